"""The answers, boxes and files of the rooms, recomputed from the 3D scene by other routes."""

import io
import itertools
import json
import math
import re
from collections import Counter

import numpy as np
import pytest
from PIL import Image

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
    jpeg,
    make_room,
    make_thing,
    mjpeg_avi,
    polygon_distance,
    render,
)
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
    """No furniture stands in walls, in other furniture, through the ceiling or over a camera."""
    for _, room, _, _, _ in made:
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


def check_size(room, row, things, pictures):
    assert row["answer"] == str(max(round(100 * float(side)) for side in things[0].dims))


def check_distance(room, row, things, pictures):
    distance = float(row["answer"])
    assert distance == pytest.approx(brute_distance(*things), abs=0.06)
    assert distance >= 0.2


def check_nearest(room, row, things, pictures):
    *others, target = things
    (least, name), (second, _), *_ = sorted((brute_distance(o, target), o.name) for o in others)
    assert chosen(row) == name
    assert second - least > 0.25
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


def check_count(room, row, things, pictures):
    assert int(row["answer"]) == Counter(t.name for t in room.things)[things[0].name]


def check_room(room, row, things, pictures):
    assert float(row["answer"]) == pytest.approx(np.prod(room.sides), abs=0.05 + 1e-9)


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


# What a chain states of a thing: name, picture, four ends in it, place on the floor.
CLAUSE = re.compile(
    r"The (\w+)(?: in (?:view|frame) (\d))? from (\d+) (\d+) to (\d+) (\d+), "
    r"(left|right) (\d+) (ahead|behind) (\d+)\."
)


def signed(number, word, negative):
    """A number that stands with a word in a chain."""
    return -int(number) if word == negative else int(number)


def chains(made, kind=None):
    """(room, pictures, row, the one thing of each name, chain) of the spatial rows of a type."""
    for room, pictures, row, numbers, solution in questions(made):
        if kind in (None, row["question_type"]):
            things = [room.things[ks[0]] for ks in numbers]
            yield room, pictures, row, things, re.fullmatch("<think>(.*)</think>.*", solution)[1]


def test_solutions_end_with_the_answer(made):
    """The chain ends with the answer's text, and with its letter if there are options."""
    for _, _, row, _, solution in questions(made):
        chain, answer = re.fullmatch("<think>(.*)</think><answer>(.*)</answer>", solution).groups()
        assert answer == row["answer"]
        assert len(chain.split()) <= 75
        if row["options"]:
            assert chain.endswith(f": {chosen(row)} {answer}")
        elif row["question_type"] == "object count":
            assert chain.endswith(f" it holds {answer}")
            assert len(CLAUSE.findall(chain)) == int(answer)
        else:
            assert chain.endswith(f": {answer}")


def test_chains_state_where_things_are(made):
    """With wrong boxes or places a chain would teach the model to ignore what it sees."""
    for room, pictures, row, numbers, solution in questions(made):
        offset = view_of(row) if row["data_type"] == "single_image" else 0
        camera = room.cameras[offset]
        left = [*itertools.chain(*numbers)]
        clauses = CLAUSE.findall(solution)
        assert len(clauses) == len(left)
        for name, picture, x0, y0, x1, y1, side, x, order, y in clauses:
            number = int(picture or 1) - 1 + offset
            _, _, sights = pictures[number]
            box = (int(x0), int(y0), int(x1), int(y1))
            (k,) = [k for k in left if (room.things[k].name, sights[k].box) == (name, box)]
            left.remove(k)
            assert picture == "" or not any(p[2][k].clear for p in pictures[:number])
            toward = complex(*room.things[k].center) - complex(camera.x, camera.y)
            toward *= np.exp(-1j * camera.yaw)
            assert abs(signed(x, side, "left") + 10 * toward.imag) <= 0.51
            assert abs(signed(y, order, "behind") - 10 * toward.real) <= 0.51


def test_chains_of_sizes_distances_and_rooms(made):
    """The numbers before the answer, from the scene."""
    for _, _, row, (thing,), chain in chains(made, "object size"):
        sides = [int(side) for side in re.search(r"(\d+) by (\d+) by (\d+): ", chain).groups()]
        assert sides == [round(100 * side) for side in thing.dims]
        assert str(max(sides)) == row["answer"]
    for _, _, row, (a, b), chain in chains(made, "absolute distance"):
        apart, gap = re.search(r"(\d+) apart: ([\d.]+)$", chain).groups()
        assert gap == row["answer"]
        assert abs(int(apart) / 10 - math.dist(a.center, b.center)) < 0.12
    for _, _, _, (*others, target), chain in chains(made, "relative distance"):
        past = re.findall(r"(\w+) (\d+)[,:]", chain[chain.index("Past") :])
        gaps = sorted((brute_distance(other, target), other.name) for other in others)
        assert [name for name, _ in past] == [name for _, name in gaps]
        for (_, gap), (true, _) in zip(past, gaps):
            assert abs(int(gap) - 10 * true) < 0.9
    for _, _, row, _, chain in chains(made, "room size"):
        w, d = map(int, re.search(r"(\d+) by (\d+): ", chain).groups())
        assert f"{w * d / 100:.1f}" == row["answer"]


def test_chains_of_directions_and_orders(made):
    """What follows from the places and pictures that the chain states, or from the scene."""
    for _, _, row, things, chain in chains(made, "relative direction"):
        if row["data_type"] == "single_image":
            spots = []
            for *_, side, x, order, y in CLAUSE.findall(chain):
                spots.append((signed(x, side, "left"), signed(y, order, "behind")))
            (xa, ya), (xb, yb) = spots
            side, x, order, y = re.search(
                r"it is (left|right) (\d+) (front|back) (\d+): ", chain
            ).groups()
            assert (xa - xb, ya - yb) == (signed(x, side, "left"), signed(y, order, "front"))
        else:
            a, b, c = (complex(*thing.center) for thing in things)
            side, degrees = re.search(r"turn (left|right) (\d+): ", chain).groups()
            true = np.angle((c - a) / (b - a), deg=True)
            assert abs(true - signed(degrees, side, "right")) <= 0.51
    for _, _, row, _, chain in chains(made, "appearance order"):
        firsts = re.findall(r"(\w+) in frame (\d)(?=[.:])", chain)
        assert ", ".join(name for name, _ in firsts) == chosen(row)
        assert dict(firsts) == {name: picture for name, picture, *_ in CLAUSE.findall(chain)}


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
    train = tmp_path / "1" / "train"
    assert not (tmp_path / "1" / "val" / "spld_coldstart_data.jsonl").exists()
    for kind in ("grounding", "spatial", "coldstart"):
        assert data.read_samples(train / f"spld_{kind}_data.jsonl", train / "images")
        for line in (train / f"spld_{kind}_data.jsonl").read_text().splitlines():
            row = json.loads(line)
            assert all((train / "images" / name).is_file() for name in row["image"])
            assert (kind == "coldstart") == ("prompt" in row) and ("options" in row) == (
                kind != "grounding"
            )
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
    before = (out / "meta.json").stat().st_mtime_ns
    scenes.write_rooms(out, 1, 0, test_scenes=0, processes=1)
    assert "already" in capsys.readouterr().out
    assert (out / "meta.json").stat().st_mtime_ns == before
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
