"""Procedural 3D rooms: furniture, cameras, and pictures with exact boxes.

    make_room    a furnished room with its cameras
    render       one picture of it, and what the picture shows of each thing (Sight)

scenes.py asks questions about them. Room coordinates: x and y along the walls from a corner, z up,
in meters. On the floor a camera has things `right` and `ahead` of it. A box [x1, y1, x2, y2] covers
the pixel columns x1 to x2 - 1 and the rows y1 to y2 - 1, so x2 - x1 is its width.
"""

import io
import math
import struct
from collections import namedtuple
from functools import lru_cache
from pathlib import Path

import numpy as np
from PIL import Image

from files import UserError, read_json

# ---------------------------------------------------------------------------------- constants

SIZE = 112  # side of a picture in pixels; a multiple of 28, a merged patch of the vision encoder
# The lens tints the edges of a picture by this many grey levels. The model has no absolute
# positions: the tint tells it where in the picture it looks.
CAST = 40
FIELD_OF_VIEW = math.radians(64)
FOCAL_LENGTH = SIZE / 2 / math.tan(FIELD_OF_VIEW / 2)  # in pixels
PITCH = math.radians(15)  # cameras look down by this angle
EYE_HEIGHT = 1.5
CEILING = 2.9

# The least and the most; flags of these names set them. A blind guess of a number earns little only
# where the numbers vary widely: hence the wide ranges of walls and scales.
DIFFICULTY = {
    "view_sides": (3.8, 5.0),  # walls in meters, of rooms with views and of rooms with a video
    "video_sides": (3.0, 7.0),
    "view_categories": (2, 5),  # different categories in a room
    "video_categories": (4, 6),
    "scale": (0.6, 1.6),  # factor on all sides of a thing
}
ROOM_TRIES = 1000  # rooms that are drawn before one of a kind is called impossible
PLACE_TRIES = 30  # places that are drawn before a thing is left out
REPEATS = 0.9  # share of rooms with several things of one category
STRETCH = (0.85, 1.18)  # factors on each side of a thing
GAP = 0.15  # meters between two things
CLEARANCE = 0.75  # meters from a thing to a camera
WALL = 0.03  # meters from a thing to a wall
VIEWS = 4  # cameras of a room with views
FRAMES = 8  # cameras of a room with a video

# A question may name a thing of which the picture shows enough.
MIN_PIXELS = 0.005  # share of the picture's pixels
MIN_SIDE = 0.06  # the box's shorter side, as a share of the picture's
MIN_RATIO = 0.5  # share of the thing's own pixels that no other thing hides
MIN_INSIDE = 0.6  # share of its projected rectangle that is inside the picture

# Category: its colour, its dims (width, depth, height in meters), and solids that fill a unit box,
# see `build`.
FURNITURE = read_json(Path(__file__).parent / "furniture.json")
SQUARE = np.array(
    [
        [-0.5, -0.5],
        [0.5, -0.5],
        [0.5, 0.5],
        [-0.5, 0.5],
    ]
)
LIGHT = np.array([0.45, 0.2, 0.87])  # unit vector towards the light
# sides of a solid: radius of the polygon in a unit square, and by how many sides it is turned
CORNERS = {4: (math.sqrt(0.5), 0.5), 8: (0.5, 0)}

# yaw turns the box around its center (2,); dims (3,) are width, depth and height; footprint (4, 2)
# has the corners on the floor, counter-clockwise
Thing = namedtuple("Thing", "name center yaw dims footprint")
# a convex part of a thing: points p with normals (K, 3) @ p <= offsets (K,); colours (K, 3) of its
# faces in this light; vertices (V, 3)
Solid = namedtuple("Solid", "normals offsets colours vertices")
# place on the floor, and heading in radians, counter-clockwise from the x axis
Camera = namedtuple("Camera", "x y yaw")
# sides (2,): the walls' lengths in meters, multiples of 0.25; solids of each thing; tints
# (3, 2, 3): colours of the walls x = 0 and x = width, y = 0 and y = depth, of floor and ceiling
Room = namedtuple("Room", "sides things solids cameras tints")
# one thing in one picture: box of its visible pixels or None; their share of the pixels that it
# would show if it stood alone in the room; whether a question may name it
Sight = namedtuple("Sight", "box ratio clear")


# ---------------------------------------------------------------------------------- things


def shuffled(rng, items):
    """The items in a random order, as a list."""
    return [items[i] for i in rng.permutation(len(items))]


