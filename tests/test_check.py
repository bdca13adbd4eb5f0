"""look/check.py: everything that is wrong or odd with a file, in one go."""

import importlib
import re
import shutil

import numpy as np
import pytest
from conftest import launch
from PIL import Image
from test_data import (
    BOX,
    CHAT,
    COLD,
    LOCALIZE,
    MALFORMED,
    MALFORMED_MEDIA,
    MALFORMED_PIXELS,
    NUMBER,
    VIDEO,
    VIEWS,
    without,
    write_images,
    write_rows,
)
from test_pictures import write_video

from checkpoint import load_config
from data import Processor, parse_row
from files import UserError, read_json, write_json
from look import check


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return write_images(tmp_path_factory.mktemp("images"))


@pytest.fixture(scope="module")
def processor(tiny_model):
    return Processor(tiny_model, load_config(tiny_model))


def test_check_finds_everything_in_one_go(tmp_path, images, tiny_model, processor):
    """Every malformed row of test_data.py is one line, and what is odd is a warning."""
    malformed = MALFORMED_PIXELS[:1] + MALFORMED + MALFORMED_PIXELS[1:] + MALFORMED_MEDIA
    rows = [row for row, _ in malformed]
    odd = [
        LOCALIZE
        | {
            "question_id": 1,
            "answer": [BOX | {"bbox_2d": [0, 2, 30, 40]}, BOX | {"bbox_2d": [1, 2, 299, 40]}],
        },
        NUMBER | {"question_id": 1, "answer": "0"},
        VIEWS,
        VIDEO,
        COLD,
        without(CHAT, "question_id"),
    ]
    path = write_rows(tmp_path / "rows.jsonl", *rows, *odd)
    flags = ["--images", images, "--model", tiny_model, "--max-tokens", 100]
    done = launch("look.check", path, *flags)
    lines, first = done.stdout.splitlines(), len(rows) + 1
    assert done.returncode == 2 and done.stderr == ""
    errors = [line for line in lines if line.startswith("error: ")]
    assert [re.match(rf"error: {path}:(\d+): ", line)[1] for line in errors] == [
        str(n) for n in range(1, first)
    ]
    for line, (_, message) in zip(errors, malformed):
        if message.startswith("gone.jpg"):
            assert line.endswith(f"{images}/gone.jpg: no such picture; is --images {images} right?")
        else:
            assert message.split(": ")[-1] in line
    warnings = [
        line.removeprefix(f"warning: {path}:") for line in lines if line.startswith("warning: ")
    ]
    length = len(processor.example(parse_row(VIEWS, "", images), "direct").ids)
    edge = "touches the edge of the picture of 300x200 pixels"
    assert warnings == [
        f"{first}: door at [0, 2, 30, 40] {edge}",
        f"{first}: door at [1, 2, 299, 40] {edge}",
        f"{first + 1}: answer is 0: only 0 earns a reward",
        f"{first + 1}: id 1 stands at {path}:{first} too",
        f"{first + 2}: {length} tokens, more than 100",
    ]
    counts = dict(line.split(maxsplit=1)[::-1] for line in lines if re.match(r" +\d+  ", line))
    assert counts == dict.fromkeys(
        (
            "chat",
            "cold start single_image",
            "localization single_image",
            "object size single_image",
            "object size multi_view",
            "object size video",
        ),
        "1",
    )
    assert lines[-1].startswith(
        f"{path}: {len(rows) + len(odd)} rows, {len(rows)} errors, 5 warnings, at most "
    )


def test_boxes_that_vanish_are_odd(tmp_path, images, tiny_model):
    """300 x 200 becomes 112 x 84: one pixel is nothing there, two may be one."""
    found = [[98, 100, 99, 150], [100, 11, 150, 13], [20.1, 10, 20.4, 50], [100, 100, 110, 110]]
    boxes = [{"bbox_2d": corners, "label": f"lamp {i}"} for i, corners in enumerate(found)]
    path = write_rows(tmp_path / "rows.jsonl", LOCALIZE | {"answer": boxes})

    def warnings(*flags):
        done = launch("look.check", path, "--images", images, *flags)
        assert done.returncode == 0
        return re.findall(r"lamp (\d) at .+ is a pixel thin, or nothing, .+: (.+)\n", done.stdout)

    seen = [("0", "[37, 42, 37, 63]"), ("1", "[37, 5, 56, 5]"), ("2", "[8, 4, 8, 21]")]
    assert warnings("--model", tiny_model) == seen
    true = [("0", "[98, 100, 99, 150]"), ("2", "[20, 10, 20, 50]")]
    assert warnings() == true


