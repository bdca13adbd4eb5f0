"""base_tasks.py: what is said of a room agrees with it, and never in the ladder's words."""
import json
import re

import numpy as np
import pytest

import base_tasks
import scenes
from base_tasks import BLOCK, CELL, TASKS, kinds, reach, talk
from data import read_samples
from rewards import parse_boxes
from rooms import Camera, Room, Sight, make_thing
from scenes import FILES, VIDEO, make_files, make_world


@pytest.fixture(scope="module")
def said():
    """[(world, ids, [(task, question, answer)])] of every conversation of some rooms, caught in make_files."""
    caught = []

    def keep(rng, world, ids):
        caught.append((world, ids, talk(rng, world, ids)))
        return caught[-1][-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scenes, "talk", keep)
        for index in (*range(16), *range(19, 60, 4)):  # the latter are filmed
            make_files(5, "train", index, tasks="base")
    return caught


def answers(said, *tasks):
    found = [(world, ids, question, answer) for world, ids, turns in said for task, question, answer in turns if task in tasks]
    assert len(found) > 5
    return found


def thing(world, name):
    """The only thing of a category."""
    (k,) = [k for k, thing in enumerate(world.room.things) if thing.name == name]
    return k


def worked_world():
    """A lamp 2 m ahead and 1 m to the left of a camera, a bed 3 m ahead and 0.5 m to its right, boxes made up."""
    things = [make_thing("lamp", (3, 2), 0, (0.6, 0.6, 1.3)), make_thing("bed", (4, 0.5), 0, (1, 1.6, 0.8))]
    sights = [Sight((8, 16, 24, 56), 1.0, True), Sight((60, 40, 92, 64), 1.0, True)]
    room = Room(np.array([5.0, 4.0]), things, [], np.array([[0, 1.2], [1.2, 0]]), [Camera(1, 1, 0)], None)
    return make_world(room, [sights], "", Camera(1, 1, 0))


@pytest.mark.parametrize("task, expected", (
    ("point", "The lamp is at column 4 row 9."), ("span", "The lamp fills columns 2 to 5, rows 4 to 13."),
    ("count", "I see 1 bed and 1 lamp."), ("place", "The lamp is 20 ahead and 10 left."),
    ("measure", "130 at the most: 60 by 60 by 130."),
    ("compare", "The lamp is more to the left by 15, nearer by 10 and taller by 5."),
    ("walk", "Go 15 right and 10 on, 18 in all, 12 of them free."), ("gap", "12."), ("pace", "It is 20.0 in all: 50 by 40.")))
def test_worked_example(task, expected):
    """Computed by hand from the two things of worked_world."""
    world = worked_world()
    found = {getattr(base_tasks, task)(np.random.default_rng(seed), world, None)[1] for seed in range(20)}
    assert expected in found


def test_a_picture_is_read_block_by_block():
    """An eighth of a block is enough to be named, less is nothing; of two things the larger."""
    world, ids = worked_world(), np.zeros((112, 112), np.uint8)
    ids[:BLOCK, :BLOCK] = 2
    ids[0, 0] = 1
    ids[BLOCK:BLOCK + 4, BLOCK:2 * BLOCK - 4] = 1  # 96 of 784 pixels: 2 short of an eighth
    ids[-BLOCK:, -4:] = 1
    assert base_tasks.read(None, world, [ids])[1] == ("bed nothing nothing nothing. nothing nothing nothing nothing. "
                                                     "nothing nothing nothing nothing. nothing nothing nothing lamp.")


