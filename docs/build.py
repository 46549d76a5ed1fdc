"""Write the generated blocks of README.md and docs/: `make docs`.

A block stands between two comments and is replaced whole:

    <!-- $ tunesmith plan recipe.yaml | lines 1-12 -->     the output of a command
    <!-- table: DataSource -->                             a table made from the code
    ...
    <!-- end -->

In: the pages, the package, and a scratch folder with the demo's files and one run of the demo that
the commands share (5 to 10 minutes on two cores; `--scratch FOLDER` keeps it for the next time).
Out: the same pages with fresh blocks. `--tables` writes the tables alone, in a second; a test
compares them. Left out: measurements; docs/results/ has them with date, machine and command.
"""

from __future__ import annotations

import argparse
import inspect
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any, get_args, get_type_hints

from pydantic import BaseModel
from typer.models import ArgumentInfo

from tunesmith.cli.app import VERBS
from tunesmith.cli.output import PIPE_WIDTH
from tunesmith.core.types import Json
from tunesmith.model.hub.families import REFUSED_TYPES, TEXT_FAMILIES
from tunesmith.plan.hardware_presets import HARDWARE_PRESETS
from tunesmith.recipe import fields, objectives, schema, sweep
from tunesmith.recipe.explain import describe_schema

ROOT = Path(__file__).parents[1]
DEMO = Path(fields.__file__).parent / "demo"
BLOCK = re.compile(r"(<!-- (\$|table:) (.*?) -->\n)(.*?)(<!-- end -->)", re.DOTALL)
LINES = re.compile(r" \| lines ([\d, -]+)$")
WIDTH = PIPE_WIDTH
FAMILIES_PAGE = ROOT / "docs" / "results" / "families.md"
MEASURED_COLUMNS = 5  # of its table
LAYER_NAMES = {
    "attention": "attention",
    "delta": "gated delta rule",
    "mamba2": "Mamba2",
    "conv": "short convolution",
}
BAR = "\\|"  # a vertical bar inside a cell of a table
TYPE_NAMES = {str: "TEXT", int: "N", float: "NUMBER", Path: "PATH", bool: ""}
TIMEOUT_SECONDS = 1800
EXPECTED_CODES = {0, 2, 4}  # ok, and the refusals that pages show


