"""runtime.py: flags, exact resume, and that the number of processes changes nothing.

Runs in this process stop by SIGTERM at a step of our choice; runs under torchrun use DRIVER, which does the same there
and gives untrained models rewards that differ. Two processes reduce in another order than one: losses are equal to
1e-4. A weight's change is compared by its norm, as Adam turns rounding in a near-zero gradient into a full step.
"""

import argparse
import json
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
from conftest import keep_gradients, launch, varied_reward
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

import grpo
import ladder
import rewards
import runtime
import train_sft
from files import UserError
from runtime import adamw, clip_gradients, main_guard, recipe_settings, rows_of_step, scheduled_rate
from settings import Parser

TIMES = re.compile(".*_(time|per_second)")
DRIVER = """
import datetime, os, signal, sys, time
sys.path[:0] = [REPOSITORY, TESTS]
import conftest, rewards, runtime, SCRIPT
import torch.distributed as dist
if "GRADIENTS" in os.environ:
    conftest.keep_gradients(SCRIPT, os.environ["GRADIENTS"])
if "HANG_AT" in os.environ:
    begin = dist.init_process_group
    dist.init_process_group = lambda backend: begin(backend, timeout=datetime.timedelta(seconds=8))
rewards.REWARDS["accuracy"] = conftest.varied_reward
end_step = runtime.Run.end_step
def ends(run, model, optimizer, step, *others, **more):
    if run.ranks.rank == 0 and str(step) == os.environ.get("STOP_AT"):
        signal.raise_signal(signal.SIGTERM)
    if run.ranks.rank == 1 and str(step) == os.environ.get("HANG_AT"):
        time.sleep(100)
    return end_step(run, model, optimizer, step, *others, **more)
runtime.Run.end_step = ends
runtime.main_guard(SCRIPT.main)
"""


