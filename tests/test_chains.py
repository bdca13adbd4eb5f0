"""look/chains.py: reckoning and sight of chains, by hand, mutated, and the true ones of rooms."""

import json
import re

import pytest

from files import UserError
from look import chains
from rooms import scenes

SIDES = ["A. left-front", "B. right-back", "C. left-back"]
TURNS = ["A. right", "B. left", "C. back"]
# question type -> options, answer, true chain
TRUE = {
    "object size": (None, "160", "bed 100 160 80: 160"),
    "room size": (None, "24", "room 18 21: 24"),
    "object count": (None, "2", "1 chair 33 45. 2 chair 21 27: 2"),
    "appearance order": (
        ["A. bed, lamp, sofa", "B. lamp, bed, sofa"],
        "B",
        "bed 3. lamp 1. sofa 5: lamp, bed, sofa B",
    ),
    "absolute distance": (None, "5.5", "lamp 33 45 bed 21 27: right 12 back 18: 22 apart: 5.5"),
    "relative distance": (
        ["A. sofa", "B. bed"],
        "A",
        "bed 30 41 lamp 33 45: left 3 front 4: 5 apart. "
        "sofa 33 44 lamp 33 45: right 0 front 1: 1 apart: sofa A",
    ),
    "relative direction": (
        TURNS,
        "B",
        "lamp 40 30 bed 30 30: right 10 back 0: at 3. "
        "bin 30 40 bed 30 30: right 0 back 10: at 12: turn 9: left B",
    ),
}
FROM_CAMERA = (SIDES, "B", "lamp 33 45 bed 21 27: right 12 back 18: right-back B")


def row_of(question_type, options, answer, chain):
    """A row of the cold start."""
    solution = f"<think>{chain}</think><answer>{answer}</answer>"
    row = {"question_id": 7, "question_type": question_type, "options": options}
    return row | {"answer": answer, "solution": solution}


def judged(reference, chain, answer=None):
    """Shares of a completion with this chain, as text; those that are 1.000 are left out."""
    completion = f"<think>{chain}</think><answer>{answer or reference['answer']}</answer>"
    shares = chains.judge(completion, reference)
    return {name: mean for name in shares if (mean := chains.mean([shares], name)) != "1.000"}


ROWS = [row_of(question_type, *parts) for question_type, parts in TRUE.items()]
ROWS.append(row_of("relative direction", *FROM_CAMERA))


def chain_of(row):
    return row["solution"].split("<think>")[1].split("</think>")[0]


@pytest.mark.parametrize("row", ROWS, ids=chain_of)
def test_a_true_chain_is_right_in_everything(row):
    assert judged(row, chain_of(row)) == {}
    names = {*chains.judge(row["solution"], row)}
    assert names > {"in form", "asked", "whole", "steps", "answer"} and names < {*chains.SHARES}


