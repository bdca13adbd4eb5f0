"""data.py: a malformed row is one line with its place; a good row becomes exactly its tokens."""

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import launch
from PIL import Image
from transformers import AutoTokenizer

from checkpoint import load_model
from data import (
    IGNORE,
    PROMPTS,
    Processor,
    check_media,
    collate,
    mrope_positions,
    prompt_text,
    read_all,
    read_prompts,
    read_samples,
    scale_boxes,
    style_of,
)
from files import UserError
from pictures import Media, open_header, open_picture
from rewards import accuracy_reward

REPO = Path(__file__).resolve().parents[1]
BOX = {"bbox_2d": [30, 20, 150, 100], "label": "door"}
LOCALIZE = {
    "question_id": 76,
    "question": "Where is the door?",
    "answer": [BOX],
    "image": ["scene0022_00/1760.jpg"],
    "data_type": "single_image",
}
CHOICE = {
    "question_id": 76,
    "question": "<image>Is the door left or right?",
    "options": ["A. left", "B. right"],
    "answer": "B",
    "image": ["scene0022_00/1760.jpg"],
    "question_type": "relative direction",
    "data_type": "single_image",
}
NUMBER = CHOICE | {
    "question_id": 77,
    "question": "How wide is it?",
    "options": None,
    "answer": "85",
    "question_type": "object size",
}
VIEWS = NUMBER | {
    "question_id": 78,
    "image": [f"scene0022_00/view{n}.jpg" for n in range(8)],
    "data_type": "multi_view",
}
VIDEO = NUMBER | {
    "question_id": 79,
    "image": [f"scene0022_00/frame{n}.jpg" for n in range(5)],
    "data_type": "video",
}
COLD = {
    "question_id": 80,
    "prompt": "How wide is it? Think first.",
    "solution": "<think>Wide.</think><answer>85</answer>",
    "image": ["scene0022_00/1760.jpg"],
    "data_type": "single_image",
}
CHAT = {
    "messages": [
        {
            "role": "user",
            "content": [
                {"type": "image", "image": "scene0022_00/1760.jpg"},
                {"type": "text", "text": "How wide?"},
            ],
        },
        {"role": "assistant", "content": "85"},
        {"role": "user", "content": "And high?"},
        {"role": "assistant", "content": "200"},
    ]
}


def write_images(folder):
    """The pictures of the rows above, 300 x 200 pixels, each of another colour, and odd files."""
    (folder / "scene0022_00").mkdir()
    for n, name in enumerate(["1760.jpg"] + VIEWS["image"] + VIDEO["image"]):
        picture = Image.new("RGB", (300, 200), (15 * n, 200 - 10 * n, 90))
        picture.save(folder / "scene0022_00" / name.split("/")[-1])
    (folder / "text.jpg").write_text("no picture")
    Image.effect_noise((300, 200), 50).convert("RGB").save(folder / "whole.jpg")
    (folder / "cut.jpg").write_bytes((folder / "whole.jpg").read_bytes()[:-2000])
    Image.new("RGB", (6000, 28)).save(folder / "thin.png")
    Image.new("RGB", (100, 100)).save(folder / "other.png")
    return folder


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return write_images(tmp_path_factory.mktemp("images"))


@pytest.fixture(scope="module")
def model(tiny_model):
    return load_model(tiny_model, torch.float32)


@pytest.fixture(scope="module")
def processor(tiny_model, model):
    return Processor(tiny_model, model.config)


def write_rows(path, *rows):
    path.write_text(
        "".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows),
        encoding="utf-8",
    )
    return path


# ------------------------------------------------------------ rows


def without(row, key):
    return {name: value for name, value in row.items() if name != key}


def boxes(**change):
    return LOCALIZE | {"answer": [BOX | change]}


def chat(*messages):
    return {"messages": list(messages)}


