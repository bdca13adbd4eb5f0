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
from collections import Counter, namedtuple
from operator import attrgetter
from string import ascii_uppercase

import numpy as np

from rooms.render import FURNITURE, ground, shuffled

BLOCK = 28  # pixels: pictures are read in blocks of this side, a merged patch of the vision encoder
MANY = 3  # things that one answer speaks of, at most
SIDES = ("left", "right", "front", "back", "left-front", "left-back", "right-front", "right-back")
QUESTIONS = {"": 6, "view": 14, "frame": 20}  # about one picture, about views, about frames

# One thing. number: in the room. place: (right, ahead) in decimeters from a camera; at: the same in
# words. seen, first: number from 1 of the first picture that shows any of it, and of the first that
# shows it clearly, or 0; where: the latter in words, if there are several pictures; box: in it.
Item = namedtuple("Item", "number name center dims place at seen first where box")
# What a row is about: some pictures of a room. sights: by picture and thing; ids: (size, size) of
# each picture, the number + 1 of the thing that a pixel shows, 0 for none. word: what a picture is
# called ("", "view", "frame"). camera: the first picture's. items: all things. named: those that a
# question may name, being clear in some picture and the only ones of their category.
World = namedtuple("World", "room sights ids word camera items named")


def make_item(number, thing, sights, word, camera):
    """An Item from its Sights, one for each picture."""
    right, ahead = ground(camera, thing.center)
    place = (round(10 * right), round(10 * ahead))
    seen = number_of_first([sight.box is not None for sight in sights])
    first = number_of_first([sight.clear for sight in sights])
    box = sights[first - 1].box if first else None
    where = f" in {word} {first}" if word else ""
    names = (number, thing.name, thing.center, thing.dims)
    return Item(*names, place, at(*place), seen, first, where, box)


def number_of_first(flags):
    """
    >>> number_of_first([False, True, True]), number_of_first([False])
    (2, 0)
    """
    return flags.index(True) + 1 if any(flags) else 0


def make_world(room, sights, ids, word, camera):
    """The World of some pictures of a room. camera: the first picture's."""
    items = []
    for number, (thing, *of_thing) in enumerate(zip(room.things, *sights)):
        items.append(make_item(number, thing, of_thing, word, camera))
    count = Counter(names(items))
    named = [item for item in items if item.first and count[item.name] == 1]
    return World(room, sights, ids, word, camera, items, named)


# ---------------------------------------------------------------------------------- the scene


def most_seen(world):
    """The most things that one of the pictures shows."""
    return max(shown_in(picture) for picture in world.sights)


def shown_in(sights):
    """How many things one picture shows."""
    return sum(sight.box is not None for sight in sights)


def by_kind(items, order):
    """{category: items in order}, of the categories of which every item is clear somewhere."""
    clear = {}
    for kind in sorted(set(names(items))):
        same = [item for item in items if item.name == kind]
        if all(item.first for item in same):
            clear[kind] = sorted(same, key=order)
    return clear


def clear_kinds(world):
    """Those that a picture shows, from left to right."""
    shown = [item for item in world.items if item.seen]
    return by_kind(shown, attrgetter("box"))


def clear_groups(world):
    """Those of the whole room, by first picture."""
    return by_kind(world.items, attrgetter("first"))


def gap_between(world, a, b):
    """Meters of free floor."""
    return world.room.gaps[a.number, b.number]


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


def names(items):
    """Their categories."""
    return [item.name for item in items]


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


def heading(a, b):
    """Radians counter-clockwise from the x axis of the way from a to b."""
    return math.atan2(b[1] - a[1], b[0] - a[0])


def turn_angle(a, b, c):
    """Degrees in (-180, 180] to turn to the left at a, from facing b to facing c.

    >>> turn_angle((0, 0), (0, 1), (-2, 0))
    90.0
    """
    turn = math.degrees(heading(a, c) - heading(a, b))
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


def whole(lengths, unit):
    """Lengths in meters as whole units.

    >>> whole(np.array([0.5, 1.26]), 10)
    [5, 13]
    """
    return [round(unit * length) for length in lengths.tolist()]


def past(world, start, others):
    """The others by their distance from the start: [(meters, name)], and that in words."""
    order = sorted((gap_between(world, start, other), other.name) for other in others)
    return order, "Past " + ", ".join(f"{name} {round(10 * gap)}" for gap, name in order)


