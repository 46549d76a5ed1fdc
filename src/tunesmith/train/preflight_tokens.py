"""Preflight checks of tokens: what is supervised, where texts end, and what transformers encodes.

In: PreflightSamples. Out: a CheckResult per check, with the number of items that it compared; a
check of nothing is a warning. Left out: checks that run the model (preflight.py)."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from tunesmith.core.errors import GateError
from tunesmith.core.events import CheckResult
from tunesmith.session.preflight_probe import (
    BANNED_SUFFIX,
    CHAINED_SUFFIX,
    TRUNCATED_SUFFIX,
    PreflightSamples,
)

REPORT_FIX = "please report this"
NO_TEXTS = "no text of the data can be compared as a whole"


def check_supervised_tokens(samples: PreflightSamples) -> CheckResult:
    """Check that every document has a supervised token, and never its first."""
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


def check_eos_supervised(samples: PreflightSamples) -> CheckResult:
    """Check that the last supervised token of every document is an end token."""
    no_end = (CHAINED_SUFFIX, TRUNCATED_SUFFIX, BANNED_SUFFIX)
    documents = [document for document in samples.documents if not document.id.endswith(no_end)]
    for document in documents:
        last = int(document.tokens_L[np.flatnonzero(document.weights_L)[-1]])
        if last not in samples.end_ids:
            raise GateError(
                f"the last supervised token is {last}, not an end token: "
                "the model would never learn to stop",
                where=f"preflight: {document.id}",
                fix="use on_overlong: drop instead of truncate, "
                "or a chat template that closes its answers",
            )
    return CheckResult.from_items(
        "EOS is supervised",
        len(documents),
        f"{len(documents)} answers end with EOS",
        if_none="all documents are truncated, parts of a text or trained away from (never)",
    )


def check_token_ids(samples: PreflightSamples) -> CheckResult:
    """Check that token ids, leading BOS included, equal those of apply_chat_template."""
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


def check_text_eos(samples: PreflightSamples) -> CheckResult:
    """Check that EOS ends every text, occurs nowhere else, and is supervised."""
    texts = samples.texts or ()
    for text in texts:
        is_eos = [token in samples.end_ids for token in text.document.tokens_L[1:].tolist()]
        ends_once = sum(is_eos) == 1 and is_eos[-1]
        last = text.windows[-1]
        is_supervised = last.weights_L[-1] and int(last.tokens_L[-1]) in samples.end_ids
        if not ends_once or not is_supervised:
            raise GateError(
                "EOS does not end the text, or is not supervised",
                where=f"preflight: {text.document.id}",
                fix="please report the model's tokenizer",
            )
    evidence = f"{len(texts)} texts end with a supervised EOS and contain no other"
    return CheckResult.from_items("EOS between documents", len(texts), evidence, if_none=NO_TEXTS)


def check_window_coverage(samples: PreflightSamples) -> CheckResult:
    """Check that the windows' targets are the text's tokens in order, each once, but the first."""
    texts = samples.texts or ()
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
    evidence = f"{num_targets:,} tokens of {len(texts)} texts in {num_windows:,} windows"
    return CheckResult.from_items(
        "every token is a target once", num_targets, evidence, if_none=NO_TEXTS
    )


TokenCheck = Callable[[PreflightSamples], CheckResult]
ROW_CHECKS: tuple[TokenCheck, ...] = (check_eos_supervised, check_token_ids)
TEXT_CHECKS: tuple[TokenCheck, ...] = (check_text_eos, check_window_coverage)
