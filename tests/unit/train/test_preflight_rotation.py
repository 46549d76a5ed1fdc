"""Models whose rotary embedding depends on the length: preflight would notice one rotation for a
pack, also where all rows are short."""

import copy
import dataclasses
from collections.abc import Sequence

import pytest
import torch
from transformers import AutoModelForCausalLM, Phi3Config

import tiny_models
from preflight_models import get_refusal, prepare_model
from quick_families import leave_others_to_slow
from rotary_configs import CONFIGS, LIMIT, LONGROPE
from tiny_models import SIZES, make_tiny_documents
from tunesmith.core.errors import GateError
from tunesmith.core.types import PackLayout
from tunesmith.data.packing import count_input_tokens
from tunesmith.model import causal_lm
from tunesmith.model.causal_lm import PackedCausalLM
from tunesmith.model.rotary import DocumentRotary
from tunesmith.session.preflight_probe import PreflightSamples, Subject, pack_documents
from tunesmith.train.preflight import run_preflight
from tunesmith.train.preflight_forward import check_rotation

FAULT = "pack rotated as one document"
ROWS = {"short": (5, 6, 7, 8), "mixed": (5, 6, 7, 8, 9, 3 * LIMIT), "long": (40, 50, 60, 90)}


def prepare_rotary_model(
    name: str,
    lengths: Sequence[int],
    monkeypatch: pytest.MonkeyPatch,
    dtype: torch.dtype = torch.float32,
) -> tuple[PackedCausalLM, PreflightSamples]:
    monkeypatch.setitem(tiny_models.CONFIGS, name, CONFIGS.get(name) or EQUAL_FACTORS)
    return prepare_model(name, dtype, candidates=make_tiny_documents(lengths))


EQUAL_FACTORS = Phi3Config(
    **SIZES,
    rope_parameters=LONGROPE | {"long_factor": LONGROPE["short_factor"]},
    original_max_position_embeddings=LIMIT,
)


@pytest.mark.parametrize(
    ("lengths", "dtype"),
    [
        (ROWS["short"], torch.float32),
        (ROWS["mixed"], torch.bfloat16),
        (ROWS["long"], torch.float32),
    ],
    ids=ROWS,
)
@pytest.mark.parametrize("name", leave_others_to_slow(CONFIGS))
def test_each_family_has_the_check_and_its_control(
    name: str, lengths: Sequence[int], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, samples = prepare_rotary_model(name, lengths, monkeypatch, dtype)
    results = {result.kind: result for result in run_preflight(model, samples)}
    rotation = results["rotation per document"]
    assert rotation.level == "ok"
    assert rotation.num_checked is not None
    assert rotation.num_checked > 2
    longest = count_input_tokens(samples.documents[-1])  # rows are chained for a window
    assert f"{min(lengths)} to {longest} tokens" in rotation.evidence
    controls = results["negative controls"]
    has_effect = min(lengths) <= LIMIT or "dynamic" in name
    assert (controls.level == "ok") == has_effect, "longrope has one set of factors above the limit"
    assert (f"not injected: {FAULT}" in controls.evidence) != has_effect
    assert FAULT in controls.evidence


def set_longest(self: DocumentRotary, lengths: Sequence[int], segments: Sequence[int]) -> None:
    self._lengths, self._segment_lengths = (max(lengths),) * len(lengths), tuple(segments)


def set_total(self: DocumentRotary, lengths: Sequence[int], segments: Sequence[int]) -> None:
    self._lengths, self._segment_lengths = (sum(segments),) * len(lengths), tuple(segments)


@pytest.mark.parametrize(
    ("broken", "dtype"), [(set_longest, torch.float32), (set_total, torch.bfloat16)]
)
@pytest.mark.parametrize("name", leave_others_to_slow(CONFIGS))
def test_one_rotation_for_a_pack_is_refused_in_any_precision(
    name: str, dtype: torch.dtype, broken: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, samples = prepare_rotary_model(name, ROWS["mixed"], monkeypatch, dtype)
    monkeypatch.setattr(DocumentRotary, "set_lengths", broken)
    with pytest.raises(GateError):
        run_preflight(model, samples)
    with pytest.raises(GateError, match="length of a pack changes the rotation"):
        check_rotation(Subject(model, samples))


@pytest.mark.parametrize("name", leave_others_to_slow(CONFIGS))
def test_the_length_of_a_pack_of_short_rows_is_refused(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No row is over the limit, and the packs of training are: only their sum is."""
    model, samples = prepare_rotary_model(name, ROWS["short"], monkeypatch)
    monkeypatch.setattr(DocumentRotary, "set_lengths", set_total)
    refusal = get_refusal(model, samples)
    assert "length of a pack changes the rotation" in refusal or "packed loss" in refusal


def test_lengths_of_segments_in_place_of_documents_are_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def measure_packs(layout: PackLayout) -> list[int]:
        return [layout.num_tokens] * len(layout.lengths)

    model, samples = prepare_rotary_model("llama-dynamic", ROWS["mixed"], monkeypatch)
    monkeypatch.setattr(causal_lm, "measure_documents", measure_packs)
    assert "packed loss" in get_refusal(model, samples)


def test_a_fault_without_effect_is_not_injected_silently(monkeypatch: pytest.MonkeyPatch) -> None:
    model, samples = prepare_rotary_model("equal factors", ROWS["mixed"], monkeypatch)
    controls = run_preflight(model, samples)[-1]
    assert controls.level == "warn"
    assert f"not injected: {FAULT} (it changes no rotation here)" in controls.evidence


def test_other_models_have_neither_check_nor_control() -> None:
    results = run_preflight(*prepare_model("llama"))
    assert "rotation per document" not in {result.kind for result in results}
    assert FAULT not in results[-1].evidence


def test_preflight_leaves_the_rotary_embedding_as_a_new_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model, samples = prepare_rotary_model("llama-dynamic", ROWS["mixed"], monkeypatch)
    batch = pack_documents(samples.documents)
    before = model.compute_hidden(batch)
    run_preflight(model, samples)
    assert torch.equal(model.compute_hidden(batch), before)
    network = AutoModelForCausalLM.from_config(copy.deepcopy(CONFIGS["llama-dynamic"]))
    assert model.rotary is not None
    fresh = network.model.rotary_emb(torch.empty(0), torch.arange(9)[None])
    ours = model.rotary.compute_alone(torch.empty(0), 9)
    assert all(torch.equal(a, b) for a, b in zip(ours, fresh, strict=True))
    assert dataclasses.is_dataclass(samples)
