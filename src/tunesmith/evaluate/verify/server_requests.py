"""What a server is asked to be verified, and its replies as answers.

    options = find_options(client, model, run)     which optional fields this server takes
    ask(client, options, item)          -> LiveAnswer
    score_documents(client, options, items) -> loss of each item's expected answers

The API is OpenAI's: chat completions, or completions for rows without messages. Token ids and
log-probabilities are asked for in the words of vLLM and used where they come. A given text is
scored as lm-eval does it, by `echo`, or by vLLM's `prompt_logprobs`.

Left out: HTTP (server_client.py), comparing (verification.py)."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

from tunesmith.core.errors import InputError, MachineError
from tunesmith.core.formatting import count_common
from tunesmith.core.json_io import parse_as
from tunesmith.core.progress_log import log_progress
from tunesmith.core.types import Document, Json
from tunesmith.evaluate.verify.recorded_items import RecordedItem, RecordedRun
from tunesmith.evaluate.verify.served_calls import CallReader, ServedCall
from tunesmith.evaluate.verify.server_client import LiveClient, RefusedRequest, open_request_pool

CHAT_PATH = "/chat/completions"
TEXT_PATH = "/completions"
TOKENIZE_PATH = "/tokenize"  # of the host, beside /v1
NUM_ALTERNATIVES = 5  # OpenAI and vLLM allow 20, others fewer
SCORING_REQUESTS = 2  # at once: the log-probabilities of a prompt take memory
# Sent if a first request with them is not refused.
OPTIONAL_FIELDS: tuple[Json, ...] = (
    {"logprobs": True, "top_logprobs": NUM_ALTERNATIVES},
    {"return_token_ids": True},
)

# ---------------------------------------------------------------- replies as they are read


@dataclass(frozen=True)
class _Alternative:
    token: str
    logprob: float | None = None
    bytes: tuple[int, ...] | None = None

    @property
    def content(self) -> bytes:
        if self.bytes is not None and all(0 <= byte < 256 for byte in self.bytes):
            return bytes(self.bytes)
        return self.token.encode(errors="replace")


@dataclass(frozen=True)
class _ChosenToken(_Alternative):
    top_logprobs: tuple[_Alternative, ...] | None = None


@dataclass(frozen=True)
class _Logprobs:
    content: tuple[_ChosenToken, ...] | None = None  # of a chat
    token_logprobs: tuple[float | None, ...] | None = None  # of a text


@dataclass(frozen=True)
class _Message:
    content: str | None = None
    tool_calls: tuple[ServedCall, ...] | None = None


@dataclass(frozen=True)
class _PromptLogprob:
    logprob: float | None = None


@dataclass(frozen=True)
class _Choice:
    """Of a chat, which has a message, or of a text."""

    message: _Message | None = None
    text: str | None = None
    finish_reason: str | None = None
    logprobs: _Logprobs | None = None
    prompt_logprobs: tuple[dict[str, _PromptLogprob] | None, ...] | None = None


@dataclass(frozen=True)
class _Usage:
    prompt_tokens: int | None = None
    completion_tokens: int | None = None


@dataclass(frozen=True)
class _Reply:
    choices: tuple[_Choice, ...]
    usage: _Usage | None = None
    prompt_token_ids: tuple[int, ...] | None = None


@dataclass(frozen=True)
class _Tokens:
    tokens: tuple[int, ...]


# ---------------------------------------------------------------- answers


@dataclass(frozen=True)
class LiveAnswer:
    """A server's answer. Whatever the server does not tell is None or empty."""

    text: str
    finish_reason: str
    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    prompt_ids: tuple[int, ...] = ()
    tokens: tuple[_ChosenToken, ...] = ()
    end_texts: tuple[str, ...] = ()

    def measure_preference(self, other: str) -> float | None:
        """Return how many nats lie between this answer's token and that of another answer, where
        the two part; a lower bound if the server does not list the other token, None if it gives
        no log-probabilities there."""
        served = self.text.encode(errors="replace")
        recorded = other.encode(errors="replace")
        parting = count_common(served, recorded)
        start = 0
        for token in self.tokens:
            # A control token that the text leaves out takes no room in it.
            is_shown = start >= len(served) or served.startswith(token.content, start)
            size = len(token.content) if is_shown else 0
            if start == parting == len(recorded) and self._is_end(token):
                return math.inf  # the answer should have ended here, and goes on
            if start <= parting < start + size or start >= len(served):
                return self._compare_tokens(token, recorded[start:])
            start += size
        return None

    def _compare_tokens(self, token: _ChosenToken, rest: bytes) -> float | None:
        """Return the nats between a token and the one that starts `rest`; empty: an end token."""
        listed: list[float] = []
        matching: list[float] = []
        for alternative in token.top_logprobs or ():
            content = alternative.content
            is_other = bool(content) and rest.startswith(content)
            if alternative.logprob is None:
                continue
            listed.append(alternative.logprob)
            if is_other if rest else self._is_end(alternative):
                matching.append(alternative.logprob)
        if token.logprob is None or not listed:
            return None
        return abs(token.logprob - max(matching, default=min(listed)))

    def _is_end(self, alternative: _Alternative) -> bool:
        return not alternative.token or alternative.token in self.end_texts


