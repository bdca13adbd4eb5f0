"""ask.py: what the model sees, what is printed, and where boxes land on the original picture."""

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import launch
from PIL import Image

import ask
from checkpoint import load_config
from data import Processor
from files import UserError
from model import generate

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def processor(tiny_model):
    return Processor(tiny_model, load_config(tiny_model), num_frames=4, video_seconds="real")


@pytest.fixture
def grey(tmp_path, monkeypatch):
    """A picture of 640 x 480, which the tiny model sees at 112 x 84, in the current folder."""
    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (640, 480), (90, 90, 90)).save("room.jpg", quality=100)
    return "room.jpg"


@pytest.fixture
def answers(processor, monkeypatch):
    """Make the model say a text; returns the batches that it was given."""

    def say(text):
        tokens = processor.tokenizer.encode(text, add_special_tokens=False).ids
        seen, ids = [], [*tokens, processor.stop_ids[0]]

        def said(model, batch, *_, **__):
            seen.append(batch)
            return SimpleNamespace(
                ids=torch.tensor([[*ids, 5, 5, 5]]), lengths=torch.tensor([len(ids)])
            )

        monkeypatch.setattr(ask, "generate", said)
        return seen

    return say


def red(path):
    """Where the picture has changed its colour to red."""
    pixels = np.asarray(Image.open(path).convert("RGB")).astype(int)
    return (pixels[..., 0] > 200) & (pixels[..., 1] < 60)


def test_the_model_answers_itself(call, tiny_model, grey, processor, capsys, monkeypatch):
    """Untrained, but run from pictures to text; no boxes, no file. Greedy: twice the same."""
    rollouts = []

    def observed(*args, **options):
        rollouts.append(generate(*args, **options))
        return rollouts[-1]

    monkeypatch.setattr(ask, "generate", observed)
    for _ in range(2):
        call(
            ask, tiny_model, "What is this?", grey, "--max-completion-length", 12, "--device", "cpu"
        )
    assert torch.equal(rollouts[0].ids, rollouts[1].ids) and 0 < rollouts[0].lengths[0] <= 12
    said = processor.decode(rollouts[0].ids[0, : rollouts[0].lengths[0]].tolist())
    assert capsys.readouterr().out == 2 * f"{said}\n"
    assert not list(Path(".").glob("*.png"))


def test_the_question_is_shown_as_typed(call, tiny_model, processor, answers, grey, capsys):
    """The chat around the pictures and the question as typed; special tokens in it are text."""
    seen = answers("a chair")
    call(
        ask,
        tiny_model,
        "Which one, <|image_pad|>?",
        grey,
        grey,
        "--max_pixels",
        56 * 56,
        "--device",
        "cpu",
    )
    assert capsys.readouterr().out == "a chair\n"
    batch = seen[0]
    assert batch.grids == [(1, 2, 4), (1, 2, 4)] and len(batch.vision_at) == 4
    text = processor.tokenizer.decode(batch.ids[0].tolist(), skip_special_tokens=False)
    picture = "<|vision_start|>" + 2 * "<|image_pad|>" + "<|vision_end|>"
    assert text == (
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n"
        + 2 * picture
        + "Which one, <|image_pad|>?<|im_end|>\n<|im_start|>assistant\n"
    )


@pytest.mark.parametrize(
    "wrap", ["```json\n[{}]\n```", "<think>There.</think>\n<answer>[{}]</answer>"]
)
def test_boxes_land_on_the_original(call, tiny_model, answers, grey, capsys, wrap):
    """The model sees 112 x 84: its box (28, 21, 56, 63) is (160, 120, 320, 360) in the file."""
    answers(wrap.format('{"bbox_2d": [28, 21, 56, 63], "label": ""}'))
    call(ask, tiny_model, "Where?", grey, "--device", "cpu")
    assert capsys.readouterr().out.splitlines()[-1] == "1 boxes drawn on room.jpg: room_boxes.png"
    found = red("room_boxes.png")
    rows, columns = found.any(1).nonzero()[0], found.any(0).nonzero()[0]
    assert found.shape == (480, 640)
    assert (columns.min(), rows.min(), columns.max(), rows.max()) == (160, 120, 320, 360)
    assert not found[130:350, 170:310].any()  # an outline


