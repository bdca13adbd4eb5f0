"""Procedural 3D rooms with exact geometry, in SpatialLadder-26k's own file format: the embedded default data set.

    python -m rooms.scenes --out DIR --scenes 3600 --seed 0          # writes DIR/{train,val,test}, see write_rooms
    python -m rooms.scenes --out DIR --scenes 40 --cast 0            # a few rooms, without the lens's colour cast

Three of four rooms are compact and pictured by four cameras, one at each wall: every picture gives localization and
single-image rows, the four together multi-view rows. Every fourth room is of any size and filmed from a moving camera:
video rows. All answers are computed from the 3D scene, all boxes from the visible pixels.
"""

import argparse
import itertools
import json
import math
import multiprocessing
import os
import shutil
import tempfile
from collections import Counter, namedtuple
from pathlib import Path

import numpy as np
from tqdm import tqdm

from data import Sample, prompt_text
from files import UserError
from rooms.render import (
    CAST,
    DIFFICULTY,
    FIELD_OF_VIEW,
    FURNITURE,
    SIZE,
    TRIES,
    ground,
    jpeg,
    make_room,
    mjpeg_avi,
    render,
)
from rooms.talk import (
    SIDES,
    TOLD,
    area,
    differ,
    groups,
    kinds,
    level,
    name,
    names,
    stated,
    talk,
    turn_angle,
    turned,
    where,
)
from runtime import main_guard
from settings import Parser

SPLITS = ("train", "val", "test")
FILES = {  # tasks -> kinds of rows -> their files
    "ladder": {kind: f"spld_{kind}_data.jsonl" for kind in ("grounding", "spatial", "coldstart")},
    "base": {"base": "base_data.jsonl"},
}
FRAMES_PER_SECOND, AVI_SHARE = 2, 1 / 6
EASY = 0.3  # share of training rooms with views that hold one thing
SIZE_SHARE, COUNT_ONE = (
    0.25,
    0.12,
)  # share of size questions kept; chance to count a category of one if none has more
# Margins that make answers unambiguous: meters to the second nearest, meters and picture widths between left and
# right (front and back), degrees to a sector's edge; closer things than MIN_DISTANCE have no distance asked.
NEAREST_MARGIN, SIDE_MARGIN, COLUMN_MARGIN, ANGLE_MARGIN, MIN_DISTANCE = 0.3, 0.35, 0.04, 15, 0.2
# How often a type comes before others: the more, the fewer rooms allow it; the last two, of video only, always.
WEIGHTS = {
    "object size": 2,
    "absolute distance": 3,
    "relative direction": 4,
    "relative distance": 8,
    "object count": 12,
    "room size": 1e9,
    "appearance order": 1e9,
}

# what questions are asked of: a room; Sights by picture and thing; what a picture is called ("", "view", "frame");
# things that may be named, being clear somewhere and the only ones of their category; {thing: number from 1 of the
# first picture that shows it clearly}; (N, 2) decimeters right and ahead of the first camera; that camera
World = namedtuple("World", "room sights word named first places camera")


# ---------------------------------------------------------------------------------------------------- questions
def make_world(room, sights, word, camera):
    count, first = Counter(t.name for t in room.things), {}
    for number, picture in reversed(list(enumerate(sights, 1))):
        first.update((k, number) for k, sight in enumerate(picture) if sight.clear)
    named = [k for k in sorted(first) if count[room.things[k].name] == 1]
    places = np.array([[round(10 * v) for v in ground(camera, t.center)] for t in room.things])
    return World(room, sights, word, named, first, places, camera)


# Each function takes the things in the order of the question's text. It returns None where they make no unambiguous
# question, else the answer in words or as a number, the end of the chain, the options. Chains are in the words of
# base_tasks.py: what is new to the base are the questions, the order of the steps and how they end in an answer, without a
# unit or a full stop: what is to be said again then stands right before </think>.
def object_size(world, a):
    w, d, h = (round(100 * v) for v in world.room.things[a].dims.tolist())
    return str(max(w, d, h)), f"{w} by {d} by {h}: {max(w, d, h)}", ()


