"""Warnings of a plan about its inputs: what is unknown about the adapter, missing in the model
folder, or other than the recipe says."""

from __future__ import annotations

from tunesmith.core.formatting import format_count
from tunesmith.core.hub_names import COMMIT, split_revision
from tunesmith.model.hub.validate import find_replaced_code, has_weights, read_model_json
from tunesmith.recipe.metric_limits import list_reversed_limits
from tunesmith.session.identity import read_provenance
from tunesmith.session.inputs import TOKENIZER_FILE, RunInputs

MAX_SPLIT_DEVIATION = 0.3  # of the number of held-out rows, without a warning


def list_input_warnings(inputs: RunInputs) -> tuple[str, ...]:
    """Return what is unknown about the adapter, and what is missing in the model folder."""
    warnings = [*inputs.notes, *list_reversed_limits(inputs.recipe.gates)]
    adapter = inputs.adapter
    model = inputs.model
    if adapter is not None and read_provenance(adapter.path) is None:
        warnings.append(
            f"adapter_from: its weights fit {model.name} by name and shape, and it names its base "
            f"as {adapter.base_name or 'unknown'}; there is no hash of the weights that it was "
            "trained on"
        )
    if code := find_replaced_code(read_model_json(model.path / "config.json")):
        warnings.append(
            f"model: config.json names code of the repository ({', '.join(code):.200}), which is "
            f"never run: {model.architecture} of transformers is trained instead"
        )
    if inputs.recipe.eval_split and (warning := _check_split(inputs)):
        warnings.append(warning)
    if not has_weights(model.path) and COMMIT.fullmatch(split_revision(inputs.recipe.model)[1]):
        warnings.append(f"model: the weights of {model.name} are downloaded when a run starts")
    elif not has_weights(model.path):
        warnings.append(
            f"model: {model.path} has no weights: the plan is made from config.json, and cannot be "
            "run yet"
        )
    if inputs.counting_model:
        warnings.append(
            f"model: there is no {TOKENIZER_FILE}, so tokens are counted with the tokenizer of "
            f"{inputs.counting_model}"
        )
    return tuple(warnings)


def _check_split(inputs: RunInputs) -> str:
    """Return a warning if eval_split holds out far more or fewer rows than it says: each row is
    held out by its hash, so that it stays where it is when rows are added."""
    fraction = inputs.recipe.eval_split or 0.0
    num_held_out = len(inputs.datasets["eval_data"])
    if "test_data" in inputs.datasets and not inputs.recipe.test_data:
        num_held_out += len(inputs.datasets["test_data"])
    num_rows = num_held_out + len(inputs.datasets["data"])
    expected = fraction * num_rows
    if abs(num_held_out - expected) <= max(1.0, MAX_SPLIT_DEVIATION * expected):
        return ""
    rows = format_count(num_rows, "row")
    return (
        f"eval_split: {fraction:g} of {rows} are {expected:.0f}, but the hash split holds out "
        f"{num_held_out}; set eval_data and test_data instead"
    )
