"""ladder.py: the recipes are complete, the commands can be typed by hand, and the whole of it runs (slow)."""

import importlib
import inspect
import json
import shlex
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from conftest import launch

import ladder
from ladder import EVERY_RUNG, FLAGS, RECIPES, RUNGS, SMOKE, WAYS, commands, lesson, table
from rooms import scenes
from runtime import recipe_settings

REPOSITORY = Path(ladder.__file__).parent


def arguments(*flags, **changes):
    """ladder.py's arguments."""
    values = {
        "preset": "tiny",
        "out": "runs/tiny",
        "seed": 0,
        "nproc_per_node": 1,
        "smoke": False,
        "model": None,
        "data": None,
        "test": None,
        "cold_start": "scenes",
        "limit": 150,
        "without": [],
        "mixed": False,
        "data_scale": [1],
    }
    return SimpleNamespace(**values | changes)


CLIMBS = {
    "tiny": arguments(),
    "smoke": arguments(smoke=True, seed=3),
    "two": arguments(nproc_per_node=2),
    "paper": arguments(preset="paper", out="runs/paper", model="3b", data="26k", nproc_per_node=4),
    "paper tested": arguments(
        preset="paper", out="runs/paper", model="3b", data="26k", test="rooms"
    ),
}


def as_typed(args):
    """[(rung, purpose, words)]"""
    return [(rung, purpose, list(map(str, command))) for rung, purpose, command in commands(args)]


# ---------------------------------------------------------------------------------------------- recipes


def test_presets_say_the_same_things():
    """A setting that one preset's stage has and the other's lacks would be None there without anyone's asking."""
    assert set(RECIPES) == {"tiny", "paper"}
    for stage in RECIPES["tiny"]:
        assert set(RECIPES["tiny"][stage]) == set(RECIPES["paper"][stage]), stage
        assert set(RECIPES["tiny"][stage]) <= set(FLAGS)
    assert set(RECIPES["tiny"]) == set(RECIPES["paper"]) == {"base", *SMOKE}
    assert set(SMOKE) == {stage for _, stage, *_ in RUNGS if stage}


def test_recipe_values_have_their_flags_types():
    """What a recipe says must be what its flag could have said, or config_run.json differs between the two."""

    def fits(value, kind):
        if value is None:
            return True
        if isinstance(kind, tuple):
            return value in kind
        if isinstance(kind, list):
            return isinstance(value, list) and all(type(item) is kind[0] for item in value)
        return type(value) is kind

    wrong = [
        (preset, stage, name, value)
        for preset, rows in RECIPES.items()
        for stage, row in rows.items()
        for name, value in row.items()
        if not fits(value, FLAGS[name][0])
    ]
    assert not wrong


def test_tiny_rungs_start_where_the_last_one_ended():
    """Typed bare, one after the other, the stages climb the same ladder as ladder.py does."""
    outs = {"base": "base"} | {
        rung: RECIPES["tiny"][stage]["out"] for rung, stage, *_ in RUNGS if stage
    }
    for rung, stage, start, files, *_ in RUNGS:
        if stage:
            assert RECIPES["tiny"][stage]["model"] == outs[start]
            assert RECIPES["tiny"][stage]["data"] == [
                f"runs/tiny/rooms/train/{file}" for file in files
            ]


# ---------------------------------------------------------------------------------------------- commands


