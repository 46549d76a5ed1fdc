"""Answers that were generated before: kept in a file by what they are an answer of, so that nothing
is generated twice.

    answers_cached(model, requests, decode=..., end_ids=..., store=Store(file, state)) -> Generations, as asked

The key of an answer is a sha256 over all that decides it: the weights (`state_of`), the prompt's
tokens, how the answer is chosen, what it may not hold, where it ends. Another key is another
answer: nothing goes stale. The file has a line for each answer, appended as it is finished, so an
evaluation that was killed goes on where it was. A line that is torn or is no answer is passed over.
Weights that are still trained have no state: they are not cached. Left out: what is asked
(tasks.py). What runs beside an answer can still round it differently (infer/engine.py): kept is
what came first."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

from tunesmith.core.errors import InputError
from tunesmith.core.json_io import dump_json, parse_as, to_jsonable
from tunesmith.core.progress_log import log_progress
from tunesmith.core.types import GenerationOutput, GenerationRequest, Json
from tunesmith.model.causal_lm import PackedCausalLM
from tunesmith.model.generation.engine import DecodeFn, generate

ANSWERS_FILE = "answers.jsonl"  # in a run folder
MODEL_KEYS = (
    "tunesmith",
    "base_sha256",
    "config",
    "tokenizer",
    "renderer",
    "versions",
    "machine",
)  # of an identity
PLAN_KEYS = ("method", "dtype", "attention")  # of its plan: how the same weights are computed with


@dataclass(frozen=True)
class AnswerCache:
    """Where answers are kept, and what the weights are that give them: see `state_of`."""

    file: Path
    weights_hash: str


def hash_weights(fingerprint: Json, adapter: Mapping[str, str]) -> str:
    """What the weights are, from the identity of a run and the sha256 of each file of its adapter
    (none: the base), or of the model where all weights were trained."""
    plan = {key: fingerprint["plan"].get(key) for key in PLAN_KEYS}
    model_values = {key: fingerprint.get(key) for key in MODEL_KEYS}
    return _hash_json({"facts": model_values, "plan": plan, "adapter": dict(adapter)})


def generate_cached(
    model: PackedCausalLM,
    requests: Sequence[GenerationRequest],
    *,
    decode: DecodeFn,
    end_ids: Collection[int],
    cache: AnswerCache | None,
) -> list[GenerationOutput]:
    """The answer of each request, in their order; the same request is answered once. Nothing is
    kept without a `store`, nor where its file cannot be written. Raises as `generate` does."""
    keys = [
        _compute_key(cache.weights_hash if cache else "", request, end_ids) for request in requests
    ]
    answers = _read_answers(cache.file, set(keys)) if cache else {}
    missing = {
        key: request for key, request in zip(keys, requests, strict=True) if key not in answers
    }
    missing_keys, generations = (
        list(missing),
        generate(model, list(missing.values()), decode=decode, end_ids=end_ids),
    )
    with closing(_AppendFile(cache.file if cache else None)) as cache_file:
        for index, answer in log_progress(
            generations, len(requests), "answers", num_done=len(requests) - len(missing_keys)
        ):
            answers[missing_keys[index]] = answer
            cache_file.append_answer(missing_keys[index], answer)
    return [answers[key] for key in keys]


def _compute_key(weights_hash: str, request: GenerationRequest, end_ids: Collection[int]) -> str:
    """Every field of a request counts, those to come too."""
    return _hash_json(
        {"state": weights_hash, "request": to_jsonable(request), "end_ids": sorted(end_ids)}
    )


def _hash_json(value: Json) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def _read_answers(file: Path, keys: Collection[str]) -> dict[str, GenerationOutput]:
    if not file.is_file():
        return {}
    with file.open("rb") as lines:
        return {key: answer for line in lines for key, answer in _parse_answer(line) if key in keys}


def _parse_answer(line: bytes) -> Iterator[tuple[str, GenerationOutput]]:
    """Nothing for a line that is torn or was damaged: its seal does not fit."""
    try:
        entry = json.loads(line)
        is_sealed = entry["seal"] == _hash_json({"key": entry["key"], "answer": entry["answer"]})
        if is_sealed:
            yield entry["key"], parse_as(GenerationOutput, entry["answer"])
    except (ValueError, KeyError, TypeError, RecursionError, InputError):
        return


class _AppendFile:
    """A file that lines are added to, each in one write. What cannot be written is not kept, and
    nothing else."""

    def __init__(self, file: Path | None) -> None:
        self._fd: int | None = None
        if file is not None:
            try:
                self._fd = os.open(file, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o644)
                self._end_torn_line()
            except OSError:
                self.close()

    def _end_torn_line(self) -> None:
        assert self._fd is not None
        size = os.fstat(self._fd).st_size
        if size and os.pread(self._fd, 1, size - 1) != b"\n":
            os.write(self._fd, b"\n")

    def append_answer(self, key: str, answer: GenerationOutput) -> None:
        if self._fd is None:
            return
        entry = {"key": key, "answer": to_jsonable(answer)}
        line = dump_json({**entry, "seal": _hash_json(entry)})
        try:
            is_complete = os.write(self._fd, line) == len(line)
        except OSError:
            is_complete = False
        if not is_complete:  # the disk is full: another line would not fit either
            self.close()

    def close(self) -> None:
        if self._fd is not None:
            os.close(self._fd)
        self._fd = None
