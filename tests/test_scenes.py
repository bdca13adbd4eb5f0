"""The answers, boxes and files of the rooms, recomputed from the 3D scene by other routes."""

import io
import itertools
import json
import math
import re
from collections import Counter, namedtuple

import numpy as np
import pytest
from PIL import Image
from test_reckon import follow, parted

from files import UserError
from rooms import render as render_module
from rooms import scenes
from rooms.render import (
    CAST,
    CEILING,
    DIFFICULTY,
    FURNITURE,
    GAP,
    SIZE,
    Camera,
    Room,
    Sight,
    jpeg,
    make_room,
    make_thing,
    mjpeg_avi,
    polygon_distance,
    render,
)
from rooms.talk import TOLD, make_world
from runtime import main_guard

ROOMS = range(24)


@pytest.fixture(scope="module")
def made():
    """[(index, room, [(image, ids, sights)], rows, files)] of some training rooms."""
    out = []
    last = {}  # what make_files drew last

    def keep_room(*arguments):
        last.update(room=make_room(*arguments), pictures=[])
        return last["room"]

    def keep_picture(*arguments):
        last["pictures"].append(render(*arguments))
        return last["pictures"][-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scenes, "make_room", keep_room)
        patch.setattr(scenes, "render", keep_picture)
        for index in ROOMS:
            files, rows = scenes.make_files(5, "train", index)
            out.append((index, last["room"], last["pictures"], rows, files))
    return out


def cell(thing, n=120):
    """Points on the outline of a thing's footprint, from its yaw by a rotation matrix."""
    w, d = thing.dims[:2]
    t = np.linspace(-0.5, 0.5, n)
    outline = np.concatenate(
        [np.c_[t * w, np.full(n, s * d / 2)] for s in (-1, 1)]
        + [np.c_[np.full(n, s * w / 2), t * d] for s in (-1, 1)]
    )
    turn = np.array(
        [[math.cos(thing.yaw), -math.sin(thing.yaw)], [math.sin(thing.yaw), math.cos(thing.yaw)]]
    )
    return outline @ turn.T + thing.center


def brute_distance(a, b):
    """Shortest distance between sampled outlines: heights overlap, so the floor decides."""
    return np.linalg.norm(cell(a)[:, None] - cell(b), axis=2).min()


def between(a, b):
    """Meters from middle to middle."""
    return abs(complex(*a.center) - complex(*b.center))


def things_of(room, name):
    """The numbers of the things of a category."""
    return [k for k, thing in enumerate(room.things) if thing.name == name]


def questions(made):
    """(room, pictures, row, named things' numbers, solution) of every spatial row."""
    for _, room, pictures, rows, _ in made:
        for row, cold in zip(rows["spatial"], rows["coldstart"]):
            names = re.findall("|".join(FURNITURE), row["question"])
            numbers = [things_of(room, name) for name in names]
            yield room, pictures, row, numbers, cold["solution"]


def chosen(row):
    """The text of the right option."""
    (text,) = [o[3:] for o in row["options"] if o[0] == row["answer"]]
    return text


def view_of(row):
    """The number of the camera whose picture a row is about: the digit before .jpg."""
    return int(row["image"][0][-5])


def test_rooms_are_solid(made):
    """No furniture stands in walls, in other furniture, through the ceiling or over a camera.

    Walls are whole quarter meters long.
    """
    for _, room, _, _, _ in made:
        assert (room.sides * 4 % 1 == 0).all()
        for a, b in itertools.combinations(room.things, 2):
            assert brute_distance(a, b) > GAP - 1e-9
            for one, other in ((a, b), (b, a)):  # no outline enters the other's box
                c, s = math.cos(other.yaw), math.sin(other.yaw)
                local = (cell(one) - other.center) @ [[c, -s], [s, c]]
                assert (np.abs(local) > other.dims[:2] / 2).any(1).all()
        for thing, solids in zip(room.things, room.solids):
            assert (
                (cell(thing) > 0).all()
                and (cell(thing) < room.sides).all()
                and thing.dims[2] < CEILING
            )
            assert (
                min(np.linalg.norm(cell(thing) - (c.x, c.y), axis=1).min() for c in room.cameras)
                > 0.7
            )
            for (
                solid
            ) in solids:  # the solids stay in the thing's box and are what their vertices span
                assert (solid.normals @ solid.vertices.T <= solid.offsets[:, None] + 1e-9).all()
                assert (
                    (solid.normals @ solid.vertices.T > solid.offsets[:, None] - 1e-9).sum(1) >= 3
                ).all()
            vertices = np.concatenate([s.vertices for s in solids])
            c, s = math.cos(thing.yaw), math.sin(thing.yaw)
            local = np.c_[(vertices[:, :2] - thing.center) @ [[c, -s], [s, c]], vertices[:, 2]]
            assert np.allclose(local.max(0) - local.min(0), thing.dims)


