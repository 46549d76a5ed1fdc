"""Untrusted adapters (faults 15, 20 and 21); adapters from PEFT are read as PEFT reads them."""

import json
import pickle
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.numpy import load_file, save_file

from processor_time import check_seconds
from tiny_models import make_tiny_network
from tunesmith.core.errors import InputError
from tunesmith.core.run_dir import RUN_FORMAT
from tunesmith.model.hub.adapter_config import AdapterFolder, read_adapter
from tunesmith.model.save import load_adapter, read_adapter_tensors

pytestmark = pytest.mark.filterwarnings(
    "ignore:.is_gradient_checkpointing. is deprecated:FutureWarning"
)  # PEFT's


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    make_tiny_network().save_pretrained(folder)
    return folder


def peft_adapter(folder: Path, **config: Any) -> Path:
    """Save an adapter with PEFT."""
    settings = {
        "r": 4,
        "lora_alpha": 6,
        "task_type": "CAUSAL_LM",
        "target_modules": "all-linear",
    } | config
    get_peft_model(make_tiny_network(), LoraConfig(**settings)).save_pretrained(folder)
    return folder


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    return peft_adapter(tmp_path / "adapter", target_modules=["q_proj", "v_proj"])


@pytest.fixture
def changed(adapter: Path, base: Path) -> Callable[..., AdapterFolder]:
    """Return changed(key=value), which reads the adapter with another adapter_config.json."""

    def read(**keys: Any) -> AdapterFolder:
        content = json.loads((adapter / "adapter_config.json").read_text()) | keys
        (adapter / "adapter_config.json").write_text(json.dumps(content))
        return read_adapter(adapter, base)

    return read


# ---------------------------------------------------------------- what is read


@pytest.mark.parametrize(
    ("targets", "expected"),
    [
        ("all-linear", "all-linear"),
        (["q_proj", "v_proj"], ("q_proj", "v_proj")),
        (r".*\.1\.mlp\.up_proj", ("model.layers.1.mlp.up_proj",)),
    ],
)
def test_adapters_from_peft_are_read(
    tmp_path: Path, base: Path, targets: Any, expected: Any
) -> None:
    adapter = read_adapter(
        peft_adapter(tmp_path / "a", target_modules=targets, use_rslora=True), base
    )
    assert (adapter.rank, adapter.alpha, adapter.use_rslora, adapter.target_modules) == (
        4,
        6,
        True,
        expected,
    )
    assert adapter.compute_scaling("model.layers.1.mlp.up_proj") == 3.0
    assert len(adapter.sha256) == 64


def test_pefts_dora_is_understood(tmp_path: Path, base: Path) -> None:
    folder = peft_adapter(tmp_path / "a", use_dora=True)
    assert read_adapter(folder, base).use_dora
    rewritten(folder, lambda w: {k: v for k, v in w.items() if k != f"{Q}.lora_magnitude_vector"})
    with pytest.raises(InputError, match=r"no \S+q_proj\.lora_magnitude_vector"):
        read_adapter(folder, base)


def test_selections_of_layers_are_read_from_the_weights(tmp_path: Path, base: Path) -> None:
    selected = read_adapter(
        peft_adapter(tmp_path / "a", layers_to_transform=[1], target_modules=["o_proj"]), base
    )
    assert selected.target_modules == ("model.layers.1.self_attn.o_proj",)
    selected = read_adapter(
        peft_adapter(tmp_path / "b", exclude_modules=["lm_head", "down_proj"]), base
    )
    assert selected.target_modules == (
        "gate_proj",
        "k_proj",
        "o_proj",
        "q_proj",
        "up_proj",
        "v_proj",
    )


def test_a_run_folder_stands_for_its_adapter(adapter: Path, base: Path, tmp_path: Path) -> None:
    (tmp_path / "plan.json").write_text(json.dumps({"format": RUN_FORMAT}))
    assert read_adapter(tmp_path, base).path == adapter
    (adapter / "adapter_config.json").unlink()
    with pytest.raises(InputError, match="no adapter in this folder") as caught:
        read_adapter(tmp_path, base)
    assert "tunesmith resume" in caught.value.fix


# ---------------------------------------------------------------- what is refused


