"""The data check: what is wrong with the data before anything is trained on it.

    data sets by role -> DataReport by role, with findings

Each check is one function over a `Subject` and one line in `CHECKS`. Levels: info is worth knowing, warn is worth a
look, error should stop a run.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from jsonschema import Draft202012Validator, SchemaError
from jsonschema.protocols import Validator
from jsonschema.validators import validator_for
from referencing import Registry
from referencing.exceptions import Unresolvable

from tunesmith.data.corpus import DENSE, Corpus
from tunesmith.data.dataset import FIRST_ROWS, Dataset
from tunesmith.data.formats import FORMATS, unused_keys
from tunesmith.data.rehearsal import NAME as REHEARSAL
from tunesmith.data.render import BOUNDARY, PER_TURN, STRUCTURAL
from tunesmith.data.scan import ALL_ROWS, Scan, percentiles, scan
from tunesmith.errors import InputError
from tunesmith.types import DataReport, Example, Finding, Json

WARN_SHARE, ERROR_SHARE = 0.01, 0.20  # of the rows
SHOWN_ROWS = 5
EXPECTED_NOTES = (STRUCTURAL, PER_TURN, BOUNDARY)  # how a template works; nothing to repair in the data

Level = Literal["info", "warn", "error"]


@dataclass(frozen=True, eq=False)
class Subject:
    """What a check looks at: one role, with the roles before it."""

    dataset: Dataset
    scan: Scan
    earlier: Mapping[str, Dataset]  # the roles named before it
    validator: Validator | None  # of the recipe's answer schema


def check(
    datasets: Mapping[str, Dataset], *, schema: Json | None = None, corpus: Corpus | None = None
) -> dict[str, DataReport]:
    """Look at every role, held-out ones last. `schema`: what every answer but those of the rehearsal should follow.
    `corpus`: the texts of the role `data`, where they are trained as windows."""
    validator = _validator(schema) if schema is not None else None
    reports: dict[str, DataReport] = {}
    for role, dataset in datasets.items():
        earlier = {name: datasets[name] for name in reports}
        seen = corpus.scan() if corpus and role == "data" else scan(dataset)
        subject = Subject(dataset, seen, earlier, validator if role != REHEARSAL else None)
        findings = tuple(finding for find in CHECKS.values() for finding in find(subject))
        reports[role] = report(dataset, subject.scan, findings)
    return reports


def report(dataset: Dataset, seen: Scan, findings: Sequence[Finding] = ()) -> DataReport:
    """The numbers of a scan as a report; estimates for all rows if only a sample was scanned."""
    return DataReport(
        path=dataset.path,
        format=", ".join(dict.fromkeys(part.format for part in dataset.parts)),
        why_format="; ".join(dict.fromkeys(part.reason for part in dataset.parts)),
        rows=len(dataset),
        documents=seen.scaled(len(seen.lengths_D)),
        tokens=seen.scaled(int(seen.lengths_D.sum())),
        supervised_tokens=seen.scaled(seen.supervised_tokens),
        dropped={reason: seen.scaled(len(ids)) for reason, ids in seen.dropped.items()},
        rejected=_rejected(dataset, seen),
        truncated=seen.scaled(seen.truncated),
        length_percentiles=percentiles(seen.lengths_D),
        fingerprint=dataset.fingerprint,
        findings=tuple(findings),
        left_out=dict(dataset.tally.left_out),
        banned=dict(dataset.tally.banned) if dataset.trained else {},
    )


def _rejected(dataset: Dataset, seen: Scan) -> dict[str, int]:
    scaled = {reason: seen.scaled(count) for reason, count in seen.rejects.counts.items()}
    return dict(dataset.rejects.counts + Counter(scaled) + seen.rare.counts)


def _validator(schema: Json) -> Validator:
    """A validator that fetches nothing: a $ref out of the schema is an error."""
    kind = validator_for(schema, default=Draft202012Validator)
    try:
        kind.check_schema(schema)
    except SchemaError as error:
        raise InputError(f"not a JSON schema: {error.message}", where="schema", fix="correct the schema") from None
    return kind(schema, registry=Registry())


def _finding(subject: Subject, check: str, ids: Sequence[str], says: str, level: Level | None = None) -> Finding:
    """A finding about some of the scanned rows, "3 of 9 rows" + says; without a level, their share decides."""
    total = len(subject.scan.rows_R)
    share = len(ids) / max(1, total)
    by_share: Level = "error" if share > ERROR_SHARE else "warn" if share > WARN_SHARE else "info"
    scanned = "" if total == len(subject.dataset) else " scanned"
    message = f"{len(ids):,} of {total:,}{scanned} rows{says}"
    return Finding(check, level or by_share, message, len(ids), tuple(ids[:SHOWN_ROWS]))


# ---------------------------------------------------------------- the checks


def rejected(subject: Subject) -> Iterator[Finding]:
    """Rows that cannot be used, by reason, with the first of each. They stop a run unless it skips them."""
    level = "warn" if subject.dataset.skip_bad else "error"
    total = len(subject.dataset) + subject.dataset.rejects.counts.total()
    found_in = ((subject.dataset.rejects, int), (subject.scan.rejects, subject.scan.scaled), (subject.scan.rare, int))
    for found, scaled in found_in:
        for reason, problems in found.first.items():
            count = scaled(found.counts[reason])
            what = problems[0].what if problems[0].what.startswith(reason) else f"{reason}: {problems[0].what}"
            message = f"{count:,} of {total:,} rows cannot be used: {what}"
            yield Finding("rejected", level, message, count, tuple(problem.where for problem in problems))


def never(subject: Subject) -> Iterator[Finding]:
    """Rows whose answer breaks a constraint of the recipe, and what becomes of them."""
    dataset = subject.dataset
    total, first = len(dataset) + dataset.violations.counts.total(), dataset.violations.first.get("never", ())
    for name, count in dataset.tally.left_out.items():
        shown = tuple(v.where for v in first if f"breaks {name!r}" in v.what)
        yield Finding(
            "never", "warn", f"{count:,} of {total:,} rows are left out: the answer breaks {name!r}", count, shown
        )
    for name, count in dataset.tally.banned.items() if dataset.trained else ():
        says = "their bad places are trained away from, the rest is not trained"
        shown = tuple(dataset.tally.first[name])
        yield Finding("never", "info", f"{count:,} of {total:,} rows break {name!r}: {says}", count, shown)


def chosen_only(subject: Subject) -> Iterator[Finding]:
    """Preference rows in a stage that knows no preferences."""
    for name in dict.fromkeys(part.format for part in subject.dataset.parts):
        if "preference" in name and not subject.dataset.pairs:
            yield Finding("chosen_only", "warn", f"{name} rows: {FORMATS[name].note}", len(subject.dataset))


def sampled(subject: Subject) -> Iterator[Finding]:
    """Say when the totals are estimates."""
    rows = len(subject.scan.rows_R)
    if rows < len(subject.dataset):
        message = f"token counts are estimated from a fixed sample of {rows:,} of {len(subject.dataset):,} rows"
        yield Finding("sampled", "info", f"{message}, since there are more than {ALL_ROWS:,}", rows)


def losses(subject: Subject) -> Iterator[Finding]:
    """Rows and documents that the length policy takes away: over 1% is a warning, over 20% an error."""
    for reason, ids in subject.scan.dropped.items():
        yield _finding(subject, "losses", ids, f" are dropped: {reason}; they count as empty slots of their steps")
    gone = {row for ids in subject.scan.dropped.values() for row in ids}
    cut = [row for row in subject.scan.marked.get("overlong", []) if row not in gone]
    done = "are cut at" if subject.dataset.overlong == "truncate" else "lose documents that are longer than"
    if cut:
        yield _finding(subject, "losses", cut, f" {done} max_length {subject.dataset.max_length}")


def long_answers(subject: Subject) -> Iterator[Finding]:
    """Answers that no prompt could be shortened for."""
    if ids := subject.scan.marked.get("answer too long"):
        message = f" have an answer that alone is longer than max_length {subject.dataset.max_length}"
        yield _finding(subject, "long_answers", ids, message, "warn")


def render_notes(subject: Subject) -> Iterator[Finding]:
    """What the render had to say, such as control text inside a message."""
    for note, ids in subject.scan.notes.items():
        yield _finding(subject, "render", ids, f": {note}", "info" if note in EXPECTED_NOTES else "warn")


def system_turns(subject: Subject) -> Iterator[Finding]:
    """A mix of rows with and without a system turn; served prompts will mostly be of one kind."""
    ids = subject.scan.marked.get("no system", [])
    if ids and len(ids) < len(subject.scan.rows_R):
        yield _finding(subject, "system_turns", ids, " have no system turn, the others have one", "warn")


def empty_prompts(subject: Subject) -> Iterator[Finding]:
    if ids := subject.scan.marked.get("empty prompt"):
        yield _finding(subject, "empty_prompts", ids, " have a user turn without text", "warn")


def dense(subject: Subject) -> Iterator[Finding]:
    """Texts that are hardly language."""
    if ids := subject.scan.marked.get(DENSE):
        message = " hold 10,000 characters without white space: data written as text, or a minified file?"
        yield _finding(subject, "dense", ids, message, "warn")


def duplicates(subject: Subject) -> Iterator[Finding]:
    """Rows that say the same as an earlier row of the role, white space aside. Looks at all rows."""
    contents_N = subject.dataset.contents_N
    order_N = np.argsort(contents_N, kind="stable")
    again_N = contents_N[order_N[1:]] == contents_N[order_N[:-1]]
    copies = np.sort(order_N[1:][again_N])
    if len(copies):
        level = "warn" if len(copies) > WARN_SHARE * len(contents_N) else "info"
        message = f"{len(copies):,} of {len(contents_N):,} rows repeat an earlier row"
        yield Finding("duplicates", level, message, len(copies), _ids(subject.dataset, copies))


def leaks(subject: Subject) -> Iterator[Finding]:
    """Held-out rows that an earlier role has too: a score on them shows memory, not skill. Looks at all rows."""
    own = subject.dataset
    for role, other in subject.earlier.items():
        same_N = np.isin(own.contents_N, other.contents_N)
        prompt_N = np.isin(own.prompts_N, other.prompts_N) & ~same_N
        if same_N.any():
            message = f"{same_N.sum():,} of {len(own):,} rows are also in {role}: remove them from one of the two"
            yield Finding("leaks", "error", message, int(same_N.sum()), _ids(own, np.flatnonzero(same_N)))
        if prompt_N.any():
            message = f"{prompt_N.sum():,} of {len(own):,} rows ask what a row of {role} asks, with another answer"
            yield Finding("leaks", "warn", message, int(prompt_N.sum()), _ids(own, np.flatnonzero(prompt_N)))


def answers(subject: Subject) -> Iterator[Finding]:
    """Answers that break the recipe's schema: over 1% is an error, since the model would learn to break it."""
    if subject.validator is None:
        return
    wrong: list[str] = []
    first = ""
    for row in subject.scan.rows_R.tolist():
        example = subject.dataset.example(row)
        if not example.banned and (problem := _problem(_answer(example), subject.validator)):
            first = first or f"{example.id}: {problem}"
            wrong.append(example.id)
    if wrong:
        level = "error" if len(wrong) > WARN_SHARE * len(subject.scan.rows_R) else "warn"
        message = f" have an answer that does not follow the schema; {first}"
        yield _finding(subject, "answers", wrong, message, level)