def test_views_go_around_the_room(made):
    """One camera at each wall looks inwards, the next at the wall to its right."""
    for index, room, _, _, _ in made:
        if index % 4 < 3:
            middle = complex(*room.sides) / 2
            for camera, following in itertools.pairwise([*room.cameras, room.cameras[0]]):
                inwards = middle - complex(camera.x, camera.y)
                assert abs(np.angle(inwards / np.exp(1j * camera.yaw))) < 0.35
                turned = np.exp(1j * (following.yaw - camera.yaw))
                assert abs(np.angle(turned / 1j)) <= 0.2 + 1e-9


def test_sights_are_those_of_a_second_renderer(made):
    """Boxes, ids and visibility agree with rays that are clipped plane by plane, in float64."""
    for _, room, pictures, _, _ in made[:4]:
        for camera, (_, ids, sights) in list(zip(room.cameras, pictures))[:3]:
            focal, alone = SIZE / 2 / math.tan(math.radians(32)), []
            yaw, pitch = camera.yaw, math.radians(15)
            ahead = np.array(
                [math.cos(yaw) * math.cos(pitch), math.sin(yaw) * math.cos(pitch), -math.sin(pitch)]
            )
            right = np.array([math.sin(yaw), -math.cos(yaw), 0])
            v, u = np.mgrid[:SIZE, :SIZE] + 0.5 - SIZE / 2
            rays = (
                focal * ahead + u[..., None] * right + v[..., None] * np.cross(ahead, right)
            )  # (S, S, 3)
            for solids in room.solids:
                t = np.full((SIZE, SIZE), np.inf)
                for solid in solids:  # clip every ray of the picture by one plane after the other
                    near, far = np.zeros((SIZE, SIZE)), np.full((SIZE, SIZE), np.inf)
                    for normal, offset in zip(solid.normals, solid.offsets):
                        slope, level = rays @ normal, offset - normal @ [camera.x, camera.y, 1.5]
                        near = np.where(slope < 0, np.maximum(near, level / slope), near)
                        far = np.where(slope > 0, np.minimum(far, level / slope), far)
                    t = np.where((near < far) & (near < t), near, t)
                alone.append(t)
            nearest = np.min(alone, 0)
            expected = np.where(nearest < np.inf, np.argmin(alone, 0) + 1, 0)
            assert (expected != ids).mean() < 1e-3  # rounding at the edges
            for k, sight in enumerate(sights):
                ys, xs = np.nonzero(ids == k + 1)
                assert sight.box == (
                    (xs.min(), ys.min(), xs.max() + 1, ys.max() + 1) if len(xs) else None
                )
                if len(xs) > 50:
                    assert sight.ratio == pytest.approx(
                        len(xs) / (alone[k] < np.inf).sum(), abs=0.05
                    )


def test_a_thing_alone_is_wholly_visible():
    """The ratio compares with the thing alone in the room; a lens cast changes no id."""
    room = make_room(np.random.default_rng(3), False)
    for k in range(len(room.things)):
        single = room._replace(things=room.things[k : k + 1], solids=room.solids[k : k + 1])
        for camera in room.cameras:
            both = render(room, camera)[2][k]
            (sight,) = render(single, camera, cast=0)[2]
            assert sight.ratio in (0.0, 1.0)
            if both.box:
                assert sight.box[0] <= both.box[0] and sight.box[3] >= both.box[3]


