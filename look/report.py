"""Write RUN_DIR/report.html, one page that shows what a run of the ladder learned. Or show a row as the model sees it.

    python -m look.report runs/tiny
    python -m look.report show FILE.jsonl --row N --model DIR [--images DIR] [--out FILE.html]

The page stands alone: pictures are inlined, curves are SVG, nothing is fetched. A file that the run has not written yet
costs its section, which then says so; a line that cannot be read is an error naming file and line.
"""

import argparse
import base64
import io
import json
import re
import sys
from html import escape
from itertools import groupby
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from checkpoint import load_config
from data import MEAN, STD, Processor, parse_row, style_of
from files import UserError, parse_line, read_lines
from look.charts import bars, differences, ticks
from look.compare import STEPS, WAYS_TITLE, other_ways, steps, ways
from look.signs import verdicts
from settings import Parser, add_flags

RUNGS = {
    "base": "base",
    "stage1": "stage 1",
    "stage2": "stage 1+2",
    "cold": "+ cold start",
    "grpo": "+ GRPO",
    "cold-self": "+ own cold start",
    "grpo-self": "+ GRPO from it",
}  # ladder.py --cold-start self
CURVES = (  # heading, stages with the prefix of their titles, panels (four to a row): key of log.jsonl -> title; unit
    (
        "Supervised stages",
        {
            "base": "Base: ",
            "stage1": "Stage 1: ",
            "stage2": "Stage 2: ",
            "cold": "Cold start: ",
            "cold-self": "Own cold start: ",
        },
        {"loss": "loss; nats per token", "grad_norm": "grad norm; before clipping"},
    ),
    (
        "GRPO",
        {"grpo": "", "grpo-self": "From its own cold start: "},
        {
            "reward": "reward; sum of its parts",
            "rewards/accuracy/mean": "accuracy reward; mean, 0 to 1",
            "rewards/format/mean": "format reward; mean, 0 to 1",
            "eval_rewards/accuracy/mean": "held-out accuracy; greedy, 0 to 1",
            "frac_reward_zero_std": "groups without signal; share",
            "kl": "KL to the reference; nats per token",
            "entropy": "entropy; nats per token",
            "completions/mean_length": "completion length; tokens",
            "completions/clipped_ratio": "truncated; share",
            "loss/policy": "policy loss; without the KL part",
            "grad_norm": "grad norm; before clipping",
            "learning_rate": "learning rate; per step",
            "step_time": "time; seconds per step",
        },
    ),
)
COLORS = (
    "#ffd43b",
    "#4dd0ff",
    "#ff7eb6",
    "#7ee787",
    "#ffa657",
    "#c4a7ff",
    "#5eead4",
    "#f2f59b",
)  # of box labels
PICTURES, FRAMES, GROUPS, CHARACTERS = (
    5,
    8,
    2,
    500,
)  # shown: gallery rows, pictures a prompt, groups each end, text
LEFT, RIGHT, TOP, BOTTOM = 46, 226, 8, 116  # the frame in a chart of 240 x 140 SVG units

