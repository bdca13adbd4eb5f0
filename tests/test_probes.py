"""look/probes.py: cases whose result is known, from a picture to its map, and a tiny ladder."""

import dataclasses
import itertools
import json
import math
import shutil
from types import SimpleNamespace
from xml.etree import ElementTree

import numpy as np
import pytest
import torch
from PIL import Image, ImageColor

import model as model_module
from checkpoint import load_model
from data import Processor, Sample, collate
from files import UserError
from look import probes
from pictures import Media

QUESTION = Sample(
    "rows.jsonl:1",
    "1",
    "Where is the bin relative to the bed?",
    "relative direction",
    "A",
    ("A. left-front", "B. right-back"),
)
BOXES = (
    {"bbox_2d": [20, 40, 60, 90], "label": "bin"},
    {"bbox_2d": [100, 10, 180, 70], "label": "bed"},
)


def pair(picture, boxes=BOXES, **changes):
    """A question and the localization row of its picture."""
    question = dataclasses.replace(QUESTION, media=(Media("image", str(picture)),), **changes)
    located = dataclasses.replace(
        question, question_type="localization", answer=tuple(boxes), options=()
    )
    return question, located


@pytest.fixture
def grey(tmp_path):
    Image.new("RGB", (224, 112), (90, 90, 90)).save(tmp_path / "grey.png")
    return tmp_path / "grey.png"


