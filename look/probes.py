"""The paper's three analyses of what training changes: hints, attention, entropy.

    python -m look.probes hints runs/tiny         # the rungs of a ladder, about its test rooms
    python -m look.probes attention runs/tiny
    python -m look.probes entropy runs/tiny
    python -m look.probes all runs/tiny           # all three
    python -m look.probes hints --model DIR DIR --data SpatialLadder-26k --out DIR

Each probe writes NAME.json, the chart NAME.svg and (the first two) pictures NAME/*.png to
RUN/probes or --out. Intervals are 95% bootstraps over questions. The paper gives numbers without
code (docs/probes.md has them), and does not define the last two measures. These definitions are
ours:

hints      Questions of relative direction about one picture. A localization row with the same
           picture and question gives the boxes of the objects. Accuracy of greedy answers without a
           hint; with each object's box drawn, and named by its colour in the question (location);
           with the centres, a line between them and its direction in words besides (full).
           "location - none" and "full - none" are paired by question.
attention  The true answer is forced, token by token, in the direct style for every model. Softmax
           weights from the positions that predict its tokens (not the end of turn) to the
           picture's vision tokens; mean over the last third of the layers, all heads and positions;
           scaled to a sum of 1. That is a map with one cell per vision token.
           iou: overlap of the union of the true boxes with the cells of the largest weights, as
           many cells as have the union's area, at least one. entropy: of the map, divided by
           ln(cells). "locating" is the same while the localization row is answered. To compare
           with: the map of a question about another picture, random cells, the best possible cells.
entropy    Several answers are sampled for each question and sorted into clusters of one meaning:
           the same letter; numbers at most 10% above the smallest of their cluster; all answers
           that cannot be parsed. entropy: -sum p ln p over the clusters' shares p, in nats, mean
           over questions. invalid: the share of answers that cannot be parsed. accuracy: what the
           accuracy reward pays, mean over all answers.
"""

import dataclasses
import io
import math
from collections import defaultdict
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageOps

from ask import draw_boxes
from benchmarks import bootstrap_interval
from checkpoint import load_model
from coldstart import JUDGED, sample_chains
from data import IGNORE, Processor, chunks, collate, read_all, style_of
from eval import answer_rows, our_files, subset
from files import (
    CONFIG,
    UserError,
    hold,
    read_json,
    text_table,
    write_json,
    write_text,
    writing,
)
from ladder import BASE, RECIPES, RUNGS
from look.charts import dots, join
from model import KVCache
from pictures import Media, open_picture
from rewards import (
    CHOICE_TYPES,
    NUMBER_TYPES,
    SCORES,
    accuracy_reward,
    extract_answer,
)
from runtime import choose_device, compute_dtype, main_guard
from settings import (
    PICTURES,
    Parser,
    add_flags,
    positive,
    values,
)

CONDITIONS = ("none", "location", "full")
PANELS = {  # probe -> charts: title -> figures of each model
    "hints": {
        "share of directions answered right": CONDITIONS,
    },
    "attention": {
        "IoU of the most attended cells and the true boxes": (
            "iou",
            "another's map",
            "locating: iou",
            "locating: another's map",
        ),
        "entropy of the map / ln(cells)": ("entropy", "locating: entropy"),
    },
    "entropy": {
        "semantic entropy, nats": ("entropy",),
    },
}
LIMITS = {  # questions that are asked
    "hints": 200,
    "attention": 200,
    "entropy": 40,  # of each type
}
COLOURS = ("red", "blue", "green", "yellow", "magenta", "cyan")  # as a question and PIL name them
USED = (  # settings that the results depend on
    "images",
    "dtype",
    *PICTURES,
    "num_generations",
    "max_completion_length",
    "temperature",
    "seed",
)
TOLERANCE = 0.1  # numbers that differ by so little mean the same
RANDOM_MAPS = 20  # drawn for each question
PAINTED = 4  # questions whose maps are painted
SIDE = 448  # pixels of a painted map's longer side

# ---------------------------------------------------------------------------------- shared


def spatial_pairs(samples):
    """Questions of relative direction, each with the localization row of its picture and text.

    Returns: [(question, localization row)]; questions that have no such row are left out.
    """
    located = {}
    for sample in samples:
        if sample.question_type == "localization" and len(sample.answer) <= len(COLOURS):
            located[sample.media, sample.question] = sample
    pairs = []
    for sample in samples:
        boxes = located.get((sample.media, sample.question))
        if boxes and sample.question_type == "relative direction":
            pairs.append((sample, boxes))
    return pairs


