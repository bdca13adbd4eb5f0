"""Six benchmarks and our own rows: how their files are read, how answers are scored, the headline.

    read_bench -> (a model answers) -> score_rows -> add_baselines -> summarize -> table

The scorers of BENCHES give to the bit what those of the paper's authors give ("spatialladder";
github ZJU-REAL/SpatialLadder, eval_spld) or those of the benchmark's makers ("official"), quirks
included. Where theirs would crash (a truth of 0, a text that is no number), an answer earns 0. For
a negative truth theirs call every answer right; here the error is relative to the truth's size.
"""

import json
import os
import re
from collections import Counter, defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from types import NoneType, SimpleNamespace
from typing import NamedTuple

import numpy as np

from data import Sample, are_texts, letters_of, located
from files import UserError, need, read_jsonl, reason, text_table
from pictures import Media
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
NAMES = (
    "one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen "
    "sixteen seventeen eighteen nineteen twenty thirty forty fifty sixty seventy eighty ninety "
    "zero a an"
)
# A text is searched for them in this order.
NUMBER_WORDS = dict(zip(NAMES.split(), [*range(1, 21), *range(30, 100, 10), 0, 1, 1]))
LETTER = re.compile(r"([A-D])\.?")
BRACKETED = re.compile(r"[(\[{]?([A-D])[)\]}]?\.?", re.IGNORECASE)
# All who evaluate on SPAR-Bench say this in the prompts about positions.
SPAR_SCALE = (
    "\nPositions and boxes are on a scale of 0 to 1000 from the top left corner of the picture."
)
OPTION_LINE = re.compile(r"^[A-Z]\..*", re.MULTILINE)
AXES = (  # of a view change, the positive direction first
    ("move_right", "move_left"),
    ("move_up", "move_down"),
    ("move_forward", "move_backward"),
    ("rotate_right", "rotate_left"),
    ("rotate_up", "rotate_down"),
)
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
CV = {"2D": "ADE20K|COCO", "3D": "Omni3D"}


# ---------------------------------------------------------------------------------- matchers
# (text of an answer, row with the true answer and its question_type) -> score from 0 to 1


def benchmark_answer(completion, thinking):
    """The text that a benchmark scores: of a chain of thought the FIRST <answer>.

    The training reward takes the last one.

    >>> chains = ("<answer>C</answer><answer>A</answer>", "<answer>4", "4")
    >>> [benchmark_answer(text, thinking=True) for text in chains]
    ['C', 'None', '4']
    """
    if not thinking or "<answer>" not in completion:
        return completion
    match = re.search(r"<answer>(.*?)</answer>", completion, re.DOTALL)
    return match[1].strip() if match else NO_ANSWER


def letter(text, pattern=LETTER):
    """The letter if the first space-separated token is one ("B. chair" -> "B"), else the text."""
    match = pattern.fullmatch(text.split(" ")[0].strip())
    return match[1].upper() if match else text.strip()


def first_number(text):
    """A number word anywhere (or "a") comes before the first digits; signs are dropped.

    >>> first_number("a 3.5 m gap"), first_number("-3.5 m"), first_number("no idea")
    ('1', '3.5', 'None')
    """
    text = text.lower()
    for word, value in NUMBER_WORDS.items():
        if re.search(rf"\b{word}\b", text):
            return str(value)
    digits = re.search(r"\d+(?:\.\d+)?", text)
    return digits[0] if digits else NO_ANSWER


def number_score(number, truth, absolute_at_zero=False):
    """Mean relative accuracy of two texts; 0 if one is no number.

    absolute_at_zero: what SPAR-Bench does where the truth is 0; VSI-Bench crashes.
    """
    try:
        number, truth = float(number), float(truth)
    except ValueError:
        return 0.0
    if truth != 0:
        return mean_relative_accuracy(number, truth)
    return float(absolute_at_zero and np.mean(abs(number) <= 1 - MRA_CONFIDENCES))


