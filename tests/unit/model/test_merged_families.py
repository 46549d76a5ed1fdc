"""Merged files of every family compute in transformers what the adapter computes."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from quick_families import leave_others_to_slow
from tiny_models import (
    CONFIGS,
    EXPERT_FAMILIES,
    LORA,
    collate_documents,
    make_stock_network,
    make_tiny_document,
    make_tiny_model,
)
from tunesmith.model.merge import read_loras, write_merged_weights
from tunesmith.model.save import save_adapter


@pytest.mark.parametrize("family", leave_others_to_slow(CONFIGS))
def test_merged_files_compute_what_the_adapter_does(family: str, tmp_path: Path) -> None:
    """Linears and, where there are some, experts have an adapter; nothing else changes."""
    words = ["all-linear", "experts"] if family in EXPERT_FAMILIES else ["all-linear"]
    settings: dict[str, Any] = {"lora_target_modules": words}
    base = tmp_path / "base"
    stock = make_stock_network(family)
    stock.save_pretrained(base)
    model = make_tiny_model(family, **settings)
    save_adapter(model.network, tmp_path / "adapter", LORA | settings, base)
    batch = collate_documents([make_tiny_document(31, first_target=1)])
    merged = tmp_path / "merged"
    merged.mkdir()
    shutil.copyfile(base / "config.json", merged / "config.json")
    loras = read_loras(tmp_path / "adapter", base)
    write_merged_weights(base, loras, merged / "model.safetensors")
    network = AutoModelForCausalLM.from_pretrained(merged, dtype=torch.float32).eval()
    with torch.no_grad():
        ours = model.head.compute_logits(model.compute_hidden(batch)).float()
        theirs, before = (
            x(input_ids=batch.tokens_T[None], use_cache=False).logits[0, batch.positions_S]
            for x in (network, stock)
        )
    assert (theirs - ours).norm() < 1e-4 * ours.norm()
    assert (theirs - before).norm() > 1e-3 * ours.norm()
