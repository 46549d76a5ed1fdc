"""Read the facts that advice is based on from arguments, a YAML file, or a recipe and its rows.

    read_requirements(path, arguments) -> Requirements

Rows of the hub are downloaded to be counted, unless they are in its cache. Left out: the facts
themselves (facts.py), and what follows from them (rubric.py).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tunesmith.advise.rules.facts import NEEDS, Requirements, parse_facts
from tunesmith.core.errors import InputError
from tunesmith.data.readers.sources import Source, open_source
from tunesmith.data.readers.text_folder import TextFolder
from tunesmith.recipe.load import load_recipe
from tunesmith.recipe.schema import Recipe, Stages, select_sources
from tunesmith.recipe.yaml_lines import read_yaml


def read_requirements(path: Path | None, arguments: Mapping[str, Any]) -> Requirements:
    """Combine the arguments with a file: facts, or a recipe whose rows are counted.

    Arguments win over facts in a file. Raises InputError for unknown, invalid or contradictory
    facts, and for an argument that differs from a count.
    """
    where = str(path or "advise")
    file_values: dict[str, Any] = {}
    counts: dict[str, int] = {}
    if path is not None and is_recipe(path):
        counts = count_rows(path)
    elif path is not None:
        file_values = _read_file(path)
    argument_values = parse_facts(
        arguments, lambda key: key if key.startswith("--") else f"argument {key}"
    )
    for name in argument_values.keys() & counts.keys():
        if argument_values[name] != counts[name]:
            argument = argument_values[name]
            message = f"{name} is {argument}, but the data of {path} has {counts[name]}"
            raise InputError(message, where=where, fix="leave it out: it is counted")
    values: dict[str, Any] = {**file_values, **counts, **argument_values}
    if not values.get("need"):
        fix = f"add --need {'|'.join(NEEDS)}, several separated by commas"
        raise InputError("'need' is missing: what the model lacks", where=where, fix=fix)
    if problem := _find_contradiction(values):
        raise InputError(problem, where=where, fix="change one of the two")
    return Requirements(**values)


def _read_file(path: Path) -> dict[str, Any]:
    document = read_yaml(path)
    if document.duplicates:
        key, line = document.duplicates[0]
        raise InputError(f"duplicate key '{key}'", where=f"{path}:{line}", fix="keep one")
    return parse_facts(document.values, lambda key: document.format_location((key,)))


def is_recipe(path: Path) -> bool:
    return bool({"data", "model"} & read_yaml(path).values.keys())


def count_rows(path: Path) -> dict[str, int]:
    """Count the rows in the data files of a recipe, without rendering; sum over its stages."""
    recipe = load_recipe(path)
    counts: Counter[str] = Counter()
    for stage in recipe.recipes if isinstance(recipe, Stages) else (recipe,):
        counts.update(_count_stage_rows(stage))
    return dict(counts)


def _count_stage_rows(recipe: Recipe) -> dict[str, int]:
    """Return bytes for continued pretraining; chosen answers of pairs count as examples too."""
    from tunesmith.session.hub_data import fetch_sources  # loads huggingface_hub

    sources: list[Source | TextFolder] = []
    for source in fetch_sources(select_sources(recipe, "data")):
        sources += map(open_source, source.files)
    if recipe.stage == "cpt":
        num_bytes = 0
        for source in sources:
            num_bytes += sum(source.read_raw(row, 0)[1] for row in range(len(source)))
        return {"raw_text": num_bytes}
    rows = sum(len(source) for source in sources)
    if recipe.max_examples is not None:
        rows = min(rows, recipe.max_examples)
    return {"examples": rows, "pairs": rows} if recipe.stage == "preference" else {"examples": rows}


def _find_contradiction(values: Mapping[str, Any]) -> str:
    """Return the first contradiction between two facts, or an empty string."""
    if "facts" not in values["need"]:
        if values.get("facts_change", "never") != "never":
            return f"facts_change is {values['facts_change']}, but 'facts' is not needed"
        if values.get("paraphrases"):
            return "paraphrases are of facts, but 'facts' is not needed"
    if "latency" in values["need"] and values.get("requests_month") == 0:
        return "'latency' is needed, but requests_month is 0"
    return ""