def meaning(text, sample):
    """The letter or the number that a completion answers, or None if it has neither."""
    parse, _ = SCORES[sample.question_type]
    return parse(extract_answer(text, text))


def save_picture(picture, path):
    with writing(path):
        picture.save(path)


# ---------------------------------------------------------------------------------- hints


def centre(box):
    x1, y1, x2, y2 = box["bbox_2d"]
    return round((x1 + x2) / 2), round((y1 + y2) / 2)


def direction(a, b):
    """Where the centre of box a lies in the picture, seen from the centre of box b.

    >>> bin, bed = {"bbox_2d": [0, 0, 2, 2]}, {"bbox_2d": [4, 0, 6, 9]}
    >>> direction(bin, bed), direction(bed, bin), direction(bed, bed)
    ('left of and above', 'right of and below', 'at')
    """
    xa, ya = centre(a)
    xb, yb = centre(b)
    words = []
    if xa != xb:
        words.append("left of" if xa < xb else "right of")
    if ya != yb:
        words.append("above" if ya < yb else "below")
    return " and ".join(words) or "at"


def hint_text(boxes, condition):
    """The sentences that go with the drawing.

    >>> bin = {"bbox_2d": [0, 0, 2, 2], "label": "bin"}
    >>> bed = {"bbox_2d": [4, 0, 6, 2], "label": "bed"}
    >>> print(hint_text([bin, bed], "full").replace(". ", ".\\n"))
    The red box marks the bin, the blue box the bed.
    The centre of the red box is left of that of the blue box.
    """
    named = list(zip(COLOURS, boxes))
    marks = [f"the {colour} box the {box['label']}" for colour, box in named]
    text = ", ".join(marks).replace("the red box", "The red box marks", 1) + "."
    if condition == "full":
        for (a, one), (b, other) in pairwise(named):
            where = direction(one, other)
            text += f" The centre of the {a} box is {where} that of the {b} box."
    return text


def mark(picture, boxes, condition):
    """Draw on a picture, in place: each box in its colour; for "full" the centres and a line."""
    draw = ImageDraw.Draw(picture)
    line = 1 + max(picture.size) // 300
    for colour, box in zip(COLOURS, boxes):
        x1, y1, x2, y2 = box["bbox_2d"]
        # PIL draws the last pixel too.
        draw.rectangle((x1, y1, x2 - 1, y2 - 1), outline=colour, width=line)
    if condition == "full":
        centres = [centre(box) for box in boxes]
        draw.line(centres, fill="white", width=line)
        for colour, place in zip(COLOURS, centres):
            draw.circle(place, 2 * line, fill=colour, outline="white")


def hinted(question, located, condition):
    """The question as it is asked under one of CONDITIONS."""
    if condition == "none":
        return question
    picture = open_picture(question.media[0].source)
    mark(picture, located.answer, condition)
    png = io.BytesIO()
    picture.save(png, "PNG")
    text = hint_text(located.answer, condition)
    return dataclasses.replace(
        question,
        question=f"{question.question} {text}",
        media=(Media("image", png.getvalue()),),
        prompt=question.prompt and f"{question.prompt} {text}",
    )


def probe_hints(model, processor, pairs, args, device):
    """{figure: number} of each question: was it answered right, was there a letter?

    What the first question shows is saved beside args.pictures.
    """
    figures = [{"chance": 1 / len(question.options)} for question, _ in pairs]
    for condition in CONDITIONS:
        samples = [hinted(*pair, condition) for pair in pairs]
        picture = open_picture(samples[0].media[0].source)
        save_picture(picture, args.pictures.with_name(condition + ".png"))
        for rows in chunks(range(len(pairs)), args.micro_batch):
            answers = answer_rows(model, processor, samples, rows, args, device)
            for row, answer in zip(rows, answers):
                text = answer["completion"]
                right = accuracy_reward([text], samples[row])[0]
                figures[row][condition] = right
                figures[row][condition + ": invalid"] = meaning(text, samples[row]) is None
                if condition != "none":
                    figures[row][condition + " - none"] = right - figures[row]["none"]
    return figures


# ---------------------------------------------------------------------------------- attention


class WatchedCache(KVCache):
    """The cache of a prefill, which also keeps every layer's queries (B, H, T, D)."""

    def __init__(self, lengths):
        super().__init__(lengths)
        self.queries = []

    def attend(self, layer, q, k, v):
        self.queries.append(q)
        return super().attend(layer, q, k, v)