@dataclass(frozen=True)
class RequestOptions:
    """The model, the limit of an answer, and the optional fields that the server takes."""

    model: str
    max_new_tokens: int
    end_texts: tuple[str, ...]
    fields: Json = field(default_factory=dict[str, object])
    template_fields: Json = field(default_factory=dict[str, object])
    can_tokenize: bool = False
    calls: CallReader | None = None


def find_options(client: LiveClient, model: str, run: RecordedRun) -> RequestOptions:
    """Return what this server can be asked, by trying each optional field once.

    Raises InputError for a server that refuses a plain request."""
    first = run.items[0]
    options = RequestOptions(model, 1, run.end_texts, calls=CallReader(run.renderer))
    ask(client, options, first)
    if first.messages:
        if run.template_variables:
            variables: Json = {"chat_template_kwargs": run.template_variables}
            tried = replace(options, template_fields=variables)
            options = tried if _is_accepted(client, tried, first) else options
        for optional in OPTIONAL_FIELDS:
            tried = replace(options, fields={**options.fields, **optional})
            options = tried if _is_accepted(client, tried, first) else options
        answer = ask(client, options, first)
        ids = () if answer.prompt_ids else _tokenize(client, options, first)
        can_tokenize = bool(ids) and len(ids) == answer.prompt_tokens
        options = replace(options, can_tokenize=can_tokenize)
    return replace(options, max_new_tokens=run.max_new_tokens)


def _is_accepted(client: LiveClient, options: RequestOptions, item: RecordedItem) -> bool:
    try:
        ask(client, options, item)
    except RefusedRequest:
        return False
    return True


def ask(client: LiveClient, options: RequestOptions, item: RecordedItem) -> LiveAnswer:
    """Return the greedy answer to an item. Raises what `LiveClient.request_json` raises."""
    if item.messages:
        path = CHAT_PATH
        body = _build_chat(options, item) | options.fields
    else:
        path = TEXT_PATH
        body = {"model": options.model, "prompt": item.prompt_text}
    body |= {"temperature": 0, "max_tokens": options.max_new_tokens}
    reply, choice = _request(client, path, body)
    message = choice.message or _Message(choice.text)
    text = message.content or ""
    if (choice.message if item.messages else choice.text) is None:
        raise InputError("the reply has no answer", where=client.url + path)
    prompt_ids = reply.prompt_token_ids or ()
    if not prompt_ids and options.can_tokenize:
        prompt_ids = _tokenize(client, options, item)
    if options.calls is not None:
        text = options.calls.restore(item, text, message.tool_calls or ())
    usage = reply.usage or _Usage()
    return LiveAnswer(
        text=text,
        finish_reason=choice.finish_reason or "",
        prompt_tokens=usage.prompt_tokens,
        completion_tokens=usage.completion_tokens,
        prompt_ids=prompt_ids,
        tokens=(choice.logprobs or _Logprobs()).content or (),
        end_texts=options.end_texts,
    )


