"""Score answers: six benchmarks and our own rows, each by its scorer, beside baselines and the paper's numbers.

    read_bench -> completions -> score_rows (a matcher) -> add_baselines -> summarize (an aggregate) -> table

The scorers of BENCHES are to the bit those of the authors (github ZJU-REAL/SpatialLadder, eval_spld: "spatialladder")
or of the benchmark's makers ("official"), quirks included. Where theirs would crash (a truth of 0, a text that is no
number), an answer earns 0; errors relative to a negative truth, which theirs call right, are relative to its size.
"""

import re
from collections import Counter, defaultdict
from dataclasses import dataclass, field, replace
from functools import cache, partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np

from data import Media, Sample
from files import UserError, read_json
from rewards import (
    MRA_CONFIDENCES,
    accuracy_reward,
    box_iou,
    extract_answer,
    format_reward,
    localization_scores,
    mean_relative_accuracy,
    parse_boxes,
    parse_choice,
)

NO_ANSWER = "None"  # what the authors score where an <answer> is not closed
WORDS = dict(
    zip(
        [
            "one",
            "two",
            "three",
            "four",
            "five",
            "six",
            "seven",
            "eight",
            "nine",
            "ten",
            "eleven",
            "twelve",
            "thirteen",
            "fourteen",
            "fifteen",
            "sixteen",
            "seventeen",
            "eighteen",
            "nineteen",
            "twenty",
            "thirty",
            "forty",
            "fifty",
            "sixty",
            "seventy",
            "eighty",
            "ninety",
            "zero",
            "a",
            "an",
        ],
        [*range(1, 21), *range(30, 100, 10), 0, 1, 1],
    )
)  # tried in this order
LETTER, BRACKETED = (
    re.compile(r"([A-D])\.?"),
    re.compile(r"[(\[{]?([A-D])[)\]}]?\.?", re.IGNORECASE),
)
OPTION_LINE = re.compile(r"^[A-Z]\..*", re.MULTILINE)
AXES = [
    ("move_right", "move_left"),
    ("move_up", "move_down"),
    ("move_forward", "move_backward"),
    ("rotate_right", "rotate_left"),
    ("rotate_up", "rotate_down"),
]  # of a view change, the positive direction first
VSI_LEVELS = [f"object_rel_direction_{level}" for level in ("easy", "medium", "hard")]
# Groups of question types that means are given for: name -> pattern
VSI = {
    "NQ": "counting|abs_distance|size_estimation",
    "MCQ": "rel_di|route_planning|appearance_order",
}
SPAR = {
    "Low": "_prediction_",
    "Middle": "view_change|matching|camera_motion",
    "High": "spatial|distance_infer",
}
VIEWS = {
    "camera": "Camera",
    "person": "Person",
    "scannet": "Camera.*Relative|Scene",
    "coco": "Object|Person.*- Rel",
}


# ---------------------------------------------------------------------------- matchers: (answer text, row) -> score
def benchmark_answer(completion, thinking):
    """What a benchmark's scorer sees: of a thinking model the FIRST <answer> (the reward takes the last).

    >>> [benchmark_answer(text, True) for text in ("<answer>C</answer><answer>A</answer>", "<answer>4", "4")]
    ['C', 'None', '4']
    """
    if not thinking or "<answer>" not in completion:
        return completion
    match = re.search(r"<answer>(.*?)</answer>", completion, re.DOTALL)
    return match[1].strip() if match else NO_ANSWER


def letter(text, pattern=LETTER):
    """The option letter if the first space-separated token is one ("B. chair" -> "B"), else the whole text."""
    match = pattern.fullmatch(text.split(" ")[0].strip())
    return match[1].upper() if match else text.strip()


def first_number(text):
    """A number word (or "a") anywhere goes before the first digits; signs are dropped.

    >>> first_number("a 3.5 m gap"), first_number("-3.5 m"), first_number("no idea")
    ('1', '3.5', 'None')
    """
    text = text.strip().lower()
    words = [str(value) for word, value in WORDS.items() if re.search(rf"\b{word}\b", text)]
    return [*words, *re.findall(r"\d+(?:\.\d+)?", text), NO_ANSWER][0]


def number_score(number, truth, absolute_at_zero=False):
    """Mean relative accuracy of two texts; 0 if one is no number."""
    try:
        number, truth = float(number), float(truth)
    except ValueError:
        return 0.0
    if truth == 0:  # SPAR-Bench takes the absolute error, VSI-Bench crashes
        return float(np.mean(abs(number) <= 1 - MRA_CONFIDENCES)) if absolute_at_zero else 0.0
    return mean_relative_accuracy(number, truth)


