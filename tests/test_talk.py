"""What the base learns: every row follows from the facts that it tells, or from the room."""

import itertools
import json
import re
from collections import Counter, namedtuple

import numpy as np
import pytest
from test_reckon import follow, parted, read_facts

from data import read_samples
from rewards import parse_boxes
from rooms import scenes, talk
from rooms.reckon import SIDES, TURNS
from rooms.render import DIFFICULTY, FURNITURE, Camera, Room, Sight, make_room, make_thing, render
from rooms.scenes import FILES, VIDEO, make_files
from rooms.talk import (
    BLOCK,
    NAMES,
    TOLD,
    WITH_OPTIONS,
    look_and_ask,
    make_world,
    told_rows,
)

# How a question is worded, twice for each task. Groups a, b and c, others, and all: the names.
LIST = r"[\w, ]+"
WORDINGS = {
    "say": (rf"Say (?P<all>{LIST})\.", rf"Where is (?P<all>{LIST})\?"),
    "enter": (rf"When do you see (?P<all>{LIST})\?", rf"First pictures: (?P<all>{LIST})\."),
    "compare": (
        r"Compare (?P<a>\w+) to (?P<b>\w+)\.",
        r"Which way is (?P<a>\w+) from (?P<b>\w+)\?",
    ),
    "apart": (
        r"Measure from (?P<a>\w+) to (?P<b>\w+)\.",
        r"How far is (?P<a>\w+) from (?P<b>\w+)\?",
    ),
    "nearest": (
        rf"Close to (?P<a>\w+): (?P<others>{LIST})\?",
        rf"Which of (?P<others>{LIST}) is near (?P<a>\w+)\?",
    ),
    "turn": (
        r"At (?P<a>\w+), turn from (?P<b>\w+) to (?P<c>\w+)\.",
        r"From (?P<a>\w+) look at (?P<b>\w+): which way is (?P<c>\w+)\?",
    ),
    "longest": (r"How long is (?P<a>\w+)\?", r"Sides of (?P<a>\w+)\?"),
    "floor": (r"How large is the room\?", r"Area of the floor\?"),
    "total": (r"Count (?P<a>\w+)\.", r"How many of (?P<a>\w+) are there\?"),
    "order": (rf"Sort (?P<all>{LIST})\.", rf"Which comes first: (?P<all>{LIST})\?"),
}
ASKED = {  # the least and the most names in a question, where facts are told
    "say": (1, 8),
    "compare": (2, 2),
    "apart": (2, 2),
    "nearest": (3, 4),
    "turn": (3, 3),
    "longest": (1, 1),
    "floor": (0, 0),
    "total": (1, 1),
    "order": (3, 3),
}
OF_PLACES = ("say", "compare", "apart", "nearest", "turn")
REASONED = ("compare", "apart", "nearest", "turn", "order")

# A row; pictures: [(camera, ids, sights)] of those that it is about, [] where facts are told.
# The question without its options [(letter, text)], the answer without the letter of one of them.
Row = namedtuple("Row", "room pictures task question answer level media options letter")


def read_question(task, question):
    """(which of its wordings, the names in the order of {a}, {b}, {c}, {others} or {all})."""
    for number, wording in enumerate(WORDINGS[task]):
        if match := re.fullmatch(wording, question):
            lists = [text.split(", ") for _, text in sorted(match.groupdict().items())]
            return number, [*itertools.chain(*lists)]
    raise AssertionError(question)


def read_answer(task, answer):
    """The facts in an answer, in the order of the question; the result follows from them."""
    assert answer.endswith(".")
    steps, result = parted(task, answer[:-1])
    facts, expected = follow(task, steps)
    assert result == expected, answer
    return facts


def without_letter(answer):
    """(the same, the letter at its end).

    >>> without_letter("left-front B.")
    ('left-front.', 'B')
    """
    words, letter = re.fullmatch(r"(.*) ([A-D])\.", answer).groups()
    return f"{words}.", letter


