"""Rehearsal rows that the model writes itself before it is trained: `rehearsal: {data: self}`.

    plan, facts, run folder -> rehearsal.jsonl in it, and plan and facts that know these rows

With a chat template it writes conversations: a question to the bare beginning of a user's turn,
then the answer to it, as it is served. Without one, and in continued pretraining, it writes texts,
after nothing but the token that stands between documents. All is drawn with a fixed seed. Rows that
show nothing are left out and counted. Sources: rows of the model's own in the place of its training
data are Huang 2024's (SSR); questions from a bare template are Xu 2024's (Magpie). Left out: how
many tokens (plan/rehearsal.py), and training on them (data/rehearsal.py)."""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from collections.abc import Iterator, Sequence

from tunesmith.core.atomic import write_file
from tunesmith.core.errors import InputError
from tunesmith.core.events import CheckResult
from tunesmith.core.json_io import dump_json
from tunesmith.core.run_dir import SELF_REHEARSAL_FILE, RunFolder
from tunesmith.core.types import GenerationOutput, GenerationRequest, Json, Plan, Row, require
from tunesmith.data.chat_template.renderer import Renderer
from tunesmith.data.checks.run import check_data
from tunesmith.data.constraints import ConstraintSet
from tunesmith.data.dataset import open_dataset
from tunesmith.data.formats.parse import parse_row
from tunesmith.data.hashing import hash_example
from tunesmith.data.readers.decode import SourceLocation, decode_json
from tunesmith.data.tokenizer.eos import find_separator
from tunesmith.model.causal_lm import PackedCausalLM
from tunesmith.model.generation.engine import find_common_prefix, generate
from tunesmith.recipe.fields import DataSource
from tunesmith.session.inputs import RunInputs, open_eval_datasets
from tunesmith.session.session import load_starting_model

MAX_QUESTION_TOKENS, MAX_ANSWER_TOKENS, MAX_TEXT_TOKENS = (
    128,
    384,
    512,
)  # tokens at most; what is longer is unfinished
TEMPERATURE, TOP_P = (
    1.0,
    0.95,
)  # as the model itself would go on, without the tail of its distribution
EXPECTED_ROW_TOKENS = 128  # tokens of a row that is kept; only decides how many are written at once
BATCH_ROWS = 64  # rows
MAX_TRIES_FACTOR = 4  # times as many rows as would do if all were kept
MAX_REPETITION = 0.2  # share of 4-token runs that stood there before: above it an answer is a loop


def add_self_rehearsal(
    plan: Plan, inputs: RunInputs, folder: RunFolder
) -> tuple[Plan, RunInputs, tuple[CheckResult, ...]]:
    """Nothing changes unless the plan wants rows of the model's own. Raises InputError when none of
    them can be used, MachineError without memory or disk for them."""
    if plan.config.rehearsal_tokens is None:
        return plan, inputs, ()
    rows, rejected_counts = generate_rows(load_starting_model(plan, inputs), plan, inputs)
    file = folder.path / SELF_REHEARSAL_FILE
    write_file(file, b"".join(dump_json(row) for row in rows))
    recipe, sources = inputs.recipe, [DataSource(path=file)]
    dataset = open_dataset(
        sources,
        inputs.renderer,
        skip_invalid=recipe.skip_invalid,
        constraint_set=ConstraintSet(recipe.never, can_ban=False),
    )
    report = check_data({"rehearsal": dataset})["rehearsal"]
    evidence = f"{len(dataset):,} rows of {report.tokens:,} tokens that the model wrote itself, in {file.name}"
    evidence += f"; left out: {_format_counts(rejected_counts)}" if rejected_counts else ""
    inputs = dataclasses.replace(inputs, datasets={**inputs.datasets, "rehearsal": dataset})
    plan = dataclasses.replace(plan, data={**plan.data, "rehearsal": report})
    return plan, inputs, (CheckResult("rehearsal rows", "ok", evidence),)


def generate_rows(
    model: PackedCausalLM, plan: Plan, inputs: RunInputs
) -> tuple[list[Json], Counter[str]]:
    """Rows until they have `rehearsal_tokens` together, and how many were left out for what."""
    writer = _RowWriter(model, inputs.renderer, plan.config.seed)
    write_rows = (
        writer.write_texts
        if plan.config.stage == "cpt" or not inputs.renderer.has_template
        else writer.write_conversations
    )
    row_filter = _RowFilter(inputs)
    target_tokens = require(plan.config.rehearsal_tokens)
    rows, num_tries = list[Json](), 0
    max_tries = MAX_TRIES_FACTOR * max(BATCH_ROWS, math.ceil(target_tokens / EXPECTED_ROW_TOKENS))
    while row_filter.tokens < target_tokens and num_tries < max_tries:
        count = min(
            BATCH_ROWS,
            max(num_tries, math.ceil((target_tokens - row_filter.tokens) / EXPECTED_ROW_TOKENS)),
        )
        for row, problem in write_rows(range(num_tries, num_tries + count)):
            if not (problem := problem or row_filter.find_problem(row)):
                rows.append(row)
            row_filter.rejected_counts.update([problem] if problem else ())
        num_tries += count
    if not rows:
        message = f"none of {num_tries:,} rows that the model wrote can be used: {_format_counts(row_filter.rejected_counts)}"
        raise InputError(
            message,
            where="rehearsal",
            fix="give a file of general rows: rehearsal: {data: general.jsonl}",
        )
    return rows, row_filter.rejected_counts


