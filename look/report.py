"""Write RUN/report.html: one page of what a run of the ladder learned, and signs of trouble.

    python -m look.report runs/tiny

The page stands alone: pictures and charts are in it, nothing is fetched. It can be made at any
time; what the run has not written yet is left out.
"""

import math
import re
from html import escape
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from files import UserError, read_json, read_jsonl, write_text
from ladder import RUNGS
from look import chains
from look.charts import boxed, curve, data_uri, dots, page
from look.signs import signs
from runtime import main_guard
from settings import Parser

CURVES = {  # key of log.jsonl -> title, unit
    "loss": ("loss", "nats per token"),
    "reward": ("reward", "sum of its parts"),
    "rewards/accuracy/mean": ("accuracy reward", "mean, 0 to 1"),
    "rewards/format/mean": ("format reward", "mean, 0 to 1"),
    "eval_rewards/accuracy/mean": ("held-out accuracy", "greedy, 0 to 1"),
    "frac_reward_zero_std": ("groups of equal rewards", "share; they teach nothing"),
    "kl": ("KL to the reference", "nats per token"),
    "entropy": ("entropy", "nats per token"),
    "completions/mean_length": ("length of completions", "tokens"),
    "completions/clipped_ratio": ("truncated completions", "share"),
    "grad_norm": ("gradient norm", "before clipping"),
}
LEADS = {  # heading -> what is seen below it
    "The ladder": "Dots: scores with 95% intervals. Rings: answers given without a look at the "
    "picture. What a rung has learned to see is what it scores above them.",
    "Signs of trouble": "What often goes wrong, and whether it did.",
    "Curves": "Over optimizer steps. Dots are single steps, the line is their running mean; a "
    "dot on the edge of a frame lies beyond it.",
    "Boxes through the rungs": "Pictures evenly spaced through the test set. Yellow: the true "
    "boxes. Pink and dashed: those of the rung.",
    "Answers through the rungs": "The middle test question of each type, with each rung's score.",
    "Sampled groups": "Groups of completions, evenly through GRPO. A completion that earns more "
    "than the mean of its group has a positive advantage and becomes more likely.",
}
CHAIN_COLUMNS = (
    "asked: the share of chains of thought that state facts of just the things that the question "
    "needs. whole: the share in which every step follows from the words before it. places: the "
    "share of stated places that are true within half a meter."
)
VERDICTS = {True: "TROUBLE", False: "ok", None: "unknown"}
FEW_STEPS = 10  # a run without a longer stage has trained nothing, and shows no sign of trouble
PICTURES, FRAMES, GROUPS, CHARACTERS = 5, 8, 4, 500  # rows, views of a row, groups, text: at most


# ---------------------------------------------------------------------------------- reading


def rows_of(path):
    """The rows of a JSON-lines file; none if there is no file yet."""
    return [row for _, row in read_jsonl(path)] if path.exists() else []


def spread(items, count):
    """At most `count` items, evenly from the first on: nothing is picked by how well it went.

    >>> spread("abcde", 3)
    'ace'
    """
    step = math.ceil(len(items) / count)
    return items[:: max(1, step)]


# ---------------------------------------------------------------------------------- pieces


def picture(path):
    """A picture as a data URI; what cannot be opened, such as a video, is a grey card."""
    try:
        return data_uri(Image.open(path))
    except OSError:
        grey = Image.new("RGB", (224, 224), "#777")
        ImageDraw.Draw(grey).multiline_text((8, 98), f"not shown:\n{Path(path).name}")
        return data_uri(grey)


def paragraph(text):
    """Text from data, escaped and cut to CHARACTERS; line breaks stay."""
    shown = escape(text[:CHARACTERS])
    if len(text) > CHARACTERS:
        shown += f" … ({len(text) - CHARACTERS} more characters)"
    return f'<p class="text">{shown}</p>'


def prompt_of(row):
    """What was said up to the answer, without the chat format's special tokens."""
    return re.sub(r"<\|[^|<>]*\|>", "", row["prompt"]).strip()


def card(title, row, answers):
    """A question with its pictures and true answer. answers: [(good, heading, completion)]."""
    question = paragraph(prompt_of(row))
    views = "".join(f'<img src="{picture(path)}" alt="">' for path in spread(row["images"], FRAMES))
    items = ""
    for good, heading, text in answers:
        kind = "good" if good else "bad"
        items += f'<li><b class="{kind}">{escape(heading)}</b>{paragraph(text)}</li>'
    return (
        f'<div class="card"><h3>{escape(title)}</h3><div class="row views">{views}</div>'
        f"{question}<p>True answer: <b>{escape(str(row['answer']))}</b></p>"
        f"<ul>{items}</ul></div>"
    )


# ---------------------------------------------------------------------------------- sections


def parts(scores):
    """What a scores.json has figures of: title -> {"score", "blind", "low", "high", "n"}."""
    found = {"all questions": scores | {"score": scores["overall"]}}
    if "localization" in scores:
        found["localization (IoU)"] = scores["localization"]
    return found | scores["types"] | {"well-formed answers": {"score": scores["well_formed"]}}


def staircase(rungs):
    """A chart of each score, with a row for each rung of results.json."""
    charts = {}
    for rung in rungs:
        for title, part in parts(rung["scores"]).items():
            row = [part.get(name) for name in ("score", "low", "high", "blind")]
            charts.setdefault(title, []).append((rung["name"], *row))
    return "".join(dots(title, rows) for title, rows in charts.items())


