"""Errors of a GPU other than memory: each is a sentence with what to do, wherever it is met, and
costs the steps since the newest checkpoint, nothing else.

No GPU is needed: the errors are torch's own types with the words of CUDA, cuBLAS and Triton."""

from __future__ import annotations

import errno
import subprocess
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from failing_backward import fail_in_backward
from plan_configs import make_config
from tiny_models import make_tiny_documents, make_tiny_model
from tiny_runs import make_tiny_recipe, read_adapter_bytes, train
from tunesmith import api
from tunesmith.core.errors import MachineError
from tunesmith.evaluate.loglikelihood import compute_nll
from tunesmith.model.causal_lm import PackedCausalLM
from tunesmith.model.machine_errors import OutOfMemory, machine_errors
from tunesmith.train import loop, run
from tunesmith.train.loop import TrainingLoop

ASYNCHRONOUS = "\nCUDA kernel errors might be asynchronously reported at some other API call."
LAUNCH_FAILED = f"CUDA error: an illegal memory access was encountered{ASYNCHRONOUS}"

# what CUDA, cuBLAS and Triton say; words of the meaning; words of the fix
MESSAGES = {
    "old torch": (
        f"CUDA error: no kernel image is available for execution on the device{ASYNCHRONOUS}",
        "no code for this GPU",
        "build of torch",
    ),
    "old driver": (
        "CUDA driver version is insufficient for CUDA runtime version",
        "driver of the GPU is too old",
        "newer driver",
    ),
    "driver that is too old for torch": (
        "The NVIDIA driver on your system is too old (found version 12020).",
        "driver of the GPU is too old",
        "newer driver",
    ),
    "driver that is too old for triton": (
        "Triton Error [CUDA]: the provided PTX was compiled with an unsupported toolchain.",
        "driver of the GPU is too old",
        "newer driver",
    ),
    "no driver": (
        "Found no NVIDIA driver on your system. Please check that you have an NVIDIA GPU",
        "no GPU",
        "nvidia-smi",
    ),
    "another process": (
        f"CUDA error: CUDA-capable device(s) is/are busy or unavailable{ASYNCHRONOUS}",
        "another process",
        "CUDA_VISIBLE_DEVICES",
    ),
    "no room for cuBLAS": (
        "CUDA error: CUBLAS_STATUS_NOT_INITIALIZED when calling `cublasCreate(handle)`",
        "lack of memory",
        "other processes",
    ),
    "no deterministic algorithm": (
        "put_ does not have a deterministic implementation, but you set 'torch.use_deterministic_",
        "no deterministic algorithm",
        "deterministic: false",
    ),
    "broken memory": (
        f"CUDA error: uncorrectable ECC error encountered{ASYNCHRONOUS}",
        "the GPU or its driver failed",
        "nvidia-smi",
    ),
    "bitsandbytes for another CUDA": (
        "\nCUDA VERSION MISMATCH\nAttempted to use bitsandbytes native library functionality but"
        " it's not available.",
        "bitsandbytes has no library",
        "python -m bitsandbytes",
    ),
    "bitsandbytes without CUDA": (
        "Method 'cget_managed_ptr' not available in CPU-only version of bitsandbytes.",
        "bitsandbytes has no library",
        "python -m bitsandbytes",
    ),
    # WSL before R615, some virtual GPUs
    "memory that cannot grow": (
        "CUDA driver error: unknown error",
        "the driver refused",
        "expandable_segments:False",
    ),
    "broken kernel": (LAUNCH_FAILED, "a kernel failed", "CUDA_LAUNCH_BLOCKING=1"),
    "broken product": (
        "CUDA error: CUBLAS_STATUS_EXECUTION_FAILED when calling `cublasGemmEx(...)`",
        "a kernel failed",
        "CUDA_LAUNCH_BLOCKING=1",
    ),
}


