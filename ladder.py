"""The curriculum on one page: what every stage starts from, reads and how it trains; `main` climbs it.

    python ladder.py                     # the whole ladder on procedural rooms and a tiny model, on a laptop
    python ladder.py --smoke             # the same with hardly any steps, to see that everything works
    python ladder.py --cold-start self   # the last two rungs once more, on chains of the model's own, beside the first
    python ladder.py --without stage1 --mixed   # other ways up, beside the ladder: what is each rung worth?
    python ladder.py --seeds 3 --limit 500 --out runs/seeds     # three ladders, and what they say together
    python ladder.py --preset paper --model Qwen2.5-VL-3B-Instruct --data SpatialLadder-26k --nproc-per-node 4

    see         stage 1   SFT: the boxes of the objects a question names, as JSON
    understand  stage 2   SFT: seven kinds of spatial questions over pictures, sets of views and video
    reason      cold      SFT: chains of thought that end in the right answer
                grpo      RL: groups of sampled chains, rewarded for format and accuracy, held near the cold start

main prints each command before it runs it: the same commands can be typed by hand. This file imports no other of
the project; the trainers read their settings from RECIPES here.
"""

import argparse
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections import namedtuple
from pathlib import Path

BASE = "base"  # in the repository: a small model that sees and speaks already
ROOMS = "runs/tiny/rooms/train/"
GROUNDING = "spld_grounding_data.jsonl"
SPATIAL = "spld_spatial_data.jsonl"
COLDSTART = "spld_coldstart_data.jsonl"

# ---------------------------------------------------------------------------------- tiny
# 2 CPU cores, 15 minutes in all. Rates and lengths were measured on this model.
TINY = {"weight_decay": 0.05, "betas": [0.9, 0.95], "warmup_ratio": 0.03, "epochs": 1000.0}
BOXES = {"replay": [ROOMS + GROUNDING], "replay_ratio": 0.2}  # keep seeing while learning to speak

# ---------------------------------------------------------------------------------- paper
# The authors' scripts (run_spld_*.sh) and answers (issues 2, 5, 6): pictures and frames of 16 to
# 128 x 28 x 28 pixels, 8 rows a step (read off their figures: 2,585 steps = 20,680 rows / 8).
PAPER = {
    "min_pixels": 16 * 28 * 28,
    "max_pixels": 128 * 28 * 28,
    "micro_batch": 1,
    "workers": 4,
    "save_every": 200,
    "keep_last": 1,
    "activation_checkpointing": True,
}
PAPER_SFT = PAPER | {"learning_rate": 1e-5, "lr_scheduler_type": "cosine", "warmup_ratio": 0.1}

