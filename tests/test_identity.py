"""What a run is made of, who works in its folder, which states are left, and disks that are full.

A path says nothing of what is in the file. Each test changes the contents under the same path, or
moves the same contents elsewhere, and looks at the numbers that come out.
"""

import json
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import kill_resume
import pytest
import torch
from conftest import launch, varied_reward
from PIL import Image, ImageOps
from test_runtime import (
    FLAGS,
    GROUNDING,
    SCRIPTS,
    SPATIAL,
    after_end_of_step,
    assert_equal_runs,
    interrupt,
    read_rows,
    sft_flags,
    states,
    steps_of,
)

import coldstart
import eval as evaluation
import files
import grpo
import ladder
import rewards
import train_sft
from checkpoint import load_model, save_model
from data import read_all
from files import CONFIG, OF_PICTURE, OF_WEIGHTS, UserError, fingerprint, hold, made_of, read_json
from look import probes, report
from runtime import Run

REPOSITORY = Path(files.__file__).parent


def spoil(model, seed=1):
    """Train a model anew, as it were: other weights under the same name."""
    tensors = load_model(model, torch.float32)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in tensors.parameters():
            parameter.add_(0.01 * torch.randn(parameter.shape, generator=generator))
    save_model(model, tensors.named_parameters(), tensors.config)


def swap(path):
    """Exchange the first two rows of a file: its size, names and times may well be the same."""
    first, second, *others = path.read_bytes().splitlines(True)
    path.write_bytes(b"".join([second, first, *others]))


def invert(*paths):
    """Other pictures under the same names."""
    for path in paths:
        ImageOps.invert(Image.open(path).convert("RGB")).save(path)


# ---------------------------------------------------------------------------------- fingerprints


def test_every_byte_of_rows_counts(tmp_path):
    """The order of two rows in the middle of a long file too; the file's name does not."""
    path, twin = tmp_path / "rows.jsonl", tmp_path / "twin.jsonl"
    lines = [f'{{"question_id": {i:07}}}\n'.encode() for i in range(10**6)]
    path.write_bytes(b"".join(lines))
    lines[543210], lines[543211] = lines[543211], lines[543210]
    twin.write_bytes(b"".join(lines))
    assert path.stat().st_size == twin.stat().st_size > OF_WEIGHTS
    assert fingerprint([path]) != fingerprint([twin])
    shutil.copy(path, twin)
    assert fingerprint([path]) == fingerprint([twin])
    assert fingerprint([path, twin]) != fingerprint([path])
    assert re.fullmatch("[0-9a-f]{16}", fingerprint([path]))


