"""`python data.py check`: look through a whole data set before a GPU hour is spent on it.

    python data.py check FILE.jsonl --images DIR [--model DIR] [--max-pixels N] [--max-tokens N]

An error is a row that training would stop at; a warning is a row worth a look. Every picture is decoded once, by all
cores. Exit code 2 if there are errors.
"""

import argparse
import sys
from collections import Counter
from multiprocessing import Pool
from pathlib import Path

from tqdm import tqdm

from checkpoint import load_config
from data import Processor, open_header, open_picture, read_samples, style_of
from files import UserError
from rewards import NUMBER_TYPES, parse_number
from settings import Parser, add_flags


def warnings(sample, places):
    """What is odd about a valid row. places: id -> file:line of the row that had it first, filled here."""
    first = places.setdefault(sample.id, sample.where)
    if first != sample.where:
        yield f"id {sample.id} stands at {first} too"
    if sample.question_type in NUMBER_TYPES and parse_number(sample.answer) == 0:
        yield f"answer is {sample.answer}: nothing but 0 earns a reward"
    if sample.question_type == "localization":
        width, height = open_header(sample.media[0].source).size
        for box in sample.answer:
            x1, y1, x2, y2 = box["bbox_2d"]
            if min(x1, y1) == 0 or x2 >= width - 1 or y2 >= height - 1:
                yield f"{box['label']} at {box['bbox_2d']} touches the edge of the picture of {width}x{height} pixels"


def pictures_of(sample):
    """Paths of a sample's pictures and of the frames of its videos, but for video files."""
    return [
        path
        for media in sample.media
        if media.kind == "image" or isinstance(media.source, tuple)
        for path in media.sources
    ]


def decode_error(path):
    """What is wrong with a picture beyond its header, such as an end that is missing; None if nothing is."""
    try:
        open_picture(path)
    except UserError as error:
        return str(error)


def check(path, images, processor=None, max_tokens=None):
    """Print what is wrong with the rows of a file, what is odd about them, and what they are.

    Args:    processor: counts the tokens of rows as they are trained on; None does not count.
             max_tokens: a longer row is odd.
    Returns: number of rows that are wrong.
    """
    wrong, odd, places, kinds, lengths = [], [], {}, Counter(), []
    samples = read_samples(path, images, wrong)
    pictures = list(dict.fromkeys(picture for sample in samples for picture in pictures_of(sample)))
    with Pool() as pool:
        errors = dict(
            zip(
                pictures,
                tqdm(
                    pool.imap(decode_error, pictures, 16),
                    desc="pictures",
                    total=len(pictures),
                    mininterval=2,
                    disable=None,
                ),
            )
        )
    for sample in samples:
        broken = next(filter(None, map(errors.get, pictures_of(sample))), None)
        if broken:
            wrong.append(f"{sample.where}: {broken}")
            continue
        kinds[sample.question_type or "cold start", sample.data_type] += 1
        odd += [f"{sample.where}: {text}" for text in warnings(sample, places)]
        if processor:
            lengths.append(len(processor.example(sample, style_of(sample), pixels=False).ids))
            if lengths[-1] > (max_tokens or lengths[-1]):
                odd.append(f"{sample.where}: {lengths[-1]} tokens, more than {max_tokens}")
    if not wrong and not kinds:
        raise UserError(f"{path}: no rows in it")
    wrong.sort(key=lambda text: int(text[len(str(path)) + 1 :].partition(":")[0]))  # by line
    for label, texts in (("error", wrong), ("warning", odd)):
        for text in texts:
            print(f"{label}: {text}")
    for kind, count in sorted(kinds.items()):
        print(f"{count:>8}  {' '.join(kind).strip()}")
    for bits, count in sorted(Counter(map(int.bit_length, lengths)).items()):
        print(
            f"{count:>8}  of {2**bits // 2} to {2**bits - 1} tokens {'#' * round(50 * count / len(lengths))}"
        )
    print(
        f"{path}: {len(wrong) + kinds.total()} rows, {len(wrong)} errors, {len(odd)} warnings"
        + (f", at most {max(lengths)} tokens" if lengths else "")
    )
    return len(wrong)


def main():
    parser = Parser(
        prog="data.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("command", choices=["check"])
    parser.add_argument("file", help="jsonl file")
    parser.add_argument(
        "--max-tokens", type=int, help="warn of rows longer than this; needs --model"
    )
    add_flags(
        parser,
        (
            "images",
            "model",
            "min_pixels",
            "max_pixels",
            "num_frames",
            "fps",
            "video_seconds",
            "prompts",
        ),
    )
    parser.set_defaults(num_frames=16, video_seconds="grid")
    args = parser.parse_args()
    refuse_bad_values(parser, args)
    if args.max_tokens and not args.model:
        parser.error("--max-tokens needs --model, whose tokenizer counts")
    processor = Processor(args.model, load_config(args.model), args) if args.model else None
    sys.exit(
        2
        if check(
            args.file, args.images or Path(args.file).parent / "images", processor, args.max_tokens
        )
        else 0
    )
