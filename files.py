"""Files: read with one-line errors that name the file, written whole or not at all.

Everything here is for people's files: JSON, JSON lines, output folders, text tables, and what tells
the contents of two files apart. No torch.
"""

import atexit
import codecs
import fcntl
import hashlib
import io
import json
import math
import os
from contextlib import contextmanager, suppress
from pathlib import Path

CONFIG = "config_run.json"  # the settings that an output folder was begun with
MADE_OF = "made_of"  # in it: the fingerprint of each input
LOCK = ".lock"  # in an output folder; the process that works there holds it
HELD = {}  # path of each lock that this process holds -> its open file
MODEL_FILES = ("*.safetensors", "*config.json", "tokenizer.json")  # what a model depends on
OF_WEIGHTS = 1 << 24  # bytes that are read of a file of weights: 16 MB of at most 5 GB
OF_PICTURE = 1 << 14  # bytes that are read of a picture or a video
PIECE = 1 << 16  # bytes that are read at one place of a large file, at most
LONGEST_REASON = 150  # characters of another library's error that are shown


def one_line(text):
    """A text without its line breaks: paths and labels may hold them."""
    return " ".join(text.splitlines())


class UserError(ValueError):
    """A mistake of the user: one line with the place, what was found and what was expected."""

    def __init__(self, message):
        super().__init__(one_line(message))


def reason(error):
    """The last line of an error: before it torch puts the traceback of the process that failed."""
    return f"{type(error).__name__}: {error}".strip().splitlines()[-1][:LONGEST_REASON]


@contextmanager
def writing(path, what="there", *others):
    """Turn a full disk, or a folder that may not be written, into one line.

    Args: others: what a library raises in place of an OSError.
    """
    try:
        yield
    except (OSError, *others) as error:
        raise UserError(f"{path}: cannot write {what} ({reason(error)})") from None


# ---------------------------------------------------------------------------------- reading


def read_json(path):
    """The object of a JSON file; a missing or broken one is one line that names it."""
    try:
        value = json.loads(Path(path).read_text(encoding="utf-8-sig"))  # or without a mark
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: not readable as JSON ({error})") from None
    if not isinstance(value, dict):
        raise UserError(f"{path}: expected a JSON object, found {type(value).__name__}")
    return value


def read_lines(path):
    """Yield (where, bytes) of every row: a line that is not blank, or an item of a JSON list.

    `where` is "file:line". The lines of a list are no rows: there the number counts its items.
    """
    try:
        with open(path, "rb") as file:
            # A look ahead that moves nothing, for a pipe cannot go back.
            if file.peek(1).removeprefix(codecs.BOM_UTF8).lstrip().startswith(b"["):
                yield from list_items(path, file.read())
            for number, line in enumerate(file, 1):
                line = line.removeprefix(codecs.BOM_UTF8)  # of Windows editors
                if line.strip():
                    yield f"{path}:{number}", line
    except OSError as error:
        raise UserError(f"{path}: not readable ({error})") from None


def list_items(path, content):
    """Yield (where, bytes) of every item of a file that is one JSON list."""
    try:
        rows = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: not a JSON list ({error})") from None
    for number, row in enumerate(rows, 1):
        yield f"{path}:{number}", json.dumps(row).encode()


def parse_line(line, where):
    """The JSON object of one line."""
    try:
        row = json.loads(line.decode())
        if b"\\u" in line:
            json.dumps(row, ensure_ascii=False).encode()  # half a surrogate pair is no text
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where}: not JSON ({error})") from None
    if not isinstance(row, dict):
        raise UserError(f"{where}: expected an object, found {type(row).__name__}")
    return row


def without_nulls(row):
    """An object without its nulls: what `datasets` writes for a column that a row lacks."""
    return {key: value for key, value in row.items() if value is not None}


REQUIRED = object()


def need(row, key, *kinds, default=REQUIRED):
    """The value of a key, which must be of one of the kinds. default: of a key that is missing."""
    value = row.get(key, default)
    if value is REQUIRED or (key in row and not isinstance(value, kinds)):
        found = json.dumps(value)[:80] if key in row else "missing"
        raise UserError(f"{key} is {found}, expected {' or '.join(k.__name__ for k in kinds)}")
    return value


def read_jsonl(path):
    """Yield (where, object) of every row of a JSON-lines file."""
    for where, line in read_lines(path):
        yield where, parse_line(line, where)


# ---------------------------------------------------------------------------------- writing


def write_text(path, text):
    """Write beside and rename into place: a reader sees the old file or the new one, never half."""
    beside = Path(f"{path}.tmp")
    with writing(path):
        beside.write_text(text, encoding="utf-8")
        os.replace(beside, path)


def write_json(path, value):
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def jsonl(rows):
    """The text of a JSON-lines file.

    >>> jsonl([{"step": 1}, {"step": 2}])
    '{"step": 1}\\n{"step": 2}\\n'
    """
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def write_jsonl(path, rows):
    write_text(path, jsonl(rows))


def append_jsonl(path, rows):
    """Add rows at the end. A process that is killed here leaves at most one torn line, the last."""
    with writing(path), open(path, "a", encoding="utf-8") as file:
        file.write(jsonl(rows))


# ---------------------------------------------------------------------------------- contents
# A path does not say what is in the file: a model may be trained anew under its old name, rows may
# be mended, a folder may move. What a result depends on is told by its contents.