def vsi_match(text, row, official=False):
    """Numbers by mean relative accuracy, choices by letter; spatialladder looks for them, official reads one token."""
    token = text.split(" ")[0].rstrip(".").strip()  # all that the official scorer looks at
    if re.search(VSI["NQ"], row["question_type"]):
        return number_score(token if official else first_number(text), row["answer"])
    return float(
        (token if official else letter(text.replace("Answer:", ""))).lower()
        == row["answer"].lower()
    )


def spar_match(text, row):
    """Numbers: the first one, of several views the last. Choices: an empty text and all that begin with the letter are
    right. View changes: five signed axes, the error relative to the PREDICTION; an axis that neither names is right."""
    truth, kind = row["answer"], row["question_type"]
    if kind == "view_change_infer":
        try:
            moves = [
                {k: float(v) for k, v in (move.split(":") for move in side.split(","))}
                for side in (truth, text)
            ]
        except ValueError:
            return 0.0
        pairs = ([move.get(plus, 0) - move.get(minus, 0) for move in moves] for plus, minus in AXES)
        return float(np.mean([number_score(*pair, absolute_at_zero=True) for pair in pairs]))
    if SPAR["Low"] in kind:
        numbers = re.findall(r"(?<!\^)\d+\.\d+|(?<!\^)\d+", text) or [NO_ANSWER]
        return number_score(
            numbers[-1 if kind.endswith("_mv") else 0], truth, absolute_at_zero=True
        )
    text, truth = text.lower(), truth.lower()
    return float(text in truth or text[0] == truth)


# ----------------------------------------------- aggregates: ({stratum: mean}, {stratum: count}) -> {name: mean}
# A mean is a float or an array of resampled means: the same lines give the headline and its interval.
def group_means(means, counts, groups={}, weighted=False):
    """Mean over all strata and over the groups (name -> pattern), weighted by counts or each alike; None of nothing."""

    def mean(names):
        weights = [counts[name] if weighted else 1 for name in names]
        return (
            sum(means[name] * w for name, w in zip(names, weights)) / sum(weights)
            if names
            else None
        )

    return {"overall": mean([*means])} | {
        g: mean([n for n in means if re.search(p, n)]) for g, p in groups.items()
    }


def vsi_means(means, counts, official=False):
    """Unweighted over types, the three direction levels being one. Without a level the direction is 0 and the levels
    before it are lost (spatialladder), or the level counts 0 (official): of no effect on a whole benchmark."""
    means = dict(means)
    if "object_rel_direction" not in means:
        levels = [level in means for level in VSI_LEVELS]
        found = [
            means.pop(level, 0.0)
            for n, level in enumerate(VSI_LEVELS)
            if official or all(levels[: n + 1])
        ]
        means["object_rel_direction"] = sum(found) / 3 if len(found) == 3 else 0.0
    return group_means(means, counts, VSI)


def cv_means(means, counts):
    """By picture source: 2D = mean of ADE20K and COCO, 3D = Omni3D, headline = mean of the parts there are."""
    parts = group_means(means, counts, {"2D": "ADE20K|COCO", "3D": "Omni3D"})
    return parts | group_means(
        {name: parts[name] for name in ("2D", "3D") if parts[name] is not None}, counts
    )


# --------------------------------------------------------------------------------------------------- benchmarks
@dataclass(frozen=True)
class Bench:
    scorers: dict  # name -> (matcher, aggregate)
    hub: str = ""  # the data set on the Hugging Face hub
    files: tuple = ()
    parse: object = None  # row of a file -> id, type, question, answer, options, [(kind, bytes or path in folder)]
    stratum: str = "question_type"  # what the aggregate takes means by
    split: str = ""  # a column by whose values the headline is given too
    extract: object = benchmark_answer  # (completion, thinking) -> answer text
    paper: dict = field(
        default_factory=dict
    )  # name -> % of (Qwen2.5-VL-3B, SpatialLadder-3B), arXiv 2510.08531


def vsi_row(row):  # VSI-Bench shows videos, SPBench pictures
    media = (
        [("image", f"{row['scene_name']}/{name}") for name in row["images"]]
        if "images" in row
        else [("video", f"{row['dataset']}/{row['scene_name']}.mp4")]
    )
    return (
        row["id"],
        row["question_type"],
        row["question"],
        row["ground_truth"],
        row["options"] or (),
        media,
    )


