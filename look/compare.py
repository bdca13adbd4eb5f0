"""Lay ladders of several seeds beside one another: each rung's scores over all their questions, with 95% intervals.

    python ladder.py --seeds 3 --limit 500 --out runs/seeds      # climbs three ladders and ends with this
    python -m look.compare runs/seeds/0 runs/seeds/1 runs/seeds/2     # the tables alone, in Markdown
    python ladder.py --without stage1 stage2 --mixed --seeds 3 --out runs/ways      # and of other ways up
    python ladder.py --data-scale 1 2 --seeds 3 --out runs/rooms                    # and of more rooms
    for run in runs/seeds/*; do python -m look.probes all $run; done      # then the tables end with what was probed
    python -m look.compare runs/seeds/* --figures figures             # and as pictures: ladder.svg, ways.svg, a chart a probe

A gain is (score - blind) / (1 - blind): 0 is what the best answer per question text earns without the picture, 1 is all
right. Intervals are bootstraps over questions within their types; differences are paired by question. No interval says how far
other seeds would lie, only how far other questions would; for that each seed's own difference stands beside it.
"""

import argparse
import math
from pathlib import Path

import numpy as np

from benchmarks import bootstrap_interval
from files import UserError, parse_line, read_json, read_lines, writing
from ladder import EVERY_RUNG, RUNGS
from look.charts import bars, differences, save_chart
from look.probes import PANELS, figures_of, table
from rewards import CHOICE_TYPES, NUMBER_TYPES
from runtime import main_guard
from settings import Parser

PAPER_POINTS = {  # what the paper loses beside its whole ladder. After stages 1 and 2 it scores 43.9%, after stage 2 alone
    # 42.7%, after both shuffled together 40.7%.
    "cold": -2.1,
    "stage2-no1": -1.2,
    "grpo-no1": -1.8,
    "grpo-no2": -9.4,
    "grpo-films": -16.4,
    "stage2-mixed": -3.2,
    "grpo-bare": -0.8,
}
STEPS = [
    (
        "questions: mean over the types, and what a blind guess earns",
        ("score",),
        ("blind",),
    ),  # panels of charts.bars
    ("boxes: mean IoU of the objects asked about", ("boxes",), ("one box for all",)),
]
WAYS_TITLE = "other ways up, points beside the ladder's rung of the same stage"


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
            raise UserError(
                f"{path}: no such file; climb it with: python ladder.py --out {run} and the flags it was begun with"
            )
        for row in (parse_line(line, where) for where, line in read_lines(path)):
            if with_blind and row["blind"] is None:
                raise UserError(f"{path}: no blind baseline in it; evaluate with --blind-from")
            found.setdefault(row["question_type"], {})[seed, row["id"]] = row["score"], row["blind"]
    return found


def paired(after, before):
    """{type: differences of the questions that both hold} of two {type: {question: number}}."""
    return {
        kind: np.array(
            [value - before[kind][key] for key, value in questions.items() if key in before[kind]]
        )
        for kind, questions in after.items()
    }


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
        left = (
            1 - blind.mean() or math.nan
        )  # where a blind guess is all right, there is nothing to gain
        made[kind] = tuple(float(number / left) for number in ((score - blind).mean(), low, high))
    return made


def changes(after, before, types):
    """{type: paired differences in points}"""
    found = {
        kind: 100 * values
        for kind, values in paired(scores_of(after), scores_of(before)).items()
        if kind in types
    }
    if not all(map(len, found.values())):
        raise UserError(
            "nothing to compare: the ladders have no question of some type in common; give ladders of the same seeds"
        )
    return found


def change(after, before, types):
    """The mean over types of the differences, its interval, and the mean of each seed: {"value", "low", "high", "seeds"}."""

    def mean(found):
        return float(np.mean([values.mean() for values in found.values()]))

    def of_seed(seed):
        return {
            kind: {key: row for key, row in rows.items() if key[0] == seed}
            for kind, rows in after.items()
        }

    found = changes(after, before, types)
    low, high = bootstrap_interval(found)
    seeds, known = (
        dict.fromkeys(seed for seed, _ in after[types[0]]),
        {seed for seed, _ in before[types[0]]},
    )
    return {
        "value": mean(found),
        "low": low,
        "high": high,
        "seeds": [mean(changes(of_seed(seed), before, types)) for seed in seeds if seed in known],
    }


def points(difference):
    """Two cells of `change`."""
    return "{value:+.1f} [{low:+.1f}, {high:+.1f}] | ".format(**difference) + ", ".join(
        f"{seed:+.1f}" for seed in difference["seeds"]
    )


