"""A finished run as an export sees it: its adapter, its base model, its renderer.

In: a run folder. Out: a SourceRun, checked: the run is finished, its files are unchanged, and so is
the base that it was trained on. Only the adapter's weights are in memory.
Left out: what it is exported to (export.py).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from datetime import datetime
from pathlib import Path

import torch

from tunesmith.core.atomic import verify_dir
from tunesmith.core.errors import GateError, InputError
from tunesmith.core.hub_names import remove_commit
from tunesmith.core.run_dir import (
    RECORD_FILE,
    find_weights_dir,
    read_failure,
    read_run_plan,
    read_run_record,
    require_run,
)
from tunesmith.core.types import ModelSpec, Plan, ScalePoint
from tunesmith.data.chat_template.renderer import Renderer
from tunesmith.data.dataset import Dataset, open_dataset
from tunesmith.model.adapters import METHODS, find_linears, scale_adapter
from tunesmith.model.causal_lm import Network, PackedCausalLM, load_network, wrap_model
from tunesmith.model.hub.adapter_config import ADAPTER_WEIGHTS_FILE
from tunesmith.model.hub.resolve import resolve_model
from tunesmith.model.hub.spec import read_spec
from tunesmith.model.merge import (
    WeightDeltas,
    read_loras,
    read_saved_modules,
    read_token_rows,
)
from tunesmith.model.new_embeddings import init_new_rows
from tunesmith.model.quantization import build_empty_network, roundtrip_network
from tunesmith.model.save import (
    AnyLora,
    ModuleTensor,
    TokenRowTensors,
    get_merge_target,
    load_adapter,
)
from tunesmith.recipe.load import rebuild_recipe
from tunesmith.recipe.schema import Recipe, select_sources
from tunesmith.session.hub_data import fetch_sources
from tunesmith.session.identity import check_provenance
from tunesmith.session.inputs import build_renderer


@dataclass(frozen=True, eq=False)
class SourceRun:
    """A checked, finished run.

    model_spec: the base, with the vocabulary that added tokens give it; or the fully trained model,
    which has no `loras`. `loras`, `token_rows` and `modules` are
    scaled by `scale`.
    """

    path: Path
    plan: Plan
    recipe: Recipe
    base_dir: Path  # the weights that training started from
    model_spec: ModelSpec
    saved_dir: Path  # adapter/ or model/, with the files that serving needs
    loras: Mapping[str, AnyLora]
    renderer: Renderer
    # Paths of the matrices that were quantized to 4 bits in training.
    quantized_paths: frozenset[str] = frozenset()
    # The adapter's embeddings of added tokens.
    token_rows: Mapping[str, TokenRowTensors] = field(default_factory=dict[str, TokenRowTensors])
    # The modules that were trained in full beside the adapter.
    modules: Mapping[str, ModuleTensor] = field(default_factory=dict[str, ModuleTensor])
    scale: float = 1.0

    @property
    def name(self) -> str:
        """The name of the run, as `tunesmith eval` takes it."""
        return self.path.name if self.scale == 1 else f"{self.path.name}@{self.scale:g}"

    def with_scale(self, factor: float) -> SourceRun:
        """Return the run with its adapter scaled, as `scaled_adapter` does in a network."""
        if factor == 1:
            return self
        loras = {path: lora.scale_by(factor) for path, lora in self.loras.items()}
        token_rows: dict[str, TokenRowTensors] = {}
        modules: dict[str, ModuleTensor] = {}
        if self.token_rows or self.modules:
            network = self.load_base_network()
            for row_path, tensors in self.token_rows.items():
                weight = network.get_parameter(f"{row_path}.weight")
                token_rows[row_path] = tensors.scale_by(factor, weight)
            for key, module_tensor in self.modules.items():
                modules[key] = module_tensor.scale_by(factor, get_merge_target(network, key))
        scale = self.scale * factor
        return replace(self, loras=loras, token_rows=token_rows, modules=modules, scale=scale)

    @property
    def changes(self) -> WeightDeltas:
        """All changes of the adapter to the base."""
        return {**self.loras, **self.token_rows, **self.modules}

    @property
    def scale_points(self) -> tuple[ScalePoint, ...]:
        """The run's measurements of its adapter at several scales."""
        return read_run_record(self.path).scales

    def load_base_network(self) -> Network:
        """Return the stock base in fp32, with the initial embeddings of added tokens.

        Matrices that were quantized in training are dequantized again.
        """
        # on the CPU, whose memory is larger: in fp32 a model takes twice the memory of its training
        network = load_network(self.model_spec.path, torch.float32)
        if self.quantized_paths:
            roundtrip_network(network)
        init_new_rows(network, self.renderer.tokenizer.new_tokens if self.token_rows else ())
        return network

    def load_untrained_network(self) -> Network:
        """Return what training of all weights started from, in fp32."""
        network = load_network(self.base_dir, torch.float32)
        init_new_rows(network, self.renderer.tokenizer.new_tokens)
        return network

    def load_live_model(self) -> PackedCausalLM:
        """Return the base with its unmerged adapter in our engine, in fp32."""
        network = self.load_base_network()
        if self.loras:
            METHODS["lora"](network, self.plan.values)
            load_adapter(network, self.saved_dir / ADAPTER_WEIGHTS_FILE)
            scale_adapter(network, self.scale)
        return wrap_model(network, torch.float32)

    def open_held_out_rows(self, count: int) -> Dataset:
        """Return the first rows of test_data, or else of eval_data or data."""
        recipe = self.recipe
        roles = ("eval_data", "data") if recipe.has_no_test else ("test_data", "eval_data", "data")
        role = next(key for key in roles if getattr(recipe, key))
        return open_dataset(
            fetch_sources(select_sources(recipe, role)),
            self.renderer,
            max_examples=count,
            skip_invalid=recipe.skip_invalid,
        )


