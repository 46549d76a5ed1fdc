"""The inputs of a plan and its run: machine, model folder, renderer, and rows.

In: a recipe. Out: RunInputs. Left out: the roles of the rows (datasets.py), deciding settings
(planner.py), weights, which session.py loads."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from tunesmith.core.atomic import MANIFEST, verify_dir
from tunesmith.core.errors import InputError
from tunesmith.core.hardware import measure_machine
from tunesmith.core.hub_names import pin_model_name, remove_commit
from tunesmith.core.run_dir import SELF_REHEARSAL_FILE, pick_run_folder
from tunesmith.core.types import Json, Machine, ModelSpec, Plan
from tunesmith.data.chat_template.renderer import Renderer
from tunesmith.data.dataset import Dataset
from tunesmith.data.pretraining import PretrainingCorpus, find_separator, open_corpus
from tunesmith.data.tokenizer.added_tokens import (
    refuse_existing_tokens,
    refuse_other_tokens,
)
from tunesmith.model.hub.adapter_config import AdapterFolder, read_adapter
from tunesmith.model.hub.resolve import resolve_model
from tunesmith.model.hub.spec import read_spec
from tunesmith.plan.hardware_presets import choose_machine
from tunesmith.plan.rules_cpt import choose_window
from tunesmith.recipe.load import rebuild_recipe
from tunesmith.recipe.schema import Recipe
from tunesmith.session.datasets import (
    HELD_OUT_ROLES,
    open_datasets,
    open_training_rows,
    read_response_schema,
)
from tunesmith.session.hub_data import pin_hub_data
from tunesmith.session.identity import check_provenance

TOKENIZER_FILE = "tokenizer.json"
FALLBACK_TOKENIZER = "smollm2-135m-instruct"  # counts tokens for a model without a tokenizer


@dataclass(frozen=True, eq=False)
class RunInputs:
    recipe: Recipe
    machine: Machine
    model: ModelSpec
    renderer: Renderer
    datasets: dict[str, Dataset]  # role -> rows
    output_dir: Path
    now: datetime
    adapter: AdapterFolder | None = None  # where training starts
    corpus: PretrainingCorpus | None = None  # the texts of `data`; stage: cpt
    counting_model: str = ""  # the model whose tokenizer counts, if this one has none
    notes: tuple[str, ...] = ()  # about data of the hub

    @property
    def response_schema(self) -> Json | None:
        return read_response_schema(self.recipe.response_schema)

    def with_machine(self, target: str | None, memory: str | None) -> RunInputs:
        """Return a copy for another GPU or amount of memory; None keeps this machine's."""
        return dataclasses.replace(self, machine=choose_machine(self.machine, target, memory))


def load_inputs(
    recipe: Recipe,
    *,
    now: datetime | None = None,
    output_dir: Path | None = None,
    needs_weights: bool = True,
    generated_rows: Path | None = None,
) -> RunInputs:
    """Open everything that a recipe names.

    Without `needs_weights`, config.json is enough of a model: it can be planned for, not trained.
    `generated_rows` is the file of rehearsal rows that the base model has generated. Raises
    InputError for unusable data or an unusable model, MachineError if it cannot be downloaded."""
    recipe, notes = pin_hub_data(recipe)
    timestamp = (now or datetime.now()).replace(microsecond=0)
    if output_dir is None and isinstance(recipe.output_dir, Path):
        output_dir = recipe.output_dir
    output_dir = output_dir or pick_run_folder(Path("runs"), "run")
    folder = resolve_model(recipe.model, needs_weights=needs_weights)
    recipe = recipe.model_copy(update={"model": pin_model_name(recipe.model, folder)})
    model = read_spec(folder, name=remove_commit(recipe.model))
    counting_model = ""
    if not needs_weights and not (folder / TOKENIZER_FILE).is_file():
        counting_model = FALLBACK_TOKENIZER
    tokenizer_dir = resolve_model(counting_model) if counting_model else folder
    embedding_rows = None if counting_model else model.token_rows
    renderer = build_renderer(recipe, tokenizer_dir, timestamp, embedding_rows)
    _refuse_missing_rows(renderer, model)
    adapter = None
    if recipe.adapter_from is not None:
        adapter = _load_checked_adapter(recipe.adapter_from, model, renderer, timestamp)
    datasets = open_datasets(recipe, renderer, generated_rows)
    corpus = None
    if recipe.stage == "cpt":
        corpus = _open_pretraining_corpus(recipe, datasets, model)
    return RunInputs(
        recipe=recipe,
        machine=measure_machine(output_dir),
        model=model,
        renderer=renderer,
        datasets=datasets,
        output_dir=output_dir,
        now=timestamp,
        adapter=adapter,
        corpus=corpus,
        counting_model=counting_model,
        notes=notes,
    )


def _open_pretraining_corpus(
    recipe: Recipe, datasets: Mapping[str, Dataset], model: ModelSpec
) -> PretrainingCorpus:
    """Raises InputError for rows that are not plain text, and for windows without a target."""
    for role in [role for role in ("data", *HELD_OUT_ROLES) if role in datasets]:
        use = "trains on" if role == "data" else "is measured on"
        for part in datasets[role].parts:
            if part.format != "text":
                message = f"stage: cpt {use} plain text, but these are {part.format} rows"
                fix = f"name the text column, `{role}: {{path: ..., format: text, columns: "
                fix += "{text: NAME}}`, or "
                fix += "use stage: sft" if role == "data" else f"set {role} in a later stage: sft"
                raise InputError(message, where=f"{role}: {part.source.path}", fix=fix)
    window = recipe.max_length if isinstance(recipe.max_length, int) else choose_window(model)
    if window < 2:
        message = "a window of one token has nothing to predict"
        raise InputError(message, where="max_length", fix="raise it")
    return open_corpus(datasets["data"], window)


