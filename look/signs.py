"""Signs of trouble in a run of the ladder: what is found wherever they show, and whether it is "ok", "TROUBLE" or "unknown".

    python -m look.signs runs/tiny            # ladder.py ends with it

Every trainer and evaluation leaves what this reads: scores.json, predictions.jsonl, log.jsonl. What is not there yet is
left out.
"""

import argparse
from pathlib import Path

import numpy as np

from files import UserError, parse_line, read_json, read_lines
from ladder import EVERY_RUNG, GROUNDING, RUNGS
from runtime import main_guard
from settings import Parser

INVALID = 0.01  # share of localization answers that may be no JSON, and of boxes that may reach out of the picture
MEMORIZED = 0.1  # training questions may score so much better than held-out ones


def rows_of(path):
    return [parse_line(line, where) for where, line in read_lines(path)]


def outside(box, size):
    """Whether a box has no area or reaches out of a picture of this size.

    >>> outside([0, 0, 112, 50], [112, 112]), outside([0, 0, 113, 50], [112, 112]), outside([9, 0, 9, 50], [112, 112])
    (False, True, True)
    """
    x1, y1, x2, y2 = box
    return not (0 <= x1 < x2 <= size[0] and 0 <= y1 < y2 <= size[1])


def boxes_sign(rows):
    """Of localization rows: (is it trouble, a sentence)."""
    valid = np.mean([row["prediction"] is not None for row in rows])
    boxes = [
        outside(box["bbox_2d"], row["size"]) for row in rows for box in row["prediction"] or ()
    ]
    out = float(np.mean(boxes)) if boxes else 0.0
    return 1 - valid > INVALID or out > INVALID, (
        f"{valid:.1%} of its localization answers are valid JSON, {out:.1%} of their boxes empty or partly outside the picture"
    )


def memory_sign(train, held_out):
    """scores.json on training and on held-out questions: knows the first and does no better than blind on the second.

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

    The first fifth of the steps against the last; noise is two standard errors of the difference of their means. Unknown
    (None) with fewer than two steps in a fifth, or fewer than two looks at held-out questions.
    """
    rewards, fifth = [row["reward"] for row in rows], len(rows) // 5
    held_out = [
        row["eval_rewards/accuracy/mean"] for row in rows if "eval_rewards/accuracy/mean" in row
    ]
    if fifth < 2 or len(held_out) < 2:
        return (
            None,
            f"{len(rows)} steps of GRPO and {len(held_out)} looks at held-out questions are too few to judge",
        )
    first, last = rewards[:fifth], rewards[-fifth:]
    noise = 2 * np.sqrt((np.var(first, ddof=1) + np.var(last, ddof=1)) / fifth)
    rises = np.mean(last) - np.mean(first) > noise
    return bool(rises and held_out[-1] <= held_out[0]), (
        f"reward {np.mean(first):.3f} -> {np.mean(last):.3f} (noise {noise:.3f}), held-out accuracy {held_out[0]:.3f} -> "
        f"{held_out[-1]:.3f}"
    )


def attention_sign(before, after):
    """Rows of probes.py attention: the map's entropy has surely risen.

    >>> attention_sign({"entropy": {"value": 0.8, "high": 0.85}}, {"entropy": {"value": 0.9, "low": 0.88}})
    (True, 'entropy of the attention map 0.800 -> 0.900')
    """
    return after["entropy"]["low"] > before["entropy"]["high"], (
        f"entropy of the attention map {before['entropy']['value']:.3f} -> {after['entropy']['value']:.3f}"
    )


def taught_boxes(run, name):
    """Whether a rung, or one below it, was trained on rows of boxes."""
    path, start = (
        run / name / "config_run.json",
        {rung.name: rung.start for rung in EVERY_RUNG}[name],
    )
    config = read_json(path) if path.is_file() else {"data": []}
    files = config["data"] + (config["replay"] or [] if config.get("replay_ratio") else [])
    return any(Path(file).name == GROUNDING for file in files) or (
        start is not None and taught_boxes(run, start)
    )


def signs(run):
    """(rung, is it trouble, a sentence) of all that a run has so far; None: there is too little to say."""
    for rung in EVERY_RUNG[1:]:
        answers, log = run / "eval" / rung.name / "predictions.jsonl", run / rung.name / "log.jsonl"
        located = (
            [row for row in rows_of(answers) if row["question_type"] == "localization"]
            if answers.is_file()
            else []
        )
        if located and taught_boxes(run, rung.name):
            yield rung.name, *boxes_sign(located)
        train, held_out = (
            run / folder / rung.name / "scores.json" for folder in ("eval-train", "eval")
        )
        if train.is_file() and held_out.is_file():
            yield rung.name, *memory_sign(read_json(train), read_json(held_out))
        steps = [row for row in rows_of(log) if "reward" in row] if log.is_file() else []
        if steps:
            yield rung.name, *reward_sign(steps)
    if (run / "probes" / "attention.json").is_file():
        rows = {row["name"]: row for row in read_json(run / "probes" / "attention.json")["rows"]}
        for before, after in zip(RUNGS, RUNGS[1:]):
            if {before.name, after.name} <= set(rows):
                yield after.name, *attention_sign(rows[before.name], rows[after.name])


def verdicts(run):
    """
    >>> verdicts(Path("nowhere"))
    []
    """
    words = {True: "TROUBLE", False: "ok", None: "unknown"}
    return [f"{words[trouble]:<8}{name}: {said}" for name, trouble, said in signs(run)]


def main():
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="directory of a ladder, such as runs/tiny")
    run = parser.parse_args().run
    if not (run / "ladder.json").is_file():
        raise UserError(f"{run}: no ladder there; climb one with: python ladder.py --out {run}")
    print("\n".join(verdicts(run)) or f"{run}: nothing in it yet that could show trouble")


if __name__ == "__main__":
    main_guard(main)
