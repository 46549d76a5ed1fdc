"""The inputs of a plan and its run: machine, model folder, renderer, and datasets by role.

In: a recipe. Out: RunInputs. `data` trains, `eval_data` selects, and `test_data` is read once, by
the final comparison; without test_data the held-out rows are split in half by a hash of their
content. Left out: weights, which session.py loads.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import cache, partial
from pathlib import Path
from typing import Any

from rich.text import Text

from tunesmith.core.atomic import MANIFEST, verify_dir
from tunesmith.core.errors import InputError
from tunesmith.core.formatting import format_bytes, format_count
from tunesmith.core.hardware import measure_machine
from tunesmith.core.hub_names import COMMIT, pin_model_name, remove_commit, split_revision
from tunesmith.core.json_io import read_json
from tunesmith.core.mesh import MeshPlan
from tunesmith.core.run_dir import SELF_REHEARSAL_FILE, pick_run_folder
from tunesmith.core.types import DataReport, Document, Json, Machine, ModelSpec, Plan, PlanValue
from tunesmith.data.chat_template.renderer import Renderer
from tunesmith.data.checks.run import check_data
from tunesmith.data.constraints import ConstraintSet
from tunesmith.data.dataset import Dataset, RowKind, open_dataset
from tunesmith.data.formats.few_shot import add_shots
from tunesmith.data.golden_set import refuse_locked_rows
from tunesmith.data.leakage import refuse_rehearsal_leakage, refuse_task_leakage
from tunesmith.data.length_stats import iter_documents, render_first_documents
from tunesmith.data.packing import compute_saved_share
from tunesmith.data.pretraining import PretrainingCorpus, open_corpus
from tunesmith.data.preview import render_preview
from tunesmith.data.sampler import TaskMixture, permute_rows
from tunesmith.data.split import split_by_hash
from tunesmith.data.tokenizer.added_tokens import (
    refuse_existing_tokens,
    refuse_other_tokens,
    refuse_unused_tokens,
)
from tunesmith.data.tokenizer.eos import find_separator
from tunesmith.model.hub.adapter_config import AdapterFolder, read_adapter
from tunesmith.model.hub.resolve import resolve_model
from tunesmith.model.hub.spec import read_model_headers, read_spec
from tunesmith.model.hub.validate import find_replaced_code, has_weights, read_model_json
from tunesmith.model.target_modules import list_linear_paths, select_targets
from tunesmith.plan.build import build_plan
from tunesmith.plan.gpu_time import estimate_gpu_time
from tunesmith.plan.hardware_presets import choose_machine, list_machines, match_preset
from tunesmith.plan.mesh import make_option, select_single_gpu
from tunesmith.plan.mixture import decide_mixture
from tunesmith.plan.new_tokens import decide_new_tokens
from tunesmith.plan.rules import Measures, SavedShareFn, assume_no_savings
from tunesmith.plan.rules_cpt import choose_window
from tunesmith.plan.step_memory import has_enough_memory
from tunesmith.recipe.fields import DataSource
from tunesmith.recipe.load import rebuild_recipe
from tunesmith.recipe.metric_limits import list_reversed_limits
from tunesmith.recipe.schema import Recipe, select_sources
from tunesmith.session.adapter_settings import (
    count_module_parameters,
    fix_adapter_values,
    refuse_contradicting_modules,
    refuse_expert_settings,
)
from tunesmith.session.hub_data import fetch_sources, pin_hub_data
from tunesmith.session.identity import check_provenance, read_provenance

TOKENIZER_FILE = "tokenizer.json"
HELD_OUT_ROLES = ("eval_data", "test_data")
FALLBACK_TOKENIZER = "smollm2-135m-instruct"  # counts tokens for a model without a tokenizer
NO_PRESET = "none of the presets"
ANY_MESH = {"dp_shard_size": "auto", "context_parallel_size": "auto"}  # of other targets
MAX_SPLIT_DEVIATION = 0.3  # of the number of held-out rows, without a warning


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


def open_datasets(
    recipe: Recipe, renderer: Renderer, generated_rows: Path | None = None
) -> dict[str, Dataset]:
    """Open the dataset of each role, with the length limit of the recipe.

    Raises InputError for unusable rows, and for rows that a role shares with another one."""
    datasets = {"data": open_training_rows(recipe, renderer)}
    rehearsal_sources = _select_rehearsal_sources(recipe, generated_rows)
    if rehearsal_sources:
        datasets["rehearsal"] = _open_rows(
            recipe, renderer, rehearsal_sources, ConstraintSet(recipe.never, can_ban=False)
        )
    held_out = ConstraintSet(recipe.never, is_held_out=True)
    if recipe.eval_data:
        sources = select_sources(recipe, "eval_data")
        datasets["eval_data"] = _open_rows(recipe, renderer, sources, held_out)
    elif recipe.eval_split:
        datasets["data"], datasets["eval_data"] = split_by_hash(
            datasets["data"], recipe.eval_split, recipe.seed
        )
    if recipe.test_data and not recipe.has_no_test:
        sources = select_sources(recipe, "test_data")
        datasets["test_data"] = _open_rows(recipe, renderer, sources, held_out)
    elif "eval_data" in datasets and not recipe.has_no_test:
        datasets["eval_data"], datasets["test_data"] = split_by_hash(
            datasets["eval_data"], 0.5, recipe.seed + 1
        )
    held_out_roles = {role: datasets[role] for role in HELD_OUT_ROLES if role in datasets}
    for role, dataset in held_out_roles.items():
        _refuse_single_row(recipe, role, dataset)
    refuse_task_leakage(datasets["data"], held_out_roles)
    refuse_locked_rows(datasets, trained_roles=("data", "rehearsal"))
    if rehearsal_sources:
        eval_datasets = open_eval_datasets(recipe, datasets, renderer)
        refuse_rehearsal_leakage(datasets["rehearsal"], eval_datasets)
    max_length = recipe.max_length if isinstance(recipe.max_length, int) else None
    datasets["data"] = datasets["data"].with_max_length(max_length, recipe.on_overlong)
    return add_shots(datasets)


def open_training_rows(recipe: Recipe, renderer: Renderer | None = None) -> Dataset:
    """Open the rows of `data`, with none of them held out."""
    recipe, _ = pin_hub_data(recipe)
    if renderer is None:
        renderer = build_renderer(recipe, resolve_model(recipe.model), datetime.now())
    constraints = ConstraintSet(recipe.never, can_ban=recipe.stage == "sft")
    sources = select_sources(recipe, "data")
    return _open_rows(recipe, renderer, sources, constraints, max_examples=recipe.max_examples)


def _open_rows(
    recipe: Recipe,
    renderer: Renderer,
    sources: Sequence[DataSource],
    constraints: ConstraintSet,
    *,
    max_examples: int | None = None,
) -> Dataset:
    return open_dataset(
        fetch_sources(sources),
        renderer.train_on(recipe.train_on),
        max_examples=max_examples,
        skip_invalid=recipe.skip_invalid,
        row_kind=get_row_kind(recipe),
        constraint_set=constraints,
    )


def get_row_kind(recipe: Recipe) -> RowKind:
    """Return what the rows of a recipe hold."""
    if recipe.stage != "preference":
        return "answer"
    return "labelled" if recipe.loss.name == "kto" else "pair"


def _select_rehearsal_sources(
    recipe: Recipe, generated_rows: Path | None
) -> tuple[DataSource, ...]:
    if recipe.rehearsal is None:
        return ()
    if recipe.rehearsal.is_self_generated:
        return () if generated_rows is None else (DataSource(path=generated_rows),)
    return recipe.rehearsal.data


def _refuse_single_row(recipe: Recipe, role: str, dataset: Dataset) -> None:
    if len(dataset) >= 2:
        return
    fix = "use at least two rows, better a hundred"
    if not recipe.test_data:
        fix += "; without test_data, half of the held-out rows become it"
    message = "one row: a score on it has no confidence interval"
    raise InputError(message, where=f"{role}: {dataset.path}", fix=fix)


def open_eval_datasets(
    recipe: Recipe, open_roles: Mapping[str, Dataset], renderer: Renderer
) -> dict[str, Dataset]:
    """Return the datasets that a run is evaluated on, retention_data included."""
    datasets = {role: open_roles[role] for role in HELD_OUT_ROLES if role in open_roles}
    if recipe.retention_data is not None:
        source = DataSource(path=recipe.retention_data, format="text")
        datasets["retention_data"] = open_dataset([source], renderer)
    return datasets


def read_response_schema(path: Path | None) -> Json | None:
    """Read a JSON schema. Raises InputError if it is missing or broken."""
    return None if path is None else read_json(path, key="response_schema")


def build_data_reports(
    inputs: RunInputs, *, needs_all_texts: bool = False
) -> dict[str, DataReport]:
    """Check the data; with `needs_all_texts` all of it, not only what a run needs to know."""
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
    """Return a function that plans for any machine, reading the rows only once.

    Its recipe may differ in settings that do not change rows or model. `inherited` are settings
    that an earlier stage has decided."""
    layers = list_linear_paths(read_model_headers(inputs.model.path))
    reports = build_data_reports(inputs)
    fixed = _collect_fixed_values(inputs, layers, reports["data"])
    if inherited is None and inputs.adapter is None:  # else an earlier stage has trained them
        refuse_unused_tokens(_iter_documents(inputs), inputs.renderer.tokenizer.new_tokens)
    fixed = {**(inherited or {}), **fixed}
    plan_kwargs = {
        "model": inputs.model,
        "data": reports,
        "output_dir": inputs.output_dir,
        "now": inputs.now.isoformat(),
        "fixed": fixed,
        "measures": Measures(
            saved_share=_make_saved_share(inputs, fixed.get("mixture")),
            count_parameters=partial(count_module_parameters, inputs.model),
        ),
    }
    input_warnings = _list_input_warnings(inputs)

    def plan_recipe(recipe: Recipe, machine: Machine) -> Plan:
        plan = build_plan(recipe, machine=machine, **plan_kwargs)
        plan = _add_time_estimate(plan)
        if plan.config.lora_target_modules is not None:
            targets = plan.config.lora_target_modules
            select_targets(layers, targets, inputs.model.model_type)  # refuses unknown layers
        refuse_contradicting_modules(plan, layers)
        refuse_expert_settings(plan, layers)
        return dataclasses.replace(
            plan,
            warnings=(*input_warnings, *plan.warnings),
            fits_on="" if has_enough_memory(plan) else find_preset_with_memory(recipe),
            mesh=compare_with_single_gpu(plan, recipe),
        )

    def find_preset_with_memory(recipe: Recipe) -> str:
        recipe = recipe.model_copy(update=ANY_MESH)
        for name, machine in list_machines(inputs.machine).items():
            if has_enough_memory(build_plan(recipe, machine=machine, **plan_kwargs)):
                return f"{name} ({format_bytes(machine.memory_bytes)})"
        return NO_PRESET

    def compare_with_single_gpu(plan: Plan, recipe: Recipe) -> MeshPlan | None:
        if plan.mesh is None or plan.mesh.mesh.num_gpus == 1:
            return plan.mesh
        recipe = recipe.model_copy(update={"method": plan.config.method, **ANY_MESH})
        machine = select_single_gpu(plan.machine)
        alone = _add_time_estimate(build_plan(recipe, machine=machine, **plan_kwargs))
        return dataclasses.replace(plan.mesh, options=(make_option(alone), make_option(plan)))

    return plan_recipe


def _add_time_estimate(plan: Plan) -> Plan:
    """Add the published training time of a preset; the speed of this machine is not known yet."""
    preset = match_preset(plan.machine)
    return plan if preset is None else estimate_gpu_time(plan, preset)


def _list_input_warnings(inputs: RunInputs) -> tuple[str, ...]:
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


def _make_saved_share(inputs: RunInputs, mixture: PlanValue | None) -> SavedShareFn:
    """Return the function that packs rows to find the savings of prefix sharing; it is cached,
    since several rules call it. Windows of texts have no common prefixes."""
    if inputs.corpus is not None:
        return assume_no_savings
    rows = inputs.datasets["data"]
    seed = inputs.recipe.seed
    first_N = (
        permute_rows(seed, 0, len(rows))
        if mixture is None
        else TaskMixture.from_dataset(rows, mixture.value).build_epoch(seed, 0)
    )
    return cache(partial(compute_saved_share, render_first_documents(rows, first_N)))


def _collect_fixed_values(
    inputs: RunInputs, layers: Sequence[str], report: DataReport
) -> dict[str, PlanValue]:
    """Return the settings that are decided before the rules."""
    fixed: dict[str, PlanValue] = {}
    if inputs.adapter is not None:
        fixed |= fix_adapter_values(inputs.adapter, inputs.recipe, inputs.model, layers)
    if inputs.recipe.mixture is not None:
        fixed["mixture"] = decide_mixture(inputs.recipe.mixture, report)
    fixed |= decide_new_tokens(inputs.renderer.tokenizer.new_tokens, inputs.model)
    if inputs.corpus is not None:
        separator = find_separator(inputs.renderer.tokenizer)
        reason = f"ends every text: {separator.reason}"
        fixed["separator"] = PlanValue(separator.text, "checkpoint", reason)
    return fixed


def has_same_layers(inputs: RunInputs, first: Any, second: Any) -> bool:
    """Return whether two values of lora_target_modules name the same layers."""
    layers = list_linear_paths(read_model_headers(inputs.model.path))
    model_type = inputs.model.model_type
    selected = select_targets(layers, first, model_type)
    return selected == select_targets(layers, second, model_type)


def show_rows(inputs: RunInputs, *, rows: int, should_show_ids: bool) -> Iterator[Text]:
    """Yield the first training rows as the model will see them."""
    dataset = inputs.datasets["data"]
    for index in range(min(rows, len(dataset))):
        yield from render_preview(
            dataset.render_row(index)[1], inputs.renderer, should_show_ids=should_show_ids
        )
    if num_rejected := dataset.rejected_rows.counts.total():
        rejected = format_count(num_rejected, "row")
        yield Text(f"{rejected} cannot be used: run `tunesmith data check`", "yellow")


def reload_inputs(plan: Plan, folder: Path | None = None) -> RunInputs:
    """Open the inputs of an existing plan, whose run folder may have moved. Raises InputError if
    its rows or its adapter have changed."""
    inputs = reload_inputs_unchecked(plan, folder)
    refuse_changed_rows(plan, inputs)
    if inputs.adapter is not None:
        load_starting_adapter(plan, inputs.model.path)
    return inputs


def refuse_changed_rows(plan: Plan, inputs: RunInputs) -> None:
    """Raise InputError if the rows are not those of the plan."""
    for role, report in plan.data.items():
        stored = report.fingerprint
        current = inputs.datasets[role].fingerprint
        if current != stored:
            raise InputError(
                f"the file has changed since the plan (sha256 {stored[:12]} -> {current[:12]})",
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
