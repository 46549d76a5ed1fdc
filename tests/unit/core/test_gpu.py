"""What is known of a GPU, and why one is not used. No GPU is needed: torch's answers are given."""

import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tunesmith.cli import launch
from tunesmith.core import hardware
from tunesmith.core.errors import InputError
from tunesmith.core.hardware import measure_machine, read_peak_bytes
from tunesmith.core.ranks import Ranks
from tunesmith.model import attention, causal_lm
from tunesmith.plan.hardware_presets import find_missing_for_triton
from tunesmith.session.doctor import _check_gpu, _check_versions

GB = 10**9


def give_files(monkeypatch: pytest.MonkeyPatch, *names: str) -> None:
    exists = os.path.exists
    files = (*hardware.NVIDIA_FILES, hardware.AMD_FILE)
    monkeypatch.setattr(
        os.path, "exists", lambda path: path in names if path in files else exists(path)
    )


def give_gpu(
    monkeypatch: pytest.MonkeyPatch,
    *,
    bf16: bool = True,
    hip: str | None = None,
    count: int = 1,
    index: int = 0,
    has_peers: bool = True,
) -> None:
    """Let torch see GPUs, of which this process has the one with this index."""

    def of_this_process(device: int) -> None:
        assert device == index

    give_files(monkeypatch, hardware.AMD_FILE if hip else hardware.NVIDIA_FILES[0])
    answers: dict[str, Any] = {
        "is_available": lambda: True,
        "current_device": lambda: index,
        "mem_get_info": lambda device: of_this_process(device) or (70 * GB, 80 * GB),
        "get_device_name": lambda device: of_this_process(device) or "NVIDIA H100 80GB HBM3",
        "get_device_capability": lambda device: (
            of_this_process(device) or ((9, 0) if bf16 else (7, 5))
        ),
        "is_bf16_supported": lambda including_emulation: bf16 or including_emulation,
        "device_count": lambda: count,
        "can_device_access_peer": lambda device, other: (
            of_this_process(device) or (has_peers and other == (index + 1) % count)
        ),
    }
    for name, answer in answers.items():
        monkeypatch.setattr(torch.cuda, name, answer)
    monkeypatch.setattr(torch.version, "cuda", None if hip else "12.8")
    monkeypatch.setattr(torch.version, "hip", hip)
    for name in (hardware.ALLOCATOR_ENV, hardware.OLD_ALLOCATOR_ENV):
        monkeypatch.delenv(name, raising=False)