def absolute_distance(world, a, b):
    if world.room.gaps[a, b] >= MIN_DISTANCE:
        answer = f"{world.room.gaps[a, b]:.1f}"
        return answer, f"{round(math.dist(world.places[a], world.places[b]))} apart: {answer}", ()


def relative_distance(world, *things):
    others = names(world, things[:-1])
    gaps = world.room.gaps[things[-1], things[:-1]].tolist()
    least, second = sorted(gaps)[:2]
    if least >= MIN_DISTANCE and second - least >= NEAREST_MARGIN:
        answer = others[gaps.index(least)]
        past = ", ".join(f"{other} {round(10 * gap)}" for gap, other in sorted(zip(gaps, others)))
        return answer, f"Past {past}: {answer}", others


def camera_direction(world, a, b):
    """Front is nearer to the camera; left and right agree on the floor and in the picture."""
    (xa, ya), (xb, yb) = (ground(world.camera, world.room.things[k].center) for k in (a, b))
    columns = (xa / ya - xb / yb) / (2 * math.tan(FIELD_OF_VIEW / 2))
    if (
        min(abs(xa - xb), abs(ya - yb)) >= SIDE_MARGIN
        and columns * math.copysign(1, xa - xb) >= COLUMN_MARGIN
    ):
        side, order = "left" if xa < xb else "right", "front" if ya < yb else "back"
        return (
            f"{side}-{order}",
            f"it is {differ(*world.places[[a, b]].tolist())}: {side}-{order}",
            SIDES[4:],
        )


def relative_direction(world, a, b, c):
    """Standing at a's centre and facing b's; c is at the back beyond 135 degrees to either side, as in VSI-Bench."""
    centers = [world.room.things[k].center for k in (a, b, c)]
    turn, near = turn_angle(*centers), min(math.dist(centers[0], other) for other in centers[1:])
    if near >= 2 * SIDE_MARGIN and min(abs(abs(turn) - edge) for edge in (0, 135)) >= ANGLE_MARGIN:
        side = "left" if turn > 0 else "right"
        answer = "back" if abs(turn) > 135 else side
        return answer, f"turn {turned(*centers)}: {answer}", ("left", "right", "back")


def object_count(world, *things):
    return str(len(things)), f"it holds {len(things)}", ()


def room_size(world):
    w, d = (round(10 * v) for v in world.room.sides)
    return area(w, d), f"{w} by {d}: {area(w, d)}", ()


def appearance_order(world, *things):
    """The first pictures differ, both those with any pixel of a thing and those that show it clearly."""
    anywhere = {
        k: next(i for i, sight in enumerate(world.sights, 1) if sight[k].box) for k in things
    }
    order = sorted(things, key=world.first.get)
    if all(
        seen[a] < seen[b] for seen in (world.first, anywhere) for a, b in itertools.pairwise(order)
    ):
        answer, *wrong = (", ".join(names(world, some)) for some in itertools.permutations(order))
        firsts = ". ".join(f"{name(world, k)}{where(world, k)}" for k in order)
        return answer, f"{firsts}: {answer}", (answer, *wrong)


# type: its function, and texts to try in turn, with one slot for each thing that may be named
VIDEO = {
    "object size": (object_size, ["How many centimeters is the longest dimension of the {}?"]),
    "absolute distance": (
        absolute_distance,
        ["How many meters apart are the {} and the {} at their closest points?"],
    ),
    "relative distance": (
        relative_distance,
        [
            "Which of {}, {} and {} is nearest to the {}?",
            "Which of {} and {} is nearest to the {}?",
        ],
    ),
    "relative direction": (
        relative_direction,
        ["If I stand by the {} and face the {}, is the {} to my left, right or back?"],
    ),
    "object count": (object_count, ["How many {} are in this room?"]),
    "room size": (room_size, ["How many square meters is this room?"]),
    "appearance order": (appearance_order, ["In what order do {}, {} and {} first appear?"]),
}
MULTI_VIEW = {t: VIDEO[t] for t in VIDEO if t not in ("room size", "appearance order")}
SINGLE_IMAGE = {t: MULTI_VIEW[t] for t in MULTI_VIEW if t != "object count"} | {
    "relative direction": (
        camera_direction,
        ["Seen from the camera, where is the {} relative to the {}?"],
    )
}
TYPES = {"single_image": SINGLE_IMAGE, "multi_view": MULTI_VIEW, "video": VIDEO}


