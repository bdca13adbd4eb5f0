"""rewards.py: parsers by their documented tables, the authors' values, and no text that raises."""

import json
import math
import re
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import rewards
from files import UserError


@dataclass
class Row:  # the two fields of a Sample that a reward reads, and the one an error names
    question_type: str
    answer: str | tuple
    where: str = "file.jsonl:17"


def tagged(answer):
    return f"<think>I look at it.</think>\n<answer>{answer}</answer>"


def box(x1, y1, x2, y2, label="bed"):
    return {"bbox_2d": [x1, y1, x2, y2], "label": label}


# (type, completion, truth, the authors' format, their accuracy,
# ours where it differs: (format, accuracy, why)).
# Values: made by running the authors' reward functions (grpo_spld_stage3.py:124-246).
CHOICE, NUMBER = "relative direction", "object count"
AUTHORS = [
    (CHOICE, tagged("A"), "A", 1, 1, None),
    (CHOICE, tagged("a."), "A", 1, 1, None),
    (CHOICE, tagged("A. left"), "A", 1, 0, (1, 1, "letter followed by its text counts")),
    (
        CHOICE,
        "<think>x</think><answer>B</answer><answer>A</answer>",
        "A",
        0,
        1,
        None,
    ),  # the last answer counts
    (CHOICE, "A", "A", 0, 1, None),  # accuracy is paid without the format
    (CHOICE, "<think>a<think>b</think><answer>A</answer>", "A", 0, 1, None),
    (CHOICE, tagged("(B)"), "B", 1, 0, (1, 1, "brackets count")),
    (CHOICE, tagged("Because"), "B", 1, 0, None),
    (CHOICE, tagged(""), "B", 1, 0, (0, 0, "an empty answer is not well-formed")),
    (NUMBER, tagged("4"), "4", 1, 1, None),
    (NUMBER, tagged("4 chairs"), "4", 1, 0, None),
    (NUMBER, tagged("four"), "4", 1, 0, None),
    (NUMBER, tagged("1.5."), "1.5", 1, 1, None),
    (NUMBER, tagged("100"), "100", 1, 1, None),
    (NUMBER, tagged("3"), "4", 1, 0.6, None),
]


@pytest.mark.parametrize("kind, completion, truth, form, accuracy, ours", AUTHORS)
def test_rewards_equal_the_authors_but_for_the_listed_differences(
    kind, completion, truth, form, accuracy, ours
):
    """A changed parser would train towards another reward than the paper's."""
    expected = ours[:2] if ours else (form, accuracy)
    assert rewards.REWARDS["format"]([completion]) == [expected[0]]
    assert rewards.REWARDS["accuracy"]([completion], Row(kind, truth)) == [expected[1]]


@pytest.mark.parametrize(
    "text",
    [
        "<think> </think><answer>A</answer>",
        "<think>x</think><answer>\n</answer>",
        "<think>x</think>junk</think><answer>A</answer>",
        "<think>x</think><answer>A</answer></answer>",
    ],
)
def test_format_is_stricter_than_the_authors_regex(text):
    """Each of these passes the authors' regex: a policy earns the format without a thought."""
    assert re.fullmatch(r"^<think>.*?</think>\s*<answer>.*?</answer>$", text, re.DOTALL)
    assert rewards.format_reward([text]) == [0.0]


@pytest.mark.parametrize(
    "text",
    [
        "",
        "A",
        "<think>x</think>",
        "<answer>A</answer>",
        "<answer>A</answer><think>x</think>",
        "x" + tagged("A"),
        tagged("A") + "x",
        "<think>x</think>y<answer>A</answer>",
        "<think>x<answer>A</answer></think>",
        tagged("A") * 2,
        "<think><answer>x</think></answer>",
        "<THINK>x</THINK><ANSWER>A</ANSWER>",
        "<think>x</think><answer>A",
    ],
)
def test_format_refuses_all_that_is_not_one_of_each_tag_in_order(text):
    assert rewards.format_reward([text, f"\n {tagged('A')} \n"]) == [
        0.0,
        1.0,
    ]  # space around it is allowed


@pytest.mark.parametrize(
    "text, answer",
    [
        ("<answer>A</answer><answer>B", "A"),
        ("<answer>A<answer>B</answer>", "B"),
        ("<answer>A</answer></answer>", "A"),
        ("<answer>A", None),
        ("A</answer>", None),
        ("", None),
        ("<answer></answer>", ""),
        ("<answer>a\nb</answer>", "a\nb"),
    ],
)
def test_extract_answer_takes_the_last_closed_and_innermost(text, answer):
    assert rewards.extract_answer(text) == answer


