"""Signs of trouble in a run of the ladder, for the report.

A sign is (trouble, sentence). Trouble is True, False, or None where there is too little to judge.
"""

from itertools import pairwise

import numpy as np

from files import read_json

INVALID = 0.01  # share of answers that may be no JSON, and of boxes that may leave the picture
MEMORIZED = 0.1  # training questions may score so much better than held-out ones


def outside(box, size):
    """Whether a box has no area or reaches out of a picture of this size.

    >>> outside([0, 0, 112, 50], [112, 112]), outside([0, 0, 113, 50], [112, 112])
    (False, True)
    >>> outside([9, 0, 9, 50], [112, 112])
    True
    """
    x1, y1, x2, y2 = box
    return not (0 <= x1 < x2 <= size[0] and 0 <= y1 < y2 <= size[1])


def boxes_sign(rows):
    """Localization rows of predictions.jsonl: answers that are no JSON, boxes that cannot be."""
    invalid = np.mean([row["prediction"] is None for row in rows])
    wrong = [0.0]
    for row in rows:
        wrong += [outside(box["bbox_2d"], row["size"]) for box in row["prediction"] or ()]
    out = sum(wrong) / max(1, len(wrong) - 1)
    return max(invalid, out) > INVALID, (
        f"{1 - invalid:.1%} of its localization answers are valid JSON, "
        f"{out:.1%} of their boxes empty or partly outside the picture"
    )


def memory_sign(train, held_out):
    """scores.json of training and of held-out questions: knows the first, is blind to the second.

    >>> score = {"overall": 0.5, "low": 0.4, "blind": 0.45}
    >>> memory_sign({"overall": 0.7}, score)[0], memory_sign({"overall": 0.55}, score)[0]
    (True, False)
    """
    far = train["overall"] - held_out["overall"] > MEMORIZED
    return far and held_out["low"] <= held_out["blind"], (
        f"training questions score {train['overall']:.3f}, held-out ones {held_out['overall']:.3f} "
        f"(at least {held_out['low']:.3f}; blind {held_out['blind']:.3f})"
    )


def reward_sign(rows):
    """log.jsonl of GRPO: the reward rises beyond its noise, the held-out accuracy does not.

    The first fifth of the steps against the last; noise is two standard errors of the difference
    of their means.
    """
    rewards = [row["reward"] for row in rows]
    fifth = len(rows) // 5
    key = "eval_rewards/accuracy/mean"
    held_out = [row[key] for row in rows if key in row]
    if fifth < 2 or len(held_out) < 2:
        return None, (
            f"{len(rows)} steps of GRPO with {len(held_out)} evaluations on held-out questions "
            "are too few to judge"
        )
    first, last = rewards[:fifth], rewards[-fifth:]
    noise = 2 * np.sqrt((np.var(first, ddof=1) + np.var(last, ddof=1)) / fifth)
    rises = np.mean(last) - np.mean(first) > noise
    return rises and held_out[-1] <= held_out[0], (
        f"reward {np.mean(first):.3f} -> {np.mean(last):.3f} (noise {noise:.3f}), "
        f"held-out accuracy {held_out[0]:.3f} -> {held_out[-1]:.3f}"
    )


def attention_sign(before, after):
    """Two rungs of look.probes attention: the entropy of the map has surely risen.

    >>> attention_sign({"value": 0.8, "high": 0.85}, {"value": 0.9, "low": 0.88})
    (True, 'entropy of the attention map 0.800 -> 0.900')
    """
    return after["low"] > before["high"], (
        f"entropy of the attention map {before['value']:.3f} -> {after['value']:.3f}"
    )


def signs(run, answers, logs):
    """Yield (rung, sign) of all that a run has so far.

    Args: answers, logs: {rung: the rows of its predictions.jsonl, of its log.jsonl}.
    """
    for name in answers:
        located = [row for row in answers[name] if row["question_type"] == "localization"]
        if located and name != "base":  # from stage 1 on a rung knows how boxes are written
            yield name, boxes_sign(located)
        train = run / "eval-train" / name / "scores.json"
        held_out = run / "eval" / name / "scores.json"
        if train.is_file() and held_out.is_file():
            yield name, memory_sign(read_json(train), read_json(held_out))
        steps = [row for row in logs[name] if "reward" in row]
        if steps:
            yield name, reward_sign(steps)
    maps = run / "probes" / "attention.json"
    if maps.is_file():
        rows = [row for row in read_json(maps)["rows"] if row["name"] in answers]
        for before, after in pairwise(rows):
            yield after["name"], attention_sign(before["entropy"], after["entropy"])
