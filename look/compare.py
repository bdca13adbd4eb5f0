"""Compare ladders of several seeds, and their ablations: tables, and charts.

    python -m look.compare runs/ways/0 runs/ways/1 runs/ways/2
    python -m look.compare runs/ways/* --figures runs/figures    # ladder.svg, ways.svg, and probes

The ladders of all seeds count as one: a score is the mean over all their questions. The blind guess
is the best answer without the picture. Intervals are 95% bootstraps over questions within their
types; differences are paired by question. No interval says how far other seeds would lie, so each
seed's own difference stands beside it.

Each rung is compared with the one that it started from; the rungs of look.ablations, and ladders
with other numbers of rooms than the first folder's, with the ladder's rung of the same stage. Then
come the chains of thought (look.chains). The probes come last, if all ladders were probed
(look.probes).
"""

import math
from collections import defaultdict
from pathlib import Path

import numpy as np

from benchmarks import bootstrap_interval
from files import UserError, changes, read_json, read_jsonl, text_table, write_text, writing
from ladder import ROOMS_MADE, RUNGS
from look import chains
from look.ablations import WAYS
from look.charts import dots, join
from look.probes import PANELS, chart, figures_of, read_ladder, table
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


def read_rung(ladders, rung):
    """Scores of a rung in all ladders: {(question type, seed, id): (score, blind)}.

    Empty if a ladder has not evaluated it.

    Args: ladders: {seed: folder}.
    """
    rows = {}
    for seed, run in ladders.items():
        path = Path(run) / "eval" / rung / "predictions.jsonl"
        if not path.is_file():
            return {}
        for _, row in read_jsonl(path):
            rows[row["question_type"], seed, row["id"]] = row["score"], row["blind"]
    return rows


def groups(rows, column=0):
    """Numbers of what read_rung returns: {line of a table: {question type: numbers}}.

    Args: column: 0 for scores, 1 for blind guesses.
    """
    # Sorted: the bootstrap draws by place, and the same rows are to give the same interval.
    types = defaultdict(list)
    for (kind, _, _), numbers in sorted(rows.items()):
        types[kind].append(numbers[column])
    boxes = types.pop("localization", [])
    each = {kind: {kind: numbers} for kind, numbers in types.items()}
    return {**each, QUESTIONS: types, BOXES: {BOXES: boxes}}


def above_blind(rows):
    """How far questions lie above the blind guess; 1 is all right, 0 as good as blind.

    A question's number is (score - blind) / (1 - mean blind of its type), so that the mean of a
    type is (score - blind) / (1 - blind) of its means.

    Returns: {question type: numbers}

    >>> rows = {("object size", 0, "1"): (1.0, 0.2), ("object size", 0, "2"): (0.5, 0.8)}
    >>> sum(above_blind(rows)["object size"]) / 2  # (0.75 - 0.5) / (1 - 0.5)
    0.5
    """
    scores = groups(rows)[QUESTIONS]
    blind = groups(rows, 1)[QUESTIONS]
    gains = {}
    for kind, numbers in scores.items():
        guesses = np.array(blind[kind], float)  # None becomes NaN
        gains[kind] = ((np.array(numbers, float) - guesses) / (1 - guesses.mean())).tolist()
    return gains


def measured(types):
    """[mean over the types, low, high] of {question type: numbers}.

    >>> measured({"room size": [1, 1], "object size": [0]})
    [0.5, 0.5, 0.5]
    """
    means = [np.array(numbers, float).mean() for numbers in types.values()]
    return [float(np.mean(means)), *bootstrap_interval(types)]


def scores_of(rungs):
    """{line of a table: [(rung, value, low, high, no mark)]}: rows of a chart."""
    scores = defaultdict(list)
    for name, rows in rungs.items():
        for line, types in groups(rows).items():
            scores[line].append((name, *measured(types), None))
    return scores


