"""What the base learns before the ladder: plain talk about rooms that the ladder never shows.

    python -m rooms.scenes --tasks base --out runs/base/rooms --scenes 16000 --test-scenes 400 \\
        --seed 1 --view-categories 3 5
    python train_sft.py --stage base

A row is one question: reading a picture, naming, counting, saying where things are, how large and
how far apart they are, describing views and frames, sums of what the question tells, and words to
say again. None of it is in the ladder's formats: no JSON boxes, none of its questions or options,
no <think> and <answer>.

Places in a picture are pixels (across, down). Places on the floor are decimeters right or left of
the first camera and ahead of it or behind it. Where an answer can be worked out, half of the
answers state the steps first.
"""

import math
from collections import namedtuple
from string import ascii_uppercase

import numpy as np

from rooms.render import FURNITURE, ground, shuffled

BLOCK = 28  # pixels: pictures are read in blocks of this side, a merged patch of the vision encoder
MANY = 3  # things that one answer speaks of, at most
SIDES = ("left", "right", "front", "back", "left-front", "left-back", "right-front", "right-back")
QUESTIONS = {"": 6, "view": 14, "frame": 20}  # about one picture, about views, about frames

# What a row is about: a room, and Sights by picture and thing. word: what a picture is called ("",
# "view", "frame"). names, and places (right, ahead) in decimeters from `camera`, of all things.
# first: {thing: number from 1 of the first picture that shows it clearly}. named: the things that a
# question may name: clear in some picture, the only ones of their category in the room.
World = namedtuple("World", "room sights word camera names places first named")


def make_world(room, sights, word, camera):
    """The World of some pictures of a room. camera: the first picture's."""
    names = [thing.name for thing in room.things]
    places = [ground(camera, thing.center) for thing in room.things]
    places = np.rint(10 * np.array(places)).astype(int).tolist()
    first = {}
    for number, picture in enumerate(sights, 1):
        for k, sight in enumerate(picture):
            if sight.clear:
                first.setdefault(k, number)
    named = [k for k in sorted(first) if names.count(names[k]) == 1]
    return World(room, sights, word, camera, names, places, first, named)


# ---------------------------------------------------------------------------------- the scene


def seen(world):
    """The most things that one of the pictures shows."""
    return max(sum(sight.box is not None for sight in picture) for picture in world.sights)


def in_order(things, sights):
    """The things from left to right in a picture."""
    return sorted(things, key=lambda k: sights[k].box)


def clear_kinds(world):
    """{category: things from left to right} of the first picture, if it shows them all clearly."""
    sights = world.sights[0]
    kinds = {}
    for k in in_order([k for k, sight in enumerate(sights) if sight.box], sights):
        kinds.setdefault(world.names[k], []).append(k)
    return {
        kind: things
        for kind, things in sorted(kinds.items())
        if all(sights[k].clear for k in things)
    }


def clear_groups(world):
    """{category: things by first picture} of the whole room, if each is clear in some picture."""
    groups = {}
    for kind in sorted(set(world.names)):
        things = [k for k, name in enumerate(world.names) if name == kind]
        if all(k in world.first for k in things):
            groups[kind] = sorted(things, key=world.first.get)
    return groups


def some(rng, items, least=1):
    """A few of the items in any order."""
    return shuffled(rng, items)[: rng.integers(least, MANY + 1)]


def few(rng, world, count):
    """That many of the things that may be named, in any order; None if there are fewer."""
    if len(world.named) >= count:
        return shuffled(rng, world.named)[:count]


# ---------------------------------------------------------------------------------- phrases


def listed(words):
    """
    >>> listed(["a"]), listed(["a", "b", "c"])
    ('a', 'a, b and c')
    """
    *others, last = words
    return f"{', '.join(others)} and {last}" if others else last


def names(world, things):
    """The things' categories."""
    return [world.names[k] for k in things]


def places(world, things):
    """Their places on the floor."""
    return [world.places[k] for k in things]


def where(world, k):
    """The picture that first shows a thing clearly, if there are several."""
    return f" in {world.word} {world.first[k]}" if world.word else ""


def way(number, below, above):
    """A number with its direction.

    >>> way(-3, "left", "right")
    'left 3'
    """
    return f"{below if number < 0 else above} {abs(round(number))}"


