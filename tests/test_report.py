"""report.py: the page shows the numbers of the run, is well-formed, stands alone, and lets no data become markup."""

import base64
import html.parser
import io
import json
import re

import numpy as np
import pytest
from PIL import Image

from files import UserError
from look import report
from look.charts import ticks
from look.report import BOTTOM, LEFT, RIGHT, TOP, pictures, spread

VOID = {"meta", "img", "br"}
EVIL = "</p><script>alert(1)</script>\"'&"


class Page(html.parser.HTMLParser):
    """Checks that tags balance, and collects the text of table cells and every attribute."""

    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.attributes, self.rows, self.cell = [], [], [], [], None
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.attributes += attributes
        if tag not in VOID:
            self.open.append(tag)
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.cell = ""

    def handle_startendtag(self, tag, attributes):
        self.tags.append(tag)
        self.attributes += attributes

    def handle_endtag(self, tag):
        assert self.open.pop() == tag, f"</{tag}> closes nothing"
        if tag in ("td", "th"):
            self.rows[-1].append(" ".join(self.cell.split()))
            self.cell = None

    def handle_data(self, data):
        if self.cell is not None:
            self.cell += data


def write(path, *rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def scores(shift):
    types = {
        "object count": {
            "n": 40,
            "score": 0.5 + shift,
            "low": 0.4 + shift,
            "high": 0.7,
            "blind": 0.55,
        },
        "relative direction": {
            "n": 24,
            "score": 0.25 + shift,
            "low": 0.1,
            "high": 0.5,
            "blind": 0.25,
        },
    }
    return {
        "overall": 0.375 + shift,
        "types": types,
        "well_formed": 0.9,
        "recipe": {},
        "localization": {
            "n": 60,
            "mean_iou": 0.4 + shift,
            "valid_json": 0.98,
            "precision": 0.5,
            "recall": 0.5,
            "mean_box_iou": 0.127,
        },
    }


@pytest.fixture
def run(tmp_path):
    """A run of two rungs with everything in it, and hostile text wherever text can come from data."""
    picture = tmp_path / "room.png"
    Image.new("RGB", (56, 28), "teal").save(picture)
    box = {"bbox_2d": [4, 4, 20, 24], "label": EVIL}
    question = f"<|vision_start|><|image_pad|><|vision_end|>How many? {EVIL}"
    prompt = f"<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n"
    for rung in ("base", "grpo"):
        shared = {
            "prompt": prompt,
            "images": [str(picture)],
            "completion": f"<think>{rung}</think>{EVIL}",
        }
        write(
            tmp_path / "eval" / rung / "predictions.jsonl",
            shared
            | {
                "where": "a.jsonl:1",
                "question_type": "localization",
                "answer": [box],
                "score": 0.625,
                "prediction": [box | {"label": "other"}] if rung == "grpo" else None,
                "size": [56, 28],
            },
            shared
            | {
                "where": "b.jsonl:1",
                "question_type": f"count {EVIL}",
                "answer": EVIL,
                "score": 0.3,
                "prediction": EVIL,
            },
        )
        write(
            tmp_path / rung / "log.jsonl",
            *({"step": i, "loss": 1.0 / i, "reward": i, "kl": None} for i in range(1, 6)),
        )
    write(
        tmp_path / "grpo" / "rollouts.jsonl",
        *(
            {
                "step": step,
                "where": "b.jsonl:1",
                "question_type": "object count",
                "prompt": prompt,
                "answer": EVIL,
                "images": [str(picture), "gone.png"],
                "completions": [f"low {step}", EVIL],
                "advantages": [-0.5, 1.25],
                "rewards": {"format": [1.0, 1.0], EVIL: [0.0, 0.75]},
            }
            for step in range(1, 8)
        ),
    )
    rungs = [
        {"name": name, "style": EVIL, "seconds": 41.4, "scores": scores(shift)}
        for name, shift in (("base", 0.0), ("grpo", 0.2))
    ]
    (tmp_path / "results.json").write_text(
        json.dumps({"preset": EVIL, "seed": 3, "rungs": rungs, "seconds": 90})
    )
    return tmp_path


def page(run):
    return report.report(run).read_text("utf-8")


def test_every_tag_is_closed_and_the_file_is_written_whole(run):
    """An unclosed tag would let one section swallow the next; a leftover temporary file means no rename."""
    Page(page(run))
    assert not list(run.glob("*.tmp"))


def test_text_from_data_never_becomes_markup(run):
    """A completion, label, answer or question type with tags in it must show as text, not run."""
    text = page(run)
    assert "script" not in Page(text).tags
    assert "<script" not in text and text.count("&lt;script&gt;") >= 8


def test_the_page_asks_for_nothing_outside_itself(run):
    """Pictures are data URIs: one link to elsewhere would break the page offline."""
    text = page(run)
    uris = [value for name, value in Page(text).attributes if name in ("src", "href")]
    assert uris and all(re.match("data:image/(jpeg|svg[+]xml);base64,", uri) for uri in uris)
    assert not re.search(r"https?:|//[a-z]|@import", re.sub(r"base64,[A-Za-z0-9+/=]+", "", text))
    assert all(url.startswith("data:") for url in re.findall(r"url\(([^)]*)", text))


def test_table_holds_the_numbers_of_results_json(run):
    """Rungs are rows in order, under the blind baseline; a swapped column would show here."""
    rows = Page(page(run)).rows
    assert rows[0] == [
        "rung answers",
        "localization mean IoU n = 60",
        "valid JSON n = 60",
        "object count n = 40",
        "relative direction n = 24",
        "mean over types",
        "well-formed",
        "seconds",
    ]
    assert rows[1][1:] == ["0.127", "–", "0.550", "0.250", "0.400", "–", "–"]
    assert rows[2][1:] == ["0.400", "0.980", "0.500", "0.250", "0.375", "0.900", "41"]
    assert rows[3][1:] == ["0.600", "0.980", "0.700", "0.450", "0.575", "0.900", "41"]
    assert [row[0].split()[0] for row in rows[1:]] == ["blind", "base", "+"]


def test_cells_are_shaded_by_the_gain_over_blind_and_bold_where_it_is_sure():
    """Green above, red below, depth 0.6 times the gain; bold only when the whole interval lies above."""
    assert (
        report.cell(0.75, 0.25, 0.3, 10)
        == '<td class="clear" style="background:rgb(40 167 90 / 0.30)">0.750</td>'
    )
    assert (
        report.cell(0.75, 0.25, 0.2, 10)
        == '<td style="background:rgb(40 167 90 / 0.30)">0.750</td>'
    )
    assert (
        report.cell(0.1, 0.2, 0.05, 10) == '<td style="background:rgb(208 72 60 / 0.06)">0.100</td>'
    )
    assert report.cell(0.1, None, 0.05, 10) == "<td>0.100</td>"


def test_table_without_localization_or_blind_baselines():
    """A benchmark without training data has no blind baseline: dashes, not a crash and not a zero."""
    bare = scores(0.0) | {
        "types": {"size": {"n": 5, "score": 0.5, "low": 0.1, "high": 0.9, "blind": None}}
    }
    del bare["localization"]
    rows = Page(
        report.ladder([{"name": "base", "style": "direct", "seconds": 1, "scores": bare}])
    ).rows
    assert rows[1][1:] == ["–"] * 6
    assert rows[2][1:] == ["–", "–", "0.500", "0.375", "0.900", "1"]


def polyline(figure):
    return [
        tuple(map(float, point.split(",")))
        for point in re.search(r'polyline points="([^"]*)"', figure)[1].split()
    ]


def test_polyline_of_a_known_log():
    """Five steps are too few to smooth: the line passes through them, from 0 at the left edge to the last step."""
    rows = [{"step": s, "loss": v} for s, v in ((1, 2.0), (2, 1.0), (3, 0.0), (4, 1.0), (5, 2.0))]
    figure = report.panel(rows, "loss", "loss", "nats per token")
    top, bottom = (
        TOP + (BOTTOM - TOP) / 22,
        BOTTOM - (BOTTOM - TOP) / 22,
    )  # the margin is 0.1 of a range of 2.2
    middle, width = (top + bottom) / 2, RIGHT - LEFT
    expected = [
        (LEFT + width * s / 5, y) for s, y in zip(range(1, 6), (top, middle, bottom, middle, top))
    ]
    np.testing.assert_allclose(polyline(figure), expected, atol=0.051)
    assert figure.count("h0") == 5 and "nats per token" in figure


def test_line_is_the_running_mean():
    """A single spike among 48 zeros spreads evenly over the 7 steps whose window holds it."""
    rows = [{"step": s, "loss": 7.0 * (s == 24)} for s in range(1, 49)]
    y = np.array([b for _, b in polyline(report.panel(rows, "loss", "loss", ""))])
    low = y == y.max()
    assert (
        low.sum() == 41
        and np.flatnonzero(~low).tolist() == list(range(20, 27))
        and np.ptp(y[~low]) == 0
    )


def test_steps_without_a_value_are_counted():
    """A NaN in the log must not erase the curve, nor go unmentioned."""
    rows = [
        {"step": 1, "kl": 0.1},
        {"step": 2, "kl": float("nan")},
        {"step": 3, "kl": None},
        {"step": 4, "kl": 0.2},
    ]
    figure = report.panel(rows, "kl", "KL", "nats")
    assert len(polyline(figure)) == 2 and "2 of 4 steps without" in figure
    assert "svg" not in report.panel(rows, "reward", "reward", "sum")


@pytest.mark.parametrize("values", [[1.0], [0.0, 0.0], [3.0, 3.0], [1e-9, 2e-9], [-5.0, 1e6]])
def test_any_range_can_be_drawn(values):
    """A flat or single-step curve has no range of its own: a division by zero here would cost the whole page."""
    points = polyline(
        report.panel([{"step": i + 1, "x": v} for i, v in enumerate(values)], "x", "x", "")
    )
    assert len(points) == len(values) and all(
        TOP <= y <= BOTTOM and LEFT <= x <= RIGHT for x, y in points
    )


def test_long_logs_are_thinned():
    """4500 steps drawn one by one in twenty panels would be megabytes."""
    rows = [{"step": i, "x": i % 7} for i in range(1, 4501)]
    assert len(polyline(report.panel(rows, "x", "x", ""))) == 375


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


def test_boxes_are_drawn_where_they_are(run):
    """Solid true and dashed predicted boxes in the picture's own pixels; a wrong name is white."""
    text = page(run)
    assert 'viewBox="0 0 56 28"' in text
    shape = 'd="M4.0 4.0H20.0V24.0H4.0Z"'
    assert (
        text.count(f'<path class="true" stroke="{report.COLORS[0]}" {shape}/>') == 2
    )  # in both rungs
    assert text.count(f'<path class="seen" stroke="#fff" {shape}/>') == 1
    assert "no boxes" in text and "IoU 0.62" in text


def test_rollouts_show_the_first_and_last_groups_best_completion_first(run):
    """7 steps: two at each end, none in between; a group is read from its highest advantage down."""
    section = page(run).split("Sampled groups</h2>")[1]
    assert re.findall(r"<h3>step (\d+), object count", section) == ["1", "2", "6", "7"]
    assert re.findall(r"<b>([+-]\d\.\d\d)</b>", section) == ["+1.25", "-0.50"] * 4
    assert "format 1.00, " in section and "low 7" in section and "low 4" not in section


def test_few_rollouts_are_shown_once(run):
    """With three groups the first two and the last two overlap; no group may appear twice."""
    path = run / "grpo" / "rollouts.jsonl"
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:3]))
    assert re.findall(r"<h3>step (\d+),", page(run)) == ["1", "2", "3"]