@pytest.mark.parametrize("kind", MESSAGES)
@pytest.mark.parametrize("error_type", [RuntimeError, torch.AcceleratorError])
def test_an_error_of_a_gpu_is_a_sentence(kind: str, error_type: type[RuntimeError]) -> None:
    text, meaning, fix = MESSAGES[kind]
    with pytest.raises(MachineError, match=meaning) as caught, machine_errors():
        raise error_type(text)
    assert caught.value.exit_code == 3
    assert fix in caught.value.fix
    assert text.partition("\n")[0] in caught.value.message
    assert "asynchronously" not in str(caught.value)
    assert not isinstance(caught.value, OutOfMemory), "nothing is tried again on a lost device"


def test_an_error_of_ours_stays_what_it_is() -> None:
    with pytest.raises(RuntimeError, match="must match"), machine_errors():
        torch.ones(2) + torch.ones(3)


# ---------------------------------------------------------------- where it is met


def fail(*_arguments: Any, **_settings: Any) -> Any:
    raise torch.AcceleratorError(LAUNCH_FAILED)


def break_forward(training: TrainingLoop, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training.model, "compute_hidden", fail)


def break_backward(training: TrainingLoop, monkeypatch: pytest.MonkeyPatch) -> None:
    compute_hidden = training.model.compute_hidden
    monkeypatch.setattr(
        training.model,
        "compute_hidden",
        lambda batch: fail_in_backward(
            compute_hidden(batch), torch.AcceleratorError(LAUNCH_FAILED)
        ),
    )


def break_update(training: TrainingLoop, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training.optimizer, "step", fail)


def break_read(_training: TrainingLoop, monkeypatch: pytest.MonkeyPatch) -> None:
    """A kernel that fails is met by the next read."""
    monkeypatch.setattr(torch.Tensor, "tolist", fail)


