"""plan.py: its counts against what a run of the tiny model really holds and computes, its estimate against real memory."""

import argparse
import dataclasses
import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import flat_config
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

import grpo
import model as model_file
import train_sft
from checkpoint import load_model, parse_config
from data import Processor, collate, read_all, style_of
from files import UserError
from look.plan import held, longest_rows, memory, peak, step_flops
from model import KVCache, generate
from runtime import adamw, recipe_settings

FILES = {
    "1": "spld_grounding_data.jsonl",
    "2": "spld_spatial_data.jsonl",
    "cold": "spld_coldstart_data.jsonl",
    "grpo": "spld_spatial_data.jsonl",
}
MATRIX_PRODUCTS = ("mm", "addmm", "bmm", "convolution")


def settings(stage, *flags):
    return recipe_settings(
        "",
        [*map(str, flags), *([] if stage == "grpo" else ["--stage", stage])],
        "grpo" if stage == "grpo" else None,
    )


@pytest.fixture(scope="module")
def world(rooms, tiny_model):
    """The tiny model, a batch of three rows with pictures and the answers they are trained on."""
    model = load_model(tiny_model, torch.float32)
    samples = read_all([rooms / "train" / FILES["2"]], None)
    processor = Processor(tiny_model, model.config, settings("2"))
    return argparse.Namespace(
        model=model,
        samples=samples,
        processor=processor,
        directory=tiny_model,
        batch=collate([processor.example(s, style_of(s)) for s in samples[:3]], model.config),
    )


# ---------------------------------------------------------------------------------------------- FLOPs


@pytest.mark.parametrize("frozen", (False, True))
def test_flops_are_torchs(world, frozen):
    """All matrix products that torch counts in the forward and backward of a batch without targets, but for the gradient
    of the patches, which nothing needs."""
    model = world.model
    batch = dataclasses.replace(world.batch, predict_at=torch.arange(0), targets=torch.arange(0))
    model.visual.requires_grad_(not frozen)
    try:
        with FlopCounterMode(display=False) as counter:
            model(batch)[0].sum().backward()
    finally:
        model.zero_grad()
        model.visual.requires_grad_(True)
    counted = sum(
        flops
        for operation, flops in counter.get_flop_counts()["Global"].items()
        if str(operation).split(".")[-1] in MATRIX_PRODUCTS
    )
    model.visual.requires_grad_(not frozen)
    mine = step_flops(model, batch.ids.numel(), 0, len(batch.patches))
    model.visual.requires_grad_(True)
    mine -= 0 if frozen else 2 * model.visual.patch_embed.proj.weight.numel() * len(batch.patches)
    assert mine == counted


def test_flops_by_hand(world):
    """One vector of each kind, forward once more: 2 a weight for each forward, 4 for the backward."""
    model = world.model
    layers = sum(p.numel() for p in model.model.layers.parameters() if p.ndim > 1)
    assert (
        step_flops(model, 1, 0, 0) == 6 * layers
        and step_flops(model, 1, 0, 0, forwards=4) == 12 * layers
    )
    assert step_flops(model, 0, 1, 0) == 6 * model.model.embed_tokens.weight.numel()


# ---------------------------------------------------------------------------------------------- exact counts


@given(st.integers(1, 50), st.integers(1, 9), st.integers(1, 16))
def test_the_fullest_rank_holds_torchs_first_chunk(rows, width, gpus):
    weight = torch.empty(rows, width)
    assert held([weight], gpus) == weight.chunk(gpus)[0].numel()


def test_weights_gradients_and_moments_are_counted_exactly(world):
    """After a step on one GPU the tensors are there, byte for byte; on more each matrix is cut by rows."""
    model, args = world.model, settings("2", "--dtype", "float32")
    longest = argparse.Namespace(tokens=10, targets=2, grids=[(1, 8, 8)])
    for frozen in (False, True):
        args.freeze_vision = frozen
        model.visual.requires_grad_(not frozen)
        optimizer = adamw(model, args)
        model(world.batch)[0].sum().backward()
        gradients = sum(p.grad.nbytes for p in model.parameters() if p.grad is not None)
        args.learning_rate = 0.0
        optimizer.step()
        moments = sum(
            t.nbytes
            for state in optimizer.state.values()
            for name, t in state.items()
            if name != "step"
        )
        optimizer.zero_grad()
        always, update, _ = memory(model.config, args, 1, longest)
        assert always == {
            "weights, fp32": sum(p.nbytes for p in model.parameters()),
            "optimizer, two fp32 moments": moments,
        }
        assert update["gradients, fp32"] == gradients
    model.visual.requires_grad_(True)


