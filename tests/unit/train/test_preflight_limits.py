"""How much preflight lets differ: up to each limit and no more, and what it says about it."""

import dataclasses
import math
from collections.abc import Callable, Iterator

import pytest
import torch

from preflight_models import prepare_model, prepare_sharing_model
from tunesmith.core.errors import GateError
from tunesmith.core.events import CheckResult
from tunesmith.model.compare_layers import Difference
from tunesmith.session.preflight_probe import OracleLogits, Subject
from tunesmith.train import preflight_blocks, preflight_forward
from tunesmith.train.preflight_blocks import (
    build_compared_pack,
    can_amplify_rounding,
    check_blocks,
    check_gradients,
)
from tunesmith.train.preflight_forward import check_oracle, compare_logits, explain_unbreakable

PRECISIONS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
TABLES = {
    "logits": preflight_forward.LOGIT_TOLERANCE,
    "losses": preflight_forward.LOSS_TOLERANCE,
    "shared losses": preflight_forward.SHARED_TOLERANCE,
    "nats of a token": preflight_forward.TOKEN_TOLERANCE_NATS,
    "oracle": preflight_forward.ORACLE_TOLERANCE,
    "hidden states": preflight_forward.HIDDEN_TOLERANCE,
    "hidden states with experts": preflight_forward.ROUTED_TOLERANCE,
    "a token of a block": preflight_blocks.TOKEN_TOLERANCE,
    "a block": preflight_blocks.BLOCK_TOLERANCE,
    "gradients": preflight_blocks.GRADIENT_TOLERANCE,
}


@pytest.mark.parametrize("name", TABLES)
def test_limits_follow_the_precision_and_are_far_from_a_lost_part(name: str) -> None:
    """What leaves something out is off by about its norm."""
    limits = [TABLES[name][dtype] for dtype in PRECISIONS if dtype in TABLES[name]]
    assert limits == sorted(limits)
    assert limits[0] >= 0
    assert limits[-1] < 0.5
    exact = [dtype for dtype in PRECISIONS[:2] if dtype in TABLES[name]]
    assert all(TABLES[name][dtype] <= 1e-3 for dtype in exact)
    assert 0 < preflight_forward.ROTATION_TOLERANCE <= 1e-3


def test_logits_are_compared_without_their_mean() -> None:
    expected = torch.tensor([[1.0, 2, 3], [4, 0, -4]])
    shifted = expected + torch.tensor([[5.0], [-7]])
    assert compare_logits(shifted, expected) == pytest.approx(0, abs=1e-6)
    assert compare_logits(2 * expected, expected) == pytest.approx(1)
    assert compare_logits(torch.zeros(2, 3), expected + 9) == pytest.approx(1)
    assert compare_logits(expected + torch.eye(2, 3), expected) == pytest.approx(
        math.sqrt(4 / 3 / 34)
    )


def make_oracle(change: float, rounding: float) -> OracleLogits:
    """Logits that change by a factor from token to token, and by another one with the cache."""
    last = torch.tensor([1.0, -1.0])
    plain = torch.stack((last * (1 - change), last))
    return OracleLogits("rows:1", 5, plain, plain * (1 + rounding))


def test_the_oracle_may_differ_by_rounding() -> None:
    subject = Subject(*prepare_model(dtype=torch.float16))
    limit = preflight_forward.ORACLE_TOLERANCE[torch.float16]
    close = subject.with_samples(oracle=make_oracle(0.5, 0.9 * limit))
    result = check_oracle(close)
    assert (result.level, result.num_checked) == ("ok", 2)
    assert result.evidence == (
        "relative difference 4.50% at 2 positions, the last one from the cache; "
        "document of 5 tokens"
    )
    far = subject.with_samples(oracle=make_oracle(0.5, 1.1 * limit))
    with pytest.raises(GateError, match=r"differ by 5\.5% of their norm") as refused:
        check_oracle(far)
    assert refused.value.where == "preflight: rows:1"


@pytest.mark.parametrize(
    ("change", "rounding", "is_noticed"),
    [(0.06, 0, False), (0.08, 0, True), (0.08, 0.01, False), (0.1, 0.01, True), (0.1, 0.02, False)],
)
def test_a_lost_token_shows_if_it_changes_more_than_rounding(
    change: float, rounding: float, is_noticed: bool
) -> None:
    """In fp16, whose limit is 0.05 of the norm of both tokens, twice the rounding is added: that of
    the fault, and that of the logits which it repeats."""
    subject = Subject(*prepare_model(dtype=torch.float16))
    subject = subject.with_samples(oracle=make_oracle(change, rounding))
    size = change / math.sqrt(1 + (1 - change) ** 2)
    assert (size > 0.05 + 2 * rounding) == is_noticed
    reason = explain_unbreakable(subject)
    assert reason == ("" if is_noticed else "the last two tokens have similar logits")


# ---------------------------------------------------------------- blocks


