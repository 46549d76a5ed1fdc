"""Preference pairs with rejected answers sampled from the model before training.

    rows without a rejected answer -> greedy answers of the base model -> pairs, in the run folder

An answer that violates a constraint of `mode: pair` becomes the rejected answer of its row. A row
with no such answer has nothing to compare, and its slot in the step stays empty.

In: a Session before training. Out: a Session with pairs; synthetic_pairs.jsonl holds them as
preference rows, to be read, corrected and trained on again. Rejected answers may be half as long
again as the longest chosen one, whatever `max_length` is, which was decided before they existed."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Container, Iterator
from pathlib import Path

from tunesmith.core.errors import GateError, InputError
from tunesmith.core.events import CheckResult
from tunesmith.core.json_io import read_file
from tunesmith.core.run_dir import RunFolder, read_all_events
from tunesmith.core.types import Example, Json
from tunesmith.data.dataset import Dataset
from tunesmith.evaluate.constraint_violations import find_matches
from tunesmith.evaluate.generate_until import build_prompts, compute_max_new_tokens, iter_answers
from tunesmith.session.session import Session

PAIRS_FILE = "synthetic_pairs.jsonl"
KIND = "synthetic pairs"
HASH = "sha256 "


def add_synthetic_pairs(
    session: Session, folder: RunFolder, *, allow_changes: bool = False
) -> tuple[Session, tuple[CheckResult, ...]]:
    """Return the session with pairs for rows that have no rejected answer, and their count.

    Call it before any weight changes; later attempts read the file. Raise GateError if there is no
    pair at all, InputError if the file has changed since an earlier attempt."""
    unpaired, _ = _select_unpaired(session.rows)
    if unpaired and not (folder.path / PAIRS_FILE).exists():
        folder.write_text(PAIRS_FILE, _generate_pairs(session, unpaired))
    session, results = read_synthetic_pairs(session, folder.path)
    if results and not allow_changes:
        _refuse_changed_pairs(folder)
    return session, results


def _refuse_changed_pairs(folder: RunFolder) -> None:
    """Raise InputError if an earlier attempt has recorded another hash of the pairs."""
    file = folder.path / PAIRS_FILE
    events = [logged.event for logged in read_all_events(folder.path)]
    recorded = [
        event.evidence
        for event in events
        if isinstance(event, CheckResult) and event.kind == KIND and HASH in event.evidence
    ]
    if recorded and _describe_hash(file) not in recorded[0]:
        raise InputError(
            "changed since this run began to train on it",
            where=str(file),
            fix="restore it from a copy of the run folder; to train on other pairs, start a run "
            "with them as `data`",
        )


def _describe_hash(file: Path) -> str:
    return f"{HASH}{hashlib.sha256(file.read_bytes()).hexdigest()[:12]}"


def read_synthetic_pairs(session: Session, path: Path) -> tuple[Session, tuple[CheckResult, ...]]:
    """Return what `add_synthetic_pairs` does, from the file that it wrote."""
    dataset = session.rows
    unpaired, num_paired = _select_unpaired(dataset)
    if not unpaired:
        return session, ()
    pair_by_row: dict[int, Example] = {}
    for row, answer in _iter_pairs(path / PAIRS_FILE, unpaired):
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
    evidence += f", {_describe_hash(path / PAIRS_FILE)}"
    evidence += f"; a step of batch_size {batch_size} has {mean_pairs:.1f} pairs on average"
    dataset = dataclasses.replace(dataset, synthetic=pair_by_row)
    datasets = {**session.inputs.datasets, "data": dataset}
    inputs = dataclasses.replace(session.inputs, datasets=datasets)
    result = CheckResult(KIND, "ok" if share_paired >= 0.5 else "warn", evidence)
    return dataclasses.replace(session, inputs=inputs), (result,)


def _iter_pairs(file: Path, rows: Container[int]) -> Iterator[tuple[int, str]]:
    """Yield (row, rejected answer) of each line. Raises InputError for a damaged one."""
    fix = "remove the file: the base model answers again"
    lines = read_file(file, fix=fix, max_bytes=None).split(b"\n")
    for number, line in enumerate(lines[:-1], start=1):
        pair = _parse_pair(line, rows)
        if pair is None:
            raise InputError("not a pair of these rows", where=f"{file}:{number}", fix=fix)
        yield pair
    if lines[-1]:
        raise InputError("the last line is cut", where=f"{file}:{len(lines)}", fix=fix)


def _parse_pair(line: bytes, rows: Container[int]) -> tuple[int, str] | None:
    """Return (row, rejected answer), None for a damaged line."""
    try:
        record = json.loads(line)
        row = record["row"]
        rejected = record["rejected"]
        answer = rejected if isinstance(rejected, str) else rejected[0]["content"]
        return (row, answer) if row in rows and isinstance(answer, str) else None
    except (ValueError, RecursionError, LookupError, TypeError):
        return None


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


def _generate_pairs(session: Session, unpaired: dict[int, Example]) -> str:
    """Return the pairs as JSON lines."""
    constraints = [c for c in session.inputs.recipe.never if c.mode == "pair"]
    session.model.network.eval()
    rows = list(unpaired)
    prompts = build_prompts(list(unpaired.values()), session.renderer)
    max_new_tokens = compute_max_new_tokens(prompts, needs_end=False)
    outputs = iter_answers(session.model, prompts, session.renderer, max_new_tokens=max_new_tokens)
    lines: list[str] = []
    for index, output in sorted(outputs, key=lambda pair: pair[0]):
        row = rows[index]
        example = unpaired[row]
        if any(find_matches(constraint, output.text, example.id) for constraint in constraints):
            lines.append(_format_pair(row, _build_pair(example, output.text)))
    return "".join(lines)


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


def _format_pair(row: int, pair: Example) -> str:
    """Return a preference row as a JSON line, with the number of the row that it belongs to."""
    assert pair.rejected is not None
    sides: Json = {"prompt": pair.prompt, "chosen": pair.text, "rejected": pair.rejected.text}
    if pair.text is None:
        *prompt, chosen = pair.messages
        sides = {"prompt": prompt, "chosen": [chosen], "rejected": [pair.rejected.messages[-1]]}
    tools = {"tools": list(pair.tools)} if pair.tools else {}
    return json.dumps({"row": row, "id": pair.id, **sides, **tools}, ensure_ascii=False) + "\n"
