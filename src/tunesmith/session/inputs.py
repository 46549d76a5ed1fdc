"""The facts that a plan is made from, gathered once: model folder, machine, renderer, data sets by role.

In: a recipe. Out: `Facts`. Three roles: `data` trains, `eval_data` selects, `test_data` is read once, by the final
before/after. Without test_data the held-out rows are split in half by a hash of their content. Loads no weights.
"""

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

from tunesmith.core.atomic import size
from tunesmith.core.errors import InputError
from tunesmith.core.hardware import measure_machine
from tunesmith.core.run_dir import OWN_ROWS, next_run_folder
from tunesmith.core.types import Choice, DataReport, Document, Json, Machine, ModelSpec, Plan
from tunesmith.data.chat_template.renderer import Renderer
from tunesmith.data.checks.run import check
from tunesmith.data.constraints import Never
from tunesmith.data.dataset import Dataset, open_dataset
from tunesmith.data.formats.few_shot import with_shots
from tunesmith.data.golden_set import refuse_golden
from tunesmith.data.hash_split import split
from tunesmith.data.leakage import refuse_overlap, refuse_trained
from tunesmith.data.length_stats import every_document, first_documents
from tunesmith.data.mixture import Mixture
from tunesmith.data.packing import saved_share
from tunesmith.data.pretraining import Corpus, open_corpus
from tunesmith.data.preview import coloured
from tunesmith.data.sampler import order
from tunesmith.data.tokenizer.added_tokens import refuse_other_tokens, refuse_unseen
from tunesmith.data.tokenizer.eos import separator_of
from tunesmith.model.hub.adapter_config import AdapterFolder, read_adapter
from tunesmith.model.hub.provenance import check_provenance, hashes_of, read_provenance
from tunesmith.model.hub.resolve import resolve
from tunesmith.model.hub.spec import headers_of, read_spec
from tunesmith.model.hub.validate import has_weights
from tunesmith.model.target_modules import linear_paths, select
from tunesmith.plan.build import decide, fits
from tunesmith.plan.flops import SHARES, seconds_on
from tunesmith.plan.hardware_presets import machines, target_of
from tunesmith.plan.mixture import mixture_choice
from tunesmith.plan.new_tokens import added
from tunesmith.plan.rules import SavedShare, nothing_saved
from tunesmith.plan.rules_cpt import window_of
from tunesmith.recipe.fields import DataSource
from tunesmith.recipe.load import kept_recipe
from tunesmith.recipe.schema import Recipe, sources_of
from tunesmith.session.run_history import corrected

TOKENIZER = "tokenizer.json"
STAND_IN = "smollm2-135m-instruct"  # counts for a model without a tokenizer
NO_MACHINE = "none of the table"


@dataclass(frozen=True, eq=False)
class Facts:
    recipe: Recipe
    machine: Machine
    model: ModelSpec
    renderer: Renderer
    datasets: dict[str, Dataset]  # role -> rows
    output_dir: Path
    now: datetime
    adapter: AdapterFolder | None = None  # the one to go on with
    corpus: Corpus | None = None  # the texts of `data`, in continued pretraining
    counted_by: str = ""  # the model whose tokenizer counts, when this one has none

    @property
    def schema(self) -> Json | None:
        return read_schema(self.recipe.answer_schema)


def gather(
    recipe: Recipe,
    *,
    now: datetime | None = None,
    output_dir: Path | None = None,
    weights: bool = True,
    own_rows: Path | None = None,
) -> Facts:
    """Raises InputError for data or a model that cannot be used, MachineError when the model cannot be fetched. Without
    `weights`, which is enough for a plan, config.json will do for a model. `own_rows`: the rehearsal rows that the
    model has written itself."""
    moment = (now or datetime.now()).replace(microsecond=0)
    wished = recipe.output_dir if isinstance(recipe.output_dir, Path) else next_run_folder(Path("runs"), "run")
    output_dir = output_dir or wished
    folder = resolve(recipe.model, weights=weights)
    model, own = read_spec(folder, name=recipe.model), (folder / TOKENIZER).is_file()
    renderer = renderer_of(recipe, folder if own or weights else resolve(STAND_IN), moment)
    _refuse_rowless(renderer, model)
    adapter = None if recipe.adapter_from is None else _adapter(recipe.adapter_from, model, renderer, moment)
    roles = open_roles(recipe, renderer, own_rows)
    return Facts(
        recipe=recipe,
        machine=measure_machine(output_dir),
        model=model,
        renderer=renderer,
        datasets=roles,
        output_dir=output_dir,
        now=moment,
        adapter=adapter,
        corpus=_corpus(recipe, roles["data"], model) if recipe.stage == "cpt" else None,
        counted_by="" if own or weights else STAND_IN,
    )


