"""What --help and shell completion show besides the options: examples, recipe keys, runs.

In: the name of a verb, or a word that the user has begun. Out: text, or words that complete it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import typer
from typer.core import TyperCommand, TyperGroup

from tunesmith.core.run_dir import RUNS_ROOT, is_run, list_folders

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

EXAMPLES: dict[str, tuple[str, ...]] = {
    "demo": ("tunesmith demo", "tunesmith demo --output-dir runs/first"),
    "init": (
        "tunesmith init --model Qwen/Qwen3-0.6B --data train.jsonl",
        "tunesmith init --from axolotl.yml",
    ),
    "doctor": ("tunesmith doctor", "tunesmith doctor --model Qwen/Qwen3-8B"),
    "advise": (
        "tunesmith advise --need format --examples 800",
        "tunesmith advise recipe.yaml --measure --minutes 20",
    ),
    "data check": (
        "tunesmith data check recipe.yaml",
        "tunesmith data check --model MODEL --data rows.jsonl",
        "tunesmith data check recipe.yaml --rejected bad.jsonl",
    ),
    "data show": (
        "tunesmith data show recipe.yaml",
        "tunesmith data show recipe.yaml --rows 1 --ids",
    ),
    "data curate": (
        "tunesmith data curate recipe.yaml --keep 1000 --out curated",
        "tunesmith data curate recipe.yaml --keep 1000 --out curated --ablate",
    ),
    "data lock": ("tunesmith data lock recipe.yaml",),
    "data export-reviews": ("tunesmith data export-reviews recipe.yaml --out reviews.csv",),
    "data import-reviews": ("tunesmith data import-reviews reviews.csv --out golden.jsonl",),
    "data split": (
        "tunesmith data split recipe.yaml --out parts",
        "tunesmith data split recipe.yaml --out parts --group customer",
    ),
    "plan": (
        "tunesmith plan recipe.yaml",
        "tunesmith plan recipe.yaml --why learning_rate",
        "tunesmith plan recipe.yaml --target h100 --compare",
    ),
    "tune lr": ("tunesmith tune lr recipe.yaml", "tunesmith tune lr recipe.yaml --steps 80"),
    "tune sweep": (
        "tunesmith tune sweep recipe.yaml",
        "tunesmith tune sweep recipe.yaml --minutes 120",
        "tunesmith tune sweep recipe.yaml --gpus 4",
        "tunesmith tune sweep recipe.yaml --sweep '{lora_r: [8, 64], seeds: 2}'",
    ),
    "train": (
        "tunesmith train recipe.yaml",
        "tunesmith train recipe.yaml --learning-rate 2e-4 --seed 1",
        "tunesmith train --model MODEL --data train.jsonl --eval-split 0.1",
    ),
    "resume": ("tunesmith resume runs/run-1", "tunesmith resume runs/run-1 --checkpoint 200"),
    "runs": ("tunesmith runs", "tunesmith runs --watch", "tunesmith runs --json | jq .runs"),
    "eval": (
        "tunesmith eval runs/run-1 --gate",
        "tunesmith eval runs/run-1@0.5",
        "tunesmith eval runs/run-1 --data new.jsonl --metrics exact_match",
    ),
    "compare": ("tunesmith compare base runs/run-1", "tunesmith compare runs/run-1 runs/run-2"),
    "report": ("tunesmith report runs/run-1", "tunesmith report runs/run-1 --track wandb"),
    "chat": ("tunesmith chat runs/run-1",),
    "export": (
        "tunesmith export runs/run-1 --to merged",
        "tunesmith export runs/run-1 --to gguf --type q8_0",
        "tunesmith export runs/run-1 --to hub --repo me/my-adapter",
        "tunesmith export runs/run-1 runs/run-2 --to vllm --out served",
    ),
    "verify": (
        "tunesmith verify runs/run-1 --url http://localhost:8000/v1",
        "tunesmith verify runs/run-1 --url https://HOST/v1 --model NAME --key-env KEY",
    ),
    "serve": (
        "tunesmith serve runs/run-1",
        "tunesmith serve runs/run-1@0.5 runs/run-2 --port 9000",
        "tunesmith serve serve.yaml",
    ),
    "keys add": ("tunesmith keys add ci", "tunesmith keys add ops --scope metrics,admin"),
    "keys list": ("tunesmith keys list",),
    "keys remove": ("tunesmith keys remove ci",),
    "schema": ("tunesmith schema > recipe.schema.json",),
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
    lines = ["[bold]Examples[/]", *(f"  {line}" for line in EXAMPLES.get(verb, ()))]
    keys = ["[bold]Recipe keys[/] (all: tunesmith schema)", *COMMON_KEYS]
    return "\n".join([*keys, "", *lines] if has_recipe else lines)


@dataclass(frozen=True)
class CompletedWord:
    """A word that completes a line; the fields that typer's shells read."""

    value: str
    help: str | None = None
    type: str = "plain"


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


class RecipeCommand(VerbCommand):
    """A verb that takes any recipe key as a flag, which the shell completes too."""

    def shell_complete(self, ctx: Any, incomplete: str) -> list[Any]:
        return [*super().shell_complete(ctx, incomplete), *complete_keys(incomplete)]


def complete_keys(incomplete: str) -> Iterator[CompletedWord]:
    """Yield the recipe keys that a word which starts with -- may become."""
    from tunesmith.recipe.schema import Recipe

    if not incomplete.startswith("--"):
        return
    prefix = incomplete[2:].replace("-", "_")
    for name, field in Recipe.model_fields.items():
        if name.startswith(prefix):
            yield CompletedWord(f"--{name}", field.description)


def complete_runs(incomplete: str) -> list[str]:
    """Return the run folders in runs/, and below the path that was begun."""
    folders = [RUNS_ROOT, Path(incomplete), Path(incomplete).parent]
    runs: dict[str, None] = {}  # ordered, without duplicates
    for folder in folders:
        runs.update({str(entry): None for entry in sorted(list_folders(folder)) if is_run(entry)})
    return [run for run in runs if run.startswith(incomplete)]
