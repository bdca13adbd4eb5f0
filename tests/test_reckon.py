"""The steps of a chain of thought, read back from their words and done again by other routes."""

import itertools
import re
from collections import namedtuple
from decimal import ROUND_HALF_EVEN, Decimal

import numpy as np
import pytest

from rooms import reckon
from rooms.reckon import Fact

# ---------------------------------------------------------------------------------- the reader
# It knows only the words. test_talk.py and test_scenes.py read with it too.

# Of one step: two facts (name, numbers); toward: from the second to the first, right + back * 1j;
# rest: what is said after it.
Way = namedtuple("Way", "a b toward rest")
WAY = re.compile(
    r"(\w+) (\d+) (\d+) (\w+) (\d+) (\d+): (left|right) (\d+) (front|back) (\d+)(?:: (.*))?"
)
SIGNS = {"left": -1, "right": 1, "front": -1, "back": 1}
CORNERS = {
    (-1, -1): "left-front",
    (-1, 1): "left-back",
    (1, -1): "right-front",
    (1, 1): "right-back",
}


def read_facts(text):
    """
    >>> read_facts("lamp 33 45. sofa 3")
    [('lamp', (33, 45)), ('sofa', (3,))]
    """
    facts = []
    for sentence in text.split(". "):
        assert re.fullmatch(r"[a-z]+( \d+)+", sentence), sentence
        name, *numbers = sentence.split()
        facts.append((name, tuple(map(int, numbers))))
    return facts


def read_way(sentence):
    """One step with two places; the way that it states is their difference."""
    a, x, y, b, u, v, side, right, order, back, rest = WAY.fullmatch(sentence).groups()
    toward = complex(SIGNS[side] * int(right), SIGNS[order] * int(back))
    assert toward == complex(int(x), int(y)) - complex(int(u), int(v)), sentence
    assert "left 0" not in sentence and "front 0" not in sentence  # 0 has one word
    return Way((a, (int(x), int(y))), (b, (int(u), int(v))), toward, rest)


def read_units(rest, way):
    """'22 apart', which is the length of the way."""
    units = int(re.fullmatch(r"(\d+) apart", rest)[1])
    assert abs(units - abs(way.toward)) < 0.5
    return units


def read_hour(rest, way):
    """'at 3', which is the direction of the way, half an hour to either side."""
    hour = int(re.fullmatch(r"at (\d+)", rest)[1])
    assert 1 <= hour <= 12
    pointer = 1j * np.exp(-1j * np.radians(30 * hour))  # 12 is at the back, 3 to the right
    if way.toward:  # what stands at the same place is seen in no direction
        assert abs(np.angle(way.toward / pointer, deg=True)) <= 15 + 1e-9
    return hour


def rounded(value, digits):
    """Text of a decimal number; what lies in the middle goes to the even digit.

    >>> rounded(Decimal("2.25"), "0.1"), rounded(Decimal("27.5"), "1")
    ('2.2', '28')
    """
    return str(value.quantize(Decimal(digits), rounding=ROUND_HALF_EVEN))


def follow_compare(way):
    assert way.rest is None
    return [way.a, way.b], CORNERS.get((np.sign(way.toward.real), np.sign(way.toward.imag)))


def follow_apart(way):
    return [way.a, way.b], rounded(Decimal(read_units(way.rest, way)) / 4, "0.1")


def follow_nearest(*ways):
    (target,) = {way.b for way in ways}
    order = sorted((read_units(way.rest, way), way.a[0]) for way in ways)
    tie = len(order) > 1 and order[0][0] == order[1][0]
    return [target, *(way.a for way in ways)], None if tie else order[0][1]


def follow_turn(face, target):
    assert face.b == target.b
    rest, turned = re.fullmatch(r"(.*): turn (\d+)", target.rest).groups()
    hours = read_hour(rest, target) - read_hour(face.rest, face)
    turned = int(turned)
    assert 1 <= turned <= 12 and (turned - hours) % 12 == 0
    if turned == 12:
        result = None
    elif abs(turned - 6) <= 1:
        result = "back"
    else:
        result = "right" if turned < 6 else "left"
    return [face.b, face.a, target.a], result


