"""The paper's three analyses of what the ladder changes, on any checkpoints and data: hints, attention, entropy.

    python -m look.probes hints runs/tiny            # the rungs of a ladder, each asked in its own style about its test rooms
    python -m look.probes attention runs/tiny
    python -m look.probes entropy runs/tiny
    python -m look.probes all runs/tiny              # the three
    python -m look.probes hints --model DIR DIR --data SpatialLadder-26k --out DIR      # any checkpoints, data in that format

Each writes its table as NAME.json and a chart NAME.svg, the first two pictures NAME/*.png besides, to RUN/probes or --out.
A model whose weights and settings have not changed is not probed again. Intervals are 95% bootstraps over questions.
The paper gives numbers (PAPER) without code, and of the last two no definitions. These are ours:

hints      Questions of relative direction over one picture whose objects' boxes a localization row of the same picture
           and question text knows. Accuracy of greedy answers with no hint; with each object's box drawn, and named by
           its colour in the question (location); with the centres, a line between them and its direction in words
           besides (full). "location - none" and "full - none" are paired by question.
attention  The true answer is teacher-forced, asked for directly whatever the style of the rung. Softmax weights from the
           positions that predict its tokens (end of turn left out) to the picture's vision tokens, mean over layers,
           heads and positions, made to sum to 1: a map with a cell per vision token. iou: of the union of the true
           boxes with the most attended cells, as many as have the union's area, at least one. entropy: the map's,
           divided by ln(number of cells). "locating" is the same while the localization row is answered. To compare
           with: another question's map on these boxes, random cells, the best cells that there are.
entropy    K answers sampled to a question; those of one meaning are a cluster: the same letter, numbers within
           --tolerance of the cluster's least, and all answers that cannot be parsed together. entropy: -sum p ln p of
           the clusters' shares p, in nats, mean over questions. invalid: share of answers that cannot be parsed.
"""

import argparse
import dataclasses
import io
import itertools
import math
import os
from collections import defaultdict
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw

from ask import draw_boxes
from benchmarks import bootstrap_interval
from checkpoint import load_model
from data import Media, Processor, check_media, collate, cost, open_picture, read_all, style_of
from eval import answer_rows, model_hash, subset
from files import UserError, read_json, write_json, writing
from grpo import complete, noise
from ladder import BASE, GROUNDING, RECIPES, RUNGS, SPATIAL, WAYS
from look.charts import bars, save_chart
from model import KVCache
from rewards import CHOICE_TYPES, NUMBER_TYPES, SCORES, accuracy_reward, extract_answer
from runtime import Ranks, main_guard
from settings import PICTURES, Parser, add_flags

PAPER = {  # group -> figures, of arXiv 2510.08531
    "hints": {
        "Qwen2.5-VL-3B": {"none": 0.365, "location": 0.415, "full": 0.46},
        "SpatialLadder-3B": {"none": 0.82, "location": 0.825, "full": 0.835},
    },
    "attention": {
        "Qwen2.5-VL-3B": {"iou": 0.338, "entropy": 0.193},
        "SpatialLadder-3B": {"iou": 0.377, "entropy": 0.176},
    },
    "entropy": {
        "before": {"entropy": 1.24},
        "stages 1 and 2": {"entropy": 1.47},
        "stage 3": {"entropy": 0.66},
    },
}
CONDITIONS = ("none", "location", "full")
PANELS = {  # of a chart: title, figures drawn as bars, figures of the first model drawn as dashed lines
    "hints": [
        ("directions answered right, share", CONDITIONS, ("chance",)),
        ("answers without a letter, share", tuple(f"{name}: invalid" for name in CONDITIONS), ()),
    ],
    "attention": [
        (
            "IoU of attended cells and true boxes, answering (the paper's definition is not known)",
            ("iou", "another's map"),
            ("random cells", "best cells"),
        ),
        (
            "the same, locating",
            ("locating: iou", "locating: another's map"),
            ("random cells", "best cells"),
        ),
        (
            "entropy of the map / ln(cells) (the paper's definition is not known)",
            ("entropy", "locating: entropy"),
            (),
        ),
    ],
    "entropy": [
        ("semantic entropy, nats", ("entropy",), ()),
        ("answers that cannot be parsed, share", ("invalid",), ()),
    ],
}
LIMITS = {"hints": 200, "attention": 200, "entropy": 40}  # questions; of each type in entropy
COLOURS = {
    "red": (255, 0, 0),
    "blue": (0, 0, 255),
    "green": (0, 255, 0),
    "yellow": (255, 255, 0),
    "pink": (255, 0, 255),
    "turquoise": (0, 255, 255),
}
RANDOM_MAPS = 20  # drawn for each question
OVERLAYS, LARGE = 4, 448  # questions whose maps are painted; pixels of the longer side, at least


