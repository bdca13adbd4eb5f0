"""Charts without a library, with intervals: bars, and differences; SVG that stands alone and suits light and dark pages."""

from html import escape

import numpy as np

STYLE = """:root{color-scheme:light dark;--ink:#1f2328;--soft:#626c7a;--line:#dfe2e7;--a:#9db8ea;--b:#5b8be0;--c:#1d4fae}
@media (prefers-color-scheme:dark){:root{--ink:#dde2e8;--soft:#949eac;--line:#2a3038;--a:#33507f;--b:#5b8be0;--c:#a9c6ff}}
text{font:12.5px system-ui,sans-serif;fill:var(--soft)}.title{font-size:14px;font-weight:600;fill:var(--ink)}
.tick{stroke:var(--line)}.whisker{stroke:var(--ink);stroke-width:1.3}.level{stroke:var(--soft);stroke-dasharray:5 4}
.a{fill:var(--a)}.b{fill:var(--b)}.c{fill:var(--c)}.paper{opacity:.45}
.ring{fill:none;stroke:var(--ink);stroke-width:1.6}""".replace("\n", "")


def rect(kind, x, y, wide, high):
    return f'<rect class="{kind}" x="{x:.1f}" y="{y:.1f}" width="{wide}" height="{high:.1f}"/>'


def line(kind, x1, x2, y1, y2):
    return f'<line class="{kind}" x1="{x1:.1f}" x2="{x2:.1f}" y1="{y1:.1f}" y2="{y2:.1f}"/>'


def text(words, x, y, anchor="start", kind="label"):
    return f'<text class="{kind}" x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(words)}</text>'


def drawing(width, height, parts):
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}">'
        f"<style>{STYLE}</style>{''.join(parts)}</svg>\n"
    )


def save_chart(svg, path):
    """Never half written."""
    path.with_suffix(".tmp").write_text(svg, "utf-8")
    path.with_suffix(".tmp").replace(path)


def bars(rows, paper, panels):
    """SVG: panels one under the other, a group of bars with their intervals for each row, the paper's paler.

    Args:    rows: [{"name": ..., figure: {"value", and where known "low" and "high"}}]. paper: {group: {figure: value}}.
             panels: [(title, figures drawn as bars, figures of the first row drawn as dashed lines)]; a row without a
             figure has no bar there, a panel without a bar is left out.
    """
    groups = [(row["name"], row, "") for row in rows] + [
        (group, {name: {"value": value} for name, value in figures.items()}, "paper")
        for group, figures in paper.items()
    ]
    left, height, svg = 44, 250, []
    step = max([124, *(7 * len(label) for label, _, _ in groups)])
    panels = [
        panel for panel in panels if any(bar in row for _, row, _ in groups for bar in panel[1])
    ]
    for number, (title, figures, levels) in enumerate(panels):
        shown = [
            (label, row, kind) for label, row, kind in groups if any(bar in row for bar in figures)
        ]
        dashed = {level: rows[0][level]["value"] for level in levels if level in rows[0]}
        most = 1.05 * max(
            *dashed.values(),
            1e-3,
            *(
                row[bar].get("high", row[bar]["value"])
                for _, row, _ in shown
                for bar in figures
                if bar in row
            ),
        )
        top, base, right = height * number, height * number + 204, left + step * len(shown)
        wide, colours = min(26, 84 // len(figures)), {1: "c", 2: "ca", 3: "abc"}[len(figures)]

        def up(value):
            return base - value / most * 144

        svg.append(text(title, left, top + 20, kind="title"))
        for i, bar in enumerate(figures if len(figures) > 1 else ()):
            svg += [
                rect(colours[i], left + 190 * i, top + 31, 10, 10),
                text(bar, left + 190 * i + 15, top + 40),
            ]
        for tick in ticks(0, most, 5):
            svg += [
                line("tick", left, right, up(tick), up(tick)),
                text(f"{tick:.4g}", left - 6, up(tick) + 4, "end"),
            ]
        for place, (label, row, kind) in enumerate(shown):
            middle = left + step * (place + 0.5)
            svg += [
                text(label, middle, base + 17, "middle"),
                text(kind, middle, base + 32, "middle"),
            ]
            for i, bar in enumerate(figures):
                x, figure = middle + wide * (i - len(figures) / 2), row.get(bar, {"value": 0})
                svg.append(
                    rect(
                        f"{colours[i]} {kind}",
                        x + 1,
                        up(figure["value"]),
                        wide - 2,
                        base - up(figure["value"]),
                    )
                )
                if "low" in figure:
                    svg.append(
                        line(
                            "whisker",
                            x + wide / 2,
                            x + wide / 2,
                            up(figure["low"]),
                            up(figure["high"]),
                        )
                    )
        for level, value in dashed.items():
            svg += [
                line("level", left, right, up(value), up(value)),
                text(level, right + 6, up(value) + 4),
            ]
    return drawing(
        left + max([step * len(groups) + 96, *(8 * len(title) for title, _, _ in panels)]),
        height * len(panels),
        svg,
    )


def differences(rows, title):
    """SVG: a line for each row, on it a dot with its interval and a paler one for each seed, left or right of zero, and a ring
    where the paper's lies.

    Args:    rows: [{"name", "value", "low", "high", "seeds": numbers, "paper": number or None}].
    """
    left, right, top, step = 150, 620, 62, 24
    ends = [
        0.0,
        *(
            number
            for row in rows
            for number in (row["low"], row["high"], *row["seeds"], row["paper"])
            if number is not None
        ),
    ]
    margin, bottom = 0.04 * (max(ends) - min(ends)) or 1.0, top + step * len(rows)

    def across(value):
        return float(np.interp(value, (min(ends) - margin, max(ends) + margin), (left, right)))

    def circle(kind, x, y):
        return f'<circle class="{kind}" cx="{x:.1f}" cy="{y:.1f}" r="4.5"/>'

    svg = [text(title, 12, 20, kind="title")]
    for x, kind, words in ((17, "c", "all"), (77, "a", "each seed"), (177, "ring", "the paper")):
        svg += [circle(kind, x, 38), text(words, x + 11, 42)]
    for tick in ticks(min(ends) - margin, max(ends) + margin, 6):
        svg += [
            line("tick" if tick else "level", across(tick), across(tick), top, bottom),
            text(f"{tick:+.4g}" if tick else "0", across(tick), bottom + 18, "middle"),
        ]
    for number, row in enumerate(rows):
        y = top + step * (number + 0.5)
        svg += [
            text(row["name"], left - 12, y + 4, "end"),
            line("whisker", across(row["low"]), across(row["high"]), y, y),
            *(circle("a", across(seed), y) for seed in row["seeds"]),
            circle("c", across(row["value"]), y),
            *([circle("ring", across(row["paper"]), y)] if row["paper"] is not None else []),
        ]
    return drawing(right + 24, bottom + 30, svg)


def ticks(low, high, count=4):
    """At most count + 1 round numbers within [low, high], 1, 2 or 5 times a power of ten apart."""
    power = 10 ** np.floor(np.log10((high - low) / count))
    step = next(power * m for m in (1, 2, 5, 10) if power * m * count >= (high - low) * (1 - 1e-9))
    return (
        step * np.arange(np.ceil(low / step - 1e-9), np.floor(high / step + 1e-9) + 1) + 0.0
    )  # no minus zero
