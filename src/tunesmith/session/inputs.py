"""The facts that a plan is made from, gathered once: model folder, machine, renderer, data sets by
role.

In: a recipe. Out: `Facts`. Three roles: `data` trains, `eval_data` selects, `test_data` is read
once, by the final before/after. Without test_data the held-out rows are split in half by a hash of
their content. Loads no weights."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import cache, partial
from pathlib import Path
from typing import Any

from rich.text import Text

from tunesmith.core.errors import InputError
from tunesmith.core.formatting import format_bytes
from tunesmith.core.hardware import measure_machine
from tunesmith.core.run_dir import SELF_REHEARSAL_FILE, pick_run_folder
from tunesmith.core.types import DataReport, Document, Json, Machine, ModelSpec, Plan, PlanValue
from tunesmith.data.chat_template.renderer import Renderer
from tunesmith.data.checks.run import check_data
from tunesmith.data.constraints import ConstraintSet
from tunesmith.data.dataset import Dataset, open_dataset
from tunesmith.data.formats.few_shot import add_shots
from tunesmith.data.golden_set import refuse_locked_rows
from tunesmith.data.leakage import refuse_rehearsal_leakage, refuse_task_leakage
from tunesmith.data.length_stats import iter_documents, render_first_documents
from tunesmith.data.packing import compute_saved_share
from tunesmith.data.pretraining import PretrainingCorpus, open_corpus
from tunesmith.data.preview import render_preview
from tunesmith.data.sampler import TaskMixture, permute_rows
from tunesmith.data.split import split_by_hash
from tunesmith.data.tokenizer.added_tokens import refuse_other_tokens, refuse_unused_tokens
from tunesmith.data.tokenizer.eos import find_separator
from tunesmith.model.hub.adapter_config import AdapterFolder, read_adapter
from tunesmith.model.hub.resolve import resolve_model
from tunesmith.model.hub.spec import read_model_headers, read_spec
from tunesmith.model.hub.validate import has_weights
from tunesmith.model.target_modules import list_linear_paths, select_targets
from tunesmith.plan.build import build_plan, has_enough_memory
from tunesmith.plan.flops import MFU_RANGE, estimate_seconds
from tunesmith.plan.hardware_presets import list_machines, match_preset
from tunesmith.plan.mixture import decide_mixture
from tunesmith.plan.new_tokens import decide_new_tokens
from tunesmith.plan.rules import SavedShareFn, assume_no_savings
from tunesmith.plan.rules_cpt import choose_window
from tunesmith.recipe.fields import DataSource
from tunesmith.recipe.load import recipe_from_plan
from tunesmith.recipe.schema import Recipe, select_sources
from tunesmith.session.provenance import check_provenance, hash_weight_files, read_provenance
from tunesmith.session.run_history import apply_past_run

TOKENIZER_FILE = "tokenizer.json"
FALLBACK_TOKENIZER = "smollm2-135m-instruct"  # counts for a model without a tokenizer
NO_PRESET = "none of the table"


@dataclass(frozen=True, eq=False)
class RunInputs:
    recipe: Recipe
    machine: Machine
    model: ModelSpec
    renderer: Renderer
    datasets: dict[str, Dataset]  # role -> rows
    output_dir: Path
    now: datetime
    adapter: AdapterFolder | None = None  # the one to go on with
    corpus: PretrainingCorpus | None = None  # the texts of `data`, in continued pretraining
    counting_model: str = ""  # the model whose tokenizer counts, when this one has none

    @property
    def response_schema(self) -> Json | None:
        return read_response_schema(self.recipe.response_schema)


def load_inputs(
    recipe: Recipe,
    *,
    now: datetime | None = None,
    output_dir: Path | None = None,
    needs_weights: bool = True,
    generated_rows: Path | None = None,
) -> RunInputs:
    """Raises InputError for data or a model that cannot be used, MachineError when the model cannot
    be fetched. Without `weights`, which is enough for a plan, config.json will do for a model.
    `own_rows`: the rehearsal rows that the model has written itself."""
    timestamp = (now or datetime.now()).replace(microsecond=0)
    default_dir = (
        recipe.output_dir
        if isinstance(recipe.output_dir, Path)
        else pick_run_folder(Path("runs"), "run")
    )
    output_dir = output_dir or default_dir
    folder = resolve_model(recipe.model, needs_weights=needs_weights)
    model, has_tokenizer = read_spec(folder, name=recipe.model), (folder / TOKENIZER_FILE).is_file()
    renderer = build_renderer(
        recipe,
        folder if has_tokenizer or needs_weights else resolve_model(FALLBACK_TOKENIZER),
        timestamp,
    )
    _refuse_missing_rows(renderer, model)
    adapter = (
        None
        if recipe.adapter_from is None
        else _load_checked_adapter(recipe.adapter_from, model, renderer, timestamp)
    )
    datasets = open_datasets(recipe, renderer, generated_rows)
    return RunInputs(
        recipe=recipe,
        machine=measure_machine(output_dir),
        model=model,
        renderer=renderer,
        datasets=datasets,
        output_dir=output_dir,
        now=timestamp,
        adapter=adapter,
        corpus=_open_pretraining_corpus(recipe, datasets["data"], model)
        if recipe.stage == "cpt"
        else None,
        counting_model="" if has_tokenizer or needs_weights else FALLBACK_TOKENIZER,
    )


def _open_pretraining_corpus(recipe: Recipe, rows: Dataset, model: ModelSpec) -> PretrainingCorpus:
    """Raises InputError for rows that are no plain text, and for windows without a target."""
    if other_sources := [part for part in rows.parts if part.format != "text"]:
        message = f"stage: cpt trains plain text, and these are {other_sources[0].format} rows"
        fix = "name the column of the text, `data: {path: ..., format: text, columns: {text: NAME}}`, or use stage: sft"
        raise InputError(message, where=f"data: {other_sources[0].source.path}", fix=fix)
    window = recipe.max_length if isinstance(recipe.max_length, int) else choose_window(model)
    if window < 2:
        raise InputError(
            "a window of one token has nothing to predict", where="max_length", fix="raise it"
        )
    return open_corpus(rows, window)


def _refuse_missing_rows(renderer: Renderer, model: ModelSpec) -> None:
    if renderer.tokenizer.new_tokens and renderer.tokenizer.new_tokens[0].id > model.vocab_size:
        num_tokens = renderer.tokenizer.new_tokens[0].id
        message = f"the tokenizer numbers {num_tokens:,} tokens, and the embedding has {model.vocab_size:,} rows"
        raise InputError(
            message,
            where="add_tokens",
            fix="give a model whose tokenizer.json belongs to its weights",
        )


def _load_checked_adapter(
    path: Path, model: ModelSpec, renderer: Renderer, now: datetime
) -> AdapterFolder:
    """The adapter to go on with. InputError when it does not fit, or says that it belongs to
    something else."""
    adapter = read_adapter(path, model.path)
    refuse_other_tokens(adapter.path, adapter.new_token_ids, renderer.tokenizer.new_tokens)
    check_provenance(adapter.path, hash_weight_files(model.path), renderer, now.isoformat())
    return adapter


def build_renderer(recipe: Recipe, folder: Path, now: datetime) -> Renderer:
    """The tokenizer of a model folder, with the chat template that the recipe wants. In continued
    pretraining texts end in the separator."""
    template = recipe.chat_template if isinstance(recipe.chat_template, Path) else None
    template_kwargs, added_tokens = recipe.chat_template_kwargs, recipe.add_tokens
    renderer = Renderer.from_folder(
        folder, template=template, now=now, variables=template_kwargs, add_tokens=added_tokens
    )
    if recipe.chat_template == "none":
        renderer = Renderer(renderer.tokenizer, {})
    return (
        renderer.with_text_end(find_separator(renderer.tokenizer).id)
        if recipe.stage == "cpt"
        else renderer
    )


def open_datasets(
    recipe: Recipe, renderer: Renderer, generated_rows: Path | None = None
) -> dict[str, Dataset]:
    """The data sets of each role, under the recipe's length policy."""
    max_length = recipe.max_length if isinstance(recipe.max_length, int) else None
    is_preference = recipe.stage == "preference"
    open_rows = partial(
        open_dataset,
        renderer=renderer,
        skip_invalid=recipe.skip_invalid,
        has_pairs=is_preference,
    )
    held_out_constraints = ConstraintSet(recipe.never, is_held_out=True)
    datasets = {
        "data": open_rows(
            select_sources(recipe, "data"),
            max_examples=recipe.max_examples,
            constraint_set=ConstraintSet(recipe.never, can_ban=recipe.stage == "sft"),
        )
    }
    rehearsal_sources = () if recipe.rehearsal is None else recipe.rehearsal.data
    if recipe.rehearsal is not None and recipe.rehearsal.is_self_generated:
        rehearsal_sources = () if generated_rows is None else (DataSource(path=generated_rows),)
    if rehearsal_sources:
        datasets["rehearsal"] = open_rows(
            rehearsal_sources, constraint_set=ConstraintSet(recipe.never, can_ban=False)
        )
    if recipe.eval_data:
        datasets["eval_data"] = open_rows(
            select_sources(recipe, "eval_data"), constraint_set=held_out_constraints
        )
    elif recipe.eval_split:
        datasets["data"], datasets["eval_data"] = split_by_hash(
            datasets["data"], recipe.eval_split, recipe.seed
        )
    if recipe.test_data:
        datasets["test_data"] = open_rows(
            select_sources(recipe, "test_data"), constraint_set=held_out_constraints
        )
    elif "eval_data" in datasets:
        datasets["eval_data"], datasets["test_data"] = split_by_hash(
            datasets["eval_data"], 0.5, recipe.seed + 1
        )
    for role in ("eval_data", "test_data"):
        if role in datasets and len(datasets[role]) < 2:
            message = "one row: a score on it has no interval"
            hint = (
                ""
                if recipe.test_data
                else "; without test_data, half of the rows that are held out become it"
            )
            fix = f"give at least two rows, better a hundred{hint}"
            raise InputError(message, where=f"{role}: {datasets[role].path}", fix=fix)
    refuse_task_leakage(
        datasets["data"],
        {role: datasets[role] for role in ("eval_data", "test_data") if role in datasets},
    )
    refuse_locked_rows(datasets, trained_roles=("data", "rehearsal"))
    if rehearsal_sources:
        refuse_rehearsal_leakage(
            datasets["rehearsal"], open_eval_datasets(recipe, datasets, renderer)
        )
    datasets["data"] = datasets["data"].with_max_length(max_length, recipe.on_overlong)
    return add_shots(datasets)