SAID = {"role": "assistant", "content": "85"}
MALFORMED = [  # a row, what the message says after file:line
    ("{", "not JSON (Expecting property name"),
    ('{"question": "\\ud800"}', "not JSON ('utf-8' codec can't encode character '\\ud800'"),
    ("[" * 100_000, "not JSON (maximum recursion depth"),
    ("[1, 2]", "expected an object, found list"),
    ("null", "expected an object, found NoneType"),
    (without(LOCALIZE, "question_id") | {"id": [7]}, "id is [7], expected int or str"),
    (LOCALIZE | {"question_id": 1.5}, "question_id is 1.5, expected int or str"),
    (without(CHOICE, "image"), "image is missing, expected list"),
    (CHOICE | {"image": "a.jpg"}, 'image is "a.jpg", expected list'),
    (CHOICE | {"image": []}, "image is [], expected a list of paths"),
    (CHOICE | {"image": [1]}, "image is [1], expected a list of paths"),
    (without(CHOICE, "data_type"), "data_type is None, expected single_image, multi_view or video"),
    (
        CHOICE | {"data_type": "audio"},
        "data_type is 'audio', expected single_image, multi_view or video",
    ),
    (without(CHOICE, "question"), "question is missing, expected str"),
    (without(COLD, "prompt"), "question is missing, expected str"),
    (without(COLD, "solution"), "question_type is missing, expected str"),
    (CHOICE | {"question": 5}, "question is 5, expected str"),
    (without(CHOICE, "question_type"), "question_type is missing, expected str"),
    (
        CHOICE | {"question_type": "colour"},
        "question_type is 'colour', expected one of relative distance, relative dir",
    ),
    (without(CHOICE, "answer"), "answer is missing, expected str or int or float"),
    (
        CHOICE | {"answer": "C"},
        "answer is 'C', expected the letter of one of the options ['A. left', 'B. right']",
    ),
    (CHOICE | {"answer": None}, "answer is missing, expected str or int or float"),
    (CHOICE | {"options": None}, "options is [], expected texts with letters of their own"),
    (CHOICE | {"options": ["left", "right"]}, "options is ['left', 'right'], expected texts with"),
    (CHOICE | {"options": ["B. left", "(b) right"]}, "options is ['B. left', '(b) right'], expe"),
    (CHOICE | {"answer": "x" * 99}, f"answer is '{'x' * 79}, expected the letter of one of"),
    (CHOICE | {"question": "<image><image>?"}, "question has <image> <image> for 1 files of data"),
    (CHOICE | {"question": "<video>?"}, "question has <video> for 1 files of data_type single_im"),
    (COLD | {"prompt": "<image> " * 3}, "prompt has <image> <image> <image> for 1 files of data"),
    (CHOICE | {"image": ["http://a.b/c.jpg"]}, "http://a.b/c.jpg: expected a file of this machine"),
    (CHOICE | {"image": ["/9j/" + "A" * 5000]}, f"/9j/{'A' * 76}: expected a file of this machine"),
    (CHOICE | {"image": ["data:video/mp4;base64,AAAA"]}, "data:video/mp4;base64,AAAA: expected da"),
    (
        CHOICE | {"image": ["data:image/png;base64,AAA"]},
        "data:image/png;base64,AAA: not base64 (Incorrect padding)",
    ),
    (
        CHOICE | {"image": ["data:image/png;base64," + "AAAA" * 99]},
        f"data:image/png;base64,{'A' * 58}: picture given as bytes: not a readable picture (cannot",
    ),
    (CHOICE | {"options": 5}, "options is 5, expected a list of texts"),
    (CHOICE | {"options": "AB"}, 'options is "AB", expected a list of texts'),
    (CHOICE | {"options": ["A. left", 2]}, 'options is ["A. left", 2], expected a list of texts'),
    (NUMBER | {"answer": "wide"}, "answer is 'wide', expected a number for object size"),
    (NUMBER | {"answer": float("nan")}, "answer is 'nan', expected a number for object size"),
    (NUMBER | {"answer": {}}, "answer is {}, expected str or int or float"),
    (VIDEO | {"seconds_per_frame": "1"}, 'seconds_per_frame is "1", expected int or float'),
    (VIDEO | {"seconds_per_frame": 0}, "seconds_per_frame is 0, expected a positive number"),
    (
        VIDEO | {"seconds_per_frame": float("inf")},
        "seconds_per_frame is inf, expected a positive number",
    ),
    (COLD | {"solution": 5}, "solution is 5, expected str"),
    (COLD | {"prompt": ["a"]}, 'prompt is ["a"], expected str'),
    (
        LOCALIZE | {"answer": []},
        "0 boxes in 1 pictures (single_image), expected one or more boxes in one",
    ),
    (
        LOCALIZE | {"image": ["a.jpg", "b.jpg"]},
        "1 boxes in 2 pictures (single_image), expected one or more boxes in one",
    ),
    (
        LOCALIZE | {"data_type": "video"},
        "1 boxes in 1 pictures (video), expected one or more boxes in one",
    ),
    (LOCALIZE | {"answer": [5]}, "box is 5, expected bbox_2d with 4 numbers and a label"),
    (
        LOCALIZE | {"answer": [without(BOX, "label")]},
        'box is {"bbox_2d": [30, 20, 150, 100]}, expected bbox_2d with 4 num',
    ),
    (
        boxes(bbox_2d=[1, 2, 3]),
        'box is {"bbox_2d": [1, 2, 3], "label": "door"}, expected bbox_2d with 4 numbers',
    ),
    (
        boxes(bbox_2d=[1, 2, 3, "4"]),
        'box is {"bbox_2d": [1, 2, 3, "4"], "label": "door"}, expected bbox_2d with 4 num',
    ),
    (
        boxes(bbox_2d=[1, 2, True, 4]),
        'box is {"bbox_2d": [1, 2, true, 4], "label": "door"}, expected bbox_2d with 4 n',
    ),
    (
        boxes(bbox_2d=[1, 2, 3, float("nan")]),
        'box is {"bbox_2d": [1, 2, 3, NaN], "label": "door"}, expected bbox_2d w',
    ),
    (
        boxes(bbox_2d=[9, 2, 3, 4]),
        "bbox_2d is [9, 2, 3, 4], expected 0 <= x1 < x2 and 0 <= y1 < y2",
    ),
    (
        boxes(bbox_2d=[-1, 2, 3, 4]),
        "bbox_2d is [-1, 2, 3, 4], expected 0 <= x1 < x2 and 0 <= y1 < y2",
    ),
    (
        boxes(bbox_2d=[0.1, 0.2, 0.5, 1]),
        "bbox_2d is [0.1, 0.2, 0.5, 1], expected pixels, not shares of the picture",
    ),
    (chat(), "messages must end with the assistant's turn"),
    ({"messages": 5}, "messages is 5, expected list"),
    (chat({"role": "user", "content": "Hi"}), "messages must end with the assistant's turn"),
    (chat({"role": "tool", "content": "Hi"}), "role is 'tool', expected system, user or assistant"),
    (chat("Hi"), "turn is 'Hi', expected an object with role and content"),
    (chat({"content": "Hi"}), "role is missing, expected str"),
    (chat({"role": "user", "content": 5}), "content is 5, expected str or list"),
    (
        chat({"role": "user", "content": [{"type": "image", "image": 5}]}, SAID),
        'content part {"type": "image", "image": 5}, exp',
    ),
    (
        chat({"role": "user", "content": ["Hi"]}, SAID),
        'content part "Hi", expected text, or in a user\'s turn an image or a video',
    ),
    (
        chat({"role": "system", "content": [{"type": "video", "video": ["a.jpg"]}]}, SAID),
        'content part {"type": "video", "video": ["a.jpg"]}, expected text',
    ),
    (
        chat({"role": "assistant", "content": [{"type": "image", "image": "a.jpg"}]}),
        'content part {"type": "image", "im',
    ),
]
MALFORMED_PIXELS = [  # rows whose pictures have a good header, and then an end that is missing
    (CHOICE | {"image": ["cut.jpg"]}, "cut.jpg: not a readable picture (image file is truncated"),
    (
        VIDEO | {"image": VIDEO["image"] + ["cut.jpg"]},
        "cut.jpg: not a readable picture (image file is truncated",
    ),
]
MALFORMED_MEDIA = [  # rows that are well-formed, whose files are not as they say
    (CHOICE | {"image": ["gone.jpg"]}, "gone.jpg: not a readable picture ("),
    (VIDEO | {"image": VIDEO["image"] + ["gone.jpg"]}, "gone.jpg: not a readable picture ("),
    (
        CHOICE | {"image": ["text.jpg"]},
        "text.jpg: not a readable picture (cannot identify image file",
    ),
    (CHOICE | {"image": ["thin.png"]}, "aspect ratio of 6000x28 is above 200"),
    (
        VIDEO | {"image": VIDEO["image"] + ["other.png"]},
        "frame0.jpg: the frames of one video differ in size",
    ),
    (
        boxes(bbox_2d=[1, 2, 301, 4]),
        "bbox_2d is [1, 2, 301, 4], outside the picture of 300x200 pixels",
    ),
    (
        boxes(bbox_2d=[1, 2, 3, 200.5]),
        "bbox_2d is [1, 2, 3, 200.5], outside the picture of 300x200 pixels",
    ),
]