RECIPES = {  # preset -> stage -> what differs from settings.SETTINGS
    "tiny": {
        "base": TINY
        | {
            "model": "runs/base/start",
            "data": ["runs/base/rooms/train/base_data.jsonl"],
            "out": "runs/base/model",
            "curriculum": 0.5,
            "max_steps": 5500,
            "learning_rate": 6e-4,
            "batch_size": 16,
            "micro_batch": 16,
            "save_every": 500,
            "keep_last": 1,
        },
        "1": TINY
        | {
            "model": BASE,
            "data": [ROOMS + GROUNDING],
            "out": "runs/tiny/stage1",
            "max_steps": 600,
            "learning_rate": 4e-4,
        },
        "2": TINY
        | BOXES
        | {
            "model": "runs/tiny/stage1",
            "data": [ROOMS + SPATIAL],
            "out": "runs/tiny/stage2",
            "max_steps": 1200,
            "learning_rate": 4e-4,
        },
        "cold": TINY
        | BOXES
        | {
            "model": "runs/tiny/stage2",
            "data": [ROOMS + COLDSTART],
            "out": "runs/tiny/cold",
            "max_steps": 550,
            "learning_rate": 6e-4,
        },
        "grpo": TINY
        | {
            "model": "runs/tiny/cold",
            "data": [ROOMS + SPATIAL],
            "out": "runs/tiny/grpo",
            "epochs": 1.0,
            "max_steps": 40,
            "learning_rate": 4e-5,
            "max_completion_length": 128,
        },
    },
    "paper": {
        "base": PAPER_SFT,  # Qwen2.5-VL is one already
        "1": PAPER_SFT,
        "2": PAPER_SFT,
        "cold": PAPER_SFT,
        # lr 1e-6 with linear decay and no warm-up, G = 4, 1,024 tokens, beta 0.01. A micro-batch
        # of the whole group computes its prompt once; sampling, not the update, sets the peak.
        "grpo": PAPER
        | {
            "learning_rate": 1e-6,
            "lr_scheduler_type": "linear",
            "num_generations": 4,
            "micro_batch": 4,
            "eval_limit": 256,
        },
    },
}
# A rung: its name, the stage that trains it, the rung it starts from, its data, how it is asked, what it teaches, and
# what its command says besides, by preset.
Rung = namedtuple("Rung", "name stage start files style what flags", defaults=({},))
RUNGS = (
    Rung(
        "base",
        None,
        None,
        (),
        "direct",
        "sees and speaks, but does not know what is asked of it here",
    ),
    Rung(
        "stage1",
        "1",
        "base",
        (GROUNDING,),
        "direct",
        "learned to see: where the objects of a question are",
    ),
    Rung(
        "stage2",
        "2",
        "stage1",
        (SPATIAL,),
        "direct",
        "learned to understand: seven kinds of spatial questions",
    ),
    Rung(
        "cold",
        "cold",
        "stage2",
        (COLDSTART,),
        "thinking",
        "learned to write its reasoning down before it answers",
    ),
    Rung(
        "grpo",
        "grpo",
        "cold",
        (SPATIAL,),
        "thinking",
        "learned to reason from its own attempts and their rewards",
    ),
)


def way(name, start, first, **changes):
    """The ladder's rungs from `first` on, named after the way, begun at the rung `start`.

    Args: changes: rung of the ladder -> fields that are others on this way.
    """
    rungs = []
    for rung in RUNGS[[rung.name for rung in RUNGS].index(first) :]:
        begun = rungs[-1].name if rungs else start
        rungs.append(
            rung._replace(name=f"{rung.name}-{name}", start=begun, **changes.get(rung.name, {}))
        )
    return tuple(rungs)


def always(*flags):
    return {"flags": dict.fromkeys(RECIPES, flags)}


