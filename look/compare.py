"""Compare ladders of several seeds, and their ablations: Markdown tables, and charts.

    python -m look.compare runs/ways/0 runs/ways/1 runs/ways/2
    python -m look.compare runs/ways/* --figures runs/figures    # ladder.svg, ways.svg, and probes

The ladders of all seeds count as one: a score is the mean over all their questions. The blind guess
is the best answer without the picture. Intervals are 95% bootstraps over questions within their
types; differences are paired by question. No interval says how far other seeds would lie, so each
seed's own difference stands beside it.

Each rung is compared with the one that it started from; the rungs of look.ablations, and ladders
with more or fewer rooms, with the ladder's rung of the same stage. If all ladders were probed
(look.probes), the probes come last.
"""

import math
from collections import defaultdict
from pathlib import Path

import numpy as np

from benchmarks import bootstrap_interval
from files import CONFIG, UserError, read_json, read_jsonl, writing
from ladder import ROOMS_MADE, RUNGS
from look.ablations import WAYS
from look.charts import dots, join, save
from look.probes import PANELS, chart, figures_of, table
from runtime import main_guard
from settings import Parser

# The paper's points: what GRPO adds to the cold start, and what is lost without a part. It scores
# 43.9% after stages 1 and 2, 42.7% after stage 2 alone, 40.7% after both shuffled together.
PAPER_POINTS = {
    "grpo": 2.1,
    "stage2-no1": -1.2,
    "grpo-no1": -1.8,
    "grpo-no2": -9.4,
    "grpo-films": -16.4,
    "stage2-mixed": -3.2,
    "grpo-bare": -0.8,
}
QUESTIONS, BOXES = "all questions", "box IoU"  # lines of a table below those of the types
OWN_SETTINGS = ("data", "seed", "questions")  # of a probe: each ladder has its own

# ---------------------------------------------------------------------------------- figures


def read_rung(runs, rung):
    """Scores of a rung in all ladders: {(question type, seed, id): (score, blind)}.

    Empty if a ladder has not evaluated it.
    """
    paths = [Path(run) / "eval" / rung / "predictions.jsonl" for run in runs]
    if not all(path.is_file() for path in paths):
        return {}
    rows = {}
    for run, path in zip(runs, paths):
        seed = read_json(Path(run) / CONFIG)["seed"]
        for where, row in read_jsonl(path):
            if row["blind"] is None:
                raise UserError(f"{where}: no blind baseline in it; evaluate with --blind-from")
            rows[row["question_type"], seed, row["id"]] = row["score"], row["blind"]
    return rows


def groups(rows, column=0):
    """Scores, or with column 1 blind ones: {line of a table: {question type: numbers}}."""
    types = defaultdict(list)
    for (kind, _, _), scores in sorted(rows.items()):
        types[kind].append(scores[column])
    boxes = types.pop("localization")
    each = {kind: {kind: numbers} for kind, numbers in types.items()}
    return {**each, QUESTIONS: types, BOXES: {BOXES: boxes}}


def measured(types):
    """[mean over the types, low, high] of {question type: numbers}.

    >>> measured({"room size": [1, 1], "object size": [0]})
    [0.5, 0.5, 0.5]
    """
    means = [np.mean(numbers) for numbers in types.values()]
    return [float(np.mean(means)), *bootstrap_interval(types)]


def change(after, before):
    """Points between two rungs, over the questions that both were asked.

    Returns: {"value", "low", "high", "seeds"}: the mean over types, its interval, each seed's mean.
    """
    types = defaultdict(list)
    seeds = defaultdict(lambda: defaultdict(list))
    for key, (score, _) in after.items():
        kind, seed, _ = key
        if key in before and kind != "localization":
            points = 100 * (score - before[key][0])
            types[kind].append(points)
            seeds[seed][kind].append(points)
    if not types:
        raise UserError("the ladders have no question in common; give ladders of the same seeds")
    value, low, high = measured(types)
    each = [measured(own)[0] for own in seeds.values()]
    return {"value": value, "low": low, "high": high, "seeds": each}


def compared(runs, pairs):
    """Rungs compared with rungs of the ladder, where both are evaluated.

    Args:    pairs: [(name, rung, its ladders, the ladder's rung)].
    Returns: [{"name", "score", "beside": the ladder's rung, "paper"} and what `change` returns].
    """
    rows = []
    for name, rung, ladders, beside in pairs:
        after = read_rung(ladders, rung)
        before = read_rung(runs, beside)
        if after and before:
            row = {"name": name, "beside": beside, "paper": PAPER_POINTS.get(name)}
            row["score"], *_ = measured(groups(after)[QUESTIONS])
            rows.append(row | change(after, before))
    return rows


def other_ways(runs, others):
    """Pairs for `compared`: the rungs of ablations; ladders with more or fewer rooms (others)."""
    pairs = []
    for way in WAYS:
        for rung in RUNGS:
            name = f"{rung.name}-{way}"
            pairs.append((name, name, runs, rung.name))
    for scale, ladders in others.items():
        pairs.append((f"grpo, rooms x{scale:g}", "grpo", ladders, "grpo"))
    return pairs


# ---------------------------------------------------------------------------------- tables


def markdown(rows):
    """Rows of cells, the heads first, as a Markdown table."""
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    lines.insert(1, "|" + "---|" * len(rows[0]))
    return "\n".join(lines)


