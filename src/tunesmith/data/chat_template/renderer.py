"""Examples to documents: which tokens the model sees, and which of them are trained.

    Example -> Rendered(documents, notes)

A trained turn goes from the end of its prompt, rendered as it is served, through the token that
ends the answer. A conversation is one document if every trained turn's prompt and answer are the
start of what the template writes for the whole; otherwise (thinking dropped from earlier turns)
each trained turn is a document of its own, as it is served. What cannot be rendered this way is
refused: a mask is never guessed."""

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
from tunesmith.data.chat_template.assistant_spans import (
    CONTROL_LIKE_TEXT,
    STRUCTURAL,
    AssistantSpan,
    check_render,
    collect_render_notes,
    find_assistant_span,
)
from tunesmith.data.chat_template.conversation import (
    Conversation,
    TemplateVariables,
    refuse_unused_kwargs,
)
from tunesmith.data.chat_template.encode import (
    EncodedText,
    TrackedText,
    encode,
    find_banned_token_spans,
    iter_text_runs,
)
from tunesmith.data.chat_template.template import ChatTemplate, find_templates
from tunesmith.data.chat_template.template_probe import TemplateProtocol, probe_template
from tunesmith.data.chat_template.tracked_str import make_origin, track_str
from tunesmith.data.tokenizer.added_tokens import make_new_tokens
from tunesmith.data.tokenizer.chat_tokenizer import ChatTokenizer

PER_TURN = "one document per assistant turn: the template writes earlier turns differently"
BOUNDARY = (
    "an answer begins with text that the tokenizer joins to the prompt: kept apart, as served"
)
CUT_OFF = "the messages after the last trained answer are left out: the template writes it differently before them"
END_TOKEN_APPENDED = "the template closes an answer with no end token: one is appended"


@dataclass(frozen=True)
class RenderedRow:
    """The documents of a row, and what there is to say about it; a note has the same words for
    every row."""

    documents: tuple[Document, ...]
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, eq=False)
class RenderDraft:
    """A row as text that is not encoded yet: all of it (`whole`), or one trained turn after the
    other."""

    example: Example
    turns: tuple[AssistantSpan, ...] = ()
    chat: Conversation | None = None  # None for plain text
    full_text: TrackedText | None = None
    error: InputError | None = None  # why it cannot be rendered
    rejected: RenderDraft | None = None  # the other side of a pair

    def iter_runs(self) -> Iterator[tuple[str, bool]]:
        if self.rejected is not None:
            yield from self.rejected.iter_runs()
        for text in (
            [turn.text for turn in self.turns] if self.full_text is None else [self.full_text]
        ):
            yield from iter_text_runs(text, cut=len(self.example.prompt or ""))