def test_cast_is_fixed_to_the_picture():
    """Redder and less blue to the right, greener downwards; 0 switches it off."""
    room = make_room(np.random.default_rng(1), False)
    plain, cast = (render(room, room.cameras[0], cast=c)[0].astype(int) for c in (0, CAST))
    middle = (plain > CAST) & (plain < 255 - CAST)
    for channel, axis, sign in ((0, 1, 1), (1, 0, 1), (2, 1, -1)):
        difference = np.where(middle, cast - plain, 0)[..., channel]
        ramp = sign * np.linspace(-CAST, CAST, SIZE)
        expected = np.broadcast_to(ramp if axis else ramp[:, None], (SIZE, SIZE))
        assert (np.abs(difference - expected)[middle[..., channel]] <= 1).all()


# Answers follow from numbers that are rounded: sizes to ten centimeters, places to a quarter meter.


def check_size(room, row, things, pictures):
    size = int(row["answer"])
    assert size % 10 == 0
    assert abs(size - 100 * sorted(things[0].dims)[-1]) <= 5 + 1e-9


def check_distance(room, row, things, pictures):
    distance = between(*things)
    assert abs(float(row["answer"]) - distance) <= 0.15 + 1e-9
    assert distance >= 0.5


def check_nearest(room, row, things, pictures):
    *others, target = things
    (least, name), (second, _), *_ = sorted((between(o, target), o.name) for o in others)
    assert chosen(row) == name
    assert second - least >= 0.4 - 1e-9
    assert sorted(o[3:] for o in row["options"]) == sorted(o.name for o in others)


def check_side_of_camera(room, row, things, pictures):
    camera = room.cameras[view_of(row)]
    c, s = math.cos(camera.yaw), math.sin(camera.yaw)
    axes = np.array([[s, -c], [c, s]])
    (xa, za), (xb, zb) = (axes @ (t.center - (camera.x, camera.y)) for t in things)
    side = "left" if xa < xb else "right"
    order = "front" if za < zb else "back"
    assert chosen(row) == f"{side}-{order}"
    assert min(abs(xa - xb), abs(za - zb)) > 0.34
    assert (xa / za < xb / zb) == (xa < xb)  # in the picture too


def check_side_of_person(room, row, things, pictures):
    stand, face, target = (complex(*t.center) for t in things)
    # The facing direction is turned onto the real axis.
    degrees = np.angle((target - stand) / (face - stand), deg=True)
    expected = "left" if degrees > 0 else "right"
    if abs(degrees) > 135:
        expected = "back"
    assert chosen(row) == expected
    assert min(abs(degrees), abs(abs(degrees) - 135)) >= 15 - 1e-6
    assert min(abs(target - stand), abs(face - stand)) >= 0.7 - 1e-9


def check_count(room, row, things, pictures):
    assert int(row["answer"]) == Counter(t.name for t in room.things)[things[0].name]


def check_room(room, row, things, pictures):
    assert abs(int(row["answer"]) - np.prod(room.sides)) <= 0.5


def check_order(room, row, things, pictures):
    first = {}
    for number, (_, ids, _) in enumerate(pictures):
        for thing in things:
            if (ids == room.things.index(thing) + 1).any():
                first.setdefault(thing.name, number)
    assert len(set(first.values())) == 3
    assert chosen(row) == ", ".join(sorted(first, key=first.get))
    assert len(row["options"]) == len(set(row["options"])) == 4


CHECKS = {
    "object size": check_size,
    "absolute distance": check_distance,
    "relative distance": check_nearest,
    "relative direction": check_side_of_person,
    "object count": check_count,
    "room size": check_room,
    "appearance order": check_order,
}


def test_answers_from_the_scene(made):
    """Every answer, recomputed from the stored room without the functions that made it."""
    seen = set()
    for room, pictures, row, numbers, _ in questions(made):
        kind = row["question_type"]
        things = [room.things[ks[0]] for ks in numbers]
        if kind != "object count":
            assert all(len(ks) == 1 for ks in numbers)  # the only ones of their category
        check = CHECKS[kind]
        if check is check_side_of_person and row["data_type"] == "single_image":
            check = check_side_of_camera
        check(room, row, things, pictures)
        seen.add(check)
    assert seen == {*CHECKS.values(), check_side_of_camera}