def open_source_run(path: Path) -> SourceRun:
    """Open and check a finished run.

    Raises InputError for a folder that is not a finished run or that was changed, also in its base
    model; GateError for a failed run.
    """
    path = find_weights_dir(path)
    require_run(path)
    if problem := read_failure(path):
        raise GateError(f"this run failed, and cannot be exported: {problem}", where=str(path))
    plan = read_run_plan(path)
    is_adapter = plan.config.method != "full"
    saved_dir = path / ("adapter" if is_adapter else "model")
    if not (path / RECORD_FILE).is_file() or not saved_dir.is_dir():
        fix = f"finish it: tunesmith resume {path}"
        raise InputError("this run is not finished", where=str(path), fix=fix)
    if problem := verify_dir(saved_dir):
        message = f"the files differ from what the run wrote: {problem}"
        raise InputError(message, where=str(saved_dir), fix="restore the files")
    recipe = rebuild_recipe(plan.recipe)
    base_dir = resolve_model(recipe.model)
    renderer = build_renderer(recipe, base_dir, datetime.fromisoformat(plan.config.now))
    check_provenance(saved_dir, base_dir, renderer, plan.config.now)
    model_spec = read_spec(base_dir if is_adapter else saved_dir, name=remove_commit(recipe.model))
    token_rows = read_token_rows(saved_dir, base_dir) if is_adapter else {}
    vocab_size = model_spec.vocab_size
    if token_rows:
        vocab_size = max(rows.count_rows(vocab_size) for rows in token_rows.values())
    quantized_paths: frozenset[str] = frozenset()
    if plan.config.method == "qlora":
        quantized_paths = frozenset(find_linears(build_empty_network(base_dir, torch.float32)))
    return SourceRun(
        path=path,
        plan=plan,
        recipe=recipe,
        base_dir=base_dir,
        model_spec=replace(model_spec, vocab_size=vocab_size),
        saved_dir=saved_dir,
        loras=read_loras(saved_dir, base_dir) if is_adapter else {},
        renderer=renderer,
        quantized_paths=quantized_paths,
        token_rows=token_rows,
        modules=read_saved_modules(saved_dir, base_dir) if is_adapter else {},
    )
