"""Rewards of completions: answer parsing, format, choices, mean relative accuracy, boxes. No torch, no files.

SpatialLadder (arXiv 2510.08531) trains with R = r_format + r_accuracy, two separate rewards of weight 1: a right
answer without the tags still earns r_accuracy, as in the authors' code. Check: python -m doctest rewards.py
"""

import json
import math
import re

import numpy as np

from files import UserError

CHOICE_TYPES = ("relative distance", "relative direction", "appearance order")
NUMBER_TYPES = ("object size", "room size", "object count", "absolute distance")
MRA_CONFIDENCES = np.linspace(0.5, 0.95, 10)  # theta of the paper

WELL_FORMED = re.compile(r"<think>(.*)</think>\s*<answer>(.*)</answer>", re.DOTALL)
TAG = re.compile(r"</?(?:think|answer)>")
ANSWER = re.compile(
    r"<answer>((?:(?!</?answer>).)*)</answer>", re.DOTALL
)  # innermost: no answer tag inside
CHOICE = re.compile(r"(?:\(([A-Za-z])\)|([A-Za-z])(?=[.):]|$))[.):]*(?:\s.*)?", re.DOTALL)
NUMBER = re.compile(
    r"([+-]?(?:[0-9]{1,3}(?:,[0-9]{3})+|[0-9]+|(?=\.[0-9]))(?:\.[0-9]*)?(?:[eE][+-]?[0-9]+)?)"
    r"\s*(?:(?:square |sq )?(?:m|cm|met(?:er|re)s?|centimet(?:er|re)s?)(?:2|\^2|²)?)?\.*"
)
FENCE = re.compile(r"```(?:json)?(.*?)```", re.DOTALL)


def extract_answer(text, default=None):
    """Return the stripped text of the last <answer>...</answer>, or `default` where there is none.

    >>> extract_answer("<answer>A</answer> or rather <answer> B </answer>")
    'B'
    """
    answers = ANSWER.findall(text)
    return answers[-1].strip() if answers else default


def parse_choice(text):
    """Return the capital option letter that `text` names, or None.

    taken as B:  B   b   B.   B:   B)   (B)   B. chair   B) chair   (B) chair
    refused:     B chair   B, C   BC   [B]   (B   chair   The answer is B
    The authors want the letter alone (either case, dots after it): no "(B)", no "B. chair".
    """
    match = CHOICE.fullmatch(text.strip())
    return (match[1] or match[2]).upper() if match else None


def parse_number(text):
    """Return the number that `text` is, as a float, or None.

    as written:  3.5   3.5.   .5   5.   +4   -4   1e1        without the commas:  1,200   1,200.5
    the unit dropped, never converted:  3.5 m   3.5m   85 cm   2 meters   20 m2   20 square meters
    refused:     four   about 4   4 chairs   3 to 4   1,20   3 feet   50%   nan   inf
    The authors call float(): no commas, no units, but 1_000 (and nan and inf, which then earn 0).
    """
    match = NUMBER.fullmatch(text.strip())
    return float(match[1].replace(",", "")) if match else None


def parse_boxes(text):
    """Return the boxes {"bbox_2d": [x1, y1, x2, y2], "label": str} of a localization answer, or None if it is invalid.

    Taken: JSON, a list or an object per line, keys in any order, in a ```json fence (text around it ignored) or none.

    >>> parse_boxes('```json\\n{"bbox_2d": [1, 2, 30, 40], "label": "bed"}\\n```')
    [{'bbox_2d': [1.0, 2.0, 30.0, 40.0], 'label': 'bed'}]
    """
    fenced = FENCE.search(text)
    body = (fenced[1] if fenced else text).strip().removesuffix(",")
    if body.startswith("{"):  # objects one after another: make them a list
        body = "[" + re.sub(r"}\s*{", "},{", body) + "]"
    try:  # parse_int=float: digits without end become inf, which is refused
        boxes = json.loads(body, parse_int=float)
    except (ValueError, RecursionError):
        return None
    valid = isinstance(boxes, list) and all(is_box(box) for box in boxes)
    return boxes if valid else None


def is_box(box):
    """Whether this is {"bbox_2d": four finite numbers, "label": text}. true and false are no numbers."""
    if not isinstance(box, dict) or not isinstance(box.get("label"), str):
        return False
    corners = box.get("bbox_2d")
    if not isinstance(corners, list) or len(corners) != 4:
        return False
    return all(type(corner) in (int, float) and abs(corner) < math.inf for corner in corners)


def mean_relative_accuracy(prediction, truth):
    """Share of the ten confidences theta with |prediction - truth| / truth <= 1 - theta, in float64.

    Source: VSI-Bench (Yang et al. 2024): < in its formula, <= in its code. Rounding decides on the boundary: keep the
    expression. Ours: truth 0 is met by 0 only, a negative divides by |truth|, a non-finite prediction earns 0.

    >>> [mean_relative_accuracy(p, t) for p, t in ((3, 4), (1.2, 1), (80, 100), (0, 0), (-4, -4))]
    [0.6, 0.7, 0.6, 1.0, 1.0]
    """
    if truth == 0 or not math.isfinite(prediction):
        return float(prediction == truth)
    return float(np.mean(abs(prediction - truth) / abs(truth) <= 1 - MRA_CONFIDENCES))


