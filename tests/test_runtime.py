"""runtime.py, with settings.py and files.py: flags, exact resume; the number of processes is free.

Runs in this process stop by SIGTERM at a step of our choice. Runs under torchrun use DRIVER, which
does the same there and gives untrained models rewards that differ. Two processes reduce in another
order than one: losses are equal to 1e-4. A weight's change is compared by its norm, as Adam turns
rounding in a near-zero gradient into a full step.
"""

import argparse
import json
import math
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import kill_resume
import numpy as np
import pytest
import torch
import torch.distributed as dist
from conftest import keep_gradients, launch, varied_reward
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

import eval as evaluation
import grpo
import ladder
import rewards
import runtime
import train_sft
from files import CONFIG, UserError, claim, read_json
from runtime import (
    MEMORY_HINT,
    Run,
    adamw,
    choose_device,
    clip_gradients,
    compute_dtype,
    main_guard,
    recipe_settings,
    rows_of_step,
    scheduled_rate,
    update_weights,
)
from settings import GRPO, SETTINGS, SFT, Parser, add_flags, positive

TESTS = Path(__file__).resolve().parent
GROUNDING = "spld_grounding_data.jsonl"
SPATIAL = "spld_spatial_data.jsonl"
CLOCK = re.compile(".*_(time|per_second)")  # keys of the log that depend on it
SCRIPTS = pytest.mark.parametrize("script", (train_sft, grpo), ids=lambda script: script.__name__)
DRIVER = """
import datetime, importlib, os, signal, sys, time
sys.path.insert(0, os.environ["TESTS"])
import conftest, rewards, runtime
import torch.distributed as dist

end_step = runtime.Run.end_step
begin = dist.init_process_group

def ends(run, model, optimizer, step, *others):
    if run.ranks.rank == 0 and str(step) == os.environ.get("STOP_AT"):
        signal.raise_signal(signal.SIGTERM)
    if run.ranks.rank == 1 and str(step) == os.environ.get("HANG_AT"):
        time.sleep(100)
    return end_step(run, model, optimizer, step, *others)

def begin_impatiently(**options):
    begin(**options, timeout=datetime.timedelta(seconds=8))

rewards.REWARDS["accuracy"] = conftest.varied_reward
runtime.Run.end_step = ends
if "HANG_AT" in os.environ:
    dist.init_process_group = begin_impatiently
if "GRADIENTS" in os.environ:
    conftest.keep_gradients(runtime, os.environ["GRADIENTS"])
runtime.main_guard(importlib.import_module(os.environ["SCRIPT"]).main)
"""
TOGETHER = """
import json, sys
import torch.distributed as dist
from pathlib import Path
from files import UserError
from runtime import Ranks

def claim(name):
    print("claimed", name, flush=True)
    if name == "broken":
        raise UserError("broken: cannot write there")
    return {"rank": ranks.rank}

ranks = Ranks("cpu")
ranks.print("once")
said = {
    "sum": ranks.sum_named({"loss": 0.5 + ranks.rank, "tokens": 3}),
    "gather": ranks.gather([ranks.rank]),
    "once": ranks.once(claim, "whole"),
}
try:
    ranks.once(claim, "broken")
except UserError as error:
    said["error"] = str(error)
Path(sys.argv[1], f"{ranks.rank}.json").write_text(json.dumps(said))
dist.destroy_process_group()
"""


