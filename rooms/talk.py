"""What the base learns before the ladder: first texts, then pictures of rooms that no ladder shows.

    python -m rooms.scenes --tasks base --out runs/base/rooms --scenes 12000 --test-scenes 400 \\
        --seed 1 --view-categories 3 5
    python train_sft.py --stage base

docs/base.md has all commands. A row is one question, and its answer is made of the sentences
of reckon.py. Where it is *told*, the facts stand before the question, among others:

    bed 21 27. lamp 33 45. bin 40 12. Compare lamp to bed.
    lamp 33 45 bed 21 27: right 12 back 18: right-back.

Where it is *seen*, one picture, four views or a video stand in their place, and the answer is the
same. Of the ladder's formats there are only the lines of options: no JSON boxes, none of its
questions, no <think> and <answer>.
"""

import itertools
from collections import Counter, namedtuple
from operator import attrgetter

import numpy as np

from rooms import reckon
from rooms.reckon import SIDES, TURNS, Fact, chain, on_map, tell_all
from rooms.render import FRAMES, FURNITURE, ground, shuffled

BLOCK = 28  # pixels: pictures are read in blocks of this side, a merged patch of the vision encoder

# Names of told facts. There are more than a room's furniture has, so that the model looks each one
# up and learns none by heart.
MORE_NAMES = "door shelf desk stool mirror rug clock vase box fan sink oven stove piano bench crib"
NAMES = (*FURNITURE, *MORE_NAMES.split())
MOST_TOLD = 8  # names in one told text, at most
MOST_SEEN = 4  # things that a question about pictures names, at most
# Numbers of told facts: from the first to before the second.
PLACES = (8, 53)
TENS = (3, 25)  # of centimeters
WALLS = (12, 33)  # quarter meters


# One thing. center: (2,) in meters. Facts: place on the map, sides in centimeters, first picture
# that shows it clearly (0: none). seen: number of the first picture that shows any of it, or 0.
# box: in the picture that shows it clearly first.
Item = namedtuple("Item", "name center place sides first seen box")
# What a row is about. sights: by picture and thing; ids: (size, size) of each picture, the number
# + 1 of the thing that a pixel shows, 0 for none. word: what a picture is called ("", "view",
# "frame"). camera: the first picture's. walls: a Fact. items: all things. named: those that a
# question may name, being clear in some picture and the only ones of their category.
World = namedtuple("World", "room walls sights ids word camera items named")


def make_item(thing, sights, camera):
    """An Item from its Sights, one for each picture."""
    seen = number_of_first([sight.box is not None for sight in sights])
    first = number_of_first([sight.clear for sight in sights])
    return Item(
        name=thing.name,
        center=thing.center,
        place=Fact(thing.name, on_map(*ground(camera, thing.center))),
        sides=Fact(thing.name, tuple(tens(side) for side in thing.dims)),
        first=Fact(thing.name, (first,)),
        seen=seen,
        box=sights[first - 1].box if first else None,
    )


def tens(meters):
    """Centimeters, rounded to tens.

    >>> tens(1.26), tens(0.5)
    (130, 50)
    """
    return 10 * round(10 * float(meters))


def number_of_first(flags):
    """
    >>> number_of_first([False, True, True]), number_of_first([False])
    (2, 0)
    """
    return flags.index(True) + 1 if any(flags) else 0


def make_world(room, sights, ids, word, camera):
    """The World of some pictures of a room. camera: the first picture's."""
    items = []
    for thing, *of_thing in zip(room.things, *sights):
        items.append(make_item(thing, of_thing, camera))
    count = Counter(item.name for item in items)
    named = [item for item in items if item.box and count[item.name] == 1]
    walls = Fact("room", tuple(sorted(round(side / reckon.UNIT) for side in room.sides)))
    return World(room, walls, sights, ids, word, camera, items, named)


# ---------------------------------------------------------------------------------- the scene


def most_seen(world):
    """The most things that one of the pictures shows."""
    counts = []
    for picture in world.sights:
        counts.append(sum(sight.box is not None for sight in picture))
    return max(counts)


