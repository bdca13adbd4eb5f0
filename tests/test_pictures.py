"""pictures.py: bit-equal to transformers' PIL processor; kinds of files, films, broken files."""

import io
import math
import os
import random
import struct
import subprocess
import sys
import time
import zlib
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import REPOSITORY
from PIL import Image, features

import pictures as module
from checkpoint import load_config
from data import Processor
from files import UserError
from pictures import (
    TURNS,
    Media,
    even_count,
    is_film,
    measure,
    open_frames,
    open_header,
    open_picture,
    read_video,
    resizes,
    smart_resize,
    spread,
    to_patches,
)

av = pytest.importorskip("av")
LIMITS = (56 * 56, 1280 * 28 * 28)  # Qwen2.5-VL's own


@pytest.fixture(scope="module")
def theirs():
    """transformers' processor: (picture, limits) -> patches, grid."""
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    def process(picture, limits=LIMITS):
        out = Qwen2VLImageProcessorPil(min_pixels=limits[0], max_pixels=limits[1])(
            picture, return_tensors="pt"
        )
        return out["pixel_values"], tuple(out["image_grid_thw"][0].tolist())

    return process


def ours(picture, limits=LIMITS):
    return to_patches([picture], smart_resize(picture.height, picture.width, *limits))


def noise(width, height, channels=3, seed=0):
    """A random array; neighbours are unrelated, so any other resampling shows."""
    return np.random.default_rng(seed).integers(0, 256, (height, width, channels), dtype=np.uint8)


def saved(image, kind="PNG", **options):
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def same(a, b):
    return torch.equal(a[0], b[0]) and a[1] == b[1] and a[0].dtype == b[0].dtype


# ------------------------------------------------------------ sizes


@pytest.mark.parametrize(
    "limits",
    [
        LIMITS,
        (4 * 28 * 28, 128 * 28 * 28),
        (4 * 28 * 28, 112 * 112),
        (512 * 28 * 28, 512 * 28 * 28),
    ],
)
def test_smart_resize_is_transformers(limits):
    """2,000 random sizes, with half multiples of 28, where round() goes to the even neighbour."""
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize as oracle

    rng = random.Random(0)
    sizes = [(rng.randint(28, 4000), rng.randint(28, 4000)) for _ in range(1500)]
    sizes += [(14 * rng.randint(2, 100), 14 * rng.randint(2, 100)) for _ in range(500)] + [
        (28, 5600),
        (5600, 28),
        (28, 28),
    ]
    for height, width in sizes:
        found = smart_resize(height, width, *limits)
        assert found == oracle(height, width, 28, *limits) and found[0] % 28 == found[1] % 28 == 0


def test_aspect_ratio_above_200_is_refused():
    assert smart_resize(28, 5600, *LIMITS) == (28, 5600)
    with pytest.raises(UserError, match="aspect ratio of 5601x28 is above 200"):
        smart_resize(28, 5601, *LIMITS)


# ------------------------------------------------------------ sizes of other programs


PUBLISHED = (4 * 28 * 28, 16384 * 28 * 28)  # limits of a published checkpoint


def tokens(steps):
    """Vision tokens of a picture, or of two frames, after its last resize."""
    (h, w), _ = steps[-1]
    return h * w // 28**2


@pytest.mark.parametrize(
    "width, height, largest, once, picture, film",
    [
        (1920, 1080, 12_845_056, 2691, 2691, 16_320),
        (1296, 968, 401_408, 494, 475, 475),
        (640, 480, 401_408, 391, 391, 475),
        (1920, 1440, 401_408, 494, 494, 475),
        (1920, 1080, 401_408, 480, 510, 510),
        (176, 144, 401_408, 30, 30, 500),
        (1296, 968, 100_352, 117, 108, 108),
        (640, 480, 100_352, 117, 117, 108),
        (1920, 1440, 100_352, 117, 117, 108),
        (1920, 1080, 100_352, 120, 120, 120),
        (176, 144, 100_352, 30, 30, 120),
    ],
)
def test_the_authors_sizes(width, height, largest, once, picture, film):
    """Tokens by their evaluation (401,408 pixels) and training, with qwen-vl-utils 0.0.8 or 0.0.11.

    These take the frames of a list for pictures.
    """
    limits = 16 * 28 * 28, largest
    size = height, width, limits
    assert tokens(resizes(*size)) == tokens(resizes(*size, frames=32, from_file=True)) == once
    assert tokens(resizes(*size, "authors")) == tokens(resizes(*size, "authors", 16)) == picture
    assert tokens(resizes(*size, "authors", 32, from_file=True)) == film


def test_the_authors_frames_are_resized_three_times():
    """Once to the area by their own code, then by the package, then by transformers."""
    found = resizes(480, 640, (16 * 28 * 28, 401_408), "authors", 32, from_file=True)
    assert found == [
        ((548, 731), Image.LANCZOS),
        ((560, 728), Image.BICUBIC),
        ((532, 700), Image.BICUBIC),
    ]