def test_the_cache_is_counted_exactly(world, monkeypatch):
    """Keys and values of all completions of a rollout, as long as they may become."""
    sizes, expand = [], KVCache.expand

    def expands(cache, group, room):
        expand(cache, group, room)
        sizes.append(sum(x.nbytes for x in cache.keys + cache.values))

    monkeypatch.setattr(model_file.KVCache, "expand", expands)
    args = settings(
        "grpo",
        "--dtype",
        "float32",
        "--prompts-per-step",
        3,
        "--num-generations",
        2,
        "--max-completion-length",
        5,
    )
    examples = [world.processor.example(s, "thinking", answer=False) for s in world.samples[:3]]
    batch = collate(examples, world.model.config)
    generate(world.model, batch, 5, world.processor.stop_ids, 2)
    longest = argparse.Namespace(tokens=batch.ids.shape[1], targets=0, grids=examples[0].grids)
    always, _, rollout = memory(world.model.config, args, 1, longest)
    assert [rollout["key-value cache"]] == sizes
    assert always["reference, fp32"] == always["weights, fp32"]
    args.beta = 0.0
    assert "reference, fp32" not in memory(world.model.config, args, 1, longest)[0]


# ---------------------------------------------------------------------------------------------- activations

REAL = """
import json, sys
sys.path[:0] = [REPOSITORY, TESTS]
import torch
from checkpoint import build_model, parse_config
from model import Batch
from rooms.tiny import initialize
source, checkpointing, frozen, tokens, grids = json.loads(sys.argv[1])
model = build_model(parse_config(source)).to_empty(device="cpu")
initialize(model, 0)
model.activation_checkpointing = checkpointing
model.visual.requires_grad_(not frozen)
patches = sum(t * h * w for t, h, w in grids)
ids = torch.full((1, tokens), 5)
batch = Batch(ids, torch.arange(tokens).expand(3, 1, -1), torch.tensor([tokens]), torch.randn(patches, 1176), grids,
              torch.arange(patches // 4), torch.arange(tokens - 9, tokens - 1), ids[0, :8])
def memory(what):
    return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith(what))
model(batch)[0].sum().backward()  # gradients are there from now on, and every kernel has been loaded
model.zero_grad(set_to_none=False)
open("/proc/self/clear_refs", "w").write("5")  # the peak begins anew
before = memory("VmRSS")
model(batch)[0].sum().backward()
print(memory("VmHWM") - before)
"""


@pytest.mark.slow
@pytest.mark.skipif(
    not Path("/proc/self/clear_refs").exists(), reason="reads the peak from Linux's /proc"
)
@pytest.mark.parametrize(
    "flags", ((), ("--activation-checkpointing",), ("--freeze-vision",)), ids=" ".join
)
def test_activations_are_within_30_percent_of_real_memory(flags):
    """Peak resident memory of a forward and backward of a model of another shape, weights and gradients aside."""
    source = flat_config(
        {"depth": 6, "hidden_size": 128, "num_heads": 4, "intermediate_size": 256},
        hidden_size=256,
        num_hidden_layers=8,
        intermediate_size=768,
        num_attention_heads=4,
        max_position_embeddings=9999,
        rope_scaling={"type": "mrope", "mrope_section": [8, 12, 12]},
    )
    tests = Path(__file__).resolve().parent
    script = REAL.replace("REPOSITORY", repr(str(tests.parent))).replace("TESTS", repr(str(tests)))
    tokens, grids = 2000, [(1, 30, 30)] * 4
    args = settings("2", "--dtype", "float32", "--batch-size", 1, *flags)
    given = json.dumps([source, args.activation_checkpointing, args.freeze_vision, tokens, grids])
    done = subprocess.run(
        [sys.executable, "-c", script, given],
        capture_output=True,
        text=True,
        check=True,
        env={
            "OMP_NUM_THREADS": "1",
            "MALLOC_MMAP_THRESHOLD_": "65536",
            "MALLOC_TRIM_THRESHOLD_": "65536",
        },
    )
    longest = argparse.Namespace(tokens=tokens, targets=8, grids=grids)
    planned = memory(parse_config(source), args, 1, longest)[1]["activations"]
    assert planned == pytest.approx(int(done.stdout), rel=0.3)


