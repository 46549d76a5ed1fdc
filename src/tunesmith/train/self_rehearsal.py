"""Rehearsal rows that the model generates before training: `rehearsal: {data: self-generated}`.

    add_self_rehearsal(plan, inputs, folder) -> plan and inputs with rehearsal.jsonl of the folder

With a chat template the model writes conversations: a question after the bare start of a user turn,
then the answer to it, prompted as in serving. Without one, and in continued pretraining, it writes
texts after BOS or EOS. The seed is fixed. Unusable rows are counted and dropped.

Sources: self-synthesized rehearsal, Huang 2024 (SSR); questions from a bare template, Xu 2024
(Magpie). Left out: how many tokens (plan/rehearsal.py), training on them (data/rehearsal.py)."""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from collections.abc import Iterator, Sequence

from tunesmith.core.atomic import write_file
from tunesmith.core.errors import InputError
from tunesmith.core.events import CheckResult
from tunesmith.core.json_io import dump_json
from tunesmith.core.ranks import SINGLE_PROCESS, Ranks
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
from tunesmith.evaluate.degeneration import compute_repetition
from tunesmith.evaluate.shared_items import generate_shared
from tunesmith.model.causal_lm import PackedCausalLM
from tunesmith.model.generation.engine import find_common_prefix
from tunesmith.recipe.fields import DataSource
from tunesmith.session.inputs import RunInputs, open_eval_datasets
from tunesmith.session.session import load_starting_model
from tunesmith.train.follow_measuring import start_measuring

# Longer texts are unfinished.
MAX_QUESTION_TOKENS = 128
MAX_ANSWER_TOKENS = 384
MAX_TEXT_TOKENS = 512
# The model's own distribution without its tail.
TEMPERATURE = 1.0
TOP_P = 0.95
EXPECTED_ROW_TOKENS = 128  # only decides how many rows are generated at once
BATCH_ROWS = 64
MAX_TRIES_FACTOR = 4  # times as many rows as needed if all were usable
MAX_REPETITION = 0.2  # seq-rep-4


def add_self_rehearsal(
    plan: Plan, inputs: RunInputs, folder: RunFolder, ranks: Ranks = SINGLE_PROCESS
) -> tuple[Plan, RunInputs, tuple[CheckResult, ...]]:
    """Generate the rehearsal rows if the plan asks for them, on all ranks, else change nothing.

    Raise InputError if none is usable, MachineError without memory or disk space."""
    if plan.config.rehearsal_tokens is None:
        return plan, inputs, ()
    model = load_starting_model(plan, inputs)
    start_measuring(model, plan, ranks, folder.path)
    rows, dropped_counts = generate_rows(model, plan, inputs)
    file = folder.path / SELF_REHEARSAL_FILE
    write_file(file, b"".join(dump_json(row) for row in rows))
    dataset = open_dataset(
        [DataSource(path=file)],
        inputs.renderer,
        skip_invalid=inputs.recipe.skip_invalid,
        constraint_set=ConstraintSet(inputs.recipe.never, can_ban=False),
    )
    report = check_data({"rehearsal": dataset})["rehearsal"]
    evidence = f"{len(dataset):,} rows of {report.tokens:,} tokens in {file.name}"
    if dropped_counts:
        evidence += f"; dropped: {_format_counts(dropped_counts)}"
    inputs = dataclasses.replace(inputs, datasets={**inputs.datasets, "rehearsal": dataset})
    plan = dataclasses.replace(plan, data={**plan.data, "rehearsal": report})
    return plan, inputs, (CheckResult("self-generated rehearsal", "ok", evidence),)


def generate_rows(
    model: PackedCausalLM, plan: Plan, inputs: RunInputs
) -> tuple[list[Json], Counter[str]]:
    """Generate rows of `rehearsal_tokens` in total; return them and the counts of dropped rows."""
    generator = _RowGenerator(model, inputs.renderer, plan.config.seed)
    generate_batch = generator.generate_conversations
    if plan.config.stage == "cpt" or not inputs.renderer.has_template:
        generate_batch = generator.generate_texts
    row_filter = _RowFilter(inputs)
    target_tokens = require(plan.config.rehearsal_tokens)
    max_tries = MAX_TRIES_FACTOR * max(BATCH_ROWS, math.ceil(target_tokens / EXPECTED_ROW_TOKENS))
    rows: list[Json] = []
    dropped_counts: Counter[str] = Counter()
    num_tries = 0
    while row_filter.tokens < target_tokens and num_tries < max_tries:
        num_missing = math.ceil((target_tokens - row_filter.tokens) / EXPECTED_ROW_TOKENS)
        count = min(BATCH_ROWS, max(num_tries, num_missing))
        for row, generation_problem in generate_batch(range(num_tries, num_tries + count)):
            problem = generation_problem or row_filter.find_problem(row)
            if problem:
                dropped_counts[problem] += 1
            else:
                rows.append(row)
        num_tries += count
    if not rows:
        raise InputError(
            f"none of {num_tries:,} generated rows is usable: {_format_counts(dropped_counts)}",
            where="rehearsal",
            fix="provide a file of general rows: rehearsal: {data: general.jsonl}",
        )
    return rows, dropped_counts