def at(x, y):
    """A place on the floor.

    >>> at(-3, 22), at(0, -1)
    ('left 3 ahead 22', 'right 0 behind 1')
    """
    return f"{way(x, 'left', 'right')} {way(y, 'behind', 'ahead')}"


def differ(a, b):
    """Where a is, seen from b: front is nearer to the camera.

    >>> differ((-3, 22), (-13, 31))
    'right 10 front 9'
    """
    return f"{way(a[0] - b[0], 'left', 'right')} {way(a[1] - b[1], 'front', 'back')}"


def turn_angle(a, b, c):
    """Degrees in (-180, 180] to turn to the left at a, from facing b to facing c.

    >>> turn_angle((0, 0), (0, 1), (-2, 0))
    90.0
    """
    turn = math.degrees(math.atan2(c[1] - a[1], c[0] - a[0]) - math.atan2(b[1] - a[1], b[0] - a[0]))
    return 180 - (180 - turn) % 360


def turned(a, b, c):
    """The same in words.

    >>> turned((0, 0), (0, 1), (-2, 0))
    'left 90'
    """
    return way(-turn_angle(a, b, c), "left", "right")


def area(width, depth):
    """Square meters of a floor with sides in decimeters.

    >>> area(76, 80)
    '60.8'
    """
    return f"{width * depth / 100:.1f}"


def sides_of(lengths, unit):
    """Lengths in meters as whole units.

    >>> sides_of(np.array([0.5, 1.26]), 10)
    [5, 13]
    """
    return [round(unit * length) for length in lengths.tolist()]


def stated(world, things):
    """Where each is first clear: the picture, the ends in it, the place on the floor."""
    sentences = []
    for k in things:
        x0, y0, x1, y1 = world.sights[world.first[k] - 1][k].box
        what = f"{world.names[k]}{where(world, k)}"
        sentences.append(f"The {what} from {x0} {y0} to {x1} {y1}, {at(*world.places[k])}.")
    return " ".join(sentences)


def worked(rng, steps, result, more=""):
    """The result at once, with `more`, or after the steps to it."""
    return f"{steps}: {result}." if rng.random() < 0.5 else f"{result}{more}."


# ---------------------------------------------------------------------------------- one picture
# A task takes (rng, world, ids) and returns (question, answer), or None where the world allows no
# clear answer. ids (pictures, size, size): number + 1 of the thing that a pixel shows, 0: none.


def read(rng, world, ids):
    """Block by block: the category that covers most of it, if it covers an eighth."""
    count = len(ids[0]) // BLOCK
    blocks = ids[0].reshape(count, BLOCK, count, BLOCK).swapaxes(1, 2)
    lines = []
    for line in blocks.reshape(count, count, -1):
        words = []
        for block in line:
            areas = np.bincount(block, minlength=2)[1:]
            enough = areas.max() >= len(block) / 8
            words.append(world.names[areas.argmax()] if enough else "nothing")
        lines.append(" ".join(words) + ".")
    return "Read the picture.", " ".join(lines)


def look(rng, world, ids):
    """What some pixels show; nearly always a thing."""
    show = np.argwhere(ids[0] > 0)
    if len(show) == 0:
        return None
    spots = []
    shown = []
    for y, x in show[rng.integers(len(show), size=MANY)]:
        if rng.random() < 0.2:
            y, x = rng.integers(len(ids[0]), size=2)
        thing = ids[0][y, x]
        spots.append(f"{x} {y}")
        shown.append(f"the {world.names[thing - 1]}" if thing else "nothing")
    return f"What is at {listed(spots)}?", f"There is {listed(shown)}."


def count(rng, world, ids):
    """How many there are of each category."""
    if kinds := clear_kinds(world):
        numbers = [
            f"{len(things)} {kind}" + ("s" if len(things) > 1 else "")
            for kind, things in kinds.items()
        ]
        return "Count what you see.", f"I see {listed(numbers)}."


def reach(rng, world, ids):
    """The left, upper, right and lower end of everything of some categories, before the name."""
    if kinds := clear_kinds(world):
        chosen = some(rng, [*kinds])
        sentences = []
        for kind in chosen:
            for k in kinds[kind]:
                box = world.sights[0][k].box
                sentences.append("From {} {} to {} {} reaches the {}.".format(*box, kind))
        return f"How far does every {listed(chosen)} reach?", " ".join(sentences)