def documented(function):
    """The texts that a docstring's table lists: (accepted, refused), without the headings."""
    rows = [
        re.split(r" {2,}", line.strip()) for line in function.__doc__.splitlines() if ":  " in line
    ]
    texts = [[text for text in row if len(text) < 3 or text[-1] != ":"] for row in rows]
    accepted = [text for row in texts[:-1] for text in row]
    return accepted, texts[-1]


def test_parse_choice_does_what_its_docstring_lists():
    """The docstring is what users read of the strict parser: it may not drift."""
    accepted, refused = documented(rewards.parse_choice)
    assert len(accepted) == 9 and len(refused) == 7
    assert [rewards.parse_choice(text) for text in accepted] == ["B"] * 9
    assert [rewards.parse_choice(text) for text in refused] == [None] * 7


def test_parse_number_does_what_its_docstring_lists():
    """As above; each accepted text's value is written out here."""
    values = {
        "3.5": 3.5,
        "3.5.": 3.5,
        ".5": 0.5,
        "5.": 5,
        "+4": 4,
        "-4": -4,
        "1e1": 10,
        "1,200": 1200,
        "1,200.5": 1200.5,
        "3.5 m": 3.5,
        "3.5m": 3.5,
        "85 cm": 85,
        "2 meters": 2,
        "20 m2": 20,
        "20 square meters": 20,
        "120 CM": 120,
        "2.5 Meters": 2.5,
        "20 Square Metres": 20,
    }
    accepted, refused = documented(rewards.parse_number)
    assert accepted == list(values) and len(refused) == 9
    assert [rewards.parse_number(text) for text in accepted] == list(values.values())
    assert [rewards.parse_number(text) for text in refused] == [None] * 9


UNITS = ["m", "cm", "meter", "meters", "metre", "metres", "centimeters", "sq m", "square metres"]


@pytest.mark.parametrize("unit", [*UNITS, "m2", "m^2", "m²", "square centimeter"])
def test_a_unit_is_one_in_any_case(unit):
    """A model writes units as its training texts did; the number is the same."""
    for written in (unit, unit.upper(), unit.title(), unit.capitalize(), unit.swapcase()):
        for text in (f"2.5 {written}", f"2.5{written}", f"2.5 {written}."):
            assert rewards.parse_number(text) == 2.5
            assert rewards.accuracy_reward([text], Row("object size", "2.5")) == [1.0]
    for other in ("KM", "Feet", "MM", "Inches", "M3"):
        assert rewards.parse_number(f"2.5 {other}") is None


@pytest.mark.parametrize(
    "text",
    ["", " ", "-", ".", ",", "1,2", "1 200", "m", "1.2.3", "--4", "٣", "²", "1e", "0x10", "1_000"],
)
def test_parse_number_refuses_what_is_not_one_number(text):
    assert rewards.parse_number(text) is None


# |prediction - truth| on and around the thresholds; run through the authors' code
MRA = [
    (3, 4, 0.6),
    (2, 4, 0.1),
    (105, 100, 1),
    (95, 100, 1),
    (80, 100, 0.6),
    (1.2, 1.0, 0.7),
    (55, 100, 0.1),
    (1.45, 1.0, 0.2),
    (62, 100, 0.3),
    (1.1, 1.0, 0.9),
    (90, 100, 0.9),
    (75, 100, 0.6),
    (65, 100, 0.4),
    (60, 100, 0.3),
    (1.35, 1, 0.3),
    (12, 10, 0.6),
    (0.95, 1.0, 1),
    (4, 4, 1),
    (1, 4, 0),
    (20.5, 22.3, 0.9),
    (30, 20, 0.1),
    (2.0, 1.5, 0.4),
    (0, 0, 1),
    (0.1, 0, 0),
    (-4, -4, 1),
    (-3, -4, 0.6),
    (4, -4, 0),  # ours: theirs divides by zero or is always 1
    (math.inf, 4, 0),
    (-math.inf, 4, 0),
    (math.nan, 4, 0),
    (math.nan, 0, 0),
    (1e308, -1e308, 0),
    (1e308, 1e-308, 0),
]


@pytest.mark.parametrize("prediction, truth, score", MRA)
def test_mean_relative_accuracy_at_its_thresholds(prediction, truth, score):
    """Integer thresholds, a rounded 1 - theta or < for <= each move some of these by 0.1."""
    assert rewards.mean_relative_accuracy(prediction, truth) == score


