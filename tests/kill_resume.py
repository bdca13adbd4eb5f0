"""kill -9 a training run at random moments, go on each time with the same command, and look at what is left.

    python tests/kill_resume.py --kills 50                          # makes a few rooms and a tiny model first
    python tests/kill_resume.py --kills 20 --nproc-per-node 2 --script grpo

Every time: the directory continues without help; a model directory, once visible, is whole; no more than --save-every
steps are done again; and a run that is done has the very weights and log of one that nobody disturbed.
"""

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[1]
SAVE_EVERY, STEPS = 2, 16
FLAGS = {
    "train_sft": ["--stage", "1", "--batch-size", "4", "--data", "spld_grounding_data.jsonl"],
    "grpo": [
        "--prompts-per-step",
        "2",
        "--num-generations",
        "3",
        "--max-completion-length",
        "8",
        "--num-iterations",
        "2",
        "--data",
        "spld_spatial_data.jsonl",
    ],
}
CLOCK = ("time", "per_second")  # endings of the log's keys that depend on it


def tree(pid):
    """A process and all that it has started, parents first."""
    pids = [pid]
    for task in Path(f"/proc/{pid}/task").glob("*/children"):
        for child in task.read_text().split():
            pids += tree(int(child))
    return pids


def log_of(out):
    lines = (
        (out / "log.jsonl").read_text().split("\n")[:-1] if (out / "log.jsonl").is_file() else []
    )
    return [
        {key: value for key, value in json.loads(line).items() if not key.endswith(CLOCK)}
        for line in lines
    ]


def start(command, said):
    """Start the command and wait until it has looked at its directory."""
    with open(said, "w") as file:
        process = subprocess.Popen(
            command,
            stdout=file,
            stderr=subprocess.STDOUT,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
    while process.poll() is None and "settings:" not in said.read_text():
        time.sleep(0.01)
    return process


def disturb(folder, train, model, kills, script="train_sft", processes=1, seed=0):
    """Kill `kills` runs of a script. train, model: rooms and model directory. AssertionError if anything is lost."""
    rng, killed, finished, repeated = random.Random(seed), 0, 0, 0
    torchrun = (
        ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
        if processes > 1
        else []
    )
    flags = [train / word if word.endswith(".jsonl") else word for word in FLAGS[script]]
    command = list(
        map(
            str,
            (
                sys.executable,
                *torchrun,
                REPOSITORY / f"{script}.py",
                *flags,
                "--model",
                model,
                "--resume",
                "auto",
                "--max-steps",
                STEPS,
                "--save-every",
                SAVE_EVERY,
                "--out",
            ),
        )
    )
    whole, out, said = folder / "whole", folder / "run0", folder / "said.txt"
    process, began = start([*command, str(whole)], said), time.time()
    assert process.wait() == 0, said.read_text()
    lasts = time.time() - began  # from the look at the directory to the end
    weights = (whole / "model.safetensors").read_bytes()
    while killed < kills:
        process = start([*command, str(out)], said)
        moment = time.time() + rng.uniform(0, lasts)
        while process.poll() is None and time.time() < moment:
            time.sleep(0.002)
        if process.poll() is None:
            for pid in tree(process.pid):
                try:
                    os.kill(pid, signal.SIGKILL)
                except ProcessLookupError:  # ended by itself in the meantime
                    pass
            killed += process.wait() == -signal.SIGKILL
        assert process.returncode in (0, -signal.SIGKILL), (
            said.read_text()
        )  # it came as far as it was let
        steps, states = log_of(out), sorted((out / "resume").glob("step-??????"))
        ahead = len(steps) - (int(states[-1].name[-6:]) if states else 0)
        repeated = max(repeated, ahead * (not (out / "config.json").exists()))
        assert repeated <= SAVE_EVERY, (ahead, states)
        assert [row["step"] for row in steps] == list(range(1, len(steps) + 1))
        if (out / "config.json").exists():  # all is visible, so all is there
            assert (out / "model.safetensors").read_bytes() == weights and steps == log_of(whole)
            assert {path.name for path in model.iterdir()} <= {path.name for path in out.iterdir()}
            finished += 1
            out = folder / f"run{finished}"
    return f"{killed} kills, {finished} runs ended, at most {repeated} steps done again (--save-every {SAVE_EVERY})"


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--script", choices=tuple(FLAGS), default="train_sft")
    parser.add_argument("--nproc-per-node", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        rooms, model = Path(folder) / "rooms", Path(folder) / "base"
        for made in (
            ["scenes.py", "--out", rooms, "--scenes", "12", "--test-scenes", "2"],
            ["tiny.py", "--data", rooms / "train", "--out", model],
        ):
            subprocess.run(
                [sys.executable, *map(str, (REPOSITORY / made[0], *made[1:]))], check=True
            )
        print(
            disturb(
                Path(folder),
                rooms / "train",
                model,
                args.kills,
                args.script,
                args.nproc_per_node,
                args.seed,
            )
        )


if __name__ == "__main__":
    main()
