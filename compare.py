"""Lay ladders of several seeds beside one another: each rung's scores over all their questions, with 95% intervals.

    python ladder.py --seeds 3 --limit 500 --out runs/seeds      # climbs three ladders and ends with this
    python compare.py runs/seeds/0 runs/seeds/1 runs/seeds/2     # the tables alone, in Markdown
    python ladder.py --without stage1 stage2 --mixed --seeds 3 --out runs/ways      # and of other ways up
    python ladder.py --data-scale 1 2 --seeds 3 --out runs/rooms                    # and of more rooms
    for run in runs/seeds/*; do python probes.py all $run; done      # then the tables end with what was probed

A gain is (score - blind) / (1 - blind): 0 is what the best answer per question text earns without the picture, 1 is all
right. Intervals are bootstraps over questions within their types; differences are paired by question. No interval says how far
other seeds would lie, only how far other questions would.
"""
import argparse
import json
import math
from pathlib import Path

import numpy as np

from benchmarks import bootstrap_interval
from checkpoint import read_json
from ladder import EVERY_RUNG, RUNGS
from probes import PANELS, figures_of, table
from rewards import CHOICE_TYPES, NUMBER_TYPES, UserError
from runtime import Parser, main_guard

PAPER_POINTS = {  # what the paper loses beside its whole ladder. After stages 1 and 2 it scores 43.9%, after stage 2 alone
    # 42.7%, after both shuffled together 40.7%.
    "cold": -2.1, "stage2-no1": -1.2, "grpo-no1": -1.8, "grpo-no2": -9.4, "grpo-films": -16.4, "stage2-mixed": -3.2}


def setting(run, name, usual):
    """What a ladder was climbed with."""
    path = Path(run) / "ladder.json"
    return read_json(path).get(name, usual) if path.is_file() else usual


def read_rung(runs, rung, with_blind=False):
    """{question type: {(seed, id): (score, blind)}} of a rung's evaluations in all runs."""
    found = {}
    for run in runs:
        path, seed = Path(run) / "eval" / rung / "predictions.jsonl", setting(run, "seed", run)
        if not path.is_file():
            raise UserError(f"{path}: no such file; climb it with: python ladder.py --out {run}")
        for line in path.read_text(encoding="utf-8").splitlines():
            row = json.loads(line)
            if with_blind and row["blind"] is None:
                raise UserError(f"{path}: no blind baseline in it; evaluate with --blind-from")
            found.setdefault(row["question_type"], {})[seed, row["id"]] = row["score"], row["blind"]
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
    if not all(map(len, differences.values())):
        raise UserError("nothing to compare: the ladders have no question of some type in common; give ladders of the same seeds")
    low, high = bootstrap_interval(differences)
    mean = np.mean([values.mean() for values in differences.values()])
    return f"{100 * mean:+.1f} [{100 * low:+.1f}, {100 * high:+.1f}]"


def mean_score(found, types):
    return np.mean([np.mean([score for score, _ in found[kind].values()]) for kind in types])


def evaluated(runs, rungs, which=all):
    """Names of the rungs that all of the ladders, or any, have answers of."""
    return [rung.name for rung in rungs if which((Path(run) / "eval" / rung.name / "predictions.jsonl").is_file() for run in runs)]


def tables(runs):
    """Markdown: a line per rung; then a line per question type with each rung's gain."""
    names = evaluated(runs, RUNGS, any)
    found = {name: read_rung(runs, name, with_blind=True) for name in names or ["base"]}  # of none, it says what to run
    scores = {name: [read_json(Path(run) / "eval" / name / "scores.json") for run in runs] for name in names}
    types = [kind for kind in (*NUMBER_TYPES, *CHOICE_TYPES) if kind in found[names[0]]]
    starts = {rung.name: rung.start for rung in RUNGS}
    lines = ["| rung | box IoU | valid JSON | types above blind | mean gain | score | well formed | score beside the rung before |",
             "|---|---|---|---|---|---|---|---|"]
    for name in names:
        gain = gains(found[name], types)
        boxes = np.mean([score for score, _ in found[name]["localization"].values()])
        valid, formed = (np.mean([get(one) for one in scores[name]]) for get in (
            lambda one: one["localization"]["valid_json"], lambda one: one["well_formed"]))
        before = change(found[name], found[starts[name]], types) if starts[name] in found else ""
        lines.append(f"| {name} | {boxes:.3f} | {valid:.1%} | {sum(low > 0 for _, low, _ in gain.values())} of {len(types)} | "
                     f"{np.mean([g for g, _, _ in gain.values()]):+.3f} | {mean_score(found[name], types):.3f} | {formed:.1%} | {before} |")
    answering = [name for name in names if name not in ("base", "stage1")]  # who know no question
    lines += ["", f"| gain of | blind | {' | '.join(answering)} |", "|---|---|" + "---|" * len(answering)]
    for kind in types:
        blind = np.mean([blind for _, blind in found[names[-1]][kind].values()])
        cells = ["{:+.2f} [{:+.2f}, {:+.2f}]".format(*gains(found[name], [kind])[kind]) for name in answering]
        lines.append(f"| {kind} | {blind:.2f} | {' | '.join(cells)} |")
    asked = sum(len(found[names[-1]][kind]) for kind in types) // len(types)
    return "\n".join([*lines, "", f"Ladders: {len(runs)}; questions of a type in all: {asked}."])


