"""The paper's ablations: the ladder without one of its parts, as commands like those of ladder.py.

    python -m look.ablations --seeds 3 --limit 500 --out runs/ways --ways all --data-scale 1 0.5 4

    no1      without stage 1: stage 2, cold start and GRPO see no row of boxes
    long     the same, and stage 1's steps are added to stage 2's
    no2      without stage 2: the cold start follows stage 1
    films    after stage 1 videos alone: no single images, no views
    bare     without thinking: GRPO on bare answers after stage 2
    nocold   without a cold start: GRPO on chains after stage 2
    mixed    stages 1 and 2 shuffled together, with the steps of both
    self     the cold start on chains of the model's own

For each seed ladder.py climbs a ladder in OUT/SEED. The ways stand beside it: they start from its
rungs and have rungs of their own, such as stage2-no1. With --data-scale there are ladders in
OUT/SEED-rooms-xSCALE too; the ways are climbed at the first scale. look.compare ends it with its
tables. What is finished is not done again: the same command goes on, and one with more ways, seeds
or scales adds them. Other flags, such as --model, go to ladder.py.
"""

import shlex
import sys
from dataclasses import replace
from pathlib import Path

import ladder
from files import read_json, read_jsonl, write_jsonl
from ladder import COLDSTART, GROUNDING, RECIPES, ROOMS_MADE, RUNGS, SPATIAL, TOLD
from runtime import main_guard
from settings import Parser, check_number, positive, with_dashes

NO_BOXES = "{no_boxes}"
OWN_FILES = " --images {data}/images"  # of a rung that trains on the files in OUT/WAY
BARE = " --prompt-style direct --reward-funcs accuracy --reward-weights 1"
WAYS = {  # name -> the ladder's rung that it starts from, and flags for each rung after it
    "no1": ("base", {"stage2": NO_BOXES, "cold": NO_BOXES, "grpo": ""}),
    "long": ("base", {"stage2": NO_BOXES + "{longer}", "cold": NO_BOXES, "grpo": ""}),
    "no2": ("stage1", {"cold": "", "grpo": ""}),
    "films": (
        "stage1",
        {"stage2": NO_BOXES + OWN_FILES, "cold": NO_BOXES + OWN_FILES, "grpo": OWN_FILES},
    ),
    "bare": ("stage2", {"grpo": BARE}),
    "nocold": ("stage2", {"grpo": ""}),
    "mixed": ("base", {"stage2": NO_BOXES + "{together}", "cold": "", "grpo": ""}),
    "self": ("stage2", {"cold": OWN_FILES, "grpo": ""}),
}
STEPS_OF_BOTH = sum(RECIPES["tiny"][stage]["max_steps"] for stage in ("1", "2"))
PRESETS = {
    "tiny": {
        "longer": f" --max-steps {STEPS_OF_BOTH}",
        "together": f" --max-steps {STEPS_OF_BOTH}",
        "no_boxes": " --replay {data}/" + TOLD,
        "sampling": "--limit 150 --per-question 2 --batch-size 32 --max-completion-length 64 "
        "--temperature 0.5",  # at 1 this teacher writes hardly a chain that is well formed
    },
    "paper": {
        "longer": " --epochs 1.287",  # (5,929 + 20,680) / 20,680 rows
        "together": "",  # one epoch of both files
        "no_boxes": "",  # nothing is replayed
        "sampling": "--limit 400 --per-type 180",
    },
}


def own_rungs(name):
    """Yield (rung, its flags) of one way."""
    start, flags = WAYS[name]
    for rung in RUNGS:
        if rung.name in flags:
            own = replace(rung, name=f"{rung.name}-{name}", start=start)
            if name == "bare":
                own = replace(own, style="direct")
            if own.name == "stage2-mixed":
                own = replace(own, files=(GROUNDING, SPATIAL))
            yield own, flags[rung.name]
            start = own.name


def own_chains(args):
    """Yield the commands that sample chains of the model's own and keep those that end right."""
    model = f"{args.out}/stage2"
    if args.preset == "tiny":
        # The tiny model never writes a chain before it has seen some; the 3B does when asked to.
        model = f"{args.out}/teacher"
        cold = RUNGS[3]
        yield None, ladder.train(args, replace(cold, name="teacher"), flags=" --max-steps 150")
    yield (
        None,
        f"{args.python} coldstart.py --model {model} --data {args.data}/{SPATIAL} "
        f"--out {args.out}/self/{COLDSTART} --seed {args.seed} {PRESETS[args.preset]['sampling']}",
    )


def write_films(args):
    """Write the rows about videos to OUT/films. Their pictures stay where they are."""
    (data,) = shlex.split(args.data)
    folder = args.folder / "films"
    folder.mkdir(exist_ok=True)
    for name in (SPATIAL, COLDSTART):
        rows = [row for _, row in read_jsonl(Path(data) / name)]
        write_jsonl(folder / name, [row for row in rows if row["data_type"] == "video"])


def commands(args, name):
    """Yield (rung or None, command) of one way, in order."""
    if name == "self":
        yield from own_chains(args)
    for rung, flags in own_rungs(name):
        files = None
        if OWN_FILES in flags:
            files = " ".join([f"{args.out}/{name}/{file}" for file in rung.files])
        slots = dict(PRESETS[args.preset])
        if args.preset == "tiny" and not args.rooms:  # then there are no texts of the base
            slots["no_boxes"] = " --replay-ratio 0"
        for slot, text in slots.items():
            flags = flags.replace("{" + slot + "}", text)
        flags = flags.format(data=args.data)  # last: a slot's text may name the folder too
        yield from ladder.steps(args, rung, files, flags)


def climb(args, names):
    """Climb ways beside the ladder in args.out; results.json and the report then hold them too."""
    rungs = read_json(args.folder / "results.json")["rungs"]
    for name in names:
        if name == "films":
            write_films(args)
        ladder.climb(args, commands(args, name), rungs)
    ladder.run(f"python -m look.report {args.out}")


def main():
    parser = Parser(__doc__)
    parser.add_argument("--out", default="runs/ways", help="folder of all ladders")
    parser.add_argument("--seeds", type=int, default=1, help="how many ladders, from seed 0 on")
    parser.add_argument("--ways", nargs="+", choices=(*WAYS, "all"), default=[])
    parser.add_argument(
        "--data-scale", type=float, nargs="+", default=[1.0], help="preset tiny: share of the rooms"
    )
    args, others = parser.parse_known_args(map(with_dashes, sys.argv[1:]))
    check_number("seeds", args.seeds, positive)
    names = WAYS if "all" in args.ways else args.ways

    folders = []
    for scale in args.data_scale:
        for seed in range(args.seeds):
            folder = f"{args.out}/{seed}"
            if scale != 1:
                folder += f"-rooms-x{scale:g}"
            scenes = round(scale * ROOMS_MADE)
            words = [*others, "--out", folder, "--seed", str(seed), "--scenes", str(scenes)]
            own = ladder.settings(words)
            if not own.test:
                parser.error("--test is missing; without it there is nothing to compare")
            ladder.run(f"python ladder.py {shlex.join(words)}")
            if scale == args.data_scale[0] and names:
                climb(own, names)
            folders.append(folder)
    ladder.run(f"python -m look.compare {shlex.join(folders)}")


if __name__ == "__main__":
    main_guard(main)
