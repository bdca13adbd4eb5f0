"""From a jsonl line to what the model takes: rows, prompts, positions, tokens, batches.

    jsonl line -> Sample -> turns -> Example (ids, labels, positions, patches, grids) -> Batch

    processor = Processor("path/to/Qwen2.5-VL-3B-Instruct", config)
    samples = read_samples("spld_spatial_data.jsonl", "images")
    examples = [processor.example(sample, style_of(sample)) for sample in samples]
    batch = collate(examples, config)

Training, rollouts and evaluation all take this one way, for pictures, views and
video alike; pictures.py opens them and cuts them into patches. Only the prompt style differs:
"localize" asks for boxes as JSON, "direct" for the bare answer, "thinking" for a chain of thought
in <think></think> and the answer in <answer></answer>.

Look through a whole file before training on it: python -m look.check FILE.jsonl --images DIR
"""

import json
import math
import re
from base64 import b64decode
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from urllib.parse import unquote

import torch
from tokenizers import Tokenizer
from torch.nn.utils.rnn import pad_sequence

from checkpoint import read_pixel_limits, read_stop_ids
from files import REQUIRED, UserError, need, parse_line, read_json, read_lines, without_nulls
from films import read_video  # noqa: F401  see open_picture
from layouts import MEDIA_TAG, turns_of
from model import Batch
from pictures import (
    PATCH,
    PATCH_VALUES,
    Media,
    measure,
    open_frames,
    open_header,
    open_picture,  # noqa: F401  data.py is all that a script needs to import
    resizes,
    smart_resize,
    to_patches,
)
from rewards import CHOICE_TYPES, NUMBER_TYPES, is_box, parse_choice, parse_number
from settings import PICTURES, SETTINGS

IGNORE = -100  # label of a token that is not trained
NO_PATCHES = torch.empty(0, PATCH_VALUES)

DATA_TYPES = ("single_image", "multi_view", "video")
LONGEST_PATH = 1000  # what is longer is a picture in base64 whose "data:image/...;" is missing
LETTER = re.compile(r"[(\[]?([A-Za-z])(?![A-Za-z0-9])")  # of an option, which may stand in brackets

# {question} and {options} are slots. --prompts FILE replaces any of these texts.
PROMPTS = {
    "system": "You are a helpful assistant.",
    "localize": "{question}\n"
    "Locate every object that the question names: give its bounding box and label as JSON.",
    "direct choice": "{question}\nOptions:\n{options}\n"
    "Reply with the letter of the correct option only.",
    "direct number": "{question}\nReply with a single number only.",
    "direct text": "{question}\nReply with the answer only.",
    "thinking choice": "{question}\nOptions:\n{options}\n"
    "Reason step by step between <think> and </think>, then write "
    "the letter of the correct option between <answer> and </answer>.",
    "thinking number": "{question}\n"
    "Reason step by step between <think> and </think>, then write a single number "
    "between <answer> and </answer>.",
    "thinking text": "{question}\n"
    "Reason step by step between <think> and </think>, then write the answer between "
    "<answer> and </answer>.",
}

SPECIAL_TOKENS = (
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|image_pad|>",
    "<|video_pad|>",
)
# The chat's structure. Written in an answer, these become ordinary characters; the model's other
# special tokens, such as <|box_start|>, stay one token.
STRUCTURE = (*SPECIAL_TOKENS, "<|vision_pad|>", "<|endoftext|>")


@contextmanager
def located(where):
    """Put file:line before every UserError that is raised inside."""
    try:
        yield
    except UserError as error:
        raise UserError(f"{where}: {error}") from None


# ------------------------------------------------------------ rows: jsonl line -> Sample
# Every mistake in a row is found here, when the file is read. Only what depends on the picture, its
# size and whether it opens, is found later: by check_media, or when the row is used.


@dataclass(frozen=True)
class Sample:
    """One validated row: a question with its answer, or the turns of a chat."""

    where: str  # "file.jsonl:17", how errors and logs name the row
    id: str
    question: str
    question_type: str  # "localization", one of the seven types, a benchmark's own, "chat[: ...]"
    answer: object  # text, or a tuple of boxes {"bbox_2d": pixels of the original file, "label"}
    options: tuple = ()  # "A. left", "B. right", ...
    media: tuple = ()
    data_type: str = ""
    prompt: str | None = None  # a complete user text, used in place of a template
    solution: str | None = None  # what a cold start imitates: chain and answer, with their tags
    messages: tuple | None = None  # of a chat: ((role, (text or Media, ...)), ...)