@pytest.mark.parametrize("row, message", MALFORMED, ids=range(len(MALFORMED)))
def test_a_malformed_row_is_one_line_with_its_place(row, message, tmp_path):
    """Not a traceback, nothing skipped, and the place counts blank lines as an editor does."""
    path = write_rows(tmp_path / "rows.jsonl", CHOICE, "", row, CHOICE)
    with pytest.raises(UserError) as error:
        read_samples(path, tmp_path)
    assert str(error.value).startswith(f"{path}:3: {message}") and "\n" not in str(error.value)


@pytest.mark.parametrize("row, message", MALFORMED_MEDIA, ids=range(len(MALFORMED_MEDIA)))
def test_unusable_pictures_and_boxes_outside_name_the_row(
    row, message, tmp_path, images, processor
):
    """Found by headers alone, and just the same by training and evaluation, which decode."""
    path = write_rows(tmp_path / "rows.jsonl", row)
    [sample] = read_samples(path, images)
    messages = set()
    for attempt in (
        lambda: check_media(sample),
        lambda: processor.example(sample, style_of(sample)),
        lambda: processor.example(sample, style_of(sample), with_answer=False),
    ):
        with pytest.raises(UserError) as error:
            attempt()
        messages.add(str(error.value))
    assert len(messages) == 1 and messages.pop().removeprefix(f"{path}:1: ").removeprefix(
        f"{images}/"
    ).removeprefix("scene0022_00/").startswith(message)