def read_rows(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def log_of(out):
    """The log's rows but for what depends on the clock."""
    rows = []
    for row in read_rows(out / "log.jsonl"):
        rows.append({key: value for key, value in row.items() if not CLOCK.fullmatch(key)})
    return rows


def steps_of(out):
    return [row["step"] for row in log_of(out)]


def states(out):
    return sorted(path.name for path in (out / "resume").iterdir())


def weights(out):
    return (out / "model.safetensors").read_bytes()


def assert_equal_runs(one, two):
    """Bit for bit."""
    assert log_of(one) == log_of(two)
    assert weights(one) == weights(two)


def exit_line(capsys, function, *arguments):
    """What a call that ends the program with code 2 wrote to stderr: one line."""
    with pytest.raises(SystemExit) as error:
        function(*arguments)
    lines = capsys.readouterr().err.splitlines()
    assert error.value.code == 2
    assert len(lines) == 1, lines
    return lines[0]


# ---------------------------------------------------------------------------------- settings


@pytest.mark.parametrize(
    "flags, expected",
    (
        (
            "--stage 1 --learning-rat 1",
            "unknown argument --learning-rat, did you mean --learning-rate?",
        ),
        ("--stage 1 --lr 1e-5", "unknown argument --lr, did you mean --"),
        ("--stage 1 --save_evry=3", "unknown argument --save-evry=3, did you mean --save-every?"),
        ("--stage 1 extra", "unknown argument extra"),
        ("--stage 1 --beta 0.1", "unknown argument --beta"),  # of GRPO only
        ("--stage 3", "argument --stage: invalid choice: '3'"),
        ("", "the following arguments are required: --stage"),
        ("--stage 1 --preset huge", "argument --preset: invalid choice: 'huge'"),
        ("--stage 1 --max-steps ten", "argument --max-steps: invalid int value: 'ten'"),
        ("--stage 1 --max-steps 0", "--max-steps is 0, expected a positive number"),
        ("--stage 1 --micro-batch 0", "--micro-batch is 0, expected a positive number"),
        ("--stage 1 --batch-size -8", "--batch-size is -8, expected a positive number"),
        ("--stage 1 --learning-rate nan", "--learning-rate is nan, expected a positive number"),
        ("--stage 1 --epochs inf", "--epochs is inf, expected a positive number"),
        ("--stage 1 --data a --replay-ratio 0.5", "--replay is missing"),
        ("--stage base --data a --replay b", "--replay-ratio is missing"),
        ("--stage 1 --replay-ratio 1", "--replay-ratio is 1.0, expected 0 or more and below 1"),
        ("--stage 1 --curriculum 2", "--curriculum is 2.0, expected 0 to 1"),
        ("--stage 1 --seed -1", "--seed is -1, expected 0 or more"),
        ("--stage 1 --betas 0.9", "--betas has 1 numbers, expected 2"),
        ("--stage 1 --betas 0.9 1", "--betas is 1.0, expected 0 or more and below 1"),
        ("--stage 1 --dtype float16", "argument --dtype: invalid choice: 'float16'"),
        ("--stage 1 --preset paper", "--model is missing"),
        ("--stage 2 --preset paper --model m --out o", "--data is missing"),
        ("--stage 2 --preset paper --model m --data d", "--out is missing"),
    ),
)
def test_wrong_flags_are_one_line(capsys, flags, expected):
    """No traceback, no usage text, no guess at what was meant: exit code 2 and what to type."""
    line = exit_line(capsys, recipe_settings, "", None, flags.split())
    assert expected in line
    assert "extra, did" not in line  # only a flag has a nearest flag


@pytest.mark.parametrize(
    "flags, expected",
    (
        ("--num-iterations 0", "--num-iterations is 0, expected a positive number"),
        ("--temperature nan", "--temperature is nan, expected a positive number"),
        ("--epsilon -0.1", "--epsilon is -0.1, expected 0 or more"),
        ("--reward-weights nan 1", "--reward-weights is nan, expected 0 or more"),
        ("--reward-weights 1 -1", "--reward-weights is -1.0, expected 0 or more"),
        ("--loss-type ppo", "argument --loss-type: invalid choice: 'ppo'"),
        ("--batch-size 4", "unknown argument --batch-size"),
        ("--stage 1", "unknown argument --stage"),
        ("--preset paper --data d.jsonl --out o", "--model is missing"),
    ),
)
def test_wrong_grpo_flags_are_one_line(capsys, flags, expected):
    assert expected in exit_line(capsys, recipe_settings, "", "grpo", flags.split())


@pytest.mark.parametrize(
    "preset, stage",
    [(preset, stage) for preset, rows in ladder.RECIPES.items() for stage in rows],
)
def test_flags_take_the_place_of_the_recipe(preset, stage):
    """A default, in its place the recipe's value, in its place the flag.

    Dashes and underscores, = and blank are alike. Rows that the recipe replays are its own rooms,
    which are not mixed into rows of --data.
    """
    flags = f"--preset {preset} --model m --data a.jsonl b.jsonl --out=under_score --max_steps=7"
    flags += " --max-pixels 50176 --freeze_vision --no-activation-checkpointing"
    if stage == "grpo":
        args = recipe_settings("", "grpo", flags.split())
    else:
        args = recipe_settings("", None, f"{flags} --stage {stage}".split())
    names = GRPO if stage == "grpo" else SFT
    expected = {name: SETTINGS[name].default for name in names} | ladder.RECIPES[preset][stage]
    if "replay" in expected:
        expected["replay"] = None
    assert vars(args) == {
        **expected,
        "preset": preset,
        "stage": stage,
        "model": "m",
        "data": ["a.jsonl", "b.jsonl"],
        "out": "under_score",
        "max_steps": 7,
        "max_pixels": 50176,
        "freeze_vision": True,
        "activation_checkpointing": False,
    }


def test_rows_are_replayed_where_nothing_else_is_said():
    """In the tiny preset's own stages, and where --replay says so."""
    rooms = ladder.RECIPES["tiny"]["2"]["replay"]
    assert recipe_settings("", None, ["--stage", "2"]).replay == rooms
    flags = "--stage 2 --data a.jsonl --replay b.jsonl c.jsonl"
    args = recipe_settings("", None, flags.split())
    assert args.replay == ["b.jsonl", "c.jsonl"]
    assert args.replay_ratio == 0.4


@pytest.mark.parametrize("chosen", (False, True))
def test_a_model_is_loaded_as_the_settings_say(chosen, tiny_model):
    """--activation-checkpointing, --freeze-vision: they reach the model."""
    args = SimpleNamespace(model=tiny_model, dtype=None)
    args.activation_checkpointing = args.freeze_vision = chosen
    ranks = SimpleNamespace(device=torch.device("cpu"), launched=False)
    model = runtime.load_sharded(args, ranks)
    assert model.activation_checkpointing == chosen
    for name, parameter in model.named_parameters():
        assert parameter.requires_grad == (not (chosen and name.startswith("visual.")))


def test_every_setting_has_a_flag():
    """What a recipe says can be said on the command line too; the table holds nothing else."""
    for rows in ladder.RECIPES.values():
        for stage, row in rows.items():
            assert row.keys() <= set(GRPO if stage == "grpo" else SFT)
    assert set(SFT) | set(GRPO) == set(SETTINGS)


def test_what_may_change_when_a_run_goes_on():
    """How a run is done may change, but nothing that its result depends on.

    Neither may the contents of the files that a path leads to.
    """
    free = {name for name, setting in SETTINGS.items() if setting.may_change}
    paths = {"model", "data", "images", "out", "replay", "prompts", "eval_data"}
    machine = {"device", "threads", "workers", "micro_batch", "activation_checkpointing"}
    assert free == paths | machine | {"resume", "save_every", "keep_last"}


def test_values_may_hold_underscores():
    """Only a flag's name is rewritten."""
    parser = Parser("x")
    parser.add_argument("--out-dir")
    assert parser.parse_args(["--out_dir=a_b=c_d"]).out_dir == "a_b=c_d"
    assert parser.parse_args(["--out-dir", "a_b"]).out_dir == "a_b"


def test_a_script_has_defaults_and_checks_of_its_own(capsys):
    """Beside rows of the table, whose checks it has too."""
    parser = Parser("x")
    add_flags(parser, ("model", "num_frames", "betas"), num_frames=32)
    parser.add_argument("--limit", type=int)
    parser.checks["limit"] = positive
    args = parser.parse_args([])
    assert (args.num_frames, args.limit, args.model) == (32, None, None)
    assert exit_line(capsys, parser.parse_args, ["--limit", "0"]).endswith(
        "--limit is 0, expected a positive number"
    )
    assert exit_line(capsys, parser.parse_args, ["--num-frames", "-1"]).endswith(
        "--num-frames is -1, expected a positive number"
    )
    assert exit_line(capsys, parser.need, args, "model").endswith(": --model is missing")


# ---------------------------------------------------------------------------------- a mistake


def user_error():
    raise UserError("rows.jsonl:3: answer is 'Z', expected a letter")


def worker_error():
    """A DataLoader's worker puts its traceback before the message."""
    raise UserError(
        "Caught UserError in DataLoader worker process 0.\nOriginal Traceback (most recent call):\n"
        "  File x, line 3\nfiles.UserError: rows.jsonl:3: answer is 'Z', expected a letter\n"
    )


def memory_error():
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.\nGPU 0 has ...")


def our_error():
    raise ValueError("ours")


def no_error():
    pass


@pytest.mark.parametrize(
    "fails, expected",
    (
        (user_error, "rows.jsonl:3: answer is 'Z', expected a letter"),
        (worker_error, "rows.jsonl:3: answer is 'Z', expected a letter"),
        (memory_error, MEMORY_HINT),
    ),
)
def test_main_guard_turns_a_mistake_into_one_line(monkeypatch, capsys, fails, expected):
    """It names the script, and the rank where there are several."""
    monkeypatch.setattr(sys, "argv", ["a/path/train_sft.py", "--stage", "1"])
    assert exit_line(capsys, main_guard, fails) == f"train_sft.py: {expected}"
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setenv("RANK", "3")
    monkeypatch.setattr(os, "_exit", sys.exit)
    assert exit_line(capsys, main_guard, fails) == f"train_sft.py: rank 3: {expected}"


def test_our_own_mistake_keeps_its_traceback():
    with pytest.raises(ValueError, match="ours"):
        main_guard(our_error)


@pytest.mark.parametrize(
    "backend, fails, torchrun, expected",
    (
        # Destroying NCCL's group after an error would wait for ranks that never come.
        ("nccl", user_error, True, ["_exit(2)"]),
        ("nccl", memory_error, True, ["_exit(2)"]),
        ("nccl", no_error, True, ["destroyed", "_exit(0)"]),
        ("gloo", user_error, True, ["destroyed", "_exit(2)"]),
        ("gloo", user_error, False, ["destroyed"]),
        ("gloo", no_error, False, ["destroyed"]),
    ),
)
def test_how_a_process_group_ends(monkeypatch, backend, fails, torchrun, expected):
    endings = []
    if torchrun:
        monkeypatch.setenv("RANK", "0")

    def exits(code):
        endings.append(f"_exit({code})")
        raise SystemExit(code)

    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "get_backend", lambda: backend)
    monkeypatch.setattr(dist, "destroy_process_group", lambda: endings.append("destroyed"))
    monkeypatch.setattr(os, "_exit", exits)
    with pytest.raises(SystemExit) as error:
        main_guard(fails)
    assert endings == expected
    assert error.value.code == (0 if fails is no_error else 2)


