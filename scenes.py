"""Procedural 3D rooms with exact geometry, in SpatialLadder-26k's own file format: the embedded default data set.

    python scenes.py --out DIR --scenes 3600 --seed 0          # writes DIR/{train,val,test}, see write_rooms
    python scenes.py --out DIR --scenes 40 --cast 0            # a few rooms, without the lens's colour cast

Three of four rooms are compact and pictured by four cameras, one at each wall: every picture gives localization and
single-image rows, the four together multi-view rows. Every fourth room is of any size and filmed from a moving camera:
video rows. All answers are computed from the 3D scene, all boxes from the visible pixels.

Room coordinates: x and y along the walls from a corner, z up, meters. On the floor a camera has things `right` and
`ahead` of it. Boxes [x1, y1, x2, y2] cover pixel columns x1 to x2-1 and rows y1 to y2-1: x2 - x1 is the width.
"""
import argparse
import io
import itertools
import json
import math
import multiprocessing
import os
import shutil
import struct
import tempfile
from collections import Counter, namedtuple
from functools import lru_cache
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

from data import Sample, prompt_text
from rewards import UserError
from runtime import Parser, main_guard

SPLITS = ("train", "val", "test")
# Difficulty. Blind guessing earns little only where the range of a number is wide: hence the factors on sides.
SIZE = 112  # side of a picture in pixels; a multiple of 28, a merged patch of the vision encoder
CAST = 40  # the lens's colour cast at the edges in grey levels; the model, which has no absolute positions, can use it
FIELD_OF_VIEW, EYE_HEIGHT, PITCH, CEILING = math.radians(64), 1.5, math.radians(15), 2.9
DIFFICULTY = {  # least and most; flags of these names set them
    "view_sides": (3.8, 5.0), "video_sides": (2.8, 9.5),  # walls in meters, log-uniform: distance
    "view_categories": (2, 5), "video_categories": (4, 6),  # different categories in a room: number
    "scale": (0.5, 1.6),  # factor on all sides of a thing: size
}
TRIES = 1000  # rooms drawn before one of a kind is called impossible
EASY, REPEATS = 0.3, 0.9  # share of training rooms with views that hold one thing; of rooms with a category 2 to 4 times
STRETCH = (0.85, 1.18)  # factors on each side of a thing
GAP, CLEARANCE, WALL = 0.15, 0.75, 0.03  # meters from things to things, cameras and walls
VIEWS, FRAMES, FRAMES_PER_SECOND, AVI_SHARE = 4, 8, 2, 1 / 6
SIZE_SHARE, COUNT_ONE = 0.25, 0.12  # share of size questions kept; chance to count a category of one if none has more
# A question may name what shows this share of the picture's pixels and sides, and of its own pixels, where others
# hide the rest, and has this share of its projected rectangle inside the picture.
MIN_PIXELS, MIN_SIDE, MIN_RATIO, MIN_INSIDE = 0.005, 0.06, 0.5, 0.6
# Margins that make answers unambiguous: meters to the second nearest, meters and picture widths between left and
# right (front and back), degrees to a sector's edge; closer things than MIN_DISTANCE have no distance asked.
NEAREST_MARGIN, SIDE_MARGIN, COLUMN_MARGIN, ANGLE_MARGIN, MIN_DISTANCE = 0.3, 0.35, 0.04, 15, 0.2
# How often a type comes before others: the more, the fewer rooms allow it; the last two, of video only, always.
WEIGHTS = {"object size": 2, "absolute distance": 3, "relative direction": 4, "relative distance": 8,
           "object count": 12, "room size": 1e9, "appearance order": 1e9}