@pytest.mark.parametrize(
    "question_type, chain, shares",
    (
        ("object size", "bed 100 160 80: 100", {"whole": "0.000", "steps": "0.000"}),
        ("object size", "bed 100 170 90: 170", {"lengths": "0.667"}),
        ("object size", "sofa 100 160 80: 160", {"asked": "0.000", "lengths": ""}),
        ("room size", "room 18 24: 27", {"lengths": "0.500"}),
        ("room size", "room 18 21: 25", {"whole": "0.000", "steps": "0.000"}),
        # one chair more: the two others stand where they do
        ("object count", "1 chair 33 45. 2 chair 21 27. 3 chair 9 9: 3", {"places": "0.667"}),
        ("object count", "1 chair 33 47. 2 chair 23 28: 2", {"places": "0.500"}),
        ("object count", "1 chair 33 45. 2 chair 21 27: 3", {"whole": "0.000", "steps": "0.000"}),
        # counted 1, 3
        ("object count", "1 chair 33 45. 3 chair 21 27: 2", {"whole": "0.000", "steps": "0.000"}),
        (
            "appearance order",
            "bed 3. lamp 4. sofa 5: lamp, bed, sofa B",
            {"whole": "0.000", "steps": "0.000", "pictures": "0.667"},
        ),
        (
            "appearance order",  # two at once are in no order
            "bed 1. lamp 1. sofa 5: bed, lamp, sofa A",
            {"whole": "0.000", "steps": "0.000", "pictures": "0.667"},
        ),
        # a wrong way from which the rest follows
        (
            "absolute distance",
            "lamp 33 45 bed 21 27: right 24 back 18: 30 apart: 7.5",
            {"whole": "0.000", "steps": "0.667"},
        ),
        (
            "absolute distance",
            "lamp 33 45 bed 21 27: left 12 front 18: 22 apart: 5.5",
            {"whole": "0.000", "steps": "0.667"},
        ),
        # right from wrong places, of other things besides
        (
            "absolute distance",
            "lamp 13 45 bed 13 41: right 0 back 4: 4 apart: 1.0",
            {"places": "0.000"},
        ),
        (
            "absolute distance",
            "sofa 13 45 bed 21 27: left 8 back 18: 20 apart: 5.0",
            {"asked": "0.000"},
        ),
        (
            "absolute distance",
            "bed 21 27 lamp 33 45: left 12 front 18: 22 apart: 5.5",
            {"asked": "0.000"},
        ),
        (
            "relative distance",
            "bed 30 41 lamp 33 45: left 3 front 4: 5 apart. "
            "sofa 33 44 lamp 33 45: right 0 front 1: 1 apart: bed B",
            {"whole": "0.000", "steps": "0.800"},
        ),
        (
            "relative distance",  # a tie
            "bed 30 41 lamp 33 45: left 3 front 4: 5 apart. "
            "sofa 33 44 lamp 33 45: right 0 front 1: 5 apart: sofa A",
            {"whole": "0.000", "steps": "0.600"},
        ),
        (
            "relative direction",  # the hour is wrong, the turn between the hours is not
            "lamp 40 30 bed 30 30: right 10 back 0: at 6. "
            "bin 30 40 bed 30 30: right 0 back 10: at 12: turn 6: back C",
            {"whole": "0.000", "steps": "0.833"},
        ),
        (
            "relative direction",
            "lamp 40 30 bed 30 30: right 10 back 0: at 3. "
            "bin 30 40 bed 30 30: right 0 back 10: at 12: turn 3: left B",
            {"whole": "0.000", "steps": "0.667"},
        ),
        (
            "relative direction",  # straight ahead is none of the words
            "lamp 40 30 bed 30 30: right 10 back 0: at 3. "
            "bin 40 30 bed 30 30: right 10 back 0: at 3: turn 12: right A",
            {"whole": "0.000", "steps": "0.833", "places": "0.750"},
        ),
    ),
)
def test_chains_by_hand(question_type, chain, shares):
    """Whether the answer belongs to the result is tested below."""
    found = judged(row_of(question_type, *TRUE[question_type]), chain)
    found.pop("answer", None)
    if question_type == "object count" and chain.count("chair") == 3:
        assert found.pop("asked") == "0.000"
    assert found == shares


@pytest.mark.parametrize(
    "chain, shares",
    (
        (
            "lamp 33 45 bed 21 27: right 12 back 18: left-back C",
            {"whole": "0.000", "steps": "0.500"},
        ),
        (
            "lamp 33 45 bed 21 27: left 12 back 18: left-back C",
            {"whole": "0.000", "steps": "0.500"},
        ),
        ("lamp 21 45 bed 33 27: left 12 back 18: left-back C", {"places": "0.000"}),
        # neither to the left nor to the right
        (
            "lamp 21 45 bed 21 27: right 0 back 18: right-back B",
            {"places": "0.500", "whole": "0.000", "steps": "0.500"},
        ),
        # as if somebody stood there
        (TRUE["relative direction"][2], {"asked": "0.000", "places": "0.000", "answer": "0.000"}),
    ),
)
def test_directions_from_the_camera(chain, shares):
    answer = chain[-1]
    assert judged(ROWS[-1], chain, answer) == shares


def test_the_letter_is_that_of_the_words():
    """Whether they are right or not; a number is said again."""
    order = ROWS[3]
    assert judged(order, chain_of(order), "A") == {"answer": "0.000"}
    assert judged(order, chain_of(order), "b.") == {}
    assert judged(order, chain_of(order), "Z") == {"answer": "0.000"}
    wrong = {"whole": "0.000", "steps": "0.000"}
    assert judged(order, "bed 3. lamp 1. sofa 5: bed, lamp, sofa B", "A") == wrong
    assert judged(order, "bed 3. lamp 1. sofa 5: bed, sofa, lamp B") == wrong | {"answer": "0.000"}
    assert judged(ROWS[0], chain_of(ROWS[0]), "100") == {"answer": "0.000"}


@pytest.mark.parametrize("row", ROWS, ids=chain_of)
def test_every_number_counts(row):
    """Change one of them: reckoning or sight falls, and the chain keeps its form."""
    chain = chain_of(row)
    for number in re.finditer("[0-9]+", chain):
        changed = str(2 * int(number[0]) + 7)
        found = judged(row, chain[: number.start()] + changed + chain[number.end() :])
        assert found.keys() & {"whole", "places", "lengths", "pictures"}
        assert "in form" not in found


