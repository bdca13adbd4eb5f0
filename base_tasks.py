"""What the base learns before the ladder begins: plain talk about rooms that the ladder never shows.

    python scenes.py --tasks base --out runs/base/rooms --scenes 24000 --test-scenes 400 --seed 1
    python train_sft.py --stage base

Reading a picture, naming, counting, pointing to a cell, telling distances and sizes, comparing two things, short
descriptions of several views and of frames. None of it in the ladder's formats: no JSON boxes, none of its questions
or options, no <think> and <answer>. A row is a chat of several questions about the same pictures.

Each task takes (rng, world, ids) and returns (question, answer), or None where the world allows no clear answer.
ids (pictures, size, size): number + 1 of the thing that each pixel shows, 0 for none; see rooms.render.
"""
import itertools
import math
import re

import numpy as np

CELL = 4  # pixels: things are pointed at in columns and rows of cells
BLOCK = 28  # pixels: pictures are read in blocks of this side, a merged patch of the vision encoder
MANY = 3  # things that one answer speaks of, at most
TURNS = {"": 6, "view": 5, "frame": 6}  # questions about one picture, about views, about frames
CLEARLY = 3  # decimeters that one thing must be more to a side, farther away or taller to be called so


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
    seen = sorted((k for k, one in enumerate(world.sights[0]) if one.box), key=lambda k: world.sights[0][k].box)
    unclear = {name(world, k) for k in seen if not world.sights[0][k].clear}
    return {kind: [k for k in seen if name(world, k) == kind] for kind in sorted({name(world, k) for k in seen} - unclear)}


def some(rng, items):
    """A few of the items in any order."""
    return [items[i] for i in rng.permutation(len(items))[:rng.integers(1, MANY + 1)]]


def numbered(count, word):
    return f"{count} {word}{'s' * (count != 1)}"


def middle(box):
    return (box[0] + box[2]) // 2 // CELL, (box[1] + box[3]) // 2 // CELL


# ---------------------------------------------------------------------------------------------------- one picture
def read(rng, world, ids):
    """Block by block: the category that covers most of it, if it covers an eighth."""
    blocks = len(ids[0]) // BLOCK
    lines = []
    for row, column in itertools.product(range(blocks), repeat=2):
        block = ids[0][BLOCK * row:, BLOCK * column:][:BLOCK, :BLOCK]
        areas = np.bincount(block.ravel(), minlength=2)[1:]
        lines.append(name(world, areas.argmax()) if areas.max() >= BLOCK * BLOCK / 8 else "nothing")
    return "Read the picture.", ". ".join(" ".join(lines[i:i + blocks]) for i in range(0, len(lines), blocks)) + "."


def point(rng, world, ids):
    """The cell in the middle of each thing's box."""
    if all_kinds := kinds(world):
        chosen, said = some(rng, [*all_kinds]), []
        for kind in chosen:
            cells = ["column {} row {}".format(*middle(world.sights[0][k].box)) for k in all_kinds[kind]]
            said.append(f"The {kind} is at {cells[0]}." if len(cells) == 1 else f"The {kind}s are at {listed(cells)}.")
        return f"Point to every {listed(chosen)}.", " ".join(said)


def span(rng, world, ids):
    """How far across and how far down each thing reaches."""
    if all_kinds := kinds(world):
        chosen, said = some(rng, [*all_kinds]), []
        for k in itertools.chain(*(all_kinds[kind] for kind in chosen)):
            x1, y1, x2, y2 = world.sights[0][k].box
            said.append(f"The {name(world, k)} fills columns {x1 // CELL} to {(x2 - 1) // CELL}, "
                        f"rows {y1 // CELL} to {(y2 - 1) // CELL}.")
        return f"Which cells does every {listed(chosen)} fill?", " ".join(said)