def pieces(file, most):
    """Yield a file's size and its bytes; of one that is larger than `most`, bytes from all over it.

    The first quarter of `most` is the file's beginning: the header of a safetensors file is there.
    """
    size = file.seek(0, io.SEEK_END)
    yield str(size).encode()
    file.seek(0)
    if size <= most:
        while chunk := file.read(1 << 20):
            yield chunk
        return
    head = most // 4
    yield file.read(head)
    piece = min(head, PIECE)
    count = (most - head) // piece
    for i in range(1, count + 1):  # the last one ends where the file ends
        file.seek(head + (size - head) * i // count - piece)
        yield file.read(piece)


def fingerprint(sources, most=math.inf):
    """16 hex digits that tell contents apart.

    Args: sources: paths of files, or the bytes of one. most: bytes that are read of each.
    """
    digest = hashlib.sha256()
    for source in sources:
        try:
            with io.BytesIO(source) if isinstance(source, bytes) else open(source, "rb") as file:
                for piece in pieces(file, most):
                    digest.update(piece)
        except (OSError, ValueError):
            # Whoever needs the file says what is wrong with it. Here its name stands for it.
            digest.update(str(source).encode())
    return digest.hexdigest()[:16]


def made_of(model, files):
    """The fingerprints that a run keeps in CONFIG, under MADE_OF.

    Args:    model: a model directory. files: name -> a path, a list of paths, or None.
    Returns: name -> fingerprint of each that is not None.
    """
    prints = {}
    for name, paths in files.items():
        if paths:
            prints[name] = fingerprint([paths] if isinstance(paths, str) else paths)
    paths = []
    for pattern in MODEL_FILES:
        paths += sorted(Path(model).glob(pattern))
    return prints | {"model": fingerprint(paths, OF_WEIGHTS)}


# ---------------------------------------------------------------------------------- output folders


def hold(folder):
    """Keep other processes out of an output folder for as long as this one lives.

    The system lets go of the lock when the process ends, however it ends. Processes that it forks
    do not hold it: a loader of pictures that outlives a killed run keeps nobody out.
    """
    path = Path(folder).resolve() / LOCK
    while True:
        with writing(folder):
            file = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            raise UserError(
                f"{folder}: another process is at work there; wait for its end, or give another "
                "--out"
            ) from None
        except OSError:
            pass  # a file system without locks
        if is_at(path, file):
            break
        os.close(file)  # the process that had it has removed it meanwhile
    HELD[path] = file
    atexit.register(let_go)


def is_at(path, file):
    """Is this open file the one that lies there now?"""
    return path.exists() and os.path.samestat(path.stat(), os.fstat(file))


def let_go():
    """Remove the locks of this process. One that a killed process leaves keeps nobody out."""
    while HELD:
        path, file = HELD.popitem()
        with suppress(OSError):
            if is_at(path, file):
                path.unlink()
        os.close(file)


def changes(before, config, free):
    """What is not as it was, in words. See claim."""
    words = []
    for name, value in config.items():
        if name not in (MADE_OF, *free) and before.get(name) != value:
            words.append(f"{name} {before.get(name)!r}, now {value!r}")
    prints = config.get(MADE_OF, {})
    earlier = before.get(MADE_OF, prints)
    for name in sorted(prints.keys() | earlier.keys()):
        if prints.get(name) != earlier.get(name):
            words.append(f"other contents of {name} {config.get(name) or ''}".strip())
    return ", ".join(words)


def claim(folder, config, free=(), go_on=True, lock=True):
    """Take an output folder: a new one, an empty one, or one that was begun with an equal config.

    No other process can take it as long as this one lives. Nothing is written but the folder and
    its lock. The caller writes CONFIG when the work begins, so that a mistake found before then
    leaves an empty folder.

    Args:    config: what the caller will write to CONFIG. Under MADE_OF it has the fingerprints of
             what the results depend on.
             free: settings that may differ: how results are made, and where inputs lie.
             go_on: False refuses a folder that was begun before.
    Returns: True if the folder was begun before.
    Raises:  UserError that names what is in the way.
    """
    folder = Path(folder)
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
    begun = (folder / CONFIG).is_file()
    if begun and go_on:
        now = json.loads(json.dumps(config))  # a tuple is a list there
        changed = changes(read_json(folder / CONFIG), now, free)
        if changed:
            raise UserError(
                f"{folder}: was begun with other settings: {changed}; give another --out"
            )
    # A file *.tmp is what a try left that was killed at once.
    elif any(path.suffix != ".tmp" and path.name != LOCK for path in folder.iterdir()):
        hint = "continue it with --resume auto, or " if begun else ""
        raise UserError(f"{folder}: not empty; {hint}give another --out")
    if lock:
        hold(folder)
    return begun


# ---------------------------------------------------------------------------------- showing


def text_table(rows):
    """Rows of cells as text: the first column flush left, the others flush right.

    >>> print(text_table([("", "n", "score"), ("room size", 12, "0.4")]))
                n  score
    room size  12    0.4
    """
    rows = [[str(cell) for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*rows)]
    lines = []
    for first, *others in rows:
        cells = [cell.rjust(width) for cell, width in zip(others, widths[1:])]
        lines.append("  ".join([first.ljust(widths[0]), *cells]).rstrip())
    return "\n".join(lines)
