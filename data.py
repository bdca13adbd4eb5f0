"""From a jsonl line to what the model eats: validated samples, prompts, pictures and video, token ids and labels.

    python data.py check FILE.jsonl --images DIR [--model DIR]

    jsonl line -> Sample -> messages -> Example (ids, labels, positions, patches, grids) -> Batch

Training, rollouts, the reference and evaluation all take this one way, for pictures, many views and video alike.
Only the prompt style differs: "localize" asks for boxes as JSON, "direct" for the bare answer, "thinking" for a chain
of thought in <think></think> and the answer in <answer></answer>.
"""

import io
import json
import math
import re
from dataclasses import dataclass
from functools import cache, partial
from itertools import groupby
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from PIL import ExifTags, Image, ImageOps
from tokenizers import Tokenizer
from torch.nn.utils.rnn import pad_sequence

from files import UserError, parse_line, read_json, read_lines
from model import Batch
from rewards import CHOICE_TYPES, NUMBER_TYPES, parse_choice, parse_number

IGNORE = -100  # label of a token that is not trained
DATA_TYPES = ("single_image", "multi_view", "video")
MEAN, STD = (
    (0.48145466, 0.4578275, 0.40821073),
    (0.26862954, 0.26130258, 0.27577711),
)  # of CLIP's pictures, RGB

PROMPTS = {  # {question} and {options} are the slots; --prompts FILE replaces any of these texts
    "system": "You are a helpful assistant.",
    "localize": "{question}\nLocate every object that the question names: give its bounding box and label as JSON.",
    "direct choice": "{question}\nOptions:\n{options}\nReply with the letter of the correct option only.",
    "direct number": "{question}\nReply with a single number only.",
    "direct text": "{question}\nReply with the answer only.",
    "thinking choice": "{question}\nOptions:\n{options}\nReason step by step between <think> and </think>, then write "
    "the letter of the correct option between <answer> and </answer>.",
    "thinking number": "{question}\nReason step by step between <think> and </think>, then write a single number "
    "between <answer> and </answer>.",
    "thinking text": "{question}\nReason step by step between <think> and </think>, then write the answer between "
    "<answer> and </answer>.",
}


# ---------------------------------------------------------------------------------------------- rows


@dataclass(frozen=True)
class Media:
    """One picture or one video of a prompt."""

    kind: str  # "image" | "video"
    source: (
        object  # path or bytes of a picture; path of a video file, or a tuple of its frames' paths
    )
    seconds_per_frame: float | None = (
        None  # true time between the frames of a list, where the row gives it
    )

    @property
    def sources(self):
        return self.source if isinstance(self.source, tuple) else (self.source,)


@dataclass(frozen=True)
class Sample:
    """One validated row. A row of chat `messages` keeps its turns; all others are a question with an answer."""

    where: str  # "file.jsonl:17", how errors and logs name the row
    id: str
    question: str
    question_type: (
        str  # "localization", one of the seven types, a benchmark's own, "chat" or "chat: ..."
    )
    answer: object  # text, or a tuple of boxes {"bbox_2d": pixels of the original file, "label"}
    options: tuple = ()  # "A. left", "B. right", ...
    media: tuple = ()
    data_type: str = ""
    prompt: str | None = None  # complete user text that replaces the template
    solution: str | None = None  # the chain of thought that a cold start imitates
    messages: tuple | None = None  # ((role, (text or Media, ...)), ...)


def read_samples(path, images, wrong=None):
    """All rows of one jsonl file in SpatialLadder-26k's formats or as chat messages; pictures lie in `images`.

    Raises UserError with file:line at the first row that is not valid. A list `wrong` takes such errors instead, and
    those of check_media, and their rows are left out."""
    samples = []
    for where, line in read_lines(path):
        try:
            sample = parse_row(parse_line(line, where), where, Path(images))
            samples.append(sample if wrong is None else check_media(sample))
        except UserError as error:
            if wrong is None:
                raise
            wrong.append(str(error))
    return samples