@pytest.mark.promise
@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("lora_bias", True),
        ("rank_pattern", {"q_proj": 0}),
        ("rank_pattern", {"q_proj": 2.0}),
        ("rank_pattern", [8]),
        ("rank_pattern", {"q_proj(": 4}),
        ("rank_pattern", {"a)|(b": 4}),
        ("alpha_pattern", {"q_proj": 0}),
        ("alpha_pattern", {"q_proj": True}),
        ("alpha_pattern", {"q_proj": "8"}),
        ("alpha_pattern", {r"((\w+\.?)*\w*)*!": 8}),
        ("modules_to_save", "lm_head"),
        ("modules_to_save", [1]),
        ("megatron_config", {"x": 1}),
        ("megatron_core", "os"),
        ("auto_mapping", {"parent_library": "os", "base_model_class": "system"}),
        ("auto_mapping", "os"),
        ("layer_replication", [[0, 2], [1, 2]]),
        ("trainable_token_indices", [2, 1]),
        ("alora_invocation_tokens", [1]),
        ("bias", "lora_only"),
        ("peft_type", "IA3"),
        ("peft_type", None),
        ("task_type", "SEQ_CLS"),
        ("init_lora_weights", "pissa"),
        ("runtime_config", {"ephemeral_gpu_offload": True}),
        ("a_key_of_next_year", 1),
    ],
)
def test_fault_20_a_key_that_changes_the_maths_is_refused_by_name(
    changed: Callable[..., AdapterFolder], key: str, value: Any
) -> None:
    with pytest.raises(InputError, match=key) as caught:
        changed(**{key: value})
    assert caught.value.where.endswith("adapter_config.json")


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"r": 10**9}, "r is 1000000000, not an integer from 1 to 4096"),
        ({"r": 0}, "r is 0"),
        ({"r": True}, "r is True"),
        ({"r": "4"}, "r is '4'"),
        ({"r": 8}, r"lora_A.weight is F32 \[4, 48\]; on this base it must be \[8, 48\]"),
        ({"modules_to_save": ["lm_head"]}, r"no \S+lm_head\.weight, which adapter_config"),
        ({"trainable_token_indices": [1]}, r"no \S+embed_tokens\.token_adapter"),
        ({"lora_alpha": -1}, "lora_alpha is -1"),
        ({"lora_alpha": float("nan")}, "lora_alpha is nan"),
        ({"lora_alpha": None}, "lora_alpha is None"),
        ({"use_rslora": "yes"}, "use_rslora is 'yes'"),
        ({"use_dora": 1}, "use_dora is 1"),
    ],
)
def test_fault_20_absurd_numbers_are_refused_before_anything_is_allocated(
    changed: Callable[..., AdapterFolder], keys: dict[str, Any], message: str
) -> None:
    tracemalloc.start()
    with pytest.raises(InputError, match=message):
        changed(**keys)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2**20


def rewritten(
    adapter: Path, change: Callable[[dict[str, np.ndarray]], dict[str, np.ndarray]]
) -> Path:
    save_file(
        change(load_file(adapter / "adapter_model.safetensors")),
        adapter / "adapter_model.safetensors",
    )
    return adapter


Q = "base_model.model.model.layers.0.self_attn.q_proj"


A_SHAPE = (4, 48)


