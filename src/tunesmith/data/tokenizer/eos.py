"""Find the token that ended each document when a model was pretrained.

    tokenizer -> SeparatorToken (id, text, reason)

The EOS token of a chat model ends answers and was set later; the separator is still in the
vocabulary under its old name. So it is the first of the usual names that is a control token, else
the EOS token."""

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
    """Return the separator. Raises InputError for a tokenizer without one."""
    eos = tokenizer.special_tokens.get("eos_token", "")
    for name in SEPARATOR_TOKENS:
        if name in tokenizer.controls:
            eos_note = f"the EOS token, {eos}, ends answers" if eos else "no EOS token is set"
            if name == eos:
                eos_note = "the EOS token"
            reason = f"usual document separator; {eos_note}"
            return SeparatorToken(tokenizer.controls[name].id, name, reason)
    if tokenizer.eos_id is None:
        raise InputError(
            "the tokenizer has no token that ends a document",
            where="tokenizer",
            fix="set eos_token in its tokenizer_config.json",
        )
    reason = f"the EOS token; it has none of {', '.join(SEPARATOR_TOKENS)}"
    return SeparatorToken(tokenizer.eos_id, eos, reason)