def ask(rng, world, function, texts):
    """(things, text, answer, chain, options' texts), or None where the world allows no such question. Of the answers in
    words that it allows, each is equally likely. Of counts, 1 is asked seldom and where no category has more."""
    for text in texts:
        candidates, found = list(itertools.permutations(world.named, text.count("{}"))), {}
        if function is object_count:  # all things of a category, each clear in some picture
            clear = groups(world).values()
            candidates = [g for g in clear if len(g) > 1] or [
                g for g in clear if rng.random() < COUNT_ONE
            ]
        for things in (candidates[i] for i in rng.permutation(len(candidates))[:60]):
            if made := function(world, *things):
                found.setdefault(made[0] if made[2] else "", (things, *made))
        if found:
            things, answer, steps, choices = found[rng.choice(sorted(found))]
            named = names(world, things)
            if function is object_count:
                named = [named[0] + "s"]
            return (
                things,
                text.format(*named),
                answer,
                f"{stated(world, things)} {steps}".strip(),
                choices,
            )


# ---------------------------------------------------------------------------------------------------- files
def make_files(seed, split, index, size=SIZE, cast=CAST, difficulty=DIFFICULTY, tasks="ladder"):
    """One room's files {name: bytes} and rows {"grounding", "spatial", "coldstart": list of dicts}, or of FILES["base"].

    A pure function of its arguments. The rooms of the base are none of the ladder's, whatever their seeds."""
    stream = SPLITS.index(split) + len(SPLITS) * (tasks == "base")
    rng = np.random.default_rng(np.random.SeedSequence(seed, spawn_key=(stream, index)))
    folder, video, files = f"room{index:05d}", index % 4 == 3, {}

    easy = split == "train" and not video and rng.random() < EASY
    for _ in range(TRIES):
        room = make_room(rng, video, easy, difficulty)
        pictures, ids, sights = zip(*(render(room, camera, size, cast) for camera in room.cameras))
        world = make_world(room, sights, "frame" if video else "view", room.cameras[0])
        if not video or ask(
            rng, world, *TYPES["video"]["appearance order"]
        ):  # a path worth filming
            break
    else:
        raise UserError(
            f"no video with an order of appearance in {TRIES} rooms of this difficulty {difficulty}"
        )
    frames = [jpeg(picture) for picture in pictures]
    if video and rng.random() < AVI_SHARE:
        files[f"{folder}/video.avi"] = mjpeg_avi(frames, size, FRAMES_PER_SECOND)
    else:
        files |= {f"{folder}/{world.word}{i}.jpg": frame for i, frame in enumerate(frames)}
    parts = [
        (world, [*files], ids)
    ]  # what rows are made of: all pictures together, and each view by itself
    if not video:
        parts += [
            (make_world(room, [sight], "", camera), [file], [shown])
            for file, camera, sight, shown in zip(files, room.cameras, sights, ids)
        ]
    if tasks == "base":
        return files, {"base": [row for part in parts for row in base_rows(rng, *part)]}
    return files, ladder_rows(rng, parts, itertools.count(100 * index), easy)


