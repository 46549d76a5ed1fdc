"""A finished run, as an export sees it: its weights, its base, and how it renders prompts.

In: a run folder. Out: `Finished`, checked: the run is complete, its files are as they were written, the base is still
the one that it was trained on. No weights are in memory but the adapter's. Left out: what is made of it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from datetime import datetime
from pathlib import Path

import torch

from tunesmith.core.atomic import damage
from tunesmith.core.errors import GateError, InputError
from tunesmith.core.json_io import from_json, read_json
from tunesmith.core.run_dir import RECORD, failure_of, plan_in, require_run, trained_in
from tunesmith.core.types import ModelSpec, Plan, RunRecord, ScalePoint
from tunesmith.data.chat_template.renderer import Renderer
from tunesmith.data.dataset import Dataset, open_dataset
from tunesmith.model.adapters import METHODS, linears, scale_adapter
from tunesmith.model.causal_lm import LanguageModel, Network, adopt, load_network
from tunesmith.model.hub.adapter_config import WEIGHTS
from tunesmith.model.hub.provenance import check_provenance, hashes_of
from tunesmith.model.hub.resolve import resolve
from tunesmith.model.hub.spec import read_spec
from tunesmith.model.merge import Changes, read_loras, read_rows
from tunesmith.model.new_embeddings import start_rows
from tunesmith.model.quantization import dequantized, skeleton
from tunesmith.model.save import Lora, Rows, load_adapter
from tunesmith.recipe.load import kept_recipe
from tunesmith.recipe.schema import Recipe, sources_of
from tunesmith.session.inputs import renderer_of


@dataclass(frozen=True, eq=False)
class Finished:
    """`weights`: the base, as large as new tokens make it, or the model itself where all of it was trained; then there
    are no `loras`."""

    path: Path
    plan: Plan
    recipe: Recipe
    weights: ModelSpec
    saved: Path  # adapter/ or model/, with the files that serving needs
    loras: Mapping[str, Lora]
    renderer: Renderer
    narrow: frozenset[str] = frozenset()  # paths of the matrices that the adapter was trained beside in 4 bits
    rows: Mapping[str, Rows] = field(default_factory=dict[str, Rows])  # of new tokens, where the adapter has them
    scale: float = 1.0  # of the adapter; `loras` and `rows` are scaled

    @property
    def name(self) -> str:
        """As `tunesmith eval` would call it."""
        return self.path.name if self.scale == 1 else f"{self.path.name}@{self.scale:g}"

    def scaled(self, factor: float) -> Finished:
        """With its adapter times `factor`, as `adapter_scaled` makes it of a network."""
        if factor == 1:
            return self
        loras = {path: lora.times(factor) for path, lora in self.loras.items()}
        start = self.base_network() if self.rows else None
        rows = {p: one.times(factor, start.get_parameter(f"{p}.weight")) for p, one in self.rows.items() if start}
        return replace(self, loras=loras, rows=rows, scale=self.scale * factor)

    @property
    def changes(self) -> Changes:
        """All that the adapter makes of the base."""
        return {**self.loras, **self.rows}

    @property
    def device(self) -> str:
        return "cuda" if torch.cuda.is_available() else "cpu"

    @property
    def curve(self) -> tuple[ScalePoint, ...]:
        """What the run measured of its adapter at several scales."""
        file = self.path / RECORD
        return from_json(RunRecord, read_json(file), where=str(file)).scales

    def base_network(self, *, original: bool = False) -> Network:
        """Stock, in fp32, without the adapter, new tokens as they started: the weights that were trained beside, or the
        files' `original` ones."""
        network = load_network(self.weights.path, torch.float32, self.device)
        for path in () if original else self.narrow:
            weight = network.get_submodule(path).weight
            assert isinstance(weight, torch.Tensor)
            weight.data = dequantized(weight)
        start_rows(network, self.renderer.tokenizer.new if self.rows else ())
        return network

    def live_model(self) -> LanguageModel:
        """What was trained, as our engine runs it, in fp32: base and adapter side by side."""
        network = self.base_network()
        if self.loras:
            METHODS["lora"](network, {key: choice.value for key, choice in self.plan.choices.items()})
            load_adapter(network, self.saved / WEIGHTS)
            scale_adapter(network, self.scale)
        return adopt(network, torch.float32)

    def held_out_rows(self, count: int) -> Dataset:
        """The first rows of the test data, or of what else the recipe names."""
        recipe = self.recipe
        role = next(key for key in ("test_data", "eval_data", "data") if getattr(recipe, key))
        return open_dataset(
            sources_of(recipe, role),
            self.renderer,
            max_examples=count,
            skip_bad=recipe.skip_bad,
        )


def open_finished(path: Path) -> Finished:
    """InputError for a folder that is no finished run, was changed, or whose base was; GateError for a failed run."""
    path = trained_in(path)
    require_run(path)
    if problem := failure_of(path):
        raise GateError(f"this run failed, and is not exported: {problem}", where=str(path))
    plan = plan_in(path)
    saved = path / ("model" if plan["method"] == "full" else "adapter")
    if not (path / RECORD).is_file() or not saved.is_dir():
        raise InputError("this run is not finished", where=str(path), fix=f"finish it: tunesmith resume {path}")
    if problem := damage(saved):
        raise InputError(f"not as the run wrote it: {problem}", where=str(saved), fix="put the files back as they were")
    recipe = kept_recipe(plan.recipe)
    base = resolve(recipe.model)
    renderer = renderer_of(recipe, base, datetime.fromisoformat(plan["now"]))
    check_provenance(saved, hashes_of(base), renderer, plan["now"])
    adapted = plan["method"] != "full"
    weights, rows = read_spec(base if adapted else saved, name=recipe.model), read_rows(saved, base) if adapted else {}
    size = max((change.size(weights.vocab_size) for change in rows.values()), default=weights.vocab_size)
    return Finished(
        path=path,
        plan=plan,
        recipe=recipe,
        weights=replace(weights, vocab_size=size),
        saved=saved,
        loras=read_loras(saved, base) if adapted else {},
        renderer=renderer,
        narrow=frozenset(linears(skeleton(base, torch.float32))) if plan["method"] == "qlora" else frozenset(),
        rows=rows,
    )
