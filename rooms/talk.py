"""What the base learns before the ladder begins: plain talk about rooms that the ladder never shows.

    python -m rooms.scenes --tasks base --out runs/base/rooms --scenes 16000 --test-scenes 400 --seed 1 --view-categories 3 5
    python train_sft.py --stage base

Reading a picture, naming, counting, saying where things are, how large and how far apart, comparing two of them, short
descriptions of several views and of frames, sums of what is told, and what is told said again. None of it in the
ladder's formats: no JSON boxes, none of its questions or options, no <think> and <answer>. A row is one question: in a
chat of several what is asked later can be copied from what was said, and is never looked for.

Places in a picture are pixels (across, down), those on the floor decimeters right or left and ahead of the first camera,
or behind it. Half of what can be worked out is said with what it is worked out from, the other half at once.

Each task takes (rng, world, ids) and returns (question, answer), or None where the world allows no clear answer.
ids (pictures, size, size): number + 1 of the thing that each pixel shows, 0 for none; see rooms.render.
"""

import itertools
import math
from string import ascii_uppercase

import numpy as np

from rooms.render import FURNITURE

BLOCK = 28  # pixels: pictures are read in blocks of this side, a merged patch of the vision encoder
MANY = 3  # things that one answer speaks of, at most
SIDES = ("left", "right", "front", "back", "left-front", "left-back", "right-front", "right-back")
QUESTIONS = {"": 6, "view": 14, "frame": 20}  # about one picture, about views, about frames


def listed(words):
    """
    >>> listed(["a"]), listed(["a", "b", "c"])
    ('a', 'a, b and c')
    """
    return " and ".join(filter(None, (", ".join(words[:-1]), words[-1])))


def name(world, k):
    return world.room.things[k].name


def kinds(world):
    """Categories in the first picture all of whose things in it are clear: {category: things from left to right}."""
    seen = sorted(
        (k for k, one in enumerate(world.sights[0]) if one.box),
        key=lambda k: world.sights[0][k].box,
    )
    unclear = {name(world, k) for k in seen if not world.sights[0][k].clear}
    return {
        kind: [k for k in seen if name(world, k) == kind]
        for kind in sorted({name(world, k) for k in seen} - unclear)
    }


def groups(world):
    """Things of every category that is clear as a whole, by where each is first clear: {category: things}."""
    made = {}
    for k, thing in enumerate(world.room.things):
        made.setdefault(thing.name, []).append(k)
    return {
        kind: sorted(things, key=lambda k: (world.first[k], k))
        for kind, things in sorted(made.items())
        if all(k in world.first for k in things)
    }


def some(rng, items, least=1):
    """A few of the items in any order."""
    return [items[i] for i in rng.permutation(len(items))[: rng.integers(least, MANY + 1)]]


def few(rng, world, count):
    """That many of the things that may be named, in any order; None where there are not so many."""
    if len(world.named) >= count:
        return [world.named[i] for i in rng.permutation(len(world.named))[:count]]


def names(world, things):
    return [name(world, k) for k in things]


def where(world, k):
    """The picture that first shows a thing clearly, if there are several."""
    return f" in {world.word} {world.first[k]}" if world.word else ""


def at(x, y):
    """
    >>> at(-3, 22), at(0, -1)
    ('left 3 ahead 22', 'right 0 behind 1')
    """
    return f"{'left' if x < 0 else 'right'} {abs(x)} {'behind' if y < 0 else 'ahead'} {abs(y)}"


def differ(a, b):
    """Where a is, seen from b: front is nearer to the camera.

    >>> differ((-3, 22), (-13, 31))
    'right 10 front 9'
    """
    x, y = a[0] - b[0], a[1] - b[1]
    return f"{'left' if x < 0 else 'right'} {abs(x)} {'front' if y < 0 else 'back'} {abs(y)}"


def turn_angle(a, b, c):
    """Degrees in (-180, 180] to turn to the left at a, from facing b to facing c.

    >>> turn_angle((0, 0), (0, 1), (-2, 0))
    90.0
    """
    turn = math.degrees(math.atan2(c[1] - a[1], c[0] - a[0]) - math.atan2(b[1] - a[1], b[0] - a[0]))
    return 180 - (180 - turn) % 360


def turned(a, b, c):
    """
    >>> turned((0, 0), (0, 1), (-2, 0))
    'left 90'
    """
    turn = turn_angle(a, b, c)
    return f"{'left' if turn > 0 else 'right'} {abs(round(turn))}"


def area(width, depth):
    """Square meters of walls in decimeters.

    >>> area(76, 80)
    '60.8'
    """
    return f"{width * depth / 100:.1f}"


def worked(rng, steps, result, more=""):
    """The result at once, with `more`, or after the steps to it."""
    return f"{steps}: {result}." if rng.random() < 0.5 else f"{result}{more}."


def places(world, things):
    return [world.places[k].tolist() for k in things]


