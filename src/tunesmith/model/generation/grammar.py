"""Answers that follow a JSON schema: a grammar says after every token which ones may come next.

    schema, the tokenizer of a model folder -> Grammar; Grammar(index, tokens) -> allowed tokens [V], for `generate`

The grammar engine is llguidance (Rust; the extra `constrained`). Form is guaranteed for answers
that come to their end; what stands in the fields is the model's. Left out: what an answer holds
that is cut by its length."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tunesmith.core.errors import InputError, MachineError
from tunesmith.core.types import Json

# At most one blank between signs: as compact as rows may be, and no way to write blanks for ever.
# What a grammar cannot follow of a schema is left to the model.
GRAMMAR_OPTIONS: Any = {"whitespace_flexible": True, "whitespace_pattern": " ?", "lenient": True}


class Grammar:
    """Raises MachineError without llguidance, InputError for a schema that it cannot follow."""

    def __init__(
        self, schema: Json, folder: Path, *, vocab_size: int, end_ids: Sequence[int]
    ) -> None:
        """`width`: how many logits the model has."""
        try:
            from llguidance import LLMatcher, LLTokenizer
        except ImportError:
            message = "answers that follow a schema need llguidance"
            raise MachineError(
                message, where="schema", fix="pip install 'tunesmith[constrained]'"
            ) from None
        tokenizer = LLTokenizer(
            (folder / "tokenizer.json").read_text(encoding="utf-8"),
            n_vocab=vocab_size,
            eos_token=list(end_ids),
        )
        grammar = LLMatcher.grammar_from_json_schema(json.dumps(schema), overrides=GRAMMAR_OPTIONS)
        self.initial_matcher = LLMatcher(tokenizer, grammar, log_level=0)
        self.vocab_size = vocab_size
        self._matchers: dict[
            int, tuple[LLMatcher, int]
        ] = {}  # by request, with the tokens that it has taken
        if self.initial_matcher.is_error():
            raise InputError(
                f"no grammar for this schema: {self.initial_matcher.get_error():.300}",
                where="schema",
            )
        self.warnings = tuple(
            self.initial_matcher.get_grammar_warnings()
        )  # what it leaves to the model

    def __call__(self, index: int, tokens: Sequence[int]) -> Tensor:
        matcher, num_consumed = self._matchers.get(index, (None, 0))
        if matcher is None or num_consumed > len(tokens):  # a new answer, or one that starts again
            matcher, num_consumed = self.initial_matcher.deep_copy(), 0
        matcher.consume_tokens(list(tokens[num_consumed:]))
        self._matchers[index] = matcher, len(tokens)
        bits = np.unpackbits(np.frombuffer(matcher.compute_bitmask(), np.uint8), bitorder="little")
        return torch.from_numpy(bits[: self.vocab_size].astype(bool))
