"""Procedural 3D rooms with exact geometry, in SpatialLadder-26k's own file format.

    python -m rooms.scenes --out DIR --scenes 3600 --seed 0   # writes DIR/{train,val,test}
    python -m rooms.scenes --out DIR --scenes 40 --cast 0     # few, without the lens's tint

Three of four rooms are compact and pictured by four cameras, one at each wall: every picture gives
localization and single-image rows, the four together multi-view rows. Every fourth room is smaller
or larger and filmed from a moving camera: video rows. All answers are computed from the 3D scene,
all boxes from the visible pixels. Beside them told_data.jsonl holds texts of the base (talk.py).
"""

import itertools
import math
import multiprocessing
import os
import tempfile
from pathlib import Path

import numpy as np
from tqdm import tqdm

from data import Sample, prompt_text
from files import CONFIG, UserError, claim, write_json, write_jsonl, writing
from rooms import reckon
from rooms.render import (
    CAST,
    DIFFICULTY,
    FIELD_OF_VIEW,
    ROOM_TRIES,
    SIZE,
    ground,
    jpeg,
    make_room,
    mjpeg_avi,
    render,
    shuffled,
)
from rooms.talk import (
    clear_groups,
    clear_kinds,
    in_order,
    make_world,
    most_seen,
    orders,
    seen_rows,
    told_rows,
    with_letters,
)
from runtime import main_guard
from settings import Parser, flag, not_negative, positive

SPLITS = ("train", "val", "test")
FILES = {  # tasks -> kinds of rows -> their files
    "ladder": {
        "grounding": "spld_grounding_data.jsonl",
        "spatial": "spld_spatial_data.jsonl",
        "coldstart": "spld_coldstart_data.jsonl",
        "told": "told_data.jsonl",  # texts of the base, which the tiny recipes replay
    },
    "base": {"base": "base_data.jsonl"},
}
FRAMES_PER_SECOND = 2
AVI_SHARE = 1 / 6  # share of videos that are one .avi file; the others are a picture for each frame
EASY = 0.3  # share of training rooms with views that hold one category
SIZE_SHARE = 0.25  # share of size questions that become spatial rows
COUNT_ONE = 0.12  # chance to count a category of one thing where no category has more
CANDIDATES = 60  # choices of things that a question is tried with, at most

# Margins that make answers unambiguous.
NEAREST_MARGIN = 0.4  # meters from the nearest thing to the second nearest
# Meters between left and right, front and back: so much that rounded places do not tie.
SIDE_MARGIN = 0.35
COLUMN_MARGIN = 0.04  # picture widths between left and right
ANGLE_MARGIN = 15  # degrees to the edge of a sector
MIN_DISTANCE = 0.5  # meters: no distance is asked for where things are closer
ROUNDING = 0.15  # meters that a distance may be off because its places are rounded

# How often a type comes before others: the more, the fewer rooms allow it; the last two always.
WEIGHTS = {
    "object size": 2,
    "absolute distance": 3,
    "relative direction": 4,
    "relative distance": 8,
    "object count": 12,
    "room size": 1e9,
    "appearance order": 1e9,
}


# ---------------------------------------------------------------------------------- questions
# Each function takes the things in the order of the question's text. It returns the steps of the
# chain of thought, the answer and the options, or None where the question is not clear. The answer
# follows from the steps, and their places are rounded to quarter meters. So a question is asked
# only where the exact places agree: on the same choice, or on the same distance to ROUNDING.


def object_size(world, a):
    """The longest side in centimeters."""
    return *reckon.longest(a.sides), ()


def absolute_distance(world, a, b):
    """Meters from middle to middle."""
    steps, answer = reckon.apart(a.place, b.place)
    exact = math.dist(a.center, b.center)
    if exact >= MIN_DISTANCE and abs(float(answer) - exact) <= ROUNDING:
        return steps, answer, ()


def relative_distance(world, *things):
    """The nearest to the last of the things."""
    *others, target = things
    steps, answer = reckon.nearest(target.place, *[other.place for other in others])
    exact = sorted((math.dist(target.center, other.center), other.name) for other in others)
    (least, name), (second, _), *_ = exact
    if name == answer and second - least >= NEAREST_MARGIN:
        return steps, answer, [other.name for other in others]