def turn(points, yaw):
    """Points (N, 2) turned counter-clockwise around the origin."""
    c = math.cos(yaw)
    s = math.sin(yaw)
    return points @ [[c, s], [-s, c]]


def make_thing(name, center, yaw, dims):
    """A thing with its footprint.

    >>> make_thing("bin", (2, 1), 0, (1, 0.5, 0.7)).footprint.tolist()
    [[1.5, 0.75], [2.5, 0.75], [2.5, 1.25], [1.5, 1.25]]
    """
    center = np.asarray(center)
    dims = np.asarray(dims)
    corners = SQUARE * dims[:2]
    return Thing(name, center, yaw, dims, turn(corners, yaw) + center)


def build(thing, sides, x, y, z, taper=1, tint=1):
    """One solid of a thing: a part of a unit box, scaled to the thing's dims, turned and moved.

    Args: sides: 4 for a rectangle, 8 for the octagon in it.
          x: it reaches from -x to x. y, z: from where to where.
          taper: factor on the top face. tint: factor on the thing's colour.
    """
    radius, start = CORNERS[sides]
    angles = (np.arange(sides) + start) * 2 * math.pi / sides
    outline = np.stack([np.cos(angles), np.sin(angles)], 1)  # (sides, 2)
    outline *= radius
    outline *= (2 * x, y[1] - y[0])
    middle = (0, sum(y) / 2)
    ends = []
    for scale, height in zip((1, taper), z):
        flat = (middle + outline * scale) * thing.dims[:2]
        flat = turn(flat, thing.yaw) + thing.center
        ends.append(np.c_[flat, np.full(sides, height * thing.dims[2])])
    bottom, top = ends  # (sides, 3) each

    # The faces: their normals point outwards, and their light depends on where they face.
    edges = np.roll(bottom, -1, 0) - bottom
    around = np.cross(edges, top - bottom)
    around /= np.linalg.norm(around, axis=1, keepdims=True)
    normals = np.r_[around, [[0, 0, 1], [0, 0, -1]]]  # (K, 3): sides, top, bottom
    offsets = np.r_[(around * bottom).sum(1), top[0, 2], -bottom[0, 2]]
    shade = tint * (0.65 + 0.4 * np.maximum(normals @ LIGHT, -0.5))
    colours = shade[:, None] * FURNITURE[thing.name]["colour"]
    return Solid(normals, offsets, colours, np.r_[bottom, top])


def polygon_distance(a, b):
    """Distance of two convex polygons (V, 2), counter-clockwise; 0 if they meet.

    >>> square = np.array([[0, 0], [1, 0], [1, 1], [0, 1.]])
    >>> polygon_distance(square, square + [4, 5]), polygon_distance(square, square / 2)
    (5.0, 0.0)
    """
    # Two convex polygons are apart just where one of them has an edge beyond which all of the other
    # lies. Their distance is then from a corner of one to an edge of the other.
    nearest = math.inf
    separated = False
    for p, q in ((a, b), (b, a)):
        edges = np.roll(p, -1, 0) - p  # (P, 2)
        lengths = np.maximum((edges * edges).sum(1), 1e-12)  # squared
        offsets = q[:, None] - p  # (Q, P, 2): each corner of q from the start of each edge of p
        along = (offsets * edges).sum(2) / lengths  # (Q, P): 0 at the edge's start, 1 at its end
        along = np.clip(along, 0, 1)[..., None]
        apart = offsets - along * edges  # from the edge's nearest point
        nearest = min(nearest, (apart * apart).sum(2).min())
        outside = offsets[..., 0] * edges[:, 1] - offsets[..., 1] * edges[:, 0]
        if (outside.min(0) > 0).any():  # all of q lies beyond one edge of p
            separated = True
    return math.sqrt(nearest) if separated else 0.0


# ---------------------------------------------------------------------------------- rooms


def ground(camera, point):
    """(right, ahead) in meters of a point (2,) on the floor.

    >>> ground(Camera(1, 0, 0), (3, 4))
    (-4.0, 2.0)
    """
    dx = point[0] - camera.x
    dy = point[1] - camera.y
    c = math.cos(camera.yaw)
    s = math.sin(camera.yaw)
    return float(dx * s - dy * c), float(dx * c + dy * s)


