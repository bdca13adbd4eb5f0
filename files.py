"""Files: read with one-line errors that name the file, written whole or not at all.

Everything here is for people's files: JSON, JSON lines, output folders, text tables. No torch.
"""

import codecs
import json
import os
from contextlib import contextmanager
from pathlib import Path

CONFIG = "config_run.json"  # the settings that an output folder was begun with
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
    """One JSON file; a missing or broken one is one line that names it."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8-sig"))  # or without a mark
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: not readable as JSON ({error})") from None


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


def given(row):
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


def claim(folder, settings, go_on=True):
    """Take an output folder: a new one, an empty one, or one that was begun with equal settings.

    Nothing is written but the folder itself. The caller writes CONFIG when the work begins, so
    that a mistake found before then leaves an empty folder.

    Args:    settings: what the results depend on, as JSON knows it.
             go_on: False refuses a folder that was begun before.
    Returns: True if the folder was begun before.
    Raises:  UserError that names what is in the way.
    """
    folder = Path(folder)
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
    begun = (folder / CONFIG).is_file()
    if begun and go_on:
        before = read_json(folder / CONFIG)
        now = json.loads(json.dumps(settings))  # a tuple is a list there
        changed = [
            f"{key} {before.get(key)!r}, now {value!r}"
            for key, value in now.items()
            if before.get(key) != value
        ]
        if changed:
            raise UserError(
                f"{folder}: was begun with other settings: {', '.join(changed)}; give another --out"
            )
        return True
    # A file *.tmp is what a try left that was killed at once.
    if any(path.suffix != ".tmp" for path in folder.iterdir()):
        hint = "continue it with --resume auto, or " if begun else ""
        raise UserError(f"{folder}: not empty; {hint}give another --out")
    return False


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