def test_check_of_a_clean_file_exits_with_0(tmp_path, images):
    path = write_rows(tmp_path / "rows.jsonl", LOCALIZE, VIEWS)
    done = launch("look.check", path, "--images", images)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == (
        f"       1  localization single_image\n       1  object size multi_view\n"
        f"{path}: 2 rows, 0 errors, 0 warnings\n"
    )


def test_a_picture_is_decoded_once_and_breaks_all_its_rows(tmp_path, images, call, capsys):
    """Two rows of one broken picture are two errors, in the order of the file."""
    broken = [NUMBER | {"question_id": n, "image": ["cut.jpg"]} for n in range(2)]
    path = write_rows(tmp_path / "rows.jsonl", broken[0], VIEWS, "{", broken[1])
    with pytest.raises(SystemExit) as stop:
        call(check, path, "--images", images)
    assert stop.value.code == 2
    lines = capsys.readouterr().out.splitlines()
    assert [line.partition(":")[0] for line in lines[:3]] == ["error"] * 3
    assert [re.search(r"jsonl:(\d+)", line)[1] for line in lines[:3]] == ["1", "3", "4"]
    assert lines[-1] == f"{path}: 4 rows, 3 errors, 0 warnings"
    decoded = check.decode_all([parse_row(row, "", images) for row in broken])
    assert set(decoded) == {(str(images / "cut.jpg"), False)}


def test_what_one_mistake_brings_into_many_lines_is_counted(tmp_path, images, call, capsys):
    """Three examples of each kind, the number, and everything else that is wrong."""
    gone = [NUMBER | {"image": [f"{n}.jpg"]} for n in range(5)]
    junk = ["junk"] * 30
    path = write_rows(tmp_path / "rows.jsonl", *junk, *gone, NUMBER | {"image": 5})
    with pytest.raises(SystemExit):
        call(check, path, "--images", images)
    lines = capsys.readouterr().out.splitlines()
    places = [re.search(r":(\d+): ", line)[1] for line in lines[:7]]
    assert places == ["1", "2", "3", "31", "32", "33", "36"]
    said = f"{path}:31: {images}/0.jpg: no such picture; is --images {images} right?"
    assert lines[3] == f"error: {said}"
    assert lines[7:] == [
        "error: 30 rows in all: not JSON",
        "error: 5 rows in all: no such picture",
        f"{path}: 36 rows, 36 errors, 0 warnings",
    ]


def test_a_film_is_read_as_training_reads_it(tmp_path, tiny_model):
    """All its frames: one that ends early by its header is an error here, not in training."""
    pytest.importorskip("av")
    for name in ("whole.avi", "cut.avi"):
        write_video(tmp_path / name)
    content = (tmp_path / "cut.avi").read_bytes()
    start = len(content) // 2
    (tmp_path / "cut.avi").write_bytes(content[:start] + bytes(len(content) - start))
    (tmp_path / "text.mpg").write_text("no film")
    names = ["whole.avi", "cut.avi", "text.mpg"]
    path = write_rows(tmp_path / "rows.jsonl", *(VIDEO | {"image": [name]} for name in names))
    done = launch("look.check", path, "--images", tmp_path, "--model", tiny_model, "--fps", 4)
    errors = [line for line in done.stdout.splitlines() if line.startswith("error: ")]
    assert done.returncode == 2
    assert len(errors) == 2 and "rows.jsonl:2: " in errors[0] and "rows.jsonl:3: " in errors[1]
    assert "text.mpg: not a readable video" in errors[1]
    processor = Processor(tiny_model, load_config(tiny_model), fps=4)
    samples = [parse_row(VIDEO | {"image": [name]}, "", tmp_path) for name in names]
    tokens = len(processor.example(samples[0], "direct").ids)
    assert done.stdout.endswith(f"3 rows, 2 errors, 0 warnings, at most {tokens} tokens\n")
    for sample in samples[1:]:
        with pytest.raises(UserError):
            processor.example(sample, "direct")


