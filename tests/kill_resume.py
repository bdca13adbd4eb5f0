"""kill -9 a training run at random moments, go on each time with the same command, and look at it.

    python tests/kill_resume.py --kills 50          # makes a few rooms and a tiny model first
    python tests/kill_resume.py --kills 20 --nproc-per-node 2 --script grpo
    python tests/kill_resume.py --race 20           # two processes start in one folder each time

Every time: the directory continues without help; a model directory, once visible, is whole; no more
than --save-every steps are done again; and a run that is done has the very weights and log of one
that nobody disturbed. Of two that race for a folder one trains, and the other ends with one line.
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
from contextlib import suppress
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[1]
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}
SAVE_EVERY, STEPS = 2, 16
FLAGS = {
    "train_sft": (*("--stage", "1", "--batch-size", "4"), "--data", "spld_grounding_data.jsonl"),
    "grpo": (
        *("--prompts-per-step", "2", "--num-generations", "3", "--max-completion-length", "8"),
        *("--num-iterations", "2", "--data", "spld_spatial_data.jsonl"),
    ),
}
CLOCK = ("time", "per_second")  # endings of the log's keys that depend on it


# ---------------------------------------------------------------------------------- processes


def command(processes, script, *flags):
    """The words that start a script, under torchrun where there are several processes."""
    torchrun = []
    if processes > 1:
        torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    return [sys.executable, *torchrun, *map(str, (script, *flags))]


def tree(pid):
    """A process and all that it has started, parents first."""
    pids = [pid]
    for task in Path(f"/proc/{pid}/task").glob("*/children"):
        for child in task.read_text().split():
            pids += tree(int(child))
    return pids


def kill(process):
    """kill -9 it and all that it has started. Returns: whether it was killed in time."""
    for pid in tree(process.pid):
        with suppress(ProcessLookupError):  # ended by itself in the meantime
            os.kill(pid, signal.SIGKILL)
    return process.wait() == -signal.SIGKILL


def start(words, said):
    """Start a training and wait until it has looked at its directory. said: file of its output."""
    with open(said, "w") as file:
        process = subprocess.Popen(words, stdout=file, stderr=subprocess.STDOUT, env=ENVIRONMENT)
    while process.poll() is None and "settings:" not in said.read_text():
        time.sleep(0.01)
    return process


# ---------------------------------------------------------------------------------- what is left


def log_of(out):
    """The whole lines of the log but for what depends on the clock."""
    if not (out / "log.jsonl").is_file():
        return []
    rows = []
    for line in (out / "log.jsonl").read_text().split("\n")[:-1]:
        row = json.loads(line)
        rows.append({key: value for key, value in row.items() if not key.endswith(CLOCK)})
    return rows


def steps_ahead(out):
    """How many steps of the log stand behind the newest trainer state."""
    steps = [row["step"] for row in log_of(out)]
    assert steps == list(range(1, len(steps) + 1)), steps
    states = sorted((out / "resume").glob("step-??????"))
    saved = int(states[-1].name[-6:]) if states else 0
    return len(steps) - saved


def assert_whole(out, undisturbed, model):
    """A directory with config.json in it has everything, the same as a run that was left alone."""
    assert log_of(out) == log_of(undisturbed)
    weights, expected = (folder / "model.safetensors" for folder in (out, undisturbed))
    assert weights.read_bytes() == expected.read_bytes()
    files = {path.name for path in out.iterdir()}
    assert {path.name for path in model.iterdir()} <= files, files


# ---------------------------------------------------------------------------------- the disturbance


def training(train, model, script="train_sft", processes=1):
    """The words of a training, less its --out. train, model: rooms and model directory."""
    flags = [train / word if word.endswith(".jsonl") else word for word in FLAGS[script]]
    flags += ["--model", model, "--resume", "auto"]
    flags += ["--max-steps", STEPS, "--save-every", SAVE_EVERY, "--out"]
    return command(processes, REPOSITORY / f"{script}.py", *flags)


def undisturbed(words, folder):
    """Train to the end. Returns: --out; the seconds from the look at the directory to the end."""
    whole, said = folder / "whole", folder / "said.txt"
    process = start([*words, str(whole)], said)
    began = time.time()
    assert process.wait() == 0, said.read_text()
    return whole, time.time() - began


def start_both(words, folder):
    """Start a training twice at the same moment and wait until one has ended.

    Returns: (process, file of its output) of the one that has ended, and of the other.
    """
    both = []
    for name in ("one.txt", "two.txt"):
        said = folder / name
        with open(said, "w") as file:
            process = subprocess.Popen(words, stdout=file, stderr=file, env=ENVIRONMENT)
        both.append((process, said))
    while all(process.poll() is None for process, _ in both):
        time.sleep(0.01)
    return sorted(both, key=lambda one: one[0].poll() is None)


def race(folder, train, model, tries, seed=0):
    """Let two trainings race for one --out, and kill the one that has it at a random moment.

    Returns: a sentence. AssertionError if both train, none does, or anything is lost.
    """
    rng = random.Random(seed)
    words = training(train, model)
    whole, lasts = undisturbed(words, folder)
    finished = late = 0
    for _ in range(tries):
        out = folder / f"run{finished}"
        (first, said), (other, others) = start_both([*words, str(out)], folder)
        if first.returncode == 0:  # it was done before the other looked at the directory
            late += 1
            assert other.wait() == 0, others.read_text()
            assert "finished already" in others.read_text()
        else:
            assert first.returncode == 2, said.read_text()
            assert "another process is at work there" in said.read_text()
            assert len(said.read_text().splitlines()) == 1, said.read_text()
            moment = time.time() + rng.uniform(0, lasts)
            while other.poll() is None and time.time() < moment:
                time.sleep(0.002)
            if other.poll() is None:
                kill(other)
            assert other.returncode in (0, -signal.SIGKILL), others.read_text()
        steps_ahead(out)  # every step once, in order
        if (out / "config.json").exists():
            assert_whole(out, whole, model)
            finished += 1
    return f"{tries} races ({late} that one was late for), {finished} runs ended, one log each"


def disturb(folder, train, model, kills, script="train_sft", processes=1, seed=0):
    """Kill `kills` runs of a script, one after another, each in an --out until that is finished.

    Args:    train, model: rooms and model directory.
    Returns: a sentence. AssertionError if anything is lost.
    """
    rng = random.Random(seed)
    words = training(train, model, script, processes)
    whole, lasts = undisturbed(words, folder)

    killed = finished = repeated = 0
    while killed < kills:
        out = folder / f"run{finished}"
        said = folder / "said.txt"
        process = start([*words, str(out)], said)
        moment = time.time() + rng.uniform(0, lasts)
        while process.poll() is None and time.time() < moment:
            time.sleep(0.002)
        if process.poll() is None:
            killed += kill(process)
        # It came as far as it was let.
        assert process.returncode in (0, -signal.SIGKILL), said.read_text()
        ahead = steps_ahead(out)
        if (out / "config.json").exists():
            assert_whole(out, whole, model)
            finished += 1
        else:
            assert ahead <= SAVE_EVERY, ahead
            repeated = max(repeated, ahead)
    return (
        f"{killed} kills, {finished} runs ended, at most {repeated} steps done again "
        f"(--save-every {SAVE_EVERY})"
    )


def make(module, *flags):
    words = [sys.executable, "-m", module, *map(str, flags)]
    subprocess.run(words, check=True, cwd=REPOSITORY)


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--race", type=int, help="start two at once, so many times")
    parser.add_argument("--script", choices=tuple(FLAGS), default="train_sft")
    parser.add_argument("--nproc-per-node", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        train, model = folder / "rooms" / "train", folder / "base"
        make("rooms.scenes", "--out", folder / "rooms", "--scenes", 12, "--test-scenes", 2)
        make("rooms.tiny", "--data", train, "--out", model)
        if args.race:
            print(race(folder, train, model, args.race, args.seed))
            return
        processes = args.nproc_per_node
        print(disturb(folder, train, model, args.kills, args.script, processes, args.seed))


if __name__ == "__main__":
    main()
