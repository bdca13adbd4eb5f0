"""The curriculum on one page: the rungs, the recipes, and a short runner that climbs them.

    python ladder.py             # rooms, a tiny model, four trainings, five evaluations, a report
    python ladder.py --smoke     # the same with hardly any steps, to see that everything works
    python ladder.py --preset paper --model Qwen2.5-VL-3B-Instruct --data SpatialLadder-26k \\
        --nproc-per-node 4

    see         stage 1   SFT: the boxes of the objects that a question names, as JSON
    understand  stage 2   SFT: seven kinds of spatial questions about images, views and videos
    reason      cold      SFT: chains of thought that end in the right answer
                grpo      RL: groups of sampled chains, rewarded for format and accuracy

Each command is printed before it runs, and a person can type it as well. When the ladder stops, the
same command goes on from there. The trainers read RECIPES. This file needs no torch.
"""

import os
import shlex
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from files import (
    CONFIG,
    MADE_OF,
    UserError,
    claim,
    made_of,
    read_json,
    read_jsonl,
    text_table,
    write_json,
)
from settings import MAY_CHANGE, Parser, add_flags, positive, values

# ---------------------------------------------------------------------------------- the rungs

GROUNDING = "spld_grounding_data.jsonl"
SPATIAL = "spld_spatial_data.jsonl"
COLDSTART = "spld_coldstart_data.jsonl"
TOLD = "told_data.jsonl"  # of rooms: texts that the base can already answer


@dataclass(frozen=True)
class Rung:
    """One step of the curriculum: a model, how it is trained and how it is asked."""

    name: str  # of its folder too
    stage: str  # row of RECIPES that trains it; None: nothing does
    start: str  # the rung whose model it starts from
    files: tuple  # what it is trained on
    style: str  # evaluation asks for a chain of thought ("thinking") or the bare answer ("direct")
    what: str  # what the model has learned, in a few words


RUNGS = (
    Rung("base", None, None, (), "direct", "can see and speak, but knows no task yet"),
    Rung("stage1", "1", "base", (GROUNDING,), "direct", "says where objects are, as boxes"),
    Rung("stage2", "2", "stage1", (SPATIAL,), "direct", "answers seven kinds of question"),
    Rung("cold", "cold", "stage2", (COLDSTART,), "thinking", "writes its reasoning first"),
    Rung("grpo", "grpo", "cold", (SPATIAL,), "thinking", "has learned from its own attempts"),
)

# ---------------------------------------------------------------------------------- preset tiny
# A model of 2.3 M weights on one CPU core, 14 minutes in all. All numbers were measured on this
# model; docs/miniature.md says what else was tried.

BASE = "base"  # folder of the repository: a small model that can see and speak already
ROOMS = "runs/tiny/rooms/train/"
ROOMS_MADE = 3600  # training rooms: with these steps no stage reads a row of its own twice

TINY = {
    # Two threads take 0.7 of the time while nothing else runs, and three times as long beside one
    # busy program (docs/speed.md). With one thread the numbers are the same on any machine's cores.
    "threads": 1,
    "weight_decay": 0.05,
    "betas": [0.9, 0.95],
    "warmup_ratio": 0.03,
}
TINY_SFT = TINY | {"epochs": 1000.0}  # that is, max_steps decides
# A small model soon forgets what it no longer reads (docs/trials.md). So all three SFT stages
# replay texts of the base. The second and the cold start replay boxes too.
TINY_SEE = TINY_SFT | {"replay": [ROOMS + TOLD], "replay_ratio": 0.3}
TINY_REPLAY = TINY_SFT | {"replay": [ROOMS + GROUNDING, ROOMS + TOLD], "replay_ratio": 0.4}

# ---------------------------------------------------------------------------------- preset paper
# The authors' scripts (run_spld_*.sh) and their answers (issues 2, 5 and 6 of their repository):
# images and frames of 16 to 128 x 28 x 28 pixels, one epoch. A step has 8 rows: their figures show
# 2,585 steps for 20,680 rows. The rest is about memory and does not change the result.

PAPER = {
    "min_pixels": 16 * 28 * 28,
    "max_pixels": 128 * 28 * 28,
    "input_as": "authors",  # resized twice: a picture of theirs has 108 tokens, not 117
    "micro_batch": 1,
    "save_every": 200,
    "keep_last": 1,
    "activation_checkpointing": True,
}
# The defaults have the rest of theirs: learning rate 1e-5 with cosine decay, no weight decay.
PAPER_SFT = PAPER | {"warmup_ratio": 0.1, "workers": 4}