def read_samples(path, images):
    """All rows of one jsonl file: SpatialLadder-26k's three formats, or chat messages.

    Args:    images: the folder that picture paths are relative to.
    Raises:  UserError with file:line at the first row that is not valid.
    """
    samples = []
    for where, line in read_lines(path):
        samples.append(parse_row(parse_line(line, where), where, Path(images)))
    return samples


def read_all(paths, images):
    """The rows of several files. images: None for a folder of that name beside each file."""
    samples = []
    for path in paths:
        samples += read_samples(path, images or Path(path).parent / "images")
    if not samples:
        raise UserError(f"{', '.join(map(str, paths))}: no rows in it")
    return samples


# The functions down to parse_part raise UserError without the place: parse_row puts it in front.


def are_texts(value):
    return isinstance(value, list) and all(isinstance(item, str) for item in value)


def parse_row(row, where, images):
    """One row as a Sample: a chat if it has turns, else a question with an answer."""
    with located(where):
        row = without_nulls(row)
        key = "question_id" if "question_id" in row else "id"
        name = str(need(row, key, int, str, default=where))
        if "messages" in row or "conversations" in row:
            return parse_chat(row, where, name, images)
        return parse_question(row, where, name, images)


def parse_question(row, where, name, images):
    """A localization if the answer is a list of boxes, a cold start if there is a solution.

    {"question_id": 7, "question": "How many chairs?", "question_type": "object count",
     "answer": "4", "options": null, "image": ["a.jpg", "b.jpg"], "data_type": "multi_view"}
    """
    prompt = need(row, "prompt", str, default=None)
    solution = need(row, "solution", str, default=None)
    # A row that brings its whole prompt needs no question.
    question = need(row, "question", str, default="" if prompt else REQUIRED)
    media = parse_media(row, images)  # checks image and data_type, which are used below
    options = row.get("options") or []
    if not are_texts(options):
        raise UserError(f"options is {json.dumps(options)[:80]}, expected a list of texts")

    if isinstance(row.get("answer"), list):
        question_type = "localization"
        answer = boxes_of_row(row)
    else:
        # A cold start may leave out its type and its answer: the solution is what is trained.
        default = REQUIRED if solution is None else ""
        question_type = need(row, "question_type", str, default=default)
        answer = str(need(row, "answer", str, int, float, default=default))
        if question_type or solution is None:
            check_answer(answer, question_type, options)
    return Sample(
        where=where,
        id=name,
        question=without_tags(row, "question", question).strip(),
        question_type=question_type,
        answer=answer,
        options=tuple(options),
        media=media,
        data_type=row["data_type"],
        prompt=prompt and without_tags(row, "prompt", prompt),
        solution=solution,
    )


def without_tags(row, key, text):
    """A question without its <image> or <video>: its pictures always come first.

    One tag may stand for all pictures, or there is one for each.
    """
    tags = MEDIA_TAG.findall(text)
    if not tags:
        return text
    files, data_type = len(row["image"]), row["data_type"]
    allowed = [["image"], ["image"] * files]
    if data_type == "video":
        allowed.append(["video"])
    if tags not in allowed:
        found = " ".join([f"<{tag}>" for tag in tags])
        raise UserError(f"{key} has {found:.80} for {files} files of data_type {data_type}")
    return MEDIA_TAG.sub("", text).strip()


def parse_media(row, images):
    """The pictures of a question, or its one video: a list of frames, or one file."""
    paths = need(row, "image", list)
    data_type = row.get("data_type")
    if data_type not in DATA_TYPES:
        raise UserError(
            f"data_type is {data_type!r:.80}, expected single_image, multi_view or video"
        )
    if not paths or not are_texts(paths):
        raise UserError(f"image is {json.dumps(paths)[:80]}, expected a list of paths")
    sources = tuple(source_of(path, images) for path in paths)
    if data_type != "video":
        return tuple(Media("image", source) for source in sources)

    seconds = need(row, "seconds_per_frame", int, float, default=None)
    if seconds is not None and not 0 < seconds < math.inf:
        raise UserError(f"seconds_per_frame is {seconds}, expected a positive number")
    if len(sources) == 1:
        sources = sources[0]  # a video file, or the one frame of a short video: see Media
    return (Media("video", sources, seconds),)