def box_iou(a, b):
    """Intersection over union of two boxes (x1, y1, x2, y2) in the same pixels; 0 for boxes without area.

    >>> box_iou((0, 0, 2, 2), (1, 0, 3, 2))  # 2 of 6
    0.3333333333333333
    """
    both = (max(a[0], b[0]), max(a[1], b[1]), min(a[2], b[2]), min(a[3], b[3]))
    area_a, area_b, shared = (
        max(0.0, x2 - x1) * max(0.0, y2 - y1) for x1, y1, x2, y2 in (a, b, both)
    )
    union = area_a + area_b - shared
    return shared / union if union > 0 else 0.0


def localization_scores(predicted, true, match_iou=0.5):
    """Compare predicted boxes (a list, or None for an invalid answer) with the true ones (at least one).

    "ious" holds, for each true object, the IoU of the best prediction of its label, 0 if there is none. Precision and
    recall count pairs of at least `match_iou`, each box used once, best pairs first: a duplicate costs precision.

    >>> bed, desk = ({"bbox_2d": [0, 0, 2, 2], "label": label} for label in ("bed", "desk"))
    >>> localization_scores([bed, bed], [bed, desk])
    {'ious': [1.0, 0.0], 'mean_iou': 0.5, 'precision': 0.5, 'recall': 0.5}
    """
    predicted = predicted or []
    pairs = [
        (box_iou(t["bbox_2d"], p["bbox_2d"]), i, j)
        for i, t in enumerate(true)
        for j, p in enumerate(predicted)
        if t["label"].strip().lower() == p["label"].strip().lower()
    ]
    ious = [
        max((iou for iou, i, _ in pairs if i == index), default=0.0) for index in range(len(true))
    ]
    matches = {}  # true index -> predicted index
    for iou, i, j in sorted(pairs, reverse=True):
        if iou >= match_iou and i not in matches and j not in matches.values():
            matches[i] = j
    return {
        "ious": ious,
        "mean_iou": sum(ious) / len(true),
        "precision": len(matches) / max(1, len(predicted)),
        "recall": len(matches) / len(true),
    }


def format_reward(completions, sample=None):
    """1 for exactly <think>...</think><answer>...</answer>, each tag once, both parts non-empty, else 0.

    The authors' regex (grpo_spld_stage3.py:181-246) also lets through a blank think or answer, a second </think> with
    more text before <answer>, and a second </answer>: it counts opening tags only.

    >>> format_reward(["<think>One.</think> <answer>1</answer>", "<think></think><answer>1</answer>"])
    [1.0, 0.0]
    """
    matches = [WELL_FORMED.fullmatch(text.strip()) for text in completions]
    return [
        float(
            match is not None
            and len(TAG.findall(match[0])) == 4
            and all(map(str.strip, match.groups()))
        )
        for match in matches
    ]


def box_iou_reward(completions, sample):
    """Mean IoU of a localization sample's true boxes, which the caller gives in pixels as the model sees them."""
    if sample.question_type != "localization":
        raise UserError(
            f"{sample.where}: no box_iou reward for question_type {sample.question_type!r}, expected boxes"
        )
    predictions = (parse_boxes(extract_answer(text, text)) for text in completions)
    return [localization_scores(boxes, sample.answer)["mean_iou"] for boxes in predictions]


def accuracy_reward(completions, sample):
    """Score each completion's answer by the sample's question type: letter equality, MRA, or mean box IoU.

    The answer is the last <answer>, or the whole text without one. UserError for an unknown type (the authors pay 0).
    """
    if sample.question_type == "localization":
        return box_iou_reward(completions, sample)
    parse, score = SCORES.get(sample.question_type.split(":")[0], (lambda text: None, None))
    truth = parse(sample.answer)
    if truth is None:
        raise UserError(
            f"{sample.where}: no accuracy reward for question_type {sample.question_type!r} with answer "
            f"{sample.answer!r}; expected localization, or a letter or number with {', '.join(SCORES)}"
        )
    answers = [parse(extract_answer(text, text)) for text in completions]
    return [0.0 if answer is None else float(score(answer, truth)) for answer in answers]


SCORES = (
    dict.fromkeys(CHOICE_TYPES, (parse_choice, str.__eq__))
    | dict.fromkeys(NUMBER_TYPES, (parse_number, mean_relative_accuracy))
    | {"chat": (str.strip, str.__eq__)}
)  # the last turn, word for word
# Every reward that --reward-funcs can name: (completions, sample) -> as many floats. A new one needs its line here.
REWARDS = {"format": format_reward, "accuracy": accuracy_reward, "box_iou": box_iou_reward}
