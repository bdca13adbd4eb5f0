"""look/plan.py: exact counts against a run of the tiny model, memory against the simulation."""

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import model as model_file
from checkpoint import load_model, parse_config
from data import Processor, collate, read_all, style_of
from files import UserError
from look import plan
from look.plan import held, longest_row, memory, peak
from model import KVCache, generate
from runtime import adamw, recipe_settings

SIMULATION = Path(__file__).with_name("simulate_memory.py")
FILES = {
    "1": "spld_grounding_data.jsonl",
    "2": "spld_spatial_data.jsonl",
    "cold": "spld_coldstart_data.jsonl",
    "grpo": "spld_spatial_data.jsonl",
}


def settings(stage, *flags):
    flags = [str(flag) for flag in flags]
    if stage == "grpo":
        return recipe_settings("", "grpo", flags)
    return recipe_settings("", None, ["--stage", stage, *flags])


def row(tokens=10, targets=2, patches=64):
    return argparse.Namespace(tokens=tokens, targets=targets, patches=patches)


@pytest.fixture(scope="module")
def world(rooms, tiny_model):
    """The tiny model and a batch of three rows with pictures."""
    model = load_model(tiny_model, torch.float32)
    samples = read_all([rooms / "train" / FILES["2"]], None)
    processor = Processor(tiny_model, model.config)
    examples = [processor.example(sample, style_of(sample)) for sample in samples[:3]]
    return argparse.Namespace(
        model=model,
        samples=samples,
        processor=processor,
        directory=tiny_model,
        batch=collate(examples, model.config),
    )


# ---------------------------------------------------------------------------------- exact counts


@given(st.integers(1, 50), st.integers(1, 9), st.integers(1, 16))
def test_the_fullest_rank_holds_torchs_first_chunk(rows, width, gpus):
    weight = torch.empty(rows, width)
    assert held([weight], gpus) == weight.chunk(gpus)[0].numel()


@pytest.mark.parametrize("frozen", (False, True))
def test_weights_gradients_and_moments_are_counted_exactly(world, frozen):
    """After a step on one GPU the tensors are there, byte for byte."""
    model, args = world.model, settings("2", "--dtype", "float32")
    args.freeze_vision = frozen
    model.visual.requires_grad_(not frozen)
    optimizer = adamw(model, args)
    model(world.batch)[0].sum().backward()
    gradients = sum(p.grad.nbytes for p in model.parameters() if p.grad is not None)
    optimizer.param_groups[0]["lr"] = optimizer.param_groups[1]["lr"] = 0.0
    optimizer.step()
    moments = 0
    for state in optimizer.state.values():
        moments += state["exp_avg"].nbytes + state["exp_avg_sq"].nbytes
    optimizer.zero_grad()
    model.visual.requires_grad_(True)

    always, phases = memory(model.config, args, 1, row())
    weights = sum(p.nbytes for p in model.parameters())
    assert always == {"weights, fp32": weights, "two moments, fp32": moments}
    for phase in ("backward", "reduction"):
        assert phases[phase]["gradients, fp32"] == gradients


def test_the_cache_is_counted_exactly(world, monkeypatch):
    """Keys and values of all completions of a rollout, as long as they may become."""
    sizes = []
    expand = KVCache.expand

    def expands(cache, G, reserve):
        expand(cache, G, reserve)
        sizes.append(sum(x.nbytes for x in cache.keys + cache.values))

    monkeypatch.setattr(model_file.KVCache, "expand", expands)
    flags = ("--dtype", "float32", "--prompts-per-step", 3, "--num-generations", 2)
    args = settings("grpo", *flags, "--max-completion-length", 5)
    samples = world.samples[:3]
    examples = [
        world.processor.example(sample, "thinking", with_answer=False) for sample in samples
    ]
    batch = collate(examples, world.model.config)
    generate(world.model, batch, 5, world.processor.stop_ids, 2)

    longest = row(tokens=batch.ids.shape[1])
    always, phases = memory(world.model.config, args, 1, longest)
    assert [phases["rollout"]["key-value cache"]] == sizes
    assert always["reference, fp32"] == always["weights, fp32"]
    args.beta = 0.0
    assert "reference, fp32" not in memory(world.model.config, args, 1, longest)[0]