NO_BOXES = always("--replay-ratio", 0)
FILMS = always("--data-types", "video", "--replay-ratio", 0)
BOTH_STAGES = RECIPES["tiny"]["1"]["max_steps"] + RECIPES["tiny"]["2"]["max_steps"]
WAYS = {  # other ways up, beside the ladder, whose rungs they share as far as they go with it
    "self": way(
        "self",
        "stage2",
        "cold",
        cold={
            "files": ("self_coldstart.jsonl",),
            "what": "learned its reasoning from those of its own chains that ended right",
        },
    ),
    "stage1": way("no1", "base", "stage2", stage2=NO_BOXES, cold=NO_BOXES),
    "stage1-as-long": way(
        "long",
        "base",
        "stage2",
        cold=NO_BOXES,
        stage2={
            "flags": {  # stage 1's budget goes to stage 2
                "tiny": ("--replay-ratio", 0, "--max-steps", BOTH_STAGES),
                "paper": ("--epochs", 1.287),
            }
        },
    ),  # (5,929 + 20,680) / 20,680 rows
    "stage2": way("no2", "stage1", "cold"),
    "single,multi": way(
        "films", "stage1", "stage2", stage2=FILMS, cold=FILMS, grpo=always("--data-types", "video")
    ),
    "thinking": way(
        "bare",
        "stage2",
        "grpo",
        grpo={"style": "direct", "what": "learned from rewards to answer at once"}
        | always("--prompt-style", "direct", "--reward-funcs", "accuracy", "--reward-weights", 1),
    ),
    "cold": way("nocold", "stage2", "grpo"),
    "grpo": (),  # that is the rung below it
    "mixed": way(
        "mixed",
        "base",
        "stage2",
        stage2={
            "files": (GROUNDING, SPATIAL),
            "what": "learned boxes and questions shuffled together",
            "flags": {"tiny": ("--replay-ratio", 0, "--max-steps", BOTH_STAGES)},
        },
    ),
}
EVERY_RUNG = RUNGS + tuple(rung for rungs in WAYS.values() for rung in rungs)
TEACHERS = {  # preset -> steps of the small cold start that makes stage 2 a teacher (None: it writes chains when asked,
    # as the 3B does; the tiny model never does), and how its chains are sampled
    "tiny": (
        300,
        ["--limit", 150, "--per-question", 2, "--batch-size", 32, "--max-completion-length", 128],
    ),
    "paper": (None, ["--limit", 400, "--per-type", 180]),
}
MADE_BY = {  # what the bare commands need and the command that makes it, above what it is itself made of; trainers, which
    # take long, are named only, the other scripts run unasked
    "runs/tiny/stage1": "python train_sft.py --stage 1",
    "runs/tiny/stage2": "python train_sft.py --stage 2",
    "runs/tiny/cold": "python train_sft.py --stage cold",
    "runs/base/start": "python -m rooms.tiny --data runs/base/rooms/train runs/tiny/rooms/train --out runs/base/start",
    "runs/base/rooms": "python -m rooms.scenes --tasks base --out runs/base/rooms --scenes 16000 --test-scenes 400 --seed 1 "
    "--view-categories 3 5",
    "runs/tiny/rooms": "python -m rooms.scenes --out runs/tiny/rooms",
}
SMOKE = {"1": 4, "2": 4, "cold": 4, "grpo": 1}  # optimizer steps of --smoke


# ---------------------------------------------------------------------------------------------- climbing


def climb(args):
    """The ladder's rungs, then those of the other ways that are asked for."""
    return [
        *RUNGS,
        *(
            rung
            for name in [
                *(["self"] if args.cold_start == "self" else []),
                *args.without,
                *(["mixed"] if args.mixed else []),
            ]
            for rung in WAYS[name]
        ),
    ]


def commands(args):
    """(rung, what it is for, command) in order; a rung is None where nothing of the ladder is trained or scored."""
    out = Path(args.out)
    launch = (
        [
            "torchrun",
            "--standalone",
            f"--nproc-per-node={args.nproc_per_node}",
            "--shutdown-timeout=600",
        ]
        if args.nproc_per_node > 1
        else ["python"]
    )
    if args.preset == "tiny":
        rooms, data = out / "rooms", out / "rooms" / "train"
        made, tested = (40, 12) if args.smoke else (ROOMS_MADE, 4 * args.limit + 40)
        scenes = ["--scenes", max(1, round(made * args.data_scale[0])), "--test-scenes", tested]
        yield None, "rooms", ["python", "-m", "rooms.scenes", "--out", rooms, "--seed", args.seed, *scenes]
        models = {"base": args.model or os.path.relpath(Path(__file__).parent / BASE)}
        test = rooms / "test"
    else:
        data, models, test = Path(args.data), {"base": args.model}, args.test

    def train(stage, start, files, out, *more):
        script = ["grpo.py"] if stage == "grpo" else ["train_sft.py", "--stage", stage]
        replay = ["--replay", data / GROUNDING] if RECIPES[args.preset][stage].get("replay") else []
        return [
            *launch,
            *script,
            "--preset",
            args.preset,
            "--model",
            start,
            "--data",
            *files,
            *replay,
            "--out",
            out,
            "--seed",
            args.seed,
            *more,
            "--resume",
            "auto",
        ]

    for rung, stage, start, files, style, _, flags in climb(args):
        models.setdefault(rung, out / rung)
        if stage is not None:
            sources, more = [data / file for file in files], [*flags.get(args.preset, ())]
            more += ["--max-steps", SMOKE[stage]] if args.smoke else []
            if rung == "cold-self":
                steps, sampling = TEACHERS[args.preset]
                teacher, sources, more = (
                    models[start],
                    [out / file for file in files],
                    ["--images", data / "images"],
                )
                if steps:
                    teacher = out / "teacher"
                    yield (
                        None,
                        "teacher",
                        train(
                            "cold", models[start], [data / COLDSTART], teacher, "--max-steps", steps
                        ),
                    )
                yield (
                    None,
                    "chains",
                    [
                        *launch,
                        "grpo.py",
                        "--sample-cold-start",
                        "--model",
                        teacher,
                        "--data",
                        data / SPATIAL,
                        "--out",
                        *sources,
                        "--seed",
                        args.seed,
                        *sampling,
                    ],
                )
            if stage == "grpo" and args.preset == "tiny":
                more += ["--eval-every", 20, "--eval-data", rooms / "val" / SPATIAL]
            yield rung, "train", train(stage, models[start], sources, models[rung], *more)
        limit = (
            ["--limit", 4 if args.smoke else args.limit, "--max-completion-length", 128]
            if args.preset == "tiny"
            else []
        )
        if test:
            yield (
                rung,
                "evaluate",
                [
                    *launch,
                    "eval.py",
                    "--model",
                    models[rung],
                    "--bench",
                    "rooms",
                    "--data",
                    test,
                    "--blind-from",
                    data,
                    "--out",
                    out / "eval" / rung,
                    "--prompt-style",
                    style,
                    *limit,
                ],
            )
        if (
            rung == "stage2" and limit
        ):  # does it know its training questions by heart? signs.py compares
            yield (
                None,
                "memory",
                [
                    *launch,
                    "eval.py",
                    "--model",
                    models[rung],
                    "--bench",
                    "rooms",
                    "--data",
                    data,
                    "--out",
                    out / "eval-train" / rung,
                    "--prompt-style",
                    style,
                    *limit[2:],
                    "--limit",
                    min(20, limit[1]),
                ],
            )


