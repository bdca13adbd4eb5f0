"""Rewards of completions: answer parsing, format, choices, numbers, boxes. No torch.

SpatialLadder (arXiv 2510.08531) trains with R = r_format + r_accuracy, two separate rewards of
weight 1: a right answer without the tags still earns r_accuracy, as in the authors' code.

    accuracy_reward(["<think>Two.</think><answer>2</answer>"], sample)  # [1.0]: one a completion

Evaluation scores with the same functions. Check the examples: python -m doctest rewards.py
"""

import json
import math
import re

import numpy as np

from files import UserError

CHOICE_TYPES = ("relative distance", "relative direction", "appearance order")
NUMBER_TYPES = ("object size", "room size", "object count", "absolute distance")

# theta of the paper. 0.9 is written as numpy.linspace(0.5, 0.95, 10) rounds it, which is what the
# authors compare with: 1.1 for 1 still passes at this one.
MRA_CONFIDENCES = np.array(
    [0.50, 0.55, 0.60, 0.65, 0.70, 0.75, 0.80, 0.85, 0.8999999999999999, 0.95]
)

WELL_FORMED = re.compile(r"<think>(.*)</think>\s*<answer>(.*)</answer>", re.DOTALL)
TAG = re.compile(r"</?(?:think|answer)>")
# The innermost: there is no answer tag inside.
ANSWER = re.compile(r"<answer>((?:(?!</?answer>).)*)</answer>", re.DOTALL)
# A letter in brackets, or one with a dot, bracket or colon behind it; then any text after a space.
CHOICE = re.compile(r"(?:\(([A-Za-z])\)|([A-Za-z])(?=[.):]|$))[.):]*(?:\s.*)?", re.DOTALL)
# A number (commas only between groups of three digits), then a unit of length or area, then dots.
NUMBER = re.compile(
    r"([+-]?(?:[0-9]{1,3}(?:,[0-9]{3})+|[0-9]+|(?=\.[0-9]))(?:\.[0-9]*)?(?:[eE][+-]?[0-9]+)?)"
    r"\s*(?i:(?:square |sq )?(?:m|cm|met(?:er|re)s?|centimet(?:er|re)s?)(?:2|\^2|²)?)?\.*"
)
FENCE = re.compile(r"```(?:json)?(.*?)```", re.DOTALL)


# ---------------------------------------------------------------------------------- answers


def extract_answer(text, default=None):
    """The stripped text of the last <answer>...</answer>, or `default` where there is none.

    >>> extract_answer("<answer>A</answer> or rather <answer> B </answer>")
    'B'
    """
    # The last one: a model may try several answers before it settles on one.
    answers = ANSWER.findall(text)
    return answers[-1].strip() if answers else default


def parse_choice(text):
    """The capital option letter that `text` names, or None.

    taken as B:  B   b   B.   B:   B)   (B)   B. chair   B) chair   (B) chair
    refused:     B chair   B, C   BC   [B]   (B   chair   The answer is B
    The authors want the letter alone (either case, dots after it): no "(B)", no "B. chair".
    """
    match = CHOICE.fullmatch(text.strip())
    if match is None:
        return None
    letter = match[1] or match[2]  # in brackets, or without
    return letter.upper()


def parse_number(text):
    """The number that `text` is, as a float, or None.

    as written:  3.5   3.5.   .5   5.   +4   -4   1e1        without the commas:  1,200   1,200.5
    the unit dropped, never converted:  3.5 m   3.5m   85 cm   2 meters   20 m2   20 square meters
    its letters of either case:  120 CM   2.5 Meters   20 Square Metres
    refused:     four   about 4   4 chairs   3 to 4   1,20   3 feet   50%   nan   inf
    The authors call float(): no commas, no units, but 1_000 (and nan and inf, which then earn 0).
    """
    match = NUMBER.fullmatch(text.strip())
    if match is None:
        return None
    return float(match[1].replace(",", ""))  # without the unit


