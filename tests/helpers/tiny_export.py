"""Tiny model folders of each family that GGUF supports, with a merging BPE tokenizer;
finished runs on them."""

import json
from pathlib import Path
from typing import Any

import torch
from tokenizers import AddedToken, Tokenizer, decoders
from tokenizers.models import BPE
from transformers import (
    AutoModelForCausalLM,
    Lfm2Config,
    LlamaConfig,
    PreTrainedConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
    Qwen3MoeConfig,
)

from tiny_runs import make_chat_row, make_tiny_recipe, train, write_rows
from tunesmith.export.export import TARGETS
from tunesmith.export.parity import (
    ExportJob,
    LiveOutputs,
    compare_outputs,
    compute_export_outputs,
    refuse_mismatch,
    select_examples,
)
from tunesmith.export.source_run import SourceRun, open_source_run
from tunesmith.model.gguf.tokenizer import set_pre_tokenizer

SYSTEM = "You are small."
CHATML = (
    "{% for m in messages %}{% if loop.first and m.role != 'system' %}<|im_start|>system\n"
    + SYSTEM
    + "<|im_end|>\n"
    "{% endif %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
MERGES = [
    ("s", "u"),
    ("su", "m"),
    ("a", "n"),
    ("an", "d"),
    ("Ġ", "and"),
    ("p", "l"),
    ("pl", "e"),
    ("Ġ", "1"),
]
SIZES: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 48,  # not a multiple of the Q8_0 block
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "initializer_range": 0.2,
    "tie_word_embeddings": True,
}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
CONFIGS: dict[str, tuple[type[PreTrainedConfig], dict[str, Any]]] = {
    "llama": (LlamaConfig, {}),
    "llama-wide": (
        LlamaConfig,
        {"head_dim": 32, "tie_word_embeddings": False, "rope_parameters": LLAMA3_ROPE},
    ),
    "llama-bias": (LlamaConfig, {"attention_bias": True, "mlp_bias": True}),
    "qwen2": (Qwen2Config, {}),
    "qwen3": (Qwen3Config, {"head_dim": 32}),
    "qwen3_moe": (
        Qwen3MoeConfig,
        {
            "head_dim": 32,
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 32,
            "norm_topk_prob": True,
        },
    ),
    "lfm2": (
        Lfm2Config,
        {"num_hidden_layers": 3, "layer_types": ["conv", "full_attention", "conv"]},
    ),
}
CUTS = {"qwen2": "qwen2", "qwen3": "qwen2", "llama-wide": "llama-bpe"}


def save_tokenizer(path: Path, cut: str, *, template: str = CHATML) -> int:
    """Save a byte-level BPE with a few merges and return its number of tokens.

    Its EOS token differs from the token that ends an answer.
    """
    alphabet = sorted(chr(i) for i in bytes_to_unicode())
    vocabulary = {
        token: i for i, token in enumerate([*alphabet, *("".join(pair) for pair in MERGES)])
    }
    tokenizer = Tokenizer(BPE(vocabulary, MERGES, ignore_merges=cut == "llama-bpe"))
    set_pre_tokenizer(tokenizer, cut)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(
        [AddedToken(t, special=True) for t in ("<|im_start|>", "<|im_end|>", "<|text|>")]
    )
    tokenizer.add_tokens(
        [AddedToken(t, special=False, normalized=False) for t in ("<think>", "</think>")]
    )
    stock = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|text|>", chat_template=template
    )
    stock.save_pretrained(path)
    return len(stock)


def bytes_to_unicode() -> list[int]:
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    return printable + [256 + i for i in range(256 - len(printable))]


def save_model(
    path: Path, family: str = "llama", *, template: str = CHATML, **changed: Any
) -> Path:
    """Save a random bf16 model; its embedding has more rows than the tokenizer has tokens."""
    tokens = save_tokenizer(path, CUTS.get(family, "smollm"), template=template)
    config_class, family_sizes = CONFIGS[family]
    ids = {"vocab_size": tokens + 5, "eos_token_id": tokens - 3, "bos_token_id": None}
    config = config_class(**(ids | SIZES | family_sizes | changed))
    torch.manual_seed(0)
    network = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    generator = torch.Generator().manual_seed(1)
    for name, parameter in network.named_parameters():
        if "norm" in name or "bias" in name:
            parameter.data += 0.3 * torch.randn(parameter.shape, generator=generator)
    network.bfloat16().save_pretrained(path)
    return path


def save_run(folder: Path, model: Path, *, system: str = "", **changed: Any) -> Path:
    """Train a run of a few steps, at a learning rate that changes the model."""
    folder.mkdir(parents=True, exist_ok=True)
    test_rows = [
        make_chat_row(f"{n} and {3 * n} please", json.dumps({"sum": 4 * n}), system)
        for n in range(9, 13)
    ]
    values = {
        "test_data": str(write_rows(folder / "test.jsonl", test_rows)),
        "learning_rate": 0.03,
    }
    train(make_tiny_recipe(model, folder, **(values | changed)))
    return folder / "run"


def make_export_job(path: Path, folder: Path, kind: str = "") -> ExportJob:
    """Return the export job of a run, with `folder` as its work folder."""
    run: SourceRun = open_source_run(path)
    folder.mkdir(parents=True, exist_ok=True)
    return ExportJob(run, folder, kind, select_examples(run))


def judge_export(job: ExportJob, target: str, live: LiveOutputs) -> None:
    """Raise GateError if an export differs from the run, whose outputs are `live`."""
    form = TARGETS[target][job.export_type]
    reread = form.reload(job)
    parity = compare_outputs(job, live, compute_export_outputs(job, reread), reread)
    refuse_mismatch(form.tolerance, parity, job, reread)
