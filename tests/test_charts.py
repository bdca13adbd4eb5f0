"""charts.py: marks stand where their values are, none is lost, any label is well-formed."""

import base64
import html.parser
import io
import re
import xml.etree.ElementTree as xml

import numpy as np
import pytest
from PIL import Image

from look.charts import BOTTOM, LEFT, RIGHT, TOP, boxed, curve, data_uri, dots, join, page, ticks

EVIL = "</text><script>alert(1)</script>\"'&"
SVG = "{http://www.w3.org/2000/svg}"


def parse(svg):
    """The root element: an SVG that is not well-formed ends here."""
    return xml.fromstring(svg)


def texts(svg):
    return [element.text or "" for element in parse(svg).iter(f"{SVG}text")]


def line_of(svg, number=0):
    """The points of a curve's line."""
    points = [*parse(svg).iter(f"{SVG}polyline")][number].get("points")
    return np.array([point.split(",") for point in points.split()], float)


def circles(svg, kind):
    found = [c for c in parse(svg).iter(f"{SVG}circle") if c.get("class") == kind]
    return [(float(c.get("cx")), float(c.get("cy"))) for c in found]


# ---------------------------------------------------------------------------------- curve


def test_the_line_of_five_known_points():
    """Too few to smooth: it passes through them, from 0 at the left edge to the last step."""
    svg = curve("loss", {"stage": list(zip(range(1, 6), (2.0, 1.0, 0.0, 1.0, 2.0)))}, "nats")
    margin = (BOTTOM - TOP) / 22  # 0.1 of a range of 2.2
    top, bottom = TOP + margin, BOTTOM - margin
    middle = (top + bottom) / 2
    heights = (top, middle, bottom, middle, top)
    expected = [(LEFT + (RIGHT - LEFT) * s / 5, y) for s, y in zip(range(1, 6), heights)]
    np.testing.assert_allclose(line_of(svg), expected, atol=0.051)
    assert svg.count("h0") == 5 and texts(svg)[:2] == ["loss", "nats"] and "stage" in texts(svg)


def test_the_line_is_the_running_mean():
    """A single spike among 48 zeros spreads evenly over the 7 steps whose window holds it."""
    y = line_of(curve("", {"a": [(s, 7.0 * (s == 24)) for s in range(1, 49)]}))[:, 1]
    low = y == y.max()
    assert low.sum() == 41 and np.ptp(y[~low]) == 0
    assert np.flatnonzero(~low).tolist() == list(range(20, 27))


def test_a_dot_beyond_the_frame_stands_on_its_edge():
    """A spike neither flattens the curve nor leaves the picture."""
    values = [(s, 1.0 + 0.01 * (s % 2)) for s in range(1, 100)] + [(100, 1000.0)]
    faint = re.search('class="faint" d="([^"]*)"', curve("", {"a": values}))[1]
    heights = [float(y) for y in re.findall(r"M\S+ (\S+?)h0", faint)]
    assert len(heights) == 100 and heights[-1] == TOP and max(heights) <= BOTTOM


@pytest.mark.parametrize("values", [[1.0], [0.0, 0.0], [3.0, 3.0], [1e-9, 2e-9], [-5.0, 1e6]])
def test_any_range_can_be_drawn(values):
    """A flat or single-step curve has no range of its own: dividing by it would cost a page."""
    points = line_of(curve("", {"x": list(enumerate(values, 1))}))
    assert len(points) == len(values)
    assert (points >= (LEFT, TOP)).all() and (points <= (RIGHT, BOTTOM)).all()


def test_long_lines_are_thinned_and_several_have_their_names():
    """4500 steps drawn one by one in twenty charts would be megabytes."""
    svg = curve("", {"long": [(i, i % 7) for i in range(1, 4501)], "short": [(1, 1.0), (2, 2.0)]})
    assert len(line_of(svg)) == 375 and len(line_of(svg, 1)) == 2
    assert {"long", "short"} <= set(texts(svg)) and 'class="c1"' in svg and 'class="c2"' in svg


# ---------------------------------------------------------------------------------- dots