def video_cameras(rng, sides):
    """Eight cameras on a straight walk of at most 2 m, which pan by 110 to 210 degrees."""
    a, b = rng.uniform(0.15, 0.85, (2, 2)) * sides
    share = rng.uniform(0, 2) / np.linalg.norm(b - a)
    b = a + (b - a) * min(1, share)
    x, y = sides - a - b  # the middle of the walk looks to the middle of the room
    yaw = math.atan2(y, x)
    sweep = rng.choice([1, -1]) * math.radians(rng.uniform(110, 210))
    cameras = []
    for t in np.linspace(0, 1, FRAMES):
        place = a + (b - a) * t
        cameras.append(Camera(*place, yaw + sweep * (t - 0.5)))
    return cameras


def view_cameras(rng, sides):
    """Four cameras, one at each wall, that look inwards; in turn around the room."""
    cameras = []
    start = int(rng.integers(VIEWS))
    for wall in range(start, start + VIEWS):
        yaw = wall * math.pi / 2
        c = np.cos(yaw)
        s = np.sin(yaw)
        forward = np.array([c, s])
        left = np.array([-s, c])
        back = abs(sides @ forward) / 2 - 0.2  # from the middle of the room almost to the wall
        place = sides / 2 - back * forward + rng.uniform(-0.3, 0.3) * left
        cameras.append(Camera(*place, yaw + rng.uniform(-0.1, 0.1)))
    return cameras


def fits(thing, things, cameras, sides):
    """Whether a thing is inside the walls, apart from all others and not close to a camera."""
    beyond_walls = sides - thing.footprint.max(0)
    if thing.footprint.min() < WALL or beyond_walls.min() < WALL:
        return False
    width, depth, _ = thing.dims
    for camera in cameras:
        # The camera's distance from the footprint, in the thing's own coordinates.
        right, ahead = ground(Camera(*thing.center, thing.yaw), camera)
        beyond = (abs(right) - depth / 2, abs(ahead) - width / 2)
        if math.hypot(*np.maximum(beyond, 0)) < CLEARANCE:
            return False
    return all(polygon_distance(other.footprint, thing.footprint) >= GAP for other in things)


def furnish(rng, names, scale, cameras, sides):
    """A thing of each name at a place where it fits. One that fits nowhere is left out."""
    things = []
    small, large = scale
    for name in names:
        # Both ends of the range are likelier than its middle.
        factor = small * (large / small) ** rng.beta(0.5, 0.5)
        stretch = np.exp(rng.uniform(*np.log(STRETCH), 3))
        dims = factor * stretch * FURNITURE[name]["dims"]
        for _ in range(PLACE_TRIES):
            center = rng.uniform(0, sides)
            yaw = rng.uniform(0, 2 * math.pi)
            thing = make_thing(name, center, yaw, dims)
            if fits(thing, things, cameras, sides):
                things.append(thing)
                break
    return things


def make_room(rng, video, easy=False, difficulty=DIFFICULTY):
    """A furnished room and its cameras, after as many tries as it takes.

    Args: video: eight cameras on a path, not four at the walls.
          easy: one category is enough.
    """
    kind = "video" if video else "view"
    walls = difficulty[f"{kind}_sides"]
    least, most = (1, 1) if easy else difficulty[f"{kind}_categories"]
    for _ in range(ROOM_TRIES):
        sides = (4 * np.exp(rng.uniform(*np.log(walls), 2))).round() / 4
        cameras = video_cameras(rng, sides) if video else view_cameras(rng, sides)
        names = shuffled(rng, [*FURNITURE])
        names = names[: rng.integers(least, most + 1)]
        if rng.random() < REPEATS and not easy:
            names[:1] *= min(4, rng.integers(2, 7))  # most are 4: not all will fit
        things = furnish(rng, names, difficulty["scale"], cameras, sides)
        if len({thing.name for thing in things}) >= least:
            return finish(rng, sides, things, cameras)
    what = f"{least} categories of scale {difficulty['scale']}"
    raise UserError(f"{what} do not fit between walls of {walls} meters")


def finish(rng, sides, things, cameras):
    """A Room: solids and colours."""
    solids = []
    for thing in things:
        parts = FURNITURE[thing.name]["solids"]
        solids.append([build(thing, **part) for part in parts])
    shades = np.array(
        [
            [0.85, 0.95],  # two walls
            [1, 0.9],  # the other two
            [rng.uniform(0.65, 0.9), 1.2],  # floor and ceiling
        ]
    )
    shades *= rng.uniform(150, 205)
    tints = shades[..., None] + rng.uniform(-14, 14, (3, 1, 3))
    return Room(sides, things, solids, cameras, tints.astype(np.float32))