CSS = """
:root { color-scheme: light dark; --paper: #fdfdfc; --ink: #1f2328; --soft: #626c7a; --line: #e4e6ea; --card: #f5f6f7;
  --accent: #2f6fde; --good: #1a7f4b; --bad: #c4403a } * { box-sizing: border-box } figure, ul { margin: 0; padding: 0 }
@media (prefers-color-scheme: dark) { :root { --paper: #14171b; --ink: #dde2e8; --soft: #949eac; --line: #2a3038;
  --card: #1b1f25; --accent: #79a8ff; --good: #56c98a; --bad: #f0837c } }
body { max-width: 1120px; margin: 0 auto; padding: 44px 20px 80px; background: var(--paper); color: var(--ink);
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; font-variant-numeric: tabular-nums }
h1 { font-size: 28px; margin: 0 } h2 { font-size: 20px; margin: 52px 0 4px } h3 { font-size: 15px; margin: 0 0 8px }
p { max-width: 46em; margin: 6px 0 14px } .soft, small, .blind { color: var(--soft) } b, .clear { font-weight: 650 }
figcaption, .key { font-size: 13px; margin: 0 0 4px } small { font-size: 12px; font-weight: normal; display: block }
table { width: 100%; border-collapse: collapse; font-size: 14px; line-height: 1.3; margin: 20px 0 16px }
th, td { padding: 7px 6px; text-align: right; border-bottom: 1px solid var(--line); font-weight: normal }
tr > :first-child { text-align: left; white-space: nowrap; padding-left: 0 } thead th { vertical-align: bottom }
.charts { display: grid; grid-template-columns: repeat(4, 1fr); gap: 20px 16px; margin: 0 0 32px }
.rungs { display: grid; grid-template-columns: repeat(5, 1fr); gap: 12px 10px; margin: 0 0 26px }
svg { display: block; width: 100% } text { font-size: 10.5px; fill: var(--soft) } line { stroke: var(--line) }
.axis { stroke: var(--soft) } polyline { stroke: var(--accent); stroke-width: 1.7; stroke-linejoin: round; fill: none }
.dots { stroke: var(--accent); stroke-width: 2.6; stroke-linecap: round; opacity: .3 } .key span { margin-right: 14px }
.key i { display: inline-block; width: 10px; height: 10px; border-radius: 2px; margin-right: 5px }
.rungs path { vector-effect: non-scaling-stroke; stroke-width: 1.8px; fill: none; filter: drop-shadow(0 0 .6px #000) }
.rungs svg { background: var(--picture) 0 / 100% 100% } .seen { stroke-dasharray: 5 3.5 } .good b { color: var(--good) }
.card { break-inside: avoid; background: var(--card); border-radius: 8px; padding: 16px; margin: 0 0 24px }
.views { display: flex; flex-wrap: wrap; gap: 6px; margin: 0 0 10px } .cards { columns: 2; column-gap: 24px }
.text { white-space: pre-wrap; overflow-wrap: anywhere; font-size: 14px; line-height: 1.45; margin: 6px 0 10px }
.wide ul { display: grid; grid-template-columns: 1fr 1fr; gap: 0 28px } img { width: 112px; border-radius: 4px }
.head { display: grid; grid-template-columns: 6.4em 1fr auto; gap: 10px } img:only-child { width: 224px }
section, .across { overflow-x: auto } .across img:only-child { width: auto; border-radius: 0 } .across td { text-align: left }
li { border-top: 1px solid var(--line); padding: 6px 0; font-size: 14px; list-style: none } .bad b { color: var(--bad) }
li .text { font: 12px/1.5 ui-monospace, SFMono-Regular, Menlo, monospace; color: var(--soft); margin: 2px 0 0 }
.flow { display: flex; flex-wrap: wrap } .flow figure { max-width: 100% } .tokens { max-width: none } .tokens span {
  border-radius: 3px; margin-right: 1px; padding: 1px 0; background: var(--line); color: var(--ink) }
.trained .tokens span { background: rgb(40 167 90 / .3) } .vision .tokens span { background: rgb(47 111 222 / .25) }
@media (max-width: 760px) { body { padding: 24px 14px 60px } .charts { grid-template-columns: 1fr 1fr; gap: 18px 10px }
  text { font-size: 12.5px } .rungs { grid-template-columns: repeat(3, 1fr) } .rungs path { stroke-width: 1.4px }
  .cards { columns: 1 } .wide ul { display: block } img { width: 76px } img:only-child { width: 168px }
  table, thead, tbody, tr { display: flex } tbody, tr { flex: 1 } tr { flex-direction: column } /* rows to columns */
  table { font-size: 12px } table small { display: none } tr > * { height: 36px; padding: 10px 3px }
  tr > :first-child { height: 44px; padding: 7px 3px; text-align: right; white-space: normal } thead { width: 92px }
  thead th:nth-child(n) { text-align: left; padding: 0; display: flex; align-items: center } }
"""