@pytest.mark.parametrize("name", CLIMBS)
def test_commands_are_accepted_as_typed(name):
    """Every training command parses, and resolves to the recipe but for what the command says."""
    args, trained = CLIMBS[name], []
    for rung, purpose, words in as_typed(args):
        script = next(word for word in words if word.endswith(".py"))
        launcher, flags = words[: words.index(script)], words[words.index(script) + 1 :]
        assert (REPOSITORY / script).is_file()
        alone = (
            ["python"]
            if args.nproc_per_node == 1 or purpose == "rooms"
            else [
                "torchrun",
                "--standalone",
                f"--nproc-per-node={args.nproc_per_node}",
                "--shutdown-timeout=600",
            ]
        )
        assert launcher == alone
        if purpose == "train":
            settings = vars(recipe_settings("", flags, "grpo" if script == "grpo.py" else None))
            stage = settings["stage"]
            said = {
                "preset",
                "stage",
                "model",
                "data",
                "out",
                "replay",
                "seed",
                "max_steps",
                "resume",
                "images",
                "eval_every",
                "eval_data",
            }
            assert {key: value for key, value in settings.items() if key not in said} == {
                key: value for key, value in RECIPES[args.preset][stage].items() if key not in said
            }
            assert settings["seed"] == args.seed and settings["resume"] == "auto"
            assert settings["max_steps"] == (
                SMOKE[stage] if args.smoke else RECIPES[args.preset][stage]["max_steps"]
            )
            trained.append((rung, stage, settings["model"], settings["out"]))
    base = "3b" if args.preset == "paper" else "base"
    rungs = ["stage1", "stage2", "cold", "grpo"]
    assert [t[:2] for t in trained] == list(zip(rungs, ["1", "2", "cold", "grpo"]))
    assert [t[2] for t in trained] == [base, *(f"{args.out}/{rung}" for rung in rungs[:-1])]
    assert [t[3] for t in trained] == [f"{args.out}/{rung}" for rung in rungs]


def test_tiny_commands_are_the_recipes_defaults():
    """The commands ladder.py prints for preset tiny name just what the bare commands would take."""
    for rung, purpose, words in as_typed(arguments()):
        if purpose == "train":
            stage = words[words.index("--stage") + 1] if "--stage" in words else "grpo"
            script = words.index("grpo.py" if stage == "grpo" else "train_sft.py")
            bare = [] if stage == "grpo" else ["--stage", stage]
            only = "grpo" if stage == "grpo" else None
            typed, default = (
                vars(recipe_settings("", flags, only)) for flags in (words[script + 1 :], bare)
            )
            held_out = (
                {key: typed[key] for key in ("eval_every", "eval_data")} if stage == "grpo" else {}
            )
            assert typed == default | {"resume": "auto"} | held_out


@pytest.mark.parametrize("name", CLIMBS)
def test_each_rung_is_trained_then_evaluated(name):
    """In the order of RUNGS; the paper preset evaluates only where it is told on what."""
    steps = [(rung, purpose) for rung, purpose, _ in as_typed(CLIMBS[name]) if rung]
    tested = CLIMBS[name].preset == "tiny" or CLIMBS[name].test
    assert steps == [
        step
        for rung, stage, *_ in RUNGS
        for step in ([(rung, "train")] if stage else []) + ([(rung, "evaluate")] if tested else [])
    ]


def test_other_ways_share_the_ladders_rungs():
    """Names are unique; each way starts at a rung of the ladder, goes on from its own, and its commands parse to what it says."""
    names = [rung.name for rung in EVERY_RUNG]
    assert len(set(names)) == len(names) and names[:5] == [rung.name for rung in RUNGS]
    starts = {
        "self": "stage2",
        "stage1": "base",
        "stage1-as-long": "base",
        "stage2": "stage1",
        "single,multi": "stage1",
        "thinking": "stage2",
        "cold": "stage2",
        "mixed": "base",
    }
    assert {name: rungs[0].start for name, rungs in WAYS.items() if rungs} == starts
    assert all(
        rung.start == before.name
        for rungs in WAYS.values()
        for before, rung in zip(rungs, rungs[1:])
    )
    args = arguments(
        without=[name for name in WAYS if name not in ("self", "mixed")],
        mixed=True,
        cold_start="self",
    )
    settings = {}
    for rung, purpose, words in as_typed(args):
        if purpose == "train":
            script = next(word for word in words if word.endswith(".py"))
            flags = words[words.index(script) + 1 :]
            settings[rung] = vars(
                recipe_settings("", flags, "grpo" if script == "grpo.py" else None)
            )
    assert set(settings) == set(names) - {"base"}
    assert (
        settings["stage2-no1"]["model"] == "base"
        and settings["grpo-no1"]["model"] == "runs/tiny/cold-no1"
    )
    assert settings["stage2-long"]["max_steps"] == sum(
        RECIPES["tiny"][stage]["max_steps"] for stage in "12"
    )
    assert settings["stage2-mixed"]["max_steps"] == settings["stage2-long"]["max_steps"]
    assert (
        len(settings["stage2-mixed"]["data"]) == 2 and settings["stage2-mixed"]["replay_ratio"] == 0
    )
    assert {settings[rung]["data_types"][0] for rung in settings if rung.endswith("films")} == {
        "video"
    }
    assert settings["grpo-bare"]["prompt_style"] == "direct" and settings["grpo-bare"][
        "reward_funcs"
    ] == ["accuracy"]
    assert settings["cold-self"]["data"] == ["runs/tiny/self_coldstart.jsonl"]
    boxes = {
        rung for rung in settings if settings[rung].get("replay_ratio") and settings[rung]["replay"]
    }
    assert boxes == {
        "stage2",
        "cold",
        "cold-self",
        "cold-no2",
        "cold-mixed",
    }  # the others must not see stage 1's rows again


