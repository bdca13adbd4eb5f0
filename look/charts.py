"""One page style and two kinds of chart, without a library: a curve, and dots with their intervals.

    svg = curve("loss", {"stage 1": [(1, 2.0), (2, 1.5)]}, "nats per token")
    svg = dots("score", [("base", 0.31, 0.29, 0.33)], {"base": 0.3})
    save(join([svg, svg], columns=2), "charts.svg")

A chart is the text of an SVG that stands alone and suits light and dark pages. Labels are escaped.
"""

import base64
import io
import re
from html import escape

import numpy as np

from files import write_text

# Plain colours and one media query: not every viewer of SVG knows CSS variables.
STYLE = """
.chart text{font:12px system-ui,sans-serif;fill:#5d6673}.chart .title{font-weight:600;fill:#1f2328}
.chart .grid{stroke:#8a929e;stroke-opacity:.25}.chart .zero{stroke:#8a929e}.chart .line{fill:none;stroke-width:1.8}
.chart .faint{fill:none;stroke-width:2.6;stroke-linecap:round;opacity:.3}.chart .ring{fill:none;stroke-width:1.6}
.chart .whisker{stroke-width:2;opacity:.55}.chart .c0{stroke:#2f7de0}.chart .c1{stroke:#d9822b}
.chart .c2{stroke:#2e9e6b}.chart .c3{stroke:#a35fd0}.chart .c4{stroke:#d0506b}.chart .c5{stroke:#7f8a99}
.chart .dot{fill:#2f7de0}.chart .ring{stroke:#d9822b}
@media(prefers-color-scheme:dark){.chart text{fill:#9aa4b2}.chart .title{fill:#dde2e8}}
""".replace("\n", "")
COLORS = 6  # c0 to c5

PAGE = """
:root { color-scheme: light dark; --paper: #fdfdfc; --ink: #1f2328; --soft: #5d6673; --line: #e1e4e8;
  --card: #f4f5f7; --good: #1a7f4b; --bad: #c4403a; --true: #2ecc71 }
@media (prefers-color-scheme: dark) { :root { --paper: #14171b; --ink: #dde2e8; --soft: #9aa4b2;
  --line: #2c333c; --card: #1c2027; --good: #56c98a; --bad: #f0837c } }
* { box-sizing: border-box }
body { max-width: 1080px; margin: 0 auto; padding: 40px 20px 80px; background: var(--paper);
  color: var(--ink); font: 16px/1.55 system-ui, sans-serif; font-variant-numeric: tabular-nums }
h1 { font-size: 28px; margin: 0 } h2 { font-size: 20px; margin: 48px 0 4px }
h3 { font-size: 15px; margin: 18px 0 8px } p { max-width: 46em; margin: 6px 0 14px }
figure, ul { margin: 0; padding: 0 } figcaption, small, .soft { font-size: 13px; color: var(--soft) }
.good { color: var(--good) } .bad { color: var(--bad) }
.across { overflow-x: auto } .row { display: flex; flex-wrap: wrap; gap: 14px 18px; margin: 0 0 16px }
table { border-collapse: collapse; font-size: 14px; margin: 12px 0 }
td, th { padding: 4px 14px 4px 0; text-align: left; border-bottom: 1px solid var(--line);
  vertical-align: top; font-weight: normal }
td { text-align: right } thead th { color: var(--soft); text-align: right }
thead th:first-child { text-align: left }
.card { background: var(--card); border-radius: 8px; padding: 14px 16px; margin: 0 0 18px }
.card h3 { margin-top: 0 } li { border-top: 1px solid var(--line); padding: 6px 0; list-style: none }
.text { white-space: pre-wrap; overflow-wrap: anywhere; font-size: 14px; margin: 4px 0; max-width: none }
img { max-width: 100%; border-radius: 4px; display: block }
.boxes { display: block; max-width: 100%; height: auto; border-radius: 4px }
.boxes rect { fill: none; stroke-width: 2; vector-effect: non-scaling-stroke }
.boxes text { font: 11px system-ui, sans-serif; fill: #fff; paint-order: stroke; stroke: #000;
  stroke-width: 2.5px }
.boxes .true { stroke: #ffd43b } .boxes .seen { stroke: #ff4fa3; stroke-dasharray: 5 3 }
.tokens span { border-radius: 3px; margin-right: 1px; background: var(--line) }
.trained .tokens span { background: rgb(40 167 90 / .3) }
.vision .tokens span { background: rgb(47 111 222 / .25) }
@media (max-width: 640px) { body { padding: 24px 14px 60px } }
"""