# ---------------------------------------------------------------------------------------------- shared


def spatial_pairs(samples):
    """(question of relative direction, localization row of the same picture and question text) wherever both are there."""
    boxes = {(s.media, s.question): s for s in samples if s.question_type == "localization"}
    pairs = [
        (s, boxes[s.media, s.question])
        for s in samples
        if s.question_type == "relative direction" and (s.media, s.question) in boxes
    ]
    return [
        (question, located) for question, located in pairs if len(located.answer) <= len(COLOURS)
    ]


def meaning(text, sample):
    """The letter or the number that a completion answers, or None."""
    return SCORES[sample.question_type][0](extract_answer(text, text))


def measured(values, seed):
    """The mean of some numbers with its 95% interval."""
    low, high = bootstrap_interval(values, seed)
    return {"value": float(np.mean(values)), "low": low, "high": high}


def save_png(picture, path):
    picture.save(f"{path}.tmp", "PNG")
    os.replace(f"{path}.tmp", path)


def batches(samples, size):
    """Places in `samples`, at most `size` together, rows of like cost beside one another."""
    order = sorted(range(len(samples)), key=lambda row: cost(samples[row]))
    return [order[i : i + size] for i in range(0, len(order), size)]


# ---------------------------------------------------------------------------------------------- hints


def direction(a, b):
    """Where the centre of box a lies from that of box b in the picture.

    >>> direction((0, 0, 2, 2), (4, 0, 6, 9)), direction((4, 0, 6, 2), (0, 0, 2, 2))
    ('left of and above', 'right of')
    """
    (xa, ya), (xb, yb) = centre(a), centre(b)
    across, down = (
        ("left of", "", "right of")[np.sign(xa - xb) + 1],
        ("above", "", "below")[np.sign(ya - yb) + 1],
    )
    return " and ".join(filter(None, (across, down))) or "at"


def centre(box):
    return round((box[0] + box[2]) / 2), round((box[1] + box[3]) / 2)


def hint_text(boxes, condition):
    """The words that go with what is drawn.

    >>> hint_text([{"bbox_2d": [0, 0, 2, 2], "label": "bin"}, {"bbox_2d": [4, 0, 6, 2], "label": "bed"}], "full")
    'The red box marks the bin, the blue box the bed. The centre of the red box is left of that of the blue box.'
    """
    marks = [
        f"the {colour} box {'' if i else 'marks '}the {box['label']}"
        for i, (colour, box) in enumerate(zip(COLOURS, boxes))
    ]
    sentences = [", ".join(marks)]
    if condition == "full":
        sentences += [
            f"the centre of the {a} box is {direction(one['bbox_2d'], other['bbox_2d'])} that of the {b} box"
            for (a, one), (b, other) in itertools.pairwise(zip(COLOURS, boxes))
        ]
    return " ".join(f"T{sentence[1:]}." for sentence in sentences)


