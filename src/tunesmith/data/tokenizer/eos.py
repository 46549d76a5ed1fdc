"""The token that ended every document when a model was pretrained.

    tokenizer -> Separator (id, text, why)

A chat model's eos token ends answers and was put in place later; the separator is still in the
vocabulary, under its own name. So: the first of the usual names that is a control token, else the
eos token."""

from __future__ import annotations

from typing import NamedTuple

from tunesmith.core.errors import InputError
from tunesmith.data.tokenizer.chat_tokenizer import ChatTokenizer

# GPT-2 and NeoX, OLMo, Phi, Qwen, SmolLM, StarCoder; Llama 3, Granite; Gemma; Llama 2, Mistral;
# DeepSeek.
SEPARATOR_TOKENS = ("<|endoftext|>", "<|end_of_text|>", "<eos>", "</s>", "<｜end▁of▁sentence｜>")


class SeparatorToken(NamedTuple):
    id: int
    text: str
    reason: str


def find_separator(tokenizer: ChatTokenizer) -> SeparatorToken:
    """Raises InputError for a tokenizer that has none."""
    eos = tokenizer.special_tokens.get("eos_token", "")
    for name in SEPARATOR_TOKENS:
        if name in tokenizer.controls:
            eos_note = (
                "the eos token"
                if name == eos
                else f"the eos token, {eos}, ends answers"
                if eos
                else "no eos token"
            )
            return SeparatorToken(
                tokenizer.controls[name].id,
                name,
                f"a usual name of what ends documents; {eos_note}",
            )
    if tokenizer.eos_id is None:
        fix = "set eos_token in its tokenizer_config.json"
        raise InputError(
            "the tokenizer names no token that ends a document", where="tokenizer", fix=fix
        )
    return SeparatorToken(
        tokenizer.eos_id, eos, f"the eos token; it has none of {', '.join(SEPARATOR_TOKENS)}"
    )