@pytest.mark.parametrize("most, share", ((OF_PICTURE, 3), (OF_WEIGHTS, 190)))
def test_a_large_file_is_known_by_its_size_its_ends_and_bytes_between(tmp_path, most, share):
    """A change of a share of the file is seen wherever it lies; little is read."""
    size = 4 * most + 12345
    path = tmp_path / "weights"
    whole = random.Random(0).randbytes(size)
    path.write_bytes(whole)
    first = fingerprint([path], most)
    with open(path, "rb") as file:
        assert sum(map(len, files.pieces(file, most))) <= most + 20
    width = size // share
    for begin in (0, 1, most // 4, size // 2, size - width):
        path.write_bytes(whole[:begin] + bytes(width) + whole[begin + width :])
        assert fingerprint([path], most) != first, begin
    path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    assert fingerprint([path], most) != first
    path.write_bytes(whole + b"\0")
    assert fingerprint([path], most) != first
    assert fingerprint([whole], most) == first  # bytes that are no file


def test_what_cannot_be_read_has_a_fingerprint_too(tmp_path):
    """Its error comes from whoever needs it, with the row's place."""
    assert fingerprint([tmp_path / "a"]) != fingerprint([tmp_path / "b"])
    assert fingerprint(["a\0b"]) != fingerprint([tmp_path])


def test_a_model_is_its_weights_its_settings_and_its_tokenizer(tiny_model, tmp_path):
    """Not its name, nor what else lies in the folder."""
    model = shutil.copytree(tiny_model, tmp_path / "model")
    first = made_of(tiny_model, {})
    (model / "log.jsonl").write_text("{}")
    (model / "README.md").write_text("x")
    shutil.copytree(model, model / "resume")
    assert made_of(model, {}) == first
    seen = {first["model"]}
    for name in ("config.json", "generation_config.json", "preprocessor_config.json"):
        values = read_json(model / name)
        (model / name).write_text(json.dumps(values | {"eos_token_id": 3}))
        seen.add(made_of(model, {})["model"])
    with open(model / "tokenizer.json", "a") as file:
        file.write(" ")
    seen.add(made_of(model, {})["model"])
    spoil(model)
    seen.add(made_of(model, {})["model"])
    assert len(seen) == 6


# ---------------------------------------------------------------------------------- trainings


@pytest.fixture
def parts(rooms, tiny_model, tmp_path):
    """A folder with all that a training is made of, to be changed or moved."""
    folder = tmp_path / "parts"
    shutil.copytree(rooms / "train", folder / "train")
    shutil.copytree(rooms / "test", folder / "val")
    shutil.copytree(tiny_model, folder / "model")
    (folder / "prompts.json").write_text('{"system": "Be brief."}')
    return folder


def made_with(parts, script, *more):
    """Flags of a training that uses every kind of input."""
    flags = {
        train_sft: (
            *("--stage", 1, "--data", parts / "train" / GROUNDING, "--batch-size", 4),
            *("--replay", parts / "val" / SPATIAL, "--replay-ratio", 0.25),
        ),
        grpo: (
            *("--data", parts / "train" / SPATIAL, "--prompts-per-step", 2),
            *("--num-generations", 2, "--max-completion-length", 6),
            *("--eval-every", 2, "--eval-data", parts / "val" / SPATIAL, "--eval-limit", 2),
        ),
    }
    same = ("--model", parts / "model", "--prompts", parts / "prompts.json", "--max-steps", 4)
    return (*flags[script], *same, "--out", parts / "out", *more)


def retrain(parts):
    spoil(parts / "model")


def mend_rows(parts):
    swap(parts / "train" / GROUNDING)
    swap(parts / "train" / SPATIAL)


def mend_other_rows(parts):
    swap(parts / "val" / SPATIAL)


def edit_prompts(parts):
    (parts / "prompts.json").write_text('{"system": "Be exact."}')


def draw_anew(parts):
    invert(*(parts / "train" / "images").rglob("*.jpg"))


@pytest.mark.slow
@SCRIPTS
def test_a_run_goes_on_with_what_it_was_begun_with(call, monkeypatch, parts, script):
    """Other contents under the same path: one line that names them, and nothing is touched."""
    whole = parts.with_name("whole")
    shutil.copytree(parts, whole)
    monkeypatch.setitem(rewards.REWARDS, "accuracy", varied_reward)
    interrupt(monkeypatch, call, script, made_with(parts, script), at=2)
    begun = {path: path.read_bytes() for path in (parts / "out").rglob("*") if path.is_file()}
    other = "eval_data" if script is grpo else "replay"
    for change, name in (
        (retrain, f"model {parts / 'model'};"),
        (mend_rows, f"data ['{parts / 'train'}"),
        (mend_other_rows, f"{other} ['{parts / 'val'}"),
        (edit_prompts, f"prompts {parts / 'prompts.json'};"),
        (draw_anew, "images;"),
    ):
        shutil.copytree(parts, parts.with_name("kept"))
        change(parts)
        with monkeypatch.context() as patch, pytest.raises(UserError) as error:
            patch.setattr(script, "load_sharded", lambda *_: pytest.fail("loads the model"))
            call(script, *made_with(parts, script, "--resume", "auto"))
        expected = f"{parts / 'out'}: was begun with other settings: other contents of {name}"
        assert str(error.value).startswith(expected), name
        assert str(error.value).endswith("; give another --out")
        assert "\n" not in str(error.value)
        shutil.rmtree(parts)
        parts.with_name("kept").rename(parts)
    after = {path: path.read_bytes() for path in (parts / "out").rglob("*") if path.is_file()}
    assert after == begun

    # The same contents in another place are the same: all of it moved, --out spelled otherwise.
    moved = parts.rename(parts.with_name("moved"))
    monkeypatch.chdir(moved)
    call(script, *made_with(moved, script, "--resume", "auto", "--out", "./out/../out"))
    call(script, *made_with(whole, script))
    for folder in (moved, whole):  # rollouts name rows by their place
        (folder / "out" / "rollouts.jsonl").unlink(missing_ok=True)
    assert_equal_runs(moved / "out", whole / "out")


def test_less_memory_is_no_other_run(call, monkeypatch, parts):
    """What a run that ran out of memory is told to change may change."""
    interrupt(monkeypatch, call, train_sft, made_with(parts, train_sft), at=2)
    more = ("--activation-checkpointing", "--micro-batch", 1, "--workers", 1)
    call(train_sft, *made_with(parts, train_sft, "--resume", "auto", *more))
    assert steps_of(parts / "out") == [1, 2, 3, 4]


def test_a_finished_run_is_told_that_its_model_changed(call, parts):
    """`finished already` would hide that a ladder's rung was made from another one."""
    call(train_sft, *made_with(parts, train_sft))
    retrain(parts)
    with pytest.raises(UserError, match="other contents of model"):
        call(train_sft, *made_with(parts, train_sft, "--resume", "auto"))


def test_a_state_of_another_run_says_what_differs(call, monkeypatch, parts, capsys):
    """It is taken, as that was asked for: the KL is then to another model, which is said."""
    interrupt(monkeypatch, call, train_sft, made_with(parts, train_sft), at=2)
    state, other = parts / "out" / "resume" / "step-000002", parts / "other"
    retrain(parts)
    call(train_sft, *made_with(parts, train_sft, "--resume", state, "--out", other))
    said = f"{state}: of a run with other settings: other contents of model {parts / 'model'}\n"
    assert said in capsys.readouterr().out
    assert steps_of(other) == [3, 4]


# ---------------------------------------------------------------------------------- evaluations


@pytest.fixture(scope="module")
def loud(tiny_model, tmp_path_factory):
    """A model whose answers differ from row to row: its layers outweigh its embeddings."""
    model, folder = load_model(tiny_model), tmp_path_factory.mktemp("models") / "loud"
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.mul_(30 if name.endswith(("o_proj.weight", "down_proj.weight")) else 1)
    save_model(folder, model.named_parameters(), model.config, tiny_model)
    return folder


class Evaluation:
    """Rows of a file of one's own, evaluated in a folder."""

    def __init__(self, call, monkeypatch, model, folder, rows):
        self.call, self.monkeypatch, self.model = call, monkeypatch, model
        self.folder, self.file = folder, folder / "mine.jsonl"
        self.write(rows)

    def write(self, rows):
        self.file.write_text("".join(json.dumps(row) + "\n" for row in rows))

    def run(self, out, *more):
        """Returns: the rows of predictions.jsonl, and how many were answered for it."""
        answered = []
        answer_rows = evaluation.answer_rows

        def counted(model, processor, samples, rows, **others):
            answered.extend(rows)
            return answer_rows(model, processor, samples, rows, **others)

        with self.monkeypatch.context() as patch:
            patch.setattr(evaluation, "answer_rows", counted)
            self.call(
                evaluation,
                *("--model", self.model, "--bench", self.file, "--batch-size", 1),
                *("--images", self.folder / "images", "--prompt-style", "direct"),
                *("--max-completion-length", 6, "--out", self.folder / out, *more),
            )
        return read_rows(self.folder / out / "predictions.jsonl"), len(answered)


@pytest.fixture
def mine(call, monkeypatch, loud, rooms, tmp_path):
    """Six rows, one of them about boxes."""
    shutil.copytree(rooms / "train" / "images", tmp_path / "images")
    rows = read_rows(rooms / "train" / SPATIAL)[:5] + read_rows(rooms / "train" / GROUNDING)[:1]
    run = Evaluation(call, monkeypatch, shutil.copytree(loud, tmp_path / "loud"), tmp_path, rows)
    first, answered = run.run("out")
    assert answered == 6 and len({row["completion"] for row in first}) > 3
    run.rows = rows
    return run


def reversed_rows(rows):
    return rows[::-1], 0


def mended_question(rows):
    return [rows[0] | {"question": "How many, really?"}, *rows[1:]], 1


def mended_answer(rows):
    (box,) = rows[5]["answer"][:1]
    return [*rows[:5], rows[5] | {"answer": [box | {"label": "sofa"}]}], 1


def other_options(rows):
    place = next(i for i, row in enumerate(rows) if row.get("options"))
    other = rows[place] | {"options": [option + "!" for option in rows[place]["options"]]}
    return [*rows[:place], other, *rows[place + 1 :]], 1


def more_rows(rows):
    return [rows[2] | {"question": "Which?", "question_id": "new"}, *rows], 1


def fewer_rows(rows):
    return rows[1:], 0


def a_row_twice(rows):
    return [*rows, rows[0]], 1


def other_names(rows):
    return [row | {"question_id": f"x{i}"} for i, row in enumerate(rows)], 0


@pytest.mark.parametrize(
    "mend",
    (
        *(reversed_rows, mended_question, mended_answer, other_options, more_rows),
        *(fewer_rows, a_row_twice, other_names),
    ),
)
def test_an_answer_belongs_to_what_was_asked(mine, mend, capsys):
    """The file was mended: the same predictions as of a new evaluation; only what is new is asked.

    They name the rows as they stand now.
    """
    rows, new = mend(mine.rows)
    mine.write(rows)
    capsys.readouterr()
    predictions, answered = mine.run("out")
    assert f"out: has {len(rows) - new} of {len(rows)} answers\n" in capsys.readouterr().out
    assert answered == new
    fresh, answered = mine.run("fresh")
    assert answered == len(rows)
    assert predictions == fresh
    assert [row["where"] for row in predictions] == [
        f"{mine.file}:{line}" for line in range(1, len(rows) + 1)
    ]
    scores = [read_json(mine.folder / name / "scores.json") for name in ("out", "fresh")]
    assert scores[0]["overall"] == scores[1]["overall"]


def test_a_picture_is_part_of_the_question(mine):
    """One was drawn anew under its old name: the rows about it are asked again."""
    name = mine.rows[0]["image"][0]
    invert(mine.folder / "images" / name)
    about = sum(name in row["image"] for row in mine.rows)
    predictions, answered = mine.run("out")
    assert answered == about
    assert predictions == mine.run("fresh")[0]


def test_an_evaluation_may_move(mine):
    """Model, rows, pictures and output elsewhere, other batches: nothing is asked again."""
    (mine.folder / "elsewhere").mkdir()
    for name in ("images", "mine.jsonl", "out", "loud"):
        (mine.folder / name).rename(mine.folder / "elsewhere" / name)
    mine.folder = mine.folder / "elsewhere"
    mine.file, mine.model = mine.folder / "mine.jsonl", mine.folder / "loud"
    predictions, answered = mine.run("out", "--batch-size", 4)
    assert answered == 0
    assert all(row["where"].startswith(str(mine.file)) for row in predictions)
    assert all(path.startswith(str(mine.folder)) for row in predictions for path in row["images"])


def test_other_questions_are_another_evaluation(mine, rooms):
    """Not one answer would be used: the folder holds something else, which stays."""
    before = (mine.folder / "out" / "predictions.jsonl").read_bytes()
    mine.write(read_rows(rooms / "train" / SPATIAL)[5:9])
    with pytest.raises(UserError, match="out: its answers are to other questions; give another"):
        mine.run("out")
    assert (mine.folder / "out" / "predictions.jsonl").read_bytes() == before


def test_an_evaluation_knows_its_model_and_its_prompts(mine):
    prompts = mine.folder / "prompts.json"
    prompts.write_text('{"system": "Be brief."}')
    with pytest.raises(UserError, match="other contents of prompts"):
        mine.run("out", "--prompts", prompts)
    mine.run("brief", "--prompts", prompts)
    prompts.write_text('{"system": "Be exact."}')
    with pytest.raises(UserError, match=f"other contents of prompts {prompts}; give another"):
        mine.run("brief", "--prompts", prompts)
    generation = read_json(mine.model / "generation_config.json")
    generation["eos_token_id"] = [5]
    (mine.model / "generation_config.json").write_text(json.dumps(generation))
    with pytest.raises(UserError, match=f"other contents of model {mine.model}; give another"):
        mine.run("out")


def test_rows_of_chats_and_of_bytes_have_names(rooms, tmp_path):
    """Who says what, and a picture that comes as bytes, are part of the question."""
    turns = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}]
    other = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "He"}]
    rows = [turns, turns, other, [*turns, *turns]]
    path = tmp_path / "chat.jsonl"
    path.write_text("".join(json.dumps({"messages": row}) + "\n" for row in rows))
    names = evaluation.asked(read_all([path], None))
    assert len(set(names)) == 4
    assert names[0].removesuffix("-1") == names[1].removesuffix("-2")