def camera_direction(world, a, b):
    """Front is nearer to the camera; left and right agree on the floor and in the picture."""
    steps, answer = reckon.compare(a.place, b.place)
    xa, ya = ground(world.camera, a.center)
    xb, yb = ground(world.camera, b.center)
    columns = (xa / ya - xb / yb) / (2 * math.tan(FIELD_OF_VIEW / 2))
    on_the_floor = min(abs(xa - xb), abs(ya - yb)) >= SIDE_MARGIN
    if on_the_floor and columns * math.copysign(1, xa - xb) >= COLUMN_MARGIN:
        return steps, answer, reckon.SIDES


def relative_direction(world, a, b, c):
    """Standing at a and facing b; c is at the back beyond 135 degrees, as in VSI-Bench."""
    steps, answer = reckon.turn(a.place, b.place, c.place)
    angle = turn_angle(a.center, b.center, c.center)
    near = min(math.dist(a.center, other.center) for other in (b, c))
    edge = min(abs(angle), abs(abs(angle) - 135))
    exact = "left" if angle > 0 else "right"
    if abs(angle) > 135:
        exact = "back"
    if answer == exact and near >= 2 * SIDE_MARGIN and edge >= ANGLE_MARGIN:
        return steps, answer, reckon.TURNS


def turn_angle(a, b, c):
    """Degrees in (-180, 180] to turn to the left at a, from facing b to facing c.

    >>> turn_angle((0, 0), (0, 1), (-2, 0))
    90.0
    """
    headings = [math.atan2(to[1] - a[1], to[0] - a[0]) for to in (b, c)]
    turn = math.degrees(headings[1] - headings[0])
    return 180 - (180 - turn) % 360


def object_count(world, *things):
    """All things of a category."""
    return *reckon.total(*[thing.place for thing in things]), ()


def room_size(world):
    """Whole square meters."""
    return *reckon.floor(world.walls), ()


def appearance_order(world, *things):
    """By first pictures: with any pixel of a thing as by those that show it clearly."""
    if in_order(things):
        steps, answer = reckon.order(*[thing.first for thing in things])
        return steps, answer, orders([thing.name for thing in things])


# type: its function, and texts to try in turn, with one slot for each thing that is named
VIDEO = {
    "object size": (
        object_size,
        ["How many centimeters, to the nearest ten, is the longest dimension of the {}?"],
    ),
    "absolute distance": (
        absolute_distance,
        ["How many meters apart are the middles of the {} and the {}?"],
    ),
    "relative distance": (
        relative_distance,
        [
            "Which of {}, {} and {} has its middle nearest to that of the {}?",
            "Which of {} and {} has its middle nearest to that of the {}?",
        ],
    ),
    "relative direction": (
        relative_direction,
        ["If I stand by the {} and face the {}, is the {} to my left, right or back?"],
    ),
    "object count": (object_count, ["How many {}s are in this room?"]),
    "room size": (room_size, ["How many whole square meters is this room?"]),
    "appearance order": (appearance_order, ["In what order do {}, {} and {} first appear?"]),
}
MULTI_VIEW = {t: VIDEO[t] for t in VIDEO if t not in ("room size", "appearance order")}
SINGLE_IMAGE = {t: MULTI_VIEW[t] for t in MULTI_VIEW if t != "object count"} | {
    "relative direction": (
        camera_direction,
        ["Seen from the camera, where is the {} relative to the {}?"],
    )
}
# what a picture is called: the data type of its rows, and its questions
TYPES = {
    "": ("single_image", SINGLE_IMAGE),
    "view": ("multi_view", MULTI_VIEW),
    "frame": ("video", VIDEO),
}


def choices_of_things(rng, world, function, text):
    """Things that a question may be about."""
    if function is not object_count:
        return [*itertools.permutations(world.named, text.count("{}"))]
    groups = clear_groups(world).values()
    several = [things for things in groups if len(things) > 1]
    return several or [things for things in groups if rng.random() < COUNT_ONE]


def pose(rng, world, function, texts):
    """One question of a type, or None where the world allows none.

    Of the options that may be right in this world, each is equally likely to be.

    Returns: things, text, steps of the chain of thought, answer, options.
    """
    for text in texts:
        questions = {}
        for things in shuffled(rng, choices_of_things(rng, world, function, text))[:CANDIDATES]:
            question = function(world, *things)
            if question:
                _, answer, choices = question
                key = answer if choices else ""
                questions.setdefault(key, (things, *question))
        if questions:
            things, *rest = questions[rng.choice(sorted(questions))]
            return things, text.format(*[thing.name for thing in things]), *rest


