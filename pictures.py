"""From the file of a picture or a video to patches: open, resize, normalize, cut.

A picture is resized to multiples of 28, then cut into patches of 14 x 14 pixels. The vision encoder
turns each patch into a vector, and its merger each 2 x 2 patches into one vision token.
"""

import io
import math
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache

import numpy as np
import torch
from PIL import ExifTags, Image, ImageOps

from files import UserError

PATCH = 14  # pixels on each side of a patch
FACTOR = 2 * PATCH  # 2 x 2 patches become one vision token: sides of pictures are multiples of this
PATCH_VALUES = 3 * 2 * PATCH * PATCH  # channels x frames x height x width of one patch: 1176

# CLIP's normalization of red, green and blue
MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)


@dataclass(frozen=True)
class Media:
    """One picture or one video of a prompt."""

    kind: str  # "image" | "video"
    # An image: its path, or the bytes of its file. A video: the path of its file, or a tuple of the
    # paths of its frames.
    source: object
    seconds_per_frame: float | None = None  # between the frames of a tuple, where the row gives it

    @property
    def sources(self):
        """The files: one, or the frames of a video."""
        return self.source if isinstance(self.source, tuple) else (self.source,)

    @property
    def is_video_file(self):
        return self.kind == "video" and not isinstance(self.source, tuple)


def smart_resize(height, width, min_pixels, max_pixels):
    """The (height, width) a picture is resized to: multiples of 28, an area within the limits.

    The aspect ratio is kept as well as multiples of 28 allow.

    >>> smart_resize(968, 1296, 16 * 28 * 28, 128 * 28 * 28)
    (252, 364)
    """
    if max(height, width) > 200 * min(height, width):
        raise UserError(f"aspect ratio of {width}x{height} is above 200")
    h, w = multiple(height, round), multiple(width, round)
    if h * w > max_pixels:
        shrink = math.sqrt(height * width / max_pixels)
        h = max(FACTOR, multiple(height / shrink, math.floor))
        w = max(FACTOR, multiple(width / shrink, math.floor))
    elif h * w < min_pixels:
        grow = math.sqrt(min_pixels / (height * width))
        h = multiple(height * grow, math.ceil)
        w = multiple(width * grow, math.ceil)
    return h, w


def multiple(side, to_whole):
    """A multiple of 28 near `side`. to_whole: round, math.floor or math.ceil."""
    return to_whole(side / FACTOR) * FACTOR


@contextmanager
def opened(source):
    """PIL's image of a path, or of the bytes of a file; whatever PIL raises becomes one line."""
    name, file = source, source
    if isinstance(source, bytes):
        name, file = "picture given as bytes", io.BytesIO(source)
    try:
        with Image.open(file) as image:
            yield image
    # PIL raises each of these for a damaged file: SyntaxError for PNG, RuntimeError for AVIF.
    except (OSError, ValueError, SyntaxError, RuntimeError, Image.DecompressionBombError) as error:
        # "cannot identify image file <_io.BytesIO object at 0x...>" ends at " <"
        reason = str(error).split(" <")[0]
        raise UserError(f"{name}: not a readable picture ({reason})") from None


def open_picture(source):
    """A picture as RGB, upright as its EXIF says; what is transparent shows white."""
    with opened(source) as image:
        image = ImageOps.exif_transpose(image)
        if image.has_transparency_data:
            white = Image.new("RGBA", image.size, "white")
            image = Image.alpha_composite(white, image.convert("RGBA"))
        return image.convert("RGB")


@cache  # one picture stands in many rows
def open_header(source):
    """(width, height) of the upright picture, from the file's header alone."""
    with opened(source) as image:
        width, height = image.size
        if image.getexif().get(ExifTags.Base.Orientation, 1) > 4:  # 5 to 8 lie on their side
            return height, width
        return width, height


