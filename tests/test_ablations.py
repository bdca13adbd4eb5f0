"""look/ablations.py: each way trains what it says, shares the ladder's rungs and can be typed."""

import json
import shlex

import pytest

import ladder
from ladder import RECIPES, RUNGS
from look import ablations
from look.ablations import WAYS, commands, own_rungs
from runtime import recipe_settings

TINY = ("--out", "runs/tiny")
PAPER = ("--preset", "paper", "--model", "3b", "--data", "26k", "--test", "t", "--out", "o")


def trainings(name, *flags):
    """{rung: what its training command resolves to} of a way."""
    rungs = {}
    for _, line in commands(ladder.settings(flags), name):
        words = shlex.split(line)
        for script, stage in (("train_sft.py", None), ("grpo.py", "grpo")):
            if script in words:
                row = vars(recipe_settings("", stage, words[words.index(script) + 1 :]))
                rungs[row["out"].split("/")[-1]] = row
    return rungs


@pytest.fixture(scope="module")
def tiny():
    """{rung: its settings} of all ways."""
    rungs = {}
    for name in WAYS:
        rungs |= trainings(name, *TINY)
    return rungs


def test_each_way_starts_at_the_ladder_and_goes_on_from_its_own_rungs(tiny, monkeypatch):
    starts = {
        "no1": ["base", "stage2-no1", "cold-no1"],
        "long": ["base", "stage2-long", "cold-long"],
        "no2": ["stage1", "cold-no2"],
        "films": ["stage1", "stage2-films", "cold-films"],
        "bare": ["stage2"],
        "nocold": ["stage2"],
        "mixed": ["base", "stage2-mixed", "cold-mixed"],
        "self": ["stage2", "cold-self"],
    }
    assert set(starts) == set(WAYS)
    for name, expected in starts.items():
        rungs = [rung for rung, _ in own_rungs(name)]
        assert [rung.start for rung in rungs] == expected
        assert [rung.name for rung in rungs] == [*expected[1:], f"grpo-{name}"]
        for rung in rungs:
            folder = tiny[rung.name]["model"].split("/")[-1]
            assert folder == rung.start


def test_each_rung_is_trained_and_then_scored_in_its_style():
    for name in WAYS:
        scored = []
        for rung, line in commands(ladder.settings(TINY), name):
            words = shlex.split(line)
            if rung:
                assert words[words.index("--out") + 1] == f"runs/tiny/eval/{rung.name}"
                scored.append((rung.name, words[words.index("--prompt-style") + 1]))
        styles = [(rung.name, rung.style) for rung, _ in own_rungs(name)]
        assert scored == styles
    ((own, _),) = own_rungs("bare")
    assert (own.name, own.style) == ("grpo-bare", "direct")


def test_what_the_ways_leave_out(tiny):
    """The commands parse to what the paper's ablations say."""
    both = RECIPES["tiny"]["1"]["max_steps"] + RECIPES["tiny"]["2"]["max_steps"]
    assert tiny["stage2-no1"]["max_steps"] == RECIPES["tiny"]["2"]["max_steps"]
    assert tiny["stage2-long"]["max_steps"] == tiny["stage2-mixed"]["max_steps"] == both
    assert [path.split("_")[1] for path in tiny["stage2-mixed"]["data"]] == ["grounding", "spatial"]
    assert tiny["grpo-bare"]["prompt_style"] == "direct"
    assert tiny["grpo-bare"]["reward_funcs"] == ["accuracy"]
    assert tiny["grpo-bare"]["reward_weights"] == [1.0]
    # Rows of boxes are read again only where stage 1's rows were read before.
    replayed = {name: " ".join(row["replay"]) for name, row in tiny.items() if "replay" in row}
    boxes = {name for name, files in replayed.items() if "grounding" in files}
    assert boxes == {"cold-no2", "cold-mixed", "cold-self", "teacher"}
    assert all("told_data.jsonl" in files for files in replayed.values())
    for name, row in tiny.items():
        stage = name.split("-")[0]
        if stage == "grpo" and name not in ("grpo-bare", "grpo-films"):
            recipe = dict(tiny["grpo-no1"])
            assert row == recipe | {"model": row["model"], "out": row["out"]}


def test_files_of_ones_own_come_with_the_folder_of_their_pictures(tiny):
    """Videos alone, chains of the model's own; held-out rooms have another folder of pictures."""
    own = {name: row["data"] for name, row in tiny.items() if row["images"]}
    assert own == {
        "stage2-films": ["runs/tiny/films/spld_spatial_data.jsonl"],
        "cold-films": ["runs/tiny/films/spld_coldstart_data.jsonl"],
        "grpo-films": ["runs/tiny/films/spld_spatial_data.jsonl"],
        "cold-self": ["runs/tiny/self/spld_coldstart_data.jsonl"],
    }
    assert {tiny[name]["images"] for name in own} == {"runs/tiny/rooms/train/images"}
    assert not tiny["grpo-films"]["eval_every"] and tiny["grpo-self"]["eval_every"] == 25


def test_ways_of_the_paper_go_by_epochs():
    """As long as both stages is more of one, both shuffled together is one epoch of both."""
    long, mixed = trainings("long", *PAPER), trainings("mixed", *PAPER)
    assert long["stage2-long"]["epochs"] == pytest.approx((5929 + 20680) / 20680, abs=1e-3)
    assert mixed["stage2-mixed"]["epochs"] == 1 and len(mixed["stage2-mixed"]["data"]) == 2
    assert {row["max_steps"] for row in (long | mixed).values()} == {None}