def ways(runs, others):
    """Markdown: rungs of other ways up, and the last rung of ladders with more or fewer rooms, beside the ladder's own of the
    same stage and seeds. others: {data scale: ladders}. Without any, nothing."""
    ladder = evaluated(runs, RUNGS)
    rows = [(name, name, name.split("-")[0], runs) for name in evaluated(runs, EVERY_RUNG) if "-" in name]
    rows += [("cold (no GRPO)", "cold", "grpo", runs)] if "cold" in ladder else []
    rows += [(f"{name}, rooms x{scale:g}", name, name, others[scale])
             for scale in others for name in evaluated(others[scale], RUNGS)[-1:]]
    lines = []
    for label, name, partner, where in rows:
        if partner in ladder:
            found, whole = read_rung(where, name), read_rung(runs, partner)
            types = [kind for kind in (*NUMBER_TYPES, *CHOICE_TYPES) if kind in found]
            paper = f"{PAPER_POINTS[name]:+.1f}" if where is runs and name in PAPER_POINTS else ""
            lines.append(f"| {label} | {mean_score(found, types):.3f} | {partner} | {change(found, whole, types)} | {paper} |")
    heads = ["| another way up | score | beside | points | the paper's |", "|---|---|---|---|---|"]
    return "\n".join(heads + lines if lines else [])


def pooled(figures):
    """A figure of several ladders as one. Their questions are independent, so squares of half an interval's width add up.

    >>> pooled([{"value": 0.0, "low": -3.0, "high": 3.0}, {"value": 1.0, "low": -3.0, "high": 5.0}])
    {'value': 0.5, 'low': -2.0, 'high': 3.0}
    """
    value = float(np.mean([figure["value"] for figure in figures]))
    half = math.hypot(*((figure["high"] - figure["low"]) / 2 for figure in figures)) / len(figures)
    return {"value": value, "low": value - half, "high": value + half}


def probed(runs):
    """The tables of probes.py, of all ladders as one, for every probe that all of them have."""
    found = []
    for what in PANELS:
        paths = [Path(run) / "probes" / f"{what}.json" for run in runs]
        if all(path.is_file() for path in paths):
            results = [read_json(path) for path in paths]
            asked = [{key: value for key, value in one["settings"].items() if key not in ("data", "seed")} for one in results]
            for path, settings in zip(paths, asked):
                if settings != asked[0]:
                    raise UserError(f"{path}: probed with {settings}, expected {asked[0]} as in {paths[0]}")
            ladders = [{row["name"]: figures_of(row) for row in one["rows"]} for one in results]
            rows = [{"name": name} | {key: pooled([ladder[name][key] for ladder in ladders])
                                      for key in row if all(key in ladder[name] for ladder in ladders)}
                    for name, row in ladders[0].items() if all(name in ladder for ladder in ladders)]
            found.append(f"\n\n{what}: {asked[0]['questions']} questions of each of {len(runs)} ladders\n"
                          + table({"rows": rows, "paper": results[0]["paper"]}))
    return "".join(found)


def main():
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", help="directories of finished ladders")
    scales = {}
    for run in parser.parse_args().runs:
        scales.setdefault(setting(run, "data_scale", [1])[0], []).append(run)
    usual = min(scales, key=lambda scale: (scale != 1, scale))
    ladders = scales.pop(usual)
    print(f"Ladders with rooms x{usual:g}:\n\n{tables(ladders)}\n\n{ways(ladders, scales)}{probed(ladders)}")


if __name__ == "__main__":
    main_guard(main)