# ---------------------------------------------------------------------------------------------------- one picture
def read(rng, world, ids):
    """Block by block: the category that covers most of it, if it covers an eighth."""
    blocks = len(ids[0]) // BLOCK
    lines = []
    for row, column in itertools.product(range(blocks), repeat=2):
        block = ids[0][BLOCK * row :, BLOCK * column :][:BLOCK, :BLOCK]
        areas = np.bincount(block.ravel(), minlength=2)[1:]
        lines.append(name(world, areas.argmax()) if areas.max() >= BLOCK * BLOCK / 8 else "nothing")
    return "Read the picture.", ". ".join(
        " ".join(lines[i : i + blocks]) for i in range(0, len(lines), blocks)
    ) + "."


def look(rng, world, ids):
    """What some pixels show; nearly always a thing."""
    show = np.argwhere(ids[0] > 0)
    if len(show):
        said = []
        for y, x in show[rng.integers(len(show), size=MANY)].tolist():
            if rng.random() < 0.2:
                y, x = rng.integers(len(ids[0]), size=2).tolist()
            thing = int(ids[0][y, x])
            said.append((f"{x} {y}", "the " + name(world, thing - 1) if thing else "nothing"))
        spots, shown = zip(*said)
        return f"What is at {listed(spots)}?", f"There is {listed(shown)}."


def count(rng, world, ids):
    if all_kinds := kinds(world):
        return "Count what you see.", "I see " + listed(
            [f"{len(k)} {kind}{'s' * (len(k) != 1)}" for kind, k in all_kinds.items()]
        ) + "."


def reach(rng, world, ids):
    """The left, upper, right and lower end of everything of some categories, before the name."""
    if all_kinds := kinds(world):
        chosen = some(rng, [*all_kinds])
        return f"How far does every {listed(chosen)} reach?", " ".join(
            "From {} {} to {} {} reaches the {}.".format(*world.sights[0][k].box, kind)
            for kind in chosen
            for k in all_kinds[kind]
        )


# ------------------------------------------------------------------------------- one picture, views and frames
def stated(world, things):
    """Where each is first clear: the picture, the ends in it, the place on the floor."""
    return " ".join(
        "The {}{} from {} {} to {} {}, {}.".format(
            name(world, k), where(world, k), *world.sights[world.first[k] - 1][k].box, at(*place)
        )
        for k, place in zip(things, places(world, things))
    )


def show(rng, world, ids):
    if world.named:
        things = some(rng, world.named)
        return f"Show the {listed(names(world, things))}.", stated(world, things)


def place(rng, world, ids):
    if world.named:
        things = some(rng, world.named)
        return f"Tell how far off: {listed(names(world, things))}.", " ".join(
            f"The {name(world, k)} is {at(*place)}."
            for k, place in zip(things, places(world, things))
        )


def measure(rng, world, ids):
    """Centimeters."""
    if things := few(rng, world, 1):
        w, d, h = (round(100 * v) for v in world.room.things[things[0]].dims.tolist())
        sides = f"{w} by {d} by {h}"
        return f"Measure the {name(world, things[0])}.", worked(
            rng, sides, f"{max(w, d, h)} at the most", f": {sides}"
        )


def compare(rng, world, ids):
    if things := few(rng, world, 2):
        a, b = places(world, things)
        return "Compare the {} to the {}.".format(*names(world, things)), worked(
            rng, f"from {at(*a)} to {at(*b)}", f"it is {differ(a, b)}"
        )


def gap(rng, world, ids):
    """Decimeters between the middles, meters of free floor."""
    if things := few(rng, world, 2):
        a, b = places(world, things)
        free = world.room.gaps[things[0], things[1]]
        return "How much floor is free from the {} to the {}?".format(
            *names(world, things)
        ), worked(
            rng, f"from {at(*a)} to {at(*b)}, {round(math.dist(a, b))} apart", f"{free:.1f} meters"
        )


def near(rng, world, ids):
    """The way from one thing past the others, in decimeters of free floor."""
    if things := few(rng, world, min(len(world.named), 4)):
        k, *others = things
        if len(others) > 1:
            gaps = world.room.gaps[k]
            others.sort(key=lambda other: gaps[other])
            return (
                f"Go away from the {name(world, k)}.",
                "Past "
                + ", ".join(f"{name(world, other)} {round(10 * gaps[other])}" for other in others)
                + ".",
            )


# -------------------------------------------------------------------------------------------- views and frames
def turn(rng, world, ids):
    if things := few(rng, world, 3):
        spots = places(world, things)
        return "At the {}, turn from the {} to the {}.".format(*names(world, things)), worked(
            rng, f"from {listed([at(*spot) for spot in spots])}", f"turn {turned(*spots)}"
        )


def describe(rng, world, ids):
    """What each picture shows clearly, from left to right."""
    said = []
    for number, sights in enumerate(world.sights, 1):
        seen = sorted((k for k, one in enumerate(sights) if one.clear), key=lambda k: sights[k].box)
        said.append(f"{world.word} {number}: {' '.join(names(world, seen)) or 'nothing'}.")
    return "Describe what you see.", " ".join(said)