def source_of(name, images):
    """Where a picture or a video of a row is: a path, or the bytes of a picture in the row itself.

    name: a path relative to the folder `images`, a file: URI, or a data: URI of a picture.
    """
    if name.startswith("file:"):
        # file:///a/b.jpg, file://localhost/a/b.jpg, file:/a/b.jpg
        path = name.removeprefix("file:").removeprefix("//localhost").removeprefix("//")
        return str(images / unquote(path))
    if name.startswith("data:"):
        head, _, content = name.partition(",")
        if not re.fullmatch("data:(image/?.*)?;base64", head):
            raise UserError(f"{name:.80}: expected data:image/...;base64,... or a path")
        with located(name[:80]):
            try:
                source = b64decode(content)
            except ValueError as error:
                raise UserError(f"not base64 ({error})") from None
            open_header(source)
        return source
    if "://" in name or len(name) > LONGEST_PATH:
        raise UserError(f"{name:.80}: expected a file of this machine; nothing is fetched")
    return str(images / name)


def boxes_of_row(row):
    """The boxes of a localization, all in one picture, in pixels of the original file."""
    boxes, pictures, data_type = row["answer"], len(row["image"]), row["data_type"]
    if not boxes or pictures != 1 or data_type != "single_image":
        raise UserError(
            f"{len(boxes)} boxes in {pictures} pictures ({data_type}), "
            "expected one or more boxes in one single_image"
        )
    for box in boxes:
        if not is_box(box):
            found = json.dumps(box)[:80]
            raise UserError(f"box is {found}, expected bbox_2d with 4 numbers and a label")
        corners = box["bbox_2d"]
        x1, y1, x2, y2 = corners
        if not (0 <= x1 < x2 and 0 <= y1 < y2):
            raise UserError(f"bbox_2d is {corners!r:.80}, expected 0 <= x1 < x2 and 0 <= y1 < y2")
        if max(corners) <= 1:
            raise UserError(
                f"bbox_2d is {corners!r:.80}, expected pixels, not shares of the picture"
            )
    return tuple(boxes)


def letters_of(options):
    """The letter that each option begins with, None where there is none.

    >>> letters_of(["A. lamp", "(B) bed", "c) desk", "D door", "Everything"])
    ['A', 'B', 'C', 'D', None]
    """
    matches = [LETTER.match(option.strip()) for option in options]
    return [match and match[1].upper() for match in matches]


def check_answer(answer, question_type, options):
    """Refuse an answer that no completion can match: training on it would teach noise."""
    if question_type in CHOICE_TYPES:
        letters = letters_of(options)
        if None in letters or len(set(letters)) < max(1, len(letters)):
            raise UserError(
                f"options is {options!r:.80}, expected texts with letters of their own: A. lamp"
            )
        if parse_choice(answer) not in letters:
            raise UserError(
                f"answer is {answer!r:.80}, expected the letter of one of the options "
                f"{options!r:.80}"
            )
    elif question_type in NUMBER_TYPES:
        if parse_number(answer) is None:
            raise UserError(f"answer is {answer!r:.80}, expected a number for {question_type}")
    else:
        known = ", ".join(CHOICE_TYPES + NUMBER_TYPES)
        raise UserError(f"question_type is {question_type!r:.80}, expected one of {known}")


def parse_chat(row, where, name, images):
    """Turns of a chat, as transformers takes them; layouts.turns_of reads other layouts.

    {"messages": [{"role": "user", "content": [{"type": "image", "image": "a.jpg"},
                                               {"type": "text", "text": "How wide?"}]},
                  {"role": "assistant", "content": "85"}]}
    """
    turns, media = [], []
    for role, parts in turns_of(row):
        parts = tuple(parse_part(part, role, images) for part in parts)
        turns.append((role, parts))
        media += [part for part in parts if isinstance(part, Media)]
    # Evaluation compares the last turn; a question_type only groups the scores.
    answer = "".join(turns[-1][1])
    question_type = "chat"
    if "question_type" in row:
        question_type += ": " + need(row, "question_type", str)
    return Sample(where, name, "", question_type, answer, media=tuple(media), messages=tuple(turns))