def test_prompts_are_shown_without_special_tokens(run):
    text = page(run)
    assert "How many?" in text and "image_pad" not in text and "im_start" not in text


def test_long_texts_are_cut_and_say_so():
    shown = report.paragraph("a" * 1000)
    assert "a" * 500 + " … (500 more characters)" in shown and "a" * 501 not in shown


def test_an_empty_run_says_what_is_missing(tmp_path):
    """The page can be made at any time: each section of a run that has not begun is a sentence."""
    text = page(tmp_path)
    Page(text)
    for sentence in (
        "Not run yet: base,",
        "No log yet: stage 1,",
        "Not tested yet: base,",
        "No rollouts yet: + GRPO.",
        "Nothing yet that could show trouble.",
        "Not probed yet",
        "Climb more of them: python ladder.py --without",
    ):
        assert sentence in text
    assert "<table" not in text and "<svg" not in text


def test_a_partial_run_shows_what_is_there(run):
    """Two rungs of five: three are named as missing, the others stay."""
    text = page(run)
    assert text.count("Not tested yet: stage 1, stage 1+2, + cold start.") == 2
    assert "Not run yet: stage 1, stage 1+2, + cold start." in text
    assert "Base: loss" in text and "Stage 1: loss" not in text


@pytest.mark.parametrize(
    "name, line, message",
    [
        ("grpo/log.jsonl", '{"step": 6, "loss"', "log.jsonl:6: not JSON"),
        (
            "grpo/log.jsonl",
            '{"loss": 1}',
            "log.jsonl:6: expected an object with the keys step; missing: step",
        ),
        ("grpo/rollouts.jsonl", "[1]", "rollouts.jsonl:8: expected an object"),
        ("eval/base/predictions.jsonl", "", "predictions.jsonl:3: not JSON"),
    ],
)
def test_a_malformed_line_is_named(run, name, line, message):
    """A truncated or foreign file must be found by file and line, not by a traceback."""
    with open(run / name, "a") as file:
        file.write(line + "\n")
    with pytest.raises(UserError, match=re.escape(message)):
        report.report(run)
    assert not (run / "report.html").exists()


