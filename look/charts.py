"""One page style and two kinds of chart, without a library: a curve, and dots with their intervals.

    svg = curve("loss", {"stage 1": [(1, 2.0), (2, 1.5)]}, "nats per token")
    svg = dots("score", [("base", 0.31, 0.29, 0.33, 0.3)])
    write_text("charts.svg", join([svg, svg]))

A chart is the text of an SVG that stands alone and suits light and dark pages. Labels are escaped.
"""

import base64
import io
import math
import re
from functools import partial
from html import escape

import numpy as np

# Plain colours and one media query: not every viewer of SVG knows CSS variables.
STYLE = """
.chart text { font: 12px system-ui, sans-serif; fill: #5d6673 }
.chart .title { font-weight: 600; fill: #1f2328 }
.chart .name { fill: currentColor }
.chart .grid { stroke: #8a929e; stroke-opacity: .25 }
.chart .zero { stroke: #8a929e }
.chart .line { fill: none; stroke: currentColor; stroke-width: 1.8 }
.chart .faint { stroke: currentColor; stroke-width: 3; stroke-linecap: round; opacity: .3 }
.chart .dot { fill: #2f7de0 }
.chart .whisker { stroke: #2f7de0; stroke-width: 2; opacity: .55 }
.chart .ring { fill: none; stroke: #d9822b; stroke-width: 1.6 }
.chart .c1 { color: #2f7de0 }
.chart .c2 { color: #d9822b }
.chart .c3 { color: #2e9e6b }
.chart .c4 { color: #a35fd0 }
.chart .c5 { color: #d0506b }
@media (prefers-color-scheme: dark) {
  .chart text { fill: #9aa4b2 }
  .chart .title { fill: #dde2e8 }
  .chart .name { fill: currentColor }
}
"""

PAGE = """
:root { color-scheme: light dark; --paper: #fdfdfc; --ink: #1f2328; --soft: #5d6673;
  --line: #e1e4e8; --card: #f4f5f7; --good: #1a7f4b; --bad: #c4403a }
@media (prefers-color-scheme: dark) { :root { --paper: #14171b; --ink: #dde2e8; --soft: #9aa4b2;
  --line: #2c333c; --card: #1c2027; --good: #56c98a; --bad: #f0837c } }
* { box-sizing: border-box }
body { max-width: 1080px; margin: 0 auto; padding: 32px 16px 80px; background: var(--paper);
  color: var(--ink); font: 16px/1.55 system-ui, sans-serif; font-variant-numeric: tabular-nums }
h1 { font-size: 28px; margin: 0 }
h2 { font-size: 20px; margin: 44px 0 8px }
h3 { font-size: 15px; margin: 18px 0 8px }
p { max-width: 46em; margin: 6px 0 14px }
ul, figure { margin: 0; padding: 0 }
li { border-top: 1px solid var(--line); padding: 6px 0; list-style: none }
small, figcaption, .soft { font-size: 13px; color: var(--soft) }
.good { color: var(--good) }
.bad { color: var(--bad) }
.row { display: flex; flex-wrap: wrap; align-items: start; gap: 14px 20px; margin: 12px 0 16px }
.row > * { flex: none }
.row, .across { overflow-x: auto }
.card { background: var(--card); border-radius: 8px; padding: 14px 16px; margin: 0 0 18px }
.card h3 { margin-top: 0 }
.text { white-space: pre-wrap; overflow-wrap: anywhere; font-size: 14px; margin: 4px 0 }
img { border-radius: 4px; display: block }
.boxes { border-radius: 4px; display: block }
.boxes path { fill: none; stroke-width: 2; vector-effect: non-scaling-stroke }
.boxes text { stroke: #000; stroke-width: .15em; paint-order: stroke }
.boxes path.true { stroke: #ffd43b }
.boxes path.seen { stroke: #ff7ec0; stroke-dasharray: 5 3 }
.boxes text.true { fill: #ffd43b }
.boxes text.seen { fill: #ff9ed0 }
.views { gap: 8px }
.views img { width: 112px }
.tokens { max-width: none }
.tokens span { border-radius: 3px; margin-right: 1px; background: var(--line) }
.trained .tokens span { background: rgb(40 167 90 / .3) }
.vision .tokens span { background: rgb(47 111 222 / .25) }
"""

