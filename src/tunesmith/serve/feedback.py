"""Feedback of people on answers, as rows that `data lock` and `stage: preference` read.

    store = FeedbackStore(folder);  store.keep(chat);  await store.add(body, key) -> JSON

In: chats that were answered, kept in memory only, and verdicts on them. Out: a reviewed row in
feedback.jsonl and, for a correction, a pair in pairs.jsonl. A row that the readers of data files
would refuse is refused here, so that one row never makes a file unusable. Both files are only
appended to, whole lines at a time. Left out: the route (handlers.py), training on any of it."""

from __future__ import annotations

import asyncio
import fcntl
import os
from collections import OrderedDict
from collections.abc import Generator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from datetime import date
from pathlib import Path

from tunesmith.core.atomic import disk_errors, fsync_path, open_unlinked
from tunesmith.core.errors import InputError, TunesmithError
from tunesmith.core.json_io import dump_json
from tunesmith.core.types import Json, Row
from tunesmith.data.formats.parse import parse_pair, parse_row
from tunesmith.data.readers.decode import SourceLocation, decode_json
from tunesmith.serve.bodies import ChatMessage, FeedbackBody
from tunesmith.serve.errors import RequestError
from tunesmith.serve.keys import ApiKey
from tunesmith.serve.tool_calls import to_template_message

FEEDBACK_FILE = "feedback.jsonl"
PAIRS_FILE = "pairs.jsonl"
SETTING = "keep_content"
MAX_CHATS = 10_000
MAX_CHARS = 64 * 10**6  # of all chats together
KEEP_SECONDS = 7 * 86_400
ID_PREFIXES = ("req-", "chatcmpl-")  # of x-request-id and of the answer, which go together


@dataclass(eq=False)
class KeptChat:
    """A chat with one complete answer."""

    id: str  # without its prefix
    key_id: str
    model: str  # as in the metrics
    version: str  # name, scale and the beginning of the digest
    digest: str
    messages: tuple[Json, ...]
    answer: str
    time: float  # in seconds, of a clock that only the caller knows
    has_feedback: bool = False

    @property
    def num_chars(self) -> int:
        num_chars = len(self.answer)
        for message in self.messages:
            num_chars += len(message["content"]) + len(message.get("reasoning_content", ""))
        return num_chars


class ChatRing:
    """The last chats in memory: at most MAX_CHATS, MAX_CHARS and KEEP_SECONDS."""

    def __init__(self) -> None:
        self._chats: OrderedDict[str, KeptChat] = OrderedDict()
        self._num_chars = 0

    def __len__(self) -> int:
        return len(self._chats)

    def add(self, chat: KeptChat) -> None:
        self._chats[chat.id] = chat
        self._num_chars += chat.num_chars
        self._forget(chat.time)

    def find(self, request_id: str, key: ApiKey, now: float) -> KeptChat:
        """Return the chat of a request. Raises RequestError 404; a chat of another key's is one
        that does not exist."""
        self._forget(now)
        for prefix in ID_PREFIXES:
            request_id = request_id.removeprefix(prefix)
        chat = self._chats.get(request_id)
        if chat is None or chat.key_id != key.id:
            message = (
                "no answer with this id is kept for this key; only the last "
                f"{MAX_CHATS:,} chats with one complete answer since the server started are kept, "
                "for 7 days"
            )
            raise RequestError(404, message, code="request_not_found", param="request_id")
        return chat

    def _forget(self, now: float) -> None:
        """Drop the oldest chats until the limits hold."""
        while self._chats:
            oldest = next(iter(self._chats.values()))
            is_over = len(self._chats) > MAX_CHATS or self._num_chars > MAX_CHARS
            if not is_over and now - oldest.time <= KEEP_SECONDS:
                return
            del self._chats[oldest.id]
            self._num_chars -= oldest.num_chars