# ---------------------------------------------------------------------------------- cold starts


@pytest.fixture
def sample(call, monkeypatch, parts):
    """Sample chains into parts/cold.jsonl."""
    monkeypatch.setitem(rewards.REWARDS, "format", lambda texts, sample: [1.0] * len(texts))
    monkeypatch.setitem(rewards.REWARDS, "accuracy", varied_reward)
    asked = []
    sample_chains = coldstart.sample_chains

    def counted(model, processor, samples, rows, **others):
        asked.extend(samples[row].question for row in rows)
        return sample_chains(model, processor, samples, rows, **others)

    monkeypatch.setattr(coldstart, "sample_chains", counted)
    few = parts / "few.jsonl"
    few.write_text("".join((parts / "train" / SPATIAL).read_text().splitlines(True)[:8]))

    def run(*more):
        asked.clear()
        call(
            coldstart,
            *("--model", parts / "model", "--data", few, "--images", parts / "train" / "images"),
            *("--num-generations", 4, "--max-completion-length", 8, "--batch-size", 1),
            *("--min-accuracy", 0.5),
            *("--out", parts / "cold.jsonl", *more),
        )
        return read_rows(parts / "cold.jsonl"), list(asked)

    run.few = few
    return run


def test_chains_are_of_the_teacher_they_were_begun_with(sample, parts):
    sample()
    retrain(parts)
    with pytest.raises(UserError, match=f"other contents of model {parts / 'model'}; give another"):
        sample()


