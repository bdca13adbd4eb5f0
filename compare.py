"""Lay ladders of several seeds beside one another: each rung's scores over all their questions, with 95% intervals.

    python ladder.py --seeds 3 --limit 500 --out runs/seeds      # climbs three ladders and ends with this
    python compare.py runs/seeds/0 runs/seeds/1 runs/seeds/2     # the tables alone, in Markdown

A gain is (score - blind) / (1 - blind): 0 is what the best answer per question text earns without the picture, 1 is all
right. Intervals are bootstraps over questions within their types; differences are paired by question.
"""
import argparse
import json
from pathlib import Path

import numpy as np

from benchmarks import bootstrap_interval
from checkpoint import read_json
from ladder import RUNGS, SELF_RUNGS
from rewards import CHOICE_TYPES, NUMBER_TYPES, UserError
from runtime import Parser, main_guard


def read_rung(runs, rung):
    """{question type: {(run, id): (score, blind)}} of a rung's evaluations in all runs."""
    found = {}
    for run in runs:
        path = Path(run) / "eval" / rung / "predictions.jsonl"
        if not path.is_file():
            raise UserError(f"{path}: no such file; climb it with: python ladder.py --out {run}")
        for line in path.read_text(encoding="utf-8").splitlines():
            row = json.loads(line)
            if row["blind"] is None:
                raise UserError(f"{path}: no blind baseline in it; evaluate with --blind-from")
            found.setdefault(row["question_type"], {})[run, row["id"]] = row["score"], row["blind"]
    return found


def paired(after, before):
    """{type: differences of the questions that both hold} of two {type: {question: number}}."""
    return {kind: np.array([value - before[kind][key] for key, value in questions.items() if key in before[kind]])
            for kind, questions in after.items()}


def scores_of(found):
    return {kind: {key: score for key, (score, _) in rows.items()} for kind, rows in found.items()}


def gains(found, types):
    """{type: (gain, low, high)}: the interval is that of score - blind over the same questions, in the same unit.

    >>> gains({"object count": {1: (1.0, 0.5), 2: (1.0, 0.5)}}, ["object count"])
    {'object count': (1.0, 1.0, 1.0)}
    """
    made = {}
    for kind in types:
        score, blind = np.array([*found[kind].values()]).T
        low, high = bootstrap_interval(score - blind)
        made[kind] = tuple(float(number / (1 - blind.mean())) for number in ((score - blind).mean(), low, high))
    return made


def change(after, before, types):
    """A cell: the mean over types of the paired differences in points, with its interval."""
    differences = {kind: values for kind, values in paired(scores_of(after), scores_of(before)).items() if kind in types}
    low, high = bootstrap_interval(differences)
    mean = np.mean([values.mean() for values in differences.values()])
    return f"{100 * mean:+.1f} [{100 * low:+.1f}, {100 * high:+.1f}]"


def tables(runs):
    """Markdown: a line per rung; then a line per question type with each rung's gain."""
    names = [name for name, *_ in (*RUNGS, *SELF_RUNGS) if any((Path(run) / "eval" / name).is_dir() for run in runs)]
    found = {name: read_rung(runs, name) for name in names or ["base"]}  # of none, it says what to run
    scores = {name: [read_json(Path(run) / "eval" / name / "scores.json") for run in runs] for name in names}
    types = [kind for kind in (*NUMBER_TYPES, *CHOICE_TYPES) if kind in found[names[0]]]
    starts = {name: start for name, _, start, *_ in (*RUNGS, *SELF_RUNGS)}
    lines = ["| rung | box IoU | valid JSON | types above blind | mean gain | score | well formed | score beside the rung before |",
             "|---|---|---|---|---|---|---|---|"]
    for name in names:
        gain = gains(found[name], types)
        boxes = np.mean([score for score, _ in found[name]["localization"].values()])
        valid, formed = (np.mean([get(one) for one in scores[name]]) for get in (
            lambda one: one["localization"]["valid_json"], lambda one: one["well_formed"]))
        mean = np.mean([np.mean([score for score, _ in found[name][kind].values()]) for kind in types])
        before = change(found[name], found[starts[name]], types) if starts[name] in found else ""
        lines.append(f"| {name} | {boxes:.3f} | {valid:.1%} | {sum(low > 0 for _, low, _ in gain.values())} of {len(types)} | "
                     f"{np.mean([g for g, _, _ in gain.values()]):+.3f} | {mean:.3f} | {formed:.1%} | {before} |")
    answering = [name for name in names if name not in ("base", "stage1")]  # who know no question
    lines += ["", f"| gain of | blind | {' | '.join(answering)} |", "|---|---|" + "---|" * len(answering)]
    for kind in types:
        blind = np.mean([blind for _, blind in found[names[-1]][kind].values()])
        cells = ["{:+.2f} [{:+.2f}, {:+.2f}]".format(*gains(found[name], [kind])[kind]) for name in answering]
        lines.append(f"| {kind} | {blind:.2f} | {' | '.join(cells)} |")
    asked = sum(len(found[names[-1]][kind]) for kind in types) // len(types)
    return "\n".join([*lines, "", f"Ladders: {len(runs)}; questions of a type in all: {asked}."])


def main():
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", help="directories of finished ladders")
    print(tables(parser.parse_args().runs))


if __name__ == "__main__":
    main_guard(main)