def test_chains_of_its_own_come_from_a_teacher(tiny):
    """The tiny model has seen 150 steps of chains; the 3B writes them when it is asked to."""
    assert tiny["teacher"]["max_steps"] == 150 and tiny["teacher"]["model"] == "runs/tiny/stage2"
    lines = [line for _, line in commands(ladder.settings(TINY), "self")]
    assert lines[1].startswith("python coldstart.py --model runs/tiny/teacher --data runs/tiny/")
    assert "--out runs/tiny/self/spld_coldstart_data.jsonl" in lines[1]
    assert "--temperature 0.5" in lines[1]  # at 1 one sample in twenty is well formed
    lines = [line for _, line in commands(ladder.settings(PAPER), "self")]
    assert lines[0].startswith("python coldstart.py --model o/stage2 --data 26k/")


def test_coldstart_knows_its_flags(call, capsys):
    import coldstart

    with pytest.raises(SystemExit):
        call(coldstart, "--help")
    said = capsys.readouterr().out
    for flags in (TINY, PAPER):
        (line,) = [li for _, li in commands(ladder.settings(flags), "self") if "coldstart.py" in li]
        for word in shlex.split(line):
            assert not word.startswith("--") or f"{word} " in said


def test_films_are_the_rows_about_videos(rooms, tmp_path):
    args = ladder.settings(["--out", str(tmp_path), "--data", str(rooms / "train"), "--test", "t"])
    ablations.write_films(args)
    for name in ("spld_spatial_data.jsonl", "spld_coldstart_data.jsonl"):
        rows = [json.loads(line) for line in (rooms / "train" / name).open()]
        films = [json.loads(line) for line in (tmp_path / "films" / name).open()]
        assert films == [row for row in rows if row["data_type"] == "video"]
        assert 0 < len(films) < len(rows)


# ---------------------------------------------------------------------------------- the command


@pytest.fixture
def ran(monkeypatch, call):
    """A function: the commands that look.ablations runs with some flags."""
    lines = []
    monkeypatch.setattr(ladder, "run", lines.append)
    monkeypatch.setattr(ablations, "climb", lambda args, names: lines.append((args, list(names))))

    def run(*flags):
        lines.clear()
        call(ablations, *flags)
        return lines

    return run


def test_seeds_and_scales_are_ladders_of_their_own(ran, tmp_path):
    """With all that was asked; ways stand beside the first scale's; in the end all are compared."""
    flags = ("--seeds", 2, "--ways", "no1", "bare", "--data_scale", 1, 0.5, "--limit", 500)
    lines = ran(*flags, "--out", tmp_path / "a b")
    folders = [f"{tmp_path}/a b/{name}" for name in ("0", "1", "0-rooms-x0.5", "1-rooms-x0.5")]
    ladders = [shlex.split(line) for line in lines if isinstance(line, str)]
    same = ["python", "ladder.py", "--limit", "500"]
    for words, folder, scenes in zip(ladders, folders, ("3600", "3600", "1800", "1800")):
        seed = folder.split("/")[-1][0]
        assert words == [*same, "--out", folder, "--seed", seed, "--scenes", scenes]
    assert ladders[4] == ["python", "-m", "look.compare", *folders] and len(ladders) == 5
    climbs = [line for line in lines if not isinstance(line, str)]
    assert [str(args.folder) for args, _ in climbs] == folders[:2]
    assert [(args.seed, args.limit, names) for args, names in climbs] == [
        (0, 500, ["no1", "bare"]),
        (1, 500, ["no1", "bare"]),
    ]


def test_all_ways(ran, tmp_path):
    (_, (_, names), _) = ran("--ways", "all", "--out", tmp_path)
    assert names == list(WAYS)


@pytest.mark.parametrize(
    "flags, expected",
    (
        (["--ways", "no3"], "invalid choice: 'no3'"),
        (["--sede", "3"], "unknown argument --sede, did you mean --seed?"),
        (["--data-scale", "0"], "--scenes is 0, expected a positive number"),
        (["--preset", "paper", "--model", "m", "--data", "d"], "--test is missing"),
    ),
)
def test_bad_input_starts_nothing(ran, capsys, flags, expected):
    with pytest.raises(SystemExit) as error:
        ran(*flags)
    assert error.value.code == 2 and expected in capsys.readouterr().err


def test_results_and_report_hold_the_ways_too(monkeypatch, tmp_path):
    """After the ladder's own rungs, as ladder.py writes them."""
    ran = []
    monkeypatch.setattr(ladder, "run", ran.append)
    monkeypatch.setattr(ladder, "lesson", lambda rung, scores: rung.name)
    monkeypatch.setattr(
        ladder, "result", lambda args, rung: {"name": rung.name, "style": rung.style, "scores": {}}
    )
    args = ladder.settings(["--out", str(tmp_path), "--seed", "2"])
    own = [{"name": rung.name} for rung in RUNGS]
    (tmp_path / "results.json").write_text(json.dumps({"rungs": own}))
    ablations.climb(args, ["no2", "bare"])
    results = json.loads((tmp_path / "results.json").read_text())
    assert (results["preset"], results["seed"]) == ("tiny", 2)
    names = [row["name"] for row in results["rungs"]]
    assert names == [*[rung.name for rung in RUNGS], "cold-no2", "grpo-no2", "grpo-bare"]
    assert ran[-1] == f"python -m look.report {tmp_path}" and len(ran) == 7