@pytest.mark.parametrize(
    "width, height, frames, expected",
    [
        (1920, 1080, 32, 11_520),
        (176, 144, 32, 2_288),
        (1296, 968, 32, 11_776),
        (640, 480, 32, 6_256),
        (640, 480, 31, 6_256),  # the last frame is repeated
        (1920, 1080, 300, 108_000),  # 150 pairs: 768 tokens each are just within the budget
        (1920, 1080, 512, 107_520),  # from here on it is shared: 450 tokens, and here 300
        (1920, 1080, 768, 105_984),
        (640, 480, 768, 115_200),
        (1920, 1080, 4000, 240_000),  # the largest area is never below 1.05 times the smallest
    ],
)
@pytest.mark.parametrize("from_file", [True, False])
def test_videos_within_the_limits_of_qwen_vl_utils(width, height, frames, expected, from_file):
    """Tokens of all frames by qwen-vl-utils 0.0.14 and a published checkpoint's own limits."""
    found = resizes(height, width, PUBLISHED, "qwen-vl-utils", frames, from_file)
    assert math.ceil(frames / 2) * tokens(found) == expected


def test_a_picture_within_the_limits_of_qwen_vl_utils():
    """A published checkpoint has the same limits of pictures."""
    found = resizes(968, 1296, PUBLISHED, "qwen-vl-utils")
    assert [size for size, _ in found] == [(980, 1288), (980, 1288)]


@pytest.mark.parametrize(
    "width, height, frames, expected",
    [
        (1296, 968, 0, 475),
        (640, 480, 32, 391),
        (1920, 1440, 32, 494),
        (1920, 1080, 32, 480),
        (176, 144, 32, 143),
    ],
)
def test_flags_come_after_the_limits_of_qwen_vl_utils(width, height, frames, expected):
    """--max-pixels 401408 is transformers' limit, as if its processor were given it."""
    assert tokens(resizes(height, width, (3136, 401_408), "qwen-vl-utils", frames)) == expected


@pytest.mark.parametrize(
    "total, rate, num_frames, fps, max_frames, expected",
    [
        (15, 30.0, 32, 2.0, 768, 4),  # half a second
        (99, 30.0, 32, 2.0, 768, 6),  # 3.3 seconds
        (119, 30.0, 32, 2.0, 768, 6),  # 3.97 seconds
        (120, 30.0, 32, 2.0, 768, 8),
        (7, 10.0, 32, 30.0, 768, 6),  # not more than there are
        (3, 30.0, 32, 2.0, 768, 2),
        (90_000, 30.0, 32, 2.0, 768, 768),
        (90_000, 30.0, 32, 2.0, 33, 32),
        (1000, 30.0, 32, None, 768, 32),
        (1000, 30.0, 5, None, 768, 4),
        (1000, 30.0, 7, None, 768, 8),
        (2400, 24000 / 1001, 32, 2.0, 768, 200),
    ],
)
def test_numbers_of_frames_of_qwen_vl_utils(total, rate, num_frames, fps, max_frames, expected):
    """As its smart_nframes (0.0.14) counts them."""
    assert even_count(total, rate, num_frames, fps, max_frames) == expected


def loaded(media, **settings):
    """What a Processor makes of a picture or a video, after it has measured the same."""
    base = REPOSITORY / "base"
    processor = Processor(base, load_config(base), **settings)
    item, measured = processor.load(media), processor.load(media, pixels=False)
    assert (item.grid, item.scale) == (measured.grid, measured.scale)
    return item


PAPER = {"min_pixels": 16 * 28 * 28, "max_pixels": 128 * 28 * 28, "input_as": "authors"}


def test_a_picture_of_the_authors(theirs, tmp_path):
    """PIL's resize as in qwen-vl-utils, then transformers' processor: bit-equal. Boxes fit it."""
    picture = Image.fromarray(noise(1296, 968))
    picture.save(tmp_path / "a.png")
    item = loaded(Media("image", str(tmp_path / "a.png")), **PAPER)
    expected = theirs(picture.resize((1288, 980)), (16 * 28 * 28, 128 * 28 * 28))
    assert same((item.patches, item.grid), expected) and item.grid == (1, 18, 24)
    assert item.scale == (336 / 1296, 252 / 968)


def test_a_list_of_frames_of_the_authors(theirs, tmp_path):
    """Each is a picture: none is enlarged, as those of a film are."""
    paths = []
    for seed in range(2):
        paths.append(str(tmp_path / f"{seed}.png"))
        Image.fromarray(noise(640, 480, seed=seed)).save(paths[-1])
    item = loaded(Media("video", tuple(paths)), **PAPER)
    assert item.grid == (1, 18, 26)
    limits = 16 * 28 * 28, 128 * 28 * 28
    for frame, path in enumerate(paths):
        patches, _ = theirs(Image.open(path).resize((644, 476)), limits)
        found = item.patches.view(-1, 3, 2, 196)[:, :, frame]
        assert torch.equal(found, patches.view(-1, 3, 2, 196)[:, :, 0])