@pytest.mark.parametrize(
    "values, said",
    [
        (np.linspace(500, 4500, 192).astype(np.uint16), "values 500 to 4500"),
        (np.append(np.zeros(92), np.full(100, 900)).astype(np.uint16), "values 0 to 900"),
        (np.linspace(0, 1, 192).astype(np.float32), "values 0 to 1"),
        (np.linspace(-3, 200, 192).astype(np.float32), "values -3 to 200"),
        (np.linspace(0, 255, 192).astype(np.float32), None),
        (np.linspace(0, 255, 192).astype(np.uint16), None),
        (np.linspace(0, 255, 192).astype(np.uint8), None),
        (np.full(192, 7, np.uint8), None),
    ],
)
def test_values_that_are_cut_are_odd(tmp_path, values, said):
    """Depth in millimetres becomes all white, values of 0 to 1 all black, there as here."""
    picture = Image.fromarray(values.reshape(12, 16))
    picture.save(tmp_path / "a.tif")
    sample = parse_row(NUMBER | {"image": ["a.tif"]}, "", tmp_path)
    ((error, odd),) = check.decode_all([sample]).values()
    assert error is None
    expected = said and f"{tmp_path / 'a.tif'}: {said}, of which the model sees 0 to 255"
    assert odd == expected
    path = write_rows(tmp_path / "rows.jsonl", NUMBER | {"image": ["a.tif"]})
    assert check.check(path, tmp_path) == 0


def test_check_of_an_empty_file_and_of_tokens_without_a_model(tmp_path, images, call, capsys):
    path = write_rows(tmp_path / "rows.jsonl", "")
    with pytest.raises(UserError, match=r"rows\.jsonl: no rows in it"):
        call(check, path, "--images", images)
    with pytest.raises(SystemExit):
        call(check, path, "--max-tokens", 9)
    assert capsys.readouterr().err == "check.py: --model is missing\n"


def short_context(tiny_model, folder, positions):
    """The tiny model with room for only so many tokens."""
    shutil.copytree(tiny_model, folder)
    config = read_json(folder / "config.json")
    write_json(folder / "config.json", config | {"max_position_embeddings": positions})
    return folder


def test_a_row_beyond_the_context_is_an_error_like_others(
    tmp_path, images, tiny_model, call, capsys
):
    """The check goes on after it: the other rows are counted, the long one is named."""
    long = NUMBER | {"question": "How many chairs? " * 200}
    path = write_rows(tmp_path / "rows.jsonl", NUMBER, long, VIEWS)
    model = short_context(tiny_model, tmp_path / "model", 400)
    with pytest.raises(SystemExit) as end:
        call(check, path, "--images", images, "--model", model)
    assert end.value.code == 2
    lines = capsys.readouterr().out.splitlines()
    errors = [line for line in lines if line.startswith("error")]
    assert len(errors) == 1 and errors[0].startswith(f"error: {path}:2: ")
    assert lines[-1].startswith(f"{path}: 3 rows, 1 errors, ")


@pytest.mark.parametrize("script", ("eval", "coldstart"))
def test_a_prompt_beyond_the_context_is_told_before_the_model_is_read(
    tmp_path, images, tiny_model, call, monkeypatch, script
):
    module = importlib.import_module(script)
    long = NUMBER | {"question": "How many chairs? " * 200}
    path = write_rows(tmp_path / "rows.jsonl", NUMBER, long)
    model = short_context(tiny_model, tmp_path / "model", 400)
    monkeypatch.setattr(module, "load_model", None)
    flags = ["--model", model, "--images", images, "--out", tmp_path / "out.jsonl"]
    flags += ["--max-completion-length", 8]
    flags += ["--bench", path] if script == "eval" else ["--data", path]
    with pytest.raises(UserError) as error:
        call(module, *flags)
    assert str(error.value).startswith(f"{path}:2: ")
    assert "400" in str(error.value)
