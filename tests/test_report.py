"""report.py: the page shows the numbers of the run, stands alone, lets no data become markup."""

import base64
import html.parser
import io
import json
import re

import pytest
from conftest import launch
from PIL import Image

from files import UserError
from look import report
from look.report import picture, spread

VOID = {"meta", "img"}
EVIL = "</p><script>alert(1)</script>\"'&"


class Page(html.parser.HTMLParser):
    """Checks that tags balance, and collects the tags and every attribute."""

    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.attributes = [], [], []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.handle_startendtag(tag, attributes)
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.tags.append(tag)
        self.attributes += attributes

    def handle_endtag(self, tag):
        assert self.open.pop() == tag, f"</{tag}> closes nothing"


def write(path, *rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def scores(shift):
    def part(score, blind, n):
        return {"n": n, "score": score + shift, "low": 0.1 + shift, "high": 0.9, "blind": blind}

    types = {"object count": part(0.5, 0.55, 40), "relative direction": part(0.25, 0.26, 24)}
    return {
        "overall": 0.375 + shift,
        "low": 0.3,
        "high": 0.65,
        "blind": 0.4,
        "n": 64,
        "types": types,
        "well_formed": 0.9,
        "recipe": {},
        "localization": part(0.42, 0.127, 60),
    }


@pytest.fixture
def run(tmp_path):
    """A run of two rungs with everything in it, and hostile text wherever text is from data."""
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
            *({"step": i, "loss": 1.0 / i, "kl": 0.1} for i in range(1, 13)),
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
    write(tmp_path / "results.json", {"preset": "tiny", "seed": 3, "rungs": rungs})
    return tmp_path


def page(run):
    report.report(run)
    return (run / "report.html").read_text("utf-8")


def section(text, heading):
    return text.split(f"<h2>{heading}</h2>")[1].split("<h2>")[0]


def chart(text, title):
    """(labels and numbers, dots, rings) of a chart of dots."""
    svg = next(svg for svg in text.split("<svg")[1:] if f">{title}</text>" in svg)
    places = [re.findall(f'<circle class="{kind}" cx="([0-9.]+)"', svg) for kind in ("dot", "ring")]
    return re.findall("<text[^>]*>([^<]*)</text>", svg), *places


def test_every_tag_is_closed_and_the_file_is_written_whole(run):
    """An unclosed tag would let one section swallow the next; a *.tmp would mean no rename."""
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
    assert uris and all(uri.startswith("data:image/jpeg;base64,") for uri in uris)
    text = re.sub(r"base64,[A-Za-z0-9+/=]+", "", text).replace("http://www.w3.org/2000/svg", "")
    assert not re.search(r"https?:|//[a-z]|@import|url\(", text)


def test_each_score_has_a_chart_with_the_numbers_of_results_json(run):
    """A row for each rung in order, with a ring for the blind baseline."""
    text = section(page(run), "The ladder")
    for title, base, grpo, low, blind in (
        ("all questions", "0.375", "0.575", "0.3", "0.4"),
        ("localization (IoU)", "0.42", "0.62", "0.1", "0.127"),
        ("object count", "0.5", "0.7", "0.1", "0.55"),
        ("relative direction", "0.25", "0.45", "0.1", "0.26"),
    ):
        words, dots, rings = chart(text, title)
        ticks = words.index("base")
        assert words[ticks : ticks + 3] == [
            "base",
            f"{low} to {'0.65' if low == '0.3' else '0.9'}",
            base,
        ]
        assert words[ticks + 3 :: 2] == ["grpo", grpo]
        assert len(dots) == 2 and len(rings) == 2 and rings[0] == rings[1]
        (a, b), ring = map(float, dots), float(rings[0])
        scale = (b - a) / (float(grpo) - float(base))
        assert ring == pytest.approx(a + scale * (float(blind) - float(base)), abs=0.3)
    assert chart(text, "well-formed answers")[0][-4:] == ["base", "0.9", "grpo", "0.9"]


def test_what_a_rung_teaches_and_took_is_said(run):
    text = section(page(run), "The ladder")
    what = {rung.name: rung.what for rung in report.RUNGS}
    assert f"<b>grpo</b> {what['grpo']} <small>({html.escape(EVIL)} answers, 41 s)" in text


def test_other_ways_up_stand_beside_the_ladder(run):
    """A rung that only results.json knows is a further row, wherever it has a score."""
    results = json.loads((run / "results.json").read_text())
    way = results["rungs"][1] | {"name": f"stage2-{EVIL}", "scores": scores(0.1)}
    del way["scores"]["localization"], way["scores"]["types"]["object count"]
    write(run / "results.json", results | {"rungs": [*results["rungs"], way]})
    text = section(page(run), "The ladder")
    assert f"stage2-{html.escape(EVIL)}" in chart(text, "all questions")[0]
    assert len(chart(text, "all questions")[1]) == 3 and len(chart(text, "object count")[1]) == 2
    assert f"<b>stage2-{html.escape(EVIL)}</b> another way up" in text


def test_scores_without_localization_or_blind_baselines(run):
    """A benchmark without training data has no blind baseline: no ring, no crash, no zero."""
    bare = scores(0.0) | {"blind": None, "types": {"size": {"n": 5, "score": 0.5, "blind": None}}}
    del bare["localization"]
    rung = {"name": "base", "style": "direct", "seconds": 1, "scores": bare}
    write(run / "results.json", {"rungs": [rung]})
    text = section(page(run), "The ladder")
    assert chart(text, "size")[1:] == (chart(text, "size")[1], []) and "localization" not in text


def test_curves_of_each_stage(run):
    """The loss of the supervised stages; of GRPO, whose loss says nothing, all the rest."""
    rows = [{"step": i, "loss": 0.0, "reward": 1.0 + i % 2, "entropy": 0.5} for i in range(1, 13)]
    write(run / "grpo" / "log.jsonl", *rows)
    stages = {}
    for svg in section(page(run), "Curves").split("<svg")[1:]:
        words = re.findall("<text[^>]*>([^<]*)</text>", svg)
        stages[words[0]] = [word for word in words if word in ("base", "grpo")]
    assert stages == {
        "loss": ["base"],
        "reward": ["grpo"],
        "KL to the reference": ["base"],
        "entropy": ["grpo"],
    }


def test_a_run_with_hardly_a_step_has_no_signs(run):
    """ladder.py --smoke: what goes wrong there is no alarm."""
    for name in ("base", "grpo"):
        write(run / name / "log.jsonl", *({"step": i, "loss": 1.0} for i in range(1, 5)))
    (line,) = report.report(run)
    text = (run / "report.html").read_text("utf-8")
    assert line.startswith("Hardly a step was trained") and "TROUBLE" not in text
    assert line in section(text, "Signs of trouble")
    assert "<path" in section(text, "Boxes through the rungs")


def test_boxes_are_drawn_where_they_are(run):
    """True and predicted boxes in the picture's own pixels, the label of each beside it."""
    text = section(page(run), "Boxes through the rungs")
    assert text.count('viewBox="0 0 56 28"') == 2  # a rung each
    assert text.count('<path class="true" d="M4.0 4.0H20.0V24.0H4.0Z"/>') == 2
    assert text.count('<path class="seen" d="M4.0 4.0H20.0V24.0H4.0Z"/>') == 1
    assert ">other</text>" in text and "base: IoU 0.62" in text


def test_answers_of_the_rungs_to_one_question(run):
    """The middle question of a type, with its true answer and what each rung says and scores."""
    text = section(page(run), "Answers through the rungs")
    shown = html.escape(EVIL)
    assert f"<h3>count {shown}</h3>" in text and f"True answer: <b>{shown}</b>" in text
    assert (
        '<b class="good">base: 0.30</b>' in text
        and f"&lt;think&gt;grpo&lt;/think&gt;{shown}" in text
    )


def test_chains_are_checked_where_true_ones_are_known(tmp_path):
    """A table of the rungs that think: one chain of two is reckoned rightly, both see the room."""
    reference = {"question_id": 7, "question_type": "room size", "options": None, "answer": "24"}
    solution = "<think>room 18 21: 24</think><answer>24</answer>"
    reference |= {"solution": solution}
    shown = {"where": "a.jsonl:7", "prompt": "How large?", "images": [], "score": 1.0}
    row = reference | shown | {"id": "7", "prediction": "24"}
    wrong = solution.replace("24", "25")
    rows = [row | {"completion": solution}, row | {"completion": wrong}]
    write(tmp_path / "eval" / "grpo" / "predictions.jsonl", *rows)
    heading = "Answers through the rungs"
    assert "<pre>" not in section(page(tmp_path), heading)
    write(tmp_path / "rooms" / "test" / "spld_coldstart_data.jsonl", reference)
    text = page(tmp_path)
    Page(text)
    table = section(text, heading).split("<pre>")[1].split("</pre>")[0]
    assert [line.split() for line in table.splitlines()] == [
        ["chains", "asked", "whole", "places"],
        ["grpo", "2", "1.000", "0.500"],
    ]


def test_rollouts_are_spread_and_show_the_best_completion_first(run):
    """7 steps: every second; the highest advantage of a group is first."""
    text = section(page(run), "Sampled groups")
    assert re.findall(r"<h3>step (\d+), object count", text) == ["1", "3", "5", "7"]
    assert re.findall(r"advantage ([+-]\d\.\d\d) \(", text) == ["+1.25", "-0.50"] * 4
    assert "(format 1.00, " in text and "low 7" in text and "low 4" not in text


def test_prompts_are_shown_without_special_tokens(run):
    text = page(run)
    assert "How many?" in text and "image_pad" not in text and "im_start" not in text


def test_a_chat_is_shown_as_a_conversation():
    """Every turn up to the answer, with its role."""
    said = report.prompt_of(
        {"prompt": "<|im_start|>user\nHow wide?<|im_end|>\n<|im_start|>assistant\n"}
    )
    assert said == "user\nHow wide?\nassistant"


def test_long_texts_are_cut_and_say_so():
    shown = report.paragraph("a" * 1000)
    assert "a" * 500 + " … (500 more characters)" in shown and "a" * 501 not in shown


def test_an_empty_run_says_what_is_missing(tmp_path):
    """The page can be made at any time: each section of a run that has not begun is a sentence."""
    text = page(tmp_path)
    Page(text)
    assert text.count("Nothing yet.") == 6 and "<svg" not in text


def test_a_run_that_goes_on_shows_what_is_there(run):
    """Stages that are trained and not evaluated yet: curves, and no scores."""
    (run / "results.json").unlink()
    text = page(run)
    Page(text)
    assert "<svg" in section(text, "Curves") and "<svg" not in section(text, "The ladder")


@pytest.mark.parametrize(
    "name, line, message",
    [
        ("grpo/log.jsonl", '{"step": 6, "loss"', "log.jsonl:13: not JSON"),
        ("grpo/rollouts.jsonl", "[1]", "rollouts.jsonl:8: expected an object"),
        ("eval/base/predictions.jsonl", "nan", "predictions.jsonl:3: not JSON"),
    ],
)
def test_a_malformed_line_is_named(run, name, line, message):
    """A truncated or foreign file must be found by file and line, not by a traceback."""
    with open(run / name, "a") as file:
        file.write(line + "\n")
    with pytest.raises(UserError, match=re.escape(message)):
        report.report(run)
    assert not (run / "report.html").exists()


def test_a_user_mistake_is_one_line_and_exit_code_2(tmp_path):
    done = launch("look.report", tmp_path / "nowhere")
    assert done.returncode == 2 and done.stderr == (
        f"report.py: {tmp_path}/nowhere: no such directory; expected the --out of ladder.py\n"
    )


def test_the_command_says_the_signs_and_where_the_page_is(run, call, capsys):
    rows = [{"step": i, "reward": 1.0} for i in range(1, 13)]
    write(run / "grpo" / "log.jsonl", *rows)
    call(report, run)
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1] == str(run / "report.html")
    boxes, sign = lines[:-1]
    assert boxes.startswith("ok      grpo: 100.0% of its localization answers are valid JSON")
    assert sign.startswith("unknown grpo: 12 steps of GRPO with 0 evaluations")
    assert sign in section((run / "report.html").read_text("utf-8"), "Signs of trouble")