def test_dots_stand_where_their_values_are():
    """On one scale with zero: dots, whiskers and rings; each row with its numbers."""
    svg = dots("scores", [("a", 1.0, 0.5, 2.0, 1.5), ("b", -0.5, None, None, None)])
    (a, b), (ring,) = circles(svg, "dot"), circles(svg, "ring")
    whisker = next(e for e in parse(svg).iter(f"{SVG}line") if e.get("class") == "whisker")
    zero = next(e for e in parse(svg).iter(f"{SVG}line") if e.get("class") == "zero")
    unit = a[0] - float(zero.get("x1"))
    for place, value in ((b[0], -0.5), (ring[0], 1.5)):
        assert place == pytest.approx(a[0] + (value - 1) * unit, abs=0.2)
    assert float(whisker.get("x1")) == pytest.approx(a[0] - 0.5 * unit, abs=0.2)
    assert float(whisker.get("x2")) == pytest.approx(a[0] + unit, abs=0.2)
    assert ring[1] == a[1] < b[1]
    assert texts(svg)[-5:] == ["a", "0.5 to 2", "1", "b", "-0.5"]


def test_small_numbers_do_not_run_into_their_interval():
    """0.00116 was as wide as its column."""
    svg = dots("entropy", [("base", 0.00116, -0.00058, 0.0029, None)])
    assert texts(svg)[-2:] == ["-0.001 to 0.003", "0.001"]


@pytest.mark.parametrize("value", [0.0, 1.0, -3e-9, 5e7])
def test_nothing_of_a_row_is_outside_the_picture(value):
    svg = dots("t", [("only", value, value, value, 2 * value)])
    width, height = float(parse(svg).get("width")), float(parse(svg).get("height"))
    for x, y in circles(svg, "dot") + circles(svg, "ring"):
        assert 5 < x < width - 5 and 5 < y < height - 5


def test_a_long_label_has_its_room():
    """Wide characters too: a label ends left of the frame and begins inside the picture."""
    for label, wide in (("x" * 200, 7.5), ("回答" * 20, 12.5)):
        svg = dots("t", [(label, 0.5, None, None, None)])
        place = next(e for e in parse(svg).iter(f"{SVG}text") if e.text == label)
        assert float(place.get("x")) > wide * len(label)


@pytest.mark.parametrize(
    "low, high, expected",
    [
        (0, 1, [0, 0.5, 1]),
        (0, 1500, [0, 500, 1000, 1500]),
        (1.41, 1.72, [1.5, 1.6, 1.7]),
        (-0.003, 0.004, [-0.002, 0, 0.002, 0.004]),
    ],
)
def test_ticks_are_round_and_inside(low, high, expected):
    found = ticks(low, high)
    np.testing.assert_allclose(found, expected, atol=1e-12)
    assert "-0" not in [f"{t:.6g}" for t in found]  # once shown at the origin of every chart


# ---------------------------------------------------------------------------------- together


def test_labels_never_become_markup():
    """Titles, names, labels and units."""
    charts_made = [
        curve(EVIL, {EVIL: [(1, 2.0), (2, 1.0)]}, EVIL),
        dots(EVIL, [(EVIL, 1.0, None, None, None)]),
    ]
    for svg in (*charts_made, join(charts_made)):
        assert "<script" not in svg
        assert EVIL in texts(svg)


def test_joined_charts_stand_below_each_other():
    svgs = [dots(str(n), [(f"row {n}", n, None, None, None)] * n) for n in (1, 2, 3)]
    sizes = [(int(parse(svg).get("width")), int(parse(svg).get("height"))) for svg in svgs]
    heights = [height for _, height in sizes]
    root = parse(join(svgs))
    places = [int(e.get("y")) for e in root.findall(f"{SVG}svg")]
    assert places == [0, heights[0], heights[0] + heights[1]]
    assert int(root.get("width")) == max(width for width, _ in sizes)
    assert int(root.get("height")) == sum(heights)


def decode(uri):
    return Image.open(io.BytesIO(base64.b64decode(uri.split(",")[1])))


def test_a_picture_in_a_link_is_reduced_and_the_original_stays():
    picture = Image.new("RGBA", (900, 450), "red")
    assert decode(data_uri(picture)).size == (448, 224) and picture.size == (900, 450)
    assert decode(data_uri(picture, 900)).size == (900, 450)


def test_boxes_are_drawn_in_the_pixels_of_the_picture():
    box = {"bbox_2d": [4, 4, 20, 24], "label": "<b>"}
    svg = boxed("data:", (56, 28), {"true": [box], "seen": ()}, "<i>")
    assert 'viewBox="0 0 56 28"' in svg and 'class="true" d="M4.0 4.0H20.0V24.0H4.0Z"' in svg
    assert "&lt;b&gt;" in svg and "&lt;i&gt;" in svg and svg.count("<path") == 1


def test_a_page_has_its_title_as_text():
    text = page("<b>", "<p>body</p>")
    html.parser.HTMLParser().feed(text)
    assert "<title>&lt;b&gt;</title>" in text and "<h1>&lt;b&gt;</h1><p>body</p>" in text
