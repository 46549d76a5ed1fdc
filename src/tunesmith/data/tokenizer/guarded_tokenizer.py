"""A tokenizer whose regular expressions are a stranger's: it encodes in a process with limits.

    list_unknown_patterns(component) -> the regular expressions that no known tokenizer has
    GuardedTokenizer(data)           -> what ChatTokenizer needs of tokenizers.Tokenizer

A pattern can take cubic time or fill the memory, and the library cannot be interrupted. The process
(`encode_worker.py`) tries the tokenizer first. One that is too slow once is refused from then on;
its clock starts when the process has loaded the file, and counts the process's own processor time,
so that a busy machine refuses no tokenizer. Threads take turns. Here a copy without patterns
answers what needs none: the vocabulary and decoding."""

from __future__ import annotations

import json
import os
import selectors
import signal
import subprocess
import sys
import tempfile
import threading
import time
import weakref
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import tokenizers
from tokenizers import Tokenizer

from tunesmith.core.errors import InputError, MachineError
from tunesmith.core.types import Json

MAX_SECONDS = 5.0  # of processor time per request, the first of which tries the tokenizer
MAX_WAIT_SECONDS = 120.0  # longer, for a process that gets little of a processor
MAX_START_SECONDS = 60.0  # until the interpreter has imported the library
MIN_LOAD_SPEED = 2**19  # bytes of tokenizer.json per second
MAX_THREADS = 8  # each thread of the library takes address space, which is limited
MAX_STDERR_CHARS = 500
READY_LINE = b"ready\n"
MAX_REQUEST_CHARS = 2**18
WORKER_SCRIPT = Path(__file__).with_name("encode_worker.py")
PATTERN_STEPS = ("normalizer", "pre_tokenizer")
LIBRARY_FOLDER = str(Path(str(tokenizers.__file__)).parent.parent)
START_FIX = "run tunesmith by a Python interpreter that can import tokenizers"
UNKNOWN_FIX = "do not use this model, or simplify the patterns in its tokenizer.json"
CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
CASED_LETTERS = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+",
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*",
)
WORD_ENDS = r"\s*[\r\n]+|\s+(?!\S)|\s+"
# Patterns of well-known tokenizers, which take linear time on any text.
COMMON_PATTERNS = frozenset({
    # Llama 3; Qwen2; GPT-4
    CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|" + WORD_ENDS,
    CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|" + WORD_ENDS,
    CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}+| ?[^\s\p{L}\p{N}]+[\r\n]*|" + WORD_ENDS,
    # Tekken; GPT-4o; Phi-4 mini, gpt-oss
    CASED_LETTERS[0] + "|" + CASED_LETTERS[1]
    + r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|" + WORD_ENDS,
    CASED_LETTERS[0] + CONTRACTIONS + "?|" + CASED_LETTERS[1] + CONTRACTIONS
    + r"?|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|" + WORD_ENDS,
    # GPT-2, GPT-NeoX
    r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+",
    r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+",
    # DeepSeek, without its `\s+$`, which is quadratic on spaces before a word
    r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", r"[一-龥ࠀ-一가-퟿]+", r"\p{N}{1,3}", r"\p{N}+", r"\p{N}",
    r"[一-龥぀-ゟ゠-ヿ]+", r"\d{1,3}", r"\s+", r" {2,}", r"[0-9]", r"\d",
    r"[0-9][0-9][0-9]",
    # DeepSeek-V3, with line ends as they are in the file
    r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|"""
    "[^\r\n\\p{L}\\p{P}\\p{S}]?[\\p{L}\\p{M}]+| ?[\\p{P}\\p{S}]+[\r\n]*|"
    "\\s*[\r\n]+|\\s+(?!\\S)|\\s+",
    # Qwen3.5
    CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|"
    + WORD_ENDS,
    # GPT-4 in tiktoken, of two versions
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]++[\r\n]*|"
    r"\s*[\r\n]|\s+(?!\S)|\s+",
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}++|\p{N}{1,3}+| ?[^\s\p{L}\p{N}]++[\r\n]*+|"
    r"\s++$|\s*[\r\n]|\s+(?!\S)|\s",
    # BLOOM
    r" ?[^(\s|[.,!?…。，、।۔،])]+",
})  # fmt: skip


def list_unknown_patterns(component: Any) -> list[str]:
    """Return the regular expressions of a normalizer, pre-tokenizer or decoder that are not among
    the known ones."""
    return [pattern for pattern in _iter_patterns(component) if pattern not in COMMON_PATTERNS]


def _iter_patterns(component: Any) -> Iterator[str]:
    todo = [component]
    while todo:
        item = todo.pop()
        if isinstance(item, dict):
            pattern = item.get("Regex")
            if isinstance(pattern, str):
                yield pattern
            todo += item.values()
        elif isinstance(item, list):
            todo += item


@dataclass(frozen=True)
class _Encoding:
    ids: list[int]


class GuardedTokenizer:
    """The part of tokenizers.Tokenizer that ChatTokenizer uses, by a process for patterns."""

    def __init__(self, data: Json) -> None:
        """Raises InputError for a tokenizer that the library cannot use, or that is too slow."""
        if list_unknown_patterns(data.get("decoder")):
            message = "the tokenizer's decoder has an unknown regular expression"
            raise InputError(message, fix=UNKNOWN_FIX)
        plain_data = data | dict.fromkeys(PATTERN_STEPS)
        self._plain_tokenizer = Tokenizer.from_str(json.dumps(plain_data))
        self._problem = ""
        self._subject = "the tokenizer"
        self._lock = threading.Lock()
        tokenizer_json = json.dumps(data).encode() + b"\n"
        load_seconds = MAX_SECONDS + len(tokenizer_json) / MIN_LOAD_SPEED
        self._process = _start_process(load_seconds)
        weakref.finalize(self, _end_process, self._process)
        try:
            self._request(tokenizer_json, "when it is loaded", load_seconds)
            self._subject = "a regular expression of the tokenizer"
            self._answer({"probe": True}, "when it is tried")
        except InputError:
            _end_process(self._process)
            raise

    # ---- what runs patterns

    def encode(self, text: str, add_special_tokens: bool = True) -> _Encoding:
        return self.encode_batch_fast([text], add_special_tokens)[0]

    def encode_batch_fast(
        self, texts: Sequence[str], add_special_tokens: bool = True
    ) -> list[_Encoding]:
        encodings: list[_Encoding] = []
        batch: list[str] = []
        for text in [*texts, None]:
            num_chars = sum(map(len, batch)) + len(text or "")
            if batch and (text is None or num_chars > MAX_REQUEST_CHARS):
                request = {"texts": batch, "special": add_special_tokens}
                where = f"on a text of {sum(map(len, batch)):,} characters"
                reply = self._answer(request, where)
                encodings += [_Encoding(ids) for ids in reply["ids"]]
                batch = []
            if text is not None:
                batch.append(text)
        return encodings

    def normalize_str(self, text: str) -> str:
        return self._answer({"normalize": text}, f"on {len(text):,} characters")["text"]

    @property
    def normalizer(self) -> GuardedTokenizer:
        return self

    # ---- what runs none

    def get_vocab(self, with_added_tokens: bool = True) -> dict[str, int]:
        return self._plain_tokenizer.get_vocab(with_added_tokens)

    def token_to_id(self, text: str) -> int | None:
        return self._plain_tokenizer.token_to_id(text)

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        return self._plain_tokenizer.decode(ids, skip_special_tokens)

    # ---- the process

    def _answer(self, request: Json, where: str) -> Json:
        line = json.dumps(request | {"seconds": MAX_SECONDS}).encode() + b"\n"
        return self._request(line, where, MAX_SECONDS)

    def _request(self, request: bytes, where: str, seconds: float) -> Json:
        """Send a line and return the reply. Raises InputError if the library refuses it or takes
        too long, and from then on."""
        with self._lock:  # a reply belongs to the request before it
            if self._problem:
                raise InputError(self._problem, fix=UNKNOWN_FIX)
            try:
                line = self._send_request(request, seconds)
            except BaseException:  # Ctrl-C, too: the reply would answer the next request
                self._problem = "the tokenizer's process was interrupted"
                _end_process(self._process)
                raise
            if line is None:  # other programs have the processors
                self._problem = "the tokenizer's process got too little time"
                _end_process(self._process)
                raise MachineError(f"{self._problem} {where}", fix="stop other programs")
            if not line and self._process.wait() == -signal.SIGPROF:
                self._problem = f"{self._subject} takes over {seconds:.3g} seconds {where}"
            elif not line:
                self._problem = f"{self._subject} needs too much memory {where}"
            if self._problem:
                _end_process(self._process)
                raise InputError(self._problem, fix=UNKNOWN_FIX)
        reply = json.loads(line or b"")
        if "error" in reply:
            message = f"the tokenizers library cannot use this tokenizer: {reply['error'][:300]}"
            raise InputError(message, fix="download the model again")
        return reply

    def _send_request(self, request: bytes, seconds: float) -> bytes | None:
        """Return the reply to a request, b"" if the process ends, None if it takes too long."""
        assert self._process.stdin is not None
        deadline = time.monotonic() + seconds + MAX_WAIT_SECONDS
        try:
            self._process.stdin.write(request)
            self._process.stdin.flush()
        except BrokenPipeError:
            return b""
        return _read_line(self._process, deadline)


# ---------------------------------------------------------------- the process


def _start_process(load_seconds: float) -> subprocess.Popen[bytes]:
    """Start the process and wait until it has imported the library. Raises MachineError."""
    num_threads = min(MAX_THREADS, os.cpu_count() or 1)
    with tempfile.TemporaryDirectory() as scratch, tempfile.TemporaryFile() as stderr:
        try:
            process = subprocess.Popen(
                [sys.executable, "-I", str(WORKER_SCRIPT), LIBRARY_FOLDER, str(load_seconds)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=stderr,
                cwd=scratch,
                env={**os.environ, "RAYON_NUM_THREADS": str(num_threads)},
                start_new_session=True,  # Ctrl-C is for this process, which ends the other
            )
        except OSError as error:
            message = f"the tokenizer's process cannot start: {error}"
            raise MachineError(message, fix=START_FIX) from error
        try:
            line = _read_line(process, time.monotonic() + MAX_START_SECONDS)
        except BaseException:  # Ctrl-C, too: nobody else would end the process
            _end_process(process)
            raise
        if line == READY_LINE:
            return process
        _end_process(process)
        raise MachineError(_describe_start(process, line, stderr), fix=START_FIX)


def _describe_start(process: subprocess.Popen[bytes], line: bytes | None, stderr: BinaryIO) -> str:
    """Return why a process did not become ready, with the end of what it wrote."""
    reason = f"it ended with status {process.returncode}"
    if line is None:
        reason = f"it was not ready within {MAX_START_SECONDS:g} seconds"
    elif line:
        reason = "sys.executable is no Python interpreter"
    stderr.seek(0)
    written = stderr.read().decode(errors="replace").strip()[-MAX_STDERR_CHARS:]
    return f"the tokenizer's process did not start: {reason}" + (f": {written}" if written else "")


def _read_line(process: subprocess.Popen[bytes], deadline: float) -> bytes | None:
    """Return the next line of a process, b"" if it ends, None if it takes too long."""
    assert process.stdout is not None
    reply = bytearray()
    with selectors.DefaultSelector() as selector:
        selector.register(process.stdout, selectors.EVENT_READ)
        while not reply.endswith(b"\n"):
            remaining = deadline - time.monotonic()
            if remaining <= 0 or not selector.select(remaining):
                return None
            part = os.read(process.stdout.fileno(), 2**20)
            if not part:
                return b""
            reply += part
    return bytes(reply)


def _end_process(process: subprocess.Popen[bytes]) -> None:
    process.kill()
    process.wait()
    for stream in (process.stdin, process.stdout):
        if stream is not None:
            stream.close()