def spar_row(row):
    question = re.sub(
        r"\n+", "\n", OPTION_LINE.sub("", row["question"])
    ).strip()  # its options stand in the text
    if row["task"] in (
        "position_matching",
        "camera_motion_infer",
    ):  # said in the prompt by all who evaluate on it
        question += "\nPositions and boxes are on a scale of 0 to 1000 from the top left corner of the picture."
    return (
        row["id"],
        row["task"],
        question,
        row["answer"],
        OPTION_LINE.findall(row["question"]),
        [("image", image["bytes"]) for image in row["image"]],
    )


VSI_SCORER, VSI_MAKERS = (
    (vsi_match, vsi_means),
    (partial(vsi_match, official=True), partial(vsi_means, official=True)),
)
BENCHES = {
    "vsibench": Bench(
        {"spatialladder": VSI_SCORER, "official": VSI_MAKERS},
        "nyu-visionx/VSI-Bench",
        ("test-00000-of-00001.parquet",),
        vsi_row,
        paper={"overall": (29.4, 45.7), "NQ": (26.0, 50.8), "MCQ": (33.0, 40.5)},
    ),
    "spbench-si": Bench(
        {"spatialladder": VSI_SCORER},
        "hongxingli/SPBench",
        ("SPBench-SI.parquet",),
        vsi_row,
        paper={"overall": (40.3, 70.2), "NQ": (24.3, 58.6), "MCQ": (56.2, 81.8)},
    ),
    "spbench-mv": Bench(
        {"spatialladder": VSI_SCORER},
        "hongxingli/SPBench",
        ("SPBench-MV.parquet",),
        vsi_row,
        paper={"overall": (36.6, 70.9), "NQ": (25.6, 68.2), "MCQ": (53.2, 75.0)},
    ),
    "cvbench": Bench(
        {
            "spatialladder": (
                lambda text, row: float(
                    letter(text, BRACKETED) == letter(row["answer"], BRACKETED)
                ),
                cv_means,
            )
        },
        "nyu-visionx/CV-Bench",
        ("test_2d.parquet", "test_3d.parquet"),
        lambda row: (
            row["idx"],
            row["task"],
            row["question"],
            row["answer"],
            [f"({'ABCDEFGH'[n]}) {text}" for n, text in enumerate(row["choices"])],
            [("image", row["image"]["bytes"])],
        ),
        stratum="source",
        paper={"overall": (70.6, 73.7), "2D": (69.1, 72.4), "3D": (72.2, 74.9)},
    ),
    "sparbench": Bench(
        {
            "spatialladder": (spar_match, partial(group_means, groups=SPAR, weighted=True)),
            # its makers lose view_change_infer from Middle by a slip in parsing keys
            "official": (
                spar_match,
                partial(group_means, groups=SPAR | {"Middle": "matching|camera_motion"}),
            ),
        },
        "jasonzhango/SPAR-Bench",
        ("test-*.parquet",),
        spar_row,
        split="img_type",
        paper={
            "overall": (24.6, 34.4),
            "Low": (15.3, 25.8),
            "Middle": (26.4, 33.2),
            "High": (32.2, 42.6),
        },
    ),
    "viewspatial": Bench(
        {
            "spatialladder": (
                lambda text, row: float(letter(text) == row["answer"][0]),
                partial(group_means, groups=VIEWS, weighted=True),
            )
        },
        "lidingm/ViewSpatial-Bench",
        ("ViewSpatial-Bench.json",),
        lambda row: (
            row["id"],
            row["question_type"],
            row["question"],
            row["answer"],
            row["choices"].split("\n"),
            [("image", path.removeprefix("ViewSpatial-Bench/")) for path in row["image_path"]],
        ),
        paper={"overall": (35.6, 44.2), "camera": (39.5, 39.6), "person": (32.0, 48.5)},
    ),
}
OURS = Bench(  # our own rows: by the training reward, unweighted over types
    {
        "spatialladder": (
            lambda text, row: accuracy_reward([text], SimpleNamespace(**row))[0],
            group_means,
        )
    },
    extract=lambda completion, thinking: extract_answer(completion, completion),
)