def list_pages() -> list[Path]:
    return [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


# ---------------------------------------------------------------- tables from the code


def build_key_table() -> list[str]:
    """Every key of a recipe: what it takes, its default, its meaning, its aliases."""
    properties = schema.build_recipe_schema()["properties"]
    lines = [
        "| key | takes | if left out | meaning | aliases |",
        "|---|---|---|---|---|",
    ]
    for key in schema.KEYS:
        aliases = ", ".join(f"`{alias}`" for alias, of in schema.ALIASES.items() if of == key)
        lines.append(_build_row(key, properties[key], aliases))
    return lines


def build_mapping_table(model: type[BaseModel]) -> list[str]:
    """The keys of one nested mapping of a recipe."""
    properties = model.model_json_schema()["properties"]
    lines = ["| key | takes | if left out | meaning |", "|---|---|---|---|"]
    return lines + [_build_row(key, value) for key, value in properties.items()]


def _build_row(key: str, schema_of_key: Json, *more: str) -> str:
    required = "required" if key in ("model", "data", "path", "match", "prompt") else None
    default = _format_default(schema_of_key.get("default", required))
    takes = _describe_type(schema_of_key)
    cells = [f"`{key}`", takes, default, schema_of_key["description"].rstrip("."), *more]
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def _describe_type(schema_of_key: Json) -> str:
    if schema_of_key.get("type") == "object":
        return "a mapping"
    text = re.sub(r"'([a-z0-9_-]+)'", r"`\1`", describe_schema(schema_of_key))
    return text.removesuffix(" or null")


def _format_default(default: object) -> str:
    if default in (None, [], {}):
        return "-"
    return str(default).lower() if isinstance(default, bool) else str(default)


def build_verb_table() -> list[str]:
    """Every verb with the first sentence of its help."""
    lines = ["| verb | does |", "|---|---|"]
    for name, verb in VERBS.items():
        summary = (inspect.getdoc(verb) or "").split("\n\n")[0].replace("\n", " ")
        lines.append(f"| `tunesmith {name}` | {summary} |")
    return lines


def build_help_pages() -> list[str]:
    """The help of every verb: its usage, and a table of its arguments and options but --json, which
    the head of the page explains once."""
    lines: list[str] = []
    for name, verb in VERBS.items():
        lines += [f"## tunesmith {name}", "", *_build_help_page(name, verb), ""]
    return lines[:-1]


def _build_help_page(name: str, verb: Callable[..., None]) -> list[str]:
    usage = [f"tunesmith {name}"]
    rows: list[str] = []
    hints = get_type_hints(verb, include_extras=True)
    for key, parameter in inspect.signature(verb).parameters.items():
        if key == "as_json":
            continue
        hint, info = get_args(hints[key])
        is_required = parameter.default is parameter.empty
        default = "required" if is_required else _format_default(parameter.default)
        takes = f"`{info.metavar or _format_type(hint)}`"
        if isinstance(info, ArgumentInfo):
            word = info.metavar or key.upper()
            many = "..." if "list" in str(hint) else ""
            usage.append(word if is_required else f"[{word}]{many}")
            flag, takes = f"`{word}`", ""
        else:
            # in an annotation the first name is where an option elsewhere has its default
            name_first = isinstance(info.default, str) and info.default.startswith("--")
            flag = info.default if name_first else f"--{key.replace('_', '-')}"
            if is_required:
                usage.append(f"{flag} {takes.strip('`')}")
            if parameter.default is False:
                takes, default = "", "-"
            flag = f"`{flag}`"
        cells = [flag, takes, default, str(info.help).rstrip(".")]
        rows.append(f"| {' | '.join(cell.replace('|', BAR) for cell in cells)} |")
    head = ["| argument or option | takes | if left out | meaning |", "|---|---|---|---|"]
    summary = (inspect.getdoc(verb) or "").split("\n\n")[0].replace("\n", " ")
    text = f"`{' '.join([*usage, '[OPTIONS]'])}`: {summary[0].lower()}{summary[1:]}"
    return [text, "", *head, *rows] if rows else [text]


def build_family_table() -> list[str]:
    """Every named model type by the layers that it may have, with a mark for those that
    `benchmarks.train.families` has not measured."""
    measured = _read_measured_types()
    types: dict[str, list[str]] = {}
    for model_type, family in TEXT_FAMILIES.items():
        layers = [LAYER_NAMES[mixer] for mixer in sorted(family.mixers)]
        if family.has_experts:
            layers.append("experts")
        mark = "" if (family.text_type or model_type) in measured else " (preflight only)"
        part = " (text part)" if family.tensor_prefix else ""
        types.setdefault(", ".join(layers), []).append(f"`{model_type}`{part}{mark}")
    lines = ["| layers | `model_type` |", "|---|---|"]
    return lines + [f"| {layers} | {', '.join(names)} |" for layers, names in types.items()]


def build_refused_table() -> list[str]:
    """Model types that are refused for a reason of their own, by reason."""
    types: dict[str, list[str]] = {}
    for model_type, reason in REFUSED_TYPES.items():
        types.setdefault(reason, []).append(f"`{model_type}`")
    lines = ["| `model_type` | why: it |", "|---|---|"]
    return lines + [f"| {', '.join(names)} | {reason} |" for reason, names in types.items()]


def build_gpu_table() -> list[str]:
    """Every GPU that can be planned for, with its memory, its rate and its links."""
    lines = [
        "| `--target` | memory | bf16 | memory per second | in a node | between nodes | links |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, preset in HARDWARE_PRESETS.items():
        rates = (preset.bandwidth, preset.link, preset.network)
        cells = [
            f"{rate / 1e9:,.3g} GB/s" if rate < 1e12 else f"{rate / 1e12:.3g} TB/s"
            for rate in rates
        ]
        cells = [
            f"{preset.memory_bytes // 10**9} GB",
            f"{preset.flops / 1e12:,.4g} TFLOP/s",
            *cells,
        ]
        lines.append(f"| `{name}` | {' | '.join(cells)} | {preset.link_source} |")
    return lines


def _read_measured_types() -> set[str]:
    """The model types in the table of docs/results/families.md."""
    rows = [line.strip("|").split("|") for line in FAMILIES_PAGE.read_text().splitlines()]
    return {cells[0].strip() for cells in rows if len(cells) == MEASURED_COLUMNS}


def _format_type(hint: Any) -> str:
    """The name of a type, without the None of an optional one."""
    (kind,) = [part for part in get_args(hint) or (hint,) if part is not type(None)]
    return TYPE_NAMES[kind]


TABLES: dict[str, Callable[[], list[str]]] = {
    "recipe": build_key_table,
    **{
        name: partial(build_mapping_table, model)
        for name, model in (
            *vars(fields).items(),
            *vars(objectives).items(),
            *vars(sweep).items(),
        )
        if inspect.isclass(model) and issubclass(model, BaseModel)
    },
    "verbs": build_verb_table,
    "help": build_help_pages,
    "families": build_family_table,
    "refused": build_refused_table,
    "gpus": build_gpu_table,
}


# ---------------------------------------------------------------- output of commands


def run_command(text: str, folder: Path) -> list[str]:
    """Run `text` in `folder`, and return it behind a `$` with what it printed, in a code block."""
    lines = LINES.search(text)
    command = LINES.sub("", text)
    output = _run(command, folder).splitlines()
    if lines:
        output = list(_select_lines(output, lines.group(1)))
    return ["```", f"$ {command}", *output, "```"]


def _run(command: str, folder: Path) -> str:
    bin_folder = str(Path(sys.executable).parent)
    settings = {"COLUMNS": str(WIDTH), "NO_COLOR": "1", "TERM": "dumb", "HF_HUB_OFFLINE": "1"}
    path = os.pathsep.join([bin_folder, os.environ["PATH"]])
    done = subprocess.run(
        ["bash", "-c", command],
        cwd=folder,
        env={**os.environ, **settings, "PATH": path},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=TIMEOUT_SECONDS,
        check=False,
    )
    if done.returncode not in EXPECTED_CODES:
        sys.exit(f"$ {command}\nexit code {done.returncode}\n{done.stdout}")
    text = done.stdout.replace(f"{folder}/", "").replace(str(Path.home()), "~")
    return "\n".join(line.rstrip() for line in text.splitlines())


def _select_lines(output: list[str], ranges: str) -> Iterable[str]:
    """The lines of "1-3, 8, 12-": what is left out in between is three dots."""
    last = 0
    for part in ranges.split(","):
        first, dash, end = part.strip().partition("-")
        start = int(first)
        stop = int(end) if end else len(output) if dash else start
        if start > last + 1:
            yield "..."
        yield from output[start - 1 : stop]
        last = stop
    if last < len(output):
        yield "..."


# ---------------------------------------------------------------- pages


def replace_tables(page: str) -> str:
    """The page with its tables made anew; blocks of commands stay."""

    def replace(match: re.Match[str]) -> str:
        opening, kind, name, _, closing = match.groups()
        if kind != "table:":
            return match.group()
        return "\n".join([opening.rstrip(), "", *TABLES[name](), "", closing])

    return BLOCK.sub(replace, page)


def replace_commands(page: str, folder: Path) -> str:
    """The page with the output of its commands, run in `folder` in the order of the page."""

    def replace(match: re.Match[str]) -> str:
        opening, kind, text, _, closing = match.groups()
        if kind != "$":
            return match.group()
        sys.stderr.write(f"$ {text}\n")
        return "\n".join([opening.rstrip(), *run_command(text, folder), closing])

    return BLOCK.sub(replace, page)


def prepare_scratch(folder: Path) -> None:
    """The demo's files, the recipes, the examples, configs of models, and one run of the demo."""
    folder.mkdir(parents=True, exist_ok=True)
    shutil.copytree(DEMO, folder, dirs_exist_ok=True)
    for name in ("recipes", "examples"):
        shutil.copytree(ROOT / name, folder / name, dirs_exist_ok=True)
    shutil.copytree(ROOT / "docs" / "models", folder / "models", dirs_exist_ok=True)
    run = folder / "runs" / "demo-1"
    shutil.rmtree(run / "export", ignore_errors=True)  # an export is not overwritten
    record = run / "record.json"
    if not record.exists():
        (folder / "demo.txt").write_text(_run("tunesmith demo", folder) + "\n")
    if not record.exists():
        sys.exit("the demo did not finish")


def main() -> None:
    parser = argparse.ArgumentParser(description="Write the generated blocks of the docs.")
    parser.add_argument("--tables", action="store_true", help="tables only, no commands")
    parser.add_argument("--scratch", type=Path, help="folder to run in, kept for the next time")
    parser.add_argument("pages", nargs="*", type=Path, help="these pages only")
    options = parser.parse_args()
    scratch = options.scratch or Path(tempfile.mkdtemp())
    if not options.tables:
        prepare_scratch(scratch.resolve())
    for path in [page.resolve() for page in options.pages] or list_pages():
        page = replace_tables(path.read_text())
        if not options.tables:
            page = replace_commands(page, scratch.resolve())
        path.write_text(page)


if __name__ == "__main__":
    main()