def launch(words):
    """Start a command of this project from any folder. Returns: the process.

    words: as a person types them here: python FILE.py, python -m PACKAGE.MODULE, torchrun FILE.py.
    """
    home = Path(__file__).resolve().parent
    words = [str(home / word) if word.endswith(".py") else word for word in map(str, words)]
    program = {"python": [], "torchrun": ["-m", "torch.distributed.run"]}[words[0]]
    paths = [str(home), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
    return subprocess.Popen([sys.executable, *program, *words[1:]], env=environment)


def run(command):
    """Print a command as a person would type it, run it, and end the ladder where it failed."""
    print("\n$ " + shlex.join(map(str, command)), flush=True)
    child, stopped = launch(command), []

    def stop(number, frame):
        """Wait for the command, which saves its state and ends: Ctrl-C reaches it too, SIGTERM is passed on."""
        stopped.append(number)
        if number == signal.SIGTERM:
            child.terminate()

    before = [signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)]
    code = child.wait() or (128 + stopped[0] if stopped else 0)
    for number, handler in zip((signal.SIGINT, signal.SIGTERM), before):
        signal.signal(number, handler)
    if code:
        print(
            f"ladder.py: stopped (exit code {code}); the same command goes on from here",
            file=sys.stderr,
        )
        sys.exit(code)


def collect(out):
    """What results.json holds, read from the files that trainers and evaluations wrote."""
    rungs = []
    for name, _, _, _, style, *_ in EVERY_RUNG:
        scores = out / "eval" / name / "scores.json"
        if scores.is_file():
            log = out / name / "log.jsonl"
            steps = (
                [json.loads(line)["step_time"] for line in log.read_text().splitlines()]
                if log.is_file()
                else []
            )
            scores = json.loads(scores.read_text())
            rungs.append(
                {
                    "name": name,
                    "style": style,
                    "seconds": sum(steps) + scores["seconds"],
                    "scores": scores,
                }
            )
    return {"rungs": rungs}