def test_boxes_outside_or_turned_around_are_drawn_as_far_as_they_go(
    call, tiny_model, answers, grey
):
    """An untrained model's numbers are anything."""
    chair = '{"bbox_2d": [100, 80, 20, 10], "label": "chair"}'
    door = '{"bbox_2d": [-5, -99999, 99999, 500], "label": "door"}'
    answers(f"[{chair}, {door}]")
    call(ask, tiny_model, "Where?", grey, "--device", "cpu")
    found = red("room_boxes.png")
    assert (
        found[0].all() and found[-1].all() and found[:, 0].all() and found[:, -1].all()
    )  # the door's frame
    assert found[58, 200] and found[300, 115]  # the chair's: y = 10 * 480 / 84, x = 20 * 640 / 112


def test_video_beside_a_picture(call, tiny_model, answers, grey, capsys):
    """Frames from the file with their true times; boxes go to the picture, whatever comes first."""
    av = pytest.importorskip("av")
    with av.open("clip.mp4", "w") as file:
        stream = file.add_stream("mpeg4", rate=4)
        stream.width, stream.height, stream.pix_fmt = 64, 64, "yuv420p"
        for _ in range(48):  # 12 seconds
            file.mux(
                stream.encode(
                    av.VideoFrame.from_ndarray(np.full((64, 64, 3), 99, np.uint8), format="rgb24")
                )
            )
        file.mux(stream.encode())
    seen = answers('[{"bbox_2d": [1, 1, 50, 50], "label": "bed"}]')
    call(ask, tiny_model, "Where?", "clip.mp4", grey, "--num-frames", 8, "--device", "cpu")
    t, h, w = seen[0].grids[0]
    assert t == 4 and len(seen[0].grids) == 2
    times = seen[0].positions[0, 0, seen[0].vision_at[: t * h * w // 4]].unique()
    assert (times - times[0]).tolist() == [
        0,
        3,
        6,
        9,
    ]  # 8 frames in 12 seconds: pairs 3 s apart, 1 position a second
    assert capsys.readouterr().out.splitlines()[-1] == "1 boxes drawn on room.jpg: room_boxes.png"
    Path("room_boxes.png").unlink()
    # What a file is does not hang on its name.
    Path("clip.mp4").rename("clip.m4v")
    Path("room.jpg").rename("room")
    call(ask, tiny_model, "Where?", "clip.m4v", "room", "--device", "cpu", "--max-frames", 4)
    kinds = [t for t, _, _ in seen[1].grids]
    assert kinds == [16, 1]
    assert capsys.readouterr().out.splitlines()[-1] == "1 boxes drawn on room: room_boxes.png"
    Path("room_boxes.png").unlink()
    call(ask, tiny_model, "Where?", "clip.m4v", "--device", "cpu", "--fps", 1, "--max-frames", 4)
    assert [t for t, _, _ in seen[2].grids] == [2]
    assert not list(Path(".").glob("*.png"))


def test_bad_input_is_one_line(call, tiny_model, tmp_path):
    """As a person calls it: exit code 2 and one line with the path."""
    result = launch(ROOT / "ask.py", tiny_model, "What?", tmp_path / "nothing.jpg")
    assert result.returncode == 2 and not result.stdout and result.stderr.count("\n") == 1
    assert result.stderr.startswith(
        f"ask.py: command line: {tmp_path / 'nothing.jpg'}: not a readable picture"
    )
    for media, message in (
        ("nothing.mp4", "not a readable video"),
        ("nothing.m4v", "not a readable video"),
        ("nothing.mpg", "not a readable video"),
        ("nothing.tif", "not a readable picture"),
        ("a\0b", "not a readable"),
    ):
        with pytest.raises(UserError, match=message):
            call(ask, tiny_model, "What?", tmp_path / media, "--device", "cpu")
    with pytest.raises(UserError, match="not a model directory"):
        call(ask, tmp_path, "What?", "--device", "cpu")
