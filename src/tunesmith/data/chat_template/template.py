"""A chat template: a conversation in, tracked text out.

    ChatTemplate(source, now).render(chat, count)       -> TrackedStr
    ChatTemplate(source, now).render_plain(chat, count) -> str, by plain Jinja
    find_templates(folder, override, now)               -> the templates of a model folder

Templates of well-known models (`popular_templates.txt`) run here. Any other is never even parsed
here: it compiles and renders in a guarded process, whose processor time and memory are limited far
above what honest rows take. What exceeds them is refused, not waited for."""

from __future__ import annotations

import hashlib
import threading
import time
from collections.abc import Iterator
from datetime import datetime
from functools import cache
from pathlib import Path
from typing import Any, NoReturn

from tunesmith.core.errors import InputError, MachineError
from tunesmith.core.json_io import read_file, read_json_object
from tunesmith.core.types import Json
from tunesmith.data.chat_template.compiled_template import CompiledTemplate, TemplateInput
from tunesmith.data.chat_template.tracked_str import TrackedStr
from tunesmith.data.guarded_process import ChildError, GuardedProcess

MAX_SOURCE = 100_000  # characters; the largest real templates have 20,000
MAX_SOURCE_BYTES = 4 * MAX_SOURCE
MAX_SECONDS = 60.0  # of processor time, of a row: honest ones take milliseconds on any machine
MAX_CHILD_BYTES = 2**30
HASH_FILE = Path(__file__).with_name("popular_templates.txt")
SPLIT_FIX = "split the row, or set `train: false` on some answers"
LIMIT_FIX = "check the template: no chat needs that much work; or set another `chat_template`"


class ChatTemplate:
    """`literals` are all strings in the template, `undeclared_variables` the names it looks up."""

    def __init__(self, source: str, *, now: datetime, name: str = "chat template") -> None:
        """Compile a template. `now` is the date that it sees. Raises InputError if it is not valid
        Jinja."""
        if len(source) > MAX_SOURCE:
            raise InputError(f"the chat template has more than {MAX_SOURCE} characters", where=name)
        self.source = source
        self.name = name
        self._failure: InputError | None = None
        self._identity: Json = {"source": source, "now": now.isoformat(), "name": name}
        self._compiled: CompiledTemplate | None = None
        if is_popular(source):
            self._compiled = CompiledTemplate(source, now=now, name=name)
            facts = self._compiled.facts
        else:
            facts = self._ask({})
        self.literals = frozenset(facts["literals"])
        self.undeclared_variables = frozenset(facts["names"])

    def render(self, chat: TemplateInput, count: int, *, has_prompt: bool = False) -> TrackedStr:
        """Render the first `count` messages to tracked text, with the generation prompt if
        `has_prompt`. Raises InputError with the template's line; the caller adds the row."""
        if self._compiled is None:
            reply = self._ask_render(chat, count, has_prompt, is_plain=False)
            return TrackedStr(reply["text"], tuple(reply["runs"]))
        started = time.thread_time()
        text = self._compiled.render(chat.build_tracked_context(count, has_prompt=has_prompt))
        self._charge_seconds(chat, time.thread_time() - started)
        return text

    def render_plain(self, chat: TemplateInput, count: int, *, has_prompt: bool = False) -> str:
        """Render the same with plain Jinja."""
        if self._compiled is None:
            return self._ask_render(chat, count, has_prompt, is_plain=True)["text"]
        started = time.thread_time()
        text = self._compiled.render_plain(chat.build_context(count, has_prompt=has_prompt))
        self._charge_seconds(chat, time.thread_time() - started)
        return text

    def _charge_seconds(self, chat: TemplateInput, seconds: float) -> None:
        """Add a render to the time of its row. Raises InputError for a row that takes too long."""
        chat.seconds += seconds
        if chat.seconds > MAX_SECONDS:
            message = (
                f"rendering each trained turn of the {len(chat.messages):,} messages with all"
                f" messages before it takes over {MAX_SECONDS:g} seconds of a processor"
            )
            raise InputError(message, fix=SPLIT_FIX)

    def _ask_render(
        self, chat: TemplateInput, count: int, has_prompt: bool, *, is_plain: bool
    ) -> Json:
        request = {
            "messages": chat.messages[:count],
            "tools": chat.tools,
            "variables": chat.variables.plain,
            "count": count,
            "has_prompt": has_prompt,
            "is_plain": is_plain,
        }
        reply = self._ask(request)
        self._charge_seconds(chat, reply["seconds"])
        return reply

    def _ask(self, request: Json) -> Json:
        """Ask the guarded process. A template that once exceeded its limits is not asked again, so
        that a data set is refused as fast as a row."""
        if self._failure is not None:
            raise self._failure
        try:
            return _get_process().ask(self._identity | request)
        except ChildError as error:
            self._refuse(error)

    def _refuse(self, error: ChildError) -> NoReturn:
        details = error.details
        if error.kind == "wait":
            message = "the process of the chat template got too little time"
            raise MachineError(message, fix="stop other programs") from error
        if error.kind == "raised" and details["type"] == "InputError":
            raise InputError(details["message"], where=details["where"], fix=details["fix"])
        problem = f"takes over {MAX_SECONDS:g} seconds of a processor"
        if error.kind == "raised" and details["type"] != "MemoryError":
            problem = f"fails: {details['type']}: {details['message']:.300}"
        elif error.kind != "time":
            problem = "needs too much memory"
        self._failure = InputError(f"{self.name}: a render {problem}", fix=LIMIT_FIX)
        raise self._failure from error