# colour, (width, depth, height) in meters, solids (sides, x, y0, y1, z0, z1, taper, tint) that fill a unit box: from -x
# to x, y0 to y1, z0 to z1; 4 sides are the rectangle, 8 the octagon in it; taper scales the top face, tint the colour.
FURNITURE = {
    "chair": ((215, 50, 45), (.65, .65, 1.05), [
        (4, .5, -.5, .5, .4, .52, 1, 1), (4, .5, .32, .5, .52, 1, 1, 1), (4, .36, -.36, .36, 0, .4, 1, .7)]),
    "table": ((150, 95, 45), (1.2, .8, .75), [
        (4, .5, -.5, .5, .84, 1, 1, 1), (4, .15, -.25, .25, .08, .84, 1, .8), (4, .4, -.3, .3, 0, .08, 1, .8)]),
    "sofa": ((45, 75, 215), (1.5, .8, .85), [(4, .5, -.5, .5, 0, .5, 1, 1), (4, .5, .2, .5, .5, 1, 1, .9)]),
    "bed": ((245, 140, 185), (1, 1.6, .8), [
        (4, .5, -.5, .42, 0, .55, 1, 1), (4, .5, .42, .5, 0, 1, 1, .8), (4, .35, .15, .38, .55, .7, 1, 1.25)]),
    "cabinet": ((130, 50, 165), (.8, .55, 1.35), [(4, .5, -.5, .5, 0, 1, 1, 1)]),
    "lamp": ((245, 215, 50), (.6, .6, 1.35), [
        (8, .5, -.5, .5, .55, 1, .5, 1), (8, .1, -.1, .1, .06, .55, 1, .6), (8, .35, -.35, .35, 0, .06, 1, .6)]),
    "plant": ((50, 165, 55), (.75, .75, 1.1), [
        (8, .5, -.5, .5, .35, 1, .35, 1), (8, .25, -.25, .25, 0, .35, 1.3, .55)]),
    "bin": ((45, 45, 50), (.6, .6, .8), [(8, .36, -.36, .36, 0, .9, 1.25, 1), (8, .5, -.5, .5, .9, 1, 1, 1.6)]),
}
LIGHT = np.array([0.45, 0.2, 0.87])  # unit vector towards it
DIAGONALS = ("left-front", "left-back", "right-front", "right-back")

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
# what questions are asked of: a room; Sights by picture and thing; what a picture is called ("", "view", "frame");
# things that may be named, being clear somewhere and the only ones of their category; {thing: number from 1 of the
# first picture that shows it clearly}; (N, 2) decimeters right and ahead of the first camera; that camera
World = namedtuple("World", "room sights word named first places camera")


# ---------------------------------------------------------------------------------------------------- geometry
def make_thing(name, center, yaw, dims):
    """A thing with its footprint.

    >>> make_thing("bin", (2, 1), 0, (1, 0.5, 0.7)).footprint.tolist()
    [[1.5, 0.75], [2.5, 0.75], [2.5, 1.25], [1.5, 1.25]]
    """
    c, s = math.cos(yaw), math.sin(yaw)
    corners = np.array([[-.5, -.5], [.5, -.5], [.5, .5], [-.5, .5]]) * dims[:2] @ [[c, s], [-s, c]] + center
    return Thing(name, np.asarray(center), yaw, np.asarray(dims), corners)


def build(thing):
    """The solids of a thing: its category's unit box scaled to dims, turned by yaw, moved to center."""
    colour, _, parts = FURNITURE[thing.name]
    c, s = math.cos(thing.yaw), math.sin(thing.yaw)
    solids = []
    for sides, x, y0, y1, z0, z1, taper, tint in parts:
        angles = (np.arange(sides) + (sides == 4) / 2) * 2 * math.pi / sides
        rim = np.stack([np.cos(angles), np.sin(angles)], 1) * (math.sqrt(0.5) if sides == 4 else 0.5)  # (n, 2)
        mid, span = np.array([0, y0 + y1]) / 2, np.array([2 * x, y1 - y0])
        bottom, top = (np.c_[(mid + rim * span * scale) * thing.dims[:2] @ [[c, s], [-s, c]] + thing.center,
                             np.full(sides, z * thing.dims[2])] for scale, z in ((1, z0), (taper, z1)))  # (n, 3)
        normals = np.cross(np.roll(bottom, -1, 0) - bottom, top - bottom)
        normals = np.r_[normals / np.linalg.norm(normals, axis=1, keepdims=True), [[0, 0, 1], [0, 0, -1]]]
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
        apart = offsets - np.minimum(np.maximum(along, 0), 1)[..., None] * edges  # from the nearest point of each edge
        best = min(best, (apart * apart).sum(2).min())
        outside = offsets[..., 0] * edges[:, 1] - offsets[..., 1] * edges[:, 0]
        separated |= bool((outside.min(0) > 0).any())  # all of q lies beyond one edge of p
    return math.sqrt(best) if separated else 0.0