def as_row(row, room=None, pictures=()):
    """A Row of one that make_files gave."""
    user, assistant = row["messages"]
    assert (user["role"], assistant["role"]) == ("user", "assistant")
    *media, text = user["content"]
    question, _, lines = text["text"].partition("\nOptions:\n")
    options = [line.split(". ") for line in lines.splitlines()]
    answer, letter = assistant["content"], None
    if options:
        answer, letter = without_letter(answer)
    return Row(
        room,
        pictures,
        row["question_type"],
        question,
        answer,
        row["level"],
        media,
        options,
        letter,
    )


@pytest.fixture(scope="module")
def all_told():
    """Rows about no picture, as 1,500 rooms bring them."""
    rng = np.random.default_rng(0)
    return [as_row(row) for _ in range(1500) for row in told_rows(rng)]


@pytest.fixture(scope="module")
def told(all_told):
    """{task: rows}, of each more than a hundred."""
    return {task: [row for row in all_told if row.task == task] for task in TOLD}


@pytest.fixture(scope="module")
def seen():
    """Rows about pictures, with the room, which is pictured once more."""
    rows, rooms = [], []

    def keep(*arguments):
        rooms.append(make_room(*arguments))
        return rooms[-1]

    hard = DIFFICULTY | {"view_categories": (3, 5)}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scenes, "make_room", keep)
        for index in range(60):
            made = make_files(5, "val", index, difficulty=hard, tasks="base")[1]["base"]
            room = rooms[-1]
            pictures = [(camera, *render(room, camera)[1:]) for camera in room.cameras]
            for row in made:
                row = as_row(row, room)
                if row.media:
                    rows.append(row._replace(pictures=pictures_of(row, pictures)))
    return rows


def pictures_of(row, pictures):
    """Those of the room's pictures that a row is about, by the names of the files."""
    files = [part.get("image") or part["video"] for part in row.media]
    if "video" in row.media[0]:
        (files,) = files
        if isinstance(files, str):
            assert files.endswith("/video.avi")
            return pictures
    return [pictures[int(re.search(r"/(?:view|frame)(\d)\.jpg$", file)[1])] for file in files]


def of_task(seen, *tasks):
    rows = [row for row in seen if row.task in tasks]
    assert len(rows) > 5
    return rows


# ---------------------------------------------------------------------------------- told


def told_facts(row):
    """([(name, numbers)] before the question, the question's wording, the names in it)."""
    told, question = re.fullmatch(r"((?:\w+(?: \d+)+\. )+)(.*)", row.question).groups()
    return read_facts(told.removesuffix(". ")), *read_question(row.task, question)


@pytest.mark.parametrize("task", ASKED)
def test_told_answers_follow_from_the_facts(told, task):
    """The answer states the facts that the question asks about, and what follows from them."""
    assert len(told[task]) > 100
    names_met, counts, wordings = set(), set(), Counter()
    for row in told[task]:
        assert not row.media
        facts, wording, asked = told_facts(row)
        kinds = Counter(name for name, _ in facts)
        wordings[wording] += 1
        counts.add(len(asked))
        names_met |= kinds.keys()
        if task == "total":
            expected = sorted(fact for fact in facts if fact[0] == asked[0])  # from the left
            assert 1 <= len(expected) <= 4
            del kinds[asked[0]]
        else:
            by_name = dict(facts)
            expected = [(name, by_name[name]) for name in asked or ["room"]]
            assert len({*asked}) == len(asked)
        assert read_answer(task, row.answer) == expected
        assert set(kinds.values()) <= {1}  # each other name is told of once
        assert task == "floor" or 2 <= len(kinds) + (task == "total") <= 8
    assert counts == {*range(ASKED[task][0], ASKED[task][1] + 1)}
    assert names_met == ({"room"} if task == "floor" else {*NAMES})
    assert min(wordings.values()) > 0.3 * wordings.total() and len(wordings) == 2


