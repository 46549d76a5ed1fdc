"""Open the base and the adapters of a server, from folders alone: no data set is needed.

    base = open_base("smollm2-135m-instruct", now)
    source = open_adapter("runs/demo-1@0.5", base)

In: names as the command line has them. Out: `BaseSource` and `AdapterSource`: the checked folder,
the adapter's own chat template and end tokens, and a digest of everything that decides its answers.
An adapter that belongs to another base, tokenizer or template is an InputError that says so. Left
out: weights in memory (registry.py)."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from functools import cached_property
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from weakref import WeakValueDictionary

from tunesmith.core.atomic import MANIFEST, hash_file, read_sealed_files, verify_dir
from tunesmith.core.errors import GateError, InputError
from tunesmith.core.json_io import dump_json, read_json_object
from tunesmith.core.run_dir import ADAPTER_DIR, find_weights_dir, read_failure, read_run_plan
from tunesmith.core.types import Json, Plan, require
from tunesmith.data.chat_template.renderer import Renderer
from tunesmith.evaluate.model_ref import SCALE_SUFFIX, parse_model_ref
from tunesmith.evaluate.scale_choice import MAX_SCALE
from tunesmith.model.adapters import METHODS, get_trainable_parameters
from tunesmith.model.causal_lm import DTYPES, load_network
from tunesmith.model.hub.adapter_config import (
    ADAPTER_CONFIG_FILE,
    AdapterFolder,
    read_adapter,
)
from tunesmith.model.hub.resolve import resolve_model
from tunesmith.model.hub.spec import read_spec
from tunesmith.model.hub.stored_tensors import read_parameter_headers
from tunesmith.model.hub.validate import (
    TensorHeader,
    check_files,
    read_model_json,
)
from tunesmith.model.save import STATE_FILE, load_weights, save_adapter, save_serving_files
from tunesmith.recipe.fields import Constraint
from tunesmith.recipe.load import rebuild_recipe
from tunesmith.serve.settings import name_source
from tunesmith.session.datasets import read_response_schema
from tunesmith.session.identity import (
    PROVENANCE_FILE,
    Provenance,
    build_provenance,
    check_checkpoint,
    check_provenance,
    hash_weight_files,
    read_provenance,
    write_provenance,
)
from tunesmith.session.inputs import build_renderer

TOKENIZER_FILE = "tokenizer.json"
ADAPTER_FIELDS: Json = {"schema": None, "weights_sha256": ""}


@dataclass(frozen=True, eq=False)
class BaseSource:
    """The base model's folder, tokenizer and template."""

    name: str
    path: Path
    renderer: Renderer
    context_length: int
    vocab_size: int
    weights_sha256: dict[str, str]  # file name -> hash of each weight file
    now: datetime  # the date that templates see
    scratch: TemporaryDirectory[str]  # for adapters that are written from checkpoints
    # what many adapters have in common is checked once
    renderers: WeakValueDictionary[str, Renderer] = field(default_factory=WeakValueDictionary)
    checked_records: set[str] = field(default_factory=set[str])  # of adapters that belong to it

    @cached_property
    def headers(self) -> Mapping[str, TensorHeader]:
        return read_parameter_headers(self.path)

    @cached_property
    def sha256(self) -> str:
        """The hash of all weights."""
        return hashlib.sha256(dump_json(self.weights_sha256)).hexdigest()


@dataclass(frozen=True, eq=False)
class AdapterSource:
    """A checked adapter that is not in memory yet. `digest` is the sha256 of all that decides its
    answers; `label` names its run without a path."""

    label: str
    folder: AdapterFolder
    renderer: Renderer
    digest: str
    scale: float
    schema: Json | None  # response_schema of its run
    provenance: Provenance | None  # None for weights of other tools
    constraints: tuple[Constraint, ...] = ()  # `never` of its run


def open_base(name: str, now: datetime) -> BaseSource:
    """Open the base model; it is downloaded if it is not there."""
    folder = resolve_model(name)
    spec = read_spec(folder, name=name)
    renderer = Renderer.from_folder(folder, now=now, embedding_rows=spec.token_rows)
    return BaseSource(
        name=name,
        path=folder,
        renderer=renderer,
        context_length=spec.context_length,
        vocab_size=spec.vocab_size,
        weights_sha256=hash_weight_files(folder),
        now=now,
        scratch=TemporaryDirectory(prefix="tunesmith-serve-"),
    )