def test_a_film_of_the_authors(video, monkeypatch):
    """64 x 48 at 12,544 pixels: 129 x 96, then 140 x 84, which is within the limits."""
    frames = [Image.fromarray(noise(64, 48, seed=seed)) for seed in range(4)]
    monkeypatch.setattr("data.open_frames", lambda *_: (frames, 0.75))
    item = loaded(Media("video", str(video)), num_frames=4, max_pixels=12_544, input_as="authors")
    steps = [frame.resize((129, 96), Image.LANCZOS).resize((140, 84)) for frame in frames]
    assert same((item.patches, item.grid), to_patches(steps, (84, 140)))
    assert item.grid == (2, 6, 10) and item.scale == (140 / 64, 84 / 48)


def test_a_film_of_qwen_vl_utils(video):
    """3 seconds at 1 a second are 4 frames, not 3; each grows to 128 tokens or more, not to 4."""
    film = Media("video", str(video))
    settings = {"fps": 1.0, "max_pixels": 768 * 28 * 28, "video_seconds": "real"}
    item = loaded(film, input_as="qwen-vl-utils", **settings)
    assert item.grid == (2, 20, 28) and item.seconds == pytest.approx(1.5)
    item = loaded(film, **settings)
    assert item.grid == (2, 4, 4) and item.seconds == pytest.approx(2.0)


def test_one_frame_is_a_film():
    """There the package ends with an error."""
    assert even_count(1, 30.0, 32, None, 768) == even_count(1, 30.0, 32, 2.0, 768) == 1


# ------------------------------------------------------------ pictures


@pytest.mark.parametrize(
    "width, height",
    [
        (28, 28),
        (29, 57),
        (56, 56),
        (113, 60),
        (224, 224),
        (333, 97),
        (640, 480),
        (481, 641),
        (28, 5600),
        (4200, 30),
        (1296, 968),
    ],
)
def test_patches_are_transformers(theirs, width, height):
    """Resize, normalization, order of patches and layout, to the last bit."""
    picture = Image.fromarray(noise(width, height))
    assert same(ours(picture), theirs(picture))


@pytest.mark.parametrize(
    "limits",
    [(4 * 28 * 28, 112 * 112), (4 * 28 * 28, 128 * 28 * 28), (512 * 28 * 28, 600 * 28 * 28)],
)
def test_patches_under_other_limits_are_transformers(theirs, limits):
    picture = Image.fromarray(noise(301, 222))
    assert same(ours(picture, limits), theirs(picture, limits))


@pytest.mark.slow
@pytest.mark.parametrize("width, height", [(4000, 3000), (3000, 4000), (1920, 1080), (2048, 2048)])
def test_large_patches_are_transformers(theirs, width, height):
    picture = Image.fromarray(noise(width, height))
    assert same(ours(picture), theirs(picture))


@pytest.mark.slow
def test_patches_of_many_shapes_are_transformers(theirs):
    rng = random.Random(0)
    for seed in range(150):
        limits = rng.choice([LIMITS, (4 * 28 * 28, 112 * 112), (4 * 28 * 28, 128 * 28 * 28)])
        picture = Image.fromarray(noise(rng.randint(28, 700), rng.randint(28, 700), seed=seed))
        assert same(ours(picture, limits), theirs(picture, limits)), (picture.size, limits)


def test_every_value_a_pixel_can_have(theirs):
    """The table of normalized values, all 256 in all three channels, without resizing."""
    ramp = np.tile(np.arange(256, dtype=np.uint8).repeat(7)[:, None, None], (1, 28, 3))  # 1792 x 28
    picture = Image.fromarray(ramp)
    assert smart_resize(1792, 28, *LIMITS) == (1792, 28) and same(ours(picture), theirs(picture))
    assert len(ours(picture)[0].unique()) == 768


def modes():
    rgb = Image.fromarray(noise(90, 70))
    transparent = rgb.convert("P", palette=Image.Palette.ADAPTIVE)
    return {
        "grey": (rgb.convert("L"), "PNG", {}),
        "black and white": (rgb.convert("1"), "PNG", {}),
        "palette": (rgb.convert("P", palette=Image.Palette.ADAPTIVE), "PNG", {}),
        "palette with a transparent colour": (transparent, "PNG", {"transparency": 3}),
        "gif": (transparent, "GIF", {}),
        "RGBA": (Image.fromarray(noise(90, 70, 4)), "PNG", {}),
        "grey with alpha": (Image.fromarray(noise(90, 70, 2)), "PNG", {}),
        "CMYK": (rgb.convert("CMYK"), "JPEG", {}),
        "CMYK tiff": (rgb.convert("CMYK"), "TIFF", {}),
        "YCbCr": (rgb, "JPEG", {"quality": 60}),
        "webp": (rgb, "WEBP", {}),
        "16 bit": (
            Image.fromarray(np.random.default_rng(0).integers(0, 400, (70, 90)).astype(np.uint16)),
            "PNG",
            {},
        ),
        "32 bit float": (
            Image.fromarray(300 * np.random.default_rng(0).random((70, 90), np.float32)),
            "TIFF",
            {},
        ),
    }