def read_rows(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def log_of(out):
    """The log's rows but for what depends on the clock."""
    return [
        {key: value for key, value in row.items() if not TIMES.fullmatch(key)}
        for row in read_rows(out / "log.jsonl")
    ]


def exit_line(capsys, function, *arguments):
    """What a call that ends the program with code 2 wrote to stderr: one line."""
    with pytest.raises(SystemExit) as error:
        function(*arguments)
    lines = capsys.readouterr().err.splitlines()
    assert error.value.code == 2 and len(lines) == 1, lines
    return lines[0]


# ---------------------------------------------------------------------------------------------- flags


@pytest.mark.parametrize(
    "argv, expected",
    (
        (
            ["--stage", "1", "--learning-rat", "1"],
            "unknown argument --learning-rat, did you mean --learning-rate?",
        ),
        (["--stage", "1", "--lr", "1e-5"], "unknown argument --lr"),
        (
            ["--stage", "1", "--save_evry=3"],
            "unknown argument --save-evry=3, did you mean --save-every?",
        ),
        (["--stage", "1", "extra"], "unknown argument extra"),
        (["--stage", "1", "--beta", "0.1"], "unknown argument --beta"),  # of GRPO only
        (["--stage", "3"], "argument --stage: invalid choice: '3'"),
        ([], "the following arguments are required: --stage"),
        (["--stage", "1", "--preset", "huge"], "argument --preset: invalid choice: 'huge'"),
        (["--stage", "1", "--max-steps", "ten"], "argument --max-steps: invalid int value: 'ten'"),
        (["--stage", "1", "--max-steps", "0"], "--max-steps is 0, expected a positive number"),
        (["--stage", "1", "--micro-batch", "0"], "--micro-batch is 0, expected a positive number"),
        (["--stage", "1", "--batch-size", "-8"], "--batch-size is -8, expected a positive number"),
        (
            ["--stage", "1", "--learning-rate", "nan"],
            "--learning-rate is nan, expected a positive number",
        ),
        (["--stage", "1", "--epochs", "inf"], "--epochs is inf, expected a positive number"),
        (["--stage", "1", "--replay-ratio", "1"], "--replay-ratio is 1.0, expected 0 to 0.99"),
        (["--stage", "1", "--curriculum", "2"], "--curriculum is 2.0, expected 0 to 1"),
        (["--stage", "1", "--seed", "-1"], "--seed is -1, expected 0 to inf"),
        (["--stage", "1", "--betas", "0.9"], "--betas has 1 numbers, expected 2"),
        (["--stage", "1", "--dtype", "float16"], "argument --dtype: invalid choice: 'float16'"),
        (["--stage", "1", "--preset", "paper"], "preset paper has no default for --model; give it"),
        (
            ["--stage", "2", "--preset", "paper", "--model", "m", "--out", "o"],
            "preset paper has no default for --data",
        ),
    ),
    ids=lambda value: " ".join(value)[:40] if isinstance(value, list) else "",
)
def test_wrong_flags_are_one_line(capsys, argv, expected):
    """No traceback, no usage text, no guess at what was meant: exit code 2 and a line that says what to type."""
    assert expected in exit_line(capsys, recipe_settings, "", argv)


@pytest.mark.parametrize(
    "argv, expected",
    (
        (["--num-iterations", "0"], "--num-iterations is 0, expected a positive number"),
        (["--temperature", "nan"], "--temperature is nan, expected a positive number"),
        (["--epsilon", "-0.1"], "--epsilon is -0.1, expected 0 to inf"),
        (["--loss-type", "ppo"], "argument --loss-type: invalid choice: 'ppo'"),
        (["--batch-size", "4"], "unknown argument --batch-size"),
        (
            ["--preset", "paper", "--data", "d.jsonl", "--out", "o"],
            "preset paper has no default for --model; give it",
        ),
    ),
    ids=lambda value: " ".join(value)[:40] if isinstance(value, list) else "",
)
def test_wrong_grpo_flags_are_one_line(capsys, argv, expected):
    assert expected in exit_line(capsys, recipe_settings, "", argv, "grpo")


def test_flags_take_the_place_of_the_recipe():
    """Dashes and underscores, = and blank alike; everything else is the recipe's row, for every preset and stage."""
    for preset, rows in ladder.RECIPES.items():
        for stage, row in rows.items():
            flags = [
                "--preset",
                preset,
                "--model",
                "m",
                "--data",
                "a.jsonl",
                "b.jsonl",
                "--out=under_score",
                "--max_steps=7",
                "--max-pixels",
                "50176",
                "--activation_checkpointing",
                "--no-reshard-after-forward",
            ]
            flags += [] if stage == "grpo" else ["--stage", stage]
            args = recipe_settings("", flags, "grpo" if stage == "grpo" else None)
            assert vars(args) == row | {
                "preset": preset,
                "stage": stage,
                "model": "m",
                "data": ["a.jsonl", "b.jsonl"],
                "out": "under_score",
                "max_steps": 7,
                "max_pixels": 50176,
                "activation_checkpointing": True,
                "reshard_after_forward": False,
            }


def test_every_setting_has_a_flag():
    """What a recipe says can be said on the command line too, and FLAGS describes nothing that no recipe has."""
    names = {name for rows in ladder.RECIPES.values() for row in rows.values() for name in row}
    assert names == set(ladder.FLAGS)


def test_values_may_hold_underscores(capsys):
    """Only a flag's name is rewritten."""
    parser = Parser(prog="x")
    parser.add_argument("--out-dir")
    assert parser.parse_args(["--out_dir=a_b=c_d"]).out_dir == "a_b=c_d"
    assert parser.parse_args(["--out-dir", "a_b"]).out_dir == "a_b"


def test_main_guard_turns_a_mistake_into_one_line(capsys):
    """UserError alone: anything else is our own mistake and keeps its traceback."""

    def fails():
        raise UserError("rows.jsonl:3: answer is 'Z', expected a letter")

    def breaks():
        raise ValueError("ours")

    assert exit_line(capsys, main_guard, fails).endswith(
        ": rows.jsonl:3: answer is 'Z', expected a letter"
    )
    with pytest.raises(ValueError, match="ours"):
        main_guard(breaks)


# ---------------------------------------------------------------------------------------------- optimizer and schedule


@pytest.mark.parametrize("name", ("cosine", "linear"))
@given(st.integers(1, 300), st.sampled_from((0.0, 0.1, 0.5)))
def test_schedule_is_transformers(name, steps, ratio):
    """Warm-up ends at the peak, one step earlier than there (whose first step has rate 0); the decay is the same."""
    from transformers import get_scheduler

    warmup = round(steps * ratio)
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=2.0)
    theirs = get_scheduler(name, optimizer, warmup, steps).lr_lambdas[0]
    args = argparse.Namespace(learning_rate=2.0, warmup_ratio=ratio, lr_scheduler_type=name)
    for step in range(1, steps + 1):
        assert scheduled_rate(step, steps, args) == pytest.approx(
            2.0 * theirs(step if step <= warmup else step - 1)
        )


def test_weight_decay_is_on_matrices_only():
    """Norms and biases are not pulled to zero; Adam's other numbers are the recipe's."""
    model = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.LayerNorm(2))
    optimizer = adamw(model, SimpleNamespace(weight_decay=0.1, learning_rate=0.5, betas=[0.8, 0.9]))
    before = [p.detach().clone() for p in model.parameters()]
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    assert torch.allclose(model[0].weight, before[0] * (1 - 0.5 * 0.1))
    assert all(torch.equal(p, b) for p, b in list(zip(model.parameters(), before))[1:])
    assert all(
        group["betas"] == (0.8, 0.9) and group["eps"] == 1e-8 for group in optimizer.param_groups
    )


def test_clipping_scales_all_gradients_together():
    model = torch.nn.Linear(2, 1)
    model.weight.grad, model.bias.grad = torch.tensor([[3.0, 0.0]]), torch.tensor([4.0])
    assert clip_gradients(model, 10.0) == 5.0 and model.bias.grad.item() == 4.0
    assert clip_gradients(model, 1.0) == 5.0
    assert torch.allclose(
        torch.cat((model.weight.grad[0], model.bias.grad)), torch.tensor([0.6, 0.0, 0.8])
    )


# ---------------------------------------------------------------------------------------------- the directory