# ---------------------------------------------------------------------------------- pictures


def camera_axes(yaw):
    """(3, 3): right, down and forward of a camera, as rows in room coordinates."""
    c = math.cos(yaw)
    s = math.sin(yaw)
    level = math.cos(PITCH)
    fall = math.sin(PITCH)
    return np.array(
        [
            [s, -c, 0],
            [-c * fall, -s * fall, -level],
            [c * level, s * level, -fall],
        ]
    )


@lru_cache
def pixel_rays():
    """(3, SIZE, SIZE): through the centre of each pixel; right, down, and forward = 1."""
    u = (np.arange(SIZE) + 0.5 - SIZE / 2) / FOCAL_LENGTH
    right, down = np.meshgrid(u, u)
    return np.stack([right, down, np.ones_like(right)]).astype(np.float32)


@lru_cache
def lens_cast(cast):
    """(SIZE, SIZE, 3) grey levels to add: redder and less blue to the right, greener downwards."""
    ramp = np.broadcast_to(np.linspace(-cast, cast, SIZE), (SIZE, SIZE))
    return np.stack([ramp, ramp.T, -ramp], 2).astype(np.float32)


def draw_walls(room, origin, rays):
    """The empty room from inside: the colour (h, w, 3) of the first plane that each ray meets."""
    far = np.array([*room.sides, CEILING])
    ahead = rays > 0
    planes = np.where(ahead, far[:, None, None], 0) - origin[:, None, None]
    with np.errstate(divide="ignore"):
        axis = (planes.astype(np.float32) / rays).argmin(0)  # (h, w)
    side = np.take_along_axis(ahead, axis[None], 0)[0]
    return room.tints[axis, side.astype(int)]


def project(solid, basis, origin):
    """The rectangle (x0, y0, x1, y1) around a solid in the picture; None if it is behind."""
    right, down, forward = basis @ (solid.vertices - origin).T  # (V,) each
    if forward.max() < 0.1:
        return None
    if forward.min() < 0.1:  # it reaches behind the camera: it may show anywhere
        return -SIZE, -SIZE, 2 * SIZE, 2 * SIZE
    corners = SIZE / 2 + FOCAL_LENGTH * np.stack([right, down]) / forward  # (2, V)
    return [*np.floor(corners.min(1)), *np.ceil(corners.max(1))]


def cast_rays(solid, origin, rays):
    """Where rays (3, h, w) enter a solid: ray lengths (h, w), inf for a miss, and faces (h, w).

    A ray is inside a convex solid from the last plane that it enters to the first that it leaves.
    """
    reach = (solid.offsets - solid.normals @ origin).astype(np.float32)[:, None, None]
    facing = np.tensordot(solid.normals.astype(np.float32), rays, 1)  # (K, h, w)
    front = reach[:, 0, 0] < 0  # the origin is beyond these planes: a hit enters through them all
    with np.errstate(divide="ignore"):
        length = reach / facing
    enter = np.where(facing[front] < 0, length[front], np.inf)
    leave = np.where(facing[~front] > 0, length[~front], np.inf).min(0)
    face = np.flatnonzero(front)[enter.argmax(0)]
    enter = enter.max(0)
    return np.where(enter < leave, enter, np.inf), face


def render(room, camera, cast=CAST):
    """One picture.

    Returns: picture (SIZE, SIZE, 3) uint8; ids (SIZE, SIZE), the number + 1 of the thing that each
             pixel shows, 0 for none; a Sight of each thing.
    """
    basis = camera_axes(camera.yaw)
    origin = np.array([camera.x, camera.y, EYE_HEIGHT])
    # From right, down, forward to room coordinates: (3, SIZE, SIZE).
    rays = np.tensordot(basis.astype(np.float32), pixel_rays(), (0, 0))
    image = draw_walls(room, origin, rays)
    depth = np.full((SIZE, SIZE), np.inf, np.float32)
    ids = np.zeros((SIZE, SIZE), np.uint8)
    extents = []
    for number, solids in enumerate(room.solids, 1):
        alone = np.zeros((SIZE, SIZE), bool)  # what it would show alone in the room
        rectangles = []
        # A depth buffer: of all solids that a pixel's ray meets it shows the nearest.
        for solid in solids:
            rectangle = project(solid, basis, origin)
            if rectangle is None:
                continue
            rectangles.append(rectangle)
            x0, y0, x1, y1 = np.clip(rectangle, 0, SIZE).astype(int)
            window = np.s_[y0:y1, x0:x1]  # no ray outside can meet the solid
            length, face = cast_rays(solid, origin, rays[:, *window])
            alone[window] |= length < np.inf
            nearer = length < depth[window]
            depth[window][nearer] = length[nearer]
            ids[window][nearer] = number
            image[window][nearer] = solid.colours[face[nearer]]
        extents.append((int(alone.sum()), rectangles))
    image = np.clip(image + lens_cast(cast), 0, 255).astype(np.uint8)
    sights = []
    for number, (alone, rectangles) in enumerate(extents, 1):
        sights.append(look(ids == number, alone, rectangles))
    return image, ids, sights


