"""The data check: what is wrong with the data before anything is trained on it.

    data sets by role -> DataReport by role, with findings

A run looks at the scanned rows (`RENDERED`) and at digests of all rows; `whole` reads all texts once more (reading.py),
for everything else in `CHECKS`.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Mapping, Sequence

from jsonschema import Draft202012Validator, SchemaError
from jsonschema.protocols import Validator
from jsonschema.validators import validator_for
from referencing import Registry

from tunesmith.core.errors import InputError
from tunesmith.core.formatting import SHOWN_ROWS
from tunesmith.core.types import DataReport, Finding, Json
from tunesmith.data.checks import distribution, duplicates, labels, rendered, row_checks
from tunesmith.data.checks.context import Subject
from tunesmith.data.checks.pii import hidden
from tunesmith.data.checks.text_stats import read_all
from tunesmith.data.dataset import Dataset
from tunesmith.data.formats.few_shot import without_shots
from tunesmith.data.length_stats import Scan, percentiles, scan
from tunesmith.data.pretraining import Corpus
from tunesmith.data.rehearsal import NAME as REHEARSAL


def check(
    datasets: Mapping[str, Dataset], *, schema: Json | None = None, corpus: Corpus | None = None, whole: bool = False
) -> dict[str, DataReport]:
    """Look at every role, held-out ones last. `schema`: what every answer but those of the rehearsal should follow.
    `corpus`: the texts of the role `data`, where they are trained as windows. `whole`: read all rows, not only what a
    run needs to know."""
    validator = _validator(schema) if schema is not None else None
    reading = read_all(without_shots(datasets), row_checks.finds()) if whole else None
    reports: dict[str, DataReport] = {}
    for role, dataset in datasets.items():
        earlier = {name: datasets[name] for name in reports}
        seen = corpus.scan() if corpus and role == "data" else scan(dataset)
        subject = Subject(role, dataset, seen, earlier, validator if role != REHEARSAL else None, reading)
        findings = tuple(_told(finding, whole) for find in CHECKS.values() for finding in find(subject))
        reports[role] = report(dataset, subject.scan, findings)
    return reports


def _told(finding: Finding, whole: bool) -> Finding:
    """Nothing that a finding quotes of a row is a secret; a plan keeps the rows that are printed."""
    rows = finding.rows if whole else finding.rows[:SHOWN_ROWS]
    return dataclasses.replace(finding, message=hidden(finding.message), rows=tuple(map(hidden, rows)))


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
        task_rows=dataset.tasks,
        task_tokens={task: seen.scaled(count) for task, count in seen.task_tokens.items() if task},
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


CHECKS = {
    "rejected": rendered.rejected,
    "others": rendered.others,
    "never": rendered.never,
    "chosen_only": rendered.chosen_only,
    "sampled": rendered.sampled,
    "losses": rendered.losses,
    "long_answers": rendered.long_answers,
    "lengths": rendered.lengths,
    "render": rendered.render_notes,
    "system_turns": rendered.system_turns,
    "empty_prompts": rendered.empty_prompts,
    "dense": rendered.dense,
    "duplicates": duplicates.duplicates,
    "conflicts": duplicates.conflicts,
    "near_duplicates": duplicates.near_duplicates,
    "leaks": duplicates.leaks,
    "near_leaks": duplicates.near_leaks,
    "copied_parts": duplicates.copied_parts,
    "answers": rendered.answers,
    "said": row_checks.findings,
    "broken_json": distribution.broken_json,
    "cut_off": distribution.cut_off,
    "outliers": distribution.outliers,
    "languages": distribution.languages,
    "openings": distribution.openings,
    "longer_side": distribution.longer_side,
    "classes": labels.classes,
    "told_label": labels.told_label,
    "triggers": labels.triggers,
    "unused": rendered.unused,
}