def find_base_name(ref: str) -> str:
    """Return the base that an adapter names: that of its run, or of its folder."""
    run = _find_run(ref)
    if run is not None:
        return str(rebuild_recipe(read_run_plan(run).recipe).model)
    folder = _find_adapter(ref)
    provenance = read_provenance(folder)
    if provenance is not None:
        return provenance.base
    name = read_json_object(folder / ADAPTER_CONFIG_FILE).get("base_model_name_or_path")
    if not name:
        fix = "name it: --base MODEL"
        raise InputError("the adapter does not name its base model", where=ref, fix=fix)
    return str(name)


def find_dtype(ref: str) -> str | None:
    """Return the dtype that a run was trained and measured in, None for an adapter folder."""
    run = _find_run(ref)
    return None if run is None else read_run_plan(run).config.dtype


def open_adapter(ref: str, base: BaseSource, *, is_unproven_allowed: bool = False) -> AdapterSource:
    """Open RUN, RUN@SCALE, RUN/checkpoints/step-N, FOLDER or FOLDER@SCALE of an adapter for a base.

    Raises InputError for an adapter that does not belong to the base, GateError for a run that a
    gate has stopped."""
    run = _find_run(ref)
    scale = parse_model_ref(ref).scale
    if run is None:
        ref, scale = _split_scale(ref)
    plan = read_run_plan(run) if run is not None else None
    if run is not None and plan is not None:
        _refuse_method(run, plan)
    model_ref = parse_model_ref(ref)
    if model_ref.checkpoint_dir is not None:
        folder = _write_checkpoint_adapter(model_ref.checkpoint_dir, require(plan), base)
    else:
        folder = _find_adapter(ref)
        if run is not None:
            _refuse_unfinished(run, folder)
    provenance = read_provenance(folder)
    check_files(folder)
    adapter = read_adapter(folder, base.path, base_headers=base.headers)
    if provenance is None and not is_unproven_allowed:
        message = "there is no tunesmith.json, so nothing shows that it belongs to this base"
        raise InputError(message, where=ref, fix="set unproven: true to serve it all the same")
    has_tokenizer = (folder / TOKENIZER_FILE).is_file()
    variables = {} if provenance is None else provenance.variables
    renderer = _open_renderer(folder if has_tokenizer else base.path, base, variables)
    if provenance is not None:
        _refuse_other_weights(adapter, provenance)
        _check_record(folder, renderer, base)
    return AdapterSource(
        label=name_source(ref),
        folder=adapter,
        renderer=renderer,
        digest=_compute_digest(adapter, renderer, base),
        scale=scale,
        schema=provenance.schema if provenance is not None else None,
        provenance=provenance,
        constraints=() if plan is None else tuple(rebuild_recipe(plan.recipe).never),
    )


def _open_renderer(folder: Path, base: BaseSource, variables: Json) -> Renderer:
    """Load the tokenizer and template of an adapter. Adapters with the same files share them: they
    are most of the time that opening one takes."""
    identity: list[Any] = [variables]
    for file in sorted(folder.rglob("*")):
        is_other = file.name in (ADAPTER_CONFIG_FILE, PROVENANCE_FILE, MANIFEST)
        if file.suffix in (".json", ".jinja") and not is_other and file.is_file():
            identity.append([file.relative_to(folder).as_posix(), hash_file(file)])
    key = hashlib.sha256(dump_json(identity)).hexdigest()
    renderer = base.renderers.get(key)
    if renderer is None:
        renderer = Renderer.from_folder(
            folder, now=base.now, variables=variables, embedding_rows=base.vocab_size
        )
        base.renderers[key] = renderer
    return renderer


def _refuse_other_weights(adapter: AdapterFolder, provenance: Provenance) -> None:
    """Raise InputError unless the weights are those of the record; a checkpoint's has no hash."""
    recorded = provenance.weights_sha256
    if recorded not in ("", adapter.sha256):
        message = f"its weights are not those recorded: sha256 {recorded[:12]} -> "
        fix = "copy the adapter folder again"
        raise InputError(f"{message}{adapter.sha256[:12]}", where=str(adapter.path), fix=fix)


def _check_record(folder: Path, renderer: Renderer, base: BaseSource) -> None:
    """Check the record of an adapter against the base, once for all that have the same but for
    schema and weights: its prompts are rendered again. Raises InputError."""
    common = read_json_object(folder / PROVENANCE_FILE) | ADAPTER_FIELDS
    record = json.dumps(common, sort_keys=True)
    key = hashlib.sha256(f"{renderer.fingerprint} {record}".encode()).hexdigest()
    if key not in base.checked_records:
        check_provenance(folder, base.path, renderer, base.now.isoformat(), base.weights_sha256)
        base.checked_records.add(key)


# ---------------------------------------------------------------- runs and folders


def _find_run(ref: str) -> Path | None:
    """Return the run folder that a name refers to, None for an adapter folder without a run."""
    run = parse_model_ref(ref).run_dir
    return None if run is None else find_weights_dir(run)


