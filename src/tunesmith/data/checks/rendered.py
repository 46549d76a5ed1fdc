"""Checks of what a run needs to know: rows as they were read and rendered, or a sample of them
(scan.py)."""

from __future__ import annotations

import json
from collections.abc import Iterator

from jsonschema.protocols import Validator
from referencing.exceptions import Unresolvable

from tunesmith.core.errors import InputError
from tunesmith.core.types import Finding
from tunesmith.data.chat_template.render_notes import BOUNDARY, PER_TURN, STRUCTURAL
from tunesmith.data.checks.context import WARN_SHARE, CheckContext, get_answer, make_finding
from tunesmith.data.checks.pii import mask_secrets
from tunesmith.data.checks.text_stats import MAX_NAMED_ROWS
from tunesmith.data.dataset import MAX_DETECTION_ROWS
from tunesmith.data.formats.parse import FORMATS, find_unused_keys
from tunesmith.data.length_stats import MAX_FULL_SCAN_ROWS
from tunesmith.data.pretraining import DENSE
from tunesmith.data.readers.sources import CONTAINERS
from tunesmith.data.readers.text_folder import TextFolder

EXPECTED_NOTES = (
    STRUCTURAL,
    PER_TURN,
    BOUNDARY,
)  # how a template works; nothing to repair in the data
READABLE = {*CONTAINERS, ".gz", ".parquet"}
SHOWN_KINDS = 3
LENGTH_CUTS = (256, 512, 1024, 2048, 4096, 8192, 16384)  # tokens, that people choose from


def check_rejected(context: CheckContext) -> Iterator[Finding]:
    """Rows that cannot be used, by reason, with the first of each. They stop a run unless it skips
    them."""
    level = "warn" if context.dataset.should_skip_invalid else "error"
    total = len(context.dataset) + context.dataset.rejected_rows.counts.total()
    reject_counts = (
        (context.dataset.rejected_rows, int),
        (context.scan.rejected_rows, context.scan.estimate_total),
        (context.scan.rare_rejected_rows, int),
    )
    for rejects, scale in reject_counts:
        for reason, problems in rejects.examples.items():
            count = scale(rejects.counts[reason])
            kinds = "; ".join(
                list(dict.fromkeys(problem.message for problem in problems))[:SHOWN_KINDS]
            )
            description = kinds if kinds.startswith(reason) else f"{reason}: {kinds}"
            message = f"{count:,} of {total:,} rows cannot be used: {description}"
            locations = tuple(problem.where for problem in problems)
            yield Finding("rejected", level, message, count, locations, problems[0].fix)


def check_unread_files(context: CheckContext) -> Iterator[Finding]:
    """Files of a folder that are not read: a mistake where they are of a kind that could be."""
    for source in (part.source for part in context.dataset.parts):
        if isinstance(source, TextFolder) and source.skipped_suffixes:
            readable = source.skipped_suffixes.keys() & READABLE
            kinds = ", ".join(
                f"{count:,} {suffix or 'without a suffix'}"
                for suffix, count in source.skipped_suffixes.items()
            )
            message = f"of the folder {source.name} only .txt and .md files are read, and {kinds} left out"
            fix = (
                f"name them beside the folder: `data: [{source.path}, FILE{min(readable)}]`"
                if readable
                else ""
            )
            yield Finding(
                "others",
                "warn" if readable else "info",
                message,
                sum(source.skipped_suffixes.values()),
                fix=fix,
            )


def check_constraints(context: CheckContext) -> Iterator[Finding]:
    """Rows whose answer breaks a constraint of the recipe, and what becomes of them."""
    dataset = context.dataset
    total, first = (
        len(dataset) + dataset.violations.counts.total(),
        dataset.violations.examples.get("never", ()),
    )
    for name, count in dataset.constraint_counts.filtered.items():
        row_ids = tuple(v.where for v in first if f"breaks {name!r}" in v.message)
        yield Finding(
            "never",
            "warn",
            f"{count:,} of {total:,} rows are left out: the answer breaks {name!r}",
            count,
            row_ids,
        )
    for name, count in dataset.constraint_counts.banned.items() if dataset.is_trained else ():
        effect = "their bad places are trained away from, the rest is not trained"
        row_ids = tuple(dataset.constraint_counts.examples[name])
        yield Finding(
            "never", "info", f"{count:,} of {total:,} rows break {name!r}: {effect}", count, row_ids
        )
    for name in dataset.unmatched_bans:
        fix = 'give rows with a bad answer, marked `"negative": true`'
        yield Finding("never", "warn", f"no row breaks {name!r}: its ban trains nothing; {fix}")


def check_chosen_only(context: CheckContext) -> Iterator[Finding]:
    """Preference rows in a stage that knows no preferences."""
    for name in dict.fromkeys(part.format for part in context.dataset.parts):
        if "preference" in name and not context.dataset.has_pairs:
            yield Finding(
                "chosen_only", "warn", f"{name} rows: {FORMATS[name].note}", len(context.dataset)
            )


def check_sampled(context: CheckContext) -> Iterator[Finding]:
    """Say when the totals are estimates."""
    rows = len(context.scan.rows_R)
    if rows < len(context.dataset):
        message = f"token counts are estimated from a fixed sample of {rows:,} of {len(context.dataset):,} rows"
        yield Finding(
            "sampled", "info", f"{message}, since there are more than {MAX_FULL_SCAN_ROWS:,}", rows
        )


