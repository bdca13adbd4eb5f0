"""runtime.Run: the first signal ends a run after its step, a second one at once, stuck or not."""

import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}

# A run whose step never ends: in Python, inside of a library, or because a worker does not answer.
DRIVER = """
import ctypes, signal, sys, time
from argparse import Namespace
from pathlib import Path
from torch.utils.data import DataLoader
import runtime

class Rows:
    def __len__(self):
        return 1
    def __getitem__(self, row):
        (folder / f"worker {runtime.os.getpid()}").touch()
        ctypes.CDLL(None).sleep(100)

kind, folder = sys.argv[1], Path(sys.argv[2])
signal.alarm(120)  # the test itself may have been killed
runtime.PASSED_ON = 1
ranks = runtime.Ranks("cpu")
base = Path(runtime.__file__).parent / "base"
args = Namespace(out=str(folder / "out"), resume=None, model=str(base), prompts=None)
run = runtime.Run(args, ranks)
(folder / f"ready {ranks.rank} {runtime.os.getpid()}").touch()
if kind == "python":
    while True:
        time.sleep(0.05)
elif kind == "library":
    libc = ctypes.CDLL(None)
    while True:
        libc.sleep(100)
elif kind == "collective":
    if ranks.rank == 0:
        time.sleep(100)
    ranks.sum(1)
elif kind == "worker":
    next(iter(DataLoader(Rows(), num_workers=1, worker_init_fn=runtime.leave_process_group)))
elif kind == "step":
    while not run.stopping:
        time.sleep(0.05)
    time.sleep(3)
    (folder / f"saved {ranks.rank}").touch()
"""


@pytest.fixture
def start(tmp_path):
    """Start the driver and wait until all its processes are in their step."""
    (tmp_path / "driver.py").write_text(DRIVER)
    started = []

    def starts(kind, processes=1):
        torchrun = []
        if processes > 1:
            torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
        words = [sys.executable, *torchrun, tmp_path / "driver.py", kind, tmp_path]
        started.append(
            subprocess.Popen(
                [*map(str, words)],
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                text=True,
                start_new_session=True,
                env=ENVIRONMENT,
            )
        )
        wanted = processes + (kind == "worker")
        while len([*tmp_path.glob("ready *"), *tmp_path.glob("worker *")]) < wanted:
            assert started[-1].poll() is None, started[-1].stderr.read()
            time.sleep(0.05)
        time.sleep(0.3)
        return started[-1]

    yield starts
    for process in started:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)


def running(tmp_path):
    """Processes of the driver that are still there."""
    files = [*tmp_path.glob("ready *"), *tmp_path.glob("worker *")]
    pids = [path.name.split()[-1] for path in files]
    return [pid for pid in pids if state(pid) not in ("", "Z")]


def all_gone(tmp_path):
    """One that was killed needs a moment to go."""
    for _ in range(40):
        if not running(tmp_path):
            return True
        time.sleep(0.05)
    return False


def state(pid):
    """The letter that Linux gives for a process, "" where there is none."""
    with suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    return ""


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("kind", ["python", "library", "worker"])
def test_a_second_signal_ends_a_step_that_never_ends(start, tmp_path, kind, number):
    process = start(kind)
    os.kill(process.pid, number)
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(1)
    os.kill(process.pid, number)
    assert process.wait(10) == 128 + number
    assert process.stderr.read() == "driver.py: ended by a second signal, nothing is saved\n"
    assert all_gone(tmp_path)


def test_one_signal_finishes_the_step(start, tmp_path):
    process = start("step")
    os.kill(process.pid, signal.SIGTERM)
    assert process.wait(10) == 0
    assert (tmp_path / "saved 0").exists()


# SIGTERM is sent to torchrun alone, Ctrl-C goes to all of its process group.
SIGNALS = [(os.kill, signal.SIGTERM), (os.killpg, signal.SIGINT)]


@pytest.mark.slow
@pytest.mark.parametrize("send, number", SIGNALS)
def test_torchrun_passes_on_what_came_already(start, tmp_path, send, number):
    """Ctrl-C comes twice, by itself and passed on, and is one signal: the step is finished."""
    process = start("step", 2)
    send(process.pid, number)
    process.wait(30)
    assert (tmp_path / "saved 0").exists() and (tmp_path / "saved 1").exists()


@pytest.mark.slow
@pytest.mark.parametrize("send, number", SIGNALS)
@pytest.mark.parametrize("kind", ["python", "collective"])
def test_a_second_signal_ends_all_ranks(start, tmp_path, kind, send, number):
    """Also those that wait for the others inside of a collective."""
    process = start(kind, 2)
    for _ in range(2):
        assert process.poll() is None and len(running(tmp_path)) == 2
        send(process.pid, number)
        time.sleep(2)
    process.wait(10)
    assert all_gone(tmp_path)
