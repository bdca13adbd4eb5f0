"""layouts.py: rows of other projects, each picture where its maker puts it, or one line why not."""

import json
from base64 import b64encode

import pytest
from conftest import launch
from PIL import Image
from test_data import REPO, write_rows

import data
from checkpoint import load_config
from data import Processor, read_all, read_samples
from files import UserError, read_json
from pictures import Media, open_picture

USER, SAID = {"role": "user", "content": "How wide?"}, {"role": "assistant", "content": "85"}


@pytest.fixture
def images(tmp_path):
    folder = tmp_path / "images"
    folder.mkdir()
    for name, colour in (("a.jpg", "red"), ("b.png", "blue"), ("a b.jpg", "green")):
        Image.new("RGB", (112, 84), colour).save(folder / name)
    return folder


def turns(row, images):
    """The turns of a row as [(role, [text, or (kind, what is left of the folder's path)])]."""
    (sample,) = read_samples(write_rows(images.parent / "rows.jsonl", row), images)
    shown = []
    for role, parts in sample.messages:
        shown.append((role, [short(part, images) for part in parts]))
    assert sample.media == tuple(
        part for _, parts in sample.messages for part in parts if isinstance(part, Media)
    )
    return shown


def short(part, images):
    if isinstance(part, str):
        return part
    paths = [source.removeprefix(f"{images}/") for source in part.sources]
    return (part.kind, *paths)


def llava(*texts, **columns):
    speakers = ("human", "gpt")
    said = [{"from": speakers[i % 2], "value": text} for i, text in enumerate(texts)]
    return {"conversations": said, **columns}


def chat(*texts, **columns):
    roles = ("user", "assistant")
    said = [{"role": roles[i % 2], "content": text} for i, text in enumerate(texts)]
    return {"messages": said, **columns}


A, B = ("image", "a.jpg"), ("image", "b.png")
READ = {  # what is in a row -> (the row, its turns as contents)
    "llava": (llava("<image>\nHow wide?", "85", image="a.jpg"), [[A, "How wide?"], ["85"]]),
    "tag at the end": (
        llava("How wide?\n<image>", "85", image="a.jpg"),
        [["How wide?", A], ["85"]],
    ),
    "second turn": (
        llava("<image>\nThis?", "lamp", "<image>\nAnd this?", "bed", image=["a.jpg", "b.png"]),
        [[A, "This?"], ["lamp"], [B, "And this?"], ["bed"]],
    ),
    "between words": (
        chat("Was: <image> Is: <image> What changed?", "x", images=["a.jpg", "b.png"]),
        [["Was: ", A, " Is: ", B, " What changed?"], ["x"]],
    ),
    "a picture twice": (
        chat("<image><image>Same?", "yes", images=["a.jpg", "a.jpg"]),
        [[A, A, "Same?"], ["yes"]],
    ),
    "text of an answer": (
        llava("<image>\nWhich tag?", "\n![](<image>) <video>\n", image="a.jpg"),
        [[A, "Which tag?"], ["\n![](<image>) <video>\n"]],
    ),
    "no tags": (
        chat("Hi", "Hello", "What is in both?", "x", images=["a.jpg", "b.png"], videos=["v.mp4"]),
        [[A, B, ("video", "v.mp4"), "Hi"], ["Hello"], ["What is in both?"], ["x"]],
    ),
    "picture and video": (
        chat("<video>Where is <image>?", "x", images=["a.jpg"], videos=["v.mp4"]),
        [[("video", "v.mp4"), "Where is ", A, "?"], ["x"]],
    ),
    "video": (
        llava("<video>\nHow many?", "3", video="v.mp4"),
        [[("video", "v.mp4"), "How many?"], ["3"]],
    ),
    "frames": (
        chat("<video>How many?", "3", videos=[["a.jpg", "b.png"]]),
        [[("video", "a.jpg", "b.png"), "How many?"], ["3"]],
    ),
    "frames of one video": (
        llava("<video>How many?", "3", video=["a.jpg", "b.png"]),
        [[("video", "a.jpg", "b.png"), "How many?"], ["3"]],
    ),
    "two videos": (
        llava("<video><video>How many?", "3", video=["v.mp4", "w.mp4"]),
        [[("video", "v.mp4"), ("video", "w.mp4"), "How many?"], ["3"]],
    ),
    "parts without files": (
        chat(
            [{"type": "text", "text": "Same as "}, {"type": "image", "text": None}],
            [{"type": "text", "text": "yes", "index": None}],
            images=["a.jpg"],
        ),
        [["Same as ", A], ["yes"]],
    ),
    "the column repeats the parts": (
        chat(
            [{"type": "image", "image": "a.jpg"}, {"type": "text", "text": "?"}],
            "85",
            image="a.jpg",
        ),
        [[A, "?"], ["85"]],
    ),
    "image and images are the same": (
        chat("<image>?", "85", image="a.jpg", images=["a.jpg"]),
        [[A, "?"], ["85"]],
    ),
    "only nulls": (
        llava(
            "Hello", "Hi", image=None, images=[], video=None, tools=None, objects={}, system=None
        ),
        [["Hello"], ["Hi"]],
    ),
    "sharegpt names in messages": (
        {"messages": llava("<image>?", "85")["conversations"], "images": ["a.jpg"]},
        [[A, "?"], ["85"]],
    ),
    "neutral keys": (
        {"messages": [USER | {"id": 1}, SAID | {"loss": True, "tool_calls": None, "weight": 1.0}]},
        [["How wide?"], ["85"]],
    ),
}