@pytest.mark.parametrize("mode", modes())
def test_every_kind_of_picture_is_transformers(theirs, mode, tmp_path):
    """transformers converts what PIL opens by itself; a path and the file's bytes are equal.

    What is transparent shows a white background and values above 255 are cut, there as here.
    """
    image, kind, options = modes()[mode]
    content = saved(image, kind, **options)
    (tmp_path / "picture").write_bytes(content)
    expected = theirs(Image.open(io.BytesIO(content)))
    assert same(ours(open_picture(content)), expected)
    assert same(ours(open_picture(str(tmp_path / "picture"))), expected)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_pictures_are_turned_upright(theirs, orientation):
    """EXIF orientation is obeyed, which transformers does not look at: boxes fit the picture."""
    upright = Image.fromarray(noise(120, 70))
    undo = {
        1: None,
        2: Image.Transpose.FLIP_LEFT_RIGHT,
        3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_90,
        7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_270,
    }
    turned = upright if undo[orientation] is None else upright.transpose(undo[orientation])
    exif = Image.Exif()
    exif[0x0112] = orientation
    found = open_picture(saved(turned, exif=exif))
    assert found.size == (120, 70) and same(ours(found), theirs(upright))
    assert open_header(saved(turned, exif=exif)) == (120, 70)


def with_exif(*tags, orientation=None):
    """A JPEG of 120 x 70 with an EXIF block of these tags: (number, TIFF type, count, 4 bytes)."""
    if orientation is not None:
        tags = (*tags, (0x0112, 3, 1, struct.pack(">H", orientation)))
    entries = b""
    for number, kind, count, value in sorted(tags):
        entries += struct.pack(">HHI", number, kind, count) + value.ljust(4, b"\0")
    block = b"Exif\0\0MM\0*" + struct.pack(">IH", 8, len(tags)) + entries + bytes(40)
    content = saved(Image.fromarray(noise(120, 70)), "JPEG")
    return content[:2] + b"\xff\xe1" + struct.pack(">H", len(block) + 2) + block + content[2:]


@pytest.mark.parametrize(
    "tag",
    [
        (296, 2, 2, b"2"),
        (282, 2, 3, b"72"),
        (271, 4, 1, b"\0\0\0\7"),
        (306, 11, 1, struct.pack(">f", 1.5)),
        (256, 2, 4, b"120"),
        (0x8769, 4, 1, b"\xff\xff\xff\xff"),
        (33434, 5, 9, b"\0\0\xff\0"),
        (700, 99, 1, b"x"),
    ],
    ids=str,
)
def test_exif_turns_by_the_orientation_alone(tag):
    """Whatever else the block holds, of whatever type: the picture is turned as without it."""
    for orientation, size in ((6, (70, 120)), (3, (120, 70)), (None, (120, 70))):
        expected = open_picture(with_exif(orientation=orientation))
        content = with_exif(tag, orientation=orientation)
        found = open_picture(content)
        assert found.size == open_header(content) == expected.size == size
        assert found.tobytes() == expected.tobytes()


@pytest.mark.parametrize(
    "content",
    [
        *(with_exif(orientation=number) for number in (0, 9, 99, 65535)),
        with_exif((0x0112, 2, 2, b"6")),
        with_exif((0x0112, 7, 4, b"abcd")),
        with_exif((0x0112, 1, 1, b"\6")),
        with_exif((0x0112, 12, 1, b"\xff")),
        with_exif((0x0112, 3, 9, b"\xff\xff\xff\xff")),
        with_exif(orientation=6).replace(b"MM\0*", b"MX\0*"),
        with_exif(orientation=6).replace(b"MM\0*", b"II*\0"),
    ],
)
def test_an_orientation_that_is_none_turns_nothing(content):
    found = open_picture(content)
    assert found.size == open_header(content) == (120, 70)
    assert found.tobytes() == open_picture(with_exif()).tobytes()


@pytest.mark.parametrize(
    "kind", ["JPEG", "PNG", "WEBP", "TIFF", *(["AVIF"] if features.check("avif") else [])]
)
@pytest.mark.parametrize("orientation", range(1, 9))
def test_header_and_pixels_agree(kind, orientation):
    """Turned once, in the size as in the pixels: PIL turns TIFF files by itself."""
    upright = Image.new("RGB", (120, 70), "black")
    upright.paste("white", (0, 0, 60, 35))  # the corner above on the left
    undo = {None: None, **{turn: turn for turn in TURNS.values()}}
    undo |= {TURNS[6]: TURNS[8], TURNS[8]: TURNS[6]}
    turn = undo[TURNS.get(orientation)]
    exif = Image.Exif()
    exif[0x0112] = orientation
    content = saved(upright if turn is None else upright.transpose(turn), kind, exif=exif)
    found = open_picture(content)
    assert found.size == open_header(content) == (120, 70)
    difference = np.asarray(found, float) - np.asarray(upright, float)
    assert abs(difference).mean() < 3  # JPEG, WEBP and AVIF lose a little