LEFT, RIGHT, TOP, BOTTOM = 50, 290, 44, 156  # the frame of a curve
ROW, ACROSS = 22, 180  # of dots: the height of a row, the width of the frame
POINTS = 400  # of a line that are drawn at most


# ---------------------------------------------------------------------------------- pieces


def text(words, x, y, anchor="start", kind="label"):
    place = f'x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}"'
    return f'<text class="{kind}" {place}>{escape(words)}</text>'


def line(kind, x1, x2, y1, y2):
    return f'<line class="{kind}" x1="{x1:.1f}" x2="{x2:.1f}" y1="{y1:.1f}" y2="{y2:.1f}"/>'


def circle(kind, x, y):
    return f'<circle class="{kind}" cx="{x:.1f}" cy="{y:.1f}" r="4.5"/>'


def width_of(words):
    """Pixels that a text needs. Beyond ASCII a character has more bytes, and may be wide."""
    return 8 * len(words.encode(errors="replace"))


def drawing(width, height, parts):
    """A whole SVG."""
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" class="chart" width="{width:.0f}" '
        f'height="{height:.0f}" viewBox="0 0 {width:.0f} {height:.0f}">'
        f"<style>{STYLE}</style>{''.join(parts)}</svg>\n"
    )


def pixels(low, high, start, end):
    """The function that takes a value to its place; what lies outside goes to the edge."""
    return partial(np.interp, xp=(low, high), fp=(start, end))


def ticks(low, high, count=4):
    """At most count + 1 round numbers from low to high, 1, 2 or 5 times a power of ten apart."""
    # The least step that is round and leaves no more than `count` of them.
    rough = (high - low) / count
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * times for times in (1, 2, 5, 10) if power * times >= rough)
    return [step * n for n in range(math.ceil(low / step), math.floor(high / step) + 1)]