def lesson(rungs, name):
    """One line on what a rung was worth, beside the one that it starts from."""
    start, what = next((rung.start, rung.what) for rung in EVERY_RUNG if rung.name == name)
    new, old = (
        next((rung for rung in rungs if rung["name"] == which), None) for which in (name, start)
    )
    types, found = new["scores"]["types"], new["scores"]["localization"]
    blind = sum(t["blind"] for t in types.values()) / len(types)
    changed = (
        ""
        if old is None
        else (
            f" (was {old['scores']['localization']['mean_iou']:.2f} and "
            f"{old['scores']['overall']:.3f})"
        )
    )
    return (
        f"--> {new['name']} {what}: boxes overlap the truth by {found['mean_iou']:.2f}, questions score "
        f"{new['scores']['overall']:.3f}{changed}; guessing without the picture scores {blind:.3f}"
    )


def table(rungs):
    """The terminal's table: a line per rung, a column per question type, the blind baseline below."""
    names = list(rungs[0]["scores"]["types"])
    rows = [["", "box IoU", "valid", *names, "mean", "formed", "sec"]]
    for rung in rungs:
        scores, boxes = rung["scores"], rung["scores"]["localization"]
        rows.append(
            [
                rung["name"],
                f"{boxes['mean_iou']:.2f}",
                f"{boxes['valid_json']:.0%}",
                *(f"{scores['types'][name]['score']:.2f}" for name in names),
                f"{scores['overall']:.3f}",
                f"{scores['well_formed']:.0%}",
                f"{rung['seconds']:.0f}",
            ]
        )
    blind = [rungs[-1]["scores"]["types"][name]["blind"] for name in names]
    rows.append(
        [
            "blind guess",
            f"{rungs[-1]['scores']['localization']['mean_box_iou']:.2f}",
            "",
            *(f"{b:.2f}" for b in blind),
            f"{sum(blind) / len(blind):.3f}",
            "",
            "",
        ]
    )
    heads = [
        cell.split(" ") if i > 2 else [cell] for i, cell in enumerate(rows[0])
    ]  # two-word types on two lines
    lines = [[h[0] for h in heads], [h[1] if len(h) > 1 else "" for h in heads]] + rows[1:]
    widths = [max(len(line[i]) for line in lines) for i in range(len(heads))]
    return "\n".join(
        "  ".join(
            cell.ljust(w) if i == 0 else cell.rjust(w)
            for i, (cell, w) in enumerate(zip(line, widths))
        )
        for line in lines
    )


