"""Compiled schemas of a server: bounded, and compiled once.

    grammar = await cache.compile(schema, model)

In: a JSON schema of a stranger. Out: a Grammar in strict mode, or RequestError 400 that names what
it cannot enforce: an answer is never quietly free. Size and depth are checked first, compiling has
a worker and a time limit, and the last MAX_GRAMMARS are kept. Left out: the grammar itself
(model/generation/grammar.py)."""

from __future__ import annotations

import asyncio
import hashlib
from collections import OrderedDict
from concurrent.futures import Future, ThreadPoolExecutor

from tunesmith.core.errors import InputError, MachineError
from tunesmith.core.json_io import dump_json, measure_depth
from tunesmith.core.types import Json
from tunesmith.model.generation.grammar import Grammar, load_tokenizer
from tunesmith.serve.errors import RequestError, from_tunesmith_error
from tunesmith.serve.registry import ServedModel

MAX_GRAMMARS = 64
MAX_SCHEMA_BYTES = 100_000
MAX_SCHEMA_DEPTH = 64
# Beside the loading of the tokenizer: hundreds of times what a common schema takes, so that none is
# called complex for a busy machine.
COMPILE_SECONDS = 10.0
PARAM = "response_format"


class GrammarCache:
    """Grammars by schema, tokenizer and end tokens."""

    def __init__(self) -> None:
        self._grammars: OrderedDict[tuple[object, ...], Grammar] = OrderedDict()
        # a schema that takes longer than its time keeps its thread; others go on in the second
        self._workers = ThreadPoolExecutor(2, thread_name_prefix="grammar")
        self._num_compiling = 0

    async def compile(self, schema: Json, model: ServedModel) -> Grammar:
        """Return the grammar of a schema for a model's tokenizer. Raises RequestError."""
        key = (check_schema(schema), model.renderer.fingerprint, model.renderer.end_ids)
        grammar = self._grammars.get(key)
        if grammar is None:
            grammar = await self._compile_in_time(schema, model)
            self._grammars[key] = grammar
            if len(self._grammars) > MAX_GRAMMARS:
                self._grammars.popitem(last=False)
        self._grammars.move_to_end(key)
        return grammar

    async def _compile_in_time(self, schema: Json, model: ServedModel) -> Grammar:
        base = model.base
        try:
            # once for each tokenizer, and no fault of the schema: seconds, where others compute
            await asyncio.to_thread(
                load_tokenizer, base.path, base.vocab_size, model.renderer.end_ids
            )
            task = self._start_compiling(schema, model)
            return await asyncio.wait_for(asyncio.wrap_future(task), COMPILE_SECONDS)
        except TimeoutError:
            message = f"the schema is not compiled after {COMPILE_SECONDS:g} s; simplify it"
            raise RequestError(400, message, code="schema_too_complex", param=PARAM) from None
        except InputError as error:
            code = "schema_not_supported"
            raise RequestError(400, error.message, code=code, param=PARAM) from None
        except MachineError as error:
            raise from_tunesmith_error(error, param=PARAM) from None

    def _start_compiling(self, schema: Json, model: ServedModel) -> Future[Grammar]:
        if self._num_compiling >= 2:
            message = "two schemas are being compiled; try again"
            raise RequestError(429, message, code="schemas_busy", param=PARAM, retry_seconds=1)
        self._num_compiling += 1
        task = self._workers.submit(make_grammar, schema, model)
        loop = asyncio.get_running_loop()
        task.add_done_callback(lambda _: loop.call_soon_threadsafe(self._note_end))
        return task

    def _note_end(self) -> None:
        self._num_compiling -= 1


def make_grammar(schema: Json, model: ServedModel) -> Grammar:
    """Compile a schema for a model. Raises InputError for what cannot be enforced, by its name."""
    return Grammar(
        schema,
        model.base.path,
        vocab_size=model.base.vocab_size,
        end_ids=model.renderer.end_ids,
        is_strict=True,
    )


def check_schema(schema: Json) -> str:
    """Return the sha256 of a schema. Raises RequestError for one that is too large or too deep."""
    if measure_depth(schema) > MAX_SCHEMA_DEPTH:
        message = f"the schema is nested more than {MAX_SCHEMA_DEPTH} levels deep"
        raise RequestError(400, message, code="schema_too_complex", param=PARAM)
    content = dump_json(schema)
    if len(content) > MAX_SCHEMA_BYTES:
        message = f"the schema has more than {MAX_SCHEMA_BYTES:,} bytes"
        raise RequestError(400, message, code="schema_too_complex", param=PARAM)
    return hashlib.sha256(content).hexdigest()