def _refuse_missing_rows(renderer: Renderer, model: ModelSpec) -> None:
    """Raise InputError if the embedding has fewer rows than the tokenizer has tokens."""
    new_tokens = renderer.tokenizer.new_tokens
    if new_tokens and new_tokens[0].id > model.vocab_size:
        raise InputError(
            f"the tokenizer has {new_tokens[0].id:,} tokens, but the embedding has "
            f"{model.vocab_size:,} rows",
            where="add_tokens",
            fix="use a model whose tokenizer.json belongs to its weights",
        )
    if new_tokens and model.per_layer_rows:
        raise InputError(
            "this model has a second table of tokens, which would have no rows for new ones",
            where="add_tokens",
            fix="leave add_tokens out; the model spells such texts with its own tokens",
        )


def _load_checked_adapter(
    path: Path, model: ModelSpec, renderer: Renderer, now: datetime
) -> AdapterFolder:
    """Read the adapter that training starts from. Raises InputError if it does not fit the model,
    was trained on another one, or has changed since a run wrote it."""
    adapter = read_adapter(path, model.path)
    if (adapter.path / MANIFEST).is_file() and (problem := verify_dir(adapter.path)):
        raise InputError(
            f"the files differ from what the run wrote: {problem}",
            where=f"adapter_from: {adapter.path}",
            fix=f"restore the folder; if you changed it on purpose, remove its {MANIFEST}",
        )
    refuse_existing_tokens(adapter.path, adapter.new_token_ids, renderer.tokenizer)
    refuse_other_tokens(adapter.path, adapter.new_token_ids, renderer.tokenizer.new_tokens)
    check_provenance(adapter.path, model.path, renderer, now.isoformat())
    return adapter


def build_renderer(
    recipe: Recipe, folder: Path, now: datetime, embedding_rows: int | None = None
) -> Renderer:
    """Load the tokenizer of a model folder with the chat template of the recipe.

    In continued pretraining every text ends in the separator. Tokens beyond the model's
    `embedding_rows` are refused."""
    renderer = Renderer.from_folder(
        folder,
        template=recipe.chat_template if isinstance(recipe.chat_template, Path) else None,
        now=now,
        variables=recipe.chat_template_kwargs,
        add_tokens=recipe.add_tokens,
        embedding_rows=embedding_rows,
    )
    if recipe.chat_template == "none":
        renderer = Renderer(renderer.tokenizer, {})
    if recipe.stage == "cpt":
        renderer = renderer.replace_text_end(find_separator(renderer.tokenizer).id)
    return renderer


def load_training_rows(recipe: Recipe) -> Dataset:
    """Open the rows of `data` without a run, with none of them held out."""
    recipe, _ = pin_hub_data(recipe)
    renderer = build_renderer(recipe, resolve_model(recipe.model), datetime.now())
    return open_training_rows(recipe, renderer)


def reload_inputs(plan: Plan, folder: Path | None = None) -> RunInputs:
    """Open the inputs of an existing plan, whose run folder may have moved. Raises InputError if
    its rows or its adapter have changed."""
    inputs = reload_inputs_unchecked(plan, folder)
    refuse_changed_rows(plan, inputs)
    if inputs.adapter is not None:
        load_starting_adapter(plan, inputs.model.path)
    return inputs


def reload_inputs_unchecked(plan: Plan, folder: Path | None = None) -> RunInputs:
    """Open the inputs of an existing plan as they are now."""
    recipe = rebuild_recipe(plan.recipe)
    output_dir = Path(plan.config.output_dir)
    generated_rows = None
    if "rehearsal" in plan.data:
        generated_rows = (folder or output_dir) / SELF_REHEARSAL_FILE
    return load_inputs(
        recipe,
        now=datetime.fromisoformat(plan.config.now),
        output_dir=output_dir,
        generated_rows=generated_rows,
    )


def refuse_changed_rows(plan: Plan, inputs: RunInputs) -> None:
    """Raise InputError if the rows are not those of the plan."""
    for role, report in plan.data.items():
        hashes = report.fingerprint[:12], inputs.datasets[role].fingerprint[:12]
        if hashes[0] != hashes[1]:
            raise InputError(
                f"the file has changed since the plan (sha256 {' -> '.join(hashes)})",
                where=f"{role}: {report.path}",
                fix="make a new plan, with a new output_dir",
            )


def load_starting_adapter(plan: Plan, base: Path) -> AdapterFolder | None:
    """Read the adapter that a run starts from. Raises InputError if it has changed since the
    plan."""
    if plan.config.adapter_from is None:
        return None
    adapter = read_adapter(Path(plan.config.adapter_from), base)
    if adapter.sha256 != plan.config.adapter_sha256:
        raise InputError(
            "the adapter has changed since the plan",
            where=f"adapter_from: {adapter.path}",
            fix="put it back, or make a new plan with a new output_dir",
        )
    return adapter
