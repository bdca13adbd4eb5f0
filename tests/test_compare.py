"""look/compare.py: the tables of several ladders hold what their predictions hold."""

import json
import re
import shutil
from pathlib import Path

import pytest

from files import UserError
from look import compare


def config(run, **settings):
    Path(run).mkdir(parents=True, exist_ok=True)
    text = json.dumps({"seed": 0, "scenes": 3600} | settings)
    (Path(run) / "config_run.json").write_text(text)


def answers_of(run, rung):
    return Path(run) / "eval" / rung / "predictions.jsonl"


def write_answers(run, rung, counts, boxes=0.5):
    """Counts of these scores, where blind earns 0.5; two sizes as good as blind; one box."""
    rows = [("object count", score, 0.5) for score in counts]
    rows += [("object size", 0.25, 0.25)] * 2 + [("localization", boxes, 0.1)]
    lines = []
    for number, (kind, score, blind) in enumerate(rows):
        row = {"id": str(number), "question_type": kind, "score": score, "blind": blind}
        lines.append(json.dumps(row) + "\n")
    path = answers_of(run, rung)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(lines))


@pytest.fixture
def runs(tmp_path):
    """Two ladders of two rungs: counts are right half of the time, then always."""
    for seed in (0, 1):
        config(tmp_path / str(seed), seed=seed)
        write_answers(tmp_path / str(seed), "stage1", (0, 1), 0.5 + seed)
        write_answers(tmp_path / str(seed), "stage2", (1, 1), 0.5 + seed)
    return [str(tmp_path / "0"), str(tmp_path / "1")]


@pytest.fixture
def printed(call, capsys):
    """A function: the cells of what look.compare prints about some ladders, line by line."""

    def lines(*flags):
        call(compare, *flags)
        return [re.split("  +", row) for row in capsys.readouterr().out.splitlines()]

    return lines


def test_tables_by_hand(runs, printed):
    """Counts go from 0.5 to 1, sizes stay at 0.25: the mean of both from 0.375 to 0.625."""
    lines = printed(*runs)
    assert lines[0] == ["Ladders: 2, rooms x1"]
    assert lines[2] == ["score", "blind guess", "stage1", "stage2"]
    assert lines[3][:2] == ["object count", "0.500"] and lines[3][2].startswith("0.500 [0.")
    assert lines[3][3] == "1.000 [1.000, 1.000]"
    assert lines[4][1:] == ["0.250", "0.250 [0.250, 0.250]", "0.250 [0.250, 0.250]"]
    assert lines[5][0] == "all questions" and lines[5][1] == "0.375"
    assert [cell.split()[0] for cell in lines[5][2:]] == ["0.375", "0.625"]
    assert lines[6][:2] == ["box IoU", "0.100"]
    assert lines[6][2].startswith("1.000 [0.5")
    # Counts gain (0.5 - 0.5) / 0.5, then (1 - 0.5) / 0.5; sizes are as good as blind.
    assert lines[8] == ["gain above the blind guess", "stage1", "stage2"]
    assert [cell.split()[0] for cell in lines[9][1:]] == ["+0.00", "+1.00"]
    assert lines[10] == ["object size", "+0.00 [+0.00, +0.00]", "+0.00 [+0.00, +0.00]"]
    assert [cell.split()[0] for cell in lines[11][1:]] == ["+0.00", "+0.50"]
    assert lines[12] == ["types surely above", "0 of 2", "1 of 2"]
    name, score, beside, points, seeds = lines[15]  # the paper has no figure for it
    assert (name, score, beside, seeds) == ("stage2", "0.625", "stage1", "+25.0, +25.0")
    # By chance none or all of the four counts that are drawn anew were wrong before.
    assert points == "+25.0 [+0.0, +50.0]"
    assert len(lines) == 16


def test_a_gain_that_may_be_chance_is_not_surely_above(runs, printed):
    """Two of three counts are right: a gain of +0.33, but three wrong ones may be drawn anew."""
    for run in runs:
        write_answers(run, "stage2", (1, 1, 0))
    gains = printed(*runs)[8:13]
    assert gains[1][0] == "object count"
    assert gains[1][2].startswith("+0.33 [-")
    assert gains[4] == ["types surely above", "0 of 2", "0 of 2"]


def test_only_questions_that_both_hold_are_compared():
    before = {("object count", 0, "1"): (0.0, 0), ("object count", 0, "2"): (1.0, 0)}
    after = {("object count", 0, "2"): (0.5, 0), ("object count", 0, "3"): (1.0, 0)}
    change = compare.change(after, before)
    assert change == {"value": -50.0, "low": -50.0, "high": -50.0, "seeds": [-50.0]}
    with pytest.raises(UserError, match="give ladders of the same seeds"):
        compare.change(after, {("object count", 1, "2"): (0.5, 0)})


