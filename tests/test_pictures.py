"""data.py's pictures and videos: bit-equal to transformers' PIL processor; broken files."""

import io
import math
import os
import random
import struct
import zlib

import numpy as np
import pytest
import torch
from PIL import Image, features

from files import UserError
from pictures import (
    Media,
    measure,
    open_frames,
    open_header,
    open_picture,
    read_video,
    smart_resize,
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


@pytest.mark.parametrize("size", [(27, 100), (100, 27), (1, 1)])
def test_pictures_below_28_are_refused(tmp_path, size):
    path = tmp_path / "small.png"
    Image.new("RGB", size).save(path)
    message = rf"small\.png: {size[0]}x{size[1]} pixels, expected at least 28"
    with pytest.raises(UserError, match=message):
        measure(Media("image", str(path)), 1, None)


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


def write_video(path, frames=30, fps=10, width=64, height=48):
    """An mp4 whose frame i is plain grey of value 7 * i + 20: a decoded frame tells its number."""
    with av.open(str(path), "w") as file:
        stream = file.add_stream("mpeg4", rate=fps)
        stream.width, stream.height, stream.pix_fmt, stream.gop_size = width, height, "yuv420p", 5
        stream.bit_rate = 4_000_000
        for i in range(frames):
            picture = np.full((height, width, 3), 7 * i + 20, np.uint8)
            file.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        file.mux(stream.encode())
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


@pytest.mark.parametrize("keep", [0, 100, 0.5, 0.9])
def test_truncated_videos_are_one_line_with_the_path(video, tmp_path, keep):
    """An empty file, a bit of header, files that lost their end, where an mp4 keeps its index."""
    content = video.read_bytes()
    path = tmp_path / "broken.mp4"
    path.write_bytes(content[: keep if isinstance(keep, int) else int(keep * len(content))])
    with pytest.raises(UserError, match=r"broken\.mp4: ") as error:
        read_video(str(path), 4, None)
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
        read_video(str(tmp_path / "nothing.mp4"), 4, None)


def resident():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.skipif(
    not os.path.exists("/proc/self/statm"), reason="resident memory is read from /proc"
)
def test_reading_videos_does_not_fill_the_memory(tmp_path):
    """decord keeps its decoder while its reader lives; 200 reads of 0.9 MB frames fit in 20 MB."""
    path = write_video(tmp_path / "small.mp4", frames=8, width=640, height=480)
    for _ in range(20):
        read_video(str(path), 4, None)
    before = resident()
    for _ in range(200):
        read_video(str(path), 4, None)
    assert resident() - before < 20e6