# ---------------------------------------------------------------------------------- the device


@pytest.fixture
def gpus(monkeypatch):
    """A function that lets torch find so many GPUs; it returns what is set on them."""

    def find(count):
        calls = []
        monkeypatch.setattr(torch.cuda, "is_available", lambda: count > 0)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
        monkeypatch.setattr(torch.cuda, "set_device", lambda device: calls.append(str(device)))
        monkeypatch.setattr(
            torch.backends.cuda,
            "enable_cudnn_sdp",
            lambda enabled: calls.append(f"cuDNN's attention {enabled}"),
        )
        return calls

    return find


@pytest.mark.parametrize("given, set_to", (((), 1), (("--threads", 3), 3)))
def test_a_script_computes_with_so_many_threads(monkeypatch, call, tmp_path, given, set_to):
    """Preset tiny's one thread, or the flag's; eval.py knows no preset."""
    calls = []
    monkeypatch.setattr(torch, "set_num_threads", calls.append)
    files = ("--model", tmp_path, "--data", tmp_path / "none.jsonl", "--out", tmp_path / "out")
    for script, more in ((train_sft, ("--stage", 1)), (grpo, ())):
        with pytest.raises(UserError):  # there is no such file: it gets no further
            call(script, *files, *more, *given)
    if given:
        with pytest.raises(UserError):
            call(evaluation, *files, "--bench", tmp_path / "none.jsonl", *given)
        calls.remove(set_to)
    assert calls == [set_to, set_to]


def test_a_gpu_is_taken_where_there_is_one(monkeypatch, gpus):
    """The one with the local rank; cuDNN's attention, which plans anew for each length, is off."""
    calls = gpus(0)
    assert choose_device() == choose_device("cpu") == torch.device("cpu")
    assert calls == []
    calls = gpus(4)
    assert choose_device("cpu") == torch.device("cpu")
    assert calls == []
    assert choose_device() == torch.device("cuda", 0)
    monkeypatch.setenv("LOCAL_RANK", "3")
    assert choose_device("cuda") == torch.device("cuda", 3)
    assert calls == [
        *("cuda:0", "cuDNN's attention False"),
        *("cuda:3", "cuDNN's attention False"),
    ]


def test_a_gpu_that_is_missing_is_one_line(monkeypatch, gpus):
    gpus(0)
    with pytest.raises(UserError, match=r"^--device cuda: torch finds no GPU$"):
        choose_device("cuda")
    calls = gpus(2)
    monkeypatch.setenv("LOCAL_RANK", "2")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    expected = r"^4 processes on a node with 2 GPUs; lower --nproc-per-node$"
    for name in (None, "cuda"):
        with pytest.raises(UserError, match=expected):
            choose_device(name)
    assert calls == []


def test_bfloat16_on_a_gpu_and_float32_on_a_cpu():
    cpu, gpu = torch.device("cpu"), torch.device("cuda", 0)
    assert compute_dtype(None, cpu) == compute_dtype("float32", gpu) == torch.float32
    assert compute_dtype(None, gpu) == compute_dtype("bfloat16", cpu) == torch.bfloat16


# ---------------------------------------------------------------------------------- optimizer


@pytest.mark.parametrize("name", ("cosine", "linear"))
@given(st.integers(1, 300), st.sampled_from((0.0, 0.1, 0.5)))
def test_schedule_is_transformers(name, steps, ratio):
    """Warm-up ends at the peak, one step earlier than there (whose first step has rate 0).

    The decay is the same.
    """
    from transformers import get_scheduler

    warmup = round(steps * ratio)
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=2.0)
    theirs = get_scheduler(name, optimizer, warmup, steps).lr_lambdas[0]
    args = argparse.Namespace(learning_rate=2.0, warmup_ratio=ratio, lr_scheduler_type=name)
    for step in range(1, steps + 1):
        expected = 2.0 * theirs(step if step <= warmup else step - 1)
        assert scheduled_rate(step, steps, args) == pytest.approx(expected)


def test_weight_decay_is_on_matrices_only():
    """Norms and biases are not pulled to zero; Adam's other numbers are the recipe's."""
    model = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.LayerNorm(2))
    args = argparse.Namespace(weight_decay=0.1, learning_rate=0.5, betas=[0.8, 0.9])
    optimizer = adamw(model, args)
    before = [p.detach().clone() for p in model.parameters()]
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    matrix, *vectors = model.parameters()
    assert torch.allclose(matrix, before[0] * (1 - 0.5 * 0.1))
    for vector, earlier in zip(vectors, before[1:], strict=True):
        assert torch.equal(vector, earlier)
    for group in optimizer.param_groups:
        assert group["betas"] == (0.8, 0.9)
        assert group["eps"] == 1e-8


def linear(weight, bias):
    """A model of three weights with these gradients, whose norm is 5 for (3, 0) and 4."""
    model = torch.nn.Linear(2, 1)
    model.weight.grad = torch.tensor([weight])
    model.bias.grad = torch.tensor([bias])
    return model


def test_clipping_scales_all_gradients_together():
    model = linear([3.0, 0.0], 4.0)
    assert clip_gradients(model, 10.0) == 5.0
    assert model.bias.grad.item() == 4.0
    assert clip_gradients(model, 1.0) == 5.0
    clipped = torch.cat((model.weight.grad[0], model.bias.grad))
    assert torch.allclose(clipped, torch.tensor([0.6, 0.0, 0.8]))


UPDATE = argparse.Namespace(
    learning_rate=0.5, warmup_ratio=0.5, lr_scheduler_type="linear", max_grad_norm=1.0
)


def test_an_update_is_a_clipped_step_at_the_scheduled_rate():
    model = linear([3.0, 0.0], 4.0)
    torch.nn.init.ones_(model.bias)
    optimizer = torch.optim.SGD(model.parameters(), lr=99.0)
    rate, norm = update_weights(model, optimizer, 1, 4, UPDATE, 2.0, ["a.jsonl:1"])
    assert (rate, norm) == (0.25, 5.0)  # half-way up to 0.5; the norm before it was clipped
    assert model.bias.item() == pytest.approx(1 - 0.25 * 0.8)
    assert model.bias.grad is None


