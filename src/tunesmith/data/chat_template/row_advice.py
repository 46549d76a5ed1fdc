"""Find what would make a refused conversation train, by trying it.

    RowAdvisor(tokenizer, templates, variables, render).suggest_fix(example, error) -> InputError

Two things are tried: a user message before a row that begins with the assistant, and
`chat_template_kwargs`, alone and in pairs. An error keeps its own fix if neither helps. Tries are
bounded for each renderer, in number and in seconds; what helped one row is tried first for the
next."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Iterator, Mapping
from copy import copy
from dataclasses import replace
from time import monotonic, thread_time
from typing import Any

from tunesmith.core.errors import InputError
from tunesmith.core.types import Example, Json
from tunesmith.data.chat_template.conversation import TEMPLATE_KWARGS_KEY, list_settable_names
from tunesmith.data.chat_template.template import SPLIT_FIX, ChatTemplate
from tunesmith.data.tokenizer.chat_tokenizer import TOO_LONG_FIX, ChatTokenizer

MAX_TRIES = 200
# Of all tries; one alone can take as long as a template may.
MAX_SECONDS = 2.0  # of this thread's processor time
MAX_CLOCK_SECONDS = 10.0  # an unknown tokenizer runs in another process
MAX_VALUES = 24  # single settings that are also tried in pairs
OPENING: Json = {"role": "user", "content": "Hello"}
USER_FIRST_FIX = "put a user message first, or drop the row"

# (tokenizer, variables, example) -> whether the example renders
RenderTest = Callable[[ChatTokenizer, Mapping[str, Any], Example], bool]


class RowAdvisor:
    def __init__(
        self,
        tokenizer: ChatTokenizer,
        templates: Mapping[str, ChatTemplate],
        variables: Mapping[str, Any],
        can_render: RenderTest,
    ) -> None:
        self.tokenizer = tokenizer
        self.templates = templates
        self.variables = dict(variables)
        self.can_render = can_render
        self.helpful: list[Json] = []  # settings that made a row train, the last first
        self.does_question_help = False  # a user message first made a row train
        self.num_tries = 0
        self.seconds = 0.0
        self.clock_seconds = 0.0

    def suggest_fix(self, example: Example, error: InputError) -> InputError:
        """Return the error with a fix that was tried, or unchanged."""
        is_chat = example.text is None and bool(self.templates)
        has_fix = error.fix in (TOO_LONG_FIX, SPLIT_FIX) or error.fix.startswith(
            "put a user message first"
        )
        if not is_chat or has_fix:
            return error
        if self._needs_question(example):
            message = (
                "the row begins with the assistant, but the chat template needs a user message"
                " before an answer"
            )
            return InputError(message, where=error.where, fix=USER_FIRST_FIX)
        candidates = itertools.chain(tuple(self.helpful), self._iter_settings())
        for settings in itertools.takewhile(self._is_try_allowed, candidates):
            if self._try_render(example, settings):
                self.helpful = [settings, *(old for old in self.helpful if old != settings)]
                fix = f"set {TEMPLATE_KWARGS_KEY}: {_format_settings(self.variables | settings)}"
                return InputError(error.message, where=error.where, fix=fix)
        return error

    def _needs_question(self, example: Example) -> bool:
        """Return whether a row begins with the assistant, and such rows need a user message."""
        index = _find_first_turn(example)
        if example.messages[index].get("role") != "assistant":
            return False
        if not self.does_question_help:
            self.does_question_help = self._try_render(_insert_question(example, index), {})
        return self.does_question_help

    def _iter_settings(self) -> Iterator[Json]:
        """Yield the settings to try: each value of each variable, then pairs of them."""
        values: list[tuple[str, Any]] = []
        special_tokens = self.tokenizer.special_tokens
        for name in list_settable_names(self.templates.values(), special_tokens):
            literals: set[str] = set()
            for template in self.templates.values():
                literals |= template.compared_values.get(name, frozenset())
            candidates = [False, True, *sorted(literals)]
            values += [(name, value) for value in candidates if self.variables.get(name) != value]
        for name, value in values:
            yield {name: value}
        for first, second in itertools.combinations(values[:MAX_VALUES], 2):
            if first[0] != second[0]:
                yield dict((first, second))

    def _try_render(self, example: Example, settings: Json) -> bool:
        if not self._is_try_allowed(settings):
            return False
        self.num_tries += 1
        started = thread_time()
        clock_started = monotonic()
        tokenizer = copy(self.tokenizer)
        tokenizer.controls = dict(tokenizer.controls)  # a probe may demote some
        try:
            return self.can_render(tokenizer, self.variables | settings, example)
        except InputError:
            return False
        finally:
            self.seconds += thread_time() - started
            self.clock_seconds += monotonic() - clock_started

    def _is_try_allowed(self, settings: Json) -> bool:
        """Return whether there is time for a try, and a number for one that has helped no row."""
        is_helpful = not settings or settings in self.helpful
        has_time = self.seconds < MAX_SECONDS and self.clock_seconds < MAX_CLOCK_SECONDS
        return has_time and (is_helpful or self.num_tries < MAX_TRIES)


def _find_first_turn(example: Example) -> int:
    """Return the index of the first message after those of the system."""
    for i, message in enumerate(example.messages):
        if message.get("role") not in ("system", "developer"):
            return i
    return 0


def _insert_question(example: Example, index: int) -> Example:
    messages = (*example.messages[:index], OPENING, *example.messages[index:])
    weights = (*example.turn_weights[:index], 0.0, *example.turn_weights[index:])
    return replace(example, messages=messages, turn_weights=weights, banned_spans=(), rejected=None)


def _format_settings(settings: Json) -> str:
    """Return settings as a YAML mapping on one line."""
    pairs = [f"{name}: {json.dumps(value, ensure_ascii=False)}" for name, value in settings.items()]
    return "{" + ", ".join(pairs) + "}"
