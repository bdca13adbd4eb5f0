"""train_sft.py: what is trained, that its loss is plain cross entropy, and that batches can be cut
as one likes.
"""

import json
import math
import random
import re
import shutil
import signal
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from conftest import launch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

import train_sft
from checkpoint import load_model
from data import IGNORE, Processor, collate, cost, read_all, style_of
from files import UserError
from runtime import check_lengths, micro_batches, recipe_settings, rows_of_step, run_length
from train_sft import Rows, accumulate_gradient, with_replay

FILES = {
    "1": "spld_grounding_data.jsonl",
    "2": "spld_spatial_data.jsonl",
    "cold": "spld_coldstart_data.jsonl",
}


@pytest.fixture(scope="module")
def world(tiny_model):
    model = load_model(tiny_model, torch.float32)
    return SimpleNamespace(model=model, processor=Processor(tiny_model, model.config))


def read_rows(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


# -------------------------------------------------------------------------- what is trained


@pytest.mark.parametrize("stage", FILES)
def test_labels_are_the_answer_and_its_end(world, rooms, stage):
    """Exactly the answer's text and the end of the turn are trained, in one piece: neither prompt
    nor pictures.
    """
    path, processor = rooms / "train" / FILES[stage], world.processor
    for row, sample in zip(read_rows(path), read_all([path], None), strict=True):
        example = processor.example(sample, style_of(sample))
        trained = (example.labels != IGNORE).nonzero()[:, 0]
        first, last = int(trained[0]), int(trained[-1])
        if stage == "1":  # pictures of 112 x 112 are shown as they are
            answer = "```json\n[" + ",\n".join(json.dumps(box) for box in row["answer"]) + "]\n```"
        else:
            answer = row["solution"] if stage == "cold" else row["answer"]
        assert (
            torch.equal(example.labels[trained], example.ids[trained])
            and len(trained) == last - first + 1
        )
        before, said, after = (
            processor.tokenizer.decode(example.ids[part].tolist(), skip_special_tokens=False)
            for part in (slice(first), trained, slice(last + 1, None))
        )
        assert said == answer + "<|im_end|>"
        assert before.endswith("<|im_end|>\n<|im_start|>assistant\n") and after == "\n"


def test_a_filler_has_pictures_and_no_label(world, rooms):
    """It takes part in every collective of the step, and in nothing of the loss."""
    samples = read_all([rooms / "train" / FILES["1"]], None)
    dataset = Rows(samples, world.processor)
    trained, filler = dataset[3, True], dataset[3, False]
    assert torch.equal(trained.ids, filler.ids) and torch.equal(trained.patches, filler.patches)
    assert (filler.labels == IGNORE).all() and (trained.labels != IGNORE).any()


@pytest.mark.parametrize("ratio", (0.0, 0.1, 0.2, 0.5, 0.9))
def test_replay_makes_up_its_ratio(ratio):
    """All new rows stay, once each; earlier ones are added until they are that share of all."""
    new, earlier = list(range(90)), ["earlier", "before"]
    mixed = with_replay(new, earlier, ratio, seed=1)
    assert mixed[:90] == new and set(mixed[90:]) <= set(earlier)
    assert len(mixed[90:]) / len(mixed) == pytest.approx(ratio, abs=0.01)
    assert mixed == with_replay(new, earlier, ratio, seed=1)


# -------------------------------------------------------------------------- the step


def mixed_examples(world, rooms, count=8):
    """Rows of all stages: one picture, several, video, with short and long answers."""
    samples = [s for name in FILES.values() for s in read_all([rooms / "train" / name], None)]
    return [
        world.processor.example(s, style_of(s)) for s in random.Random(0).sample(samples, count)
    ]


def step_of(world, batches):
    loss = accumulate_gradient(world.model, batches, sum(len(b.targets) for b in batches))
    grads = {name: p.grad.clone() for name, p in world.model.named_parameters()}
    world.model.zero_grad()
    return loss, grads


def assert_same(mine, theirs):
    assert mine[0] == pytest.approx(theirs[0], rel=1e-6)
    for name, expected in theirs[1].items():
        assert (mine[1][name] - expected).abs().max() <= 1e-5 * expected.abs().max(), name


def test_loss_is_cross_entropy_over_the_answers(world, rooms):
    """Loss and gradient equal F.cross_entropy of all logits, labels shifted by one."""
    examples, hidden = mixed_examples(world, rooms), []
    batch = collate(examples, world.model.config)
    mine = step_of(world, [batch])
    hook = world.model.model.layers[-1].register_forward_hook(
        lambda layer, given, x: hidden.append(x)
    )
    world.model(batch)
    hook.remove()
    logits = (
        world.model.model.norm(hidden[0]) @ world.model.model.embed_tokens.weight.T
    )  # (B, T, V)
    losses = torch.cat(
        [
            F.cross_entropy(
                logits[i, : len(e.ids) - 1], e.labels[1:], ignore_index=IGNORE, reduction="none"
            )[e.labels[1:] != IGNORE]
            for i, e in enumerate(examples)
        ]
    )
    losses.mean().backward()
    grads = {name: p.grad.clone() for name, p in world.model.named_parameters()}
    world.model.zero_grad()
    assert_same(mine, (losses.mean().item(), grads))


@pytest.mark.parametrize("sizes", ([4, 4], [2, 2, 2, 2], [1, 7], [1] * 8), ids=str)
def test_micro_batches_do_not_change_the_gradient(world, rooms, sizes):
    """Answers differ in length, so averaging micro-batches' means would not do; a text-only filler
    adds zero.
    """
    examples = mixed_examples(world, rooms)
    whole = step_of(world, [collate(examples, world.model.config)])
    rest = iter(examples)
    batches = [collate([next(rest) for _ in range(size)], world.model.config) for size in sizes]
    filler = world.processor.example(read_all([rooms / "train" / FILES["1"]], None)[0], "localize")
    filler.labels.fill_(IGNORE)
    assert_same(step_of(world, [*batches, collate([filler], world.model.config)]), whole)


# -------------------------------------------------------------------------- order


@given(st.integers(1, 40), st.integers(1, 50), st.integers(0, 3), st.integers(1, 4))
def test_every_row_comes_once_an_epoch(count, batch_size, seed, epochs):
    """Whatever the batch size, each stretch of `count` rows is a permutation: no row is left out at
    an epoch's end.
    """
    steps = -(-epochs * count // batch_size)
    rows = [
        row for step in range(1, steps + 1) for row in rows_of_step(step, count, batch_size, seed)
    ]
    for epoch in range(epochs):
        assert sorted(rows[epoch * count : (epoch + 1) * count]) == list(range(count))
    assert rows_of_step(steps, count, batch_size, seed) == rows[-batch_size:]


@given(st.integers(1, 9), st.integers(1, 40), st.integers(1, 50), st.floats(0.01, 0.99))
def test_a_window_holds_the_first_rows_only(step, count, batch_size, window):
    """A curriculum's step draws from the beginning of the file, and is a pure function of its
    number too.
    """
    rows = rows_of_step(step, count, batch_size, 0, window)
    assert len(rows) == batch_size and all(0 <= row < math.ceil(window * count) for row in rows)
    assert rows == rows_of_step(step, count, batch_size, 0, window)


def test_epochs_and_seeds_differ_in_order():
    orders = {tuple(rows_of_step(step, 30, 30, seed)) for step in (1, 2, 3) for seed in (0, 1)}
    assert len(orders) == 6


@given(st.lists(st.integers(0, 9), min_size=1, max_size=40), st.integers(1, 9), st.integers(1, 6))
def test_ranks_share_a_step_evenly(costs, size, world):
    """All rows once over all ranks, as many micro-batches on each, and no more fillers than that
    needs.
    """
    rows = list(range(100, 100 + len(costs)))
    shares = [micro_batches(rows, costs, size, rank, world) for rank in range(world)]
    assert len({len(share) for share in shares}) == 1
    items = [item for share in shares for batch in share for item in batch]
    assert sorted(row for row, trained in items if trained) == rows
    fillers = [item for item in items if not item[1]]
    assert len(fillers) < world and all(row in rows for row, _ in fillers)
    assert all(1 <= len(batch) <= size for share in shares for batch in share)


# -------------------------------------------------------------------------- a run


FEW = ("--batch-size", 6, "--micro-batch", 3, "--max-steps", 6)
KEYS = {
    "step",
    "epoch",
    "loss",
    "learning_rate",
    "grad_norm",
    "num_tokens",
    "tokens_per_second",
    "step_time",
}


@pytest.mark.slow
@pytest.mark.parametrize("stage", FILES)
def test_a_few_steps_reduce_the_loss(call, rooms, tiny_model, tmp_path, stage, capsys):
    """Each stage's command learns, logs the agreed keys and leaves a model directory that loads and
    has moved.
    """
    out = tmp_path / "out"
    call(
        train_sft,
        "--stage",
        stage,
        "--model",
        tiny_model,
        "--data",
        rooms / "train" / FILES[stage],
        "--out",
        out,
        "--replay",
        rooms / "train" / FILES["1"],
        "--replay-ratio",
        0.2,
        *FEW,
    )
    line = (
        r"(\d+) rows, 6 steps of 6, until --max-steps 6 .*: (\d+) of (.+), (\d+) replayed of (.+)\n"
    )
    said = re.search(line, capsys.readouterr().out)
    whole, own, path, replayed, earlier = said.groups()
    assert int(whole) == int(own) + int(replayed) and int(own) == len(read_all([path], None))
    assert (path, earlier) == (f"{rooms}/train/{FILES[stage]}", f"{rooms}/train/{FILES['1']}")
    log = read_rows(out / "log.jsonl")
    assert [row["step"] for row in log] == [1, 2, 3, 4, 5, 6] and all(
        set(row) == KEYS for row in log
    )
    assert abs(log[0]["loss"] - math.log(1000)) < 1.5 and log[-1]["loss"] < log[0]["loss"] - 1
    before, after = (
        load_file(tiny_model / "model.safetensors"),
        load_file(out / "model.safetensors"),
    )
    assert before.keys() == after.keys() and all(
        not torch.equal(before[name], after[name]) for name in before
    )
    assert load_model(out).config.source == load_model(tiny_model).config.source
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        assert (out / name).read_bytes() == (tiny_model / name).read_bytes()


def test_a_loss_that_is_not_finite_is_refused(call, rooms, tiny_model, tmp_path, monkeypatch):
    """Step, value and rows are named, nothing is applied, nothing saved: the last good checkpoint
    stays.
    """
    broken = tmp_path / "broken"
    shutil.copytree(tiny_model, broken)
    weights = load_file(broken / "model.safetensors")
    weights["model.norm.weight"][3] = math.inf
    save_file(weights, broken / "model.safetensors")
    path, out = rooms / "train" / FILES["1"], tmp_path / "out"
    monkeypatch.setattr(train_sft, "rows_of_step", lambda *given: [3, 1, 4, 15, 9, 2])
    with pytest.raises(UserError) as error:
        call(
            train_sft,
            "--stage",
            "1",
            "--model",
            broken,
            "--data",
            path,
            "--out",
            out,
            *FEW,
            "--save-every",
            1,
        )
    assert str(error.value).startswith("step 1: loss nan") and "\n" not in str(error.value)
    assert str(error.value).endswith(
        ": " + ", ".join(f"{path}:{line}" for line in (2, 3, 4, 5, 10, 16))
    )
    assert [p.name for p in out.iterdir()] == ["config_run.json"]


@pytest.mark.slow
def test_a_broken_picture_names_its_row(rooms, tiny_model, tmp_path):
    """One line with file:line and picture, the same when a worker process reads it, whose traceback
    torch adds.
    """
    shutil.copytree(rooms / "train", tmp_path / "train")
    path, images = tmp_path / "train" / FILES["1"], tmp_path / "train" / "images"
    for picture in images.glob("*/view*.jpg"):
        picture.write_bytes(b"not a picture")
    for workers in (0, 1):
        done = launch(
            train_sft.__file__,
            "--stage",
            "1",
            "--model",
            tiny_model,
            "--data",
            path,
            "--out",
            tmp_path / f"out{workers}",
            "--workers",
            workers,
            *FEW,
        )
        line = done.stderr.splitlines()[-1]
        number = int(re.match(rf"train_sft.py: {re.escape(str(path))}:(\d+): ", line)[1])
        assert f"{images / read_rows(path)[number - 1]['image'][0]}: not a readable picture" in line
        assert done.returncode == 2 and "Traceback" not in done.stderr


def test_cost_grows_with_pictures_and_words(rooms):
    """Rows of like length are padded together: a video is dearer than a picture, a chain than an
    answer.
    """
    samples = [s for name in FILES.values() for s in read_all([rooms / "train" / name], None)]
    by_type = {
        kind: [cost(s) for s in samples if s.data_type == kind and s.solution is None]
        for kind in ("single_image", "multi_view", "video")
    }
    assert max(by_type["single_image"]) < min(by_type["multi_view"]) <= max(by_type["multi_view"])
    talk = {
        text: replace(
            samples[0], question="", messages=(("user", ("Count.",)), ("assistant", (text,)))
        )
        for text in ("One.", "One lamp and two chairs.")
    }
    assert cost(talk["One."]) + 4 == cost(talk["One lamp and two chairs."])


# ---------------------------------------------------------------------- how long, how large


@pytest.mark.parametrize(
    "flags, steps, end",
    (
        ((), 800, "--max-steps 800 (31.4 of --epochs 1000)"),  # the recipe's
        (("--epochs", 2), 51, "--epochs 2"),  # the user's wins over the recipe's --max-steps
        (("--epochs", 0.5), 13, "--epochs 0.5"),
        (("--max-steps", 30), 30, "--max-steps 30 (1.18 of --epochs 1000)"),
        (("--epochs", 2, "--max-steps", 30), 30, "--max-steps 30 (1.18 of --epochs 2)"),
        (("--epochs", 1, "--max-steps", 30), 26, "--epochs 1 (before --max-steps 30)"),
        (("--epochs", 1, "--max-steps", 26), 26, "--epochs 1"),
    ),
)
def test_what_ends_a_run_is_told(flags, steps, end):
    """204 rows in steps of 8."""
    words = ["--stage", "1", "--model", "m", "--data", "a.jsonl", *map(str, flags)]
    assert run_length(recipe_settings("", None, words), 204, 8) == (steps, end)


def test_iterations_are_steps_too():
    """GRPO: 26 rollouts with 3 updates each, 204 prompts in an epoch."""
    words = ["--model", "m", "--data", "a.jsonl", "--num-iterations", "3"]
    args = recipe_settings("", "grpo", words)
    assert run_length(args, 204, 8) == (78, "--epochs 1 (before --max-steps 200)")
    args = recipe_settings("", "grpo", [*words, "--epochs", "1"])
    assert run_length(args, 204, 8) == (78, "--epochs 1")


def test_epochs_that_are_given_are_trained(call, rooms, tiny_model, tmp_path, capsys):
    """The recipe's limit does not end them; the line with the steps says what does."""
    lines = (rooms / "train" / FILES["1"]).read_text().splitlines(True)[:5]
    (tmp_path / "five.jsonl").write_text("".join(lines))
    flags = ("--stage", "1", "--model", tiny_model, "--data", tmp_path / "five.jsonl")
    flags += ("--images", rooms / "train" / "images", "--batch-size", 5, "--workers", 0)
    call(train_sft, *flags, "--epochs", 3, "--out", tmp_path / "out")
    assert (
        f"5 rows, 3 steps of 5, until --epochs 3: {tmp_path}/five.jsonl\n"
        in capsys.readouterr().out
    )
    log = read_rows(tmp_path / "out" / "log.jsonl")
    assert [row["epoch"] for row in log] == [1, 2, 3]
    assert json.loads((tmp_path / "out" / "config_run.json").read_text())["max_steps"] is None
    call(train_sft, *flags, "--max-steps", 2, "--out", tmp_path / "two")
    expected = "5 rows, 2 steps of 5, until --max-steps 2 (2 of --epochs 1000): "
    assert expected in capsys.readouterr().out


@pytest.mark.slow
def test_a_stop_in_the_last_step_loses_nothing(call, rooms, tiny_model, tmp_path, monkeypatch):
    """SIGTERM while the last step runs: its state is saved, and the run goes on to its end."""
    flags = ("--stage", "1", "--model", tiny_model, "--data", rooms / "train" / FILES["1"], *FEW)
    call(train_sft, *flags, "--out", tmp_path / "whole")

    log, step = tmp_path / "parts" / "log.jsonl", iter(range(1, 7))
    with monkeypatch.context() as patch:

        def at_last(model, batches, targets):
            if next(step) == 6:
                signal.raise_signal(signal.SIGTERM)
            return accumulate_gradient(model, batches, targets)

        patch.setattr(train_sft, "accumulate_gradient", at_last)
        call(train_sft, *flags, "--out", tmp_path / "parts")
    assert [row["step"] for row in read_rows(log)] == [1, 2, 3, 4, 5, 6]
    assert not (tmp_path / "parts" / "config.json").exists()
    call(train_sft, *flags, "--out", tmp_path / "parts", "--resume", "auto")
    whole, parts = (tmp_path / name / "model.safetensors" for name in ("whole", "parts"))
    assert whole.read_bytes() == parts.read_bytes()
    assert [row["step"] for row in read_rows(log)] == [1, 2, 3, 4, 5, 6]


def test_a_row_beyond_the_context_shows_at_once(call, rooms, tiny_model, tmp_path, monkeypatch):
    """The last row, which the run would reach late: named before the model is read."""
    lines = (rooms / "train" / FILES["2"]).read_text().splitlines(True)[:5]
    row = json.loads(lines[0])
    lines.append(json.dumps(row | {"question": row["question"] + " Look well." * 3000}) + "\n")
    (tmp_path / "mine.jsonl").write_text("".join(lines))
    monkeypatch.setattr(train_sft, "load_sharded", lambda *_: pytest.fail("read the model"))
    flags = ("--stage", "2", "--model", tiny_model, "--data", tmp_path / "mine.jsonl")
    with pytest.raises(UserError) as error:
        call(train_sft, *flags, "--images", rooms / "train" / "images", "--out", tmp_path / "out")
    expected = r"\S+mine.jsonl:6: \d+ tokens; the model's context has 4096"
    assert re.fullmatch(expected, str(error.value))


@pytest.mark.parametrize("stage", FILES)
def test_every_length_is_below_its_glance(world, rooms, stage, monkeypatch):
    """check_lengths measures no row if the context is large enough, and finds the longest one."""
    samples = read_all([rooms / "train" / FILES[stage]], None)
    examples = [world.processor.example(sample, style_of(sample)) for sample in samples]
    longest = max(len(example.ids) for example in examples)
    text = world.processor.config.text
    for context, fits in ((longest, True), (longest - 1, False)):
        small = replace(world.processor.config, text=replace(text, max_position_embeddings=context))
        monkeypatch.setattr(world.processor, "config", small)
        if fits:
            check_lengths(world.processor, samples)
            continue
        with pytest.raises(UserError, match=f"{longest} tokens; the model's context has {context}"):
            check_lengths(world.processor, samples)
    large = replace(world.processor.config, text=replace(text, max_position_embeddings=32768))
    monkeypatch.setattr(world.processor, "config", large)
    monkeypatch.setattr(world.processor, "example", lambda *_: pytest.fail("measured"))
    check_lengths(world.processor, samples)