def parse(text, where, keys):
    """The JSON object in `text`. Raises UserError naming `where` if there is none or it lacks one of the keys."""
    try:
        row = json.loads(text)
    except ValueError as error:
        raise UserError(f"{where}: not JSON ({error})") from None
    missing = [key for key in keys.split() if not isinstance(row, dict) or key not in row]
    if missing:
        raise UserError(
            f"{where}: expected an object with the keys {keys}; missing: {' '.join(missing)}"
        )
    return row


def read_rows(path, keys):
    """The objects of a JSON-lines file; none if the run has not written it yet."""
    lines = io.StringIO(path.read_text("utf-8") if path.exists() else "")
    return [parse(text, f"{path}:{line}", keys) for line, text in enumerate(lines, start=1)]


def spread(items, count):
    """At most `count` items, evenly spaced from first to last, so that nothing is picked by how well it went."""
    return [
        items[i] for i in np.linspace(0, len(items) - 1, min(count, len(items))).round().astype(int)
    ]


def number(value, digits=3):
    return "–" if value is None else f"{value:.{digits}f}"


def absent(sentence, names):
    names = [
        name for name in names if not name.endswith("-self")
    ]  # those are asked for, not expected
    return (
        f'<p class="soft">{sentence}: {", ".join(RUNGS[name] for name in names)}.</p>'
        if names
        else ""
    )


def paragraph(text):
    """Text from data, escaped and cut to CHARACTERS, as a paragraph that keeps its line breaks."""
    rest = f" … ({len(text) - CHARACTERS} more characters)" if len(text) > CHARACTERS else ""
    return f'<p class="text">{escape(text[:CHARACTERS])}{rest}</p>'


def pictures(path, longest=448):
    """Data URIs of a picture or of the frames of a Motion-JPEG .avi; anything else is a grey card with its name."""
    try:
        data = Path(
            path
        ).read_bytes()  # in a stream of JPEGs the start marker ff d8 occurs nowhere else
        files = (
            [b"\xff\xd8" + frame for frame in data.split(b"\xff\xd8")[1:]]
            if path.endswith(".avi")
            else [data]
        )
        images = [Image.open(io.BytesIO(file)).convert("RGB") for file in files]
    except OSError:
        images = [Image.new("RGB", (224, 224), "#777")]
        ImageDraw.Draw(images[0]).multiline_text(
            (8, 98), f"not shown:\n{Path(path).name}", fill="white"
        )
    return [data_uri(image, longest) for image in images]


def data_uri(image, longest):
    buffer = io.BytesIO()
    image.thumbnail((longest, longest))
    image.save(buffer, "JPEG", quality=92, subsampling=0)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()


def chart(svg):
    """A chart of charts.bars, inlined; it scrolls sideways on a narrow screen."""
    return f'<div class="across"><img src="data:image/svg+xml;base64,{base64.b64encode(svg.encode()).decode()}" alt=""></div>'


def measures(scores):
    """The table's columns of one scores.json: title -> (value, blind baseline, low end of the interval, n)."""
    boxes, types = scores.get("localization", {}), scores["types"]
    blinds = [row["blind"] for row in types.values()]
    blind = float(np.mean(blinds)) if blinds and None not in blinds else None
    columns = {
        "localization mean IoU": [
            boxes.get(key) for key in ("mean_iou", "mean_box_iou", "low", "n")
        ],
        "valid JSON": (boxes.get("valid_json"), None, None, boxes.get("n")),
    }
    columns |= {
        escape(name): [row[key] for key in ("score", "blind", "low", "n")]
        for name, row in types.items()
    }
    return columns | {
        "mean over types": (scores["overall"], blind, scores.get("low"), None),
        "well-formed": (scores["well_formed"], None, None, None),
    }


def cell(value, blind, low, _):
    """A table cell, green above the blind baseline and red below it, deeper the further; bold where surely above."""
    if None in (value, blind):
        return f"<td>{number(value)}</td>"
    color, depth = "40 167 90" if value > blind else "208 72 60", 0.6 * min(abs(value - blind), 0.5)
    clear = ' class="clear"' if low is not None and low > blind else ""
    return f'<td{clear} style="background:rgb({color} / {depth:.2f})">{number(value)}</td>'


