"""compare.py: the tables of several ladders hold what their predictions hold."""

import json
import math
import re
import shutil
from pathlib import Path

import pytest

from files import UserError
from look import compare
from look.charts import bars, differences
from look.probes import table


@pytest.fixture
def runs(tmp_path):
    """Two ladders of two rungs: counts are right half of the time, then always; sizes are never better than blind."""
    for run in "01":
        for rung, right in (("stage1", (0, 1)), ("stage2", (1, 1))):
            folder = tmp_path / run / "eval" / rung
            folder.mkdir(parents=True)
            rows = (
                [("object count", score, 0.5) for score in right]
                + [("object size", 0.25, 0.25)] * 2
                + [("localization", 0.5 + int(run), 0.1)]
            )
            (folder / "predictions.jsonl").write_text(
                "".join(
                    json.dumps(
                        {"id": str(i), "question_type": kind, "score": score, "blind": blind}
                    )
                    + "\n"
                    for i, (kind, score, blind) in enumerate(rows)
                )
            )
            (folder / "scores.json").write_text(
                json.dumps({"localization": {"valid_json": int(run)}, "well_formed": 0.5})
            )
    return [str(tmp_path / run) for run in "01"]


def test_tables_by_hand(runs):
    """Gain of counting 0 then 1, of sizes 0; its paired change +50 points, of sizes 0: +25 on the mean."""
    lines = [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in compare.tables(runs).splitlines()
    ]
    assert lines[2][:4] == ["stage1", "1.000", "50.0%", "0 of 2"] and lines[2][4:7] == [
        "+0.000",
        "0.375",
        "50.0%",
    ]
    assert lines[3][:4] == ["stage2", "1.000", "50.0%", "1 of 2"] and lines[3][4:6] == [
        "+0.500",
        "0.625",
    ]
    assert (
        lines[3][7].startswith("+25.0 [")
        and lines[3][8] == "+25.0, +25.0"
        and lines[2][7:9] == ["", ""]
    )
    assert lines[7] == ["object size", "0.25", "+0.00 [+0.00, +0.00]"]
    assert lines[8] == ["object count", "0.50", "+1.00 [+1.00, +1.00]"]
    assert lines[-1] == ["Ladders: 2; questions of a type in all: 4."]


def test_only_questions_that_both_hold_are_paired():
    before = {"object count": {1: 0.0, 2: 1.0}}
    assert compare.paired({"object count": {2: 0.5, 3: 1.0}}, before)["object count"].tolist() == [
        -0.5
    ]


def test_a_ladder_that_is_not_there(runs, tmp_path):
    """Neither at all nor among others; the line names the file and the command."""
    for asked in ([tmp_path / "none"], [*runs, tmp_path / "none"]):
        with pytest.raises(
            UserError, match="none/eval/.*: no such file; climb it with: python ladder.py --out"
        ):
            compare.tables(asked)


def test_an_answer_may_hold_any_character(runs):
    """Lines of a jsonl file end in a line feed: not in a line separator, which eval.py writes as it is."""
    path = Path(runs[0]) / "eval" / "stage2" / "predictions.jsonl"
    before = compare.tables(runs)
    path.write_text(path.read_text().replace('"id": "0"', '"completion": "a\u2028b", "id": "0"'))
    assert compare.tables(runs) == before


def test_beside_a_blind_guess_that_is_always_right_there_is_no_gain(recwarn):
    found = {"object count": {1: (1.0, 1.0), 2: (0.0, 1.0)}}
    assert (
        all(math.isnan(number) for number in compare.gains(found, ["object count"])["object count"])
        and not recwarn.list
    )


def test_scores_without_a_blind_baseline_are_named(runs):
    path = Path(runs[0]) / "eval" / "stage2" / "predictions.jsonl"
    path.write_text(path.read_text().replace("0.25}", "null}"))
    with pytest.raises(
        UserError,
        match="stage2/predictions.jsonl: no blind baseline in it; evaluate with --blind-from",
    ):
        compare.tables(runs)


def test_a_ladder_on_its_way_shows_what_is_there(runs):
    for run in runs:
        shutil.rmtree(Path(run) / "eval" / "stage2")
    assert "| stage1 |" in compare.tables(runs) and "stage2" not in compare.tables(runs)


