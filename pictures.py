"""From the file of a picture or a video to patches: open, resize, normalize, cut.

A picture is resized to multiples of 28, then cut into patches of 14 x 14 pixels. The vision encoder
turns each patch into a vector, and its merger each 2 x 2 patches into one vision token.
"""

import io
import math
import sys
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from queue import Empty, Queue
from threading import Thread

import numpy as np
import torch
from PIL import ExifTags, Image

from files import UserError, one_line

PATCH = 14  # pixels on each side of a patch
FACTOR = 2 * PATCH  # 2 x 2 patches become one vision token: sides of pictures are multiples of this
PATCH_VALUES = 3 * 2 * PATCH * PATCH  # channels x frames x height x width of one patch: 1176

# CLIP's normalization of red, green and blue
MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)

PICTURE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff")
# How a picture is turned for each orientation that its EXIF block may name; 1 is upright.
TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
PATIENCE = 60  # seconds that a film's next frame may take
MISSING = 0.25  # seconds at a film's beginning that may be impossible to decode

# The limits of the package qwen-vl-utils, by its names: areas in pixels, numbers of frames.
MIN_PIXELS = 4 * 28 * 28  # of a picture
MAX_PIXELS = 16384 * 28 * 28
VIDEO_MIN_PIXELS = 128 * 28 * 28  # of a frame
VIDEO_MAX_PIXELS = 768 * 28 * 28
VIDEO_TOTAL_PIXELS = int(128000 * 28 * 28 * 0.9)  # of a video: one area for each pair of frames
FRAME_FACTOR = 2  # numbers of frames are multiples of this
FPS_MIN_FRAMES = 4  # its FPS_MAX_FRAMES is the default of --max-frames


@dataclass(frozen=True)
class Media:
    """One picture or one video of a prompt."""

    kind: str  # "image" | "video"
    # An image: its path, or the bytes of its file. A video: the path of its file or of its one
    # frame, or a tuple of the paths of its frames.
    source: object
    seconds_per_frame: float | None = None  # between the frames of a tuple, where the row gives it

    @property
    def sources(self):
        """The files: one, or the frames of a video."""
        return self.source if isinstance(self.source, tuple) else (self.source,)

    @property
    def is_video_file(self):
        return self.kind == "video" and isinstance(self.source, str) and is_film(self.source)


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


def resizes(height, width, limits, input_as="transformers", frames=0, from_file=False):
    """What a picture is resized to, one size after the other; the model sees the last.

    transformers resizes it within `limits`. With "qwen-vl-utils" and "authors" the package
    qwen-vl-utils has resized it before, within limits of its own. The authors bring the frames of a
    film to the largest area before that, and their version of the package (0.0.11 or older) takes
    each frame for a picture.

    Args:    limits: smallest and largest area. frames: of a video, 0 for a picture.
             from_file: the video is a film, not a list of frames.
    Returns: [((height, width), PIL's filter)].

    >>> [size for size, _ in resizes(968, 1296, (16 * 28 * 28, 128 * 28 * 28), "authors")]
    [(980, 1288), (252, 336)]
    """
    size, steps = (height, width), []
    areas = [limits]
    if input_as == "qwen-vl-utils":
        areas = [utils_limits(frames), limits]
    elif input_as == "authors":
        areas = [utils_limits(0), limits]
        if from_file:
            area, ratio = limits[1], width / height
            size = int((area / ratio) ** 0.5), int((area * ratio) ** 0.5)
            steps.append((size, Image.LANCZOS))
    for smallest, largest in areas:
        size = smart_resize(*size, smallest, largest)
        steps.append((size, Image.BICUBIC))
    return steps


def utils_limits(frames):
    """The smallest and the largest area that qwen-vl-utils gives a frame of a video.

    frames: in the video; 0 for a picture.

    >>> [pixels // 28**2 for pixels in utils_limits(32)], utils_limits(768)[1] // 28**2
    ([128, 768], 300.0)
    """
    if not frames:
        return MIN_PIXELS, MAX_PIXELS
    share = VIDEO_TOTAL_PIXELS / math.ceil(frames / FRAME_FACTOR)
    return VIDEO_MIN_PIXELS, max(min(VIDEO_MAX_PIXELS, share), int(VIDEO_MIN_PIXELS * 1.05))


def name_of(source):
    """How messages name a picture: by its path."""
    return "picture given as bytes" if isinstance(source, bytes) else source


@contextmanager
def opened(source):
    """PIL's image of a path, or of the bytes of a file; whatever PIL raises becomes one line."""
    try:
        with Image.open(io.BytesIO(source) if isinstance(source, bytes) else source) as image:
            yield image
    # PIL raises each of these for a damaged file: SyntaxError for PNG, RuntimeError for AVIF.
    except (OSError, ValueError, SyntaxError, RuntimeError, Image.DecompressionBombError) as error:
        # "cannot identify image file <_io.BytesIO object at 0x...>" ends at " <"
        reason = str(error).split(" <")[0]
        raise UserError(f"{name_of(source)}: not a readable picture ({reason})") from None