def open_data_pool(recipe: Recipe) -> Dataset:
    """The rows of `data` alone, none of them held out."""
    renderer = build_renderer(recipe, resolve_model(recipe.model), datetime.now())
    constraints = ConstraintSet(recipe.never, can_ban=recipe.stage == "sft")
    is_preference = recipe.stage == "preference"
    return open_dataset(
        select_sources(recipe, "data"),
        renderer,
        max_examples=recipe.max_examples,
        skip_invalid=recipe.skip_invalid,
        has_pairs=is_preference,
        constraint_set=constraints,
    )


def open_eval_datasets(
    recipe: Recipe, open_roles: Mapping[str, Dataset], renderer: Renderer
) -> dict[str, Dataset]:
    """All rows that a run is measured on."""
    datasets = {role: open_roles[role] for role in ("eval_data", "test_data") if role in open_roles}
    if recipe.retention_data is not None:
        source = DataSource(path=recipe.retention_data, format="text")
        datasets["retention_data"] = open_dataset([source], renderer)
    return datasets


def read_response_schema(path: Path | None) -> Json | None:
    if path is None:
        return None
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(
            f"cannot read the file: {error.strerror}", where=f"schema: {path}"
        ) from error
    except ValueError as error:
        raise InputError(
            f"not JSON: {error}", where=f"schema: {path}", fix="correct the file"
        ) from error


