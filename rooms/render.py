"""Procedural 3D rooms: furniture, cameras, and pictures with exact boxes. scenes.py asks questions about them.

Room coordinates: x and y along the walls from a corner, z up, meters. On the floor a camera has things `right` and
`ahead` of it. Boxes [x1, y1, x2, y2] cover pixel columns x1 to x2-1 and rows y1 to y2-1: x2 - x1 is the width.
"""

import io
import itertools
import math
import struct
from collections import namedtuple
from functools import lru_cache

import numpy as np
from PIL import Image

from files import UserError

# Difficulty. Blind guessing earns little only where the range of a number is wide: hence the factors on sides.
SIZE = 112  # side of a picture in pixels; a multiple of 28, a merged patch of the vision encoder
CAST = 40  # the lens's colour cast at the edges in grey levels; the model, which has no absolute positions, can use it
FIELD_OF_VIEW, EYE_HEIGHT, PITCH, CEILING = math.radians(64), 1.5, math.radians(15), 2.9
DIFFICULTY = {  # least and most; flags of these names set them
    "view_sides": (3.8, 5.0),
    "video_sides": (2.8, 9.5),  # walls in meters, log-uniform: distance
    "view_categories": (2, 5),
    "video_categories": (4, 6),  # different categories in a room: number
    "scale": (0.5, 1.6),  # factor on all sides of a thing: size
}
TRIES = 1000  # rooms drawn before one of a kind is called impossible
REPEATS = 0.9  # share of rooms with a category 2 to 4 times
STRETCH = (0.85, 1.18)  # factors on each side of a thing
GAP, CLEARANCE, WALL = 0.15, 0.75, 0.03  # meters from things to things, cameras and walls
VIEWS, FRAMES = 4, 8  # cameras of a room
# A question may name what shows this share of the picture's pixels and sides, and of its own pixels, where others
# hide the rest, and has this share of its projected rectangle inside the picture.
MIN_PIXELS, MIN_SIDE, MIN_RATIO, MIN_INSIDE = 0.005, 0.06, 0.5, 0.6

# colour, (width, depth, height) in meters, solids (sides, x, y0, y1, z0, z1, taper, tint) that fill a unit box: from -x
# to x, y0 to y1, z0 to z1; 4 sides are the rectangle, 8 the octagon in it; taper scales the top face, tint the colour.
FURNITURE = {
    "chair": (
        (215, 50, 45),
        (0.65, 0.65, 1.05),
        [
            (4, 0.5, -0.5, 0.5, 0.4, 0.52, 1, 1),
            (4, 0.5, 0.32, 0.5, 0.52, 1, 1, 1),
            (4, 0.36, -0.36, 0.36, 0, 0.4, 1, 0.7),
        ],
    ),
    "table": (
        (150, 95, 45),
        (1.2, 0.8, 0.75),
        [
            (4, 0.5, -0.5, 0.5, 0.84, 1, 1, 1),
            (4, 0.15, -0.25, 0.25, 0.08, 0.84, 1, 0.8),
            (4, 0.4, -0.3, 0.3, 0, 0.08, 1, 0.8),
        ],
    ),
    "sofa": (
        (45, 75, 215),
        (1.5, 0.8, 0.85),
        [(4, 0.5, -0.5, 0.5, 0, 0.5, 1, 1), (4, 0.5, 0.2, 0.5, 0.5, 1, 1, 0.9)],
    ),
    "bed": (
        (245, 140, 185),
        (1, 1.6, 0.8),
        [
            (4, 0.5, -0.5, 0.42, 0, 0.55, 1, 1),
            (4, 0.5, 0.42, 0.5, 0, 1, 1, 0.8),
            (4, 0.35, 0.15, 0.38, 0.55, 0.7, 1, 1.25),
        ],
    ),
    "cabinet": ((130, 50, 165), (0.8, 0.55, 1.35), [(4, 0.5, -0.5, 0.5, 0, 1, 1, 1)]),
    "lamp": (
        (245, 215, 50),
        (0.6, 0.6, 1.35),
        [
            (8, 0.5, -0.5, 0.5, 0.55, 1, 0.5, 1),
            (8, 0.1, -0.1, 0.1, 0.06, 0.55, 1, 0.6),
            (8, 0.35, -0.35, 0.35, 0, 0.06, 1, 0.6),
        ],
    ),
    "plant": (
        (50, 165, 55),
        (0.75, 0.75, 1.1),
        [(8, 0.5, -0.5, 0.5, 0.35, 1, 0.35, 1), (8, 0.25, -0.25, 0.25, 0, 0.35, 1.3, 0.55)],
    ),
    "bin": (
        (45, 45, 50),
        (0.6, 0.6, 0.8),
        [(8, 0.36, -0.36, 0.36, 0, 0.9, 1.25, 1), (8, 0.5, -0.5, 0.5, 0.9, 1, 1, 1.6)],
    ),
}
LIGHT = np.array([0.45, 0.2, 0.87])  # unit vector towards it