SMALL = [(27, 100), (100, 27), (257, 27), (20, 20), (13, 14), (1, 1), (5, 900), (2, 400)]


@pytest.mark.parametrize("size", SMALL)
def test_small_pictures_are_grown_as_transformers_grows_them(theirs, tmp_path, size):
    picture = Image.fromarray(noise(*size))
    path = tmp_path / "small.png"
    picture.save(path)
    assert measure(Media("image", str(path)), 1) == (1, size, None)
    frames, _ = open_frames(Media("image", str(path)), 1)
    for limits in (LIMITS, (4 * 28 * 28, 128 * 28 * 28)):
        assert same(ours(frames[0], limits), theirs(picture, limits))
    assert ours(frames[0])[1][0] == 1 and min(ours(frames[0])[1][1:]) >= 2


@pytest.mark.parametrize("suffix", [".jpg", ".png", ".bmp", ".gif", ".tif", ".webp", ".ppm", ""])
def test_a_picture_is_one_frame(tmp_path, suffix):
    """By its name, or by its content where the name tells nothing; in capitals too."""
    path = tmp_path / f"frame{suffix.upper()}"
    path.write_bytes(
        saved(Image.new("RGB", (64, 48)), Image.registered_extensions().get(suffix, "PNG"))
    )
    assert not is_film(str(path))
    media = Media("video", str(path))
    assert not media.is_video_file
    frames, interval = open_frames(media, 8)
    assert measure(media, 8) == (len(frames), frames[0].size, interval) == (1, (64, 48), None)


@pytest.mark.parametrize(
    "suffix", [".mp4", ".m4v", ".mov", ".avi", ".mkv", ".mpg", ".ts", ".wmv", ".webm", ""]
)
def test_all_else_is_a_film(tmp_path, suffix):
    path = tmp_path / f"film{suffix}"
    path.write_bytes(b"not a video really")
    assert is_film(str(path)) and Media("video", str(path)).is_video_file
    with pytest.raises(UserError, match="not a readable video"):
        open_frames(Media("video", str(path)), 8)


def test_a_picture_that_moves_is_a_film(tmp_path):
    """Its first frame alone would be taken for the whole."""
    path = tmp_path / "moving.gif"
    frames = [Image.new("RGB", (64, 48), colour) for colour in ("red", "blue")]
    frames[0].save(path, save_all=True, append_images=frames[1:])
    assert is_film(str(path))


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"not a picture",
        saved(Image.new("RGB", (64, 64)))[:60],
        saved(Image.fromarray(noise(64, 64)), "JPEG")[:-300],
        b"\x89PNG\r\n\x1a\n" + b"\0" * 40,
    ],
    ids=["empty", "text", "cut png", "cut jpeg", "png header"],
)
def test_what_is_not_a_picture_is_one_line_with_the_path(tmp_path, content):
    path = tmp_path / "broken.jpg"
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"broken\.jpg: not a readable picture") as error:
        open_picture(str(path))
    assert "\n" not in str(error.value)
    with pytest.raises(UserError, match="picture given as bytes: not a readable picture"):
        open_picture(content)


def test_no_such_picture(tmp_path):
    for path in (tmp_path / "nothing.jpg", tmp_path):
        with pytest.raises(UserError, match="not a readable picture"):
            open_picture(str(path))


def test_a_picture_of_a_billion_pixels_is_refused():
    """Refused from its header, not decoded: a row of a data set must not fill the memory."""
    content = bytearray(saved(Image.new("1", (28, 28))))
    content[16:24] = struct.pack(
        ">II", 40_000, 30_000
    )  # PNG's width and height; the checksum follows
    content[29:33] = struct.pack(">I", zlib.crc32(content[12:29]))
    with pytest.raises(UserError, match="not a readable picture"):
        open_picture(bytes(content))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "kind",
    ["PNG", "JPEG", "GIF", "WEBP", "TIFF", "BMP", *(["AVIF"] if features.check("avif") else [])],
)
def test_damaged_pictures_open_or_are_refused(kind):
    """Random bytes changed or cut anywhere, in EXIF too: a picture or our one error."""
    exif = Image.Exif()
    exif[0x0112], exif[0x010E] = 6, "a room"
    content = saved(
        Image.fromarray(noise(40, 30)),
        kind,
        **({"exif": exif} if kind in ("PNG", "JPEG", "WEBP", "TIFF") else {}),
    )
    rng, refused = random.Random(0), 0
    for _ in range(100 if kind == "TIFF" else 300):
        damaged = bytearray(content)
        for _ in range(rng.randint(1, 6)):
            damaged[rng.randrange(len(damaged) if rng.random() < 0.3 else 120)] = rng.randrange(256)
        try:
            damaged = bytes(
                damaged[: rng.randint(1, len(damaged))] if rng.random() < 0.2 else damaged
            )
            open_header(damaged)
            open_picture(damaged)
        except UserError:
            refused += 1
    assert refused > 0