class _TemplateProcess:
    """The guarded process of all unknown templates, started anew after it ended."""

    def __init__(self) -> None:
        self._child: GuardedProcess | None = None
        self._lock = threading.Lock()

    def ask(self, request: Json) -> Json:
        with self._lock:
            if self._child is None or self._child.failure is not None:
                job = "tunesmith.data.chat_template.compiled_template:start_templates"
                self._child = GuardedProcess(
                    job, None, load_seconds=MAX_SECONDS, max_bytes=MAX_CHILD_BYTES
                )
            child = self._child
        return child.ask(request, seconds=MAX_SECONDS)


@cache
def _get_process() -> _TemplateProcess:
    return _TemplateProcess()


@cache
def _load_popular_hashes() -> frozenset[str]:
    lines = HASH_FILE.read_text("utf-8").splitlines()
    return frozenset(line.split()[0] for line in lines if line and not line.startswith("#"))


def is_popular(source: str) -> bool:
    """Return whether a template is one of a well-known model, which runs in this process."""
    digest = hashlib.sha256(source.rstrip().encode(errors="surrogatepass")).hexdigest()
    return digest in _load_popular_hashes()


def find_templates(folder: Path, override: Path | None, now: datetime) -> dict[str, ChatTemplate]:
    """Load the templates of a model folder, "default" and perhaps "tool_use": from `override`, else
    chat_template.jinja, else tokenizer_config.json. A folder may have none."""
    default_file = folder / "chat_template.jinja"
    sources: dict[str, tuple[str, str]] = {}  # name -> (source, where it is from)
    if override or default_file.is_file():
        files = {"default": override or default_file}
        if not override:
            extra_files = sorted((folder / "additional_chat_templates").glob("*.jinja"))
            files |= {path.stem: path for path in extra_files}
        for name, path in files.items():
            sources[name] = (_read_source(path), path.name)
    else:
        config = read_json_object(folder / "tokenizer_config.json", is_optional=True)
        where = "chat_template of tokenizer_config.json"
        for name, source in _read_config_templates(config.get("chat_template"), folder):
            sources[name] = (source, where)
    templates: dict[str, ChatTemplate] = {}
    for name in ("default", "tool_use"):
        if name in sources:
            source, where = sources[name]
            templates[name] = ChatTemplate(source, now=now, name=where)
    return templates


def _read_config_templates(entry: Any, folder: Path) -> Iterator[tuple[str, str]]:
    """Yield (name, source) of each template in tokenizer_config.json: one text, or a list of
    objects with both."""
    if isinstance(entry, str):
        entry = [{"name": "default", "template": entry}] if entry else None
    for item in entry if isinstance(entry, list) else [] if entry is None else [entry]:
        name = item.get("name") if isinstance(item, dict) else None
        source = item.get("template") if isinstance(item, dict) else None
        if not isinstance(name, str) or not isinstance(source, str):
            raise InputError(
                f"chat_template is not a text or a list of name and template: {str(item)[:80]!r}",
                where=str(folder / "tokenizer_config.json"),
                fix="correct it, or set `chat_template` to a template file",
            )
        yield name, source


def _read_source(path: Path) -> str:
    content = read_file(path, max_bytes=MAX_SOURCE_BYTES)
    try:
        return content.decode().replace("\r\n", "\n").replace("\r", "\n")
    except UnicodeDecodeError as error:
        raise InputError(f"the chat template cannot be read: {error}", where=str(path)) from error