def vsi_score(number, choice, row):
    """The score of a number or of a choice, as the row's type asks."""
    if re.search(VSI["NQ"], row["question_type"]):
        return number_score(number, row["answer"])
    return float(choice.lower() == row["answer"].lower())


def vsi_match(text, row):
    """The authors' way: the first number anywhere, or the letter at the beginning."""
    return vsi_score(first_number(text), letter(text.replace("Answer:", "")), row)


def vsi_match_official(text, row):
    """The makers' way: the first token and nothing else."""
    token = text.split(" ")[0].rstrip(".").strip()
    return vsi_score(token, token, row)


def cv_match(text, row):
    """Letters in any case and any brackets."""
    return float(letter(text, BRACKETED) == letter(row["answer"], BRACKETED))


def view_match(text, row):
    """Capital letters; the true answer is a whole option, "A. right"."""
    return float(letter(text) == row["answer"][0])


def parse_moves(text):
    """The axes of a view change; ValueError if the text is anything else.

    >>> parse_moves("move_right:0.5,rotate_left:30")
    {'move_right': 0.5, 'rotate_left': 30.0}
    """
    moves = {}
    for part in text.split(","):
        name, number = part.split(":")
        moves[name] = float(number)
    return moves


def view_change_score(text, truth):
    """Mean over five signed axes. An axis that neither side names counts as right."""
    try:
        sides = [parse_moves(truth), parse_moves(text)]
    except ValueError:
        return 0.0
    scores = []
    for plus, minus in AXES:
        true, predicted = (side.get(plus, 0) - side.get(minus, 0) for side in sides)
        # Their arguments are the other way round: the error is relative to the PREDICTION.
        scores.append(number_score(true, predicted, absolute_at_zero=True))
    return float(np.mean(scores))


def spar_match(text, row):
    """Numbers: the first one, or of several views the last. Choices: by the first letter."""
    truth, kind = row["answer"], row["question_type"]
    if kind == "view_change_infer":
        return view_change_score(text, truth)
    if SPAR["Low"] in kind:
        numbers = re.findall(r"(?<!\^)\d+\.\d+|(?<!\^)\d+", text) or [NO_ANSWER]
        place = -1 if kind.endswith("_mv") else 0
        return number_score(numbers[place], truth, absolute_at_zero=True)
    text, truth = text.lower(), truth.lower()
    return float(text in truth or text[0] == truth)  # an empty text is in every truth


def our_match(text, row):
    """The training reward: training and evaluation agree on what is right."""
    return accuracy_reward([text], SimpleNamespace(**row))[0]


def our_answer(completion, thinking):
    """The last <answer>, or the whole text; as the training reward reads it."""
    return extract_answer(completion, completion)


# ---------------------------------------------------------------------------------- aggregates
# ({stratum: mean}, {stratum: count}) -> {"overall" or the name of a group: mean}
# A mean is a float, or an array of means of scores drawn anew: the same lines give the headline
# and its interval.


def group_means(means, counts, groups=None, weighted=False):
    """Means over all strata and over groups of them (name -> pattern); None of no strata.

    weighted: by the number of rows; else every stratum counts alike.
    """
    result = {}
    for group, pattern in {"overall": "", **(groups or {})}.items():
        names = [name for name in means if re.search(pattern, name)]
        weights = [counts[name] if weighted else 1 for name in names]
        total = sum(means[name] * weight for name, weight in zip(names, weights))
        result[group] = total / sum(weights) if names else None
    return result


def vsi_means(means, counts, official=False):
    """Unweighted over the question types; the three levels of direction count as one type.

    Of no effect on a whole benchmark: where a level is missing, the authors' direction is 0 and
    the levels before the gap are lost; the makers take 0 for the level.
    """
    means = dict(means)
    if "object_rel_direction" not in means:
        levels = []
        for level in VSI_LEVELS:
            if level not in means and not official:
                break
            levels.append(means.pop(level, 0.0))
        means["object_rel_direction"] = sum(levels) / 3 if len(levels) == 3 else 0.0
    return group_means(means, counts, VSI)