def enter(rng, world, ids):
    """Which picture first shows each of some things clearly."""
    if world.named:
        things = some(rng, world.named, 2)
        seen = sorted(things, key=lambda k: (world.first[k], k))
        return f"When do you see {listed(names(world, things))}?", " ".join(
            f"{name(world, k)}{where(world, k)}." for k in seen
        )


def total(rng, world, ids):
    """Things of a category in the whole room; of those of which there is more than one, if any."""
    if clear := groups(world):
        several = [kind for kind, things in clear.items() if len(things) > 1] or [*clear]
        kind = several[rng.integers(len(several))]
        things = clear[kind]
        steps = ", ".join(
            f"{at(*spot)}{where(world, k)}" for k, spot in zip(things, places(world, things))
        )
        return f"Count every {kind} of the whole room.", worked(
            rng, f"from {steps}", f"it holds {len(things)}"
        )


def pace(rng, world, ids):
    w, d = (round(10 * v) for v in world.room.sides)
    sides = f"{w} by {d}"
    return "Pace out the room.", worked(rng, sides, f"{area(w, d)} in all", f": {sides}")


# ------------------------------------------------------------------------------------------------ without pictures
def spot(rng):
    """A place on the floor: most are ahead, in the camera's field of view."""
    x, y = rng.uniform(-0.6, 0.6), rng.uniform(8, 45)
    return (
        (round(x * y), round(y))
        if rng.random() < 0.6
        else tuple(rng.integers(-45, 46, size=2).tolist())
    )


def sums(rng, world, ids):
    """What follows from places, walls, distances and times that are told: the steps of the tasks above, one by one."""
    a, b, c = (spot(rng) for _ in range(3))
    kind = int(rng.integers(6))
    if kind == 0:
        return f"Compare {at(*a)} to {at(*b)}.", f"It is {differ(a, b)}."
    if kind == 1:
        return f"How far is {at(*a)} from {at(*b)}?", f"{round(math.dist(a, b))} apart."
    if kind == 2:
        return f"At {at(*a)}, turn from {at(*b)} to {at(*c)}.", f"Turn {turned(a, b, c)}."
    if kind == 3:
        w, d = rng.integers(28, 96, size=2).tolist()
        return f"Pace out {w} by {d}.", f"{area(w, d)} in all."
    told = some(rng, [*FURNITURE], 2)
    numbers = rng.choice(
        np.arange(1, 9 if kind == 4 else 50), size=len(told), replace=False
    ).tolist()
    pairs, ordered = (
        ", ".join(f"{word} {n}" for word, n in zip(told, numbers)),
        [told[i] for i in np.argsort(numbers)],
    )
    return (
        (f"In which order are {pairs}?", f"{', '.join(ordered)}.")
        if kind == 4
        else (f"Least of {pairs}?", f"{ordered[0]}.")
    )


def recall(rng, world, ids):
    """Words are told by letters, and the letter of each is asked for again, in another order."""
    words = rng.permutation([*FURNITURE, *SIDES]).tolist()[: rng.integers(2, 9)]
    pairs = [*zip(rng.permutation([*ascii_uppercase]).tolist(), words)]
    told, asked = (
        ", ".join(f"{letter} {word}" for letter, word in pairs),
        [pairs[i] for i in rng.permutation(len(pairs))],
    )
    return (
        f"Told {told}, say {', '.join(word for _, word in asked)}.",
        f"Told {', '.join(f'{word} {letter}' for letter, word in asked)}.",
    )


TASKS = {  # what a picture is called -> its tasks and how often each is tried; pairs are found in few pictures
    "": {
        read: 1,
        look: 1,
        count: 1,
        reach: 2,
        show: 2,
        place: 1,
        measure: 1,
        compare: 9,
        gap: 9,
        near: 6,
    },
    "view": {
        describe: 1,
        enter: 2,
        total: 3,
        show: 4,
        place: 1,
        measure: 1,
        compare: 4,
        gap: 4,
        near: 3,
        turn: 4,
        pace: 1,
    },
    "frame": {
        describe: 1,
        enter: 5,
        total: 2,
        show: 4,
        place: 1,
        measure: 2,
        gap: 3,
        near: 3,
        turn: 3,
        pace: 1,
    },
}
TOLD = (sums, recall)  # about no picture, once with each part of a room


def level(world, task):
    """Order of learning: recall, what one picture shows, what follows from that or from what is told, several pictures."""
    return {"recall": 0, "sums": 2}.get(
        task, 3 if world.word else 1 + (task in ("compare", "gap", "near"))
    )


def talk(rng, world, ids):
    """[(task's name, question, answer)]: some tasks in any order, the same one twice if not in the same words."""
    made, tasks = {}, [task for task, times in TASKS[world.word].items() for _ in range(times)]
    for i in rng.permutation(len(tasks)):
        task = tasks[i]
        if said := task(rng, world, ids):
            made.setdefault(said[0], (task.__name__, *said))
    return [*made.values()][: QUESTIONS[world.word]]