def mean_score(found, types):
    return np.mean([np.mean([score for score, _ in found[kind].values()]) for kind in types])


def evaluated(runs, rungs, which=all):
    """Names of the rungs that all of the ladders, or any, have answers of."""
    return [
        rung.name
        for rung in rungs
        if which((Path(run) / "eval" / rung.name / "predictions.jsonl").is_file() for run in runs)
    ]


def tables(runs):
    """Markdown: a line per rung; then a line per question type with each rung's gain."""
    names = evaluated(runs, RUNGS, any)
    found = {
        name: read_rung(runs, name, with_blind=True) for name in names or ["base"]
    }  # of none, it says what to run
    scores = {
        name: [read_json(Path(run) / "eval" / name / "scores.json") for run in runs]
        for name in names
    }
    types = [kind for kind in (*NUMBER_TYPES, *CHOICE_TYPES) if kind in found[names[0]]]
    starts = {rung.name: rung.start for rung in RUNGS}
    lines = [
        "| rung | box IoU | valid JSON | types above blind | mean gain | score | well formed | beside the rung before | "
        "each seed |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for name in names:
        gain = gains(found[name], types)
        boxes = np.mean([score for score, _ in found[name]["localization"].values()])
        valid, formed = (
            np.mean([get(one) for one in scores[name]])
            for get in (
                lambda one: one["localization"]["valid_json"],
                lambda one: one["well_formed"],
            )
        )
        before = (
            points(change(found[name], found[starts[name]], types))
            if starts[name] in found
            else " | "
        )
        above, mean = (
            sum(low > 0 for _, low, _ in gain.values()),
            np.mean([g for g, _, _ in gain.values()]),
        )
        lines.append(
            f"| {name} | {boxes:.3f} | {valid:.1%} | {above} of {len(types)} | {mean:+.3f} | "
            f"{mean_score(found[name], types):.3f} | {formed:.1%} | {before} |"
        )
    answering = [name for name in names if name not in ("base", "stage1")]  # who know no question
    lines += [
        "",
        f"| gain of | blind | {' | '.join(answering)} |",
        "|---|---|" + "---|" * len(answering),
    ]
    for kind in types:
        blind = np.mean([blind for _, blind in found[names[-1]][kind].values()])
        cells = [
            "{:+.2f} [{:+.2f}, {:+.2f}]".format(*gains(found[name], [kind])[kind])
            for name in answering
        ]
        lines.append(f"| {kind} | {blind:.2f} | {' | '.join(cells)} |")
    asked = sum(len(found[names[-1]][kind]) for kind in types) // len(types)
    return "\n".join([*lines, "", f"Ladders: {len(runs)}; questions of a type in all: {asked}."])


def other_ways(runs, others):
    """Rungs of other ways up, and the last rung of ladders with more or fewer rooms, beside the ladder's own of the same stage
    and seeds. others: {data scale: ladders}. -> [{"name", "score", "beside", "paper"} and what change returns]"""
    ladder = evaluated(runs, RUNGS)
    rungs = [
        (name, name, name.split("-")[0], runs)
        for name in evaluated(runs, EVERY_RUNG)
        if "-" in name
    ]
    rungs += [("cold (no GRPO)", "cold", "grpo", runs)] if "cold" in ladder else []
    rungs += [
        (f"{name}, rooms x{scale:g}", name, name, others[scale])
        for scale in others
        for name in evaluated(others[scale], RUNGS)[-1:]
    ]
    rows = []
    for label, name, partner, where in rungs:
        if partner in ladder:
            found, whole = read_rung(where, name), read_rung(runs, partner)
            types = [kind for kind in (*NUMBER_TYPES, *CHOICE_TYPES) if kind in found]
            rows.append(
                {
                    "name": label,
                    "score": mean_score(found, types),
                    "beside": partner,
                    "paper": PAPER_POINTS.get(name) if where is runs else None,
                }
                | change(found, whole, types)
            )
    return rows


def ways(rows):
    """Markdown of other_ways."""
    lines = [
        f"| {row['name']} | {row['score']:.3f} | {row['beside']} | {points(row)} | "
        + ("|" if row["paper"] is None else f"{row['paper']:+.1f} |")
        for row in rows
    ]
    heads = [
        "| another way up | score | beside | points | each seed | the paper's |",
        "|---|---|---|---|---|---|",
    ]
    return "\n".join(heads + lines)


def steps(rungs):
    """What STEPS draws of [{"name", "scores"}], the rungs of a results.json."""
    rows = []
    for rung in rungs:
        scores, boxes = rung["scores"], rung["scores"].get("localization", {})
        figures = {
            "score": (scores, "overall", "low", "high"),
            "blind": (scores, "blind"),
            "boxes": (boxes, "mean_iou", "low", "high"),
            "one box for all": (boxes, "mean_box_iou"),
        }
        rows.append(
            {"name": rung["name"]}
            | {
                name: {"value": where[value]} | {end: where[end] for end in ends if end in where}
                for name, (where, value, *ends) in figures.items()
                if where.get(value) is not None
            }
        )
    return rows


def pooled(figures):
    """A figure of several ladders as one. Their questions are independent, so the squares of how far an interval reaches
    below and above add up.

    >>> pooled([{"value": 0.0, "low": -3.0, "high": 6.0}, {"value": 1.0, "low": -3.0, "high": 9.0}])
    {'value': 0.5, 'low': -2.0, 'high': 5.5}
    """
    value = float(np.mean([figure["value"] for figure in figures]))
    if any("low" not in figure for figure in figures):
        return {"value": value}
    below, above = (
        math.hypot(*(figure[end] - figure["value"] for figure in figures)) / len(figures)
        for end in ("low", "high")
    )
    return {"value": value, "low": value - below, "high": value + above}


def together(ladders):
    """Rows of figures of several ladders as one: those that all of them have."""
    ladders = [{row["name"]: figures_of(row) for row in rows} for rows in ladders]
    return [
        {"name": name}
        | {
            key: pooled([ladder[name][key] for ladder in ladders])
            for key in row
            if all(key in ladder[name] for ladder in ladders)
        }
        for name, row in ladders[0].items()
        if all(name in ladder for ladder in ladders)
    ]


def probed(runs):
    """{probe: (questions, result as probes.table takes it)}: of all ladders as one, every probe that all have."""
    found = {}
    for what in PANELS:
        paths = [Path(run) / "probes" / f"{what}.json" for run in runs]
        if all(path.is_file() for path in paths):
            results = [read_json(path) for path in paths]
            asked = [
                {
                    key: value
                    for key, value in one["settings"].items()
                    if key not in ("data", "seed", "questions")
                }
                for one in results
            ]
            for path, settings in zip(paths, asked):
                if settings != asked[0]:
                    raise UserError(
                        f"{path}: probed with {settings}, expected {asked[0]} as in {paths[0]}"
                    )
            questions = sum(one["settings"]["questions"] for one in results)
            found[what] = (
                questions,
                {"rows": together([one["rows"] for one in results]), "paper": results[0]["paper"]},
            )
    return found


def drawn(runs, rows, probes):
    """{name: SVG} of the ladder, of other_ways and of what probed found."""
    rungs = [
        [
            {"name": name, "scores": read_json(Path(run) / "eval" / name / "scores.json")}
            for name in evaluated(runs, RUNGS)
        ]
        for run in runs
    ]
    made = {"ladder": bars(together([steps(ladder) for ladder in rungs]), {}, STEPS)}
    made |= {"ways": differences(rows, WAYS_TITLE)} if rows else {}
    return made | {
        what: bars(result["rows"], result["paper"], PANELS[what])
        for what, (_, result) in probes.items()
    }


def main():
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", help="directories of finished ladders")
    parser.add_argument("--figures", type=Path, help="folder to write charts to")
    args, scales = parser.parse_args(), {}  # {data scale: {seed: directory}}
    for run in args.runs:
        seeds, seed = (
            scales.setdefault(setting(run, "data_scale", [1])[0], {}),
            setting(run, "seed", run),
        )
        if seed in seeds:
            raise UserError(
                f"{run}: a ladder of the seed of {seeds[seed]}, expected one of each seed"
            )
        seeds[seed] = run
    scales = {scale: [*seeds.values()] for scale, seeds in scales.items()}
    usual = min(scales, key=lambda scale: (scale != 1, scale))
    ladders = scales.pop(usual)
    rungs, rows, probes = tables(ladders), other_ways(ladders, scales), probed(ladders)
    print(
        f"Ladders with rooms x{usual:g}:",
        rungs,
        *([ways(rows)] if rows else []),
        *(
            f"{what}: {questions} questions of {len(ladders)} ladders\n{table(result)}"
            for what, (questions, result) in probes.items()
        ),
        sep="\n\n",
    )
    if args.figures:
        with writing(args.figures, "charts"):
            args.figures.mkdir(parents=True, exist_ok=True)
            for name, svg in drawn(ladders, rows, probes).items():
                save_chart(svg, args.figures / f"{name}.svg")


if __name__ == "__main__":
    main_guard(main)