def mark(picture, boxes, condition):
    """Draw on a picture, in place: each box in its colour; for "full" the centres and the lines from one to the next."""
    draw, line = ImageDraw.Draw(picture), 1 + max(picture.size) // 300
    for colour, box in zip(COLOURS.values(), boxes):
        x1, y1, x2, y2 = box["bbox_2d"]
        draw.rectangle((x1, y1, max(x1, x2 - 1), max(y1, y2 - 1)), outline=colour, width=line)
    if condition == "full":
        centres = [centre(box["bbox_2d"]) for box in boxes]
        draw.line(centres, fill="white", width=line)
        for colour, (x, y) in zip(COLOURS.values(), centres):
            draw.ellipse(
                (x - 2 * line, y - 2 * line, x + 2 * line, y + 2 * line),
                fill=colour,
                outline="white",
            )


def hinted(question, located, condition):
    """The question as it is asked under a condition."""
    if condition == "none":
        return question
    picture, text = open_picture(question.media[0].source), hint_text(located.answer, condition)
    mark(picture, located.answer, condition)
    png = io.BytesIO()
    picture.save(png, "PNG")
    return dataclasses.replace(
        question,
        question=f"{question.question} {text}",
        media=(Media("image", png.getvalue()),),
        prompt=question.prompt and f"{question.prompt} {text}",
    )


def probe_hints(model, processor, pairs, args, device):
    """Accuracy under each condition, and the share of answers without a letter."""
    right, invalid = (
        {condition: np.zeros(len(pairs)) for condition in CONDITIONS} for _ in range(2)
    )
    for condition in CONDITIONS:
        for rows in batches([question for question, _ in pairs], args.batch_size):
            asked = [hinted(*pairs[row], condition) for row in rows]
            for row, answer in zip(
                rows, answer_rows(model, processor, asked, range(len(asked)), args, device)
            ):
                right[condition][row] = accuracy_reward([answer["completion"]], pairs[row][0])[0]
                invalid[condition][row] = meaning(answer["completion"], pairs[row][0]) is None
    figures = right | {f"{name} - none": right[name] - right["none"] for name in CONDITIONS[1:]}
    figures |= {f"{name}: invalid": invalid[name] for name in CONDITIONS}
    figures["chance"] = [1 / len(question.options) for question, _ in pairs]
    return {name: measured(values, args.seed) for name, values in figures.items()}


# ---------------------------------------------------------------------------------------------- attention