def change(after, before):
    """Points between two rungs, over the questions that both were asked.

    Returns: {"value", "low", "high", "seeds"}: the mean over types, its interval, each seed's mean.
    """
    points = {}
    seeds = defaultdict(dict)  # the same for each seed
    for key in after:
        if key in before:
            _, seed, _ = key
            points[key] = seeds[seed][key] = [100 * (after[key][0] - before[key][0])]
    if not points:
        raise UserError("the ladders have no question in common; give ladders of the same seeds")
    value, low, high = measured(groups(points)[QUESTIONS])
    each = [measured(groups(own)[QUESTIONS])[0] for own in seeds.values()]
    return {"value": value, "low": low, "high": high, "seeds": each}


def compared(ladders, pairs):
    """Rungs compared with rungs of the ladder, where both are evaluated.

    Args:    pairs: [(name, rung, its ladders, the ladder's rung)].
    Returns: [{"name", "score", "beside": the ladder's rung, "paper"} and what `change` returns].
    """
    rows = []
    for name, rung, own, beside in pairs:
        after = read_rung(own, rung)
        before = read_rung(ladders, beside)
        if after and before:
            row = {"name": name, "beside": beside, "paper": PAPER_POINTS.get(name)}
            row["score"], *_ = measured(groups(after)[QUESTIONS])
            rows.append(row | change(after, before))
    return rows


def other_ways(ladders, others):
    """Pairs for `compared`: the rungs of ablations; ladders with more or fewer rooms (others)."""
    pairs = []
    for way in WAYS:
        for rung in RUNGS:
            name = f"{rung.name}-{way}"
            pairs.append((name, name, ladders, rung.name))
    for scale, own in others.items():
        pairs.append((f"grpo, rooms x{scale:g}", "grpo", own, "grpo"))
    return pairs


# ---------------------------------------------------------------------------------- tables


def score_table(rungs, scores):
    """A line for each question type, a column for each rung.

    Args:    rungs: {rung: what read_rung returns}. scores: see `scores_of`.
    """
    lines = [["score", "blind guess", *rungs]]
    for line, blind in groups([*rungs.values()][-1], 1).items():
        cells = [f"{value:.3f} [{low:.3f}, {high:.3f}]" for _, value, low, high, _ in scores[line]]
        lines.append([line, f"{measured(blind)[0]:.3f}", *cells])
    return text_table(lines)


def gain_table(rungs):
    """How far above the blind guess each type of question lies, their mean, and how many surely do.

    Args: rungs: {rung: what read_rung returns}.
    """
    columns = [above_blind(rows) for rows in rungs.values()]
    kinds = [*columns[-1]]
    lines = [["gain above the blind guess", *rungs]]
    lines += [[kind] for kind in kinds]
    lines += [["mean"], ["types surely above"]]
    for gains in columns:
        intervals = [measured({kind: gains[kind]}) for kind in kinds]
        surely = sum(low > 0 for _, low, _ in intervals)  # the whole interval lies above
        cells = [
            f"{value:+.2f} [{low:+.2f}, {high:+.2f}]"
            for value, low, high in [*intervals, measured(gains)]
        ]
        for line, cell in zip(lines[1:], [*cells, f"{surely} of {len(kinds)}"]):
            line.append(cell)
    return text_table(lines)


def change_table(rows):
    """A line for each row that `compared` returns."""
    lines = [["rung", "score", "compared with", "points", "each seed", "the paper's"]]
    for row in rows:
        points = f"{row['value']:+.1f} [{row['low']:+.1f}, {row['high']:+.1f}]"
        seeds = ", ".join([f"{seed:+.1f}" for seed in row["seeds"]])
        paper = f"{row['paper']:+.1f}" if row["paper"] else ""
        lines.append([row["name"], f"{row['score']:.3f}", row["beside"], points, seeds, paper])
    return text_table(lines)


def chain_table(ladders):
    """A line for each rung that thinks in every ladder, of all their chains; "" for none."""
    each = [chains.judge_ladder(Path(run)) for run in ladders.values()]
    rungs = {}
    for rung in each[0]:
        if all(rung in own for own in each):
            rungs[rung] = []
            for own in each:
                rungs[rung] += own[rung]["all"]
    return chains.table("rung", rungs, chains.FEW_SHARES) if rungs else ""