def running_mean(values):
    """The mean over an eighth of the values around each, 51 at most, fewer at both ends."""
    # At both ends part of the window is empty: each sum is divided by how many values it holds.
    window = np.ones(2 * min(len(values) // 16, 25) + 1)
    counts = np.convolve(np.ones(len(values)), window, "same")
    return np.convolve(values, window, "same") / counts


# ---------------------------------------------------------------------------------- two charts


def curve(title, lines, unit=""):
    """Values over steps: single ones as faint dots, their running mean as a line.

    The frame holds the lines and the middle 96% of the dots, so that a spike does not flatten the
    curve. A dot on the edge lies beyond it.

    Args:    lines: {name: [(x, y), ...]}, five at most to have a colour each.
    Returns: the text of an SVG.
    """
    series = {}
    for name, points in lines.items():
        x, y = np.array(points, float).T
        series[name] = np.stack([x, y, running_mean(y)])
    steps, values, means = np.concatenate([*series.values()], axis=1)
    low = min(means.min(), np.percentile(values, 2))
    high = max(means.max(), np.percentile(values, 98))
    margin = 0.05 * (high - low) or 0.1 * abs(high) or 1.0  # a flat curve needs a range too
    low, high, last = low - margin, high + margin, max(1, steps.max())
    across, up = pixels(0, last, LEFT, RIGHT), pixels(low, high, BOTTOM, TOP)

    parts = [text(title, 8, 16, kind="title"), text(unit, 8, 32)]
    for tick in ticks(0, last):
        parts.append(text(f"{tick:.6g}", across(tick), BOTTOM + 16, "middle"))
    for tick in ticks(low, high):
        parts.append(line("grid", LEFT, RIGHT, up(tick), up(tick)))
        parts.append(text(f"{tick:.5g}", LEFT - 6, up(tick) + 4, "end"))
    bottom = BOTTOM + 24
    for number, (name, rows) in enumerate(series.items(), 1):
        x, y, mean = rows[:, :: rows.shape[1] // POINTS + 1]
        faint = "".join(f"M{a:.1f} {b:.1f}h0" for a, b in zip(across(x), up(y)))
        points = " ".join(f"{a:.1f},{b:.1f}" for a, b in zip(across(x), up(mean)))
        parts.append(f'<g class="c{number}"><path class="faint" d="{faint}"/>')
        parts.append(f'<polyline class="line" points="{points}"/>')
        bottom += 16
        parts.append(text(name, 8, bottom - 8, kind="name") + "</g>")
    return drawing(RIGHT + 14, bottom, parts)


def short(value):
    """A number that fits beside a chart: three digits, none after the third decimal.

    >>> short(0.7171), short(-30.14), short(0.00116), short(-0.0001)
    ('0.717', '-30.1', '0.001', '0')
    """
    return f"{round(value, 3) + 0:.3g}"  # + 0: no sign before a zero


def dots(title, rows):
    """A row for each value: a dot with its interval over an axis with zero, and the numbers.

    Args:    rows: [(label, value, low, high, mark)]; low, high and mark may be None. A mark is a
             ring: what the value is compared with.
    Returns: the text of an SVG.
    """
    places = np.array([row[1:] for row in rows], float)  # None becomes NaN
    least, most = np.nanmin(places, initial=0.0), np.nanmax(places, initial=0.0)
    margin = 0.04 * (most - least) or 1.0
    left = 20 + max(width_of(row[0]) for row in rows)
    right, bottom = left + ACROSS, 30 + ROW * len(rows)
    across = pixels(least - margin, most + margin, left, right)

    parts = [text(title, 8, 16, kind="title")]
    for tick in ticks(least - margin, most + margin):
        kind = "grid" if tick else "zero"
        parts.append(line(kind, across(tick), across(tick), 26, bottom))
        parts.append(text(f"{tick:.5g}", across(tick), bottom + 15, "middle"))
    for number, (label, value, low, high, mark) in enumerate(rows):
        y = 41 + ROW * number
        parts.append(text(label, left - 10, y + 4, "end"))
        if low is not None:
            parts.append(line("whisker", across(low), across(high), y, y))
            parts.append(text(f"{short(low)} to {short(high)}", right + 54, y + 4))
        parts.append(circle("dot", across(value), y))
        if mark is not None:
            parts.append(circle("ring", across(mark), y))
        parts.append(text(short(value), right + 10, y + 4))
    return drawing(right + 200, bottom + 24, parts)


def join(svgs):
    """Several charts in one SVG, one below the other."""
    width = height = 0
    parts = []
    for svg in svgs:
        wide, high = map(int, re.search(r'width="(\d+)" height="(\d+)"', svg).groups())
        parts.append(svg.replace("<svg", f'<svg y="{height}"', 1))
        width = max(width, wide)
        height += high
    return drawing(width, height, parts)


# ---------------------------------------------------------------------------------- pages


def data_uri(image, longest=448):
    """A picture as the text of a link that holds it, at most `longest` pixels on a side."""
    image = image.convert("RGB")  # a copy
    image.thumbnail((longest, longest))
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=92, subsampling=0)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()


def boxed(uri, size, kinds, caption):
    """A picture under outlines of boxes.

    Args: size: (width, height) that the boxes are given in. kinds: {"true" or "seen": boxes}.
    """
    width, height = size
    drawn = f'<image href="{uri}" width="{width}" height="{height}" preserveAspectRatio="none"/>'
    for kind, boxes in kinds.items():
        for box in boxes:
            x1, y1, x2, y2 = box["bbox_2d"]
            drawn += f'<path class="{kind}" d="M{x1:.1f} {y1:.1f}H{x2:.1f}V{y2:.1f}H{x1:.1f}Z"/>'
            y = y1 + width / 13 if kind == "true" else y2 - width / 40
            drawn += f'<text class="{kind}" x="{x1 + 2}" y="{y:.1f}">{escape(box["label"])}</text>'
    return (
        f'<figure><svg class="boxes" width="190" viewBox="0 0 {width} {height}" '
        f'font-size="{width / 16}">{drawn}</svg>'
        f"<figcaption>{escape(caption)}</figcaption></figure>"
    )


def page(title, body):
    """A whole HTML page that fetches nothing. title: text; body: HTML."""
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{PAGE}{STYLE}</style></head>"
        f"<body><h1>{escape(title)}</h1>{body}</body></html>\n"
    )
