"""The two exports that are folders for transformers: the adapter as it is, and the model with the adapter merged in.

In: a finished run. Out: `adapter_config.json` and its weights for PEFT, or a model folder that needs no adapter. Both
hold the tokenizer, the chat template and the generation config with the trained end tokens.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import torch

from tunesmith.core.atomic import MANIFEST
from tunesmith.export.parity import Job, Reread
from tunesmith.model.causal_lm import load_network
from tunesmith.model.hub.adapter_config import CONFIG, WEIGHTS
from tunesmith.model.hub.provenance import FILE as PROVENANCE
from tunesmith.model.hub.validate import SINGLE, read_json
from tunesmith.model.merge import add_to_network, read_loras, read_rows, write_merged
from tunesmith.model.reference_load import stock_prompts
from tunesmith.model.save import rescale_adapter, save_config
from tunesmith.train.model_card import CARD, note_scale


def write_peft(job: Job) -> None:
    """The adapter folder, file by file; at another scale its config, its rows of new tokens and its card say so."""
    _copy(job)
    if job.run.scale != 1:
        rescale_adapter(job.folder, job.run.scale, job.run.rows)
        note_scale(job.folder, job.run.scale, job.run.curve)


def reread_peft(job: Job) -> Reread:
    """The adapter as its own files say it is, added to the stock base."""
    network = job.run.base_network()
    base = job.run.weights.path
    add_to_network(network, {**read_loras(job.folder, base), **read_rows(job.folder, base)})
    return Reread(network, _rendered(job), _end_ids(job.folder))


def write_merged_folder(job: Job) -> None:
    """The base's config, its weights with the adapter added in fp32 and cast once, and what serving needs."""
    run = job.run
    _copy(job, CONFIG, WEIGHTS, PROVENANCE, SINGLE, CARD)
    save_config(job.folder, run.weights.path, run.weights.vocab_size)
    write_merged(run.weights.path, run.changes, job.folder / SINGLE, job.narrow)


def reread_merged(job: Job) -> Reread:
    network = load_network(job.folder, torch.float32, job.run.device)
    return Reread(network, _rendered(job), _end_ids(job.folder))


def _copy(job: Job, *left_out: str) -> None:
    """File by file: `copytree` would gather errors and lose what the disk said."""
    for file in sorted(job.run.saved.rglob("*")):
        if file.is_file() and file.name not in (MANIFEST, *left_out):
            place = job.folder / file.relative_to(job.run.saved)
            place.parent.mkdir(exist_ok=True)
            shutil.copyfile(file, place)


def _rendered(job: Job) -> list[tuple[int, ...]]:
    return stock_prompts(
        job.folder, [(witness.messages, witness.tools) for witness in job.chats], job.run.recipe.chat_template_kwargs
    )


def _end_ids(folder: Path) -> tuple[int, ...]:
    ends = read_json(folder / "generation_config.json").get("eos_token_id")
    return (ends,) if isinstance(ends, int) else tuple(ends or ())