def test_chains_belong_to_their_questions(sample, parts):
    """Rows in another order: the same chains for the same questions, none is sampled again."""
    chains, asked = sample()
    assert len(asked) == 8
    sample.few.write_text("".join(reversed(sample.few.read_text().splitlines(True))))
    mended, asked = sample()
    assert asked == []
    questions = [(row["question"], tuple(row["image"])) for row in chains]
    assert len(questions) > 3
    stored = [
        answer["completions"] for answer in read_rows(parts / "cold.samples/answers-rank0.jsonl")
    ]
    for row in mended:
        assert any(row["solution"] in [text.strip() for text in texts] for texts in stored)
    by_question = {(row["question"], tuple(row["image"])): row["solution"] for row in chains}
    same = [
        by_question.get((row["question"], tuple(row["image"]))) == row["solution"] for row in mended
    ]
    assert all(same)


def test_a_question_twice_is_sampled_twice(sample, parts):
    """Copies of one answer are no samples."""
    line = sample.few.read_text().splitlines(True)[0]
    sample.few.write_text(line * 2)
    _, asked = sample("--per-question", 9)
    assert len(asked) == 2
    one, two = read_rows(parts / "cold.samples" / "answers-rank0.jsonl")
    assert one["completions"] != two["completions"]


# ---------------------------------------------------------------------------------- ladders