def test_other_ways_of_the_paper_go_by_epochs():
    """Its stages are one epoch each: as long as both is more of one, shuffled together one of both, and no number of steps."""
    args = arguments(
        preset="paper", out="o", model="3b", data="26k", without=["stage1-as-long"], mixed=True
    )
    settings = {
        rung: vars(recipe_settings("", words[words.index("train_sft.py") + 1 :]))
        for rung, purpose, words in as_typed(args)
        if purpose == "train" and "train_sft.py" in words
    }
    assert settings["stage2-long"]["epochs"] == 1.287 and settings["stage2-mixed"]["epochs"] == 1.0
    assert len(settings["stage2-mixed"]["data"]) == 2 and {
        row["max_steps"] for row in settings.values()
    } == {None}


def test_more_rooms_are_made_for_a_larger_data_scale():
    rooms = [
        next(
            words
            for _, purpose, words in as_typed(arguments(data_scale=[scale]))
            if purpose == "rooms"
        )
        for scale in (1, 2.5)
    ]
    assert [words[words.index("--scenes") + 1] for words in rooms] == ["3600", "9000"]
    default = (
        inspect.getsource(scenes.main).split('"--scenes", type=int, default=')[1].split(",")[0]
    )
    assert int(default) == ladder.ROOMS_MADE


def test_other_scripts_know_the_flags_they_are_given(call, capsys):
    """scenes.py, tiny.py and eval.py list each flag of the commands in their --help."""
    given = {}
    for command in ladder.MADE_BY.values():
        _, script, *words = shlex.split(command)
        given.setdefault(script, set()).update(word for word in words if word.startswith("--"))
    for name in ("smoke", "paper tested"):
        for _, _, words in as_typed(CLIMBS[name]):
            script = next(word for word in words if word.endswith(".py"))
            given.setdefault(script, set()).update(word for word in words if word.startswith("--"))
    for script in ("scenes.py", "tiny.py", "eval.py"):
        with pytest.raises(SystemExit):
            call(importlib.import_module(script.removesuffix(".py")), "--help")
        said = capsys.readouterr().out.replace("[", " ").replace(",", " ").split()
        assert given[script] <= {word.rstrip("]") for word in said}, script


def test_what_is_printed_is_what_runs(monkeypatch, capsys):
    """The printed line is shell-quoted and stands for the very process that is started, from any directory."""
    started = []
    monkeypatch.setattr(
        subprocess, "Popen", lambda words: started.append(words) or SimpleNamespace(wait=lambda: 0)
    )
    ladder.run(["python", "tiny.py", "--data", Path("my rooms"), "--seed", 3])
    ladder.run(["torchrun", "--standalone", "--nproc-per-node=2", "grpo.py", "--out", "o"])
    lines = [
        shlex.split(line[2:])
        for line in capsys.readouterr().out.splitlines()
        if line.startswith("$ ")
    ]
    assert lines == [
        ["python", "tiny.py", "--data", "my rooms", "--seed", "3"],
        ["torchrun", "--standalone", "--nproc-per-node=2", "grpo.py", "--out", "o"],
    ]
    assert started == [
        [sys.executable, str(REPOSITORY / "tiny.py"), "--data", "my rooms", "--seed", "3"],
        [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--standalone",
            "--nproc-per-node=2",
            str(REPOSITORY / "grpo.py"),
            "--out",
            "o",
        ],
    ]