# name, (2,) center, yaw, (3,) width, depth and height, (4, 2) corners on the floor, counter-clockwise: a yawed box
Thing = namedtuple("Thing", "name center yaw dims footprint")
# a convex part of a thing, points p with normals (K, 3) @ p <= offsets (K,); (K, 3) shaded colours; (V, 3) vertices
Solid = namedtuple("Solid", "normals offsets colours vertices")
# place on the floor and heading, counter-clockwise from the x axis, radians
Camera = namedtuple("Camera", "x y yaw")
# (2,) walls' lengths in whole decimeters, things, their solids, (N, N) distances of things in meters, cameras, and
# (3, 2, 3) colours of the walls x = 0 and x = width, y = 0 and y = depth, of floor and ceiling
Room = namedtuple("Room", "sides things solids gaps cameras tints")
# one thing in one picture: box of the visible pixels or None, their share in what the thing would show if it stood
# alone in the room, whether that is enough to name it in a question
Sight = namedtuple("Sight", "box ratio clear")


# ---------------------------------------------------------------------------------------------------- geometry
def make_thing(name, center, yaw, dims):
    """A thing with its footprint.

    >>> make_thing("bin", (2, 1), 0, (1, 0.5, 0.7)).footprint.tolist()
    [[1.5, 0.75], [2.5, 0.75], [2.5, 1.25], [1.5, 1.25]]
    """
    c, s = math.cos(yaw), math.sin(yaw)
    corners = (
        np.array([[-0.5, -0.5], [0.5, -0.5], [0.5, 0.5], [-0.5, 0.5]])
        * dims[:2]
        @ [[c, s], [-s, c]]
        + center
    )
    return Thing(name, np.asarray(center), yaw, np.asarray(dims), corners)


def build(thing):
    """The solids of a thing: its category's unit box scaled to dims, turned by yaw, moved to center."""
    colour, _, parts = FURNITURE[thing.name]
    c, s = math.cos(thing.yaw), math.sin(thing.yaw)
    solids = []
    for sides, x, y0, y1, z0, z1, taper, tint in parts:
        angles = (np.arange(sides) + (sides == 4) / 2) * 2 * math.pi / sides
        rim = np.stack([np.cos(angles), np.sin(angles)], 1) * (
            math.sqrt(0.5) if sides == 4 else 0.5
        )  # (n, 2)
        mid, span = np.array([0, y0 + y1]) / 2, np.array([2 * x, y1 - y0])
        bottom, top = (
            np.c_[
                (mid + rim * span * scale) * thing.dims[:2] @ [[c, s], [-s, c]] + thing.center,
                np.full(sides, z * thing.dims[2]),
            ]
            for scale, z in ((1, z0), (taper, z1))
        )  # (n, 3)
        normals = np.cross(np.roll(bottom, -1, 0) - bottom, top - bottom)
        normals = np.r_[
            normals / np.linalg.norm(normals, axis=1, keepdims=True), [[0, 0, 1], [0, 0, -1]]
        ]
        offsets = np.r_[(normals[:-2] * bottom).sum(1), top[0, 2], -bottom[0, 2]]
        shade = tint * (0.65 + 0.4 * np.maximum(normals @ LIGHT, -0.5))
        solids.append(Solid(normals, offsets, shade[:, None] * colour, np.r_[bottom, top]))
    return solids