@pytest.mark.parametrize("row", ROWS, ids=chain_of)
def test_of_a_chain_that_breaks_off_nothing_is_read(row):
    """After each number, or with words that do not belong there: only that it is one counts."""
    chain = chain_of(row)
    steps = chain.rpartition(": ")[0]
    nothing = dict.fromkeys(("in form", "asked", "whole"), "0.000")
    for number in re.finditer("[0-9]+", steps):
        assert judged(row, steps[: number.end()]) == nothing
    for other in ("", "and so on", f"I see {chain}", chain.replace(" ", "  "), f"{chain} {chain}"):
        assert judged(row, other) == nothing
    assert judged(row, chain.replace("1", "1" * 5000)) == nothing


def test_true_chains_of_rooms_are_right_in_everything():
    seen = set()
    for index in range(24):
        _, rows = scenes.make_files(3, "train", index)
        for row in rows["coldstart"]:
            assert judged(row, chain_of(row)) == {}
            seen.add((row["question_type"], row["data_type"] == "single_image"))
    assert {question_type for question_type, _ in seen} == {*chains.FORMS}
    assert ("relative direction", True) in seen and ("relative direction", False) in seen


# ---------------------------------------------------------------------------------- a ladder


def write(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def fake_ladder(run, completions):
    """Answers of the rung cold to the questions of ROWS, whose true chains lie in the test rooms.

    Args: completions: one for each of the first of ROWS.
    """
    references = [row | {"question_id": number} for number, row in enumerate(ROWS)]
    write(run / "rooms" / "test" / "spld_coldstart_data.jsonl", references)
    answers = []
    for row, completion in zip(references, completions):
        answer = {"id": str(row["question_id"]), "completion": completion}
        answer |= {key: row[key] for key in ("question_type", "answer")}
        # Boxes may be asked for under the same number.
        answers += [answer, answer | {"question_type": "localization", "completion": "[]"}]
    write(run / "eval" / "cold" / "predictions.jsonl", answers)


COMPLETIONS = (
    "<think>bed 100 160 80: 160</think><answer>160</answer>",
    "<think>room 18 24: 25</think>\n<answer>25</answer>\n",
    "<think>1 chair 33 45. 2 chair 21 27: 2",  # truncated, as is the next
    "",
    "<think>lamp 13 45 bed 21 27: left 8</think><answer>5.5</answer>",
    "<think>I see</think><answer>A</answer>",
)


def test_the_command_prints_a_table(tmp_path, call, capsys):
    """By hand: four well-formed chains, two in form; 4 of 5 lengths; no place is read."""
    fake_ladder(tmp_path, COMPLETIONS)
    call(chains, tmp_path)
    lines = [re.split("  +", line) for line in capsys.readouterr().out.splitlines()]
    assert lines[0] == ["cold", "chains", *chains.SHARES]
    one, zero = "1.000", "0.000"
    assert lines[1] == ["object size", "1", one, one, one, one, one, one]
    assert lines[2] == ["room size", "1", one, one, zero, zero, one, "0.500"]
    assert lines[3] == ["appearance order", "0"]
    assert lines[5] == ["absolute distance", "1", zero, zero, zero]
    assert lines[8] == ["all", "4", "0.500", "0.500", "0.250", "0.500", one, "0.800"]
    assert len(lines) == 9


def test_test_rooms_may_lie_elsewhere(tmp_path):
    fake_ladder(tmp_path / "run", COMPLETIONS)
    (tmp_path / "run" / "rooms").rename(tmp_path / "rooms")
    assert chains.judge_ladder(tmp_path / "run") == {}
    write(tmp_path / "run" / "config_run.json", [{"test": str(tmp_path / "rooms" / "test")}])
    assert len(chains.judge_ladder(tmp_path / "run")["cold"]["all"]) == 4


def test_chains_about_no_procedural_rooms_are_left_out(tmp_path, call):
    """SpatialLadder-26k's file has the same name, and rows with neither type nor id."""
    fake_ladder(tmp_path, COMPLETIONS)
    prose = "<think>I look around.</think><answer>A</answer>"
    rows = [{"solution": prose}, ROWS[0] | {"solution": prose}, ROWS[0] | {"solution": "A"}]
    write(tmp_path / "rooms" / "test" / "spld_coldstart_data.jsonl", rows)
    assert chains.judge_ladder(tmp_path) == {}
    with pytest.raises(UserError, match=r"no chains to read; expected true ones in .*/test/spld_"):
        call(chains, tmp_path)


def test_answers_about_other_rooms_are_refused(tmp_path):
    fake_ladder(tmp_path, COMPLETIONS)
    path = tmp_path / "eval" / "cold" / "predictions.jsonl"
    path.write_text(path.read_text().replace('"answer": "24"', '"answer": "30"'))
    with pytest.raises(
        UserError, match=r"predictions.jsonl:3: the true answer is 30, expected 24 "
    ):
        chains.judge_ladder(tmp_path)
