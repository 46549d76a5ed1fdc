"""A tokenizer whose regular expressions or tables are a stranger's: it runs in a guarded process.

    needs_guard(components)          -> whether a tokenizer has any
    list_unknown_patterns(component) -> the regular expressions that no known tokenizer has
    GuardedTokenizer(data)           -> what ChatTokenizer needs of tokenizers.Tokenizer
    load_tokenizer(tokenizer_json)   the job of the process

A pattern can take cubic time or fill the memory, and the library cannot be interrupted. It follows
a table of SentencePiece (`precompiled_charsmap`) without looking where that leads. The process
tries the tokenizer first. One that is too slow once is refused from then on. Here a copy without
patterns answers what needs none: the vocabulary and decoding."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from tokenizers import Tokenizer

from tunesmith.core.errors import InputError, MachineError
from tunesmith.core.types import Json
from tunesmith.data.guarded_process import ChildError, GuardedProcess
from tunesmith.data.tokenizer.tokenizer_json import iter_steps

MAX_SECONDS = 5.0  # of processor time per request, the first of which tries the tokenizer
MIN_LOAD_SPEED = 2**19  # bytes of tokenizer.json per second
MAX_BYTES = 2**30  # of memory, beside what the file itself needs
BYTES_PER_CHAR = 20  # of tokenizer.json, in memory
MAX_THREADS = 8  # each thread of the library takes address space, which is limited
MAX_REQUEST_CHARS = 2**18
PROBES = ("x", " ", "\n", "1", "x ", "x\n", "x1", ".", "é", "x.")  # slow on bad patterns
PROBE_REPEATS = 500
PATTERN_STEPS = ("normalizer", "pre_tokenizer")
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


def needs_guard(components: list[Any]) -> bool:
    """Return whether a normalizer, pre-tokenizer or decoder must not run in this process."""
    has_table = any("precompiled_charsmap" in step for step in iter_steps({"steps": components}))
    return has_table or bool(list_unknown_patterns(components))


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
        tokenizer_json = json.dumps(data)
        self._threads = min(MAX_THREADS, os.cpu_count() or 1)
        load_seconds = MAX_SECONDS + len(tokenizer_json) / MIN_LOAD_SPEED
        try:
            self._child = GuardedProcess(
                "tunesmith.data.tokenizer.guarded_tokenizer:load_tokenizer",
                tokenizer_json,
                load_seconds=load_seconds,
                max_bytes=MAX_BYTES + BYTES_PER_CHAR * len(tokenizer_json),
                threads=self._threads,
            )
        except ChildError as error:
            raise _explain_failure(error, "when it is loaded", load_seconds) from error
        probes = [probe * PROBE_REPEATS for probe in PROBES]
        self._answer({"texts": probes, "special": False}, "when it is tried")

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
                encodings += [_Encoding(ids) for ids in reply]
                batch = []
            if text is not None:
                batch.append(text)
        return encodings

    def normalize_str(self, text: str) -> str:
        return self._answer({"normalize": text}, f"on {len(text):,} characters")

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

    def _answer(self, request: Json, where: str) -> Any:
        threads = max(1, min(self._threads, len(request.get("texts", ()))))
        try:
            return self._child.ask(request, seconds=MAX_SECONDS, threads=threads)
        except ChildError as error:
            raise _explain_failure(error, where, MAX_SECONDS) from error


def _explain_failure(error: ChildError, where: str, seconds: float) -> InputError | MachineError:
    if error.kind == "wait":
        message = f"the tokenizer's process got too little time {where}"
        return MachineError(message, fix="stop other programs")
    is_raised = error.kind == "raised"
    if is_raised and error.details["type"] != "MemoryError":
        reason = error.details["message"]
        message = f"the tokenizers library cannot use this tokenizer: {reason:.300}"
        return InputError(message, fix="download the model again")
    if error.kind == "time":
        message = f"a regular expression of the tokenizer takes over {seconds:.3g} seconds {where}"
    else:
        message = f"the tokenizer needs too much memory {where}"
    return InputError(message, fix=UNKNOWN_FIX)


def load_tokenizer(tokenizer_json: str) -> Callable[[Json], Any]:
    """Return the job of the process: ids of texts, or a normalized text."""
    tokenizer = Tokenizer.from_str(tokenizer_json)
    tokenizer.encode_special_tokens = True

    def answer(request: Json) -> Any:
        if "normalize" in request:
            normalizer = tokenizer.normalizer
            text = request["normalize"]
            return text if normalizer is None else normalizer.normalize_str(text)
        encodings = tokenizer.encode_batch_fast(
            request["texts"], add_special_tokens=request["special"]
        )
        return [encoding.ids for encoding in encodings]

    return answer
