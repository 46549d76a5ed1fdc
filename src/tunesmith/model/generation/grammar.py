"""Answers that follow a JSON schema: a grammar decides after every token which ones may follow.

    Grammar(schema, folder, ...).start_answer().find_allowed(tokens) -> allowed tokens [V]

The grammar engine is llguidance (Rust; the extra `constrained`). The form of complete answers is
guaranteed; the content of the fields is the model's. A strict grammar is for schemas of strangers:
what it cannot enforce is an error. Left out: answers cut off by their length, and how large a
schema may be (serve/grammars.py)."""

from __future__ import annotations

import functools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tunesmith.core.errors import InputError, MachineError
from tunesmith.core.types import Json

# at most one space between symbols: as compact as rows may be, and no endless whitespace
GRAMMAR_OPTIONS: Any = {"whitespace_flexible": True, "whitespace_pattern": " ?"}
OPTIONS_KEYWORD = "x-guidance"  # of a schema: would change the options from inside


class Grammar:
    """The tokens that keep an answer valid under a JSON schema."""

    def __init__(
        self,
        schema: Json,
        folder: Path,
        *,
        vocab_size: int,
        end_ids: Sequence[int],
        is_strict: bool = False,
    ) -> None:
        """Compile `schema` for the tokenizer in `folder` and a model with `vocab_size` logits.

        Parts of the schema that a grammar cannot express are left to the model and are in
        `warnings`; with `is_strict` they are an error that names them. Raises MachineError without
        llguidance, InputError for an unsupported schema."""
        LLMatcher = import_llguidance().LLMatcher
        options = _make_options(schema, is_strict=is_strict)
        grammar = LLMatcher.grammar_from_json_schema(json.dumps(schema), overrides=options)
        tokenizer = load_tokenizer(folder, vocab_size, tuple(end_ids))
        self._matcher = LLMatcher(tokenizer, grammar, log_level=0)
        self._vocab_size = vocab_size
        self._end_ids = [token for token in end_ids if token < vocab_size]
        if self._matcher.is_error():
            message = f"the schema has no grammar: {self._matcher.get_error():.300}"
            raise InputError(message, where="response_schema")
        # what is left to the model
        self.warnings = tuple(self._matcher.get_grammar_warnings())

    def start_answer(self) -> SchemaAnswer:
        """Return the grammar of one answer."""
        return SchemaAnswer(self._matcher.deep_copy(), self._vocab_size, self._end_ids)


def _make_options(schema: Json, *, is_strict: bool) -> Any:
    """Return the options of a schema's grammar. Raises InputError for a strict schema that sets
    them itself."""
    if is_strict and OPTIONS_KEYWORD in schema:
        raise InputError(f"{OPTIONS_KEYWORD} is not a keyword", where="response_schema")
    return GRAMMAR_OPTIONS | {"lenient": not is_strict, "coerce_one_of": not is_strict}


class SchemaAnswer:
    """The state of a grammar in one answer."""

    def __init__(self, matcher: Any, vocab_size: int, end_ids: Sequence[int]) -> None:
        self._matcher = matcher
        self._vocab_size = vocab_size
        self._end_ids = list(end_ids)
        self._num_consumed = 0

    def find_allowed(self, tokens: Sequence[int]) -> Tensor:
        """Return which tokens may follow `tokens` [V], which continue those of the last call.

        Raises InputError if the next step of the grammar is beyond llguidance's limits."""
        self._matcher.consume_tokens(list(tokens[self._num_consumed :]))
        self._num_consumed = len(tokens)
        mask = np.frombuffer(self._matcher.compute_bitmask(), np.uint8)
        if self._matcher.is_error():
            message = f"the schema cannot be followed further: {self._matcher.get_error():.200}"
            raise InputError(message, where="response_schema", fix="simplify the schema")
        bits = np.unpackbits(mask, bitorder="little")[: self._vocab_size].astype(bool)
        if not self._matcher.is_accepting():
            # llguidance takes an end token for its text, where a schema asks for that text
            bits[self._end_ids] = False
        return torch.from_numpy(bits)


@functools.lru_cache(maxsize=8)
def load_tokenizer(folder: Path, vocab_size: int, end_ids: tuple[int, ...]) -> Any:
    """Return llguidance's view of a tokenizer, which takes longer to build than most grammars.
    Raises MachineError without llguidance."""
    tokenizer_json = (folder / "tokenizer.json").read_text(encoding="utf-8")
    make_tokenizer = import_llguidance().LLTokenizer
    return make_tokenizer(tokenizer_json, n_vocab=vocab_size, eos_token=list(end_ids))


def import_llguidance() -> Any:
    """Return the grammar engine. Raises MachineError without it."""
    try:
        import llguidance
    except ImportError:
        message = "answers that follow a schema need llguidance"
        fix = "pip install '.[constrained]' in tunesmith's folder"
        raise MachineError(message, where="response_schema", fix=fix) from None
    return llguidance