def test_types_count_alike_whatever_their_rows():
    """By hand: three counts gain 0 points each, one size 80, boxes do not count: 40."""
    before, after = {}, {}
    for number in range(3):
        before["object count", 0, number] = after["object count", 0, number] = (0.5, 0)
    before["object size", 0, 9], after["object size", 0, 9] = (0.1, 0), (0.9, 0)
    before["localization", 0, 9], after["localization", 0, 9] = (0.0, 0), (1.0, 0)
    assert compare.change(after, before)["value"] == pytest.approx(40)


def test_a_folder_that_is_no_ladder_is_named(runs, tmp_path, call):
    with pytest.raises(UserError, match=r"none/config_run.json: no such file"):
        call(compare, *runs, tmp_path / "none")
    config(tmp_path / "begun", seed=2)
    with pytest.raises(UserError, match="there is no rung that all of them have evaluated"):
        call(compare, *runs, tmp_path / "begun")


def test_a_seed_that_is_given_twice_is_refused(runs, tmp_path, call):
    config(tmp_path / "again", seed=1)
    with pytest.raises(UserError, match=r"again: has the seed of .*/1; give one ladder for each"):
        call(compare, *runs, tmp_path / "again")


def test_an_answer_may_hold_any_character(runs, printed):
    """Lines of a jsonl file end in a line feed, not in a line separator, which stands as it is."""
    before = printed(*runs)
    path = answers_of(runs[0], "stage2")
    path.write_text(path.read_text().replace('"id": "0"', '"completion": "a\u2028b", "id": "0"'))
    assert printed(*runs) == before


def test_scores_without_a_blind_baseline_are_seen(runs, printed):
    path = answers_of(runs[0], "stage2")
    path.write_text(path.read_text().replace("0.25}", "null}"))
    assert printed(*runs)[4][:2] == ["object size", "nan"]


def test_a_ladder_on_its_way_shows_what_all_have(runs, printed):
    shutil.rmtree(Path(runs[1]) / "eval" / "stage2")
    assert printed(*runs)[2] == ["score", "blind guess", "stage1"]


def test_ablations_stand_beside_the_ladder(runs, printed):
    """By hand: without stage 1 counts are always wrong: -50 points; the paper lost 1.2."""
    for run in runs:
        write_answers(run, "stage2-no1", (0, 0))
    line = ["stage2-no1", "0.125", "stage2", "-50.0 [-50.0, -50.0]", "-50.0, -50.0", "-1.2"]
    assert printed(*runs)[16:] == [line]
    # An ablation that one of the ladders has not finished is left out.
    answers_of(runs[1], "stage2-no1").unlink()
    assert len(printed(*runs)) == 16


def test_other_numbers_of_rooms_stand_beside_the_usual(runs, tmp_path, printed):
    """By hand: with twice the rooms the second seed counts nothing in the end: -50, mean -25."""
    scaled = [tmp_path / "0-rooms-x2", tmp_path / "1-rooms-x2"]
    for seed in (0, 1):
        write_answers(runs[seed], "grpo", (1, 1))
        config(scaled[seed], seed=seed, scenes=7200)
        write_answers(scaled[seed], "grpo", (1 - seed, 1 - seed))
    lines = printed(*runs, *scaled)
    assert lines[0] == ["Ladders: 2, rooms x1"]
    name, score, beside, points, seeds = lines[-1]
    assert (name, score, beside) == ("grpo, rooms x2", "0.375", "grpo")
    assert points.startswith("-25.0 [") and seeds in ("+0.0, -50.0", "-0.0, -50.0")
    # A seed that the usual ladders lack is not compared.
    config(scaled[1], seed=5, scenes=7200)
    assert printed(*runs, *scaled)[-1][3:5] == ["+0.0 [+0.0, +0.0]", "+0.0"]
    # Ladders of other rooms alone are a table too.
    assert printed(*scaled)[0] == ["Ladders: 2, rooms x2"]


def test_the_papers_gain_of_grpo_stands_beside_ours(runs, printed):
    for run in runs:
        write_answers(run, "cold", (0, 1))
        write_answers(run, "grpo", (1, 1))
    name, _, beside, points, _, paper = printed(*runs)[-1]
    assert (name, beside, points.split()[0], paper) == ("grpo", "cold", "+25.0", "+2.1")