def sft_flags(rooms, model, out, *more):
    return (
        "--stage",
        "1",
        "--model",
        model,
        "--data",
        rooms / "train" / "spld_grounding_data.jsonl",
        "--out",
        out,
        "--batch-size",
        4,
        "--micro-batch",
        2,
        "--max-steps",
        4,
        *more,
    )


def grpo_flags(rooms, model, out, *more):
    return (
        "--model",
        model,
        "--data",
        rooms / "train" / "spld_spatial_data.jsonl",
        "--out",
        out,
        "--max-steps",
        4,
        "--prompts-per-step",
        2,
        "--num-generations",
        3,
        "--max-completion-length",
        8,
        "--num-iterations",
        2,
        *more,
    )


FLAGS = {train_sft: sft_flags, grpo: grpo_flags}


def interrupt(monkeypatch, call, script, flags, at):
    """Run a script's main and send it SIGTERM when step `at` ends."""
    end_step = runtime.Run.end_step

    def ends(run, model, optimizer, step, *others, **more):
        if step == at:
            signal.raise_signal(signal.SIGTERM)
        return end_step(run, model, optimizer, step, *others, **more)

    with monkeypatch.context() as patch:
        patch.setattr(runtime.Run, "end_step", ends)
        call(script, *flags)


def states(out):
    return sorted(path.name for path in (out / "resume").iterdir())