def base_rows(rng, world, images, ids):
    """Rows in chat messages: questions about some pictures, each by itself, and some about no picture."""
    media = [{"type": "image", "image": path} for path in images]
    if world.word == "frame":
        media = [{"type": "video", "video": images if len(images) > 1 else images[0]}]
    turns = (
        talk(rng, world, ids) if seen(world) else []
    )  # of a picture that shows nothing there is nothing to say
    asked = [(media, *turn) for turn in turns] + [
        ([], task.__name__, *task(rng, world, ids)) for task in TOLD
    ]
    return [
        {
            "messages": [
                {"role": "user", "content": [*parts, {"type": "text", "text": question}]},
                {"role": "assistant", "content": answer},
            ],
            "question_type": task,
            "level": (level(world, task), seen(world)),
        }
        for parts, task, question, answer in asked
    ]


def seen(world):
    """The most things that a picture shows."""
    return max(sum(sight.box is not None for sight in picture) for picture in world.sights)


def ladder_rows(rng, parts, ids, easy):
    """Rows in SpatialLadder-26k's formats. parts: see make_files. ids: numbers of the rows."""
    rows = {"grounding": [], "spatial": [], "coldstart": []}

    def locate(world, row, things):
        """A localization row: the boxes of the things in the order in which the question names them."""
        boxes = [{"bbox_2d": [*world.sights[0][k].box], "label": name(world, k)} for k in things]
        rows["grounding"].append(row | {"answer": boxes, "level": seen(world)})

    for world, images, _ in parts[1:] + parts[:1]:  # views first
        data_type, number = {
            "": ("single_image", 2),
            "frame": ("video", 4),
            "view": ("multi_view", 1 if easy else 2),
        }[world.word]
        types = sorted(TYPES[data_type], key=lambda t: rng.exponential(1 / WEIGHTS[t]))
        asked = ((t, ask(rng, world, *TYPES[data_type][t])) for t in types)
        for question_type, made in itertools.islice((pair for pair in asked if pair[1]), number):
            things, text, answer, chain, choices = made
            wrong = [c for c in choices if c != answer]
            texts = [wrong[i] for i in rng.permutation(len(wrong))[:3]] + [answer]
            order = rng.permutation(len(texts))
            options = [f"{'ABCD'[i]}. {texts[k]}" for i, k in enumerate(order)] if choices else None
            row = {
                "question_id": next(ids),
                "question": text,
                "image": images,
                "data_type": data_type,
            }
            if data_type == "single_image":
                locate(world, row, things)
            if options:
                answer = next(option[0] for option in options if option[3:] == answer)
                chain = f"{chain} {answer}"
            if question_type != "object size" or rng.random() < SIZE_SHARE:
                row |= {"options": options, "answer": answer, "question_type": question_type}
                rows["spatial"].append(row)
                sample = Sample("scenes.py", "", text, question_type, answer, tuple(options or ()))
                rows["coldstart"].append(
                    row
                    | {
                        "solution": f"<think>{chain}</think><answer>{answer}</answer>",
                        "prompt": prompt_text(sample, "thinking"),
                    }
                )
        if data_type == "single_image" and (
            clear := kinds(world)
        ):  # and where everything is of the kinds wholly clear
            order = rng.permutation([*clear]).tolist()
            locate(
                world,
                {
                    "question_id": next(ids),
                    "question": f"Where in the picture: {', '.join(order)}?",
                    "image": images,
                    "data_type": data_type,
                },
                [k for kind in order for k in clear[kind]],
            )
    return rows


def save_room(job):
    """Pool worker: write a room's files, return its rows."""
    folder, arguments = job
    files, rows = make_files(*arguments)
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    return rows


