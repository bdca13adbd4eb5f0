"""The GPU paths without a GPU: device rules, equal values, no waiting (see fake_gpu.py).

The test must fail on code that CUDA would refuse or that waits. These faults are planted in a copy
of the project (slow):
 1. the mask of a group's completions made on the CPU
 2. the mask of decoding made on the CPU
 3. stop ids left on the CPU
 4. banned tokens left on the CPU
 5. the noise of sampling left on the CPU
 6. advantages left on the CPU
 7. targets of a batch left on the CPU
 8. a CPU number stacked among the sums of an update (a past bug: it ended every run on CUDA)
 9. a value read in a decoding step
10. a list made into a tensor in a forward
11. a boolean index in the vision encoder
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[1]
FAULTS = {  # name -> (file, a text in it, what stands there instead)
    "group mask": (
        "model.py",
        "dtype=torch.bool, device=device).tril()",
        "dtype=torch.bool).tril()",
    ),
    "decoding mask": (
        "model.py",
        "index = torch.arange(self.seen, device=device)",
        "index = torch.arange(self.seen)",
    ),
    "stop ids": (
        "model.py",
        "stops = to_device(torch.tensor(stop_ids), device)",
        "stops = torch.tensor(stop_ids)",
    ),
    "banned tokens": ("grpo.py", "processor.banned(device)", 'processor.banned("cpu")'),
    "noise": ("grpo.py", "uniforms = to_device(uniforms, device)", "pass"),
    "advantages": (
        "grpo.py",
        "to_device(part.advantages.repeat_interleave(part.lengths), device)",
        "part.advantages.repeat_interleave(part.lengths)",
    ),
    "targets": (
        "model.py",
        "if isinstance(value, torch.Tensor):",
        'if isinstance(value, torch.Tensor) and name != "targets":',
    ),
    "CPU number": ("grpo.py", "clipped.sum()))", "clipped.sum(), torch.tensor(1.0)))"),
    "value read": (
        "model.py",
        "        position = position + 1\n",
        "        position = position + 1\n        position.amax().item()\n",
    ),
    "list to tensor": (
        "model.py",
        "    steps = torch.arange(0, config.head_dim, 2, device=positions.device)\n",
        "    steps = torch.tensor(list(range(0, config.head_dim, 2)), device=positions.device)\n",
    ),
    "boolean index": (
        "model.py",
        "out.index_select(0, self.unpad)",
        "out.unflatten(0, self.shape)[self.mask[:, 0, 0]]",
    ),
}


def run_check(repository):
    """fake_gpu.py check on a checkout, in a process of its own."""
    return subprocess.run(
        [sys.executable, str(REPOSITORY / "tests" / "fake_gpu.py"), "check"],
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "OMP_NUM_THREADS": "1", "REPO": str(repository)},
    )


def waits_in(places):
    return sum(times for *_, times in places)


@pytest.fixture(scope="module")
def ran():
    done = run_check(REPOSITORY)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.slow
def test_a_gpu_gives_what_the_cpu_gives(ran):
    """Texts exactly, numbers to rounding; and nothing was refused, or the process had failed."""
    for name, value in ran["cpu"].items():
        exact = name in ("answers", "chains", "sampled")
        expected = value if exact else pytest.approx(value, rel=1e-3, abs=1e-5)
        assert ran["gpu"][name] == expected, name


def test_the_host_waits_once_in_a_decoding_step(ran):
    """To know how many rows go on, and nowhere in the layers or the cache."""
    assert waits_in(ran["step"]) == 1, ran["step"]
    assert ran["step"][0][1].endswith("generate")


def test_the_host_never_waits_in_a_forward(ran):
    """Copies to the device do not block; with pictures of unequal sizes and a video."""
    assert ran["forward"] == []


@pytest.mark.slow
@pytest.mark.parametrize("name", FAULTS)
def test_a_planted_fault_is_seen(name, tmp_path):
    """Each fault ends the run with its place, or shows in the waits."""
    file, text, fault = FAULTS[name]
    for path in REPOSITORY.glob("*.py"):
        shutil.copy(path, tmp_path)
    for folder in ("look", "rooms", "base"):
        shutil.copytree(REPOSITORY / folder, tmp_path / folder)
    source = (tmp_path / file).read_text(encoding="utf-8")
    assert text in source
    (tmp_path / file).write_text(source.replace(text, fault), encoding="utf-8")

    done = run_check(tmp_path)
    if done.returncode == 0:
        seen = json.loads(done.stdout.splitlines()[-1])
        assert waits_in(seen["step"]) > 1 or seen["forward"]
    else:
        assert "is given tensors of two devices" in done.stderr