# ------------------------------------------------------------ videos


@pytest.mark.parametrize("count", [1, 2, 3, 5, 8])
def test_frames_become_temporal_patches(theirs, count):
    """Slice s holds frames 2s and 2s + 1, an odd last one twice: transformers' patches of each."""
    frames = [Image.fromarray(noise(100, 75, seed=i)) for i in range(count)]
    size = smart_resize(75, 100, *LIMITS)
    patches, grid = to_patches(frames, size)
    single = [theirs(frame) for frame in frames + frames[-1:]]
    slices = math.ceil(count / 2)
    h, w = single[0][1][1:]
    expected = torch.stack([single[2 * s][0].view(h * w, 3, 2, 196) for s in range(slices)])
    expected[:, :, :, 1] = torch.stack(
        [single[2 * s + 1][0].view(h * w, 3, 2, 196)[:, :, 0] for s in range(slices)]
    )
    assert grid == (slices, h, w) and torch.equal(patches, expected.view(-1, 1176))


def write_video(path, frames=30, fps=10, width=64, height=48, codec="mpeg4", times=None, **more):
    """A video whose frame i is plain grey of value 7 * i + 20: a decoded frame tells its number.

    times: of the frames, in milliseconds. more: options of the encoder.
    """
    with av.open(str(path), "w") as file:
        stream = file.add_stream(codec, rate=fps, options=more)
        stream.width, stream.height, stream.pix_fmt, stream.gop_size = width, height, "yuv420p", 5
        stream.bit_rate = 4_000_000
        if times:
            stream.codec_context.time_base = Fraction(1, 1000)
        for i in range(frames):
            picture = np.full((height, width, 3), (7 * i + 20) % 256, np.uint8)
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
            if times:
                frame.pts, frame.time_base = times[i], Fraction(1, 1000)
            file.mux(stream.encode(frame))
        file.mux(stream.encode())
    return path


def cut(path, seconds):
    """Let an mp4 begin later, without encoding it again: its edit list hides what is before."""
    content = bytearray(path.read_bytes())
    scale = content.index(b"mdhd") + 16  # units of a second
    start = content.index(b"elst") + 16  # of what is shown, in these units
    units, begins = (struct.unpack(">I", content[i : i + 4])[0] for i in (scale, start))
    content[start : start + 4] = struct.pack(">I", begins + round(seconds * units))
    path.write_bytes(content)
    return path


def test_frames_of_a_file_are_measured_as_they_are_opened(video):
    """Tokens are counted from `measure`, patches are cut from `open_frames`."""
    media = Media("video", str(video))
    frames, size, between = measure(media, 4, None)
    pictures, interval = open_frames(media, 4, None)
    assert (frames, size) == (len(pictures), pictures[0].size) == (4, (64, 48))
    assert between == interval == pytest.approx(0.75)


def numbers(pictures):
    return [round((np.asarray(p).mean() - 20) / 7) for p in pictures]


@pytest.fixture(scope="module")
def video(tmp_path_factory):
    return write_video(tmp_path_factory.mktemp("video") / "thirty.mp4")  # 3 seconds


@pytest.mark.parametrize(
    "num_frames, fps, expected, seconds",
    [
        (4, None, [0, 9, 19, 29], 0.75),  # 29 / 3 = 9.67 apart, rounded down
        (1, None, [0], 3.0),
        (2, None, [0, 29], 1.5),
        (30, None, list(range(30)), 0.1),
        (64, None, list(range(30)), 0.1),  # fewer frames than asked for: all of them
        (4, 2.0, [0, 5, 11, 17, 23, 29], 0.5),  # 3 seconds at 2 a second: 29 / 5 = 5.8 apart
        (4, 1.0, [0, 14, 29], 1.0),
        (4, 0.01, [0], 3.0),  # at least one
        (4, 100.0, list(range(30)), 0.1),
    ],
)
def test_frames_of_a_file(video, num_frames, fps, expected, seconds):
    """Which frames are read, and the time between them from the true length: seconds / frames."""
    pictures, between = read_video(str(video), num_frames, fps)
    assert numbers(pictures) == expected and between == pytest.approx(seconds)
    assert all(p.size == (64, 48) and p.mode == "RGB" for p in pictures)


@pytest.mark.parametrize(
    "count, num_frames, fps, expected, seconds",
    [
        (5, 32, 2.0, [0, 1, 2, 4], 0.125),
        (33, 32, 2.0, [0, 6, 12, 19, 25, 32], 0.55),
        (7, 32, None, [0, 1, 2, 3, 4, 6], 0.7 / 6),
        (33, 5, None, [0, 10, 21, 32], 0.825),
    ],
)
def test_even_numbers_of_frames(tmp_path, count, num_frames, fps, expected, seconds):
    """Half a second, 3.3 seconds, a film of seven frames, an odd --num-frames."""
    path = write_video(tmp_path / "v.mp4", frames=count)
    pictures, between = read_video(path, num_frames, fps, even=True)
    assert numbers(pictures) == expected and between == pytest.approx(seconds)
    media = Media("video", str(path))
    assert measure(media, num_frames, fps, even=True) == (len(pictures), (64, 48), between)