def by_kind(items, order):
    """{category: items in order}, of the categories of which every item is clear somewhere."""
    clear = {}
    for kind in sorted({item.name for item in items}):
        same = [item for item in items if item.name == kind]
        if all(item.box for item in same):
            clear[kind] = sorted(same, key=order)
    return clear


def clear_kinds(world):
    """{category: its things that one picture shows, from left to right}, if all are clear."""
    shown = [item for item in world.items if item.seen]
    return by_kind(shown, attrgetter("box"))


def clear_groups(world):
    """{category: its things in the room, by first picture, then from left to right}."""
    return by_kind(world.items, attrgetter("first.numbers", "place.numbers"))


# ---------------------------------------------------------------------------------- questions

# steps: function of reckon.py. fact: the field of an Item that it takes; "walls": of the World.
# least, most: things. wordings: of the question; {a}, {b}, {c}: names, {all}: all of them,
# {others}: all but the first.
Task = namedtuple("Task", "steps fact least most wordings")
TASKS = {
    "say": Task(reckon.say, "place", 1, MOST_TOLD, ("Say {all}.", "Where is {all}?")),
    "enter": Task(reckon.say, "first", 2, 3, ("When do you see {all}?", "First pictures: {all}.")),
    "compare": Task(
        reckon.compare, "place", 2, 2, ("Compare {a} to {b}.", "Which way is {a} from {b}?")
    ),
    "apart": Task(
        reckon.apart, "place", 2, 2, ("Measure from {a} to {b}.", "How far is {a} from {b}?")
    ),
    "nearest": Task(
        reckon.nearest,
        "place",
        3,
        4,
        ("Close to {a}: {others}?", "Which of {others} is near {a}?"),
    ),
    "turn": Task(
        reckon.turn,
        "place",
        3,
        3,
        ("At {a}, turn from {b} to {c}.", "From {a} look at {b}: which way is {c}?"),
    ),
    "longest": Task(reckon.longest, "sides", 1, 1, ("How long is {a}?", "Sides of {a}?")),
    "floor": Task(reckon.floor, "walls", 0, 0, ("How large is the room?", "Area of the floor?")),
    "total": Task(reckon.total, "place", 1, 4, ("Count {a}.", "How many of {a} are there?")),
    "order": Task(reckon.order, "first", 3, 3, ("Sort {all}.", "Which comes first: {all}?")),
}
# Share of a task's rows that have options. An order's are long: they need more practice.
WITH_OPTIONS = {"compare": 0.5, "nearest": 0.5, "turn": 0.5, "order": 0.75}


def reword(rng, task, names):
    """A question in one of its wordings.

    >>> reword(np.random.default_rng(1), TASKS["turn"], ["bed", "lamp", "bin"])
    'At bed, turn from lamp to bin.'
    """
    text = task.wordings[rng.integers(len(task.wordings))]
    slots = dict(zip("abc", names))
    return text.format(**slots, others=", ".join(names[1:]), all=", ".join(names))


# ---------------------------------------------------------------------------------- options


def with_letters(rng, answer, choices):
    """(options in any order, three wrong ones at most; the letter of the right one)."""
    wrong = [choice for choice in choices if choice != answer]
    texts = shuffled(rng, [*shuffled(rng, wrong)[:3], answer])
    options = [f"{letter}. {text}" for letter, text in zip("ABCD", texts)]
    return options, "ABCD"[texts.index(answer)]


def orders(names):
    """All orders of some names, in words."""
    return [", ".join(some) for some in itertools.permutations(names)]


def choices(name, asked):
    """What may be the result of a task."""
    names = [fact.name for fact in asked]
    if name == "nearest":
        return names[1:]
    if name == "order":
        return orders(names)
    return SIDES if name == "compare" else TURNS


def ask(rng, name, facts):
    """(question, answer) of a task, or None where nothing is clear.

    WITH_OPTIONS is the chance that lines of options follow. Then the answer ends with the letter
    of the right one.
    """
    task = TASKS[name]
    steps, result = task.steps(*facts)
    if result is None:
        return None
    question = reword(rng, task, [fact.name for fact in facts])
    answer = chain(steps, result)
    if rng.random() < WITH_OPTIONS.get(name, 0):
        options, letter = with_letters(rng, result, choices(name, facts))
        question = "\n".join([question, "Options:", *options])
        answer = f"{answer} {letter}"
    return question, answer + "."