def parse_part(part, role, images):
    """One part of a turn: text, or in a user's turn a picture or a video."""
    match part:
        case {"type": "text", "text": str(text)}:
            return text
        case {"type": "image" | "video" as kind, **rest} if role == "user":
            source = rest.pop(kind, None)
            # max_pixels, nframes, video_start, ...: flags say this for all rows alike.
            if source and rest:
                raise UserError(f"{kind} part has {', '.join(rest):.80}, expected {kind} alone")
            if isinstance(source, str) and not (kind == "video" and source.startswith("data:")):
                return Media(kind, source_of(source, images))
            if kind == "video" and source and are_texts(source):
                return Media(kind, tuple(source_of(path, images) for path in source))
    found = json.dumps(part)[:80]
    raise UserError(f"content part {found}, expected text, or in a user's turn an image or a video")


def picture_paths(sample):
    """Paths of all pictures and frames, for those who look at the answers later."""
    paths = []
    for media in sample.media:
        paths += [source for source in media.sources if not isinstance(source, bytes)]
    return paths


def style_of(sample, style=None):
    """The prompt style of a row: a localization asks for boxes; the others take the style given.

    style: None for the style that the row is trained in.
    """
    if sample.question_type == "localization":
        return "localize"
    return style or ("direct" if sample.solution is None else "thinking")


def cost(sample):
    """About how long a row is, for padding rows of like length together. A picture is 100 words."""
    texts = [sample.question, sample.solution or ""]
    for _, parts in sample.messages or ():
        texts += [part for part in parts if isinstance(part, str)]
    words = sum(len(text.split()) for text in texts)
    return words + 100 * sum(len(media.sources) for media in sample.media)


def chunks(items, size):
    """A list in pieces of `size` items, the last one may be shorter.

    >>> chunks(["a", "b", "c"], 2)
    [['a', 'b'], ['c']]
    """
    return [items[first : first + size] for first in range(0, len(items), size)]


def check_media(sample):
    """The sample, if its pictures are there and usable, and its boxes lie inside: by headers."""
    with located(sample.where):
        for media in sample.media:
            _, (width, height), _ = measure(media, 1, None)
            smart_resize(height, width, 0, math.inf)  # refuses what is too thin
            if sample.question_type != "localization":
                continue
            for box in sample.answer:
                corners = box["bbox_2d"]
                if corners[2] > width or corners[3] > height:
                    raise UserError(
                        f"bbox_2d is {corners}, outside the picture of {width}x{height} pixels"
                    )
    return sample


# ------------------------------------------------------------ prompts: Sample -> texts
# What the user says comes from a template, or from the row's own prompt; what the assistant says
# is the row's answer or its solution.


def prompt_text(sample, style, prompts=PROMPTS):
    """The user's text for a sample: its own prompt where it has one, else the style's template.

    >>> prompt_text(Sample("f:1", "1", "How many?", "object count", "2"), "direct")
    'How many?\\nReply with a single number only.'
    """
    if sample.prompt is not None:
        return sample.prompt
    if style == "localize":
        name = "localize"
    elif sample.options:
        name = f"{style} choice"
    # By the answer, not by the type: benchmarks have types of their own.
    elif parse_number(str(sample.answer)) is not None:
        name = f"{style} number"
    else:
        name = f"{style} text"
    # All slots at once, not one after the other: a question may hold the text "{options}".
    slots = {"{question}": sample.question, "{options}": "\n".join(sample.options)}
    pieces = re.split("({question}|{options})", prompts[name])
    return "".join(slots.get(piece, piece) for piece in pieces)


def read_prompts(path):
    """PROMPTS with the texts of a JSON file in place of ours."""
    texts = read_json(path)
    if not are_texts([*texts.values()]):
        raise UserError(f"{path}: expected an object from prompt names to texts")
    for name, text in texts.items():
        if name not in PROMPTS:
            raise UserError(
                f"{path}: unknown prompt {name!r}, expected one of {', '.join(PROMPTS)}"
            )
        # A prompt without its slot would ask the same of every row.
        for slot in ("{question}", "{options}"):
            if slot in PROMPTS[name] and slot not in text:
                raise UserError(f"{path}: prompt {name!r} lacks the slot {slot}")
    return PROMPTS | texts


def answer_text(sample, style):
    """What the assistant is to say. Boxes are written as they are: `example` scales them before.

    >>> box = {"bbox_2d": [0, 2, 10, 9], "label": "lamp"}
    >>> sample = Sample("f:1", "1", "?", "localization", (box,))
    >>> print(answer_text(sample, "localize"))
    ```json
    [{"bbox_2d": [0, 2, 10, 9], "label": "lamp"}]
    ```
    """
    if style == "thinking":
        if sample.solution is None:
            raise UserError("no solution (chain of thought) in this row")
        return sample.solution
    if sample.question_type != "localization":
        return sample.answer
    lines = [json.dumps(box, ensure_ascii=False) for box in sample.answer]
    return "```json\n[" + ",\n".join(lines) + "]\n```"


def scale_boxes(boxes, scale):
    """Boxes with corners multiplied by (x, y) factors and rounded to whole pixels."""
    scaled = []
    for box in boxes:
        pairs = zip(box["bbox_2d"], (*scale, *scale))  # x1, y1, x2, y2 and x, y, x, y
        corners = [round(corner * factor) for corner, factor in pairs]
        scaled.append({"bbox_2d": corners, "label": box["label"]})
    return tuple(scaled)


# ------------------------------------------------------------ positions: ids -> three axes
# M-RoPE rotates queries and keys by three positions: when, and where in the picture. For text all
# three are equal, which is the usual rotary embedding.


def vision_tokens(grid):
    """Tokens of a picture or a video of (t, h, w) patches: 2 x 2 patches become one.

    >>> vision_tokens((1, 18, 26))
    117
    """
    t, h, w = grid
    return t * h * w // 4


def vision_positions(t, h, w, step):
    """Positions of the t * h * w vision tokens of one picture or video, counted from its start.

    Args:    t: slices: a picture, or pairs of frames. h, w: in tokens, not patches.
             step: time positions from one slice to the next.
    Returns: (3, t * h * w) int64: time, height, width.

    >>> vision_positions(2, 1, 3, 4.5).tolist()  # two slices of 1 x 3 tokens
    [[0, 0, 0, 4, 4, 4], [0, 0, 0, 0, 0, 0], [0, 1, 2, 0, 1, 2]]
    """
    times = torch.tensor([math.floor(i * step) for i in range(t)])
    axes = torch.meshgrid(times, torch.arange(h), torch.arange(w), indexing="ij")
    return torch.stack(axes).flatten(1)


