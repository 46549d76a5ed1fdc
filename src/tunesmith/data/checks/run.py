"""The data check: what is wrong with the data, before anything is trained on it.

    data sets by role -> check_data -> DataReport by role, with findings

A run checks the scanned rows and the digests of all rows (`rendered.py`, `duplicates.py`).
`tunesmith data check` (`should_read_all`) also reads all texts (`text_stats.py`)."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Mapping, Sequence

from tunesmith.core.formatting import MAX_ROW_IDS
from tunesmith.core.types import DataReport, Document, Finding, Json, WeightedText
from tunesmith.data.checks import (
    contradicted,
    distribution,
    duplicates,
    labels,
    rendered,
    row_checks,
)
from tunesmith.data.checks.context import CheckContext
from tunesmith.data.checks.pii import mask_secrets
from tunesmith.data.checks.text_stats import compute_text_stats
from tunesmith.data.dataset import Dataset
from tunesmith.data.formats.few_shot import remove_shots
from tunesmith.data.json_schema import make_validator
from tunesmith.data.labels import read_labels
from tunesmith.data.length_stats import (
    DatasetScan,
    compute_percentiles,
    count_lengths,
    scan_dataset,
)
from tunesmith.data.pretraining import PretrainingCorpus
from tunesmith.data.preview import split_by_weight
from tunesmith.data.rehearsal import REHEARSAL_ROLE as REHEARSAL

MAX_ODD_SHARE = 0.4  # of answers that are no labels among labels
MAX_SHOWN_TOKENS = 1500  # of the row that the report shows


def check_data(
    datasets: Mapping[str, Dataset],
    *,
    schema: Json | None = None,
    corpus: PretrainingCorpus | None = None,
    should_read_all: bool = False,
) -> dict[str, DataReport]:
    """Check every role, held-out roles last.

    `schema` is the JSON schema of answers, except in rehearsal data. `corpus` holds the texts of
    the role `data` if they are trained as windows. With `should_read_all`, all texts are read, not
    only what a run needs. Raises InputError for an invalid schema."""
    validator = make_validator(schema) if schema is not None else None
    text_stats = None
    if should_read_all:
        text_stats = compute_text_stats(remove_shots(datasets), row_checks.get_row_finders())
    has_labels = not corpus and not schema and "data" in datasets
    odd_share = MAX_ODD_SHARE if should_read_all else 0
    labels = read_labels(datasets["data"], odd_share) if has_labels else {}
    reports: dict[str, DataReport] = {}
    for role, dataset in datasets.items():
        earlier = {name: datasets[name] for name in reports}
        scan = corpus.build_scan() if corpus and role == "data" else scan_dataset(dataset)
        role_validator = None if role == REHEARSAL else validator
        context = CheckContext(role, dataset, scan, earlier, role_validator, text_stats, labels)
        findings: list[Finding] = []
        for data_check in DATASET_CHECKS.values():
            for finding in data_check(context):
                findings.append(_mask_finding(finding, should_read_all))
        report = make_report(dataset, scan, findings)
        first_row = _show_beginning(dataset, scan.first_document) if role == "data" else ()
        reports[role] = dataclasses.replace(
            report,
            is_fully_checked=should_read_all,
            first_row=first_row,
            labels={mask_secrets(label): n for label, n in labels.items() if role == "data"},
        )
    return reports


def _mask_finding(finding: Finding, should_name_all: bool) -> Finding:
    """Mask secrets in what a finding quotes. A plan stores only the rows that are printed."""
    rows = finding.rows if should_name_all else finding.rows[:MAX_ROW_IDS]
    return dataclasses.replace(
        finding, message=mask_secrets(finding.message), rows=tuple(map(mask_secrets, rows))
    )


def make_report(
    dataset: Dataset, dataset_scan: DatasetScan, findings: Sequence[Finding] = ()
) -> DataReport:
    """Return the numbers of a scan as a report, estimated for all rows if it is a sample."""
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
        length_counts={
            longest: dataset_scan.estimate_total(count)
            for longest, count in count_lengths(dataset_scan.lengths_D).items()
        },
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


def _show_beginning(dataset: Dataset, document: Document | None) -> tuple[WeightedText, ...]:
    """Return the first tokens of a document as text, secrets masked; () without one."""
    if document is None:
        return ()
    return tuple(
        WeightedText(mask_secrets(part.text), part.weight)
        for part in split_by_weight(document, dataset.renderer, MAX_SHOWN_TOKENS)
    )


def _count_rejected(dataset: Dataset, dataset_scan: DatasetScan) -> dict[str, int]:
    scaled = {
        reason: dataset_scan.estimate_total(count)
        for reason, count in dataset_scan.rejected_rows.counts.items()
    }
    return dict(
        dataset.rejected_rows.counts + Counter(scaled) + dataset_scan.rare_rejected_rows.counts
    )


DATASET_CHECKS = {
    "rejected": rendered.check_rejected,
    "unread_files": rendered.check_unread_files,
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
    "ngram_overlap": duplicates.check_ngram_overlap,
    "answers": rendered.check_schema,
    "row_checks": row_checks.check_rows,
    "broken_json": distribution.check_broken_json,
    "cut_off": distribution.check_cut_answers,
    "outliers": distribution.check_length_outliers,
    "languages": distribution.check_languages,
    "length_bias": distribution.check_length_bias,
    "label_balance": distribution.check_label_balance,
    "classes": labels.check_classes,
    "lopsided": labels.check_lopsided_fields,
    "label_in_prompt": labels.check_label_in_prompt,
    "mislabelled": contradicted.check_mislabelled,
    "swapped": contradicted.check_swapped,
    "cut_words": contradicted.check_cut_words,
    "unused": rendered.check_unused_keys,
    "one_label": rendered.check_single_label,
}