def write_chain(run, chain):
    """One more question of the test rooms with its true chain, and what the rung cold wrote."""
    solution = "<think>1 bed 21 27. 2 bed 33 45: 2</think><answer>2</answer>"
    question = {"question_id": 7, "question_type": "object count", "options": None, "answer": "2"}
    path = Path(run) / "rooms" / "test" / "spld_coldstart_data.jsonl"
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps(question | {"solution": solution}) + "\n")
    completion = f"<think>{chain}</think><answer>2</answer>"
    row = question | {"id": "7", "completion": completion, "score": 1.0, "blind": 0.5}
    with open(answers_of(run, "cold"), "a") as file:
        file.write(json.dumps(row) + "\n")


def test_chains_of_all_ladders_as_one(runs, printed):
    """By hand: one chain counts wrongly; of its three places and of the other's two one is false.

    A ladder that was begun before true chains were written has no such table, nor have the others.
    """
    for run in runs:
        write_answers(run, "cold", (1, 1))
    write_chain(runs[0], "1 bed 21 27. 2 bed 33 45: 2")
    assert not any("whole" in line for line in printed(*runs))
    write_chain(runs[1], "1 bed 21 27. 2 bed 33 45. 3 bed 9 9: 2")
    assert printed(*runs)[-2:] == [
        ["rung", "chains", "asked", "whole", "places"],
        ["cold", "2", "0.500", "0.500", "0.800"],
    ]


# ---------------------------------------------------------------------------------- probes, charts


def probe(run, what, names, value, half, figures=("entropy",), **settings):
    """What look.probes writes: the same figure under several names for several rungs."""
    figure = {"value": value, "low": value - half, "high": value + half}
    rows = []
    for name in names:
        rows.append({"name": name, "style": "direct", **dict.fromkeys(figures, figure)})
    result = {
        "settings": {"data": run, "seed": 0, "questions": 20, "temperature": 1.0} | settings,
        "rows": rows,
    }
    path = Path(run) / "probes" / f"{what}.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(result))


def test_probes_of_all_ladders_as_one(runs, printed):
    """By hand: 0.2 and 0.4 with half widths 0.03 and 0.04: 0.3 +- 0.05 / 2.

    A figure that one ladder lacks is that of the others; a probe that one lacks stays out.
    """
    probe(runs[0], "entropy", ["stage2"], 0.2, 0.03, ("room size", "entropy"))
    assert "entropy" not in [line[0] for line in printed(*runs)]
    probe(runs[1], "entropy", ["stage2"], 0.4, 0.04, seed=1, questions=18)  # its rooms have no more
    probe(runs[1], "hints", ["stage2"], 0.4, 0.04)
    lines = printed(*runs)[-4:]
    assert lines == [
        ["entropy"],
        ["", "stage2"],
        ["room size", "0.200 [0.170, 0.230]"],
        ["entropy", "0.300 [0.275, 0.325]"],
    ]
    for rung, temperature, said in (
        ("stage2", 2, "temperature 1.0, now 2"),
        ("cold", 1.0, r"models \['stage2'\], now \['cold'\]"),
    ):
        probe(runs[1], "entropy", [rung], 0.4, 0.04, temperature=temperature)
        expected = f"1/probes/entropy.json: probed with other settings than .*: {said}"
        with pytest.raises(UserError, match=expected):
            printed(*runs)


def places(svg, mark):
    """How far the marks of a chart lie right of its zero, in pixels, from the first row down."""
    zero = float(re.search(r'class="zero" x1="([0-9.]+)"', svg)[1])
    found = re.findall(rf'<circle class="{mark}" cx="([0-9.]+)"', svg)
    return [float(x) - zero for x in found]


def test_charts_are_drawn_to_the_scale_of_the_tables(runs, tmp_path, printed):
    """A chart of the ladder, one of the ablations where there are any, one of each probe."""
    printed(*runs, "--figures", tmp_path / "figures")
    (path,) = (tmp_path / "figures").iterdir()
    assert path.name == "ladder.svg"
    _, _, boxes, scores = path.read_text().split("<svg ")
    assert "box IoU" in boxes and "all questions" in scores
    first, second = places(scores, "dot")
    assert second / first == pytest.approx(0.625 / 0.375, rel=0.01)
    for run in runs:
        write_answers(run, "stage2-no1", (0, 0))
        probe(run, "entropy", ["stage2"], 0.25, 0.0)
    printed(*runs, "--figures", tmp_path / "figures")
    names = {path.stem for path in (tmp_path / "figures").iterdir()}
    assert names == {"ladder", "ways", "entropy"}
    svg = (tmp_path / "figures" / "ways.svg").read_text()
    (dot,), (ring,) = places(svg, "dot"), places(svg, "ring")
    assert "stage2-no1" in svg and dot / ring == pytest.approx(50 / 1.2, rel=0.02)
    assert "stage2: entropy" in (tmp_path / "figures" / "entropy.svg").read_text()
