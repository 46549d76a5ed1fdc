"""Worse sides made from the base model's own bad answers, for rows that have a good answer alone.

    rows without a rejected side -> greedy answers of the model before training -> pairs, kept in the run folder

An answer that a constraint of `mode: pair` matches becomes the rejected side of its row; a row whose answer matches
none has nothing to be preferred to, and is an empty slot of its step. `made_pairs.jsonl` holds the pairs as preference
rows: to be read, corrected, and trained on again. They may be half as long again as the longest good answer, whatever
`max_length` is: that was decided before they were there.
"""

from __future__ import annotations

import dataclasses
import json

from tunesmith.core.errors import GateError
from tunesmith.core.events import Verdict
from tunesmith.core.run_dir import RunFolder
from tunesmith.core.types import Example, Json
from tunesmith.data.dataset import Dataset
from tunesmith.evaluate.constraint_violations import matched
from tunesmith.evaluate.generate_until import answer_length, ask, questions_of
from tunesmith.session.session import Workbench

MADE = "made_pairs.jsonl"


def with_made_pairs(bench: Workbench, folder: RunFolder) -> tuple[Workbench, tuple[Verdict, ...]]:
    """The bench with a worse side for every row that got one, made once and read back by every later attempt; and how
    many. Call it before any weight has changed. Raises GateError when nothing is left to compare."""
    rows = bench.rows
    alone = _alone(rows) if any(part.pairs and part.never.pairing for part in rows.parts) else {}
    if not alone:
        return bench, ()
    path = folder.path / MADE
    if not path.exists():
        constraints = [one for one in bench.facts.recipe.never if one.mode == "pair"]
        answers = _answers(bench, alone).items()
        made = [(row, bad) for row, bad in answers if any(matched(one, bad, alone[row].id) for one in constraints)]
        folder.write_text(MADE, "".join(_line(row, _pair(alone[row], bad)) for row, bad in made))
    kept = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    worse = {line["row"]: _pair(alone[line["row"]], _said(line["rejected"])) for line in kept}
    evidence = f"{len(worse):,} of {len(alone):,} answers of the base model break a constraint: {MADE}"
    if not worse and len(alone) == len(rows):
        fix = "give prompts that ask for what it may not say, or rows with both sides"
        raise GateError(f"{evidence}; there is nothing to prefer the good answers to", where="never", fix=fix)
    datasets = {**bench.facts.datasets, "data": dataclasses.replace(rows, made=worse)}
    facts = dataclasses.replace(bench.facts, datasets=datasets)
    return dataclasses.replace(bench, facts=facts), (Verdict("made pairs", "ok" if worse else "warn", evidence),)


def _alone(rows: Dataset) -> dict[int, Example]:
    """The rows with one side, that can be rendered."""
    understood = ((row, rows.understand(row)) for row in range(len(rows)))
    return {row: example for row, (example, found) in understood if found.documents and example.rejected is None}


def _answers(bench: Workbench, alone: dict[int, Example]) -> dict[int, str]:
    bench.model.network.eval()
    questions, rows = questions_of(list(alone.values()), bench.renderer), list(alone)
    found = ask(bench.model, questions, bench.renderer, max_new_tokens=answer_length(questions))
    return {rows[i]: answer.text for i, answer in sorted(found, key=lambda pair: pair[0])}


def _pair(example: Example, answer: str) -> Example:
    """The row's last answer as the better side, `answer` as the worse one; earlier answers are part of the prompt."""
    if example.text is not None:
        return dataclasses.replace(example, rejected=dataclasses.replace(example, text=answer))
    last = max(place for place, weight in enumerate(example.turn_weights) if weight > 0)
    before, weights = example.messages[:last], (*[0.0] * last, example.turn_weights[last])
    chosen = dataclasses.replace(example, messages=example.messages[: last + 1], turn_weights=weights)
    worse = dataclasses.replace(chosen, messages=(*before, {"role": "assistant", "content": answer}))
    return dataclasses.replace(chosen, rejected=worse)


def _line(row: int, pair: Example) -> str:
    """A preference row, with the place of the row that it was made for."""
    assert pair.rejected is not None
    sides = {"prompt": pair.prompt, "chosen": pair.text, "rejected": pair.rejected.text}
    if pair.text is None:
        *before, better = pair.messages
        sides = {"prompt": before, "chosen": [better], "rejected": [pair.rejected.messages[-1]]}
    tools = {"tools": list(pair.tools)} if pair.tools else {}
    return json.dumps({"row": row, "id": pair.id, **sides, **tools}, ensure_ascii=False) + "\n"


def _said(side: str | list[Json]) -> str:
    return side if isinstance(side, str) else side[0]["content"]