# ---------------------------------------------------------------------------------- told


def draw(rng, bounds):
    """A whole number from the first bound to before the second.

    >>> 10 <= draw(np.random.default_rng(0), (10, 12)) < 12
    True
    """
    return int(rng.integers(*bounds))


def made_up(rng, kind, name):
    """A fact of a kind, with random numbers."""
    if kind == "place":
        return Fact(name, (draw(rng, PLACES), draw(rng, PLACES)))
    if kind == "sides":
        return Fact(name, tuple(10 * draw(rng, TENS) for _ in range(3)))
    if kind == "walls":
        return Fact(name, tuple(sorted(draw(rng, WALLS) for _ in range(2))))
    return Fact(name, (draw(rng, (1, FRAMES + 1)),))


def told_facts(rng, task):
    """Facts in any order, and those of them that the task asks about."""
    if task.fact == "walls":
        facts = [made_up(rng, "walls", "room")]
        return facts, facts
    # Names differ, but where things are counted: there one name has up to three facts more.
    names = shuffled(rng, NAMES)[: draw(rng, (max(2, task.least), MOST_TOLD + 1))]
    if task.steps is reckon.total:
        names += [names[0]] * draw(rng, (0, task.most))
    facts = shuffled(rng, [made_up(rng, task.fact, name) for name in names])
    if task.steps is reckon.total:  # from left to right, as in clear_groups
        counted = [fact for fact in facts if fact.name == names[0]]
        return facts, sorted(counted, key=attrgetter("numbers"))
    most = min(task.most, len(facts))
    return facts, shuffled(rng, facts)[: draw(rng, (task.least, most + 1))]


def clear_facts(rng, task):
    """The same, so that the task has a result."""
    result = None
    while result is None:
        facts, asked = told_facts(rng, task)
        _, result = task.steps(*asked)
    return facts, asked


def choose(rng):
    """Lines with letters; the letters are asked for in another order."""
    words = shuffled(rng, [*NAMES, *SIDES, *TURNS])[: rng.integers(2, 5)]
    lines = [f"{letter}. {word}" for letter, word in zip("ABCD", words)]
    pairs = shuffled(rng, [*zip("ABCD", words)])
    asked = ", ".join(word for _, word in pairs)
    answer = ". ".join(f"{word} {letter}" for letter, word in pairs)
    return "Lines:\n" + "\n".join(lines) + f"\nLetters of {asked}?", answer + "."


def tell_and_ask(rng, name):
    """(question, answer) of a task; the question tells the facts, among others."""
    facts, asked = clear_facts(rng, TASKS[name])
    question, answer = ask(rng, name, asked)
    return f"{tell_all(facts)}. {question}", answer


# ---------------------------------------------------------------------------------- seen


def read(rng, world):
    """Block by block: the thing that covers most of it, if it covers an eighth."""
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


def show(rng, world):
    """The left, upper, right and lower end of everything of some categories, in pixels."""
    if things := some_kinds(rng, world):
        names, items = things
        sentences = [f"{item.name} {corners(item)}." for item in items]
        return f"Show {names}.", " ".join(sentences)


def outline(rng, world):
    """The same, the ends before the name."""
    if things := some_kinds(rng, world):
        names, items = things
        sentences = [f"{corners(item)} {item.name}." for item in items]
        return f"Outline {names}.", " ".join(sentences)


def some_kinds(rng, world):
    """(names, all things) of one to three categories; None where a picture shows none clearly."""
    if kinds := clear_kinds(world):
        asked = shuffled(rng, [*kinds])[: draw(rng, (1, 4))]
        return ", ".join(asked), [item for kind in asked for item in kinds[kind]]


def corners(item):
    """Its box in words."""
    return " ".join(map(str, item.box))


def seen_items(rng, world, task):
    """Things that a task asks about, or None where the world has too few."""
    if task.steps is reckon.total:
        groups = clear_groups(world)
        several = [kind for kind in groups if len(groups[kind]) > 1] or [*groups]
        if not several:
            return None
        return groups[several[draw(rng, (0, len(several)))]]
    most = min(task.most, MOST_SEEN, len(world.named))
    if most >= task.least:
        return shuffled(rng, world.named)[: draw(rng, (task.least, most + 1))]


