"""The folder base/: it can do what it was taught, and the command that made it teaches it."""

import numpy as np
import pytest

import eval as evaluation
import train_sft
from files import read_jsonl, write_jsonl
from ladder import BASE
from rooms import scenes, tiny
from rooms.talk import TOLD, make_row, tell_and_ask
from tests.conftest import REPOSITORY

TASKS = sorted(TOLD.keys() - {"choose"})
LEAST = {  # shares of told rows that base/ answers word for word
    "apart": 0.75,
    "compare": 0.85,
    "floor": 0.8,
    "longest": 0.6,
    "nearest": 0.6,
    "order": 0.7,
    "say": 0.9,
    "total": 0.0,  # it cannot count things of one name
    "turn": 0.7,
}


@pytest.mark.slow
def test_base_answers_what_it_is_told(call, tmp_path):
    """Rows that it has never read, word for word; docs/miniature.md has the shares."""
    rng = np.random.default_rng(2026)
    rows = []
    for name in TASKS:
        for _ in range(20):
            row = make_row(name, *tell_and_ask(rng, name), [], None)
            del row["level"]
            rows.append(row)
    write_jsonl(tmp_path / "told.jsonl", rows)
    flags = ("--prompt-style", "direct", "--max-completion-length", "96", "--threads", "1")
    data = ("--bench", tmp_path / "told.jsonl", "--out", tmp_path / "eval")
    call(evaluation, "--model", REPOSITORY / BASE, *data, *flags)
    right = dict.fromkeys(TASKS, 0)
    for row, (_, answer) in zip(rows, read_jsonl(tmp_path / "eval" / "predictions.jsonl")):
        said = answer["completion"].strip()
        right[row["question_type"]] += said == row["messages"][1]["content"]
    assert [*LEAST] == TASKS
    for name, least in LEAST.items():
        assert right[name] / 20 >= least, name


@pytest.mark.slow
def test_the_first_hundred_steps_of_the_base(call, tmp_path):
    """From random weights the loss of easy rows falls by half within a hundred steps."""
    rooms = tmp_path / "rooms"
    scenes.write_rooms(rooms, 60, 1, test_scenes=0, processes=1, tasks="base")
    call(tiny, "--data", rooms / "train", "--out", tmp_path / "start")
    paths = ("--model", tmp_path / "start", "--data", rooms / "train" / "base_data.jsonl")
    call(train_sft, "--stage", "base", *paths, "--out", tmp_path / "out", "--max-steps", "100")
    log = [row for _, row in read_jsonl(tmp_path / "out" / "log.jsonl")]
    losses = [row["loss"] for row in log]
    assert len(losses) == 100
    assert np.mean(losses[-10:]) < 0.5 * np.mean(losses[:10])