@pytest.mark.parametrize(
    "loss, gradient",
    ((math.nan, 4.0), (math.inf, 4.0), (2.0, math.nan), (2.0, -math.inf)),
)
def test_what_is_not_finite_is_not_applied(loss, gradient):
    """The weights stay as they were, and the rows of the step are named, each one once."""
    model = linear([3.0, 0.0], gradient)
    before = [p.detach().clone() for p in model.parameters()]
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    places = ["b.jsonl:7", "a.jsonl:12", "b.jsonl:7"]
    with pytest.raises(UserError) as error:
        update_weights(model, optimizer, 3, 4, UPDATE, loss, places)
    said = str(error.value)
    assert f"loss {loss}, gradient norm " in said
    assert said.endswith("not applied. Rows of this step: b.jsonl:7, a.jsonl:12")
    for parameter, earlier in zip(model.parameters(), before, strict=True):
        assert torch.equal(parameter, earlier)


# ---------------------------------------------------------------------------------- the folder


def sft_flags(rooms, model, out, *more):
    return (
        *("--stage", "1", "--model", model, "--data", rooms / "train" / GROUNDING, "--out", out),
        *("--batch-size", 4, "--micro-batch", 2, "--max-steps", 4, *more),
    )


def grpo_flags(rooms, model, out, *more):
    return (
        *("--model", model, "--data", rooms / "train" / SPATIAL, "--out", out),
        *("--prompts-per-step", 2, "--num-generations", 3, "--max-completion-length", 8),
        *("--num-iterations", 2, "--max-steps", 4, *more),
    )


FLAGS = {train_sft: sft_flags, grpo: grpo_flags}


@pytest.fixture(scope="module")
def finished():
    """{script: folder of its run}, filled by `undisturbed`."""
    return {}


@pytest.fixture
def undisturbed(monkeypatch, call, rooms, tiny_model, tmp_path_factory, finished):
    """A function: the folder of a script's run of 4 steps. It is made once and only read."""

    def run(script):
        if script not in finished:
            out = tmp_path_factory.mktemp("undisturbed") / "out"
            with monkeypatch.context() as patch:
                patch.setitem(rewards.REWARDS, "accuracy", varied_reward)
                call(script, *FLAGS[script](rooms, tiny_model, out))
            finished[script] = out
        return finished[script]

    return run


def before_end_of_step(patch, action):
    """Call action(step) when a step has been computed, before it is logged and saved."""
    end_step = Run.end_step

    def ends(run, model, optimizer, step, *others):
        action(step)
        return end_step(run, model, optimizer, step, *others)

    patch.setattr(Run, "end_step", ends)


def after_end_of_step(patch, action):
    """Call action(step) when a step has been logged, and saved if it is time."""
    end_step = Run.end_step

    def ends(run, model, optimizer, step, *others):
        stop = end_step(run, model, optimizer, step, *others)
        action(step)
        return stop

    patch.setattr(Run, "end_step", ends)


def interrupt(monkeypatch, call, script, flags, at):
    """Run a script's main and send it SIGTERM when step `at` ends."""

    def stop(step):
        if step == at:
            signal.raise_signal(signal.SIGTERM)

    with monkeypatch.context() as patch:
        before_end_of_step(patch, stop)
        call(script, *flags)


def test_a_folder_is_claimed_by_equal_settings_only(tmp_path):
    """A new one, an empty one, or one that was begun with equal settings; a lock is written."""
    folder = tmp_path / "runs" / "out"
    settings = {"seed": 0, "betas": (0.9, 0.95)}
    assert claim(folder, settings) is False  # a new one
    assert claim(folder, settings) is False  # an empty one
    assert [path.name for path in folder.iterdir()] == [".lock"]
    (folder / "scores.json.tmp").touch()  # of a try that was killed
    assert claim(folder, settings) is False

    # A tuple is a list in the file; a setting that the file has besides does not matter.
    (folder / CONFIG).write_text('{"seed": 0, "betas": [0.9, 0.95], "gone": 1}')
    (folder / "scores.json").touch()
    assert claim(folder, settings) is True
    with pytest.raises(UserError) as error:
        claim(folder, {"seed": 3, "betas": (0.9, 0.95), "limit": None, "bench": "rooms"})
    expected = "was begun with other settings: seed 0, now 3, bench None, now 'rooms'"
    assert str(error.value) == f"{folder}: {expected}; give another --out"
    with pytest.raises(UserError) as error:
        claim(folder, settings, go_on=False)
    expected = "not empty; continue it with --resume auto, or give another --out"
    assert str(error.value) == f"{folder}: {expected}"


def holds_a_thesis(out):
    out.mkdir()
    (out / "thesis.txt").touch()


def is_a_file(out):
    out.touch()


def is_under_a_file(out):
    out.parent.rmdir()
    out.parent.touch()