def stated(items):
    """Where each is first clear: the picture, the ends in it, the place on the floor."""
    sentences = []
    for item in items:
        x0, y0, x1, y1 = item.box
        what = f"{item.name}{item.where}"
        sentences.append(f"The {what} from {x0} {y0} to {x1} {y1}, {item.at}.")
    return " ".join(sentences)


def worked(rng, steps, result, more=""):
    """The result at once, with `more`, or after the steps to it."""
    return f"{steps}: {result}." if rng.random() < 0.5 else f"{result}{more}."


# ---------------------------------------------------------------------------------- one picture
# A task takes (rng, world) and returns (question, answer), or None where the world allows no clear
# answer.


def read(rng, world):
    """Block by block: the category that covers most of it, if it covers an eighth."""
    ids = world.ids[0]
    count = len(ids) // BLOCK
    blocks = ids.reshape(count, BLOCK, count, BLOCK).swapaxes(1, 2)
    lines = []
    for line in blocks.reshape(count, count, -1):
        words = []
        for block in line:
            areas = np.bincount(block, minlength=2)[1:]
            enough = areas.max() >= len(block) / 8
            words.append(world.items[areas.argmax()].name if enough else "nothing")
        lines.append(" ".join(words) + ".")
    return "Read the picture.", " ".join(lines)


def look(rng, world):
    """What some pixels show; nearly always a thing."""
    ids = world.ids[0]
    pixels = np.argwhere(ids)
    spots = []
    shown = []
    for y, x in pixels[rng.integers(len(pixels), size=MANY)]:
        if rng.random() < 0.2:
            y, x = rng.integers(len(ids), size=2)
        spots.append(f"{x} {y}")
        number = ids[y, x]
        shown.append(f"the {world.items[number - 1].name}" if number else "nothing")
    return f"What is at {listed(spots)}?", f"There is {listed(shown)}."


def count(rng, world):
    """How many there are of each category."""
    if kinds := clear_kinds(world):
        numbers = []
        for kind, items in kinds.items():
            plural = "s" if len(items) > 1 else ""
            numbers.append(f"{len(items)} {kind}{plural}")
        return "Count what you see.", f"I see {listed(numbers)}."


def reach(rng, world):
    """The left, upper, right and lower end of everything of some categories, before the name."""
    if kinds := clear_kinds(world):
        chosen = some(rng, [*kinds])
        sentences = []
        for kind in chosen:
            for item in kinds[kind]:
                x0, y0, x1, y1 = item.box
                sentences.append(f"From {x0} {y0} to {x1} {y1} reaches the {kind}.")
        return f"How far does every {listed(chosen)} reach?", " ".join(sentences)


# ---------------------------------------------------------------- one picture, views and frames


def show(rng, world):
    """Everything about some things, see `stated`."""
    if world.named:
        items = some(rng, world.named)
        return f"Show the {listed(names(items))}.", stated(items)


def place(rng, world):
    """Places on the floor."""
    if world.named:
        items = some(rng, world.named)
        answer = " ".join(f"The {item.name} is {item.at}." for item in items)
        return f"Tell how far off: {listed(names(items))}.", answer


def measure(rng, world):
    """Width, depth and height in centimeters."""
    if items := few(rng, world, 1):
        w, d, h = whole(items[0].dims, 100)
        steps = f"{w} by {d} by {h}"
        answer = worked(rng, steps, f"{max(w, d, h)} at the most", f": {steps}")
        return f"Measure the {items[0].name}.", answer


def compare(rng, world):
    """Where one thing is, seen from another."""
    if items := few(rng, world, 2):
        a, b = items
        answer = worked(rng, f"from {a.at} to {b.at}", f"it is {differ(a.place, b.place)}")
        return f"Compare the {a.name} to the {b.name}.", answer


def gap(rng, world):
    """Decimeters between the middles, meters of free floor."""
    if items := few(rng, world, 2):
        a, b = items
        steps = f"from {a.at} to {b.at}, {round(math.dist(a.place, b.place))} apart"
        answer = worked(rng, steps, f"{gap_between(world, a, b):.1f} meters")
        return f"How much floor is free from the {a.name} to the {b.name}?", answer