def read_video(path, num_frames, fps):
    """Frames of a video file, spread evenly: num_frames (fewer if it is short), or `fps` a second.

    Returns: list of RGB pictures, seconds between two of them.
    """
    try:
        import decord
    except ImportError:
        raise UserError(
            f"{path}: reading video files needs decord (pip install decord; "
            "it has no build for ARM), or give the frames as a list of pictures"
        ) from None
    try:
        reader = decord.VideoReader(str(path), num_threads=1)
        total = len(reader)
        rate = float(reader.get_avg_fps())
        count = num_frames if fps is None else max(1, round(total / rate * fps))
        # Evenly from the first frame to the last; astype rounds down.
        index = np.linspace(0, total - 1, min(count, total)).astype(int)
        frames = reader.get_batch(index).asnumpy()
        del reader  # decord keeps its decoder's memory as long as the reader lives
        interval = total / rate / len(index)
    except (decord.DECORDError, OSError, RuntimeError, ValueError, ZeroDivisionError) as error:
        reason = str(error).strip().splitlines()[0][:100]
        raise UserError(f"{path}: not a readable video ({reason})") from None
    return [Image.fromarray(frame) for frame in frames], interval


def open_frames(media, num_frames, fps):
    """The frames of a video, or the one picture, ready for to_patches.

    Returns: list of RGB pictures of one size, seconds between two of them (None: not known).
    """
    if media.is_video_file:
        frames, interval = read_video(media.source, num_frames, fps)
    else:
        frames = [open_picture(source) for source in media.sources]
        interval = media.seconds_per_frame
    check_sizes([frame.size for frame in frames], media)
    return frames, interval


@cache
def measure(media, num_frames, fps):
    """What open_frames would give, for counting tokens: only headers of pictures are read.

    Returns: number of frames, (width, height) of each, seconds between two (None: not known).
    """
    if media.is_video_file:  # it has no header that tells how many frames can be decoded
        frames, interval = open_frames(media, num_frames, fps)
        return len(frames), frames[0].size, interval
    sizes = [open_header(source) for source in media.sources]
    check_sizes(sizes, media)
    return len(sizes), sizes[0], media.seconds_per_frame


def check_sizes(sizes, media):
    """Raise UserError unless all frames have one size, and one that can be cut into patches."""
    name = media.sources[0]
    width, height = sizes[0]
    if len(set(sizes)) > 1:
        raise UserError(f"{name}: the frames of one video differ in size")
    if min(width, height) < FACTOR:
        raise UserError(f"{name}: {width}x{height} pixels, expected at least 28 on each side")


def to_patches(pictures, size):
    """Resize (bicubic), normalize and cut the frames of a video, or one picture, into patches.

    A patch is 14 x 14 pixels of two frames. An odd last frame is repeated, as a still picture is.
    Patches are not in the order of lines: the four that become one vision token stand together.
    In a picture of 2 x 4 patches:

        0 1 | 4 5
        2 3 | 6 7

    Args:    pictures: RGB. size: (height, width), multiples of 28.
    Returns: patches (N, 1176) float32; grid (t, h, w) in patches, N = t * h * w.

    >>> to_patches([Image.new("RGB", (50, 30))] * 3, (28, 56))[1]
    (2, 2, 4)
    """
    height, width = size
    resized = [np.asarray(p.resize((width, height), Image.BICUBIC)) for p in pictures]
    pixels = np.stack(resized)  # (T, height, width, 3) uint8
    if len(pixels) % 2:
        pixels = np.concatenate((pixels, pixels[-1:]))  # T is even from here on

    # Normalize by a table of the 256 values that a pixel can have: a look-up is quicker than
    # arithmetic, and this order of operations rounds as transformers does.
    table = (np.arange(256) * (1 / 255)).astype(np.float32)[:, None]
    table = (table - np.array(MEAN, np.float32)) / np.array(STD, np.float32)  # (256, 3)
    channels = [table[pixels[..., c], c] for c in range(3)]
    values = np.stack(channels, axis=1)  # (T, 3, height, width)

    # Split the axes, then put them in order: first which patch, then what is in it.
    t, h, w = len(values) // 2, height // PATCH, width // PATCH
    axes = values.reshape(t, 2, 3, h // 2, 2, PATCH, w // 2, 2, PATCH)
    #                     0  1  2  3       4  5      6       7  8
    # 0: pair of frames   3, 6: row, column of the 2 x 2 block   4, 7: row, column in the block
    # 2: channel          1: frame of the pair                   5, 8: row, column in the patch
    ordered = axes.transpose(0, 3, 6, 4, 7, 2, 1, 5, 8)
    return torch.from_numpy(ordered.reshape(t * h * w, PATCH_VALUES)), (t, h, w)
