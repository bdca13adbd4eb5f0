"""show.py: the page holds the exact input of a row, and its text never becomes markup."""

import html
import json
import re

import pytest
import torch
from conftest import launch
from PIL import Image

from checkpoint import load_config
from data import Processor, read_samples
from look import show
from pictures import open_picture

PICTURE = "room/1760.jpg"
LOCALIZE = {
    "question_id": 76,
    "question": "Where is the <b>dôor</b>?",
    "answer": [{"bbox_2d": [30, 20, 150, 100], "label": "door"}],
    "image": [PICTURE],
    "data_type": "single_image",
}
VIDEO = {
    "question_id": 77,
    "question": "How wide is it?",
    "answer": "85",
    "question_type": "object size",
    "image": [f"room/frame{i}.jpg" for i in range(5)],
    "data_type": "video",
}


@pytest.fixture
def rows(tmp_path):
    """A file of three rows, of which the first is broken, with its pictures beside it."""
    (tmp_path / "images" / "room").mkdir(parents=True)
    for number, name in enumerate([PICTURE, *VIDEO["image"]]):
        picture = Image.radial_gradient("L").resize((300, 200)).convert("RGB")
        picture.paste((40 * number, 90, 200), (10, 10, 60, 90))
        picture.save(tmp_path / "images" / name)
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(["{", json.dumps(LOCALIZE), json.dumps(VIDEO)]), encoding="utf-8")
    return path


@pytest.fixture
def page(rows, tiny_model, call, capsys):
    """The page of a row."""

    def write(row):
        out = rows.parent / f"{row}.html"
        call(show, rows, "--row", row, "--model", tiny_model, "--out", out)
        assert capsys.readouterr().out == f"{out}\n" and not list(rows.parent.glob("*.tmp"))
        return out.read_text("utf-8")

    return write


def test_a_picture_with_its_boxes_tokens_and_positions(page):
    """At the size that the model sees: 112 x 84 pixels, 12 vision tokens after 9 tokens of text."""
    text = page(2)
    assert "<b>dôor</b>" in html.unescape(re.sub("<[^>]*>", "", text))
    assert text.count("<image ") == 1 and 'viewBox="0 0 112 84"' in text
    assert '<path class="true" d="M11.0 8.0H56.0V42.0H11.0Z"/>' in text
    assert "<figcaption>image 1, 112 × 84</figcaption>" in text
    assert "&lt;|image_pad|&gt; × 12" in text
    assert "12 tokens: time 9 to 9, height 9 to 11, width 9 to 12" in text
    assert "prompt style localize" in text


def test_the_frames_of_a_video(page):
    """Five frames are three pairs: the last one stands twice in its patches, as on the page."""
    text = page(3)
    assert text.count("<image ") == 6 and "<figcaption>video 6, 112 × 84</figcaption>" in text
    assert "&lt;|video_pad|&gt; × 36" in text and "<path" not in text
    assert "36 tokens: time 9 to 11, height 9 to 11, width 9 to 12" in text


def test_runs_hold_every_token_label_and_position(rows, tiny_model):
    rows.write_text(json.dumps(LOCALIZE), encoding="utf-8")
    processor = Processor(tiny_model, load_config(tiny_model))
    (sample,) = read_samples(rows, rows.parent / "images")
    example = processor.example(sample, "localize")
    runs = list(show.token_runs(example, processor))
    assert [kind for kind, *_ in runs] == ["prompt", "vision", "prompt", "trained", "prompt"]
    assert torch.equal(torch.cat([positions for *_, positions in runs], dim=1), example.positions)
    text = "".join("".join(texts) for _, texts, _ in runs)
    assert text == processor.tokenizer.decode(example.ids.tolist(), skip_special_tokens=False)
    assert "dôor" in text
    trained = sum(positions.shape[1] for kind, _, positions in runs if kind == "trained")
    assert trained == int((example.labels >= 0).sum())


def test_pictures_come_out_of_the_patches(rows, tiny_model):
    """to_patches backwards gives the resized picture, pixel for pixel, in both frames."""
    rows.write_text(json.dumps(LOCALIZE), encoding="utf-8")
    processor = Processor(tiny_model, load_config(tiny_model))
    (sample,) = read_samples(rows, rows.parent / "images")
    ((first, second),) = show.seen(processor.example(sample, "localize"))
    small = open_picture(rows.parent / "images" / PICTURE).resize((112, 84), Image.BICUBIC)
    assert first.tobytes() == second.tobytes() == small.tobytes()


def test_no_such_row_is_one_line(rows, tiny_model):
    done = launch("look.show", rows, "--row", 4, "--model", tiny_model)
    assert (done.returncode, done.stderr) == (2, f"show.py: {rows}:4: there is no such row\n")
