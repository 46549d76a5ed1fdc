"""Runs on packed checkpoints: the adapter of a gpt-oss whose experts stay packed, and of an FP8
model, whose rounding is said."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, GptOssConfig

from tiny_runs import make_tiny_recipe, plan_recipe, save_model_folder, train
from tunesmith.core.errors import InputError
from tunesmith.core.events import CheckResult
from tunesmith.export.export import export_run
from tunesmith.model.merge import refuse_packed_merge
from tunesmith.model.packed_formats import widen_mxfp4
from tunesmith.model.save import LoraTensors
from tunesmith.plan.memory import MXFP4_BYTES, Footprint, estimate_fixed_memory

pytestmark = pytest.mark.filterwarnings(
    "ignore:.is_gradient_checkpointing. is deprecated:FutureWarning"
)  # PEFT's
GPT_OSS = GptOssConfig(
    vocab_size=259,
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
    sliding_window=16,
    num_local_experts=4,
    num_experts_per_tok=2,
    max_position_embeddings=512,
    initializer_range=0.2,
    eos_token_id=258,
    bos_token_id=None,
)


def rewrite_config(folder: Path, **changed: Any) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changed))


def save_gpt_oss(folder: Path) -> tuple[Path, Any]:
    """Save a tiny gpt-oss with packed experts. Return it and the network with wide ones."""
    save_model_folder(folder)
    torch.manual_seed(0)
    network: Any = AutoModelForCausalLM.from_config(GPT_OSS, dtype=torch.float32).eval()
    for name, parameter in network.named_parameters():
        if name.endswith("sinks"):
            parameter.data = torch.randn(parameter.shape)
    network.save_pretrained(folder)
    tensors: dict[str, torch.Tensor] = {}
    for name, parameter in network.named_parameters():
        if not name.endswith((".experts.gate_up_proj", ".experts.down_proj")):
            tensors[name] = parameter.detach().contiguous()
            continue
        num_experts, num_inputs, num_outputs = parameter.shape
        groups = (num_experts, num_outputs, num_inputs // 32)
        blocks = torch.randint(256, (*groups, 16), dtype=torch.uint8)
        scales = torch.randint(121, 125, groups, dtype=torch.uint8)
        tensors |= {f"{name}_blocks": blocks, f"{name}_scales": scales}
        parameter.data = widen_mxfp4(blocks, scales, torch.float32).transpose(1, 2).contiguous()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    rewrite_config(folder, quantization_config={"quant_method": "mxfp4"})
    return folder, network


@pytest.mark.promise
def test_an_adapter_of_a_packed_gpt_oss_is_proven_and_loads_in_peft(tmp_path: Path) -> None:
    folder, wide = save_gpt_oss(tmp_path / "model")
    recipe = make_tiny_recipe(folder, tmp_path)
    plan = plan_recipe(recipe)
    num_packed = sum(p.numel() for n, p in wide.named_parameters() if n.endswith("_proj"))
    num_other = sum(parameter.numel() for parameter in wide.parameters()) - num_packed
    assert plan.model.packed_parameters == num_packed
    memory = estimate_fixed_memory(plan.model, Footprint("lora", "fp32", rank=2), layouts=1)
    assert memory.weights == int(num_packed * MXFP4_BYTES) + 4 * num_other
    checks = {event.kind: event for event in train(recipe) if isinstance(event, CheckResult)}
    assert checks["logits match transformers"].level == "ok"
    assert checks["transformers with its cache = without"].level == "ok"
    adapter = tmp_path / "run" / "adapter"
    names = set(load_file(adapter / "adapter_model.safetensors"))
    assert not [name for name in names if "experts" in name or "router" in name]
    tokens = torch.arange(5, 40)[None]
    with torch.no_grad():
        base = wide(input_ids=tokens).logits
        tuned = PeftModel.from_pretrained(wide, adapter)(input_ids=tokens).logits
    assert (tuned - base).norm() > 1e-3 * base.norm()
    export_run(tmp_path / "run", "merged", out=tmp_path / "merged")  # compared with the run
    merged = load_file(tmp_path / "merged" / "model.safetensors")
    original = load_file(folder / "model.safetensors")
    changed = {name for name in original if not torch.equal(merged[name], original[name])}
    assert changed == {name for name in original if "self_attn" in name and "proj.weight" in name}
    with pytest.raises(InputError, match="weights are in mxfp4, and merged ones"):
        refuse_packed_merge(folder, {"model.layers.0.mlp.experts": LoraTensors(*[base[0]] * 2, 1)})


def test_an_fp8_base_is_trained_and_not_merged(tmp_path: Path) -> None:
    folder = save_model_folder(tmp_path / "model")
    tensors = load_file(folder / "model.safetensors")
    for name in [name for name in tensors if name.endswith("_proj.weight")]:
        scale = tensors[name].abs().max().reshape(1) / 448
        tensors[f"{name}_scale_inv"] = scale
        tensors[name] = (tensors[name] / scale).to(torch.float8_e4m3fn)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    rewrite_config(folder, quantization_config={"quant_method": "fp8"})
    recipe = make_tiny_recipe(folder, tmp_path, dtype="bf16", attention="auto")
    list(train(recipe))
    run_dir = tmp_path / "run"
    with pytest.raises(InputError, match="weights are in fp8, and merged ones"):
        export_run(run_dir, "merged", out=tmp_path / "merged")
