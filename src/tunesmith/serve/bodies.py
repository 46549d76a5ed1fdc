"""The bodies of requests, checked field by field.

    read_body(raw, ChatBody) -> ChatBody, or RequestError 400 with the name of the field

Strict: an unknown or unsupported field, a duplicate key, NaN and a number written as text are
refused, since a field that is silently ignored changes answers. The OpenAPI document is made from
the same classes (app.py). Left out: what a request becomes (exchange.py)."""

from __future__ import annotations

import json
from collections import Counter
from math import isfinite
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from tunesmith.core.json_io import describe_json_error, measure_depth
from tunesmith.core.sampling import MAX_SEED
from tunesmith.core.types import Json
from tunesmith.serve.errors import RequestError

MAX_MESSAGES = 1000
MAX_TOOLS = 128
MAX_CHOICES = 4
MAX_STOPS = 4
MAX_STOP_CHARS = 256
MAX_BIASES = 1024
MAX_TOP_LOGPROBS = 20
MAX_PROMPTS = 64
MAX_COMMENT_CHARS = 2000
MAX_NAME_CHARS = 256  # of who speaks
MAX_TOKENS = 1_000_000  # of an answer, before it is compared with the context
MAX_DEPTH = 100  # levels of nesting, as of rows; templates recurse through what tools hold
DEFAULT_COMPLETION_TOKENS = 16  # of OpenAI's /v1/completions

ModelName = Annotated[str, Field(min_length=1, max_length=80)]
ToolName = Annotated[str, Field(min_length=1, max_length=64, pattern=r"^[a-zA-Z0-9_-]+$")]
StopText = Annotated[str, Field(min_length=1, max_length=MAX_STOP_CHARS)]
TokenId = Annotated[int, Field(ge=0, le=2**31 - 1)]
TokenCount = Annotated[int, Field(ge=1, le=MAX_TOKENS)]
Penalty = Annotated[float, Field(ge=-2, le=2)]
Bias = Annotated[float, Field(ge=-100, le=100)]
BiasedToken = Annotated[str, Field(pattern=r"^[0-9]{1,9}$")]
TokenPrompt = Annotated[list[TokenId], Field(min_length=1)]

B = TypeVar("B", bound=BaseModel)


class _Body(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


class TextPart(_Body):
    type: Literal["text"]
    text: str


class FunctionCall(_Body):
    name: ToolName
    arguments: str  # JSON


class MessageToolCall(_Body):
    id: Annotated[str, Field(min_length=1, max_length=80)]
    type: Literal["function"]
    function: FunctionCall
    index: int | None = None  # of a stream, which clients send back


class ChatMessage(_Body):
    """A message. The fields that are null or empty occur in answers, which clients send back."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[TextPart] | None
    name: Annotated[str, Field(min_length=1, max_length=MAX_NAME_CHARS)] | None = None
    refusal: None = None
    annotations: Annotated[list[Json], Field(max_length=0)] | None = None
    audio: None = None
    function_call: None = None
    tool_calls: Annotated[list[MessageToolCall], Field(max_length=MAX_TOOLS)] | None = None
    tool_call_id: Annotated[str, Field(min_length=1, max_length=80)] | None = None
    reasoning_content: str | None = None  # thinking of an earlier answer

    @model_validator(mode="before")
    @classmethod
    def _add_content(cls, message: Any) -> Any:
        """Clients may leave the content out beside calls."""
        has_calls = isinstance(message, dict) and message.get("tool_calls")
        return {"content": None, **message} if has_calls else message

    @model_validator(mode="after")
    def _check_role(self) -> ChatMessage:
        if self.tool_calls and self.role != "assistant":
            raise ValueError("tool_calls are of the assistant")
        if (self.tool_call_id is not None) != (self.role == "tool"):
            raise ValueError("tool_call_id goes with the role tool, and only with it")
        if self.reasoning_content is not None and self.role != "assistant":
            raise ValueError("reasoning_content is of the assistant")
        if self.content is None and not self.tool_calls:
            raise ValueError("content is null, and there are no tool_calls")
        return self

    def get_text(self) -> str:
        if self.content is None or isinstance(self.content, str):
            return self.content or ""
        return "".join(part.text for part in self.content)


class FunctionTool(_Body):
    name: ToolName
    description: str | None = None
    parameters: Json | None = None
    strict: bool | None = None


class Tool(_Body):
    type: Literal["function"]
    function: FunctionTool


class StreamOptions(_Body):
    include_usage: bool = False


class JsonSchemaFormat(_Body):
    name: Annotated[str, Field(min_length=1, max_length=64, pattern=r"^[a-zA-Z0-9_-]+$")]
    description: str | None = None
    schema_: Annotated[Json, Field(alias="schema")]
    strict: bool | None = None


class ResponseFormat(_Body):
    """`json_schema` is always enforced, with or without `strict`."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchemaFormat | None = None

    @model_validator(mode="after")
    def _check_schema(self) -> ResponseFormat:
        if (self.type == "json_schema") != (self.json_schema is not None):
            raise ValueError("json_schema goes with type json_schema, and only with it")
        return self


class SamplingBody(_Body):
    """The fields that chats and completions share. The defaults are OpenAI's: temperature 1."""

    model: ModelName
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    stop: StopText | Annotated[list[StopText], Field(max_length=MAX_STOPS)] | None = None
    seed: Annotated[int, Field(ge=-(2**63), le=MAX_SEED)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=-1, le=1_000_000)] | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    presence_penalty: Penalty | None = None
    frequency_penalty: Penalty | None = None
    logit_bias: Annotated[dict[BiasedToken, Bias], Field(max_length=MAX_BIASES)] | None = None
    n: Annotated[int, Field(ge=1, le=MAX_CHOICES)] | None = None
    response_format: ResponseFormat | None = None
    user: Annotated[str, Field(max_length=256)] | None = None
    return_token_ids: bool | None = None

    @model_validator(mode="after")
    def _check_stream_options(self) -> SamplingBody:
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options needs stream: true")
        return self

    @property
    def stops(self) -> tuple[str, ...]:
        if self.stop is None:
            return ()
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)

    @property
    def should_send_usage(self) -> bool:
        """Whether a stream ends with a chunk of usage."""
        return self.stream_options is not None and self.stream_options.include_usage