def main():
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        usage=argparse.SUPPRESS,
    )  # an error is one line
    parser.add_argument(
        "--preset", choices=tuple(RECIPES), default="tiny", help="column of RECIPES"
    )
    parser.add_argument("--out", help="directory of the whole run (default: runs/PRESET)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--seeds",
        type=int,
        default=1,
        help="climb that many, with seeds from --seed on, and compare them",
    )
    parser.add_argument(
        "--limit",
        type=int,
        default=150,
        help="preset tiny: questions of a type that a rung is scored on",
    )
    parser.add_argument("--nproc-per-node", type=int, default=1, help="processes, one per GPU")
    parser.add_argument(
        "--cold-start",
        choices=("scenes", "self"),
        default="scenes",
        help="self: climb the last two rungs "
        "once more, on chains sampled from the model itself and kept where they end right",
    )
    parts = [name for name in WAYS if name not in ("self", "mixed")]
    parser.add_argument(
        "--without",
        nargs="+",
        default=[],
        choices=parts,
        metavar="PART",
        help="climb without a part too, beside the whole: " + " | ".join(parts),
    )
    parser.add_argument(
        "--mixed",
        action="store_true",
        help="stages 1 and 2 as one, shuffled together, beside the ladder",
    )
    parser.add_argument(
        "--data-scale",
        type=float,
        nargs="+",
        default=[1],
        help="preset tiny: how many times as many rooms, "
        "in as many steps (at 1 no row is seen twice); several: a ladder each",
    )
    parser.add_argument(
        "--smoke", action="store_true", help="hardly any steps: see that everything works"
    )
    parser.add_argument(
        "--fresh", action="store_true", help="delete what an earlier run left in --out first"
    )
    parser.add_argument(
        "--model",
        help="directory to start from; preset paper: of Qwen2.5-VL-3B-Instruct (default: base)",
    )
    parser.add_argument("--data", help="preset paper: the directory of SpatialLadder-26k")
    parser.add_argument("--test", help="preset paper: directory to evaluate on after each rung")
    args = parser.parse_args()
    if min(args.data_scale) <= 0 or (args.preset == "paper" and args.data_scale != [1]):
        parser.error(
            f"--data-scale is {min(args.data_scale)}: expected more than 0, and preset tiny"
        )
    for name, least in (("nproc_per_node", 1), ("seed", 0), ("seeds", 1), ("limit", 1)):
        if vars(args)[name] < least:
            parser.error(
                f"--{name.replace('_', '-')} is {vars(args)[name]}, expected at least {least}"
            )
    several = args.seeds * len(args.data_scale) > 1
    args.out = args.out or f"runs/{args.preset}" + "-smoke" * args.smoke + "-ladders" * several
    if args.preset == "paper" and not (args.model and args.data):
        parser.error("--preset paper needs --model and --data")
    if args.smoke and args.cold_start == "self":
        parser.error(
            "--smoke trains too little for chains of its own; --cold-start self needs the whole run"
        )
    if several and args.preset == "paper" and not args.test:
        parser.error("--seeds compares what --test measures; give --test")
    out = Path(args.out)
    if several:
        if (out / "ladder.json").is_file():
            parser.error(f"{out} holds one ladder; give another --out for several")
        same = {name: value for name, value in vars(args).items() if value}
        words = [
            word
            for name, value in same.items()
            if name not in ("out", "seed", "seeds", "data_scale")
            for word in (
                f"--{name.replace('_', '-')}",
                *(value if isinstance(value, list) else [] if value is True else [value]),
            )
        ]
        ladders = [
            (seed, scale)
            for scale in args.data_scale
            for seed in range(args.seed, args.seed + args.seeds)
        ]
        folders = [
            out / (str(seed) if scale == 1 else f"{seed}-rooms-x{scale:g}")
            for seed, scale in ladders
        ]
        for (seed, scale), folder in zip(ladders, folders):
            run(
                [
                    "python",
                    "ladder.py",
                    "--seed",
                    seed,
                    "--data-scale",
                    f"{scale:g}",
                    "--out",
                    folder,
                    *words,
                ]
            )
        return run(["python", "-m", "look.compare", *folders])
    if args.fresh and (out / "ladder.json").is_file():
        shutil.rmtree(out)
    beside = (
        "fresh",
        "nproc_per_node",
        "cold_start",
        "without",
        "mixed",
        "seeds",
    )  # the same ladder goes on with others
    asked = {key: value for key, value in vars(args).items() if key not in beside}
    try:
        out.mkdir(parents=True, exist_ok=True)
        begun = (
            json.loads((out / "ladder.json").read_text())
            if (out / "ladder.json").is_file()
            else None
        )
        if begun is None and any(out.iterdir()):
            parser.error(f"{out} holds something else; give another --out")
        if begun not in (None, asked):
            parser.error(
                f"{out} holds a ladder with other settings {begun}; give another --out, or --fresh"
            )
        (out / "ladder.json").write_text(json.dumps(asked))
    except OSError as error:
        parser.error(f"cannot write in {out}: {error.strerror}")

    # climb
    began = time.time()
    for rung, purpose, command in commands(args):
        run(command)
        if purpose == "evaluate":
            results = collect(out) | {"preset": args.preset, "seed": args.seed}
            (out / "results.json.tmp").write_text(json.dumps(results, indent=1))
            (out / "results.json.tmp").replace(out / "results.json")
            print(lesson(results["rungs"], rung), flush=True)

    # result
    run(["python", "-m", "look.signs", out])
    run(["python", "-m", "look.report", out])
    if (out / "results.json").is_file():
        print(table(results["rungs"]))
    print(
        f"the ladder took {(time.time() - began) / 60:.1f} minutes; everything is in {out}, report.html first"
    )


if __name__ == "__main__":
    main()
