"""Preflight checks of tokens: what is supervised, where texts end, and what transformers encodes.

In: a Subject, of which only the samples are read. Out: a CheckResult per check, with the number of
items that it compared; a check of nothing is a warning. Left out: checks that run the model
(preflight_forward.py)."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence

import numpy as np

from tunesmith.core.errors import GateError
from tunesmith.core.events import CheckResult
from tunesmith.core.formatting import format_count
from tunesmith.core.types import Document, require
from tunesmith.session.preflight_probe import (
    BANNED_SUFFIX,
    CHAINED_SUFFIX,
    REPORT_FIX,
    TRUNCATED_SUFFIX,
    PreflightSamples,
    RoleMask,
    Subject,
)

TOKENS_AFTER_END = (
    3  # in which a template may write another end: `<|END_TEXT|><|END_OF_TURN_TOKEN|>`
)
NO_TEXTS = "no text of the data can be compared as a whole"


def check_supervised_tokens(subject: Subject) -> CheckResult:
    """Check that every document has a supervised token, and never its first."""
    samples = subject.samples
    num_supervised = 0
    for document in samples.documents:
        if not document.weights_L.any() or document.weights_L[0]:
            raise GateError(
                "no token of this document is supervised, or its first one is",
                where=f"preflight: {document.id}",
                fix="look at the row with `tunesmith data show`",
            )
        num_supervised += int(np.count_nonzero(document.weights_L))
    num_tokens = sum(map(len, samples.documents))
    evidence = f"{num_supervised} of {num_tokens}"
    return CheckResult.from_items(
        "supervised tokens", num_tokens, evidence, if_none="there is no document"
    )


def check_eos_supervised(subject: Subject) -> CheckResult:
    """Check that the last supervised token of every document is an end token, by the model folder:
    no end of its generation_config or tokenizer is written inside an answer that ends in another
    token, or right after it."""
    samples = subject.samples
    num_answers = 0
    unnamed: dict[str, None] = {}
    for document, start, end in _iter_answers(samples):
        num_answers += 1
        tokens = document.tokens_L.tolist()
        last = tokens[end - 1]
        if samples.role_masks is not None:
            # text of the template may follow the last answer, if it is trained
            targets = document.tokens_L[document.weights_L > 0].tolist()
            is_ended = not samples.end_ids.isdisjoint(targets)
        else:
            is_ended = last in samples.end_ids
        if not is_ended:
            raise GateError(
                f"the last supervised token is {last}, not an end token: "
                "the model would never learn to stop",
                where=f"preflight: {document.id}",
                fix="use on_overlong: drop instead of truncate, "
                "or a chat template that closes its answers",
            )
        if samples.role_masks is None and last not in samples.folder_end_ids:
            nearby = tokens[start : end + TOKENS_AFTER_END]
            _refuse_other_end(document.id, last, nearby, samples)
            unnamed[_name_end(last, samples)] = None
    evidence = f"{num_answers} answers end with EOS"
    if unnamed:
        ends = ", ".join(sorted(_name_end(token, samples) for token in samples.folder_end_ids))
        evidence += (
            f"; the model folder names {ends or 'none'} as the end, not {', '.join(unnamed)}: only "
            "the adapter's generation_config does, so a server that reads the base's does not stop"
        )
    result = CheckResult.from_items(
        "EOS is supervised",
        num_answers,
        evidence,
        if_none="all documents are truncated, parts of a text or trained away from (never)",
    )
    return dataclasses.replace(result, level="warn") if unnamed else result


def _refuse_other_end(
    row_id: str, last: int, nearby: Sequence[int], samples: PreflightSamples
) -> None:
    for token in nearby:
        if token in samples.folder_end_ids:
            raise GateError(
                f"answers are trained to end in {_name_end(last, samples)}, but the model folder "
                f"ends them in {_name_end(token, samples)}, which the chat template writes there: "
                "servers stop at the latter",
                where=f"preflight: {row_id}",
                fix="set a `chat_template` that ends answers in one of both, or correct "
                "eos_token_id in generation_config.json",
            )


def _iter_answers(samples: PreflightSamples) -> Iterator[tuple[Document, int, int]]:
    """Yield (document, first token, end) of the last whole answer that each document trains."""
    for document in samples.documents if samples.has_trained_answers else ():
        if document.id.endswith((CHAINED_SUFFIX, TRUNCATED_SUFFIX, BANNED_SUFFIX)):
            continue
        is_target_L = document.weights_L > 0
        end = int(np.flatnonzero(is_target_L)[-1]) + 1
        others = np.flatnonzero(~is_target_L[:end])
        yield document, int(others[-1]) + 1 if len(others) else 0, end


def _name_end(token: int, samples: PreflightSamples) -> str:
    return samples.end_texts.get(token, f"token {token}")


def swap_end(subject: Subject) -> Subject:
    """Choose the token before the end of each answer for it, where the model folder names the
    end."""
    samples = subject.samples
    swapped: dict[str, Document] = {}
    folder_ends: set[int] = set()
    chosen: set[int] = set()
    for document, start, end in _iter_answers(samples):
        if end - start > 1:
            weights_L = document.weights_L.copy()
            weights_L[end - 1] = 0
            swapped[document.id] = dataclasses.replace(document, weights_L=weights_L)
            folder_ends.add(int(document.tokens_L[end - 1]))
            chosen.add(int(document.tokens_L[end - 2]))
    return subject.with_samples(
        documents=tuple(swapped.get(document.id, document) for document in samples.documents),
        folder_end_ids=frozenset(folder_ends),
        end_ids=samples.end_ids | chosen,
        role_masks=None,
    )


def explain_short_answers(subject: Subject) -> str:
    is_longer = any(end - start > 1 for _, start, end in _iter_answers(subject.samples))
    return "" if is_longer else "no whole answer has two tokens"


def check_token_ids(subject: Subject) -> CheckResult:
    """Check that token ids, leading BOS included, equal those of apply_chat_template."""
    samples = subject.samples
    num_rows = len(samples.token_id_checks)
    num_prompts = 0
    for row_id, is_equal, is_full_row in samples.token_id_checks:
        num_prompts += not is_full_row
        if not is_equal:
            raise GateError(
                "token ids differ from apply_chat_template",
                where=f"preflight: {row_id}",
                fix="tokenizer.json and the tokenizer class disagree; if tokenizer.json is right, "
                'set "tokenizer_class": "PreTrainedTokenizerFast" in tokenizer_config.json',
            )
    evidence = f"{num_rows} rows, leading BOS included"
    if num_prompts:
        evidence += f"; only the prompts of {num_prompts}"
    return CheckResult.from_items(
        "token ids match apply_chat_template",
        num_rows,
        evidence,
        if_none="all rows are plain text, contain control-like text or a date",
    )


def check_text_eos(subject: Subject) -> CheckResult:
    """Check that EOS ends every text, occurs nowhere else, and is supervised."""
    texts = subject.samples.texts or ()
    end_ids = subject.samples.end_ids
    for text in texts:
        is_eos = [token in end_ids for token in text.document.tokens_L[1:].tolist()]
        ends_once = sum(is_eos) == 1 and is_eos[-1]
        last = text.windows[-1]
        is_supervised = last.weights_L[-1] and int(last.tokens_L[-1]) in end_ids
        if not ends_once or not is_supervised:
            raise GateError(
                "EOS does not end the text, or is not supervised",
                where=f"preflight: {text.document.id}",
                fix="please report the model's tokenizer",
            )
    evidence = f"{len(texts)} texts end with a supervised EOS and contain no other"
    return CheckResult.from_items("EOS between documents", len(texts), evidence, if_none=NO_TEXTS)


def check_window_coverage(subject: Subject) -> CheckResult:
    """Check that the windows' targets are the text's tokens in order, each once, but the first."""
    texts = subject.samples.texts or ()
    num_windows = 0
    num_targets = 0
    for text in texts:
        targets = np.concatenate([w.tokens_L[w.weights_L > 0] for w in text.windows])
        if not np.array_equal(targets, text.document.tokens_L[1:]):
            raise GateError(
                f"windows have {len(targets)} targets for a text of {len(text.document)} tokens, "
                "or other tokens than the text",
                where=f"preflight: {text.document.id}",
                fix=REPORT_FIX,
            )
        num_windows += len(text.windows)
        num_targets += len(targets)
    counts = f"{format_count(len(texts), 'text')} in {format_count(num_windows, 'window')}"
    evidence = f"{num_targets:,} tokens of {counts}"
    return CheckResult.from_items(
        "every token is a target once", num_targets, evidence, if_none=NO_TEXTS
    )


def check_role_masks(subject: Subject) -> CheckResult:
    """Check that the decoded targets hold the messages of the trained roles, and no other.

    It compares the texts of the rows with the decoded tokens, and uses none of the spans of the
    renderer."""
    num_messages = 0
    num_skipped = 0
    for mask in subject.samples.role_masks or ():
        if mask.missing_targets:
            raise _make_mask_error(mask, f"{mask.missing_targets} tokens are not targets")
        for content in mask.trained:
            if content not in mask.targets:
                raise _make_mask_error(mask, f"a trained message is not a target: {content:.40}")
        for content in mask.untrained:
            if content in mask.targets:
                raise _make_mask_error(mask, f"an untrained message is a target: {content:.40}")
        num_messages += len(mask.trained) + len(mask.untrained)
        num_skipped += mask.skipped
    evidence = f"{num_messages} messages are targets or not, as train_on says"
    if num_skipped:
        evidence += f"; {num_skipped} cannot be compared"
    return CheckResult.from_items(
        "trained roles",
        num_messages,
        evidence,
        if_none="the chat template writes no message as it is in the rows",
    )


def _make_mask_error(mask: RoleMask, message: str) -> GateError:
    return GateError(message, where=f"preflight: {mask.row_id}", fix=REPORT_FIX)


def swap_role_masks(subject: Subject) -> Subject:
    """Let the targets be what is not trained."""
    masks = tuple(mask.swap() for mask in subject.samples.role_masks or ())
    return subject.with_samples(role_masks=masks)


def explain_equal_masks(subject: Subject) -> str:
    masks = subject.samples.role_masks or ()
    if any(mask.has_distinct_targets for mask in masks):
        return ""
    return "no trained message differs from all other text"


def drop_target(subject: Subject) -> Subject:
    """Remove the last target of the first window."""
    first_text, *others = require(subject.samples.texts)
    first_window, *windows = first_text.windows
    weights_L = first_window.weights_L.copy()
    weights_L[-1] = 0
    corrupted_window = dataclasses.replace(first_window, weights_L=weights_L)
    corrupted = dataclasses.replace(first_text, windows=(corrupted_window, *windows))
    return subject.with_samples(texts=(corrupted, *others))


def explain_missing_text(subject: Subject) -> str:
    return "" if subject.samples.texts else "there is no text"