def test_pictures_of_every_kind_of_file(tmp_path):
    """A large picture is reduced; what is no picture, or is not there, is a grey card."""
    Image.new("RGBA", (900, 450), "red").save(tmp_path / "a.png")
    assert decode(picture(tmp_path / "a.png")).size == (448, 224)
    (tmp_path / "clip.mp4").write_bytes(b"no picture")
    for name in ("clip.mp4", "gone.png"):
        assert decode(picture(tmp_path / name)).size == (224, 224)


def decode(uri):
    return Image.open(io.BytesIO(base64.b64decode(uri.split(",")[1])))


def test_spread_is_even_and_never_repeats():
    """Nothing is picked by its outcome."""
    assert spread("abcdefghij", 3) == "aei"
    assert spread("ab", 5) == "ab"
    assert spread("", 5) == ""


def test_what_the_probes_left_is_shown(run):
    """Each chart, and the pictures in the folder of its name."""
    assert "Nothing yet." in section(page(run), "Probes")
    (run / "probes" / "hints").mkdir(parents=True)
    (run / "probes" / "hints.svg").write_text('<svg id="chart"></svg>')
    Image.new("RGB", (28, 28)).save(run / "probes" / "hints" / "full.png")
    text = section(page(run), "Probes")
    assert "<h3>hints</h3>" in text and '<svg id="chart">' in text
    assert text.count("<img") == 1 and "<figcaption>full</figcaption>" in text