@cache
def is_film(path):
    """Whether a file is a video: PIL cannot open it, or finds several frames in it.

    What is named as a picture is one, so that a damaged one is called a damaged picture.
    """
    if Path(path).suffix.lower() in PICTURE_SUFFIXES:
        return False
    try:
        with opened(path) as image:
            return image.format == "MPEG" or getattr(image, "n_frames", 1) > 1
    except UserError:
        return True


def turn_of(image):
    """The transposition that makes a picture upright, None if it is.

    Nothing but the orientation is read: what else the EXIF block holds, or a block that cannot be
    read, changes nothing.
    """
    try:
        return TURNS.get(image.getexif().get(ExifTags.Base.Orientation))
    except Exception:  # PIL's parser raises nearly everything for a damaged block
        return None


def open_picture(source):
    """A picture as RGB, upright as its EXIF says; what is transparent shows white."""
    with opened(source) as image:
        image.load()
        turn = turn_of(image)
        if turn is not None:
            image = image.transpose(turn)
        if image.has_transparency_data:
            white = Image.new("RGBA", image.size, "white")
            image = Image.alpha_composite(white, image.convert("RGBA"))
        return image.convert("RGB")


@cache  # one picture stands in many rows
def open_header(source):
    """(width, height) of the upright picture, from the file's header alone."""
    with opened(source) as image:
        width, height = image.size
        # PIL gives the size of a TIFF as it is when upright.
        sideways = [TURNS[orientation] for orientation in (5, 6, 7, 8)]
        if image.format != "TIFF" and turn_of(image) in sideways:
            return height, width
        return width, height


# ---------------------------------------------------------------------------------- films
# decord's seeking is not used: in many files it goes to another frame than was asked for, or never
# comes back. Decoding from the first frame to the last is right in all of them.


def decode(path, limit, queue):
    """Put a film's (timestamps, frames per second) into the queue, then its frames, then None.

    The timestamps are those of the file, in order, also of frames that are hidden or damaged. An
    error is put there in place of a frame.

    Args:    limit: frames to decode at most.
    """
    import decord

    try:
        # Without fault_tol the last frame is repeated for each one that cannot be decoded.
        reader = decord.VideoReader(path, num_threads=1, fault_tol=1e-9)
        numbers = range(len(reader))
        times = reader.get_frame_timestamp(numbers)[:, 0].astype(np.float64)
        rate = reader.get_avg_fps()
        if not 0 < rate < math.inf:
            raise ValueError("no frame rate")
        queue.put((times, rate))
        for _ in numbers[:limit]:
            queue.put(reader.next())
        queue.put(None)
    except (decord.DECORDLimitReachedError, StopIteration):
        queue.put(None)
    except Exception as error:  # decord checks with assertions too
        # "[12:00:00] /github/workspace/src/video/video_reader.cc:270: [a.ogv] Failed to ..."
        reason = one_line(str(error).strip()).split(": ", 1)[-1][:100]
        queue.put(UserError(f"{path}: not a readable video ({reason})"))


def film(path, limit=None):
    """Yield what `decode` finds: (timestamps, frames per second), then one frame after the other.

    A decoder that hangs cannot be stopped, only left behind: therefore it runs in a thread.
    """
    try:
        import decord  # noqa: F401
    except ImportError:
        raise UserError(
            f"{path}: reading video files needs decord (pip install decord; "
            "it has no build for ARM), or give the frames as a list of pictures"
        ) from None
    queue = Queue(maxsize=4)
    thread = Thread(target=decode, args=(str(path), limit, queue), daemon=True)
    thread.start()
    while True:
        try:
            item = queue.get(timeout=PATIENCE)
        except Empty:
            raise UserError(f"{path}: no frame could be read in {PATIENCE} seconds") from None
        if isinstance(item, UserError):
            raise item
        if item is None:
            thread.join(PATIENCE)
            return
        yield item


def moments(times, rate):
    """Timestamps that can be used: the file's own, or even ones where its own are not in order.

    Frames without a timestamp (of AVI and MPEG files) have one far below zero.

    Returns: timestamps in seconds, number of frames that are shown. Frames before second 0 are
             hidden: a clip that was cut without encoding it again begins at an earlier key frame.
    """
    if times[0] < -1e6 or (np.diff(times) <= 0).any():
        return np.arange(len(times)) / rate, len(times)
    return times, max(1, int((times > -0.001).sum()))