class Renderer:
    """What the tokenizer and the chat template of a model make of examples.

    `end_ids`: tokens that end an answer, the trained one first. `control_ids`: tokens that no text
    of a row makes, and structural ones. `fingerprint`: sha256 over all that documents depend on,
    dates aside."""

    def __init__(
        self,
        tokenizer: ChatTokenizer,
        templates: Mapping[str, ChatTemplate] | None = None,
        variables: Mapping[str, Any] | None = None,
    ) -> None:
        """`templates`: "default" and perhaps "tool_use", for rows with tools. `variables`: what
        templates may be told, such as {"enable_thinking": False}; prompts and answers are rendered
        with the same. InputError for a name that no template looks up."""
        self.tokenizer, self.templates = tokenizer, dict(templates or {})
        self._end_override: int | None = None
        refuse_unused_kwargs(variables or {}, self.templates.values(), tokenizer.special_tokens)
        self._variables = TemplateVariables({**tokenizer.special_tokens, **(variables or {})})
        self._protocols = {
            name: probe_template(template, tokenizer, self._variables)
            for name, template in self.templates.items()
        }
        ends = [end for protocol in self._protocols.values() for end in protocol.end_ids]
        self.end_ids: tuple[int, ...] = tuple(dict.fromkeys(ends + list(tokenizer.end_ids)))
        self.control_ids = tokenizer.control_ids
        sources = [
            tokenizer.sha256,
            {name: template.source for name, template in self.templates.items()},
        ]
        self.fingerprint = hashlib.sha256(
            json.dumps([*sources, self._variables.plain]).encode()
        ).hexdigest()

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
        """`template`: a file to use instead of the model's own. `now`: the date in templates.
        Raises InputError."""
        tokenizer, templates = (
            ChatTokenizer.from_folder(folder),
            find_templates(folder, template, now),
        )
        if add_tokens:
            added_tokens = make_new_tokens(tokenizer, add_tokens, templates.values())
            tokenizer = ChatTokenizer.from_folder(folder, added_tokens)
        return cls(tokenizer, templates, variables)

    @property
    def has_template(self) -> bool:
        return bool(self.templates)

    @property
    def has_date(self) -> bool:
        """A template asks what day it is."""
        return any("strftime_now" in template.source for template in self.templates.values())

    def decode(self, tokens: Iterable[int]) -> str:
        return self.tokenizer.decode(tokens)

    def encode_text(self, text: str) -> list[int]:
        """Plain text, nothing around it."""
        return list(self.tokenizer.encode(text, is_start=True))

    def iter_text_ids(
        self, text: str, ids: list[int] | None = None
    ) -> Iterator[Sequence[int] | np.ndarray]:
        """The ids of a plain text as a document, part by part, so that a text of any length takes
        little memory. `known`: those of the text, if it is encoded already."""
        yield self.tokenizer.bos_ids
        if ids is None:
            yield from self.tokenizer.iter_text_ids(text)
        else:
            yield self.tokenizer.check_ids(ids)
        yield (self.text_end_id,)

    def iter_texts_ids(self, texts: Sequence[str]) -> list[Iterator[Sequence[int] | np.ndarray]]:
        """`text_parts` of each text; what is not too long is encoded here and now, on all cores."""
        encoded_texts = self.tokenizer.encode_texts(texts)
        return [self.iter_text_ids(text, encoded_texts.get(text)) for text in texts]

    def normalize_messages(
        self, messages: Sequence[Json], tools: Sequence[Json] = ()
    ) -> list[Json]:
        """The messages as they reach the template: what to hand to another renderer to get the same
        text."""
        return self._make_conversation(messages, tools)[0].messages

    def encode_prompt(
        self, messages: Sequence[Json], tools: Sequence[Json] = ()
    ) -> tuple[int, ...]:
        """Ids of a conversation with the start of an answer after it, as it is served. Raises
        InputError."""
        chat, _ = self._make_conversation(messages, tools)
        text = TrackedText(
            chat.render(len(messages), add_generation_prompt=True),
            self.tokenizer,
            chat.assistant_indices,
        )
        return tuple(encode(text).ids)

    def render_documents(self, example: Example) -> RenderedRow:
        """No documents if no turn has a weight. Raises InputError with the row's id."""
        return self.finish_draft(self.make_draft(example))

    def make_drafts(self, examples: Sequence[Example]) -> list[RenderDraft]:
        """Many rows for `finish`; their text is encoded here, on all cores."""
        drafts = [self.make_draft(example) for example in examples]
        self.tokenizer.encode_ahead(run for draft in drafts for run in draft.iter_runs())
        return drafts

    def finish_draft(self, draft: RenderDraft) -> RenderedRow:
        """See `documents`."""
        if draft.rejected is None:
            return self._finish_side(draft)
        chosen, rejected = self._finish_side(draft), self._finish_side(draft.rejected)
        return RenderedRow(
            _make_pair(chosen.documents, rejected.documents), chosen.notes + rejected.notes
        )

    def _finish_side(self, draft: RenderDraft) -> RenderedRow:
        try:
            if draft.error is not None:
                raise draft.error
            if draft.chat is not None:
                rendered = self._render_conversation(draft.chat, draft)
            else:
                rendered = (
                    RenderedRow(())
                    if draft.full_text is None
                    else self._render_text(draft.example, draft.full_text)
                )
            if draft.example.banned_spans:
                return replace(
                    rendered,
                    documents=tuple(
                        replace(document, side="banned") for document in rendered.documents
                    ),
                )
            return rendered
        except InputError as error:
            raise InputError(error.message, where=draft.example.id, fix=error.fix) from error

    def make_draft(self, example: Example) -> RenderDraft:
        """One row for `finish`, nothing encoded yet."""
        if example.rejected is not None:
            chosen, rejected = (
                self.make_draft(side)
                for side in (replace(example, rejected=None), example.rejected)
            )
            return replace(chosen, example=example, rejected=rejected)
        try:
            return self._draft_turns(example) if example.text is None else self._draft_text(example)
        except InputError as error:
            return RenderDraft(example, error=error)

    # ---- plain text

    def _draft_text(self, example: Example) -> RenderDraft:
        text, prompt = example.text or "", example.prompt or ""
        if not text:
            raise InputError("the text is empty", fix="drop the row")
        tracked = track_str(prompt, make_origin(0, "content")) + track_str(
            text, make_origin(1, "content")
        )
        return RenderDraft(
            example, full_text=TrackedText(tracked, self.tokenizer, {1} if prompt else ())
        )

    def _render_text(self, example: Example, tracked_text: TrackedText) -> RenderedRow:
        """All is trained but the first token, or the prompt, which is encoded alone as it is
        served. The rest then is an answer: its structural tokens stay tokens."""
        cut = len(example.prompt or "")
        encoded = encode(tracked_text, cut=cut)
        tokens = [*self.tokenizer.bos_ids, *encoded.ids, self.text_end_id]
        trained_start = len(self.tokenizer.bos_ids) + _get_token_index(encoded, cut) if cut else 1
        trained_spans = [(trained_start, len(tokens), 1.0)]
        if example.banned_spans:
            shift = len(self.tokenizer.bos_ids)
            banned_spans = find_banned_token_spans(
                encoded,
                cut,
                len(tracked_text.plain),
                (example.text or "").strip(),
                example.banned_spans,
            )
            trained_spans = [
                (max(trained_start, start + shift), end + shift, 1.0) for start, end in banned_spans
            ]
        document = _make_document(example.id, tokens, trained_spans)
        notes = {
            CONTROL_LIKE_TEXT: tracked_text.has_control_like_text,
            STRUCTURAL: tracked_text.has_structural_tokens,
        }
        return RenderedRow(
            (document,), tuple(note for note, is_present in notes.items() if is_present)
        )

    def with_text_end(self, token: int) -> Renderer:
        """The same, but for the token that ends a plain text: the tokenizer's eos if nothing else
        is said."""
        renderer = copy(self)
        renderer._end_override = token
        return renderer

    @property
    def text_end_id(self) -> int:
        """The token that ends a plain text. Raises InputError if there is none."""
        if self._end_override is not None:
            return self._end_override
        if self.tokenizer.eos_id is not None:
            return self.tokenizer.eos_id
        if not self.end_ids:
            raise InputError(
                "the tokenizer names no token to end a text with", fix="set eos_token in its config"
            )
        return self.end_ids[0]

    # ---- conversations

    def _make_conversation(
        self, messages: Sequence[Json], tools: Sequence[Json]
    ) -> tuple[Conversation, TemplateProtocol]:
        name = "tool_use" if tools and "tool_use" in self.templates else "default"
        if name not in self.templates:
            fix = "give one as `template`, or write rows with prompt and completion"
            raise InputError("the model has no chat template", fix=fix)
        protocol = self._protocols[name]
        return Conversation(
            self.templates[name], messages, tools, self._variables, protocol.quirks
        ), protocol

    def _draft_turns(self, example: Example) -> RenderDraft:
        trained_turns = [(i, weight) for i, weight in enumerate(example.turn_weights) if weight > 0]
        if not trained_turns:
            return RenderDraft(example)
        chat, protocol = self._make_conversation(example.messages, example.tools)
        ends = (protocol.end_ids, self.end_ids)
        turns = tuple(
            find_assistant_span(chat, self.tokenizer, i, weight, ends)
            for i, weight in trained_turns
        )
        return RenderDraft(example, turns, chat, self._join_turns(chat, turns))

    def _render_conversation(self, chat: Conversation, draft: RenderDraft) -> RenderedRow:
        turns, example = list(draft.turns), draft.example
        encoded = None if draft.full_text is None else encode(draft.full_text)
        if encoded is not None and all(
            encoded.count_tokens_before(character) is not None
            for t in turns
            for character in (t.start, t.end)
        ):
            check_render(
                chat, encoded.text, chat.render_plain(len(chat.messages)), len(chat.messages)
            )
            spans = [span for turn in turns for span in _find_trained_spans(example, encoded, turn)]
            return RenderedRow(
                (_make_document(example.id, encoded.ids, spans),),
                tuple(collect_render_notes(chat, encoded.text, turns)),
            )
        notes = [PER_TURN] if len(turns) > 1 else []
        notes += [CUT_OFF] if turns[-1].message_index < len(chat.messages) - 1 else []
        documents = [self._render_turn(example, chat, turn, notes) for turn in turns]
        return RenderedRow(tuple(documents), tuple(dict.fromkeys(notes)))

    def _join_turns(self, chat: Conversation, turns: Sequence[AssistantSpan]) -> TrackedText | None:
        """All messages as one text; None if that differs from what is served for a trained turn."""
        text = turns[-1].text
        if turns[-1].message_index < len(chat.messages) - 1:
            text = TrackedText(
                chat.render(len(chat.messages)), self.tokenizer, chat.assistant_indices
            )
        is_prefix = all(
            turn.has_end_token and text.plain.startswith(turn.text.plain[: turn.end])
            for turn in turns
        )
        return text if is_prefix and all(turn.splice_start is None for turn in turns) else None

    def _render_turn(
        self, example: Example, chat: Conversation, turn: AssistantSpan, notes: list[str]
    ) -> Document:
        """The messages up to a turn as a document; adds to the notes."""
        check_render(chat, turn.text, turn.render_plain(chat), turn.message_index + 1)
        encoded = encode(turn.text)
        if encoded.count_tokens_before(turn.start) is None:
            encoded = encode(turn.text, cut=turn.start)
            notes.append(BOUNDARY)
        notes += collect_render_notes(chat, turn.text, [turn])
        tokens, spans = encoded.ids, _find_trained_spans(example, encoded, turn)
        if not turn.has_end_token:
            spans += [] if example.banned_spans else [(len(tokens), len(tokens) + 1, turn.weight)]
            tokens = [*tokens, self.text_end_id]
            notes.append(END_TOKEN_APPENDED)
        return _make_document(example.id, tokens, spans)