def lessons(rungs):
    """What each rung teaches, and how long it took."""
    what = {rung.name: rung.what for rung in RUNGS}
    items = ""
    for rung in rungs:
        lesson = what.get(rung["name"], "another way up")
        items += f"<li><b>{escape(rung['name'])}</b> {lesson} "
        items += f"<small>({escape(rung['style'])} answers, {rung['seconds']:.0f} s)</small></li>"
    return f"<ul>{items}</ul>"


def curves(logs):
    """A chart of each key that the trainers logged, with a line for each stage."""
    charts = ""
    for key, (title, unit) in CURVES.items():
        lines = {}
        for name, rows in logs.items():
            points = [(row["step"], row[key]) for row in rows if row.get(key) is not None]
            # The loss of GRPO is about zero whatever it learns.
            if points and not (key == "loss" and "reward" in rows[0]):
                lines[name] = points
        if lines:
            charts += curve(title, lines, unit)
    return charts


def gallery(questions):
    """Pictures evenly through the test set, with the boxes of each rung.

    Args: questions: for each the list of (rung, row of predictions.jsonl).
    """
    body = ""
    for answers in spread(questions, PICTURES):
        uri = picture(answers[0][1]["images"][0])
        figures = ""
        for name, row in answers:
            boxes = {"true": row["answer"], "seen": row["prediction"] or ()}
            figures += boxed(uri, row["size"], boxes, f"{name}: IoU {row['score']:.2f}")
        body += f'<div class="row">{figures}</div>'
    return body


def conversations(types):
    """The middle question of each type, with what each rung answers."""
    cards = ""
    for title, questions in types.items():
        answers = [*questions.values()][len(questions) // 2]
        lines = []
        for name, row in answers:
            lines.append((row["score"] > 0, f"{name}: {row['score']:.2f}", row["completion"]))
        cards += card(title, answers[0][1], lines)
    return cards


def chains_of_thought(run):
    """A table of the rungs that think, where their chains can be checked."""
    rungs = {name: groups["all"] for name, groups in chains.judge_ladder(run).items()}
    if not rungs:
        return ""
    return f"<p>{CHAIN_COLUMNS}</p><pre>{chains.table('', rungs, chains.FEW_SHARES)}</pre>"


def groups(rows):
    """Groups of completions, each from the highest advantage down."""
    cards = ""
    for row in spread(rows, GROUPS):
        lines = []
        for place in np.argsort(row["advantages"])[::-1]:
            gain = row["advantages"][place]
            rewards = [f"{name} {values[place]:.2f}" for name, values in row["rewards"].items()]
            heading = f"advantage {gain:+.2f} ({', '.join(rewards)})"
            lines.append((gain > 0, heading, row["completions"][place]))
        cards += card(f"step {row['step']}, {row['question_type']}", row, lines)
    return cards


def probes(folder):
    """The charts and pictures that look.probes left."""
    body = ""
    for chart in sorted(folder.glob("*.svg")):
        body += f'<h3>{chart.stem}</h3><div class="across">{chart.read_text("utf-8")}</div>'
        for path in sorted((folder / chart.stem).glob("*.png")):
            body += f'<figure><img src="{picture(path)}" alt=""><figcaption>{escape(path.stem)}'
            body += "</figcaption></figure>"
    return body


# ---------------------------------------------------------------------------------- the page


def through_the_rungs(answers):
    """{question type: {where: [(rung, row), ...]}}: each question with the answer of each rung."""
    types = {}
    for name, rows in answers.items():
        for row in rows:
            questions = types.setdefault(row["question_type"], {})
            questions.setdefault(row["where"], []).append((name, row))
    return types


def report(run):
    """Write the page from what the run has so far. Returns the signs of trouble as lines."""
    if not run.is_dir():
        raise UserError(f"{run}: no such directory; expected the --out of ladder.py")
    names = [rung.name for rung in RUNGS]
    answers = {name: rows_of(run / "eval" / name / "predictions.jsonl") for name in names}
    logs = {name: rows_of(run / name / "log.jsonl") for name in names}
    results = run / "results.json"
    rungs = read_json(results)["rungs"] if results.is_file() else []

    troubles = ["Hardly a step was trained: this page shows that everything works, and no more."]
    if max(map(len, logs.values())) >= FEW_STEPS:
        troubles = []
        for name, (bad, said) in signs(run, answers, logs):
            troubles.append(f"{VERDICTS[bad]:<8}{name}: {said}")
    types = through_the_rungs(answers)
    located = types.pop("localization", {})
    ladder = lessons(rungs) + f'<div class="row">{staircase(rungs)}</div>' if rungs else ""
    sections = {
        "The ladder": ladder,
        "Signs of trouble": "".join(f"<li>{escape(line)}</li>" for line in troubles),
        "Curves": curves(logs),
        "Boxes through the rungs": gallery([*located.values()]),
        "Answers through the rungs": chains_of_thought(run) + conversations(types),
        "Sampled groups": groups(rows_of(run / "grpo" / "rollouts.jsonl")),
        "Probes": probes(run / "probes"),
    }
    body = ""
    for heading, content in sections.items():
        lead = LEADS.get(heading, "") if content else "Nothing yet."
        body += f'<h2>{heading}</h2><p class="soft">{lead}</p>{content}'
    write_text(run / "report.html", page("A run of the ladder", body))
    return troubles


def main():
    parser = Parser(__doc__)
    parser.add_argument("run", type=Path, help="directory that ladder.py wrote, such as runs/tiny")
    run = parser.parse_args().run
    print(*report(run), run / "report.html", sep="\n")


if __name__ == "__main__":
    main_guard(main)