def test_the_ladder_ends_where_a_rung_fails(monkeypatch, capsys):
    """With that rung's exit code, and one line on how to go on."""
    monkeypatch.setattr(subprocess, "Popen", lambda words: SimpleNamespace(wait=lambda: 7))
    with pytest.raises(SystemExit) as error:
        ladder.run(["python", "tiny.py"])
    assert error.value.code == 7
    assert (
        capsys.readouterr().err
        == "ladder.py: stopped (exit code 7); the same command goes on from here\n"
    )


def test_several_seeds_are_ladders_of_their_own(monkeypatch, tmp_path):
    """One command each, with all that was asked, and then their comparison."""
    started = []
    monkeypatch.setattr(ladder, "run", lambda command: started.append(list(map(str, command))))
    monkeypatch.setattr(
        sys,
        "argv",
        [
            "ladder.py",
            "--seeds",
            "2",
            "--seed",
            "4",
            "--limit",
            "500",
            "--fresh",
            "--out",
            str(tmp_path / "seeds"),
        ],
    )
    ladder.main()
    outs = [str(tmp_path / "seeds" / seed) for seed in "45"]
    assert started == [
        [
            "python",
            "ladder.py",
            "--seed",
            seed,
            "--data-scale",
            "1",
            "--out",
            out,
            "--preset",
            "tiny",
            "--limit",
            "500",
            "--nproc-per-node",
            "1",
            "--cold-start",
            "scenes",
            "--fresh",
        ]
        for seed, out in zip("45", outs)
    ] + [["python", "compare.py", *outs]]


def test_several_data_scales_are_ladders_of_their_own(monkeypatch, tmp_path):
    started = []
    monkeypatch.setattr(ladder, "run", lambda command: started.append(list(map(str, command))))
    monkeypatch.setattr(
        sys,
        "argv",
        [
            "ladder.py",
            "--data-scale",
            "1",
            "0.5",
            "--without",
            "stage1",
            "grpo",
            "--mixed",
            "--out",
            str(tmp_path / "ways"),
        ],
    )
    ladder.main()
    outs = [str(tmp_path / "ways" / name) for name in ("0", "0-rooms-x0.5")]
    assert [words[3:7] for words in started[:2]] == [
        ["0", "--data-scale", scale, "--out"] for scale in ("1", "0.5")
    ]
    assert all(
        " ".join(words[7:]).startswith(out) and "--without stage1 grpo --mixed" in " ".join(words)
        for words, out in zip(started, outs)
    )
    assert started[2] == ["python", "compare.py", *outs]


# ---------------------------------------------------------------------------------------------- the result


def rung(name, score):
    scores = {
        "overall": score,
        "well_formed": 0.5,
        "seconds": 1.0,
        "localization": {"mean_iou": 0.25, "valid_json": 1.0, "mean_box_iou": 0.125},
        "types": {kind: {"score": score, "blind": 0.3} for kind in ("object count", "room size")},
    }
    return {"name": name, "style": "direct", "seconds": 12.0, "scores": scores}


def test_table_and_lesson_say_what_the_scores_say():
    """Each number stands under its own heading, each rung is compared with the one before."""
    lines = [line.split() for line in table([rung("base", 0.1), rung("stage1", 0.4)]).splitlines()]
    assert lines[0] == ["box", "IoU", "valid", "object", "room", "mean", "formed", "sec"]
    assert lines[1] == ["count", "size"]
    assert lines[2] == ["base", "0.25", "100%", "0.10", "0.10", "0.100", "50%", "12"]
    assert lines[-1] == ["blind", "guess", "0.12", "0.30", "0.30", "0.300"]
    assert len({len(line) for line in table([rung("base", 0.1)]).splitlines()}) == 1
    said = lesson([rung("base", 0.1), rung("stage1", 0.4), rung("stage2", 0.6)], "stage1")
    assert (
        "stage1" in said and "0.400" in said and "(was 0.25 and 0.100)" in said and "0.300" in said
    )
    assert "was" not in lesson([rung("base", 0.1)], "base").split("guessing")[0].replace(
        "without", ""
    )


# ---------------------------------------------------------------------------------------------- bad input and the whole


@pytest.mark.parametrize(
    "flags, expected",
    (
        (["--preset", "paper"], "--preset paper needs --model and --data"),
        (
            ["--preset", "paper", "--model", "m", "--data", "d", "--seeds", "2"],
            "--seeds compares what --test measures; give --test",
        ),
        (["--preset", "huge"], "invalid choice: 'huge'"),
        (["--out", "TAKEN"], "holds something else; give another --out"),
        (["--out", "BEGUN"], "holds a ladder with other settings"),
        (["--out", "BEGUN", "--seeds", "2"], "holds one ladder; give another --out for several"),
        (["--out", "FILE"], "cannot write in"),
        (["--data-scale", "0"], "--data-scale is 0.0: expected more than 0"),
        (["--without", "stage3"], "invalid choice: 'stage3'"),
    ),
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_bad_input_starts_nothing(monkeypatch, capsys, tmp_path, flags, expected):
    """Exit code 2 and a line that says what to give, before any command runs, and nothing of anyone's touched."""
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "thesis.txt").touch()
    (tmp_path / "begun").mkdir()
    (tmp_path / "begun" / "ladder.json").write_text('{"seed": 8}')
    (tmp_path / "file").touch()
    before = sorted(tmp_path.rglob("*"))
    words = [str(tmp_path / word.lower()) if word.isupper() else word for word in flags]
    monkeypatch.setattr(sys, "argv", ["ladder.py", *words])
    monkeypatch.setattr(ladder, "run", lambda command: pytest.fail("a command was run"))
    with pytest.raises(SystemExit) as error:
        ladder.main()
    assert error.value.code == 2 and expected in capsys.readouterr().err.splitlines()[-1]
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.slow
def test_smoke_climbs_everything(tmp_path):
    """Rooms, four stages, five evaluations, results and report; a second call finds all of it done and says the
    same."""
    out = tmp_path / "smoke"
    done = launch(REPOSITORY / "ladder.py", "--smoke", "--out", out)
    assert done.returncode == 0, done.stderr[-2000:]
    results = json.loads((out / "results.json").read_text())
    assert [rung["name"] for rung in results["rungs"]] == [
        "base",
        "stage1",
        "stage2",
        "cold",
        "grpo",
    ]
    for rung in results["rungs"]:
        folder = out / "eval" / rung["name"]
        assert (
            rung["scores"] == json.loads((folder / "scores.json").read_text())
            and rung["seconds"] > 0
        )
        assert (folder / "predictions.jsonl").is_file()
    for rung, stage, *_ in RUNGS:
        if stage:
            assert (out / rung / "config.json").is_file()
            assert len((out / rung / "log.jsonl").read_text().splitlines()) == SMOKE[stage]
    page = (out / "report.html").read_text(encoding="utf-8")
    assert "<svg" in page and "GRPO" in page and "data:image" in page
    printed = [line for line in done.stdout.splitlines() if line.startswith("$ ")]
    assert (
        len(printed) == 1 + 4 + 5 + 1 + 2
    )  # rooms, stages, evaluations, training questions, signs and report
    assert "the ladder took" in done.stdout

    weights = {
        rung: (out / rung / "model.safetensors").read_bytes() for rung, stage, *_ in RUNGS if stage
    }
    again = launch(REPOSITORY / "ladder.py", "--smoke", "--out", out)
    assert again.returncode == 0 and again.stdout.count("finished already") == 4, again.stderr[
        -2000:
    ]
    assert json.loads((out / "results.json").read_text())["rungs"] == results["rungs"]
    assert all((out / rung / "model.safetensors").read_bytes() == weights[rung] for rung in weights)