# ---------------------------------------------------------------------------------- probes


def pooled(figures):
    """One figure over several ladders, each with an interval.

    The ladders were asked other questions, so the squares of the intervals' half widths add up.

    >>> pooled([{"value": 0, "low": -3, "high": 3}, {"value": 1, "low": -3, "high": 5}])
    {'value': 0.5, 'low': -2.0, 'high': 3.0}
    """
    count = len(figures)
    value = sum(figure["value"] for figure in figures) / count
    widths = [figure["high"] - figure["low"] for figure in figures]
    half = math.hypot(*widths) / 2 / count
    return {"value": value, "low": value - half, "high": value + half}


def together(paths):
    """Rows of a probe over several ladders. paths: of its results, which must be of equal rungs."""
    results = [read_json(path) for path in paths]
    settings = []
    for result in results:
        names = [row["name"] for row in result["rows"]]
        settings.append(result["settings"] | {"models": names})
    for path, own in zip(paths, settings):
        other = changes(settings[0], own, OWN_SETTINGS)
        if other:
            raise UserError(f"{path}: probed with other settings than {paths[0]}: {other}")
    rows = []
    for same in zip(*[result["rows"] for result in results]):  # one rung in all ladders
        row = {"name": same[0]["name"]}
        for name in figures_of(same[0]):
            row[name] = pooled([own[name] for own in same if name in own])
        rows.append(row)
    return rows


# ---------------------------------------------------------------------------------- the command


def by_scale(runs):
    """{times the usual number of rooms: {seed: ladder}}."""
    scales = defaultdict(dict)
    for run in runs:
        config = read_ladder(run)
        other = scales[config["scenes"] / ROOMS_MADE].setdefault(config["seed"], run)
        if other != run:
            raise UserError(f"{run}: has the seed of {other}; give one ladder for each seed")
    return scales


def draw(scores, ways, probes):
    """{name: SVG} of the ladder, of the ablations and of each probe."""
    charts = {"ladder": join([dots(line, scores[line]) for line in (BOXES, QUESTIONS)])}
    if ways:
        rows = []
        for row in ways:
            rows.append((row["name"], row["value"], row["low"], row["high"], row["paper"]))
        charts["ways"] = dots("points beside the ladder's rung of the same stage", rows)
    for what, rows in probes.items():
        charts[what] = chart(what, rows)
    return charts


def main():
    parser = Parser(__doc__)
    parser.add_argument("runs", nargs="+", help="folders of finished ladders")
    parser.add_argument("--figures", type=Path, help="folder to write charts to")
    args = parser.parse_args()
    others = by_scale(args.runs)
    usual = next(iter(others))  # the first folder's
    ladders = others.pop(usual)

    rungs = {}
    for rung in RUNGS:
        answers = read_rung(ladders, rung.name)
        if answers:
            rungs[rung.name] = answers
    if not rungs:
        names = ", ".join(ladders.values())
        raise UserError(f"{names}: there is no rung that all of them have evaluated")
    scores = scores_of(rungs)
    steps = compared(ladders, [(rung.name, rung.name, ladders, rung.start) for rung in RUNGS[1:]])
    ways = compared(ladders, other_ways(ladders, others))
    probes = {}
    for what in PANELS:
        paths = [Path(run) / "probes" / f"{what}.json" for run in ladders.values()]
        if all(path.is_file() for path in paths):
            probes[what] = together(paths)

    print(f"Ladders: {len(ladders)}, rooms x{usual:g}\n\n{score_table(rungs, scores)}")
    print(f"\n{gain_table(rungs)}")
    print(f"\n{change_table(steps + ways)}")
    thoughts = chain_table(ladders)
    if thoughts:
        print(f"\n{thoughts}")
    for what, rows in probes.items():
        print(f"\n{what}\n{table(rows)}")
    if args.figures:
        with writing(args.figures):
            args.figures.mkdir(parents=True, exist_ok=True)
        for name, svg in draw(scores, ways, probes).items():
            write_text(args.figures / f"{name}.svg", svg)


if __name__ == "__main__":
    main_guard(main)
