"""Answers that were generated before: kept in a file by what they are an answer of, so that nothing is generated twice.

    answers_cached(model, requests, decode=..., end_ids=..., store=Store(file, state)) -> Generations, as asked

The key of an answer is a sha256 over all that decides it: the weights (`state_of`), the prompt's tokens, how the answer
is chosen, what it may not hold, where it ends. Another key is another answer: nothing goes stale. The
file has a line for each answer, appended as it is finished, so an evaluation that was killed goes on where it was. A
line that is torn or is no answer is passed over. Weights that are still trained have no state: they are not cached.
Left out: what is asked (tasks.py). What runs beside an answer can still round it differently (infer/engine.py): kept
is what came first.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

from tunesmith.core.errors import InputError
from tunesmith.core.json_io import from_json, json_bytes, to_json
from tunesmith.core.progress_log import watched
from tunesmith.core.types import Generation, Json, Request
from tunesmith.model.causal_lm import LanguageModel
from tunesmith.model.generation.engine import Decode, generate

ANSWERS = "answers.jsonl"  # in a run folder
MODEL = ("tunesmith", "base_sha256", "config", "tokenizer", "renderer", "versions", "machine")  # of an identity
COMPUTED = ("method", "dtype", "attention")  # of its plan: how the same weights are computed with


@dataclass(frozen=True)
class Store:
    """Where answers are kept, and what the weights are that give them: see `state_of`."""

    file: Path
    state: str


def state_of(identity: Json, adapter: Mapping[str, str]) -> str:
    """What the weights are, from the identity of a run and the sha256 of each file of its adapter (none: the base), or
    of the model where all weights were trained."""
    plan = {key: identity["plan"].get(key) for key in COMPUTED}
    facts = {key: identity.get(key) for key in MODEL}
    return _sha256({"facts": facts, "plan": plan, "adapter": dict(adapter)})


def answers_cached(
    model: LanguageModel,
    requests: Sequence[Request],
    *,
    decode: Decode,
    end_ids: Collection[int],
    store: Store | None,
) -> list[Generation]:
    """The answer of each request, in their order; the same request is answered once. Nothing is kept without a `store`,
    nor where its file cannot be written. Raises as `generate` does."""
    keys = [_key(store.state if store else "", request, end_ids) for request in requests]
    found = _read(store.file, set(keys)) if store else {}
    missing = {key: request for key, request in zip(keys, requests, strict=True) if key not in found}
    names, finished = list(missing), generate(model, list(missing.values()), decode=decode, end_ids=end_ids)
    with closing(_Appended(store.file if store else None)) as kept:
        for place, answer in watched(finished, len(requests), "answers", done=len(requests) - len(names)):
            found[names[place]] = answer
            kept.add(names[place], answer)
    return [found[key] for key in keys]


def _key(state: str, request: Request, end_ids: Collection[int]) -> str:
    """Every field of a request counts, those to come too."""
    return _sha256({"state": state, "request": to_json(request), "end_ids": sorted(end_ids)})


def _sha256(value: Json) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def _read(file: Path, keys: Collection[str]) -> dict[str, Generation]:
    if not file.is_file():
        return {}
    with file.open("rb") as lines:
        return {key: answer for line in lines for key, answer in _answer_of(line) if key in keys}


def _answer_of(line: bytes) -> Iterator[tuple[str, Generation]]:
    """Nothing for a line that is torn or was damaged: its seal does not fit."""
    try:
        entry = json.loads(line)
        sealed = entry["seal"] == _sha256({"key": entry["key"], "answer": entry["answer"]})
        if sealed:
            yield entry["key"], from_json(Generation, entry["answer"])
    except (ValueError, KeyError, TypeError, RecursionError, InputError):
        return


class _Appended:
    """A file that lines are added to, each in one write. What cannot be written is not kept, and nothing else."""

    def __init__(self, file: Path | None) -> None:
        self._file: int | None = None
        if file is not None:
            try:
                self._file = os.open(file, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o644)
                self._end_torn_line()
            except OSError:
                self.close()

    def _end_torn_line(self) -> None:
        assert self._file is not None
        size = os.fstat(self._file).st_size
        if size and os.pread(self._file, 1, size - 1) != b"\n":
            os.write(self._file, b"\n")

    def add(self, key: str, answer: Generation) -> None:
        if self._file is None:
            return
        entry = {"key": key, "answer": to_json(answer)}
        line = json_bytes({**entry, "seal": _sha256(entry)})
        try:
            whole = os.write(self._file, line) == len(line)
        except OSError:
            whole = False
        if not whole:  # the disk is full: another line would not fit either
            self.close()

    def close(self) -> None:
        if self._file is not None:
            os.close(self._file)
        self._file = None