def read_all(paths, images, tell=None, data_types=None):
    """The rows of several jsonl files, those of the data_types if some are given; pictures lie in `images`, or in a folder
    of that name beside each file. With `tell`, such as print, rows that are not valid are dropped, and it is told how many.
    """
    wrong = [] if tell else None
    samples = [
        s
        for path in paths
        for s in read_samples(path, images or Path(path).parent / "images", wrong)
    ]
    if wrong:
        tell(f"dropped {len(wrong)} of {len(wrong) + len(samples)} rows, the first: {wrong[0]}")
    unknown, kinds = (
        set(data_types or ()) - set(DATA_TYPES),
        f" of data_type {' or '.join(data_types)}" if data_types else "",
    )
    if unknown:
        raise UserError(
            f"--data-types: there is no {unknown.pop()!r}, expected of {', '.join(DATA_TYPES)}"
        )
    samples = [s for s in samples if not data_types or s.data_type in data_types]
    if not samples:
        raise UserError(f"{', '.join(map(str, paths))}: no rows{kinds} in it")
    return samples


def parse_row(row, where, images):
    """One row: localization if its answer is a list of boxes, cold start if it has a solution, chat if messages."""

    def need(key, kind, default=None):
        value = row.get(key, default)
        if not isinstance(value, kind):
            names = (
                " or ".join(k.__name__ for k in kind) if isinstance(kind, tuple) else kind.__name__
            )
            found = json.dumps(value)[:80] if key in row else "missing"
            raise UserError(f"{where}: {key} is {found}, expected {names}")
        return value

    row_id = str(need("question_id", (int, str), row.get("id", where)))
    if "messages" in row:
        turns = parse_messages(need("messages", list), where, images)
        media = tuple(part for _, parts in turns for part in parts if isinstance(part, Media))
        kind = "chat: " + need("question_type", str) if "question_type" in row else "chat"
        return Sample(where, row_id, "", kind, "".join(turns[-1][1]), media=media, messages=turns)

    paths, data_type = need("image", list), need("data_type", str)
    if data_type not in DATA_TYPES:
        raise UserError(
            f"{where}: data_type is {data_type!r}, expected single_image, multi_view or video"
        )
    if not paths or not all(isinstance(p, str) for p in paths):
        raise UserError(f"{where}: image is {json.dumps(paths)[:80]}, expected a list of paths")
    if data_type == "video":
        is_file = len(paths) == 1 and Path(paths[0]).suffix.lower() not in (
            ".jpg",
            ".jpeg",
            ".png",
            ".webp",
        )
        source = str(images / paths[0]) if is_file else tuple(str(images / p) for p in paths)
        seconds = need("seconds_per_frame", (int, float)) if "seconds_per_frame" in row else 1.0
        if not 0 < seconds < math.inf:
            raise UserError(f"{where}: seconds_per_frame is {seconds}, expected a positive number")
        media = (Media("video", source, row.get("seconds_per_frame")),)
    else:
        media = tuple(Media("image", str(images / p)) for p in paths)

    prompt, solution = row.get("prompt"), row.get("solution")
    for key in ("prompt", "solution"):
        if row.get(key) is not None or (key == "solution" and "question" not in row):
            need(key, str)
    question = need("question", str, "" if prompt else None).replace("<image>", "").strip()
    answer, options = row.get("answer", ""), row.get("options") or []
    if not isinstance(options, list) or not all(isinstance(option, str) for option in options):
        raise UserError(f"{where}: options is {json.dumps(options)[:80]}, expected a list of texts")
    if isinstance(answer, list):
        if len(media) != 1 or data_type != "single_image" or not answer:
            raise UserError(
                f"{where}: {len(answer)} boxes in {len(paths)} pictures ({data_type}), expected some in one"
            )
        return Sample(
            where,
            row_id,
            question,
            "localization",
            tuple(parse_box(b, where) for b in answer),
            (),
            media,
            data_type,
            prompt,
            solution,
        )
    question_type = need("question_type", str, "" if solution is not None else None)
    if question_type not in CHOICE_TYPES + NUMBER_TYPES + (("",) if solution is not None else ()):
        raise UserError(
            f"{where}: question_type is {question_type!r}, expected one of "
            f"{', '.join(CHOICE_TYPES + NUMBER_TYPES)}"
        )
    answer = str(need("answer", (str, int, float), ""))
    if question_type in CHOICE_TYPES:
        if parse_choice(answer) not in [option[:1] for option in options]:
            raise UserError(
                f"{where}: answer is {answer!r}, expected the letter of one of the options {options}"
            )
    elif question_type in NUMBER_TYPES and parse_number(answer) is None:
        raise UserError(f"{where}: answer is {answer!r}, expected a number for {question_type}")
    return Sample(
        where,
        row_id,
        question,
        question_type,
        answer,
        tuple(options),
        media,
        data_type,
        prompt,
        solution,
    )