def test_mean_relative_accuracy_equals_the_formula_as_the_authors_compute_it():
    confidences = np.linspace(0.5, 0.95, int((0.95 - 0.5) / 0.05 + 2))
    for truth in (1, 4, 10, 22.3, 100):
        for percent in range(40, 165, 5):
            prediction = truth * percent / 100
            expected = (abs(prediction - truth) / truth <= 1 - confidences).mean()
            assert rewards.mean_relative_accuracy(prediction, truth) == expected


@given(
    st.floats(allow_nan=True, allow_infinity=True), st.floats(allow_nan=False, allow_infinity=False)
)
def test_mean_relative_accuracy_is_a_tenth_step_in_the_unit_interval(prediction, truth):
    """A NaN or a crash for any pair would stop a training run."""
    score = rewards.mean_relative_accuracy(prediction, truth)
    assert (
        score in [step / 10 for step in range(11)]
        and rewards.mean_relative_accuracy(truth, truth) == 1.0
    )


# ------------------------------------------------------------ boxes
ROWS = '{"bbox_2d": [1, 2, 30, 40], "label": "bed"}', '{"label": "desk", "bbox_2d": [5, 6.5, 7, 8]}'
BOTH = [box(1, 2, 30, 40), box(5, 6.5, 7, 8, "desk")]


@pytest.mark.parametrize(
    "text",
    [
        "\n".join(ROWS),
        ",\n".join(ROWS),
        ",\n".join(ROWS) + ",\n",
        "[" + ", ".join(ROWS) + "]",
        "[\n" + ",\n".join(ROWS) + "\n]",
        "```json\n" + "\n".join(ROWS) + "\n```",
        "```\n[" + ",".join(ROWS) + "]\n```",
        "Here:\n```json\n[" + ",".join(ROWS) + "]```\nDone.",
        json.dumps(BOTH, indent=4),
        "\n".join(json.dumps(row, indent=1) for row in BOTH),
        "\r\n".join(ROWS),
    ],
)
def test_parse_boxes_takes_lists_and_lines_fenced_or_not(text):
    assert rewards.parse_boxes(text) == BOTH


@pytest.mark.parametrize(
    "text",
    [
        "",
        "bed",
        "4",
        "null",
        '"bed"',
        "{}",
        "[[]]",
        "[1]",
        '[{"bbox_2d": [1, 2, 3, 4]}]',
        '[{"label": "bed"}]',
        json.dumps([box(1, 2, 3, 4)])[:-1],
        '{"bbox_2d": [1, 2, 3], "label": "bed"}',
        '{"bbox_2d": [1, 2, 3, 4, 5], "label": "a"}',
        '{"bbox_2d": [1, 2, 3, "4"], "label": "bed"}',
        '{"bbox_2d": [1, 2, 3, true], "label": "bed"}',
        '{"bbox_2d": [1, 2, 3, NaN], "label": "bed"}',
        '{"bbox_2d": [1, 2, 3, 1e999], "label": "bed"}',
        '{"bbox_2d": [1, 2, 3, 1' + "0" * 5000 + '], "label": "bed"}',
        '{"bbox_2d": [1, 2, 3, 4], "label": 5}',
        '{"bbox_2d": "1234", "label": "bed"}',
        '{"bbox_2d": {"1": 1, "2": 2, "3": 3, "4": 4}, "label": "bed"}',
        "[" * 100_000,
        '{"a":' * 100_000,
        json.dumps(json.dumps([box(1, 2, 3, 4)])),
    ],
)  # the last: encoded twice, as the authors' stage-1 answers are
def test_parse_boxes_refuses_what_is_not_json_of_that_form(text):
    assert rewards.parse_boxes(text) is None


FRAGMENTS = st.lists(
    st.sampled_from(
        [
            "<think>",
            "</think>",
            "<answer>",
            "</answer>",
            "```json",
            "```",
            "{",
            "}",
            "[",
            "]",
            '"bbox_2d"',
            '"label"',
            ":",
            ",",
            "\n",
            " ",
            '"bed"',
            "1",
            "-2.5",
            "1e999",
            "NaN",
            "true",
            "null",
            "A",
            "B.",
            "(C)",
            "3.5 m",
            "1,200",
            "\\",
            "\ud800",
            "\u2028",
        ]
    )
).map("".join)


