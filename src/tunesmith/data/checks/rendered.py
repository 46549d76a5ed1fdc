"""Checks of rows as they were read and rendered: what every run needs to know.

They use the scan of the data set (`length_stats.py`): all rows, or a sample of many."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence

from jsonschema.protocols import Validator

from tunesmith.core.formatting import format_count
from tunesmith.core.json_io import MAX_TEXT_VALUES, describe_json_error, has_more_values
from tunesmith.core.types import Finding
from tunesmith.data.chat_template.render_notes import BOUNDARY, PER_TURN, STRUCTURAL
from tunesmith.data.checks.context import (
    WARN_SHARE,
    CheckContext,
    describe_rows,
    get_answer,
    make_finding,
)
from tunesmith.data.checks.pii import mask_secrets
from tunesmith.data.checks.text_stats import MAX_NAMED_ROWS
from tunesmith.data.dataset import MAX_DETECTION_ROWS
from tunesmith.data.formats.parse import FORMATS, find_unused_keys
from tunesmith.data.formats.tables import name_columns
from tunesmith.data.json_schema import find_violation
from tunesmith.data.length_stats import MAX_FULL_SCAN_ROWS
from tunesmith.data.pretraining import DENSE
from tunesmith.data.readers.sources import CONTAINERS
from tunesmith.data.readers.text_folder import TextFolder

# Notes on how the template works; there is nothing to repair in the data.
EXPECTED_NOTES = (STRUCTURAL, PER_TURN, BOUNDARY)
READABLE_SUFFIXES = {*CONTAINERS, ".gz", ".parquet"}
SHOWN_KINDS = 3
MAX_NAMED_KEYS = 5
MIN_TABLE_ROWS = 20  # a table of fewer may be a trial
LENGTH_CUTS = (256, 512, 1024, 2048, 4096, 8192, 16384)  # usual values of max_length


def check_rejected(context: CheckContext) -> Iterator[Finding]:
    """Rows that cannot be used, by reason, with examples. They stop a run unless it skips them."""
    level = "warn" if context.dataset.skip_invalid else "error"
    total = len(context.dataset) + context.dataset.rejected_rows.counts.total()
    reject_counts = (
        (context.dataset.rejected_rows, int),
        (context.scan.rejected_rows, context.scan.estimate_total),
        (context.scan.rare_rejected_rows, int),
    )
    for rejects, scale in reject_counts:
        for reason, problems in rejects.examples.items():
            count = scale(rejects.counts[reason])
            messages = dict.fromkeys(problem.message for problem in problems)
            kinds = "; ".join(list(messages)[:SHOWN_KINDS])
            description = kinds if kinds.startswith(reason) else f"{reason}: {kinds}"
            message = f"{count:,} of {total:,} rows cannot be used: {description}"
            locations = tuple(problem.where for problem in problems)
            yield Finding("rejected", level, message, count, locations, problems[0].fix)


def check_unread_files(context: CheckContext) -> Iterator[Finding]:
    """Files of a folder that are not read; a warning if their format is supported."""
    for part in context.dataset.parts:
        source = part.source
        if not isinstance(source, TextFolder) or not source.skipped_suffixes:
            continue
        counts: list[str] = []
        for suffix, count in source.skipped_suffixes.items():
            counts.append(f"{count:,} {suffix or 'without a suffix'}")
        message = f"only .txt and .md files of {source.name} are read; skipped: {', '.join(counts)}"
        level = "info"
        fix = ""
        if readable := source.skipped_suffixes.keys() & READABLE_SUFFIXES:
            level = "warn"
            fix = f"list them with the folder: `data: [{source.path}, FILE{min(readable)}]`"
        num_files = sum(source.skipped_suffixes.values())
        yield Finding("unread_files", level, message, num_files, fix=fix)


def check_constraints(context: CheckContext) -> Iterator[Finding]:
    """Rows whose answer violates a constraint of the recipe, and what happens to them."""
    dataset = context.dataset
    total = len(dataset) + dataset.violations.counts.total()
    violations = dataset.violations.examples.get("never", ())
    for name, count in dataset.constraint_counts.filtered.items():
        row_ids = tuple(v.where for v in violations if f"breaks {name!r}" in v.message)
        counts = describe_rows(count, total, "are filtered out")
        message = f"{counts}: the answer breaks {name!r}"
        yield Finding("never", "warn", message, count, row_ids)
    if dataset.is_trained:
        for name, count in dataset.constraint_counts.banned.items():
            counts = describe_rows(count, total, f"have an answer that breaks {name!r}")
            message = f"{counts}: only the violating tokens are trained, with unlikelihood loss"
            row_ids = tuple(dataset.constraint_counts.examples[name])
            yield Finding("never", "info", message, count, row_ids)
    for name in dataset.unmatched_bans:
        message = f"no row breaks {name!r}: its ban trains nothing"
        fix = 'add rows with a bad answer, marked `"negative": true`'
        yield Finding("never", "warn", message, fix=fix)


def check_chosen_only(context: CheckContext) -> Iterator[Finding]:
    """Preference rows in a stage that does not use preferences."""
    for name in dict.fromkeys(part.format for part in context.dataset.parts):
        is_used = context.dataset.has_pairs or context.dataset.has_labels
        if "preference" in name and not is_used:
            message = f"{name} rows: {FORMATS[name].note}"
            yield Finding("chosen_only", "warn", message, len(context.dataset))


def check_sampled(context: CheckContext) -> Iterator[Finding]:
    """Report that the totals are estimates."""
    num_scanned = len(context.scan.rows_R)
    if num_scanned < len(context.dataset):
        message = (
            f"token counts are estimated from a fixed sample of {num_scanned:,} of"
            f" {len(context.dataset):,} rows (more than {MAX_FULL_SCAN_ROWS:,})"
        )
        yield Finding("sampled", "info", message, num_scanned)


def check_length_losses(context: CheckContext) -> Iterator[Finding]:
    """Rows and documents lost to the over-long policy: a warning above 1%, an error above 20%."""
    for reason, ids in context.scan.dropped.items():
        predicate = f"are dropped: {reason}; they count as empty slots of their steps"
        yield make_finding(context, "losses", ids, predicate)
    dropped_ids = {row_id for ids in context.scan.dropped.values() for row_id in ids}
    cut_ids = [row for row in context.scan.flagged.get("overlong", []) if row not in dropped_ids]
    if cut_ids:
        predicate = f"have documents longer than max_length {context.dataset.max_length}: dropped"
        if context.dataset.on_overlong == "truncate":
            predicate = f"are truncated to max_length {context.dataset.max_length}"
        yield make_finding(context, "losses", cut_ids, predicate)


def check_long_answers(context: CheckContext) -> Iterator[Finding]:
    """Answers that no shorter prompt would make fit."""
    if ids := context.scan.flagged.get("answer too long"):
        predicate = f"have an answer longer than max_length {context.dataset.max_length}"
        yield make_finding(context, "long_answers", ids, predicate, "warn")


def check_lengths(context: CheckContext) -> Iterator[Finding]:
    """How many documents are longer than each usual max_length."""
    lengths_D = context.scan.lengths_D
    if context.text_stats is None or context.role != "data" or not len(lengths_D):
        return
    longest = int(lengths_D.max())
    cuts: list[str] = []
    for max_length in LENGTH_CUTS:
        count = int((lengths_D > max_length).sum())
        if max_length < longest and count:
            cuts.append(f"{count:,} ({count / len(lengths_D):.1%}) above {max_length:,}")
    if cuts:
        documents = format_count(len(lengths_D), "document")
        message = f"tokens of {documents}: {', '.join(cuts)}; maximum {longest:,}"
        fix = "set max_length from this, or leave it at auto"
        yield Finding("lengths", "info", message, fix=fix)


def check_render_notes(context: CheckContext) -> Iterator[Finding]:
    """Notes of the render, such as control-like text in a message."""
    for note, ids in context.scan.notes.items():
        level = "info" if note in EXPECTED_NOTES else "warn"
        yield make_finding(context, "render", ids, f": {note}", level)


def check_system_turns(context: CheckContext) -> Iterator[Finding]:
    """A mix of rows with and without a system message; served prompts are mostly of one kind."""
    with_ids = context.scan.flagged.get("system", [])
    without_ids = context.scan.flagged.get("no system", [])
    if not with_ids or not without_ids:
        return
    if len(without_ids) <= len(with_ids):  # the minority is named
        predicate = f"have no system message, {_count_having(with_ids)} one"
        yield make_finding(context, "system_turns", without_ids, predicate, "warn")
    else:
        predicate = f"have a system message, {_count_having(without_ids)} none"
        yield make_finding(context, "system_turns", with_ids, predicate, "warn")


def _count_having(ids: Sequence[str]) -> str:
    return f"{len(ids):,} {'has' if len(ids) == 1 else 'have'}"


def check_empty_prompts(context: CheckContext) -> Iterator[Finding]:
    if ids := context.scan.flagged.get("empty prompt"):
        yield make_finding(context, "empty_prompts", ids, "have an empty user message", "warn")


def check_dense_texts(context: CheckContext) -> Iterator[Finding]:
    """Texts that are hardly natural language."""
    if ids := context.scan.flagged.get(DENSE):
        predicate = "contain 10,000 characters without white space: encoded data or minified code?"
        yield make_finding(context, "dense", ids, predicate, "warn")


def check_schema(context: CheckContext) -> Iterator[Finding]:
    """Answers that violate the recipe's schema: an error above 1%, since the model would learn to
    violate it."""
    if context.validator is None:
        return
    invalid_ids: list[str] = []
    first_problem = ""
    for row in context.scan.rows_R.tolist():
        example = context.dataset.read_example(row)
        if example.banned_spans:
            continue
        if problem := _explain_violation(get_answer(example), context.validator):
            first_problem = first_problem or f"{example.id}: {problem}"
            invalid_ids.append(example.id)
    if invalid_ids:
        level = "error" if len(invalid_ids) > WARN_SHARE * len(context.scan.rows_R) else "warn"
        predicate = f"have an answer that violates response_schema; {first_problem}"
        yield make_finding(context, "answers", invalid_ids, predicate, level)


def check_unused_keys(context: CheckContext) -> Iterator[Finding]:
    """Keys of a row that have no effect. Checks the first few rows."""
    dataset = context.dataset
    keys: dict[str, str] = {}
    negative_ids: list[str] = []
    first_rows = context.scan.rows_R[:MAX_DETECTION_ROWS].tolist()
    for row in first_rows:
        row_data = dataset.read_row(row)
        for key in find_unused_keys(
            row_data, dataset.get_part(row).format, has_labels=dataset.has_labels
        ):
            if key == "label" and dataset.get_part(row).has_classes:
                continue  # the number of a class whose name is the answer
            keys.setdefault(key, dataset.get_id(row))
            if key == "label" and row_data.data[key] is False:
                negative_ids.append(dataset.get_id(row))
    if negative_ids and dataset.is_trained:
        message = (
            f"{len(negative_ids)} of the first {len(first_rows)} rows have `label: false` (a bad"
            " answer in KTO) and are trained like the others"
        )
        fix = 'drop them, or mark them `"negative": true` and set `never:`'
        yield Finding("unused", "warn", message, len(negative_ids), tuple(negative_ids), fix)
    if weighted := [key for key in ("train", "weight", "loss_weight") if key in keys]:
        key_names = ", ".join(f"`{key}`" for key in weighted)
        message = f"not used: {key_names} of a row; the row is trained anyway"
        fix = 'set it on a message: {"role": "assistant", "content": ..., "weight": 0}'
        yield Finding("unused", "warn", message, len(weighted), (keys[weighted[0]],), fix)
        keys = {key: row_id for key, row_id in keys.items() if key not in weighted}
    if keys:
        key_names = ", ".join(f"`{key:.40}`" for key in list(keys)[:MAX_NAMED_KEYS])
        remaining = len(keys) - MAX_NAMED_KEYS
        more = f" and {format_count(remaining, 'more key')}" if remaining > 0 else ""
        message = f"not used: {key_names}{more}"
        fix = _suggest_columns(context, next(iter(keys)))
        rows = tuple(keys.values())[:MAX_NAMED_ROWS]
        yield Finding("unused", "error" if fix else "info", message, len(keys), rows, fix)


def _suggest_columns(context: CheckContext, first_key: str) -> str:
    """Return how a recipe says that other columns are not needed; "" where it need not.

    A conversation holds its whole task, so other keys beside it are about the row."""
    part = context.dataset.parts[0]
    is_table = part.row_kind == "answer" and part.format in ("completion", "alpaca", "text")
    if context.role != "data" or part.is_described or not is_table:
        return ""
    names = {name: name for name in FORMATS[part.format].keys}
    if part.prompt_formatter:
        formatter = part.prompt_formatter
        names = name_columns(
            formatter.columns, formatter.answer_column, has_classes=part.has_classes
        )
    columns = ", ".join(f"{name}: {column}" for name, column in names.items())
    fix = f"if it is not needed, name the columns that are: `columns: {{{columns}}}`"
    if part.format == "text":
        fix += f"; if it is the answer, `columns: {{{columns}, label: {first_key:.40}}}`"
    return fix


def check_single_label(context: CheckContext) -> Iterator[Finding]:
    """A table with one label in all rows, of which nothing can be learned."""
    dataset = context.dataset
    is_table = all(part.has_classes for part in dataset.parts)
    if context.role != "data" or not is_table or len(dataset) < MIN_TABLE_ROWS:
        return
    labels: set[str] = set()
    for row in range(len(dataset)):
        labels.add(get_answer(dataset.read_example(row)))
        if len(labels) > 1:
            return
    message = f"all {len(dataset):,} rows have the label {mask_secrets(*labels)!r:.60}"
    fix = "add rows of other labels; if the file is sorted by label, raise max_examples"
    yield Finding("one_label", "error", message, len(dataset), (dataset.get_id(0),), fix)


def _explain_violation(answer: str, validator: Validator) -> str:
    """Return in one line why an answer violates the schema; empty if it does not."""
    if not answer.strip():
        return ""
    if has_more_values(answer, MAX_TEXT_VALUES):
        return f"more than {MAX_TEXT_VALUES:,} values"
    try:
        value = json.loads(answer)
    except (ValueError, RecursionError) as error:
        return describe_json_error(error)
    return mask_secrets(find_violation(value, validator))[:200]