@pytest.mark.parametrize(
    "make, expected",
    (
        (holds_a_thesis, "not empty; give another --out"),
        (is_a_file, "cannot write there"),
        (is_under_a_file, "cannot write there"),
    ),
)
def test_a_directory_that_is_not_ours_is_refused(call, rooms, tiny_model, tmp_path, make, expected):
    """Nothing of anyone's is overwritten, with or without --resume auto."""
    out = tmp_path / "runs" / "out"
    out.parent.mkdir()
    make(out)
    before = sorted(tmp_path.rglob("*"))
    for more in ((), ("--resume", "auto")):
        with pytest.raises(UserError) as error:
            call(train_sft, *sft_flags(rooms, tiny_model, out, *more))
        assert str(error.value).startswith(f"{out}: {expected}")
        assert "\n" not in str(error.value)
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize(
    "script, flags, made, command",
    (
        (train_sft, ("--stage", "2"), "stage1", "train_sft.py --stage 1"),
        (train_sft, ("--stage", "cold"), "stage2", "train_sft.py --stage 2"),
        (grpo, (), "cold", "train_sft.py --stage cold"),
    ),
    ids=("2", "cold", "grpo"),
)
def test_a_missing_rung_names_its_command(
    monkeypatch, call, tmp_path, script, flags, made, command
):
    """A bare command on a fresh machine says what to run before it; it starts nothing long."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError) as error:
        call(script, *flags)
    expected = f"runs/tiny/{made}: no model there yet; make it with: python {command}"
    assert str(error.value) == expected
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_a_bare_first_stage_makes_rooms_and_model(monkeypatch, call, tmp_path):
    """The first command a reader types needs nothing but the repository (with fewer rooms here)."""
    monkeypatch.chdir(tmp_path)
    for rooms in ("runs/tiny/rooms", "runs/base/rooms"):
        command, *_ = ladder.MADE_BY[rooms].split(" --scenes")
        monkeypatch.setitem(ladder.MADE_BY, rooms, f"{command} --scenes 8 --test-scenes 2")
    call(train_sft, "--stage", "base", "--max-steps", 1, "--batch-size", 2)
    base = tmp_path / "runs" / "base" / "model"
    assert (base / "config.json").is_file()
    (tmp_path / "base").symlink_to(base)  # in place of the repository's
    call(train_sft, "--stage", "1", "--max-steps", 1, "--batch-size", 2)
    assert (tmp_path / "runs" / "tiny" / "stage1" / "config.json").is_file()
    assert sorted(str(path) for path in Path("runs").glob("*/*")) == [
        "runs/base/model",
        "runs/base/rooms",
        "runs/base/start",
        "runs/tiny/rooms",
        "runs/tiny/stage1",
    ]


def test_rooms_that_cannot_be_made_name_their_command(monkeypatch, call, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)
    failed = SimpleNamespace(wait=lambda: 2)
    monkeypatch.setattr(runtime, "launch", lambda words: failed)
    with pytest.raises(UserError) as error:
        call(train_sft, "--stage", "1")
    command = "python -m rooms.scenes --out runs/tiny/rooms"
    assert str(error.value) == f"runs/tiny/rooms: could not be made with: {command}"
    assert capsys.readouterr().out == f"$ {command}\n"


def test_a_run_continues_only_as_it_began(monkeypatch, call, rooms, tiny_model, tmp_path, capsys):
    """Changed settings are refused by name and value; those of the machine may change.

    A finished run is left alone. Without --resume a run that was begun is refused.
    """
    out = tmp_path / "out"
    flags = sft_flags(rooms, tiny_model, out)
    interrupt(monkeypatch, call, train_sft, flags, at=2)
    assert states(out) == ["step-000002"]
    assert not (out / "config.json").exists()
    command = "continue with: python train_sft.py --stage 1 --model"
    assert f"stopped after step 2 of 4; {command}" in capsys.readouterr().out
    config = read_json(out / CONFIG)
    assert config["preset"] == "tiny"
    assert config["max_steps"] == 4
    assert config["micro_batch"] == 2
    assert set(config["made_of"]) == {"model", "data", "images"}

    with pytest.raises(UserError, match="not empty; continue it with --resume auto"):
        call(train_sft, *flags)
    with pytest.raises(UserError) as error:
        call(train_sft, *flags, "--resume", "auto", "--learning-rate", 1, "--seed", 3)
    rate = ladder.RECIPES["tiny"]["1"]["learning_rate"]
    changed = f"seed 0, now 3, learning_rate {rate}, now 1.0"
    expected = f"{out}: was begun with other settings: {changed}; give another --out"
    assert str(error.value) == expected
    assert read_json(out / CONFIG) == config

    free = ("--micro-batch", 4, "--save-every", 1, "--keep-last", 3)
    call(train_sft, *flags, "--resume", "auto", *free)
    assert f"resumed {out / 'resume' / 'step-000002'}" in capsys.readouterr().out
    assert states(out) == ["step-000002", "step-000003"]
    assert (out / "config.json").exists()

    before = weights(out)
    call(train_sft, *flags, "--resume", "auto")
    assert f"{out}: finished already" in capsys.readouterr().out
    assert weights(out) == before
    assert steps_of(out) == [1, 2, 3, 4]


def test_the_log_is_cut_to_the_state(tmp_path):
    """Rows of steps that will be done again go, and so does a line that a crash left half."""
    run = SimpleNamespace(out=tmp_path)
    rows = ['{"step": 1, "x": 1}\n', '{"step": 2}\n', '{"step": 3}\n', '{"step": 4, "lo']
    (tmp_path / "log.jsonl").write_text("".join(rows))
    (tmp_path / "rollouts.jsonl").write_text("".join(rows[:1] * 2 + rows[2:]))
    Run.cut_log(run, 2)
    assert (tmp_path / "log.jsonl").read_text() == "".join(rows[:2])
    assert (tmp_path / "rollouts.jsonl").read_text() == "".join(rows[:1] * 2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["log.jsonl", "rollouts.jsonl"]


def test_the_command_that_goes_on(monkeypatch):
    """As it was typed, under torchrun where it ran there, with --resume auto once."""
    monkeypatch.setattr(sys, "argv", ["grpo.py", "--out", "my run"])
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    args, ranks = SimpleNamespace(resume=None), SimpleNamespace(launched=False)
    run = SimpleNamespace(args=args, ranks=ranks)
    assert Run.command(run) == "python grpo.py --out 'my run' --resume auto"
    ranks.launched = True
    launcher = "torchrun --nproc-per-node=4"
    assert Run.command(run) == f"{launcher} grpo.py --out 'my run' --resume auto"
    args.resume = "auto"
    assert Run.command(run) == f"{launcher} grpo.py --out 'my run'"


# ---------------------------------------------------------------------------------- exact resume


@SCRIPTS
def test_stop_and_resume_is_exact(
    monkeypatch, call, rooms, tiny_model, undisturbed, tmp_path, script
):
    """4 steps equal 2, SIGTERM, and 2 more, bit for bit: weights, log and rollouts.

    GRPO is stopped in the middle of the iterations over one rollout and finishes them first.
    """
    monkeypatch.setitem(rewards.REWARDS, "accuracy", varied_reward)
    whole, parts = undisturbed(script), tmp_path / "parts"
    flags = FLAGS[script](rooms, tiny_model, parts)
    interrupt(monkeypatch, call, script, flags, at=1 if script is grpo else 2)
    assert states(parts) == ["step-000002"]
    assert steps_of(parts) == [1, 2]
    call(script, *flags, "--resume", "auto")
    assert_equal_runs(parts, whole)
    assert steps_of(whole) == [1, 2, 3, 4]
    assert all(row["grad_norm"] > 1e-3 for row in log_of(whole))
    if script is train_sft:
        return

    assert (parts / "rollouts.jsonl").read_bytes() == (whole / "rollouts.jsonl").read_bytes()
    data_file = rooms / "train" / SPATIAL
    count = len(read_rows(data_file))
    expected = []
    for step, rollout in ((1, 1), (3, 2)):
        for row in rows_of_step(rollout, count, 2, 0):
            expected.append((step, f"{data_file}:{row + 1}"))
    rollouts = read_rows(whole / "rollouts.jsonl")
    assert [(row["step"], row["where"]) for row in rollouts] == expected


def test_death_between_saves_is_exact(monkeypatch, call, rooms, tiny_model, undisturbed, tmp_path):
    """A run that dies after step 3 goes on from the state of step 2 and ends the same."""
    parts = tmp_path / "parts"
    flags = sft_flags(rooms, tiny_model, parts, "--save-every", 2)

    def die(step):
        if step == 3:
            raise MemoryError

    with monkeypatch.context() as patch, pytest.raises(MemoryError):
        after_end_of_step(patch, die)
        call(train_sft, *flags)
    assert states(parts) == ["step-000002"]
    assert steps_of(parts) == [1, 2, 3]
    call(train_sft, *flags, "--resume", "auto")
    assert_equal_runs(parts, undisturbed(train_sft))


def damage(state, how):
    if how == "no metadata":
        (state / ".metadata").unlink()
    elif how == "torn meta.json":
        (state / "meta.json").write_text('{"step"')
    else:
        largest = max(state.glob("*.distcp"), key=lambda path: path.stat().st_size)
        content = largest.read_bytes()
        half = content[: len(content) // 2]
        largest.write_bytes(half if how == "torn" else b"\0" * len(content))


@pytest.mark.slow
@pytest.mark.parametrize("how", ("torn", "zeros", "no metadata", "torn meta.json"))
def test_a_damaged_state_falls_back(
    monkeypatch, call, rooms, tiny_model, undisturbed, tmp_path, capsys, how
):
    """The newest state is unreadable: the run says so, takes the one before and ends the same.

    It is kept aside, as a disk's error may pass. If none can be read, the run is refused, not begun
    again.
    """
    whole, parts, worse = undisturbed(train_sft), tmp_path / "parts", tmp_path / "worse"
    flags = sft_flags(rooms, tiny_model, parts, "--save-every", 1)
    interrupt(monkeypatch, call, train_sft, flags, at=3)
    assert states(parts) == ["step-000002", "step-000003"]  # the newest two are kept
    damage(parts / "resume" / "step-000003", how)
    shutil.copytree(parts, worse)
    damaged = parts / "resume" / "step-000003"
    held = {path.name: path.read_bytes() for path in damaged.iterdir()}
    capsys.readouterr()
    call(train_sft, *flags, "--resume", "auto")
    said = capsys.readouterr().out
    assert f"{damaged}: not readable" in said
    assert f"{damaged}: kept as step-000003.unreadable" in said
    aside = damaged.with_suffix(".unreadable")
    assert {path.name: path.read_bytes() for path in aside.iterdir()} == held
    assert f"resumed {parts / 'resume' / 'step-000002'}" in said
    assert_equal_runs(parts, whole)

    shutil.rmtree(parts)
    worse.rename(parts)
    damage(parts / "resume" / "step-000002", how)
    with pytest.raises(UserError, match="none of its 2 trainer states can be read"):
        call(train_sft, *flags, "--resume", "auto")


def test_too_little_memory_is_not_a_damaged_state(monkeypatch, capsys, tmp_path):
    """Nothing is wrong with the file: an older state would need as much memory."""
    run = SimpleNamespace(ranks=SimpleNamespace(print=print))
    errors = [torch.OutOfMemoryError("CUDA out of memory"), RuntimeError("torn\nlast line")]

    def fails(model, optimizer):
        raise errors.pop(0)

    monkeypatch.setattr(runtime, "get_state_dict", fails)
    with pytest.raises(torch.OutOfMemoryError):
        Run.load_state(run, tmp_path, None, None)
    assert capsys.readouterr().out == ""
    assert Run.load_state(run, tmp_path, None, None) is None
    expected = f"{tmp_path}: not readable (last line), trying the one before\n"
    assert capsys.readouterr().out == expected


def test_a_full_disk_loses_nothing(call, rooms, tiny_model, undisturbed, tmp_path):
    """No room for a trainer state or for the model: one line that says which.

    No half-written one is ever taken for a whole one. With room again the run goes on.
    """
    out = tmp_path / "out"
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    flags = sft_flags(rooms, tiny_model, out, "--resume", "auto")
    for more, expected in (
        (("--save-every", 2), "cannot write the trainer state"),
        ((), "cannot write the model"),
    ):
        try:
            resource.setrlimit(resource.RLIMIT_FSIZE, (10**6, hard))
            with pytest.raises(UserError) as error:
                call(train_sft, *flags, *more)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        assert expected in str(error.value)
        assert "\n" not in str(error.value)
        assert not (out / "config.json").exists()
        assert not list((out / "resume").glob("step-??????"))
    call(train_sft, *flags)
    assert_equal_runs(out, undisturbed(train_sft))


@pytest.mark.slow
def test_pictures_that_vanish_lose_nothing(monkeypatch, call, rooms, tiny_model, tmp_path):
    """Deleted after step 2: the row that needs one is named. Put back, the run ends the same."""
    train, elsewhere = tmp_path / "train", tmp_path / "elsewhere"
    whole, out = tmp_path / "whole", tmp_path / "out"
    shutil.copytree(rooms / "train", train)
    data = train / GROUNDING
    more = ("--data", data, "--save-every", 1)
    call(train_sft, *sft_flags(rooms, tiny_model, whole, *more))
    flags = sft_flags(rooms, tiny_model, out, *more)

    def hide(step):
        if step == 2:
            (train / "images").rename(elsewhere)

    expected = rf"{data}:\d+: \S+: not a readable picture"
    with monkeypatch.context() as patch, pytest.raises(UserError, match=expected):
        after_end_of_step(patch, hide)
        call(train_sft, *flags)
    assert states(out) == ["step-000001", "step-000002"]
    elsewhere.rename(train / "images")
    call(train_sft, *flags, "--resume", "auto")
    assert_equal_runs(out, whole)


def test_a_directory_that_vanishes_is_one_line(monkeypatch, call, rooms, tiny_model, tmp_path):
    """As of a disk that was unmounted, or made read-only, in the middle of a run."""
    out = tmp_path / "out"

    def vanish(step):
        shutil.rmtree(out)
        out.touch()

    before_end_of_step(monkeypatch, vanish)
    expected = rf"^{out}/log.jsonl: cannot write there \(NotADirectoryError"
    with pytest.raises(UserError, match=expected):
        call(train_sft, *sft_flags(rooms, tiny_model, out))


@SCRIPTS
def test_no_hidden_random_numbers(
    monkeypatch, call, rooms, tiny_model, undisturbed, tmp_path, script
):
    """Every generator of python, numpy and torch is upset at every step; the run is the same.

    A trainer state needs to hold none of them.
    """
    monkeypatch.setitem(rewards.REWARDS, "accuracy", varied_reward)
    calm, upset = undisturbed(script), tmp_path / "upset"

    def seed(step):
        random.seed(step)
        np.random.seed(step)
        torch.manual_seed(step)

    before_end_of_step(monkeypatch, seed)
    call(script, *FLAGS[script](rooms, tiny_model, upset))
    assert_equal_runs(calm, upset)


@pytest.mark.slow
def test_what_an_interrupted_save_left_is_removed(monkeypatch, call, rooms, tiny_model, tmp_path):
    """45 GB of a 3B trainer state that nobody would ever read.

    A run that is taken back to an earlier state leaves the later ones: `auto` would take them.
    """
    out, first = tmp_path / "out", tmp_path / "step-000001"
    flags = sft_flags(rooms, tiny_model, out, "--save-every", 1, "--keep-last", 1)
    interrupt(monkeypatch, call, train_sft, flags, at=1)
    shutil.copytree(out / "resume" / "step-000001", out / "resume" / "step-000002.tmp")
    interrupt(monkeypatch, call, train_sft, (*flags, "--resume", "auto"), at=3)
    assert states(out) == ["step-000003"]
    shutil.copytree(out / "resume" / "step-000003", first)
    (first / "meta.json").write_text(json.dumps({"step": 1}))
    interrupt(monkeypatch, call, train_sft, (*flags, "--resume", first), at=2)
    assert states(out) == ["step-000002"]


def test_resume_from_a_path(monkeypatch, call, rooms, tiny_model, undisturbed, tmp_path):
    """A state of another directory continues in a new one; a path that is none is one line."""
    parts, new = tmp_path / "parts", tmp_path / "new"
    interrupt(monkeypatch, call, train_sft, sft_flags(rooms, tiny_model, parts), at=2)
    state = parts / "resume" / "step-000002"
    call(train_sft, *sft_flags(rooms, tiny_model, new, "--resume", state))
    assert weights(new) == weights(undisturbed(train_sft))
    with pytest.raises(UserError, match=r"--resume .*: no trainer state there"):
        call(train_sft, *sft_flags(rooms, tiny_model, tmp_path / "other", "--resume", parts))


def test_bfloat16_trains_float32_weights(call, rooms, tiny_model, tmp_path):
    """On a mesh of one process.

    The loss follows float32's, and weights move by less than bfloat16 could tell.
    """
    fp32, bf16 = tmp_path / "fp32", tmp_path / "bf16"
    flags = ("--learning-rate", 1e-5)
    call(train_sft, *sft_flags(rooms, tiny_model, fp32, *flags))
    call(train_sft, *sft_flags(rooms, tiny_model, bf16, *flags, "--dtype", "bfloat16"))
    for a, b in zip(log_of(fp32), log_of(bf16), strict=True):
        assert b["loss"] == pytest.approx(a["loss"], rel=0.01)
        assert b["loss"] != a["loss"]
    name = "model.embed_tokens.weight"
    before = load_file(tiny_model / "model.safetensors")[name]
    after = load_file(bf16 / "model.safetensors")[name]
    assert 1e-6 < (after - before).abs().max() < 1e-4


# ---------------------------------------------------------------------------------- many processes


@pytest.fixture
def drive(tmp_path):
    """Run a script by DRIVER."""

    def start(script, *flags, processes=2, **environment):
        path = tmp_path / f"drive_{script.__name__}.py"
        path.write_text(DRIVER)
        environment |= {"SCRIPT": script.__name__, "TESTS": str(TESTS)}
        return launch(path, *flags, processes=processes, **environment)

    return start


@pytest.fixture(scope="module")
def plain_model(tiny_model, tmp_path_factory):
    """tiny_model without the biases of tiny.look_back.

    Heads that attend to one token alone give their key biases a gradient that is rounding, and Adam
    makes whole steps of it, other ones for every order of summation.
    """
    folder = tmp_path_factory.mktemp("models") / "plain"
    shutil.copytree(tiny_model, folder)
    tensors = load_file(folder / "model.safetensors")
    for part in ("q_proj", "k_proj"):
        tensors[f"model.layers.0.self_attn.{part}.bias"].zero_()
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


def assert_same_run(start, one, two, drift=1e-3):
    """Losses to 1e-4 and each weight's change to `drift` of its norm."""
    for a, b in zip(log_of(one), log_of(two), strict=True):
        assert a["step"] == b["step"]
        assert a["num_tokens"] == b["num_tokens"]
        assert abs(a["loss"] - b["loss"]) <= 1e-4
    assert log_of(two)[0]["grad_norm"] == pytest.approx(log_of(one)[0]["grad_norm"], rel=1e-5)
    start, one, two = (load_file(folder / "model.safetensors") for folder in (start, one, two))
    assert one.keys() == two.keys()
    for name in one:
        assert one[name].shape == two[name].shape
        assert one[name].dtype == two[name].dtype
        assert (two[name] - one[name]).norm() <= drift * (one[name] - start[name]).norm(), name