LEFT, RIGHT, TOP, BOTTOM = 50, 290, 44, 156  # the frame of a curve
ROW, ACROSS = 22, 240  # of dots: the height of a row, the width of the frame
POINTS = 400  # of a curve that are drawn at most


# ---------------------------------------------------------------------------------- pieces


def text(words, x, y, anchor="start", kind="label"):
    # What XML cannot hold, such as a control character, becomes a question mark.
    words = re.sub("[^\t\n -\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]", "?", words)
    place = f'x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}"'
    return f'<text class="{kind}" {place}>{escape(words)}</text>'


def line(kind, x1, x2, y1, y2):
    return f'<line class="{kind}" x1="{x1:.1f}" x2="{x2:.1f}" y1="{y1:.1f}" y2="{y2:.1f}"/>'


def circle(kind, x, y):
    return f'<circle class="{kind}" cx="{x:.1f}" cy="{y:.1f}" r="4.5"/>'


def room_for(words):
    """Pixels that a text needs at most. Characters beyond ASCII have more bytes, and may be wider."""
    return 8 * len(words.encode(errors="replace"))


def drawing(width, height, parts):
    """A whole SVG."""
    size = f'width="{width:.0f}" height="{height:.0f}"'
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" class="chart" {size} '
        f'viewBox="0 0 {width:.0f} {height:.0f}"><style>{STYLE}</style>{"".join(parts)}</svg>\n'
    )


def ticks(low, high, count=4):
    """At most count + 1 round numbers in [low, high], 1, 2 or 5 times a power of ten apart."""
    power = 10.0 ** np.floor(np.log10((high - low) / count))
    steps = power * np.array([1, 2, 5, 10])
    step = steps[np.argmax(steps * count >= (high - low) * (1 - 1e-9))]
    first, last = np.ceil(low / step - 1e-9), np.floor(high / step + 1e-9)
    return step * np.arange(first, last + 1) + 0.0  # no minus zero