def attention_weights(q, k, places):
    """Softmax weights of the queries at some places over all keys up to their own.

    The model's own attention (SDPA) does not return them.

    Args:    q (H, T, D), k (K, T, D), places (r,).
    Returns: (H, r, T) fp32.
    """
    k = k.float().repeat_interleave(len(q) // len(k), dim=0)  # (H, T, D)
    scores = q[:, places].float() @ k.mT / math.sqrt(q.shape[-1])  # (H, r, T)
    later = torch.arange(q.shape[1], device=q.device) > places[:, None]  # (r, T)
    return scores.masked_fill(later, -math.inf).softmax(-1)


@torch.no_grad()
def attention_maps(model, processor, samples, device):
    """A map (h, w) for each sample: the share of attention that each vision token gets."""
    examples = [processor.example(sample, style_of(sample, "direct")) for sample in samples]
    # One forward over prompt and true answer gives the queries of every answer token at once.
    batch = collate(examples, model.config).to(device)
    cache = WatchedCache(batch.lengths)
    model(batch, cache)

    layers = list(zip(cache.queries, cache.keys))
    layers = layers[len(layers) * 2 // 3 :]  # the last third
    maps = []
    for row, example in enumerate(examples):
        targets = example.labels[1:]  # a position predicts the token after it
        answer = (targets != IGNORE) & (targets != processor.special["<|im_end|>"])
        places = answer.nonzero()[:, 0].to(device)
        # Summed over heads and positions; weights on the padding at the end are zero.
        heat = sum(attention_weights(q[row], k[row], places).sum((0, 1)) for q, k in layers)
        heat = heat.cpu()[: len(example.ids)][example.ids == model.config.image_token_id]
        _, h, w = batch.grids[row]  # in patches; a vision token holds 2 x 2
        maps.append((heat / heat.sum()).view(h // 2, w // 2).numpy())
    return maps


def box_mask(boxes, size):
    """The union of the boxes in a picture of size (width, height): (height, width), 0 or 1."""
    mask = np.zeros(size[::-1], np.float32)
    for box in boxes:
        x1, y1, x2, y2 = map(round, box["bbox_2d"])
        mask[y1:y2, x1:x2] = 1
    return mask


def in_cells(mask, shape):
    """The share of each cell of a map (h, w) that a mask (height, width) covers.

    >>> in_cells(box_mask([{"bbox_2d": [0, 0, 5, 10]}], (20, 20)), (2, 2)).tolist()
    [[0.5, 0.0], [0.0, 0.0]]
    """
    # A box filter takes the mean over each cell, also where cells do not end between two pixels.
    cells = Image.fromarray(mask).resize(shape[::-1], Image.Resampling.BOX)
    return np.asarray(cells, float)


def attended_iou(heat, mask):
    """IoU of a region with the cells of most attention, as many as have its area, at least one.

    Args:    heat (h, w). mask (height, width): the region in pixels.

    >>> left = box_mask([{"bbox_2d": [0, 0, 10, 20]}], (20, 20))
    >>> attended_iou(np.array([[0.7, 0.1], [0.1, 0.1]]), left)  # both upper cells: 1 of 3
    0.3333333333333333
    """
    truth = in_cells(mask, heat.shape)
    count = max(1, round(truth.sum()))
    order = np.argsort(-heat, axis=None, kind="stable")
    shared = truth.flat[order[:count]].sum()
    return float(shared / (count + truth.sum() - shared))


def map_entropy(heat):
    """Entropy of a map that sums to 1, divided by the largest possible.

    >>> map_entropy(np.full((2, 2), 0.25)), map_entropy(np.array([[0.0, 1.0]]))
    (1.0, 0.0)
    """
    p = heat[heat > 0]
    return float((p * -np.log(p)).sum() / math.log(max(2, heat.size)))


def overlay(picture, heat, boxes):
    """The map in yellow over a grey picture of a size to look at; true boxes in red."""
    painted = ImageOps.contain(picture.convert("L"), (SIDE, SIDE)).convert("RGB")
    heat = (heat - heat.min()) / max(np.ptp(heat), 1e-9)  # from the least to the most
    opacity = Image.fromarray(np.uint8(170 * heat))
    painted.paste("#ffe128", mask=opacity.resize(painted.size, Image.Resampling.NEAREST))
    draw_boxes(painted, boxes, np.divide(picture.size, painted.size))
    return painted


def another_picture(pairs, row):
    """The next question, in a circle, that is about another picture than question `row`."""
    question, _ = pairs[row]
    for other in (*range(row + 1, len(pairs)), *range(row)):
        if pairs[other][0].media != question.media:
            return other
    raise UserError(f"all {len(pairs)} questions are about one picture; attention needs two")


def probe_attention(model, processor, pairs, args, device):
    """Yield {figure: number} of each question: IoU and entropy of its maps.

    The first maps are painted to files whose names begin with args.pictures.
    """
    others = [another_picture(pairs, row) for row in range(len(pairs))]
    maps = {"": [], "locating: ": []}
    for kind, samples in zip(maps, zip(*pairs)):
        for part in chunks(samples, args.micro_batch):
            maps[kind] += attention_maps(model, processor, part, device)

    rng = np.random.default_rng(args.seed)
    for row, (question, located) in enumerate(pairs):
        picture = open_picture(question.media[0].source)
        mask = box_mask(located.answer, picture.size)
        figures = {}
        for kind, heats in maps.items():
            heat = heats[row]
            own = attended_iou(heat, mask)
            another = attended_iou(heats[others[row]], mask)
            figures[kind + "iou"] = own
            figures[kind + "another's map"] = another
            figures[kind + "iou - another's"] = own - another
            figures[kind + "entropy"] = map_entropy(heat)
            if row < PAINTED:
                painted = overlay(picture, heat, located.answer)
                save_picture(painted, f"{args.pictures}-{kind.strip(': ')}{row + 1}.png")
        random = [attended_iou(rng.random(heat.shape), mask) for _ in range(RANDOM_MAPS)]
        figures["random cells"] = np.mean(random)
        figures["best cells"] = attended_iou(in_cells(mask, heat.shape), mask)
        yield figures


# ---------------------------------------------------------------------------------- entropy


def alike(number, least):
    """Does a letter or number mean the same as the smallest of a cluster?"""
    if isinstance(number, float) and least is not None:
        return number - least <= TOLERANCE * abs(least)
    return number == least


def cluster_sizes(meanings):
    """How many answers share a meaning; those that cannot be parsed (None) come first.

    >>> cluster_sizes(["B", "A", "B", None, None]), cluster_sizes([121.0, 100.0, 110.0])
    ([2, 1, 2], [2, 1])
    """
    sizes = [meanings.count(None)]
    least = None
    for meaning in sorted(meaning for meaning in meanings if meaning is not None):
        if alike(meaning, least):
            sizes[-1] += 1
        else:
            sizes.append(1)
            least = meaning
    return [size for size in sizes if size]


def semantic_entropy(meanings):
    """Entropy over clusters of meaning, in nats.

    >>> semantic_entropy(["A", "A", "B", "B"]) == math.log(2), semantic_entropy([None, None])
    (True, 0.0)
    """
    shares = [size / len(meanings) for size in cluster_sizes(meanings)]
    return sum(share * -math.log(share) for share in shares)


def probe_entropy(model, processor, pairs, args, device):
    """Yield {figure: number} of each question; the entropy counts for its type as well."""
    samples = [sample for sample, _ in pairs]
    for rows in chunks(range(len(pairs)), max(1, args.micro_batch // args.num_generations)):
        chains = sample_chains(model, processor, samples, rows, args, device)
        for row, chain in zip(rows, chains):
            sample, texts = samples[row], chain["completions"]
            meanings = [meaning(text, sample) for text in texts]
            entropy = semantic_entropy(meanings)
            yield {
                "entropy": entropy,
                "invalid": meanings.count(None) / len(meanings),
                "accuracy": float(np.mean(accuracy_reward(texts, sample))),
                sample.question_type: entropy,
            }


# ---------------------------------------------------------------------------------- results


def summary(rows, seed):
    """{figure: {"value", "low", "high"}}: means over questions with their 95% intervals."""
    numbers = defaultdict(list)
    for row in rows:
        for name, number in row.items():
            numbers[name].append(number)
    figures = {}
    for name in numbers:
        low, high = bootstrap_interval(numbers[name], seed)
        figures[name] = {"value": float(np.mean(numbers[name])), "low": low, "high": high}
    return figures


def figures_of(row):
    """The figures of one model in NAME.json."""
    return {name: figure for name, figure in row.items() if isinstance(figure, dict)}


def table(rows):
    """The rows of NAME.json as text: a line per figure with its interval, a column per model."""
    lines = [["", *[row["name"] for row in rows]]]
    for name in figures_of(rows[0]):
        cells = ["{value:.3f} [{low:.3f}, {high:.3f}]".format(**row[name]) for row in rows]
        lines.append([name, *cells])
    return text_table(lines)


def chart(what, rows):
    """The rows of NAME.json as one SVG."""
    charts = []
    for title, names in PANELS[what].items():
        places = []
        for row in rows:
            places += [(f"{row['name']}: {name}", *row[name].values(), None) for name in names]
        charts.append(dots(title, places))
    return join(charts)


# ---------------------------------------------------------------------------------- the command

PROBES = {"hints": probe_hints, "attention": probe_attention, "entropy": probe_entropy}


def questions_for(what, samples, args):
    """What a probe asks: [(question, its localization row)]; the same for one seed."""
    if what == "entropy":  # asks no second question
        parsed = CHOICE_TYPES + NUMBER_TYPES
        pairs = [(sample, None) for sample in samples if sample.question_type in parsed]
    else:
        pairs = spatial_pairs(samples)
    if not pairs:
        raise UserError(f"{args.data}: no rows for {what}; python -m look.probes --help says which")
    return list(zip(*subset(*zip(*pairs), args.limit or LIMITS[what], args.seed)))


def probe(what, models, samples, args):
    """Run one probe on all models and write its results."""
    pairs = questions_for(what, samples, args)
    folder = Path(args.out, what)  # of its pictures
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
    hold(folder)
    device = choose_device(args.device)
    rows = []
    for name, directory, style in models:
        args.prompt_style = "direct" if what == "attention" else style
        args.pictures = folder / name
        model = load_model(directory, compute_dtype(args.dtype, device), device)
        processor = Processor(directory, model.config, args)
        figures = summary(PROBES[what](model, processor, pairs, args, device), args.seed)
        rows.append({"name": name, "style": args.prompt_style, **figures})
    settings = {"data": str(args.data), "questions": len(pairs), **values(args, USED)}
    write_json(folder.with_suffix(".json"), {"settings": settings, "rows": rows})
    write_text(folder.with_suffix(".svg"), chart(what, rows))
    print(f"\n{what}: {len(pairs)} questions\n{table(rows)}", flush=True)


def read_ladder(run):
    """What a ladder was begun with. Rooms and trainings have a CONFIG too."""
    config = read_json(Path(run) / CONFIG)
    if "scenes" not in config:
        raise UserError(f"{run}: no ladder there, expected an --out of ladder.py")
    return config


def use_ladder(args):
    """Take from a ladder's folder what is not given: data, out, the length of answers.

    Returns: [(name, model directory, style)] of the rungs that are there.
    """
    ladder = read_ladder(args.run)
    args.data = args.data or ladder["test"] or args.run / "rooms/test"
    args.out = args.out or args.run / "probes"
    length = args.max_completion_length  # tiny rungs were trained for fewer tokens
    longest = RECIPES[ladder["preset"]]["grpo"].get("max_completion_length", length)
    args.max_completion_length = min(length, longest)
    models = [("base", ladder["model"] or Path(__file__).parents[1] / BASE, "direct")]
    for rung in RUNGS[1:]:
        directory = args.run / rung.name
        if (directory / "config.json").is_file():
            models.append((rung.name, directory, rung.style))
    return models


def main():
    parser = Parser(__doc__)
    parser.add_argument("what", choices=(*PROBES, "all"))
    models = parser.add_mutually_exclusive_group(required=True)
    models.add_argument("run", nargs="?", type=Path, help="folder of a ladder, such as runs/tiny")
    models.add_argument("--model", nargs="+", help="model directories, in place of a ladder")
    parser.add_argument("--data", help="folder like SpatialLadder-26k, or one jsonl file")
    parser.add_argument("--limit", type=int, help="questions (of each type, for entropy)")
    parser.checks["limit"] = positive
    names = (*USED, "out", "device", "micro_batch", "prompt_style")
    add_flags(parser, names, num_frames=32, micro_batch=32)
    parser.set_defaults(**JUDGED)
    args = parser.parse_args()
    chosen = PROBES if args.what == "all" else (args.what,)
    if "entropy" in chosen and args.num_generations < 2:
        parser.error("--num-generations is 1, expected at least 2: one answer has no entropy")
    if args.run:
        models = use_ladder(args)
    else:
        parser.need(args, "data", "out")
        names = [path.strip("/").replace("/", "_") for path in args.model]
        models = [(name, path, args.prompt_style) for name, path in zip(names, args.model)]
    samples = read_all(our_files(args.data), args.images)
    for what in chosen:
        probe(what, models, samples, args)


if __name__ == "__main__":
    main_guard(main)
