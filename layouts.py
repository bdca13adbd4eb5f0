"""Chats as LLaVA, ShareGPT, LLaMA-Factory, ms-swift and TRL write them -> turns with their files.

    LLaVA, ShareGPT          {"image": "a.jpg",
                              "conversations": [{"from": "human", "value": "<image>\\nHow wide?"},
                                                {"from": "gpt", "value": "85"}]}
    LLaMA-Factory, ms-swift  {"images": ["a.jpg"], "system": "Be brief.",
                              "messages": [{"role": "user", "content": "<image>How wide?"},
                                           {"role": "assistant", "content": "85"}]}
    TRL                      {"images": ["a.jpg"],
                              "messages": [{"role": "user", "content": [
                                  {"type": "image"}, {"type": "text", "text": "How wide?"}]}, ...]}

Files stand in a column beside the turns. A tag in a user's text, or a part without a file, says
where each of them belongs. data.parse_chat takes what comes out; errors get their place there.
"""

import re
from pathlib import Path

from files import UserError, need, without_nulls
from pictures import PICTURE_SUFFIXES

ROLES = {"human": "user", "gpt": "assistant"}
MEDIA_TAG = re.compile(r"<(image|video)>")
# Of LLaVA's "<image>\nHow wide?" the line break goes with the tag, as in Qwen's own training code.
TAG_OF_LINE = re.compile(rf"\n?{MEDIA_TAG.pattern}\n?")

# Keys that would change what is trained, in a row and in a turn. They are refused, not passed over.
UNREAD = ("objects", "audio", "audios", "tools")
UNREAD_IN_TURN = (
    *("image", "images", "video", "videos", "audio", "audios"),
    *("tool_calls", "function_call", "reasoning_content", "thinking"),
    *("loss", "loss_scale", "weight", "train"),
)
NEUTRAL = (True, 1.0, "", [], {})  # values of theirs that change nothing


def turns_of(row):
    """The turns of a chat: [(role, [part, ...])], each part as transformers has it.

    >>> human = {"from": "human", "value": "<image>\\nHow wide?"}
    >>> gpt = {"from": "gpt", "value": "85"}
    >>> for role, parts in turns_of({"image": "a.jpg", "conversations": [human, gpt]}):
    ...     print(role, parts)
    user [{'type': 'image', 'image': 'a.jpg'}, {'type': 'text', 'text': 'How wide?'}]
    assistant [{'type': 'text', 'text': '85'}]
    """
    refuse(row, UNREAD)
    key = "messages" if "messages" in row else "conversations"
    turns = [read_turn(turn) for turn in need(row, key, list)]
    if not turns or turns[-1][0] != "assistant":
        raise UserError(f"{key} must end with the assistant's turn")
    if row.get("system"):
        if turns[0][0] == "system":
            raise UserError(f"system stands beside a system turn in {key}, expected one of them")
        turns.insert(0, ("system", [{"type": "text", "text": need(row, "system", str)}]))
    # Files without tags come first in the first question: pictures, then videos.
    for kind in ("video", "image"):
        place(files_of(row, kind), kind, turns)
    return turns


def refuse(row, keys):
    """Raise UserError if one of these keys holds something."""
    for key in keys:
        if key in row and row[key] not in NEUTRAL:
            raise UserError(f"{key} is {row[key]!r:.80}, expected none: it is not read")


def read_turn(turn):
    """(role, [part, ...]) of one turn. A tag in a user's text becomes a part without a file."""
    if not isinstance(turn, dict):
        raise UserError(f"turn is {turn!r:.80}, expected an object with role and content")
    turn = without_nulls(turn)
    refuse(turn, UNREAD_IN_TURN)
    keys = ("from", "value") if "from" in turn else ("role", "content")
    role = need(turn, keys[0], str)
    role = ROLES.get(role, role)
    if role not in ("system", "user", "assistant"):
        raise UserError(f"{keys[0]} is {role!r:.80}, expected system, user or assistant")
    content = need(turn, keys[1], str, list)
    if isinstance(content, str):
        content = [{"type": "text", "text": content}]
    parts = []
    for part in content:
        if isinstance(part, dict):
            part = without_nulls(part)
        match part:
            case {"type": "text", "text": str(text)} if role == "user":
                parts += split(text)
            case _:
                parts.append(part)
    return role, parts


def split(text):
    """The parts of a text with tags.

    >>> split("Was: <image> Is: <image>")[:3]
    [{'type': 'text', 'text': 'Was: '}, {'type': 'image'}, {'type': 'text', 'text': ' Is: '}]
    """
    parts = []
    for place, piece in enumerate(TAG_OF_LINE.split(text)):
        if place % 2:  # between two texts stands the kind of a tag
            parts.append({"type": piece})
        elif piece:
            parts.append({"type": "text", "text": piece})
    return parts


def files_of(row, kind):
    """The files of a row's column: `image` or `images`, `video` or `videos`; a path or a list."""
    columns = []
    for key in (kind, f"{kind}s"):
        files = need(row, key, str, list, default=[])
        if isinstance(files, str):
            files = [files] if files else []
        if files and files not in columns:
            columns.append(files)
    if len(columns) > 1:
        raise UserError(f"{kind} and {kind}s name other files, expected one of them")
    files = columns[0] if columns else []
    suffixes = {Path(str(file)).suffix.lower() for file in files}
    if kind == "video" and suffixes and suffixes <= set(PICTURE_SUFFIXES):
        return [files]  # pictures are the frames of one video, as they are in a part
    return files


def place(files, kind, turns):
    """Give each part without a file the next one of its column."""
    parts = []
    for _, turn in turns:
        parts += [part for part in turn if isinstance(part, dict) and part.get("type") == kind]
    slots = [part for part in parts if len(part) == 1]  # nothing but its type
    if not slots and len(files) == len(parts):  # the column repeats what the parts name
        return
    questions = [turn for role, turn in turns if role == "user"]
    if files and questions and not parts:  # no tags: all come first, as ms-swift and TRL have it
        slots = [{"type": kind} for _ in files]
        questions[0][:0] = slots
    if len(slots) != len(files):
        raise UserError(
            f"{len(slots)} <{kind}> in the user's turns, {len(files)} files in {kind} or {kind}s"
        )
    for part, file in zip(slots, files):
        part[kind] = file