def check_length_losses(context: CheckContext) -> Iterator[Finding]:
    """Rows and documents that the length policy takes away: over 1% is a warning, over 20% an
    error."""
    for reason, ids in context.scan.dropped.items():
        yield make_finding(
            context,
            "losses",
            ids,
            f" are dropped: {reason}; they count as empty slots of their steps",
        )
    dropped = {row for ids in context.scan.dropped.values() for row in ids}
    cut = [row for row in context.scan.flagged.get("overlong", []) if row not in dropped]
    effect = (
        "are cut at"
        if context.dataset.on_overlong == "truncate"
        else "lose documents that are longer than"
    )
    if cut:
        yield make_finding(
            context, "losses", cut, f" {effect} max_length {context.dataset.max_length}"
        )


def check_long_answers(context: CheckContext) -> Iterator[Finding]:
    """Answers that no prompt could be shortened for."""
    if ids := context.scan.flagged.get("answer too long"):
        message = (
            f" have an answer that alone is longer than max_length {context.dataset.max_length}"
        )
        yield make_finding(context, "long_answers", ids, message, "warn")


def check_lengths(context: CheckContext) -> Iterator[Finding]:
    """What each usual max_length would cut."""
    lengths_D = context.scan.lengths_D
    if context.text_stats is None or context.role != "data" or not len(lengths_D):
        return
    longest = int(lengths_D.max())
    cuts = [(cut, int((lengths_D > cut).sum())) for cut in LENGTH_CUTS if cut < longest]
    cut_counts = ", ".join(
        f"{cut:,} {count:,} ({count / len(lengths_D):.1%})" for cut, count in cuts if count
    )
    if cut_counts:
        message = (
            f"of {len(lengths_D):,} documents max_length would cut: {cut_counts}; {longest:,} none"
        )
        yield Finding(
            "lengths", "info", message, fix="choose max_length by it, or leave it to the plan"
        )


def check_render_notes(context: CheckContext) -> Iterator[Finding]:
    """What the render had to say, such as control text inside a message."""
    for note, ids in context.scan.notes.items():
        yield make_finding(
            context, "render", ids, f": {note}", "info" if note in EXPECTED_NOTES else "warn"
        )


def check_system_turns(context: CheckContext) -> Iterator[Finding]:
    """A mix of rows with and without a system turn; served prompts will mostly be of one kind."""
    without_system, rows = (
        set(context.scan.flagged.get("no system", [])),
        context.scan.rows_R.tolist(),
    )
    if without_system and len(without_system) < len(rows):
        is_minority = 2 * len(without_system) <= len(rows)  # the odd ones are named
        ids = [
            row_id
            for row_id in map(context.dataset.get_id, rows)
            if (row_id in without_system) == is_minority
        ]
        text = (
            " have no system turn, the others have one"
            if is_minority
            else " have a system turn, the others have none"
        )
        yield make_finding(context, "system_turns", ids, text, "warn")


def check_empty_prompts(context: CheckContext) -> Iterator[Finding]:
    if ids := context.scan.flagged.get("empty prompt"):
        yield make_finding(context, "empty_prompts", ids, " have a user turn without text", "warn")


def check_dense_texts(context: CheckContext) -> Iterator[Finding]:
    """Texts that are hardly language."""
    if ids := context.scan.flagged.get(DENSE):
        message = (
            " hold 10,000 characters without white space: data written as text, or a minified file?"
        )
        yield make_finding(context, "dense", ids, message, "warn")


def check_schema(context: CheckContext) -> Iterator[Finding]:
    """Answers that break the recipe's schema: over 1% is an error, since the model would learn to
    break it."""
    if context.validator is None:
        return
    invalid_ids: list[str] = []
    first_problem = ""
    for row in context.scan.rows_R.tolist():
        example = context.dataset.read_example(row)
        if not example.banned_spans and (
            problem := _explain_violation(get_answer(example), context.validator)
        ):
            first_problem = first_problem or f"{example.id}: {problem}"
            invalid_ids.append(example.id)
    if invalid_ids:
        level = "error" if len(invalid_ids) > WARN_SHARE * len(context.scan.rows_R) else "warn"
        message = f" have an answer that does not follow the schema; {first_problem}"
        yield make_finding(context, "answers", invalid_ids, message, level)


def check_unused_keys(context: CheckContext) -> Iterator[Finding]:
    """Keys that nothing reads, so that nobody believes they do something. Looks at a few rows."""
    dataset = context.dataset
    keys: dict[str, str] = {}
    negative_ids: list[str] = []
    for row in context.scan.rows_R[:MAX_DETECTION_ROWS].tolist():
        row_data = dataset.read_row(row)
        for key in find_unused_keys(row_data, dataset.get_part(row).format):
            keys.setdefault(key, dataset.get_id(row))
            negative_ids += [dataset.get_id(row)] * (key == "label" and row_data.data[key] is False)
    if negative_ids and dataset.is_trained:
        message = f"{len(negative_ids)} of the first {MAX_DETECTION_ROWS} rows have `label: false`, as KTO marks bad answers: they are trained"
        fix = 'drop them, or mark them `"negative": true` and say by `never:` what is bad'
        yield Finding("unused", "warn", message, len(negative_ids), tuple(negative_ids), fix)
    if weighted := [key for key in ("train", "weight", "loss_weight") if key in keys]:
        key_names = ", ".join(f"`{key}`" for key in weighted)
        message = f"not used: {key_names} of a row, which is trained all the same"
        fix = 'write it into a message: {"role": "assistant", "content": ..., "weight": 0}'
        yield Finding("unused", "warn", message, len(weighted), (keys[weighted[0]],), fix)
        keys = {key: row_id for key, row_id in keys.items() if key not in weighted}
    if keys:
        message = f"not used: {', '.join(f'`{key}`' for key in keys)}"
        yield Finding("unused", "info", message, len(keys), tuple(keys.values())[:MAX_NAMED_ROWS])


def _explain_violation(answer: str, validator: Validator) -> str:
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
    return "" if error is None else mask_secrets(error.message)[:200]