@pytest.mark.parametrize(
    ("name", "tensor", "message"),
    [
        (f"{Q}.lora_B.weight", np.ones((5, 4), np.float32), r"lora_B.weight is F32 \[5, 4\]"),
        (f"{Q}.lora_A.weight", np.ones(A_SHAPE), "is F64"),
        (f"{Q}.lora_B.weight", None, r"no \S+q_proj\.lora_B\.weight, which"),
        (f"{Q}.lora_magnitude_vector", np.ones(64, np.float32), "not part of a LoRA"),
        (f"{Q}.lora_E", np.ones(64, np.float32), "not part of a LoRA"),
        ("base_model.model.lm_head.lora_A.weight", np.ones(A_SHAPE), "has lm_head, which is not"),
        (f"{Q.replace('q_proj', 'z_proj')}.lora_A.weight", np.ones(A_SHAPE), "z_proj"),
        (
            f"{Q.replace('self_attn.q_proj', 'input_layernorm')}.lora_A.weight",
            np.ones(A_SHAPE),
            "input_layernorm, which is not a linear layer",
        ),
        ("../../etc/passwd", np.ones(1), "not part of a LoRA"),
    ],
)
def test_fault_20_weights_that_do_not_fit_the_base_are_named(
    adapter: Path, base: Path, name: str, tensor: np.ndarray | None, message: str
) -> None:
    def change(weights: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        changed = weights | {name: tensor}
        return {key: value for key, value in changed.items() if value is not None}

    with pytest.raises(InputError, match=message) as caught:
        read_adapter(rewritten(adapter, change), base)
    assert caught.value.where.endswith("adapter_model.safetensors")


def test_an_adapter_without_weights_is_refused(adapter: Path, base: Path) -> None:
    with pytest.raises(InputError, match="holds no weights"):
        read_adapter(rewritten(adapter, lambda _: {}), base)


def test_the_fix_of_another_dtype_is_no_other_base(adapter: Path, base: Path) -> None:
    fixes: list[str] = []
    for change in (lambda x: x.astype(np.float64), lambda x: x[:-1]):
        folder = rewritten(
            adapter,
            lambda w, change=change: w | {f"{Q}.lora_A.weight": change(w[f"{Q}.lora_A.weight"])},
        )
        with pytest.raises(InputError, match=r"lora_A\.weight is F") as caught:
            read_adapter(folder, base)
        fixes.append(caught.value.fix)
    assert "dtypes" in fixes[0]
    assert "model:" in fixes[1]


def test_fault_20_values_that_are_not_finite_are_refused(adapter: Path, base: Path) -> None:
    for bad in (np.nan, np.inf):
        rewritten(
            adapter,
            lambda w, bad=bad: w | {f"{Q}.lora_B.weight": np.full((64, 4), bad, np.float32)},
        )
        assert read_adapter(adapter, base).rank == 4
        with pytest.raises(
            InputError, match=r"q_proj\.lora_B\.weight holds NaN or infinite values"
        ):
            read_adapter_tensors(adapter / "adapter_model.safetensors")
        with pytest.raises(InputError, match="NaN or infinite"):
            load_adapter(make_tiny_network(), adapter / "adapter_model.safetensors")


def test_fault_20_a_damaged_file_is_named(adapter: Path, base: Path) -> None:
    file = adapter / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(InputError, match="damaged or not a safetensors file"):
        read_adapter(adapter, base)


class Evil:
    def __init__(self, sentinel: Path) -> None:
        self.sentinel = sentinel

    def __reduce__(self) -> tuple:
        import os

        return os.system, (f"touch {self.sentinel}",)


def test_fault_15_only_a_pickled_adapter_is_refused_and_not_opened(
    adapter: Path, base: Path, tmp_path: Path
) -> None:
    sentinel = tmp_path / "executed"
    (adapter / "adapter_model.bin").write_bytes(pickle.dumps(Evil(sentinel)))
    read_adapter(adapter, base)  # beside safetensors it does not matter
    (adapter / "adapter_model.safetensors").unlink()
    with pytest.raises(InputError, match=r"only pickled weights \(adapter_model\.bin\)") as caught:
        read_adapter(adapter, base)
    assert "save_pretrained" in caught.value.fix
    assert not sentinel.exists()


def test_fault_21_a_pattern_of_targets_is_never_evaluated(
    changed: Callable[..., AdapterFolder],
) -> None:
    def read() -> None:
        adapter = changed(target_modules="(.*.*)*" * 30 + "$", exclude_modules="(a|a)*" * 99)
        assert adapter.target_modules == ("q_proj", "v_proj")

    check_seconds(read, limit=2)


def test_the_adapter_of_another_size_of_model_is_refused(adapter: Path, tmp_path: Path) -> None:
    make_tiny_network("llama-tied").save_pretrained(tmp_path / "other")
    with pytest.raises(InputError, match=r"must be|not a linear layer") as caught:
        read_adapter(adapter, tmp_path / "other")
    assert "set model: to the adapter's base model" in caught.value.fix


def test_bf16_adapters_pass(adapter: Path, base: Path) -> None:
    from safetensors.torch import load_file as load_torch
    from safetensors.torch import save_file as save_torch

    file = adapter / "adapter_model.safetensors"
    save_torch({name: tensor.to(torch.bfloat16) for name, tensor in load_torch(file).items()}, file)
    assert read_adapter(adapter, base).rank == 4