def assert_same_gradients(one, two):
    """Of step 1, before the first difference in rounding has moved a weight.

    To 1e-5 of each tensor's largest entry.
    """
    one, two = torch.load(one), torch.load(two)
    assert one.keys() == two.keys()
    for name in one:
        assert one[name].shape == two[name].shape
        assert (one[name] - two[name]).abs().max() <= 1e-5 * one[name].abs().max(), name


def call_and_keep_gradients(monkeypatch, call, script, flags, path):
    with monkeypatch.context() as patch:
        patch.setattr(runtime, "clip_gradients", clip_gradients)  # put back at the end
        keep_gradients(runtime, path)
        call(script, *flags)


def test_ranks_add_gather_and_fail_together(tmp_path):
    """What rank 0 alone does is done once; its result, or its mistake, is that of every rank."""
    script = tmp_path / "ranks.py"
    script.write_text(TOGETHER)
    done = launch(script, tmp_path, processes=2)
    assert done.returncode == 0, done.stderr
    assert sorted(done.stdout.splitlines()) == ["claimed broken", "claimed whole", "once"]
    for rank in (0, 1):
        assert read_json(tmp_path / f"{rank}.json") == {
            "sum": {"loss": 2.0, "tokens": 6.0},
            "gather": [[0], [1]],
            "once": {"rank": 0},
            "error": "broken: cannot write there",
        }