def order_of(facts):
    """Names by their one number, None where two are the same."""
    numbers = [number for _, (number,) in facts]
    by_number = dict(zip(numbers, (name for name, _ in facts)))
    if len(by_number) == len(facts):
        return ", ".join(by_number[number] for number in range(100) if number in by_number)


BY_WAYS = {
    "compare": follow_compare,
    "apart": follow_apart,
    "nearest": follow_nearest,
    "turn": follow_turn,
}
BY_FACTS = {
    "say": lambda facts: "",
    "enter": lambda facts: "",
    "longest": lambda facts: str(sorted(facts[0][1])[-1]),
    "floor": lambda facts: rounded(Decimal(facts[0][1][0] * facts[0][1][1]) / 16, "1"),
    "total": lambda facts: str(len(facts)),
    "order": order_of,
}


def uncounted(steps):
    """Steps that count things, without the numbers, which go up from 1.

    >>> uncounted("1 bed 21 27. 2 bed 33 45")
    'bed 21 27. bed 33 45'
    """
    sentences = []
    for expected, sentence in enumerate(steps.split(". "), 1):
        number, fact = sentence.split(" ", 1)
        assert number == str(expected)
        sentences.append(fact)
    return ". ".join(sentences)


def follow(task, steps):
    """The facts that steps state, as the question names them, and the result that follows.

    Every step is checked against the words before it. The result is None where nothing is clear.

    >>> follow("compare", "lamp 33 45 bed 21 27: right 12 back 18")
    ([('lamp', (33, 45)), ('bed', (21, 27))], 'right-back')
    """
    if task in BY_WAYS:
        return BY_WAYS[task](*(read_way(step) for step in steps.split(". ")))
    facts = read_facts(uncounted(steps) if task == "total" else steps)
    return facts, BY_FACTS[task](facts)


def parted(task, chain):
    """(steps, result) of a chain: what stands after the last colon is the result.

    >>> parted("longest", "bed 100 160 80: 160"), parted("say", "lamp 33 45")
    (('bed 100 160 80', '160'), ('lamp 33 45', ''))
    """
    if task in ("say", "enter"):
        return chain, ""
    steps, _, result = chain.rpartition(": ")
    return steps, result


# ---------------------------------------------------------------------------------- worked examples


def facts_of(text):
    """The facts of a text, as the functions take them."""
    return [Fact(*fact) for fact in read_facts(text)]