def test_a_ladder_knows_its_base_and_its_rows(call, monkeypatch, parts):
    """Both may move. Test rows may change: eval.py answers what it has not answered."""
    monkeypatch.setattr(ladder, "climb", lambda *_: None)
    monkeypatch.setattr(ladder, "run", lambda *_: None)

    def climb(parts, *more):
        flags = ("--model", parts / "model", "--data", parts / "train", "--test", parts / "val")
        call(ladder, *flags, "--out", parts / "run", *more)

    climb(parts)
    swap(parts / "val" / SPATIAL)
    climb(parts)
    moved = parts.rename(parts.with_name("moved"))
    climb(moved)
    for change, name in ((retrain, "model"), (mend_rows, "data")):
        change(moved)
        with pytest.raises(UserError, match=f"run: was begun .* other contents of {name} .*; give"):
            climb(moved)
        (moved / "run" / CONFIG).unlink()
        climb(moved)


# ---------------------------------------------------------------------------------- one at a time


@contextmanager
def held(folder):
    """Another process holds the folder, and ends with kill -9."""
    folder.mkdir(parents=True, exist_ok=True)
    code = f"import files, time; files.hold({str(folder)!r}); print('held', flush=True)"
    code += "; time.sleep(99)"
    process = subprocess.Popen(
        [sys.executable, "-c", code], cwd=REPOSITORY, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "held\n"
    yield
    process.kill()
    process.wait()


def test_a_lock_ends_with_its_process(tmp_path):
    """Even by kill -9, and although a process that it forked lives on."""
    with held(tmp_path):
        for _ in range(2):
            with pytest.raises(UserError) as error:
                hold(tmp_path)
            expected = "another process is at work there; wait for its end, or give another --out"
            assert str(error.value) == f"{tmp_path}: {expected}"
    hold(tmp_path)
    hold(tmp_path)  # one process may take it twice

    code = (
        "import files, os, time; files.hold('.'); child = os.fork(); "
        "print(child, flush=True) if child else None; time.sleep(99)"
    )
    (tmp_path / "forked").mkdir()
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    words = [sys.executable, "-c", code]
    where = {"cwd": tmp_path / "forked", "env": environment}
    process = subprocess.Popen(words, stdout=subprocess.PIPE, text=True, **where)
    child = int(process.stdout.readline())
    process.kill()
    process.wait()
    os.kill(child, 0)  # it is there
    hold(tmp_path / "forked")
    os.kill(child, signal.SIGKILL)


def test_every_script_keeps_out_of_a_folder_that_is_in_use(call, monkeypatch, parts):
    """One line before the model is loaded, and nothing is written."""
    evaluate = ("--model", parts / "model", "--bench", "rooms", "--data", parts / "val")
    sample = ("--model", parts / "model", "--data", parts / "train" / SPATIAL)
    probe = ("entropy", "--model", parts / "model", "--data", parts / "val")
    climb = ("--model", parts / "model", "--data", parts / "train")
    monkeypatch.setattr(ladder, "climb", lambda *_: pytest.fail("climbs"))
    for script in (train_sft, grpo):
        monkeypatch.setattr(script, "load_sharded", lambda *_: pytest.fail("loads"))
    for script in (evaluation, coldstart, probes):
        monkeypatch.setattr(script, "load_model", lambda *_: pytest.fail("loads"))
    for script, flags, out, folder in (
        (train_sft, made_with(parts, train_sft), "out", "out"),
        (train_sft, made_with(parts, train_sft, "--resume", "auto"), "out", "out"),
        (grpo, made_with(parts, grpo, "--resume", "auto"), "out", "out"),
        (evaluation, evaluate, "scores", "scores"),
        (coldstart, sample, "cold.jsonl", "cold.samples"),
        (probes, probe, "probes", "probes/entropy"),
        (ladder, climb, "run", "run"),
    ):
        with held(parts / folder):
            before = sorted(parts.rglob("*"))
            with pytest.raises(UserError, match="another process is at work there"):
                call(script, *flags, "--out", parts / out)
            assert sorted(parts.rglob("*")) == before


@pytest.mark.slow
def test_two_starts_in_one_folder_are_one_run(rooms, tiny_model, tmp_path):
    """Five tries; tests/kill_resume.py --race 20 is the long version."""
    said = kill_resume.race(tmp_path, rooms / "train", tiny_model, tries=5)
    assert said.startswith("5 races")


# ---------------------------------------------------------------------------------- states


@pytest.mark.slow
def test_a_run_that_was_taken_back_goes_on_from_there(
    call, monkeypatch, rooms, tiny_model, tmp_path
):
    """Back to step 1, stopped at step 2: `auto` takes that, not step 3 of the way that was left."""
    whole, out = tmp_path / "whole", tmp_path / "out"
    call(train_sft, *sft_flags(rooms, tiny_model, whole))
    flags = sft_flags(rooms, tiny_model, out, "--save-every", 1, "--keep-last", 9)
    interrupt(monkeypatch, call, train_sft, flags, at=3)
    assert states(out) == ["step-000001", "step-000002", "step-000003"]
    back = ("--resume", out / "resume" / "step-000001")
    interrupt(monkeypatch, call, train_sft, (*flags, *back), at=2)
    assert states(out) == ["step-000001", "step-000002"]
    assert steps_of(out) == [1, 2]
    call(train_sft, *flags, "--resume", "auto")
    assert_equal_runs(out, whole)


def test_a_state_from_elsewhere_is_found_again(
    call, monkeypatch, rooms, tiny_model, tmp_path, capsys
):
    """Killed before its first own state: `auto` goes on from the state that was given."""
    first, out = tmp_path / "first", tmp_path / "out"
    interrupt(monkeypatch, call, train_sft, sft_flags(rooms, tiny_model, first), at=2)
    flags = sft_flags(rooms, tiny_model, out)

    def fail(step):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        after_end_of_step(patch, fail)
        call(train_sft, *flags, "--resume", first / "resume" / "step-000002")
    call(train_sft, *flags, "--resume", "auto")
    assert f"resumed {out / 'resume' / 'step-000002'}" in capsys.readouterr().out
    assert steps_of(out) == [3, 4]


@pytest.mark.slow
@pytest.mark.parametrize("removed", (0, 1, 2))
def test_a_kill_while_states_are_left_leaves_one_way(
    call, monkeypatch, rooms, tiny_model, tmp_path, removed
):
    """Whatever is removed when it is killed, `auto` goes on and the log has every step once."""
    whole, out = tmp_path / "whole", tmp_path / "out"
    call(train_sft, *sft_flags(rooms, tiny_model, whole))
    flags = sft_flags(rooms, tiny_model, out, "--save-every", 1, "--keep-last", 9)
    interrupt(monkeypatch, call, train_sft, flags, at=3)
    rmtree, gone = shutil.rmtree, []

    def killed(path, **options):
        if len(gone) == removed:
            raise KeyboardInterrupt
        gone.append(path)
        rmtree(path, **options)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(shutil, "rmtree", killed)
        patch.setattr(Run, "cut_log", lambda *_: killed(None))
        call(train_sft, *flags, "--resume", out / "resume" / "step-000001")
    assert [path.name for path in gone] == ["step-000003", "step-000002"][:removed]
    call(train_sft, *flags, "--resume", "auto")
    assert_equal_runs(out, whole)


# ---------------------------------------------------------------------------------- full disks


@contextmanager
def room_for(size):
    """No file can grow beyond so many bytes: a write ends as on a full disk, in the middle."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def fails_at(name, function, *arguments):
    """The call ends with one line that begins with the file."""
    with pytest.raises(UserError) as error:
        function(*arguments)
    line = str(error.value)
    assert line.startswith(f"{name}: cannot write"), line
    assert "\n" not in line


@pytest.mark.parametrize("size", (10, 1200, 2000))
def test_a_full_disk_while_evaluating(mine, size):
    """Torn at any place: the same command goes on with what was written."""
    shutil.copytree(mine.folder / "out", mine.folder / "fresh")
    for path in (mine.folder / "fresh").glob("*.json*"):
        if path.name != CONFIG:
            path.unlink()
    with room_for(size):
        name = "answers-rank0.jsonl" if size > 1000 else CONFIG
        fails_at(mine.folder / "fresh" / name, mine.run, "fresh")
    predictions, answered = mine.run("fresh")
    assert (answered < 6) == (size > 1000)
    assert predictions == read_rows(mine.folder / "out" / "predictions.jsonl")


@pytest.mark.parametrize("name", ("predictions.jsonl", "scores.json"))
def test_a_full_disk_while_scoring(mine, name):
    """All is answered; the result cannot be written."""
    out = mine.folder / "out"
    before = (out / "predictions.jsonl").read_bytes()
    (out / f"{name}.tmp").symlink_to("/dev/full")
    fails_at(out / name, mine.run, "out")
    (out / f"{name}.tmp").unlink()
    assert mine.run("out")[1] == 0
    assert (out / "predictions.jsonl").read_bytes() == before


def test_a_full_disk_while_sampling_chains(sample, parts):
    whole, _ = sample()
    answers = parts / "cold.samples" / "answers-rank0.jsonl"
    for path in (answers, parts / "cold.jsonl", parts / "cold.samples" / "report.json"):
        path.unlink()
    with room_for(700):
        fails_at(answers, sample)
    assert answers.stat().st_size == 700
    again, asked = sample()
    assert again == whole and 0 < len(asked) < 8
    for path in (parts / "cold.jsonl", parts / "cold.samples" / "report.json"):
        Path(f"{path}.tmp").symlink_to("/dev/full")
        fails_at(path, sample)
        Path(f"{path}.tmp").unlink()
    assert sample() == (whole, [])


@pytest.mark.slow
@SCRIPTS
@pytest.mark.parametrize("name", ("log.jsonl", "rollouts.jsonl"))
def test_a_full_disk_while_logging(call, monkeypatch, rooms, tiny_model, tmp_path, script, name):
    """The step is not saved without its row. With room again the run ends as one that had it."""
    if script is train_sft and name == "rollouts.jsonl":
        return
    whole, out = tmp_path / "whole", tmp_path / "out"
    monkeypatch.setitem(rewards.REWARDS, "accuracy", varied_reward)
    call(script, *FLAGS[script](rooms, tiny_model, whole))
    flags = FLAGS[script](rooms, tiny_model, out, "--save-every", 2, "--resume", "auto")
    append, full = files.append_jsonl, []

    def full_disk(path, rows):
        if path.name == name and rows[0]["step"] == 3:
            full.append(path)
            with open(path, "a") as file:
                file.write('{"step": 3, "lo')
            path = Path("/dev/full")
        try:
            append(path, rows)
        except UserError as error:
            raise UserError(str(error).replace("/dev/full", str(full[-1]))) from None

    with monkeypatch.context() as patch:
        patch.setattr("runtime.append_jsonl", full_disk)
        fails_at(out / name, call, script, *flags)
    assert states(out) == ["step-000002"]
    call(script, *flags)
    assert_equal_runs(out, whole)
    if script is grpo:
        assert read_rows(out / "rollouts.jsonl") == read_rows(whole / "rollouts.jsonl")


@pytest.mark.slow
def test_all_ranks_end_with_the_line_of_a_full_disk(rooms, tiny_model, tmp_path):
    """No rank waits for one that has ended, and none shows a traceback."""
    driver = tmp_path / "driver.py"
    driver.write_text(
        "import sys\n"
        f"sys.path.insert(0, {str(REPOSITORY)!r})\n"
        "import runtime, train_sft\n"
        "append = runtime.append_jsonl\n"
        "runtime.append_jsonl = lambda path, rows: append('/dev/full', rows)\n"
        "runtime.main_guard(train_sft.main)\n"
    )
    done = launch(driver, *sft_flags(rooms, tiny_model, tmp_path / "out"), processes=2)
    assert done.returncode != 0
    said, _, _ = done.stderr.partition("torch/distributed/elastic/")  # its own report
    assert re.search(r"driver.py: rank [01]: /dev/full: cannot write there \(OSError: ", said)
    assert "Traceback" not in said


def test_a_full_disk_while_reporting_and_probing(call, parts, tmp_path):
    """The report, a probe's numbers, its chart and its pictures."""
    page = parts / "report.html"
    Path(f"{page}.tmp").symlink_to("/dev/full")
    fails_at(page, call, report, parts)
    Path(f"{page}.tmp").unlink()
    call(report, parts)
    assert page.is_file()

    flags = ("hints", "--model", parts / "model", "--data", parts / "train", "--limit", 1)
    flags += ("--max-completion-length", 4, "--device", "cpu", "--out", tmp_path / "probes")
    picture = tmp_path / "probes" / "hints" / "full.png"
    picture.parent.mkdir(parents=True)
    picture.symlink_to("/dev/full")
    fails_at(picture, call, probes, *flags)
    picture.unlink()
    for name in ("hints.json", "hints.svg"):
        (tmp_path / "probes" / f"{name}.tmp").symlink_to("/dev/full")
        fails_at(tmp_path / "probes" / name, call, probes, *flags)
        (tmp_path / "probes" / f"{name}.tmp").unlink()
    call(probes, *flags)
    assert read_json(tmp_path / "probes" / "hints.json")["rows"]