def _split_scale(ref: str) -> tuple[str, float]:
    """Return an adapter folder and the scale behind it, 1 without one."""
    suffix = SCALE_SUFFIX.search(ref)
    if suffix is None or Path(ref).exists():
        return ref, 1.0
    scale = float(suffix[0][1:])
    if scale > MAX_SCALE:
        fix = f"use a number from 0 to {MAX_SCALE:g}"
        raise InputError(f"invalid scale {scale:g}", where=ref, fix=fix)
    return ref[: suffix.start()], scale


def _find_adapter(ref: str) -> Path:
    """Return the adapter folder that a name refers to."""
    run = _find_run(ref)
    folder = Path(ref) if run is None else run / ADAPTER_DIR
    if run is None and not (folder / ADAPTER_CONFIG_FILE).is_file():
        fix = "name a run folder or an adapter folder; a base is named with --base"
        raise InputError("there is no adapter in this folder", where=ref, fix=fix)
    return folder


def _refuse_method(run: Path, plan: Plan) -> None:
    """Raise InputError for a run whose weights this kind of base cannot take."""
    where = str(run)
    if plan.config.method == "full":
        fix = f"serve it as a base: tunesmith serve --base {run / 'model'}"
        raise InputError("this run trained all weights, and has no adapter", where=where, fix=fix)
    if plan.config.method == "qlora":
        message = "this adapter was trained on a 4-bit base, but the base is served in 16 bits"
        fix = f"merge it: tunesmith export {run} --to merged, and serve that as the base"
        raise InputError(message, where=where, fix=fix)


def _refuse_unfinished(run: Path, folder: Path) -> None:
    """Raise for a run without an adapter, or with one that is not as the run wrote it."""
    if problem := read_failure(run):
        raise GateError(f"this run failed: {problem}", where=str(run))
    if not folder.is_dir():
        fix = f"finish it: tunesmith resume {run}"
        raise InputError("this run has no adapter yet", where=str(run), fix=fix)
    if problem := verify_dir(folder):
        message = f"not as the run wrote it: {problem}"
        raise InputError(message, where=str(folder), fix="restore the files")


def _write_checkpoint_adapter(checkpoint: Path, plan: Plan, base: BaseSource) -> Path:
    """Write the adapter of a checkpoint in PEFT's format, with the template of its run, into the
    scratch folder, once: a model that is served already may read it again. Raises InputError for a
    damaged checkpoint, and for one of another base or template."""
    if not checkpoint.is_dir():
        names = sorted(path.name for path in checkpoint.parent.iterdir())
        fix = f"available checkpoints: {', '.join(names) or 'none'}"
        raise InputError("no such checkpoint", where=str(checkpoint), fix=fix)
    if problem := verify_dir(checkpoint):
        message = f"the checkpoint was changed or damaged: {problem}"
        raise InputError(message, where=str(checkpoint), fix="use another checkpoint")
    recipe = rebuild_recipe(plan.recipe)
    renderer = build_renderer(recipe, base.path, base.now, base.vocab_size)
    check_checkpoint(checkpoint, base.path, renderer, base.weights_sha256)
    state = read_sealed_files(checkpoint)[STATE_FILE].sha256
    name = hashlib.sha256(f"{checkpoint} {state}".encode()).hexdigest()
    folder = Path(base.scratch.name) / name
    if (folder / PROVENANCE_FILE).is_file():  # is written last
        return folder
    network = load_network(base.path, DTYPES[plan.config.dtype])
    METHODS[plan.config.method](network, plan.values)
    load_weights(checkpoint, get_trainable_parameters(network))
    save_adapter(network, folder, plan.values, base.path)
    templates = {name: template.source for name, template in renderer.templates.items()}
    save_serving_files(folder, base.path, templates=templates, end_ids=renderer.end_ids)
    config = read_model_json(base.path / "config.json")
    now = base.now.isoformat()
    schema = read_response_schema(recipe.response_schema)
    provenance = build_provenance(
        base.name, base.weights_sha256, config, renderer, now, schema=schema
    )
    write_provenance(folder, provenance)
    return folder


def _compute_digest(adapter: AdapterFolder, renderer: Renderer, base: BaseSource) -> str:
    """Return the sha256 of all that decides the answers of an adapter, but for its scale."""
    identity = [
        base.sha256,
        adapter.sha256,
        [adapter.rank, adapter.alpha, adapter.use_rslora, adapter.use_dora],
        [dict(adapter.rank_pattern), dict(adapter.alpha_pattern)],
        renderer.fingerprint,
        list(renderer.end_ids),
    ]
    return hashlib.sha256(dump_json(identity)).hexdigest()
