"""What is said of a room agrees with it, and never in the ladder's words."""

import itertools
import json
import re

import numpy as np
import pytest

from data import read_samples
from rewards import parse_boxes
from rooms import scenes
from rooms import talk as plain
from rooms.render import Camera, Room, Sight, make_thing
from rooms.scenes import FILES, VIDEO, make_files
from rooms.talk import (
    BLOCK,
    QUESTIONS,
    TASKS,
    TOLD,
    clear_kinds,
    make_world,
    recall,
    sums,
    talk,
)


@pytest.fixture(scope="module")
def said():
    """[(world, ids, [(task, question, answer)])] of all pictures of some rooms."""
    caught = []

    def keep(rng, world):
        caught.append((world, world.ids, talk(rng, world)))
        return caught[-1][-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plain, "talk", keep)
        for index in (*range(30), *range(31, 72, 4)):  # the latter are filmed
            make_files(5, "train", index, tasks="base")
    return caught


def answers(said, *tasks):
    found = []
    for world, ids, turns in said:
        for task, question, answer in turns:
            if task in tasks:
                found.append((world, ids, question, answer))
    assert len(found) > 5
    return found


def thing(world, name):
    """The only thing of a category."""
    (k,) = [k for k, thing in enumerate(world.room.things) if thing.name == name]
    return k


def worked_world(ids=None):
    """A lamp 2 m ahead and 1 m to the left of a camera, a bed 3 m ahead and 0.5 m to its right."""
    things = [
        make_thing("lamp", (3, 2), 0, (0.6, 0.6, 1.3)),
        make_thing("bed", (4, 0.5), 0, (1, 1.6, 0.8)),
    ]
    sights = [Sight((8, 16, 24, 56), 1.0, True), Sight((60, 40, 92, 64), 1.0, True)]
    room = Room(
        np.array([5.0, 4.0]), things, [], np.array([[0, 1.2], [1.2, 0]]), [Camera(1, 1, 0)], None
    )
    return make_world(room, [sights], [ids], "", Camera(1, 1, 0))


@pytest.mark.parametrize(
    "task, expected",
    (
        ("count", "I see 1 bed and 1 lamp."),
        ("place", "The lamp is left 10 ahead 20."),
        ("reach", "From 8 16 to 24 56 reaches the lamp. From 60 40 to 92 64 reaches the bed."),
        (
            "show",
            "The lamp from 8 16 to 24 56, left 10 ahead 20. "
            "The bed from 60 40 to 92 64, right 5 ahead 30.",
        ),
        ("measure", "60 by 60 by 130: 130 at the most."),
        ("measure", "130 at the most: 60 by 60 by 130."),
        ("compare", "it is left 15 front 10."),
        ("compare", "from left 10 ahead 20 to right 5 ahead 30: it is left 15 front 10."),
        ("gap", "1.2 meters."),
        ("gap", "from right 5 ahead 30 to left 10 ahead 20, 18 apart: 1.2 meters."),
        ("total", "it holds 1."),
        ("total", "from left 10 ahead 20: it holds 1."),
        ("pace", "20.0 in all: 50 by 40."),
        ("pace", "50 by 40: 20.0 in all."),
    ),
)
def test_worked_example(task, expected):
    """Computed by hand from the two things of worked_world."""
    world = worked_world()
    found = {getattr(plain, task)(np.random.default_rng(seed), world)[1] for seed in range(40)}
    assert expected in found


def test_a_picture_is_read_block_by_block():
    """An eighth of a block is enough to be named, less is nothing; of two things the larger."""
    ids = np.zeros((112, 112), np.uint8)
    ids[:BLOCK, :BLOCK] = 2
    ids[0, 0] = 1
    ids[BLOCK : BLOCK + 4, BLOCK : 2 * BLOCK - 4] = 1  # 96 of 784 pixels: 2 short of an eighth
    ids[-BLOCK:, -4:] = 1
    assert plain.read(None, worked_world(ids))[1] == (
        "bed nothing nothing nothing. nothing nothing nothing nothing. "
        "nothing nothing nothing nothing. nothing nothing nothing lamp."
    )


def test_pixels_hold_what_is_said(said):
    """A pixel shows what the ids say; everything of some categories reaches as far as its box."""
    for world, ids, question, answer in answers(said, "look"):
        spots = re.findall(r"(\d+) (\d+)", question)
        names = re.findall(r"the (\w+)|(nothing)", answer)
        assert len(spots) == len(names) == 3
        for (x, y), (name, nothing) in zip(spots, names):
            k = ids[0][int(y), int(x)]
            assert nothing if k == 0 else world.room.things[k - 1].name == name
    for world, _, question, answer in answers(said, "reach"):
        found = re.findall(r"From (\d+) (\d+) to (\d+) (\d+) reaches the (\w+)", answer)
        named = re.findall(r"\w+", question)
        true = [
            (*item.box, item.name)
            for item in itertools.chain(*clear_kinds(world).values())
            if item.name in named
        ]
        assert sorted((*map(int, numbers), name) for *numbers, name in found) == sorted(true)