def look(rng, world, ids):
    """What a cell shows at its middle; nearly always a thing."""
    show = np.argwhere(ids[0][CELL // 2::CELL, CELL // 2::CELL] > 0)
    if len(show):
        said = []
        for row, column in show[rng.integers(len(show), size=MANY)].tolist():
            if rng.random() < 0.2:
                row, column = (int(v) for v in rng.integers(len(ids[0]) // CELL, size=2))
            thing = int(ids[0][row * CELL + CELL // 2, column * CELL + CELL // 2])
            said.append((f"column {column} row {row}", "the " + name(world, thing - 1) if thing else "nothing"))
        cells, shown = zip(*said)
        return f"What is at {listed(cells)}?", f"There is {listed(shown)}."


def count(rng, world, ids):
    if all_kinds := kinds(world):
        return "Count what you see.", "I see " + listed([numbered(len(k), kind) for kind, k in all_kinds.items()]) + "."


# ------------------------------------------------------------------------------- one picture, views and frames
def place(rng, world, ids):
    """Decimeters to the side of and ahead of the camera, of the first view or frame."""
    if world.named:
        chosen = some(rng, world.named)
        said = []
        for k in chosen:
            x, y = world.places[k].tolist()
            said.append(f"The {name(world, k)} is {abs(y)} {'behind' if y < 0 else 'ahead'} and {abs(x)} "
                        f"{'left' if x < 0 else 'right'}.")
        return f"Tell how far off: {listed([name(world, k) for k in chosen])}.", " ".join(said)


def measure(rng, world, ids):
    if world.named:
        k = world.named[rng.integers(len(world.named))]
        w, d, h = (round(100 * v) for v in world.room.things[k].dims.tolist())
        return f"Measure the {name(world, k)}.", f"{max(w, d, h)} at the most: {w} by {d} by {h}."


def pair(rng, world):
    if len(world.named) > 1:
        a, b = (world.named[i] for i in rng.permutation(len(world.named))[:2])
        return a, b, name(world, a), name(world, b)


def compare(rng, world, ids):
    """Left or right, nearer or farther, taller or lower of two things, each where it is clear."""
    if two := pair(rng, world):
        a, b, first, second = two
        x, y = (world.places[a] - world.places[b]).tolist()
        height = round(10 * (world.room.things[a].dims[2] - world.room.things[b].dims[2]))
        said = [f"{(less, more)[number > 0]} by {abs(number)}" for number, less, more in (
            (x, "more to the left", "more to the right"), (y, "nearer", "farther"), (height, "lower", "taller"))
            if abs(number) >= CLEARLY]
        if said:
            return f"Compare the {first} to the {second}.", f"The {first} is {listed(said)}."


def walk(rng, world, ids):
    """From one thing to another: decimeters between their centers in each direction, in all, and of free floor."""
    if two := pair(rng, world):
        a, b, first, second = two
        x, y = (world.places[b] - world.places[a]).tolist()
        return (f"Walk from the {first} to the {second}.",
                f"Go {abs(x)} {'left' if x < 0 else 'right'} and {abs(y)} {'back' if y < 0 else 'on'}, "
                f"{round(math.hypot(x, y))} in all, {round(10 * world.room.gaps[a, b])} of them free.")


def gap(rng, world, ids):
    if two := pair(rng, world):
        a, b, first, second = two
        return f"How much floor is free from the {first} to the {second}?", f"{round(10 * world.room.gaps[a, b])}."


def near(rng, world, ids):
    """Everything that may be named, in the order of its distance from one thing, in decimeters of free floor."""
    if len(world.named) > 2:
        k = world.named[rng.integers(len(world.named))]
        others = sorted((other for other in world.named if other != k), key=lambda other: world.room.gaps[k, other])
        return (f"Go away from the {name(world, k)}.",
                "Past " + ", ".join(f"{name(world, other)} {round(10 * world.room.gaps[k, other])}" for other in others) + ".")


def turn(rng, world, ids):
    """Standing at one thing and facing another, where is a third: degrees, before or after where the two are from it."""
    if len(world.named) > 2:
        a, b, c = (world.named[i] for i in rng.permutation(len(world.named))[:3])
        (xb, yb), (xc, yc) = (world.places[k] - world.places[a] for k in (b, c))
        left = (math.degrees(math.atan2(yc, xc) - math.atan2(yb, xb)) + 180) % 360 - 180
        names = [name(world, k) for k in (a, b, c)]
        said = [f"{abs(round(left))} degrees to the {'left' if left > 0 else 'right'}.",
                f"The {names[1]} is at {xb} {yb}, the {names[2]} at {xc} {yc}."]
        first = int(rng.integers(2))
        return (f"At the {names[0]}, {('turn', 'look and turn')[first]} from the {names[1]} to the {names[2]}.",
                f"{said[first]} {said[1 - first]}")


# -------------------------------------------------------------------------------------------- views and frames
def describe(rng, world, ids):
    """What each picture shows clearly, from left to right."""
    said = []
    for number, sights in enumerate(world.sights, 1):
        seen = sorted((k for k, one in enumerate(sights) if one.clear), key=lambda k: sights[k].box)
        said.append(f"{world.word} {number}: {' '.join(name(world, k) for k in seen) or 'nothing'}.")
    return "Describe what you see.", " ".join(said)


def enter(rng, world, ids):
    """Which picture first shows each thing clearly."""
    if world.named:
        seen = sorted(world.named, key=lambda k: (world.first[k], k))
        return "When does each thing come in?", " ".join(f"{name(world, k)} in {world.word} {world.first[k]}." for k in seen)


def total(rng, world, ids):
    """Things of every category that is clear as a whole, in the whole room."""
    groups = {}
    for k, thing in enumerate(world.room.things):
        groups.setdefault(thing.name, []).append(k)
    clear = {kind: things for kind, things in sorted(groups.items()) if all(k in world.first for k in things)}
    if clear:
        return "Count the whole room.", "It holds " + listed([numbered(len(k), kind) for kind, k in clear.items()]) + "."


def pace(rng, world, ids):
    w, d = (round(10 * v) for v in world.room.sides)
    return "Pace out the room.", f"It is {w * d / 100:.1f} in all: {w} by {d}."


TASKS = {  # what a picture is called -> its tasks, the likelier the more often they stand here
    "": (read, point, point, span, span, look, count, place, place, measure, compare, compare, walk, gap, near),
    "view": (describe, enter, total, total, place, place, measure, walk, gap, near, near, turn, turn),
    "frame": (describe, enter, enter, total, total, place, place, measure, walk, gap, near, near, turn, turn, pace, pace),
}


def reach(world, question):
    """The things that a question for places names, in its order: their boxes in pixels, the place before the name."""
    all_kinds = kinds(world)
    chosen = [word for word in re.findall(r"\w+", question) if word in all_kinds]
    said = ["From {} {} to {} {} reaches the {}.".format(*world.sights[0][k].box, kind)
            for kind in chosen for k in all_kinds[kind]]
    return f"How far does every {listed(chosen)} reach?", " ".join(said)


def talk(rng, world, ids):
    """[(task's name, question, answer)]: some tasks in any order, the same one twice if not in the same words."""
    made = {}
    for i in rng.permutation(len(TASKS[world.word])):
        task = TASKS[world.word][i]
        if said := task(rng, world, ids):
            made.setdefault(said[0], (task.__name__, *said))
    return [*made.values()][:TURNS[world.word]]