def bare_world(rng):
    """Four things and a camera anywhere, all in clear sight and drawn nowhere."""
    names = rng.permutation([*FURNITURE])[:4].tolist()
    things = [make_thing(name, rng.uniform(0, 5, 2), 0, (0.5, 0.5, 1)) for name in names]
    camera = Camera(*rng.uniform(0, 5, 2), rng.uniform(0, 7))
    sides = np.array([5.0, 5.0])
    room = Room(sides=sides, things=things, solids=[], cameras=[camera], tints=None)
    return make_world(room, [[Sight((0, 0, 9, 9), 1.0, True)] * 4], [None], "view", camera)


@pytest.mark.parametrize(
    "function, count, check",
    (
        (scenes.absolute_distance, 2, check_distance),
        (scenes.relative_distance, 3, check_nearest),
        (scenes.relative_distance, 4, check_nearest),
        (scenes.relative_direction, 3, check_side_of_person),
    ),
)
def test_nothing_is_asked_where_rounding_changes_the_answer(function, count, check):
    """A thousand questions about things at places that no room was made for."""
    rng = np.random.default_rng(0)
    asked = Counter()
    for _ in range(1000):
        world = bare_world(rng)
        question = function(world, *world.items[:count])
        asked[bool(question)] += 1
        if question:
            _, answer, choices = question
            row = {"answer": answer, "options": None}
            if choices:
                letters = dict(zip(choices, "ABC"))
                options = [f"{letter}. {choice}" for choice, letter in letters.items()]
                row = {"answer": letters[answer], "options": options}
            check(world.room, row, world.room.things[:count], None)
    assert asked[True] > 200 and asked[False] > 20


def test_named_things_are_visible(made):
    """A question about something that no picture shows well could not be answered."""
    for _, pictures, row, numbers, _ in questions(made):
        shown = pictures
        if row["data_type"] == "single_image":
            shown = [pictures[view_of(row)]]
        for k in itertools.chain(*numbers):
            sights = [(p[2][k], (p[1] == k + 1).sum()) for p in shown]
            assert any(n >= 0.005 * SIZE**2 and s.ratio >= 0.5 for s, n in sights)


def test_localization_rows(made):
    """Boxes of the visible pixels of all things named: by the question's order, then left to right.

    A spatial question's twin shares its id, and names things that are the only ones of their kind.
    """
    sizes = Counter()
    for _, room, pictures, rows, files in made:
        spatial = {row["question_id"]: row for row in rows["spatial"]}
        for row in rows["grounding"]:
            _, ids, sights = pictures[view_of(row)]
            expected = []
            for name in re.findall("|".join(FURNITURE), row["question"]):
                kind = [k for k, t in enumerate(room.things) if t.name == name]
                assert len(kind) == 1 or (
                    row["question_id"] not in spatial and row["question"].startswith("Where")
                )
                shown = {k: np.argwhere(ids == k + 1) for k in kind if (ids == k + 1).any()}
                assert shown and all(sights[k].clear for k in shown)
                corners = [
                    [*p.min(0)[::-1].tolist(), *(p.max(0)[::-1] + 1).tolist()]
                    for p in shown.values()
                ]
                expected += [{"bbox_2d": box, "label": name} for box in sorted(corners)]
            assert row["answer"] == expected
            twin = spatial.get(row["question_id"], row)
            assert (twin["question"], twin["image"]) == (row["question"], row["image"]) and row[
                "image"
            ][0] in files
            sizes[len(row["answer"])] += 1
    assert {1, 2, 3, 4} <= set(sizes)


# What a chain's steps are called in reckon.py, and what their facts state.
STEPS = {
    "object size": ("longest", "sides"),
    "absolute distance": ("apart", "place"),
    "relative distance": ("nearest", "place"),
    "relative direction": ("turn", "place"),
    "object count": ("total", "place"),
    "room size": ("floor", "walls"),
    "appearance order": ("order", "first"),
}

# A chain that is read. facts: [(name, numbers)] in the question's order; numbers: of the things
# that the question names; pictures: those that the row is about; camera: of the first of them.
Chain = namedtuple("Chain", "room row kind facts result numbers pictures camera")