def ground(camera, point):
    """(right, ahead) in meters of a point (2,) on the floor.

    >>> ground(Camera(1, 0, 0), (3, 4))
    (-4.0, 2.0)
    """
    dx, dy, c, s = point[0] - camera.x, point[1] - camera.y, math.cos(camera.yaw), math.sin(camera.yaw)
    return float(dx * s - dy * c), float(dx * c + dy * s)


def make_cameras(rng, sides, video):
    """Four cameras at the walls looking inwards, in turn round the room; or 8 on a path that pans and walks."""
    if video:
        a, b = rng.uniform(0.15, 0.85, (2, 2)) * sides
        b = a + (b - a) * min(1, rng.uniform(0, 2) / np.linalg.norm(b - a))  # a walk of at most 2 m
        inwards = sides - a - b  # the middle of the path looks this way
        yaw, sweep = math.atan2(inwards[1], inwards[0]), rng.choice([1, -1]) * math.radians(rng.uniform(110, 210))
        return [Camera(*(a + (b - a) * t), yaw + sweep * (t - 0.5)) for t in np.linspace(0, 1, FRAMES)]
    cameras, start, turn = [], int(rng.integers(VIEWS)), int(rng.choice([1, -1]))
    for wall in range(start, start + turn * VIEWS, turn):
        c, s = np.cos(wall * math.pi / 2), np.sin(wall * math.pi / 2)  # looking this way, from the wall behind
        back, aside = abs(sides @ [c, s]) / 2 - 0.2, rng.uniform(-0.3, 0.3)
        cameras.append(Camera(*(sides / 2 - back * np.array([c, s]) + aside * np.array([-s, c])),
                              wall * math.pi / 2 + rng.uniform(-0.1, 0.1)))
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
    walls, categories = (difficulty[f"{'video' if video else 'view'}_{what}"] for what in ("sides", "categories"))
    (least, most), (small, large) = (1, 1) if easy else categories, difficulty["scale"]
    for _ in range(TRIES):
        sides = np.round(np.exp(rng.uniform(*np.log(walls), 2)), 1)
        cameras, things = make_cameras(rng, sides, video), []
        names = rng.permutation(list(FURNITURE))[:rng.integers(least, most + 1)].tolist()
        if rng.random() < REPEATS and not easy:
            names[:1] *= min(4, int(rng.integers(2, 7)))  # most are 4: not all will fit
        for name in names:
            scale = small * (large / small) ** rng.beta(0.5, 0.5)  # the ends are likelier than the middle
            dims = scale * np.exp(rng.uniform(*np.log(STRETCH), 3)) * FURNITURE[name][1]
            for _ in range(30):  # tries
                thing = make_thing(name, rng.uniform(0, sides), rng.uniform(0, 2 * math.pi), dims)
                if fits(thing, things, cameras, sides):
                    things.append(thing)
                    break
        if len({t.name for t in things}) >= least:
            break
    else:
        raise UserError(f"{least} categories of scale {small} to {large} do not fit between walls of {walls} meters")
    gaps = np.zeros((len(things), len(things)))
    for a, b in itertools.combinations(range(len(things)), 2):
        gaps[a, b] = gaps[b, a] = polygon_distance(things[a].footprint, things[b].footprint)
    shades = np.array([[0.85, 0.95], [1, 0.9], [rng.uniform(0.65, 0.9), 1.2]]) * rng.uniform(150, 205)
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
    basis = np.array([[s, -c, 0], [-c * sp, -s * sp, -cp], [c * cp, s * cp, -sp]])  # rows right, down, forward
    origin, focal = np.array([camera.x, camera.y, EYE_HEIGHT]), size / 2 / math.tan(FIELD_OF_VIEW / 2)
    rays = np.tensordot(basis.astype(np.float32), pixel_rays(size), (0, 0))  # (3, size, size) in room coordinates
    far, ahead = np.array([*room.sides, CEILING]), rays > 0
    with np.errstate(divide="ignore"):  # the room from inside: along each axis the plane ahead
        walls = np.where(ahead, (far - origin)[:, None, None], -origin[:, None, None]).astype(np.float32) / rays
    axis = walls.argmin(0)
    image = room.tints.reshape(6, 3)[2 * axis + np.take_along_axis(ahead, axis[None], 0)[0]]
    depth, ids, alone, inside = np.full((size, size), np.inf, np.float32), np.zeros((size, size), np.uint8), [], []
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
                x0, y0, x1, y1 = math.floor(u.min()), math.floor(v.min()), math.ceil(u.max()), math.ceil(v.max())
            low, high = np.minimum(low, (x0, y0)), np.maximum(high, (x1, y1))
            window = slice(max(y0, 0), max(y1, 0)), slice(max(x0, 0), max(x1, 0))
            if (here := rays[:, *window]).size:
                t, face = (a.reshape(here.shape[1:]) for a in cast_rays(solid, origin, here.reshape(3, -1)))
                mask[window] |= t < np.inf
                nearer = t < depth[window]
                depth[window][nearer], ids[window][nearer] = t[nearer], number
                image[window][nearer] = solid.colours[face[nearer]]
        alone.append(int(mask.sum()))
        inside.append(np.prod(np.clip(high, 0, size) - np.clip(low, 0, size)) / np.prod(high - low) if alone[-1] else 0)
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
    return Sight(box, pixels / alone, pixels >= MIN_PIXELS * mask.size and side >= MIN_SIDE * len(mask)
                 and pixels >= MIN_RATIO * alone and bool(inside >= MIN_INSIDE))


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
    main = struct.pack("<14I", 1_000_000 // fps, largest * fps, 0, 0x10, count, 0, 1, largest, size, size, 0, 0, 0, 0)
    stream = struct.pack("<4s4sI2H8I4H", b"vids", b"MJPG", 0, 0, 0, 0, 1, fps, 0, count, largest, 2**32 - 1, 0,
                         0, 0, size, size)
    picture = struct.pack("<IiiHH4sIiiII", 40, size, size, 1, 24, b"MJPG", size * size * 3, 0, 0, 0, 0)
    data = [chunk(b"00dc", frame) for frame in frames]
    starts = itertools.accumulate(map(len, data), initial=4)
    index = [struct.pack("<4s3I", b"00dc", 0x10, start, len(frame)) for start, frame in zip(starts, frames)]
    headers = chunk(b"LIST", b"strl", chunk(b"strh", stream), chunk(b"strf", picture))
    return chunk(b"RIFF", b"AVI ", chunk(b"LIST", b"hdrl", chunk(b"avih", main), headers),
                 chunk(b"LIST", b"movi", *data), chunk(b"idx1", *index))


# ---------------------------------------------------------------------------------------------------- questions
def make_world(room, sights, word, camera):
    count, first = Counter(t.name for t in room.things), {}
    for number, picture in reversed(list(enumerate(sights, 1))):
        first.update((k, number) for k, sight in enumerate(picture) if sight.clear)
    named = [k for k in sorted(first) if count[room.things[k].name] == 1]
    places = np.array([[round(10 * v) for v in ground(camera, t.center)] for t in room.things])
    return World(room, sights, word, named, first, places, camera)


def names(world, things):
    return [world.room.things[k].name for k in things]


def describe(world, things):
    """How a chain begins: where each thing is first seen, its box there, its place on the floor in decimeters."""
    parts = []
    for k in things:
        number, (x, y) = world.first[k], world.places[k].tolist()
        picture, box = world.word and f"{world.word} {number} ", [*world.sights[number - 1][k].box]
        parts.append(f"{world.room.things[k].name} {picture}{box} "
                     f"{'left' if x < 0 else 'right'} {abs(x)} {'behind' if y < 0 else 'ahead'} {abs(y)}.")
    return " ".join(parts)


# Each function takes the things in the order of the question's text. It returns None where they make no unambiguous
# question, else the answer in words or as a number, the end of the chain (integers: decimeters, degrees), the options.
def object_size(world, a):
    w, d, h = (round(100 * v) for v in world.room.things[a].dims.tolist())
    return str(max(w, d, h)), f"{w} wide, {d} deep, {h} high.", ()


def absolute_distance(world, a, b):
    centers, gap = round(math.dist(world.places[a], world.places[b])), round(10 * world.room.gaps[a, b])
    if world.room.gaps[a, b] >= MIN_DISTANCE:
        return f"{gap / 10:.1f}", f"Centers {centers} apart, less {centers - gap}: {gap}.", ()


def relative_distance(world, *things):
    *others, target = names(world, things)
    gaps = world.room.gaps[things[-1], things[:-1]].tolist()
    least, second = sorted(gaps)[:2]
    if least >= MIN_DISTANCE and second - least >= NEAREST_MARGIN:
        answer = others[gaps.index(least)]
        stated = ", ".join(f"{name} {round(10 * gap)}" for name, gap in zip(others, gaps))
        return answer, f"From {target}: {stated}. Least {answer}.", others


def camera_direction(world, a, b):
    """Front is nearer to the camera; left and right agree on the floor and in the picture."""
    (xa, ya), (xb, yb) = (ground(world.camera, world.room.things[k].center) for k in (a, b))
    columns = (xa / ya - xb / yb) / (2 * math.tan(FIELD_OF_VIEW / 2))
    if min(abs(xa - xb), abs(ya - yb)) >= SIDE_MARGIN and columns * math.copysign(1, xa - xb) >= COLUMN_MARGIN:
        side, order = "left" if xa < xb else "right", "front" if ya < yb else "back"
        x, y = abs(world.places[a] - world.places[b])
        return f"{side}-{order}", f"Differ {side} {x} {order} {y}: {side}-{order}.", DIAGONALS


def turn_angle(a, b, c):
    """Degrees in (-180, 180] to turn to the left at a, from facing b to facing c.

    >>> turn_angle((0, 0), (0, 1), (-2, 0))
    90.0
    """
    turn = math.degrees(math.atan2(c[1] - a[1], c[0] - a[0]) - math.atan2(b[1] - a[1], b[0] - a[0]))
    return 180 - (180 - turn) % 360


def relative_direction(world, a, b, c):
    """Standing at a's centre and facing b's; c is at the back beyond 135 degrees to either side, as in VSI-Bench."""
    centers = [world.room.things[k].center for k in (a, b, c)]
    turn, near = turn_angle(*centers), min(math.dist(centers[0], other) for other in centers[1:])
    if near >= 2 * SIDE_MARGIN and min(abs(abs(turn) - edge) for edge in (0, 135)) >= ANGLE_MARGIN:
        side = "left" if turn > 0 else "right"
        answer = "back" if abs(turn) > 135 else side
        return answer, f"Turn {round(abs(turn))} {side}: {answer}.", ("left", "right", "back")


def object_count(world, *things):
    return str(len(things)), f"{len(things)} in all.", ()


def room_size(world):
    w, d = (round(10 * v) for v in world.room.sides)
    return f"{w * d / 100:.1f}", f"Walls {w} and {d}.", ()


def appearance_order(world, *things):
    """The first pictures differ, both those with any pixel of a thing and those that show it clearly."""
    anywhere = {k: next(i for i, sight in enumerate(world.sights, 1) if sight[k].box) for k in things}
    order = sorted(things, key=world.first.get)
    if all(seen[a] < seen[b] for seen in (world.first, anywhere) for a, b in itertools.pairwise(order)):
        answer, *wrong = (", ".join(names(world, some)) for some in itertools.permutations(order))
        return answer, f"First {', '.join(str(world.first[k]) for k in order)}: {answer}.", (answer, *wrong)


# type: its function, and texts to try in turn, with one slot for each thing that may be named
VIDEO = {
    "object size": (object_size, ["How many centimeters is the longest dimension of the {}?"]),
    "absolute distance": (absolute_distance, ["How many meters apart are the {} and the {} at their closest points?"]),
    "relative distance": (relative_distance, ["Which of {}, {} and {} is nearest to the {}?",
                                              "Which of {} and {} is nearest to the {}?"]),
    "relative direction": (relative_direction, ["If I stand by the {} and face the {}, "
                                                "is the {} to my left, right or back?"]),
    "object count": (object_count, ["How many {} are in this room?"]),
    "room size": (room_size, ["How many square meters is this room?"]),
    "appearance order": (appearance_order, ["In what order do {}, {} and {} first appear?"]),
}
MULTI_VIEW = {t: VIDEO[t] for t in VIDEO if t not in ("room size", "appearance order")}
SINGLE_IMAGE = {t: MULTI_VIEW[t] for t in MULTI_VIEW if t != "object count"} | {
    "relative direction": (camera_direction, ["Seen from the camera, where is the {} relative to the {}?"])}
TYPES = {"single_image": SINGLE_IMAGE, "multi_view": MULTI_VIEW, "video": VIDEO}


def ask(rng, world, function, texts):
    """(things, text, answer, chain, options' texts), or None where the world allows no such question. Of the answers in
    words that it allows, each is equally likely. Of counts, 1 is asked seldom and where no category has more."""
    for text in texts:
        candidates, found = list(itertools.permutations(world.named, text.count("{}"))), {}
        if function is object_count:  # all things of a category, each clear in some picture
            groups = [[k for k, thing in enumerate(world.room.things) if thing.name == name] for name in FURNITURE]
            groups = [sorted(g, key=world.first.get) for g in groups if g and all(k in world.first for k in g)]
            candidates = [g for g in groups if len(g) > 1] or [g for g in groups if rng.random() < COUNT_ONE]
        for things in (candidates[i] for i in rng.permutation(len(candidates))[:60]):
            if made := function(world, *things):
                found.setdefault(made[0] if made[2] else "", (things, *made))
        if found:
            things, answer, steps, choices = found[rng.choice(sorted(found))]
            named = names(world, things)
            if function is object_count:
                named = [named[0] + "s"]
            return things, text.format(*named), answer, f"{describe(world, things)} {steps}".strip(), choices


# ---------------------------------------------------------------------------------------------------- files
def make_files(seed, split, index, size=SIZE, cast=CAST, difficulty=DIFFICULTY):
    """One room's files {name: bytes} and rows {"grounding", "spatial", "coldstart": list of dicts}.

    A pure function of its arguments."""
    rng = np.random.default_rng(np.random.SeedSequence(seed, spawn_key=(SPLITS.index(split), index)))
    folder, video, ids = f"room{index:05d}", index % 4 == 3, itertools.count(100 * index)
    files, rows = {}, {"grounding": [], "spatial": [], "coldstart": []}

    def locate(world, row, things):
        """A localization row: the boxes of the things in the order in which the question names them."""
        boxes = [{"bbox_2d": [*world.sights[0][k].box], "label": world.room.things[k].name} for k in things]
        shown = sum(sight.box is not None for sight in world.sights[0])
        rows["grounding"].append(row | {"answer": boxes, "shown": shown})

    def add(world, images, data_type, number):
        """Rows of `number` types that the world has a question of."""
        types = sorted(TYPES[data_type], key=lambda t: rng.exponential(1 / WEIGHTS[t]))
        asked = ((t, ask(rng, world, *TYPES[data_type][t])) for t in types)
        for question_type, made in itertools.islice((pair for pair in asked if pair[1]), number):
            things, text, answer, chain, choices = made
            wrong = [c for c in choices if c != answer]
            texts = [wrong[i] for i in rng.permutation(len(wrong))[:3]] + [answer]
            order = rng.permutation(len(texts))
            options = [f"{'ABCD'[i]}. {texts[k]}" for i, k in enumerate(order)] if choices else None
            row = {"question_id": next(ids), "question": text, "image": images, "data_type": data_type}
            if data_type == "single_image":
                locate(world, row, things)
            if options:
                answer = next(option[0] for option in options if option[3:] == answer)
                chain += f" Option {answer}."
            if question_type != "object size" or rng.random() < SIZE_SHARE:
                row |= {"options": options, "answer": answer, "question_type": question_type}
                rows["spatial"].append(row)
                sample = Sample("scenes.py", "", text, question_type, answer, tuple(options or ()))
                rows["coldstart"].append(row | {"solution": f"<think>{chain}</think><answer>{answer}</answer>",
                                                "prompt": prompt_text(sample, "thinking")})

    easy = split == "train" and not video and rng.random() < EASY
    for _ in range(TRIES):
        room = make_room(rng, video, easy, difficulty)
        pictures, _, sights = zip(*(render(room, camera, size, cast) for camera in room.cameras))
        world = make_world(room, sights, "frame" if video else "view", room.cameras[0])
        if not video or ask(rng, world, *TYPES["video"]["appearance order"]):  # a path worth filming
            break
    else:
        raise UserError(f"no video with an order of appearance in {TRIES} rooms of this difficulty {difficulty}")
    frames = [jpeg(picture) for picture in pictures]
    if video and rng.random() < AVI_SHARE:
        files[f"{folder}/video.avi"] = mjpeg_avi(frames, size, FRAMES_PER_SECOND)
    else:
        files |= {f"{folder}/{world.word}{i}.jpg": frame for i, frame in enumerate(frames)}
    if video:
        add(world, list(files), "video", 4)
    else:
        for name, camera, sight in zip(files, room.cameras, sights):
            view = make_world(room, [sight], "", camera)
            add(view, [name], "single_image", 2)
            # and where everything is of the kinds that are wholly clear, kind by kind from left to right
            seen = sorted((k for k, one in enumerate(sight) if one.box), key=lambda k: sight[k].box)
            unclear = {room.things[k].name for k in seen if not sight[k].clear}
            if kinds := rng.permutation(sorted({room.things[k].name for k in seen} - unclear)).tolist():
                row = {"question_id": next(ids), "question": f"Where in the picture: {', '.join(kinds)}?"}
                locate(view, row | {"image": [name], "data_type": "single_image"},
                       [k for kind in kinds for k in seen if room.things[k].name == kind])
        add(world, list(files), "multi_view", 1 if easy else 2)
    return files, rows


def save_room(job):
    """Pool worker: write a room's files, return its rows."""
    folder, arguments = job
    files, rows = make_files(*arguments)
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    return rows


def write_rooms(out, scenes, seed, test_scenes=640, size=SIZE, cast=CAST, processes=None, **difficulty):
    """Write out/{train,val,test}/spld_{grounding,spatial,coldstart}_data.jsonl (cold start: train only), images/
    roomNNNNN/{view0..3.jpg, frame0..7.jpg, video.avi} and out/meta.json: `scenes` training rooms, `test_scenes` test
    rooms, half as many for validation. Built beside and renamed; does nothing where out holds this very request.
    `difficulty` are pairs in place of those of DIFFICULTY. UserError for what cannot be made or written.
    """
    difficulty = {name: [*difficulty.get(name, pair)] for name, pair in DIFFICULTY.items()}
    out, request = Path(out), dict(difficulty, scenes=scenes, test_scenes=test_scenes, seed=seed, size=size, cast=cast)
    for name in ("scenes", "test_scenes", "seed", "cast", "size"):
        if request[name] < 0 or name == "size" and size % 28 + (size == 0):
            raise UserError(f"--{name.replace('_', '-')} is {request[name]}, expected "
                            + ("a multiple of 28" if name == "size" else "0 or more"))
    for name, (low, high) in difficulty.items():
        if not 0 < low <= high < 100 or "categories" in name and high > len(FURNITURE):
            most = f", at most {len(FURNITURE)}" * ("categories" in name)
            raise UserError(f"--{name.replace('_', '-')} {low} {high}: expected the least and the most, above 0{most}")
    try:
        if out.exists() and any(out.iterdir()):
            meta = out / "meta.json"
            if not meta.exists() or json.loads(meta.read_text()) != request:
                raise UserError(f"--out {out}: expected a new folder or the rooms {json.dumps(request)}, found others")
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
                jobs = [(folder / "images", (seed, split, index, size, cast, difficulty)) for index in range(rooms)]
                folder.mkdir()
                made = list(tqdm(pool.imap(save_room, jobs, 4), f"{split} rooms", rooms, mininterval=1))
                for kind in ("grounding", "spatial") + ("coldstart",) * (split == "train"):
                    rows = [row for room in made for row in room[kind]]
                    if kind == "grounding":  # from pictures of one thing to those of many: a curriculum, read in order
                        rows.sort(key=lambda row: row.pop("shown"))
                    (folder / f"spld_{kind}_data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        (beside / "meta.json").write_text(json.dumps(request) + "\n")
        os.replace(beside, out)
    finally:
        shutil.rmtree(beside, ignore_errors=True)


def main():
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", required=True, help="folder to make")
    parser.add_argument("--scenes", type=int, default=3600, help="training rooms")
    parser.add_argument("--test-scenes", type=int, default=640, help="test rooms; validation has half as many")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--size", type=int, default=SIZE, help="side of a picture in pixels, a multiple of 28")
    parser.add_argument("--cast", type=int, default=CAST, help="the lens's colour cast in grey levels, 0 for none")
    parser.add_argument("--processes", type=int, help="default: one per core")
    for name, pair in DIFFICULTY.items():
        parser.add_argument(f"--{name.replace('_', '-')}", nargs=2, type=type(pair[0]), default=pair,
                            metavar=("LEAST", "MOST"), help="difficulty, default: %(default)s")
    write_rooms(**vars(parser.parse_args()))


if __name__ == "__main__":
    main_guard(main)
