"""A config.json alone: its number of parameters, and missing or implausible values."""

import json
from pathlib import Path
from typing import Any

import pytest

from tunesmith.core.errors import InputError
from tunesmith.model.hub.resolve import resolve_model
from tunesmith.model.hub.spec import read_model_headers, read_spec
from tunesmith.model.target_modules import list_linear_paths

LLAMA_70B = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 8192,
    "intermediate_size": 28672,
    "num_hidden_layers": 80,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
    "max_position_embeddings": 131072,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
}


def folder_of(path: Path, **changed: Any) -> Path:
    path.mkdir(exist_ok=True)
    content = {key: value for key, value in (LLAMA_70B | changed).items() if value is not None}
    (path / "config.json").write_text(json.dumps(content))
    return path


def test_a_70b_model_is_described_without_its_weights(tmp_path: Path) -> None:
    folder = folder_of(tmp_path)
    spec = read_spec(folder)
    assert spec.parameters == 70_553_706_496, "as the model's card says"
    assert (spec.head_dim, spec.dtype, spec.tie_word_embeddings) == (128, "bfloat16", False)
    assert len(list_linear_paths(read_model_headers(folder))) == 80 * 7
    assert (
        resolve_model(str(folder), needs_weights=False)
        == resolve_model(str(folder / "config.json"), needs_weights=False)
        == folder
    )
    with pytest.raises(InputError, match=r"neither model\.safetensors nor"):
        resolve_model(str(folder))


@pytest.mark.parametrize(
    ("changed", "message", "key"),
    [
        (
            {"num_attention_heads": 0},
            "num_attention_heads is 0, not an integer from 1",
            "num_attention_heads",
        ),
        ({"hidden_size": -8192}, "hidden_size is -8192", "hidden_size"),
        ({"vocab_size": "128k"}, "vocab_size is 128k", "vocab_size"),
        ({"intermediate_size": 28672.5}, r"intermediate_size is 28672\.5", "intermediate_size"),
        ({"num_hidden_layers": 10**12}, "num_hidden_layers is 1000000000000", "num_hidden_layers"),
        ({"num_hidden_layers": [80]}, r"num_hidden_layers is \[80\]", "num_hidden_layers"),
        ({"intermediate_size": None}, "config.json has no intermediate_size", "intermediate_size"),
        (
            {"max_position_embeddings": None},
            "config.json has no max_position_embeddings",
            "max_position_embeddings",
        ),
        ({"num_key_value_heads": 7}, "64 heads cannot share 7 key and value heads", ""),
        (
            {"intermediate_size": 2**24, "hidden_size": 2**20},
            "a model of these sizes has",
            "correct the size",
        ),
    ],
)
def test_what_is_missing_or_absurd_is_named(
    changed: dict[str, Any], message: str, key: str, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match=message) as refusal:
        read_spec(folder_of(tmp_path, **changed))
    assert key in refusal.value.fix
    assert refusal.value.where.endswith("config.json")


def test_an_index_without_its_files_is_no_weights(tmp_path: Path) -> None:
    folder_of(tmp_path)
    (tmp_path / "model.safetensors.index.json").write_text(
        json.dumps({"weight_map": {"a": "model-1.safetensors"}})
    )
    assert read_spec(tmp_path).parameters == 70_553_706_496