# Tasks that need a picture. Each takes (rng, world).
PICTURED = {"read": read, "show": show, "outline": outline}


def look_and_ask(rng, world, name):
    """(question, answer) of a task whose facts are seen, or None where nothing is clear."""
    if name in PICTURED:
        return PICTURED[name](rng, world)
    task = TASKS[name]
    if task.fact == "walls":
        return ask(rng, name, [world.walls])
    items = seen_items(rng, world, task)
    if items and (name != "order" or in_order(items)):
        return ask(rng, name, [getattr(item, task.fact) for item in items])


def in_order(items):
    """Whether they appear one after the other, in one order by first pixel and by clear sight."""
    order = sorted(items, key=attrgetter("first.numbers"))
    for numbers in ([item.first.numbers[0] for item in order], [item.seen for item in order]):
        if numbers != sorted(set(numbers)):
            return False
    return True


# ---------------------------------------------------------------------------------- rows

TOLD = {  # how many rows of each a room brings
    "say": 1.0,
    "choose": 0.4,
    "compare": 0.6,
    "apart": 0.8,
    "nearest": 1.4,
    "turn": 0.8,
    "longest": 0.4,
    "floor": 0.3,
    "total": 1.2,
    "order": 1.6,
}
FIRST_TASKS = ("say", "choose")  # which number or letter belongs to which name
ROWS = {"": 3, "view": 8, "frame": 16}  # about one picture, about views, about frames
SEEN = {  # how often each is tried, in the order of ROWS
    "read": (3, 0, 0),
    "show": (8, 0, 0),
    "outline": (4, 0, 0),
    "say": (8, 10, 8),
    "enter": (0, 1, 4),
    "compare": (4, 3, 2),
    "apart": (2, 3, 2),
    "nearest": (2, 3, 2),
    "turn": (2, 5, 3),
    "longest": (4, 3, 4),
    "floor": (0, 2, 4),
    "total": (2, 5, 3),
    "order": (0, 0, 5),
}
REASONED = ("compare", "apart", "nearest", "turn", "order")  # answers go beyond the facts


def order_of_learning(name, world):
    """A row's level: bound, then told, then seen, few things before many."""
    if world is None:
        return (0, 0) if name in FIRST_TASKS else (1, 0)
    level = most_seen(world)
    if world.word:  # several pictures
        level += 2
    if name in REASONED:
        level += 1
    return 2, level


def make_row(name, question, answer, media, level):
    """A row of chat messages."""
    content = [*media, {"type": "text", "text": question}]
    messages = [{"role": "user", "content": content}, {"role": "assistant", "content": answer}]
    return {"messages": messages, "question_type": name, "level": level}


def told_row(rng, name):
    """A row of a task about no picture."""
    exchange = choose(rng) if name == "choose" else tell_and_ask(rng, name)
    return make_row(name, *exchange, [], order_of_learning(name, None))


def told_rows(rng):
    """Rows about no picture, as many as TOLD says on average."""
    rows = []
    for name, rate in TOLD.items():
        for _ in range(rng.poisson(rate)):
            rows.append(told_row(rng, name))
    return rows


def seen_rows(rng, world, images):
    """Rows about some pictures: some tasks in any order, none twice in the same words."""
    if not most_seen(world):
        return []
    media = [{"type": "image", "image": path} for path in images]
    if world.word == "frame":
        video = images if len(images) > 1 else images[0]  # frames, or one .avi file
        media = [{"type": "video", "video": video}]
    column = [*ROWS].index(world.word)
    tries = []
    for name, times in SEEN.items():
        tries += times[column] * [name]
    rows = {}
    for name in shuffled(rng, tries):
        exchange = look_and_ask(rng, world, name)
        if exchange:
            question, answer = exchange
            level = order_of_learning(name, world)
            rows.setdefault(question, make_row(name, question, answer, media, level))
    return [*rows.values()][: ROWS[world.word]]