def parse_boxes(text):
    """The boxes of a localization answer, or None if it is not valid.

    Taken: JSON, a list or an object per line, keys in any order, in a ```json fence (text around it
    is ignored) or none.

    >>> parse_boxes('```json\\n{"bbox_2d": [1, 2, 30, 40], "label": "bed"}\\n```')
    [{'bbox_2d': [1.0, 2.0, 30.0, 40.0], 'label': 'bed'}]
    """
    fenced = FENCE.search(text)
    if fenced:
        text = fenced[1]
    text = text.strip().removesuffix(",")
    if text.startswith("{"):  # objects one after another: make them a list
        text = "[" + re.sub(r"}\s*{", "},{", text) + "]"
    # parse_int=float: an integer of thousands of digits becomes inf, which is_box refuses.
    # RecursionError: thousands of brackets, which a model that repeats itself does write.
    try:
        boxes = json.loads(text, parse_int=float)
    except (ValueError, RecursionError):
        return None
    if isinstance(boxes, list) and all(is_box(box) for box in boxes):
        return boxes
    return None


def is_box(box):
    """Whether this is {"bbox_2d": four finite numbers, "label": text}; JSON's true is no number."""
    if not isinstance(box, dict) or not isinstance(box.get("label"), str):
        return False
    corners = box.get("bbox_2d")
    if not isinstance(corners, list) or len(corners) != 4:
        return False
    return all(type(corner) in (int, float) and abs(corner) < math.inf for corner in corners)


# ---------------------------------------------------------------------------------- scores


def mean_relative_accuracy(prediction, truth):
    """Share of the ten confidences theta with |prediction - truth| / truth <= 1 - theta.

    Source: VSI-Bench (Yang et al. 2024): < in its formula, <= in its code. Rounding decides on the
    boundary: do not rearrange the expression, in float64. Ours: a truth of 0 is met by 0 only, a
    negative one divides by |truth|, a prediction that is not finite earns 0.

    >>> [mean_relative_accuracy(p, t) for p, t in ((3, 4), (1.2, 1), (80, 100), (0, 0), (-4, -4))]
    [0.6, 0.7, 0.6, 1.0, 1.0]
    """
    if truth == 0 or not math.isfinite(prediction):
        return float(prediction == truth)
    return float(np.mean(abs(prediction - truth) / abs(truth) <= 1 - MRA_CONFIDENCES))


def box_iou(a, b):
    """Intersection over union of two boxes (x1, y1, x2, y2); 0 for boxes without area.

    >>> box_iou((0, 0, 2, 2), (1, 0, 3, 2))  # 2 of 6
    0.3333333333333333
    """
    shared = box_area(max(a[0], b[0]), max(a[1], b[1]), min(a[2], b[2]), min(a[3], b[3]))
    union = box_area(*a) + box_area(*b) - shared
    if union > 0:
        return shared / union
    return 0.0  # no area, or inf - inf = nan for absurd corners


def box_area(x1, y1, x2, y2):
    return max(0.0, x2 - x1) * max(0.0, y2 - y1)


def localization_scores(predicted, true):
    """Compare predicted boxes (None for an answer that is not valid) with one or more true ones.

    "ious" holds, for each true object, the IoU of the best prediction of its label, 0 if there is
    none. Precision and recall count pairs of an IoU of at least 0.5, each box used once, best pairs
    first: a duplicate costs precision.

    >>> bed, desk = ({"bbox_2d": [0, 0, 2, 2], "label": label} for label in ("bed", "desk"))
    >>> localization_scores([bed, bed], [bed, desk])
    {'ious': [1.0, 0.0], 'mean_iou': 0.5, 'precision': 0.5, 'recall': 0.5}
    """
    predicted = predicted or []
    ious = [0.0] * len(true)
    pairs = []  # (IoU, index of the true box, index of the predicted box), of one label
    for i, t in enumerate(true):
        for j, p in enumerate(predicted):
            if t["label"].strip().lower() == p["label"].strip().lower():
                iou = box_iou(t["bbox_2d"], p["bbox_2d"])
                ious[i] = max(ious[i], iou)
                pairs.append((iou, i, j))
    # Greedy: the best pair first, then the best of those whose boxes are both free.
    matches = {}  # true index -> predicted index
    for iou, i, j in sorted(pairs, reverse=True):
        if iou >= 0.5 and i not in matches and j not in matches.values():
            matches[i] = j
    return {
        "ious": ious,
        "mean_iou": sum(ious) / len(true),
        "precision": len(matches) / max(1, len(predicted)),
        "recall": len(matches) / len(true),
    }