@pytest.mark.parametrize("row, message", MALFORMED_PIXELS, ids=range(len(MALFORMED_PIXELS)))
def test_truncated_pictures_name_the_row_where_they_are_decoded(
    row, message, tmp_path, images, processor
):
    path = write_rows(tmp_path / "rows.jsonl", row)
    [sample] = read_samples(path, images)
    assert check_media(sample) == sample  # the header says nothing of it
    with pytest.raises(UserError) as error:
        processor.example(sample, style_of(sample))
    assert str(error.value).startswith(f"{path}:1: {images}/{message}") and "\n" not in str(
        error.value
    )


def test_not_utf8_names_its_line_and_a_missing_file_its_path(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(json.dumps(CHOICE).encode() + b"\n\xff\xfe{}\n")
    with pytest.raises(UserError, match=r"rows.jsonl:2: not JSON \('utf-8' codec can't decode"):
        read_samples(path, tmp_path)
    with pytest.raises(UserError, match=r"gone\.jsonl: not readable"):
        read_samples(tmp_path / "gone.jsonl", tmp_path)
    path.write_text("\n\n")
    with pytest.raises(UserError, match=r"rows\.jsonl: no rows in it"):
        read_all([path], None)


def test_the_three_released_files_and_chat_are_read_as_they_are(tmp_path, images):
    """Localization by its boxes, cold start by solution, chat by messages; <image> is no text."""
    path = write_rows(tmp_path / "rows.jsonl", LOCALIZE, CHOICE, NUMBER, VIEWS, VIDEO, COLD, CHAT)
    found, choice, number, views, video, cold, talk = read_samples(path, images)
    picture = Media("image", str(images / "scene0022_00/1760.jpg"))
    assert (
        found.question_type == "localization"
        and found.answer == (BOX,)
        and found.media == (picture,)
    )
    assert choice.question == "Is the door left or right?" and choice.options == (
        "A. left",
        "B. right",
    )
    assert (choice.id, choice.answer, choice.question_type) == ("76", "B", "relative direction")
    assert number.options == () and [media.kind for media in views.media] == ["image"] * 8
    assert video.media == (Media("video", tuple(str(images / name) for name in VIDEO["image"])),)
    assert (cold.prompt, cold.solution, cold.question_type) == (
        COLD["prompt"],
        COLD["solution"],
        "",
    )
    assert [style_of(s) for s in (found, choice, cold, talk)] == [
        "localize",
        "direct",
        "thinking",
        "direct",
    ]
    assert (
        talk.messages[0] == ("user", (picture, "How wide?"))
        and talk.id == f"{path}:7"
        and talk.media == (picture,)
    )


def test_nulls_are_absent(tmp_path, images):
    """`datasets` gives every row every column, and every part every key."""
    keys = {key for row in (LOCALIZE, CHOICE, VIDEO, COLD, CHAT) for key in row}
    nulls = dict.fromkeys((*keys, "conversations", "id", "seconds_per_frame", "images", "system"))
    rows = [LOCALIZE, CHOICE, NUMBER, VIEWS, VIDEO, COLD, CHAT]
    path = write_rows(tmp_path / "rows.jsonl", *rows)
    plain = read_samples(path, images)
    write_rows(path, *[nulls | row for row in rows])
    assert read_samples(path, images) == plain


@pytest.mark.parametrize(
    "options",
    (
        ["A. lamp", "B. bed"],
        ["(A) lamp", "(B) bed"],
        ["a. lamp", "b. bed"],
        ["A) lamp", "B) bed"],
        ["A: lamp", "B: bed"],
        ["[A] lamp", "[B] bed"],
        [" A lamp", "B bed"],
        ["A", "B"],
        ["B. bed", "A. lamp"],
    ),
    ids=str,
)
@pytest.mark.parametrize("answer", ("B", "b", "(B)", "B. bed"))
def test_options_stand_in_the_forms_of_benchmarks(options, answer, tmp_path, images):
    """As they are in the prompt; a third letter is none of them."""
    row = CHOICE | {"options": options, "answer": answer}
    (sample,) = read_samples(write_rows(tmp_path / "rows.jsonl", row), images)
    assert sample.options == tuple(options) and accuracy_reward(["B", "A"], sample) == [1, 0]
    with pytest.raises(UserError, match="answer is 'C', expected the letter of one of the options"):
        read_samples(write_rows(tmp_path / "rows.jsonl", row | {"answer": "C"}), images)


@pytest.mark.parametrize(
    "row, tags",
    (
        (CHOICE, "<image>\n"),
        (VIEWS, "<image>"),
        (VIEWS, "<image>" * 8),
        (VIDEO, "<video>\n"),
        (VIDEO, "<image>"),
        (VIDEO, "<image>" * 5),
    ),
)
def test_tags_in_a_question_are_not_read_to_the_model(row, tags, tmp_path, images):
    """Nor in a prompt of the row's own."""
    rows = [row | {"question": tags + "Where?"}, row | {"prompt": tags + "Where?"}]
    tagged, own = read_samples(write_rows(tmp_path / "rows.jsonl", *rows), images)
    assert tagged.question == own.prompt == "Where?"


# ------------------------------------------------------------ positions


def test_positions_of_the_worked_example(model):
    """The table in mrope_positions' docstring, and the same with a video of two slices."""
    config = model.config
    picture = torch.tensor([0, 1, *[config.image_token_id] * 6, 2, 3])
    positions = mrope_positions(picture, [(1, 4, 6)], [None], config)
    assert positions.tolist() == [
        [0, 1, 2, 2, 2, 2, 2, 2, 5, 6],
        [0, 1, 2, 2, 2, 3, 3, 3, 5, 6],
        [0, 1, 2, 3, 4, 2, 3, 4, 5, 6],
    ]
    table = re.findall(r"(?:time|height|width) +((?:\d+ *){10})", mrope_positions.__doc__)
    assert [[int(cell) for cell in row.split()] for row in table] == positions.tolist()

    # 2.25 seconds at this model's tokens_per_second: what follows continues after the largest.
    video = torch.tensor([0, *[config.video_token_id] * 4, 2])
    step = int(config.vision.tokens_per_second * 2.25)
    positions = mrope_positions(video, [(2, 2, 4)], [2.25], config)
    assert positions.tolist() == [
        [0, 1, 1, 1 + step, 1 + step, 2 + max(step, 1)],
        [0, 1, 1, 1, 1, 2 + max(step, 1)],
        [0, 1, 2, 1, 2, 2 + max(step, 1)],
    ]


def test_placeholders_and_pictures_must_agree(model):
    ids = torch.tensor([0, *[model.config.image_token_id] * 5])
    with pytest.raises(UserError, match="5 vision placeholders in the text, 6 vision tokens"):
        mrope_positions(ids, [(1, 4, 6)], [None], model.config)


# ------------------------------------------------------------ token ids


def theirs(directory, turns, grids, generate):
    """transformers, as it loads the directory: chat template, tokens, pads repeated."""
    tokenizer = AutoTokenizer.from_pretrained(directory)
    messages = [
        {
            "role": role,
            "content": [
                {"type": "text", "text": part} if isinstance(part, str) else {"type": part.kind}
                for part in parts
            ],
        }
        for role, parts in turns
    ]
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=generate)
    pads, grids, ids = (
        tokenizer.convert_tokens_to_ids(["<|image_pad|>", "<|video_pad|>"]),
        iter(grids),
        [],
    )
    for token in tokenizer.encode(text, add_special_tokens=False):
        t, h, w = next(grids) if token in pads else (1, 2, 2)
        ids += [token] * (t * h * w // 4)
    return ids


@pytest.mark.parametrize("generate", (False, True))
@pytest.mark.parametrize(
    "row",
    (
        LOCALIZE,
        CHOICE,
        NUMBER,
        VIEWS,
        VIDEO,
        COLD,
        CHAT,
        chat({"role": "system", "content": "Be brief."}, *CHAT["messages"][2:]),
    ),
    ids=lambda row: f"{len(str(row))} characters",
)
def test_ids_are_those_of_the_chat_template(row, generate, tmp_path, images, tiny_model, processor):
    """A token off, and a published checkpoint is asked in a format it has never seen."""
    [sample] = read_samples(write_rows(tmp_path / "rows.jsonl", row), images)
    style = style_of(sample)
    example = processor.example(sample, style, with_answer=not generate)
    if sample.question_type == "localization":
        # The answer is in pixels of the picture as the model sees it.
        assert example.boxes == scale_boxes(sample.answer, (112 / 300, 84 / 200))
        sample = replace(sample, answer=example.boxes)
    turns = processor.turns(sample, style, not generate)
    assert example.ids.tolist() == theirs(tiny_model, turns, example.grids, generate)
    assert example.positions.shape == (3, len(example.ids)) and len(example.labels) == len(
        example.ids
    )


def test_a_given_prompt_is_used_as_it_is_and_media_come_first(tmp_path, images, processor):
    [sample] = read_samples(write_rows(tmp_path / "rows.jsonl", COLD), images)
    shown, counts = processor.shown(processor.example(sample, "thinking", with_answer=False))
    assert counts == [12] and shown == (  # 112 x 84 pixels
        f"<|im_start|>system\n{PROMPTS['system']}<|im_end|>\n<|im_start|>user\n<|vision_start|><|image_pad|><|vision_end|>"
        f"{COLD['prompt']}<|im_end|>\n<|im_start|>assistant\n"
    )


@pytest.mark.parametrize("name", ("<|image_pad|>", "<|im_end|>", "<|vision_start|>"))
def test_special_tokens_in_a_question_are_text(name, tmp_path, images, processor):
    """Else a question could end its own turn, or claim another picture's features."""
    text = f"Is {name} left?"
    [odd, plain] = read_samples(
        write_rows(tmp_path / "rows.jsonl", CHOICE | {"question": text}, CHOICE), images
    )
    odd, plain = (processor.example(sample, "direct") for sample in (odd, plain))
    token = processor.special[name]
    assert (odd.ids == token).sum() == (plain.ids == token).sum()
    assert text in processor.tokenizer.decode(odd.ids.tolist(), skip_special_tokens=False)
    assert len(odd.ids) > len(plain.ids)  # spelled out


def trained_text(example, processor):
    return processor.tokenizer.decode(
        example.labels[example.labels != IGNORE].tolist(), skip_special_tokens=False
    )


def test_boxes_are_scaled_from_the_true_size(tmp_path, images, processor, tiny_model, model):
    """300 x 200 becomes 112 x 84: x times 112 / 300, y times 84 / 200."""
    [sample] = read_samples(write_rows(tmp_path / "rows.jsonl", LOCALIZE), images)
    example = processor.example(sample, "localize")
    assert example.grids == [(1, 6, 8)]
    assert example.boxes == ({"bbox_2d": [11, 8, 56, 42], "label": "door"},)
    assert trained_text(example, processor) == (
        '```json\n[{"bbox_2d": [11, 8, 56, 42], "label": "door"}]\n```<|im_end|>'
    )
    large = Processor(tiny_model, model.config, max_pixels=308 * 196).example(sample, "localize")
    assert large.grids == [(1, 14, 22)] and large.boxes[0]["bbox_2d"] == [31, 20, 154, 98]


@pytest.mark.parametrize(
    "row, answers",
    [
        (CHOICE, "B<|im_end|>"),
        (VIEWS, "85<|im_end|>"),
        (VIDEO, "85<|im_end|>"),
        (COLD, COLD["solution"] + "<|im_end|>"),
        (CHAT, "85<|im_end|>200<|im_end|>"),
    ],
    ids=("choice", "views", "video", "cold", "chat"),
)
def test_labels_are_the_assistants_words_and_its_ends_of_turn(
    row, answers, tmp_path, images, processor
):
    """The authors train on the prompt and on every video token too."""
    [sample] = read_samples(write_rows(tmp_path / "rows.jsonl", row), images)
    example = processor.example(sample, style_of(sample))
    trained = example.labels != IGNORE
    assert trained_text(example, processor) == answers and torch.equal(
        example.labels[trained], example.ids[trained]
    )


def test_headers_give_the_same_tokens_as_pixels(tmp_path, images, processor):
    """`check` counts tokens without decoding; a difference would be a wrong warning."""
    for row in (LOCALIZE, VIEWS, VIDEO, CHAT):
        [sample] = read_samples(write_rows(tmp_path / "rows.jsonl", row), images)
        whole, header = (
            processor.example(sample, style_of(sample), pixels=pixels) for pixels in (True, False)
        )
        assert torch.equal(whole.ids, header.ids) and torch.equal(whole.positions, header.positions)
        assert (
            whole.grids == header.grids and whole.boxes == header.boxes and len(header.patches) == 0
        )


@pytest.mark.parametrize("kind", ("jpg", "png", "webp"))
@pytest.mark.parametrize("orientation", range(1, 9))
def test_headers_give_the_upright_size(kind, orientation, tmp_path):
    """Boxes are drawn on the upright picture: with the stored size those of phones would fail."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.new("RGB", (80, 40)).save(tmp_path / f"a.{kind}", exif=exif)
    size = open_header(tmp_path / f"a.{kind}")
    assert size == ((80, 40) if orientation < 5 else (40, 80))
    assert size == open_picture(tmp_path / f"a.{kind}").size


def test_a_mixed_batch_equals_its_rows_one_by_one(tmp_path, images, processor, model):
    """A picture, eight views, a video, a bare chat: padding and others' pictures change nothing."""
    bare = chat({"role": "user", "content": "How many?"}, {"role": "assistant", "content": "3"})
    samples = read_samples(
        write_rows(tmp_path / "rows.jsonl", LOCALIZE, VIEWS, VIDEO, bare), images
    )
    examples = [processor.example(sample, style_of(sample)) for sample in samples]
    with torch.no_grad():
        together = model(collate(examples, model.config))[0]
        alone = torch.cat([model(collate([example], model.config))[0] for example in examples])
    assert len(alone) == sum((example.labels != IGNORE).sum() for example in examples)
    torch.testing.assert_close(together, alone, rtol=0, atol=2e-5)


# ------------------------------------------------------------ tokenizer


def test_banned_tokens_are_those_of_the_chat_format_and_rows_without_a_token(processor, model):
    """The sampler must be able to end its turn, and to write everything that is text."""
    banned = processor.banned("cpu")
    size = processor.tokenizer.get_vocab_size()
    assert banned.shape == (model.config.text.vocab_size,) and banned[size:].all()
    names = {processor.tokenizer.id_to_token(i) for i in banned[:size].nonzero()[:, 0].tolist()}
    vision = {"<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"}
    assert names == vision | {"<|im_start|>"}


def test_another_models_tokenizer_is_refused(tiny_model, model):
    """Its ids would mean something else, and nothing would say so."""
    other = replace(model.config, image_token_id=model.config.image_token_id + 1)
    with pytest.raises(UserError, match="tokenizer and model have other vocabularies"):
        Processor(tiny_model, other)


# ------------------------------------------------------------ prompts


@pytest.mark.parametrize(
    "content, message",
    [
        ("{", "not readable as JSON (Expecting property name"),
        ("[1]", "expected a JSON object, found list"),
        ('{"system": 5}', "expected an object from prompt names to texts"),
        (
            '{"sytem": "Hi"}',
            "unknown prompt 'sytem', expected one of system, localize, direct choice",
        ),
        ('{"localize": "Where?"}', "prompt 'localize' lacks the slot {question}"),
        ('{"direct choice": "{question}"}', "prompt 'direct choice' lacks the slot {options}"),
    ],
)
def test_a_malformed_prompts_file_is_one_line(content, message, tmp_path):
    """A prompt without its slot would ask every row the same."""
    (tmp_path / "prompts.json").write_text(content)
    with pytest.raises(UserError) as error:
        read_prompts(tmp_path / "prompts.json")
    assert str(error.value).startswith(f"{tmp_path / 'prompts.json'}: {message}")
    with pytest.raises(UserError, match="no such file"):
        read_prompts(tmp_path / "gone.json")


def test_prompts_of_a_file_replace_ours_one_by_one(tmp_path, images, tiny_model, model):
    (tmp_path / "prompts.json").write_text(
        '{"system": "Be brief", "direct choice": "Q: {question}\\n{options}\\nLetter?"}'
    )
    [choice, number] = read_samples(write_rows(tmp_path / "rows.jsonl", CHOICE, NUMBER), images)
    processor = Processor(tiny_model, model.config, prompts=tmp_path / "prompts.json")
    assert (
        prompt_text(choice, "direct", processor.prompts)
        == "Q: Is the door left or right?\nA. left\nB. right\nLetter?"
    )
    assert prompt_text(number, "direct", processor.prompts) == prompt_text(number, "direct")
    odd = replace(choice, question="What is {options}?", options=("A. {question}", "B. b"))
    assert (
        prompt_text(odd, "direct", processor.prompts)
        == "Q: What is {options}?\nA. {question}\nB. b\nLetter?"
    )
    assert "system\nBe brief<|im_end|>" in processor.shown(processor.example(choice, "direct"))[0]


# ------------------------------------------------------------ training


def test_training_stops_at_an_invalid_row(tmp_path, images, tiny_model):
    """One line and exit code 2."""
    path = write_rows(tmp_path / "rows.jsonl", LOCALIZE, CHOICE | {"answer": "C"}, CHOICE)
    flags = ["--stage", "1", "--model", tiny_model, "--data", path, "--images", images]
    stopped = launch(REPO / "train_sft.py", *flags, "--max-steps", 1, "--out", tmp_path / "a")
    assert stopped.returncode == 2 and stopped.stderr.startswith(
        f"train_sft.py: {path}:2: answer is 'C', expected "
    )
    assert stopped.stderr.count("\n") == 1


def test_a_box_outside_stops_training_where_the_row_is_read(tmp_path, images, tiny_model):
    """The true size is known when the picture is opened, in a worker too: the line is the same."""
    path = write_rows(tmp_path / "rows.jsonl", boxes(bbox_2d=[1, 2, 301, 4]))
    flags = ["--stage", "1", "--model", tiny_model, "--data", path, "--images", images]
    flags += ["--max-steps", 1, "--batch-size", 1, "--workers", 1, "--out", tmp_path / "a"]
    stopped = launch(REPO / "train_sft.py", *flags)
    assert stopped.returncode == 2
    last = stopped.stderr.splitlines()[-1]
    outside = "bbox_2d is [1, 2, 301, 4], outside the picture of 300x200 pixels"
    assert last.startswith("train_sft.py: ") and last.endswith(f"{path}:1: {outside}")
