"""Every key reads the same value from YAML, as a text and as a flag, and refuses any other value
with a message."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from tiny_runs import make_tiny_recipe
from tunesmith.cli.app import main
from tunesmith.core.errors import InputError
from tunesmith.evaluate.regression_gate import parse_metrics
from tunesmith.recipe.load import load_recipe, read_recipe
from tunesmith.recipe.schema import ALIASES, KEYS, Recipe

pytestmark = pytest.mark.promise


PREFERENCE = {"stage": "preference"}
# key -> spellings of one value, and the keys that it needs
SPELLINGS: dict[str, tuple[list[Any], dict[str, Any]]] = {
    "model": (["tiny"], {}),
    "method": (["qlora"], {}),
    "adapter_from": (["run"], {}),
    "stage": (["cpt", "pt"], {}),
    "data": (["a.jsonl", ["a.jsonl"], {"path": "a.jsonl"}, [{"path": "a.jsonl"}]], {}),
    "eval_data": (["b.jsonl", ["b.jsonl"], {"path": "b.jsonl", "weight": "1"}], {}),
    "eval_split": ([0.1, "0.1", "1e-1"], {}),
    "test_data": (["b.jsonl", [{"path": "b.jsonl"}]], {}),
    "retention_data": (["none", [], None], {}),
    "rehearsal": (
        [{"data": "b.jsonl", "ratio": 0.1}, {"data": ["b.jsonl"], "ratio": "0.1"}],
        {"retention_data": "c.txt"},
    ),
    "mixture": ([{"temperature": 2, "limit": 5}, {"temperature": "2", "limit": "5"}], {}),
    "never": (["apology", ["apology"], [{"check": "apology"}], {"check": "apology"}], {}),
    "max_examples": ([5, "5", 5.0], {}),
    "skip_invalid": ([True, "true"], {}),
    "chat_template": (["none"], {}),
    "chat_template_kwargs": ([{"enable_thinking": False}], {}),
    "add_tokens": (["<a>,<b>", ["<a>", "<b>"], "<a>, <b>"], {}),
    "response_schema": (["s.json"], {}),
    "group": (["author"], {}),
    "train_on": (["user", ["user"], "human", ["human"]], {}),
    "max_length": ([64, "64"], {"pack_length": "128"}),
    "on_overlong": (["truncate"], {}),
    "pack_length": ([128, "128"], {"max_length": "64"}),
    "share_prefixes": ([True, "true"], {"lora_dropout": "0", "neftune_noise_alpha": "0"}),
    "batch_size": ([4, "4"], {}),
    "batch_tokens": ([64, "64"], {"stage": "pt"}),
    "num_train_epochs": ([2, "2", "2.0"], {}),
    "max_steps": ([7, "7"], {}),
    "learning_rate": ([1e-4, "1e-4", "0.0001"], {}),
    "lr_scheduler_type": (["constant"], {"warmup_ratio": "0"}),
    "lr_scheduler_kwargs": (
        [
            {"num_decay_steps": 2, "min_lr_ratio": 0.1},
            {"num_decay_steps": "2", "min_lr_ratio": ".1"},
        ],
        {"lr_scheduler_type": "warmup_stable_decay"},
    ),
    "warmup_ratio": ([0, "0", "0.0", 0.0], {"lr_scheduler_type": "constant"}),
    "optim": (["adamw_8bit", "paged_adamw_8bit", "adamw_bnb_8bit"], {}),
    "weight_decay": ([0.1, "0.1"], {}),
    "max_grad_norm": ([0, "0", "0.0"], {}),
    "loss": (
        ["dpo", "sigmoid", {"name": "dpo"}, {"name": "sigmoid"}],
        {**PREFERENCE, "label_smoothing": "0.1"},
    ),
    "label_smoothing": ([0.1, "0.1", "1e-1"], {**PREFERENCE, "loss": "sigmoid"}),
    "neftune_noise_alpha": ([5, "5", "5.0"], {}),
    "lora_r": ([8, "8"], {}),
    "lora_alpha": ([16, "16"], {}),
    "lora_dropout": ([0, "0", "0.0"], {"share_prefixes": "true"}),
    "lora_target_modules": (["all-linear"], {}),
    "use_rslora": ([True, "true"], {}),
    "use_dora": ([True, "true"], {}),
    "modules_to_save": (["lm_head", ["lm_head"]], {}),
    "dtype": (["fp32"], {}),
    "attention": (["sdpa", "documents"], {}),
    "gradient_checkpointing": ([True, "true", "recompute", "full"], {}),
    "deterministic": ([True, "true"], {}),
    "context_parallel_size": ([2, "2"], {}),
    "dp_shard_size": ([2, "2"], {}),
    "metrics": (["exact_match", ["exact_match"]], {}),
    "gates": ([{"exact_match": ">= 0.8"}], {}),
    "guard": (["off", False, {"collapse": "off", "forgetting": "false"}], {}),
    "save_steps": ([5, "5"], {}),
    "eval_steps": ([5, "5"], {}),
    "sweep": (
        [
            {"lora_r": [4, 8], "learning_rate": [0.001], "seeds": 2},
            {"lora_r": ["4", "8"], "learning_rate": ["1e-3"], "seeds": "2"},
        ],
        {"eval_data": "b.jsonl", "test_data": "c.jsonl"},
    ),
    "seed": ([3, "3"], {}),
    "output_dir": (["runs/x"], {}),
}
WRONG_VALUES = (
    *("high", "''", "-1", "'0'", "'0.5'", "[[a]]", "{a: [b]}", "{1: 2}", "[{mode: [a]}]"),
    *("{mode: {}}", "{path: 1, name: [b]}", "{data: {path: {}}, ratio: [adaptive]}", "[null]"),
    *("{name: [simpo], gamma: [1]}", "{name: sigmoid, gamma: x}", "{timescale: [1]}", "!!set {a}"),
)
CONTEXTS: tuple[dict[str, Any], ...] = (
    {},
    {"stage": "cpt"},
    {"stage": "preference", "loss": {"name": "simpo"}},
    {"stage": ["cpt", {"preference": {"label_smoothing": "0.1"}}]},
    {"method": "full", "share_prefixes": True, "lr_scheduler_type": "constant"},
)


def write_recipe(folder: Path, values: dict[str, Any]) -> Path:
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(values, sort_keys=False))
    return path


def format_flag(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def test_every_key_has_spellings() -> None:
    assert list(SPELLINGS) == list(KEYS)


@pytest.mark.parametrize("key", KEYS)
def test_a_value_is_the_same_in_yaml_and_as_a_flag(
    key: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    spellings, needed = SPELLINGS[key]
    common = {"model": "base", "data": "train.jsonl"} | needed
    common.pop(key, None)
    expected = load_recipe(None, arguments=(common | {key: spellings[0]},))
    assert isinstance(expected, Recipe)
    for value in spellings:
        from_yaml = load_recipe(write_recipe(tmp_path, common | {key: value}))
        assert from_yaml == expected, value
        flags = {name: format_flag(text) for name, text in common.items()}
        assert load_recipe(None, flags | {key: format_flag(value)}) == expected, value
        for alias in [alias for alias, target in ALIASES.items() if target == key]:
            assert load_recipe(None, flags | {alias: format_flag(value)}) == expected, alias


@pytest.mark.parametrize("key", KEYS)
def test_a_wrong_value_is_refused_with_its_problems(key: str, tmp_path: Path) -> None:
    for index, text in enumerate(WRONG_VALUES):
        common = {"model": "base", "data": "train.jsonl"} | CONTEXTS[index % len(CONTEXTS)]
        common.pop(key, None)
        flags: dict[str, str] = {}
        if index % 2:
            flags = {key: text}
            path = write_recipe(tmp_path, common)
        else:
            path = tmp_path / "recipe.yaml"
            path.write_text(f"{yaml.safe_dump(common)}{key}: {text}\n")
        message = ""
        try:
            load_recipe(path, flags)
        except InputError as error:
            message = str(error)
        assert ": 0 problems" not in message, (common, text)


PAIRS = [
    {"prompt": f"{n} and {n}", "chosen": f"{2 * n}", "rejected": f"no {n}"} for n in range(1, 7)
]
COMMANDS: list[tuple[list[str], str]] = [
    (["--stage", "preference", "--label-smoothing", "0.1"], ""),
    (["--stage", "preference", "--label-smoothing", "0.1", "--loss", "sigmoid"], ""),
    (["--lr-scheduler-type", "constant", "--warmup-ratio", "0"], ""),
    (["--share-prefixes", "true", "--lora-dropout", "0.0"], ""),
    (["--stage", "preference", "--label-smoothing", "high"], "label-smoothing: expected a number"),
    (["--stage", "preference", "--label-smoothing", "0.7"], "must be below 0.5"),
    (
        ["--stage", "preference", "--label-smoothing", "0.1", "--loss", "orpo"],
        "no effect with orpo",
    ),
    (["--lr-scheduler-type", "constant", "--warmup-ratio", "0.1"], "constant has no warm-up"),
    (["--max-length", "64", "--pack-length", "32"], "pack_length 32 is below max_length 64"),
    (["--batch-tokens", "64"], "no effect without stage: cpt"),
]


@pytest.mark.parametrize(("flags", "message"), COMMANDS)
def test_plan_reads_flags_as_it_reads_numbers(
    flags: list[str],
    message: str,
    tiny_folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    recipe = make_tiny_recipe(tiny_folder, tmp_path)
    data = str(recipe.data[0].path)
    if "preference" in flags:
        data = str(tmp_path / "pairs.jsonl")
        Path(data).write_text("\n".join(map(json.dumps, PAIRS)))
    with pytest.raises(SystemExit) as caught:
        main(["plan", "--model", str(tiny_folder), "--data", data, *flags])
    streams = capsys.readouterr()
    assert (caught.value.code or 0) == (2 if message else 0), streams.err
    assert message in " ".join(streams.err.split())


def test_the_former_spelling_of_a_metric_is_accepted() -> None:
    recipe = read_recipe(
        None,
        model="m",
        data="rows.jsonl",
        metrics=["normalised_match", "exact_match"],
        gates={"normalised_match": ">= 0.5", "test/normalised_match": ">= 0.6"},
    )
    assert isinstance(recipe, Recipe)
    assert recipe.metrics == ("normalized_match", "exact_match")
    assert recipe.gates == {"normalized_match": ">= 0.5", "test/normalized_match": ">= 0.6"}
    assert parse_metrics("normalised_match") == ("normalized_match",)
