"""compare.py: the tables of several ladders hold what their predictions hold."""
import json
import shutil
from pathlib import Path

import pytest

import compare
from rewards import UserError


@pytest.fixture
def runs(tmp_path):
    """Two ladders of two rungs: counts are right half of the time, then always; sizes are never better than blind."""
    for run in "01":
        for rung, right in (("stage1", (0, 1)), ("stage2", (1, 1))):
            folder = tmp_path / run / "eval" / rung
            folder.mkdir(parents=True)
            rows = [("object count", score, 0.5) for score in right] + [("object size", 0.25, 0.25)] * 2 + [
                ("localization", 0.5 + int(run), 0.1)]
            (folder / "predictions.jsonl").write_text("".join(json.dumps(
                {"id": str(i), "question_type": kind, "score": score, "blind": blind}) + "\n"
                for i, (kind, score, blind) in enumerate(rows)))
            (folder / "scores.json").write_text(json.dumps({"localization": {"valid_json": int(run)}, "well_formed": 0.5}))
    return [str(tmp_path / run) for run in "01"]


def test_tables_by_hand(runs):
    """Gain of counting 0 then 1, of sizes 0; its paired change +50 points, of sizes 0: +25 on the mean."""
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in compare.tables(runs).splitlines()]
    assert lines[2][:4] == ["stage1", "1.000", "50.0%", "0 of 2"] and lines[2][4:7] == ["+0.000", "0.375", "50.0%"]
    assert lines[3][:4] == ["stage2", "1.000", "50.0%", "1 of 2"] and lines[3][4:6] == ["+0.500", "0.625"]
    assert lines[3][7].startswith("+25.0 [") and lines[2][7] == ""
    assert lines[7] == ["object size", "0.25", "+0.00 [+0.00, +0.00]"]
    assert lines[8] == ["object count", "0.50", "+1.00 [+1.00, +1.00]"]
    assert lines[-1] == ["Ladders: 2; questions of a type in all: 4."]


def test_only_questions_that_both_hold_are_paired():
    before = {"object count": {1: 0.0, 2: 1.0}}
    assert compare.paired({"object count": {2: 0.5, 3: 1.0}}, before)["object count"].tolist() == [-0.5]


def test_a_ladder_that_is_not_there(runs, tmp_path):
    """Neither at all nor among others; the line names the file and the command."""
    for asked in ([tmp_path / "none"], [*runs, tmp_path / "none"]):
        with pytest.raises(UserError, match="none/eval/.*: no such file; climb it with: python ladder.py --out"):
            compare.tables(asked)


def test_scores_without_a_blind_baseline_are_named(runs):
    path = Path(runs[0]) / "eval" / "stage2" / "predictions.jsonl"
    path.write_text(path.read_text().replace("0.25}", "null}"))
    with pytest.raises(UserError, match="stage2/predictions.jsonl: no blind baseline in it; evaluate with --blind-from"):
        compare.tables(runs)


def test_a_ladder_on_its_way_shows_what_is_there(runs):
    for run in runs:
        shutil.rmtree(Path(run) / "eval" / "stage2")
    assert "| stage1 |" in compare.tables(runs) and "stage2" not in compare.tables(runs)


def test_other_ways_stand_beside_the_ladder(runs, tmp_path):
    """By hand: without stage 1 counts are always wrong, sizes equal: -50 points of the mean of two types; with twice the
    rooms all is as with the usual ones. The paper's figure stands beside its own."""
    for run, copy in zip(runs, ("a", "b")):
        (Path(run) / "ladder.json").write_text(json.dumps({"seed": int(run[-1]), "data_scale": [1]}))
        shutil.copytree(run, tmp_path / copy)
        (tmp_path / copy / "ladder.json").write_text(json.dumps({"seed": int(run[-1]), "data_scale": [2]}))
        folder = shutil.copytree(Path(run) / "eval" / "stage2", Path(run) / "eval" / "stage2-no1")
        text = (folder / "predictions.jsonl").read_text()
        (folder / "predictions.jsonl").write_text(text.replace('"score": 1, "blind": 0.5', '"score": 0, "blind": 0.5'))
    lines = [[cell.strip() for cell in line.strip("|").split("|")]
             for line in compare.ways(runs, {2: [str(tmp_path / "a"), str(tmp_path / "b")]}).splitlines()]
    assert lines[2] == ["stage2-no1", "0.125", "stage2", "-50.0 [-50.0, -50.0]", "-1.2"]
    assert lines[3:] == [["stage2, rooms x2", "0.625", "stage2", "+0.0 [+0.0, +0.0]", ""]]
    assert compare.ways([str(tmp_path / "a")], {}) == ""
    (Path(runs[1]) / "eval" / "stage2-no1" / "predictions.jsonl").unlink()  # not done in one of the ladders: not compared
    assert compare.ways(runs, {}) == ""
    (Path(runs[0]) / "ladder.json").write_text('{"seed": 7}')
    with pytest.raises(UserError, match="give ladders of the same seeds"):
        compare.ways(runs[:1], {2: [str(tmp_path / "a")]})


def test_probes_of_all_ladders_as_one(runs):
    """By hand: 0.2 and 0.4 with half widths 0.03 and 0.04: 0.3 +- 0.05 / 2. Rungs, types and probes that one ladder lacks
    stay out."""
    def probe(run, what, names, value, half, kinds=("object count",), **settings):
        figure = {"value": value, "low": value - half, "high": value + half}
        rows = [{"name": name, "style": "direct", "entropy": figure, "types": dict.fromkeys(kinds, figure)} for name in names]
        (Path(run) / "probes").mkdir(exist_ok=True)
        (Path(run) / "probes" / f"{what}.json").write_text(json.dumps(
            {"settings": {"data": run, "seed": 0, "questions": 40} | settings, "rows": rows, "paper": {"X": {"entropy": 1.24}}}))

    probe(runs[0], "entropy", ["base", "stage2"], 0.2, 0.03, kinds=("room size", "object count"))
    assert compare.probed(runs) == ""
    probe(runs[1], "entropy", ["stage2"], 0.4, 0.04, seed=1)
    probe(runs[1], "hints", ["stage2"], 0.4, 0.04)
    assert [line.split() for line in compare.probed(runs).splitlines()[2:]] == [
        "entropy: 40 questions of each of 2 ladders".split(), "stage2 paper: X".split(),
        "entropy 0.300 [0.275, 0.325] 1.240".split(), "object count 0.300 [0.275, 0.325]".split()]
    probe(runs[1], "entropy", ["stage2"], 0.4, 0.04, temperature=2)
    with pytest.raises(UserError, match="1/probes/entropy.json: probed with .*'temperature': 2.*, expected .* as in .*0/probes"):
        compare.probed(runs)