def running_mean(values):
    """The mean over an eighth of the values around each, 51 at most, fewer at both ends."""
    window = np.ones(2 * min(len(values) // 16, 25) + 1)
    counts = np.convolve(np.ones(len(values)), window, "same")
    return np.convolve(values, window, "same") / counts


# ---------------------------------------------------------------------------------- two charts


def curve(title, lines, unit=""):
    """Values over steps: single ones as faint dots, their running mean as a line.

    The frame holds the lines and the middle 96% of the dots, so that a spike does not flatten the
    curve. A dot on the edge lies beyond it. Values that are None or not finite are counted.

    Args:    lines: {name: [(x, y), ...]}. The names are written only if there are several.
    Returns: the text of an SVG.
    """
    series, total, missing = {}, 0, 0
    for name, points in lines.items():
        finite = [(x, y) for x, y in points if y is not None and np.isfinite(y)]
        total += len(points)
        missing += len(points) - len(finite)
        if finite:
            x, y = np.array(finite, float).T
            series[name] = x, y, running_mean(y)
    if missing:
        unit = f"{unit} ({missing} of {total} without a value)"
    width = max(RIGHT + 14, 12 + room_for(title), 12 + room_for(unit))
    parts = [text(title, 8, 16, kind="title"), text(unit, 8, 32)]
    if not series:
        return drawing(width, TOP + 20, [*parts, text("no values", 8, TOP + 10)])

    last = max(x.max() for x, _, _ in series.values())
    low = min(min(mean.min(), np.percentile(y, 2)) for _, y, mean in series.values())
    high = max(max(mean.max(), np.percentile(y, 98)) for _, y, mean in series.values())
    margin = 0.05 * (high - low) or 0.1 * abs(high) or 1.0  # a flat curve needs a range too
    across = (0, max(last, 1)), (LEFT, RIGHT)
    up = (low - margin, high + margin), (BOTTOM, TOP)
    for tick in ticks(*up[0]):
        y = np.interp(tick, *up)
        parts += [line("grid", LEFT, RIGHT, y, y), text(f"{tick:.5g}", LEFT - 6, y + 4, "end")]
    for tick in ticks(*across[0]):
        parts.append(text(f"{tick:.6g}", np.interp(tick, *across), BOTTOM + 16, "middle"))
    parts.append(line("zero", LEFT, RIGHT, BOTTOM, BOTTOM))

    legend = 8
    for number, (name, (x, y, mean)) in enumerate(series.items()):
        color = f"c{number % COLORS}"
        some = slice(None, None, len(x) // POINTS + 1)
        x, y, mean = (
            np.interp(x, *across)[some],
            np.interp(y, *up)[some],
            np.interp(mean, *up)[some],
        )
        faint = "".join(f"M{a:.1f} {b:.1f}h0" for a, b in zip(x, y))
        points = " ".join(f"{a:.1f},{b:.1f}" for a, b in zip(x, mean))
        parts.append(f'<path class="faint {color}" d="{faint}"/>')
        parts.append(f'<polyline class="line {color}" points="{points}"/>')
        if len(series) > 1:
            parts.append(line(f"line {color}", legend, legend + 14, BOTTOM + 32, BOTTOM + 32))
            parts.append(text(name, legend + 19, BOTTOM + 36))
            legend += 30 + room_for(name)
    height = BOTTOM + (44 if len(series) > 1 else 24)
    return drawing(max(width, legend), height, parts)


def dots(title, rows, marks=None):
    """A row for each value: a dot with its interval over an axis with zero, and the numbers.

    Args:    rows: [(label, value, low, high)]; what is not known is None.
             marks: {label: value}: a ring, for the paper's figure, in the row of that label or in
             a row of its own.
    Returns: the text of an SVG.
    """
    marks = marks or {}
    labels = [row[0] for row in rows]
    rows = list(rows) + [(label, None, None, None) for label in marks if label not in labels]
    numbers = [(*row[1:], marks.get(row[0])) for row in rows]
    table = np.array(numbers, float).reshape(-1, 4)  # None becomes NaN
    table[np.isinf(table)] = np.nan
    low, high = np.nanmin(table, initial=0.0), np.nanmax(table, initial=0.0)
    margin = 0.04 * (high - low) or 1.0
    left = 20 + max((room_for(row[0]) for row in rows), default=0)
    right = left + ACROSS
    bottom = 30 + ROW * len(rows)
    scale = (low - margin, high + margin), (left, right)

    parts = [text(title, 8, 16, kind="title")]
    for tick in ticks(*scale[0]):
        x = np.interp(tick, *scale)
        kind = "grid" if tick else "zero"
        parts += [line(kind, x, x, 26, bottom), text(f"{tick:.5g}", x, bottom + 15, "middle")]
    for number, (row, values) in enumerate(zip(rows, table)):
        y = 30 + ROW * (number + 0.5)
        value, start, end, mark = np.interp(values, *scale)  # NaN stays NaN
        said = "–" if np.isnan(value) else f"{values[0]:.3g}"
        if not np.isnan(start + end):
            parts.append(line("whisker c0", start, end, y, y))
            said += f" [{values[1]:.3g}, {values[2]:.3g}]"
        if not np.isnan(value):
            parts.append(circle("dot", value, y))
        if not np.isnan(mark):
            parts.append(circle("ring", mark, y))
            said += f"  ({values[3]:.3g})"
        parts += [text(row[0], left - 10, y + 4, "end"), text(said, right + 10, y + 4)]
    width = max(right + 190, 16 + room_for(title))
    return drawing(width, bottom + 24, parts)


def join(svgs, columns):
    """Several charts in one SVG, row by row."""
    sizes = [
        [float(n) for n in re.search(r'width="(\d+)" height="(\d+)"', s).groups()] for s in svgs
    ]
    wide = max((width for width, _ in sizes), default=0)
    parts, y = [], 0
    for first in range(0, len(svgs), columns):
        for column, svg in enumerate(svgs[first : first + columns]):
            parts.append(svg.replace("<svg ", f'<svg x="{wide * column:.0f}" y="{y:.0f}" ', 1))
        y += max(height for _, height in sizes[first : first + columns])
    return drawing(wide * min(columns, len(svgs)), y, parts)


def save(svg, path):
    write_text(path, svg)


# ---------------------------------------------------------------------------------- pages


def embed(svg):
    """A chart inside a page; it scrolls sideways on a narrow screen."""
    return f'<div class="across">{svg}</div>'


def data_uri(image, longest=448):
    """A picture as the text of a link that holds it, at most `longest` pixels on a side."""
    image = image.convert("RGB")  # a copy
    image.thumbnail((longest, longest))
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=92, subsampling=0)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()


def page(title, body):
    """A whole HTML page that fetches nothing. title: text; body: HTML."""
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{PAGE}{STYLE}</style></head>"
        f"<body><h1>{escape(title)}</h1>{body}</body></html>\n"
    )
