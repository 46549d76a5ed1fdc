"""Checks of what a run needs to know: rows as they were read and rendered, or a sample of them (scan.py)."""

from __future__ import annotations

import json
from collections.abc import Iterator

from jsonschema.protocols import Validator
from referencing.exceptions import Unresolvable

from tunesmith.core.errors import InputError
from tunesmith.core.types import Finding
from tunesmith.data.chat_template.renderer import BOUNDARY, PER_TURN, STRUCTURAL
from tunesmith.data.checks.context import WARN_SHARE, Subject, answer_of, some
from tunesmith.data.checks.pii import hidden
from tunesmith.data.checks.text_stats import NAMED_ROWS
from tunesmith.data.dataset import FIRST_ROWS
from tunesmith.data.formats.row_formats import FORMATS, unused_keys
from tunesmith.data.length_stats import ALL_ROWS
from tunesmith.data.pretraining import DENSE
from tunesmith.data.readers.sources import CONTAINERS
from tunesmith.data.readers.text_folder import Folder

EXPECTED_NOTES = (STRUCTURAL, PER_TURN, BOUNDARY)  # how a template works; nothing to repair in the data
READABLE = {*CONTAINERS, ".gz", ".parquet"}
SHOWN_KINDS = 3
CUTS = (256, 512, 1024, 2048, 4096, 8192, 16384)  # tokens, that people choose from


def rejected(subject: Subject) -> Iterator[Finding]:
    """Rows that cannot be used, by reason, with the first of each. They stop a run unless it skips them."""
    level = "warn" if subject.dataset.skip_bad else "error"
    total = len(subject.dataset) + subject.dataset.rejects.counts.total()
    found_in = ((subject.dataset.rejects, int), (subject.scan.rejects, subject.scan.scaled), (subject.scan.rare, int))
    for found, scaled in found_in:
        for reason, problems in found.first.items():
            count = scaled(found.counts[reason])
            kinds = "; ".join(list(dict.fromkeys(problem.what for problem in problems))[:SHOWN_KINDS])
            what = kinds if kinds.startswith(reason) else f"{reason}: {kinds}"
            message = f"{count:,} of {total:,} rows cannot be used: {what}"
            where = tuple(problem.where for problem in problems)
            yield Finding("rejected", level, message, count, where, problems[0].fix)


def others(subject: Subject) -> Iterator[Finding]:
    """Files of a folder that are not read: a mistake where they are of a kind that could be."""
    for source in (part.source for part in subject.dataset.parts):
        if isinstance(source, Folder) and source.others:
            known = source.others.keys() & READABLE
            kinds = ", ".join(f"{count:,} {suffix or 'without a suffix'}" for suffix, count in source.others.items())
            message = f"of the folder {source.name} only .txt and .md files are read, and {kinds} left out"
            fix = f"name them beside the folder: `data: [{source.path}, FILE{min(known)}]`" if known else ""
            yield Finding("others", "warn" if known else "info", message, sum(source.others.values()), fix=fix)


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
    for name in dataset.idle_bans:
        fix = 'give rows with a bad answer, marked `"negative": true`'
        yield Finding("never", "warn", f"no row breaks {name!r}: its ban trains nothing; {fix}")


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
        yield some(subject, "losses", ids, f" are dropped: {reason}; they count as empty slots of their steps")
    gone = {row for ids in subject.scan.dropped.values() for row in ids}
    cut = [row for row in subject.scan.marked.get("overlong", []) if row not in gone]
    done = "are cut at" if subject.dataset.overlong == "truncate" else "lose documents that are longer than"
    if cut:
        yield some(subject, "losses", cut, f" {done} max_length {subject.dataset.max_length}")


def long_answers(subject: Subject) -> Iterator[Finding]:
    """Answers that no prompt could be shortened for."""
    if ids := subject.scan.marked.get("answer too long"):
        message = f" have an answer that alone is longer than max_length {subject.dataset.max_length}"
        yield some(subject, "long_answers", ids, message, "warn")


