"""Worse sides made from the base model's own bad answers, for rows that have a good answer alone.

    rows without a rejected side -> greedy answers of the model before training -> pairs, kept in the run folder

An answer that a constraint of `mode: pair` matches becomes the rejected side of its row; a row
whose answer matches none has nothing to be preferred to, and is an empty slot of its step.
`made_pairs.jsonl` holds the pairs as preference rows: to be read, corrected, and trained on again.
They may be half as long again as the longest good answer, whatever `max_length` is: that was
decided before they were there."""

from __future__ import annotations

import dataclasses
import json

from tunesmith.core.errors import GateError
from tunesmith.core.events import CheckResult
from tunesmith.core.run_dir import RunFolder
from tunesmith.core.types import Example, Json
from tunesmith.data.dataset import Dataset
from tunesmith.evaluate.constraint_violations import find_matches
from tunesmith.evaluate.generate_until import build_prompts, compute_max_new_tokens, iter_answers
from tunesmith.session.session import Session

PAIRS_FILE = "made_pairs.jsonl"


def add_synthetic_pairs(
    session: Session, folder: RunFolder
) -> tuple[Session, tuple[CheckResult, ...]]:
    """The bench with a worse side for every row that got one, made once and read back by every
    later attempt; and how many. Call it before any weight has changed. Raises GateError when
    nothing is left to compare."""
    dataset = session.rows
    unpaired = (
        _select_unpaired(dataset)
        if any(
            part.has_pairs and part.constraint_set.has_pair_constraints for part in dataset.parts
        )
        else {}
    )
    if not unpaired:
        return session, ()
    path = folder.path / PAIRS_FILE
    if not path.exists():
        constraints = [
            constraint for constraint in session.inputs.recipe.never if constraint.mode == "pair"
        ]
        answers = _generate_answers(session, unpaired).items()
        pairs = [
            (row, answer)
            for row, answer in answers
            if any(find_matches(constraint, answer, unpaired[row].id) for constraint in constraints)
        ]
        folder.write_text(
            PAIRS_FILE,
            "".join(_format_line(row, _build_pair(unpaired[row], answer)) for row, answer in pairs),
        )
    records = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    pair_by_row = {
        line["row"]: _build_pair(unpaired[line["row"]], _extract_answer(line["rejected"]))
        for line in records
    }
    evidence = f"{len(pair_by_row):,} of {len(unpaired):,} answers of the base model break a constraint: {PAIRS_FILE}"
    if not pair_by_row and len(unpaired) == len(dataset):
        fix = "give prompts that ask for what it may not say, or rows with both sides"
        raise GateError(
            f"{evidence}; there is nothing to prefer the good answers to", where="never", fix=fix
        )
    datasets = {
        **session.inputs.datasets,
        "data": dataclasses.replace(dataset, synthetic=pair_by_row),
    }
    inputs = dataclasses.replace(session.inputs, datasets=datasets)
    return dataclasses.replace(session, inputs=inputs), (
        CheckResult("made pairs", "ok" if pair_by_row else "warn", evidence),
    )


def _select_unpaired(dataset: Dataset) -> dict[int, Example]:
    """The rows with one side, that can be rendered."""
    rendered_rows = ((row, dataset.render_row(row)) for row in range(len(dataset)))
    return {
        row: example
        for row, (example, rendered) in rendered_rows
        if rendered.documents and example.rejected is None
    }


def _generate_answers(session: Session, unpaired: dict[int, Example]) -> dict[int, str]:
    session.model.network.eval()
    questions, rows = build_prompts(list(unpaired.values()), session.renderer), list(unpaired)
    outputs = iter_answers(
        session.model, questions, session.renderer, max_new_tokens=compute_max_new_tokens(questions)
    )
    return {rows[i]: answer.text for i, answer in sorted(outputs, key=lambda pair: pair[0])}


def _build_pair(example: Example, answer: str) -> Example:
    """The row's last answer as the better side, `answer` as the worse one; earlier answers are part
    of the prompt."""
    if example.text is not None:
        return dataclasses.replace(example, rejected=dataclasses.replace(example, text=answer))
    last = max(index for index, weight in enumerate(example.turn_weights) if weight > 0)
    before, weights = example.messages[:last], (*[0.0] * last, example.turn_weights[last])
    chosen = dataclasses.replace(
        example, messages=example.messages[: last + 1], turn_weights=weights
    )
    rejected = dataclasses.replace(
        chosen, messages=(*before, {"role": "assistant", "content": answer})
    )
    return dataclasses.replace(chosen, rejected=rejected)


def _format_line(row: int, pair: Example) -> str:
    """A preference row, with the place of the row that it was made for."""
    assert pair.rejected is not None
    sides = {"prompt": pair.prompt, "chosen": pair.text, "rejected": pair.rejected.text}
    if pair.text is None:
        *before, better = pair.messages
        sides = {"prompt": before, "chosen": [better], "rejected": [pair.rejected.messages[-1]]}
    tools = {"tools": list(pair.tools)} if pair.tools else {}
    return json.dumps({"row": row, "id": pair.id, **sides, **tools}, ensure_ascii=False) + "\n"


def _extract_answer(side: str | list[Json]) -> str:
    return side if isinstance(side, str) else side[0]["content"]