def signed(number, word, negative):
    """A number that stands with a word."""
    return -int(number) if word == negative else int(number)


def on_the_floor(world, text):
    """Every place that a text states, as right + ahead * 1j in decimeters."""
    found = re.findall(r"(left|right) (\d+) (ahead|behind) (\d+)", text)
    return [
        signed(x, side, "left") + 1j * signed(y, order, "behind") for side, x, order, y in found
    ]


def true_place(world, name):
    """The same of a thing's center, by complex numbers."""
    toward = complex(*world.room.things[thing(world, name)].center) - complex(
        world.camera.x, world.camera.y
    )
    toward *= 10 * np.exp(-1j * world.camera.yaw)
    return -toward.imag + 1j * toward.real


def test_what_is_shown_is_there(said):
    """The first picture with a clear view of the thing, the box in it, the place on the floor."""
    pattern = r"The (\w+)(?: in (?:view|frame) (\d))? from (\d+) (\d+) to (\d+) (\d+), (.*?)\."
    for world, ids, _, answer in answers(said, "show"):
        for name, picture, *corners, floor in re.findall(pattern, answer):
            k, number = thing(world, name), int(picture or 1)
            assert not any(sights[k].clear for sights in world.sights[: number - 1])
            rows, columns = np.nonzero(ids[number - 1] == k + 1)
            assert [*map(int, corners)] == [
                columns.min(),
                rows.min(),
                columns.max() + 1,
                rows.max() + 1,
            ]
            assert abs(on_the_floor(world, floor)[0] - true_place(world, name)) < 0.72


def test_ways_on_the_floor_agree_with_the_scene(said):
    """Differences and free floor, from the true centers, and the places that are stated first."""
    for world, _, question, answer in answers(said, "compare", "gap"):
        asked = re.findall(r"the (\w+)", question)
        a, b = (true_place(world, name) for name in asked)
        for stated, place in zip(on_the_floor(world, answer), (a, b)):
            assert abs(stated - place) < 0.72
        if question.startswith("Compare"):
            side, x, order, y = re.search(
                r"is (left|right) (\d+) (front|back) (\d+)", answer
            ).groups()
            stated = signed(x, side, "left") + 1j * signed(y, order, "front")
            assert abs(stated - (a - b)) < 1.42
        else:
            gap = world.room.gaps[thing(world, asked[0]), thing(world, asked[1])]
            assert float(re.search(r"([\d.]+) meters", answer)[1]) == round(gap, 1)


def test_near_is_in_order(said):
    for world, _, question, answer in answers(said, "near"):
        start, past = re.search(r"from the (\w+)", question)[1], re.findall(r"(\w+) (\d+)", answer)
        gaps = [world.room.gaps[thing(world, start), thing(world, name)] for name, _ in past]
        assert gaps == sorted(gaps) and [round(10 * gap) for gap in gaps] == [
            int(n) for _, n in past
        ]


def test_turns_are_angles_of_the_scene(said):
    """By complex numbers of the true centers, whatever the camera."""
    for world, _, question, answer in answers(said, "turn"):
        a, b, c = (
            complex(*world.room.things[thing(world, name)].center)
            for name in re.findall(r"the (\w+)", question)
        )
        # Counter-clockwise, as the room's y axis is left of its x axis.
        turn = np.angle((c - a) / (b - a), deg=True)
        side, degrees = re.search(r"turn (left|right) (\d+)", answer).groups()
        off = turn - signed(degrees, side, "right")
        # Places are rounded to 10 cm.
        assert abs((off + 180) % 360 - 180) < 25 / min(abs(b - a), abs(c - a))


def test_totals_and_entrances(said):
    """Counted over all pictures' ids; a thing comes in where it is first clear."""
    for world, ids, question, answer in answers(said, "total"):
        kind = re.search(r"every (\w+)", question)[1]
        kinds = {k: thing.name for k, thing in enumerate(world.room.things, 1)}
        shown = set().union(*(np.unique(picture) for picture in ids))
        seen = [k for k in shown if kinds.get(k) == kind]
        assert int(re.search(r"holds (\d+)", answer)[1]) == len(seen)
    for world, _, _, answer in answers(said, "enter"):
        for name, number in re.findall(r"(\w+) in \w+ (\d)", answer):
            clear = [sights[thing(world, name)].clear for sights in world.sights]
            assert clear.index(True) + 1 == int(number)