def polygon_distance(a, b):
    """Distance of two convex polygons (V, 2), counter-clockwise; 0 if they meet.

    All things are upright prisms on the floor: this is the distance of their closest points in 3D, exactly.

    >>> square = np.array([[0, 0], [1, 0], [1, 1], [0, 1.]])
    >>> polygon_distance(square, square + [4, 5]), polygon_distance(square, square / 2)
    (5.0, 0.0)
    """
    best, separated = math.inf, False
    for p, q in ((a, b), (b, a)):
        edges = p[np.arange(1, len(p) + 1) % len(p)] - p  # (P, 2)
        offsets = q[:, None] - p  # (Q, P, 2)
        along = (offsets * edges).sum(2) / np.maximum((edges * edges).sum(1), 1e-12)
        apart = (
            offsets - np.minimum(np.maximum(along, 0), 1)[..., None] * edges
        )  # from the nearest point of each edge
        best = min(best, (apart * apart).sum(2).min())
        outside = offsets[..., 0] * edges[:, 1] - offsets[..., 1] * edges[:, 0]
        separated |= bool((outside.min(0) > 0).any())  # all of q lies beyond one edge of p
    return math.sqrt(best) if separated else 0.0


def ground(camera, point):
    """(right, ahead) in meters of a point (2,) on the floor.

    >>> ground(Camera(1, 0, 0), (3, 4))
    (-4.0, 2.0)
    """
    dx, dy, c, s = (
        point[0] - camera.x,
        point[1] - camera.y,
        math.cos(camera.yaw),
        math.sin(camera.yaw),
    )
    return float(dx * s - dy * c), float(dx * c + dy * s)


def make_cameras(rng, sides, video):
    """Four cameras at the walls looking inwards, in turn round the room; or 8 on a path that pans and walks."""
    if video:
        a, b = rng.uniform(0.15, 0.85, (2, 2)) * sides
        b = a + (b - a) * min(1, rng.uniform(0, 2) / np.linalg.norm(b - a))  # a walk of at most 2 m
        inwards = sides - a - b  # the middle of the path looks this way
        yaw, sweep = (
            math.atan2(inwards[1], inwards[0]),
            rng.choice([1, -1]) * math.radians(rng.uniform(110, 210)),
        )
        return [
            Camera(*(a + (b - a) * t), yaw + sweep * (t - 0.5)) for t in np.linspace(0, 1, FRAMES)
        ]
    cameras, start, turn = [], int(rng.integers(VIEWS)), int(rng.choice([1, -1]))
    for wall in range(start, start + turn * VIEWS, turn):
        c, s = (
            np.cos(wall * math.pi / 2),
            np.sin(wall * math.pi / 2),
        )  # looking this way, from the wall behind
        back, aside = abs(sides @ [c, s]) / 2 - 0.2, rng.uniform(-0.3, 0.3)
        cameras.append(
            Camera(
                *(sides / 2 - back * np.array([c, s]) + aside * np.array([-s, c])),
                wall * math.pi / 2 + rng.uniform(-0.1, 0.1),
            )
        )
    return cameras


def fits(thing, things, cameras, sides):
    """Whether a thing is inside the walls, apart from all others and not in a camera's face."""
    if thing.footprint.min() < WALL or (sides - thing.footprint.max(0)).min() < WALL:
        return False
    for camera in cameras:  # its distance from the footprint, in the thing's own coordinates
        beyond = np.abs(ground(Camera(*thing.center, thing.yaw), camera)) - thing.dims[1::-1] / 2
        if math.hypot(*np.maximum(beyond, 0)) < CLEARANCE:
            return False
    return all(polygon_distance(other.footprint, thing.footprint) >= GAP for other in things)


