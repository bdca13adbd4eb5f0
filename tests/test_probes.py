"""probes.py: cases whose result is known, the way from a picture's pixels to its map, and all of it on a tiny ladder."""

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
from PIL import Image

import model as model_module
from checkpoint import load_model
from data import Media, Processor, Sample, collate
from files import UserError
from look import probes

ASKED = Sample(
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
ALL = {"layers": None, "heads": None}


def pair(picture, boxes=BOXES, asked=ASKED):
    media = (Media("image", str(picture)),)
    return (
        dataclasses.replace(asked, media=media),
        dataclasses.replace(
            asked, media=media, question_type="localization", answer=tuple(boxes), options=()
        ),
    )


@pytest.fixture
def grey(tmp_path):
    Image.new("RGB", (224, 112), (90, 90, 90)).save(tmp_path / "grey.png")
    return tmp_path / "grey.png"


@pytest.fixture
def loaded(tiny_model):
    """The untrained model and its processor."""
    model = load_model(tiny_model, torch.float32)
    return model, Processor(tiny_model, model.config, SimpleNamespace(**dict.fromkeys(SEEN)))


# ---------------------------------------------------------------------------------------------- pairs


def test_pairs_are_of_one_picture_and_one_text(grey, tmp_path):
    """Another text, another picture, another type, and more boxes than colours are no pairs."""
    asked, located = pair(grey)
    other = dataclasses.replace(located, media=(Media("image", "other.png"),))
    reworded, typed = (
        dataclasses.replace(located, question="Where?"),
        dataclasses.replace(asked, question_type="object size"),
    )
    assert probes.spatial_pairs([asked, other, reworded, typed, located]) == [(asked, located)]
    assert probes.spatial_pairs([asked, other, reworded]) == []
    assert probes.spatial_pairs([asked, dataclasses.replace(located, answer=7 * BOXES[:1])]) == []


# ---------------------------------------------------------------------------------------------- hints


def test_hint_pictures_hold_the_colours_that_the_question_names(grey):
    """On the edges of each box its own colour, which stands before its label; inside and in "none" nothing is drawn."""
    asked, located = pair(grey)
    assert probes.hinted(asked, located, "none") is asked
    for condition in ("location", "full"):
        made = probes.hinted(asked, located, condition)
        pixels = np.asarray(probes.open_picture(made.media[0].source))
        for (name, colour), box in zip(probes.COLOURS.items(), BOXES):
            x1, y1, x2, y2 = box["bbox_2d"]
            edges = (
                pixels[y1, x1:x2],
                pixels[y2 - 1, x1:x2],
                pixels[y1:y2, x1],
                pixels[y1:y2, x2 - 1],
            )
            assert all(
                (edge == colour).all(1).mean() > 0.9 for edge in edges
            )  # the line between centres crosses two
            assert (
                f"the {name} box marks the {box['label']}" in made.question.lower()
                or f"the {name} box the {box['label']}" in made.question
            )
            assert pixels[y1 + 5, x1 + 5].tolist() == pixels[5, 5].tolist() == [90, 90, 90]
            x, y = probes.centre(box["bbox_2d"])
            assert pixels[y, x].tolist() == (
                [90, 90, 90] if condition == "location" else list(colour)
            )
        assert made.question.startswith(ASKED.question) and (
            "left of and below" in made.question
        ) == (condition == "full")
        assert made.options == ASKED.options and made.answer == ASKED.answer
    between = [(a + b) // 2 for a, b in zip(*(probes.centre(box["bbox_2d"]) for box in BOXES))]
    assert pixels[between[1] - 1 : between[1] + 2, between[0]].max() == 255


def test_a_row_with_its_own_prompt_is_hinted_too(grey):
    asked, located = pair(grey, asked=dataclasses.replace(ASKED, prompt="Which way?"))
    assert (
        probes.hinted(asked, located, "location").prompt
        == "Which way? The red box marks the bin, the blue box the bed."
    )


def test_accuracy_by_condition(grey, loaded, monkeypatch):
    """A model that is right once boxes are drawn: 0, then 1; the change is paired; chance is one of two options."""

    def answers(model, processor, samples, rows, args, device):
        return [
            {"index": row, "completion": "A" if "red box" in samples[row].question else "left"}
            for row in rows
        ]

    monkeypatch.setattr(probes, "answer_rows", answers)
    row = probes.probe_hints(
        *loaded, [pair(grey)] * 3, SimpleNamespace(batch_size=2, seed=0), "cpu"
    )
    assert {name: figure["value"] for name, figure in row.items()} == {
        "none": 0,
        "location": 1,
        "full": 1,
        "location - none": 1,
        "full - none": 1,
        "chance": 0.5,
        "none: invalid": 1,
        "location: invalid": 0,
        "full: invalid": 0,
    }


# ---------------------------------------------------------------------------------------------- attention


def test_weights_times_values_are_what_sdpa_gives(loaded, grey, tmp_path):
    """At every watched query of every layer and head, in a batch of two pictures of different sizes."""

    class Recording(probes.WatchedCache):
        def attend(self, layer, q, k, v):
            out = super().attend(layer, q, k, v)
            T = q.shape[2]
            values = v.repeat_interleave(q.shape[1] // v.shape[1], dim=1)[
                self.at // T
            ]  # (R, H, T, D)
            ours = torch.einsum("rht,rhtd->rhd", probes.attention_weights(q, k, self.at), values)
            checked.append((ours - out[self.at // T, :, self.at % T]).abs().max().item())
            return out

    model, processor = loaded
    noise = np.random.default_rng(0).integers(0, 255, (112, 84, 3), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / "noise.png")
    samples = [
        pair(grey)[0],
        dataclasses.replace(pair(tmp_path / "noise.png")[0], question="Where?"),
    ]
    batch, checked = collate([processor.example(s, "direct") for s in samples], model.config), []
    cache = Recording(batch.lengths, batch.predict_at, range(6), [0, 1, 2, 3])
    with torch.no_grad():
        assert torch.equal(model(batch, cache), model(batch, model_module.KVCache(batch.lengths)))
    assert len(checked) == 6 and max(checked) < 1e-5
    assert len(cache.weights) == 6 and torch.allclose(
        torch.stack(cache.weights).sum(-1), torch.ones(6, len(batch.predict_at))
    )


class Bright(torch.nn.Module):
    """A vision encoder whose features say one thing: whether a merged patch is bright."""

    def forward(self, patches, grids, run):
        features = torch.zeros(len(patches) // 4, 128)
        features[:, 0] = patches.view(len(features), -1).mean(1).sign()
        return features


@pytest.fixture
def watcher(loaded, monkeypatch):
    """A model whose first layer looks at bright patches only, wherever they lie; with strength 0 it looks everywhere."""

    def make(strength):
        model, processor = loaded
        attention = model.model.layers[0].self_attn
        with torch.no_grad():
            for linear in (attention.q_proj, attention.k_proj):
                linear.weight.zero_()
                linear.bias.zero_()
            attention.q_proj.bias[::32] = strength  # dimension 0 of every head
            attention.k_proj.weight[::32, 0] = 1.0
        model.visual = Bright()
        monkeypatch.setattr(
            model_module,
            "text_rope",
            lambda positions, config, dtype: (
                torch.ones(*positions.shape[1:], 16)[:, None],
                torch.zeros(*positions.shape[1:], 16)[:, None],
            ),
        )
        return model, processor

    return make


@pytest.mark.parametrize("box", ([112, 56, 168, 112], [0, 168, 224, 224], [56, 0, 112, 168]))
def test_attention_forced_onto_a_known_box(box, watcher, tmp_path):
    """A white rectangle in a black picture, shown at half its size: IoU 1, entropy ln(cells in it) / ln(16)."""
    pixels = np.zeros((224, 224, 3), np.uint8)
    pixels[box[1] : box[3], box[0] : box[2]] = 255
    Image.fromarray(pixels).save(tmp_path / "box.png")
    Image.fromarray(pixels).save(tmp_path / "twin.png")
    one, twin = (
        pair(tmp_path / name, [{"bbox_2d": box, "label": "bin"}])
        for name in ("box.png", "twin.png")
    )
    args = SimpleNamespace(
        layers=[0], heads=None, seed=0, batch_size=4, pictures=tmp_path, name="forced", data="rows"
    )
    row = probes.probe_attention(*watcher(40.0), [one, twin], args, "cpu")
    assert row["another's map"] == row["iou"] and row["iou - another's"]["value"] == 0
    cells = (box[2] - box[0]) * (box[3] - box[1]) // 56**2
    assert (row["iou"]["value"], row["best cells"]["value"]) == (1.0, 1.0) and row["random cells"][
        "value"
    ] < 1
    assert row["entropy"]["value"] == pytest.approx(math.log(cells) / math.log(16), abs=1e-5)
    painted = np.asarray(Image.open(tmp_path / "forced-1.png")).astype(int)
    yellow = painted[..., 0] - painted[..., 2] > 100
    assert (
        yellow[2 * box[1] + 40 : 2 * box[3] - 12, 2 * box[0] + 12 : 2 * box[2] - 12].mean() > 0.95
    )
    assert yellow.mean() < cells / 16 + 0.01


def test_attention_is_compared_between_pictures(watcher, grey):
    """Another question about the same picture is no control."""
    with pytest.raises(UserError, match="rows: all 2 questions are about one picture"):
        probes.probe_attention(
            *watcher(0.0),
            [pair(grey)] * 2,
            SimpleNamespace(layers=[0], heads=None, batch_size=4, seed=0, data="rows"),
            "cpu",
        )


def test_attention_everywhere_has_entropy_one(watcher, grey):
    model, processor = watcher(0.0)
    (heat,) = probes.attention_maps(
        model, processor, [pair(grey)[0]], SimpleNamespace(layers=[0], heads=[2]), "cpu"
    )
    assert heat.shape == (2, 5) and heat == pytest.approx(np.full((2, 5), 0.1))
    assert probes.map_entropy(heat) == pytest.approx(1)


def test_maps_do_not_depend_on_the_batch(loaded, grey, tmp_path):
    """Padding is not seen, and each map is of its own picture."""
    Image.fromarray(np.random.default_rng(1).integers(0, 255, (112, 112, 3), dtype=np.uint8)).save(
        tmp_path / "noise.png"
    )
    samples = [
        pair(grey)[0],
        dataclasses.replace(pair(tmp_path / "noise.png")[0], question="And the lamp, the sofa?"),
    ]
    together = probes.attention_maps(*loaded, samples, SimpleNamespace(**ALL), "cpu")
    for sample, heat in zip(samples, together):
        assert heat.sum() == pytest.approx(1)
        assert heat == pytest.approx(
            probes.attention_maps(*loaded, [sample], SimpleNamespace(**ALL), "cpu")[0], abs=1e-6
        )
    assert together[0].shape == (2, 5) and together[1].shape == (4, 4)


def test_at_least_one_cell_is_attended():
    """A box of 2 x 2 pixels in the attended one of 16 cells, each of 7 x 7."""
    heat = np.eye(4) / 4 + np.eye(1, 16, 5).reshape(4, 4)
    assert probes.attended_iou(
        heat, probes.box_mask([{"bbox_2d": [8, 8, 10, 10]}], (28, 28))
    ) == pytest.approx(4 / 49)


@pytest.mark.parametrize("flag, last", [("layers", 5), ("heads", 3)])
def test_layers_and_heads_that_are_not_there(flag, last, loaded, grey):
    with pytest.raises(UserError, match=f"--{flag} is {last + 1}, expected 0 to {last}"):
        probes.attention_maps(
            *loaded, [pair(grey)[0]], SimpleNamespace(**ALL | {flag: [1, last + 1]}), "cpu"
        )


# ---------------------------------------------------------------------------------------------- semantic entropy


@pytest.mark.parametrize(
    "kind, texts, sizes",
    [
        ("relative direction", ["A", "a.", "(A)", "A. left-front"], [4]),
        ("relative direction", ["A", "B", "C", "D"], [1, 1, 1, 1]),
        ("relative direction", ["<think>B</think><answer>A</answer>", "A", "B", "left"], [1, 2, 1]),
        (
            "object size",
            ["100", "109.9 cm", "111", "121"],
            [2, 2],
        ),  # 111 is 11% above 100, 121 9% above 111
        ("object size", ["4", "four", "about 4", ""], [3, 1]),
        ("object count", ["0", "0", "1", "-1"], [1, 2, 1]),
    ],
)
def test_clusters_of_meaning(kind, texts, sizes, loaded, grey, monkeypatch):
    """Whole way from sampled texts to nats; what cannot be parsed is one cluster."""

    def complete(model, processor, samples, rows, G, uniforms, args, device):
        assert uniforms.shape == (4, 8) and args.prompt_style == "thinking"
        return [SimpleNamespace(texts=texts, sample=samples[row]) for row in rows]

    monkeypatch.setattr(probes, "complete", complete)
    args = SimpleNamespace(
        num_generations=4,
        max_completion_length=8,
        batch_size=4,
        seed=0,
        tolerance=0.1,
        prompt_style="thinking",
    )
    options = ASKED.options if kind == "relative direction" else ()
    sample = dataclasses.replace(
        pair(grey)[0], question_type=kind, options=options, answer="A" if options else "4"
    )
    row = probes.probe_entropy(*loaded, [sample], args, "cpu")
    expected = sum(n / 4 * math.log(4 / n) for n in sizes)
    assert row["entropy"]["value"] == row["types"][kind]["value"] == pytest.approx(expected)
    meanings = [probes.meaning(text, sample) for text in texts]
    assert (
        probes.cluster_sizes(meanings, 0.1) == sizes
        and row["invalid"]["value"] == meanings.count(None) / 4
    )


@pytest.mark.parametrize("meanings", [*itertools.permutations([90.0, 100.0, 109.0, 98.0])])
def test_order_of_sampling_does_not_matter(meanings):
    assert probes.cluster_sizes(list(meanings), 0.1) == [2, 2]  # 90 to 99, 100 to 110


# ---------------------------------------------------------------------------------------------- the commands


@pytest.fixture
def run(rooms, tiny_model, tmp_path):
    """A ladder of two rungs, whose test data are a few training rooms."""
    run = tmp_path / "run"
    run.mkdir()
    (run / "ladder.json").write_text(
        json.dumps({"preset": "tiny", "model": str(tiny_model), "test": str(rooms / "train")})
    )
    for rung in ("stage1", "grpo"):
        shutil.copytree(tiny_model, run / rung)
    (run / "stage1" / "config.json").unlink()  # not finished: no rung
    return run


SMALL = ("--limit", 2, "--num-generations", 3, "--max-completion-length", 6, "--device", "cpu")


def test_all_on_a_tiny_ladder(run, call, tmp_path, capsys, monkeypatch):
    """Every file is there and well-formed, once more elsewhere it has the same numbers, in place nothing is computed."""
    call(probes, "all", run, *SMALL)
    printed, out = capsys.readouterr().out, run / "probes"
    results = {what: json.loads((out / f"{what}.json").read_text()) for what in probes.PANELS}
    for what, result in results.items():
        assert result["what"] == what and [row["name"] for row in result["rows"]] == [
            "base",
            "grpo",
        ]
        assert [row["style"] for row in result["rows"]] == (
            ["direct"] * 2 if what == "attention" else ["direct", "thinking"]
        )
        text = " ".join(ElementTree.parse(out / f"{what}.svg").getroot().itertext())
        assert (
            "grpo" in text
            and "paper" in text
            and all(title in text for title, _, _ in probes.PANELS[what])
        )
        for row in result["rows"]:
            for name in {name for _, bars, levels in probes.PANELS[what] for name in bars + levels}:
                figure = row[name]
                assert (
                    figure["low"] <= figure["value"] + 1e-12
                    and figure["value"] <= figure["high"] + 1e-12
                )
                assert "{value:.3f} [{low:.3f}, {high:.3f}]".format(**figure) in printed
        assert result["paper"] == probes.PAPER[what]
    assert {path.name for path in (out / "hints").iterdir()} == {
        f"{condition}.png" for condition in probes.CONDITIONS
    }
    assert {path.name for path in (out / "attention").iterdir()} == {
        f"{rung}-{n}{kind}.png"
        for rung in ("base", "grpo")
        for n in (1, 2)
        for kind in ("", "-locating")
    }
    assert not list(out.rglob("*.tmp"))
    call(probes, "all", run, *SMALL, "--out", tmp_path / "again")
    assert results == {
        what: json.loads((tmp_path / "again" / f"{what}.json").read_text()) for what in results
    }
    monkeypatch.setattr(probes, "load_model", None)
    call(probes, "all", run, *SMALL)
    assert results == {what: json.loads((out / f"{what}.json").read_text()) for what in results}
    with pytest.raises(TypeError):  # other settings are computed anew
        call(probes, "entropy", run, *SMALL, "--tolerance", 0.2)


def test_any_checkpoints_and_one_file(tiny_model, rooms, call, tmp_path):
    """Models of one name are told apart; rows of both kinds may stand in one file."""
    shutil.copytree(tiny_model, tmp_path / "x" / tiny_model.name)
    train = rooms / "train"
    (tmp_path / "both.jsonl").write_text(
        "".join(
            (train / f"spld_{kind}_data.jsonl").read_text() for kind in ("grounding", "spatial")
        )
    )
    call(
        probes,
        "attention",
        "--model",
        tiny_model,
        tmp_path / "x" / tiny_model.name,
        "--data",
        tmp_path / "both.jsonl",
        "--images",
        train / "images",
        "--out",
        tmp_path / "out",
        *SMALL,
        "--layers",
        0,
        3,
        "--heads",
        1,
    )
    rows = json.loads((tmp_path / "out" / "attention.json").read_text())["rows"]
    assert rows[0]["name"] != rows[1]["name"] and rows[0]["iou"] == rows[1]["iou"]