def test_sums_by_other_routes():
    """Complex numbers, products and sorted pairs."""
    rng, kinds_met = np.random.default_rng(0), set()
    for _ in range(200):
        question, answer = sums(rng, None)
        spots = on_the_floor(None, question)
        kinds_met.add(question.split()[0])
        if question.startswith("Compare"):
            side, x, order, y = answer[6:-1].split()
            expected = signed(x, side, "left") + 1j * signed(y, order, "front")
            assert spots[0] - spots[1] == expected
        elif question.startswith("How far"):
            assert abs(int(answer.split()[0]) - abs(spots[0] - spots[1])) <= 0.5
        elif question.startswith("At"):
            a, b, c = spots
            side, degrees = answer[5:-1].split()
            if b != a != c:
                turn = np.angle((c - a) / (b - a), deg=True)
                assert abs(turn - signed(degrees, side, "right")) % 360 < 0.51
        elif question.startswith("Pace"):
            w, d = map(int, re.findall(r"\d+", question))
            assert answer == f"{w * d / 100:.1f} in all."
        else:
            pairs = sorted((int(n), word) for word, n in re.findall(r"(\w+) (\d+)", question))
            words = [word for _, word in pairs]
            if question.startswith("Least"):
                words = words[:1]
            assert answer == ", ".join(words) + "."
    assert kinds_met == {"Compare", "How", "At", "Pace", "In", "Least"}


def test_recall_says_what_was_told():
    """Every word once, with the letter that stands before it in the question, in any order."""
    rng, same = np.random.default_rng(0), 0
    for _ in range(200):
        told, asked, said = re.fullmatch(
            "Told (.*), say (.*)\\.Told (.*)\\.", "".join(recall(rng, None))
        ).groups()
        letters = dict(item.split()[::-1] for item in told.split(", "))
        assert said == ", ".join(f"{word} {letters[word]}" for word in asked.split(", "))
        assert len(letters) == len(set(letters.values())) == len(said.split(", ")) <= 8
        same += [*letters] == asked.split(", ")
    assert same < 50


def test_nothing_is_said_in_the_ladders_words(said):
    """No boxes as JSON, no chains, no options, and none of its questions."""
    questions = [*VIDEO.values(), *scenes.SINGLE_IMAGE.values()]
    texts = itertools.chain(*(texts for _, texts in questions))
    ladder = [re.escape(text).replace(r"\{\}", r"\w+") for text in texts]
    done = set()
    for world, _, turns in said:
        for task, question, answer in turns:
            done.add((world.word, task))
            assert parse_boxes(answer) is None
            assert "<" not in answer
            assert not re.search(r"\b[A-D]\. ", question + answer)
            assert not re.search("|".join(ladder), question)
            assert "Where in the picture" not in question
    tried = set()
    for task, times in TASKS.items():
        tried |= {(word, task.__name__) for word, count in zip(QUESTIONS, times) if count}
    assert done == tried
    rng = np.random.default_rng(0)
    for _ in range(200):
        for task in TOLD:
            text = "".join(task(rng, None))
            assert not re.search(r"\b[A-D]\. |\n|[<{]", text)
            assert not re.search("|".join(ladder), text)


def test_the_bases_rooms_are_not_the_ladders():
    """Same seed, same split, same index: another room."""
    for split in scenes.SPLITS:
        pictures = {}
        for tasks in FILES:
            files = [make_files(0, split, index, tasks=tasks)[0] for index in range(3)]
            pictures[tasks] = set().union(*(file.values() for file in files))
        assert not pictures["ladder"] & pictures["base"]


def test_rows_are_one_question_each(tmp_path):
    """One question and its answer, with its task for a type; what is told is about no picture.

    Recall comes first, then what one picture shows, fewer things before many, then what follows
    from it and sums, then several pictures.
    """
    scenes.write_rooms(tmp_path / "rooms", 8, 0, test_scenes=8, processes=1, tasks="base")
    for split in scenes.SPLITS:
        folder = tmp_path / "rooms" / split
        samples = read_samples(folder / "base_data.jsonl", folder / "images")
        assert {len(s.messages) for s in samples} == {2} and len(samples) > 50
        tasks = {s.question_type.removeprefix("chat: ") for s in samples}
        told = {task.__name__ for task in TOLD}
        assert told <= tasks <= told.union(task.__name__ for task in TASKS)
        assert all(
            (s.question_type.removeprefix("chat: ") in told) == (not s.media) for s in samples
        )
        media = itertools.chain(*(sample.media for sample in samples))
        assert ("image", False) in {(m.kind, len(m.sources) > 1) for m in media}
        rows = [json.loads(line) for line in (folder / "base_data.jsonl").read_text().splitlines()]
        assert all(set(row) == {"messages", "question_type"} for row in rows)
        levels = []
        for sample in samples:
            task = sample.question_type.removeprefix("chat: ")
            if len(sample.media) > 1 or any(media.kind == "video" for media in sample.media):
                levels.append(3)
            elif task == "recall":
                levels.append(0)
            else:
                levels.append(2 if task in ("compare", "gap", "near", "sums") else 1)
        assert levels == sorted(levels) and set(levels) == {0, 1, 2, 3}
        counts = [
            row["messages"][1]["content"].count(",")
            for row in rows
            if row["question_type"] == "count"
        ]
        assert counts[0] == 0 and sum(counts[: len(counts) // 2]) <= sum(counts[len(counts) // 2 :])