@pytest.mark.parametrize("task", WITH_OPTIONS)
def test_the_letter_is_that_of_the_result(told, seen, task):
    """Of two to four different options one is the result; each letter is right about as often."""
    letters = {"told": Counter(), "seen": Counter()}
    for row in [*told[task], *of_task(seen, task)]:
        if not row.options:
            continue
        options = dict(row.options)
        _, result = parted(task, row.answer.removesuffix("."))
        assert options[row.letter] == result
        assert len({*options.values()}) == len(row.options)
        assert [*options] == [*"ABCD"[: len(options)]] and len(options) >= 2
        letters["seen" if row.media else "told"][row.letter] += 1
    assert letters["seen"].total() > 5
    told_letters = letters["told"]
    assert min(told_letters["A"], told_letters["B"]) > 0.15 * told_letters.total()


def test_told_numbers_are_within_their_bounds(told):
    """And reach them: what the base never heard, it could not say of a room."""
    ends = {"place": (8, 52), "sides": (30, 240), "walls": (12, 32), "first": (1, 8)}
    kinds = dict.fromkeys(OF_PLACES, "place")
    kinds |= {"total": "place", "longest": "sides", "floor": "walls", "order": "first"}
    sizes = {"place": 2, "sides": 3, "walls": 2, "first": 1}
    met = {kind: set() for kind in ends}
    for task, kind in kinds.items():
        for row in told[task]:
            for _, numbers in told_facts(row)[0]:
                assert len(numbers) == sizes[kind]
                assert kind != "walls" or numbers[0] <= numbers[1]
                met[kind] |= {*numbers}
    for kind, (least, most) in ends.items():
        assert met[kind] == {*range(least, most + 1, 10 if kind == "sides" else 1)}


def test_what_is_asked_stands_anywhere_among_the_facts(told):
    """Neither the first nor the last fact is asked about more often, and any order is."""
    places, orders = Counter(), Counter()
    for row in told["turn"]:
        facts, _, asked = told_facts(row)
        names = [name for name, _ in facts]
        if len(names) == 8:
            numbers = [names.index(name) for name in asked]
            places.update(numbers)
            orders[tuple(np.argsort(numbers).tolist())] += 1
    share = places.total() / 8
    assert len(places) == 8 and share > 20
    assert all(abs(count - share) < 4 * share**0.5 for count in places.values())
    assert len(orders) == 6
    first = set()  # whether the first fact is counted, and one later too
    for row in told["total"]:
        facts, _, (name,) = told_facts(row)
        counted = [fact[0] == name for fact in facts]
        first.add((counted[0], any(counted[1:])))
    assert first == {(True, True), (True, False), (False, True)}


def test_letters_belong_to_lines(told):
    """Each word once, with the letter of its line, in an order of its own."""
    words_met, sizes, same = set(), Counter(), 0
    assert len(told["choose"]) > 100
    for row in told["choose"]:
        lines, asked = re.fullmatch(r"Lines:\n(.*)\nLetters of (.*)\?", row.question, re.S).groups()
        letters = dict(line.split(". ")[::-1] for line in lines.split("\n"))
        asked = asked.split(", ")
        assert "".join(letters.values()) == "ABCD"[: len(letters)]
        assert sorted(asked) == sorted(letters)
        assert row.answer == ". ".join(f"{word} {letters[word]}" for word in asked) + "."
        words_met |= letters.keys()
        sizes[len(letters)] += 1
        same += asked == [*letters]
    assert words_met == {*NAMES, *SIDES, *TURNS}
    assert sizes.keys() == {2, 3, 4}
    assert same < 0.5 * sizes.total()  # of two lines every second has them in order