def build_data_reports(
    inputs: RunInputs, *, needs_all_texts: bool = False
) -> dict[str, DataReport]:
    """What the data check says; `whole`: of all texts, not only what a run needs to know."""
    return check_data(
        inputs.datasets,
        schema=inputs.response_schema,
        corpus=inputs.corpus,
        should_read_all=needs_all_texts,
    )


def make_plan(inputs: RunInputs, inherited: Mapping[str, PlanValue] | None = None) -> Plan:
    return make_planner(inputs, inherited)(inputs.recipe, inputs.machine)


def _iter_documents(inputs: RunInputs) -> Iterator[Document]:
    corpus = inputs.corpus
    if corpus is None:
        return iter_documents(inputs.datasets["data"])
    return (corpus.read_window(index) for index in range(len(corpus)))


def make_planner(
    inputs: RunInputs, inherited: Mapping[str, PlanValue] | None = None
) -> Callable[[Recipe, Machine], Plan]:
    """Plans for any machine, and for the recipe or one that differs in what rows and model do not
    depend on: the rows are read once for all. `handed_on`: what an earlier stage has decided."""
    layers = list_linear_paths(read_model_headers(inputs.model.path))
    reports = build_data_reports(inputs)
    fixed = _collect_fixed_values(inputs, layers, reports["data"])
    if (
        inherited is None and inputs.adapter is None
    ):  # else an earlier run or stage has trained them
        refuse_unused_tokens(_iter_documents(inputs), inputs.renderer.tokenizer.new_tokens)
    plan_kwargs = {
        "model": inputs.model,
        "data": reports,
        "output_dir": inputs.output_dir,
        "now": inputs.now.isoformat(),
        "fixed": {**(inherited or {}), **fixed},
        "saved_share": _make_saved_share(inputs, fixed.get("mixture")),
    }
    adapter_warnings = (
        () if inputs.adapter is None else _list_adapter_warnings(inputs.adapter, inputs.model)
    )

    def plan_recipe(recipe: Recipe, machine: Machine) -> Plan:
        plan = _add_time_estimate(
            apply_past_run(build_plan(recipe, machine=machine, **plan_kwargs))
        )
        if plan.config.lora_target_modules is not None:
            select_targets(layers, plan.config.lora_target_modules)  # refused before anything is loaded
        warnings = (*adapter_warnings, *_iter_missing_files(inputs), *plan.warnings)
        return dataclasses.replace(
            plan,
            warnings=warnings,
            fits_on="" if has_enough_memory(plan) else find_preset_with_memory(recipe),
        )

    def find_preset_with_memory(recipe: Recipe) -> str:
        for name, machine in list_machines(inputs.machine).items():
            if has_enough_memory(build_plan(recipe, machine=machine, **plan_kwargs)):
                return f"{name} ({format_bytes(machine.memory_bytes)})"
        return NO_PRESET

    return plan_recipe


