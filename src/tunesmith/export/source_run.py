"""A finished run, as an export sees it: its weights, its base, and how it renders prompts.

In: a run folder. Out: `Finished`, checked: the run is complete, its files are as they were written,
the base is still the one that it was trained on. No weights are in memory but the adapter's. Left
out: what is made of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from datetime import datetime
from pathlib import Path

import torch

from tunesmith.core.atomic import verify_dir
from tunesmith.core.errors import GateError, InputError
from tunesmith.core.json_io import parse_as, read_json
from tunesmith.core.run_dir import (
    RECORD_FILE,
    find_weights_dir,
    read_failure,
    read_run_plan,
    require_run,
)
from tunesmith.core.types import ModelSpec, Plan, RunRecord, ScalePoint
from tunesmith.data.chat_template.renderer import Renderer
from tunesmith.data.dataset import Dataset, open_dataset
from tunesmith.model.adapters import METHODS, find_linears, scale_adapter
from tunesmith.model.causal_lm import Network, PackedCausalLM, load_network, wrap_model
from tunesmith.model.hub.adapter_config import ADAPTER_WEIGHTS_FILE
from tunesmith.model.hub.resolve import resolve_model
from tunesmith.model.hub.spec import read_spec
from tunesmith.model.merge import WeightDeltas, read_loras, read_token_rows
from tunesmith.model.new_embeddings import init_new_rows
from tunesmith.model.quantization import build_empty_network, roundtrip_nf4
from tunesmith.model.save import LoraTensors, TokenRowTensors, load_adapter
from tunesmith.recipe.load import recipe_from_plan
from tunesmith.recipe.schema import Recipe, select_sources
from tunesmith.session.inputs import build_renderer
from tunesmith.session.provenance import check_provenance, hash_weight_files


@dataclass(frozen=True, eq=False)
class SourceRun:
    """`weights`: the base, as large as new tokens make it, or the model itself where all of it was
    trained; then there are no `loras`."""

    path: Path
    plan: Plan
    recipe: Recipe
    model_spec: ModelSpec
    saved_dir: Path  # adapter/ or model/, with the files that serving needs
    loras: Mapping[str, LoraTensors]
    renderer: Renderer
    quantized_paths: frozenset[str] = (
        frozenset()
    )  # paths of the matrices that the adapter was trained beside in 4 bits
    token_rows: Mapping[str, TokenRowTensors] = field(
        default_factory=dict[str, TokenRowTensors]
    )  # of new tokens, where the adapter has them
    scale: float = 1.0  # of the adapter; `loras` and `rows` are scaled

    @property
    def name(self) -> str:
        """As `tunesmith eval` would call it."""
        return self.path.name if self.scale == 1 else f"{self.path.name}@{self.scale:g}"

    def with_scale(self, factor: float) -> SourceRun:
        """With its adapter times `factor`, as `adapter_scaled` makes it of a network."""
        if factor == 1:
            return self
        loras = {path: lora.scale_by(factor) for path, lora in self.loras.items()}
        network = self.load_base_network() if self.token_rows else None
        token_rows = {
            row_path: tensors.scale_by(factor, network.get_parameter(f"{row_path}.weight"))
            for row_path, tensors in self.token_rows.items()
            if network
        }
        return replace(self, loras=loras, token_rows=token_rows, scale=self.scale * factor)

    @property
    def changes(self) -> WeightDeltas:
        """All that the adapter makes of the base."""
        return {**self.loras, **self.token_rows}

    @property
    def device(self) -> str:
        return "cuda" if torch.cuda.is_available() else "cpu"

    @property
    def scale_points(self) -> tuple[ScalePoint, ...]:
        """What the run measured of its adapter at several scales."""
        file = self.path / RECORD_FILE
        return parse_as(RunRecord, read_json(file), where=str(file)).scales

    def load_base_network(self, *, is_original: bool = False) -> Network:
        """Stock, in fp32, without the adapter, new tokens as they started: the weights that were
        trained beside, or the files' `original` ones."""
        network = load_network(self.model_spec.path, torch.float32, self.device)
        for path in () if is_original else self.quantized_paths:
            weight = network.get_submodule(path).weight
            assert isinstance(weight, torch.Tensor)
            weight.data = roundtrip_nf4(weight)
        init_new_rows(network, self.renderer.tokenizer.new_tokens if self.token_rows else ())
        return network

    def load_live_model(self) -> PackedCausalLM:
        """What was trained, as our engine runs it, in fp32: base and adapter side by side."""
        network = self.load_base_network()
        if self.loras:
            METHODS["lora"](network, self.plan.values)
            load_adapter(network, self.saved_dir / ADAPTER_WEIGHTS_FILE)
            scale_adapter(network, self.scale)
        return wrap_model(network, torch.float32)

    def open_held_out_rows(self, count: int) -> Dataset:
        """The first rows of the test data, or of what else the recipe names."""
        recipe = self.recipe
        role = next(key for key in ("test_data", "eval_data", "data") if getattr(recipe, key))
        return open_dataset(
            select_sources(recipe, role),
            self.renderer,
            max_examples=count,
            should_skip_invalid=recipe.skip_bad,
        )


def open_source_run(path: Path) -> SourceRun:
    """InputError for a folder that is no finished run, was changed, or whose base was; GateError
    for a failed run."""
    path = find_weights_dir(path)
    require_run(path)
    if problem := read_failure(path):
        raise GateError(f"this run failed, and is not exported: {problem}", where=str(path))
    plan = read_run_plan(path)
    saved_dir = path / ("model" if plan.config.method == "full" else "adapter")
    if not (path / RECORD_FILE).is_file() or not saved_dir.is_dir():
        raise InputError(
            "this run is not finished", where=str(path), fix=f"finish it: tunesmith resume {path}"
        )
    if problem := verify_dir(saved_dir):
        raise InputError(
            f"not as the run wrote it: {problem}",
            where=str(saved_dir),
            fix="put the files back as they were",
        )
    recipe = recipe_from_plan(plan.recipe)
    base_dir = resolve_model(recipe.model)
    renderer = build_renderer(recipe, base_dir, datetime.fromisoformat(plan.config.now))
    check_provenance(saved_dir, hash_weight_files(base_dir), renderer, plan.config.now)
    is_adapter = plan.config.method != "full"
    model_spec, token_rows = (
        read_spec(base_dir if is_adapter else saved_dir, name=recipe.model),
        read_token_rows(saved_dir, base_dir) if is_adapter else {},
    )
    vocab_size = max(
        (tensors.count_rows(model_spec.vocab_size) for tensors in token_rows.values()),
        default=model_spec.vocab_size,
    )
    return SourceRun(
        path=path,
        plan=plan,
        recipe=recipe,
        model_spec=replace(model_spec, vocab_size=vocab_size),
        saved_dir=saved_dir,
        loras=read_loras(saved_dir, base_dir) if is_adapter else {},
        renderer=renderer,
        quantized_paths=frozenset(find_linears(build_empty_network(base_dir, torch.float32)))
        if plan.config.method == "qlora"
        else frozenset(),
        token_rows=token_rows,
    )