# ---------------------------------------------------------------------------------- rewards
# A reward takes all completions of a group and their sample, and returns a number for each of them.


def format_reward(completions, sample=None):
    """1 for exactly <think>...</think><answer>...</answer>, each tag once, no part empty, else 0.

    The authors' regex (grpo_spld_stage3.py:181-246) also lets through a blank think or answer, a
    second </think> with more text before <answer>, and a second </answer>: it counts opening tags
    only.

    >>> format_reward(["<think>I</think> <answer>1</answer>", "<think></think><answer>1</answer>"])
    [1.0, 0.0]
    """
    return [float(is_well_formed(text.strip())) for text in completions]


def is_well_formed(text):
    match = WELL_FORMED.fullmatch(text)
    # The pattern lets tags stand inside the two parts: four tags are all that there may be.
    if match is None or len(TAG.findall(text)) != 4:
        return False
    return all(part.strip() for part in match.groups())


# question_type -> how an answer is parsed, and how it is compared with the truth. The last turn of
# a chat has to be met word for word.
SCORES = {
    **dict.fromkeys(CHOICE_TYPES, (parse_choice, str.__eq__)),
    **dict.fromkeys(NUMBER_TYPES, (parse_number, mean_relative_accuracy)),
    "chat": (str.strip, str.__eq__),
}


def how_to_score(sample):
    """(parse, score, truth) of a row; UserError for a type or an answer that cannot be scored."""
    kind = sample.question_type.partition(":")[0]  # "chat: ..." is a chat
    truth = None
    if kind in SCORES:
        parse, score = SCORES[kind]
        truth = parse(sample.answer)
    if truth is None:
        raise UserError(
            f"{sample.where}: no accuracy reward for question_type {sample.question_type!r} with "
            f"answer {sample.answer!r}; expected localization, or a letter or number with "
            f"{', '.join(SCORES)}"
        )
    return parse, score, truth


def accuracy_reward(completions, sample):
    """Score each completion's answer by the question type: letter, mean relative accuracy, IoU.

    The answer is the last <answer>, or the whole text without one. UserError for a type that is not
    known (the authors pay 0).
    """
    answers = [extract_answer(text, text) for text in completions]
    if sample.question_type == "localization":  # the caller gives boxes in the model's pixels
        boxes = [parse_boxes(answer) for answer in answers]
        return [localization_scores(some, sample.answer)["mean_iou"] for some in boxes]
    # What cannot be parsed earns 0: the model is to learn the form of an answer too.
    parse, score, truth = how_to_score(sample)
    parsed = [parse(answer) for answer in answers]
    return [0.0 if answer is None else float(score(answer, truth)) for answer in parsed]


# Every reward that --reward-funcs can name. A new one needs its line here.
REWARDS = {"format": format_reward, "accuracy": accuracy_reward}


def check_row(name, sample):
    """Raise UserError if accuracy_reward cannot score this row; no other reward is asked."""
    if REWARDS[name] is accuracy_reward and sample.question_type != "localization":
        how_to_score(sample)


def call_reward(name, completions, sample):
    """What the reward of this name gives each completion of a group: a list of floats.

    Raises:  UserError with row and reward, unless it returns one finite number for each completion.

    >>> call_reward("format", ["<think>I</think><answer>1</answer>", "1"], None)
    [1.0, 0.0]
    """
    # A copy of the list: a reward of one's own may sort it.
    scores = REWARDS[name](list(completions), sample)
    if hasattr(scores, "tolist"):  # an array or a tensor
        scores = scores.tolist()
    # A wrong count would give one completion the reward of another without a word.
    problem = None
    if not isinstance(scores, list | tuple):
        problem = type(scores).__name__
    elif len(scores) != len(completions):
        problem = f"a list of {len(scores)}"
    else:
        scores = [score.item() if hasattr(score, "item") else score for score in scores]
        for score in scores:
            if not isinstance(score, int | float) or not math.isfinite(score):
                problem = f"{str(score)[:80]} ({type(score).__name__}) for a completion"
    if problem:
        raise UserError(
            f"{sample.where}: reward {name!r} returned {problem}, expected a list of "
            f"{len(completions)} finite numbers, one for each completion"
        )
    return [float(score) for score in scores]