def _add_time_estimate(plan: Plan) -> Plan:
    """What is published of a machine of the table; of this one only what was measured."""
    preset = match_preset(plan.machine)
    if preset is None:
        return plan
    shares = " to ".join(f"{100 * share:.0f}%" for share in MFU_RANGE)
    speed_source = f"at {shares} of its bf16 rate, published for well-tuned runs"
    return dataclasses.replace(
        plan, seconds=estimate_seconds(plan, preset.flops), seconds_source=speed_source
    )


def _iter_missing_files(inputs: RunInputs) -> Iterator[str]:
    """What is not in the model's folder, though a plan can be made without it."""
    if not has_weights(inputs.model.path):
        yield f"model: {inputs.model.path} holds no weights: this plan is made from config.json and cannot be run yet"
    if inputs.counting_model:
        yield f"model: without {TOKENIZER_FILE} the tokens of the data are counted by the tokenizer of {inputs.counting_model}"


def _make_saved_share(inputs: RunInputs, mixture: PlanValue | None) -> SavedShareFn:
    """Windows of texts do not begin alike. Several rules ask, and each answer packs many rows: it
    is remembered."""
    if inputs.corpus is not None:
        return assume_no_savings
    rows, seed = inputs.datasets["data"], inputs.recipe.seed
    first_N = (
        permute_rows(seed, 0, len(rows))
        if mixture is None
        else TaskMixture.from_dataset(rows, mixture.value).build_epoch(seed, 0)
    )
    return cache(partial(compute_saved_share, render_first_documents(rows, first_N)))


def _collect_fixed_values(
    inputs: RunInputs, layers: Sequence[str], report: DataReport
) -> dict[str, PlanValue]:
    """What is decided before the rules."""
    fixed = (
        {} if inputs.adapter is None else _fix_adapter_values(inputs.adapter, inputs.recipe, layers)
    )
    if inputs.recipe.mixture is not None:
        fixed["mixture"] = decide_mixture(inputs.recipe.mixture, report)
    fixed |= decide_new_tokens(inputs.renderer.tokenizer.new_tokens, inputs.model)
    if inputs.corpus is not None:
        separator = find_separator(inputs.renderer.tokenizer)
        fixed["separator"] = PlanValue(
            separator.text, "checkpoint", f"ends every text: {separator.reason}"
        )
    return fixed