@pytest.mark.parametrize(
    "task, told, steps, result",
    (
        ("say", "lamp 33 45", "lamp 33 45", ""),
        ("enter", "lamp 3. bed 1", "lamp 3. bed 1", ""),
        ("compare", "bed 1 7. lamp 3 9", "bed 1 7 lamp 3 9: left 2 front 2", "left-front"),
        ("compare", "bed 1 9. lamp 3 7", "bed 1 9 lamp 3 7: left 2 back 2", "left-back"),
        ("compare", "bed 4 7. lamp 3 9", "bed 4 7 lamp 3 9: right 1 front 2", "right-front"),
        ("compare", "bed 52 52. lamp 8 8", "bed 52 52 lamp 8 8: right 44 back 44", "right-back"),
        # 3 and 4 are 5; from one corner of the map to the other 44 times the root of 2 is 62.2.
        # A half rounds to the even digit: 1.25 to 1.2, 2.75 to 2.8.
        ("apart", "bin 3 1. bed 0 5", "bin 3 1 bed 0 5: right 3 front 4: 5 apart", "1.2"),
        ("apart", "bin 3 12. bed 3 1", "bin 3 12 bed 3 1: right 0 back 11: 11 apart", "2.8"),
        ("apart", "bin 3 1. bed 3 1", "bin 3 1 bed 3 1: right 0 back 0: 0 apart", "0.0"),
        ("apart", "bin 8 8. bed 52 52", "bin 8 8 bed 52 52: left 44 front 44: 62 apart", "15.5"),
        (
            "nearest",
            "sofa 30 30. bin 30 37. box 36 30",
            "bin 30 37 sofa 30 30: right 0 back 7: 7 apart. "
            "box 36 30 sofa 30 30: right 6 back 0: 6 apart",
            "box",
        ),
        # Two things far away may be equally far.
        (
            "nearest",
            "sofa 30 30. bin 33 34. box 30 35. bed 30 29",
            "bin 33 34 sofa 30 30: right 3 back 4: 5 apart. "
            "box 30 35 sofa 30 30: right 0 back 5: 5 apart. "
            "bed 30 29 sofa 30 30: right 0 front 1: 1 apart",
            "bed",
        ),
        # Facing right, what is at the back of the map is on the left.
        (
            "turn",
            "sofa 30 30. bin 35 30. box 30 35",
            "bin 35 30 sofa 30 30: right 5 back 0: at 3. "
            "box 30 35 sofa 30 30: right 0 back 5: at 12: turn 9",
            "left",
        ),
        # Facing the back of the map, what is at its front is behind.
        (
            "turn",
            "sofa 30 30. bin 30 35. box 30 25",
            "bin 30 35 sofa 30 30: right 0 back 5: at 12. "
            "box 30 25 sofa 30 30: right 0 front 5: at 6: turn 6",
            "back",
        ),
        # A direction right between two hours is at the even one.
        (
            "turn",
            "sofa 30 30. bin 35 35. box 35 25",
            "bin 35 35 sofa 30 30: right 5 back 5: at 2. "
            "box 35 25 sofa 30 30: right 5 front 5: at 4: turn 2",
            "right",
        ),
        (
            "turn",
            "sofa 30 30. bin 25 35. box 25 25",
            "bin 25 35 sofa 30 30: left 5 back 5: at 10. "
            "box 25 25 sofa 30 30: left 5 front 5: at 8: turn 10",
            "left",
        ),
        ("longest", "bed 100 160 80", "bed 100 160 80", "160"),
        ("longest", "box 240 30 30", "box 240 30 30", "240"),
        ("longest", "box 30 30 30", "box 30 30 30", "30"),
        # In square meters: 22.5, 23.625, 27.5, 9 and 64.
        ("floor", "room 18 20", "room 18 20", "22"),
        ("floor", "room 18 21", "room 18 21", "24"),
        ("floor", "room 20 22", "room 20 22", "28"),
        ("floor", "room 12 12", "room 12 12", "9"),
        ("floor", "room 32 32", "room 32 32", "64"),
        ("total", "bed 21 27", "1 bed 21 27", "1"),
        ("total", "bed 2 7. bed 2 8. bed 3 7", "1 bed 2 7. 2 bed 2 8. 3 bed 3 7", "3"),
        ("order", "bed 8. bin 1. box 4", "bed 8. bin 1. box 4", "bin, box, bed"),
    ),
)
def test_worked_examples(task, told, steps, result):
    """Computed by hand; the reader of these tests agrees."""
    function = reckon.say if task == "enter" else getattr(reckon, task)
    assert function(*facts_of(told)) == (steps, result)
    assert follow(task, steps) == (read_facts(told), result)


@pytest.mark.parametrize(
    "task, told",
    (
        ("compare", "lamp 33 45. bin 29 45"),  # the same distance ahead
        ("compare", "lamp 33 45. bin 33 44"),  # the same distance to the right
        ("compare", "lamp 33 45. bin 33 45"),
        ("nearest", "sofa 30 30. bin 33 34. box 30 35"),  # both are 5 apart
        ("nearest", "sofa 30 30. bin 33 34. bed 39 30. box 25 30"),
        ("nearest", "sofa 30 30. bin 31 32. box 32 30"),  # 2.2 and 2 are both called 2
        ("turn", "sofa 30 30. bin 30 35. box 30 39"),  # straight ahead
        ("turn", "sofa 30 30. bin 23 31. box 23 29"),  # both are at 9
        ("order", "bed 3. bin 1. box 3"),
        ("order", "bed 8. bin 8"),
    ),
)
def test_nothing_is_clear(task, told):
    """There are steps, and no result."""
    steps, result = getattr(reckon, task)(*facts_of(told))
    assert result is None
    assert follow(task, steps) == (read_facts(told), None)


