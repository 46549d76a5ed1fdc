"""Rows that the base model generates before training: rejected answers, and rehearsal rows.

    add_synthetic_pairs(session, folder)              synthetic_pairs.json: rows without a rejected
                                                      answer get the base's own, where it is bad
    add_self_rehearsal(plan, inputs, folder, ranks)   rehearsal.jsonl: `data: self-generated`

An answer that violates a constraint of `mode: pair` becomes the rejected answer of its row. A row
with no such answer has nothing to compare, and its slot in the step stays empty. Rejected answers
may be half as long again as the longest chosen one, whatever `max_length` is, which was decided
before they existed.

Of rehearsal, with a chat template the model writes a question after the bare start of a user turn,
then the answer to it, prompted as in serving. Without one, and in continued pretraining, it writes
texts after BOS or EOS. The seed is fixed. Unusable rows are counted and dropped.

Sources: self-synthesized rehearsal, Huang 2024 (SSR); questions from a bare template, Xu 2024
(Magpie). Left out: how many tokens (plan/rehearsal.py), training on them (data/rehearsal.py)."""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

from tunesmith.core.atomic import write_file
from tunesmith.core.errors import GateError, InputError
from tunesmith.core.events import CheckResult
from tunesmith.core.json_io import dump_json
from tunesmith.core.ranks import SINGLE_PROCESS, Ranks
from tunesmith.core.run_dir import SELF_REHEARSAL_FILE, RunFolder
from tunesmith.core.sealed_json import RESTORE_FIX, read_sealed_as
from tunesmith.core.types import (
    Example,
    GenerationOutput,
    GenerationRequest,
    Json,
    Plan,
    Row,
    require,
)
from tunesmith.data.chat_template.renderer import Renderer
from tunesmith.data.checks.run import check_data
from tunesmith.data.constraints import ConstraintSet
from tunesmith.data.dataset import Dataset, open_dataset
from tunesmith.data.formats.parse import parse_row
from tunesmith.data.hashing import hash_example
from tunesmith.data.pretraining import find_separator
from tunesmith.data.readers.decode import SourceLocation, decode_json
from tunesmith.evaluate.constraint_violations import find_matches
from tunesmith.evaluate.degeneration import compute_repetition
from tunesmith.evaluate.generate_until import build_prompts, compute_max_new_tokens, iter_answers
from tunesmith.evaluate.shared_items import generate_shared
from tunesmith.model.causal_lm import PackedCausalLM
from tunesmith.model.generation.engine import find_common_prefix
from tunesmith.recipe.fields import DataSource
from tunesmith.session.datasets import open_eval_datasets
from tunesmith.session.inputs import RunInputs
from tunesmith.session.session import Session, load_starting_model
from tunesmith.train.follow_measuring import start_measuring

PAIRS_FILE = "synthetic_pairs.json"  # row -> the base model's answer
KIND = "synthetic pairs"


def add_synthetic_pairs(
    session: Session, folder: RunFolder
) -> tuple[Session, tuple[CheckResult, ...]]:
    """Return the session with pairs for rows that have no rejected answer, and their count.

    Call it before any weight changes; later attempts read the file. Raise GateError if there is no
    pair at all."""
    unpaired, _ = _select_unpaired(session.rows)
    if unpaired and not (folder.path / PAIRS_FILE).exists():
        folder.write_json(PAIRS_FILE, _generate_rejected(session, unpaired))
    return read_synthetic_pairs(session, folder.path)


def read_synthetic_pairs(session: Session, path: Path) -> tuple[Session, tuple[CheckResult, ...]]:
    """Return what `add_synthetic_pairs` does, from the file that it wrote."""
    dataset = session.rows
    unpaired, num_paired = _select_unpaired(dataset)
    if not unpaired:
        return session, ()
    pair_by_row: dict[int, Example] = {}
    for row, answer in read_sealed_as(dict[int, str], path / PAIRS_FILE).items():
        if row not in unpaired:
            message = f"row {row} of the data has no pair to make"
            raise InputError(message, where=str(path / PAIRS_FILE), fix=RESTORE_FIX)
        pair_by_row[row] = _build_pair(unpaired[row], answer)
    evidence = (
        f"{len(pair_by_row):,} of {len(unpaired):,} answers of the base model violate a "
        f"constraint: {PAIRS_FILE}"
    )
    if not pair_by_row and not num_paired:
        raise GateError(
            f"{evidence}; there is no rejected answer to train against",
            where="never",
            fix="provide prompts that elicit violations, or rows with both answers",
        )
    share_paired = (num_paired + len(pair_by_row)) / len(dataset)
    batch_size = session.plan.config.batch_size
    assert batch_size is not None, "pairs have rows, which stage: cpt has not"
    mean_pairs = batch_size * share_paired
    evidence += f"; a step of batch_size {batch_size} has {mean_pairs:.1f} pairs on average"
    dataset = dataclasses.replace(dataset, synthetic=pair_by_row)
    datasets = {**session.inputs.datasets, "data": dataset}
    inputs = dataclasses.replace(session.inputs, datasets=datasets)
    result = CheckResult(KIND, "ok" if share_paired >= 0.5 else "warn", evidence)
    return dataclasses.replace(session, inputs=inputs), (result,)


def _select_unpaired(dataset: Dataset) -> tuple[dict[int, Example], int]:
    """Return the rows without a rejected answer that can be rendered, if pairs are made of them,
    and the number of rows that have one."""
    unpaired: dict[int, Example] = {}
    num_paired = 0
    if not any(
        part.has_pairs and part.constraint_set.has_pair_constraints for part in dataset.parts
    ):
        return unpaired, num_paired
    for row in range(len(dataset)):
        example, rendered = dataset.render_row(row)
        if rendered.documents and example.rejected is None:
            unpaired[row] = example
        elif rendered.documents:
            num_paired += 1
    return unpaired, num_paired


def _generate_rejected(session: Session, unpaired: dict[int, Example]) -> dict[int, str]:
    """Return row -> answer of the base model, where it violates a constraint."""
    constraints = [c for c in session.inputs.recipe.never if c.mode == "pair"]
    session.model.network.eval()
    rows = list(unpaired)
    prompts = build_prompts(list(unpaired.values()), session.renderer)
    max_new_tokens = compute_max_new_tokens(prompts, needs_end=False)
    outputs = iter_answers(session.model, prompts, session.renderer, max_new_tokens=max_new_tokens)
    rejected: dict[int, str] = {}
    for index, output in sorted(outputs, key=lambda pair: pair[0]):
        row = rows[index]
        row_id = unpaired[row].id
        if any(find_matches(constraint, output.text, row_id) for constraint in constraints):
            rejected[row] = output.text
    return rejected


def _build_pair(example: Example, answer: str) -> Example:
    """Return a pair of the row's last answer and `answer`, rejected.

    Earlier answers become part of the prompt."""
    if example.text is not None:
        return dataclasses.replace(example, rejected=dataclasses.replace(example, text=answer))
    last = max(index for index, weight in enumerate(example.turn_weights) if weight > 0)
    prompt = example.messages[:last]
    chosen = dataclasses.replace(
        example,
        messages=example.messages[: last + 1],
        turn_weights=(*[0.0] * last, example.turn_weights[last]),
    )
    rejected_turn = {"role": "assistant", "content": answer}
    rejected = dataclasses.replace(chosen, messages=(*prompt, rejected_turn))
    return dataclasses.replace(chosen, rejected=rejected)


# ---------------------------------------------------------------- rehearsal rows


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
