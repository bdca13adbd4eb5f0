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
    """[(world, ids, [(task, question, answer)])] of all pictures of some rooms, caught in make_files."""
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
    found = [
        (world, ids, question, answer)
        for world, ids, turns in said
        for task, question, answer in turns
        if task in tasks
    ]
    assert len(found) > 5
    return found


def thing(world, name):
    """The only thing of a category."""
    (k,) = [k for k, thing in enumerate(world.room.things) if thing.name == name]
    return k


def worked_world(ids=None):
    """A lamp 2 m ahead and 1 m to the left of a camera, a bed 3 m ahead and 0.5 m to its right, boxes made up."""
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
            "The lamp from 8 16 to 24 56, left 10 ahead 20. The bed from 60 40 to 92 64, right 5 ahead 30.",
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
    """What is at a pixel is what the picture's ids show there; everything of the kinds asked for reaches as far as its box."""
    for world, ids, question, answer in answers(said, "look"):
        spots = re.findall(r"(\d+) (\d+)", question)
        names = re.findall(r"the (\w+)|(nothing)", answer)
        assert len(spots) == len(names) == 3
        for (x, y), (name, nothing) in zip(spots, names):
            k = ids[0][int(y), int(x)]
            assert nothing if k == 0 else world.room.things[k - 1].name == name
    for world, ids, question, answer in answers(said, "reach"):
        found = re.findall(r"From (\d+) (\d+) to (\d+) (\d+) reaches the (\w+)", answer)
        named = re.findall(r"\w+", question)
        true = [
            (*item.box, item.name)
            for item in itertools.chain(*clear_kinds(world).values())
            if item.name in named
        ]
        assert sorted((*map(int, numbers), name) for *numbers, name in found) == sorted(true)