def test_every_task_is_told_as_often_as_it_says(all_told):
    """Four standard deviations of a count that has no memory, and of those with options."""
    for task, rate in TOLD.items():
        rows = [row for row in all_told if row.task == task]
        assert abs(len(rows) - 1500 * rate) < 4 * (1500 * rate) ** 0.5
        with_options = sum(bool(row.options) for row in rows)
        share = WITH_OPTIONS.get(task, 0)
        spread = (len(rows) * share * (1 - share)) ** 0.5
        assert abs(with_options - len(rows) * share) <= 4 * spread


# ---------------------------------------------------------------------------------- one world


def worked_world(ids=None):
    """A lamp 2 m ahead and 1 m to the left of a camera, a bed 3 m ahead and 0.5 m to its right."""
    things = [
        make_thing("lamp", (3, 2), 0, (0.6, 0.64, 1.26)),
        make_thing("bed", (4, 0.5), 0, (1, 1.6, 0.8)),
    ]
    sights = [Sight((8, 16, 24, 56), 1.0, True), Sight((60, 40, 92, 64), 1.0, True)]
    room = bare_room(things, [Camera(1, 1, 0)])
    return make_world(room, [sights], [ids], "", room.cameras[0])


def bare_room(things, cameras):
    """A room of 5 by 4.5 meters, of which nothing is drawn."""
    sides = np.array([5.0, 4.5])
    return Room(sides=sides, things=things, solids=[], cameras=cameras, tints=None)


@pytest.mark.parametrize(
    "task, expected",
    (
        ("say", {"lamp 26 38.", "bed 32 42.", "lamp 26 38. bed 32 42.", "bed 32 42. lamp 26 38."}),
        ("show", {"lamp 8 16 24 56.", "bed 60 40 92 64.", "lamp 8 16 24 56. bed 60 40 92 64."}),
        ("outline", {"8 16 24 56 lamp.", "60 40 92 64 bed. 8 16 24 56 lamp."}),
        ("enter", {"lamp 1. bed 1.", "bed 1. lamp 1."}),
        ("compare", {"lamp 26 38 bed 32 42: left 6 front 4: left-front."}),
        # 6 and 4 are 7.2, and 7 quarters are 1.75.
        ("apart", {"bed 32 42 lamp 26 38: right 6 back 4: 7 apart: 1.8."}),
        ("longest", {"lamp 60 60 130: 130.", "bed 100 160 80: 160."}),
        ("floor", {"room 18 20: 22."}),
        ("total", {"1 lamp 26 38: 1.", "1 bed 32 42: 1."}),
        ("nearest", set()),
        ("turn", set()),
        ("order", set()),
    ),
)
def test_worked_example(task, expected):
    """Computed by hand from the two things of worked_world, which are too few for three names."""
    world, found = worked_world(), set()
    for seed in range(40):
        row = look_and_ask(np.random.default_rng(seed), world, task)
        found |= {row[1]} if row else set()
    assert expected <= found
    assert bool(expected) == bool(found)


def test_a_picture_is_read_block_by_block():
    """An eighth of a block is enough to be named, less is nothing; of two things the larger."""
    ids = np.zeros((112, 112), np.uint8)
    ids[:BLOCK, :BLOCK] = 2
    ids[0, 0] = 1
    ids[BLOCK : BLOCK + 4, BLOCK : 2 * BLOCK - 4] = 1  # 96 of 784 pixels: 2 short of an eighth
    ids[-BLOCK:, -4:] = 1
    assert talk.read(None, worked_world(ids))[1] == (
        "bed nothing nothing nothing. nothing nothing nothing nothing. "
        "nothing nothing nothing nothing. nothing nothing nothing lamp."
    )