def chains(made):
    """Every chain; its steps follow from the words before them."""
    for room, pictures, row, numbers, solution in questions(made):
        task, kind = STEPS[row["question_type"]]
        camera = room.cameras[0]
        if row["data_type"] == "single_image":
            camera, pictures = room.cameras[view_of(row)], [pictures[view_of(row)]]
            task = "compare" if task == "turn" else task
        text = re.fullmatch("<think>(.*)</think>.*", solution)[1]
        if row["options"]:
            text, letter = text.rsplit(" ", 1)
            assert letter == row["answer"]
        steps, result = parted(task, text)
        facts, expected = follow(task, steps)
        assert result == expected
        if task == "nearest":  # the question names the target last
            facts = facts[1:] + facts[:1]
        numbers = [*itertools.chain(*numbers)]
        names = [room.things[k].name for k in numbers]
        assert [name for name, _ in facts] == (names or ["room"])
        yield Chain(room, row, kind, facts, result, numbers, pictures, camera)


def test_chains_end_with_the_answer(made):
    """The answer's text follows from the steps; where there are options their letter stands last.

    A cold start has every spatial row, with a prompt that asks for a chain of thought.
    """
    for _, _, row, _, solution in questions(made):
        chain, answer = re.fullmatch("<think>(.*)</think><answer>(.*)</answer>", solution).groups()
        assert answer == row["answer"]
        assert chain.endswith(f": {chosen(row)} {answer}" if row["options"] else f": {answer}")
        assert len(chain.split()) <= 60
    for chain in chains(made):
        assert chain.result == (chosen(chain.row) if chain.row["options"] else chain.row["answer"])
    for _, _, _, rows, _ in made:
        for row, cold in zip(rows["spatial"], rows["coldstart"], strict=True):
            assert cold | row == cold
            assert cold.keys() - row.keys() == {"solution", "prompt"}
            assert cold["prompt"].startswith(row["question"] + "\n")
            assert "between <think> and </think>" in cold["prompt"]
            assert all(option in cold["prompt"].split("\n") for option in row["options"] or ())


def test_chains_state_where_things_are(made):
    """With wrong places a chain would teach the model to ignore what it sees.

    They are in quarter meters from the first camera, at 30 30, and half of one off at most.
    """
    for chain in chains(made):
        if chain.kind != "place":
            continue
        exact = {}
        for k in chain.numbers:
            exact[k] = place_on_the_map(chain.camera, chain.room.things[k])
        for k, (_, place) in zip(chain.numbers, chain.facts):
            if chain.row["question_type"] == "object count":  # in any order, but each thing once
                k = min(exact, key=lambda k: abs(exact[k] - complex(*place)))
            off = exact.pop(k) - complex(*place)
            assert max(abs(off.real), abs(off.imag)) <= 0.5 + 1e-6


def place_on_the_map(camera, thing):
    """To the right + ahead * 1j, in quarter meters, with the camera at 30 + 30j."""
    toward = complex(*thing.center) - complex(camera.x, camera.y)
    toward *= 4 * np.exp(-1j * camera.yaw)  # now ahead is real, and left imaginary
    return complex(30 - toward.imag, 30 + toward.real)


def test_chains_state_sizes_and_walls(made):
    """Every side to the nearest ten centimeters, and walls in quarter meters, the shorter first."""
    for chain in chains(made):
        if chain.kind == "sides":
            ((_, sides),) = chain.facts
            (number,) = chain.numbers
            assert all(side % 10 == 0 for side in sides)
            assert np.abs(sides - 100 * chain.room.things[number].dims).max() <= 5 + 1e-9
        if chain.kind == "walls":
            ((_, walls),) = chain.facts
            assert [wall / 4 for wall in walls] == sorted(chain.room.sides)


def test_chains_state_first_pictures(made):
    """Those that show a thing clearly."""
    for chain in chains(made):
        if chain.kind == "first":
            for k, (_, (number,)) in zip(chain.numbers, chain.facts):
                clear = [sights[k].clear for _, _, sights in chain.pictures]
                assert number == clear.index(True) + 1


def test_told_rows_are_of_the_base(made):
    """As many as a room of the base brings; see test_talk.py."""
    counts = Counter()
    for _, _, _, rows, _ in made:
        for row in rows["told"]:
            counts[row["question_type"]] += 1
            assert [part["type"] for part in row["messages"][0]["content"]] == ["text"]
    assert counts.keys() == TOLD.keys()
    expected = len(made) * sum(TOLD.values())
    assert abs(counts.total() - expected) < 4 * expected**0.5


