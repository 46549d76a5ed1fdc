"""The data check: what is wrong with the data before anything is trained on it.

    data sets by role -> DataReport by role, with findings

A run looks at the scanned rows (`RENDERED`) and at digests of all rows; `whole` reads all texts
once more (reading.py), for everything else in `CHECKS`."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Mapping, Sequence

from jsonschema import Draft202012Validator, SchemaError
from jsonschema.protocols import Validator
from jsonschema.validators import validator_for
from referencing import Registry

from tunesmith.core.errors import InputError
from tunesmith.core.formatting import MAX_ROW_IDS
from tunesmith.core.types import DataReport, Finding, Json
from tunesmith.data.checks import distribution, duplicates, labels, rendered, row_checks
from tunesmith.data.checks.context import CheckContext
from tunesmith.data.checks.pii import mask_secrets
from tunesmith.data.checks.text_stats import compute_text_stats
from tunesmith.data.dataset import Dataset
from tunesmith.data.formats.few_shot import remove_shots
from tunesmith.data.length_stats import DatasetScan, compute_percentiles, scan_dataset
from tunesmith.data.pretraining import PretrainingCorpus
from tunesmith.data.rehearsal import REHEARSAL_ROLE as REHEARSAL


def check_data(
    datasets: Mapping[str, Dataset],
    *,
    schema: Json | None = None,
    corpus: PretrainingCorpus | None = None,
    should_read_all: bool = False,
) -> dict[str, DataReport]:
    """Look at every role, held-out ones last. `schema`: what every answer but those of the
    rehearsal should follow. `corpus`: the texts of the role `data`, where they are trained as
    windows. `whole`: read all rows, not only what a run needs to know."""
    validator = _make_validator(schema) if schema is not None else None
    text_stats = (
        compute_text_stats(remove_shots(datasets), row_checks.get_row_finders())
        if should_read_all
        else None
    )
    reports: dict[str, DataReport] = {}
    for role, dataset in datasets.items():
        earlier = {name: datasets[name] for name in reports}
        role_scan = corpus.build_scan() if corpus and role == "data" else scan_dataset(dataset)
        context = CheckContext(
            role, dataset, role_scan, earlier, validator if role != REHEARSAL else None, text_stats
        )
        findings = tuple(
            _mask_finding(finding, should_read_all)
            for data_check in DATASET_CHECKS.values()
            for finding in data_check(context)
        )
        reports[role] = make_report(dataset, context.scan, findings)
    return reports


def _mask_finding(finding: Finding, should_name_all: bool) -> Finding:
    """Nothing that a finding quotes of a row is a secret; a plan keeps the rows that are
    printed."""
    rows = finding.rows if should_name_all else finding.rows[:MAX_ROW_IDS]
    return dataclasses.replace(
        finding, message=mask_secrets(finding.message), rows=tuple(map(mask_secrets, rows))
    )


def make_report(
    dataset: Dataset, dataset_scan: DatasetScan, findings: Sequence[Finding] = ()
) -> DataReport:
    """The numbers of a scan as a report; estimates for all rows if only a sample was scanned."""
    return DataReport(
        path=dataset.path,
        format=", ".join(dict.fromkeys(part.format for part in dataset.parts)),
        format_reason="; ".join(dict.fromkeys(part.format_reason for part in dataset.parts)),
        rows=len(dataset),
        documents=dataset_scan.estimate_total(len(dataset_scan.lengths_D)),
        tokens=dataset_scan.estimate_total(int(dataset_scan.lengths_D.sum())),
        supervised_tokens=dataset_scan.estimate_total(dataset_scan.supervised_tokens),
        dropped={
            reason: dataset_scan.estimate_total(len(ids))
            for reason, ids in dataset_scan.dropped.items()
        },
        rejected=_count_rejected(dataset, dataset_scan),
        truncated=dataset_scan.estimate_total(dataset_scan.num_truncated),
        length_percentiles=compute_percentiles(dataset_scan.lengths_D),
        fingerprint=dataset.fingerprint,
        findings=tuple(findings),
        filtered=dict(dataset.constraint_counts.filtered),
        banned=dict(dataset.constraint_counts.banned) if dataset.is_trained else {},
        task_rows=dataset.tasks,
        task_tokens={
            task: dataset_scan.estimate_total(count)
            for task, count in dataset_scan.task_tokens.items()
            if task
        },
    )


def _count_rejected(dataset: Dataset, dataset_scan: DatasetScan) -> dict[str, int]:
    scaled = {
        reason: dataset_scan.estimate_total(count)
        for reason, count in dataset_scan.rejected_rows.counts.items()
    }
    return dict(
        dataset.rejected_rows.counts + Counter(scaled) + dataset_scan.rare_rejected_rows.counts
    )


def _make_validator(schema: Json) -> Validator:
    """A validator that fetches nothing: a $ref out of the schema is an error."""
    validator_class = validator_for(schema, default=Draft202012Validator)
    try:
        validator_class.check_schema(schema)
    except SchemaError as error:
        raise InputError(
            f"not a JSON schema: {error.message}", where="schema", fix="correct the schema"
        ) from None
    return validator_class(schema, registry=Registry())


DATASET_CHECKS = {
    "rejected": rendered.check_rejected,
    "others": rendered.check_unread_files,
    "never": rendered.check_constraints,
    "chosen_only": rendered.check_chosen_only,
    "sampled": rendered.check_sampled,
    "losses": rendered.check_length_losses,
    "long_answers": rendered.check_long_answers,
    "lengths": rendered.check_lengths,
    "render": rendered.check_render_notes,
    "system_turns": rendered.check_system_turns,
    "empty_prompts": rendered.check_empty_prompts,
    "dense": rendered.check_dense_texts,
    "duplicates": duplicates.check_duplicates,
    "conflicts": duplicates.check_conflicts,
    "near_duplicates": duplicates.check_near_duplicates,
    "leaks": duplicates.check_leakage,
    "near_leaks": duplicates.check_near_leakage,
    "copied_parts": duplicates.check_ngram_overlap,
    "answers": rendered.check_schema,
    "said": row_checks.check_rows,
    "broken_json": distribution.check_broken_json,
    "cut_off": distribution.check_cut_answers,
    "outliers": distribution.check_length_outliers,
    "languages": distribution.check_languages,
    "openings": distribution.check_openings,
    "longer_side": distribution.check_length_bias,
    "classes": labels.check_classes,
    "told_label": labels.check_label_in_prompt,
    "triggers": labels.check_trigger_phrases,
    "unused": rendered.check_unused_keys,
}
