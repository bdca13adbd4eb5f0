"""From a video file to frames: which frames, and at what time, by decord.

decord's seeking is not used: in many files it goes to another frame than was asked for, or never
comes back. Decoding from the first frame to the last is right in all of them.
"""

import math
import sys
from functools import cache
from pathlib import Path
from queue import Empty, Queue
from threading import Thread

import numpy as np
from PIL import Image

from files import UserError, one_line

PATIENCE = 60  # seconds that a film's next frame may take
MISSING = 0.25  # seconds at a film's beginning that may be impossible to decode
# Of the package qwen-vl-utils, by its names.
FRAME_FACTOR = 2  # numbers of frames are multiples of this
FPS_MIN_FRAMES = 4  # its FPS_MAX_FRAMES is the default of --max-frames


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


def shown_times(times, rate):
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


def choose_frames(times, rate, num_frames, fps, max_frames, even=False):
    """Choose frames that are evenly spread in time, from the first frame to the last.

    Args:    times: of the frames, growing. The others: see read_video.
    Returns: numbers of frames (those on the screen at even moments), seconds between two of them.

    >>> choose_frames(np.array([0, 1, 2, 3, 6, 9]), 1.0, 4, None, 768)  # moments 0, 3, 6, 9
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
    times, by_time = shown_times(times, rate)
    expected = shown or by_time
    times = times[len(times) - expected :]
    index, interval = choose_frames(times, rate, num_frames, fps, max_frames, even)

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
