"""Model folders with toy tokenizers (pipelines of the tokenizers library), and chat rows."""

import json
import re
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

from tokenizers import (
    AddedToken,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from tokenizers.pre_tokenizers import ByteLevel

from tunesmith.core.types import Document, Example, Json
from tunesmith.data.chat_template.renderer import Renderer

SENTENCES = [
    "the user asks the assistant\nand the assistant answers the user\n\nsystem: you are a "
    "helpful assistant",
    "assistant\nuser\nsystem\n hello there 12 345 <think> </think> <tool_call> Größe ä ö ü",
]
TAG = re.compile(r"</?[a-z_]+>")
CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
CHATML_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<think>", "</think>")


@cache
def make_byte_bpe() -> str:
    """Return a byte-level BPE of 400 tokens as JSON."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400, initial_alphabet=ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator(SENTENCES * 3, trainer)
    return tokenizer.to_str()


@cache
def make_sentence_bpe(kind: str) -> str:
    """Return a BPE over characters and ▁, like those of Llama 2 and Gemma, as JSON.

    kind: what adds the first ▁ (`prepend`: a normalizer; `first`, `always`: Metaspace; else none)
    """
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    steps: list[Any] = [normalizers.Replace(" ", "▁")]
    if kind == "prepend":
        steps.insert(0, normalizers.Prepend("▁"))
    if kind in ("first", "always"):
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=kind, split=False)
    else:
        tokenizer.normalizer = normalizers.Sequence(steps)
    special = ["<unk>", *(f"<0x{i:02X}>" for i in range(256))]
    tokenizer.train_from_iterator(
        SENTENCES * 3,
        trainers.BpeTrainer(vocab_size=500, special_tokens=special, show_progress=False),
    )
    data = json.loads(tokenizer.to_str())
    data["added_tokens"] = [token for token in data["added_tokens"] if token["content"] == "<unk>"]
    data["decoder"] = {"type": "Sequence", "decoders": [
        {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
        {"type": "ByteFallback"}, {"type": "Fuse"},
    ]}  # fmt: skip
    return json.dumps(data)


def make_newline_bpe() -> str:
    """Return a BPE that merges two newlines, as most do."""
    data = json.loads(make_sentence_bpe("none"))
    data["model"]["vocab"] |= {"\n\n": 500}
    data["model"]["merges"].insert(0, ["\n", "\n"])
    return json.dumps(data)


def write_model_folder(
    path: Path,
    template: str | None = CHATML,
    tokens: Sequence[str | AddedToken] = CHATML_TOKENS,
    *,
    base: str | None = None,
    bos: str | None = None,
    **config: Any,
) -> Path:
    """Write a tokenizer and a chat template, and return the folder.

    tokens: added tokens, special except for tags like <think>
    bos: the token that precedes plain text
    """
    path.mkdir(parents=True, exist_ok=True)
    tokenizer = Tokenizer.from_str(base or make_byte_bpe())
    tokenizer.add_tokens(
        [
            token
            if isinstance(token, AddedToken)
            else AddedToken(token, special=not TAG.fullmatch(token), normalized=False)
            for token in tokens
        ]
    )
    if bos:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A",
            pair=f"{bos} $A $B",
            special_tokens=[(bos, tokenizer.token_to_id(bos))],
        )
        config["bos_token"] = bos
    tokenizer.save(str(path / "tokenizer.json"))
    (path / "tokenizer_config.json").write_text(
        json.dumps({"eos_token": "<|endoftext|>", **config})
    )
    if template is not None:
        (path / "chat_template.jinja").write_text(template)
    return path


def user(content: str) -> Json:
    return {"role": "user", "content": content}


def assistant(content: str, **more: Any) -> Json:
    return {"role": "assistant", "content": content, **more}


def make_tool_call(**arguments: Any) -> Json:
    return {
        "id": "call_1",
        "type": "function",
        "function": {"name": "look", "arguments": arguments},
    }


def make_example(
    *messages: Json, weights: tuple[float, ...] | None = None, tools: tuple[Json, ...] = ()
) -> Example:
    trained = tuple(float(message["role"] == "assistant") for message in messages)
    return Example("rows:7", messages=messages, turn_weights=weights or trained, tools=tools)


def mark_trained_text(renderer: Renderer, document: Document) -> str:
    """Return the text with supervised tokens between ⟦ and ⟧."""
    text = ""
    inside = False
    for token, weight in zip(document.tokens_L.tolist(), document.weights_L.tolist(), strict=True):
        if (weight > 0) != inside:
            inside = weight > 0
            text += "⟦" if inside else "⟧"
        text += renderer.decode([token])
    return text + ("⟧" if inside else "")


def render_marked(renderer: Renderer, *messages: Json, **more: Any) -> list[str]:
    return [
        mark_trained_text(renderer, document)
        for document in renderer.render(make_example(*messages, **more)).documents
    ]