@pytest.mark.slow
@pytest.mark.parametrize("processes", (2, 4))
def test_processes_train_as_one(monkeypatch, call, drive, rooms, plain_model, tmp_path, processes):
    """10 SFT steps and the sharded weights saved.

    5 rows make three micro-batches: one of 2 ranks gets a filler. The rows of a weight do not
    divide by 4.
    """
    one, many = tmp_path / "one", tmp_path / "many"
    more = ("--max-steps", 10, "--batch-size", 5, "--micro-batch", 2)
    flags = sft_flags(rooms, plain_model, one, *more)
    call_and_keep_gradients(monkeypatch, call, train_sft, flags, tmp_path / "one.pt")
    done = drive(
        train_sft,
        *sft_flags(rooms, plain_model, many, *more),
        processes=processes,
        GRADIENTS=str(tmp_path / "many.pt"),
    )
    assert done.returncode == 0, done.stderr
    assert_same_gradients(tmp_path / "one.pt", tmp_path / "many.pt")
    assert_same_run(plain_model, one, many)


@pytest.mark.slow
def test_text_only_rows_do_not_hang(call, rooms, plain_model, tmp_path):
    """Rows without pictures are the cheapest, so one rank has nothing else.

    It must enter the vision tower with the other, whose pictures need its part of the weights.
    """
    lines = (rooms / "train" / GROUNDING).read_text().splitlines()[:9]
    for i in range(9):
        user = {"role": "user", "content": f"What is {i} and {i}?"}
        assistant = {"role": "assistant", "content": str(2 * i)}
        lines.append(json.dumps({"messages": [user, assistant]}))
    data = tmp_path / "mixed.jsonl"
    data.write_text("\n".join(lines) + "\n")
    more = ("--data", data, "--images", rooms / "train" / "images")
    one, two = tmp_path / "one", tmp_path / "two"
    call(train_sft, *sft_flags(rooms, plain_model, one, *more))
    flags = sft_flags(rooms, plain_model, two, *more)
    done = launch(train_sft.__file__, *flags, processes=2)
    assert done.returncode == 0, done.stderr
    assert_same_run(plain_model, one, two)