class ChatBody(SamplingBody):
    messages: Annotated[list[ChatMessage], Field(min_length=1, max_length=MAX_MESSAGES)]
    max_tokens: TokenCount | None = None
    max_completion_tokens: TokenCount | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=MAX_TOP_LOGPROBS)] | None = None
    metadata: Annotated[dict[str, str], Field(max_length=16)] | None = None
    tools: Annotated[list[Tool], Field(min_length=1, max_length=MAX_TOOLS)] | None = None
    tool_choice: Literal["none", "auto"] | None = None
    parallel_tool_calls: bool | None = None

    @model_validator(mode="after")
    def _check_tools(self) -> ChatBody:
        names = [tool.function.name for tool in self.tools or ()]
        if len(set(names)) < len(names):
            raise ValueError("two tools have the same name")
        if self.tools is None and self.tool_choice == "auto":
            raise ValueError("tool_choice needs tools")
        return self

    @field_validator("tool_choice", mode="before")
    @classmethod
    def _refuse_forced_call(cls, choice: Any) -> Any:
        if choice == "required" or isinstance(choice, dict):
            fix = "send tool_choice: auto, or response_format with a json_schema"
            raise ValueError(f"no call is forced; {fix}")
        return choice

    @model_validator(mode="after")
    def _check_pairs(self) -> ChatBody:
        if self.top_logprobs and not self.logprobs:
            raise ValueError("top_logprobs needs logprobs: true")
        if self.max_tokens and self.max_completion_tokens:
            raise ValueError("max_tokens and max_completion_tokens are the same; send one of them")
        return self

    @property
    def answer_tokens(self) -> int | None:
        return self.max_completion_tokens or self.max_tokens

    @property
    def num_logprobs(self) -> int:
        return (self.top_logprobs or 0) if self.logprobs else -1

    @property
    def num_prompt_logprobs(self) -> int:
        return -1

    @property
    def active_tools(self) -> list[Tool]:
        """The tools that an answer may call: with `none`, the model is not told of any."""
        return [] if self.tool_choice == "none" else self.tools or []

    @property
    def has_tools(self) -> bool:
        """Whether a tool is called anywhere, or may be."""
        calls = (message.tool_calls or message.tool_call_id for message in self.messages)
        return bool(self.active_tools) or any(calls)


class CompletionBody(SamplingBody):
    prompt: (
        str
        | Annotated[list[str], Field(min_length=1, max_length=MAX_PROMPTS)]
        | TokenPrompt
        | Annotated[list[TokenPrompt], Field(min_length=1, max_length=MAX_PROMPTS)]
    )
    max_tokens: TokenCount | None = None
    logprobs: Annotated[int, Field(ge=0, le=MAX_TOP_LOGPROBS)] | None = None
    echo: bool | None = None

    @model_validator(mode="after")
    def _check_echo(self) -> CompletionBody:
        if self.echo and self.logprobs is not None and self.stream:
            raise ValueError("echo with logprobs is not streamed")
        return self

    @property
    def answer_tokens(self) -> int:
        return self.max_tokens or DEFAULT_COMPLETION_TOKENS

    @property
    def num_logprobs(self) -> int:
        return -1 if self.logprobs is None else self.logprobs

    @property
    def num_prompt_logprobs(self) -> int:
        return self.num_logprobs if self.echo else -1

    @property
    def prompts(self) -> tuple[str | list[int], ...]:
        """The prompts one by one, as text or token ids."""
        prompt: Any = self.prompt
        if isinstance(prompt, str) or isinstance(prompt[0], int):
            return (prompt,)
        return tuple(prompt)