def look(mask, alone, rectangles):
    """The Sight of a thing.

    Args: mask: (size, size), its visible pixels.
          alone: how many pixels it would show alone.
          rectangles: around its solids, see `project`.

    >>> look(np.pad(np.ones((2, 3), bool), 4), 12, [(4, 4, 7, 6)])
    Sight(box=(4, 4, 7, 6), ratio=0.5, clear=True)
    """
    rows, columns = np.nonzero(mask)
    pixels = len(rows)
    if pixels == 0:
        return Sight(None, 0.0, False)
    corner = (int(columns.min()), int(rows.min()))
    beyond = (int(columns.max()) + 1, int(rows.max()) + 1)
    size = len(mask)
    low = np.min(rectangles, 0)[:2]
    high = np.max(rectangles, 0)[2:]
    inner = np.clip(high, 0, size) - np.clip(low, 0, size)
    inside = inner.prod() / (high - low).prod()
    clear = (
        pixels >= MIN_PIXELS * mask.size
        and np.subtract(beyond, corner).min() >= MIN_SIDE * size
        and pixels >= MIN_RATIO * alone
        and inside >= MIN_INSIDE
    )
    return Sight(corner + beyond, pixels / alone, bool(clear))


def jpeg(image):
    """A picture (h, w, 3) as the bytes of a .jpg file."""
    out = io.BytesIO()
    Image.fromarray(image).save(out, "JPEG", quality=95, subsampling=0)
    return out.getvalue()


def chunk(name, *parts):
    """A chunk of a RIFF file: its name, its length, its content, filled up to an even length."""
    content = b"".join(parts)
    return name + struct.pack("<I", len(content)) + content + b"\0" * (len(content) % 2)


def avi_headers(count, largest, size, fps):
    """What an .avi file of `count` frames says of itself; `largest` is the longest frame in bytes.

    An x in the formats below is a zero byte: a field that players do not need.
    """
    film = struct.pack(
        "<2I4x2I4x4I16x",
        1_000_000 // fps,  # microseconds of a frame
        largest * fps,  # bytes in a second, at most
        16,  # there is an index
        count,
        1,  # stream
        largest,
        size,
        size,
    )
    stream = struct.pack(
        "<8s12x2I4x3I8x2H",
        b"vidsMJPG",
        1,  # fps / 1 frames in a second
        fps,
        count,
        largest,
        2**32 - 1,  # the default quality
        size,
        size,
    )
    picture = struct.pack(
        "<3I2H4sI16x",
        40,  # bytes of this header
        size,
        size,
        1,  # plane
        24,  # bits of a pixel
        b"MJPG",
        size * size * 3,
    )
    about = chunk(b"LIST", b"strl", chunk(b"strh", stream), chunk(b"strf", picture))
    return chunk(b"LIST", b"hdrl", chunk(b"avih", film), about)


def mjpeg_avi(frames, size, fps):
    """An .avi file (RIFF, one stream of Motion JPEG) of pictures that are .jpg files, all bytes."""
    headers = avi_headers(len(frames), max(map(len, frames)), size, fps)
    data = [chunk(b"00dc", frame) for frame in frames]
    index = []
    start = 4  # where each frame's chunk begins, counted from the name "movi"
    for frame, content in zip(frames, data):
        index.append(struct.pack("<4s3I", b"00dc", 16, start, len(frame)))
        start += len(content)
    movie = chunk(b"LIST", b"movi", *data)
    return chunk(b"RIFF", b"AVI ", headers, movie, chunk(b"idx1", *index))