def parse_box(box, where):
    """{"bbox_2d": [x1, y1, x2, y2], "label": text} with x1 < x2 and y1 < y2, in pixels of the original file."""
    corners = box.get("bbox_2d") if isinstance(box, dict) else None
    if not (
        isinstance(corners, list)
        and len(corners) == 4
        and isinstance(box.get("label"), str)
        and all(type(c) in (int, float) and -math.inf < c < math.inf for c in corners)
    ):
        raise UserError(
            f"{where}: box is {json.dumps(box)[:80]}, expected bbox_2d with 4 numbers and a label"
        )
    x1, y1, x2, y2 = corners
    if not (0 <= x1 < x2 and 0 <= y1 < y2):
        raise UserError(f"{where}: bbox_2d is {corners}, expected 0 <= x1 < x2 and 0 <= y1 < y2")
    return {"bbox_2d": corners, "label": box["label"]}


def parse_messages(messages, where, images):
    """Chat turns; content is text or a list of parts {"type": "text"|"image"|"video", "text"|"image"|"video": ...}."""
    turns = []
    for message in messages:
        role, content = (
            (message.get("role"), message.get("content"))
            if isinstance(message, dict)
            else (None, None)
        )
        if role not in ("system", "user", "assistant"):
            raise UserError(f"{where}: role is {role!r}, expected system, user or assistant")
        content = [{"type": "text", "text": content}] if isinstance(content, str) else content
        parts = []
        for part in content if isinstance(content, list) else [content]:
            kind = part.get("type") if isinstance(part, dict) else None
            value = part.get(kind) if kind in ("text", "image", "video") else None
            if (
                kind == "video"
                and isinstance(value, list)
                and value
                and all(isinstance(p, str) for p in value)
            ):
                parts.append(Media("video", tuple(str(images / p) for p in value)))
            elif isinstance(value, str) and (kind == "text" or role == "user"):
                parts.append(value if kind == "text" else Media(kind, str(images / value)))
            else:
                raise UserError(
                    f"{where}: content part {json.dumps(part)[:80]}, expected text, or in a user's turn "
                    f"an image or a video"
                )
        turns.append((role, tuple(parts)))
    if not turns or turns[-1][0] != "assistant":
        raise UserError(f"{where}: messages must end with the assistant's turn")
    return tuple(turns)


# ---------------------------------------------------------------------------------------------- pictures


def smart_resize(height, width, min_pixels, max_pixels, factor=28):
    """The size a picture is shown at: multiples of 28 with an area within the limits, the aspect ratio about kept.

    >>> smart_resize(968, 1296, 16 * 28 * 28, 128 * 28 * 28)
    (252, 364)
    """
    if max(height, width) > 200 * min(height, width):
        raise UserError(f"aspect ratio of {width}x{height} is above 200")
    h, w = round(height / factor) * factor, round(width / factor) * factor
    if h * w > max_pixels:
        shrink = math.sqrt(height * width / max_pixels)
        h, w = (
            max(factor, math.floor(side / shrink / factor) * factor) for side in (height, width)
        )
    elif h * w < min_pixels:
        grow = math.sqrt(min_pixels / (height * width))
        h, w = (math.ceil(side * grow / factor) * factor for side in (height, width))
    return h, w