def lengths(subject: Subject) -> Iterator[Finding]:
    """What each usual max_length would cut."""
    lengths_D = subject.scan.lengths_D
    if subject.reading is None or subject.role != "data" or not len(lengths_D):
        return
    longest = int(lengths_D.max())
    cuts = [(cut, int((lengths_D > cut).sum())) for cut in CUTS if cut < longest]
    said = ", ".join(f"{cut:,} {count:,} ({count / len(lengths_D):.1%})" for cut, count in cuts if count)
    if said:
        message = f"of {len(lengths_D):,} documents max_length would cut: {said}; {longest:,} none"
        yield Finding("lengths", "info", message, fix="choose max_length by it, or leave it to the plan")


def render_notes(subject: Subject) -> Iterator[Finding]:
    """What the render had to say, such as control text inside a message."""
    for note, ids in subject.scan.notes.items():
        yield some(subject, "render", ids, f": {note}", "info" if note in EXPECTED_NOTES else "warn")


def system_turns(subject: Subject) -> Iterator[Finding]:
    """A mix of rows with and without a system turn; served prompts will mostly be of one kind."""
    bare, rows = set(subject.scan.marked.get("no system", [])), subject.scan.rows_R.tolist()
    if bare and len(bare) < len(rows):
        few = 2 * len(bare) <= len(rows)  # the odd ones are named
        ids = [id for id in map(subject.dataset.id, rows) if (id in bare) == few]
        says = " have no system turn, the others have one" if few else " have a system turn, the others have none"
        yield some(subject, "system_turns", ids, says, "warn")


def empty_prompts(subject: Subject) -> Iterator[Finding]:
    if ids := subject.scan.marked.get("empty prompt"):
        yield some(subject, "empty_prompts", ids, " have a user turn without text", "warn")


def dense(subject: Subject) -> Iterator[Finding]:
    """Texts that are hardly language."""
    if ids := subject.scan.marked.get(DENSE):
        message = " hold 10,000 characters without white space: data written as text, or a minified file?"
        yield some(subject, "dense", ids, message, "warn")


def answers(subject: Subject) -> Iterator[Finding]:
    """Answers that break the recipe's schema: over 1% is an error, since the model would learn to break it."""
    if subject.validator is None:
        return
    wrong: list[str] = []
    first = ""
    for row in subject.scan.rows_R.tolist():
        example = subject.dataset.example(row)
        if not example.banned and (problem := _problem(answer_of(example), subject.validator)):
            first = first or f"{example.id}: {problem}"
            wrong.append(example.id)
    if wrong:
        level = "error" if len(wrong) > WARN_SHARE * len(subject.scan.rows_R) else "warn"
        message = f" have an answer that does not follow the schema; {first}"
        yield some(subject, "answers", wrong, message, level)


def unused(subject: Subject) -> Iterator[Finding]:
    """Keys that nothing reads, so that nobody believes they do something. Looks at a few rows."""
    dataset = subject.dataset
    keys: dict[str, str] = {}
    bad: list[str] = []
    for row in subject.scan.rows_R[:FIRST_ROWS].tolist():
        read = dataset.row(row)
        for key in unused_keys(read, dataset.part(row).format):
            keys.setdefault(key, dataset.id(row))
            bad += [dataset.id(row)] * (key == "label" and read.data[key] is False)
    if bad and dataset.trained:
        message = (
            f"{len(bad)} of the first {FIRST_ROWS} rows have `label: false`, as KTO marks bad answers: they are trained"
        )
        fix = 'drop them, or mark them `"negative": true` and say by `never:` what is bad'
        yield Finding("unused", "warn", message, len(bad), tuple(bad), fix)
    if weighted := [key for key in ("train", "weight", "loss_weight") if key in keys]:
        named = ", ".join(f"`{key}`" for key in weighted)
        message = f"not used: {named} of a row, which is trained all the same"
        fix = 'write it into a message: {"role": "assistant", "content": ..., "weight": 0}'
        yield Finding("unused", "warn", message, len(weighted), (keys[weighted[0]],), fix)
        keys = {key: id for key, id in keys.items() if key not in weighted}
    if keys:
        message = f"not used: {', '.join(f'`{key}`' for key in keys)}"
        yield Finding("unused", "info", message, len(keys), tuple(keys.values())[:NAMED_ROWS])


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
    return "" if error is None else hidden(error.message)[:200]