def test_the_longest_row_is_the_datas(world):
    args = settings("2", "--model", world.directory)
    total, longest = longest_row(args, world.model.config, world.samples)
    examples = [world.processor.example(sample, style_of(sample)) for sample in world.samples]
    assert total == sum(len(example.ids) for example in examples)
    assert longest.tokens == max(len(example.ids) for example in examples)
    assert longest.targets == max(int((example.labels >= 0).sum()) for example in examples)
    assert longest.patches == max(len(example.patches) for example in examples)


# ---------------------------------------------------------------------------------- the simulation


@pytest.mark.slow
@pytest.mark.parametrize(
    "gpus, stage, flags",
    (
        (1, "2", ""),
        (8, "1", "--freeze-vision"),
        (64, "2", ""),
        (4, "2", "--micro-batch 2 --no-activation-checkpointing"),
        (4, "grpo", ""),
        (8, "grpo", "--micro-batch 2 --no-activation-checkpointing"),
    ),
)
def test_memory_is_within_15_percent_of_the_simulation(gpus, stage, flags):
    """The real model, FSDP2 and autograd on tensors without numbers, at the 3B's shape."""
    import simulate_memory

    done = subprocess.run(
        [sys.executable, SIMULATION, f"--gpus={gpus}", f"--stage={stage}", f"--flags={flags}"],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr[-2000:]
    simulated = json.loads(done.stdout)

    command = ["--preset", "paper", "--model", "m", "--data", "d", "--out", "o", *flags.split()]
    args = settings(stage, *command)
    config = parse_config(simulate_memory.CONFIG_3B, "3B")
    longest = row(simulate_memory.TOKENS, simulate_memory.TARGETS.get(stage, 0), 3456)
    always, phases = memory(config, args, gpus, longest)
    assert sum(always.values()) / 1e9 == pytest.approx(simulated["always"], rel=0.01)
    assert peak(always, phases) / 1e9 == pytest.approx(max(simulated.values()), rel=0.15)


# ---------------------------------------------------------------------------------- the command


def command(stage, rooms, model, *more):
    data = rooms / "train" / FILES[stage]
    return ("--stage", stage, "--model", model, "--data", data, *more)


@pytest.mark.parametrize("stage", FILES)
def test_a_plan_writes_nothing(call, rooms, tiny_model, tmp_path, monkeypatch, capsys, stage):
    """It says what will be trained, on what, how long and in how much memory."""
    monkeypatch.chdir(tmp_path)
    call(plan, *command(stage, rooms, tiny_model, "--gpus", "2x8", "--max-steps", 2))
    said = capsys.readouterr().out
    count = sum(p.numel() for p in load_model(tiny_model).parameters())
    assert "planned, not measured: 2 GPUs of 8 GB" in said
    assert f"weights     {count / 1e9:.3f} billion" in said
    assert "steps       2 of 8 " in said and ": --max-steps 2 (" in said
    assert f"{12 * count / 1e9:.1f} GB for each of" in said
    assert ("key-value cache" in said) == (stage == "grpo")
    assert list(tmp_path.iterdir()) == []


def test_a_plan_that_cannot_fit_is_one_line(world, call, rooms, tmp_path, monkeypatch):
    """On more GPUs the same plan fits; the unit is so small that the tiny model fills it."""
    monkeypatch.chdir(tmp_path)
    flags = command("2", rooms, world.directory, "--micro-batch", 1)
    args = settings("2", "--out", "o", *flags[2:])
    longest = longest_row(args, world.model.config, world.samples)[1]
    needed = peak(*memory(world.model.config, args, 8, longest))
    monkeypatch.setattr(plan, "GB", 1.01 * needed / (1 - plan.RESERVE))
    with pytest.raises(UserError, match=r"^--gpus 2x1: needs .* take more GPUs, lower --micro-b"):
        call(plan, *flags, "--gpus", "2x1")
    call(plan, *flags, "--gpus", "8x1")


@pytest.mark.parametrize("given", ("8", "x24", "0x24", "4x", "8x24GB", "2x8x4"))
def test_gpus_are_a_number_times_gigabytes(call, rooms, tiny_model, given):
    with pytest.raises(UserError, match="expected number x gigabytes, such as 4x80"):
        call(plan, *command("1", rooms, tiny_model, "--gpus", given))