class FeedbackStore:
    """The kept chats and the two files. Raises InputError or MachineError if the folder cannot
    be used."""

    def __init__(self, folder: Path) -> None:
        self.chats = ChatRing()
        self.folder = folder
        self._lock = asyncio.Lock()
        with disk_errors(folder, key=SETTING):
            if folder.exists() and not folder.is_dir():
                raise InputError("not a folder", where=str(folder), fix=f"set another {SETTING}")
            folder.mkdir(parents=True, exist_ok=True, mode=0o700)

    async def add(self, body: FeedbackBody, key: ApiKey, now: float) -> KeptChat:
        """Write the rows of one feedback and return its chat.

        Raises RequestError 404 for a chat that is not kept, 409 for a second feedback and for what
        cannot be a row, 507 if the disk does not take the rows; nothing is written then."""
        async with self._lock:
            chat = self.chats.find(body.request_id, key, now)
            if chat.has_feedback:
                message = "there is feedback on this request"
                raise RequestError(409, message, code="feedback_exists", param="request_id")
            rows = make_rows(body, chat, key.name)
            lines = {self.folder / name: dump_json(row) for name, row in rows.items()}
            try:
                await asyncio.to_thread(append_lines, lines)
            except TunesmithError as error:
                message = f"the feedback was not stored: {error.message}"
                raise RequestError(507, message, code="not_stored") from None
            chat.has_feedback = True
        return chat


def list_messages(messages: Sequence[ChatMessage]) -> tuple[Json, ...]:
    """Return the messages of a request as those of a row. Nobody judged the earlier answers, so
    they are not trained."""
    turns: list[Json] = []
    for message in messages:
        turn = to_template_message(message)
        turns.append({**turn, "train": False} if message.role == "assistant" else turn)
    return tuple(turns)


def make_rows(body: FeedbackBody, chat: KeptChat, reviewer: str) -> dict[str, Json]:
    """Return the row for each file. Raises RequestError 409 for a row that no file may have.

    The review is of the answer in its row: a corrected answer is good, whatever was served."""
    review: Json = {"reviewer": reviewer, "date": date.today().isoformat(), "verdict": body.verdict}
    if body.comment:
        review["comment"] = body.comment
    served = {"model": chat.version, "digest": chat.digest, "request": f"req-{chat.id}"}
    answer = chat.answer
    if body.corrected is not None:
        answer = body.corrected
        review["verdict"] = "good"
        served["verdict"] = body.verdict
    origin: Json = {"review": review, "served": served}
    final_turn = {"role": "assistant", "content": answer}
    rows: dict[str, Json] = {FEEDBACK_FILE: {"messages": [*chat.messages, final_turn], **origin}}
    if body.corrected is not None:
        served_turn = {"role": "assistant", "content": chat.answer}
        sides: Json = {"chosen": [final_turn], "rejected": [served_turn]}
        rows[PAIRS_FILE] = {"prompt": list(chat.messages), **sides, **origin}
    for name, row in rows.items():
        _check_row(name, row)
    return rows


def _check_row(name: str, row: Json) -> None:
    """Raise RequestError 409 for a row that the readers of data files would refuse."""
    try:
        data = decode_json(dump_json(row), SourceLocation(name))
        if name == PAIRS_FILE:
            parse_pair(Row("the pair", data), "preference", has_template=True)
        else:
            parse_row(Row("the row", data), "messages", has_template=True)
    except InputError as error:
        message = f"this chat cannot be a row of {name}: {error.message}"
        raise RequestError(409, message, code="not_a_row") from None


# ---------------------------------------------------------------- files


def append_lines(lines: Mapping[Path, bytes], key: str = SETTING) -> None:
    """Append a line to each file: to all of them or to none. `key` is the setting that chose them.
    Raises MachineError if the disk refuses, InputError for a link."""
    first = next(iter(lines))
    with disk_errors(first, sum(map(len, lines.values())), key), ExitStack() as files:
        for path, line in lines.items():
            descriptor = files.enter_context(_open_to_append(path))
            while line:
                line = line[os.write(descriptor, line) :]
            os.fsync(descriptor)


@contextmanager
def _open_to_append(path: Path) -> Generator[int]:
    """Yield the descriptor of a file to append to, locked. Before, a line that a killed process
    left unfinished is cut off; on an error, all that was written is."""
    descriptor = open_unlinked(path, os.O_RDWR | os.O_APPEND)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        os.fchmod(descriptor, 0o600)
        end = _cut_torn_line(descriptor, path)
        if end == 0:
            fsync_path(path.parent)
        try:
            yield descriptor
        except (OSError, TunesmithError):
            os.ftruncate(descriptor, end)
            raise
    finally:
        os.close(descriptor)


def _cut_torn_line(descriptor: int, path: Path) -> int:
    """Return the size of a file after its last whole line."""
    size = os.fstat(descriptor).st_size
    if size and os.pread(descriptor, 1, size - 1) != b"\n":
        size = path.read_bytes().rfind(b"\n") + 1
        os.ftruncate(descriptor, size)
    return size
