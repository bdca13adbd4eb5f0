"""Write a page with the exact input that the model is trained on for one row of a jsonl file.

    python -m look.show FILE.jsonl --row 3 --model DIR [--images DIR] [--out row.html]

Pictures are shown as the patches hold them, text as its tokens: which ones are trained, and where
they stand on the three position axes.
"""

import math
from html import escape
from itertools import groupby
from pathlib import Path

from PIL import Image

from checkpoint import load_config
from data import Processor, parse_row, style_of
from files import UserError, parse_line, read_lines, write_text
from look.charts import boxed, data_uri, page
from pictures import MEAN, STD
from runtime import main_guard
from settings import PICTURES, Parser, add_flags


def seen(example):
    """An example's pictures and frames as the patches hold them, in one list for each grid."""
    pictures = []
    counts = [math.prod(grid) for grid in example.grids]
    for (t, h, w), patches in zip(example.grids, example.patches.split(counts)):
        # pictures.to_patches backwards, axis by axis.
        axes = patches.numpy().reshape(t, h // 2, w // 2, 2, 2, 3, 2, 14, 14)
        frames = axes.transpose(0, 6, 1, 3, 7, 2, 4, 8, 5).reshape(2 * t, 14 * h, 14 * w, 3)
        pixels = 255 * (frames * STD + MEAN)
        pixels = pixels.round().clip(0, 255).astype("uint8")
        pictures.append([Image.fromarray(frame) for frame in pixels])
    return pictures


def token_runs(example, processor):
    """Yield (kind, texts, positions (3, n)) of each run of tokens of one kind.

    A kind is "vision", "trained" or "prompt". There is a text for each token, or for several that
    are one character together.
    """
    vision = processor.config.image_token_id, processor.config.video_token_id
    kinds = []
    for token, label in zip(example.ids, example.labels):
        kind = "trained" if label >= 0 else "prompt"
        kinds.append("vision" if token in vision else kind)
    before = []  # a decoder may treat the start of a text in its own way, so nothing starts one
    for kind, places in groupby(range(len(kinds)), kinds.__getitem__):
        places = list(places)
        texts = []
        pending = []
        for token in example.ids[places].tolist():
            pending.append(token)
            length = len(processor.tokenizer.decode(before, skip_special_tokens=False))
            text = processor.tokenizer.decode(before + pending, skip_special_tokens=False)[length:]
            if "\ufffd" not in text:  # else a part of a character that the next token completes
                texts.append(text)
                before, pending = pending, []
        yield kind, texts, example.positions[:, places]


def views(example, sample):
    """The pictures of an example with the boxes of its answer."""
    figures = ""
    for media, frames in zip(sample.media, seen(example)):
        if media.kind == "image":
            frames = frames[:1]  # a still picture stands in both frames of its patches
        for number, frame in enumerate(frames, 1):
            caption = f"{media.kind} {number}, {frame.width} × {frame.height}"
            uri = data_uri(frame, max(frame.size))
            figures += boxed(uri, frame.size, {"true": example.boxes}, caption)
    return figures


def tokens(example, processor):
    """The tokens of an example, run by run, with their positions on the three axes."""
    items = ""
    for kind, texts, positions in token_runs(example, processor):
        ends = zip(("time", "height", "width"), positions.amin(1), positions.amax(1))
        axes = ", ".join(f"{name} {low} to {high}" for name, low, high in ends)
        count = positions.shape[1]
        if kind == "vision":
            texts = [f"{texts[0]} × {count}"]
        marked = "".join(f"<span>{escape(text)}</span>" for text in texts).replace("\n", "↵\n")
        items += f'<li class="{kind}"><b>{kind}</b> <small>{count} tokens: {axes}</small>'
        items += f'<p class="text tokens">{marked}</p></li>'
    return items


def show(args):
    """Write the page of one row."""
    where = f"{args.file}:{args.row}"
    line = dict(read_lines(args.file)).get(where)
    if line is None:
        raise UserError(f"{where}: there is no such row")
    images = Path(args.images or args.file.parent / "images")
    sample = parse_row(parse_line(line, where), where, images)
    processor = Processor(args.model, load_config(args.model), args)
    example = processor.example(sample, style_of(sample))

    trained = int((example.labels >= 0).sum())
    body = (
        f"<p>{escape(sample.question_type)} {sample.data_type}, prompt style {style_of(sample)}: "
        f"{len(example.ids)} tokens, {trained} of them trained</p>"
        "<h2>Pictures</h2><p>At the size that the model sees, with the boxes of the answer.</p>"
        f'<div class="row">{views(example, sample)}</div>'
        "<h2>Tokens</h2><p>One shade for each token; ↵ ends a line. Green tokens are trained, blue "
        "ones stand for a picture or video, grey ones are only read.</p>"
        f"<ul>{tokens(example, processor)}</ul>"
    )
    write_text(args.out, page(Path(where).name, body))


def main():
    parser = Parser(__doc__)
    parser.add_argument("file", type=Path, help="jsonl file")
    parser.add_argument("--row", type=int, required=True, help="line number of the row, from 1")
    parser.add_argument("--model", required=True, help="model directory")
    parser.add_argument("--out", default="row.html", help="page to write (default: %(default)s)")
    add_flags(parser, ("images", *PICTURES))
    args = parser.parse_args()
    show(args)
    print(args.out)


if __name__ == "__main__":
    main_guard(main)