def make_room(rng, video, easy=False, difficulty=DIFFICULTY):
    """A furnished room and its cameras; drawn anew until it holds the least number of categories, one if easy."""
    walls, categories = (
        difficulty[f"{'video' if video else 'view'}_{what}"] for what in ("sides", "categories")
    )
    (least, most), (small, large) = (1, 1) if easy else categories, difficulty["scale"]
    for _ in range(TRIES):
        sides = np.round(np.exp(rng.uniform(*np.log(walls), 2)), 1)
        cameras, things = make_cameras(rng, sides, video), []
        names = rng.permutation(list(FURNITURE))[: rng.integers(least, most + 1)].tolist()
        if rng.random() < REPEATS and not easy:
            names[:1] *= min(4, int(rng.integers(2, 7)))  # most are 4: not all will fit
        for name in names:
            scale = small * (large / small) ** rng.beta(
                0.5, 0.5
            )  # the ends are likelier than the middle
            dims = scale * np.exp(rng.uniform(*np.log(STRETCH), 3)) * FURNITURE[name][1]
            for _ in range(30):  # tries
                thing = make_thing(name, rng.uniform(0, sides), rng.uniform(0, 2 * math.pi), dims)
                if fits(thing, things, cameras, sides):
                    things.append(thing)
                    break
        if len({t.name for t in things}) >= least:
            break
    else:
        raise UserError(
            f"{least} categories of scale {small} to {large} do not fit between walls of {walls} meters"
        )
    gaps = np.zeros((len(things), len(things)))
    for a, b in itertools.combinations(range(len(things)), 2):
        gaps[a, b] = gaps[b, a] = polygon_distance(things[a].footprint, things[b].footprint)
    shades = np.array([[0.85, 0.95], [1, 0.9], [rng.uniform(0.65, 0.9), 1.2]]) * rng.uniform(
        150, 205
    )
    tints = (shades[..., None] + rng.uniform(-14, 14, (3, 1, 3))).astype(np.float32)
    return Room(sides, things, [build(t) for t in things], gaps, cameras, tints)


# ---------------------------------------------------------------------------------------------------- pictures
@lru_cache
def pixel_rays(size):
    """(3, size, size): through the centre of each pixel, in camera coordinates right, down, forward = 1."""
    u = (np.arange(size) + 0.5 - size / 2) / (size / 2 / math.tan(FIELD_OF_VIEW / 2))
    return np.stack([*np.meshgrid(u, u), np.ones((size, size))]).astype(np.float32)


@lru_cache
def lens_cast(size, cast):
    """(size, size, 3) grey levels to add: redder and less blue to the right, greener downwards."""
    ramp = np.broadcast_to(np.linspace(-cast, cast, size), (size, size))
    return np.stack([ramp, ramp.T, -ramp], 2).astype(np.float32)


def cast_rays(solid, origin, rays):
    """Where rays (3, P) from origin enter a solid: ray lengths (P,), inf for a miss, and the face's number (P,)."""
    reach = (solid.offsets - solid.normals @ origin).astype(np.float32)[:, None]  # (K, 1)
    facing = solid.normals.astype(np.float32) @ rays  # (K, P)
    front = reach[:, 0] < 0  # the origin is beyond these planes: a hit must enter through them all
    with np.errstate(divide="ignore"):
        enter = np.where(facing[front] < 0, reach[front] / facing[front], np.inf)  # (F, P)
        leave = np.where(facing[~front] > 0, reach[~front] / facing[~front], np.inf).min(0)  # (P,)
    face = enter.argmax(0)
    enter = enter[face, np.arange(len(face))]
    return np.where(enter < leave, enter, np.inf), np.flatnonzero(front)[face]


def render(room, camera, size=SIZE, cast=CAST):
    """Picture (size, size, 3) uint8, ids (size, size) of the things seen + 1, 0 for none, and a Sight of each thing.

    Each solid is met only with the rays of the rectangle around its projected vertices; a depth buffer decides.
    """
    c, s, cp, sp = math.cos(camera.yaw), math.sin(camera.yaw), math.cos(PITCH), math.sin(PITCH)
    basis = np.array(
        [[s, -c, 0], [-c * sp, -s * sp, -cp], [c * cp, s * cp, -sp]]
    )  # rows right, down, forward
    origin, focal = (
        np.array([camera.x, camera.y, EYE_HEIGHT]),
        size / 2 / math.tan(FIELD_OF_VIEW / 2),
    )
    rays = np.tensordot(
        basis.astype(np.float32), pixel_rays(size), (0, 0)
    )  # (3, size, size) in room coordinates
    far, ahead = np.array([*room.sides, CEILING]), rays > 0
    with np.errstate(divide="ignore"):  # the room from inside: along each axis the plane ahead
        walls = (
            np.where(ahead, (far - origin)[:, None, None], -origin[:, None, None]).astype(
                np.float32
            )
            / rays
        )
    axis = walls.argmin(0)
    image = room.tints.reshape(6, 3)[2 * axis + np.take_along_axis(ahead, axis[None], 0)[0]]
    depth, ids, alone, inside = (
        np.full((size, size), np.inf, np.float32),
        np.zeros((size, size), np.uint8),
        [],
        [],
    )
    for number, solids in enumerate(room.solids, 1):
        mask, low, high = np.zeros((size, size), bool), np.full(2, np.inf), np.full(2, -np.inf)
        for solid in solids:
            right, down, forward = basis @ (solid.vertices - origin).T  # (V,) each
            if forward.max() < 0.1:
                continue
            if forward.min() < 0.1:  # reaches behind the camera: may show anywhere
                x0, y0, x1, y1 = -size, -size, 2 * size, 2 * size
            else:
                u, v = size / 2 + focal * right / forward, size / 2 + focal * down / forward
                x0, y0, x1, y1 = (
                    math.floor(u.min()),
                    math.floor(v.min()),
                    math.ceil(u.max()),
                    math.ceil(v.max()),
                )
            low, high = np.minimum(low, (x0, y0)), np.maximum(high, (x1, y1))
            window = slice(max(y0, 0), max(y1, 0)), slice(max(x0, 0), max(x1, 0))
            if (here := rays[:, *window]).size:
                t, face = (
                    a.reshape(here.shape[1:]) for a in cast_rays(solid, origin, here.reshape(3, -1))
                )
                mask[window] |= t < np.inf
                nearer = t < depth[window]
                depth[window][nearer], ids[window][nearer] = t[nearer], number
                image[window][nearer] = solid.colours[face[nearer]]
        alone.append(int(mask.sum()))
        inside.append(
            np.prod(np.clip(high, 0, size) - np.clip(low, 0, size)) / np.prod(high - low)
            if alone[-1]
            else 0
        )
    image = np.clip(image + lens_cast(size, cast), 0, 255).astype(np.uint8)
    return image, ids, [look(ids == k + 1, alone[k], inside[k]) for k in range(len(alone))]