def vsi_means_official(means, counts):
    return vsi_means(means, counts, official=True)


def cv_means(means, counts):
    """By the source of the picture; the headline is the mean of 2D and 3D, of those there are."""
    parts = group_means(means, counts, CV)
    present = {name: parts[name] for name in CV if parts[name] is not None}
    return parts | group_means(present, counts)


def spar_means(means, counts):
    return group_means(means, counts, SPAR, weighted=True)


def spar_means_official(means, counts):
    """Its makers lose view_change_infer from Middle by a slip in parsing keys."""
    return group_means(means, counts, SPAR | {"Middle": "matching|camera_motion"})


def view_means(means, counts):
    return group_means(means, counts, VIEWS, weighted=True)


# ---------------------------------------------------------------------------------- rows of files
# (row of a file, find: path in the benchmark's folder -> path) -> question, options, media
# Id, question, type and answer of the row are checked before.


def value(row, key, *kinds):
    """The value of a column, which must be of one of the kinds, and no empty text."""
    found = row.get(key)
    if not isinstance(found, kinds) or found == "":
        names = " or ".join(kind.__name__ for kind in kinds)
        raise UserError(f"{key} is {found!r:.80}, expected {names}")
    return found


def texts(row, key):
    """The value of a column of one or more texts."""
    if not are_texts(value(row, key, list)) or not row[key]:
        raise UserError(f"{key} is {row[key]!r:.80}, expected a list of texts")
    return row[key]


def stored_picture(image):
    """A picture that stands in the table itself."""
    if not isinstance(image, dict) or not isinstance(image.get("bytes"), bytes):
        raise UserError(f"image is {image!r:.80}, expected the bytes of a file")
    return Media("image", image["bytes"])


def vsi_row(row, find):
    """VSI-Bench shows videos, SPBench pictures."""
    scene = value(row, "scene_name", str, int)
    if "images" in row:
        media = [Media("image", find(f"{scene}/{name}")) for name in texts(row, "images")]
    else:
        media = [Media("video", find(f"{value(row, 'dataset', str)}/{scene}.mp4"))]
    # A question for a number has null, or an empty list.
    options = texts(row, "options") if value(row, "options", list, NoneType) else ()
    return row["question"], options, media


def cv_row(row, find):
    options = [f"({name}) {text}" for name, text in zip("ABCDEFGH", texts(row, "choices"))]
    return row["question"], options, [stored_picture(value(row, "image", dict))]


def spar_row(row, find):
    """The options stand in the question's text and are taken out of it."""
    options = OPTION_LINE.findall(row["question"])
    question = re.sub(r"\n+", "\n", OPTION_LINE.sub("", row["question"])).strip()
    if row["task"] in ("position_matching", "camera_motion_infer"):
        question += SPAR_SCALE
    media = [stored_picture(image) for image in value(row, "image", list)]
    return question, options, media


def view_row(row, find):
    paths = [path.removeprefix("ViewSpatial-Bench/") for path in texts(row, "image_path")]
    media = [Media("image", find(path)) for path in paths]
    return row["question"], value(row, "choices", str).split("\n"), media


# ---------------------------------------------------------------------------------- the table


class Scorer(NamedTuple):
    """How an answer is scored and how scores become a headline."""

    match: Callable
    means: Callable


@dataclass(frozen=True)
class Bench:
    """A benchmark: its files, its rows, its scorers and what the paper reports."""

    scorers: dict  # name -> Scorer
    hub: str = ""  # the data set on the Hugging Face hub
    files: tuple = ()
    parse: Callable | None = None  # a row of a file; see vsi_row
    # of a row: its id, question, question type and answer
    columns: tuple = ("id", "question", "question_type", "answer")
    stratum: str = "question_type"  # what the aggregate takes means by
    extract: Callable = benchmark_answer  # (completion, thinking) -> text of the answer
    # name -> % of (Qwen2.5-VL-3B, SpatialLadder-3B), arXiv 2510.08531
    paper: dict = field(default_factory=dict)