def _corpus(recipe: Recipe, rows: Dataset, model: ModelSpec) -> Corpus:
    """Raises InputError for rows that are no plain text, and for windows without a target."""
    if other := [part for part in rows.parts if part.format != "text"]:
        what = f"stage: cpt trains plain text, and these are {other[0].format} rows"
        fix = "name the column of the text, `data: {path: ..., format: text, columns: {text: NAME}}`, or use stage: sft"
        raise InputError(what, where=f"data: {other[0].source.path}", fix=fix)
    window = recipe.max_length if isinstance(recipe.max_length, int) else window_of(model)
    if window < 2:
        raise InputError("a window of one token has nothing to predict", where="max_length", fix="raise it")
    return open_corpus(rows, window)


def _refuse_rowless(renderer: Renderer, model: ModelSpec) -> None:
    if renderer.tokenizer.new and renderer.tokenizer.new[0].id > model.vocab_size:
        ids = renderer.tokenizer.new[0].id
        what = f"the tokenizer numbers {ids:,} tokens, and the embedding has {model.vocab_size:,} rows"
        raise InputError(what, where="add_tokens", fix="give a model whose tokenizer.json belongs to its weights")


def _adapter(path: Path, model: ModelSpec, renderer: Renderer, now: datetime) -> AdapterFolder:
    """The adapter to go on with. InputError when it does not fit, or says that it belongs to something else."""
    adapter = read_adapter(path, model.path)
    refuse_other_tokens(adapter.path, adapter.new_ids, renderer.tokenizer.new)
    check_provenance(adapter.path, hashes_of(model.path), renderer, now.isoformat())
    return adapter


def renderer_of(recipe: Recipe, folder: Path, now: datetime) -> Renderer:
    """The tokenizer of a model folder, with the chat template that the recipe wants. In continued pretraining texts end
    in the separator."""
    template = recipe.template if isinstance(recipe.template, Path) else None
    told, tokens = recipe.chat_template_kwargs, recipe.add_tokens
    renderer = Renderer.from_folder(folder, template=template, now=now, variables=told, add_tokens=tokens)
    if recipe.template == "none":
        renderer = Renderer(renderer.tokenizer, {})
    return renderer.ending_texts_in(separator_of(renderer.tokenizer).id) if recipe.stage == "cpt" else renderer


def open_roles(recipe: Recipe, renderer: Renderer, own_rows: Path | None = None) -> dict[str, Dataset]:
    """The data sets of each role, under the recipe's length policy."""
    longest = recipe.max_length if isinstance(recipe.max_length, int) else None
    pairs = recipe.stage == "preference"
    opened = partial(open_dataset, renderer=renderer, skip_bad=recipe.skip_bad, pairs=pairs)
    held_out = Never(recipe.never, held_out=True)
    roles = {
        "data": opened(
            sources_of(recipe, "data"),
            max_examples=recipe.max_examples,
            never=Never(recipe.never, bans=recipe.stage == "sft"),
        )
    }
    rehearsed = () if recipe.rehearsal is None else recipe.rehearsal.data
    if recipe.rehearsal is not None and recipe.rehearsal.own:
        rehearsed = () if own_rows is None else (DataSource(path=own_rows),)
    if rehearsed:
        roles["rehearsal"] = opened(rehearsed, never=Never(recipe.never, bans=False))
    if recipe.eval_data:
        roles["eval_data"] = opened(sources_of(recipe, "eval_data"), never=held_out)
    elif recipe.eval_split:
        roles["data"], roles["eval_data"] = split(roles["data"], recipe.eval_split, recipe.seed)
    if recipe.test_data:
        roles["test_data"] = opened(sources_of(recipe, "test_data"), never=held_out)
    elif "eval_data" in roles:
        roles["eval_data"], roles["test_data"] = split(roles["eval_data"], 0.5, recipe.seed + 1)
    for role in ("eval_data", "test_data"):
        if role in roles and len(roles[role]) < 2:
            what = "one row: a score on it has no interval"
            more = "" if recipe.test_data else "; without test_data, half of the rows that are held out become it"
            fix = f"give at least two rows, better a hundred{more}"
            raise InputError(what, where=f"{role}: {roles[role].path}", fix=fix)
    refuse_trained(roles["data"], {role: roles[role] for role in ("eval_data", "test_data") if role in roles})
    refuse_golden(roles, trained=("data", "rehearsal"))
    if rehearsed:
        refuse_overlap(roles["rehearsal"], measured_roles(recipe, roles, renderer))
    roles["data"] = roles["data"].limited(longest, recipe.overlong)
    return with_shots(roles)


def open_pool(recipe: Recipe) -> Dataset:
    """The rows of `data` alone, none of them held out."""
    renderer = renderer_of(recipe, resolve(recipe.model), datetime.now())
    never = Never(recipe.never, bans=recipe.stage == "sft")
    pairs = recipe.stage == "preference"
    return open_dataset(
        sources_of(recipe, "data"),
        renderer,
        max_examples=recipe.max_examples,
        skip_bad=recipe.skip_bad,
        pairs=pairs,
        never=never,
    )


def measured_roles(recipe: Recipe, roles: Mapping[str, Dataset], renderer: Renderer) -> dict[str, Dataset]:
    """All rows that a run is measured on."""
    found = {role: roles[role] for role in ("eval_data", "test_data") if role in roles}
    if recipe.retention_data is not None:
        source = DataSource(path=recipe.retention_data, format="text")
        found["retention_data"] = open_dataset([source], renderer)
    return found


def read_schema(path: Path | None) -> Json | None:
    if path is None:
        return None
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"cannot read the file: {error.strerror}", where=f"schema: {path}") from error
    except ValueError as error:
        raise InputError(f"not JSON: {error}", where=f"schema: {path}", fix="correct the file") from error


def reports(facts: Facts, *, whole: bool = False) -> dict[str, DataReport]:
    """What the data check says; `whole`: of all texts, not only what a run needs to know."""
    return check(facts.datasets, schema=facts.schema, corpus=facts.corpus, whole=whole)


def make_plan(facts: Facts, handed_on: Mapping[str, Choice] | None = None) -> Plan:
    return planner(facts, handed_on)(facts.recipe, facts.machine)


def _documents(facts: Facts) -> Iterator[Document]:
    corpus = facts.corpus
    if corpus is None:
        return every_document(facts.datasets["data"])
    return (corpus.document(number) for number in range(len(corpus)))


def planner(facts: Facts, handed_on: Mapping[str, Choice] | None = None) -> Callable[[Recipe, Machine], Plan]:
    """Plans for any machine, and for the recipe or one that differs in what rows and model do not depend on: the rows
    are read once for all. `handed_on`: what an earlier stage has decided."""
    layers = linear_paths(headers_of(facts.model.path))
    found = reports(facts)
    fixed = _fixed_of(facts, layers, found["data"])
    if handed_on is None and facts.adapter is None:  # else an earlier run or stage has trained them
        refuse_unseen(_documents(facts), facts.renderer.tokenizer.new)
    known = {
        "model": facts.model,
        "data": found,
        "output_dir": facts.output_dir,
        "now": facts.now.isoformat(),
        "fixed": {**(handed_on or {}), **fixed},
        "saved_share": _saved_share(facts, fixed.get("mixture")),
    }
    doubts = () if facts.adapter is None else _doubts(facts.adapter, facts.model)

    def make(recipe: Recipe, machine: Machine) -> Plan:
        plan = _timed(corrected(decide(recipe, machine=machine, **known)))
        if "lora_target_modules" in plan.choices:
            select(layers, plan["lora_target_modules"])  # refused before anything is loaded
        warnings = (*doubts, *_lacks(facts), *plan.warnings)
        return dataclasses.replace(plan, warnings=warnings, fits_on="" if fits(plan) else roomy(recipe))

    def roomy(recipe: Recipe) -> str:
        for name, machine in machines(facts.machine).items():
            if fits(decide(recipe, machine=machine, **known)):
                return f"{name} ({size(machine.memory_bytes)})"
        return NO_MACHINE

    return make


def _timed(plan: Plan) -> Plan:
    """What is published of a machine of the table; of this one only what was measured."""
    target = target_of(plan.machine)
    if target is None:
        return plan
    shares = " to ".join(f"{100 * share:.0f}%" for share in SHARES)
    told = f"at {shares} of its bf16 rate, published for well-tuned runs"
    return dataclasses.replace(plan, seconds=seconds_on(plan, target.flops), seconds_from=told)


def _lacks(facts: Facts) -> Iterator[str]:
    """What is not in the model's folder, though a plan can be made without it."""
    if not has_weights(facts.model.path):
        yield f"model: {facts.model.path} holds no weights: this plan is made from config.json and cannot be run yet"
    if facts.counted_by:
        yield f"model: without {TOKENIZER} the tokens of the data are counted by the tokenizer of {facts.counted_by}"


def _saved_share(facts: Facts, mixture: Choice | None) -> SavedShare:
    """Windows of texts do not begin alike. Several rules ask, and each answer packs many rows: it is remembered."""
    if facts.corpus is not None:
        return nothing_saved
    rows, seed = facts.datasets["data"], facts.recipe.seed
    first_N = order(seed, 0, len(rows)) if mixture is None else Mixture.of(rows, mixture.value).epoch(seed, 0)
    return cache(partial(saved_share, first_documents(rows, first_N)))