@pytest.fixture
def noisy(tmp_path):
    """A picture of another shape."""
    pixels = np.random.default_rng(0).integers(0, 255, (112, 84, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "noise.png")
    return tmp_path / "noise.png"


@pytest.fixture
def loaded(tiny_model):
    """The untrained model and its processor."""
    model = load_model(tiny_model, torch.float32)
    return model, Processor(tiny_model, model.config)


# ---------------------------------------------------------------------------------- pairs


def test_pairs_are_of_one_picture_and_one_text(grey):
    """Another text, another picture, another type, and more boxes than colours are no pairs."""
    question, located = pair(grey)
    other = dataclasses.replace(located, media=(Media("image", "other.png"),))
    reworded = dataclasses.replace(located, question="Where?")
    typed = dataclasses.replace(question, question_type="object size")
    crowded = dataclasses.replace(located, answer=7 * BOXES[:1])
    rows = [question, other, reworded, typed, located]
    assert probes.spatial_pairs(rows) == [(question, located)]
    assert probes.spatial_pairs([question, other, reworded]) == []
    assert probes.spatial_pairs([question, crowded]) == []


# ---------------------------------------------------------------------------------- hints


@pytest.mark.parametrize("condition", ("location", "full"))
def test_hint_pictures_hold_the_colours_that_the_question_names(condition, grey):
    """On the edges of each box its own colour; inside nothing but the centres of "full"."""
    question, located = pair(grey)
    hinted = probes.hinted(question, located, condition)
    pixels = np.asarray(probes.open_picture(hinted.media[0].source))
    for name, box in zip(probes.COLOURS, BOXES):
        colour = list(ImageColor.getrgb(name))
        x1, y1, x2, y2 = box["bbox_2d"]
        rows, columns = pixels[y1:y2], pixels[:, x1:x2]
        for edge in (columns[y1], columns[y2 - 1], rows[:, x1], rows[:, x2 - 1]):
            assert (edge == colour).all(1).mean() > 0.9  # the line of "full" crosses two
        assert pixels[y1 + 5, x1 + 5].tolist() == pixels[5, 5].tolist() == [90, 90, 90]
        x, y = probes.centre(box)
        at_centre = {"location": [90, 90, 90], "full": colour}
        assert pixels[y, x].tolist() == at_centre[condition]
    between = [(a + b) // 2 for a, b in zip(*map(probes.centre, BOXES))]
    around = pixels[between[1] - 1 : between[1] + 2, between[0]]
    assert (around.max() == 255) == (condition == "full")


def test_the_words_of_a_hint(grey):
    question, located = pair(grey)
    assert probes.hinted(question, located, "none") is question
    marks = "The red box marks the bin, the blue box the bed."
    line = "The centre of the red box is left of and below that of the blue box."
    for condition, words in (("location", marks), ("full", f"{marks} {line}")):
        hinted = probes.hinted(question, located, condition)
        assert hinted.question == f"{QUESTION.question} {words}"
        assert (hinted.options, hinted.answer) == (QUESTION.options, QUESTION.answer)


def test_a_row_with_its_own_prompt_is_hinted_too(grey):
    hinted = probes.hinted(*pair(grey, prompt="Which way?"), "location")
    assert hinted.prompt == "Which way? The red box marks the bin, the blue box the bed."


def test_accuracy_by_condition(grey, loaded, monkeypatch, tmp_path):
    """A model that is right once boxes are drawn: 0, then 1. The change is paired."""

    def answers(model, processor, samples, rows, args, device):
        hints = ["red box" in samples[row].question for row in rows]
        return [{"completion": "A" if hint else "left"} for hint in hints]

    monkeypatch.setattr(probes, "answer_rows", answers)
    args = SimpleNamespace(micro_batch=2, pictures=tmp_path / "model")
    rows = list(probes.probe_hints(*loaded, [pair(grey)] * 3, args, "cpu"))
    expected = {
        "chance": 0.5,  # of two options
        "none": 0,
        "location": 1,
        "full": 1,
        "location - none": 1,
        "full - none": 1,
        "none: invalid": True,
        "location: invalid": False,
        "full: invalid": False,
    }
    assert rows == [expected] * 3


# ---------------------------------------------------------------------------------- attention


def test_weights_times_values_are_what_sdpa_gives(loaded, grey, noisy):
    """At every query of every layer and head, in a batch of two pictures of different sizes."""
    differences = []

    class Recording(probes.WatchedCache):
        def attend(self, layer, q, k, v):
            out = super().attend(layer, q, k, v)  # (B, H, T, D)
            places = torch.arange(q.shape[2])
            for row in range(len(q)):
                weights = probes.attention_weights(q[row], k[row], places)  # (H, T, T)
                assert torch.allclose(weights.sum(-1), torch.ones(weights.shape[:2]))
                values = v[row].repeat_interleave(len(q[row]) // len(v[row]), dim=0)
                differences.append((weights @ values - out[row]).abs().max())
            return out

    model, processor = loaded
    samples = [pair(grey)[0], pair(noisy, question="Where?")[0]]
    examples = [processor.example(sample, "direct") for sample in samples]
    batch = collate(examples, model.config)
    with torch.no_grad():
        watched = model(batch, Recording(batch.lengths))
        plain = model(batch, model_module.KVCache(batch.lengths))
    assert torch.equal(watched, plain)
    assert len(differences) == 2 * len(model.model.layers)
    assert max(differences) < 1e-5


class Bright(torch.nn.Module):
    """A vision encoder whose features say one thing: whether a merged patch is bright."""

    def forward(self, patches, grids, run):
        features = torch.zeros(len(patches) // 4, 128)
        features[:, 0] = patches.view(len(features), -1).mean(1).sign()
        return features


@pytest.fixture
def watcher(loaded, monkeypatch):
    """A model with one layer that looks at bright patches only; with strength 0 everywhere."""

    def no_rotation(positions, config, dtype):
        shape = (*positions.shape[1:], 16)
        return torch.ones(shape)[:, None], torch.zeros(shape)[:, None]

    def make(strength):
        model, processor = loaded
        model.model.layers = model.model.layers[:1]
        attention = model.model.layers[0].self_attn
        with torch.no_grad():
            for linear in (attention.q_proj, attention.k_proj):
                linear.weight.zero_()
                linear.bias.zero_()
            attention.q_proj.bias[::32] = strength  # dimension 0 of every head
            attention.k_proj.weight[::32, 0] = 1.0
        model.visual = Bright()
        monkeypatch.setattr(model_module, "text_rope", no_rotation)
        return model, processor

    return make


@pytest.mark.parametrize("box", ([112, 56, 168, 112], [0, 168, 224, 224], [56, 0, 112, 168]))
def test_attention_forced_onto_a_known_box(box, watcher, tmp_path):
    """A white rectangle in black, shown at half its size: IoU 1, entropy ln(its cells) / ln(16)."""
    x1, y1, x2, y2 = box
    pixels = np.zeros((224, 224, 3), np.uint8)
    pixels[y1:y2, x1:x2] = 255
    pairs = []
    for name in ("one.png", "two.png"):
        Image.fromarray(pixels).save(tmp_path / name)
        pairs.append(pair(tmp_path / name, [{"bbox_2d": box, "label": "bin"}]))
    args = SimpleNamespace(micro_batch=4, seed=0, pictures=tmp_path / "forced")
    row, other = probes.probe_attention(*watcher(40.0), pairs, args, "cpu")
    cells = (x2 - x1) * (y2 - y1) // 56**2
    for kind in ("", "locating: "):
        assert row[kind + "iou"] == row[kind + "another's map"] == other[kind + "iou"] == 1.0
        assert row[kind + "iou - another's"] == 0
        entropy = math.log(cells) / math.log(16)
        assert row[kind + "entropy"] == pytest.approx(entropy, abs=1e-5)
    assert row["random cells"] < row["best cells"] == 1.0

    painted = np.asarray(Image.open(tmp_path / "forced-1.png")).astype(int)  # twice as large
    yellow = painted[..., 0] - painted[..., 2] > 100
    assert yellow[2 * y1 + 40 : 2 * y2 - 12, 2 * x1 + 12 : 2 * x2 - 12].mean() > 0.95
    assert yellow.mean() < cells / 16 + 0.01


def test_attention_is_compared_between_pictures(watcher, grey):
    """Another question about the same picture is no control."""
    args = SimpleNamespace(micro_batch=4, seed=0)
    with pytest.raises(UserError, match="all 2 questions are about one picture"):
        list(probes.probe_attention(*watcher(0.0), [pair(grey)] * 2, args, "cpu"))


def test_attention_everywhere_has_entropy_one(watcher, grey):
    (heat,) = probes.attention_maps(*watcher(0.0), [pair(grey)[0]], "cpu")
    assert heat.shape == (2, 5)
    assert heat == pytest.approx(np.full((2, 5), 0.1))
    assert probes.map_entropy(heat) == pytest.approx(1)


def test_maps_do_not_depend_on_the_batch(loaded, grey, noisy):
    """Padding is not seen, and each map is of its own picture."""
    samples = [pair(grey)[0], pair(noisy, question="And the lamp, the sofa?")[0]]
    together = probes.attention_maps(*loaded, samples, "cpu")
    for sample, heat in zip(samples, together):
        (alone,) = probes.attention_maps(*loaded, [sample], "cpu")
        assert heat == pytest.approx(alone, abs=1e-6)
        assert heat.sum() == pytest.approx(1)
    assert [heat.shape for heat in together] == [(2, 5), (4, 3)]


def test_at_least_one_cell_is_attended():
    """A box of 2 x 2 pixels in the attended one of 16 cells, each of 7 x 7."""
    heat = np.eye(1, 16, 5).reshape(4, 4)
    truth = probes.box_mask([{"bbox_2d": [8, 8, 10, 10]}], (28, 28))
    assert probes.attended_iou(heat, truth) == pytest.approx(4 / 49)


# ---------------------------------------------------------------------------------- entropy


THOUGHT = "<think>B</think><answer>A</answer>"


@pytest.mark.parametrize(
    "kind, truth, texts, sizes, accuracy",
    [
        ("relative direction", "A", ["A", "a.", "(A)", "A. left-front"], [4], 1),
        ("relative direction", "A", ["A", "B", "C", "D"], [1, 1, 1, 1], 0.25),
        ("relative direction", "B", [THOUGHT, "A", "B", "left"], [1, 2, 1], 0.25),
        # 111 is 11% above 100, 121 is 9% above 111. Each keeps 10, 9, 8, 6 of the ten limits.
        ("object size", "100", ["100", "109.9 cm", "111", "121"], [2, 2], 0.825),
        ("object size", "4", ["4", "four", "about 4", ""], [3, 1], 0.25),
        ("object count", "1", ["0", "0", "1", "-1"], [1, 2, 1], 0.25),
    ],
)
def test_clusters_of_meaning(kind, truth, texts, sizes, accuracy, loaded, grey, monkeypatch):
    """The whole way from sampled texts to nats; what cannot be parsed is one cluster."""

    def chains(model, processor, samples, rows, args, device):
        return [{"completions": texts} for row in rows]

    monkeypatch.setattr(probes, "sample_chains", chains)
    args = SimpleNamespace(num_generations=4, micro_batch=4)
    sample, _ = pair(grey, question_type=kind, answer=truth)
    (row,) = probes.probe_entropy(*loaded, [(sample, None)], args, "cpu")
    meanings = [probes.meaning(text, sample) for text in texts]
    assert probes.cluster_sizes(meanings) == sizes
    assert row["entropy"] == row[kind] == pytest.approx(sum(n / 4 * math.log(4 / n) for n in sizes))
    assert row["invalid"] == meanings.count(None) / 4
    assert row["accuracy"] == pytest.approx(accuracy)


@pytest.mark.parametrize("meanings", [*itertools.permutations([90.0, 100.0, 109.0, 98.0])])
def test_the_order_of_sampling_does_not_matter(meanings):
    assert probes.cluster_sizes(list(meanings)) == [2, 2]  # 90 to 99, 100 to 110


# ---------------------------------------------------------------------------------- the command

SMALL = ("--limit", 2, "--num-generations", 3, "--max-completion-length", 6, "--device", "cpu")


@pytest.fixture
def run(rooms, tiny_model, tmp_path):
    """A ladder of two rungs whose test data are a few training rooms."""
    run = tmp_path / "run"
    for rung in ("stage1", "grpo"):
        shutil.copytree(tiny_model, run / rung)
    (run / "stage1" / "config.json").unlink()  # not finished: no rung
    ladder = {
        "preset": "tiny",
        "model": str(tiny_model),
        "test": str(rooms / "train"),
        "scenes": 12,
    }
    (run / "config_run.json").write_text(json.dumps(ladder))
    return run


def results_in(folder):
    return {what: json.loads((folder / f"{what}.json").read_text()) for what in probes.PANELS}


def test_all_on_a_tiny_ladder(run, call, capsys):
    """Every file is there and well-formed."""
    call(probes, "all", run, *SMALL)
    printed, out = capsys.readouterr().out, run / "probes"
    for what, result in results_in(out).items():
        styles = ["direct", "direct" if what == "attention" else "thinking"]
        assert [row["name"] for row in result["rows"]] == ["base", "grpo"]
        assert [row["style"] for row in result["rows"]] == styles
        for row in result["rows"]:
            for figure in probes.figures_of(row).values():
                assert figure["low"] <= figure["value"] + 1e-12
                assert figure["value"] <= figure["high"] + 1e-12
                assert "{value:.3f} [{low:.3f}, {high:.3f}]".format(**figure) in printed
        svg = ElementTree.parse(out / f"{what}.svg").getroot()
        words = " ".join(svg.itertext())
        for title, names in probes.PANELS[what].items():
            labels = [f"{rung}: {name}" for rung in ("base", "grpo") for name in names]
            assert all(text in words for text in (title, *labels))
    conditions = {f"{condition}.png" for condition in probes.CONDITIONS}
    assert {path.name for path in (out / "hints").iterdir()} == conditions
    maps = {"base-1.png", "base-2.png", "base-locating1.png", "base-locating2.png"}
    maps |= {name.replace("base", "grpo") for name in maps}
    assert {path.name for path in (out / "attention").iterdir()} == maps
    assert not list(out.rglob("*.tmp"))


def test_the_same_numbers_elsewhere(run, call, tmp_path):
    """Questions, noise and intervals are functions of the seed."""
    call(probes, "all", run, *SMALL)
    call(probes, "all", run, *SMALL, "--out", tmp_path / "again")
    assert results_in(tmp_path / "again") == results_in(run / "probes")


def test_any_checkpoints_and_one_file(tiny_model, rooms, call, tmp_path):
    """Models of one name are told apart; rows of both kinds may stand in one file."""
    twin = tmp_path / "x" / tiny_model.name
    shutil.copytree(tiny_model, twin)
    files = [rooms / "train" / f"spld_{kind}_data.jsonl" for kind in ("grounding", "spatial")]
    (tmp_path / "both.jsonl").write_text("".join(file.read_text() for file in files))
    flags = ("--data", tmp_path / "both.jsonl", "--images", rooms / "train" / "images")
    out = tmp_path / "out"
    call(probes, "attention", "--model", tiny_model, twin, *flags, "--out", out, *SMALL)
    one, two = json.loads((out / "attention.json").read_text())["rows"]
    assert one["name"] != two["name"]
    assert one["iou"] == two["iou"]


def test_what_is_missing_is_one_line(rooms, run, call, tmp_path, capsys):
    with pytest.raises(UserError, match=r"config_run.json: no such file"):
        call(probes, "hints", tmp_path)
    for flags, line in (
        (("--model", "m", "--data", rooms), "--out is missing"),
        ((), "one of the arguments run --model is required"),
        ((run, "--model", "m"), "argument --model: not allowed with argument run"),
    ):
        with pytest.raises(SystemExit):
            call(probes, "hints", *flags)
        assert line in capsys.readouterr().err
    with pytest.raises(UserError, match=r"rooms: no ladder there, expected an --out of ladder.py"):
        call(probes, "hints", rooms)
    with pytest.raises(SystemExit):
        call(probes, "all", run, "--num-generations", 1)
    assert "--num-generations is 1, expected at least 2" in capsys.readouterr().err
    boxes = rooms / "train" / "spld_grounding_data.jsonl"
    with pytest.raises(UserError, match="no rows for entropy"):
        call(probes, "entropy", run, "--data", boxes)
