"""The names of an adapter's tensors on the model that PEFT loads.

    name_on_checkpoint(path, prefix)    path in the text class -> path on the whole model
    name_in_text_class(path)            the other way round
    rename_tensors(tensors, prefix)     the tensors of a file under the names of the text class

The text part of a multimodal model is trained as a model of its own. PEFT and vLLM load its adapter
onto the whole model, where the layers are below `model.language_model.`; a name that is not there
changes nothing, and they only print a warning. So files have the names of the whole model, and
everything else in tunesmith those of the text class. Adapters of others may have either. Left out:
what else a file may hold (adapter_config.py)."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TypeVar

from tunesmith.core.errors import InputError
from tunesmith.model.hub.stored_tensors import PREFIXES

PREFIX = "base_model.model."
TEXT_CLASS_PREFIX = "model."
# what an adapter of the text class may change
TEXT_MODULES = (
    "model.layers.",
    "model.embed_tokens",
    "model.norm.",
    "model.per_layer_",
    "lm_head.",
)
TEXT_FIX = "use an adapter of the text part alone, or merge this one with PEFT and train the result"
MODEL_FIX = "set model: to the multimodal checkpoint that the adapter was trained on"
COPY_FIX = "copy the adapter folder again"
T = TypeVar("T")


def name_on_checkpoint(path: str, tensor_prefix: str) -> str:
    """Return a path of the text class on the whole model; the same without a prefix, and for the
    head, which both have in one place."""
    if not tensor_prefix or not path.startswith(TEXT_CLASS_PREFIX):
        return path
    return tensor_prefix + path.removeprefix(TEXT_CLASS_PREFIX)


def name_in_text_class(path: str) -> str:
    """Return a path of the whole model in the text class, whichever version of transformers has
    named it; others unchanged."""
    inner_path = f"{path}."
    for prefix, replacement in PREFIXES:
        if inner_path.startswith(prefix):
            return (replacement + inner_path.removeprefix(prefix)).removesuffix(".")
    return path


def rename_tensors(tensors: Mapping[str, T], tensor_prefix: str, file: Path) -> dict[str, T]:
    """Return the tensors of an adapter under PEFT's names on the text class. Raise InputError for
    those of a multimodal model on a base that is none, for those of a tower, and for two with one
    name."""
    renamed: dict[str, T] = {}
    for stored_name, tensor in tensors.items():
        path = stored_name.removeprefix(PREFIX)
        text_path = name_in_text_class(path)
        if text_path != path and not tensor_prefix:
            message = f"the adapter is for a multimodal model, but the base is not: {path:.200}"
            raise InputError(message, where=str(file), fix=MODEL_FIX)
        if tensor_prefix and not text_path.startswith(TEXT_MODULES):
            message = f"the adapter changes {path:.200}, which is not in the text part"
            raise InputError(message, where=str(file), fix=TEXT_FIX)
        name = f"{PREFIX}{text_path}" if path != stored_name else stored_name
        if name in renamed:
            message = f"the adapter holds {text_path:.200} under two names"
            raise InputError(message, where=str(file), fix=COPY_FIX)
        renamed[name] = tensor
    return renamed
