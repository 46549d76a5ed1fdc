"""No check of nothing says ok, and no negative control disappears silently."""

import ast
import copy
import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import tiny_models
from preflight_models import prepare_model, prepare_sharing_model
from tiny_models import END, make_tiny_document
from tunesmith.core.events import CheckResult
from tunesmith.core.types import Document
from tunesmith.data.pretraining import count_windows, cut_window
from tunesmith.session.preflight_probe import (
    CHAINED_SUFFIX,
    NO_ORACLE,
    TRUNCATED_SUFFIX,
    PreflightSamples,
    Subject,
    TokenIdCheck,
    WindowedText,
)
from tunesmith.train import preflight_blocks, preflight_forward, preflight_tokens
from tunesmith.train.preflight import CHECKS, run_preflight

MAX_TARGETS = 7


def make_text(num_tokens: int) -> WindowedText:
    """A text that ends in the end token, with its windows."""
    document = make_tiny_document(num_tokens - 1)
    weights_L = np.ones(num_tokens, np.float32)
    weights_L[0] = 0
    tokens_L = np.where(document.tokens_L == END, 3, document.tokens_L)
    tokens_L[-1] = END
    document = dataclasses.replace(document, tokens_L=tokens_L, weights_L=weights_L)
    count = int(count_windows(num_tokens, MAX_TARGETS))
    windows = tuple(cut_window(document, MAX_TARGETS, index) for index in range(count))
    return WindowedText(document, windows)


TEXTS = (make_text(30), make_text(6))
ROWS_OF_PAIRS = (TokenIdCheck("rows:1", True), TokenIdCheck("rows:2", True, is_full_row=False))


def run_checks(**changed: Any) -> dict[str, CheckResult]:
    """Run every check of rows or, with `texts`, of texts; with prefix sharing."""
    model, samples = prepare_sharing_model()
    results = run_preflight(model, dataclasses.replace(samples, **changed))
    return {result.kind: result for result in results}


def test_nothing_checked_is_never_ok() -> None:
    with pytest.raises(ValueError, match="leak: nothing was checked"):
        CheckResult("leak", "ok", "0 documents", num_checked=0)
    result = CheckResult.from_items("leak", 0, "0 documents", if_none="there is no document")
    assert (result.level, result.evidence) == ("warn", "not checked: there is no document")


@pytest.mark.parametrize("texts", [None, TEXTS], ids=["rows", "texts"])
def test_every_check_says_how_many_items_it_compared(
    texts: tuple[WindowedText, ...] | None,
) -> None:
    results = run_checks(texts=texts, token_id_checks=ROWS_OF_PAIRS)
    for result in results.values():
        assert isinstance(result.num_checked, int), result.kind
        assert result.num_checked > 0, result.kind
        assert result.level == "ok"
        if result.kind != "prefix-shared loss = unshared loss":  # there, input minus computed
            assert str(result.num_checked) in result.evidence.replace(",", ""), result
    subject = Subject(*prepare_sharing_model()).with_samples(texts=texts)
    assert len(results) == 1 + sum(check.applies(subject) for check in CHECKS)


def rename(documents: tuple[Document, ...], suffix: str) -> tuple[Document, ...]:
    return tuple(dataclasses.replace(d, id=d.id + suffix) for d in documents)


def empty_samples() -> list[tuple[str, dict[str, Any], str, int]]:
    """A check, samples with nothing for it, its reason, and how many faults are not injected."""
    _, samples = prepare_model()
    cut = {"documents": rename(samples.documents, TRUNCATED_SUFFIX)}
    chained = {"documents": rename(samples.documents, CHAINED_SUFFIX)}
    return [
        ("EOS is supervised", cut, "truncated", 1),
        ("EOS is supervised", chained, "parts of a text", 1),
        ("token ids match apply_chat_template", {"token_id_checks": ()}, "plain text", 0),
        ("prefix-shared loss = unshared loss", {"sharing_documents": ()}, "share a prefix", 1),
        ("EOS between documents", {"texts": ()}, "no text of the data", 1),
        ("every token is a target once", {"texts": ()}, "no text of the data", 1),
        ("4-bit weights", {"is_quantized": True}, "no matrix", 0),
        ("transformers with its cache = without", {"oracle": NO_ORACLE}, "one token", 1),
    ]


@pytest.mark.parametrize(("kind", "changed", "reason", "num_skipped"), empty_samples())
def test_a_check_of_nothing_is_a_warning_with_its_reason(
    kind: str, changed: dict[str, Any], reason: str, num_skipped: int
) -> None:
    results = run_checks(**changed)
    empty = results[kind]
    assert (empty.level, empty.num_checked) == ("warn", 0)
    assert empty.evidence.startswith("not checked: ")
    assert reason in empty.evidence
    assert not [r for r in results.values() if r.level == "ok" and not r.num_checked]
    controls = results["negative controls"]
    assert (controls.level == "warn") == (num_skipped > 0)
    assert controls.evidence.count("(") == num_skipped, "each with its reason"
    if num_skipped:
        assert f"{controls.num_checked} of {controls.num_checked + 1}" in controls.evidence  # type: ignore[operator]


def test_one_document_has_no_other_to_attend_to() -> None:
    model, samples = prepare_model()
    alone = dataclasses.replace(
        samples, documents=samples.documents[:1], reference_logits=samples.reference_logits[:1]
    )
    result = preflight_forward.check_document_isolation(Subject(model, alone))
    assert (result.level, result.num_checked) == ("warn", 0)
    nothing = Subject(model, PreflightSamples((), (), frozenset()))
    assert preflight_forward.check_logits(nothing).level == "warn"
    assert preflight_forward.check_labels(nothing).level == "warn"
    assert preflight_tokens.check_supervised_tokens(nothing).level == "warn"


@pytest.mark.parametrize("module", [preflight_forward, preflight_blocks, preflight_tokens])
def test_no_check_states_ok_by_itself(module: Any) -> None:
    """A check builds its result from the number of its items."""
    tree = ast.parse(Path(module.__file__).read_text(encoding="utf-8"))
    levels: list[object] = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "CheckResult":
            levels += [arg.value for arg in node.args[1:2] if isinstance(arg, ast.Constant)]
    assert not levels


def test_flat_logits_cannot_show_shifted_labels(monkeypatch: pytest.MonkeyPatch) -> None:
    """In bf16 their losses differ by no more than rounding; in fp32 they still do."""
    config = copy.deepcopy(tiny_models.CONFIGS["granitemoehybrid"])
    config.logits_scaling = 20.0
    monkeypatch.setitem(tiny_models.CONFIGS, "granitemoehybrid", config)
    controls = run_preflight(*prepare_model("granitemoehybrid", torch.bfloat16))[-1]
    assert controls.level == "warn"
    assert "not injected: shifted labels (the next tokens have nearly" in controls.evidence
    controls = run_preflight(*prepare_model("granitemoehybrid", torch.float32))[-1]
    assert controls.level == "ok"
    assert "shifted labels" in controls.evidence