def test_other_ways_stand_beside_the_ladder(runs, tmp_path):
    """By hand: without stage 1 counts are always wrong, sizes equal: -50 points of the mean of two types; with twice the
    rooms all is as with the usual ones. The paper's figure stands beside its own."""
    for run, copy in zip(runs, ("a", "b")):
        (Path(run) / "ladder.json").write_text(
            json.dumps({"seed": int(run[-1]), "data_scale": [1]})
        )
        shutil.copytree(run, tmp_path / copy)
        (tmp_path / copy / "ladder.json").write_text(
            json.dumps({"seed": int(run[-1]), "data_scale": [2]})
        )
        folder = shutil.copytree(Path(run) / "eval" / "stage2", Path(run) / "eval" / "stage2-no1")
        text = (folder / "predictions.jsonl").read_text()
        (folder / "predictions.jsonl").write_text(
            text.replace('"score": 1, "blind": 0.5', '"score": 0, "blind": 0.5')
        )
    lines = [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in compare.ways(
            compare.other_ways(runs, {2: [str(tmp_path / "a"), str(tmp_path / "b")]})
        ).splitlines()
    ]
    assert lines[2] == [
        "stage2-no1",
        "0.125",
        "stage2",
        "-50.0 [-50.0, -50.0]",
        "-50.0, -50.0",
        "-1.2",
    ]
    assert lines[3:] == [
        ["stage2, rooms x2", "0.625", "stage2", "+0.0 [+0.0, +0.0]", "+0.0, +0.0", ""]
    ]
    for folder in (*map(Path, runs), tmp_path / "a", tmp_path / "b"):
        shutil.copytree(folder / "eval" / "stage2", folder / "eval" / "cold")
    (tmp_path / "b" / "ladder.json").write_text(
        json.dumps({"seed": 5, "data_scale": [2]})
    )  # of a seed that runs lack
    rows = compare.other_ways(runs, {2: [str(tmp_path / "a"), str(tmp_path / "b")]})
    assert [(row["name"], row["seeds"], row["paper"]) for row in rows[1:]] == [
        ("cold, rooms x2", [0], None)
    ]
    for folder in (*map(Path, runs), tmp_path / "a", tmp_path / "b"):
        shutil.rmtree(folder / "eval" / "cold")
    (tmp_path / "b" / "ladder.json").write_text(json.dumps({"seed": 1, "data_scale": [2]}))
    path = (
        tmp_path / "b" / "eval" / "stage2" / "predictions.jsonl"
    )  # the second seed counts nothing with twice the rooms
    path.write_text(
        path.read_text().replace('"score": 1, "blind": 0.5', '"score": 0, "blind": 0.5')
    )
    row = compare.other_ways(runs, {2: [str(tmp_path / "a"), str(tmp_path / "b")]})[1]
    assert row["value"] == -25 and row["seeds"] == [0, -50]
    made = compare.drawn(runs, [row], {})
    assert (
        set(made) == {"ladder", "ways"}
        and "stage2, rooms x2" in made["ways"]
        and "stage2, rooms x2" not in made["ladder"]
    )
    assert compare.other_ways([str(tmp_path / "a")], {}) == []
    (
        Path(runs[1]) / "eval" / "stage2-no1" / "predictions.jsonl"
    ).unlink()  # not done in one of the ladders: not compared
    assert compare.other_ways(runs, {}) == []
    (Path(runs[0]) / "ladder.json").write_text('{"seed": 7}')
    with pytest.raises(UserError, match="give ladders of the same seeds"):
        compare.other_ways(runs[:1], {2: [str(tmp_path / "a")]})


def test_probes_of_all_ladders_as_one(runs):
    """By hand: 0.2 and 0.4 with half widths 0.03 and 0.04: 0.3 +- 0.05 / 2. Rungs, types and probes that one ladder lacks
    stay out."""

    def probe(run, what, names, value, half, kinds=("object count",), **settings):
        figure = {"value": value, "low": value - half, "high": value + half}
        rows = [
            {
                "name": name,
                "style": "direct",
                "entropy": figure,
                "types": dict.fromkeys(kinds, figure),
            }
            for name in names
        ]
        (Path(run) / "probes").mkdir(exist_ok=True)
        (Path(run) / "probes" / f"{what}.json").write_text(
            json.dumps(
                {
                    "settings": {"data": run, "seed": 0, "questions": 20} | settings,
                    "rows": rows,
                    "paper": {"X": {"entropy": 1.24}},
                }
            )
        )

    probe(runs[0], "entropy", ["base", "stage2"], 0.2, 0.03, kinds=("room size", "object count"))
    assert compare.probed(runs) == {}
    probe(runs[1], "entropy", ["stage2"], 0.4, 0.04, seed=1, questions=18)  # its rooms have no more
    probe(runs[1], "hints", ["stage2"], 0.4, 0.04)
    found = compare.probed(runs)
    assert {what: questions for what, (questions, _) in found.items()} == {"entropy": 38}
    assert [line.split() for line in table(found["entropy"][1]).splitlines()] == [
        ["stage2", "paper:", "X"],
        ["entropy", "0.300", "[0.275,", "0.325]", "1.240"],
        ["object", "count", "0.300", "[0.275,", "0.325]"],
    ]
    ours, paper = (
        float(h)
        for h in re.findall(
            r'<rect [^>]*height="([0-9.]+)"', compare.drawn(runs, [], found)["entropy"]
        )[:2]
    )
    assert ours / paper == pytest.approx(0.3 / 1.24, rel=0.01)
    probe(runs[1], "entropy", ["stage2"], 0.4, 0.04, temperature=2)
    with pytest.raises(
        UserError,
        match="1/probes/entropy.json: probed with .*'temperature': 2.*, expected .* as in .*0/probes",
    ):
        compare.probed(runs)


