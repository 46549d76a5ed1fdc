"""Rehearsal rows that the model writes itself before it is trained: `rehearsal: {data: self}`.

    plan, facts, run folder -> rehearsal.jsonl in it, and plan and facts that know these rows

With a chat template it writes conversations: a question to the bare beginning of a user's turn, then the answer to it,
as it is served. Without one, and in continued pretraining, it writes texts, after nothing but the token that stands
between documents. All is drawn with a fixed seed. Rows that show nothing are left out and counted. Sources: rows of the
model's own in the place of its training data are Huang 2024's (SSR); questions from a bare template are Xu 2024's
(Magpie). Left out: how many tokens (plan/rehearsal.py), and training on them (data/rehearsal.py).
"""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from collections.abc import Iterator, Sequence

from tunesmith.core.atomic import write_file
from tunesmith.core.errors import InputError
from tunesmith.core.events import Verdict
from tunesmith.core.json_io import json_bytes
from tunesmith.core.run_dir import OWN_ROWS, RunFolder
from tunesmith.core.types import Generation, Json, Plan, Request, Row
from tunesmith.data.chat_template.renderer import Renderer
from tunesmith.data.checks.run import check
from tunesmith.data.constraints import Never
from tunesmith.data.dataset import open_dataset
from tunesmith.data.formats.row_formats import parse
from tunesmith.data.hashing import digests
from tunesmith.data.readers.decode import Spot, decode_json
from tunesmith.data.tokenizer.eos import separator_of
from tunesmith.model.causal_lm import LanguageModel
from tunesmith.model.generation.engine import common_start, generate
from tunesmith.recipe.fields import DataSource
from tunesmith.session.inputs import Facts, measured_roles
from tunesmith.session.session import model_at_start

QUESTION, ANSWER, TEXT = 128, 384, 512  # tokens at most; what is longer is unfinished
TEMPERATURE, TOP_P = 1.0, 0.95  # as the model itself would go on, without the tail of its distribution
EXPECTED = 128  # tokens of a row that is kept; only decides how many are written at once
AT_ONCE = 64  # rows
MOST_TRIES = 4  # times as many rows as would do if all were kept
REPEATED = 0.2  # share of 4-token runs that stood there before: above it an answer is a loop


def with_own_rows(plan: Plan, facts: Facts, folder: RunFolder) -> tuple[Plan, Facts, tuple[Verdict, ...]]:
    """Nothing changes unless the plan wants rows of the model's own. Raises InputError when none of them can be used,
    MachineError without memory or disk for them."""
    if "rehearsal_tokens" not in plan.choices:
        return plan, facts, ()
    rows, left_out = written(model_at_start(plan, facts), plan, facts)
    file = folder.path / OWN_ROWS
    write_file(file, b"".join(json_bytes(row) for row in rows))
    recipe, path = facts.recipe, [DataSource(path=file)]
    dataset = open_dataset(path, facts.renderer, skip_bad=recipe.skip_bad, never=Never(recipe.never, bans=False))
    report = check({"rehearsal": dataset})["rehearsal"]
    said = f"{len(dataset):,} rows of {report.tokens:,} tokens that the model wrote itself, in {file.name}"
    said += f"; left out: {_counted(left_out)}" if left_out else ""
    facts = dataclasses.replace(facts, datasets={**facts.datasets, "rehearsal": dataset})
    plan = dataclasses.replace(plan, data={**plan.data, "rehearsal": report})
    return plan, facts, (Verdict("rehearsal rows", "ok", said),)


def written(model: LanguageModel, plan: Plan, facts: Facts) -> tuple[list[Json], Counter[str]]:
    """Rows until they have `rehearsal_tokens` together, and how many were left out for what."""
    writer = _Writer(model, facts.renderer, plan["seed"])
    write = writer.texts if plan["stage"] == "cpt" or not facts.renderer.has_template else writer.conversations
    judge = _Judge(facts)
    wanted, rows, tried = plan["rehearsal_tokens"], list[Json](), 0
    most = MOST_TRIES * max(AT_ONCE, math.ceil(wanted / EXPECTED))
    while judge.tokens < wanted and tried < most:
        count = min(AT_ONCE, max(tried, math.ceil((wanted - judge.tokens) / EXPECTED)))
        for row, problem in write(range(tried, tried + count)):
            if not (problem := problem or judge.problem(row)):
                rows.append(row)
            judge.left_out.update([problem] if problem else ())
        tried += count
    if not rows:
        what = f"none of {tried:,} rows that the model wrote can be used: {_counted(judge.left_out)}"
        raise InputError(what, where="rehearsal", fix="give a file of general rows: rehearsal: {data: general.jsonl}")
    return rows, judge.left_out


