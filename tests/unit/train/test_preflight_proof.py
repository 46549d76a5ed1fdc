"""What each check of preflight's forward accepts, refuses and says."""

import dataclasses
import math
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from torch import Tensor

from preflight_models import prepare_model, prepare_sharing_model
from tiny_models import make_tiny_documents
from tunesmith.core.errors import GateError
from tunesmith.core.types import Batch
from tunesmith.data.packing import count_input_tokens
from tunesmith.session.preflight_probe import Subject, choose_positions, pack_documents
from tunesmith.train import preflight_forward
from tunesmith.train.preflight import run_preflight
from tunesmith.train.preflight_blocks import check_blocks

LENGTHS = (9, 14, 20, 33)  # of `prepare_model`


@pytest.fixture(autouse=True)
def _no_grad() -> Iterator[None]:
    with torch.no_grad():
        yield


def set_errors(monkeypatch: pytest.MonkeyPatch, name: str, *errors: float) -> None:
    """Let a comparison give these errors in turn, and the last one from then on."""
    remaining = list(errors)

    def compare(*_: object, **__: object) -> float:
        return remaining.pop(0) if len(remaining) > 1 else remaining[0]

    monkeypatch.setattr(preflight_forward, name, compare)


def test_hidden_states_alone_are_those_of_the_model() -> None:
    """Of targets and of checked positions; a document with other targets is another one."""
    subject = Subject(*prepare_model())
    (long,) = make_tiny_documents((100,))
    weights_L = (long.weights_L == 0).astype(np.float32)
    weights_L[0], weights_L[-1] = 0, 1
    other = dataclasses.replace(long, weights_L=weights_L)
    for document in (long, other, *subject.samples.documents):
        batch = pack_documents([document])
        everywhere = torch.arange(count_input_tokens(document))
        whole = dataclasses.replace(batch, positions_S=everywhere)
        hidden_LH = subject.model.compute_hidden(whole)
        for positions in (batch.positions_S, torch.tensor(choose_positions(document))):
            hidden = subject.compute_unpacked(document, positions)
            torch.testing.assert_close(hidden, hidden_LH[positions])
    assert len(subject.hidden_cache) == 2 + len(subject.samples.documents)


def test_logits_say_how_far_they_are_and_how_often_they_agree() -> None:
    subject = Subject(*prepare_model())
    positions = sum(LENGTHS)
    result = preflight_forward.check_logits(subject)
    assert (result.level, result.num_checked) == ("ok", positions)
    agreement = f"top-1 equal at {positions}/{positions} positions"
    assert result.evidence == (
        f"relative difference at most 0.00%, {agreement}; document lengths 9, 14, 20, 33"
    )
    assert 0 <= subject.logit_error < 1e-4


def test_the_worst_document_is_remembered(monkeypatch: pytest.MonkeyPatch) -> None:
    subject = Subject(*prepare_model())
    set_errors(monkeypatch, "compare_logits", 2e-4, 9e-4, 1e-4)
    assert "at most 0.09%" in preflight_forward.check_logits(subject).evidence
    assert subject.logit_error == 9e-4
    set_errors(monkeypatch, "compare_logits", 2e-4, 1.1e-3, 1e-4)
    with pytest.raises(GateError, match=r"logits differ from transformers by 0\.1%") as refused:
        preflight_forward.check_logits(subject)
    assert refused.value.where == f"preflight: {subject.samples.documents[1].id}"


