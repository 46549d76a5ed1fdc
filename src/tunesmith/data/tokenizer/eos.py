"""The token that ended every document when a model was pretrained.

    tokenizer -> Separator (id, text, why)

A chat model's eos token ends answers and was put in place later; the separator is still in the vocabulary, under its
own name. So: the first of the usual names that is a control token, else the eos token.
"""

from __future__ import annotations

from typing import NamedTuple

from tunesmith.core.errors import InputError
from tunesmith.data.tokenizer.chat_tokenizer import ChatTokenizer

# GPT-2 and NeoX, OLMo, Phi, Qwen, SmolLM, StarCoder; Llama 3, Granite; Gemma; Llama 2, Mistral; DeepSeek.
NAMES = ("<|endoftext|>", "<|end_of_text|>", "<eos>", "</s>", "<｜end▁of▁sentence｜>")


class Separator(NamedTuple):
    id: int
    text: str
    why: str


def separator_of(tokenizer: ChatTokenizer) -> Separator:
    """Raises InputError for a tokenizer that has none."""
    eos = tokenizer.named.get("eos_token", "")
    for name in NAMES:
        if name in tokenizer.controls:
            same = "the eos token" if name == eos else f"the eos token, {eos}, ends answers" if eos else "no eos token"
            return Separator(tokenizer.controls[name].id, name, f"a usual name of what ends documents; {same}")
    if tokenizer.eos_id is None:
        fix = "set eos_token in its tokenizer_config.json"
        raise InputError("the tokenizer names no token that ends a document", where="tokenizer", fix=fix)
    return Separator(tokenizer.eos_id, eos, f"the eos token; it has none of {', '.join(NAMES)}")
