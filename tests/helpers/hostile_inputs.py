"""Hostile inputs by name, and what each costs in a process of its own.

    python hostile_inputs.py FOLDER NAME ...    one JSON line for each: outcome, seconds, megabytes

A case gets an empty folder, writes its files there, and returns the call that reads them. The call
runs in a forked child: seconds and peak memory are its own, without Python and libraries. The cases
are examples of their class; a new one is a line in CASES."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import struct
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import hostile_rows
import hostile_text_parts
import hostile_volumes
from hostile_recipe_values import RECIPE_VALUES
from hostile_rows import NOW, Call
from tiny_runs import save_model_folder
from toy_chat import CHATML, make_byte_bpe, write_model_folder
from tunesmith import api
from tunesmith.core.errors import TunesmithError
from tunesmith.core.types import Json
from tunesmith.data.chat_template.renderer import Renderer
from tunesmith.model.hub.validate import check_folder
from tunesmith.recipe.load import load_recipe

MAX_SECONDS = int(os.environ.get("HOSTILE_SECONDS", "600"))
# ---------------------------------------------------------------- templates


def read_config_template(value: Any, folder: Path) -> Call:
    """Load a model folder whose chat_template has another shape."""
    model = write_model_folder(folder / "m", None)
    file = model / "tokenizer_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"chat_template": value}))
    return partial(Renderer.from_folder, model, now=NOW)


SHAPES: list[Any] = [
    3, 1.5, True, {}, {"default": CHATML}, {"template": CHATML}, ["x"], [3], [[]], [None],
    [{"template": CHATML}], [{"name": "default"}], [{"name": [], "template": CHATML}],
    [{"name": "default", "template": 3}], [{"name": "default", "template": [CHATML]}],
    [{"name": {}, "template": {}}], [[{"name": "default", "template": CHATML}]],
]  # fmt: skip
CHAT_TEMPLATES = {
    f"chat_template: {json.dumps(shape)[:60]}": partial(read_config_template, shape)
    for shape in SHAPES
}


# ---------------------------------------------------------------- tokenizers


def load_tokenizer(changes: Callable[[Json], Json], text: str, folder: Path) -> Call:
    """Load a tokenizer.json with changed parts and encode a text."""
    model = write_model_folder(folder / "m", CHATML)
    file = model / "tokenizer.json"
    data = json.loads(file.read_text())
    file.write_text(json.dumps(data | changes(data)))

    def load() -> None:
        renderer = Renderer.from_folder(model, now=NOW)
        renderer.encode_text(text)

    return load


def change_tokenizer(text: str = "some text", **parts: Any) -> Callable[[Path], Call]:
    return partial(load_tokenizer, lambda _: parts, text)


def split_by(regex: str, text: str) -> Callable[[Path], Call]:
    split = {"type": "Split", "pattern": {"Regex": regex}, "behavior": "Isolated", "invert": False}
    steps = [
        split,
        {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False, "trim_offsets": True},
    ]
    return change_tokenizer(text, pre_tokenizer={"type": "Sequence", "pretokenizers": steps})


def replace_by(regex: str, text: str) -> Callable[[Path], Call]:
    step = {"type": "Replace", "pattern": {"Regex": regex}, "content": "a"}
    return change_tokenizer(text, normalizer=step)


def add_tokens(texts: Callable[[], list[str]]) -> Callable[[Path], Call]:
    def add(data: Json) -> Json:
        tokens: list[Json] = [
            {**FLAGS, "id": 500 + i, "content": text, "special": True}
            for i, text in enumerate(texts())
        ]
        return {"added_tokens": data["added_tokens"] + tokens}

    return partial(load_tokenizer, add, "some text")


def make_random_texts(count: int, size: int) -> list[str]:
    draw = random.Random(0)
    return ["".join(draw.choices("abcdefghijklmnopqrstuvwxyz", k=size)) for _ in range(count)]


def add_leading(count: int) -> Callable[[Path], Call]:
    special = {"SpecialToken": {"id": "<|im_start|>", "type_id": 0}}
    sequence = {"Sequence": {"id": "A", "type_id": 0}}

    def change(data: Json) -> Json:
        token_id = next(
            token["id"] for token in data["added_tokens"] if token["content"] == "<|im_start|>"
        )
        tokens = {"id": "<|im_start|>", "ids": [token_id], "tokens": ["<|im_start|>"]}
        return {"post_processor": {
            "type": "TemplateProcessing", "single": [special] * count + [sequence],
            "pair": [sequence, sequence], "special_tokens": {"<|im_start|>": tokens},
        }}  # fmt: skip

    return partial(load_tokenizer, change, "some text")


def add_long_leading(count: int) -> Callable[[Path], Call]:
    """One special token of a post-processor that stands for many ids."""
    special = {"SpecialToken": {"id": "B", "type_id": 0}}
    sequence = {"Sequence": {"id": "A", "type_id": 0}}
    tokens = {"id": "B", "ids": [1] * count, "tokens": ["b"] * count}
    return change_tokenizer(post_processor={
        "type": "TemplateProcessing", "single": [special, sequence], "pair": [sequence, sequence],
        "special_tokens": {"B": tokens},
    })  # fmt: skip


def make_unigram(length: int) -> Json:
    vocab = [["<unk>", 0.0], *(["a" * i, -1.0] for i in range(1, length))]
    return {"type": "Unigram", "unk_id": 0, "vocab": vocab, "byte_fallback": False}


def make_wordpiece(length: int) -> Json:
    vocab = {"[UNK]": 0, "##b": 1, **{"a" * i: i + 1 for i in range(1, length)}}
    return {
        "type": "WordPiece", "unk_token": "[UNK]", "continuing_subword_prefix": "##",
        "max_input_chars_per_word": length, "vocab": vocab,
    }  # fmt: skip


BYTE_LEVEL = {
    "type": "ByteLevel", "add_prefix_space": False, "use_regex": False, "trim_offsets": True,
}  # fmt: skip
FLAGS = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
CUBIC = r"[\s\S]+?[\s\S]+?(?<![\s\S])"
TOKENIZERS: dict[str, Callable[[Path], Call]] = {
    "a cubic pattern": split_by(CUBIC, "x" * 2000),
    "nested repeats": split_by(r"(x+x+)+y", "x" * 50),
    "20 times ByteLevel": change_tokenizer(
        pre_tokenizer={"type": "Sequence", "pretokenizers": [BYTE_LEVEL] * 20}
    ),
    "a back-reference": split_by(r"(x*)*\1y", "x" * 3000),
    "a quadratic pattern": split_by(r"x+y", "x" * 200_000),
    "a huge repetition": split_by("(?:(?:(?:x{1,1000}){1,1000}){1,1000}){1,1000}", "x" * 5000),
    "a long alternation": split_by("|".join(make_random_texts(20_000, 20)), "x" * 5000),
    "deep groups": split_by("(" * 20_000 + "x" + ")" * 20_000, "xxx"),
    "a subroutine call": split_by(r"(?<a>x\g<a>?\g<a>?)y", "x" * 60),
    "a cubic normalizer": replace_by(CUBIC, "x" * 2000),
    "nested repeats in a normalizer": replace_by(r"(x+x+)+y", "x" * 50),
    "random added tokens, 2000 of 1000": add_tokens(lambda: make_random_texts(2000, 1000)),
    "random added tokens, 5000 of 1000": add_tokens(lambda: make_random_texts(5000, 1000)),
    "random added tokens, 50000 of 18": add_tokens(lambda: make_random_texts(50_000, 18)),
    "nested added tokens": add_tokens(lambda: ["<" + "a" * i for i in range(1, 1000)]),
    "200000 leading tokens": add_leading(200_000),
    "20 leading tokens": add_leading(20),
    "a leading token of 200000 ids": add_long_leading(200_000),
    "a token id of two billion": change_tokenizer(
        added_tokens=[{**FLAGS, "id": 2_000_000_000, "content": "<|im_start|>", "special": True}]
    ),
    "nested unigram tokens": change_tokenizer("a" * 200_000, model=make_unigram(5000)),
    "nested unigram tokens, short": change_tokenizer("a" * 200_000, model=make_unigram(60)),
    "long words of wordpiece": change_tokenizer(
        ("a" * 999 + " ") * 200, model=make_wordpiece(1000), pre_tokenizer={"type": "Whitespace"}
    ),
    "words of wordpiece": change_tokenizer(
        ("a" * 199 + " ") * 1000, model=make_wordpiece(200), pre_tokenizer={"type": "Whitespace"}
    ),
    "a long word of bpe": change_tokenizer("ab" * 130_000),
    "100000 letters that normalization makes 18 long": change_tokenizer(
        "\ufdfa" * 100_000, normalizer={"type": "NFKD"}
    ),
    "ideographs that normalization puts apart": change_tokenizer(
        "日本" * 100_000, normalizer={
            "type": "BertNormalizer", "clean_text": True, "handle_chinese_chars": True,
            "strip_accents": None, "lowercase": True,
        }
    ),
    "such letters between words": change_tokenizer(
        "a \ufdfa b " * 30_000, normalizer={"type": "NFKC"}
    ),
    "letters of four tokens": change_tokenizer("🤗" * 250_000),
    "the same split 50 times": change_tokenizer(
        "x" * 200_000,
        pre_tokenizer={"type": "Sequence", "pretokenizers": [
            {"type": "Split", "pattern": {"String": "x"}, "behavior": "Isolated", "invert": False}
        ] * 50},
    ),
    "deep normalizers": change_tokenizer(
        normalizer=json.loads('{"type": "Sequence", "normalizers": [' * 300 + "]}" * 300)
    ),
}  # fmt: skip


# ---------------------------------------------------------------- model folders


def read_model(config: str, folder: Path) -> Call:
    """Check a folder with the text of a config.json."""
    model = folder / "m"
    model.mkdir()
    (model / "config.json").write_text(config)
    return partial(check_folder, model, needs_weights=False)


def read_weights(header: Callable[[], bytes], folder: Path) -> Call:
    """Check a folder with a safetensors header."""
    model = folder / "m"
    model.mkdir()
    (model / "config.json").write_text("{}")
    content = header()
    (model / "model.safetensors").write_bytes(struct.pack("<Q", len(content)) + content)
    return partial(check_folder, model)


def make_tensor(shape: str = "[0]") -> str:
    return f'{{"dtype":"F32","shape":{shape},"data_offsets":[0,0]}}'


def make_header(names: list[str]) -> bytes:
    return ("{" + ",".join(f'"{name}":{make_tensor()}' for name in names) + "}").encode()


def make_shape_header(shape: str) -> bytes:
    return f'{{"a":{make_tensor(shape)}}}'.encode()


def make_index(content: Callable[[], str]) -> Callable[[Path], Call]:
    def write(folder: Path) -> Call:
        model = folder / "m"
        model.mkdir()
        (model / "config.json").write_text("{}")
        (model / "model.safetensors.index.json").write_text(content())
        return partial(check_folder, model)

    return write


LONG_KEY = "k" * 20_000
MODELS: dict[str, Callable[[Path], Call]] = {
    "a long key with a long list": partial(
        read_model, json.dumps({LONG_KEY: [0] * 20_000})
    ),
    "a long key with many keys": partial(
        read_model, json.dumps({LONG_KEY: {str(i): 0 for i in range(20_000)}})
    ),
    "long nested keys": partial(
        read_model, '{"' + '":{"'.join(["k" * 2000] * 900) + '":0' + "}" * 900
    ),
    **hostile_text_parts.CASES,
    "a deep config": partial(read_model, '{"a":' * 100_000 + "0" + "}" * 100_000),
    "a deep list": partial(read_model, '{"a":' + "[" * 900 + "0" + "]" * 900 + "}"),
    "a config of a million zeros": partial(read_model, json.dumps({"a": [0] * 1_000_000})),
    "a number of 10000 digits": partial(read_model, '{"a": ' + "9" * 10_000 + "}"),
    "a late repeated tensor": partial(
        read_weights, lambda: make_header([*map(str, range(200_000)), "7"])
    ),
    "many tensors": partial(read_weights, lambda: make_header([*map(str, range(60_000))])),
    "a shape of huge numbers": partial(
        read_weights, lambda: make_shape_header("[" + ",".join(["9" * 4000] * 1000) + "]")
    ),
    "a shape of many numbers": partial(
        read_weights, lambda: make_shape_header("[" + ",".join(["9"] * 2_000_000) + "]")
    ),
    "a shape with a zero": partial(
        read_weights,
        lambda: make_shape_header("[0," + ",".join(["9" * 18] * 200_000) + "]"),
    ),
    "a long tensor name": partial(read_weights, lambda: make_header(["n" * 5_000_000])),
    "long metadata": partial(
        read_weights, lambda: b'{"__metadata__":{"a":"' + b"x" * 15_000_000 + b'"}}'
    ),
    "a deep header": partial(read_weights, lambda: b'{"a":' * 100_000),
    "an index with a long name": make_index(
        lambda: json.dumps({"weight_map": {"a": "n" * 300 + ".safetensors"}})
    ),
    "an index of many files": make_index(
        lambda: json.dumps({"weight_map": {str(i): f"{i}.safetensors" for i in range(200_000)}})
    ),
    "an index with a NUL": make_index(
        lambda: json.dumps({"weight_map": {"a": "n\0.safetensors"}})
    ),
}  # fmt: skip


# ---------------------------------------------------------------- recipes


def read_recipe_file(text: str, folder: Path) -> Call:
    (folder / "recipe.yaml").write_text(text)
    return partial(load_recipe, folder / "recipe.yaml")


def import_config(text: str, folder: Path) -> Call:
    (folder / "axolotl.yaml").write_text("base_model: a\ndatasets:\n- path: a.jsonl\n" + text)
    return partial(api.init, folder / "recipe.yaml", from_config=folder / "axolotl.yaml")


BASE = "model: m\ndata: d.jsonl\n"
RECIPES: dict[str, Callable[[Path], Call]] = {
    name: partial(read_recipe_file, BASE + text) for name, text in RECIPE_VALUES.items()
}
CONFIGS: dict[str, Callable[[Path], Call]] = {
    "a config's hex number of 6000 digits": partial(import_config, "seed: 0x" + "f" * 6_000),
    "a config's base 60": partial(import_config, "seed: 1" + ":59" * 80_000),
    "a config's rate of 6000 hex digits": partial(
        import_config, "learning_rate: 0x" + "f" * 6_000
    ),
    "a config's unknown key of 6000 hex digits": partial(
        import_config, "rubbish: 0x" + "f" * 6_000
    ),
    "a config's rank of 6000 hex digits": partial(
        import_config, "adapter: lora\nlora_r: 0x" + "f" * 6_000
    ),
}  # fmt: skip

CASES: dict[str, Callable[[Path], Call]] = {
    **CHAT_TEMPLATES, **TOKENIZERS, **MODELS, **RECIPES, **CONFIGS,
    **hostile_rows.CASES, **hostile_volumes.CASES,
}  # fmt: skip


# ---------------------------------------------------------------- measuring


def measure_case(name: str, folder: Path) -> Json:
    """Run a case in a forked child: what it ends in, seconds and megabytes."""
    folder.mkdir()
    call = CASES[name](folder)
    reader, writer = os.pipe()
    child = os.fork()
    if not child:
        os.close(reader)
        signal.alarm(MAX_SECONDS)
        os.write(writer, json.dumps(run_call(call)).encode())
        os._exit(0)
    os.close(writer)
    with os.fdopen(reader, "rb") as stream:
        content = stream.read()
    _, status = os.waitpid(child, 0)
    shutil.rmtree(folder)
    result = json.loads(content) if content else {"outcome": f"status {status}"}
    return {"name": name, **result}


def run_call(call: Call) -> Json:
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    before = read_peak()
    start = read_cpu_seconds()
    try:
        call()
        outcome = "ok"
    except TunesmithError as error:
        outcome = f"{error.exit_code}: {error}"
    except BaseException as error:  # noqa: BLE001 - a bug, whose kind the test names
        outcome = f"{type(error).__name__}: {error}"
    seconds = read_cpu_seconds() - start
    return {"outcome": outcome[:2000], "chars": len(outcome), "seconds": round(seconds, 2),
            "megabytes": round((read_peak() - before) / 1e6)}  # fmt: skip


def read_cpu_seconds() -> float:
    """Return the processor time of this process and of those that it waited for."""
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system


def read_peak() -> int:
    """Return the peak resident memory of this process, in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM"):
            return int(line.split()[1]) * 1024
    raise AssertionError("no VmHWM")


def main(folder: Path, names: list[str]) -> None:
    tiny = save_model_folder(folder / "tiny")
    os.environ["HOSTILE_TINY"] = str(tiny)
    make_byte_bpe()
    warm_folder = folder / "warm"  # so that no case pays for imports
    warm_folder.mkdir()
    hostile_rows.check_rows(lambda: [hostile_rows.make_row("a")], warm_folder)()
    for name in names or CASES:
        sys.stdout.write(json.dumps(measure_case(name, folder / "case")) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
