"""Exports that are transformers folders: the adapter as it is, and the merged model.

In: an ExportJob. Out: `adapter_config.json` and weights for PEFT, or a model folder without an
adapter. Both contain the tokenizer, the chat template and the generation config with the trained
end tokens."""

from __future__ import annotations

import shutil
from pathlib import Path

import torch

from tunesmith.core.atomic import MANIFEST
from tunesmith.export.parity import ExportJob, ReloadedExport
from tunesmith.export.source_run import SourceRun
from tunesmith.model.causal_lm import load_network
from tunesmith.model.experts import (
    ExpertLoraTensors,
)
from tunesmith.model.hub.adapter_config import (
    ADAPTER_CONFIG_FILE,
    ADAPTER_WEIGHTS_FILE,
)
from tunesmith.model.hub.validate import WEIGHTS_FILE, read_model_json
from tunesmith.model.merge import (
    merge_into_network,
    read_loras,
    read_saved_modules,
    read_token_rows,
    write_merged_weights,
)
from tunesmith.model.reference_load import encode_stock_prompts
from tunesmith.model.save import rescale_adapter, save_config
from tunesmith.session.identity import PROVENANCE_FILE as PROVENANCE
from tunesmith.session.identity import update_weights_hash
from tunesmith.train.model_card import CARD_FILE, note_scale

MERGE_FIX = "export it with --to merged, and serve the merged model"


def write_peft(job: ExportJob) -> None:
    """Copy the adapter folder; at another scale, change its config, the rows and modules
    that are trained in full, and the model card."""
    _copy_files(job)
    if job.run.scale != 1:
        rescale_adapter(job.folder, job.run.scale, job.run.token_rows, job.run.modules)
        update_weights_hash(job.folder, job.folder / ADAPTER_WEIGHTS_FILE)
        note_scale(job.folder, job.run.scale, job.run.scale_points)


def reload_peft(job: ExportJob) -> ReloadedExport:
    """Merge the exported adapter into the stock base, as its own files describe it."""
    network = job.run.load_base_network()
    base_dir = job.run.model_spec.path
    loras = read_loras(job.folder, base_dir)
    token_rows = read_token_rows(job.folder, base_dir)
    modules = read_saved_modules(job.folder, base_dir)
    merge_into_network(network, {**loras, **token_rows, **modules})
    return ReloadedExport(network, render_prompts(job), read_end_ids(job.folder))


def write_merged_folder(job: ExportJob) -> None:
    """Write the base's config, its weights merged in fp32 and cast once, and the serving files."""
    run = job.run
    _copy_files(job, ADAPTER_CONFIG_FILE, ADAPTER_WEIGHTS_FILE, PROVENANCE, WEIGHTS_FILE, CARD_FILE)
    save_config(job.folder, run.model_spec.path, run.model_spec.vocab_size, is_packed=True)
    write_merged_weights(
        run.model_spec.path, run.changes, job.folder / WEIGHTS_FILE, run.quantized_paths
    )


def reload_merged(job: ExportJob) -> ReloadedExport:
    network = load_network(job.folder, torch.float32)
    return ReloadedExport(network, render_prompts(job), read_end_ids(job.folder))


def _copy_files(job: ExportJob, *excluded: str) -> None:
    """Copy file by file: `copytree` would collect errors and lose the errno of a full disk."""
    for file in sorted(job.run.saved_dir.rglob("*")):
        if file.is_file() and file.name not in (MANIFEST, *excluded):
            target = job.folder / file.relative_to(job.run.saved_dir)
            target.parent.mkdir(exist_ok=True)
            shutil.copyfile(file, target)


def render_prompts(job: ExportJob) -> list[tuple[int, ...]]:
    """Return the ids of the prompts as transformers renders them from the exported files."""
    chats = [(example.messages, example.tools) for example in job.chat_examples]
    return encode_stock_prompts(job.folder, chats, job.run.recipe.chat_template_kwargs)


def read_end_ids(folder: Path) -> tuple[int, ...]:
    """Return the end tokens of an exported folder."""
    end_ids = read_model_json(folder / "generation_config.json").get("eos_token_id")
    return (end_ids,) if isinstance(end_ids, int) else tuple(end_ids or ())


def has_expert_adapters(run: SourceRun) -> bool:
    """Return whether the run trained adapters of routed experts."""
    return any(isinstance(lora, ExpertLoraTensors) for lora in run.loras.values())