# ---------------------------------------------------------------- one picture, views and frames


def show(rng, world, ids):
    """Everything about some things, see `stated`."""
    if world.named:
        things = some(rng, world.named)
        return f"Show the {listed(names(world, things))}.", stated(world, things)


def place(rng, world, ids):
    """Places on the floor."""
    if world.named:
        things = some(rng, world.named)
        sentences = [f"The {world.names[k]} is {at(*world.places[k])}." for k in things]
        return f"Tell how far off: {listed(names(world, things))}.", " ".join(sentences)


def measure(rng, world, ids):
    """Width, depth and height in centimeters."""
    if things := few(rng, world, 1):
        sides = sides_of(world.room.things[things[0]].dims, 100)
        steps = "{} by {} by {}".format(*sides)
        answer = worked(rng, steps, f"{max(sides)} at the most", f": {steps}")
        return f"Measure the {world.names[things[0]]}.", answer


def compare(rng, world, ids):
    """Where one thing is, seen from another."""
    if things := few(rng, world, 2):
        a, b = places(world, things)
        answer = worked(rng, f"from {at(*a)} to {at(*b)}", f"it is {differ(a, b)}")
        return "Compare the {} to the {}.".format(*names(world, things)), answer


def gap(rng, world, ids):
    """Decimeters between the middles, meters of free floor."""
    if things := few(rng, world, 2):
        a, b = places(world, things)
        steps = f"from {at(*a)} to {at(*b)}, {round(math.dist(a, b))} apart"
        answer = worked(rng, steps, f"{world.room.gaps[*things]:.1f} meters")
        return "How much floor is free from the {} to the {}?".format(*names(world, things)), answer


def near(rng, world, ids):
    """The way from one thing past the others, in decimeters of free floor."""
    things = few(rng, world, min(len(world.named), 4))
    if len(things) > 2:
        k, *others = things
        gaps = world.room.gaps[k]
        others.sort(key=gaps.__getitem__)
        past = ", ".join(f"{world.names[other]} {round(10 * gaps[other])}" for other in others)
        return f"Go away from the {world.names[k]}.", f"Past {past}."


# ---------------------------------------------------------------------------------- many pictures


def turn(rng, world, ids):
    """Degrees from one thing to another, standing at a third."""
    if things := few(rng, world, 3):
        spots = places(world, things)
        steps = f"from {listed([at(*spot) for spot in spots])}"
        answer = worked(rng, steps, f"turn {turned(*spots)}")
        return "At the {}, turn from the {} to the {}.".format(*names(world, things)), answer


def describe(rng, world, ids):
    """What each picture shows clearly, from left to right."""
    sentences = []
    for number, sights in enumerate(world.sights, 1):
        clear = in_order([k for k, sight in enumerate(sights) if sight.clear], sights)
        words = " ".join(names(world, clear)) or "nothing"
        sentences.append(f"{world.word} {number}: {words}.")
    return "Describe what you see.", " ".join(sentences)


def enter(rng, world, ids):
    """Which picture first shows each of some things clearly."""
    if world.named:
        things = some(rng, world.named, 2)
        order = sorted(sorted(things), key=world.first.get)
        sentences = [f"{world.names[k]}{where(world, k)}." for k in order]
        return f"When do you see {listed(names(world, things))}?", " ".join(sentences)


def total(rng, world, ids):
    """Things of a category in the whole room; of those of which there are several, if any."""
    if groups := clear_groups(world):
        several = [kind for kind, things in groups.items() if len(things) > 1] or [*groups]
        kind = several[rng.integers(len(several))]
        steps = ", ".join(f"{at(*world.places[k])}{where(world, k)}" for k in groups[kind])
        answer = worked(rng, f"from {steps}", f"it holds {len(groups[kind])}")
        return f"Count every {kind} of the whole room.", answer


def pace(rng, world, ids):
    """The walls' lengths in decimeters, square meters."""
    w, d = sides_of(world.room.sides, 10)
    return "Pace out the room.", worked(rng, f"{w} by {d}", f"{area(w, d)} in all", f": {w} by {d}")


# ---------------------------------------------------------------------------------- no picture