class ModelBody(_Body):
    """An adapter to publish under the name in the path. `from` is an id below --models-dir."""

    source: Annotated[str, Field(alias="from", min_length=1, max_length=400)]
    scale: Annotated[float, Field(ge=0, le=2)] = 1.0
    constrain: bool = False  # the run's schema is the default response_format
    pin: bool = False  # stays in memory
    unproven: bool = False  # serve weights that hold nothing to check them by


class CanaryBody(_Body):
    """An admin's decision on the canary of a route, whatever was counted."""

    canary: Literal["start", "roll_back"]


class FeedbackBody(_Body):
    """A verdict on an answer. `corrected` is the answer that should have been given."""

    request_id: Annotated[str, Field(min_length=1, max_length=80)]
    verdict: Literal["good", "bad", "unsure"]
    corrected: Annotated[str, Field(min_length=1)] | None = None
    comment: Annotated[str, Field(max_length=MAX_COMMENT_CHARS)] | None = None

    @model_validator(mode="after")
    def _check_verdict(self) -> FeedbackBody:
        if self.corrected is not None and self.verdict == "good":
            raise ValueError("an answer with a correction is bad or unsure, not good")
        return self


# ---------------------------------------------------------------- reading


def read_body(raw: bytes, kind: type[B]) -> B:
    """Parse and check a body. Raises RequestError 400 with the name of the first wrong field."""
    content = parse_json(raw)
    if not isinstance(content, dict):
        raise RequestError(400, "the body is not a JSON object")
    try:
        return kind.model_validate(content)
    except ValidationError as error:
        details = error.errors(include_url=False, include_input=False)
    names = _list_field_names(kind)
    # of a union, the branch that got furthest says most
    detail = max(details, key=lambda problem: len(_find_path(problem, names)))
    param = _format_path(_find_path(detail, names))
    message = detail["msg"].removeprefix("Value error, ")
    if detail["type"] == "extra_forbidden":
        message = "unknown or unsupported field"
    raise RequestError(400, f"{param}: {message}" if param else message, param=param)


def parse_json(raw: bytes) -> Any:
    """Return the value of strict JSON, in a body or in a text of it. Raises RequestError 400."""
    try:
        text = raw.decode()
        content = json.loads(
            text,
            object_pairs_hook=_build_object,
            parse_constant=_refuse_constant,
            parse_float=_parse_float,
        )
        if measure_depth(content) > MAX_DEPTH:
            raise RecursionError
        if "\\ud" in text.lower():  # half of a pair is no character, and no tokenizer takes it
            json.dumps(content, ensure_ascii=False).encode()
        return content
    except UnicodeEncodeError:
        raise RequestError(400, "not valid JSON: half of a surrogate pair") from None
    except RecursionError:
        message = f"the JSON is nested deeper than {MAX_DEPTH} levels"
        raise RequestError(400, message) from None
    except json.JSONDecodeError as error:
        message = f"{describe_json_error(error)} at character {error.pos}"
        raise RequestError(400, message) from None
    except ValueError as error:
        raise RequestError(400, describe_json_error(error)) from None


def _build_object(pairs: list[tuple[str, Any]]) -> Json:
    content = dict(pairs)
    if len(content) < len(pairs):
        key = Counter(name for name, _ in pairs).most_common(1)[0][0]
        raise RequestError(400, f"the key {key!r:.80} occurs twice in one object")
    return content


def _parse_float(text: str) -> float:
    """Return a number. JSON allows 1e999, which is infinite here and cannot be written again."""
    number = float(text)
    if not isfinite(number):
        raise RequestError(400, f"a number is out of range: {text:.40}")
    return number


def _refuse_constant(name: str) -> Any:
    raise RequestError(400, f"not valid JSON: {name} is not a number")


def _list_field_names(kind: type[BaseModel]) -> set[str]:
    """Return the names of all fields of a body and of what it holds."""
    schema = kind.model_json_schema(by_alias=True)
    names = set(schema["properties"])
    for inner in schema.get("$defs", {}).values():
        names |= set(inner.get("properties", ()))
    return names


def _find_path(detail: Any, names: set[str]) -> tuple[str | int, ...]:
    """Return the fields and indices that lead to a value, without pydantic's names of types."""
    location = detail["loc"]
    path = [part for part in location if isinstance(part, int) or part in names]
    if detail["type"] == "extra_forbidden":
        path = [*path[: len(path) - (location[-1] in names)], str(location[-1])[:80]]
    return tuple(path)


def _format_path(path: tuple[str | int, ...]) -> str:
    text = ""
    for part in path:
        text += f"[{part}]" if isinstance(part, int) else f".{part}"
    return text.removeprefix(".")
