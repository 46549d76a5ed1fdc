"""Examples to documents: which tokens the model sees, and which of them are trained.

    Example -> Rendered(documents, notes)

A trained turn goes from the end of its prompt, rendered as it is served, through the token that ends the answer. A
conversation is one document if every trained turn's prompt and answer are the start of what the template writes for the
whole; otherwise (thinking dropped from earlier turns) each trained turn is a document of its own, as it is served.
What cannot be rendered this way is refused: a mask is never guessed.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from copy import copy
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np

from tunesmith.core.errors import InputError
from tunesmith.core.types import Document, Example, Json
from tunesmith.data.chat_template.assistant_spans import FOREIGN, STRUCTURAL, Turn, check_written, find_turn, notes_on
from tunesmith.data.chat_template.conversation import Chat, Variables, refuse_unasked
from tunesmith.data.chat_template.encode import Encoded, MarkedText, bad_tokens, encode, plain_runs
from tunesmith.data.chat_template.template import ChatTemplate, find_templates
from tunesmith.data.chat_template.template_probe import Protocol, probe
from tunesmith.data.chat_template.tracked_str import literal, origin_of
from tunesmith.data.tokenizer.added_tokens import new_tokens
from tunesmith.data.tokenizer.chat_tokenizer import ChatTokenizer

PER_TURN = "one document per assistant turn: the template writes earlier turns differently"
BOUNDARY = "an answer begins with text that the tokenizer joins to the prompt: kept apart, as served"
CUT_OFF = "the messages after the last trained answer are left out: the template writes it differently before them"
APPENDED = "the template closes an answer with no end token: one is appended"


@dataclass(frozen=True)
class Rendered:
    """The documents of a row, and what there is to say about it; a note has the same words for every row."""

    documents: tuple[Document, ...]
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, eq=False)
class Draft:
    """A row as text that is not encoded yet: all of it (`whole`), or one trained turn after the other."""

    example: Example
    turns: tuple[Turn, ...] = ()
    chat: Chat | None = None  # None for plain text
    whole: MarkedText | None = None
    problem: InputError | None = None  # why it cannot be rendered
    rejected: Draft | None = None  # the other side of a pair

    def runs(self) -> Iterator[tuple[str, bool]]:
        if self.rejected is not None:
            yield from self.rejected.runs()
        for text in [turn.marked for turn in self.turns] if self.whole is None else [self.whole]:
            yield from plain_runs(text, cut=len(self.example.prompt or ""))


class Renderer:
    """What the tokenizer and the chat template of a model make of examples.

    `end_ids`: tokens that end an answer, the trained one first. `control_ids`: tokens that no text of a row makes, and
    structural ones. `fingerprint`: sha256 over all that documents depend on, dates aside.
    """

    def __init__(
        self,
        tokenizer: ChatTokenizer,
        templates: Mapping[str, ChatTemplate] | None = None,
        variables: Mapping[str, Any] | None = None,
    ) -> None:
        """`templates`: "default" and perhaps "tool_use", for rows with tools. `variables`: what templates may be told,
        such as {"enable_thinking": False}; prompts and answers are rendered with the same. InputError for a name that
        no template looks up."""
        self.tokenizer, self.templates = tokenizer, dict(templates or {})
        self._given_end: int | None = None
        refuse_unasked(variables or {}, self.templates.values(), tokenizer.named)
        self._variables = Variables({**tokenizer.named, **(variables or {})})
        self._protocols = {
            name: probe(template, tokenizer, self._variables) for name, template in self.templates.items()
        }
        ends = [end for protocol in self._protocols.values() for end in protocol.end_ids]
        self.end_ids: tuple[int, ...] = tuple(dict.fromkeys(ends + list(tokenizer.end_ids)))
        self.control_ids = tokenizer.control_ids
        sources = [tokenizer.sha256, {name: template.source for name, template in self.templates.items()}]
        self.fingerprint = hashlib.sha256(json.dumps([*sources, self._variables.plain]).encode()).hexdigest()

    @classmethod
    def from_folder(
        cls,
        folder: Path,
        *,
        template: Path | None = None,
        now: datetime,
        variables: Mapping[str, Any] | None = None,
        add_tokens: Sequence[str] = (),
    ) -> Renderer:
        """`template`: a file to use instead of the model's own. `now`: the date in templates. Raises InputError."""
        tokenizer, templates = ChatTokenizer.from_folder(folder), find_templates(folder, template, now)
        if add_tokens:
            new = new_tokens(tokenizer, add_tokens, templates.values())
            tokenizer = ChatTokenizer.from_folder(folder, new)
        return cls(tokenizer, templates, variables)

    @property
    def has_template(self) -> bool:
        return bool(self.templates)

    @property
    def dated(self) -> bool:
        """A template asks what day it is."""
        return any("strftime_now" in template.source for template in self.templates.values())

    def decode(self, tokens: Iterable[int]) -> str:
        return self.tokenizer.decode(tokens)

    def text_tokens(self, text: str) -> list[int]:
        """Plain text, nothing around it."""
        return list(self.tokenizer.encode(text, at_start=True))

    def text_parts(self, text: str, known: list[int] | None = None) -> Iterator[Sequence[int] | np.ndarray]:
        """The ids of a plain text as a document, part by part, so that a text of any length takes little memory.
        `known`: those of the text, if it is encoded already."""
        yield self.tokenizer.bos
        if known is None:
            yield from self.tokenizer.text_parts(text)
        else:
            yield self.tokenizer.checked(known)
        yield (self.text_end,)

    def many_texts(self, texts: Sequence[str]) -> list[Iterator[Sequence[int] | np.ndarray]]:
        """`text_parts` of each text; what is not too long is encoded here and now, on all cores."""
        known = self.tokenizer.many(texts)
        return [self.text_parts(text, known.get(text)) for text in texts]

    def as_wanted(self, messages: Sequence[Json], tools: Sequence[Json] = ()) -> list[Json]:
        """The messages as they reach the template: what to hand to another renderer to get the same text."""
        return self._chat(messages, tools)[0].messages

    def prompt(self, messages: Sequence[Json], tools: Sequence[Json] = ()) -> tuple[int, ...]:
        """Ids of a conversation with the start of an answer after it, as it is served. Raises InputError."""
        chat, _ = self._chat(messages, tools)
        text = MarkedText(chat.render(len(messages), prompt=True), self.tokenizer, chat.assistants)
        return tuple(encode(text).ids)

    def documents(self, example: Example) -> Rendered:
        """No documents if no turn has a weight. Raises InputError with the row's id."""
        return self.finish(self.draft(example))

    def drafts(self, examples: Sequence[Example]) -> list[Draft]:
        """Many rows for `finish`; their text is encoded here, on all cores."""
        drafts = [self.draft(example) for example in examples]
        self.tokenizer.encode_ahead(run for draft in drafts for run in draft.runs())
        return drafts

    def finish(self, draft: Draft) -> Rendered:
        """See `documents`."""
        if draft.rejected is None:
            return self._finish(draft)
        chosen, rejected = self._finish(draft), self._finish(draft.rejected)
        return Rendered(_pair(chosen.documents, rejected.documents), chosen.notes + rejected.notes)

    def _finish(self, draft: Draft) -> Rendered:
        try:
            if draft.problem is not None:
                raise draft.problem
            if draft.chat is not None:
                rendered = self._conversation(draft.chat, draft)
            else:
                rendered = Rendered(()) if draft.whole is None else self._text(draft.example, draft.whole)
            if draft.example.banned:
                return replace(rendered, documents=tuple(replace(one, side="banned") for one in rendered.documents))
            return rendered
        except InputError as error:
            raise InputError(error.what, where=draft.example.id, fix=error.fix) from error

    def draft(self, example: Example) -> Draft:
        """One row for `finish`, nothing encoded yet."""
        if example.rejected is not None:
            chosen, rejected = (self.draft(one) for one in (replace(example, rejected=None), example.rejected))
            return replace(chosen, example=example, rejected=rejected)
        try:
            return self._drafted_turns(example) if example.text is None else self._drafted_text(example)
        except InputError as error:
            return Draft(example, problem=error)

    # ---- plain text

    def _drafted_text(self, example: Example) -> Draft:
        text, prompt = example.text or "", example.prompt or ""
        if not text:
            raise InputError("the text is empty", fix="drop the row")
        both = literal(prompt, origin_of(0, "content")) + literal(text, origin_of(1, "content"))
        return Draft(example, whole=MarkedText(both, self.tokenizer, {1} if prompt else ()))

    def _text(self, example: Example, marked: MarkedText) -> Rendered:
        """All is trained but the first token, or the prompt, which is encoded alone as it is served. The rest then is
        an answer: its structural tokens stay tokens."""
        cut = len(example.prompt or "")
        encoded = encode(marked, cut=cut)
        tokens = [*self.tokenizer.bos, *encoded.ids, self.text_end]
        begin = len(self.tokenizer.bos) + _place(encoded, cut) if cut else 1
        trained = [(begin, len(tokens), 1.0)]
        if example.banned:
            shift = len(self.tokenizer.bos)
            bad = bad_tokens(encoded, cut, len(marked.plain), (example.text or "").strip(), example.banned)
            trained = [(max(begin, start + shift), end + shift, 1.0) for start, end in bad]
        document = _document(example.id, tokens, trained)
        notes = {FOREIGN: marked.foreign, STRUCTURAL: marked.structural}
        return Rendered((document,), tuple(note for note, holds in notes.items() if holds))

    def ending_texts_in(self, token: int) -> Renderer:
        """The same, but for the token that ends a plain text: the tokenizer's eos if nothing else is said."""
        other = copy(self)
        other._given_end = token
        return other

    @property
    def text_end(self) -> int:
        """The token that ends a plain text. Raises InputError if there is none."""
        if self._given_end is not None:
            return self._given_end
        if self.tokenizer.eos_id is not None:
            return self.tokenizer.eos_id
        if not self.end_ids:
            raise InputError("the tokenizer names no token to end a text with", fix="set eos_token in its config")
        return self.end_ids[0]

    # ---- conversations

    def _chat(self, messages: Sequence[Json], tools: Sequence[Json]) -> tuple[Chat, Protocol]:
        name = "tool_use" if tools and "tool_use" in self.templates else "default"
        if name not in self.templates:
            fix = "give one as `template`, or write rows with prompt and completion"
            raise InputError("the model has no chat template", fix=fix)
        protocol = self._protocols[name]
        return Chat(self.templates[name], messages, tools, self._variables, protocol.habits), protocol

    def _drafted_turns(self, example: Example) -> Draft:
        trained = [(i, weight) for i, weight in enumerate(example.turn_weights) if weight > 0]
        if not trained:
            return Draft(example)
        chat, protocol = self._chat(example.messages, example.tools)
        ends = (protocol.end_ids, self.end_ids)
        turns = tuple(find_turn(chat, self.tokenizer, i, weight, ends) for i, weight in trained)
        return Draft(example, turns, chat, self._whole(chat, turns))

    def _conversation(self, chat: Chat, draft: Draft) -> Rendered:
        turns, example = list(draft.turns), draft.example
        whole = None if draft.whole is None else encode(draft.whole)
        if whole is not None and all(whole.tokens_before(at) is not None for t in turns for at in (t.start, t.end)):
            check_written(chat, whole.text, chat.stock(len(chat.messages)), len(chat.messages))
            spans = [span for turn in turns for span in _trained(example, whole, turn)]
            return Rendered((_document(example.id, whole.ids, spans),), tuple(notes_on(chat, whole.text, turns)))
        notes = [PER_TURN] if len(turns) > 1 else []
        notes += [CUT_OFF] if turns[-1].message < len(chat.messages) - 1 else []
        documents = [self._alone(example, chat, turn, notes) for turn in turns]
        return Rendered(tuple(documents), tuple(dict.fromkeys(notes)))

    def _whole(self, chat: Chat, turns: Sequence[Turn]) -> MarkedText | None:
        """All messages as one text; None if that differs from what is served for a trained turn."""
        text = turns[-1].marked
        if turns[-1].message < len(chat.messages) - 1:
            text = MarkedText(chat.render(len(chat.messages)), self.tokenizer, chat.assistants)
        same = all(turn.closed and text.plain.startswith(turn.marked.plain[: turn.end]) for turn in turns)
        return text if same and all(turn.spliced is None for turn in turns) else None

    def _alone(self, example: Example, chat: Chat, turn: Turn, notes: list[str]) -> Document:
        """The messages up to a turn as a document; adds to the notes."""
        check_written(chat, turn.marked, turn.stock(chat), turn.message + 1)
        encoded = encode(turn.marked)
        if encoded.tokens_before(turn.start) is None:
            encoded = encode(turn.marked, cut=turn.start)
            notes.append(BOUNDARY)
        notes += notes_on(chat, turn.marked, [turn])
        tokens, spans = encoded.ids, _trained(example, encoded, turn)
        if not turn.closed:
            spans += [] if example.banned else [(len(tokens), len(tokens) + 1, turn.weight)]
            tokens = [*tokens, self.text_end]
            notes.append(APPENDED)
        return _document(example.id, tokens, spans)


