"""Reload exported files with plain transformers: the independent check of an export.

In: folders and GGUF files that we wrote. Out: stock networks, and the ids of stock chat templates.
GGUF weights come through transformers' own reader, which shares no code with ours."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from contextlib import redirect_stderr
from io import StringIO
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from tunesmith.core.types import Json
from tunesmith.model.causal_lm import Network, encode_stock_conversation, load_stock_tokenizer
from tunesmith.model.hub.text_class import load_config, transformers_errors, use_torch_code


def encode_stock_prompts(
    folder: Path, prompts: Sequence[tuple[Sequence[Json], Sequence[Json]]], variables: Json
) -> list[tuple[int, ...]]:
    """Return the ids of each (messages, tools) with a generation prompt, from the folder's
    tokenizer and template. `variables` are passed to the template."""
    load_stock_tokenizer.cache_clear()  # the folder may have been written anew
    encode = functools.partial(encode_stock_conversation, folder, add_generation_prompt=True)
    with transformers_errors(folder):
        return [tuple(encode(messages, tools, None, variables)) for messages, tools in prompts]


def load_config_dict(folder: Path) -> dict[str, Any]:
    """Return config.json with all defaults of its model type."""
    return load_config(folder).to_dict()


def load_gguf(file: Path, config_dir: Path) -> Network:
    """Load a GGUF file in fp32 with transformers' own reader.

    The config comes from `config_dir`, written by `gguf.convert.write_settings`: transformers reads
    neither the head size of Qwen3 nor the rope scaling of Llama 3."""
    # redirected, since its progress bar cannot be turned off
    with transformers_errors(file), redirect_stderr(StringIO()):
        config = AutoConfig.from_pretrained(
            config_dir, trust_remote_code=False, local_files_only=True
        )
        network: Any = AutoModelForCausalLM.from_pretrained(
            file.parent,
            gguf_file=file.name,
            config=config,
            dtype=torch.float32,
            local_files_only=True,
        )
    return use_torch_code(network).eval().requires_grad_(False)