def on_the_floor(world, text):
    """Every place that a text states, as right + ahead * 1j in decimeters."""
    return [
        int(x) * (-1) ** (side == "left") + 1j * int(y) * (-1) ** (order == "behind")
        for side, x, order, y in re.findall(r"(left|right) (\d+) (ahead|behind) (\d+)", text)
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
    for world, ids, question, answer in answers(said, "show"):
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
    """Differences and free floor, from the true centers; what they are worked out from is where the things are."""
    for world, _, question, answer in answers(said, "compare", "gap"):
        asked = re.findall(r"the (\w+)", question)
        a, b = (true_place(world, name) for name in asked)
        for stated, place in zip(on_the_floor(world, answer), (a, b)):
            assert abs(stated - place) < 0.72
        if question.startswith("Compare"):
            side, x, order, y = re.search(
                r"is (left|right) (\d+) (front|back) (\d+)", answer
            ).groups()
            assert (
                abs(
                    int(x) * (-1) ** (side == "left")
                    + 1j * int(y) * (-1) ** (order == "front")
                    - (a - b)
                )
                < 1.42
            )
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
        turn = np.degrees(
            np.angle((c - a) / (b - a))
        )  # counter-clockwise, as the room's y axis is left of its x axis
        side, degrees = re.search(r"turn (left|right) (\d+)", answer).groups()
        off = turn - int(degrees) * (1 if side == "left" else -1)
        assert abs((off + 180) % 360 - 180) < 25 / min(
            abs(b - a), abs(c - a)
        )  # places are rounded to 10 cm


def test_totals_and_entrances(said):
    """Counted over all pictures' ids; a thing comes in where it is first clear."""
    for world, ids, question, answer in answers(said, "total"):
        kind = re.search(r"every (\w+)", question)[1]
        seen = {
            k
            for picture in ids
            for k in np.unique(picture[picture > 0])
            if world.room.things[k - 1].name == kind
        }
        assert int(re.search(r"holds (\d+)", answer)[1]) == len(seen)
    for world, _, question, answer in answers(said, "enter"):
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
            assert spots[0] - spots[1] == int(x) * (-1) ** (side == "left") + 1j * int(y) * (
                -1
            ) ** (order == "front")
        elif question.startswith("How far"):
            assert abs(int(answer.split()[0]) - abs(spots[0] - spots[1])) <= 0.5
        elif question.startswith("At"):
            a, b, c = spots
            turn = np.degrees(np.angle((c - a) / (b - a))) if abs(b - a) * abs(c - a) else None
            side, degrees = answer[5:-1].split()
            assert (
                turn is None
                or abs(turn - int(degrees) * (1 if side == "left" else -1)) % 360 < 0.51
            )
        elif question.startswith("Pace"):
            w, d = map(int, re.findall(r"\d+", question))
            assert answer == f"{w * d / 100:.1f} in all."
        else:
            pairs = sorted((int(n), word) for word, n in re.findall(r"(\w+) (\d+)", question))
            assert (
                answer
                == ", ".join(
                    word for _, word in pairs[: 1 if question.startswith("Least") else None]
                )
                + "."
            )
    assert kinds_met == {"Compare", "How", "At", "Pace", "In", "Least"}


def test_recall_says_what_was_told():
    """Every word once, with the letter that stands before it in the question, in any order."""
    rng, same = np.random.default_rng(0), 0
    for _ in range(200):
        told, asked, said = re.fullmatch(
            "Told (.*), say (.*)\\.Told (.*)\\.", "".join(recall(rng, None))
        ).groups()
        letters = {word: letter for letter, word in (item.split() for item in told.split(", "))}
        assert said == ", ".join(f"{word} {letters[word]}" for word in asked.split(", "))
        assert len(letters) == len(set(letters.values())) == len(said.split(", ")) <= 8
        same += [*letters] == asked.split(", ")
    assert same < 50


def test_nothing_is_said_in_the_ladders_words(said):
    """No boxes as JSON, no chains, no options, and none of its questions."""
    ladder = [
        re.escape(text).replace(r"\{\}", r"\w+")
        for _, texts in [*VIDEO.values(), *scenes.SINGLE_IMAGE.values()]
        for text in texts
    ]
    done = set()
    for world, _, turns in said:
        for task, question, answer in turns:
            done.add((world.word, task))
            assert (
                parse_boxes(answer) is None
                and "<" not in answer
                and not re.search(r"\b[A-D]\. ", question + answer)
            )
            assert (
                not any(re.search(pattern, question) for pattern in ladder)
                and "Where in the picture" not in question
            )
    tried = {
        (word, task.__name__)
        for task, times in TASKS.items()
        for word, count in zip(QUESTIONS, times)
        if count
    }
    assert done == tried
    rng = np.random.default_rng(0)
    for text in (part for _ in range(200) for task in TOLD for part in task(rng, None)):
        assert not re.search(r"\b[A-D]\. |\n|[<{]", text) and not any(
            re.search(pattern, text) for pattern in ladder
        )


def test_the_bases_rooms_are_not_the_ladders():
    """Same seed, same split, same index: another room."""
    for split in scenes.SPLITS:
        pictures = [
            set(make_files(0, split, index, 28, tasks=tasks)[0].values())
            for tasks in FILES
            for index in range(3)
        ]
        assert not set.union(*pictures[:3]) & set.union(*pictures[3:])


def test_rows_are_one_question_each(tmp_path):
    """Of every split: one question and its answer, its task for its type; what is told is about no picture; recall comes
    first, then what one picture shows, fewer things before many, what follows from it and sums, several pictures."""
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
        assert {(m.kind, len(m.sources) > 1) for s in samples for m in s.media} >= {
            ("image", False)
        }
        rows = [json.loads(line) for line in (folder / "base_data.jsonl").read_text().splitlines()]
        assert all(set(row) == {"messages", "question_type"} for row in rows)
        levels = [
            3
            if len(s.media) > 1 or any(media.kind == "video" for media in s.media)
            else 0
            if s.question_type == "chat: recall"
            else 1 + (s.question_type.removeprefix("chat: ") in ("compare", "gap", "near", "sums"))
            for s in samples
        ]
        assert levels == sorted(levels) and set(levels) == {0, 1, 2, 3}
        counts = [
            row["messages"][1]["content"].count(",")
            for row in rows
            if row["question_type"] == "count"
        ]
        assert counts[0] == 0 and sum(counts[: len(counts) // 2]) <= sum(counts[len(counts) // 2 :])