def _trained(example: Example, encoded: Encoded, turn: Turn) -> list[tuple[int, int, float]]:
    """(first token, behind the last one, weight) of what is trained of a turn: all of it, or what is bad in it."""
    if not example.banned:
        return [(_place(encoded, turn.start), _place(encoded, turn.end), turn.weight)]
    said, own = (
        example.messages[turn.message]["content"].strip(),
        [s for s in example.banned if s.message == turn.message],
    )
    return [(start, end, turn.weight) for start, end in bad_tokens(encoded, turn.start, turn.end, said, own)]


def _place(encoded: Encoded, character: int) -> int:
    place = encoded.tokens_before(character)
    if place is None:
        raise InputError("the tokenizer swallows the place where an answer begins")
    return place


def _document(row: str, tokens: Sequence[int], spans: Sequence[tuple[int, int, float]]) -> Document:
    weights_L = np.zeros(len(tokens), dtype=np.float32)
    for start, end, weight in spans:
        if start < 1:
            fix = "put a user message first, or `train: false` on the answer"
            raise InputError("nothing stands before the answer", fix=fix)
        weights_L[start:end] = weight
    return Document(row, np.array(tokens, dtype=np.int32), weights_L)


def _pair(chosen: Sequence[Document], rejected: Sequence[Document]) -> tuple[Document, ...]:
    """The two sides as neighbours. Raises InputError for a side that is not one document, and for equal ids."""
    if len(chosen) != 1 or len(rejected) != 1:
        what = "a side holds several trained answers that the chat template writes as several documents"
        where = (*chosen, *rejected)[0].id if chosen or rejected else ""
        raise InputError(what, where=where, fix="give one answer a side, or `train: false` for the earlier ones")
    one, other = replace(chosen[0], side="chosen"), replace(rejected[0], side="rejected")
    if np.array_equal(one.tokens_L, other.tokens_L):
        raise InputError("the chat template writes both sides alike", where=one.id, fix="drop the row")
    return one, other