# ---------------------------------------------------------------------------------------------- the dry run


def flags_of(stage, rooms, model, out, *more):
    return (
        *(() if stage == "grpo" else ("--stage", stage)),
        "--model",
        model,
        "--data",
        rooms / "train" / FILES[stage],
        "--out",
        out,
        *more,
    )


@pytest.mark.parametrize("stage", FILES)
def test_a_dry_run_writes_nothing(call, rooms, tiny_model, tmp_path, capsys, stage):
    """It says what will be trained, on what, how long, in how much memory, and what the paper does otherwise."""
    script = grpo if stage == "grpo" else train_sft
    call(
        script,
        *flags_of(stage, rooms, tiny_model, tmp_path / "out", "--dry-run", "2x8", "--max-steps", 2),
    )
    said, model = capsys.readouterr().out, load_model(tiny_model)
    count = sum(p.numel() for p in model.parameters())
    assert (
        f"parameters    {count / 1e9:.3f} billion" in said
        and "planned, not measured on GPUs: 2 of 8 GB" in said
    )
    assert (
        "steps         2 of 8" in said
        and "differs from the paper's recipe: " in said
        and "learning_rate" in said
    )
    assert f"{12 * count / 1e9:.1f} GB a trainer state" in said
    assert ("key-value cache" in said) == (stage == "grpo") and not list(tmp_path.iterdir())


def test_the_longest_row_is_the_datas(world, rooms):
    args = settings("2", "--model", world.directory)
    total, longest = longest_rows(args, world.samples, world.model.config)
    examples = [world.processor.example(s, style_of(s)) for s in world.samples]
    assert total == sum(len(e.ids) for e in examples) and longest.tokens == max(
        len(e.ids) for e in examples
    )
    assert longest.targets == max(int((e.labels >= 0).sum()) for e in examples)
    assert sum(map(math.prod, longest.grids)) == max(len(e.patches) for e in examples)


@pytest.mark.parametrize(
    "stage, flags, expected",
    (
        ("2", ("--micro-batch", 64, "--batch-size", 64), "--activation-checkpointing"),
        (
            "2",
            ("--micro-batch", 64, "--batch-size", 64, "--activation-checkpointing"),
            "--micro-batch 1",
        ),
        ("grpo", ("--prompts-per-step", 64, "--micro-batch", 1), "--prompts-per-step 2"),
    ),
)
def test_a_plan_that_cannot_fit_names_the_flag_that_helps(
    world, call, rooms, tmp_path, monkeypatch, capsys, stage, flags, expected
):
    """With that flag the same plan fits; the unit is set so small that the tiny model fills it."""
    from look import plan

    script = grpo if stage == "grpo" else train_sft
    flags = flags_of(stage, rooms, world.directory, tmp_path / "out", "--dry-run", "2x1", *flags)
    args = argparse.Namespace(**vars(settings(stage, *flags[2 * (stage != "grpo") :])))
    longest = longest_rows(args, world.samples, world.model.config)[1]
    needed = peak(memory(world.model.config, args, 2, longest))
    monkeypatch.setattr(plan, "GB", 0.95 * needed / (1 - plan.RESERVE))
    with pytest.raises(UserError) as error:
        call(script, *flags)
    assert str(error.value).endswith(f"it would fit with {expected}") and "\n" not in str(
        error.value
    )
    call(script, *flags, *expected.split())
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("given", ("8", "x24", "0x24", "4x", "8x24GB", "2x8x4"))
def test_a_dry_run_is_gpus_times_gigabytes(call, rooms, tiny_model, tmp_path, given):
    with pytest.raises(UserError, match="expected GPUs x GB, such as 4x80"):
        call(train_sft, *flags_of("1", rooms, tiny_model, tmp_path / "out", "--dry-run", given))