def _find_trained_spans(
    example: Example, encoded: EncodedText, turn: AssistantSpan
) -> list[tuple[int, int, float]]:
    """(first token, behind the last one, weight) of what is trained of a turn: all of it, or what
    is bad in it."""
    if not example.banned_spans:
        return [
            (
                _get_token_index(encoded, turn.start),
                _get_token_index(encoded, turn.end),
                turn.weight,
            )
        ]
    answer, banned_spans = (
        example.messages[turn.message_index]["content"].strip(),
        [span for span in example.banned_spans if span.message == turn.message_index],
    )
    return [
        (start, end, turn.weight)
        for start, end in find_banned_token_spans(
            encoded, turn.start, turn.end, answer, banned_spans
        )
    ]


def _get_token_index(encoded: EncodedText, character: int) -> int:
    token_index = encoded.count_tokens_before(character)
    if token_index is None:
        raise InputError("the tokenizer swallows the place where an answer begins")
    return token_index


def _make_document(
    row_id: str, tokens: Sequence[int], spans: Sequence[tuple[int, int, float]]
) -> Document:
    weights_L = np.zeros(len(tokens), dtype=np.float32)
    for start, end, weight in spans:
        if start < 1:
            fix = "put a user message first, or `train: false` on the answer"
            raise InputError("nothing stands before the answer", fix=fix)
        weights_L[start:end] = weight
    return Document(row_id, np.array(tokens, dtype=np.int32), weights_L)


def _make_pair(chosen: Sequence[Document], rejected: Sequence[Document]) -> tuple[Document, ...]:
    """The two sides as neighbours. Raises InputError for a side that is not one document, and for
    equal ids."""
    if len(chosen) != 1 or len(rejected) != 1:
        message = "a side holds several trained answers that the chat template writes as several documents"
        where = (*chosen, *rejected)[0].id if chosen or rejected else ""
        raise InputError(
            message,
            where=where,
            fix="give one answer a side, or `train: false` for the earlier ones",
        )
    chosen_document, rejected_document = (
        replace(chosen[0], side="chosen"),
        replace(rejected[0], side="rejected"),
    )
    if np.array_equal(chosen_document.tokens_L, rejected_document.tokens_L):
        raise InputError(
            "the chat template writes both sides alike",
            where=chosen_document.id,
            fix="drop the row",
        )
    return chosen_document, rejected_document