@pytest.mark.parametrize(
    "make, expected",
    (
        (
            lambda out: (out.mkdir(), (out / "thesis.txt").touch()),
            "not empty; continue it with --resume auto",
        ),
        (lambda out: out.touch(), "cannot write there"),
        (lambda out: out.parent.rmdir() or out.parent.touch(), "cannot write there"),
    ),
    ids=("not empty", "a file", "under a file"),
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
        assert str(error.value).startswith(f"{out}: {expected}") and "\n" not in str(error.value)
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
    """A bare command on a fresh machine says what to run before it, and starts nothing long by itself."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError) as error:
        call(script, *flags)
    assert (
        str(error.value) == f"runs/tiny/{made}: no model there yet; make it with: python {command}"
    )
    assert not list(tmp_path.iterdir())


def test_a_bare_first_stage_makes_rooms_and_model(monkeypatch, call, tmp_path):
    """The first command a reader types needs nothing but the repository (fewer rooms here than its own)."""
    monkeypatch.chdir(tmp_path)
    for rooms in ("tiny", "base"):
        command = (
            ladder.MADE_BY[f"runs/{rooms}/rooms"].split(" --scenes")[0]
            + " --scenes 8 --test-scenes 2"
        )
        monkeypatch.setitem(ladder.MADE_BY, f"runs/{rooms}/rooms", command)
    call(train_sft, "--stage", "base", "--max-steps", 1, "--batch-size", 2)
    assert (tmp_path / "runs" / "base" / "model" / "config.json").is_file()
    (tmp_path / "base").symlink_to(
        tmp_path / "runs" / "base" / "model"
    )  # in place of the repository's
    call(train_sft, "--stage", "1", "--max-steps", 1, "--batch-size", 2)
    assert (tmp_path / "runs" / "tiny" / "stage1" / "config.json").is_file()
    assert sorted(str(path) for path in Path("runs").glob("*/*")) == [
        "runs/base/model",
        "runs/base/rooms",
        "runs/base/start",
        "runs/tiny/rooms",
        "runs/tiny/stage1",
    ]


def test_a_run_continues_only_as_it_began(monkeypatch, call, rooms, tiny_model, tmp_path, capsys):
    """Changed settings are refused by name and value; those that do not touch the result may change; a finished run
    is left alone; without --resume a started one is refused."""
    out = tmp_path / "out"
    interrupt(monkeypatch, call, train_sft, sft_flags(rooms, tiny_model, out), at=2)
    assert states(out) == ["step-000002"] and not (out / "config.json").exists()
    assert (
        "stopped after step 2 of 4; continue with: python train_sft.py --stage 1 --model"
        in capsys.readouterr().out
    )
    with pytest.raises(UserError, match="not empty; continue it with --resume auto"):
        call(train_sft, *sft_flags(rooms, tiny_model, out))
    with pytest.raises(UserError) as error:
        call(
            train_sft,
            *sft_flags(
                rooms, tiny_model, out, "--resume", "auto", "--learning-rate", 1, "--seed", 3
            ),
        )
    rate = ladder.RECIPES["tiny"]["1"]["learning_rate"]
    assert (
        str(error.value)
        == f"{out}: was begun with other settings: seed 0, now 3, learning_rate {rate}, now 1.0"
    )
    free = ("--micro-batch", 4, "--save-every", 1, "--keep-last", 3)
    call(train_sft, *sft_flags(rooms, tiny_model, out, "--resume", "auto", *free))
    assert f"resumed {out / 'resume' / 'step-000002'}" in capsys.readouterr().out
    assert states(out) == ["step-000002", "step-000003"] and (out / "config.json").exists()
    weights = (out / "model.safetensors").read_bytes()
    call(train_sft, *sft_flags(rooms, tiny_model, out, "--resume", "auto"))
    assert f"{out}: finished already" in capsys.readouterr().out
    assert (out / "model.safetensors").read_bytes() == weights and [
        row["step"] for row in log_of(out)
    ] == [1, 2, 3, 4]


def test_the_log_is_cut_to_the_state(tmp_path):
    """Rows of steps that will be done again go, and so does a line that was being written when the machine died."""
    run = SimpleNamespace(out=tmp_path, ranks=SimpleNamespace(rank=0))
    rows = ['{"step": 1, "x": 1}\n', '{"step": 2}\n', '{"step": 3}\n', '{"step": 4, "lo']
    (tmp_path / "log.jsonl").write_text("".join(rows))
    (tmp_path / "rollouts.jsonl").write_text("".join(rows[:1] * 2 + rows[2:]))
    runtime.Run.cut_log(run, 2)
    assert (tmp_path / "log.jsonl").read_text() == "".join(rows[:2])
    assert (tmp_path / "rollouts.jsonl").read_text() == "".join(rows[:1] * 2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["log.jsonl", "rollouts.jsonl"]


# ---------------------------------------------------------------------------------------------- exact resume


@pytest.mark.parametrize("script", (train_sft, grpo), ids=lambda script: script.__name__)
def test_stop_and_resume_is_exact(monkeypatch, call, rooms, tiny_model, tmp_path, script):
    """4 steps equal 2, SIGTERM, and 2 more, bit for bit: weights, log and rollouts. GRPO is stopped in the middle of
    the iterations over one rollout and finishes them first."""
    monkeypatch.setitem(rewards.REWARDS, "accuracy", varied_reward)
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    call(script, *FLAGS[script](rooms, tiny_model, whole))
    interrupt(
        monkeypatch,
        call,
        script,
        FLAGS[script](rooms, tiny_model, parts),
        at=1 if script is grpo else 2,
    )
    assert states(parts) == ["step-000002"] and [row["step"] for row in log_of(parts)] == [1, 2]
    call(script, *FLAGS[script](rooms, tiny_model, parts, "--resume", "auto"))
    assert log_of(parts) == log_of(whole) and len(log_of(whole)) == 4
    assert all(row["grad_norm"] > 1e-3 for row in log_of(whole))
    assert (parts / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()
    if script is grpo:
        assert (parts / "rollouts.jsonl").read_bytes() == (whole / "rollouts.jsonl").read_bytes()
        rollouts, data_file = (
            read_rows(whole / "rollouts.jsonl"),
            rooms / "train" / "spld_spatial_data.jsonl",
        )
        rows = [
            row
            for rollout in (1, 2)
            for row in rows_of_step(rollout, len(read_rows(data_file)), 2, 0)
        ]
        assert [(r["step"], r["where"]) for r in rollouts] == [
            (step, f"{data_file}:{row + 1}") for step, row in zip((1, 1, 3, 3), rows)
        ]


def test_death_between_saves_is_exact(monkeypatch, call, rooms, tiny_model, tmp_path):
    """A run that dies after step 3 goes on from the state of step 2, repeats step 3, and ends the same."""
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    call(train_sft, *sft_flags(rooms, tiny_model, whole))
    end_step = runtime.Run.end_step

    def dies(run, model, optimizer, step, *others, **more):
        stop = end_step(run, model, optimizer, step, *others, **more)
        if step == 3:
            raise MemoryError
        return stop

    with monkeypatch.context() as patch, pytest.raises(MemoryError):
        patch.setattr(runtime.Run, "end_step", dies)
        call(train_sft, *sft_flags(rooms, tiny_model, parts, "--save-every", 2))
    assert states(parts) == ["step-000002"] and [row["step"] for row in log_of(parts)] == [1, 2, 3]
    call(train_sft, *sft_flags(rooms, tiny_model, parts, "--save-every", 2, "--resume", "auto"))
    assert log_of(parts) == log_of(whole)
    assert (parts / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()


def damage(state, how):
    if how == "no metadata":
        (state / ".metadata").unlink()
    elif how == "torn meta.json":
        (state / "meta.json").write_text('{"step"')
    else:
        largest = max(state.glob("*.distcp"), key=lambda path: path.stat().st_size)
        content = largest.read_bytes()
        largest.write_bytes(content[: len(content) // 2] if how == "torn" else b"\0" * len(content))


@pytest.mark.parametrize("how", ("torn", "zeros", "no metadata", "torn meta.json"))
def test_a_damaged_state_falls_back(monkeypatch, call, rooms, tiny_model, tmp_path, capsys, how):
    """The newest state is unreadable: the run says so, takes the one before and ends as if undisturbed; if none can
    be read it is refused, not begun again."""
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    call(train_sft, *sft_flags(rooms, tiny_model, whole))
    flags = sft_flags(rooms, tiny_model, parts, "--save-every", 1)
    interrupt(monkeypatch, call, train_sft, flags, at=3)
    assert states(parts) == ["step-000002", "step-000003"]  # the newest two are kept
    damage(parts / "resume" / "step-000003", how)
    shutil.copytree(parts, tmp_path / "worse")
    capsys.readouterr()
    call(train_sft, *flags, "--resume", "auto")
    said = capsys.readouterr().out
    assert f"{parts / 'resume' / 'step-000003'}: not readable" in said
    assert f"resumed {parts / 'resume' / 'step-000002'}" in said
    assert log_of(parts) == log_of(whole)
    assert (parts / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()
    shutil.rmtree(parts)
    (tmp_path / "worse").rename(parts)
    damage(parts / "resume" / "step-000002", how)
    with pytest.raises(UserError, match="none of its 2 trainer states can be read"):
        call(train_sft, *flags, "--resume", "auto")


def test_a_full_disk_loses_nothing(call, rooms, tiny_model, tmp_path):
    """No room for a trainer state or for the model: one line that says which; no half-written one is ever taken for
    a whole one, and with room again the run goes on from what it had."""
    out, (soft, hard) = tmp_path / "out", resource.getrlimit(resource.RLIMIT_FSIZE)
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
        assert expected in str(error.value) and "\n" not in str(error.value)
        assert not (out / "config.json").exists() and not list((out / "resume").glob("step-??????"))
    call(train_sft, *flags)
    call(train_sft, *sft_flags(rooms, tiny_model, tmp_path / "whole"))
    assert log_of(out) == log_of(tmp_path / "whole")
    assert (out / "model.safetensors").read_bytes() == (
        tmp_path / "whole" / "model.safetensors"
    ).read_bytes()


def test_pictures_that_vanish_lose_nothing(monkeypatch, call, rooms, tiny_model, tmp_path):
    """Deleted after step 2: the row that needs one is named; put back, the run goes on and ends as if undisturbed."""
    shutil.copytree(rooms / "train", tmp_path / "train")
    images, data = tmp_path / "train" / "images", tmp_path / "train" / "spld_grounding_data.jsonl"
    whole, out = (
        sft_flags(rooms, tiny_model, tmp_path / name, "--data", data, "--save-every", 1)
        for name in ("whole", "out")
    )
    call(train_sft, *whole)
    end_step = runtime.Run.end_step

    def ends(run, model, optimizer, step, *others, **more):
        stop = end_step(run, model, optimizer, step, *others, **more)
        if step == 2:
            images.rename(tmp_path / "elsewhere")
        return stop

    with (
        monkeypatch.context() as patch,
        pytest.raises(UserError, match=rf"{data}:\d+: \S+: not a readable picture"),
    ):
        patch.setattr(runtime.Run, "end_step", ends)
        call(train_sft, *out)
    assert states(tmp_path / "out") == ["step-000001", "step-000002"]
    (tmp_path / "elsewhere").rename(images)
    call(train_sft, *out, "--resume", "auto")
    assert log_of(tmp_path / "out") == log_of(tmp_path / "whole")
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == (
        tmp_path / "whole" / "model.safetensors"
    ).read_bytes()


def test_a_directory_that_vanishes_is_one_line(monkeypatch, call, rooms, tiny_model, tmp_path):
    """As of a disk that was unmounted, or made read-only, in the middle of a run."""
    end_step, out = runtime.Run.end_step, tmp_path / "out"

    def ends(run, *others, **more):
        shutil.rmtree(out)
        out.touch()
        return end_step(run, *others, **more)

    monkeypatch.setattr(runtime.Run, "end_step", ends)
    with pytest.raises(
        UserError, match=rf"^{out}/log.jsonl: cannot write there \(NotADirectoryError"
    ):
        call(train_sft, *sft_flags(rooms, tiny_model, out))


@pytest.mark.parametrize("script", (train_sft, grpo), ids=lambda script: script.__name__)
def test_no_hidden_random_numbers(monkeypatch, call, rooms, tiny_model, tmp_path, script):
    """Every generator of python, numpy and torch is upset at every step, and the run is the same: a trainer state needs
    to hold none of them."""
    monkeypatch.setitem(rewards.REWARDS, "accuracy", varied_reward)
    call(script, *FLAGS[script](rooms, tiny_model, tmp_path / "calm"))
    end_step = runtime.Run.end_step

    def ends(run, model, optimizer, step, *others, **more):
        random.seed(step)
        np.random.seed(step)
        torch.manual_seed(step)
        return end_step(run, model, optimizer, step, *others, **more)

    monkeypatch.setattr(runtime.Run, "end_step", ends)
    call(script, *FLAGS[script](rooms, tiny_model, tmp_path / "upset"))
    assert log_of(tmp_path / "calm") == log_of(tmp_path / "upset")
    assert (tmp_path / "calm" / "model.safetensors").read_bytes() == (
        tmp_path / "upset" / "model.safetensors"
    ).read_bytes()


def test_what_an_interrupted_save_left_is_removed(monkeypatch, call, rooms, tiny_model, tmp_path):
    """45 GB of a 3B trainer state that nobody would ever read; and a state that is newer than the one that goes on is
    kept, as it may be the only one that is whole."""
    out = tmp_path / "out"
    flags = sft_flags(rooms, tiny_model, out, "--save-every", 1, "--keep-last", 1)
    interrupt(monkeypatch, call, train_sft, flags, at=1)
    shutil.copytree(out / "resume" / "step-000001", out / "resume" / "step-000002.tmp")
    interrupt(monkeypatch, call, train_sft, (*flags, "--resume", "auto"), at=3)
    assert states(out) == ["step-000003"]
    shutil.copytree(out / "resume" / "step-000003", tmp_path / "step-000001")
    (tmp_path / "step-000001" / "meta.json").write_text(json.dumps({"step": 1}))
    interrupt(monkeypatch, call, train_sft, (*flags, "--resume", tmp_path / "step-000001"), at=2)
    assert states(out) == ["step-000002", "step-000003"]


def test_resume_from_a_path(monkeypatch, call, rooms, tiny_model, tmp_path):
    """A state of another directory continues in a new one; a path that is none is one line."""
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    call(train_sft, *sft_flags(rooms, tiny_model, whole))
    interrupt(monkeypatch, call, train_sft, sft_flags(rooms, tiny_model, parts), at=2)
    state = parts / "resume" / "step-000002"
    call(train_sft, *sft_flags(rooms, tiny_model, tmp_path / "new", "--resume", state))
    assert (tmp_path / "new" / "model.safetensors").read_bytes() == (
        whole / "model.safetensors"
    ).read_bytes()
    with pytest.raises(UserError, match="--resume .*: no trainer state there"):
        call(train_sft, *sft_flags(rooms, tiny_model, tmp_path / "other", "--resume", parts))


def test_bfloat16_trains_float32_weights(call, rooms, tiny_model, tmp_path):
    """On a mesh of one process: the loss follows float32's, and weights move by less than bfloat16 could tell."""
    flags = ("--learning-rate", 1e-5)
    call(train_sft, *sft_flags(rooms, tiny_model, tmp_path / "fp32", *flags))
    call(train_sft, *sft_flags(rooms, tiny_model, tmp_path / "bf16", *flags, "--dtype", "bfloat16"))
    for a, b in zip(log_of(tmp_path / "fp32"), log_of(tmp_path / "bf16"), strict=True):
        assert b["loss"] == pytest.approx(a["loss"], rel=0.01) and b["loss"] != a["loss"]
    before, after = (
        load_file(tiny_model / "model.safetensors"),
        load_file(tmp_path / "bf16" / "model.safetensors"),
    )
    moved = (after["model.embed_tokens.weight"] - before["model.embed_tokens.weight"]).abs()
    assert 1e-6 < moved.max() < 1e-4


# ---------------------------------------------------------------------------------------------- many processes


@pytest.fixture
def driver(tmp_path):
    """The path of a script's DRIVER."""

    def write(script):
        tests, path = Path(__file__).resolve().parent, tmp_path / f"drive_{script}.py"
        names = {"SCRIPT": script, "REPOSITORY": repr(str(tests.parent)), "TESTS": repr(str(tests))}
        path.write_text(re.sub("|".join(names), lambda match: names[match[0]], DRIVER))
        return path

    return write


@pytest.fixture(scope="module")
def plain_model(tiny_model, tmp_path_factory):
    """tiny_model without the biases of tiny.look_back. Heads that attend to one token alone give their key biases a gradient
    that is rounding, and Adam makes whole steps of it, other ones for every order of summation."""
    folder = tmp_path_factory.mktemp("models") / "plain"
    shutil.copytree(tiny_model, folder)
    weights = load_file(folder / "model.safetensors")
    for part in ("q_proj", "k_proj"):
        weights[f"model.layers.0.self_attn.{part}.bias"].zero_()
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    return folder


def assert_same_run(start, one, two, drift=1e-3):
    """Losses to 1e-4 and each weight's change to `drift` of its norm."""
    for a, b in zip(log_of(one), log_of(two), strict=True):
        assert (
            a["step"] == b["step"]
            and a["num_tokens"] == b["num_tokens"]
            and abs(a["loss"] - b["loss"]) <= 1e-4
        )
    assert log_of(two)[0]["grad_norm"] == pytest.approx(log_of(one)[0]["grad_norm"], rel=1e-5)
    start, one, two = (load_file(folder / "model.safetensors") for folder in (start, one, two))
    assert one.keys() == two.keys()
    for name in one:
        assert one[name].shape == two[name].shape and one[name].dtype == two[name].dtype
        assert (two[name] - one[name]).norm() <= drift * (one[name] - start[name]).norm(), name


def assert_same_gradients(one, two):
    """Of step 1, before the first difference in rounding has moved a weight: to 1e-5 of each tensor's largest entry."""
    one, two = torch.load(one), torch.load(two)
    assert one.keys() == two.keys()
    for name in one:
        assert (
            one[name].shape == two[name].shape
            and (one[name] - two[name]).abs().max() <= 1e-5 * one[name].abs().max()
        ), name


@pytest.mark.parametrize("processes", (2, pytest.param(4, marks=pytest.mark.slow)))
def test_processes_train_as_one(monkeypatch, call, driver, rooms, plain_model, tmp_path, processes):
    """10 SFT steps and the sharded weights saved. 5 rows make three micro-batches: one of 2 ranks gets a filler; and
    the rows of a weight do not divide by 4."""
    flags = ("--max-steps", 10, "--batch-size", 5, "--micro-batch", 2)
    with monkeypatch.context() as patch:
        patch.setattr(train_sft, "clip_gradients", clip_gradients)  # put back at the end
        keep_gradients(train_sft, tmp_path / "one.pt")
        call(train_sft, *sft_flags(rooms, plain_model, tmp_path / "one", *flags))
    done = launch(
        driver("train_sft"),
        *sft_flags(rooms, plain_model, tmp_path / "many", *flags),
        processes=processes,
        GRADIENTS=str(tmp_path / "many.pt"),
    )
    assert done.returncode == 0, done.stderr
    assert_same_gradients(tmp_path / "one.pt", tmp_path / "many.pt")
    assert_same_run(plain_model, tmp_path / "one", tmp_path / "many")


@pytest.mark.slow
def test_text_only_rows_do_not_hang(call, rooms, plain_model, tmp_path):
    """Rows without pictures are the cheapest, so one rank has nothing else: it must enter the vision tower with the
    other, whose pictures need its part of the weights."""
    rows = [
        {
            "messages": [
                {"role": "user", "content": f"What is {i} and {i}?"},
                {"role": "assistant", "content": str(2 * i)},
            ]
        }
        for i in range(9)
    ]
    pictures = (rooms / "train" / "spld_grounding_data.jsonl").read_text().splitlines()[:9]
    data = tmp_path / "mixed.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows) + "\n".join(pictures) + "\n")
    flags = ("--data", data, "--images", rooms / "train" / "images")
    call(train_sft, *sft_flags(rooms, plain_model, tmp_path / "one", *flags))
    done = launch(
        train_sft.__file__, *sft_flags(rooms, plain_model, tmp_path / "two", *flags), processes=2
    )
    assert done.returncode == 0, done.stderr
    assert_same_run(plain_model, tmp_path / "one", tmp_path / "two")


@pytest.mark.slow
@pytest.mark.parametrize(
    "processes, more",
    (
        (2, ("--prompts-per-step", 3)),
        (
            4,
            (
                "--prompts-per-step",
                5,
                "--num-iterations",
                1,
                "--beta",
                0,
                "--no-reshard-after-forward",
            ),
        ),
    ),
    ids=("iterations", "plain"),
)
def test_processes_roll_out_and_train_as_one(
    monkeypatch, call, driver, rooms, plain_model, tmp_path, processes, more
):
    """3 prompts on 2 ranks, 5 on 4: the same completions, whole groups, the same losses; ranks decode on their own."""
    monkeypatch.setitem(rewards.REWARDS, "accuracy", varied_reward)
    more = ("--micro-batch", 2, "--max-steps", 5, *more)
    with monkeypatch.context() as patch:
        patch.setattr(grpo, "clip_gradients", clip_gradients)  # put back at the end
        keep_gradients(grpo, tmp_path / "one.pt")
        call(grpo, *grpo_flags(rooms, plain_model, tmp_path / "one", *more))
    done = launch(
        driver("grpo"),
        *grpo_flags(rooms, plain_model, tmp_path / "two", *more),
        processes=processes,
        GRADIENTS=str(tmp_path / "two.pt"),
    )
    assert_same_gradients(tmp_path / "one.pt", tmp_path / "two.pt")
    assert done.returncode == 0, done.stderr
    one, two = (read_rows(tmp_path / name / "rollouts.jsonl") for name in ("one", "two"))
    assert len(one) == len(two)
    for a, b in zip(one, two):
        assert (
            a["where"] == b["where"]
            and a["completions"] == b["completions"]
            and a["rewards"] == b["rewards"]
        )
        assert len(b["completions"]) == 3
    assert_same_run(plain_model, tmp_path / "one", tmp_path / "two")
    for a, b in zip(log_of(tmp_path / "one"), log_of(tmp_path / "two")):
        assert b == pytest.approx(a, rel=1e-3, abs=1e-5)


@pytest.mark.slow
def test_a_failing_rank_ends_all(rooms, tiny_model, tmp_path):
    """One rank meets a broken picture: it says which, and the other does not wait for it forever."""
    shutil.copytree(rooms / "train", tmp_path / "train")
    path = tmp_path / "train" / "spld_grounding_data.jsonl"
    for picture in {row["image"][0] for row in read_rows(path)[::7]}:
        (tmp_path / "train" / "images" / picture).write_bytes(b"broken")
    flags = sft_flags(rooms, tiny_model, tmp_path / "out", "--data", path, "--max-steps", 30)
    done = launch(train_sft.__file__, *flags, processes=2)
    expected = r"train_sft.py: rank \d, step \d+: \S+.jsonl:\d+: \S+: not a readable picture"
    assert done.returncode == 1 and re.search(expected, done.stderr)
    assert not (tmp_path / "out" / "config.json").exists()


@pytest.mark.slow
@pytest.mark.parametrize("script", (train_sft, grpo), ids=lambda script: script.__name__)
def test_processes_may_change_on_resume(
    monkeypatch, call, driver, rooms, plain_model, tmp_path, script
):
    """2 processes, 2 steps, SIGTERM to one of them; then 2 more steps: exact on 2 processes, and close on 1."""
    monkeypatch.setitem(rewards.REWARDS, "accuracy", varied_reward)
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    done = launch(driver(script.__name__), *FLAGS[script](rooms, plain_model, whole), processes=2)
    assert done.returncode == 0, done.stderr
    flags = FLAGS[script](rooms, plain_model, parts, "--resume", "auto")
    done = launch(driver(script.__name__), *flags, processes=2, STOP_AT="2")
    assert done.returncode == 0 and states(parts) == ["step-000002"], done.stderr
    assert "stopped after step 2 of 4" in done.stdout
    shutil.copytree(parts, tmp_path / "copy")

    done = launch(driver(script.__name__), *flags, processes=2)
    assert done.returncode == 0, done.stderr
    assert log_of(parts) == log_of(whole)
    assert (parts / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()

    shutil.rmtree(parts)
    (tmp_path / "copy").rename(parts)
    call(script, *flags)
    assert_same_run(plain_model, whole, parts)


@pytest.mark.slow
def test_sigterm_is_not_an_error(rooms, tiny_model, tmp_path, driver):
    """Plain python: the run finishes its step, saves, says how to go on, and exits with 0."""
    done = launch(driver("train_sft"), *sft_flags(rooms, tiny_model, tmp_path / "out"), STOP_AT="2")
    assert done.returncode == 0 and "Traceback" not in done.stderr
    assert "stopped after step 2 of 4; continue with: python " in done.stdout
    assert states(tmp_path / "out") == ["step-000002"]


@pytest.mark.slow
@pytest.mark.parametrize("processes", (1, 2))
def test_mistakes_on_the_command_line(rooms, tiny_model, tmp_path, processes):
    """Exit code 2 and one line under plain python (it aborted at its exit once, with gloo's threads alive); under
    torchrun a line for each rank that came to say it, and torchrun's own report."""
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").touch()
    done = launch(
        train_sft.__file__, *sft_flags(rooms, tiny_model, tmp_path / "out"), processes=processes
    )
    ours = [
        line
        for line in done.stderr.splitlines()
        if "train_sft.py: " in line and "not empty" in line
    ]
    assert done.returncode == (2 if processes == 1 else 1) and 1 <= len(ours) <= processes, (
        done.stderr
    )
    assert processes > 1 or done.stderr.splitlines() == ours


@pytest.mark.slow
def test_a_rank_that_hangs_ends_all(driver, rooms, tiny_model, tmp_path):
    """The other waits for it no longer than the backend's time-out, and says where it was and what the backend said."""
    done = launch(
        driver("train_sft"),
        *sft_flags(rooms, tiny_model, tmp_path / "out"),
        processes=2,
        HANG_AT="2",
        TORCH_ELASTIC_SHUTDOWN_TIMEOUT="2",
    )
    assert (
        done.returncode == 1
        and "rank 0, step 2" in done.stderr
        and "Timed out waiting" in done.stderr
    ), done.stderr
    assert not (tmp_path / "out" / "config.json").exists()


@pytest.mark.slow
@pytest.mark.parametrize(
    "processes, number", ((1, signal.SIGINT), (1, signal.SIGTERM), (2, signal.SIGINT)), ids=str
)
def test_a_signal_to_the_whole_group(rooms, tiny_model, tmp_path, processes, number):
    """Ctrl-C reaches the run and the workers that read its pictures; under torchrun the launcher as well, which passes
    it on. The step is finished and saved, nothing is left running, and plain python has not failed."""
    torchrun = (
        ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
        if processes > 1
        else []
    )
    flags = sft_flags(rooms, tiny_model, tmp_path / "out", "--workers", 2, "--max-steps", 3000)
    log = tmp_path / "out" / "log.jsonl"
    with open(tmp_path / "said.txt", "w+") as said:
        process = subprocess.Popen(
            [sys.executable, *torchrun, train_sft.__file__, *map(str, flags)],
            stdout=said,
            stderr=said,
            start_new_session=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        while process.poll() is None and not (log.is_file() and log.read_bytes().count(b"\n") >= 2):
            time.sleep(0.05)
        started = kill_resume.tree(process.pid)
        os.killpg(process.pid, number)
        code = process.wait(60)
        said.seek(0)
        text = said.read()
    step = len(read_rows(log))
    assert (
        states(tmp_path / "out") == [f"step-{step:06d}"]
        and f"stopped after step {step} of 3000" in text
    ), text
    assert (
        code == 0 and "Traceback" not in text if processes == 1 else "DataLoader worker" not in text
    )
    assert len(started) > processes and not any(
        Path(f"/proc/{pid}/task").exists() for pid in started
    )


@pytest.mark.slow
def test_kill_9_loses_nothing(rooms, tiny_model, tmp_path):
    """Four moments; tests/kill_resume.py --kills 50 is the long version."""
    said = kill_resume.disturb(tmp_path, rooms / "train", tiny_model, kills=4)
    assert said.startswith("4 kills")