def spot(rng):
    """A place on the floor: most are ahead, in the camera's field of view."""
    x, y = rng.uniform(-0.6, 0.6), rng.uniform(8, 45)
    if rng.random() < 0.6:
        return round(x * y), round(y)
    return rng.integers(-45, 46, size=2).tolist()


def sums(rng, world, ids):
    """What follows from places, walls and numbers that the question tells."""
    a, b, c = (spot(rng) for _ in range(3))
    kind = rng.integers(6)
    if kind == 0:
        return f"Compare {at(*a)} to {at(*b)}.", f"It is {differ(a, b)}."
    if kind == 1:
        return f"How far is {at(*a)} from {at(*b)}?", f"{round(math.dist(a, b))} apart."
    if kind == 2:
        return f"At {at(*a)}, turn from {at(*b)} to {at(*c)}.", f"Turn {turned(a, b, c)}."
    if kind == 3:
        w, d = rng.integers(28, 96, size=2)
        return f"Pace out {w} by {d}.", f"{area(w, d)} in all."
    words = some(rng, [*FURNITURE], 2)
    most = 8 if kind == 4 else 49
    numbers = rng.choice(np.arange(1, most + 1), size=len(words), replace=False)
    pairs = ", ".join(f"{word} {number}" for word, number in zip(words, numbers))
    order = [words[i] for i in numbers.argsort()]
    if kind == 4:
        return f"In which order are {pairs}?", f"{', '.join(order)}."
    return f"Least of {pairs}?", f"{order[0]}."


def recall(rng, world, ids):
    """Words are told with letters; the letter of each is asked for again, in another order."""
    words = shuffled(rng, [*FURNITURE, *SIDES])[: rng.integers(2, 9)]
    pairs = [*zip(shuffled(rng, ascii_uppercase), words)]
    told = ", ".join(f"{letter} {word}" for letter, word in pairs)
    pairs = shuffled(rng, pairs)
    order = ", ".join(word for _, word in pairs)
    answer = ", ".join(f"{word} {letter}" for letter, word in pairs)
    return f"Told {told}, say {order}.", f"Told {answer}."


# ---------------------------------------------------------------------------------- rows

TASKS = {  # how often each is tried of one picture, of views, of frames; few pictures show pairs
    read: (1, 0, 0),
    look: (1, 0, 0),
    count: (1, 0, 0),
    reach: (2, 0, 0),
    describe: (0, 1, 1),
    enter: (0, 2, 5),
    total: (0, 3, 2),
    show: (2, 4, 4),
    place: (1, 1, 1),
    measure: (1, 1, 2),
    compare: (9, 4, 0),
    gap: (9, 4, 3),
    near: (6, 3, 3),
    turn: (0, 4, 3),
    pace: (0, 1, 1),
}
TOLD = (sums, recall)  # about no picture, once with each part of a room


def level(world, task):
    """Order of learning: recall, one picture, what follows from it or is told, several pictures."""
    if task == "recall":
        return 0
    if world.word and task != "sums":
        return 3
    return 2 if task in ("compare", "gap", "near", "sums") else 1


def talk(rng, world, ids):
    """[(task's name, question, answer)]: some tasks in any order, none twice in the same words."""
    column = [*QUESTIONS].index(world.word)
    tasks = []
    for task, times in TASKS.items():
        tasks += times[column] * [task]
    turns = {}
    for task in shuffled(rng, tasks):
        turn = task(rng, world, ids)
        if turn:
            turns.setdefault(turn[0], (task.__name__, *turn))
    return [*turns.values()][: QUESTIONS[world.word]]


def base_rows(rng, world, images, ids):
    """Rows of chat messages: questions about some pictures, and some about no picture."""
    media = [{"type": "image", "image": path} for path in images]
    if world.word == "frame":
        media = [{"type": "video", "video": images if len(images) > 1 else images[0]}]
    turns = []
    if seen(world):
        turns = [(media, *turn) for turn in talk(rng, world, ids)]
    turns += [([], task.__name__, *task(rng, world, ids)) for task in TOLD]
    rows = []
    for parts, task, question, answer in turns:
        content = [*parts, {"type": "text", "text": question}]
        rows.append(
            {
                "messages": [
                    {"role": "user", "content": content},
                    {"role": "assistant", "content": answer},
                ],
                "question_type": task,
                "level": (level(world, task), seen(world)),
            }
        )
    return rows