def _format_counts(counts: Counter[str]) -> str:
    return ", ".join(f"{count:,} {problem}" for problem, count in counts.most_common())


class _RowGenerator:
    """Generate rows by number; row n depends on the model, n and the seed alone.

    Each method yields rows and what is wrong with their generation, "" if nothing is."""

    def __init__(self, model: PackedCausalLM, renderer: Renderer, seed: int) -> None:
        self.model = model
        self.renderer = renderer
        self.seed = seed
        self.separator = find_separator(renderer.tokenizer).id

    def generate_texts(self, numbers: range) -> Iterator[tuple[Json, str]]:
        start = tuple(self.renderer.tokenizer.bos_ids) or (self.separator,)
        for output in self._generate([start] * len(numbers), numbers, MAX_TEXT_TOKENS):
            yield {"text": output.text.strip()}, _find_problem(output)

    def generate_conversations(self, numbers: range) -> Iterator[tuple[Json, str]]:
        # What prompts of any user message have in common is the bare start of a user turn.
        prompts = [self._encode_question(text) for text in ("Why", "hello", "2")]
        starts = [find_common_prefix(prompts)] * len(numbers)
        questions = self._generate(starts, numbers, MAX_QUESTION_TOKENS)
        problems = [_find_problem(question) for question in questions]
        usable = [i for i, problem in enumerate(problems) if not problem]
        answers = self._generate(
            [self._encode_question(questions[i].text.strip()) for i in usable],
            [numbers[i] for i in usable],
            MAX_ANSWER_TOKENS,
        )
        answer_by_index = dict(zip(usable, answers, strict=True))
        for i, question in enumerate(questions):
            messages = [{"role": "user", "content": question.text.strip()}]
            problem = problems[i]
            if not problem:
                answer = answer_by_index[i]
                messages.append({"role": "assistant", "content": answer.text.strip()})
                problem = _find_problem(answer)
            yield {"messages": messages}, problem

    def _encode_question(self, text: str) -> tuple[int, ...]:
        return self.renderer.encode_prompt([{"role": "user", "content": text}])

    def _generate(
        self, prompts: Sequence[tuple[int, ...]], numbers: Sequence[int], max_new_tokens: int
    ) -> list[GenerationOutput]:
        """Return the model's continuation of each prompt."""
        is_answer = max_new_tokens == MAX_ANSWER_TOKENS
        requests: list[GenerationRequest] = []
        for prompt, number in zip(prompts, numbers, strict=True):
            seed = (self.seed << 31) + 2 * number + is_answer
            requests.append(
                GenerationRequest(
                    prompt, max_new_tokens, temperature=TEMPERATURE, top_p=TOP_P, seed=seed
                )
            )
        end_ids = {*self.renderer.end_ids, self.separator}
        outputs = generate_shared(
            self.model, requests, decode=self.renderer.decode, end_ids=end_ids
        )
        return [output for _, output in sorted(outputs, key=lambda pair: pair[0])]


def _find_problem(output: GenerationOutput) -> str:
    if output.finish_reason != "end":
        return "unfinished"
    if not output.text.strip():
        return "empty"
    return "repetitive" if compute_repetition(output.tokens) > MAX_REPETITION else ""


class _RowFilter:
    """Find rows that cannot be used, repeat an accepted one, or are held out."""

    def __init__(self, inputs: RunInputs) -> None:
        self.renderer = inputs.renderer
        self.eval_digests: set[int] = set()
        eval_datasets = open_eval_datasets(inputs.recipe, inputs.datasets, inputs.renderer)
        for dataset in eval_datasets.values():
            self.eval_digests.update(map(int, dataset.contents_N))
        self.accepted_digests: set[int] = set()
        self.tokens = 0  # of accepted rows

    def find_problem(self, row: Json) -> str:
        """Return why a row is dropped; "" accepts it."""
        form = "messages" if "messages" in row else "text"
        try:
            # As the run will read it from the file.
            row = decode_json(dump_json(row), SourceLocation(SELF_REHEARSAL_FILE))
            example = parse_row(Row("", row), form, self.renderer.has_template)
            documents = self.renderer.render(example).documents
        except InputError:
            return "not readable or renderable"
        digest = hash_example(example)[0]
        if digest in self.eval_digests:
            return "held out"
        if digest in self.accepted_digests:
            return "duplicate"
        self.accepted_digests.add(digest)
        self.tokens += sum(len(document) for document in documents)
        return ""