def test_a_gpu_is_described(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    give_gpu(monkeypatch, count=8)
    machine = measure_machine(tmp_path)
    assert (machine.device, machine.num_gpus) == ("cuda", 8)
    assert (machine.memory_bytes, machine.available_bytes) == (80 * GB, 70 * GB)
    assert (machine.gpu_software, machine.compute_capability) == ("CUDA 12.8", "9.0")
    assert machine.has_flash_attention
    assert machine.unused_gpu == ""
    assert os.environ[hardware.ALLOCATOR_ENV] == "expandable_segments:True"
    check, _ = _check_gpu(machine)
    assert check.is_ok
    for part in ("CUDA 12.8", "compute capability 9.0", "70.0 GB free", "first of 8", "--gpus 8"):
        assert part in check.value


def test_scaled_dot_product_attention_never_runs_through_cudnn() -> None:
    """cuDNN builds a plan for each new length, and answers grow by a token at a time; torch prefers
    it on an H100 and a B200."""
    assert hasattr(attention, "attend")
    assert not torch.backends.cuda.cudnn_sdp_enabled()


@pytest.mark.parametrize(
    ("has_peers", "link"), [(True, "directly"), (False, "through main memory")]
)
def test_the_link_between_two_gpus_is_named(
    has_peers: bool, link: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """An RTX 4090 does not reach another one."""
    give_gpu(monkeypatch, count=2, has_peers=has_peers)
    check, _ = _check_gpu(measure_machine(tmp_path))
    assert check.value.endswith(f"which copy to each other {link}")


@pytest.mark.parametrize("name", [hardware.ALLOCATOR_ENV, hardware.OLD_ALLOCATOR_ENV])
def test_a_setting_of_the_allocator_is_kept(
    name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Some releases of torch read the new name first."""
    give_gpu(monkeypatch)
    monkeypatch.setenv(name, "backend:native")
    measure_machine(tmp_path)
    settings = [os.environ.get(n) for n in (hardware.ALLOCATOR_ENV, hardware.OLD_ALLOCATOR_ENV)]
    assert sorted(filter(None, settings)) == ["backend:native"]


def test_torch_2_8_has_another_name_for_the_allocator(monkeypatch: pytest.MonkeyPatch) -> None:
    give_gpu(monkeypatch)
    monkeypatch.setattr(hardware.importlib.metadata, "version", lambda _name: "2.8.0+cu128")
    hardware.set_allocator()
    assert os.environ[hardware.OLD_ALLOCATOR_ENV] == hardware.ALLOCATOR_SETTING
    assert hardware.ALLOCATOR_ENV not in os.environ


def test_the_allocator_of_wsl_is_torchs_own(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The first memory that should grow is an error there with drivers before R615."""
    give_gpu(monkeypatch)
    give_files(monkeypatch, hardware.WSL_FILE)
    assert measure_machine(tmp_path).device == "cuda"
    assert not os.environ.keys() & {hardware.ALLOCATOR_ENV, hardware.OLD_ALLOCATOR_ENV}


def test_a_rank_measures_its_own_gpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A question about the first one would put a CUDA context of every rank there."""
    give_gpu(monkeypatch, count=8, index=3)
    assert measure_machine(tmp_path).memory_bytes == 80 * GB


def test_who_starts_ranks_takes_no_memory_of_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """A CUDA context of the process that waits would stay on the first one, and would keep its rank
    out where a GPU is for one process."""
    give_gpu(monkeypatch, count=2)
    for name in ("init", "current_device", "mem_get_info", "get_device_name"):
        monkeypatch.setattr(torch.cuda, name, lambda *_: pytest.fail("CUDA is started"))
    started: list[int] = []
    monkeypatch.setattr(launch, "run_torchrun", lambda count, _words: started.append(count) or 0)
    assert launch.launch(2, ["train"]) == 0
    assert started == [2]
    with pytest.raises(InputError, match="3 GPUs requested, but this machine has 2 GPUs"):
        launch.launch(3, ["train"])


def test_ranks_set_the_allocator_before_they_start_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    give_gpu(monkeypatch, count=2)
    settings: list[str | None] = []

    class Started(Exception):
        pass

    def start(_index: int) -> None:
        settings.append(os.environ.get(hardware.ALLOCATOR_ENV))
        raise Started

    monkeypatch.setattr(torch.cuda, "set_device", start)
    with pytest.raises(Started), Ranks(rank=1, world=2, local=1):
        pass
    assert settings == [hardware.ALLOCATOR_SETTING]


def test_a_gpu_without_bf16_says_so(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    give_gpu(monkeypatch, bf16=False)
    machine = measure_machine(tmp_path)
    assert not machine.has_flash_attention
    check, _ = _check_gpu(machine)
    assert (check.is_ok, check.is_required) == (False, False)
    assert "no bf16" in check.value
    assert "fp16" in check.fix


def test_torch_has_to_be_newer_on_a_gpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    versions = hardware.collect_versions() | {"torch": "2.7.1"}
    monkeypatch.setattr(hardware, "collect_versions", lambda: versions)
    give_files(monkeypatch)
    checks = {check.name: check for check in _check_versions(measure_machine(tmp_path))}
    assert checks["torch"].is_ok
    give_gpu(monkeypatch)
    checks = {check.name: check for check in _check_versions(measure_machine(tmp_path))}
    assert (checks["torch"].is_ok, checks["torch"].is_required) == (False, True)
    assert checks["torch"].fix == "install torch 2.8 or newer"


def test_an_amd_gpu_is_called_so(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    give_gpu(monkeypatch, hip="6.4")
    machine = measure_machine(tmp_path)
    assert (machine.device, machine.gpu_software) == ("cuda", "ROCm 6.4")
    assert machine.compute_capability == ""
    assert not machine.has_flash_attention
    assert "not been tried" in _check_gpu(machine)[0].value


@pytest.mark.parametrize(
    ("versions", "compiler", "has_headers", "missing"),
    [
        ({"triton": "3.4.0"}, "/usr/bin/cc", True, ""),
        ({}, "/usr/bin/cc", True, "the package triton"),
        ({"triton": "3.4.0"}, None, True, "a C compiler"),
        ({"triton": "3.4.0"}, "/usr/bin/cc", False, "Python's headers (such as python3-dev)"),
    ],
    ids=["all", "no triton", "no compiler", "no headers"],
)
def test_what_the_kernels_lack_is_named(
    versions: dict[str, str],
    compiler: str | None,
    has_headers: bool,
    missing: str,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    give_gpu(monkeypatch)
    monkeypatch.setattr(hardware, "collect_versions", lambda: versions)
    monkeypatch.setattr(hardware, "find_compiler", lambda: compiler)
    monkeypatch.setattr(hardware, "has_python_headers", lambda: has_headers)
    machine = measure_machine(tmp_path)
    assert find_missing_for_triton(machine) == missing
    _, check = _check_gpu(machine)
    assert (check.name, check.is_ok, check.is_required) == ("GPU kernels", not missing, False)
    assert missing in check.value
    assert missing in check.fix


def test_the_headers_of_this_python_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    assert hardware.has_python_headers()
    monkeypatch.setattr(hardware.sysconfig, "get_config_var", lambda _name: "/nowhere")
    assert not hardware.has_python_headers()


def explain(folder: Path) -> str:
    """Return why the GPU is not used, and what doctor and plan do with it."""
    machine = measure_machine(folder)
    assert machine.device == "cpu"
    checks = _check_gpu(machine)
    assert [check.value for check in checks] == ([machine.unused_gpu] if machine.unused_gpu else [])
    return machine.unused_gpu


def test_a_torch_without_cuda_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    give_files(monkeypatch, hardware.NVIDIA_FILES[0])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", None)
    assert "torch is built without CUDA" in explain(tmp_path)


def test_an_old_driver_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    give_files(monkeypatch, hardware.NVIDIA_FILES[1])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", "13.0")

    def refuse() -> None:
        raise RuntimeError("The NVIDIA driver on your system is too old (found version 12020).\nX")

    monkeypatch.setattr(torch.cuda, "init", refuse)
    problem = explain(tmp_path)
    assert problem.endswith("driver on your system is too old (found version 12020).")


def test_a_gpu_that_another_process_has_is_named(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """It is there, and there is no CUDA context to be had."""
    give_gpu(monkeypatch)

    problem = "CUDA error: CUDA-capable device(s) is/are busy or unavailable"

    def refuse(_device: int = 0) -> None:
        raise RuntimeError(f"{problem}\nCUDA kernel errors might be asynchronously reported")

    monkeypatch.setattr(torch.cuda, "init", lambda: None)
    monkeypatch.setattr(torch.cuda, "mem_get_info", refuse)
    assert explain(tmp_path).endswith(
        "torch cannot use it: CUDA error: CUDA-capable device(s) is/are busy or unavailable"
    )


def test_a_gpu_that_fails_at_its_start_is_named(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """As with instances of a MIG that CUDA_VISIBLE_DEVICES does not list right."""
    give_gpu(monkeypatch)
    message = "CUDA call failed lazily at initialization with error: device=1, num_gpus=1"

    def refuse(*_device: int) -> None:
        raise torch.cuda.DeferredCudaCallError(message)

    for name in ("init", "current_device", "mem_get_info"):
        monkeypatch.setattr(torch.cuda, name, refuse)
    assert message in explain(tmp_path)


def test_an_amd_gpu_needs_another_torch(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    give_files(monkeypatch, hardware.AMD_FILE)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "hip", None)
    assert "torch is built without ROCm" in explain(tmp_path)


def test_apple_gpus_are_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    give_files(monkeypatch)
    assert explain(tmp_path) == ""
    monkeypatch.setattr(hardware, "sys", SimpleNamespace(platform="darwin", modules={}))
    monkeypatch.setattr(hardware.platform, "machine", lambda: "arm64")
    assert "MPS" in explain(tmp_path)


def test_the_peak_of_a_gpu_is_that_of_its_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "max_memory_reserved", lambda: 123)
    assert read_peak_bytes("cuda") == 123
    assert read_peak_bytes("cpu") > 10**7


def test_freed_memory_of_a_gpu_is_returned(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: calls.append("emptied"))
    hardware.release_memory()
    assert calls == [], "no CUDA is started for it"
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    hardware.release_memory()
    assert calls == ["emptied"]


def test_numbers_for_a_gpu_are_pinned_and_their_copy_is_queued(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pinned: list[torch.Tensor] = []

    def pin(tensor: torch.Tensor) -> torch.Tensor:
        pinned.append(tensor)
        return tensor

    monkeypatch.setattr(torch.Tensor, "pin_memory", pin)
    assert hardware.upload([1, 2], "cpu").tolist() == [1, 2]
    assert hardware.upload([], "cpu", torch.long).dtype == torch.long
    assert pinned == []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    tensor = hardware.upload((3, 4), "meta", torch.int32)
    assert (tensor.device.type, tensor.dtype) == ("meta", torch.int32)
    assert [values.tolist() for values in pinned] == [[3, 4]]


def test_sums_on_a_gpu_are_not_rounded_on_their_way() -> None:
    """torch rounds the parts of a sum to 16 bits unless it is told not to."""
    assert causal_lm.DTYPES["bf16"] == torch.bfloat16
    assert not torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction
    assert not torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction
