"""ladder.py: valid recipes, commands that can be typed by hand, going on, the whole (slow)."""

import importlib
import inspect
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import launch

import ladder
from ladder import RECIPES, RUNGS, SMOKE, commands, lesson, settings, table
from rooms import scenes
from runtime import recipe_settings
from settings import GRPO, SETTINGS, SFT

REPOSITORY = Path(ladder.__file__).parent
PAPER = ("--preset", "paper", "--model", "3b", "--data", "26k")
CLIMBS = {
    "tiny": (),
    "smoke": ("--smoke", "--seed", "3", "--out", "my smoke"),
    "two": ("--nproc-per-node", "2"),
    "paper": (*PAPER, "--nproc-per-node", "4"),
    "paper tested": (*PAPER, "--test", "rooms"),
}


def as_typed(*flags):
    """[(rung that is scored or None, words)]"""
    return [(rung, shlex.split(line)) for rung, line in commands(settings(flags))]


def training(words):
    """The settings that a typed training command resolves to; None for another command."""
    for script, stage in (("train_sft.py", None), ("grpo.py", "grpo")):
        if script in words:
            return vars(recipe_settings("", stage, words[words.index(script) + 1 :]))
    return None


def trainings(*flags):
    return list(filter(None, [training(words) for _, words in as_typed(*flags)]))


# ---------------------------------------------------------------------------------- recipes


def test_every_stage_of_every_preset_has_a_recipe():
    assert set(RECIPES) == {"tiny", "paper"}
    assert set(RECIPES["tiny"]) == set(RECIPES["paper"]) == {"base", *SMOKE}
    assert set(SMOKE) == {rung.stage for rung in RUNGS if rung.stage}


@pytest.mark.parametrize("preset, stage", [(p, s) for p in RECIPES for s in RECIPES[p]])
def test_recipes_say_what_a_flag_could_say(preset, stage):
    """Settings that the stage has, of their flags' types, within their checks; only differences."""
    for name, value in RECIPES[preset][stage].items():
        setting = SETTINGS[name]
        assert name in (GRPO if stage == "grpo" else SFT)
        assert value != setting.default, name
        kind = setting.kind
        if isinstance(kind, tuple):
            assert value in kind
            continue
        numbers = value if isinstance(kind, list) else [value]
        expected = kind[0] if isinstance(kind, list) else kind
        assert {type(number) for number in numbers} == {expected}, name
        if setting.check:
            assert [setting.check(number) for number in numbers] == [None] * len(numbers)


def test_the_papers_numbers():
    """Of the authors' scripts and answers, with the defaults that the recipes leave out."""
    sft, *_, grpo = trainings(*PAPER)
    assert (sft["learning_rate"], sft["lr_scheduler_type"], sft["warmup_ratio"]) == (
        1e-5,
        "cosine",
        0.1,
    )
    assert (sft["batch_size"], sft["epochs"], sft["max_pixels"]) == (8, 1.0, 100352)
    assert (grpo["learning_rate"], grpo["lr_scheduler_type"], grpo["warmup_ratio"]) == (
        1e-6,
        "linear",
        0.0,
    )
    assert (grpo["num_generations"], grpo["beta"], grpo["max_completion_length"]) == (4, 0.01, 1024)


def test_tiny_rungs_start_where_the_last_one_ended():
    """Typed bare, one after the other, the stages climb the same ladder as ladder.py does."""
    outs = {"base": "base"}
    for rung in RUNGS[1:]:
        outs[rung.name] = RECIPES["tiny"][rung.stage]["out"]
    for rung in RUNGS[1:]:
        recipe = RECIPES["tiny"][rung.stage]
        assert recipe["model"] == outs[rung.start]
        assert recipe["data"] == [f"runs/tiny/rooms/train/{file}" for file in rung.files]


# ---------------------------------------------------------------------------------- commands


@pytest.mark.parametrize("name", CLIMBS)
def test_training_commands_resolve_to_their_recipes(name, monkeypatch):
    """Every training command parses, and gives the recipe but for what the command says."""
    monkeypatch.chdir(REPOSITORY)
    args = settings(CLIMBS[name])
    rows = trainings(*CLIMBS[name])
    assert [row["stage"] for row in rows] == ["1", "2", "cold", "grpo"]
    said = {"preset", "stage", "model", "data", "out", "replay", "seed", "max_steps", "resume"}
    said |= {"eval_every", "eval_data"}
    for row in rows:
        recipe = RECIPES[args.preset][row["stage"]]
        for key in row.keys() - said:
            assert row[key] == recipe.get(key, SETTINGS[key].default), key
        assert (row["preset"], row["seed"], row["resume"]) == (args.preset, args.seed, "auto")
        steps = SMOKE[row["stage"]] if args.smoke else recipe.get("max_steps")
        assert row["max_steps"] == steps
    outs = [f"{args.folder}/{rung.name}" for rung in RUNGS]
    assert [row["out"] for row in rows] == outs[1:]
    assert [row["model"] for row in rows] == ["3b" if "paper" in name else "base", *outs[1:-1]]


@pytest.mark.parametrize("name", CLIMBS)
def test_commands_start_with_their_launcher(name):
    """torchrun where there are several processes, but for the rooms; each script is there."""
    processes = settings(CLIMBS[name]).nproc_per_node
    for _, words in as_typed(*CLIMBS[name]):
        if words[1] == "-m":
            assert words[:3] == ["python", "-m", "rooms.scenes"]
            continue
        script = next(word for word in words if word.endswith(".py"))
        assert (REPOSITORY / script).is_file()
        torchrun = ["torchrun", "--standalone", f"--nproc-per-node={processes}"]
        expected = ["python"] if processes == 1 else [*torchrun, "--shutdown-timeout=600"]
        assert words[: words.index(script)] == expected


def test_tiny_commands_are_the_recipes_defaults(monkeypatch):
    """The commands of preset tiny name just what the bare commands would take."""
    monkeypatch.chdir(REPOSITORY)
    for typed in trainings():
        stage = typed["stage"]
        bare = ["grpo.py"] if stage == "grpo" else ["train_sft.py", "--stage", stage]
        held_out = {key: typed[key] for key in ("eval_every", "eval_data") if key in typed}
        assert typed == training(bare) | {"resume": "auto"} | held_out


@pytest.mark.parametrize("name", CLIMBS)
def test_each_rung_is_trained_then_evaluated(name):
    """In the order of RUNGS; the paper preset evaluates only where it is told on what."""
    args = settings(CLIMBS[name])
    steps = []
    for rung, words in as_typed(*CLIMBS[name]):
        row = training(words)
        if row:
            steps.append(("train", Path(row["out"]).name))
        elif rung:
            assert words[words.index("--out") + 1] == f"{args.folder}/eval/{rung.name}"
            assert words[words.index("--prompt-style") + 1] == rung.style
            steps.append(("evaluate", rung.name))
    expected = []
    for rung in RUNGS:
        expected += [("train", rung.name)] if rung.stage else []
        expected += [("evaluate", rung.name)] if args.test else []
    assert steps == expected


def test_the_papers_input():
    """Trained and evaluated on the authors' sizes, at 128 and at 512 tokens of 28 x 28 pixels."""
    assert {row["input_as"] for row in trainings(*PAPER)} == {"authors"}
    evaluations = [words for rung, words in as_typed(*PAPER, "--test", "rooms") if rung]
    assert len(evaluations) == len(RUNGS)
    for words in evaluations:
        assert words[words.index("--input-as") + 1] == "authors"
        assert words[words.index("--min-pixels") + 1] == str(16 * 28 * 28)
        assert words[words.index("--max-pixels") + 1] == str(512 * 28 * 28)
    assert not any("--input-as" in words for _, words in as_typed())


def test_rows_of_ones_own_are_not_mixed_with_rooms():
    """Preset tiny with --data makes no rooms and reads none; without --test it scores nothing."""
    lines = [line for _, line in commands(settings(["--data", "mine"]))]
    assert len(lines) == 4 and "rooms" not in " ".join(lines)
    assert "--data mine/spld_grounding_data.jsonl" in lines[0]


def test_rooms_enough_for_the_questions():
    """--scenes and --limit reach the command; the usual number of rooms is scenes.py's default."""
    _, words = as_typed("--scenes", "9000", "--limit", "500")[0]
    assert words[words.index("--scenes") + 1] == "9000"
    assert words[words.index("--test-scenes") + 1] == "2040"
    source = inspect.getsource(scenes.main)
    assert f"default={ladder.ROOMS_MADE}" in source.replace(" ", "")


def test_other_scripts_know_the_flags_they_are_given(call, capsys):
    """rooms.scenes, rooms.tiny and eval.py list each flag of the commands in their --help."""
    lines = list(ladder.MADE_BY.values())
    for name in ("smoke", "paper tested"):
        lines += [line for _, line in commands(settings(CLIMBS[name]))]
    for script in ("rooms.scenes", "rooms.tiny", "eval"):
        given = set()
        for line in lines:
            if f" {script} " in line or f" {script}.py " in line:
                given |= {word for word in shlex.split(line) if word.startswith("--")}
        assert given - {"--standalone"}
        with pytest.raises(SystemExit):
            call(importlib.import_module(script), "--help")
        said = capsys.readouterr().out.replace("[", " ").replace(",", " ").split()
        assert given <= {word.rstrip("]") for word in said}, script


# ---------------------------------------------------------------------------------- running


class Child:
    """Stands for a process that has ended."""

    def __init__(self, code):
        self.code = code

    def wait(self):
        return self.code


def test_what_is_printed_is_what_runs(monkeypatch, capsys):
    """The printed line stands for the very process that is started, from any directory."""
    started = []

    def popen(words, env):
        started.append(words)
        assert env["PYTHONPATH"].split(os.pathsep)[0] == str(REPOSITORY)
        return Child(0)

    monkeypatch.setattr(subprocess, "Popen", popen)
    lines = [
        "python eval.py --data 'my rooms' --seed 3",
        "torchrun --standalone --nproc-per-node=2 grpo.py --out o",
        "python -m rooms.scenes --out o",
    ]
    for line in lines:
        ladder.run(line)
    said = capsys.readouterr().out.splitlines()
    assert [line for line in said if line] == [f"$ {line}" for line in lines]
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    assert started == [
        [sys.executable, str(REPOSITORY / "eval.py"), "--data", "my rooms", "--seed", "3"],
        [sys.executable, *torchrun, str(REPOSITORY / "grpo.py"), "--out", "o"],
        [sys.executable, "-m", "rooms.scenes", "--out", "o"],
    ]


def test_a_path_with_a_space_stays_one_word():
    for _, words in as_typed(*CLIMBS["smoke"]):
        assert any(word.startswith("my smoke/") for word in words) and "smoke" not in words


def test_the_ladder_ends_where_a_rung_fails(monkeypatch, capsys):
    """With that rung's exit code, and one line on how to go on."""
    monkeypatch.setattr(subprocess, "Popen", lambda words, env: Child(7))
    with pytest.raises(SystemExit) as error:
        ladder.run("python eval.py")
    assert error.value.code == 7
    said = capsys.readouterr().err
    assert said == "stopped (exit code 7); the same command goes on from here\n"


SLEEPER = """
import signal, sys, time
def stop(number, frame):
    print("saved", number, flush=True)
    sys.exit(0)
for number in (signal.SIGINT, signal.SIGTERM):
    signal.signal(number, stop)
print("ready", flush=True)
time.sleep(60)
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_reaches_the_command_which_saves(tmp_path, number):
    """The ladder waits for the command, which ends with 0, and itself ends with 128 + the signal.

    Ctrl-C goes to all of the terminal's process group, SIGTERM to the ladder alone.
    """
    (tmp_path / "sleeper.py").write_text(SLEEPER)
    code = f"import ladder; ladder.run('python {tmp_path}/sleeper.py'); print('went on')"
    process = subprocess.Popen(
        [sys.executable, "-c", code],
        cwd=REPOSITORY,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    while process.stdout.readline().strip() != "ready":
        time.sleep(0.01)
    if number == signal.SIGINT:
        os.killpg(process.pid, number)
    else:
        process.send_signal(number)
    rest = process.stdout.read()
    assert process.wait(30) == 128 + number
    assert f"saved {int(number)}" in rest and "went on" not in rest


# ---------------------------------------------------------------------------------- results


def scores(score):
    types = {kind: {"score": score, "blind": 0.3} for kind in ("object count", "room size")}
    boxes = {"score": 0.25, "mean_iou": 0.25, "blind": 0.125}
    return {
        "overall": score,
        "blind": 0.3,
        "seconds": 1.0,
        "localization": boxes,
        "types": types,
    }


def pretend(monkeypatch):
    """Let commands write what ladder.py reads of them. Returns: the list of commands that ran."""
    ran = []

    def run(line):
        words = shlex.split(line)
        ran.append(line)
        if "eval.py" in words:
            out = Path(words[words.index("--out") + 1])
            out.mkdir(parents=True, exist_ok=True)
            (out / "scores.json").write_text(json.dumps(scores(len(ran) / 100)))
        elif training(words):
            out = Path(training(words)["out"])
            out.mkdir(parents=True, exist_ok=True)
            (out / "log.jsonl").write_text('{"step": 1, "step_time": 2.5}\n' * 2)

    monkeypatch.setattr(ladder, "run", run)
    return ran


def test_results_hold_what_trainers_and_evaluations_wrote(monkeypatch, call, capsys, tmp_path):
    """Scores as in scores.json, seconds of steps and evaluation; then the report and the table."""
    ran = pretend(monkeypatch)
    call(ladder, "--out", tmp_path / "run", "--seed", 4)
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert (results["preset"], results["seed"]) == ("tiny", 4)
    assert [rung["name"] for rung in results["rungs"]] == [rung.name for rung in RUNGS]
    assert [rung["style"] for rung in results["rungs"]] == [rung.style for rung in RUNGS]
    assert [rung["seconds"] for rung in results["rungs"]] == [1.0, 6.0, 6.0, 6.0, 6.0]
    for rung in results["rungs"]:
        path = tmp_path / "run" / "eval" / rung["name"] / "scores.json"
        assert rung["scores"] == json.loads(path.read_text())
    assert ran[-1] == f"python -m look.report {tmp_path}/run"
    said = capsys.readouterr().out
    assert said.count("--> ") == 5 and said.endswith(table(results["rungs"]) + "\n")


def test_table_and_lesson_say_what_the_scores_say():
    """Each number stands in the line of its type and under its rung."""
    rungs = [{"name": "base", "scores": scores(0.1)}, {"name": "stage1", "scores": scores(0.4)}]
    lines = [line.split() for line in table(rungs).splitlines()]
    assert lines == [
        ["base", "stage1", "blind", "guess"],
        ["boxes", "(IoU)", "0.250", "0.250", "0.125"],
        ["object", "count", "0.100", "0.400", "0.300"],
        ["room", "size", "0.100", "0.400", "0.300"],
        ["mean", "0.100", "0.400", "0.300"],
    ]
    said = lesson(RUNGS[1], scores(0.4))
    assert said.startswith("--> stage1 says where objects are")
    assert [number in said for number in ("0.25", "0.400", "0.300")] == [True] * 3


def test_a_ladder_goes_on_with_equal_settings_only(monkeypatch, call, capsys, tmp_path):
    """With more processes too, but not with other rooms."""
    ran = pretend(monkeypatch)
    out = tmp_path / "run"
    call(ladder, "--out", out)
    first = len(ran)
    (out / "thesis.txt").touch()
    call(ladder, "--out", out, "--nproc-per-node", 2, "--limit", 150)
    assert len(ran) == 2 * first and (out / "thesis.txt").is_file()
    with pytest.raises(ladder.UserError, match="other settings: limit 150, now 20; give another"):
        call(ladder, "--out", out, "--limit", 20)
    assert len(ran) == 2 * first and (out / "thesis.txt").is_file()
    begun = json.loads((out / "config_run.json").read_text())
    keys = ("preset", "model", "data", "test", "seed", "limit", "scenes", "smoke")
    made_of = begun.pop("made_of")
    assert begun == dict(zip(keys, ("tiny", None, None, None, 0, 150, 3600, False)))
    assert set(made_of) == {"model"}


@pytest.mark.parametrize(
    "flags, expected",
    (
        (["--preset", "paper"], "--model is missing"),
        (["--preset", "paper", "--model", "m"], "--data is missing"),
        (["--preset", "huge"], "invalid choice: 'huge'"),
        (["--limit", "0"], "--limit is 0, expected a positive number"),
        (["--sede", "1"], "unknown argument --sede, did you mean --seed?"),
        (["--out", "TAKEN"], "not empty; give another --out"),
        (["--out", "BEGUN"], "was begun with other settings: seed 8, now 0"),
        (["--out", "STAGE"], "was begun with other settings"),
        (["--out", "FILE"], "cannot write"),
    ),
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_bad_input_starts_nothing(tmp_path, flags, expected):
    """Exit code 2 and a line that says what to give; nothing runs and nothing is touched."""
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "thesis.txt").touch()
    for name, config in (("begun", {"preset": "tiny", "seed": 8}), ("stage", {"stage": "1"})):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config_run.json").write_text(json.dumps(config))
    (tmp_path / "file").touch()
    before = sorted(tmp_path.rglob("*"))
    words = [str(tmp_path / word.lower()) if word.isupper() else word for word in flags]
    done = launch(REPOSITORY / "ladder.py", *words)
    assert done.returncode == 2 and expected in done.stderr.splitlines()[-1]
    assert len(done.stderr.splitlines()) == 1 and "$ " not in done.stdout
    assert sorted(tmp_path.rglob("*")) == before


# ---------------------------------------------------------------------------------- the whole


@pytest.mark.slow
def test_smoke_climbs_everything(tmp_path):
    """Rooms, stages, evaluations, results and report; a second call finds all of it done."""
    out = tmp_path / "smoke"
    done = launch(REPOSITORY / "ladder.py", "--smoke", "--out", out)
    assert done.returncode == 0, done.stderr[-2000:]
    results = json.loads((out / "results.json").read_text())
    assert [rung["name"] for rung in results["rungs"]] == [rung.name for rung in RUNGS]
    for rung in results["rungs"]:
        folder = out / "eval" / rung["name"]
        assert rung["scores"] == json.loads((folder / "scores.json").read_text())
        assert rung["seconds"] > 0 and (folder / "predictions.jsonl").is_file()
    for rung in RUNGS[1:]:
        assert (out / rung.name / "config.json").is_file()
        log = (out / rung.name / "log.jsonl").read_text()
        assert len(log.splitlines()) == SMOKE[rung.stage]
    page = (out / "report.html").read_text(encoding="utf-8")
    assert "<svg" in page and "GRPO" in page and "data:image" in page
    printed = [line for line in done.stdout.splitlines() if line.startswith("$ ")]
    assert len(printed) == 1 + 4 + 5 + 1 + 1  # rooms, stages, evaluations, training rows, report
    assert done.stdout.splitlines()[-1].startswith("mean")

    weights = {}
    for rung in RUNGS[1:]:
        path = out / rung.name / "model.safetensors"
        weights[path] = path.read_bytes()
    again = launch(REPOSITORY / "ladder.py", "--smoke", "--out", out)
    assert again.returncode == 0, again.stderr[-2000:]
    assert again.stdout.count("finished already") == 4
    now = json.loads((out / "results.json").read_text())
    for rung in (*now["rungs"], *results["rungs"]):
        # To find all answers done may take longer on a busy machine than to make these few.
        del rung["seconds"], rung["scores"]["seconds"]
    assert now["rungs"] == results["rungs"]
    assert all(path.read_bytes() == before for path, before in weights.items())
