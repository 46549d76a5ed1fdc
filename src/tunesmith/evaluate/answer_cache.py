"""Cache generated answers on disk, so that no answer is generated twice.

    cache = AnswerCache(file, hash_weights(fingerprint, adapter_files))
    generate_cached(model, requests, decode=..., end_ids=..., cache=cache)

The key of an answer is the sha256 of everything that decides it: the weights, the prompt's tokens,
the sampling settings, the banned sequences and the end tokens; entries never go stale. The file has
one line per answer, appended when the answer is finished, so a killed evaluation continues where it
stopped. Torn or damaged lines are skipped. Weights that are still trained have no hash and are not
cached. Rounding depends on what else is in the batch (generation/engine.py): the cache holds the
first answer.

Left out: which prompts are answered (generate_until.py).
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Collection, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

from tunesmith.core.atomic import open_unlinked
from tunesmith.core.errors import InputError
from tunesmith.core.json_io import dump_json, parse_as, to_jsonable
from tunesmith.core.progress_log import log_progress
from tunesmith.core.ranks import Ranks
from tunesmith.core.types import GenerationOutput, GenerationRequest, Json
from tunesmith.evaluate.shared_items import generate_shared
from tunesmith.model.causal_lm import PackedCausalLM
from tunesmith.model.generation.engine import DecodeFn
from tunesmith.model.hub.adapter_config import AdapterFolder
from tunesmith.session.provenance import hash_weight_files

ANSWERS_FILE = "answers.jsonl"  # in a run folder
# Keys of a run's fingerprint that decide its answers, and of the plan in it.
MODEL_KEYS = (
    *("tunesmith", "base_sha256", "config", "tokenizer", "renderer"),
    *("versions", "machine", "kernels"),
)
PLAN_KEYS = ("method", "dtype", "attention")


@dataclass(frozen=True)
class AnswerCache:
    """The file of the answers, and the hash of the weights that generate them."""

    file: Path
    weights_hash: str


def hash_weights(fingerprint: Json, adapter: Mapping[str, str]) -> str:
    """Return the hash of a run's fingerprint and its weights.

    adapter: file name -> sha256, of the adapter or the fully trained model; empty for the base.
    """
    plan = {key: fingerprint["plan"].get(key) for key in PLAN_KEYS}
    model_values = {key: fingerprint.get(key) for key in MODEL_KEYS}
    return _hash_json({"facts": model_values, "plan": plan, "adapter": dict(adapter)})


def open_answer_cache(
    path: Path, fingerprint: Json, weights: AdapterFolder | Path | None
) -> AnswerCache:
    """Return the answer cache of a run folder for its base model, the adapter that training started
    from, or a folder of trained weights."""
    hashes: Mapping[str, str] = {}
    if isinstance(weights, Path):
        hashes = hash_weight_files(weights)
    elif weights is not None:
        hashes = {"start": weights.sha256}
    return AnswerCache(path / ANSWERS_FILE, hash_weights(fingerprint, hashes))


def generate_cached(
    model: PackedCausalLM,
    requests: Sequence[GenerationRequest],
    *,
    decode: DecodeFn,
    end_ids: Collection[int],
    cache: AnswerCache | None,
) -> list[GenerationOutput]:
    """Return the answer to each request, in their order; equal requests are answered once.

    Without a cache, or where its file cannot be written, nothing is stored. Raises InputError if
    the file is a link, and what `generate` raises.
    """
    weights_hash = cache.weights_hash if cache else ""
    keys = [_compute_key(weights_hash, request, end_ids) for request in requests]
    answers = _read_shared_answers(cache, set(keys), model.ranks) if cache else {}
    missing = {
        key: request for key, request in zip(keys, requests, strict=True) if key not in answers
    }
    missing_keys = list(missing)
    generations = generate_shared(model, list(missing.values()), decode=decode, end_ids=end_ids)
    num_cached = len(requests) - len(missing)
    progress = log_progress(generations, len(requests), "answers", num_done=num_cached)
    file = cache.file if cache and model.ranks.is_main else None
    with closing(_AppendFile(file)) as cache_file:
        for index, answer in progress:
            answers[missing_keys[index]] = answer
            cache_file.append_answer(missing_keys[index], answer)
    return [answers[key] for key in keys]


def _compute_key(weights_hash: str, request: GenerationRequest, end_ids: Collection[int]) -> str:
    """Return the key of an answer; new fields of a request are part of it automatically."""
    return _hash_json(
        {"state": weights_hash, "request": to_jsonable(request), "end_ids": sorted(end_ids)}
    )


def _hash_json(value: Json) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def _read_shared_answers(
    cache: AnswerCache, keys: Collection[str], ranks: Ranks
) -> dict[str, GenerationOutput]:
    """Return the answers that are in the file; ranks in lockstep take those that rank 0 reads, for
    it adds to the file while the others read it."""
    answers = _read_answers(cache.file, keys) if ranks.is_main else {}
    if not ranks.is_lockstep:
        return answers
    stored = ranks.gather_in_lockstep("stored answers", answers)[0]
    return {key: parse_as(GenerationOutput, answer) for key, answer in stored.items()}


def _read_answers(file: Path, keys: Collection[str]) -> dict[str, GenerationOutput]:
    answers: dict[str, GenerationOutput] = {}
    if not file.is_file():
        return answers
    with file.open("rb") as lines:
        for line in lines:
            # A torn or damaged line is no JSON, or its seal does not match.
            try:
                entry = json.loads(line)
                key = entry["key"]
                seal = _hash_json({"key": key, "answer": entry["answer"]})
                if key in keys and entry["seal"] == seal:
                    answers[key] = parse_as(GenerationOutput, entry["answer"])
            except (ValueError, KeyError, TypeError, RecursionError, InputError):
                continue
    return answers


class _AppendFile:
    """Append lines to a file, each in one write; after a failed write, store nothing more."""

    def __init__(self, file: Path | None) -> None:
        self._fd: int | None = None
        if file is not None:
            try:
                self._fd = open_unlinked(file, os.O_RDWR | os.O_APPEND)
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
