"""The folder base/: it can do what it was taught, and the command that made it teaches it."""

import math

import numpy as np
import pytest
from test_reckon import read_facts

import eval as evaluation
import train_sft
from files import read_jsonl, write_jsonl
from ladder import BASE
from rooms import scenes, tiny
from rooms.talk import TOLD, WITH_OPTIONS, make_row, tell_and_ask
from tests.conftest import REPOSITORY

LEAST = {  # shares of told rows that base/ answers word for word
    "apart": 0.9,
    "compare": 0.9,
    "floor": 0.9,
    "longest": 0.9,
    "nearest": 0.8,
    "order": 0.9,
    "say": 0.9,
    "total": 0.4,
    "turn": 0.8,
}
LEAST_WITH_OPTIONS = {"compare": 0.9, "nearest": 0.6, "order": 0.65, "turn": 0.9}
LEAST_SEEN = {1: 0.85, 4: 0.85, 8: 0.4}  # pictures: share of true places


def answers_of_base(call, folder, rows, *flags):
    """What base/ says to rows of chat messages, in their order."""
    write_jsonl(folder / "rows.jsonl", rows)
    flags += ("--prompt-style", "direct", "--max-completion-length", "96", "--threads", "1")
    data = ("--bench", folder / "rows.jsonl", "--out", folder / "eval")
    call(evaluation, "--model", REPOSITORY / BASE, *data, *flags)
    return [row["completion"] for _, row in read_jsonl(folder / "eval" / "predictions.jsonl")]


@pytest.mark.slow
@pytest.mark.parametrize("bounds, with_options", ((LEAST, False), (LEAST_WITH_OPTIONS, True)))
def test_base_answers_what_it_is_told(bounds, with_options, call, tmp_path):
    """Rows that it has never read, word for word; docs/base.md has the shares."""
    assert bounds.keys() == (WITH_OPTIONS.keys() if with_options else TOLD.keys() - {"choose"})
    rng = np.random.default_rng(2026)
    rows = []
    for name in bounds:
        several = []
        while len(several) < 20:
            question, answer = tell_and_ask(rng, name)
            if ("Options:" in question) == with_options:
                several.append(make_row(name, question, answer, [], None))
        rows += several
    for row in rows:
        del row["level"]
    right = dict.fromkeys(bounds, 0)
    for row, said in zip(rows, answers_of_base(call, tmp_path, rows), strict=True):
        right[row["question_type"]] += said == row["messages"][1]["content"]
    for name, least in bounds.items():
        assert right[name] / 20 >= least, name


@pytest.mark.slow
def test_base_sees_where_things_are(call, tmp_path):
    """Places in rooms that it has never seen: true within half a meter, two units of the map."""
    scenes.write_rooms(tmp_path / "rooms", 24, 2026, test_scenes=0, processes=1, tasks="base")
    train = tmp_path / "rooms" / "train"
    rows = []
    for _, row in read_jsonl(train / "base_data.jsonl"):
        if row["question_type"] == "say" and len(row["messages"][0]["content"]) > 1:
            rows.append(row)
    near = {pictures: [] for pictures in LEAST_SEEN}
    said = answers_of_base(call, tmp_path, rows, "--images", train / "images")
    for row, answer in zip(rows, said, strict=True):
        *media, _ = row["messages"][0]["content"]
        pictures = 8 if media[0]["type"] == "video" else len(media)
        places = dict(read_facts(answer.removesuffix(".")))
        for name, place in read_facts(row["messages"][1]["content"].removesuffix(".")):
            found = places.get(name, ())
            near[pictures].append(len(found) == 2 and math.dist(found, place) <= 2)
    for pictures, least in LEAST_SEEN.items():
        assert len(near[pictures]) > 30
        assert sum(near[pictures]) / len(near[pictures]) >= least, pictures


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