def test_a_user_mistake_is_one_line_and_exit_code_2(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["report.py", str(tmp_path / "nowhere")])
    with pytest.raises(SystemExit) as stop:
        report.main()
    assert stop.value.code == 2
    assert (
        capsys.readouterr().err
        == f"{tmp_path / 'nowhere'}: no such directory; expected the --out of ladder.py\n"
    )


def decode(uri):
    return Image.open(io.BytesIO(base64.b64decode(uri.split(",")[1])))


def test_pictures_of_every_kind_of_file(tmp_path):
    """A large picture is reduced, a Motion-JPEG video gives its frames in order, anything else is a grey card."""
    Image.new("RGBA", (900, 450), "red").save(tmp_path / "a.png")
    [large] = pictures(str(tmp_path / "a.png"))
    assert decode(large).size == (448, 224)
    frames = b"RIFF....AVI "
    for color in ("red", "blue", "lime"):
        stream = io.BytesIO()
        Image.new("RGB", (16, 16), color).save(stream, "JPEG")
        frames += b"00dc\0\0\0\0" + stream.getvalue()
    (tmp_path / "v.avi").write_bytes(frames)
    shown = [decode(uri).getpixel((8, 8)) for uri in pictures(str(tmp_path / "v.avi"))]
    assert [int(np.argmax(pixel)) for pixel in shown] == [0, 2, 1]
    (tmp_path / "clip.mp4").write_bytes(b"no picture")
    for name in ("clip.mp4", "gone.png"):
        [card] = pictures(str(tmp_path / name))
        assert decode(card).size == (224, 224)


