"""Render examples to documents: token ids, and the loss weight of each token.

    Renderer.render(example) -> RenderedRow (documents, notes)
    Renderer.render_rows(examples) -> one RenderedRow for each, encoded in one batch

A trained turn runs from the end of its prompt, rendered as it is served, through the token that
ends the answer. A conversation is one document if each trained turn's prompt and answer are a
prefix of the full render. Otherwise (Qwen3 drops the thinking of earlier turns) each trained turn
is one document, rendered as it is served. A row that cannot be rendered this way is refused: a mask
is never guessed."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from copy import copy
from dataclasses import dataclass, replace
from datetime import datetime
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np

from tunesmith.core.errors import InputError
from tunesmith.core.types import Document, Example, Json, RowWeight
from tunesmith.data.chat_template.assistant_spans import (
    AssistantSpan,
    TokenSpan,
    TrainedRoles,
    find_assistant_spans,
    find_banned_token_spans,
    find_message_spans,
    find_spans_in_full,
    find_token_spans,
    render_turns,
    select_messages,
    weigh_messages,
)
from tunesmith.data.chat_template.conversation import (
    Conversation,
    TemplateVariables,
    refuse_unused_kwargs,
)
from tunesmith.data.chat_template.encode import EncodedText, TrackedText, encode
from tunesmith.data.chat_template.render_notes import (
    BOUNDARY,
    CONTROL_LIKE_TEXT,
    CUT_OFF,
    END_TOKEN_APPENDED,
    PER_TURN,
    STRUCTURAL,
    check_render,
    collect_render_notes,
)
from tunesmith.data.chat_template.template import ChatTemplate, find_templates
from tunesmith.data.chat_template.template_probe import TemplateProtocol, probe_template
from tunesmith.data.chat_template.tracked_str import make_origin, track_str
from tunesmith.data.tokenizer.added_tokens import make_new_tokens
from tunesmith.data.tokenizer.chat_tokenizer import ChatTokenizer


@dataclass(frozen=True)
class RenderedRow:
    """The documents of a row and notes on its render, or the error of a row that has none."""

    example: Example
    documents: tuple[Document, ...] = ()
    notes: tuple[str, ...] = ()
    error: InputError | None = None


@dataclass(frozen=True, eq=False)
class _Draft:
    """An example as text, before encoding; one side of a pair. The text is `full_text`, or that of
    each span where no text holds them all. `weights` are those of the messages."""

    example: Example
    chat: Conversation | None = None  # None for plain text
    weights: tuple[float, ...] = ()
    spans: tuple[AssistantSpan, ...] = ()
    full_text: TrackedText | None = None
    error: InputError | None = None

    def iter_runs(self) -> Iterator[tuple[str, bool]]:
        """Yield the plain runs to encode (see TrackedText.iter_runs)."""
        texts = [span.text for span in self.spans]
        for text in texts if self.full_text is None else [self.full_text]:
            yield from text.iter_runs(cut=len(self.example.prompt or ""))


class Renderer:
    """The tokenizer and chat templates of a model, applied to examples.

    `end_ids` are the tokens that end an answer, the trained one first. `control_ids` are the tokens
    that text of a row cannot make, structural ones included. `fingerprint` is a sha256 over
    everything that documents depend on, except dates."""

    def __init__(
        self,
        tokenizer: ChatTokenizer,
        templates: Mapping[str, ChatTemplate] | None = None,
        variables: Mapping[str, Any] | None = None,
    ) -> None:
        """`templates` are named "default" and "tool_use" (for rows with tools). `variables` are
        passed to them for prompts and answers, such as {"enable_thinking": False}. Raises
        InputError for a variable that no template uses."""
        self.tokenizer = tokenizer
        self.templates = dict(templates or {})
        self._text_end_override: int | None = None
        self._train_on: TrainedRoles = "answers"
        refuse_unused_kwargs(variables or {}, self.templates.values(), tokenizer.special_tokens)
        self.variables = dict(variables or {})
        self._variables = TemplateVariables({**tokenizer.special_tokens, **(variables or {})})
        self._protocols: dict[str, TemplateProtocol] = {}
        end_ids: list[int] = []
        for name, template in self.templates.items():
            self._protocols[name] = probe_template(template, tokenizer, self._variables)
            end_ids += self._protocols[name].end_ids
        self.end_ids = tuple(dict.fromkeys([*end_ids, *tokenizer.end_ids]))
        self.control_ids = tokenizer.control_ids
        sources = {name: template.source for name, template in self.templates.items()}
        identity = [tokenizer.sha256, sources, self._variables.plain]
        self.fingerprint = hashlib.sha256(json.dumps(identity).encode()).hexdigest()

    @classmethod
    def from_folder(
        cls,
        folder: Path,
        *,
        template: Path | None = None,
        now: datetime,
        variables: Mapping[str, Any] | None = None,
        add_tokens: Sequence[str] = (),
        embedding_rows: int | None = None,
    ) -> Renderer:
        """Load the tokenizer and chat templates of a model folder.

        `template` is a file that replaces the model's own, `now` the date that templates see,
        `embedding_rows` the model's vocab_size. Raises InputError."""
        tokenizer = ChatTokenizer.from_folder(folder, embedding_rows=embedding_rows)
        templates = find_templates(folder, template, now)
        if add_tokens:
            new_tokens = make_new_tokens(tokenizer, add_tokens, templates.values())
            tokenizer = ChatTokenizer.from_folder(folder, new_tokens, embedding_rows)
        return cls(tokenizer, templates, variables)

    @property
    def has_template(self) -> bool:
        return bool(self.templates)

    @property
    def has_date(self) -> bool:
        """Whether a template prints the current date."""
        return any("strftime_now" in template.source for template in self.templates.values())

    def decode(self, tokens: Iterable[int]) -> str:
        return self.tokenizer.decode(tokens)

    def encode_text(self, text: str) -> list[int]:
        """Return the ids of plain text, without BOS and EOS."""
        return list(self.tokenizer.encode(text, is_start=True))

    def iter_text_ids(
        self, text: str, ids: list[int] | None = None
    ) -> Iterator[Sequence[int] | np.ndarray]:
        """Yield the ids of a text as a document, part by part, so that long texts take little
        memory. `ids` are those of the text if it is encoded already."""
        yield self.tokenizer.bos_ids
        if ids is None:
            yield from self.tokenizer.iter_text_ids(text)
        else:
            yield self.tokenizer.check_ids(ids)
        yield (self.text_end_id,)

    def iter_texts_ids(self, texts: Sequence[str]) -> list[Iterator[Sequence[int] | np.ndarray]]:
        """Return `iter_text_ids` of each text; short texts are encoded now, on all cores."""
        encoded_texts = self.tokenizer.encode_texts(texts)
        return [self.iter_text_ids(text, encoded_texts.get(text)) for text in texts]

    def normalize_messages(
        self, messages: Sequence[Json], tools: Sequence[Json] = ()
    ) -> list[Json]:
        """Return the messages as the template receives them: another renderer of the same template
        writes the same text for them."""
        return self._make_conversation(messages, tools)[0].messages

    def encode_prompt(
        self, messages: Sequence[Json], tools: Sequence[Json] = ()
    ) -> tuple[int, ...]:
        """Return the ids of a conversation with the generation prompt, as it is served. Raises
        InputError."""
        chat, _ = self._make_conversation(messages, tools)
        prompt = chat.render(len(messages), add_generation_prompt=True)
        return tuple(encode(TrackedText(prompt, self.tokenizer, chat.assistant_indices)).ids)

    def render_text(
        self, messages: Sequence[Json], tools: Sequence[Json] = (), *, has_prompt: bool = False
    ) -> str:
        """Return the text of a conversation, with the generation prompt if `has_prompt`. Raises
        InputError."""
        chat, _ = self._make_conversation(messages, tools)
        return chat.render_plain(len(messages), add_generation_prompt=has_prompt)

    def find_unused(
        self, key: str, messages: Sequence[Json], tools: Sequence[Json] = ()
    ) -> list[int]:
        """Return the indices of messages whose `key` the template does not use: without those of
        their role, the prompt is the same. Raises InputError."""
        by_role: dict[str, list[int]] = {}
        for index, message in enumerate(messages):
            if key in message:
                by_role.setdefault(message["role"], []).append(index)
        unused: list[int] = []
        for indices in by_role.values():
            others = list(messages)
            for index in indices:
                others[index] = {k: v for k, v in messages[index].items() if k != key}
            if self._is_same_prompt(messages, others, tools):
                unused += indices
        return sorted(unused)

    def _is_same_prompt(
        self, messages: Sequence[Json], others: Sequence[Json], tools: Sequence[Json]
    ) -> bool:
        """Return whether the prompt of other messages is the same; one that is refused is not."""
        text = self.render_text(messages, tools, has_prompt=True)
        try:
            return self.render_text(others, tools, has_prompt=True) == text
        except InputError:
            return False

    # ---- rows

    def render(self, example: Example) -> RenderedRow:
        """Render one row. It has no documents if no turn has a weight, and two if it is a pair.
        Raises InputError with the row's id."""
        (row,) = self.render_rows([example])
        if row.error is not None:
            raise row.error
        return row

    def render_rows(self, examples: Sequence[Example]) -> list[RenderedRow]:
        """Render many rows; their text is encoded in one batch, on all cores. A row that cannot be
        rendered has an `error`."""
        drafts = [self._make_drafts(example) for example in examples]
        if len(examples) > 1:
            sides = chain.from_iterable(drafts)
            self.tokenizer.encode_ahead(run for side in sides for run in side.iter_runs())
        return [self._encode_row(*row) for row in zip(examples, drafts, strict=True)]

    def _make_drafts(self, example: Example) -> list[_Draft]:
        """Lay out the text of a row, or of both sides of a pair (chosen, rejected)."""
        drafts: list[_Draft] = []
        for side in (example, example.rejected):
            if side is None:
                continue
            try:
                make_draft = self._make_chat_draft if side.text is None else self._make_text_draft
                drafts.append(make_draft(side))
            except InputError as error:
                drafts.append(_Draft(side, error=error))
        return drafts

    def _encode_row(self, example: Example, drafts: Sequence[_Draft]) -> RenderedRow:
        sides: list[tuple[Document, ...]] = []
        notes: list[str] = []
        draft = drafts[0]
        try:
            for draft in drafts:
                documents, side_notes = self._encode_draft(draft)
                sides.append(documents)
                notes += side_notes
        except InputError as error:
            located = InputError(error.message, where=draft.example.id, fix=error.fix)
            return RenderedRow(example, error=located)
        if example.label is not None:
            return _label_sides(example, sides, notes)
        if len(sides) == 1:
            return RenderedRow(example, sides[0], tuple(notes))
        try:
            return RenderedRow(example, _make_pair(*sides), tuple(notes))
        except InputError as error:
            return RenderedRow(example, error=error)

    def _encode_draft(self, draft: _Draft) -> tuple[tuple[Document, ...], list[str]]:
        """Return the documents and notes of one side."""
        if draft.error is not None:
            raise draft.error
        if draft.chat is not None:
            documents, notes = self._encode_chat(draft.chat, draft)
        elif draft.full_text is not None:
            documents, notes = self._encode_plain_text(draft.example, draft.full_text)
        else:
            return (), []
        if draft.example.banned_spans:
            documents = [replace(document, side="banned") for document in documents]
        return tuple(documents), list(dict.fromkeys(notes))

    # ---- plain text

    def _make_text_draft(self, example: Example) -> _Draft:
        if not example.text:
            raise InputError("the text is empty", fix="drop the row")
        prompt = track_str(example.prompt or "", make_origin(0, "content"))
        tracked = prompt + track_str(example.text, make_origin(1, "content"))
        assistant_indices = {1} if prompt else ()
        full_text = TrackedText(tracked, self.tokenizer, assistant_indices)
        return _Draft(example, full_text=full_text)

    def _encode_plain_text(
        self, example: Example, text: TrackedText
    ) -> tuple[list[Document], list[str]]:
        """Train everything but the first token. A prompt is not trained and encoded separately, as
        it is served; the text after it is an answer and keeps its structural tokens."""
        cut = len(example.prompt or "")
        encoded = encode(text, cut=cut)
        num_bos = len(self.tokenizer.bos_ids)
        tokens = [*self.tokenizer.bos_ids, *encoded.ids, self.text_end_id]
        trained_start = num_bos + encoded.get_token_index(cut) if cut else 1
        spans: list[TokenSpan] = [(trained_start, len(tokens), 1.0)]
        if cut and not example.banned_spans and self._train_on != "answers":
            spans = self._weigh_completion(trained_start, len(tokens))
        if example.banned_spans:
            answer = (example.text or "").strip()
            banned = find_banned_token_spans(
                encoded, cut, len(text.plain), answer, example.banned_spans
            )
            spans = [
                (max(trained_start, start + num_bos), end + num_bos, 1.0) for start, end in banned
            ]
        notes = [CONTROL_LIKE_TEXT] if text.has_control_like_text else []
        notes += [STRUCTURAL] if text.has_structural_tokens else []
        return [_make_document(example.id, tokens, spans)], notes

    def replace_text_end(self, token: int) -> Renderer:
        """Return a copy that ends plain texts with another token than the tokenizer's EOS."""
        renderer = copy(self)
        renderer._text_end_override = token
        return renderer

    def train_on(self, trained: TrainedRoles) -> Renderer:
        """Return a copy that trains other text than answers: all, or the messages of roles."""
        renderer = copy(self)
        renderer._train_on = trained
        return renderer

    def _weigh_completion(self, completion_start: int, end: int) -> list[TokenSpan]:
        """Return the trained tokens of a prompt and its completion without a chat template."""
        prompt_weight = float(self._train_on == "all" or "user" in self._train_on)
        answer_weight = float(self._train_on == "all" or "assistant" in self._train_on)
        return [(1, completion_start, prompt_weight), (completion_start, end, answer_weight)]

    @property
    def text_end_id(self) -> int:
        """The token that ends a plain text. Raises InputError if there is none."""
        if self._text_end_override is not None:
            return self._text_end_override
        if self.tokenizer.eos_id is not None:
            return self.tokenizer.eos_id
        if self.end_ids:
            return self.end_ids[0]
        raise InputError("the tokenizer has no EOS token", fix="set eos_token in its config")

    # ---- conversations

    def _make_conversation(
        self, messages: Sequence[Json], tools: Sequence[Json]
    ) -> tuple[Conversation, TemplateProtocol]:
        name = "tool_use" if tools and "tool_use" in self.templates else "default"
        if name not in self.templates:
            fix = "set `chat_template`, or use rows with prompt and completion"
            raise InputError("the model has no chat template", fix=fix)
        protocol = self._protocols[name]
        template = self.templates[name]
        chat = Conversation(template, messages, tools, self._variables, protocol.quirks)
        return chat, protocol

    def _make_chat_draft(self, example: Example) -> _Draft:
        weights = example.turn_weights
        if self._train_on != "answers" and not example.banned_spans:
            weights = weigh_messages(example, self._train_on)
        if self._train_on != "all" and not any(weight > 0 for weight in weights):
            return _Draft(example)
        chat, protocol = self._make_conversation(example.messages, example.tools)
        answer_weights = [
            weight if index in chat.assistant_indices else 0.0
            for index, weight in enumerate(weights)
        ]
        if self._is_all_trained(example) or not any(answer_weights):
            return _Draft(example, chat, weights, full_text=self._render_all(chat))
        end_ids = (protocol.end_ids, self.end_ids)
        find_spans = partial(
            find_assistant_spans,
            chat,
            self.tokenizer,
            answer_weights,
            end_ids,
            protocol.answer_tail,
        )
        try:
            full_text = self._render_all(chat)
        except InputError:
            find_spans()  # raises the error of the first answer that cannot be trained
            raise
        spans = find_spans_in_full(chat, full_text, answer_weights, end_ids)
        if spans is not None:
            return _Draft(example, chat, weights, spans, full_text)
        spans = find_spans(full_text)
        has_joined = all(span.is_served_in(full_text) for span in spans)
        return _Draft(example, chat, weights, spans, full_text if has_joined else None)

    def _render_all(self, chat: Conversation) -> TrackedText:
        rendered = chat.render(len(chat.messages))
        return TrackedText(rendered, self.tokenizer, chat.assistant_indices)

    def _is_all_trained(self, example: Example) -> bool:
        """Return whether the text of the template is trained, too."""
        return self._train_on == "all" and not example.banned_spans

    def _encode_chat(self, chat: Conversation, draft: _Draft) -> tuple[list[Document], list[str]]:
        spans = draft.spans
        example = draft.example
        if draft.full_text is not None:
            encoded = encode(draft.full_text)
            if all(_is_token_boundary(encoded, span) for span in spans):
                count = len(chat.messages)
                check_render(chat, encoded.text, chat.full_plain_text, count)
                token_spans = self._find_role_spans(encoded, draft, range(count))
                for span in spans:
                    token_spans += find_token_spans(encoded, span, example)
                document = _make_document(example.id, encoded.ids, token_spans)
                return [document], collect_render_notes(chat, encoded.text, spans)
        if spans[0].text is draft.full_text:
            spans = render_turns(chat, self.tokenizer, spans)
        rest = range(spans[-1].message_index + 1, len(chat.messages))
        rest_documents, rest_notes = self._encode_rest(draft, chat, rest)
        notes = [PER_TURN] if len(spans) > 1 else []
        notes += rest_notes
        documents: list[Document] = []
        first_message = 0
        for span in spans:
            messages = range(first_message, span.message_index)
            document, turn_notes = self._encode_turn(draft, chat, span, messages)
            documents.append(document)
            notes += turn_notes
            first_message = span.message_index
        return [*documents, *rest_documents], notes

    def _encode_rest(
        self, draft: _Draft, chat: Conversation, rest: range
    ) -> tuple[list[Document], list[str]]:
        """Return the conversation as a document in which the messages after the last trained answer
        are trained whose role is, with its notes; without such messages, no document."""
        if not self._select_roles(draft, rest):
            return [], [CUT_OFF] if rest else []
        count = len(chat.messages)
        text = self._render_all(chat)
        check_render(chat, text, chat.full_plain_text, count)
        encoded = encode(text)
        token_spans = self._find_role_spans(encoded, draft, rest)
        document = _make_document(draft.example.id, encoded.ids, token_spans)
        return [document], collect_render_notes(chat, text, [])

    def _select_roles(self, draft: _Draft, messages: range) -> dict[int, float]:
        """Return the weights of those of these messages that are trained besides answers."""
        if self._train_on == "answers" or draft.example.banned_spans:
            return {}
        roles = [message["role"] for message in draft.example.messages]
        return select_messages(draft.weights, messages, roles)

    def _find_role_spans(
        self, encoded: EncodedText, draft: _Draft, messages: range
    ) -> list[TokenSpan]:
        """Return what is trained besides answers, of these messages: nothing by default."""
        if self._train_on == "answers" or draft.example.banned_spans:
            return []
        weights = draft.weights
        if self._train_on == "all":
            set_weights = {
                index: weight
                for index, weight in enumerate(weights)
                if isinstance(weight, RowWeight)
            }
            full_span: TokenSpan = (1, len(encoded.ids), 1.0)
            return [full_span, *find_message_spans(encoded, set_weights, self.end_ids)]
        selected = self._select_roles(draft, messages)
        return find_message_spans(encoded, selected, self.end_ids)

    def _encode_turn(
        self, draft: _Draft, chat: Conversation, span: AssistantSpan, messages: range
    ) -> tuple[Document, list[str]]:
        """Return the messages up to a trained turn as one document, with its notes. Of the
        `messages` before it, those are trained whose role is."""
        example = draft.example
        check_render(chat, span.text, span.render_plain(chat), span.message_index + 1)
        notes: list[str] = []
        encoded = encode(span.text)
        if encoded.count_tokens_before(span.start) is None:
            encoded = encode(span.text, cut=span.start)
            notes.append(BOUNDARY)
        notes += collect_render_notes(chat, span.text, [span])
        tokens = encoded.ids
        token_spans = self._find_role_spans(encoded, draft, messages)
        token_spans += find_token_spans(encoded, span, example)
        if not span.has_end_token:
            if not example.banned_spans:
                token_spans.append((len(tokens), len(tokens) + 1, span.weight))
            tokens = [*tokens, self.text_end_id]
            notes.append(END_TOKEN_APPENDED)
        return _make_document(example.id, tokens, token_spans), notes


