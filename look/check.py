"""Look through a whole data set before a GPU hour is spent on it.

    python -m look.check FILE.jsonl --images DIR [--model DIR] [--max-pixels N] [--max-tokens N]

An error is a row that training would stop at; a warning is a row worth a look. Every picture and
every frame of a video is decoded once, by all cores. With --model, tokens are counted. Of lines
that are not JSON, and of missing pictures, three are printed and their number. Exit code 2 if there
are errors.
"""

import os
import sys
from collections import Counter
from multiprocessing import Pool
from pathlib import Path

from tqdm import tqdm

from checkpoint import load_config
from data import Processor, Sample, check_media, parse_row, scale_boxes, style_of
from files import UserError, one_line, parse_line, read_lines
from films import read_video
from pictures import name_of, open_header, open_picture, opened
from rewards import NUMBER_TYPES, parse_number
from runtime import main_guard
from settings import PICTURES, Parser, add_flags

# One mistake, such as a wrong --images, brings these into thousands of lines.
FREQUENT = ("not JSON", "no such picture")
EXAMPLES = 3  # of each that are printed


def read_rows(path, images):
    """-> {file:line: Sample or error}. Pictures are opened, not decoded."""
    rows = {}
    for where, line in read_lines(path):
        try:
            sample = parse_row(parse_line(line, where), where, images)
            for file, _ in files_of(sample):
                if isinstance(file, str) and not os.path.exists(file):
                    raise UserError(
                        f"{where}: {file}: no such picture; is --images {images} right?"
                    )
            rows[where] = check_media(sample)
        except UserError as error:
            rows[where] = str(error)
    return rows


def files_of(sample):
    """[(path, whether it is a video file)] of all that a sample shows."""
    files = []
    for media in sample.media:
        files += [(source, media.is_video_file) for source in media.sources]
    return files


def decode(file):
    """-> error, oddity of a file beyond its header, such as an end that is missing; None for none.

    Of a video every frame is decoded, as training does, and only one is kept.
    """
    source, is_video = file
    try:
        if is_video:
            read_video(source, 1)
            return None, None
        open_picture(source)
        return None, odd_values(source)
    except UserError as error:
        return str(error), None


def odd_values(source):
    """What a 16-bit or a float picture loses: its values are cut to whole numbers of 0 to 255."""
    with opened(source) as image:
        if image.mode[0] not in "IF":
            return None
        low, high = image.getextrema()
    if low >= 0 and high <= 255 and high - low > 1:
        return None
    return f"{name_of(source)}: values {low:g} to {high:g}, of which the model sees 0 to 255"


def decode_all(samples):
    """-> {(path, is video): (error, oddity)} of all pictures and videos."""
    files = {}  # a dict keeps the order and holds each file once
    for sample in samples:
        files |= dict.fromkeys(files_of(sample))
    with Pool() as pool:
        results = pool.imap(decode, files, 16)
        # disable=None: no bar in a log file
        return dict(zip(files, tqdm(results, "pictures", len(files), disable=None)))


def oddities(sample, example=None):
    """Yield what is odd about one valid row. example: where there is a model to count tokens."""
    if sample.question_type in NUMBER_TYPES and parse_number(sample.answer) == 0:
        yield f"answer is {sample.answer}: only 0 earns a reward"
    if sample.question_type == "localization":
        width, height = open_header(sample.media[0].source)
        # at the size that the model sees, else at the true one
        boxes = example.boxes if example else scale_boxes(sample.answer, (1, 1))
        for box, seen in zip(sample.answer, boxes):
            corners = box["bbox_2d"]
            name = f"{box['label']:.80} at {corners}"
            left, top, right, bottom = seen["bbox_2d"]
            if min(right - left, bottom - top) <= 1:
                yield f"{name} is a pixel thin, or nothing, for the model: {seen['bbox_2d']}"
            x1, y1, x2, y2 = corners
            if min(x1, y1) == 0 or x2 >= width - 1 or y2 >= height - 1:
                edge = f"the edge of the picture of {width}x{height} pixels"
                yield f"{name} touches {edge}"


def print_errors(errors):
    """A line for each error; of those of one of the FREQUENT kinds a few, and their number."""
    counts = dict.fromkeys(FREQUENT, 0)
    for error in errors:
        kind = next((kind for kind in FREQUENT if kind in error), None)
        if kind:
            counts[kind] += 1
        if not kind or counts[kind] <= EXAMPLES:
            print(f"error: {error}")
    for kind, count in counts.items():
        if count > EXAMPLES:
            print(f"error: {count} rows in all: {kind}")


def look_at(sample, decoded, processor):
    """What is odd about a row, and its number of tokens: 0 without a processor.

    Raises: UserError where training would.
    """
    odd = []
    for file in files_of(sample):
        error, oddity = decoded[file]
        if error:
            raise UserError(f"{sample.where}: {error}")
        if oddity:
            odd.append(oddity)
    if processor is None:
        return [*odd, *oddities(sample)], 0
    example = processor.example(sample, style_of(sample), pixels=False)
    return [*odd, *oddities(sample, example)], len(example.ids)


def check(path, images, processor=None, max_tokens=None):
    """Print the errors and the oddities of a file, its kinds of rows, and a summary.

    Args:    processor: counts the tokens of rows as they are trained on.
             max_tokens: a longer row is odd.
    Returns: number of errors.
    """
    rows = read_rows(path, images)
    if not rows:
        raise UserError(f"{path}: no rows in it")
    decoded = decode_all([row for row in rows.values() if isinstance(row, Sample)])
    errors, warnings, kinds = [], [], Counter()
    longest = 0
    first = {}  # id -> the row that had it first
    for where, sample in rows.items():
        if isinstance(sample, str):
            errors.append(sample)
            continue
        try:
            odd, tokens = look_at(sample, decoded, processor)
        except UserError as error:
            errors.append(str(error))
            continue
        earlier = first.setdefault(sample.id, where)
        if earlier != where:
            odd.append(f"id {sample.id:.80} stands at {earlier} too")
        longest = max(longest, tokens)
        if max_tokens and tokens > max_tokens:
            odd.append(f"{tokens} tokens, more than {max_tokens}")
        warnings += [one_line(f"warning: {where}: {text}") for text in odd]
        kinds[f"{sample.question_type or 'cold start'} {sample.data_type}".strip()] += 1

    print_errors(errors)
    for line in warnings:
        print(line)
    for kind, count in sorted(kinds.items()):
        print(f"{count:>8}  {kind}")
    tokens = f", at most {longest} tokens" if processor else ""
    path = one_line(str(path))
    print(f"{path}: {len(rows)} rows, {len(errors)} errors, {len(warnings)} warnings{tokens}")
    return len(errors)


def main():
    parser = Parser(__doc__)
    parser.add_argument("file", help="jsonl file")
    parser.add_argument("--max-tokens", type=int, help="longer rows are odd; needs --model")
    add_flags(parser, ("images", "model", *PICTURES))
    args = parser.parse_args()
    if args.max_tokens:
        parser.need(args, "model")
    processor = None
    if args.model:
        processor = Processor(args.model, load_config(args.model), args)
    images = Path(args.images or Path(args.file).parent / "images")
    if check(args.file, images, processor, args.max_tokens):
        sys.exit(2)


if __name__ == "__main__":
    main_guard(main)