# . no pixel, h hidden: some pixels, c clear
@pytest.mark.parametrize(
    "lamp, bed, bin_, expected",
    (
        ("..c", ".cc", "cc.", "lamp 3. bed 2. bin 1: bin, bed, lamp."),
        (".hc", "cc.", "hhh", None),  # one is never clear
        (".hc", ".cc", "c..", None),  # two come in at once, one of them hidden
        ("hhc", ".cc", "c..", None),  # the first to come in is the last to be clear
        ("..c", "..c", "c..", None),  # two are clear at once
    ),
)
def test_things_come_in_one_after_the_other(lamp, bed, bin_, expected):
    """With any pixel and in clear sight."""
    box = (10, 10, 40, 40)
    kinds = {".": Sight(None, 0.0, False), "h": Sight(box, 0.2, False), "c": Sight(box, 1.0, True)}
    things = [
        make_thing(name, (x, 2), 0, (0.5, 0.5, 1))
        for x, name in enumerate(("lamp", "bed", "bin"), 2)
    ]
    room = bare_room(things, [Camera(1, 1, 0)] * 3)
    sights = [[kinds[sight] for sight in picture] for picture in zip(lamp, bed, bin_)]
    world = make_world(room, sights, None, "frame", room.cameras[0])
    found = set()
    for seed in range(40):
        row = look_and_ask(np.random.default_rng(seed), world, "order")
        answer = row and row[1]
        if row and "Options:" in row[0]:
            answer, _ = without_letter(answer)
        found |= {answer}
    assert expected in found
    assert len(found) == (6 if expected else 1)  # the facts in any order


# ---------------------------------------------------------------------------------- seen


def numbers_of(room, name):
    """The numbers of the things of a category."""
    return [k for k, thing in enumerate(room.things) if thing.name == name]


def number_of(row, name):
    """The number of the only thing of a category, which some picture shows clearly."""
    (k,) = numbers_of(row.room, name)
    assert any(sights[k].clear for _, _, sights in row.pictures)
    return k


def off_the_map(row, k, place):
    """How far a place is from that of a thing's middle, in units: the larger of both ways."""
    camera = row.pictures[0][0]
    toward = complex(*row.room.things[k].center) - complex(camera.x, camera.y)
    toward *= 4 * np.exp(-1j * camera.yaw)  # now ahead is real, and left imaginary
    off = complex(*place) - complex(30 - toward.imag, 30 + toward.real)
    return max(abs(off.real), abs(off.imag))


def first_clear(row, k):
    """The number of the first picture that shows a thing clearly."""
    return [sights[k].clear for _, _, sights in row.pictures].index(True) + 1


def shown(ids):
    """The numbers of the things of which a picture shows a pixel."""
    return {k - 1 for k in np.unique(ids).tolist() if k}


def pixels_of(ids, k):
    """The box of the pixels that show a thing."""
    rows, columns = np.nonzero(ids == k + 1)
    return [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]


def test_seen_places_are_the_rooms(seen):
    """Half a unit off at most, since places are rounded; the result follows from the places."""
    for row in of_task(seen, *OF_PLACES):
        facts = read_answer(row.task, row.answer)
        _, asked = read_question(row.task, row.question)
        assert [name for name, _ in facts] == asked
        assert len(asked) <= 4
        for name, place in facts:
            assert off_the_map(row, number_of(row, name), place) <= 0.5 + 1e-6


def test_totals_are_all_of_the_room(seen):
    """Each thing once, by its first picture; every one of them is clear in some picture."""
    counts = Counter()
    for row in of_task(seen, "total"):
        (name,) = read_question("total", row.question)[1]
        facts = read_answer("total", row.answer)
        left = numbers_of(row.room, name)
        firsts = []
        for told_name, place in facts:
            k = min(left, key=lambda k: off_the_map(row, k, place))
            left.remove(k)
            assert told_name == name
            assert off_the_map(row, k, place) <= 0.5 + 1e-6
            firsts.append((first_clear(row, k), place))
        assert not left
        assert firsts == sorted(firsts)
        counts[len(facts)] += 1
    assert counts.keys() == {1, 2, 3, 4}


