"""What the ranks other than 0 do while rank 0 measures: their share of its items.

    start     load the inputs of a plan, and the model that training starts from
    score     compute the losses or divergences of some packs
    generate  answer some prompts
    weights   take over the trained weights of rank 0

Rank 0 says what is computed, and gets the results; the others throw them away. A problem here is
told with the next results. In: commands (evaluate/shared_items.py). Out: results, for rank 0. Left
out: training (follow.py)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch

from tunesmith.core.errors import InputError, TunesmithError
from tunesmith.core.json_io import parse_as
from tunesmith.core.ranks import Ranks
from tunesmith.core.types import GenerationRequest, Json, Plan
from tunesmith.evaluate.kl_divergence import KL_SCORER
from tunesmith.evaluate.loglikelihood import GREEDY_SCORER, NLL_SCORER
from tunesmith.evaluate.shared_items import (
    GENERATE,
    SCORE,
    generate_share,
    parse_pack,
    score_share,
)
from tunesmith.model.adapters import (
    get_adapter_scales,
    get_trainable_parameters,
    set_adapter_scales,
)
from tunesmith.model.causal_lm import PackedCausalLM
from tunesmith.model.generation.engine import DecodeFn
from tunesmith.session import inputs
from tunesmith.session.identity import hash_source
from tunesmith.session.session import load_starting_model

START = "start"
WEIGHTS = "weights"
SOURCE_CHANGE = "other source files of tunesmith"
SCORERS = {scorer.name: scorer for scorer in (NLL_SCORER, GREEDY_SCORER, KL_SCORER)}


def start_measuring(
    model: PackedCausalLM, plan: Plan, ranks: Ranks, path: Path | None = None
) -> None:
    """Share out what is measured with this model, which training starts from; `path` is its run
    folder."""
    model.ranks = ranks
    path_text = None if path is None else str(path.absolute())
    ranks.send(START, plan=plan, path=path_text, source=hash_source())


def send_weights(model: PackedCausalLM) -> None:
    """Give the other ranks the trained weights of rank 0."""
    if model.ranks.world > 1:
        model.ranks.send(WEIGHTS)
        _share_weights(model)


def _share_weights(model: PackedCausalLM) -> None:
    """Replace the trained weights of all ranks by those of rank 0."""
    for parameter in get_trainable_parameters(model.network).values():
        # a sum with zeros, which changes no bit
        weights = parameter.detach().clone()
        if not model.ranks.is_main:
            weights.zero_()
        model.ranks.sum_(weights)
        with torch.no_grad():
            parameter.copy_(weights)


class MeasuringFollower:
    """A rank that is not rank 0, while rank 0 measures. `problem` is what went wrong here."""

    def __init__(self, ranks: Ranks) -> None:
        self.ranks = ranks
        self.problem: TunesmithError | None = None
        self._model: PackedCausalLM | None = None
        self._decode: DecodeFn | None = None
        self.commands: dict[str, Callable[..., None]] = {
            START: self._start,
            SCORE: self._score,
            GENERATE: self._generate,
            WEIGHTS: self._take_weights,
        }

    def use_model(self, model: PackedCausalLM | None, decode: DecodeFn | None) -> None:
        """Measure with a model from now on, or with none."""
        self._model = model
        self._decode = decode
        if model is not None:
            model.ranks = self.ranks

    def _start(self, plan: Json, path: str | None, source: str) -> None:
        self.use_model(None, None)
        if source != hash_source():
            message = f"{SOURCE_CHANGE} than rank 0 has"
            raise InputError(message, where=self.ranks.name, fix="install one version everywhere")
        start_plan = parse_as(Plan, plan)
        folder = None if path is None else Path(path)
        run_inputs = inputs.reload_inputs_unchecked(start_plan, folder)
        self.use_model(load_starting_model(start_plan, run_inputs), run_inputs.renderer.decode)

    def _score(
        self, scorer: str, packs: list[Json], num_documents: int, scales: list[float]
    ) -> None:
        with self._measuring(scales) as model:
            if model is not None:
                indexed = [parse_pack(pack) for pack in packs]
                _run(score_share(model, indexed, SCORERS[scorer], num_documents))

    def _generate(self, requests: list[Json], end_ids: list[int], scales: list[float]) -> None:
        with self._measuring(scales) as model:
            if model is not None:
                assert self._decode is not None, "it comes with the model"
                parsed = list(parse_as(tuple[GenerationRequest, ...], requests))
                _run(generate_share(model, parsed, decode=self._decode, end_ids=end_ids))

    def _take_weights(self) -> None:
        if self._model is not None:
            _share_weights(self._model)

    @contextmanager
    def _measuring(self, scales: list[float]) -> Iterator[PackedCausalLM | None]:
        """Yield the model with the adapter scales of rank 0; None after a problem, which rank 0
        hears instead of results. What goes wrong meanwhile is told with the results."""
        model = self._model
        if self.problem is not None or model is None:
            assert self.problem is not None, "rank 0 measures before it has said with which model"
            with suppress(TunesmithError):
                self.ranks.gather_answers(None, self.problem)
            yield None
            return
        previous_scales = get_adapter_scales(model.network)
        set_adapter_scales(model.network, scales)
        model.network.eval()
        with suppress(TunesmithError):
            yield model
        set_adapter_scales(model.network, previous_scales)


def _run(results: Iterable[Any]) -> None:
    for _ in results:
        pass