# ---------------------------------------------------------------------------------- rows


def coldstart_row(row, chain):
    """A spatial row with the prompt and the chain of thought that a cold start imitates."""
    options = tuple(row["options"] or ())
    sample = Sample("", "", row["question"], row["question_type"], row["answer"], options)
    solution = f"<think>{chain}</think><answer>{row['answer']}</answer>"
    return row | {"solution": solution, "prompt": prompt_text(sample, "thinking")}


def ladder_rows(rng, world, images, ids, easy):
    """Yield (kind, row) about some pictures, in SpatialLadder-26k's formats. ids: of the rows."""
    data_type, types = TYPES[world.word]
    single = data_type == "single_image"

    def new_row(text):
        return {
            "question_id": next(ids),
            "question": text,
            "image": images,
            "data_type": data_type,
        }

    def located(row, things):
        boxes = [{"bbox_2d": [*item.box], "label": item.name} for item in things]
        return "grounding", row | {"answer": boxes, "level": most_seen(world)}

    wanted = {"": 2, "view": 1 if easy else 2, "frame": 4}[world.word]
    for question_type in sorted(types, key=lambda t: rng.exponential(1 / WEIGHTS[t])):
        question = wanted and pose(rng, world, *types[question_type])
        if not question:
            continue
        wanted -= 1
        things, text, steps, answer, choices = question
        chain = reckon.chain(steps, answer)
        options = None
        if choices:
            options, answer = with_letters(rng, answer, choices)
            chain = f"{chain} {answer}"
        row = new_row(text)
        if single:
            yield located(row, things)
        if question_type != "object size" or rng.random() < SIZE_SHARE:
            row |= {"options": options, "answer": answer, "question_type": question_type}
            yield "spatial", row
            yield "coldstart", coldstart_row(row, chain)

    kinds = clear_kinds(world)
    if single and kinds:
        order = shuffled(rng, [*kinds])
        things = itertools.chain(*(kinds[kind] for kind in order))
        yield located(new_row(f"Where in the picture: {', '.join(order)}?"), things)


# ---------------------------------------------------------------------------------- files


def pictures_of(rng, easy, video, cast, difficulty):
    """(World, .jpg files) of a room; in a video's there is an order of appearance to ask for."""
    for _ in range(ROOM_TRIES):
        room = make_room(rng, video, easy, difficulty)
        pictures, ids, sights = zip(*(render(room, camera, cast) for camera in room.cameras))
        word = "frame" if video else "view"
        world = make_world(room, sights, ids, word, room.cameras[0])
        if not video or pose(rng, world, *VIDEO["appearance order"]):
            return world, [jpeg(picture) for picture in pictures]
    raise UserError(f"no video with an order of appearance in {ROOM_TRIES} rooms of {difficulty}")


def make_files(seed, split, index, cast=CAST, difficulty=DIFFICULTY, tasks="ladder"):
    """One room: files {name: bytes} of pictures, and rows {kind of FILES[tasks]: list of dicts}.

    A pure function of its arguments. The rooms of the base are none of the ladder's.
    """
    stream = SPLITS.index(split) + len(SPLITS) * [*FILES].index(tasks)
    rng = np.random.default_rng(np.random.SeedSequence(seed, spawn_key=(stream, index)))
    video = index % 4 == 3
    easy = split == "train" and not video and rng.random() < EASY
    world, pictures = pictures_of(rng, easy, video, cast, difficulty)
    folder = f"room{index:05d}"
    files = {f"{folder}/{world.word}{i}.jpg": picture for i, picture in enumerate(pictures)}
    if video and rng.random() < AVI_SHARE:
        files = {f"{folder}/video.avi": mjpeg_avi(pictures, SIZE, FRAMES_PER_SECOND)}

    # What rows are about, with the files: all pictures together, and each view by itself.
    parts = [(world, [*files])]
    if not video:
        for file, camera, sights, ids in zip(files, world.room.cameras, world.sights, world.ids):
            view = make_world(world.room, [sights], [ids], "", camera)
            parts.append((view, [file]))
    rows = {kind: [] for kind in FILES[tasks]}
    row_ids = itertools.count(100 * index)
    if tasks == "ladder":
        for part in parts[1:] + parts[:1]:  # views first
            for kind, row in ladder_rows(rng, *part, row_ids, easy):
                rows[kind].append(row)
        rows["told"] += told_rows(rng)
    else:
        for part in parts:
            rows["base"] += seen_rows(rng, *part)
        rows["base"] += told_rows(rng)
    return files, rows