def near(rng, world):
    """The way from one thing past the others, in decimeters of free floor."""
    items = few(rng, world, min(len(world.named), 4))
    if len(items) > 2:
        start, *others = items
        _, steps = past(world, start, others)
        return f"Go away from the {start.name}.", f"{steps}."


# ---------------------------------------------------------------------------------- many pictures


def turn(rng, world):
    """Degrees from one thing to another, standing at a third."""
    if items := few(rng, world, 3):
        a, b, c = items
        steps = f"from {listed([a.at, b.at, c.at])}"
        answer = worked(rng, steps, f"turn {turned(a.place, b.place, c.place)}")
        return f"At the {a.name}, turn from the {b.name} to the {c.name}.", answer


def describe(rng, world):
    """What each picture shows clearly, from left to right."""
    sentences = []
    for number, sights in enumerate(world.sights, 1):
        pairs = zip(sights, names(world.items))
        clear = sorted((sight.box, name) for sight, name in pairs if sight.clear)
        words = " ".join(name for _, name in clear) or "nothing"
        sentences.append(f"{world.word} {number}: {words}.")
    return "Describe what you see.", " ".join(sentences)


def enter(rng, world):
    """Which picture first shows each of some things clearly."""
    if world.named:
        items = some(rng, world.named, 2)
        order = sorted(items, key=attrgetter("first", "number"))
        answer = " ".join(f"{item.name}{item.where}." for item in order)
        return f"When do you see {listed(names(items))}?", answer


def total(rng, world):
    """Things of a category in the whole room; of those of which there are several, if any."""
    if groups := clear_groups(world):
        several = [kind for kind in groups if len(groups[kind]) > 1] or [*groups]
        kind = several[rng.integers(len(several))]
        steps = ", ".join(f"{item.at}{item.where}" for item in groups[kind])
        answer = worked(rng, f"from {steps}", f"it holds {len(groups[kind])}")
        return f"Count every {kind} of the whole room.", answer


def pace(rng, world):
    """The walls' lengths in decimeters, square meters."""
    w, d = whole(world.room.sides, 10)
    steps = f"{w} by {d}"
    return "Pace out the room.", worked(rng, steps, f"{area(w, d)} in all", f": {steps}")


# ---------------------------------------------------------------------------------- no picture


def spot(rng):
    """A place on the floor: most are ahead, in the camera's field of view."""
    x, y = rng.uniform(-0.6, 0.6), rng.uniform(8, 45)
    if rng.random() < 0.6:
        return round(x * y), round(y)
    return rng.integers(-45, 46, size=2).tolist()


def sums(rng, world):
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
    numbers = rng.choice(most, size=len(words), replace=False) + 1
    pairs = ", ".join(f"{word} {number}" for word, number in zip(words, numbers))
    order = [words[i] for i in numbers.argsort()]
    if kind == 4:
        return f"In which order are {pairs}?", f"{', '.join(order)}."
    return f"Least of {pairs}?", f"{order[0]}."


def recall(rng, world):
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


def talk(rng, world):
    """[(task's name, question, answer)]: some tasks in any order, none twice in the same words."""
    column = [*QUESTIONS].index(world.word)
    tasks = []
    for task, times in TASKS.items():
        tasks += times[column] * [task]
    turns = {}
    for task in shuffled(rng, tasks):
        turn = task(rng, world)
        if turn:
            turns.setdefault(turn[0], (task.__name__, *turn))
    return [*turns.values()][: QUESTIONS[world.word]]


def base_rows(rng, world, images):
    """Rows of chat messages: questions about some pictures, and some about no picture."""
    media = [{"type": "image", "image": path} for path in images]
    if world.word == "frame":
        video = images if len(images) > 1 else images[0]  # frames, or one .avi file
        media = [{"type": "video", "video": video}]
    turns = talk(rng, world) if most_seen(world) else []
    told = [(task.__name__, *task(rng, world)) for task in TOLD]
    rows = []
    for task, question, answer in turns + told:
        content = [{"type": "text", "text": question}]
        if task not in ("sums", "recall"):
            content = media + content
        messages = [
            {"role": "user", "content": content},
            {"role": "assistant", "content": answer},
        ]
        order = (level(world, task), most_seen(world))
        rows.append({"messages": messages, "question_type": task, "level": order})
    return rows