def ladder(rungs):
    """The rungs of results.json as the rows of a table, under the blind baseline; measures are columns."""
    missing = absent(
        "Not run yet", [name for name in RUNGS if name not in [rung["name"] for rung in rungs]]
    )
    if not rungs:
        return missing
    columns = measures(rungs[0]["scores"])
    head = "".join(
        f"<th>{title}{f' <small>n = {n:d}</small>' if n else ''}</th>"
        for title, (*_, n) in columns.items()
    )
    rows = "".join(f"<td>{number(blind)}</td>" for _, blind, _, _ in columns.values())
    rows = f'<tr class="blind"><th>blind <small>no picture</small></th>{rows}<td>–</td></tr>'
    for rung in rungs:
        values, label = measures(rung["scores"]), RUNGS.get(rung["name"], rung["name"])
        rows += (
            f"<tr><th>{escape(label)} <small>{escape(rung['style'])}</small></th>"
            f"{''.join(cell(*values[title]) for title in columns)}<td>{number(rung['seconds'], 0)}</td></tr>"
        )
    return (
        f"<table><thead><tr><th>rung <small>answers</small></th>{head}<th>seconds</th></tr></thead><tbody>{rows}"
        f'</tbody></table>{missing}<p class="soft">Blind is the score without looking: to each question text the '
        "answer that the training answers favour, for localization the mean box of the training set. The gain of a "
        "rung is its score minus blind: only that speaks for having looked. Cells are green above blind and red "
        "below, deeper the further; bold: the whole 95% interval lies above. Choices count exact matches, "
        "numbers mean relative accuracy; well-formed: in the think/answer format.</p>"
    )