def open_picture(source, pixels=True):
    """A picture (path, or bytes of a file) as RGB, upright as EXIF says, what is transparent on white; without `pixels`
    its size, from the header."""
    name = "picture given as bytes" if isinstance(source, bytes) else source
    try:
        with Image.open(io.BytesIO(source) if isinstance(source, bytes) else source) as image:
            size = (
                image.size[::-1]
                if image.getexif().get(ExifTags.Base.Orientation, 1) > 4
                else image.size
            )
            if pixels:
                image = ImageOps.exif_transpose(image)
                if image.has_transparency_data:
                    image = Image.alpha_composite(
                        Image.new("RGBA", image.size, "white"), image.convert("RGBA")
                    )
            image = image.convert("RGB") if pixels else SimpleNamespace(size=size)
    except (
        OSError,
        ValueError,
        SyntaxError,
        RuntimeError,
        Image.DecompressionBombError,
    ) as error:  # AVIF: RuntimeError
        raise UserError(f"{name}: not a readable picture ({str(error).split(' <')[0]})") from None
    if min(image.size) < 28:
        raise UserError(
            f"{name}: {image.size[0]}x{image.size[1]} pixels, expected at least 28 on each side"
        )
    return image


def read_video(path, num_frames, fps):
    """Frames of a video file, spread evenly: num_frames of them (fewer if it is shorter), or `fps` a second.

    Returns: list of RGB pictures, seconds between two of them.
    """
    try:
        import decord
    except ImportError:
        raise UserError(
            f"{path}: reading video files needs decord (pip install decord; it has no build for ARM), "
            f"or give the frames as a list of pictures"
        ) from None
    try:
        reader = decord.VideoReader(str(path), num_threads=1)
        total, rate = len(reader), float(reader.get_avg_fps())
        count = num_frames if fps is None else max(1, round(total / rate * fps))
        index = np.linspace(0, total - 1, min(count, total)).astype(int)
        frames = reader.get_batch(index).asnumpy()
        del reader  # decord keeps its decoder's memory as long as the reader lives
    except (decord.DECORDError, OSError, RuntimeError, ValueError, ZeroDivisionError) as error:
        raise UserError(
            f"{path}: not a readable video ({str(error).strip().splitlines()[0][:100]})"
        ) from None
    if len(index) == 0:
        raise UserError(f"{path}: the video has no frames")
    return [Image.fromarray(frame) for frame in frames], total / rate / len(index)


open_header = cache(
    partial(open_picture, pixels=False)
)  # a data set shows one picture in many rows


@cache
def video_header(path, num_frames, fps):
    """As read_video, but of the frames only their sizes."""
    frames, seconds = read_video(path, num_frames, fps)
    return [SimpleNamespace(size=frame.size) for frame in frames], seconds


def open_media(media, num_frames=1, fps=None, pixels=True):
    """-> [the picture] or the frames of a video (see open_picture), seconds between two frames or None."""
    if media.kind == "video" and isinstance(media.source, str):
        return (read_video if pixels else video_header)(media.source, num_frames, fps)
    pictures = [open_picture(source) if pixels else open_header(source) for source in media.sources]
    if any(picture.size != pictures[0].size for picture in pictures):
        raise UserError(f"{media.sources[0]}: the frames of one video differ in size")
    return pictures, media.seconds_per_frame


def check_media(sample):
    """The sample, if its pictures are there, of a usable size by their headers, and its boxes lie inside."""
    try:
        for media in sample.media:
            width, height = open_media(media, pixels=False)[0][0].size
            smart_resize(height, width, 0, math.inf)  # refuses what is too thin
            for box in sample.answer if sample.question_type == "localization" else ():
                if box["bbox_2d"][2] > width or box["bbox_2d"][3] > height:
                    raise UserError(
                        f"bbox_2d is {box['bbox_2d']}, outside the picture of {width}x{height} pixels"
                    )
    except UserError as error:
        raise UserError(f"{sample.where}: {error}") from None
    return sample