@settings(max_examples=300)
@given(st.text() | FRAGMENTS)
def test_no_text_makes_a_reward_raise(text):
    """A model writes anything; one exception ends a run of days."""
    truth = {"localization": (box(0, 0, 2, 2),), CHOICE: "B", NUMBER: "4"}
    for kind, answer in truth.items():
        scores = rewards.accuracy_reward([text], Row(kind, answer)) + rewards.format_reward([text])
        assert all(0.0 <= score <= 1.0 for score in scores)
    boxes = rewards.parse_boxes(text)
    assert boxes is None or rewards.parse_boxes(json.dumps(boxes)) == boxes


CORNERS = st.tuples(*[st.floats(-1e3, 1e3)] * 4)


@given(CORNERS, CORNERS)
def test_box_iou_is_symmetric_bounded_and_one_only_for_itself(a, b):
    iou = rewards.box_iou(a, b)
    assert iou == rewards.box_iou(b, a) and 0.0 <= iou <= 1.0
    assert rewards.box_iou(a, a) == float(
        (a[2] - a[0] > 0 and a[3] - a[1] > 0) and (a[2] - a[0]) * (a[3] - a[1]) > 0
    )


def test_box_iou_of_absurd_corners_is_a_number():
    """Areas beyond float64 are inf, and inf - inf is nan, which would end a run."""
    assert rewards.box_iou((0, 0, 1e300, 1e300), (0, 0, 1e300, 1e300)) == 0.0


def test_box_iou_equals_counting_pixels():
    """An oracle: paint both boxes on a grid and count."""
    generator = np.random.default_rng(0)
    for _ in range(200):
        a, b = np.sort(generator.integers(0, 12, (2, 2, 2)), axis=1).reshape(2, 4)
        grids = np.zeros((2, 12, 12), bool)
        for grid, (x1, y1, x2, y2) in zip(grids, (a, b)):
            grid[y1:y2, x1:x2] = True
        union = (grids[0] | grids[1]).sum()
        assert rewards.box_iou(a.tolist(), b.tolist()) == (
            (grids[0] & grids[1]).sum() / union if union else 0.0
        )


def test_localization_scores_by_hand():
    true = [box(0, 0, 10, 10), box(20, 0, 30, 10), box(0, 0, 4, 4, "desk")]
    predicted = [
        box(0, 0, 10, 5),
        box(0, 0, 10, 8),
        box(21, 0, 31, 10, " Bed"),
        box(0, 0, 4, 4, "lamp"),
    ]
    scores = rewards.localization_scores(predicted, true)
    assert scores == {
        "ious": [0.8, 90 / 110, 0.0],
        "mean_iou": (0.8 + 90 / 110) / 3,
        "precision": 0.5,
        "recall": 2 / 3,
    }


def test_one_prediction_is_matched_to_one_object_only():
    """Two beds of one place, one box: with double counting precision would be 2 of 1."""
    scores = rewards.localization_scores([box(0, 0, 10, 10)], [box(0, 0, 10, 10), box(0, 0, 10, 9)])
    assert scores == {"ious": [1.0, 0.9], "mean_iou": 0.95, "precision": 1.0, "recall": 0.5}


@pytest.mark.parametrize("predicted", [None, []])
def test_an_answer_without_boxes_scores_zero(predicted):
    scores = rewards.localization_scores(predicted, [box(0, 0, 2, 2)])
    assert scores == {"ious": [0.0], "mean_iou": 0.0, "precision": 0.0, "recall": 0.0}


def test_box_rewards_pay_the_mean_iou_with_and_without_tags():
    sample = Row("localization", (box(0, 0, 4, 4), box(4, 4, 8, 8, "desk")))
    texts = [
        json.dumps(sample.answer),
        tagged(ROWS[0]),
        tagged(json.dumps([box(0, 0, 4, 2)])),
        "bed",
    ]
    iou = rewards.box_iou((1, 2, 30, 40), (0, 0, 4, 4))
    assert rewards.REWARDS["accuracy"](texts, sample) == [1.0, iou / 2, 0.25, 0.0]


@pytest.mark.parametrize("kind, answer", [("colour", "B"), (CHOICE, "left"), (NUMBER, "four")])
def test_a_truth_that_cannot_be_scored_is_named(kind, answer):
    """Paying 0, as the authors do, would train on noise in silence."""
    with pytest.raises(UserError) as error:
        rewards.accuracy_reward(["B"], Row(kind, answer))
    message = str(error.value)
    assert (
        message.startswith("file.jsonl:17: ") and repr(kind) in message and repr(answer) in message
    )
    assert "\n" not in message