@pytest.mark.parametrize("name", READ)
def test_each_picture_stands_where_its_tag_does(name, images):
    row, contents = READ[name]
    found = turns(row, images)
    assert [parts for _, parts in found] == contents
    assert [role for role, _ in found] == ["user", "assistant"] * (len(contents) // 2)


def test_a_system_text_comes_first(images):
    """As a column or as a turn of its own; the default takes its place where there is none."""
    column = turns(llava("<image>\n?", "85", system="Be brief.", image="a.jpg"), images)
    own = llava("?", "85")
    own["conversations"].insert(0, {"from": "system", "value": "Be brief."})
    assert column == [("system", ["Be brief."]), ("user", [A, "?"]), ("assistant", ["85"])]
    assert turns(own, images)[0] == ("system", ["Be brief."])


REFUSED = {
    "no files": (chat("<image>?", "85"), "1 <image> in the user's turns, 0 files in image or"),
    "too few": (
        chat("<image><image>?", "85", images=["a.jpg"]),
        "2 <image> in the user's turns, 1",
    ),
    "too many": (
        chat("<image>?", "85", images=["a.jpg"] * 2),
        "1 <image> in the user's turns, 2 f",
    ),
    "no video": (
        chat("<video>?", "85", images=["a.jpg"]),
        "1 <video> in the user's turns, 0 files",
    ),
    "tag beside a part": (
        chat([{"type": "image", "image": "a.jpg"}, {"type": "text", "text": "<image>?"}], "85"),
        "1 <image> in the user's turns, 0 files",
    ),
    "parts and a column": (
        chat([{"type": "image", "image": "a.jpg"}], "85", images=["a.jpg", "b.png"]),
        "0 <image> in the user's turns, 2 files in image or images",
    ),
    "no question": ({"messages": [SAID], "image": "a.jpg"}, "0 <image> in the user's turns, 1 fi"),
    "two columns": (
        chat("<image>?", "85", image="b.png", images=["a.jpg"]),
        "image and images name other files, expected one of them",
    ),
    "column": (chat("?", "85", images=5), "images is 5, expected str or list"),
    "no path": (
        chat("<image>?", "85", images=[5]),
        'content part {"type": "image", "image": 5}, ex',
    ),
    "objects": (
        chat("?", "<bbox>", objects={"bbox": [[1, 2, 3, 4]]}),
        "objects is {'bbox': [[1, 2",
    ),
    "audios": (
        chat("<audio>?", "85", audios=["a.wav"]),
        "audios is ['a.wav'], expected none: it is",
    ),
    "tools": (
        chat("?", "85", tools='[{"name": "f"}]'),
        'tools is \'[{"name": "f"}]\', expected no',
    ),
    "loss": (
        {"messages": [USER, SAID | {"loss": False}]},
        "loss is False, expected none: it is not",
    ),
    "calls": ({"messages": [USER, SAID | {"tool_calls": [1]}]}, "tool_calls is [1], expected none"),
    "in a turn": (
        {"messages": [USER | {"images": ["a.jpg"]}, SAID]},
        "images is ['a.jpg'], expected",
    ),
    "two systems": (
        {"messages": [{"role": "system", "content": "Hi"}, USER, SAID], "system": "Be brief."},
        "system stands beside a system turn in messages, expected one of them",
    ),
    "observation": (
        llava("?", "85") | {"conversations": [{"from": "observation", "value": "1"}]},
        "from is 'observation', expected system, user or assistant",
    ),
    "user last": (llava("?", "85", "And?"), "conversations must end with the assistant's turn"),
    "half a turn": ({"conversations": [{"from": "gpt"}]}, "value is missing, expected str or list"),
    "web address": (
        chat("<image>?", "85", images=["https://a.b/c.jpg"]),
        "https://a.b/c.jpg: expected a file of this machine; nothing is fetched",
    ),
    "no layout": ({"instruction": "?", "output": "85"}, "question is missing, expected str"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_read_is_one_line(name, images):
    row, message = REFUSED[name]
    path = write_rows(images.parent / "rows.jsonl", row)
    with pytest.raises(UserError) as error:
        read_samples(path, images)
    assert str(error.value).startswith(f"{path}:1: {message}")
    assert len(str(error.value)) < len(f"{path}:1: ") + 200


OPTIONS = (
    *("min_pixels", "max_pixels", "resized_height", "resized_width", "detail", "nframes", "fps"),
    *("min_frames", "max_frames", "total_pixels", "video_start", "video_end", "sample_fps"),
)


@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("kind", ("image", "video"))
def test_options_of_a_part_are_refused_by_name(kind, option, images):
    """A null, as `datasets` writes it, is none."""
    part = {"type": kind, kind: "a.jpg", option: None}
    assert turns(chat([part], "85"), images)[0] == ("user", [(kind, "a.jpg")])
    with pytest.raises(UserError, match=f"rows.jsonl:1: {kind} part has {option}, expected {kind}"):
        turns(chat([part | {option: 3136}], "85"), images)


def test_tokens_are_those_of_parts_with_files(images, tiny_model):
    """The model reads the same ids, positions and patches, however the row says it."""
    parts = [{"type": "image", "image": "a.jpg"}, {"type": "text", "text": "How wide?"}]
    rows = [
        chat(parts, "85"),
        chat("<image>How wide?", "85", images=["a.jpg"]),
        llava("<image>\nHow wide?", "85", image="a.jpg"),
        chat("How wide?", "85", image="a.jpg"),
        chat([{"type": "image"}, parts[1]], "85", images=["a.jpg"]),
        chat([parts[0] | {"image": f"file://{images}/a.jpg"}, parts[1]], "85"),
    ]
    processor = Processor(tiny_model, load_config(tiny_model))
    samples = read_samples(write_rows(images.parent / "rows.jsonl", *rows), images)
    first, *others = [processor.example(sample, "direct") for sample in samples]
    for other in others:
        assert other.ids.equal(first.ids) and other.labels.equal(first.labels)
        assert other.positions.equal(first.positions) and other.patches.equal(first.patches)


# ------------------------------------------------------------ files and URIs


@pytest.mark.parametrize(
    "uri",
    ("file://{}/a b.jpg", "file://{}/a%20b.jpg", "file://localhost{}/a b.jpg", "file:{}/a b.jpg"),
)
def test_file_uris_are_paths(uri, images):
    question = {"question": "?", "question_type": "object count", "answer": 3}
    question |= {"image": [uri.format(images)], "data_type": "single_image"}
    (sample,) = read_samples(write_rows(images.parent / "rows.jsonl", question), images)
    assert sample.media == (Media("image", str(images / "a b.jpg")),)


@pytest.mark.parametrize("head", ("data:image/jpeg;base64,", "data:image;base64,"))
def test_data_uris_are_the_pictures_themselves(head, images, tiny_model, tmp_path):
    """In a part, a column, a question, as a frame; `check` reads them, logs leave them out."""
    content = (images / "a.jpg").read_bytes()
    uri = head + b64encode(content).decode()
    question = {"question": "?", "question_type": "object count", "answer": 3, "image": [uri]}
    rows = [
        chat([{"type": "image", "image": uri}], "85"),
        chat("<image>?", "85", images=[uri]),
        chat([{"type": "video", "video": [uri, "b.png"]}], "85"),
        question | {"data_type": "single_image"},
        question | {"data_type": "video"},
    ]
    path = write_rows(tmp_path / "rows.jsonl", *rows)
    samples = read_samples(path, images)
    assert {sample.media[0].sources[0] for sample in samples} == {content}
    assert open_picture(content).getpixel((5, 5))[0] > 250  # red
    assert data.picture_paths(samples[2]) == [str(images / "b.png")]
    done = launch("look.check", path, "--images", images, "--model", tiny_model)
    assert done.returncode == 0, done.stdout

    film = chat([{"type": "video", "video": "data:video/mp4;base64,AAAA"}], "85")
    with pytest.raises(UserError, match=r"content part .*, expected text, or in a user's turn"):
        turns(film, images)


# ------------------------------------------------------------ lists, marks, odd paths


@pytest.mark.parametrize("indent", (None, 1))
@pytest.mark.parametrize("mark", (b"", b"\xef\xbb\xbf", b" \n"))
def test_a_json_list_is_read_item_by_item(indent, mark, images):
    """The number after the file's name counts its rows: it tells them apart."""
    path = images.parent / "rows.json"
    rows = [chat("Hi", f"é {i}") for i in range(3)]
    path.write_bytes(mark + json.dumps(rows, indent=indent, ensure_ascii=False).encode())
    samples = read_all([path], None)
    assert [sample.answer for sample in samples] == ["é 0", "é 1", "é 2"]
    assert [sample.where for sample in samples] == [f"{path}:{i}" for i in (1, 2, 3)]

    path.write_bytes(mark + json.dumps([*rows, {"messages": 5}], indent=indent).encode())
    with pytest.raises(UserError, match=r"rows\.json:4: messages is 5, expected list"):
        read_all([path], None)
    path.write_bytes(mark + json.dumps([*rows, 7], indent=indent).encode())
    with pytest.raises(UserError, match=r"rows\.json:4: expected an object, found int"):
        read_all([path], None)
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(UserError, match=r"rows\.json: not a JSON list \(Expecting ',' delimiter"):
        read_all([path], None)


def test_marks_of_concatenated_files_are_no_text(images):
    (images / "a.json").write_bytes(b'\xef\xbb\xbf{"a": 1}')
    assert read_json(images / "a.json") == {"a": 1}
    path = images.parent / "rows.jsonl"
    line = b"\xef\xbb\xbf" + json.dumps(chat("Hi", "Hello")).encode() + b"\r\n"
    path.write_bytes(line + line + b"\xef\xbb\xbf\r\n")
    assert [sample.where for sample in read_all([path], None)] == [f"{path}:1", f"{path}:2"]


@pytest.mark.slow
@pytest.mark.parametrize("break_", ("\n", "\u2028", "\r", "\x85"), ids=ascii)
def test_a_message_has_one_line_and_begins_with_its_place(break_, images, tiny_model):
    """Whatever the path holds, and in a worker of the trainer too, whose traceback torch adds."""
    folder = images.parent / f"odd{break_}name"
    images.rename(folder)
    question = {"question": "?", "question_type": "object count", "answer": 3}
    question |= {"image": ["gone.jpg"], "data_type": "single_image"}
    path = write_rows(folder / "rows.jsonl", question)
    place = str(path).replace(break_, " ") + ":1: "
    flags = ["--stage", "1", "--model", tiny_model, "--data", path, "--images", folder]
    flags += ["--max-steps", 1, "--workers", 1, "--out", folder / "out"]
    done = launch(REPO / "train_sft.py", *flags)
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith(f"train_sft.py: {place}")
    checked = launch("look.check", path, "--images", folder)
    assert checked.stdout.splitlines()[0].startswith(f"error: {place}")
    assert len(checked.stdout.splitlines()) == 2