def test_cells_hold_what_is_said(said):
    """What stands at a column and a row is what the picture's ids say there; a span's corners lie in the box's cells."""
    for world, ids, question, answer in answers(said, "look"):
        cells = re.findall(r"column (\d+) row (\d+)", question)
        names = re.findall(r"the (\w+)|(nothing)", answer)
        assert len(cells) == len(names) == 3
        for (column, row), (name, nothing) in zip(cells, names):
            k = ids[0][int(row) * CELL + CELL // 2, int(column) * CELL + CELL // 2]
            assert nothing if k == 0 else world.room.things[k - 1].name == name
    for world, ids, question, answer in answers(said, "span"):
        spans = re.findall(r"The (\w+) fills columns (\d+) to (\d+), rows (\d+) to (\d+)", answer)
        true = [(name, *(v // CELL for v in (x1, x2 - 1, y1, y2 - 1))) for name, things in kinds(world).items()
                if name in question for x1, y1, x2, y2 in (world.sights[0][k].box for k in things)]
        assert sorted((name, *map(int, numbers)) for name, *numbers in spans) == sorted(true)


def test_ways_on_the_floor_agree_with_the_places(said):
    """From a to b is b's place less a's, in centers that are up to a decimeter off by rounding."""
    for world, _, question, answer in answers(said, "walk"):
        a, b = (thing(world, name) for name in re.findall(r"the (\w+)", question))
        x, y, total, free = map(int, re.findall(r"\d+", answer))
        x, y = x * (-1) ** ("left" in answer), y * (-1) ** ("back" in answer)
        centers = [world.room.things[k].center for k in (a, b)]
        c, s = np.cos(world.camera.yaw), np.sin(world.camera.yaw)
        dx, dy = 10 * (centers[1] - centers[0])
        assert abs(x - (dx * s - dy * c)) <= 1 and abs(y - (dx * c + dy * s)) <= 1
        assert abs(total - np.hypot(dx, dy)) <= 1.5 and abs(free - 10 * world.room.gaps[a, b]) <= 0.51


def test_turns_are_angles_of_the_scene(said):
    """By complex numbers of the true centers, whatever the camera."""
    for world, _, question, answer in answers(said, "turn"):
        a, b, c = (complex(*world.room.things[thing(world, name)].center) for name in re.findall(r"the (\w+)", question))
        turn = np.degrees(np.angle((c - a) / (b - a)))  # counter-clockwise, as the room's y axis is left of its x axis
        degrees = int(re.search(r"(\d+) degrees", answer)[1]) * (1 if "to the left" in answer else -1)
        assert abs((turn - degrees + 180) % 360 - 180) < 25 / min(abs(b - a), abs(c - a))  # places are rounded to 10 cm


def test_nothing_is_said_in_the_ladders_words(said):
    """No boxes as JSON, no chains, no options, and none of its questions."""
    ladder = [re.escape(text).replace(r"\{\}", r"\w+") for _, texts in [*VIDEO.values(), *scenes.SINGLE_IMAGE.values()]
              for text in texts]
    done = set()
    for world, _, turns in said:
        for task, question, answer in turns:
            done.add((world.word, task))
            assert parse_boxes(answer) is None and "<" not in answer and not re.search(r"\b[A-D]\. ", question + answer)
            assert not any(re.search(pattern, question) for pattern in ladder) and "Where in the picture" not in question
    assert done == {(word, task.__name__) for word, tasks in TASKS.items() for task in tasks}


def test_the_bases_rooms_are_not_the_ladders():
    """Same seed, same split, same index: another room."""
    for split in scenes.SPLITS:
        pictures = [set(make_files(0, split, index, 28, tasks=tasks)[0].values()) for tasks in FILES for index in range(3)]
        assert not set.union(*pictures[:3]) & set.union(*pictures[3:])


def test_rows_are_chats(tmp_path):
    """Training rows hold several turns about the same pictures, held-out ones one turn whose task is their type."""
    scenes.write_rooms(tmp_path / "rooms", 8, 0, test_scenes=8, processes=1, tasks="base")
    rows = {split: read_samples(tmp_path / "rooms" / split / "base_data.jsonl", tmp_path / "rooms" / split / "images")
            for split in scenes.SPLITS}
    assert max(len(s.messages) for s in rows["train"]) > 6 and {s.question_type for s in rows["train"]} == {"chat"}
    assert {len(s.messages) for s in rows["test"] + rows["val"]} == {2}
    assert {s.question_type for s in rows["test"]} <= {f"chat: {task.__name__}" for tasks in TASKS.values() for task in tasks}
    assert {(m.kind, len(m.sources) > 1) for s in rows["train"] for m in s.media} >= {("image", False), ("video", True)}
    lines = (tmp_path / "rooms" / "train" / "base_data.jsonl").read_text().splitlines()
    assert all(set(json.loads(line)) == {"messages"} for line in lines)


def test_questions_by_themselves_are_those_of_the_chats(tmp_path):
    """Of each training chat the first that asks for places and the last other one; of held-out pictures there are none."""
    scenes.write_rooms(tmp_path / "rooms", 6, 0, test_scenes=2, processes=1, tasks="base")
    chats, single = ([json.loads(line)["messages"] for line in (tmp_path / "rooms" / "train" / file).read_text().splitlines()]
                     for file in ("base_data.jsonl", "base_single.jsonl"))
    expected = []
    for chat in chats:
        media = [part for part in chat[0]["content"] if part["type"] != "text"]
        turns = [(chat[i]["content"][-1]["text"], chat[i + 1]["content"]) for i in range(0, len(chat), 2)]
        places = [turn for turn in turns if turn[0].startswith(("Point to", "Which cells"))]
        expected += [(media, *turn) for turn in places[:1] + [turn for turn in turns if turn not in places][-1:]]
    assert [(one[0]["content"][:-1], one[0]["content"][-1]["text"], one[1]["content"]) for one in single] == expected
    assert len(single) > 20 and not (tmp_path / "rooms" / "test" / "base_single.jsonl").exists()
    pixels = (tmp_path / "rooms" / "train" / "base_pixels.jsonl").read_text().splitlines()
    assert len(pixels) == sum(one[0]["content"][-1]["text"].startswith(("Point to", "Which cells")) for one in single)


def test_reach_by_hand():
    """The boxes of worked_world in the order in which the question names their things."""
    said = reach(worked_world(), "Point to every lamp and bed.")
    assert said == ("How far does every lamp and bed reach?", "From 8 16 to 24 56 reaches the lamp. From 60 40 to 92 64 reaches the bed.")
