"""FP8 and MXFP4 checkpoints: loaded as the same model with wide weights, or refused by name."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    GptOssConfig,
    LlamaConfig,
    PreTrainedConfig,
    Qwen3MoeConfig,
)

from text_part_configs import make_multimodal_configs
from tiny_models import SIZES
from tunesmith.core.errors import InputError
from tunesmith.model.adapters import METHODS
from tunesmith.model.causal_lm import compute_stock_logits, load_network
from tunesmith.model.hub.packed_tensors import find_packing
from tunesmith.model.hub.spec import read_spec
from tunesmith.model.packed_formats import (
    MAX_SCALE,
    Mxfp4ExpertWeight,
    widen_fp8,
    widen_mxfp4,
)
from tunesmith.model.save import save_model

BLOCK = [16, 16]
WIDTHS: dict[str, Any] = SIZES | {"hidden_size": 64, "intermediate_size": 96, "head_dim": 16}
GPT_OSS = GptOssConfig(**WIDTHS, num_local_experts=4, num_experts_per_tok=2, sliding_window=8)
LLAMA = LlamaConfig(**WIDTHS)
QWEN3_MOE = Qwen3MoeConfig(
    **WIDTHS, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=40, decoder_sparse_step=1
)
TOKENS = [3, 7, 11, 50, 96, 4]


def make_network(config: PreTrainedConfig) -> Any:
    network: Any = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()
    generator = torch.Generator().manual_seed(0)
    for name, parameter in network.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        parameter.data = (1 + 0.1 * noise if "norm" in name else 0.1 * noise).bfloat16()
    return network.requires_grad_(False)


def write_checkpoint(
    folder: Path, network: Any, tensors: dict[str, Tensor], quantization: dict[str, Any]
) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    config = network.config.to_dict() | {"architectures": [type(network).__name__]}
    config |= {"dtype": "bfloat16"}
    if quantization:
        config["quantization_config"] = quantization
    (folder / "config.json").write_text(json.dumps(config))
    contiguous = {name: tensor.contiguous() for name, tensor in tensors.items()}
    save_file(contiguous, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def assert_same_model(folder: Path, expected: Any) -> None:
    """The loaded network has the logits of the wide one, to the bit."""
    network = load_network(folder, torch.bfloat16)
    places = list(range(len(TOKENS)))
    expected.set_experts_implementation("eager")
    network.set_experts_implementation("eager")
    logits = compute_stock_logits(expected, TOKENS, places)
    assert torch.equal(compute_stock_logits(network, TOKENS, places), logits)


# ---------------------------------------------------------------- MXFP4


def write_mxfp4(folder: Path) -> tuple[Path, Any]:
    """Write a gpt-oss with packed experts. Return the folder, and the network with wide ones."""
    network = make_network(GPT_OSS)
    tensors = dict(network.state_dict())
    generator = torch.Generator().manual_seed(1)
    for name in list(tensors):
        if not name.endswith((".experts.gate_up_proj", ".experts.down_proj")):
            continue
        num_experts, num_inputs, num_outputs = tensors.pop(name).shape
        groups = (num_experts, num_outputs, num_inputs // 32)
        blocks = torch.randint(256, (*groups, 16), generator=generator, dtype=torch.uint8)
        scales = torch.randint(121, 125, groups, generator=generator, dtype=torch.uint8)
        tensors |= {f"{name}_blocks": blocks, f"{name}_scales": scales}
        wide = widen_mxfp4(blocks, scales, torch.bfloat16).transpose(1, 2).contiguous()
        network.get_parameter(name).data = wide
    quantization = {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]}
    return write_checkpoint(folder, network, tensors, quantization), network


def test_a_gpt_oss_checkpoint_stays_packed_and_computes_the_wide_model(tmp_path: Path) -> None:
    folder, wide = write_mxfp4(tmp_path)
    assert_same_model(folder, wide)
    experts = load_network(folder, torch.bfloat16).model.layers[0].mlp.experts
    assert isinstance(experts.gate_up_proj, Mxfp4ExpertWeight)
    spec = read_spec(folder)
    assert spec.parameters == sum(parameter.numel() for parameter in wide.parameters())
    assert (spec.num_experts, spec.dtype) == (4, "bfloat16")
    (folder / "model.safetensors").unlink()
    expected = read_spec(folder)  # a plan before the download
    assert expected.packed_parameters == spec.packed_parameters > 0
    assert (expected.parameters, expected.dtype) == (spec.parameters, spec.dtype)


@pytest.mark.parametrize("scale", [MAX_SCALE + 1, 255])
def test_infinite_mxfp4_weights_are_refused(scale: int, tmp_path: Path) -> None:
    folder, _ = write_mxfp4(tmp_path)
    tensors = load_file(folder / "model.safetensors")
    name = "model.layers.1.mlp.experts.down_proj_scales"
    tensors[name][2, 1, 0] = scale
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(InputError, match=f"scale is {scale}: its weights are NaN or infinite"):
        load_network(folder, torch.bfloat16)


def test_missing_or_short_mxfp4_scales_are_refused(tmp_path: Path) -> None:
    _, wide = write_mxfp4(tmp_path / "whole")
    tensors = dict(wide.state_dict())
    name = "model.layers.0.mlp.experts.gate_up_proj"
    num_experts, num_inputs, num_outputs = tensors.pop(name).shape
    blocks = torch.zeros(num_experts, num_outputs, num_inputs // 32, 16, dtype=torch.uint8)
    for scales in (None, torch.zeros(num_experts, num_outputs, 1, dtype=torch.uint8)):
        packed = {f"{name}_blocks": blocks}
        if scales is not None:
            packed[f"{name}_scales"] = scales
        folder = write_checkpoint(tmp_path, wide, tensors | packed, {"quant_method": "mxfp4"})
        with pytest.raises(InputError, match=r"gate_up_proj_blocks .* are (missing|U8)"):
            read_spec(folder)


# ---------------------------------------------------------------- FP8


def pack_fp8(weight: Tensor, block: list[int] | None) -> tuple[Tensor, Tensor]:
    """Quantize a matrix with one scale per block, or one for all."""
    weight = weight.float()
    if block is None:
        scale = weight.abs().max() / 448
        return (weight / scale).to(torch.float8_e4m3fn), scale.bfloat16().reshape(1)
    rows, columns = (-(-size // step) for size, step in zip(weight.shape, block, strict=True))
    scales = torch.empty(rows, columns)
    for row in range(rows):
        for column in range(columns):
            part = weight[row * block[0] :, column * block[1] :][: block[0], : block[1]]
            scales[row, column] = part.abs().max() / 448
    wide = scales.repeat_interleave(block[0], 0).repeat_interleave(block[1], 1)
    return (weight / wide[: weight.shape[0], : weight.shape[1]]).to(torch.float8_e4m3fn), scales


def write_fp8(folder: Path, config: PreTrainedConfig, block: list[int] | None) -> tuple[Path, Any]:
    """Write a checkpoint with all linears of the layers in FP8, experts one by one. Return the
    folder, and the network with what they stand for."""
    network = make_network(config)
    tensors: dict[str, Tensor] = {}
    for name, parameter in network.named_parameters():
        matrices = {name: parameter.data}
        if ".experts." in name:
            path, word = name.rsplit(".", 1)
            words = ["gate_proj", "up_proj"] if word == "gate_up_proj" else ["down_proj"]
            matrices = {}
            for expert, stacked in enumerate(parameter.data):
                for piece, matrix in zip(words, stacked.chunk(len(words)), strict=True):
                    matrices[f"{path}.{expert}.{piece}.weight"] = matrix
        wide: list[Tensor] = []
        for key, matrix in matrices.items():
            is_packed = ".layers." in key and key.endswith("_proj.weight")
            if not is_packed:
                tensors[key] = matrix
                continue
            packed, scales = pack_fp8(matrix, block)
            tensors |= {key: packed, f"{key}_scale_inv": scales}
            shape = None if block is None else (block[0], block[1])
            wide.append(widen_fp8(packed, scales, shape).bfloat16())
        if wide:
            parameter.data = torch.cat(wide).view(parameter.shape)
    quantization = {"quant_method": "fp8", "weight_block_size": block, "fmt": "e4m3"}
    if block is None:
        quantization["activation_scheme"] = "static"
        tensors["model.layers.0.self_attn.q_proj.activation_scale"] = torch.ones(())
    return write_checkpoint(folder, network, tensors, quantization), network


@pytest.mark.parametrize("block", [BLOCK, [40, 24], None], ids=str)
@pytest.mark.parametrize("config", [LLAMA, QWEN3_MOE], ids=["llama", "qwen3_moe"])
def test_an_fp8_checkpoint_is_read(
    config: PreTrainedConfig, block: list[int] | None, tmp_path: Path
) -> None:
    folder, wide = write_fp8(tmp_path, config, block)
    assert_same_model(folder, wide)
    spec = read_spec(folder)
    assert spec.parameters == sum(parameter.numel() for parameter in wide.parameters())
    assert spec.dtype == "bfloat16"


def write_whole_fp8(folder: Path) -> tuple[Path, dict[str, Tensor]]:
    """Write a whole Qwen3.5 with linears in FP8: of its text part, of a tower, and of the layer for
    further tokens. Return the folder, and what the files stand for."""
    torch.manual_seed(0)
    whole: Any = AutoModelForImageTextToText.from_config(
        make_multimodal_configs()["qwen3_5"], dtype=torch.bfloat16
    )
    for parameter in whole.parameters():
        parameter.data.normal_(0, 0.1)
    whole.save_pretrained(folder)
    wide = load_file(folder / "model.safetensors")
    wide["mtp.layers.0.self_attn.q_proj.weight"] = torch.randn(64, 48).bfloat16()
    wide["mtp.norm.weight"] = torch.randn(48).bfloat16()
    tensors: dict[str, Tensor] = {}
    for name, tensor in wide.items():
        is_linear = name.endswith(("_proj.weight", "linear_fc1.weight", "in_proj_qkv.weight"))
        tensors[name] = tensor
        if is_linear and tensor.ndim == 2:
            packed, scales = pack_fp8(tensor, BLOCK)
            scales = scales.bfloat16()
            tensors |= {name: packed, f"{name}_scale_inv": scales}
            wide[name] = widen_fp8(packed, scales, (BLOCK[0], BLOCK[1])).bfloat16()
    packed_names = {name for name in wide if f"{name}_scale_inv" in tensors}
    assert {name.split(".")[1] for name in packed_names} == {"language_model", "visual", "layers"}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "fp8", "weight_block_size": BLOCK}
    (folder / "config.json").write_text(json.dumps(config))
    return folder, wide


def test_a_trained_fp8_model_is_saved_wide_with_all_its_parts(tmp_path: Path) -> None:
    """Towers and layers for further tokens in FP8, too: the saved config says that nothing is."""
    base, wide = write_whole_fp8(tmp_path / "base")
    network = load_network(base, torch.bfloat16)
    METHODS["full"](network, {})
    save_model(network, tmp_path / "saved", base, torch.bfloat16)
    saved = load_file(tmp_path / "saved/model.safetensors")
    assert saved.keys() == wide.keys()
    for name, tensor in wide.items():
        assert torch.equal(saved[name], tensor), name
    assert "quantization_config" not in json.loads((tmp_path / "saved/config.json").read_text())
    _, info = AutoModelForImageTextToText.from_pretrained(
        tmp_path / "saved", output_loading_info=True
    )
    assert not info["missing_keys"]


def drop_scales(tensors: dict[str, Tensor], name: str) -> None:
    del tensors[f"{name}_scale_inv"]


def shorten_scales(tensors: dict[str, Tensor], name: str) -> None:
    tensors[f"{name}_scale_inv"] = tensors[f"{name}_scale_inv"][:1]


@pytest.mark.parametrize(
    ("change", "message"),
    [(drop_scales, "have no model.layers.0.mlp.up_proj.weight_scale_inv"),
     (shorten_scales, "not one per block of 16 x 16")],
)  # fmt: skip
def test_wrong_fp8_scales_are_refused(
    change: Callable[[dict[str, Tensor], str], None], message: str, tmp_path: Path
) -> None:
    network = make_network(LLAMA)
    tensors = dict(network.state_dict())
    name = "model.layers.0.mlp.up_proj.weight"
    tensors[name], tensors[f"{name}_scale_inv"] = pack_fp8(tensors[name], BLOCK)
    change(tensors, name)
    quantization = {"quant_method": "fp8", "weight_block_size": BLOCK}
    with pytest.raises(InputError, match=message):
        read_spec(write_checkpoint(tmp_path, network, tensors, quantization))


# ---------------------------------------------------------------- refused by name


def test_fp8_of_other_tools_is_refused_by_name(tmp_path: Path) -> None:
    """AutoFP8 writes the same quant_method with other scales."""
    network = make_network(LLAMA)
    tensors = dict(network.state_dict())
    name = "model.layers.0.mlp.up_proj"
    packed, scale = pack_fp8(tensors[f"{name}.weight"], None)
    tensors |= {f"{name}.weight": packed, f"{name}.weight_scale": scale.float().reshape(())}
    tensors[f"{name}.input_scale"] = torch.ones(())
    quantization = {"quant_method": "fp8", "activation_scheme": "static"}
    with pytest.raises(InputError, match=r"weight_scale, as AutoFP8") as caught:
        read_spec(write_checkpoint(tmp_path, network, tensors, quantization))
    assert "unquantized" in caught.value.fix


def test_stacked_fp8_is_refused_by_name(tmp_path: Path) -> None:
    network = make_network(QWEN3_MOE)
    tensors = dict(network.state_dict())
    name = "model.layers.0.mlp.experts.down_proj"
    tensors[name] = tensors[name].to(torch.float8_e4m3fn)
    tensors[f"{name}_scale_inv"] = torch.ones(4, 4, 3)
    quantization = {"quant_method": "fp8", "weight_block_size": BLOCK}
    with pytest.raises(InputError, match="supported for matrices only") as caught:
        read_spec(write_checkpoint(tmp_path, network, tensors, quantization))
    assert "unquantized" in caught.value.fix


@pytest.mark.parametrize(
    "method", ["awq", "gptq", "bitsandbytes", "compressed-tensors", "fbgemm_fp8", None]
)
def test_other_packings_are_refused_by_name(method: str | None) -> None:
    config = {"quantization_config": {"quant_method": method, "bits": 4}}
    with pytest.raises(InputError, match=f"already quantized .*{method or 'bits'}"):
        find_packing(config, "llama", "config.json")


def test_mxfp4_is_refused_beside_gpt_oss() -> None:
    config = {"quantization_config": {"quant_method": "mxfp4"}}
    assert find_packing(config, "gpt_oss", "config.json") is not None
    with pytest.raises(InputError, match="mxfp4 is supported for gpt_oss only"):
        find_packing(config, "llama", "config.json")


@pytest.mark.parametrize("size", [[0, 128], [128], "128", [128, 1.5], [10**9, 128]])
def test_an_absurd_block_is_refused(size: object) -> None:
    config = {"quantization_config": {"quant_method": "fp8", "weight_block_size": size}}
    with pytest.raises(InputError, match="weight_block_size"):
        find_packing(config, "llama", "config.json")