def look(mask, alone, inside):
    """Sight of the thing with visible pixels mask (size, size).
    >>> look(np.pad(np.ones((2, 3), bool), 4), 12, 1.0)
    Sight(box=(4, 4, 7, 6), ratio=0.5, clear=True)
    """
    columns, rows = np.flatnonzero(mask.any(0)).tolist(), np.flatnonzero(mask.any(1)).tolist()
    if not rows:
        return Sight(None, 0.0, False)
    box, pixels = (columns[0], rows[0], columns[-1] + 1, rows[-1] + 1), int(mask.sum())
    side = min(box[2] - box[0], box[3] - box[1])
    return Sight(
        box,
        pixels / alone,
        pixels >= MIN_PIXELS * mask.size
        and side >= MIN_SIDE * len(mask)
        and pixels >= MIN_RATIO * alone
        and bool(inside >= MIN_INSIDE),
    )


def jpeg(image):
    out = io.BytesIO()
    Image.fromarray(image).save(out, "JPEG", quality=95, subsampling=0)
    return out.getvalue()


def mjpeg_avi(frames, size, fps):
    """An .avi file (RIFF, one MJPEG stream) of jpeg pictures, all bytes."""

    def chunk(name, *data):
        data = b"".join(data)
        return name + struct.pack("<I", len(data)) + data + b"\0" * (len(data) % 2)

    count, largest = len(frames), max(map(len, frames))
    main = struct.pack(
        "<14I",
        1_000_000 // fps,
        largest * fps,
        0,
        0x10,
        count,
        0,
        1,
        largest,
        size,
        size,
        0,
        0,
        0,
        0,
    )
    stream = struct.pack(
        "<4s4sI2H8I4H",
        b"vids",
        b"MJPG",
        0,
        0,
        0,
        0,
        1,
        fps,
        0,
        count,
        largest,
        2**32 - 1,
        0,
        0,
        0,
        size,
        size,
    )
    picture = struct.pack(
        "<IiiHH4sIiiII", 40, size, size, 1, 24, b"MJPG", size * size * 3, 0, 0, 0, 0
    )
    data = [chunk(b"00dc", frame) for frame in frames]
    starts = itertools.accumulate(map(len, data), initial=4)
    index = [
        struct.pack("<4s3I", b"00dc", 0x10, start, len(frame))
        for start, frame in zip(starts, frames)
    ]
    headers = chunk(b"LIST", b"strl", chunk(b"strh", stream), chunk(b"strf", picture))
    return chunk(
        b"RIFF",
        b"AVI ",
        chunk(b"LIST", b"hdrl", chunk(b"avih", main), headers),
        chunk(b"LIST", b"movi", *data),
        chunk(b"idx1", *index),
    )