def read_bench(name, folder):
    """Read a benchmark as distributed, its archives unpacked in `folder` or one folder deeper; nothing is decoded.

    Returns: [Sample], [what the aggregate needs of its row besides]. Raises: UserError for anything missing."""
    bench, folder, samples, extras = BENCHES[name], Path(folder), [], []

    @cache
    def look(pattern):  # many rows show the same picture
        return next(
            filter(None, (sorted(folder.glob(depth + pattern)) for depth in ("", "*/"))), None
        )

    def find(pattern, where):
        if look(pattern) is None:
            raise UserError(
                f"{where}: no {pattern} in {folder}; it comes with {bench.hub} on the Hugging Face hub"
            )
        return look(pattern)

    for path in (path for pattern in bench.files for path in find(pattern, name)):
        for where, row in ((f"{path}:{n}", row) for n, row in enumerate(read_table(path), 1)):
            try:
                row_id, kind, question, answer, options, parts = bench.parse(row)
                extras.append({key: row[key] for key in (bench.stratum, bench.split) if key in row})
            except KeyError as error:
                raise UserError(f"{where}: no column {error}, found {', '.join(row)}") from None
            media = tuple(
                Media(part, source if isinstance(source, bytes) else str(find(source, where)[0]))
                for part, source in parts
            )
            samples.append(
                Sample(where, str(row_id), question, kind, str(answer), tuple(options), media)
            )
    return samples, extras


def read_table(path):
    """The rows of a parquet file or of a JSON list, as dicts; those of the list get their number as id."""
    if path.suffix == ".json":
        return [{"id": n} | row for n, row in enumerate(read_json(path), 1)]
    try:
        from pyarrow import parquet

        return [
            row
            for batch in parquet.ParquetFile(path).iter_batches(1024)
            for row in batch.to_pylist()
        ]
    except ImportError:
        raise UserError(f"{path}: reading parquet needs pyarrow (pip install pyarrow)") from None
    except (OSError, ValueError) as error:
        raise UserError(
            f"{path}: not a readable parquet file ({str(error).splitlines()[0]})"
        ) from None


# ---------------------------------------------------------------------------------------------- scores and baselines
def blind_baseline(train, samples, match=OURS.scorers["spatialladder"][0]):
    """The answers that do best on the training answers to the same question, or to its type if the question is new.

    Choices: the offered option whose text was right most often. Others: the training answer that `match` scores highest
    against them all. Returns: a letter or text per sample; of a new type the first option or NO_ANSWER."""
    seen = defaultdict(
        Counter
    )  # (question or "" for any, question type) -> how often each answer was right
    for s in train:
        right = [
            option.split(" ", 1)[-1]
            for option in s.options
            if parse_choice(option) == parse_choice(s.answer)
        ]
        for key in ((s.question, s.question_type), ("", s.question_type)):
            seen[key][right[0] if right else s.answer] += 1

    @cache
    def guess(key, options):
        if options:
            return parse_choice(
                max(options, key=lambda option: seen[key][option.split(" ", 1)[-1]])
            )
        return max(
            seen[key],
            default=NO_ANSWER,
            key=lambda answer: sum(
                times * match(answer, {"question_type": key[1], "answer": truth})
                for truth, times in seen[key].items()
            ),
        )

    keys = ([(s.question, s.question_type), ("", s.question_type)] for s in samples)
    return [
        guess(own if own in seen else of_type, s.options)
        for (own, of_type), s in zip(keys, samples)
    ]


def add_baselines(rows, samples, match, train=()):
    """Rows with the scores of answers given without the pictures: "chance" is 1 / options, "frequent" blind_baseline
    from the true answers by type only, "blind" that from the training samples; for localization the mean training box
    under each true label, in pixels of the files (it means something where all pictures have one size)."""
    boxes = [box["bbox_2d"] for s in train if s.question_type == "localization" for box in s.answer]
    train = [s for s in train if s.question_type != "localization" and not s.messages]
    mean = np.mean(boxes, axis=0) if boxes else None
    typed = [replace(s, question="") for s in samples if s.question_type != "localization"]
    for row, s, blind, frequent in zip(
        rows,
        samples,
        blind_baseline(train, samples, match),
        blind_baseline(typed, samples, match),
        strict=True,
    ):
        if s.question_type != "localization":
            yield row | {
                "chance": 1 / len(s.options) if s.options else None,
                "frequent": match(frequent, row),
                "blind": match(blind, row) if train else None,
            }
        else:
            yield row | {
                "blind": float(np.mean([box_iou(mean, b["bbox_2d"]) for b in s.answer]))
                if boxes
                else None
            }


def score_rows(rows, bench, scorer="spatialladder", thinking=True):
    """Rows of completions with "prediction" (the answer's text; localization: boxes, None if invalid) and "score"."""
    for row in rows:
        text = bench.extract(row["completion"], thinking)
        yield row | {
            "prediction": parse_boxes(text) if row["question_type"] == "localization" else text,
            "score": bench.scorers[scorer][0](text, row),
        }


