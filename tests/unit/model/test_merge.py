import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from tunesmith.core.errors import GateError, InputError
from tunesmith.model.hub.validate import check_folder, read_headers
from tunesmith.model.merge import (
    iter_merged_tensors,
    read_loras,
    write_merged_weights,
    write_weights,
)

PATH = "model.layers.0.mlp.up_proj"


def base_folder(path: Path, **more: Tensor) -> dict[str, Tensor]:
    """Write two matrices in bf16 and a norm in fp32."""
    path.mkdir()
    generator = torch.Generator().manual_seed(0)
    weights = {f"{PATH}.weight": torch.randn(6, 8, generator=generator).bfloat16()}
    weights |= {"model.embed_tokens.weight": torch.randn(5, 8, generator=generator).bfloat16()}
    weights |= {"model.norm.weight": torch.randn(8, generator=generator)} | more
    save_file(weights, path / "model.safetensors", metadata={"format": "pt"})
    (path / "config.json").write_text("{}")
    return weights


def adapter_folder(
    path: Path,
    *,
    rslora: bool = False,
    key: str = PATH,
    value: float | None = None,
    dora: bool = False,
) -> dict[str, Tensor]:
    path.mkdir()
    generator = torch.Generator().manual_seed(1)
    a, b = torch.randn(4, 8, generator=generator), torch.randn(6, 4, generator=generator)
    if value is not None:
        b[0, 0] = value
    stored = {
        f"base_model.model.{key}.lora_A.weight": a,
        f"base_model.model.{key}.lora_B.weight": b,
    }
    magnitude = torch.rand(6, generator=generator) + 1
    if dora:
        stored[f"base_model.model.{key}.lora_magnitude_vector"] = magnitude
    save_file(stored, path / "adapter_model.safetensors", metadata={"format": "pt"})
    config = {"r": 4, "lora_alpha": 6, "use_rslora": rslora, "use_dora": dora}
    (path / "adapter_config.json").write_text(json.dumps(config))
    return {"a": a, "b": b, "m": magnitude}


@pytest.mark.parametrize(("rslora", "scale"), [(False, 6 / 4), (True, 6 / 2)])
def test_merged_in_fp32_and_cast_once(tmp_path: Path, rslora: bool, scale: float) -> None:
    weights = base_folder(tmp_path / "base")
    lora = adapter_folder(tmp_path / "adapter", rslora=rslora)
    write_merged_weights(
        tmp_path / "base",
        read_loras(tmp_path / "adapter", tmp_path / "base"),
        tmp_path / "merged.safetensors",
    )
    merged = load_file(tmp_path / "merged.safetensors")
    exact = weights[f"{PATH}.weight"].double() + scale * (lora["b"].double() @ lora["a"].double())
    assert torch.equal(merged.pop(f"{PATH}.weight"), exact.bfloat16())
    assert not torch.equal(exact.bfloat16(), weights.pop(f"{PATH}.weight"))
    assert {n: t.dtype for n, t in merged.items()} == {n: t.dtype for n, t in weights.items()}
    assert all(torch.equal(tensor, weights[name]) for name, tensor in merged.items())


def test_rows_get_the_lengths_of_dora(tmp_path: Path) -> None:
    weights = base_folder(tmp_path / "base")
    lora = adapter_folder(tmp_path / "adapter", dora=True)
    write_merged_weights(
        tmp_path / "base",
        read_loras(tmp_path / "adapter", tmp_path / "base"),
        tmp_path / "m.safetensors",
    )
    direction = weights[f"{PATH}.weight"].double() + 1.5 * (lora["b"].double() @ lora["a"].double())
    exact = direction / direction.norm(dim=1, keepdim=True) * lora["m"].double()[:, None]
    torch.testing.assert_close(
        load_file(tmp_path / "m.safetensors")[f"{PATH}.weight"], exact.bfloat16()
    )


def test_the_file_is_sound_safetensors(tmp_path: Path) -> None:
    base_folder(tmp_path / "base")
    (tmp_path / "merged").mkdir()
    (tmp_path / "merged" / "config.json").write_text("{}")
    write_merged_weights(tmp_path / "base", {}, tmp_path / "merged" / "model.safetensors")
    check_folder(tmp_path / "merged")
    before, after = (
        load_file(tmp_path / name / "model.safetensors") for name in ("base", "merged")
    )
    assert before.keys() == after.keys()
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_an_adapter_that_is_not_finite_is_refused(tmp_path: Path, value: float) -> None:
    base_folder(tmp_path / "base")
    adapter_folder(tmp_path / "adapter", value=value)
    with pytest.raises(InputError, match=r"up_proj\.lora_B\.weight holds NaN or infinite values"):
        write_merged_weights(
            tmp_path / "base",
            read_loras(tmp_path / "adapter", tmp_path / "base"),
            tmp_path / "merged.safetensors",
        )


def test_what_only_the_cast_makes_infinite_is_refused(tmp_path: Path) -> None:
    base_folder(tmp_path / "base", **{"model.half.weight": torch.full((2,), 6e4).half()})
    headers = read_headers(tmp_path / "base")
    tensors = [tensor * 2 for _, tensor in iter_merged_tensors(headers, {})]
    with pytest.raises(GateError, match=r"model\.half\.weight"):
        write_weights(headers, tensors, tmp_path / "merged.safetensors")


def test_a_base_that_is_not_finite_is_refused(tmp_path: Path) -> None:
    base_folder(tmp_path / "base", **{"model.extra.weight": torch.tensor([1.0, float("-inf")])})
    with pytest.raises(GateError, match=r"model\.extra\.weight holds NaN or infinite values"):
        write_merged_weights(tmp_path / "base", {}, tmp_path / "merged.safetensors")


def test_files_of_the_decoder_alone(tmp_path: Path) -> None:
    name = f"{PATH}.weight".removeprefix("model.")
    base_folder(tmp_path / "base")
    base = tmp_path / "base" / "model.safetensors"
    weights = {key.removeprefix("model."): tensor for key, tensor in load_file(base).items()}
    save_file(weights, base, metadata={"format": "pt"})
    lora = adapter_folder(tmp_path / "adapter")
    write_merged_weights(
        tmp_path / "base",
        read_loras(tmp_path / "adapter", tmp_path / "base"),
        tmp_path / "m.safetensors",
    )
    expected = weights[name].float() + 1.5 * (lora["b"] @ lora["a"])
    assert torch.equal(load_file(tmp_path / "m.safetensors")[name], expected.bfloat16())


def test_an_adapter_of_another_model_is_refused(tmp_path: Path) -> None:
    base_folder(tmp_path / "base")
    adapter_folder(tmp_path / "adapter", key="model.layers.7.mlp.up_proj")
    with pytest.raises(InputError, match=r"the adapter has model\.layers\.7\.mlp\.up_proj"):
        write_merged_weights(
            tmp_path / "base",
            read_loras(tmp_path / "adapter", tmp_path / "base"),
            tmp_path / "merged.safetensors",
        )