# The paper gives the 3B a mean of 38.8 over VSI-Bench and both SPBench; of its own numbers below it
# is 35.4.
VSI_COLUMNS = ("id", "question", "question_type", "ground_truth")
VSI_SCORER = {"spatialladder": Scorer(vsi_match, vsi_means)}
BENCHES = {
    "vsibench": Bench(
        VSI_SCORER | {"official": Scorer(vsi_match_official, vsi_means_official)},
        "nyu-visionx/VSI-Bench",
        ("test-00000-of-00001.parquet",),
        vsi_row,
        VSI_COLUMNS,
        paper={"overall": (29.4, 45.7), "NQ": (26.0, 50.8), "MCQ": (33.0, 40.5)},
    ),
    "spbench-si": Bench(
        VSI_SCORER,
        "hongxingli/SPBench",
        ("SPBench-SI.parquet",),
        vsi_row,
        VSI_COLUMNS,
        paper={"overall": (40.3, 70.2), "NQ": (24.3, 58.6), "MCQ": (56.2, 81.8)},
    ),
    "spbench-mv": Bench(
        VSI_SCORER,
        "hongxingli/SPBench",
        ("SPBench-MV.parquet",),
        vsi_row,
        VSI_COLUMNS,
        paper={"overall": (36.6, 70.9), "NQ": (25.6, 68.2), "MCQ": (53.2, 75.0)},
    ),
    "cvbench": Bench(
        {"spatialladder": Scorer(cv_match, cv_means)},
        "nyu-visionx/CV-Bench",
        ("test_2d.parquet", "test_3d.parquet"),
        cv_row,
        ("idx", "question", "task", "answer"),
        stratum="source",
        paper={"overall": (70.6, 73.7), "2D": (69.1, 72.4), "3D": (72.2, 74.9)},
    ),
    "sparbench": Bench(
        {
            "spatialladder": Scorer(spar_match, spar_means),
            "official": Scorer(spar_match, spar_means_official),
        },
        "jasonzhango/SPAR-Bench",
        ("test-*.parquet",),
        spar_row,
        ("id", "question", "task", "answer"),
        paper={
            "overall": (24.6, 34.4),
            "Low": (15.3, 25.8),
            "Middle": (26.4, 33.2),
            "High": (32.2, 42.6),
        },
    ),
    "viewspatial": Bench(
        {"spatialladder": Scorer(view_match, view_means)},
        "lidingm/ViewSpatial-Bench",
        ("ViewSpatial-Bench.json",),
        view_row,
        paper={"overall": (35.6, 44.2), "camera": (39.5, 39.6), "person": (32.0, 48.5)},
    ),
}
OURS = Bench({"spatialladder": Scorer(our_match, group_means)}, extract=our_answer)


# ---------------------------------------------------------------------------------- reading

KINDS = ((str, int, float), (str,), (str,), (str, int, float))  # of the four columns of a Bench


def read_table(path):
    """The rows of a parquet file or of a JSON list, as dicts. A list's rows get numbers as ids."""
    rows = []
    if path.suffix == ".json":
        for number, (_, row) in enumerate(read_jsonl(path), 1):
            rows.append({"id": number} | row)
        return rows
    try:
        from pyarrow import parquet

        for batch in parquet.ParquetFile(path).iter_batches(1024):
            rows += batch.to_pylist()
    except ImportError:
        raise UserError(f"{path}: reading parquet needs pyarrow (pip install pyarrow)") from None
    except (OSError, ValueError, NotImplementedError) as error:
        raise UserError(f"{path}: not a readable parquet file ({reason(error)})") from None
    return rows


def read_bench(name, folder):
    """Read a benchmark as distributed, its archives unpacked in `folder` or one folder deeper.

    No picture is opened here.

    Returns: [Sample], [what the aggregate needs of its row besides].
    Raises:  UserError for anything missing.
    """
    bench, folder = BENCHES[name], Path(folder)
    folders = [folder, *sorted(folder.glob("*/"))]
    origin = f"it comes with {bench.hub} on the Hugging Face hub"

    @cache  # many rows show the same picture
    def find(path):
        for place in folders:
            if os.path.isfile(place / path):
                return str(place / path)
        raise UserError(f"{name}: no {path!r:.80} in {folder}; {origin}")

    tables = []
    for pattern in bench.files:
        paths = sorted(folder.glob(pattern)) or sorted(folder.glob(f"*/{pattern}"))
        if not paths:
            raise UserError(f"{name}: no {pattern} in {folder}; {origin}")
        tables += paths

    samples, extras = [], []
    for path in tables:
        for number, row in enumerate(read_table(path), 1):
            where = f"{path}:{number}"
            with located(where):
                pairs = zip(bench.columns, KINDS)
                row_id, _, kind, answer = [value(row, key, *kinds) for key, kinds in pairs]
                question, options, media = bench.parse(row, find)
                extra = {}
                if bench.stratum != "question_type":
                    extra[bench.stratum] = value(row, bench.stratum, str)
                if not media:
                    raise UserError("no picture in it")
            row_id, answer = str(row_id), str(answer)
            sample = Sample(where, row_id, question, kind, answer, tuple(options), tuple(media))
            samples.append(sample)
            extras.append(extra)
    if not samples:
        raise UserError(f"{folder}: no rows in {', '.join(bench.files)}")
    return samples, extras


# ---------------------------------------------------------------------------------- another engine


def given_answers(path, samples, benchmark):
    """Another engine's completions in the samples' order; a sample without one counts as wrong.

    Rows hold id, question_type and completion. If a row has an `answer` too, it must be the
    sample's: so ids that are counted in another way do not pass unnoticed. The answer of a
    localization row is its true boxes in the pixels that the engine saw, as in our own
    predictions.jsonl; without it the completion's boxes are taken as pixels of the file.

    Args:    benchmark: all of its samples, of which `samples` are scored.
    """
    truths = {(s.id, s.question_type): s.answer for s in benchmark}
    if len(truths) < len(benchmark):
        raise UserError(f"--predictions {path}: rows of the benchmark share id and question_type")
    given = {}
    for where, row in read_jsonl(path):
        with located(where):
            name = str(need(row, "id", str, int)), need(row, "question_type", str)
            about = f"id {name[0]!r:.80} of {name[1]!r:.80}"
            if name not in truths:
                raise UserError(f"{about} is not in the benchmark")
            if name in given:
                raise UserError(f"{about} stands twice")
            truth = truths[name]
            answer = truth if row.get("answer") is None else row["answer"]
            if name[1] == "localization":
                truth = parse_boxes(json.dumps(answer))
                if not truth:
                    raise UserError(f"answer is {answer!r:.80}, expected a list of boxes")
            elif str(answer) != truth:
                raise UserError(
                    f"answer is {answer!r:.80}, expected {truth!r:.80} as in the benchmark"
                )
            given[name] = {"answer": truth, "completion": need(row, "completion", str)}
    answers = []
    for sample in samples:
        name = sample.id, sample.question_type
        nothing = {"answer": sample.answer, "completion": ""}
        answers.append(given.get(name, nothing) | {"skipped": name not in given})
    return answers


# ---------------------------------------------------------------------------------- baselines


def option_text(option):
    """What stands behind an option's letter.

    >>> [option_text(option) for option in ("A. big bed", "(B) bed", "c) bed", "D bed", "A.bed")]
    ['big bed', 'bed', 'bed', 'bed', 'bed']
    """
    return re.sub(r"^[(\[]?[A-Za-z](?![A-Za-z0-9])[)\].:]*\s*", "", option.strip())


def chosen_text(answer, options):
    """The text of the option that an answer names, as letters are shuffled; else the answer.

    >>> chosen_text("B", ["A. left", "B. right"]), chosen_text("5.5", ())
    ('right', '5.5')
    """
    named = parse_choice(answer)
    for letter, option in zip(letters_of(options), options):
        if letter == named:
            return option_text(option)
    return answer


def blind_baseline(train, samples, match=our_match):
    """What one can answer without the picture, from the answers to questions of training.

    A question counts as seen if it stood in training word for word; else all of its type count.
    Choices: the option whose text was right most often. Others: the training answer that `match`
    scores highest against them all.

    Returns: a letter or text for each sample; of a new type the first option or NO_ANSWER.
    """
    # Counts, not lists: thousands of training rows share a few answers, and every answer is scored
    # against all the others.
    seen = defaultdict(Counter)  # (question or "" for any, type) -> how often each answer was right
    for sample in train:
        text = chosen_text(sample.answer, sample.options)
        for question in (sample.question, ""):
            seen[question, sample.question_type][text] += 1

    @cache
    def best_text(key):
        def score(answer):
            total = 0
            for truth, times in seen[key].items():
                total += times * match(answer, {"question_type": key[1], "answer": truth})
            return total

        return max(seen[key], key=score, default=NO_ANSWER)

    answers = []
    for sample in samples:
        key = (sample.question, sample.question_type)
        if key not in seen:
            key = ("", sample.question_type)
        if sample.options:
            times = {option: seen[key][option_text(option)] for option in sample.options}
            answers += letters_of([max(times, key=times.get)])
        else:
            answers.append(best_text(key))
    return answers


def add_baselines(rows, samples, match, train=()):
    """Add to each row what answers without the picture would score.

    "chance" is 1 / options. "blind" is the blind_baseline from training samples; for localization
    the mean training box under each true label, in pixels of the files (of meaning where all
    pictures have one size).

    Yields: rows; a baseline is None where there is nothing to take it from.
    """
    boxes = []
    for sample in train:
        if sample.question_type == "localization":
            boxes += [box["bbox_2d"] for box in sample.answer]
    mean_box = np.mean(boxes, axis=0) if boxes else None
    questions = [s for s in train if s.question_type != "localization" and not s.messages]
    guesses = blind_baseline(questions, samples, match)
    for row, sample, guess in zip(rows, samples, guesses, strict=True):
        blind = chance = None
        if sample.question_type == "localization":
            if boxes:
                overlaps = [box_iou(mean_box, box["bbox_2d"]) for box in sample.answer]
                blind = float(np.mean(overlaps))
        elif questions:
            blind = match(guess, row)
        if sample.options:
            chance = 1 / len(sample.options)
        yield row | {"chance": chance, "blind": blind}


# ---------------------------------------------------------------------------------- scores


def score_rows(rows, bench, scorer="spatialladder", thinking=True):
    """Yield rows with "prediction" (text of the answer; boxes, None if invalid) and "score"."""
    for row in rows:
        text = bench.extract(row["completion"], thinking)
        boxes = row["question_type"] == "localization"
        yield row | {
            "prediction": parse_boxes(text) if boxes else text,
            "score": bench.scorers[scorer].match(text, row),
        }


def bootstrap_interval(scores, seed=0, aggregate=group_means):
    """95% interval of a mean of scores, or of the headline of {stratum: scores}.

    Scores are drawn anew a thousand times, in each stratum as many as it has.
    """
    strata = scores if isinstance(scores, dict) else {"": scores}
    draw = np.random.default_rng(seed).integers
    means, counts = {}, {}
    for name, values in strata.items():
        # A thousand tables of n row numbers each, so a row may stand in one twice or not at all.
        n = counts[name] = len(values)
        means[name] = np.asarray(values, float)[draw(0, n, (1000, n))].mean(1)  # (1000,)
    low, high = np.percentile(aggregate(means, counts)["overall"], (2.5, 97.5)).tolist()
    return low, high


