"""What a plan decides on a GPU: precision, attention, sharing; and what it says of GPUs."""

from collections.abc import Callable
from typing import Any

import pytest

from tunesmith.core.errors import InputError
from tunesmith.plan import rules
from tunesmith.plan.build import _collect_fp16_warnings, _collect_gpu_warnings
from tunesmith.plan.rules import RuleContext

Make = Callable[..., RuleContext]
OLD_GPU = {"device": "cuda", "device_name": "Tesla T4", "has_bf16_matmul": False}


def test_flash_attention_needs_bf16_and_a_gpu_that_has_it(make_context: Make) -> None:
    assert rules.attention(make_context(device="cuda")).value == "varlen"
    for changes in (
        {"device": "cuda", "dtype": "fp32"},
        OLD_GPU,
        OLD_GPU | {"dtype": "fp32"},
        {"device": "cuda", "gpu_software": "ROCm 6.4"},
    ):
        assert rules.attention(make_context(**changes)).value == "sdpa", changes


def test_without_bf16_a_gpu_trains_in_fp16_and_gemma_in_fp32(make_context: Make) -> None:
    value = rules.dtype(make_context(**OLD_GPU))
    assert value.value == "fp16"
    assert "Tesla T4 has no bf16" in value.reason
    value = rules.dtype(make_context(**OLD_GPU, model_type="gemma3_text"))
    assert value.value == "fp32"
    assert "Gemma overflows" in value.reason
    assert rules.attention(make_context(device="cuda", dtype="fp16")).value == "varlen"
    assert rules.attention(make_context(**OLD_GPU, dtype="fp16")).value == "sdpa"


def test_fp16_is_for_gpus_without_bf16(make_context: Make) -> None:
    settings = {"dtype": "fp16", "step_in_backward": False}
    assert _collect_fp16_warnings(make_context(**OLD_GPU, **settings)) == []
    assert _collect_fp16_warnings(make_context(**settings | {"dtype": "bf16"})) == []
    assert "slower than fp32" in _collect_fp16_warnings(make_context(**settings))[0]
    assert "has bf16" in _collect_fp16_warnings(make_context(device="cuda", **settings))[0]


def test_gradients_in_fp16_are_all_known_before_an_update(make_context: Make) -> None:
    settings = {"method": "full", "dtype": "fp16", "max_grad_norm": 0.0}
    assert rules.step_in_backward(make_context(**settings)).value is False
    with pytest.raises(InputError, match="sometimes overflow") as caught:
        _collect_fp16_warnings(make_context(**settings, step_in_backward=True))
    assert caught.value.where == "step_in_backward"


@pytest.mark.parametrize(("device", "words"), [("cpu", "same bits"), ("cuda", "last bits")])
def test_the_plan_says_whether_a_resumed_run_has_the_same_bits(
    device: str, words: str, make_context: Make
) -> None:
    value = rules.deterministic(make_context(device=device))
    assert value.value is False
    assert words in value.reason


@pytest.mark.parametrize(
    ("device", "savings", "expected"),
    [("cpu", 0.04, False), ("cpu", 0.06, True), ("cuda", 0.2, False), ("cuda", 0.3, True)],
)
def test_sharing_pays_later_on_a_gpu(
    make_context: Make, monkeypatch: pytest.MonkeyPatch, device: str, savings: float, expected: bool
) -> None:
    monkeypatch.setattr(RuleContext, "prefix_savings", property(lambda _context: savings))
    context = make_context(device=device, lora_dropout=0.0, pack_length=4096)
    assert rules.share_prefixes(context).value is expected


def test_a_gpu_that_is_not_used_is_a_warning(make_context: Make) -> None:
    assert _collect_gpu_warnings(make_context(attention="sdpa")) == []
    (warning,) = _collect_gpu_warnings(make_context(unused_gpu="no driver", attention="sdpa"))
    assert "no driver" in warning
    assert "doctor" in warning


def test_what_a_gpu_cannot_do_is_a_warning(make_context: Make) -> None:
    rocm = make_context(device="cuda", gpu_software="ROCm 6.4", attention="sdpa")
    assert "AMD" in _collect_gpu_warnings(rocm)[0]
    assert _collect_gpu_warnings(make_context(device="cuda", attention="varlen")) == []
    (plain,) = _collect_gpu_warnings(
        make_context(device="cuda", attention="varlen", gpu_software="CUDA 12.8", versions={})
    )
    assert "the package triton" in plain


def test_an_old_torch_on_a_gpu_is_a_warning(make_context: Make) -> None:
    gpu = {"device": "cuda", "attention": "varlen", "gpu_software": "CUDA 12.6"}
    versions = {"torch": "2.7.1+cu126", "triton": "3.3"}
    (warning,) = _collect_gpu_warnings(make_context(**gpu, versions=versions))
    assert warning.startswith("torch 2.7.1+cu126: on a GPU, tunesmith needs 2.8 or newer")
    for changes in ({"versions": versions | {"torch": "2.13.0"}}, {"gpu_software": ""}):
        assert not _collect_gpu_warnings(make_context(**(gpu | {"versions": versions} | changes)))


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"device": "cuda", "dtype": "fp32"}, "16 bits only"),
        (OLD_GPU | {"dtype": "fp16"}, "Tesla T4 does not have"),
    ],
)
def test_varlen_without_flash_attention_is_refused(
    changes: dict[str, Any], problem: str, make_context: Make
) -> None:
    with pytest.raises(InputError, match=problem) as caught:
        _collect_gpu_warnings(make_context(attention="varlen", **changes))
    assert "auto" in caught.value.fix
