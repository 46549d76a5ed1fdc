"""Does packing leak? Documents in one pack against each document alone, on tiny random models.

    python examples/packing_leak.py [MODEL_TYPE ...]

Prints the relative error of the logits behind the first document for plain transformers with
position_ids, for what TRL's padding-free collator passes, and for tunesmith. The states of the
models are set to fade slowly, as those of trained models do.
"""

import sys
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from tunesmith.core.types import Document
from tunesmith.data.collate import collate
from tunesmith.data.packing import pack_step
from tunesmith.model.causal_lm import wrap_model

LENGTHS = (70, 33, 97)
# fmt: off
SIZES = {
    "vocab_size": 512, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 4,
    "num_attention_heads": 4, "num_key_value_heads": 4, "head_dim": 16, "pad_token_id": 0,
    "linear_num_key_heads": 4, "linear_num_value_heads": 4, "linear_key_head_dim": 16,
    "linear_value_head_dim": 16, "mamba_n_heads": 8, "mamba_d_head": 16, "mamba_d_state": 16,
    "mamba_n_groups": 1, "mamba_d_ssm": 128, "num_local_experts": 0, "num_experts": 4,
    "num_experts_per_tok": 2, "moe_intermediate_size": 32, "shared_expert_intermediate_size": 32,
    "shared_intermediate_size": 128, "bos_token_id": 1, "eos_token_id": 2,
}
LAYERS = {
    "qwen3_5_text": "linear_attention", "qwen3_next": "linear_attention", "lfm2": "conv",
    "olmo_hybrid": "linear_attention", "granitemoehybrid": "mamba", "falcon_h1": "",
}
# fmt: on


def main(model_types: list[str]) -> None:
    print(f"{'':16}{'position_ids':>14}{'TRL padding-free':>18}{'tunesmith':>11}")
    for model_type in model_types or LAYERS:
        plain, padding_free, ours = measure_errors(make_network(model_type))
        print(f"{model_type:16}{plain:>14}{padding_free:>18}{ours:>11}", flush=True)


@torch.no_grad()
def make_network(model_type: str) -> Any:
    torch.manual_seed(0)
    attention = "attention" if model_type == "granitemoehybrid" else "full_attention"
    layers = {"layer_types": [LAYERS[model_type], attention] * 2}
    if not LAYERS[model_type]:  # both mixers in every layer
        layers = {}
    config = AutoConfig.for_model(model_type, **layers, **SIZES)
    network = AutoModelForCausalLM.from_config(config).eval().requires_grad_(False)
    for name, parameter in network.named_parameters():
        if name.endswith("A_log"):
            parameter.copy_(torch.linspace(0.01, 1, parameter.numel()).log())
        elif name.endswith("dt_bias"):
            parameter.fill_(-2.0)
        elif parameter.ndim > 1:
            parameter.mul_(4)
    return network


@torch.no_grad()
def measure_errors(network: Any) -> list[str]:
    rows = [torch.randint(3, 512, (length,)) for length in LENGTHS]
    alone = [network(ids[None], use_cache=False).logits[0, :-1] for ids in rows]
    positions = torch.cat([torch.arange(length) for length in LENGTHS])
    collator = DataCollatorForLanguageModeling(pad_token_id=0, padding_free=True)
    padding_free = collator([{"input_ids": ids.tolist()} for ids in rows])
    plain = {"input_ids": torch.cat(rows)[None], "position_ids": positions[None]}
    results: list[str] = []
    for inputs in (plain, padding_free):
        try:
            logits = network(**inputs, use_cache=False).logits[0].split(LENGTHS)
            results.append(compare([x[:-1] for x in logits], alone))
        except ValueError as error:
            results.append(type(error).__name__)
    return [*results, compare(compute_packed(network, rows), alone)]


def compute_packed(network: Any, rows: list[Tensor]) -> list[Tensor]:
    weights = np.arange(max(LENGTHS), dtype=np.float32).clip(max=1)
    documents = [Document(str(i), ids.numpy(), weights[: len(ids)]) for i, ids in enumerate(rows)]
    model = wrap_model(network, torch.float32)
    batch = collate(*pack_step(documents, sum(LENGTHS)))
    logits = model.head.compute_logits(model.compute_hidden(batch))
    return [logits[batch.document_S == batch.ids.index(name)] for name in ("0", "1", "2")]


def compare(packed: list[Tensor], alone: list[Tensor]) -> str:
    ours, expected = torch.cat(packed[1:]), torch.cat(alone[1:])
    return f"{(ours - expected).norm() / (expected - expected.mean(-1, keepdim=True)).norm():.1e}"


if __name__ == "__main__":
    main(sys.argv[1:])
