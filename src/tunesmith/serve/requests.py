"""From a checked body to the jobs of an answer.

    jobs = await make_jobs(body, [render_chat(body, model)], model, key, grammars)

In: bodies, a model with its renderer. Out: AnswerJobs for the scheduler, or a RequestError with the
field. A prompt is rendered with the adapter's own chat template, and text of a message never makes
a control token. Left out: the queue (scheduler.py), answers (generation.py)."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Sequence
from dataclasses import dataclass, replace

from tunesmith.core.errors import InputError
from tunesmith.core.sampling import MAX_SEED
from tunesmith.core.types import GenerationRequest, Json
from tunesmith.serve.bodies import ChatBody, CompletionBody, SamplingBody
from tunesmith.serve.errors import RequestError, from_tunesmith_error
from tunesmith.serve.grammars import GrammarCache
from tunesmith.serve.keys import ApiKey
from tunesmith.serve.registry import ServedModel
from tunesmith.serve.scheduler import AnswerJob
from tunesmith.serve.tool_requests import build_tool_grammar, list_tools, to_template_message

DEFAULT_TEMPERATURE = 1.0  # of OpenAI's API
DEFAULT_CHAT_TOKENS = 1024
ANY_OBJECT: Json = {"type": "object"}
# an answer with thinking that nothing follows: a template that can write thinking does so here
THINKING: tuple[Json, ...] = (
    {"role": "user", "content": "a"},
    {"role": "assistant", "content": "b", "reasoning_content": "c"},
)


@dataclass(frozen=True)
class Prompt:
    """Token ids to continue, and how many tokens the answer may have."""

    tokens: tuple[int, ...]
    max_new_tokens: int


def render_chat(body: ChatBody, model: ServedModel) -> Prompt:
    """Render the messages with the model's template. Slow for long prompts: runs on a worker."""
    messages: list[Json] = []
    for message in body.messages:
        messages.append(to_template_message(message))
    if messages[-1]["role"] == "assistant":
        message = "the last message is the assistant's, so there is nothing to answer"
        raise RequestError(400, message, param="messages")
    tools = list_tools(body)
    try:
        _refuse_unwritten(messages, tools, model)
        tokens = model.renderer.encode_prompt(messages, tools)
    except InputError as error:
        raise from_tunesmith_error(error, param="messages") from None
    return _fit_prompt(tokens, body.answer_tokens, model, param="messages")


def _refuse_unwritten(messages: Sequence[Json], tools: Sequence[Json], model: ServedModel) -> None:
    """Raise RequestError 400 for names that the template does not write, and for thinking if it
    writes none at all; most templates drop the thinking before the last question."""
    for index in model.renderer.find_unused("name", messages, tools):
        message = f"the chat template does not write names of role {messages[index]['role']}"
        raise RequestError(400, message, param=f"messages[{index}].name")
    for index, message in enumerate(messages):
        if "reasoning_content" not in message:
            continue
        if model.renderer.find_unused("reasoning_content", THINKING):
            text = "the chat template does not write the thinking of answers"
            raise RequestError(400, text, param=f"messages[{index}].reasoning_content")
        return


def render_completions(body: CompletionBody, model: ServedModel) -> list[Prompt]:
    """Encode the prompts as plain text, after the token that begins a document, if there is one."""
    prompts: list[Prompt] = []
    tokenizer = model.renderer.tokenizer
    for prompt in body.prompts:
        if isinstance(prompt, str):
            try:
                text_tokens = model.renderer.encode_text(prompt)
            except InputError as error:
                raise from_tunesmith_error(error, param="prompt") from None
            tokens = (*tokenizer.bos_ids, *text_tokens)
        else:
            tokens = tuple(prompt)
            if max(tokens) >= model.base.vocab_size:
                message = f"token {max(tokens)} is not one of the model's {model.base.vocab_size}"
                raise RequestError(400, message, param="prompt")
        if not tokens:
            raise RequestError(400, "the prompt is empty", param="prompt")
        prompts.append(_fit_prompt(tokens, body.answer_tokens, model, param="prompt"))
    return prompts


def _fit_prompt(
    tokens: tuple[int, ...], answer_tokens: int | None, model: ServedModel, *, param: str
) -> Prompt:
    """Raise RequestError 400 with both counts unless prompt and answer fit in the context."""
    context = model.base.context_length
    room = context - len(tokens)
    wanted = answer_tokens or 1
    if wanted > room:
        message = (
            f"the prompt has {len(tokens)} tokens and the answer may have {wanted}, "
            f"together more than the context of {context}"
        )
        raise RequestError(400, message, code="context_length_exceeded", param=param)
    return Prompt(tokens, answer_tokens or min(room, DEFAULT_CHAT_TOKENS))


async def make_jobs(
    body: ChatBody | CompletionBody,
    prompts: Sequence[Prompt],
    model: ServedModel,
    key: ApiKey,
    grammars: GrammarCache,
) -> list[AnswerJob]:
    """Return a job for each answer: `n` for each prompt, with seeds that follow each other."""
    schema = find_schema(body, model)
    if isinstance(body, ChatBody) and body.active_tools:
        schema = await asyncio.to_thread(build_tool_grammar, body, model) or schema
    grammar = None if schema is None else await grammars.compile(schema, model)
    biases = list_biases(body, model)
    seed = secrets.randbelow(MAX_SEED) if body.seed is None else body.seed % MAX_SEED
    outbox = asyncio.Queue()
    jobs: list[AnswerJob] = []
    for prompt in prompts:
        first_request = _make_request(body, prompt, model, key, biases)
        for choice in range(body.n or 1):
            request = replace(first_request, seed=(seed + choice) % MAX_SEED)
            answer_grammar = None if grammar is None else grammar.start_answer()
            client = (key.id, model.name)
            jobs.append(AnswerJob(request, client, outbox, len(jobs), answer_grammar))
    return jobs


def find_schema(body: SamplingBody, model: ServedModel) -> Json | None:
    """Return the schema that answers have to follow: the request's, else the model's own."""
    wanted = body.response_format
    if wanted is None:
        return model.schema
    if wanted.json_schema is not None:
        return wanted.json_schema.schema_
    return ANY_OBJECT if wanted.type == "json_object" else None


def list_biases(body: SamplingBody, model: ServedModel) -> tuple[tuple[int, float], ...]:
    """Return (token, bias). Raises RequestError for a token that the model does not have."""
    biases = body.list_biases()
    for token, _ in biases:
        if token >= model.base.vocab_size:
            message = f"token {token} is not one of the model's {model.base.vocab_size}"
            raise RequestError(400, message, param="logit_bias")
    return biases


def _make_request(
    body: ChatBody | CompletionBody,
    prompt: Prompt,
    model: ServedModel,
    key: ApiKey,
    biases: tuple[tuple[int, float], ...],
) -> GenerationRequest:
    return GenerationRequest(
        tokens=prompt.tokens,
        max_new_tokens=prompt.max_new_tokens,
        temperature=DEFAULT_TEMPERATURE if body.temperature is None else body.temperature,
        top_p=body.top_p or 1.0,
        top_k=max(0, body.top_k or 0),
        min_p=body.min_p or 0.0,
        stop=body.stops,
        presence_penalty=body.presence_penalty or 0.0,
        frequency_penalty=body.frequency_penalty or 0.0,
        logit_bias=biases,
        num_logprobs=body.num_logprobs,
        num_prompt_logprobs=body.num_prompt_logprobs,
        end_ids=model.renderer.end_ids,
        adapter=model.adapter_key if model.scale else "",
        adapter_scale=model.scale,
        cache_salt=key.id,
    )