def test_several_are_counted_rather_than_one(seen):
    """One thing is counted only where nothing is there several times, all of it clear."""
    for row in of_task(seen, "total"):
        if row.answer.endswith(": 1."):
            for name in FURNITURE:
                several = numbers_of(row.room, name)
                clear = [any(p[2][k].clear for p in row.pictures) for k in several]
                assert len(several) < 2 or not all(clear)


def test_seen_sizes_are_the_rooms(seen):
    """Sides to the nearest ten centimeters; walls are whole quarter meters."""
    for row in of_task(seen, "longest"):
        ((name, sides),) = read_answer("longest", row.answer)
        assert read_question("longest", row.question)[1] == [name]
        exact = row.room.things[number_of(row, name)].dims
        assert all(side % 10 == 0 for side in sides)
        assert np.abs(sides - 100 * exact).max() <= 5 + 1e-9
    for row in of_task(seen, "floor"):
        assert read_question("floor", row.question)[1] == []
        ((name, walls),) = read_answer("floor", row.answer)
        assert name == "room"
        assert [wall / 4 for wall in walls] == sorted(row.room.sides)


def test_first_pictures_are_those_of_clear_sight(seen):
    """In an order, what comes in with any pixel does so one after the other, as in clear sight."""
    for row in of_task(seen, "enter", "order"):
        facts = read_answer(row.task, row.answer)
        assert [name for name, _ in facts] == read_question(row.task, row.question)[1]
        for name, (number,) in facts:
            assert number == first_clear(row, number_of(row, name))
        if row.task == "order":
            entrances = []
            for name, _ in sorted(facts, key=lambda fact: fact[1]):
                k = number_of(row, name)
                entrances.append([k in shown(ids) for _, ids, _ in row.pictures].index(True))
            assert entrances == sorted({*entrances})


def test_boxes_hold_the_pixels(seen):
    """Everything of the categories that are asked for: in their order, then from left to right."""
    patterns = {"show": r"(\w+) ((?:\d+ ?){4})\.", "outline": r"((?:\d+ ?){4}) (\w+)\."}
    counts = Counter()
    for row in of_task(seen, "show", "outline"):
        verb, names = re.fullmatch(r"(Show|Outline) ([\w, ]+)\.", row.question).groups()
        ((_, ids, sights),) = row.pictures
        expected = []
        for name in names.split(", "):
            kind = [k for k in numbers_of(row.room, name) if k in shown(ids)]
            assert kind and all(sights[k].clear for k in kind)
            boxes = sorted(pixels_of(ids, k) for k in kind)
            expected += [(name, " ".join(map(str, box))) for box in boxes]
        found = re.findall(patterns[row.task], row.answer)
        if row.task == "outline":
            found = [(name, box) for box, name in found]
        assert found == expected
        assert verb.lower() == row.task
        assert row.answer.count(".") == len(expected)
        counts[len(names.split(", "))] += 1
    assert counts.keys() == {1, 2, 3}


def test_blocks_hold_what_is_read(seen):
    """Pixel by pixel: the thing that covers most of a block, or nothing."""
    for row in of_task(seen, "read"):
        ((_, ids, _),) = row.pictures
        lines = [line.split() for line in row.answer.removesuffix(".").split(". ")]
        assert [len(line) for line in lines] == [4] * 4
        for line, top in zip(lines, range(0, 112, 28)):
            for word, left in zip(line, range(0, 112, 28)):
                block = Counter(ids[top : top + 28, left : left + 28].ravel().tolist())
                del block[0]
                most = max(block.values(), default=0)
                largest = {row.room.things[k - 1].name for k, n in block.items() if n == most}
                assert word in (largest if 8 * most >= 28 * 28 else {"nothing"})