def unused(subject: Subject) -> Iterator[Finding]:
    """Keys that nothing reads, so that nobody believes they do something. Looks at a few rows."""
    dataset = subject.dataset
    keys: dict[str, str] = {}
    for row in subject.scan.rows_R[:FIRST_ROWS].tolist():
        for key in unused_keys(dataset.row(row), dataset.part(row).format):
            keys.setdefault(key, dataset.id(row))
    if keys:
        message = f"not used: {', '.join(f'`{key}`' for key in keys)}"
        yield Finding("unused", "info", message, len(keys), tuple(keys.values())[:SHOWN_ROWS])


def _ids(dataset: Dataset, rows: np.ndarray) -> tuple[str, ...]:
    return tuple(dataset.id(row) for row in rows[:SHOWN_ROWS])


def _answer(example: Example) -> str:
    """The last answer of a conversation or completion; empty for plain text, and for a turn that only calls tools."""
    if example.messages:
        return example.messages[-1]["content"]
    return example.text or "" if example.prompt is not None else ""


def _problem(answer: str, validator: Validator) -> str:
    """Why an answer does not follow the schema, in one line; empty if it does."""
    if not answer.strip():
        return ""
    try:
        value = json.loads(answer)
    except (json.JSONDecodeError, RecursionError):
        return "not JSON"
    try:
        error = next(validator.iter_errors(value), None)
    except Unresolvable as missing:
        fix = "put the referenced definition into the schema itself"
        raise InputError(f"the schema refers to {missing}", where="schema", fix=fix) from None
    return "" if error is None else error.message[:200]


CHECKS = {
    "rejected": rejected,
    "never": never,
    "chosen_only": chosen_only,
    "sampled": sampled,
    "losses": losses,
    "long_answers": long_answers,
    "render": render_notes,
    "system_turns": system_turns,
    "empty_prompts": empty_prompts,
    "dense": dense,
    "duplicates": duplicates,
    "leaks": leaks,
    "answers": answers,
    "unused": unused,
}