@pytest.mark.parametrize(
    ("dtype", "error", "has_stock", "is_refused"),
    [
        (torch.bfloat16, 0.05, False, False),
        (torch.bfloat16, 0.07, False, True),
        (torch.bfloat16, 0.49, True, False),
        (torch.bfloat16, 0.51, True, True),
        (torch.bfloat16, math.nan, True, True),
        (torch.bfloat16, math.inf, True, True),
        (torch.float32, 0.002, True, True),
    ],
)
def test_only_what_amplifies_rounding_may_differ_more(
    dtype: torch.dtype,
    error: float,
    has_stock: bool,
    is_refused: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model, samples = prepare_model(dtype=dtype)
    if not has_stock:
        samples = dataclasses.replace(samples, stock=None)
    set_errors(monkeypatch, "compare_logits", error)
    if is_refused:
        with pytest.raises(GateError, match="logits differ from transformers"):
            preflight_forward.check_logits(Subject(model, samples))
    else:
        assert preflight_forward.check_logits(Subject(model, samples)).level == "ok"


def test_labels_of_the_first_documents_are_counted() -> None:
    model, samples = prepare_model()
    targets = [int(np.count_nonzero(document.weights_L)) for document in samples.documents]
    result = preflight_forward.check_labels(Subject(model, samples))
    assert result.num_checked == sum(targets[:3])
    assert result.evidence.startswith(f"{sum(targets[:3])} losses, relative difference at most 0.0")


@pytest.mark.parametrize(("factor", "is_refused"), [(1.0005, False), (1.01, True), (0.99, True)])
def test_losses_differ_from_transformers_by_rounding_at_most(
    factor: float, is_refused: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, samples = prepare_model()
    right = preflight_forward.measure_target_losses
    monkeypatch.setattr(
        preflight_forward, "measure_target_losses", lambda *args: factor * right(*args)
    )
    if is_refused:
        with pytest.raises(GateError, match="labels are shifted or missing"):
            preflight_forward.check_labels(Subject(model, samples))
    else:
        assert preflight_forward.check_labels(Subject(model, samples)).level == "ok"


def raise_packed_losses(monkeypatch: pytest.MonkeyPatch, factor: float) -> None:
    """Let losses in packs of several documents be higher by a factor."""
    right = preflight_forward.measure_target_losses
    is_pack: list[bool] = []
    collate = preflight_forward.collate

    def collate_pack(*args: object) -> Batch:
        is_pack.append(True)
        return collate(*args)  # type: ignore[arg-type]

    def measure(*args: object) -> Tensor:
        losses_S = right(*args)  # type: ignore[arg-type]
        return losses_S * (factor if is_pack and is_pack.pop() else 1)

    monkeypatch.setattr(preflight_forward, "collate", collate_pack)
    monkeypatch.setattr(preflight_forward, "measure_target_losses", measure)


@pytest.mark.parametrize("change", [-1, 1])
def test_a_loss_in_a_pack_differs_by_rounding_at_most(
    change: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, samples = prepare_model()
    with monkeypatch.context() as patch:
        raise_packed_losses(patch, 1 + 5e-6 * change)
        result = preflight_forward.check_packed_loss(Subject(model, samples))
    assert result.num_checked == 3
    assert result.evidence.startswith("3 documents in a pack of ")
    assert result.evidence.endswith("; document lengths 9, 14, 33")
    worst = float(result.evidence.split("at most ")[1].split(",")[0])
    assert worst == pytest.approx(5e-6, abs=2e-6)
    raise_packed_losses(monkeypatch, 1 + 2e-5 * change)
    with pytest.raises(GateError, match=r"packed loss .*, unpacked loss") as refused:
        preflight_forward.check_packed_loss(Subject(model, samples))
    assert "use another attention backend" in refused.value.fix


def test_a_loss_of_nearly_nothing_may_differ_by_a_few_times_itself(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As of rows that the model knows by heart: there, rounding is larger than the loss."""
    model, samples = prepare_model()
    right = preflight_forward.measure_target_losses
    monkeypatch.setattr(
        preflight_forward, "measure_target_losses", lambda *args: 0 * right(*args) + 1e-9
    )
    raise_packed_losses(monkeypatch, 9)
    assert preflight_forward.check_packed_loss(Subject(model, samples)).level == "ok"
    raise_packed_losses(monkeypatch, 20)
    with pytest.raises(GateError, match="packed loss"):
        preflight_forward.check_packed_loss(Subject(model, samples))


def test_a_loss_with_a_shared_prefix_differs_by_rounding_at_most(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model, samples = prepare_sharing_model()
    raise_packed_losses(monkeypatch, 1 + 2e-5)
    with pytest.raises(GateError, match="prefix-shared loss") as refused:
        preflight_forward.check_prefix_sharing(Subject(model, samples))
    assert "use share_prefixes: false" in refused.value.fix


def test_shared_tokens_are_counted() -> None:
    model, samples = prepare_sharing_model()
    result = preflight_forward.check_prefix_sharing(Subject(model, samples))
    num_input = sum(map(count_input_tokens, samples.sharing_documents or ()))
    num_computed = num_input - (result.num_checked or 0)
    assert 0 < num_computed < num_input
    assert result.evidence.endswith(f"; {num_computed} tokens computed for {num_input}")


@pytest.mark.parametrize(
    ("logit_error", "error", "is_refused"),
    [
        (0.0, 0.9e-3, False),
        (0.0, 1.1e-3, True),
        (0.01, 0.019, False),
        (0.01, 0.021, True),
        (1e-9, 0.9e-3, False),
        (0.0, math.nan, True),
    ],
)
def test_hidden_states_in_a_pack_differ_by_no_more_than_the_logits(
    logit_error: float,
    error: float,
    is_refused: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Twice as much: those in the pack are rounded, and those alone."""
    model, samples = prepare_model()
    subject = Subject(model, samples, logit_error=logit_error)
    set_errors(monkeypatch, "compare_hidden", 0.0, error, 0.0)
    if is_refused:
        with pytest.raises(GateError, match="hidden states in a pack differ") as refused:
            preflight_forward.check_packed_loss(subject)
        assert refused.value.where == f"preflight: {samples.documents[1].id}"
    else:
        evidence = preflight_forward.check_packed_loss(subject).evidence
        assert f"of hidden states at most {error:.1e};" in evidence


def test_blocks_are_compared_once() -> None:
    subject = Subject(*prepare_model())
    result = check_blocks(subject)
    assert check_blocks(subject) is result


def test_four_bit_weights_are_counted_in_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    @dataclasses.dataclass
    class Weight:
        nbytes: int
        num_parameters: int

    weights = {"a": Weight(500, 1000), "b": Weight(1500, 2000)}
    monkeypatch.setattr(preflight_forward, "find_quantized_weights", lambda _: weights)
    results = {result.kind: result for result in run_preflight(*prepare_model())}
    said = results["4-bit weights"]
    assert (said.num_checked, said.evidence) == (2, "2 matrices, 2,000 bytes, 0.333x of bf16")