H264 = {"codec": "libx264", "bf": "3", "sc_threshold": "0"}


@pytest.mark.parametrize("gop", ["5", "12", "250"])
@pytest.mark.parametrize("hidden", [1, 4, 7, 13])
@pytest.mark.parametrize("count", [1, 4, 8, 64])
def test_clips_that_were_cut_without_encoding(tmp_path, gop, hidden, count):
    """Frames before the cut are in the file, but not shown: what is read begins at the cut."""
    path = cut(write_video(tmp_path / "cut.mp4", **H264, g=gop), hidden / 10)
    pictures, between = read_video(path, count)
    shown = list(range(hidden, 30))
    index = np.linspace(0, len(shown) - 1, min(count, len(shown))).astype(int)
    assert numbers(pictures) == [shown[i] for i in index]
    assert between == pytest.approx(len(shown) / 10 / len(index), rel=0.01)
    assert measure(Media("video", str(path)), count) == (len(index), (64, 48), between)


KINDS = {
    "mkv": H264,
    "mov": H264,
    "flv": H264,
    "avi": H264,
    "avi b-frames": {"codec": "mpeg4", "bf": "2"},
    "mp4 open groups": H264 | {"x264-params": "open-gop=1"},
    "mp4 fragments": H264,
    "webm": {"codec": "libvpx", "deadline": "realtime", "crf": "4"},
    "wmv": {"codec": "wmv2"},
    "mpg": {"codec": "mpeg2video", "bf": "2"},
    "mpg 1": {"codec": "mpeg1video", "bf": "2"},
    "ts": {"codec": "mpeg2video", "bf": "2"},
    "ts h264": H264,
    "m2ts": H264,
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("count", [4, 7, 30])
def test_frames_of_every_container(tmp_path, kind, count):
    """The right frames in order, or a word: of MPEG streams the first ones may be out of reach."""
    path = tmp_path / f"film.{kind.split()[0]}"
    write_video(path, fps=25, **KINDS[kind])
    try:
        pictures, between = read_video(path, count)
    except UserError as error:
        assert "frames can be decoded; write it anew: ffmpeg -i film." in str(error)
        assert kind.startswith(("ts", "m2ts", "mpg"))
        return
    found = numbers(pictures)
    first = found[0]
    assert first * 0.04 <= module.MISSING and (first == 0 or path.suffix in (".ts", ".m2ts"))
    expected = first + np.linspace(0, 29 - first, min(count, 30 - first)).astype(int)
    assert found == expected.tolist()
    assert between == pytest.approx((30 - first) * 0.04 / len(found), rel=0.02)


def test_an_mpeg_stream_without_its_beginning(tmp_path):
    """A recording that begins within a group of frames, cut in its middle."""
    whole = write_video(tmp_path / "whole.ts", codec="mpeg2video", g="3")
    content = whole.read_bytes()
    path = tmp_path / "late.ts"
    path.write_bytes(content[len(content) // 2 // 188 * 188 :])
    try:
        found = numbers(read_video(path, 64)[0])
    except UserError as error:
        assert "frames can be decoded" in str(error)
    else:
        assert found == list(range(found[0], 30)) and 10 < found[0] < 20


VARIABLE = [50 * i for i in range(20)] + [1000 * i for i in range(2, 12)]  # milliseconds


@pytest.mark.parametrize("suffix", ["mp4", "mkv", "mov"])
@pytest.mark.parametrize("count", [2, 3, 8, 16])
def test_frames_are_even_in_time_where_the_rate_is_not(tmp_path, suffix, count):
    """20 frames in the first second, then one a second: what is on the screen at even moments."""
    path = write_video(tmp_path / f"variable.{suffix}", fps=20, times=VARIABLE)
    pictures, between = read_video(path, count)
    wanted = np.linspace(0, 11000, count)
    expected = np.searchsorted(VARIABLE, wanted + 1, side="right") - 1
    assert numbers(pictures) == expected.tolist()
    assert between == pytest.approx(11 * 30 / 29 / count, rel=0.01)
    assert len(read_video(path, 1, fps=0.5)[0]) == 6
    assert numbers(read_video(path, 30)[0]) == list(range(30))


@pytest.mark.parametrize("damage", ["twice", "none"])
def test_without_usable_timestamps_frames_are_even(damage):
    """Two recordings in one file count their time twice; some frames have no time at all."""
    times = {"twice": np.repeat(np.arange(5) / 10, 2), "none": np.arange(-1, 9) / 10}[damage]
    if damage == "none":
        times[0] = -1e14
    found, shown = module.moments(times, 10.0)
    assert shown == 10 and found.tolist() == [i / 10 for i in range(10)]
    index, between = spread(found, 10.0, 4, None, 768)
    assert index.tolist() == [0, 3, 6, 9] and between == pytest.approx(0.25)


def test_long_films_have_a_cap(tmp_path, capsys, monkeypatch):
    """With a word, once; --num-frames is not capped."""
    module.tell_cut.cache_clear()
    path = write_video(tmp_path / "long.mp4")
    for _ in range(2):
        pictures, between = read_video(path, 1, fps=10, max_frames=4)
        assert numbers(pictures) == [0, 9, 19, 29] and between == pytest.approx(0.75)
    assert measure(Media("video", str(path)), 1, 10, 4) == (4, (64, 48), between)
    said = capsys.readouterr().err
    assert said == (
        "--fps 10: of films longer than 0.4 seconds only --max-frames 4 are shown, evenly spread\n"
    )
    assert len(read_video(path, 8, max_frames=4)[0]) == 8
    assert capsys.readouterr().err == ""


def test_a_film_is_measured_by_its_first_frame(tmp_path, monkeypatch):
    """15 minutes at 2 frames a second are 768 frames, of which none but the first is decoded."""
    decord = pytest.importorskip("decord")
    path = write_video(tmp_path / "v.mp4", frames=200)
    decoded, following = [], decord.VideoReader.next
    count = lambda reader: decoded.append(1) or following(reader)  # noqa: E731
    monkeypatch.setattr(decord.VideoReader, "next", count)
    assert measure(Media("video", str(path)), 1, 5.0)[0] == 100
    assert len(decoded) == 1


def test_a_reader_that_never_comes_back_is_one_line(monkeypatch):
    class Stuck:
        def __init__(self, *names, **options):
            time.sleep(60)

    errors = {"DECORDError": RuntimeError, "DECORDLimitReachedError": EOFError}
    monkeypatch.setitem(sys.modules, "decord", SimpleNamespace(VideoReader=Stuck, **errors))
    monkeypatch.setattr(module, "PATIENCE", 0.2)
    for read in (read_video, lambda path, count: measure(Media("video", path), count)):
        with pytest.raises(UserError, match=r"stuck\.mp4: no frame could be read in 0\.2 seconds"):
            read("stuck.mp4", 4)


@pytest.mark.parametrize("keep", [0, 100, 0.5, 0.9])
def test_truncated_videos_are_one_line_with_the_path(video, tmp_path, keep):
    """An empty file, a bit of header, files that lost their end, where an mp4 keeps its index."""
    content = video.read_bytes()
    path = tmp_path / "broken.mp4"
    path.write_bytes(content[: keep if isinstance(keep, int) else int(keep * len(content))])
    with pytest.raises(UserError, match=r"broken\.mp4: ") as error:
        read_video(str(path), 4)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "name, content", [("text.mp4", b"no video"), ("picture.mp4", saved(Image.new("RGB", (64, 64))))]
)
def test_other_files_are_no_video(tmp_path, name, content):
    path = tmp_path / name
    path.write_bytes(content)
    try:
        pictures, _ = read_video(
            str(path), 4, None
        )  # a decoder may take a picture for a video of one frame
        assert name == "picture.mp4" and len(pictures) == 1
    except UserError as error:
        assert name in str(error) and "\n" not in str(error)


def test_no_such_video(tmp_path):
    with pytest.raises(UserError, match=r"nothing\.mp4: not a readable video"):
        read_video(str(tmp_path / "nothing.mp4"), 4)


@pytest.mark.skipif(
    not os.path.exists("/proc/self/statm"), reason="resident memory is read from /proc"
)
def test_reading_videos_does_not_fill_the_memory(tmp_path):
    """decord keeps its decoder while its reader lives; 200 reads of 0.9 MB frames fit in 20 MB.

    In a process of its own: what other tests have freed would be taken for what this one holds.
    """
    path = write_video(tmp_path / "small.mp4", frames=8, width=640, height=480)
    code = """
import sys
from pictures import read_video

def resident():
    pages = int(open("/proc/self/statm").read().split()[1])
    return 4096 * pages

for _ in range(20):
    read_video(sys.argv[1], 4)
before = resident()
for _ in range(200):
    read_video(sys.argv[1], 4)
print(resident() - before)
"""
    repository = Path(__file__).resolve().parents[1]
    done = subprocess.run(
        [sys.executable, "-c", code, str(path)], cwd=repository, capture_output=True, text=True
    )
    assert int(done.stdout) < 20e6, done.stderr


def test_an_assertion_of_decord_is_one_line(monkeypatch, tmp_path):
    """It fails in a thread: without a word of it the reader would only wait for the next frame."""
    decord = pytest.importorskip("decord")

    def fails(*_, **__):
        raise AssertionError("bad\nindex")

    path = write_video(tmp_path / "a.mp4")
    monkeypatch.setattr(decord, "VideoReader", fails)
    monkeypatch.setattr(module, "PATIENCE", 1)
    with pytest.raises(UserError) as error:
        read_video(str(path), 4)
    assert str(error.value).startswith(f"{path}: not a readable video (bad")
    assert "\n" not in str(error.value)