def score_table(rungs):
    """Markdown: a line for each question type, a column for each rung."""
    columns = [groups(rows) for rows in rungs.values()]
    lines = [["score", "blind guess", *rungs]]
    for line, blind in groups([*rungs.values()][-1], 1).items():
        cells = [line, f"{measured(blind)[0]:.3f}"]
        for column in columns:
            value, low, high = measured(column[line])
            cells.append(f"{value:.3f} [{low:.3f}, {high:.3f}]")
        lines.append(cells)
    return markdown(lines)


def change_table(rows):
    """Markdown of what `compared` returns."""
    lines = [["rung", "score", "compared with", "points", "each seed", "the paper's"]]
    for row in rows:
        points = f"{row['value']:+.1f} [{row['low']:+.1f}, {row['high']:+.1f}]"
        seeds = ", ".join([f"{seed:+.1f}" for seed in row["seeds"]])
        cells = [row["name"], f"{row['score']:.3f}", row["beside"], points, seeds]
        cells.append(f"{row['paper']:+.1f}" if row["paper"] else "")
        lines.append(cells)
    return markdown(lines)


# ---------------------------------------------------------------------------------- probes


def pooled(figures):
    """One figure over several ladders, each with an interval.

    The ladders were asked other questions, so the squares of how far the intervals reach below
    (and above) add up.

    >>> pooled([{"value": 0, "low": -3, "high": 6}, {"value": 1, "low": -3, "high": 9}])
    {'value': 0.5, 'low': -2.0, 'high': 5.5}
    """
    count = len(figures)
    value = sum(figure["value"] for figure in figures) / count
    below = math.hypot(*[figure["value"] - figure["low"] for figure in figures]) / count
    above = math.hypot(*[figure["high"] - figure["value"] for figure in figures]) / count
    return {"value": value, "low": value - below, "high": value + above}


def together(results):
    """Rows of a probe over all ladders: the rungs and the figures that all of them have."""
    same = defaultdict(list)
    for result in results:
        for row in result["rows"]:
            for name, figure in figures_of(row).items():
                same[row["name"], name].append(figure)
    rows = {}
    for (rung, name), figures in same.items():
        if len(figures) == len(results):
            rows.setdefault(rung, {"name": rung})[name] = pooled(figures)
    return [*rows.values()]


def probed(runs):
    """{probe: its result over all ladders}, of every probe that all ladders have."""
    probes = {}
    for what in PANELS:
        paths = [Path(run) / "probes" / f"{what}.json" for run in runs]
        if all(path.is_file() for path in paths):
            results = [read_json(path) for path in paths]
            for path, result in zip(paths, results):
                for name, expected in results[0]["settings"].items():
                    value = result["settings"].get(name)
                    if value != expected and name not in OWN_SETTINGS:
                        place = f"expected {expected} as in {paths[0]}"
                        raise UserError(f"{path}: probed with {name} {value}, {place}")
            probes[what] = {"rows": together(results), "paper": results[0]["paper"]}
    return probes


# ---------------------------------------------------------------------------------- the command


def by_scale(runs):
    """{times the usual number of rooms: ladders}; of one scale each must have a seed of its own."""
    scales = defaultdict(dict)
    for run in runs:
        config = read_json(Path(run) / CONFIG)
        other = scales[config["scenes"] / ROOMS_MADE].setdefault(config["seed"], run)
        if other != run:
            raise UserError(f"{run}: has the seed of {other}; give one ladder for each seed")
    return {scale: [*seeds.values()] for scale, seeds in scales.items()}


def draw(rungs, ways, probes):
    """{name: SVG} of the ladder, of the ablations and of each probe."""
    panels = []
    for line in (BOXES, QUESTIONS):
        rows = []
        for name, answers in rungs.items():
            rows.append((name, *measured(groups(answers)[line])))
        panels.append(dots(line, rows))
    charts = {"ladder": join(panels, 2)}
    if ways:
        rows = [(row["name"], row["value"], row["low"], row["high"]) for row in ways]
        paper = {row["name"]: row["paper"] for row in ways if row["paper"]}
        charts["ways"] = dots("points beside the ladder's rung of the same stage", rows, paper)
    for what, result in probes.items():
        charts[what] = chart(what, result)
    return charts


def main():
    parser = Parser(__doc__)
    parser.add_argument("runs", nargs="+", help="folders of finished ladders")
    parser.add_argument("--figures", type=Path, help="folder to write charts to")
    args = parser.parse_args()
    others = by_scale(args.runs)
    usual = 1 if 1 in others else min(others)
    runs = others.pop(usual)

    rungs = {}
    for rung in RUNGS:
        answers = read_rung(runs, rung.name)
        if answers:
            rungs[rung.name] = answers
    if not rungs:
        raise UserError(f"{', '.join(runs)}: there is no rung that all of them have evaluated")
    steps = compared(runs, [(rung.name, rung.name, runs, rung.start) for rung in RUNGS[1:]])
    ways = compared(runs, other_ways(runs, others))
    probes = probed(runs)

    print(f"Ladders: {len(runs)}, rooms x{usual:g}\n\n{score_table(rungs)}")
    print(f"\n{change_table(steps + ways)}")
    for what, result in probes.items():
        print(f"\n{what}\n{table(result)}")
    if args.figures:
        with writing(args.figures):
            args.figures.mkdir(parents=True, exist_ok=True)
        for name, svg in draw(rungs, ways, probes).items():
            save(svg, args.figures / f"{name}.svg")


if __name__ == "__main__":
    main_guard(main)