def attention_weights(q, k, at):
    """Softmax weights of some queries over all keys up to their own.

    Args:    q (B, H, T, D), k (B, K, T, D). at: (R,) places in the flattened (B, T), in order.
    Returns: (R, H, T) fp32.
    """
    _, H, T, D = q.shape
    weights = []
    for row in range(len(q)):
        places = at[at // T == row] % T  # (r,)
        keys = k[row].float().repeat_interleave(H // k.shape[1], dim=0)  # (H, T, D)
        scores = q[row][:, places].float() @ keys.mT / math.sqrt(D)  # (H, r, T)
        later = torch.arange(T, device=at.device) > places[:, None]  # (r, T)
        weights.append(scores.masked_fill(later, -math.inf).softmax(-1).transpose(0, 1))
    return torch.cat(weights)


class WatchedCache(KVCache):
    """A prefill as the model makes it, which beside it keeps the weights of the queries `at`: (R, T) a layer."""

    def __init__(self, lengths, at, layers, heads):
        super().__init__(lengths)
        self.at, self.layers, self.heads, self.weights = at, layers, heads, []

    def attend(self, layer, q, k, v):
        if layer in self.layers:
            self.weights.append(attention_weights(q, k, self.at)[:, self.heads].mean(1))
        return super().attend(layer, q, k, v)


@torch.no_grad()
def attention_maps(model, processor, samples, args, device):
    """A map (h, w) for each sample, which sums to 1: row by row the merged vision tokens of its one picture."""
    merge, L, H = (
        model.config.vision.spatial_merge_size,
        model.config.text.num_hidden_layers,
        model.config.text.num_attention_heads,
    )
    layers, heads = args.layers or [*range(L - -(-L // 3), L)], args.heads or [*range(H)]
    for flag, numbers, count in (("--layers", layers, L), ("--heads", heads, H)):
        if max(numbers) >= count:
            raise UserError(f"{flag} is {max(numbers)}, expected 0 to {count - 1}")
    examples = [processor.example(sample, style_of(sample, "direct")) for sample in samples]
    batch = collate(examples, model.config).to(device)
    at, T = batch.predict_at[batch.targets != processor.special["<|im_end|>"]], batch.ids.shape[1]
    cache = WatchedCache(batch.lengths, at, layers, heads)
    model(batch, cache)
    weights, maps = torch.stack(cache.weights).mean(0), []  # (R, T)
    for row, example in enumerate(examples):
        columns = batch.vision_at[batch.vision_at // T == row] % T
        heat = weights[at // T == row][:, columns].sum(0)  # (cells,)
        _, h, w = example.grids[0]
        maps.append((heat / heat.sum()).view(h // merge, w // merge).cpu().numpy())
    return maps


def in_pixels(cells, shape):
    """Cells (h, w) spread over a picture of shape (height, width) in pixels: the resize backwards."""
    rows, columns = (np.arange(side) * n // side for side, n in zip(shape, cells.shape))
    return cells[rows][:, columns]


def box_mask(boxes, size):
    """The union of the boxes in a picture of size (width, height): (height, width) bool."""
    mask = np.zeros(size[::-1], bool)
    for box in boxes:
        x1, y1, x2, y2 = map(round, box["bbox_2d"])
        mask[y1:y2, x1:x2] = True
    return mask


def attended_iou(heat, truth):
    """IoU of a region with the most attended cells, as many as have its area, at least one.

    Args:    heat (h, w). truth: (height, width) bool, pixels.

    >>> attended_iou(np.array([[0.7, 0.1], [0.1, 0.1]]), box_mask([{"bbox_2d": [0, 0, 10, 20]}], (20, 20)))  # 2 cells of 3
    0.3333333333333333
    """
    cells = np.zeros(heat.shape, bool)
    cells.flat[
        np.argsort(-heat, axis=None, kind="stable")[: max(1, round(heat.size * truth.mean()))]
    ] = True
    seen = in_pixels(cells, truth.shape)
    return float((seen & truth).sum() / (seen | truth).sum())


def map_entropy(heat):
    """Entropy of a map that sums to 1, as a share of the most that it could be.

    >>> map_entropy(np.array([[0.25, 0.25], [0.25, 0.25]])), map_entropy(np.array([[0.0, 1.0]]))
    (1.0, 0.0)
    """
    p = heat[heat > 0]
    return float((p * -np.log(p)).sum() / math.log(max(2, heat.size)))


def overlay(picture, heat, boxes):
    """The map in yellow, from its least to its most, over a grey picture large enough to look at; the true boxes in red."""
    scale = -(-LARGE // max(picture.size))
    grey = picture.convert("L").resize([side * scale for side in picture.size]).convert("RGB")
    heat = in_pixels((heat - heat.min()) / max(np.ptp(heat), 1e-9), grey.size[::-1])
    grey.paste((255, 225, 40), mask=Image.fromarray(np.uint8(170 * heat)))
    draw_boxes(grey, boxes, (1 / scale, 1 / scale))
    return grey


def probe_attention(model, processor, pairs, args, device):
    """IoU and entropy of the maps; those of OVERLAYS questions are painted."""
    figures, rng, maps = defaultdict(list), np.random.default_rng(args.seed), {}
    for kind, asked in zip(("", "locating: "), zip(*pairs)):
        maps[kind] = [None] * len(pairs)
        for rows in batches(asked, args.batch_size):
            for row, heat in zip(
                rows, attention_maps(model, processor, [asked[row] for row in rows], args, device)
            ):
                maps[kind][row] = heat
    media = [question.media for question, _ in pairs]
    others = [
        next(
            (
                j % len(pairs)
                for j in range(i + 1, i + len(pairs))
                if media[j % len(pairs)] != media[i]
            ),
            None,
        )
        for i in range(len(pairs))
    ]  # for each question the next one that asks about another picture
    if None in others:
        raise UserError(
            f"{args.data}: all {len(pairs)} questions are about one picture; attention is compared between two"
        )
    for row, (question, located) in enumerate(pairs):
        picture = open_picture(question.media[0].source)
        truth = box_mask(located.answer, picture.size)
        for kind, found in maps.items():
            own, another = attended_iou(found[row], truth), attended_iou(found[others[row]], truth)
            for name, value in (
                ("iou", own),
                ("another's map", another),
                ("iou - another's", own - another),
                ("entropy", map_entropy(found[row])),
            ):
                figures[kind + name].append(value)
            if row < OVERLAYS:
                name = f"{args.name}-{row + 1}{'-locating' if kind else ''}.png"
                save_png(overlay(picture, found[row], located.answer), args.pictures / name)
        shape = maps[""][row].shape
        cell_of = in_pixels(
            np.arange(math.prod(shape)).reshape(shape), truth.shape
        )  # of every pixel
        covered = np.bincount(cell_of.ravel(), truth.ravel(), math.prod(shape)).reshape(shape)
        figures["random cells"].append(
            np.mean([attended_iou(rng.random(shape), truth) for _ in range(RANDOM_MAPS)])
        )
        figures["best cells"].append(attended_iou(covered, truth))
    return {name: measured(values, args.seed) for name, values in figures.items()}


# ---------------------------------------------------------------------------------------------- semantic entropy


def cluster_sizes(meanings, tolerance):
    """How many answers mean the same: letters, or numbers within a tolerance of the cluster's least; None together.

    >>> cluster_sizes(["B", "A", "B", None, None], 0.1), cluster_sizes([121.0, 100.0, 110.0], 0.1)
    ([2, 1, 2], [2, 1])
    """
    valid = sorted(meaning for meaning in meanings if meaning is not None)
    sizes, least = [len(meanings) - len(valid)] if len(valid) < len(meanings) else [], None
    for meaning in valid:
        if meaning == least or (
            isinstance(least, float) and meaning - least <= tolerance * abs(least)
        ):
            sizes[-1] += 1
        else:
            sizes, least = [*sizes, 1], meaning
    return sizes


def semantic_entropy(meanings, tolerance):
    """Entropy over clusters of meaning, in nats.

    >>> semantic_entropy(["A", "A", "B", "B"], 0.1) == math.log(2), semantic_entropy([None, None], 0.1)
    (True, 0.0)
    """
    shares = [size / len(meanings) for size in cluster_sizes(meanings, tolerance)]
    return sum(share * -math.log(share) for share in shares)


def probe_entropy(model, processor, samples, args, device):
    """Semantic entropy of K sampled answers, over all questions and by their types."""
    K, C = args.num_generations, args.max_completion_length
    entropies, invalid = np.zeros(len(samples)), np.zeros(len(samples))
    for rows in batches(samples, max(1, args.batch_size // K)):
        uniforms = torch.cat([noise(args.seed, 0, row, K, C) for row in rows]).to(device)
        for row, group in zip(
            rows, complete(model, processor, samples, rows, K, uniforms, args, device)
        ):
            meanings = [meaning(text, group.sample) for text in group.texts]
            entropies[row], invalid[row] = (
                semantic_entropy(meanings, args.tolerance),
                meanings.count(None) / K,
            )
    kinds = np.array([s.question_type for s in samples])
    return {
        "entropy": measured(entropies, args.seed),
        "invalid": measured(invalid, args.seed),
        "types": {
            kind: measured(entropies[kinds == kind], args.seed)
            for kind in sorted({*kinds.tolist()})
        },
    }


# ---------------------------------------------------------------------------------------------- results


def figures_of(row):
    """{name: {"value", "low", "high"}} of one model, those of question types last."""
    return {
        name: figure
        for name, figure in (row | row.get("types", {})).items()
        if isinstance(figure, dict) and "value" in figure
    }


def table(result):
    """A line per figure, a column per model with intervals, then the paper's."""
    models = [figures_of(row) for row in result["rows"]]
    lines = [
        [
            "",
            *(row["name"] for row in result["rows"]),
            *(f"paper: {group}" for group in result["paper"]),
        ]
    ]
    for name in models[0]:
        lines.append(
            [
                name,
                *("{value:.3f} [{low:.3f}, {high:.3f}]".format(**row[name]) for row in models),
                *(
                    f"{figures[name]:.3f}" if name in figures else ""
                    for figures in result["paper"].values()
                ),
            ]
        )
    widths = [max(map(len, column)) for column in zip(*lines)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths)).rstrip() for line in lines
    )


def rungs(run):
    """-> [(name, model directory, style)] of a ladder's finished rungs, its test data, its preset."""
    if not (run / "ladder.json").is_file():
        raise UserError(f"{run}: no ladder there; climb one with: python ladder.py --out {run}")
    ladder = read_json(run / "ladder.json")
    base = Path(ladder["model"] or Path(__file__).parent / BASE)
    models = [
        (rung.name, run / rung.name if rung.start else base, rung.style)
        for rung in RUNGS + WAYS["self"]
        if not rung.start or (run / rung.name / "config.json").is_file()
    ]
    return (
        models,
        ladder["test"] or (ladder["preset"] == "tiny" and run / "rooms" / "test"),
        ladder["preset"],
    )


def questions_for(what, samples, args):
    """What a probe asks: samples, or pairs of them, the same for the same seed."""
    limit = args.limit or LIMITS[what]
    if what == "entropy":
        answerable = [s for s in samples if s.question_type in CHOICE_TYPES + NUMBER_TYPES]
        questions, _ = subset(answerable, answerable, limit, args.seed)
    else:
        pairs = spatial_pairs(samples)
        questions = [
            *zip(
                *subset(
                    [question for question, _ in pairs],
                    [located for _, located in pairs],
                    limit,
                    args.seed,
                )
            )
        ]
        for _, located in questions:
            check_media(located)
    if not questions:
        raise UserError(
            f"{args.data}: nothing to ask for {what}; expected "
            + (
                "questions with a letter or a number for answer"
                if what == "entropy"
                else "a question of relative direction "
                "over one picture and a localization row of the same picture and question"
            )
        )
    return questions


def probe(what, models, questions, args, device):
    """One probe of all models: written after each, its chart in the end."""
    out, measure = (
        Path(args.out),
        {"hints": probe_hints, "attention": probe_attention, "entropy": probe_entropy}[what],
    )
    used = [
        "images",
        "dtype",
        *PICTURES,
        "seed",
        *(("layers", "heads") if what == "attention" else ("max_completion_length",)),
    ]
    used += ["num_generations", "temperature", "tolerance"] if what == "entropy" else []
    asked = {"data": str(args.data), "questions": len(questions)} | {
        key: vars(args)[key] for key in used
    }
    result, done = {"what": what, "settings": asked, "rows": [], "paper": PAPER[what]}, []
    if (out / f"{what}.json").is_file() and (before := read_json(out / f"{what}.json")).get(
        "settings"
    ) == asked:
        done = before["rows"]
    args.pictures = out / what
    (out if what == "entropy" else args.pictures).mkdir(parents=True, exist_ok=True)
    for name, directory, style in models:
        args.name, args.prompt_style = name, "direct" if what == "attention" else style
        row = {"name": name, "style": args.prompt_style, "model": model_hash(directory)}
        found = [old for old in done if row.items() <= old.items()]
        if not found:
            dtype = args.dtype or ("bfloat16" if device.type == "cuda" else "float32")
            model = load_model(directory, getattr(torch, dtype), device)
            found = [
                row
                | measure(model, Processor(directory, model.config, args), questions, args, device)
            ]
        result["rows"] += found
        write_json(
            out / f"{what}.json",
            result | {"rows": result["rows"] + [old for old in done if old not in result["rows"]]},
        )
    write_json(out / f"{what}.json", result)
    for condition in CONDITIONS if what == "hints" else ():
        save_png(
            open_picture(hinted(*questions[0], condition).media[0].source),
            args.pictures / f"{condition}.png",
        )
    save_chart(bars(result["rows"], result["paper"], PANELS[what]), out / f"{what}.svg")
    print(f"\n{what}: {len(questions)} questions\n{table(result)}", flush=True)


def settings():
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=(*PANELS, "all"))
    parser.add_argument(
        "run", nargs="?", type=Path, help="directory of a ladder, such as runs/tiny"
    )
    parser.add_argument("--model", nargs="+", help="model directories, in place of a ladder")
    parser.add_argument(
        "--data",
        type=Path,
        help="folder of spld_grounding_data.jsonl and spld_spatial_data.jsonl, or one "
        "jsonl file with rows of both kinds (default: the ladder's test rooms)",
    )
    parser.add_argument(
        "--prompt-style",
        choices=("direct", "thinking"),
        help="how questions are asked (default: as the rung was trained; with --model thinking)",
    )
    add_flags(
        parser,
        (
            "images",
            "out",
            "device",
            "dtype",
            *PICTURES,
            "num_generations",
            "max_completion_length",
            "temperature",
            "seed",
        ),
    )
    parser.add_argument(
        "--limit",
        type=int,
        help="questions, drawn by --seed, in entropy of each type (default: "
        + ", ".join(f"{what} {limit}" for what, limit in LIMITS.items())
        + ")",
    )
    parser.add_argument("--batch-size", type=int, default=32, help="answers made at once")
    parser.add_argument(
        "--layers", type=int, nargs="+", help="of attention, from 0 (default: the last third)"
    )
    parser.add_argument("--heads", type=int, nargs="+", help="of attention, from 0 (default: all)")
    parser.add_argument(
        "--tolerance",
        type=float,
        default=0.1,
        help="numbers that differ by so little mean the same",
    )
    parser.set_defaults(
        num_frames=32, video_seconds="grid", num_generations=8, temperature=1.0, seed=0
    )
    args = parser.parse_args()
    refuse_bad_values(parser, args)
    if (args.run is None) == (args.model is None):
        parser.error("expected either the directory of a ladder or --model")
    for name in ("data", "out"):
        if args.model and getattr(args, name) is None:
            parser.error(f"--model needs --{name}")
    if args.num_generations < 2:
        parser.error(f"--num-generations is {args.num_generations}, expected at least 2")
    return args


def main():
    args = settings()
    if args.run:
        models, data, preset = rungs(args.run)
        if not (args.data or data):
            raise UserError(
                f"{args.run}: was climbed without --test; give --data, what to ask about"
            )
        args.data, args.out = args.data or Path(data), args.out or args.run / "probes"
    else:
        unique = len({Path(model).name for model in args.model}) == len(args.model)
        models = [
            (Path(m).name if unique else m.strip("/").replace("/", "_"), Path(m), "thinking")
            for m in args.model
        ]
        preset = "paper"
    models = [(name, directory, args.prompt_style or style) for name, directory, style in models]
    args.max_completion_length = (
        args.max_completion_length or RECIPES[preset]["grpo"]["max_completion_length"]
    )
    files = (
        [args.data / file for file in (GROUNDING, SPATIAL)] if args.data.is_dir() else [args.data]
    )
    samples = read_all(files, args.images)
    asked = {
        what: questions_for(what, samples, args)
        for what in (PANELS if args.what == "all" else (args.what,))
    }
    ranks = Ranks(args.device)
    if ranks.world > 1:
        raise UserError("probes.py runs in one process: python -m look.probes, not torchrun")
    with writing(args.out, "results"):
        for what, questions in asked.items():
            probe(what, models, questions, args, ranks.device)
    ranks.close()


if __name__ == "__main__":
    main_guard(main)