RECIPES = {  # preset -> stage -> what differs from settings.SETTINGS
    "tiny": {
        # A base from random weights: texts first, then pictures (docs/base.md).
        "base": TINY_SFT
        | {
            "model": "runs/base/start",
            "data": ["runs/base/rooms/train/base_data.jsonl"],
            "out": "runs/base/model",
            "curriculum": 0.005,
            "max_steps": 12000,
            "learning_rate": 1e-3,
            "batch_size": 32,
            "micro_batch": 16,
            "save_every": 500,
            "keep_last": 1,
        },
        # A higher rate or more steps: better boxes, worse answers (docs/miniature.md).
        "1": TINY_SEE
        | {
            "model": BASE,
            "data": [ROOMS + GROUNDING],
            "out": "runs/tiny/stage1",
            "max_steps": 800,
            "learning_rate": 3e-4,
        },
        "2": TINY_REPLAY
        | {
            "model": "runs/tiny/stage1",
            "data": [ROOMS + SPATIAL],
            "out": "runs/tiny/stage2",
            "max_steps": 500,
            "learning_rate": 3e-4,
        },
        "cold": TINY_REPLAY
        | {
            "model": "runs/tiny/stage2",
            "data": [ROOMS + COLDSTART],
            "out": "runs/tiny/cold",
            "max_steps": 200,
            "learning_rate": 4e-4,
        },
        # 200 steps of 8 prompts x 8 completions. At temperature 1 most samples have a slip; what is
        # learned from them does not help greedy answers (docs/miniature.md).
        "grpo": TINY
        | {
            "model": "runs/tiny/cold",
            "data": [ROOMS + SPATIAL],
            "out": "runs/tiny/grpo",
            "max_steps": 200,
            "learning_rate": 6e-5,
            "temperature": 0.5,
            "max_completion_length": 64,
        },
    },
    "paper": {
        "base": PAPER_SFT,  # Qwen2.5-VL can see and speak already
        "1": PAPER_SFT,
        "2": PAPER_SFT,
        "cold": PAPER_SFT,
        # Theirs: 1e-6 with linear decay and no warm-up, G = 4, beta 0.01, 1,024 tokens (the last
        # two are the defaults). A micro-batch of the whole group computes its prompt once;
        # sampling, not the update, sets the peak of memory.
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
# preset -> flags of its evaluations. The authors' pictures are larger there (run_eval.sh).
EVALUATION = {
    "tiny": " --threads 1",
    "paper": " --min-pixels 12544 --max-pixels 401408 --input-as authors",
}
SMOKE = {"1": 4, "2": 4, "cold": 4, "grpo": 4}  # optimizer steps of --smoke

# What the bare commands of preset tiny need, and the command that makes it, before what that
# command itself needs. Rooms are made unasked; a training takes long and is only named.
MADE_BY = {
    "runs/tiny/stage1": "python train_sft.py --stage 1",
    "runs/tiny/stage2": "python train_sft.py --stage 2",
    "runs/tiny/cold": "python train_sft.py --stage cold",
    "runs/base/start": "python -m rooms.tiny --data runs/base/rooms/train runs/tiny/rooms/train "
    "--out runs/base/start",
    "runs/base/rooms": "python -m rooms.scenes --tasks base --out runs/base/rooms "
    "--scenes 12000 --test-scenes 400 --seed 1 --view-categories 3 5",
    "runs/tiny/rooms": "python -m rooms.scenes --out runs/tiny/rooms",
}

# ---------------------------------------------------------------------------------- the commands


def model_of(args, name):
    """The model directory of a rung."""
    return args.model if name == "base" else f"{args.out}/{name}"


def train(args, rung, files=None, flags=""):
    """The command that trains a rung. files: to train on, in place of those in --data."""
    script = "grpo.py"
    if rung.stage != "grpo":
        script = f"train_sft.py --stage {rung.stage}"
    elif args.rooms and not files:
        # Rooms that nothing is trained on: does a higher reward mean better answers? With --images
        # (files of an ablation) their pictures would be looked for in the wrong folder.
        flags += f" --eval-every 25 --eval-data {args.rooms}/val/{SPATIAL}"
    replayed = []
    for file in RECIPES[args.preset][rung.stage].get("replay", ()):
        name = Path(file).name
        if args.rooms or name != TOLD:  # only rooms have texts of the base
            replayed.append(f"{args.data}/{name}")
    if replayed:
        # First, so that an ablation can name other files: the last --replay counts.
        flags = f" --replay {' '.join(replayed)}{flags}"
    if args.smoke:
        flags += f" --max-steps {SMOKE[rung.stage]}"
    files = files or " ".join([f"{args.data}/{name}" for name in rung.files])
    return (
        f"{args.python} {script} --preset {args.preset} --model {model_of(args, rung.start)} "
        f"--data {files} --out {args.out}/{rung.name} --seed {args.seed}{flags} --resume auto"
    )


def evaluate(args, rung, data, limit, folder="eval"):
    """The command that asks a rung questions in its own style.

    The best guess without a look at the picture is made from the answers in the training rows.
    """
    # As many tokens as GRPO lets a completion have; 1,024 is the default of both scripts.
    length = RECIPES[args.preset]["grpo"].get("max_completion_length", 1024)
    line = (
        f"{args.python} eval.py --model {model_of(args, rung.name)} --bench rooms --data {data} "
        f"--blind-from {args.data} --out {args.out}/{folder}/{rung.name} "
        f"--prompt-style {rung.style} --max-completion-length {length}{EVALUATION[args.preset]}"
    )
    return f"{line} --limit {limit}" if limit else line


def steps(args, rung, files=None, flags=""):
    """Yield (None, the command that trains a rung) and (the rung, the command that scores it)."""
    if rung.stage:
        yield None, train(args, rung, files, flags)
    if args.test:
        yield rung, evaluate(args, rung, args.test, args.limit)


def commands(args):
    """Yield (rung or None, command) of the whole ladder, in order."""
    if args.rooms:
        rooms = f"--out {args.rooms} --seed {args.seed} --scenes {args.scenes}"
        tested = 4 * args.limit + 40  # a room has some types of question, not all
        yield None, f"python -m rooms.scenes {rooms} --test-scenes {tested}"
    for rung in RUNGS:
        yield from steps(args, rung)
        if rung.name == "stage2" and args.rooms:
            # Training rows too: does it know them by heart? The report compares.
            yield None, evaluate(args, rung, args.data, min(20, args.limit), "eval-train")


def launch(words):
    """Start a command of this project from any folder. Returns: the process.

    words: as a person types them here: python FILE.py, python -m PACKAGE.MODULE, torchrun FILE.py.
    """
    home = Path(__file__).resolve().parent
    # Scripts and modules are found next to this file, data and runs in the folder of the user.
    words = [str(home / word) if word.endswith(".py") else word for word in map(str, words)]
    program = {"python": [], "torchrun": ["-m", "torch.distributed.run"]}[words[0]]
    paths = [str(home), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
    return subprocess.Popen([sys.executable, *program, *words[1:]], env=environment)


def run(command):
    """Print a command as a person types it and run it. Where it fails the ladder ends."""
    print(f"\n$ {command}", flush=True)
    child = launch(shlex.split(command))
    stopped = []

    def stop(number, frame):
        """Wait for the command: it saves its state and ends."""
        stopped.append(number)
        if number == signal.SIGTERM:  # Ctrl-C reaches the command without our help
            child.terminate()

    # Between two commands a signal ends the ladder as it ends any script, so the handlers are put
    # back after each one.
    numbers = (signal.SIGINT, signal.SIGTERM)
    before = [signal.signal(number, stop) for number in numbers]
    code = child.wait()
    if code < 0:  # ended by a signal
        code = 128 - code
    if stopped and not code:  # a trainer that was told to stop has saved and ends well
        code = 128 + stopped[0]  # what a shell says of a command that a signal ended
    for number, handler in zip(numbers, before):
        signal.signal(number, handler)
    if code:
        print(f"stopped (exit code {code}); the same command goes on from here", file=sys.stderr)
        sys.exit(code)


# ---------------------------------------------------------------------------------- the results


def result(args, rung):
    """What results.json says of a rung that has been evaluated."""
    scores = read_json(args.folder / "eval" / rung.name / "scores.json")
    seconds = scores["seconds"]
    if rung.stage:
        log = read_jsonl(args.folder / rung.name / "log.jsonl")
        seconds += sum(row["step_time"] for _, row in log)
    return {"name": rung.name, "style": rung.style, "seconds": seconds, "scores": scores}


def lesson(rung, scores):
    """One line on what a rung is worth."""
    boxes = scores["localization"]["mean_iou"]
    return (
        f"--> {rung.name} {rung.what}: boxes overlap the true ones by {boxes:.2f}, questions score "
        f"{scores['overall']:.3f}; a guess without the picture scores {scores['blind']:.3f}"
    )


def table(rungs):
    """The rungs of results.json as text: a line for each question type, a column for each rung."""
    columns = []  # for each rung, {line: {"score", "blind"}}
    for rung in rungs:
        scores = rung["scores"]
        mean = {"score": scores["overall"], "blind": scores["blind"]}
        columns.append({"boxes (IoU)": scores["localization"], **scores["types"], "mean": mean})
    lines = [["", *[rung["name"] for rung in rungs], "blind guess"]]
    # All rungs are asked the same questions, so one blind guess goes for all.
    for name, part in columns[-1].items():
        numbers = [column[name]["score"] for column in columns]
        lines.append([name, *[f"{number:.3f}" for number in [*numbers, part["blind"]]]])
    return text_table(lines)


# ---------------------------------------------------------------------------------- the climb


def settings(argv=None):
    """The flags; paths are quoted, as a shell needs them. `folder` is --out as it is."""
    parser = Parser(__doc__)
    add_flags(parser, ("model", "seed"))
    parser.add_argument("--preset", choices=tuple(RECIPES), default="tiny", help="of RECIPES")
    parser.add_argument("--data", help="folder of training rows (default: rooms are made)")
    parser.add_argument("--test", help="folder of rows to score each rung on")
    parser.add_argument("--out", help="folder of the whole run (default: runs/PRESET)")
    parser.add_argument("--limit", type=int, help="questions of each type (default: 150 in rooms)")
    parser.add_argument("--scenes", type=int, default=ROOMS_MADE, help="training rooms to make")
    parser.add_argument("--smoke", action="store_true", help="hardly any steps and rooms")
    parser.add_argument("--nproc-per-node", type=int, default=1, help="processes, one for each GPU")
    # These numbers are no rows of settings.SETTINGS, so their checks stand here.
    parser.checks |= dict.fromkeys(("limit", "scenes", "nproc_per_node"), positive)
    args = parser.parse_args(argv)
    args.python = "python"
    if args.nproc_per_node > 1:
        # After Ctrl-C each process has ten minutes to finish its step and to save its state.
        processes = f"--nproc-per-node={args.nproc_per_node}"
        args.python = f"torchrun --standalone {processes} --shutdown-timeout=600"
    folder = f"runs/{args.preset}"
    if args.preset == "paper":
        parser.need(args, "model", "data")
    if args.smoke:
        args.scenes = 40
        args.limit = 4
        folder += "-smoke"
    if not (args.data or args.limit):
        args.limit = 150
    # With others of these it is another ladder. look/ reads them from OUT/config_run.json.
    names = ("preset", "model", "data", "test", "seed", "limit", "scenes", "smoke")
    args.config = values(args, names)

    args.folder = Path(args.out or folder)
    args.out = shlex.quote(str(args.folder))
    args.base = args.model or os.path.relpath(Path(__file__).parent / BASE)
    args.model = shlex.quote(args.base)
    args.test = args.test and shlex.quote(args.test)
    if args.data:
        args.rooms = None
        args.data = shlex.quote(args.data)
    else:
        args.rooms = f"{args.out}/rooms"
        args.data = f"{args.rooms}/train"
        args.test = args.test or f"{args.rooms}/test"
    return args


def climb(args, commands, rungs):
    """Run commands. After each evaluation add the rung to `rungs` and write results.json."""
    for rung, command in commands:
        run(command)
        if rung:
            rungs.append(result(args, rung))
            print(lesson(rung, rungs[-1]["scores"]), flush=True)
            results = {"preset": args.preset, "seed": args.seed, "rungs": rungs}
            write_json(args.folder / "results.json", results)


def main():
    args = settings()
    # A new folder, or this very ladder, which then goes on. Other test rows are no other ladder:
    # eval.py answers what it has not answered.
    data = args.config["data"]
    rows = data and [Path(data) / name for name in (GROUNDING, SPATIAL, COLDSTART)]
    config = args.config | {MADE_OF: made_of(args.base, {"data": rows})}
    claim(args.folder, config, (*MAY_CHANGE, "test"))
    write_json(args.folder / CONFIG, config)

    rungs = []
    climb(args, commands(args), rungs)
    run(f"python -m look.report {args.out}")
    if rungs:
        print(table(rungs))


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        print(f"ladder.py: {error}", file=sys.stderr)
        sys.exit(2)