@pytest.mark.parametrize("breaking", [break_forward, break_backward, break_update, break_read])
def test_a_step_that_fails_ends_the_run_with_advice(
    breaking: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    documents = make_tiny_documents((9, 5))
    training = TrainingLoop(make_tiny_model(), lambda _step: documents, make_config(), steps=3)
    next(training)
    with monkeypatch.context() as patch:
        breaking(training, patch)
        with pytest.raises(MachineError, match="a kernel failed on the GPU"):
            next(training)


def test_measuring_that_fails_ends_with_advice(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_tiny_model()
    monkeypatch.setattr(model, "compute_hidden", fail)
    with pytest.raises(MachineError, match="a kernel failed on the GPU"):
        list(compute_nll(model, make_tiny_documents((9, 5)), 90))


def test_a_run_goes_on_from_its_checkpoint(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bitwise as if the GPU had not failed: step 2 is saved, step 3 fails."""
    recipes = [make_tiny_recipe(tiny_folder, tmp_path / name, save_steps=1) for name in "ab"]
    train(recipes[0])
    clip = loop.clip_gradients
    calls: list[int] = []

    def fail_at_third(*arguments: Any) -> Tensor:
        calls.append(1)
        return fail() if len(calls) == 3 else clip(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(loop, "clip_gradients", fail_at_third)
        with pytest.raises(MachineError, match="a kernel failed") as caught:
            train(recipes[1])
    path = tmp_path / "b" / "run"
    assert f"tunesmith resume {path}" in caught.value.fix
    list(run.resume(path))
    assert read_adapter_bytes(recipes[1]) == read_adapter_bytes(recipes[0])


def test_preflight_that_fails_ends_with_advice(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(PackedCausalLM, "compute_hidden", fail)
    with pytest.raises(MachineError, match="a kernel failed"):
        train(make_tiny_recipe(tiny_folder, tmp_path))


@pytest.mark.parametrize("as_json", [False, True])
@pytest.mark.parametrize(
    ("error", "meaning"),
    [
        (torch.OutOfMemoryError("CUDA out of memory."), "out of memory"),
        (torch.AcceleratorError(LAUNCH_FAILED), "a kernel failed on the GPU"),
    ],
    ids=["memory", "kernel"],
)
def test_any_verb_ends_with_advice(
    error: RuntimeError,
    meaning: str,
    as_json: bool,
    tunesmith: Callable[..., tuple[int, str, str]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As where a model is loaded to answer or to be measured."""

    def run_out(*_arguments: Any, **_settings: Any) -> Any:
        raise error

    monkeypatch.setattr(api, "doctor", run_out)
    code, stdout, stderr = tunesmith("doctor", *(["--json"] if as_json else []))
    assert code == 3
    assert meaning in stderr
    assert "bug" not in stderr
    assert (meaning in stdout) == as_json


# ---------------------------------------------------------------- Triton


class FailingKernel:
    """A kernel of which every launch raises."""

    def __init__(self, error: Exception) -> None:
        self.error = error

    def __getitem__(self, _grid: Any) -> Any:
        def launch(*_arguments: Any, **_settings: Any) -> None:
            raise self.error

        return launch


@pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed")
@pytest.mark.parametrize(
    "kind",
    [
        *("resources", "compiler", "driver", "no compiler", "no libcuda", "no ldconfig"),
        *("no cache", "full disk", "unloadable", "old card", "missing CC", "memory"),
    ],
)
def test_a_kernel_that_triton_cannot_run_is_named(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from triton.runtime.errors import OutOfResources

    from tunesmith.model.kernels import triton_kernels, triton_ops

    errors = {
        "resources": OutOfResources(120_000, 101_376, "shared memory"),
        "compiler": subprocess.CalledProcessError(1, ["gcc", "a.c", "-l:libcuda.so.1"]),
        "driver": RuntimeError("Triton Error [CUDA]: device kernel image is invalid"),
        "no compiler": RuntimeError("Failed to find C compiler. Please specify via CC"),
        "no libcuda": AssertionError("libcuda.so cannot found!\nPlease make sure GPU is set up"),
        "no ldconfig": FileNotFoundError(2, "No such file or directory", "/sbin/ldconfig"),
        "no cache": PermissionError(13, "Permission denied", "/.triton"),
        "full disk": OSError(errno.ENOSPC, "No space left on device"),
        "unloadable": ImportError("cuda_utils.so: failed to map segment from shared object"),
        "old card": RuntimeError("PassManager::run failed"),
        "missing CC": FileNotFoundError(2, "No such file or directory", "missing-cc"),
        "memory": torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
    }

    monkeypatch.setenv("CC", "missing-cc")
    monkeypatch.setattr(triton_kernels, "rms_norm_kernel", FailingKernel(errors[kind]))
    with pytest.raises(MachineError) as caught, machine_errors():
        triton_ops.rms_norm(torch.ones(2, 8), torch.ones(8), 1e-6)
    if kind == "driver":
        assert "newer driver" in caught.value.fix
    elif kind == "memory":
        assert isinstance(caught.value, OutOfMemory)
    else:
        assert "Triton cannot run rms_norm" in caught.value.message
        fixes = {
            **dict.fromkeys(("no cache", "full disk", "unloadable"), "TRITON_CACHE_DIR"),
            **dict.fromkeys(("no libcuda", "no ldconfig"), "TRITON_LIBCUDA_PATH"),
        }
        assert fixes.get(kind, "pip uninstall triton") in caught.value.fix


@pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed")
@pytest.mark.parametrize(
    "error",
    [
        AssertionError("rows must be contiguous"),
        RuntimeError("expected a tensor of 2 dimensions"),
        OSError(errno.EBADF, "Bad file descriptor"),
        FileNotFoundError(2, "No such file or directory", "kernels.py"),
    ],
    ids=repr,
)
def test_an_error_of_a_launch_that_is_not_the_machine_s_stays_a_bug(
    error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tunesmith.model.kernels import triton_kernels, triton_ops

    monkeypatch.setattr(triton_kernels, "rms_norm_kernel", FailingKernel(error))
    with pytest.raises(type(error)) as caught, machine_errors():
        triton_ops.rms_norm(torch.ones(2, 8), torch.ones(8), 1e-6)
    assert caught.value is error