def _build_chat(options: RequestOptions, item: RecordedItem) -> Json:
    body: Json = {"model": options.model, "messages": list(item.messages)}
    if item.tools:
        body["tools"] = list(item.tools)
    return body | options.template_fields


def _request(client: LiveClient, path: str, body: Json) -> tuple[_Reply, _Choice]:
    """Return the reply and its first choice."""
    where = client.url + path
    reply = parse_as(_Reply, client.request_json(path, body), where=where)
    if not reply.choices:
        raise InputError("the reply has no choices", where=where)
    return reply, reply.choices[0]


def _tokenize(client: LiveClient, options: RequestOptions, item: RecordedItem) -> tuple[int, ...]:
    """Return the ids of a prompt as vLLM's /tokenize gives them; empty for another server."""
    body = _build_chat(options, item) | {"add_generation_prompt": True}
    try:
        reply = client.request_json(TOKENIZE_PATH, body, is_below_url=False)
        return parse_as(_Tokens, reply).tokens
    except (InputError, MachineError):
        return ()


# ---------------------------------------------------------------- probabilities


Logprobs = tuple[float | None, ...]  # of each token
ScoreFn = Callable[[LiveClient, str, Sequence[int]], Logprobs]


def score_documents(
    client: LiveClient, options: RequestOptions, items: Sequence[RecordedItem]
) -> dict[str, float]:
    """Return item id -> loss of its expected answers, nats per token; empty if the server does not
    score given tokens."""
    recorded = [item for item in items if item.loss is not None and item.documents]
    if not recorded:
        return {}
    document = recorded[0].documents[0]
    score = next(
        (each for each in SCORERS if _has_scores(client, each, options.model, document)), None
    )
    if score is None:
        return {}
    with open_request_pool(SCORING_REQUESTS) as pool:
        losses = pool.map(
            lambda item: _compute_loss(client, score, options.model, item.documents), recorded
        )
        values = list(log_progress(losses, len(recorded), "expected answers"))
    pairs = zip(recorded, values, strict=True)
    return {item.id: loss for item, loss in pairs if loss is not None}


def _has_scores(client: LiveClient, score: ScoreFn, model: str, document: Document) -> bool:
    try:
        return _compute_loss(client, score, model, (document,)) is not None
    except (InputError, MachineError):  # refused, without them, or a server that fails at it
        return False


def _compute_loss(
    client: LiveClient, score: ScoreFn, model: str, documents: Sequence[Document]
) -> float | None:
    """Return the mean loss of the trained tokens; None if the server leaves one out."""
    nats = 0.0
    num_targets = 0
    for document in documents:
        ids = document.tokens_L.tolist()
        logprobs = score(client, model, ids)
        if len(logprobs) not in (len(ids), len(ids) + 1):  # the one token that it generates
            return None
        for position in document.weights_L.nonzero()[0].tolist():
            logprob = logprobs[position]
            if logprob is None or not math.isfinite(logprob):
                return None
            nats -= logprob
            num_targets += 1
    return nats / num_targets if num_targets else None


def _score_by_echo(client: LiveClient, model: str, ids: Sequence[int]) -> Logprobs:
    _, choice = _request(client, TEXT_PATH, _build_scoring(model, ids, echo=True, logprobs=1))
    return (choice.logprobs or _Logprobs()).token_logprobs or ()


def _score_by_prompt(client: LiveClient, model: str, ids: Sequence[int]) -> Logprobs:
    _, choice = _request(client, TEXT_PATH, _build_scoring(model, ids, prompt_logprobs=0))
    logprobs: list[float | None] = []
    for token, entry in zip(ids, choice.prompt_logprobs or (), strict=False):
        logprobs.append((entry or {}).get(str(token), _PromptLogprob()).logprob)
    return tuple(logprobs)


def _build_scoring(model: str, ids: Sequence[int], **fields: int) -> Json:
    return {"model": model, "prompt": list(ids), "max_tokens": 1, "temperature": 0, **fields}


SCORERS: tuple[ScoreFn, ...] = (_score_by_echo, _score_by_prompt)