def test_differences_are_drawn_to_scale():
    """By hand: of -10 to 10 points a dot at 5 lies as far right of zero as a ring at -5 left of it; a row without the paper's
    figure has no ring."""
    svg = differences(
        [
            {
                "name": "a<b",
                "value": 5.0,
                "low": -10.0,
                "high": 10.0,
                "paper": -5.0,
                "seeds": [20.0, 0.0],
            },
            {"name": "c", "value": 0.0, "low": -1.0, "high": 1.0, "paper": None, "seeds": []},
        ],
        "points",
    )
    (zero,) = (float(x) for x in re.findall(r'class="level" x1="([0-9.]+)"', svg))
    (first, second, dot, ring, other), (low, high) = (
        [float(x) for x in found]
        for found in (
            re.findall('<circle class="[a-z]*" cx="([0-9.]+)"', svg)[
                3:
            ],  # after the three of the legend
            re.search(r'class="whisker" x1="([0-9.]+)" x2="([0-9.]+)"', svg).groups(),
        )
    )
    assert dot - zero == pytest.approx(zero - ring, abs=0.2) and other == zero == second
    assert first - zero == pytest.approx(
        2 * (high - zero), abs=0.2
    )  # beyond the interval, yet within the picture
    assert (
        high - zero
        == pytest.approx(2 * (dot - zero), abs=0.2)
        == pytest.approx(zero - low, abs=0.2)
    )
    assert "a&lt;b" in svg and svg.count('class="ring"') == 2
    still = differences(
        [{"name": "a", "value": 0.0, "low": 0.0, "high": 0.0, "paper": None, "seeds": []}], "points"
    )
    level, dot = (
        re.search('class="level" x1="([0-9.]+)"', still)[1],
        re.findall('class="c" cx="([0-9.]+)"', still)[1],
    )
    assert level == dot


def test_a_chart_of_one_model_holds_its_words():
    """Columns as wide as the longest name needs, the whole as wide as its title, at the least the widths measured in a browser."""
    one = bars([{"name": "m", "iou": {"value": 0.5}}], {}, [("t" * 100, ("iou",), ())])
    two = bars(
        [{"name": "x" * 30, "iou": {"value": 0.5}}, {"name": "y" * 30, "iou": {"value": 0.5}}],
        {},
        [("t", ("iou",), ())],
    )
    assert int(re.search('width="([0-9]+)"', one)[1]) >= 44 + 720
    first, second = (float(re.search(f'x="([0-9.]+)"[^>]*>{word}', two)[1]) for word in ("x", "y"))
    assert second - first >= 30 * 6.1
    bare = bars(
        [{"name": "m", "iou": {"value": 0.5}}],
        {},
        [("boxes", ("boxes",), ()), ("map", ("iou",), ())],
    )
    assert (
        ">map<" in bare and "boxes" not in bare and 'height="250"' in bare
    )  # a panel that nothing stands in is left out


def test_only_scores_have_the_interval_of_scores():
    """By hand: blind and the one box for all stand without, and what a rung lacks is not there."""
    rungs = [{"name": "stage2", "scores": {"overall": 0.5, "low": 0.4, "high": 0.6, "blind": 0.3}}]
    assert compare.steps(rungs) == [
        {
            "name": "stage2",
            "score": {"value": 0.5, "low": 0.4, "high": 0.6},
            "blind": {"value": 0.3},
        }
    ]


def test_figures_of_the_tables(runs, tmp_path, call, capsys):
    """A chart of the ladder, one of each probe that all ladders have, one of other ways where there are any: here none. Bars by
    hand: the means over both ladders' scores.json."""
    for run, score in zip(runs, (0.25, 0.75)):
        for rung in ("stage1", "stage2"):
            path = Path(run) / "eval" / rung / "scores.json"
            path.write_text(
                json.dumps(
                    {
                        "localization": {"valid_json": 1, "mean_iou": 0.5, "mean_box_iou": 0.1},
                        "well_formed": 0.5,
                        "overall": score * (rung == "stage2"),
                        "blind": 0.25,
                        "low": 0.1,
                        "high": 0.9,
                    }
                )
            )
    call(compare, *runs, "--figures", tmp_path / "figures")
    assert "| stage2 | 1.000 |" in capsys.readouterr().out
    assert [path.name for path in (tmp_path / "figures").iterdir()] == ["ladder.svg"]
    svg = (tmp_path / "figures" / "ladder.svg").read_text()
    heights = [float(h) for h in re.findall(r'<rect class="c[^>]*height="([0-9.]+)"', svg)]
    (base, score), (_, boxes) = heights[:2], heights[2:]
    ends = re.findall(r'class="whisker" [^>]* y1="([0-9.]+)" y2="([0-9.]+)"', svg)
    level = float(re.search('class="level" [^>]* y1="([0-9.]+)"', svg)[1])
    assert base == 0 and boxes > 0 and 204 - level == pytest.approx(score / 2, abs=0.1)
    assert float(ends[1][0]) - float(ends[1][1]) == pytest.approx(
        score / 0.5 * math.hypot(0.15, 0.65), abs=0.2
    )
    assert compare.pooled([{"value": 0.5, "low": 0.4, "high": 0.9}]) == {
        "value": 0.5,
        "low": 0.4,
        "high": 0.9,
    }  # one as it is