def _fix_adapter_values(
    adapter: AdapterFolder, recipe: Recipe, layers: Sequence[str]
) -> dict[str, PlanValue]:
    """What going on with an adapter leaves no choice about. Other words for the same layers are no
    other choice."""
    requested, target_modules = recipe.lora_target_modules, adapter.target_modules
    if requested != "auto" and select_targets(layers, requested) == select_targets(
        layers, target_modules
    ):
        target_modules = requested
    values = {
        "adapter_sha256": adapter.sha256,
        "method": "qlora" if recipe.method == "qlora" else "lora",
        "lora_r": adapter.rank,
        "lora_alpha": adapter.alpha,
        "lora_target_modules": target_modules,
        "use_rslora": adapter.use_rslora,
        "use_dora": adapter.use_dora,
    }
    plan_values = {
        key: PlanValue(value, "checkpoint", "the adapter to go on with")
        for key, value in values.items()
    }
    return plan_values | {
        "adapter_from": PlanValue(str(adapter.path), "user", "its weights are where training starts")
    }


def has_same_layers(inputs: RunInputs, first: Any, second: Any) -> bool:
    """Two ways to say which layers get an adapter."""
    layers = list_linear_paths(read_model_headers(inputs.model.path))
    return select_targets(layers, first) == select_targets(layers, second)


def _list_adapter_warnings(adapter: AdapterFolder, model: ModelSpec) -> tuple[str, ...]:
    if read_provenance(adapter.path) is not None:
        return ()
    return (
        f"adapter_from: its weights fit {model.name} by name and shape, and it says that its base is "
        f"{adapter.base_name or 'unknown'}; there is no hash by which to know that it was trained on these weights",
    )


def show_rows(inputs: RunInputs, *, rows: int, should_show_ids: bool) -> Iterator[Text]:
    """The first training rows as the model will see them."""
    dataset = inputs.datasets["data"]
    for index in range(min(rows, len(dataset))):
        yield from render_preview(
            dataset.render_row(index)[1], inputs.renderer, should_show_ids=should_show_ids
        )
    if num_rejected := dataset.rejected_rows.counts.total():
        yield Text(
            f"{num_rejected:,} rows cannot be used: `tunesmith data check` says why", "yellow"
        )


def reload_inputs(plan: Plan, folder: Path | None = None) -> RunInputs:
    """The facts of an existing plan, whose run folder may have moved. Raises InputError when the
    rows that it was made from have changed."""
    inputs = reload_inputs_unchecked(plan, folder)
    refuse_changed_rows(plan, inputs)
    if inputs.adapter is not None:
        load_starting_adapter(plan, inputs.model.path)
    return inputs


def refuse_changed_rows(plan: Plan, inputs: RunInputs) -> None:
    """Raises InputError when rows are not those of the plan."""
    for role, report in plan.data.items():
        fingerprint = inputs.datasets[role].fingerprint
        if fingerprint != report.fingerprint:
            raise InputError(
                f"the file has changed since the plan (sha256 {report.fingerprint[:12]} -> {fingerprint[:12]})",
                where=f"{role}: {report.path}",
                fix="make a new plan, with a new output_dir",
            )


def load_starting_adapter(plan: Plan, base: Path) -> AdapterFolder | None:
    """The adapter that a run goes on with. Raises InputError when it is not the one of the plan."""
    if plan.config.adapter_from is None:
        return None
    adapter = read_adapter(Path(plan.config.adapter_from), base)
    if adapter.sha256 != plan.config.adapter_sha256:
        where, fix = (
            f"adapter_from: {adapter.path}",
            "put it back, or make a new plan with a new output_dir",
        )
        raise InputError("the adapter has changed since the plan", where=where, fix=fix)
    return adapter


def reload_inputs_unchecked(plan: Plan, folder: Path | None = None) -> RunInputs:
    """What the recipe and the dates of a plan give now, whatever has changed since."""
    recipe = recipe_from_plan(plan.recipe)
    output_dir = Path(plan.config.output_dir)
    generated_rows = (
        (folder or output_dir) / SELF_REHEARSAL_FILE if "rehearsal" in plan.data else None
    )
    return load_inputs(
        recipe,
        now=datetime.fromisoformat(plan.config.now),
        output_dir=output_dir,
        generated_rows=generated_rows,
    )