def set_differences(monkeypatch: pytest.MonkeyPatch, *differences: Difference) -> None:
    def compare(*_: object) -> Iterator[Difference]:
        yield from differences

    monkeypatch.setattr(preflight_blocks, "compare_layers", compare)
    monkeypatch.setattr(preflight_blocks, "compare_gradients", compare)


@pytest.mark.parametrize("compare", [check_blocks, check_gradients])
@pytest.mark.parametrize("error", [1.1e-4, math.nan])
def test_no_part_of_fp32_is_off_by_more_than_rounding(
    compare: Callable[[Subject], CheckResult],
    error: float,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model, samples = prepare_model()
    close = Difference("layers.0.mlp", 0.9e-4, 0.5)
    set_differences(monkeypatch, close, Difference("layers.1.mlp", 2e-5, 0.5))
    result = compare(Subject(model, samples))
    assert (result.level, result.num_checked) == ("ok", 2)
    assert "differ by 9.0e-05 at most" in result.evidence
    assert "bfloat16" not in result.evidence
    set_differences(monkeypatch, close, Difference("layers.1.mlp", error, 0.0))
    with pytest.raises(GateError, match=r"layers\.1\.mlp is off by"):
        compare(Subject(model, samples))


@pytest.mark.parametrize("is_backward", [False, True])
def test_a_block_of_bf16_is_compared_as_a_whole(
    is_backward: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, samples = prepare_model(dtype=torch.bfloat16)
    limit = 0.25 if is_backward else 0.03

    def compare(error: float) -> str:
        set_differences(
            monkeypatch, Difference("a", 1e-5, error), Difference("b", 1e-6, 0.5 * error)
        )
        if is_backward:
            return check_gradients(Subject(model, samples)).evidence
        return check_blocks(Subject(model, samples)).evidence

    words = f"; in bfloat16 by {0.9 * limit:.1%}" if is_backward else "; in bfloat16 by 2.70%"
    assert compare(0.9 * limit).endswith(words)
    for error in (1.1 * limit, math.nan):
        with pytest.raises(GateError, match="a is off by"):
            compare(error)


@pytest.mark.parametrize(
    ("num_choices", "num_other", "is_refused"),
    [(1000, 6, False), (1000, 7, True), (10, 1, False), (10, 2, True), (0, 0, False)],
)
def test_a_router_may_decide_a_few_ties_otherwise(
    num_choices: int, num_other: int, is_refused: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, samples = prepare_model()
    router = Difference("layers.0.mlp", 1e-6, 0.0, num_choices - num_other, num_choices)
    set_differences(monkeypatch, Difference("other", 1e-6, 0.0, 1000, 1000), router)
    if is_refused:
        message = f"layers.0.mlp sends {num_other} of {num_choices} tokens to other experts"
        with pytest.raises(GateError, match=message):
            check_blocks(Subject(model, samples))
        return
    evidence = check_blocks(Subject(model, samples)).evidence
    equal = 1000 + num_choices - num_other
    assert f"router decisions equal at {equal:,}/{1000 + num_choices:,}" in evidence


def test_layers_and_adapters_are_counted_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    model, samples = prepare_model()
    adapter = Difference("layers.0.mlp.up_proj", 1e-6, 0.0, is_adapter=True)
    set_differences(monkeypatch, Difference("layers.0", 1e-6, 0.0), adapter, adapter)
    evidence = check_gradients(Subject(model, samples)).evidence
    assert evidence.startswith("3 gradients (1 of 2 layers, 2 adapters) in float32, ")


def test_without_modules_of_transformers_there_is_nothing_to_compare() -> None:
    model, samples = prepare_model()
    nothing = Subject(model, dataclasses.replace(samples, stock=None))
    for result in (check_blocks(nothing), check_gradients(nothing)):
        assert result.level == "warn"
        assert "modules were not kept" in result.evidence


@pytest.mark.parametrize("should_share", [False, True])
def test_each_token_of_a_compared_pack_is_found_in_its_document(should_share: bool) -> None:
    model, samples = prepare_sharing_model()
    documents = samples.sharing_documents or ()
    pack = build_compared_pack(model, documents, should_share=should_share)
    tokens = torch.cat(pack.documents)
    assert torch.equal(tokens[pack.index_T], pack.batch.tokens_T.to(tokens.dtype))
    assert (len(tokens) > pack.batch.layout.num_tokens) == should_share


@pytest.mark.parametrize(
    ("family", "dtype", "can_amplify"),
    [
        ("llama", torch.float32, False),
        ("llama", torch.float64, False),
        ("llama", torch.bfloat16, True),
        ("llama", torch.float16, True),
        ("qwen3_moe", torch.float32, True),
        ("lfm2", torch.float32, True),
    ],
)
def test_what_amplifies_rounding(family: str, dtype: torch.dtype, can_amplify: bool) -> None:
    model, _ = prepare_model(family, dtype)
    assert can_amplify_rounding(model) == can_amplify