def _fixed_of(facts: Facts, layers: Sequence[str], report: DataReport) -> dict[str, Choice]:
    """What is decided before the rules."""
    fixed = {} if facts.adapter is None else _fixed(facts.adapter, facts.recipe, layers)
    if facts.recipe.mixture is not None:
        fixed["mixture"] = mixture_choice(facts.recipe.mixture, report)
    fixed |= added(facts.renderer.tokenizer.new, facts.model)
    if facts.corpus is not None:
        separator = separator_of(facts.renderer.tokenizer)
        fixed["separator"] = Choice(separator.text, "checkpoint", f"ends every text: {separator.why}")
    return fixed


def _fixed(adapter: AdapterFolder, recipe: Recipe, layers: Sequence[str]) -> dict[str, Choice]:
    """What going on with an adapter leaves no choice about. Other words for the same layers are no other choice."""
    wish, targets = recipe.lora_target_modules, adapter.targets
    if wish != "auto" and select(layers, wish) == select(layers, targets):
        targets = wish
    values = {
        "adapter_sha256": adapter.sha256,
        "method": "qlora" if recipe.method == "qlora" else "lora",
        "lora_r": adapter.rank,
        "lora_alpha": adapter.alpha,
        "lora_target_modules": targets,
        "use_rslora": adapter.rslora,
        "use_dora": adapter.dora,
    }
    chosen = {key: Choice(value, "checkpoint", "the adapter to go on with") for key, value in values.items()}
    return chosen | {"adapter_from": Choice(str(adapter.path), "you", "its weights are where training starts")}


def same_layers(facts: Facts, one: Any, other: Any) -> bool:
    """Two ways to say which layers get an adapter."""
    layers = linear_paths(headers_of(facts.model.path))
    return select(layers, one) == select(layers, other)


def _doubts(adapter: AdapterFolder, model: ModelSpec) -> tuple[str, ...]:
    if read_provenance(adapter.path) is not None:
        return ()
    return (
        f"adapter_from: its weights fit {model.name} by name and shape, and it says that its base is "
        f"{adapter.base or 'unknown'}; there is no hash by which to know that it was trained on these weights",
    )


def show_rows(facts: Facts, *, rows: int, ids: bool) -> Iterator[Text]:
    """The first training rows as the model will see them."""
    dataset = facts.datasets["data"]
    for index in range(min(rows, len(dataset))):
        yield from coloured(dataset.prepare(index), facts.renderer, ids=ids)
    if bad := dataset.rejects.counts.total():
        yield Text(f"{bad:,} rows cannot be used: `tunesmith data check` says why", "yellow")


def regather(plan: Plan, folder: Path | None = None) -> Facts:
    """The facts of an existing plan, whose run folder may have moved. Raises InputError when the rows that it was made
    from have changed."""
    found = gather_as_is(plan, folder)
    refuse_other_rows(plan, found)
    if found.adapter is not None:
        start_of(plan, found.model.path)
    return found


def refuse_other_rows(plan: Plan, found: Facts) -> None:
    """Raises InputError when rows are not those of the plan."""
    for role, report in plan.data.items():
        fingerprint = found.datasets[role].fingerprint
        if fingerprint != report.fingerprint:
            raise InputError(
                f"the file has changed since the plan (sha256 {report.fingerprint[:12]} -> {fingerprint[:12]})",
                where=f"{role}: {report.path}",
                fix="make a new plan, with a new output_dir",
            )


def start_of(plan: Plan, base: Path) -> AdapterFolder | None:
    """The adapter that a run goes on with. Raises InputError when it is not the one of the plan."""
    if "adapter_from" not in plan.choices:
        return None
    adapter = read_adapter(Path(plan["adapter_from"]), base)
    if adapter.sha256 != plan["adapter_sha256"]:
        where, fix = f"adapter_from: {adapter.path}", "put it back, or make a new plan with a new output_dir"
        raise InputError("the adapter has changed since the plan", where=where, fix=fix)
    return adapter


def gather_as_is(plan: Plan, folder: Path | None = None) -> Facts:
    """What the recipe and the dates of a plan give now, whatever has changed since."""
    recipe = kept_recipe(plan.recipe)
    output_dir = Path(plan["output_dir"])
    own_rows = (folder or output_dir) / OWN_ROWS if "rehearsal" in plan.data else None
    return gather(recipe, now=datetime.fromisoformat(plan["now"]), output_dir=output_dir, own_rows=own_rows)
