"""Write RUN/report.html: one page that shows what a run of the ladder learned, and signs of trouble.

    python -m look.report runs/tiny

The page stands alone: pictures and charts are in it, nothing is fetched. It can be made at any time:
what the run has not written yet is left out. A line that cannot be read is an error that names it.
"""

import re
from html import escape
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from files import CONFIG, UserError, read_json, read_jsonl, write_text
from ladder import RUNGS
from look.charts import boxed, curve, data_uri, dots, embed, page
from look.signs import signs
from runtime import main_guard
from settings import Parser

SFT = {  # key of log.jsonl -> title and unit of its curve
    "loss": ("loss", "nats per token"),
    "grad_norm": ("gradient norm", "before clipping"),
    "learning_rate": ("learning rate", ""),
}
GRPO = {
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
NOTHING = '<p class="soft">Nothing yet.</p>'
VERDICTS = {True: "TROUBLE", False: "ok", None: "unknown"}
FEW_STEPS = 10  # a run with no stage longer than this has trained nothing
PICTURES, FRAMES, GROUPS, CHARACTERS = 5, 8, 2, 500  # rows, views of a row, groups, text: at most


# ---------------------------------------------------------------------------------- pieces


def rows_of(path, *keys):
    """The rows of a JSON-lines file, which must have these keys; none if there is no file yet."""
    if not path.exists():
        return []
    rows = []
    for where, row in read_jsonl(path):
        missing = [key for key in keys if key not in row]
        if missing:
            raise UserError(f"{where}: expected an object with {', '.join(missing)}")
        rows.append(row)
    return rows


def spread(items, count):
    """At most `count` items, evenly from first to last: nothing is picked by how well it went."""
    places = np.linspace(0, len(items) - 1, min(count, len(items)))
    return [items[place] for place in places.round().astype(int)]


def picture(path):
    """A picture as a data URI; what cannot be opened, such as a video, is a grey card."""
    try:
        return data_uri(Image.open(path))
    except OSError:
        card = Image.new("RGB", (224, 224), "#777")
        ImageDraw.Draw(card).multiline_text((8, 98), f"not shown:\n{Path(path).name}")
        return data_uri(card)


def paragraph(text):
    """Text from data, escaped and cut to CHARACTERS; line breaks stay."""
    rest = len(text) - CHARACTERS
    more = f" … ({rest} more characters)" if rest > 0 else ""
    return f'<p class="text">{escape(text[:CHARACTERS])}{more}</p>'


def card(title, row, lines):
    """A question with its pictures and true answer.

    lines: (good or bad, heading, completion) of each answer.
    """
    turn = row["prompt"].rsplit("<|im_start|>user", 1)[-1].split("<|im_end|>")[0]
    question = re.sub(r"<\|[^|<>]*\|>", "", turn).strip()  # without special tokens
    views = [
        f'<img width="112" src="{picture(path)}" alt="">' for path in spread(row["images"], FRAMES)
    ]
    items = [
        f'<li><b class="{kind}">{escape(heading)}</b>{paragraph(text)}</li>'
        for kind, heading, text in lines
    ]
    return (
        f'<div class="card"><h3>{escape(title)}</h3><div class="row">{"".join(views)}</div>'
        f"{paragraph(question)}<p>True answer: <b>{escape(str(row['answer']))}</b></p>"
        f"<ul>{''.join(items)}</ul></div>"
    )


# ---------------------------------------------------------------------------------- sections


def columns(scores):
    """What is shown of a scores.json: title -> {"score", "blind", "low", "high", "n"}."""
    shown = {"all questions": scores | {"score": scores["overall"]}}
    if "localization" in scores:
        shown["localization, mean IoU"] = scores["localization"]
    return shown | scores["types"]


def number(value):
    return "–" if value is None else f"{value:.3f}"


def table(rungs):
    """The rungs as rows, below what is scored without a look; bold: surely above that."""
    titles = columns(rungs[0]["scores"])
    head, blind = ["rung"], ["blind <small>answers without a look at the picture</small>"]
    for title, part in titles.items():
        head.append(f"{escape(title)} <small>n = {part.get('n')}</small>")
        blind.append(number(part.get("blind")))
    rows = [[*head, "well-formed", "seconds"], [*blind, "–", "–"]]
    what = {rung.name: rung.what for rung in RUNGS}
    for rung in rungs:
        name, scores = rung["name"], columns(rung["scores"])
        cells = [f"{escape(name)} <small>{escape(what.get(name, rung['style']))}</small>"]
        for title in titles:
            part = scores.get(title, {})
            cell, low, blind = number(part.get("score")), part.get("low"), part.get("blind")
            sure = None not in (low, blind) and low > blind
            cells.append(f"<b>{cell}</b>" if sure else cell)
        rows.append([*cells, number(rung["scores"]["well_formed"]), f"{rung['seconds']:.0f}"])
    lines = ["<tr><td>" + "</td><td>".join(row) + "</td></tr>" for row in rows]
    return f'<div class="across"><table>{"".join(lines)}</table></div>'


def staircase(rungs):
    """Two charts of what the rungs score, and the table of all of it."""
    if not rungs:
        return ""
    charts = ""
    for title in list(columns(rungs[0]["scores"]))[:2]:
        rows = []
        for rung in rungs:
            part = columns(rung["scores"]).get(title, {})
            rows.append((rung["name"], part.get("score"), part.get("low"), part.get("high")))
        charts += embed(dots(title, rows, {"blind": part.get("blind")}))
    return f'<div class="row">{charts}</div>{table(rungs)}'


def curves(logs):
    """Charts of what the trainers logged: one for each key, with a line for each stage."""
    body = ""
    for heading, keys in (("Supervised stages", SFT), ("GRPO", GRPO)):
        charts = ""
        for key, (title, unit) in keys.items():
            lines = {}
            for name, rows in logs.items():
                points = [(row["step"], row[key]) for row in rows if key in row]
                if points and ("reward" in rows[0]) == (keys is GRPO):
                    lines[name] = points
            if lines:
                charts += curve(title, lines, unit)
        if charts:
            body += f'<h3>{heading}</h3><div class="row">{charts}</div>'
    return body


def through_the_rungs(answers):
    """The same question through the rungs: (localization, others), lists of [(rung, row), ...]."""
    located, others = {}, {}
    for name, rows in answers.items():
        for row in rows:
            kind = located if row["question_type"] == "localization" else others
            kind.setdefault((row["question_type"], row["where"]), []).append((name, row))
    return [*located.values()], [*others.values()]


def gallery(questions):
    """Pictures evenly through the test set, with the boxes of each rung."""
    body = ""
    for answers in spread(questions, PICTURES):
        uri = picture(answers[0][1]["images"][0])
        figures = ""
        for name, row in answers:
            boxes = {"true": row["answer"], "seen": row["prediction"] or []}
            said = f"IoU {row['score']:.2f}" if row["prediction"] else "no boxes"
            figures += f"<figure>{boxed(uri, row['size'], boxes)}<figcaption>{escape(name)}: {said}"
            figures += "</figcaption></figure>"
        body += f'<div class="row">{figures}</div>'
    return body


def conversations(questions):
    """The middle question of each type, with what each rung answers."""
    types = {}
    for answers in questions:
        types.setdefault(answers[0][1]["question_type"], []).append(answers)
    cards = ""
    for name, those in types.items():
        answers = those[len(those) // 2]
        lines = []
        for rung, row in answers:
            kind = "good" if row["score"] > 0.99 else "bad" if row["score"] == 0 else "partly"
            lines.append((kind, f"{rung}: {row['score']:.2f}", row["completion"]))
        cards += card(name, answers[0][1], lines)
    return cards


def groups(rows):
    """The first and the last GROUPS of sampled completions, each from the highest advantage down."""
    cards = ""
    for row in rows[:GROUPS] + rows[max(GROUPS, len(rows) - GROUPS) :]:
        lines = []
        for place in np.argsort(row["advantages"], kind="stable")[::-1]:
            gain = row["advantages"][place]
            parts = [f"{name} {values[place]:.2f}" for name, values in row["rewards"].items()]
            heading = f"advantage {gain:+.2f} ({', '.join(parts)})"
            kind = "good" if gain > 0 else "bad"
            lines.append((kind, heading, row["completions"][place]))
        cards += card(f"step {row['step']}, {row['question_type']}", row, lines)
    return cards


def probes(folder):
    """The charts and pictures that look.probes left."""
    body = ""
    for chart in sorted(folder.glob("*.svg")):
        body += f"<h3>{escape(chart.stem)}</h3>{embed(chart.read_text(encoding='utf-8'))}"
        for path in sorted((folder / chart.stem).glob("*.png")):
            body += f'<figure><img src="{picture(path)}" alt="">'
            body += f"<figcaption>{escape(path.stem)}</figcaption></figure>"
    return body


# ---------------------------------------------------------------------------------- the page


def report(run):
    """Write the page from what the run has so far.

    Returns: (its path, the signs of trouble as lines of text).
    """
    if not run.is_dir():
        raise UserError(f"{run}: no such directory; expected the --out of ladder.py")
    settings, results = {}, {"rungs": []}
    if (run / CONFIG).exists():
        settings = read_json(run / CONFIG)
    if (run / "results.json").exists():
        results = read_json(run / "results.json")
    names = [rung.name for rung in RUNGS]
    ways = [rung["name"] for rung in results["rungs"] if rung["name"] not in names]
    keys = (
        "where",
        "question_type",
        "prompt",
        "completion",
        "prediction",
        "answer",
        "score",
        "images",
    )
    answers = {name: rows_of(run / "eval" / name / "predictions.jsonl", *keys) for name in names}
    logs = {name: rows_of(run / name / "log.jsonl", "step") for name in names}
    keys = (
        "step",
        "question_type",
        "prompt",
        "answer",
        "images",
        "completions",
        "rewards",
        "advantages",
    )
    sampled = rows_of(run / "grpo" / "rollouts.jsonl", *keys)
    located, others = through_the_rungs(answers)

    steps = max(map(len, logs.values()))
    said = [f"{VERDICTS[bad]:<8}{name}: {text}" for name, bad, text in signs(run, names + ways)]
    scores = staircase(results["rungs"])
    if steps < FEW_STEPS:
        said = []
        scores = f"<p>Nothing was trained: no stage has more than {steps} steps.</p>"
    missing = [name for name in names if not answers[name]]
    if missing:
        scores += f'<p class="soft">Not evaluated yet: {", ".join(missing)}.</p>'
    sections = {
        "The ladder": scores,
        "Signs of trouble": "".join(f"<p>{escape(line)}</p>" for line in said),
        "Curves": curves(logs),
        "Probes": probes(run / "probes"),
        "Boxes through the rungs": gallery(located),
        "Answers through the rungs": conversations(others),
        "Sampled groups": groups(sampled),
    }
    body = f'<p class="soft">{escape(", ".join(f"{k} {v}" for k, v in settings.items()))}</p>'
    for heading, content in sections.items():
        body += f"<section><h2>{heading}</h2>{content or NOTHING}</section>"
    write_text(run / "report.html", page("A run of the ladder", body))
    return run / "report.html", said


def main():
    parser = Parser(__doc__)
    parser.add_argument("run", type=Path, help="directory that ladder.py wrote, such as runs/tiny")
    path, said = report(parser.parse_args().run)
    print(*said, path, sep="\n")


if __name__ == "__main__":
    main_guard(main)