def bootstrap_interval(scores, seed=0, aggregate=group_means):
    """95% interval of the mean of scores, or of the headline of {stratum: scores}, resampled within strata."""
    strata, draw = (
        scores if isinstance(scores, dict) else {"": scores},
        np.random.default_rng(seed).integers,
    )
    means = {
        name: np.asarray(s, float)[draw(0, len(s), (1000, len(s)))].mean(1)
        for name, s in strata.items()
    }
    headline = aggregate(means, {name: len(s) for name, s in strata.items()})["overall"]
    return tuple(np.percentile(headline, (2.5, 97.5)).tolist())


def summarize(rows, bench, scorer="spatialladder", seed=0):
    """scores.json less its recipe, from rows of score_rows, with the baselines that add_baselines gave them."""

    def by(key, rows):
        return {
            value: [row for row in rows if row[key] == value]
            for value in sorted({row[key] for row in rows})
        }

    def measure(rows, key="question_type", aggregate=group_means):
        part = {"n": len(rows)}
        for name in ("blind", "frequent", "chance", "score"):
            values = {
                s: np.array([row.get(name) for row in rows], float)
                for s, rows in by(key, rows).items()
            }
            groups = aggregate(
                {s: float(v.mean()) for s, v in values.items()},
                {s: len(v) for s, v in values.items()},
            )
            part[name] = (
                None if np.isnan(groups["overall"]) else groups.pop("overall")
            )  # None became NaN
        low, high = bootstrap_interval(values, seed, aggregate)
        return part | {"low": low, "high": high} | ({"groups": groups} if groups else {})

    kinds, how = by("question_type", rows), (bench.stratum, bench.scorers[scorer][1])
    boxes = kinds.pop("localization", [])
    asked = [row for row in rows if row["question_type"] in kinds]
    scores = {"groups": {}} | measure(asked or boxes, *how)
    if bench.split:
        scores["groups"] |= {
            value: measure(part, *how)["score"] for value, part in by(bench.split, asked).items()
        }
    scores |= {
        "overall": scores.pop("score"),
        "types": {kind: measure(part) for kind, part in kinds.items()},
        "well_formed": float(np.mean(format_reward([row["completion"] for row in asked or boxes]))),
    }
    if boxes:
        found, box = (
            [localization_scores(row["prediction"], row["answer"]) for row in boxes],
            measure(boxes),
        )
        valid = 1 - [row["prediction"] for row in boxes].count(None) / len(boxes)
        scores["localization"] = (
            box
            | {"mean_iou": box["score"], "mean_box_iou": box["blind"], "valid_json": valid}
            | {
                name: float(np.mean([one[name] for one in found]))
                for name in ("precision", "recall")
            }
        )
    return scores


def table(name, scores, bench, scorer="spatialladder"):
    """The scores as text, in %, beside the baselines and the paper's numbers; low and high are the 95% interval."""

    def line(title, *cells):
        cells = (
            "" if c is None else f"{100 * c:.1f}" if isinstance(c, float) else c for c in cells
        )
        return f"{title:<57}" + "".join(f"{cell:>9}" for cell in cells)

    keys = ("n", "score", "low", "high", "chance", "frequent", "blind")
    parts = {"overall": scores | {"score": scores["overall"]}} | {
        g: {"score": v} for g, v in scores["groups"].items()
    }
    parts |= scores["types"] | (
        {"localization (mean IoU)": scores["localization"]} if "localization" in scores else {}
    )
    lines = [
        line(
            f"{name}, {scorer} scorer" + ", our prompt" * (scorer == "official"),
            *keys,
            *(("paper 3B", "SpLadder") if bench.paper else ()),
        )
    ]
    lines += [
        line(title, *map(part.get, keys), *map(str, bench.paper.get(title, ())))
        for title, part in parts.items()
    ]
    if scores.get("truncated"):
        lines.append(
            f"{100 * scores['truncated']:.1f}% of the completions reached --max-completion-length."
        )
    if scores.get("skipped"):
        lines.append(f"{scores['skipped']} samples without a completion: they count as wrong.")
    if name in ("vsibench", "spbench-si", "spbench-mv"):
        lines.append(
            "The paper gives the 3B a mean of 38.8 over VSI-Bench and both SPBench; it should read 35.4."
        )
    return "\n".join(lines)