def test_spread_is_even_and_never_repeats():
    """Nothing is picked by its outcome: first, last and evenly between."""
    assert spread("abcde", 3) == ["a", "c", "e"]
    assert spread("ab", 5) == ["a", "b"]
    assert spread("", 5) == []


def test_the_staircase_draws_what_the_rungs_score(run):
    """A bar as high as its score, the blind guess as a dashed line where it is known, and no bar without a figure; the rungs of
    other ways up are not among them."""
    found = json.loads((run / "results.json").read_text())["rungs"]
    found[0]["scores"] |= {"blind": 0.25}
    found[1]["scores"] |= {"low": 0.5, "high": 0.65}
    del found[0]["scores"]["localization"]
    results = {"preset": "tiny", "seed": 0, "rungs": [*found, found[1] | {"name": "stage2-no1"}]}
    (run / "results.json").write_text(json.dumps(results))
    svg = base64.b64decode(re.search('svg[+]xml;base64,([^"]*)', page(run))[1]).decode()
    bars = [
        (float(y), float(h))
        for y, h in re.findall(r'<rect class="c[^>]* y="([0-9.]+)"[^>]*height="([0-9.]+)"', svg)
    ]
    assert len(bars) == 3 and bars[1][1] / bars[0][1] == pytest.approx(0.575 / 0.375, rel=0.01)
    (level,) = (float(y) for y in re.findall(r'class="level"[^>]* y1="([0-9.]+)"', svg))
    base = bars[0][0] + bars[0][1]
    assert (base - level) / bars[0][1] == pytest.approx(0.25 / 0.375, rel=0.01) and svg.count(
        'class="whisker"'
    ) == 1
    (run / "results.json").unlink()
    assert "svg+xml" not in page(run)


def test_probes_signs_and_other_ways_have_their_sections(run):
    """Charts and pictures that probes.py left, the lines of signs.py, the table of compare.ways."""
    text = page(run)
    assert (
        "Not probed yet" in text
        and "5 steps of GRPO and 0 looks at held-out questions are too few" in text
    )
    assert not any("grpo" in row for row in Page(text).rows)
    (run / "probes" / "hints").mkdir(parents=True)
    (run / "probes" / "hints.svg").write_text("<svg></svg>")
    Image.new("RGB", (28, 28)).save(run / "probes" / "hints" / "full.png")
    for rung, score in (("cold", 0.25), ("grpo", 0.75)):
        write(
            run / "eval" / rung / "predictions.jsonl",
            {
                "id": "1",
                "where": "b.jsonl:1",
                "question_type": "object count",
                "prompt": "",
                "completion": "",
                "prediction": 1,
                "answer": "1",
                "score": score,
                "blind": None,
                "images": [],
            },
        )
    text = page(run)
    assert (
        "Do hints help?" in text and "<small>full</small>" in text and "Not probed yet" not in text
    )
    assert ["cold (no GRPO)", "0.250", "grpo", "-50.0 [-50.0, -50.0]", "-50.0", "-2.1"] in Page(
        text
    ).rows