def save_room(job):
    """Pool worker: write a room's pictures, return its rows."""
    folder, *arguments = job
    files, rows = make_files(*arguments)
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    return rows


def write_split(folder, count, pool, seed, *arguments):
    """One split: pictures under images/, a file of each kind of rows.

    arguments: the others of make_files.
    """
    split, tasks = folder.name, arguments[-1]
    jobs = [(folder / "images", seed, split, index, *arguments) for index in range(count)]
    folder.mkdir(parents=True)
    made = pool.imap(save_room, jobs, 4)
    rooms = list(tqdm(made, f"{split} rooms", count, mininterval=1))
    for kind, file in FILES[tasks].items():
        rows = [*itertools.chain(*(room[kind] for room in rooms))]
        if kind in ("grounding", "base", "told"):  # a curriculum: what is easy comes first
            rows.sort(key=lambda row: row.pop("level"))
        write_jsonl(folder / file, rows)


def write_rooms(
    out,
    scenes,
    seed,
    test_scenes=640,
    cast=CAST,
    processes=None,
    tasks="ladder",
    **difficulty,
):
    """Write a folder of rooms: the files of FILES[tasks] and images/ in out/{train,val,test}.

    It is made beside and renamed; nothing is done where `out` holds these very rooms.

    Args:   scenes, test_scenes: rooms of train and test; val has half as many as test.
            processes: that make rooms; None: one per core. The files do not depend on it.
            difficulty: pairs in place of those of DIFFICULTY.
    Raises: UserError for what cannot be made or written.
    """
    out = Path(out)
    difficulty = {name: sorted(difficulty.get(name, pair)) for name, pair in DIFFICULTY.items()}
    rooms = {"train": scenes, "val": test_scenes // 2, "test": test_scenes}
    request = {"rooms": rooms, "seed": seed, "size": SIZE, "cast": cast, "tasks": tasks}
    request |= difficulty
    if claim(out, request, lock=False):  # the folder is made beside and renamed
        print(f"{out} already holds these rooms")
        return
    with (
        writing(out),
        tempfile.TemporaryDirectory(prefix=f".{out.name}.", dir=out.parent) as folder,
    ):
        beside = Path(folder) / out.name
        with multiprocessing.Pool(processes) as pool:
            for split, count in rooms.items():
                write_split(beside / split, count, pool, seed, cast, difficulty, tasks)
        write_json(beside / CONFIG, request)
        os.replace(beside, out)


# ---------------------------------------------------------------------------------- the command

RANGES = {  # what the pairs of DIFFICULTY are of
    "view_sides": "walls in meters, of rooms with views",
    "video_sides": "walls in meters, of rooms with a video",
    "view_categories": "different categories in a room with views",
    "video_categories": "different categories in a room with a video",
    "scale": "factor on all sides of a thing",
}


def main():
    parser = Parser(__doc__)
    parser.add_argument("--out", required=True, help="folder to make")
    parser.add_argument("--scenes", type=int, default=3600, help="training rooms")
    parser.add_argument("--test-scenes", type=int, default=640, help="test rooms; val: half")
    parser.add_argument("--seed", type=int, default=0, help="of everything in the rooms")
    parser.add_argument("--cast", type=int, default=CAST, help="colour cast of the lens, 0: none")
    parser.add_argument("--tasks", choices=tuple(FILES), default="ladder", help="base: see talk.py")
    parser.add_argument("--processes", type=int, help="that make rooms (default: one per core)")
    parser.checks = dict.fromkeys(("scenes", "test_scenes", "seed", "cast"), not_negative)
    parser.checks["processes"] = positive
    for name, pair in DIFFICULTY.items():
        options = {"nargs": 2, "type": type(pair[0]), "default": pair}
        parser.add_argument(flag(name), help=f"{RANGES[name]}: the least and the most", **options)
        parser.checks[name] = positive
    write_rooms(**vars(parser.parse_args()))


if __name__ == "__main__":
    main_guard(main)