def write_rooms(
    out,
    scenes,
    seed,
    test_scenes=640,
    size=SIZE,
    cast=CAST,
    processes=None,
    tasks="ladder",
    **difficulty,
):
    """Write out/{train,val,test}/spld_{grounding,spatial,coldstart}_data.jsonl (cold start: train only), or with tasks
    "base" base_data.jsonl, and images/roomNNNNN/{view0..3.jpg, frame0..7.jpg, video.avi}, out/meta.json: `scenes` training
    rooms, `test_scenes` test rooms, half as many for validation. Built beside and renamed; does nothing where out holds
    this very request. `difficulty` are pairs in place of those of DIFFICULTY. UserError for what cannot be made or written.
    """
    difficulty = {name: [*difficulty.get(name, pair)] for name, pair in DIFFICULTY.items()}
    out, request = (
        Path(out),
        dict(
            difficulty,
            scenes=scenes,
            test_scenes=test_scenes,
            seed=seed,
            size=size,
            cast=cast,
            tasks=tasks,
        ),
    )
    for name in ("scenes", "test_scenes", "seed", "cast", "size"):
        if request[name] < 0 or (name == "size" and size % 28 + (size == 0)):
            raise UserError(
                f"--{name.replace('_', '-')} is {request[name]}, expected "
                + ("a multiple of 28" if name == "size" else "0 or more")
            )
    for name, (low, high) in difficulty.items():
        if not 0 < low <= high < 100 or ("categories" in name and high > len(FURNITURE)):
            most = f", at most {len(FURNITURE)}" * ("categories" in name)
            raise UserError(
                f"--{name.replace('_', '-')} {low} {high}: expected the least and the most, above 0{most}"
            )
    try:
        if out.exists() and any(out.iterdir()):
            meta = out / "meta.json"
            if not meta.exists() or json.loads(meta.read_text()) != request:
                raise UserError(
                    f"--out {out}: expected a new folder or the rooms {json.dumps(request)}, found others"
                )
            return print(f"{out} already holds these rooms")
        out.parent.mkdir(parents=True, exist_ok=True)
        beside = Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.parent))
    except OSError as error:
        raise UserError(f"--out {out}: cannot write there: {error.strerror}") from None
    try:
        beside.chmod(0o755)
        with multiprocessing.Pool(processes) as pool:
            for split, rooms in zip(SPLITS, (scenes, test_scenes // 2, test_scenes)):
                folder = beside / split
                jobs = [
                    (folder / "images", (seed, split, index, size, cast, difficulty, tasks))
                    for index in range(rooms)
                ]
                folder.mkdir()
                made = list(
                    tqdm(pool.imap(save_room, jobs, 4), f"{split} rooms", rooms, mininterval=1)
                )
                for kind, file in FILES[tasks].items():
                    rows = [row for room in made for row in room[kind]]
                    if kind in ("grounding", "base"):  # a curriculum: what is easy comes first
                        rows.sort(key=lambda row: row.pop("level"))
                    if kind != "coldstart" or split == "train":
                        (folder / file).write_text("".join(json.dumps(row) + "\n" for row in rows))
        (beside / "meta.json").write_text(json.dumps(request) + "\n")
        os.replace(beside, out)
    finally:
        shutil.rmtree(beside, ignore_errors=True)


def main():
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", required=True, help="folder to make")
    parser.add_argument("--scenes", type=int, default=3600, help="training rooms")
    parser.add_argument(
        "--test-scenes", type=int, default=640, help="test rooms; validation has half as many"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--size", type=int, default=SIZE, help="side of a picture in pixels, a multiple of 28"
    )
    parser.add_argument(
        "--cast", type=int, default=CAST, help="the lens's colour cast in grey levels, 0 for none"
    )
    parser.add_argument(
        "--tasks",
        choices=tuple(FILES),
        default="ladder",
        help="rows of the ladder, or what its base "
        "learned before: plain talk (base_tasks.py) about other rooms",
    )
    parser.add_argument("--processes", type=int, help="default: one per core")
    for name, pair in DIFFICULTY.items():
        parser.add_argument(
            f"--{name.replace('_', '-')}",
            nargs=2,
            type=type(pair[0]),
            default=pair,
            metavar=("LEAST", "MOST"),
            help="difficulty, default: %(default)s",
        )
    write_rooms(**vars(parser.parse_args()))


if __name__ == "__main__":
    main_guard(main)