@pytest.mark.slow
@pytest.mark.parametrize(
    "processes, more",
    (
        (2, ("--prompts-per-step", 3)),
        (4, ("--prompts-per-step", 5, "--num-iterations", 1, "--beta", 0)),
    ),
    ids=("iterations", "plain"),
)
def test_processes_roll_out_and_train_as_one(
    monkeypatch, call, drive, rooms, plain_model, tmp_path, processes, more
):
    """3 prompts on 2 ranks, 5 on 4: the same completions, whole groups, the same losses.

    Ranks decode on their own.
    """
    monkeypatch.setitem(rewards.REWARDS, "accuracy", varied_reward)
    one, many = tmp_path / "one", tmp_path / "many"
    more = ("--micro-batch", 2, "--max-steps", 5, *more)
    flags = grpo_flags(rooms, plain_model, one, *more)
    call_and_keep_gradients(monkeypatch, call, grpo, flags, tmp_path / "one.pt")
    done = drive(
        grpo,
        *grpo_flags(rooms, plain_model, many, *more),
        processes=processes,
        GRADIENTS=str(tmp_path / "many.pt"),
    )
    assert done.returncode == 0, done.stderr
    assert_same_gradients(tmp_path / "one.pt", tmp_path / "many.pt")
    groups = zip(read_rows(one / "rollouts.jsonl"), read_rows(many / "rollouts.jsonl"), strict=True)
    for a, b in groups:
        assert a["where"] == b["where"]
        assert a["completions"] == b["completions"]
        assert a["rewards"] == b["rewards"]
        assert len(b["completions"]) == 3
    assert_same_run(plain_model, one, many)
    for a, b in zip(log_of(one), log_of(many), strict=True):
        assert b == pytest.approx(a, rel=1e-3, abs=1e-5)


@pytest.mark.slow
def test_a_failing_rank_ends_all(rooms, tiny_model, tmp_path):
    """One rank meets a broken picture: it says which, and the other does not wait forever."""
    train, out = tmp_path / "train", tmp_path / "out"
    shutil.copytree(rooms / "train", train)
    data = train / GROUNDING
    for picture in {row["image"][0] for row in read_rows(data)[::7]}:
        (train / "images" / picture).write_bytes(b"broken")
    flags = sft_flags(rooms, tiny_model, out, "--data", data, "--max-steps", 30)
    done = launch(train_sft.__file__, *flags, processes=2)
    expected = r"train_sft.py: rank \d: \S+.jsonl:\d+: \S+: not a readable picture"
    assert done.returncode == 1
    assert re.search(expected, done.stderr), done.stderr
    assert not (out / "config.json").exists()


@pytest.mark.slow
@SCRIPTS
def test_processes_may_change_on_resume(
    monkeypatch, call, drive, rooms, plain_model, tmp_path, script
):
    """2 processes, 2 steps, SIGTERM to one of them; then 2 more steps.

    Exact on 2 processes, and close on 1.
    """
    monkeypatch.setitem(rewards.REWARDS, "accuracy", varied_reward)
    whole, parts, copy = tmp_path / "whole", tmp_path / "parts", tmp_path / "copy"
    done = drive(script, *FLAGS[script](rooms, plain_model, whole))
    assert done.returncode == 0, done.stderr
    flags = FLAGS[script](rooms, plain_model, parts, "--resume", "auto")
    done = drive(script, *flags, STOP_AT="2")
    assert done.returncode == 0, done.stderr
    assert states(parts) == ["step-000002"]
    assert "stopped after step 2 of 4; continue with: torchrun --nproc-per-node=2 " in done.stdout
    shutil.copytree(parts, copy)

    done = drive(script, *flags)
    assert done.returncode == 0, done.stderr
    assert_equal_runs(parts, whole)

    shutil.rmtree(parts)
    copy.rename(parts)
    call(script, *flags)
    assert_same_run(plain_model, whole, parts)


@pytest.mark.slow
def test_sigterm_is_not_an_error(rooms, tiny_model, tmp_path, drive):
    """Plain python: the run finishes its step, saves, says how to go on, and exits with 0."""
    out = tmp_path / "out"
    done = drive(train_sft, *sft_flags(rooms, tiny_model, out), processes=1, STOP_AT="2")
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    assert "stopped after step 2 of 4; continue with: python " in done.stdout
    assert states(out) == ["step-000002"]


@pytest.mark.slow
@pytest.mark.parametrize("processes", (1, 2))
def test_mistakes_on_the_command_line(rooms, tiny_model, tmp_path, processes):
    """Exit code 2 and one line under plain python (it once aborted, with gloo's threads alive).

    Under torchrun a line for each rank that came to say it, and torchrun's own report.
    """
    out = tmp_path / "out"
    holds_a_thesis(out)
    flags = sft_flags(rooms, tiny_model, out)
    done = launch(train_sft.__file__, *flags, processes=processes)
    lines = done.stderr.splitlines()
    ours = [line for line in lines if "train_sft.py: " in line and "not empty" in line]
    if processes == 1:
        assert done.returncode == 2
        assert len(ours) == 1
        assert lines == ours
    else:
        assert done.returncode == 1
        assert 1 <= len(ours) <= 2, done.stderr
        assert all(re.search(r"train_sft.py: rank [01]: ", line) for line in ours)


@pytest.mark.slow
def test_a_rank_that_hangs_ends_all(drive, rooms, tiny_model, tmp_path):
    """The other waits for it no longer than the backend's time-out, and says what it waited for."""
    done = drive(
        train_sft,
        *sft_flags(rooms, tiny_model, tmp_path / "out"),
        HANG_AT="2",
        TORCH_ELASTIC_SHUTDOWN_TIMEOUT="2",
    )
    assert done.returncode == 1
    assert "in end_step" in done.stderr, done.stderr
    assert "Timed out waiting" in done.stderr, done.stderr
    assert not (tmp_path / "out" / "config.json").exists()


@pytest.mark.slow
@pytest.mark.parametrize(
    "processes, number", ((1, signal.SIGINT), (1, signal.SIGTERM), (2, signal.SIGINT)), ids=str
)
def test_a_signal_to_the_whole_group(rooms, tiny_model, tmp_path, processes, number):
    """Ctrl-C reaches the run and the workers that read its pictures; torchrun passes it on too.

    The step is finished and saved, nothing is left running, and plain python has not failed.
    """
    out = tmp_path / "out"
    flags = sft_flags(rooms, tiny_model, out, "--workers", 2, "--max-steps", 3000)
    command = kill_resume.command(processes, train_sft.__file__, *flags)
    log = out / "log.jsonl"
    with open(tmp_path / "said.txt", "w+") as said:
        process = subprocess.Popen(
            command,
            stdout=said,
            stderr=said,
            start_new_session=True,
            env=kill_resume.ENVIRONMENT,
        )
        while process.poll() is None and not (log.is_file() and log.read_bytes().count(b"\n") >= 2):
            time.sleep(0.05)
        started = kill_resume.tree(process.pid)
        os.killpg(process.pid, number)
        code = process.wait(60)
        said.seek(0)
        text = said.read()
    step = len(read_rows(log))
    assert states(out) == [f"step-{step:06d}"], text
    assert f"stopped after step {step} of 3000" in text
    if processes == 1:
        assert code == 0
        assert "Traceback" not in text
    else:
        assert "DataLoader worker" not in text
    assert len(started) > processes
    assert not any(Path(f"/proc/{pid}/task").exists() for pid in started)


@pytest.mark.slow
def test_kill_9_loses_nothing(rooms, tiny_model, tmp_path):
    """Four moments; tests/kill_resume.py --kills 50 is the long version."""
    said = kill_resume.disturb(tmp_path, rooms / "train", tiny_model, kills=4)
    assert said.startswith("4 kills")