def _is_token_boundary(encoded: EncodedText, span: AssistantSpan) -> bool:
    """Return whether no token spans the start or the end of an answer."""
    boundaries = (span.start, span.end)
    return all(encoded.count_tokens_before(boundary) is not None for boundary in boundaries)


def _make_document(row_id: str, tokens: Sequence[int], spans: Sequence[TokenSpan]) -> Document:
    weights_L = np.zeros(len(tokens), dtype=np.float32)
    for start, end, weight in spans:
        if start < 1:
            fix = "put a user message first, or set `train: false` on the answer"
            raise InputError("the answer has no prompt before it", fix=fix)
        weights_L[start:end] = weight
    return Document(row_id, np.array(tokens, dtype=np.int32), weights_L)


def _label_sides(
    example: Example, sides: Sequence[tuple[Document, ...]], notes: Sequence[str]
) -> RenderedRow:
    """Return a row with a desirable or an undesirable answer, or with one of each."""
    documents: list[Document] = []
    for is_first, side_documents in zip((True, False), sides, strict=False):
        if len(side_documents) != 1:
            error = InputError(
                "the row has several trained answers, which the chat template renders as several"
                " documents, or none: its label belongs to a single one",
                where=example.id,
                fix="set `train: false` on the earlier answers",
            )
            return RenderedRow(example, error=error)
        side = "desirable" if example.label and is_first else "undesirable"
        documents.append(replace(side_documents[0], side=side))
    return RenderedRow(example, tuple(documents), tuple(notes))


def _make_pair(
    chosen: Sequence[Document], rejected: Sequence[Document]
) -> tuple[Document, Document]:
    """Return (chosen, rejected) with their sides set. Raises InputError for a side that is not one
    document, and if both have the same ids."""
    if len(chosen) != 1 or len(rejected) != 1:
        documents = [*chosen, *rejected]
        raise InputError(
            "one side of the pair has several trained answers, which the chat template renders"
            " as several documents",
            where=documents[0].id if documents else "",
            fix="use one answer per side, or set `train: false` on the earlier ones",
        )
    if np.array_equal(chosen[0].tokens_L, rejected[0].tokens_L):
        message = "the chat template renders both sides of the pair identically"
        raise InputError(message, where=chosen[0].id, fix="drop the row")
    return replace(chosen[0], side="chosen"), replace(rejected[0], side="rejected")