def mrope_positions(ids, grids, seconds_per_slice, config):
    """The three position axes of one sequence: time, height, width.

    Text counts on all three axes together. The tokens of a picture share one time and spread over
    height and width. A video's also move in time, by tokens_per_second * seconds_per_slice a slice
    (multiplied first, then rounded down). What follows goes on one after the largest position so
    far, on any axis. Two text tokens, a picture of (1, 4, 6) patches, two text tokens:

        token     a  b  picture: 2 x 3   c  d
        time      0  1  2  2  2  2  2  2  5  6
        height    0  1  2  2  2  3  3  3  5  6
        width     0  1  2  3  4  2  3  4  5  6

    This is how the model was trained. (After a video whose time axis is the longest, transformers 5
    goes on at its start + max(h, w) / 2 instead.)

    Args:    ids: (T,) int64. grids: [(t, h, w)] in patches, in order.
             seconds_per_slice: of each grid; None for a picture.
    Returns: (3, T) int64.
    Raises:  UserError if `ids` does not hold a placeholder for every vision token of `grids`.
    """
    merge = config.vision.spatial_merge_size
    is_vision = (ids == config.image_token_id) | (ids == config.video_token_id)
    needed = sum(vision_tokens(grid) for grid in grids)
    count = int(is_vision.sum())
    if count != needed:
        raise UserError(
            f"{count} vision placeholders in the text, {needed} vision tokens in the "
            f"{len(grids)} pictures"
        )
    pieces = []  # (3, n) each: text, vision, text, vision, ..., text
    done = 0  # tokens that have positions
    position = 0  # of the next token
    for (t, h, w), seconds in zip(grids, seconds_per_slice):
        # The text before this picture: the same number on all axes.
        before = int(is_vision[done:].nonzero()[0])  # its tokens
        pieces.append(torch.arange(position, position + before).expand(3, -1))
        position += before
        # The picture: 2 x 2 patches are one token.
        step = 0.0 if seconds is None else config.vision.tokens_per_second * seconds
        pieces.append(position + vision_positions(t, h // merge, w // merge, step))
        position = int(pieces[-1].max()) + 1
        done += before + pieces[-1].shape[1]
    # The text after the last picture.
    pieces.append(torch.arange(position, position + len(ids) - done).expand(3, -1))
    return torch.cat(pieces, dim=1)


# ------------------------------------------------------------ token ids: Sample -> Example
# Everything that the model is given for a sample is made here, in Processor.example. Training,
# rollouts and evaluation differ only in the arguments of `example`.


@dataclass
class Loaded:
    """A picture or a video as the model sees it."""

    patches: torch.Tensor  # (t * h * w, 1176), (0, 1176) if it was only measured
    grid: tuple  # (t, h, w) in patches
    seconds: float | None  # between two of the t slices; None for a picture
    scale: tuple  # (x, y) factors from the original size to the size that the model sees


@dataclass
class Example:
    """One sample as the model takes it."""

    ids: torch.Tensor  # (T,) int64
    labels: torch.Tensor  # (T,) int64, IGNORE where not trained
    positions: torch.Tensor  # (3, T) int64
    patches: torch.Tensor  # (N, 1176)
    grids: list  # [(t, h, w)]
    boxes: tuple = ()  # of a localization, in pixels as the model sees them


def load_tokenizer(directory):
    """A model directory's tokenizer. UserError where its file is missing or broken.

    A training script may have saved it with settings of its own: they would cut, pad or vary texts.
    """
    path = Path(directory) / "tokenizer.json"
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # tokenizers raises nothing narrower, even for a missing file
        raise UserError(f"{path}: not a readable tokenizer ({error})") from None
    tokenizer.no_truncation()
    tokenizer.no_padding()
    tokenizer.model.dropout = None
    return tokenizer


class Processor:
    """Everything between a Sample and an Example: tokenizer, picture limits, prompts.

    Args:    args: a script's settings, of which those in settings.PICTURES are taken.
             changes: the same settings by name. What neither gives has its default.
    """

    def __init__(self, directory, config, args=None, **changes):
        directory = Path(directory)
        chosen = {name: SETTINGS[name].default for name in PICTURES} | changes
        for name in PICTURES:
            chosen[name] = getattr(args, name, chosen[name])
        self.config = config
        self.input_as = chosen["input_as"]
        even = self.input_as == "qwen-vl-utils"
        self.frames = (chosen["num_frames"], chosen["fps"], chosen["max_frames"], even)
        self.video_seconds = chosen["video_seconds"]
        self.prompts = read_prompts(chosen["prompts"]) if chosen["prompts"] else PROMPTS
        self.tokenizer = load_tokenizer(directory)
        self.tokenizer.encode_special_tokens = True  # "<|image_pad|>" in a question is text
        self.special = {name: self.tokenizer.token_to_id(name) for name in SPECIAL_TOKENS}
        # Another model's tokenizer would give ids that mean something else. The embedding may have
        # more rows than there are tokens: it is padded to a round number.
        size, rows = self.tokenizer.get_vocab_size(), config.text.vocab_size
        pads = self.special["<|image_pad|>"], self.special["<|video_pad|>"]
        expected = config.image_token_id, config.video_token_id
        if None in self.special.values() or size > rows or pads != expected:
            raise UserError(
                f"{directory}: tokenizer and model have other vocabularies: {size} tokens with "
                f"<|image_pad|> and <|video_pad|> at {pads}, the model {rows} and {expected}"
            )

        # A flag wins over the model's own limits, for pictures and for frames.
        self.limits = read_pixel_limits(directory)
        smallest, largest = self.limits["image"]
        self.min_pixels = chosen["min_pixels"] or smallest
        self.max_pixels = chosen["max_pixels"] or largest
        if self.min_pixels > self.max_pixels:
            raise UserError(
                f"--min-pixels is {self.min_pixels}, above --max-pixels {self.max_pixels}"
            )
        if chosen["min_pixels"] or chosen["max_pixels"]:
            self.limits = dict.fromkeys(self.limits, (self.min_pixels, self.max_pixels))

        self.stop_ids = read_stop_ids(directory, size) or (self.special["<|im_end|>"],)
        # Special tokens are the chat's structure, or the model's own words, such as <|box_start|>.
        self.structure = {*self.stop_ids, *map(self.tokenizer.token_to_id, STRUCTURE)}
        self.own_tokens = {}  # name -> id
        for token, added in self.tokenizer.get_added_tokens_decoder().items():
            if added.special and token not in self.structure:
                self.own_tokens[added.content] = token
        names = sorted(self.own_tokens, key=len, reverse=True)  # the longest that matches is meant
        pattern = "|".join(map(re.escape, names)) or "(?!)"  # which matches nowhere
        self.own_pattern = re.compile(f"({pattern})")

    def banned(self, device):
        """(V,) bool: tokens that sampler, policy and reference never use.

        These are <|im_start|>, the vision tokens and the rows of the embedding that no token has.
        """
        # A sampled picture token would have no picture; a padded row of the embedding no text.
        banned = torch.arange(self.config.text.vocab_size) >= self.tokenizer.get_vocab_size()
        for name, token in self.special.items():
            if name != "<|im_end|>":
                banned[token] = True
        return banned.to(device)

    def encode(self, text):
        """Ids of a text; a special token that is written in it becomes ordinary characters."""
        return self.tokenizer.encode(text, add_special_tokens=False).ids

    def encode_answer(self, text):
        """Ids of what the assistant says; <|box_start|> and the like become one token each."""
        # re.split keeps what matches a pattern in brackets: the tokens are pieces too.
        ids = []
        for piece in self.own_pattern.split(text):
            if piece in self.own_tokens:
                ids.append(self.own_tokens[piece])
            else:
                ids += self.encode(piece)
        return ids

    def decode(self, ids):
        """Text of a completion: with the model's own tokens, without its end of turn."""
        # skip_special_tokens would also drop what the model may say, such as <|box_start|>.
        said = [token for token in ids if token not in self.structure]
        return self.tokenizer.decode(said, skip_special_tokens=False)

    def shown(self, example):
        """The text with one pad token per picture or video, and how often each pad is repeated."""
        text = self.tokenizer.decode(example.ids.tolist(), skip_special_tokens=False)
        counts = [vision_tokens(grid) for grid in example.grids]
        return re.sub(r"(<\|(?:image|video)_pad\|>)\1+", r"\1", text), counts

    def example(self, sample, style, with_answer=True, pixels=True, reserve=0):
        """Render one sample in the chat format.

        Args:    with_answer: with the answer and its labels (training), or up to where the
                 assistant begins (generation).
                 pixels: False reads only headers, to count tokens; there are no patches then.
                 reserve: tokens (--max-completion-length) that have to fit behind it.
        Raises:  UserError that begins with the sample's file:line.
        """
        # That a box lies within its picture is only known when the picture's header is read.
        if sample.question_type == "localization":
            check_media(sample)
        with located(sample.where):
            # Pictures first: their sizes decide how many tokens the text has, and where boxes lie.
            loaded = [self.load(media, pixels) for media in sample.media]
            grids = [item.grid for item in loaded]
            seconds = [item.seconds for item in loaded]
            boxes = ()
            if sample.question_type == "localization":
                # Qwen2.5-VL gives boxes in pixels of the one picture that it sees.
                boxes = scale_boxes(sample.answer, loaded[0].scale)
                sample = replace(sample, answer=boxes)
            turns = self.turns(sample, style, with_answer)
            grid_of = dict(zip(sample.media, grids))  # equal Media have equal grids
            ids, labels = self.render(turns, grid_of, with_answer)
            context = self.config.text.max_position_embeddings
            if len(ids) + reserve > context:
                problem = f"{len(ids)} tokens"
                if len(ids) <= context:
                    problem = f"--max-completion-length {reserve} does not fit behind {problem}"
                raise UserError(f"{problem}; the model's context has {context}")
            positions = mrope_positions(ids, grids, seconds, self.config)
        # A text without pictures has no patches: cat needs one tensor at least.
        patches = torch.cat([NO_PATCHES, *(item.patches for item in loaded)])
        return Example(ids, labels, positions, patches, grids, boxes)

    def load(self, media, pixels=True):
        """Resize one picture or video and cut it into patches; without pixels, only measure it."""
        patches = NO_PATCHES
        if pixels:
            frames, interval = open_frames(media, *self.frames)
            count, (width, height) = len(frames), frames[0].size
        else:
            count, (width, height), interval = measure(media, *self.frames)
        # The size that the model sees, and the sizes on the way to it.
        video_frames = count if media.kind == "video" else 0
        limits = self.limits[media.kind]
        sizes = resizes(height, width, limits, self.input_as, video_frames, media.is_video_file)
        *before, ((h, w), _) = sizes  # in pixels
        if pixels:
            for (tall, wide), how in before:
                frames = [frame.resize((wide, tall), how) for frame in frames]
            patches, _ = to_patches(frames, (h, w))  # which resizes to the last size
        if media.kind == "image":
            seconds = None
        elif self.video_seconds == "real" and interval is not None:
            seconds = 2 * interval  # a slice is two frames
        else:
            seconds = 1.0  # as in the authors' runs
        grid = (math.ceil(count / 2), h // PATCH, w // PATCH)
        return Loaded(patches, grid, seconds, (w / width, h / height))

    def turns(self, sample, style, with_answer):
        """The conversation: ((role, (text or Media, ...)), ...). Boxes are written as they are."""
        system = ("system", (self.prompts["system"],))
        if sample.messages is None:
            user = ("user", (*sample.media, prompt_text(sample, style, self.prompts)))
            if not with_answer:
                return system, user
            return system, user, ("assistant", (answer_text(sample, style),))
        turns = sample.messages if with_answer else sample.messages[:-1]
        if sample.messages[0][0] == "system":  # a chat that brings its own
            return turns
        return system, *turns

    def render(self, turns, grid_of, with_answer):
        """The conversation in the chat format -> ids (T,), labels (T,).

            <|im_start|>user
            <|vision_start|><|image_pad|><|image_pad|>...<|vision_end|>How many chairs?<|im_end|>
            <|im_start|>assistant
            4<|im_end|>

        Only an assistant's text and its <|im_end|> are trained. The text is tokenized apart from
        its head "assistant\\n", behind which a model begins to write. So a text that begins with
        line breaks has other ids than by the chat template, which joins them to the head's: "\\n"
        and "\\n\\n" here, "\\n\\n\\n" there.

        Args:    grid_of: {Media: (t, h, w)}. with_answer: False adds the assistant's head.
        """
        start, end = [self.special["<|im_start|>"]], [self.special["<|im_end|>"]]
        head, newline = start + self.encode("assistant\n"), self.encode("\n")
        ids, labels = [], []
        for role, parts in turns:
            if role == "assistant":
                untrained = head
                trained = self.encode_answer("".join(parts)) + end
            else:
                untrained = start + self.encode_parts(role + "\n", parts, grid_of) + end
                trained = []
            # A segment is trained or not: labels need no search in the text.
            ids += untrained + trained + newline
            labels += [IGNORE] * len(untrained) + trained + [IGNORE] * len(newline)
        if not with_answer:
            ids += head
            labels += [IGNORE] * len(head)
        return torch.tensor(ids), torch.tensor(labels)

    def encode_parts(self, text, parts, grid_of):
        """Ids of a user's turn. A picture becomes as many pads as it has vision tokens.

        Text runs on up to the next special token and is tokenized in one piece, as if the whole
        conversation were.
        """
        ids = []
        for part in parts:
            if isinstance(part, Media):
                # The vision tokens' features take the pads' places in the model.
                pads = [self.special[f"<|{part.kind}_pad|>"]] * vision_tokens(grid_of[part])
                ids += self.encode(text)
                ids += [self.special["<|vision_start|>"], *pads, self.special["<|vision_end|>"]]
                text = ""
            else:
                text += part
        return ids + self.encode(text)


# ------------------------------------------------------------ batches: Examples -> Batch
# Padding is on the right: with causal attention no token sees it, so that no mask is needed. This
# runs in DataLoader's worker processes, on the CPU.


def collate(examples, config):
    """Right-pad examples to one Batch; see model.Batch for the shapes.

    A batch without pictures gets a dummy picture of 2 x 2 patches whose features go nowhere.
    """
    ids = pad_sequence([e.ids for e in examples], batch_first=True)  # (B, T)
    labels = pad_sequence([e.labels for e in examples], batch_first=True, padding_value=IGNORE)
    positions = pad_sequence([e.positions.T for e in examples], batch_first=True)  # (B, T, 3)

    # The hidden state of token i predicts token i + 1. `before` are the places i whose next token
    # is trained.
    sequence, before = (labels[:, 1:] != IGNORE).nonzero(as_tuple=True)  # (n,) each
    is_vision = (ids == config.image_token_id) | (ids == config.video_token_id)

    grids = []
    for example in examples:
        grids += example.grids
    patches = torch.cat([e.patches for e in examples])  # (N, 1176)
    # All ranks must run the vision encoder: its sharded weights are gathered together.
    if not grids:
        grids = [(1, 2, 2)]
        patches = torch.zeros(4, PATCH_VALUES)
    # Places are indices into the flattened ids: number of the sequence * T + place in it.
    return Batch(
        ids=ids,
        positions=positions.permute(2, 0, 1),  # (3, B, T)
        lengths=torch.tensor([len(e.ids) for e in examples]),
        patches=patches,
        grids=grids,
        vision_at=is_vision.flatten().nonzero()[:, 0],
        predict_at=sequence * ids.shape[1] + before,
        targets=labels[sequence, before + 1],
    )
