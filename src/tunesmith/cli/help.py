"""What --help shows besides the options: headings, examples and recipe keys."""

from __future__ import annotations

from typing import Any

import typer
from typer.core import TyperCommand, TyperGroup

# What a first run sets; each is a flag of every verb that takes a recipe.
COMMON_KEYS = (
    "  --model NAME --data FILE --eval-data FILE --test-data FILE",
    "  --method lora --learning-rate X --num-train-epochs N",
    "  --batch-size N --max-length N --lora-r N --output-dir RUN",
)

# Verbs and groups of verbs under the headings of --help, in this order.
PANELS = {
    "Start": ("demo", "init", "doctor", "advise", "schema"),
    "Data": ("data",),
    "Train": ("plan", "tune", "train", "resume", "runs"),
    "Measure": ("eval", "compare", "report", "chat"),
    "Ship": ("export", "serve", "keys", "verify"),
}

# verb -> what follows it
EXAMPLES: dict[str, tuple[str, ...]] = {
    "demo": ("", "--output-dir runs/first"),
    "init": ("--model Qwen/Qwen3-0.6B --data train.jsonl", "--from axolotl.yml"),
    "doctor": ("", "--json"),
    "advise": ("--need format --examples 800", "recipe.yaml --measure --minutes 20"),
    "data check": (
        "recipe.yaml",
        "--model MODEL --data rows.jsonl",
        "recipe.yaml --rejected bad.jsonl",
    ),
    "data show": ("recipe.yaml", "recipe.yaml --rows 1 --ids"),
    "data curate": ("recipe.yaml --keep 1000 --out curated",),
    "data lock": ("recipe.yaml",),
    "data export-reviews": ("recipe.yaml --out reviews.csv",),
    "data import-reviews": ("reviews.csv --out golden.jsonl",),
    "data split": ("recipe.yaml --out parts", "recipe.yaml --out parts --group customer"),
    "plan": (
        "recipe.yaml",
        "recipe.yaml --why learning_rate",
        "recipe.yaml --target h100 --compare",
    ),
    "tune lr": ("recipe.yaml", "recipe.yaml --steps 80"),
    "tune sweep": (
        "recipe.yaml",
        "recipe.yaml --minutes 120",
        "recipe.yaml --gpus 4",
        "recipe.yaml --sweep '{lora_r: [8, 64], seeds: 2}'",
    ),
    "train": (
        "recipe.yaml",
        "recipe.yaml --learning-rate 2e-4 --seed 1",
        "--model MODEL --data train.jsonl --eval-split 0.1",
    ),
    "resume": ("runs/run-1", "runs/run-1 --checkpoint 200"),
    "runs": ("", "--watch", "--json | jq .runs"),
    "eval": (
        "runs/run-1 --gate",
        "runs/run-1@0.5",
        "runs/run-1 --data new.jsonl --metrics exact_match",
    ),
    "compare": ("base runs/run-1", "runs/run-1 runs/run-2"),
    "report": ("runs/run-1", "runs/run-1 --track wandb"),
    "chat": ("runs/run-1",),
    "export": (
        "runs/run-1 --to merged",
        "runs/run-1 --to gguf --type q8_0",
        "runs/run-1 runs/run-2 --to vllm --out served",
    ),
    "verify": (
        "runs/run-1 --url http://localhost:8000/v1",
        "runs/run-1 --url https://HOST/v1 --model NAME --key-env KEY",
    ),
    "serve": (
        "runs/run-1",
        "runs/run-1@0.5 runs/run-2 --port 9000",
        "serve.yaml",
    ),
    "keys add": ("ci", "ops --scope metrics,admin"),
    "keys list": ("",),
    "keys remove": ("ci",),
    "schema": ("> recipe.schema.json",),
}


def option(metavar: str, help: str, *names: str, **settings: Any) -> Any:
    """Declare a flag with a value."""
    return typer.Option(*names, metavar=metavar, help=help, **settings)


def switch(name: str, help: str) -> Any:
    """Declare a flag without a value."""
    return typer.Option(name, help=help)


def find_panel(name: str) -> str | None:
    """Return the heading of a verb or group."""
    return next((panel for panel, names in PANELS.items() if name in names), None)


def format_examples(verb: str, *, has_recipe: bool) -> str:
    """Return the end of a verb's help, in rich markup: recipe keys that it takes, and examples."""
    lines = [
        "[bold]Examples[/]",
        *(f"  tunesmith {verb} {rest}".rstrip() for rest in EXAMPLES.get(verb, ())),
    ]
    keys = ["[bold]Recipe keys[/] (all: tunesmith schema)", *COMMON_KEYS]
    return "\n".join([*keys, "", *lines] if has_recipe else lines)


class VerbCommand(TyperCommand):
    """A verb whose --help names no type for switches: `<bool>` is not what one writes."""

    def get_params(self, ctx: Any) -> list[Any]:
        return hide_switch_types(super().get_params(ctx))


class VerbGroup(TyperGroup):
    """A group of verbs, with the same --help; the first level is in the order of PANELS."""

    def list_commands(self, ctx: Any) -> list[str]:
        names = super().list_commands(ctx)
        ordered = [name for panel in PANELS.values() for name in panel if name in names]
        return ordered or names

    def get_params(self, ctx: Any) -> list[Any]:
        return hide_switch_types(super().get_params(ctx))


def hide_switch_types(params: list[Any]) -> list[Any]:
    """Return the parameters of a command; switches show nothing where others show a type."""
    for param in params:
        if getattr(param, "is_flag", False):
            param.metavar = ""
    return params