def test_a_chain_ends_with_its_result():
    """A fact that is only said has none."""
    assert reckon.chain("room 18 21", "24") == "room 18 21: 24"
    assert reckon.chain("lamp 33 45. bed 21 27", "") == "lamp 33 45. bed 21 27"


# ---------------------------------------------------------------------------------- random facts

NAMES = ("bed", "bin", "box", "fan", "lamp", "sofa")
NUMBERS = {  # task -> how many facts, how many numbers of each, least and most number
    "say": ((1, 6), 2, (0, 60)),
    "compare": ((2, 2), 2, (20, 40)),
    "apart": ((2, 2), 2, (0, 60)),
    "nearest": ((3, 5), 2, (25, 35)),
    "turn": ((3, 3), 2, (20, 40)),
    "longest": ((1, 1), 3, (1, 40)),
    "floor": ((1, 1), 2, (1, 60)),
    "total": ((1, 6), 2, (0, 60)),
    "order": ((2, 4), 1, (1, 8)),
}


def some_facts(rng, counts, size, ends):
    """Random facts of different names; no two have the same numbers, except in an order."""
    count = rng.integers(counts[0], counts[1] + 1)
    while True:
        numbers = rng.integers(ends[0], ends[1] + 1, (count, size)).tolist()
        if size == 1 or len({*map(tuple, numbers)}) == count:
            return [Fact(name, tuple(some)) for name, some in zip(NAMES, numbers)]


@pytest.mark.parametrize("task", NUMBERS)
def test_random_facts(task):
    """200 of each: the steps state the facts, every step follows, and so does the result."""
    rng = np.random.default_rng(0)
    results = set()
    for _ in range(200):
        facts = some_facts(rng, *NUMBERS[task])
        steps, result = getattr(reckon, task)(*facts)
        assert follow(task, steps) == ([tuple(fact) for fact in facts], result)
        if result is not None:
            assert parted(task, reckon.chain(steps, result)) == (steps, result)
        results.add(result)
    if task in ("compare", "nearest", "turn", "order"):
        assert None in results
    if task in ("compare", "turn"):
        assert results == {None, *(reckon.SIDES if task == "compare" else reckon.TURNS)}


def ways_around(reach):
    """(right + back * 1j, the fact of a place there, the fact of the middle) of all places near."""
    for x, y in itertools.product(range(-reach, reach + 1), repeat=2):
        if x or y:
            yield complex(x, y), Fact("bin", (30 + x, 30 + y)), Fact("sofa", (30, 30))


def test_hours_around_the_clock():
    """Of twelve pointers that of the hour is the nearest."""
    pointers = {hour: 1j * np.exp(-1j * np.pi * hour / 6) for hour in range(1, 13)}
    met = set()
    for way, there, here in ways_around(10):
        hour = reckon.hour(there, here)
        along = {other: (way * pointers[other].conjugate()).real for other in pointers}
        assert along[hour] == pytest.approx(max(along.values()))
        met.add(hour)
    assert met == {*pointers}


def test_units_are_rounded_lengths():
    """By the square of the length, in whole numbers."""
    for way, there, here in ways_around(20):
        units = reckon.units_apart(there, here)
        square = int(way.real**2 + way.imag**2)
        assert (2 * units - 1) ** 2 < 4 * square < (2 * units + 1) ** 2


def test_places_on_the_map():
    """A quarter of a meter is a unit, the camera stands at 30 30; half a unit is lost at most."""
    assert reckon.on_map(0, 0) == (30, 30)
    assert reckon.on_map(-5.5, 5.5) == (8, 52)
    rng = np.random.default_rng(0)
    for right, ahead in rng.uniform(-6, 6, (200, 2)):
        exact = 4 * complex(right, ahead) + (30 + 30j)
        lost = complex(*reckon.on_map(right, ahead)) - exact
        assert max(abs(lost.real), abs(lost.imag)) <= 0.5