def even_count(total, rate, num_frames, fps, max_frames):
    """How many of a film's `total` frames qwen-vl-utils takes: an even number; with fps 4 or more.

    >>> even_count(33, 10.0, 32, 2.0, 768)  # 3.3 seconds
    6
    """
    count = FRAME_FACTOR * round(num_frames / FRAME_FACTOR)
    if fps is not None:
        count = min(max(total / rate * fps, FPS_MIN_FRAMES), max_frames)
    pairs = int(min(count, total) / FRAME_FACTOR)
    return max(1, FRAME_FACTOR * pairs)  # the package refuses a film of one frame


def spread(times, rate, num_frames, fps, max_frames, even=False):
    """Choose frames that are evenly spread in time, from the first frame to the last.

    Args:    times: of the frames, growing. The others: see read_video.
    Returns: numbers of frames (those on the screen at even moments), seconds between two of them.

    >>> spread(np.array([0, 1, 2, 3, 6, 9]), 1.0, 4, None, 768)  # moments 0, 3, 6, 9
    (array([0, 3, 4, 5]), 2.7)
    """
    total = len(times)
    length = 1 / rate
    if total > 1:  # the last frame is shown as long as the others are
        length = (times[-1] - times[0]) * total / (total - 1)
    count = num_frames
    if fps is not None:
        count = max(1, round(length * fps))
        if count > max_frames:
            count = max_frames
            tell_cut(fps, max_frames)
    if even:
        count = even_count(total, rate, num_frames, fps, max_frames)
    if count >= total:
        return np.arange(total), float(length / total)
    wanted = np.linspace(times[0], times[-1], count)
    index = np.searchsorted(times, wanted + 0.001, side="right") - 1
    return index, float(length / count)


@cache  # once in a process, not for every film
def tell_cut(fps, max_frames):
    print(
        f"--fps {fps:g}: of films longer than {max_frames / fps:g} seconds only "
        f"--max-frames {max_frames} are shown, evenly spread",
        file=sys.stderr,
    )


def read_video(path, num_frames, fps=None, max_frames=768, even=False, shown=None):
    """Frames of a video file, spread evenly over its time.

    Args:    num_frames: how many (fewer if the film is short).
             fps: frames per second in place of num_frames; max_frames in all.
             even: as many as qwen-vl-utils takes, see even_count.
             shown: frames that are shown, the last ones of the file; None: by their timestamps.
    Returns: list of RGB pictures, seconds between two of them.
    """
    reader = film(path)
    times, rate = next(reader)
    times, by_time = moments(times, rate)
    expected = shown or by_time
    times = times[len(times) - expected :]
    index, interval = spread(times, rate, num_frames, fps, max_frames, even)

    wanted = set(index.tolist())
    frames, count = {}, 0
    for frame in reader:
        if count in wanted:
            frames[count] = Image.fromarray(frame.asnumpy())
        count += 1
    if count != expected:
        # Frames are missing at the beginning, where those are not there that they are built on.
        if shown or not count or times[max(0, expected - count)] - times[0] > MISSING:
            raise UserError(
                f"{path}: only {count} of its {expected} frames can be decoded; "
                f"write it anew: ffmpeg -i {Path(path).name} new.mp4"
            )
        return read_video(path, num_frames, fps, max_frames, even, count)
    return [frames[number] for number in index.tolist()], interval


def open_frames(media, num_frames, fps=None, max_frames=768, even=False):
    """The frames of a video, or the one picture, ready for to_patches.

    Returns: list of RGB pictures of one size, seconds between two of them (None: not known).
    """
    if media.is_video_file:
        return read_video(media.source, num_frames, fps, max_frames, even)
    frames = [open_picture(source) for source in media.sources]
    check_sizes([frame.size for frame in frames], media)
    return frames, media.seconds_per_frame


@cache
def measure(media, num_frames, fps=None, max_frames=768, even=False):
    """What open_frames would give, for counting tokens: only headers are read, and one frame.

    Returns: number of frames, (width, height) of each, seconds between two (None: not known).
    """
    if media.is_video_file:
        (times, rate), *first = film(media.source, 1)
        times, shown = moments(times, rate)
        index, interval = spread(times[-shown:], rate, num_frames, fps, max_frames, even)
        if not first:
            raise UserError(f"{media.source}: none of its frames can be decoded")
        height, width, _ = first[0].shape
        return len(index), (width, height), interval
    sizes = [open_header(source) for source in media.sources]
    check_sizes(sizes, media)
    return len(sizes), sizes[0], media.seconds_per_frame


def check_sizes(sizes, media):
    """Raise UserError unless all frames have one size."""
    if len(set(sizes)) > 1:
        name = name_of(media.sources[0])
        raise UserError(f"{name}: the frames of one video differ in size")


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