def _format_counts(kinds: Counter[str]) -> str:
    return ", ".join(f"{count:,} {kind}" for kind, count in kinds.most_common())


class _RowWriter:
    """Rows by their numbers: a row and what is wrong with how it was written. What row n says
    depends on the model, n and the seed."""

    def __init__(self, model: PackedCausalLM, renderer: Renderer, seed: int) -> None:
        self.model, self.renderer, self.seed = model, renderer, seed
        self.separator = find_separator(renderer.tokenizer).id

    def write_texts(self, numbers: range) -> Iterator[tuple[Json, str]]:
        start = tuple(self.renderer.tokenizer.bos_ids) or (self.separator,)
        for output in self._generate([start] * len(numbers), numbers, MAX_TEXT_TOKENS):
            yield {"text": output.text.strip()}, _find_problem(output)

    def write_conversations(self, numbers: range) -> Iterator[tuple[Json, str]]:
        prompts = [
            self.renderer.encode_prompt([{"role": "user", "content": text}])
            for text in ("Why", "hello", "2")
        ]
        question_outputs = self._generate(
            [find_common_prefix(prompts)] * len(numbers), numbers, MAX_QUESTION_TOKENS
        )
        questions = [
            [{"role": "user", "content": output.text.strip()}] for output in question_outputs
        ]
        problems = [_find_problem(output) for output in question_outputs]
        valid_indices = [i for i, problem in enumerate(problems) if not problem]
        answers = self._generate(
            [self.renderer.encode_prompt(questions[i]) for i in valid_indices],
            [numbers[i] for i in valid_indices],
            MAX_ANSWER_TOKENS,
        )
        answer_by_index = dict(zip(valid_indices, answers, strict=True))
        for i, question in enumerate(questions):
            answer_turns = (
                [{"role": "assistant", "content": answer_by_index[i].text.strip()}]
                if i in answer_by_index
                else []
            )
            yield (
                {"messages": question + answer_turns},
                problems[i] or _find_problem(answer_by_index[i]),
            )

    def _generate(
        self, prompts: Sequence[tuple[int, ...]], numbers: Sequence[int], max_new_tokens: int
    ) -> list[GenerationOutput]:
        """What the model writes after each prompt."""
        seeds = [
            (self.seed << 31) + 2 * number + (max_new_tokens == MAX_ANSWER_TOKENS)
            for number in numbers
        ]
        requests = [
            GenerationRequest(prompt, max_new_tokens, TEMPERATURE, TOP_P, seed)
            for prompt, seed in zip(prompts, seeds, strict=True)
        ]
        ends = {*self.renderer.end_ids, self.separator}
        outputs = generate(self.model, requests, decode=self.renderer.decode, end_ids=ends)
        return [generation for _, generation in sorted(outputs, key=lambda pair: pair[0])]


def _find_problem(output: GenerationOutput) -> str:
    if output.finish_reason != "end":
        return "unfinished"
    if not output.text.strip():
        return "empty"
    return "repetitive" if compute_repetition(output.tokens) > MAX_REPETITION else ""


def compute_repetition(tokens: Sequence[int]) -> float:
    """The share of runs of four tokens that stood there before."""
    ngrams = [tuple(tokens[i : i + 4]) for i in range(len(tokens) - 3)]
    return 1 - len(set(ngrams)) / len(ngrams) if ngrams else 0.0


class _RowFilter:
    """Knows what was kept so far, and what is measured."""

    def __init__(self, inputs: RunInputs) -> None:
        self.renderer = inputs.renderer
        self.eval_digests = {
            int(content)
            for rows in open_eval_datasets(inputs.recipe, inputs.datasets, inputs.renderer).values()
            for content in rows.contents_N
        }
        self.accepted_digests: set[int] = set()
        self.tokens, self.rejected_counts = 0, Counter[str]()

    def find_problem(self, row: Json) -> str:
        """Why a row is not kept; one that is counts from now on."""
        try:
            row = decode_json(
                dump_json(row), SourceLocation(SELF_REHEARSAL_FILE)
            )  # as it will be read
            example = parse_row(
                Row("", row),
                "messages" if "messages" in row else "text",
                self.renderer.has_template,
            )
            documents = self.renderer.render(example).documents
        except InputError:
            return "that cannot be read or rendered"
        digest = hash_example(example)[0]
        if digest in self.eval_digests:
            return "that are measured"
        if digest in self.accepted_digests:
            return "duplicate"
        self.accepted_digests.add(digest)
        self.tokens += sum(len(document) for document in documents)
        return ""