@given(st.lists(FRAGMENTS, max_size=4))
def test_rewards_score_each_completion_alone(texts):
    """A group's rewards may not depend on order or company."""
    for reward in rewards.REWARDS.values():
        sample = Row("localization", (box(0, 0, 2, 2),))
        assert reward(texts, sample) == [reward([text], sample)[0] for text in texts]


# ------------------------------------------------------------ rewards of one's own

GIVEN = [  # what a reward may return for three completions, all of it 1, 0 and 1
    [1.0, 0.0, 1.0],
    (1.0, 0.0, 1.0),
    [1, 0, 1],
    [True, False, True],
    np.array([1.0, 0.0, 1.0]),
    np.array([True, False, True]),
    np.array([1, 0, 1], np.float32),
    list(np.array([1, 0, 1], np.float32)),
    torch.tensor([1.0, 0.0, 1.0]),
    torch.tensor([1, 0, 1], dtype=torch.bfloat16),
    list(torch.tensor([1.0, 0.0, 1.0])),
]


@pytest.mark.parametrize("scores", GIVEN, ids=repr)
def test_numbers_of_any_kind_are_rewards(monkeypatch, scores):
    """Lists, arrays and tensors of floats, ints and bools."""
    monkeypatch.setitem(rewards.REWARDS, "mine", lambda completions, sample: scores)
    given = rewards.call_reward("mine", ["a", "b", "c"], Row(NUMBER, "4"))
    assert given == [1.0, 0.0, 1.0]
    assert [type(score) for score in given] == [float] * 3


REFUSED = [
    (1.0, "float"),
    (None, "NoneType"),
    ("101", "str"),
    ({0: 1, 1: 0, 2: 1}, "dict"),
    ((float(i) for i in range(3)), "generator"),
    (np.float64(1), "float"),
    ([], "a list of 0"),
    ([1.0], "a list of 1"),
    ([1.0] * 4, "a list of 4"),
    (torch.ones(1), "a list of 1"),
    (torch.ones(3, 1), "[1.0] (list) for a completion"),
    ([1.0, None, 0.0], "None (NoneType) for a completion"),
    ([1.0, "0.5", 0.0], "0.5 (str) for a completion"),
    ([1.0, 0.0, math.nan], "nan (float) for a completion"),
    ([1.0, 0.0, -math.inf], "-inf (float) for a completion"),
    (["x" * 500, 0.0, 1.0], "x" * 80 + " (str) for a completion"),
]


@pytest.mark.parametrize("scores, found", REFUSED, ids=repr)
def test_what_is_not_a_number_for_each_completion_is_named(monkeypatch, scores, found):
    """One number for all would be spread over the group, nan would end in the weights."""
    monkeypatch.setitem(rewards.REWARDS, "mine", lambda completions, sample: scores)
    with pytest.raises(UserError) as error:
        rewards.call_reward("mine", ["a", "b", "c"], Row(NUMBER, "4"))
    assert str(error.value) == (
        f"file.jsonl:17: reward 'mine' returned {found}, expected a list of 3 finite numbers, "
        "one for each completion"
    )


def test_a_reward_may_sort_what_it_is_given(monkeypatch):
    """It has a list of its own: the completions stay beside their log-probs."""
    monkeypatch.setitem(rewards.REWARDS, "mine", lambda texts, sample: texts.sort() or [1.0] * 2)
    completions = ["b", "a"]
    assert rewards.call_reward("mine", completions, Row(NUMBER, "4")) == [1.0, 1.0]
    assert completions == ["b", "a"]


def test_rows_are_checked_for_the_rewards_of_the_table_only(monkeypatch):
    """A row that our reward cannot score is found without a call; one of your own is not called."""
    rewards.check_row("format", Row("", ""))
    rewards.check_row("accuracy", Row(NUMBER, "4"))
    rewards.check_row("accuracy", Row("localization", (box(0, 0, 2, 2),)))
    with pytest.raises(UserError, match=r"file.jsonl:17: no accuracy reward for question_type ''"):
        rewards.check_row("accuracy", Row("", ""))
    monkeypatch.setitem(rewards.REWARDS, "mine", lambda *_: pytest.fail("called"))
    monkeypatch.setitem(rewards.REWARDS, "accuracy", lambda *_: pytest.fail("called"))
    rewards.check_row("mine", Row("", ""))
    rewards.check_row("accuracy", Row("", ""))