@pytest.mark.slow
def test_answers_are_balanced():
    """No letter, side or position is right more often: else it would be learned, not the scene."""
    letters, sides = {n: Counter() for n in (2, 3, 4)}, Counter()
    for row in itertools.chain(
        *(scenes.make_files(9, "train", i)[1]["spatial"] for i in range(160))
    ):
        if row["options"]:
            letters[len(row["options"])][row["answer"]] += 1
            if row["data_type"] == "single_image" and row["question_type"] == "relative direction":
                sides[chosen(row)] += 1
    for n, counts in [*letters.items(), (4, sides)]:
        total = counts.total()
        assert total >= 20 and len(counts) == n
        assert all(
            abs(c - total / n) < 4 * math.sqrt(total / n * (1 - 1 / n)) for c in counts.values()
        )  # 4 sigma


def test_polygon_distance_by_sampling():
    """The closed form against dense samples, for turned boxes at any distance."""
    rng = np.random.default_rng(0)
    for _ in range(200):
        a, b = (
            make_thing("bin", rng.uniform(0, 4, 2), rng.uniform(0, 7), rng.uniform(0.3, 2, 3))
            for _ in "ab"
        )
        exact, sampled = polygon_distance(a.footprint, b.footprint), brute_distance(a, b)
        assert exact <= sampled + 1e-9 and (exact == 0 or sampled - exact < 0.03)


def test_rooms_differ_between_splits_and_seeds():
    """A test room that is a training room would be scored from memory."""
    keys = itertools.product((0, 1), scenes.SPLITS, (0, 1))
    contents = [scenes.make_files(seed, split, index)[0] for seed, split, index in keys]
    assert len({next(iter(files.values())) for files in contents}) == len(contents)


def test_avi_is_read_by_decord(tmp_path):
    """Frame for frame: a wrong index or header makes decord drop or repeat frames."""
    decord = pytest.importorskip("decord")
    frames = [np.full((56, 56, 3), 20 + 28 * i, np.uint8) for i in range(8)]
    path = tmp_path / "video.avi"
    path.write_bytes(mjpeg_avi([jpeg(f) for f in frames], 56, 2))
    reader = decord.VideoReader(str(path))
    assert len(reader) == 8 and reader.get_avg_fps() == 2
    for frame, read in zip(frames, reader.get_batch(range(8)).asnumpy()):
        assert read.shape == (56, 56, 3) and abs(read.astype(int) - frame).max() <= 3


def contents(folder):
    """{path: bytes} of all files."""
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {path.relative_to(folder): path.read_bytes() for path in files}


def test_files_do_not_depend_on_processes(tmp_path):
    """Same request, same bytes; the rows load, pictures have their size, a video is an .avi."""
    data = pytest.importorskip("data")
    for n in (1, 2):
        scenes.write_rooms(tmp_path / str(n), 32, 4, test_scenes=4, processes=n)
    one, two = (contents(tmp_path / n) for n in "12")
    assert one == two and len(list(tmp_path.iterdir())) == 2
    names = ("spld_grounding", "spld_spatial", "spld_coldstart", "told")
    for split, name in itertools.product(scenes.SPLITS, names):
        folder = tmp_path / "1" / split
        file = folder / f"{name}_data.jsonl"
        assert data.read_samples(file, folder / "images")
        for line in file.read_text().splitlines():
            row = json.loads(line)
            assert all((folder / "images" / picture).is_file() for picture in row.get("image", ()))
            assert ("prompt" in row) == (name == "spld_coldstart")
            assert ("options" in row) == (name in ("spld_spatial", "spld_coldstart"))
            assert (row.keys() == {"messages", "question_type"}) == (name == "told")
            assert "level" not in row
    bound = []  # the first thing to learn is which number or letter belongs to which name
    for line in (tmp_path / "1" / "train" / "told_data.jsonl").read_text().splitlines():
        bound.append(json.loads(line)["question_type"] in ("say", "choose"))
    assert bound == sorted(bound, reverse=True) and len({*bound}) == 2
    assert any(p.suffix == ".avi" for p in one)
    assert {
        Image.open(io.BytesIO(content)).size for p, content in one.items() if p.suffix == ".jpg"
    } == {(SIZE, SIZE)}