def _counted(kinds: Counter[str]) -> str:
    return ", ".join(f"{count:,} {kind}" for kind, count in kinds.most_common())


class _Writer:
    """Rows by their numbers: a row and what is wrong with how it was written. What row n says depends on the model, n
    and the seed."""

    def __init__(self, model: LanguageModel, renderer: Renderer, seed: int) -> None:
        self.model, self.renderer, self.seed = model, renderer, seed
        self.separator = separator_of(renderer.tokenizer).id

    def texts(self, numbers: range) -> Iterator[tuple[Json, str]]:
        start = tuple(self.renderer.tokenizer.bos) or (self.separator,)
        for one in self._go_on([start] * len(numbers), numbers, TEXT):
            yield {"text": one.text.strip()}, _problem(one)

    def conversations(self, numbers: range) -> Iterator[tuple[Json, str]]:
        prompts = [self.renderer.prompt([{"role": "user", "content": text}]) for text in ("Why", "hello", "2")]
        asked = self._go_on([common_start(prompts)] * len(numbers), numbers, QUESTION)
        questions = [[{"role": "user", "content": one.text.strip()}] for one in asked]
        problems = [_problem(one) for one in asked]
        good = [i for i, problem in enumerate(problems) if not problem]
        answers = self._go_on([self.renderer.prompt(questions[i]) for i in good], [numbers[i] for i in good], ANSWER)
        said = dict(zip(good, answers, strict=True))
        for i, question in enumerate(questions):
            turns = [{"role": "assistant", "content": said[i].text.strip()}] if i in said else []
            yield {"messages": question + turns}, problems[i] or _problem(said[i])

    def _go_on(self, prompts: Sequence[tuple[int, ...]], numbers: Sequence[int], most: int) -> list[Generation]:
        """What the model writes after each prompt."""
        seeds = [(self.seed << 31) + 2 * number + (most == ANSWER) for number in numbers]
        requests = [
            Request(prompt, most, TEMPERATURE, TOP_P, seed) for prompt, seed in zip(prompts, seeds, strict=True)
        ]
        ends = {*self.renderer.end_ids, self.separator}
        found = generate(self.model, requests, decode=self.renderer.decode, end_ids=ends)
        return [generation for _, generation in sorted(found, key=lambda pair: pair[0])]


def _problem(one: Generation) -> str:
    if one.finished != "end":
        return "unfinished"
    if not one.text.strip():
        return "empty"
    return "repetitive" if repeated(one.tokens) > REPEATED else ""


def repeated(tokens: Sequence[int]) -> float:
    """The share of runs of four tokens that stood there before."""
    runs = [tuple(tokens[i : i + 4]) for i in range(len(tokens) - 3)]
    return 1 - len(set(runs)) / len(runs) if runs else 0.0


class _Judge:
    """Knows what was kept so far, and what is measured."""

    def __init__(self, facts: Facts) -> None:
        self.renderer = facts.renderer
        self.measured = {
            int(content)
            for rows in measured_roles(facts.recipe, facts.datasets, facts.renderer).values()
            for content in rows.contents_N
        }
        self.kept: set[int] = set()
        self.tokens, self.left_out = 0, Counter[str]()

    def problem(self, row: Json) -> str:
        """Why a row is not kept; one that is counts from now on."""
        try:
            row = decode_json(json_bytes(row), Spot(OWN_ROWS))  # as it will be read
            example = parse(Row("", row), "messages" if "messages" in row else "text", self.renderer.has_template)
            documents = self.renderer.documents(example).documents
        except InputError:
            return "that cannot be read or rendered"
        content = digests(example)[0]
        if content in self.measured:
            return "that are measured"
        if content in self.kept:
            return "duplicate"
        self.kept.add(content)
        self.tokens += sum(len(document) for document in documents)
        return ""