def to_patches(pictures, size):
    """Resize (bicubic), normalize and cut pictures into patches; T pictures are T / 2 temporal slices of a video.

    An odd last frame is repeated, as a still picture is.

    Args:    pictures: RGB. size: (height, width), multiples of 28.
    Returns: patches (N, 3 * 2 * 14 * 14) float32, flattened as (channel, time, height, width), in the order of
             merge blocks; grid (t, h, w) in patches.
    """
    height, width = size
    table = (np.arange(256) * (1 / 255)).astype(np.float32)[:, None]
    table = (table - np.array(MEAN, np.float32)) / np.array(
        STD, np.float32
    )  # (256, 3): every value a pixel can have
    pixels = np.stack(
        [np.asarray(p.resize((width, height), Image.BICUBIC)) for p in pictures]
    )  # (T, H, W, 3) uint8
    if len(pixels) % 2:
        pixels = np.concatenate((pixels, pixels[-1:]))
    values = np.stack([table[pixels[..., c], c] for c in range(3)], axis=1)  # (T, 3, H, W)
    t, h, w = len(values) // 2, height // 14, width // 14
    blocks = values.reshape(t, 2, 3, h // 2, 2, 14, w // 2, 2, 14)
    patches = blocks.transpose(0, 3, 6, 4, 7, 2, 1, 5, 8).reshape(t * h * w, 3 * 2 * 14 * 14)
    return torch.from_numpy(patches), (t, h, w)


# ---------------------------------------------------------------------------------------------- prompts


def prompt_text(sample, style, prompts=PROMPTS):
    """The user's text for a sample: its own prompt where it has one, else the template of the style.

    >>> prompt_text(Sample("f:1", "1", "How many?", "object count", "2"), "direct")
    'How many?\\nReply with a single number only.'
    """
    if sample.prompt is not None:
        return sample.prompt
    kind = (
        "choice"
        if sample.options
        else "number"
        if parse_number(str(sample.answer)) is not None
        else "text"
    )
    text = prompts[style if style == "localize" else f"{style} {kind}"]
    slots = {"{question}": sample.question, "{options}": "\n".join(sample.options)}
    return re.sub(
        "{question}|{options}", lambda slot: slots[slot[0]], text
    )  # at once: a question may hold {options}


def read_prompts(path):
    """PROMPTS with the texts of a JSON file in place of ours."""
    given = read_json(path)
    if not isinstance(given, dict) or not all(isinstance(text, str) for text in given.values()):
        raise UserError(f"{path}: expected an object from prompt names to texts")
    for name, text in given.items():
        if name not in PROMPTS:
            raise UserError(
                f"{path}: unknown prompt {name!r}, expected one of {', '.join(PROMPTS)}"
            )
        for slot in ("{question}", "{options}"):
            if slot in PROMPTS[name] and slot not in text:
                raise UserError(f"{path}: prompt {name!r} lacks the slot {slot}")
    return PROMPTS | given


def answer_text(sample, style, scale):
    """What the assistant is to say. scale: (x, y) factors from the original picture to the size the model sees.

    >>> box = {"bbox_2d": [0, 8, 20, 36], "label": "lamp"}
    >>> print(answer_text(Sample("f:1", "1", "?", "localization", (box,)), "localize", (0.5, 0.25)))
    ```json
    [{"bbox_2d": [0, 2, 10, 9], "label": "lamp"}]
    ```
    """
    if style == "thinking":
        if sample.solution is None:
            raise UserError(f"{sample.where}: no solution (chain of thought) in this row")
        return sample.solution
    if sample.question_type != "localization":
        return sample.answer
    boxes = scale_boxes(sample.answer, scale)
    return (
        "```json\n[" + ",\n".join(json.dumps(box, ensure_ascii=False) for box in boxes) + "]\n```"
    )


def scale_boxes(boxes, scale):
    """Boxes with corners multiplied by (x, y) factors and rounded to whole pixels."""
    return tuple(
        {
            "bbox_2d": [round(c * scale[i % 2]) for i, c in enumerate(box["bbox_2d"])],
            "label": box["label"],
        }
        for box in boxes
    )


# ---------------------------------------------------------------------------------------------- token ids


@dataclass
class Example:
    """One sample as the model takes it."""

    ids: torch.Tensor  # (T,) int64
    labels: torch.Tensor  # (T,) int64, IGNORE where not trained
    positions: torch.Tensor  # (3, T) int64
    patches: torch.Tensor  # (N, 1176)
    grids: list  # [(t, h, w)]
    boxes: tuple = ()  # a localization sample's boxes in pixels as the model sees them


def load_tokenizer(directory):
    """A model directory's tokenizer. UserError where its file is missing or broken."""
    path = Path(directory) / "tokenizer.json"
    try:
        return Tokenizer.from_file(str(path))
    except (
        Exception
    ) as error:  # tokenizers raises plain Exception for a missing file as for a broken one
        raise UserError(f"{path}: not a readable tokenizer ({error})") from None


def mrope_positions(ids, grids, seconds_per_grid, config):
    """The three position axes of one sequence.

    Text advances all axes together. A picture's tokens share the time at which they start and spread over height and
    width; a video's also move in time, by floor(t * tokens_per_second * seconds_per_grid): multiplied first, then
    floored. What follows continues at the largest position so far, over all axes, plus one, as the model was trained.
    (transformers 5 continues after a video at its start + max(h, w) / 2, which differs once the time axis is longest.)

    Args:    ids: (T,) int64. grids: [(t, h, w)] in patches, in order. seconds_per_grid: None for a picture.
    Returns: (3, T) int64.
    Raises:  UserError if the placeholders in `ids` are not those of `grids`.
    """
    merge = config.vision.spatial_merge_size
    is_pad = (ids == config.image_token_id) | (ids == config.video_token_id)
    needed = sum(t * h * w // merge**2 for t, h, w in grids)
    if int(is_pad.sum()) != needed:
        raise UserError(
            f"{int(is_pad.sum())} vision placeholders in the text, {needed} vision tokens in the "
            f"{len(grids)} pictures"
        )
    positions, at, following = [], 0, 0
    for (t, h, w), seconds in zip(grids, seconds_per_grid):
        start = at + int(is_pad[at:].nonzero()[0])
        text = torch.arange(following, following + start - at).expand(3, -1)
        h, w = h // merge, w // merge
        step = 0.0 if seconds is None else config.vision.tokens_per_second * seconds
        times = torch.tensor([math.floor(frame * step) for frame in range(t)])
        vision = torch.stack(
            torch.meshgrid(times, torch.arange(h), torch.arange(w), indexing="ij")
        ).flatten(1)  # (3, t*h*w)
        vision = vision + following + start - at
        positions += [text, vision]
        at, following = start + t * h * w, int(vision.max()) + 1
    positions.append(torch.arange(following, following + len(ids) - at).expand(3, -1))
    return torch.cat(positions, dim=1)


class Processor:
    """Everything between a Sample and an Example: tokenizer, picture limits, prompts. One per model directory."""

    def __init__(self, directory, config, args):
        """args holds: min_pixels, max_pixels: per picture and frame; preprocessor_config.json's where None.
        num_frames, fps: sampling of video files. video_seconds: "grid" takes one second per temporal patch of a
        video, as the authors' runs had it; "real" takes the true times where they are known. prompts: file or None."""
        directory = Path(directory)
        self.tokenizer = load_tokenizer(directory)
        self.tokenizer.encode_special_tokens = True  # "<|image_pad|>" in a question is text
        self.config, self.prompts = config, read_prompts(args.prompts) if args.prompts else PROMPTS
        self.special = {}
        for name in (
            "<|im_start|>",
            "<|im_end|>",
            "<|vision_start|>",
            "<|vision_end|>",
            "<|image_pad|>",
            "<|video_pad|>",
        ):
            self.special[name] = self.tokenizer.token_to_id(name)
            if self.special[name] is None:
                raise UserError(
                    f"{directory / 'tokenizer.json'}: no token {name} in it; not Qwen2.5-VL's tokenizer?"
                )
        words = self.tokenizer.get_vocab_size()
        if words > config.text.vocab_size or self.special["<|image_pad|>"] != config.image_token_id:
            raise UserError(
                f"{directory}: tokenizer and model have other vocabularies: {words} words with <|image_pad|> at "
                f"{self.special['<|image_pad|>']}, the model {config.text.vocab_size} and {config.image_token_id}"
            )
        limits = read_json(directory / "preprocessor_config.json")
        edges = limits.get("size") or {}
        self.min_pixels = (
            args.min_pixels or limits.get("min_pixels") or edges.get("shortest_edge") or 56 * 56
        )
        self.max_pixels = (
            args.max_pixels
            or limits.get("max_pixels")
            or edges.get("longest_edge")
            or 1280 * 28 * 28
        )
        if self.min_pixels > self.max_pixels:
            raise UserError(
                f"--min-pixels is {self.min_pixels}, above --max-pixels {self.max_pixels}"
            )
        self.num_frames, self.fps, self.video_seconds = (
            args.num_frames,
            args.fps,
            args.video_seconds,
        )
        generation = read_json(directory / "generation_config.json")
        stops = generation.get("eos_token_id", self.special["<|im_end|>"])
        self.stop_ids = tuple(stops) if isinstance(stops, list) else (stops,)

    def banned(self, device):
        """(V,) bool: vision tokens and rows beyond the tokenizer, which sampler, policy and reference never use."""
        words = (
            torch.arange(self.config.text.vocab_size, device=device)
            >= self.tokenizer.get_vocab_size()
        )
        for name in (
            "<|im_start|>",
            "<|vision_start|>",
            "<|vision_end|>",
            "<|image_pad|>",
            "<|video_pad|>",
        ):
            words[self.special[name]] = True
        return words

    def decode(self, ids):
        """Text of a completion, without special tokens."""
        return self.tokenizer.decode(ids, skip_special_tokens=True)

    def shown(self, example):
        """The rendered text with one pad token per picture or video, and how often each pad is repeated."""
        pads = {self.special["<|image_pad|>"], self.special["<|video_pad|>"]}
        ids, counts = [], []
        for token, run in groupby(example.ids.tolist()):
            run = list(run)
            ids += run[:1] if token in pads else run
            counts += [len(run)] if token in pads else []
        return self.tokenizer.decode(ids, skip_special_tokens=False), counts

    def load(self, media, pixels=True):
        """-> patches (N, 1176), grid (t, h, w), seconds per temporal patch or None, (x, y) scale from the original."""
        pictures, seconds = open_media(media, self.num_frames, self.fps, pixels)
        width, height = pictures[0].size
        h, w = smart_resize(height, width, self.min_pixels, self.max_pixels)
        grid = -(-len(pictures) // 2), h // 14, w // 14
        known = self.video_seconds == "real" and seconds is not None
        return (
            to_patches(pictures, (h, w))[0] if pixels else torch.empty(0, 1176),
            grid,
            (2 * seconds if known else 1.0) if media.kind == "video" else None,
            (w / width, h / height),
        )

    def turns(self, sample, style, scale, answer):
        """The conversation as ((role, (text or Media, ...)), ...)."""
        system = (("system", (self.prompts["system"],)),)  # a chat may bring its own
        if sample.messages is not None:
            return (
                system * (sample.messages[0][0] != "system")
                + sample.messages[: None if answer else -1]
            )
        turns = (*system, ("user", (*sample.media, prompt_text(sample, style, self.prompts))))
        return turns + (("assistant", (answer_text(sample, style, scale),)),) if answer else turns

    def example(self, sample, style, answer=True, pixels=True):
        """Render one sample in the chat format. Only the assistant's text and its end-of-turn token are trained.

        Args:    answer: with the answer and its labels (training), or up to where the assistant begins (generation).
                 pixels: False leaves the patches out: only headers of pictures are read.
        Raises:  UserError that begins with the sample's file:line.
        """
        if sample.question_type == "localization":
            check_media(sample)
        try:
            loaded = [self.load(media, pixels) for media in sample.media]
            scale = loaded[0][3] if loaded else (1, 1)
            ids, labels, pictures = [], [], iter(loaded)

            def add(tokens, trained=False):
                ids.extend(tokens)
                labels.extend(tokens if trained else [IGNORE] * len(tokens))

            def add_text(text, trained=False):
                add(self.tokenizer.encode(text, add_special_tokens=False).ids, trained)

            start, end = [self.special["<|im_start|>"]], [self.special["<|im_end|>"]]
            for role, parts in self.turns(sample, style, scale, answer):
                add(start)
                if role == "assistant":
                    add_text("assistant\n")
                    add_text("".join(parts), trained=True)
                    add(end, trained=True)
                else:
                    text = (
                        role + "\n"
                    )  # text runs on until a special token, as when the whole chat is tokenized
                    for part in parts:
                        if isinstance(part, Media):
                            add_text(text)
                            t, h, w = next(pictures)[1]
                            add(
                                [self.special["<|vision_start|>"]]
                                + [self.special[f"<|{part.kind}_pad|>"]] * (t * h * w // 4)
                                + [self.special["<|vision_end|>"]]
                            )
                            text = ""
                        else:
                            text += part
                    add_text(text)
                    add(end)
                add_text("\n")
            if not answer:
                add(start)
                add_text("assistant\n")
            ids = torch.tensor(ids)
            grids = [item[1] for item in loaded]
            positions = mrope_positions(ids, grids, [item[2] for item in loaded], self.config)
        except UserError as error:
            raise UserError(f"{sample.where}: {error}") from None
        boxes = scale_boxes(sample.answer, scale) if sample.question_type == "localization" else ()
        patches = torch.cat([item[0] for item in loaded] or [torch.empty(0, 1176)])
        return Example(ids, torch.tensor(labels), positions, patches, grids, boxes)


def collate(examples, config):
    """Right-pad examples to one Batch; see model.Batch for the shapes.

    A batch without pictures gets a dummy picture of 2 x 2 patches whose features go nowhere.
    """
    ids = pad_sequence([e.ids for e in examples], batch_first=True)  # (B, T)
    labels = pad_sequence(
        [e.labels for e in examples], batch_first=True, padding_value=IGNORE
    )  # (B, T)
    positions = pad_sequence([e.positions.T for e in examples], batch_first=True).permute(
        2, 0, 1
    )  # (3, B, T)
    flat = ids.flatten()
    following = torch.cat(
        (labels[:, 1:], torch.full_like(labels[:, :1], IGNORE)), dim=1
    ).flatten()  # (B*T,) next token
    predict_at = (following != IGNORE).nonzero()[:, 0]
    grids = [grid for e in examples for grid in e.grids]
    patches = torch.cat([e.patches for e in examples]) if grids else torch.zeros(4, 1176)
    return Batch(
        ids,
        positions,
        torch.tensor([len(e.ids) for e in examples]),
        patches,
        grids or [(1, 2, 2)],
        ((flat == config.image_token_id) | (flat == config.video_token_id)).nonzero()[:, 0],
        predict_at,
        following[predict_at],
    )


# ---------------------------------------------------------------------------------------------- kinds of rows


def style_of(sample, style=None):
    """How a row is asked: for boxes, if those are its answer; else in the style given, or by what it is trained on."""
    if sample.question_type == "localization":
        return "localize"
    return style or ("direct" if sample.solution is None else "thinking")


def cost(sample):
    """About how long a row is, in words and pictures: rows of like cost are padded together."""
    pictures = sum(len(media.sources) for media in sample.media)
    texts = [part for _, parts in sample.messages or () for part in parts if isinstance(part, str)]
    return 100 * pictures + sum(
        len(text.split()) for text in (sample.question, sample.solution or "", *texts)
    )


if __name__ == "__main__":
    from look.check import main, main_guard  # beside the reading path

    main_guard(main)