def test_easy_rows_come_first(told, seen):
    """Names with their numbers and letters, then other texts, then pictures: few things first.

    Of the same number of things it is later what follows from places, and what several show.
    """
    for task, rows in told.items():
        assert {row.level for row in rows} == {(0, 0) if task in ("say", "choose") else (1, 0)}
    for row in seen:
        most = max(len(shown(ids)) for _, ids, _ in row.pictures)
        several = 2 if len(row.pictures) > 1 else 0
        assert row.level == (2, most + several + (row.task in REASONED))


def test_pictures_and_their_tasks(seen):
    """Of one picture, of four views, of eight frames: what each is asked, and how much."""
    asked, groups = {1: set(), 4: set(), 8: set()}, {}
    for row in seen:
        asked[len(row.pictures)].add(row.task)
        groups.setdefault((id(row.room), json.dumps(row.media)), []).append(row)
    both = {"say", "compare", "apart", "nearest", "turn", "longest", "total"}
    asked[1] |= {"nearest", "turn"}  # few pictures show three things clearly
    assert asked == {
        1: both | {"read", "show", "outline"},
        4: both | {"enter", "floor"},
        8: both | {"enter", "floor", "order"},
    }
    most = Counter()
    for rows in groups.values():
        count = len(rows[0].pictures)
        assert len({(row.question, str(row.options)) for row in rows}) == len(rows)
        most[count] = max(most[count], len(rows))
    assert most == {1: 3, 4: 8, 8: 16}


def test_seen_questions_are_worded_both_ways(seen):
    for task in WORDINGS:
        rows = of_task(seen, task)
        assert {read_question(task, row.question)[0] for row in rows} == {0, 1}


# ---------------------------------------------------------------------------------- rows and files


def test_nothing_is_said_in_the_ladders_words(told, seen):
    """No boxes as JSON, no tags, none of its questions and instructions; options apart."""
    questions = [*VIDEO.values(), *scenes.SINGLE_IMAGE.values()]
    texts = itertools.chain(*(texts for _, texts in questions))
    ladder = [re.escape(text).replace(r"\{\}", r"\w+") for text in texts]
    ladder += ["Where in the picture", "Reply", "Reason", "Locate"]
    for row in itertools.chain(seen, *told.values()):
        text = f"{row.question}\n{row.answer}"
        assert parse_boxes(row.answer) is None
        assert not re.search("[<>{}\\[\\]]", text)
        assert not re.search("|".join(ladder), text)


def test_the_bases_rooms_are_not_the_ladders():
    """Same seed, same split, same index: another room."""
    for split in scenes.SPLITS:
        pictures = {}
        for tasks in FILES:
            files = [make_files(0, split, index, tasks=tasks)[0] for index in range(3)]
            pictures[tasks] = set().union(*(file.values() for file in files))
        assert not pictures["ladder"] & pictures["base"]


def test_files_hold_the_rows_from_easy_to_hard(tmp_path):
    """One question each; told rows have no picture, and the level is not written."""
    scenes.write_rooms(tmp_path / "rooms", 8, 0, test_scenes=8, processes=1, tasks="base")
    for split, count in (("train", 8), ("val", 4), ("test", 8)):
        folder = tmp_path / "rooms" / split
        assert [path.name for path in folder.glob("*.jsonl")] == ["base_data.jsonl"]
        made = [make_files(0, split, index, tasks="base")[1]["base"] for index in range(count)]
        expected = sorted(itertools.chain(*made), key=lambda row: row.pop("level"))
        lines = (folder / "base_data.jsonl").read_text().splitlines()
        assert [json.loads(line) for line in lines] == expected
        assert all(set(row) == {"messages", "question_type"} for row in expected)

        samples = read_samples(folder / "base_data.jsonl", folder / "images")
        assert len(samples) > 50
        assert {len(sample.messages) for sample in samples} == {2}
        stages = []
        for sample in samples:
            task = sample.question_type.removeprefix("chat: ")
            if sample.media:
                stages.append(2)
            else:
                stages.append(0 if task in ("say", "choose") else 1)
        assert stages == sorted(stages) and {*stages} == {0, 1, 2}