def test_difficulty_is_what_is_asked_for():
    """Walls, categories and sizes of rooms stay within the pairs that are given."""
    hard = DIFFICULTY | {"view_sides": (6.0, 7.0), "view_categories": (6, 8), "scale": (0.2, 0.4)}
    for seed in range(20):
        room = make_room(np.random.default_rng(seed), False, False, hard)
        assert (
            (room.sides >= 6).all()
            and (room.sides <= 7).all()
            and 6 <= len({t.name for t in room.things}) <= 8
        )
        for thing in room.things:
            factors = thing.dims / FURNITURE[thing.name]["dims"]
            assert (factors > 0.2 * 0.85).all() and (factors < 0.4 * 1.18).all()


@pytest.mark.parametrize(
    "name, pair, expected",
    (
        ("view_sides", (1.0, 1.0), "do not fit between walls"),
        ("video_categories", (2, 2), "no video with an order of appearance"),
    ),
)
def test_rooms_that_cannot_be_are_given_up(tmp_path, monkeypatch, name, pair, expected):
    """After many tries one line, and a folder that is empty."""
    for module in (scenes, render_module):
        monkeypatch.setattr(module, "ROOM_TRIES", 9)
    with pytest.raises(UserError, match=expected):
        scenes.write_rooms(tmp_path / "new", 4, 0, test_scenes=0, processes=1, **{name: pair})
    assert [path.name for path in tmp_path.rglob("*")] == ["new"]


def test_folder_mistakes(tmp_path, capsys, monkeypatch):
    """A folder of other data is not touched; the same rooms are not made twice; one line each."""
    out = tmp_path / "rooms"
    scenes.write_rooms(out, 1, 0, test_scenes=0, processes=1)
    before = (out / "config_run.json").stat().st_mtime_ns
    scenes.write_rooms(out, 1, 0, test_scenes=0, processes=1)
    assert "already" in capsys.readouterr().out
    assert (out / "config_run.json").stat().st_mtime_ns == before
    with pytest.raises(UserError, match="begun with other settings: seed 0, now 1"):
        scenes.write_rooms(out, 1, 1, test_scenes=0, processes=1)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "theirs.txt").write_text("")
    with pytest.raises(UserError, match="full: not empty"):
        scenes.write_rooms(tmp_path / "full", 1, 0)
    assert [path.name for path in (tmp_path / "full").iterdir()] == ["theirs.txt"]
    (tmp_path / "file").write_text("")
    for bad in (tmp_path / "file", tmp_path / "file" / "rooms"):
        with pytest.raises(UserError, match="cannot write there"):
            scenes.write_rooms(bad, 1, 0)
    capsys.readouterr()  # the progress bars so far
    monkeypatch.setattr("sys.argv", ["scenes.py", "--out", str(tmp_path / "file"), "--scenes", "1"])
    with pytest.raises(SystemExit) as stopped:
        main_guard(scenes.main)
    assert stopped.value.code == 2 and capsys.readouterr().err.count("\n") == 1
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "full", "rooms"]


@pytest.mark.parametrize(
    "flags, expected",
    (
        (["--scenes", "-1"], "--scenes is -1, expected 0 or more"),
        (["--seed", "-1"], "--seed is -1, expected 0 or more"),
        (["--scale", "-0.5", "1"], "--scale is -0.5, expected a positive number"),
        (["--view-categories", "0", "2"], "--view-categories is 0, expected a positive number"),
    ),
)
def test_numbers_that_cannot_be(call, tmp_path, capsys, flags, expected):
    """One line names the flag; nothing is written."""
    with pytest.raises(SystemExit) as stopped:
        call(scenes, "--out", tmp_path / "new", *flags)
    assert stopped.value.code == 2 and expected in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_the_order_of_a_pair_does_not_matter(tmp_path):
    """The least and the most may be given either way round."""
    for name, scale in (("one", (0.4, 1.2)), ("two", (1.2, 0.4))):
        scenes.write_rooms(tmp_path / name, 1, 0, test_scenes=0, processes=1, scale=scale)
    one, two = (
        (tmp_path / name / "train" / "images" / "room00000" / "view0.jpg").read_bytes()
        for name in ("one", "two")
    )
    assert one == two