def rows_by(key, rows):
    """Value of a column -> its rows, values in order."""
    groups = defaultdict(list)
    for row in rows:
        groups[row[key]].append(row)
    return dict(sorted(groups.items()))


def measure(rows, seed, stratum="question_type", aggregate=group_means):
    """n, the means of the score and its baselines, the score's interval, and means of groups."""
    strata = rows_by(stratum, rows)
    counts = {name: len(group) for name, group in strata.items()}
    part = {"n": len(rows)}
    for column in ("blind", "chance", "score"):
        values, means = {}, {}
        # A row without a baseline makes its mean NaN: better no number than one over other
        # questions than the score's.
        for name, group in strata.items():
            values[name] = np.array([row.get(column) for row in group], float)  # None becomes NaN
            means[name] = float(values[name].mean())
        groups = aggregate(means, counts)
        overall = groups.pop("overall")
        part[column] = None if np.isnan(overall) else overall
    part["low"], part["high"] = bootstrap_interval(values, seed, aggregate)
    if groups:
        part["groups"] = groups
    return part


def measure_boxes(rows, seed):
    """The scores of localization rows: their score is the mean IoU."""
    part = measure(rows, seed)
    part["mean_iou"] = part["score"]
    part["valid_json"] = float(np.mean([row["prediction"] is not None for row in rows]))
    each = [localization_scores(row["prediction"], row["answer"]) for row in rows]
    for name in ("precision", "recall"):
        part[name] = float(np.mean([scores[name] for scores in each]))
    return part


def summarize(rows, bench, scorer="spatialladder", seed=0):
    """scores.json less its recipe, from the rows of score_rows and add_baselines.

    Boxes stand beside the headline, not in it, unless there is nothing else.
    """
    kinds = rows_by("question_type", rows)
    boxes = kinds.pop("localization", [])
    questions = [row for row in rows if row["question_type"] in kinds] or boxes
    how = bench.stratum, bench.scorers[scorer].means

    scores = {"groups": {}} | measure(questions, seed, *how)
    scores["overall"] = scores.pop("score")
    scores["types"] = {kind: measure(part, seed) for kind, part in kinds.items()}
    completions = [row["completion"] for row in questions]
    scores["well_formed"] = float(np.mean(format_reward(completions)))
    scores["truncated"] = sum(row.get("truncated", False) for row in rows) / len(rows)
    scores["skipped"] = sum(row.get("skipped", False) for row in rows)
    if boxes:
        scores["localization"] = measure_boxes(boxes, seed)
    return scores


def percent(value):
    """A cell of the table.

    >>> percent(0.25), percent(None), percent(12)
    ('25.0', '', '12')
    """
    if value is None:
        return ""
    return f"{100 * value:.1f}" if isinstance(value, float) else str(value)


def table(name, scores, bench, scorer="spatialladder"):
    """The scores as text, in %, beside the baselines and the paper's numbers."""
    parts = {"overall": scores | {"score": scores["overall"]}}
    for group, mean in scores["groups"].items():
        parts[group] = {"score": mean}
    parts |= scores["types"]
    if "localization" in scores:
        parts["localization (mean IoU)"] = scores["localization"]

    keys = ("n", "score", "low", "high", "chance", "blind")
    title = f"{name}, {scorer} scorer"
    if scorer == "official":
        title += ", our prompt"
    rows = [[title, *keys, "paper 3B", "SpLadder"]]
    for label, part in parts.items():
        cells = [percent(part.get(key)) for key in keys]
        rows.append([label, *cells, *bench.paper.get(label, ("", ""))])
    if not bench.paper:
        rows = [row[:-2] for row in rows]

    lines = [text_table(rows)]
    if scores["truncated"]:
        share = percent(scores["truncated"])
        lines.append(f"{share}% of the completions reached --max-completion-length.")
    if scores["skipped"]:
        lines.append(f"{scores['skipped']} samples without a completion: they count as wrong.")
    return "\n".join(lines)