def panel(rows, key, title, unit):
    """One logged key over the steps: single steps as faint dots, their running mean as a line, ticks on both axes.

    The mean is over an eighth of the curve, at most 51 steps, fewer at both ends. The frame holds the line and the
    middle 96% of the dots, so that a spike does not flatten the curve. Steps without a finite value are counted.
    """
    pairs = [
        (row["step"], row[key])
        for row in rows
        if row.get(key) is not None and np.isfinite(row[key])
    ]
    gaps = (
        f"; {len(rows) - len(pairs)} of {len(rows)} steps without" if len(pairs) < len(rows) else ""
    )
    caption = f"<figcaption><b>{title}</b><small>{unit}{gaps}</small></figcaption>"
    if not pairs:
        return f"<figure>{caption}</figure>"
    steps, values = np.array(pairs, float).T
    window = np.ones(2 * min(len(steps) // 16, 25) + 1)
    line = np.convolve(values, window, "same") / np.convolve(np.ones(len(steps)), window, "same")
    low, high = (
        min(line.min(), np.percentile(values, 2)),
        max(line.max(), np.percentile(values, 98)),
    )
    margin = 0.05 * (high - low) or 0.1 * abs(high) or 1.0  # a flat curve needs a range too
    across, up = (
        ((0, max(steps[-1], 1)), (LEFT, RIGHT)),
        ((low - margin, high + margin), (BOTTOM, TOP)),
    )
    shown = list(zip(np.interp(steps, *across), np.interp(values, *up), np.interp(line, *up)))[
        :: len(steps) // 400 + 1
    ]
    path = "".join(f"M{a:.1f} {b:.1f}h0" for a, b, _ in shown)
    points = " ".join(f"{a:.1f},{c:.1f}" for a, _, c in shown)
    labels = "".join(
        f'<text x="{np.interp(t, *across):.1f}" y="{BOTTOM + 15}" text-anchor="middle">{t:.6g}</text>'
        for t in ticks(*across[0])
    )
    for t in ticks(*up[0]):
        y = np.interp(t, *up)
        labels += (
            f'<line x1="{LEFT}" x2="{RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>'
            f'<text x="{LEFT - 6}" y="{y + 3.5:.1f}" text-anchor="end">{t:.6g}</text>'
        )
    return (
        f'<figure>{caption}<svg viewBox="0 0 240 140">{labels}<path class="dots" d="{path}"/><line class="axis" '
        f'x1="{LEFT}" x2="{RIGHT}" y1="{BOTTOM}" y2="{BOTTOM}"/><polyline points="{points}"/></svg></figure>'
    )


def curves(run):
    """The panels of CURVES for every stage that has a log."""
    logs = {name: rows for name in RUNGS if (rows := read_rows(run / name / "log.jsonl", "step"))}
    text = absent(
        "No log yet", [name for name in RUNGS if name not in (*logs, "base")]
    )  # which no run trains
    for heading, stages, panels in CURVES:
        figures = "".join(
            panel(logs[name], key, prefix + title, unit)
            for key, titles in panels.items()
            for title, unit in [titles.split("; ")]
            for name, prefix in stages.items()
            if name in logs
            and (not key.startswith("eval") or any(key in row for row in logs[name]))
        )
        text += f'<h3>{heading}</h3><div class="charts">{figures}</div>' if figures else ""
    return (
        "<p>Over optimizer steps. Dots are single steps, the line is their running mean; a dot on the edge of a "
        f"frame lies beyond it.</p>{text}"
    )


def outlines(kind, boxes, colors):
    """Boxes as SVG outlines in the color of their label; a label outside `colors` is white."""
    corners = [(colors.get(box["label"], "#fff"), *box["bbox_2d"]) for box in boxes]
    return "".join(
        f'<path class="{kind}" stroke="{color}" d="M{x1:.1f} {y1:.1f}H{x2:.1f}V{y2:.1f}H{x1:.1f}Z"/>'
        for color, x1, y1, x2, y2 in corners
    )


def gallery(asked):
    """Pictures with their boxes; asked: for each picture the (rung's label, its row of predictions.jsonl) pairs."""
    text = (
        "<p>Pictures evenly spaced through the test set. Solid: the true box. Dashed: the predicted one, in the "
        "color of the object it names, white if it names an object that was not asked for.</p>"
    )
    for rows in spread(asked, PICTURES):
        truth = rows[0][1]
        colors = dict(zip(sorted({box["label"] for box in truth["answer"]}), COLORS))
        key = "".join(
            f'<span><i style="background:{c}"></i>{escape(name)}</span>'
            for name, c in colors.items()
        )
        uri = pictures(truth["images"][0])[0]  # inlined once, the background of every rung's boxes
        text += f'<p class="key">{key}</p><div class="rungs" style="--picture:url({uri})">'
        for label, row in rows:
            drawn = outlines("true", row["answer"], colors) + outlines(
                "seen", row["prediction"] or (), colors
            )
            verdict = f"IoU {number(row['score'], 2)}" if row["prediction"] else "no boxes"
            text += (
                f'<figure><svg viewBox="0 0 {row["size"][0]:g} {row["size"][1]:g}">{drawn}</svg>'
                f"<figcaption>{label}<small>{verdict}</small></figcaption></figure>"
            )
        text += "</div>"
    return text


def card(title, row, lines):
    """A question with pictures and true answer; lines: (kind, name, verdict, detail, completion or "") an answer."""
    turn = row["prompt"].rsplit("<|im_start|>user", 1)[-1].split("<|im_end|>")[0]
    question = paragraph(
        re.sub(r"<\|[^|<>]*\|>", "", turn).strip()
    )  # the last user turn, without special tokens
    uris = [uri for path in row["images"] for uri in pictures(path)]
    views = "".join(f'<img src="{uri}" alt="">' for uri in spread(uris, FRAMES))
    items = "".join(
        f'<li class="{kind}"><div class="head"><span>{escape(name)}</span><b>{escape(verdict)}</b><small>'
        f"{escape(detail)}</small></div>{paragraph(said) if said else ''}</li>"
        for kind, name, verdict, detail, said in lines
    )
    return (
        f'<div class="card"><h3>{escape(title)}</h3><div class="views">{views}</div>{question}<p class="key">true '
        f"answer <b>{escape(str(row['answer']))}</b></p><ul>{items}</ul></div>"
    )


def questions(types):
    """The middle question of each type; types: type -> for each question the pairs of rung and row as in `gallery`."""
    cards = ""
    for name, asked in types.items():
        rows, lines = asked[len(asked) // 2], []
        for label, row in rows:
            given = "no answer" if row["prediction"] is None else str(row["prediction"])[:40]
            kind = "good" if row["score"] > 0.99 else "partly" if row["score"] > 0 else "bad"
            said = row["completion"] if row["completion"].strip() != given else ""
            lines.append((kind, label, given, number(row["score"], 2), said))
        cards += card(name, rows[0][1], lines)
    return f'<p>The middle question of each type in the test set, and its scores.</p><div class="cards">{cards}</div>'


def rollouts(groups):
    """The first and the last GROUPS rows of rollouts.jsonl, completions from the highest advantage to the lowest."""
    cards = ""
    for group in groups[:GROUPS] + groups[max(GROUPS, len(groups) - GROUPS) :]:
        lines = []
        for i, gain in sorted(enumerate(group["advantages"]), key=lambda pair: -pair[1]):
            detail = ", ".join(
                f"{part} {values[i]:.2f}" for part, values in group["rewards"].items()
            )
            kind = "good" if gain > 0 else "bad" if gain < 0 else "even"
            lines.append((kind, "advantage", f"{gain:+.2f}", detail, group["completions"][i]))
        cards += card(f"step {group['step']}, {group['question_type']}", group, lines)
    return (
        "<p>The first and the last groups of completions that GRPO sampled. What earns more than the mean of its "
        f'group has a positive advantage and becomes more likely.</p><div class="wide">{cards}</div>'
    )


PROBES = {
    "hints": "Do hints help?",
    "attention": "Where does it look?",
    "entropy": "How sure is it?",
}


def probed(folder):
    """What probes.py has found: its charts, its pictures."""
    text = ""
    for what, heading in PROBES.items():
        if (folder / f"{what}.svg").is_file():
            shown = "".join(
                f'<figure><img src="{data_uri(Image.open(path).convert("RGB"), 336)}" alt=""><figcaption><small>'
                f"{escape(path.stem)}</small></figcaption></figure>"
                for path in sorted(folder.glob(f"{what}/*.png"))
            )
            text += f'<h3>{heading}</h3>{chart((folder / f"{what}.svg").read_text("utf-8"))}<div class="views">{shown}</div>'
    return text or '<p class="soft">Not probed yet: python -m look.probes all RUN_DIR.</p>'


def markdown_table(text):
    """A Markdown table as HTML."""
    rows = [line.strip("|").split("|") for line in text.splitlines() if not line.startswith("|--")]
    cells = "".join(
        f"<tr>{''.join(f'<td>{escape(cell.strip())}</td>' for cell in row)}</tr>" for row in rows
    )
    return f'<div class="across"><table>{cells}</table></div>'


def acceptance(path):
    """What the rejection sampling of the own cold start kept, per question type, as coldstart.py counted it."""
    if not path.exists():
        return ""
    rows = json.loads(path.read_text("utf-8"))
    head = "".join(f"<th>{escape(key)}</th>" for key in next(iter(rows.values())))
    rows = "".join(
        f"<tr><th>{escape(name)}</th>{''.join(f'<td>{count:d}</td>' for count in row.values())}</tr>"
        for name, row in rows.items()
    )
    return f"<table><thead><tr><th>chains of its own</th>{head}</tr></thead><tbody>{rows}</tbody></table>"


def page(title, subtitle, sections):
    """A complete HTML page; sections: heading -> HTML."""
    body = "".join(
        f"<section><h2>{heading}</h2>{content}</section>" for heading, content in sections.items()
    )
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="'
        f'width=device-width, initial-scale=1"><title>{title}</title><style>{CSS}</style></head><body>'
        f'<h1>{title}</h1><p class="soft">{escape(subtitle)}</p>{body}</body></html>\n'
    )


def report(run):
    """Write run/report.html from what the run has so far, and return its path."""
    if not run.is_dir():
        raise UserError(f"{run}: no such directory; expected the --out of ladder.py")
    results, asked, types = run / "results.json", {}, {}
    found = (
        parse(results.read_text("utf-8"), results, "preset seed rungs")
        if results.exists()
        else {"rungs": []}
    )
    keys = "where question_type prompt completion prediction answer score images"
    answers = {name: read_rows(run / "eval" / name / "predictions.jsonl", keys) for name in RUNGS}
    for name, rows in answers.items():
        for row in rows:
            asked.setdefault(row["where"], []).append(
                (RUNGS[name], row)
            )  # one question through the rungs
    for rows in asked.values():
        types.setdefault(rows[0][1]["question_type"], []).append(rows)
    boxes, missing = (
        types.pop("localization", []),
        absent("Not tested yet", [n for n in RUNGS if not answers[n]]),
    )
    keys = "step question_type prompt answer images completions rewards advantages"
    groups = {
        name: read_rows(run / name / "rollouts.jsonl", keys) for name in ("grpo", "grpo-self")
    }
    climbed, others = (
        steps(rung for rung in found["rungs"] if rung["name"] in RUNGS),
        other_ways([run], {}),
    )
    html = page(
        "SpatialLadder",
        ", ".join(f"{key} {found[key]}" for key in ("preset", "seed") if key in found),
        {
            "The ladder": (chart(bars(climbed, {}, STEPS)) if climbed else "")
            + ladder(found["rungs"])
            + acceptance(run / "self_coldstart.samples" / "report.json"),
            "Signs of trouble": "<ul>"
            + "".join(
                f"<li>{escape(line)}</li>"
                for line in verdicts(run) or ["Nothing yet that could show trouble."]
            )
            + "</ul>",
            "Curves": curves(run),
            "What the rungs change": probed(run / "probes"),
            "Other ways up": (
                chart(differences(others, WAYS_TITLE))
                + markdown_table(ways(others))
                + '<p class="soft">Intervals are of one ladder\'s questions, paired.</p>'
                if others
                else ""
            )
            + '<p class="soft">Climb more of them: python ladder.py --without stage1 stage2 --mixed.</p>',
            "Boxes through the rungs": (gallery(boxes) if boxes else "") + missing,
            "Answers through the rungs": (questions(types) if types else "") + missing,
            "Sampled groups": "".join(
                f"<h3>{RUNGS[name]}</h3>{rollouts(rows)}" for name, rows in groups.items() if rows
            )
            or absent("No rollouts yet", ["grpo"]),
        },
    )
    (run / "report.html.tmp").write_text(html, "utf-8")
    return (run / "report.html.tmp").replace(run / "report.html")


def seen(example):
    """An example's pictures and frames as the patches hold them: data.to_patches backwards. One list per grid."""
    first, found = 0, []
    for t, h, w in example.grids:
        patches = (
            example.patches[first : first + t * h * w]
            .numpy()
            .reshape(t, h // 2, w // 2, 2, 2, 3, 2, 14, 14)
        )
        first += t * h * w
        frames = patches.transpose(0, 6, 1, 3, 7, 2, 4, 8, 5).reshape(2 * t, 14 * h, 14 * w, 3)
        pixels = (
            (255 * (frames * np.array(STD) + np.array(MEAN))).round().clip(0, 255).astype(np.uint8)
        )
        found.append([Image.fromarray(frame) for frame in pixels])
    return found


def token_runs(example, processor):
    """Runs of tokens of one kind, "vision", "trained" or "prompt": (kind, pieces of text, positions (3, n))."""
    pads = [processor.config.image_token_id, processor.config.video_token_id]
    kinds = [
        "vision" if token in pads else "prompt" if label < 0 else "trained"
        for token, label in zip(example.ids.tolist(), example.labels.tolist())
    ]
    for kind, places in groupby(range(len(kinds)), kinds.__getitem__):
        places, pieces, pending = list(places), [], []
        for token in example.ids[places[:1] if kind == "vision" else places].tolist():
            pending.append(token)
            piece = processor.tokenizer.decode(pending, skip_special_tokens=False)
            if "\ufffd" not in piece:  # else a part of a character that the next token completes
                pieces, pending = [*pieces, piece], []
        yield kind, pieces, example.positions[:, places]


def show(args):
    """Write a page of the exact input that the model is trained on for one row, and return its path."""
    where = f"{args.file}:{args.row}"
    line = dict(read_lines(args.file)).get(where)
    if line is None:
        raise UserError(f"{where}: there is no such row")
    sample = parse_row(
        parse_line(line, where), where, Path(args.images or args.file.parent / "images")
    )
    processor = Processor(args.model, load_config(args.model), args)
    example, style = processor.example(sample, style_of(sample)), style_of(sample)

    colors = dict(zip(sorted({box["label"] for box in example.boxes}), COLORS))
    key = "".join(
        f'<span><i style="background:{c}"></i>{escape(name)}</span>' for name, c in colors.items()
    )
    views, rows = "", ""
    for media, frames in zip(sample.media, seen(example)):
        names = [Path(source).name for source in media.sources]
        if media.kind == "video":  # in pairs: an odd last frame stands there twice
            names = (
                names + names[-1:]
                if len(names) > 1
                else [f"{names[0]}, frame {n + 1}" for n in range(len(frames))]
            )
        for frame, name in zip(frames, names):
            w, h = frame.size
            views += (
                f'<figure style="width:{w}px"><svg style="--picture:url({data_uri(frame, max(w, h))})" '
                f'viewBox="0 0 {w} {h}">{outlines("true", example.boxes, colors)}</svg>'
                f"<figcaption><small>{escape(name)}, {w} × {h}</small></figcaption></figure>"
            )
    for kind, pieces, positions in token_runs(example, processor):
        count = positions.shape[1]
        axes = ", ".join(
            f"{name} {axis.min()}" + f" to {axis.max()}" * bool(axis.min() < axis.max())
            for name, axis in zip(("time", "height", "width"), positions)
        )
        text = "".join(f"<span>{escape(piece)}</span>" for piece in pieces).replace("\n", "↵\n")
        text += f" × {count}" * (kind == "vision")
        rows += (
            f'<li class="{kind}"><div class="head"><b>{kind}</b><span>{count} token{"s" * (count > 1)}</span>'
            f'<small>{axes}</small></div><p class="text tokens">{text}</p></li>'
        )
    trained = int((example.labels >= 0).sum())
    kind = f"{sample.question_type or 'cold start'} {sample.data_type}".strip()
    html = page(
        escape(Path(where).name),
        f"{kind}, style {style}: {len(example.ids)} tokens, {trained} of them trained",
        {
            "Pictures": f"<p>At the size that the model sees, as its patches hold them"
            f"{', with the boxes of the answer' * bool(key)}.</p>"
            f'<p class="key">{key}</p><div class="rungs flow">{views}</div>',
            "Tokens": "<p>One shade a token; ↵ ends a line. Green is trained, blue stands for a picture or video, grey "
            f"is only read. On the right the positions on the three axes.</p><ul>{rows}</ul>",
        },
    )
    args.out.with_suffix(".tmp").write_text(html, "utf-8")
    return args.out.with_suffix(".tmp").replace(args.out)


def main():
    if sys.argv[1:2] == ["show"]:
        parser = Parser(description=show.__doc__)
        parser.add_argument("show", choices=["show"])
        parser.add_argument("file", type=Path, help="jsonl file")
        parser.add_argument("--row", type=int, required=True, help="line number of the row, from 1")
        parser.add_argument(
            "--model", required=True, help="model directory: tokenizer, picture limits, positions"
        )
        parser.add_argument(
            "--out",
            type=Path,
            default=Path("row.html"),
            help="page to write (default: %(default)s)",
        )
        add_flags(
            parser,
            ("images", "min_pixels", "max_pixels", "num_frames", "fps", "video_seconds", "prompts"),
        )
        parser.set_defaults(num_frames=16, video_seconds="grid")
        refuse_bad_values(parser, args := parser.parse_args())
    else:
        parser = argparse.ArgumentParser(
            description=__doc__.split("\n")[0], usage=argparse.SUPPRESS
        )
        parser.add_argument(
            "run", type=Path, metavar="RUN_DIR", help="directory that ladder.py wrote: runs/tiny"
        )
        args = parser.parse_args()
    try:
        print(show(args) if "show" in args else report(args.run))
    except (UserError, OSError) as error:
        parser.exit(2, f"{error}\n")


if __name__ == "__main__":
    main()
