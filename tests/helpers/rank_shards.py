"""Training loops with frozen weights that several ranks hold together, for `rank_processes`."""

import copy
import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import psutil
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from rank_loops import (
    collect_outcome,
    fail_on_second_rank,
    get_weights,
    iterate_alone,
    limit_memory,
    make_documents,
)
from tiny_loop import SETTINGS, select_steps
from tiny_models import CONFIGS, LORA
from tiny_runs import save_model_folder
from tunesmith.core.errors import MachineError, TunesmithError
from tunesmith.core.ranks import RankFailed, Ranks
from tunesmith.core.types import Batch
from tunesmith.evaluate.loglikelihood import compute_nll
from tunesmith.model.adapters import METHODS, get_trainable_parameters
from tunesmith.model.causal_lm import PackedCausalLM, load_network, wrap_model
from tunesmith.model.experts import Experts
from tunesmith.model.lora import LoraLinear, QuantizedLinear
from tunesmith.model.quantization import load_quantized
from tunesmith.model.text_network import load_text_network
from tunesmith.model.weight_shards import WeightShards, join_ranks
from tunesmith.train.checkpoint import iter_state
from tunesmith.train.loop import TrainingLoop
from tunesmith.train.update_norms import compute_update_ratios

STEPS = 6
FULL_STEPS = 20
CHANGES: dict[str, dict[str, Any]] = {
    "accumulated": {"pack_length": 20},
    "pairs": {"loss": "dpo", "beta": 0.1},  # its reference is a forward without the adapter
}


class Outcome(NamedTuple):
    losses: list[float]
    weights: bytes
    frozen_bytes: int  # of the layers, that this rank holds between two steps


class FullOutcome(NamedTuple):
    losses: list[float]
    weights: np.ndarray  # complete; none on ranks whose parts another one has, too
    state_bytes: int  # of all storages of weights and moments, between two steps
    update_ratios: dict[str, float]  # of the last step


def load_model(
    folder: str,
    ranks: Ranks,
    size: int,
    *,
    method: str = "lora",
    policy: str = "none",
    targets: str | list[str] = "all-linear",
    use_dora: bool = False,
) -> PackedCausalLM:
    """Load a model whose adapters start away from zero; groups of `size` ranks share weights."""
    shards = WeightShards(ranks, size) if size > 1 else None
    load = load_quantized if method == "qlora" else load_network
    with join_ranks(shards):
        network = load(Path(folder), torch.float32, "cpu", shards)
        if shards is not None and method == "full":
            shards.train(network)
        METHODS[method](network, LORA | {"lora_target_modules": targets, "use_dora": use_dora})
    generator = torch.Generator().manual_seed(1)
    if method != "full":
        for parameter in get_trainable_parameters(network).values():
            parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)
    return wrap_model(network, torch.float32, gradient_checkpointing=policy, shards=shards)


def make_sharded_loop(
    ranks: Ranks,
    folder: str,
    size: int,
    kind: str = "rows",
    context_parallel_size: int = 1,
    **how: Any,
) -> TrainingLoop:
    iterate_alone(ranks)
    changes = {"pack_length": 200, "context_parallel_size": context_parallel_size}
    changes |= CHANGES.get(kind, {})
    return TrainingLoop(
        load_model(folder, ranks, size, **how),
        lambda step: make_documents(kind, step),
        dataclasses.replace(SETTINGS, **changes),
        steps=STEPS,
        ranks=ranks,
    )


def save_wide_experts(family: str, folder: Path) -> None:
    """Save a tiny model whose experts are wide beside their 4-bit scales."""
    save_model_folder(folder)  # for its tokenizer
    config = copy.deepcopy(CONFIGS[family])
    config.hidden_size = config.moe_intermediate_size = config.intermediate_size = 64
    config.vocab_size = 259
    config.eos_token_id = 258
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(folder)


@dataclass(frozen=True)
class Case:
    """Steps of `world` ranks, of which groups of `size` share weights."""

    world: int
    size: int
    kind: str = "rows"
    base: str = "llama"
    how: dict[str, Any] = field(default_factory=dict[str, Any])


def train_cases(
    ranks: Ranks, folders: dict[str, str], cases: Sequence[Case]
) -> list[tuple[Outcome, Outcome] | FullOutcome]:
    """Train each case, in processes that start once: with complete and with sharded weights, or all
    weights, which the ranks hold together."""
    outcomes: list[tuple[Outcome, Outcome] | FullOutcome] = []
    for case in cases:
        folder = folders[case.base]
        if case.how.get("method") == "full":
            outcomes.append(train_all_weights(ranks, folder, case.size, case.kind, **case.how))
            continue
        complete = train_sharded(ranks, folder, 1, case.kind, case.how)
        outcomes.append((complete, train_sharded(ranks, folder, case.size, case.kind, case.how)))
    return outcomes


def train_sharded(ranks: Ranks, folder: str, size: int, kind: str, how: dict[str, Any]) -> Outcome:
    training = make_sharded_loop(ranks, folder, size, kind, **how)
    steps = select_steps(list(training))
    weights = get_weights(training).tobytes()
    return Outcome([step.loss for step in steps], weights, count_frozen_bytes(training.model))


def train_all_weights(
    ranks: Ranks, folder: str, size: int, kind: str, *, has_memory: bool = True, **how: Any
) -> FullOutcome:
    """Train all weights, of which `size` ranks hold parts, for 20 steps. Without `has_memory`, rank
    1 has little."""
    training = make_sharded_loop(ranks, folder, size, kind, **how)
    training.total_steps = FULL_STEPS
    training.config = dataclasses.replace(training.config, probe_steps=FULL_STEPS)
    if not has_memory:
        limit_memory(training)
    losses = [step.loss for step in select_steps(list(training))]
    training.compare_ranks()
    held = [*training.model.network.parameters(), *training.parameters.values()]
    for moments in training.optimizer.state.values():
        held += [moments["exp_avg"], moments["exp_avg_sq"]]
    storages = {id(tensor.untyped_storage()): tensor.untyped_storage() for tensor in held}
    layers = training.shards.trained if training.shards else []
    tensors: dict[str, Tensor] = {}
    if not layers or ranks.rank < size:
        for state in iter_state(training.parameters, training.optimizer, layers):
            tensors |= state
    weights = [t.numpy().ravel() for key, t in sorted(tensors.items()) if "weight." in key[:7]]
    complete = np.concatenate(weights) if weights else np.zeros(0)
    ratios = training.update_ratios
    ratios = ratios or compute_update_ratios(training.model.network, training.optimizer, {})
    return FullOutcome(losses, complete, sum(s.nbytes() for s in storages.values()), ratios)


def count_frozen_bytes(model: PackedCausalLM) -> int:
    """Return the bytes of all storages with frozen weights of the layers, and of the parts."""
    storages = {id(tensor.untyped_storage()): tensor for tensor in _iter_frozen(model)}
    total = sum(tensor.untyped_storage().nbytes() for tensor in storages.values())
    parts = [layer.part_B for layer in model.shards.layers] if model.shards else []
    return total + sum(part_B.nbytes for part_B in parts)


def _iter_frozen(model: PackedCausalLM) -> Iterator[Tensor]:
    layers: nn.ModuleList = model.decoder.layers
    for module in layers.modules():
        if isinstance(module, LoraLinear | QuantizedLinear):
            yield from module.frozen.list_tensors()
        if isinstance(module, Experts):
            for weight in module.list_quantized().values():
                yield from weight.list_tensors()
        yield from (p for p in module.parameters(recurse=False) if not p.requires_grad)


def record_gathers(ranks: Ranks, folder: str) -> list[str]:
    """Return in which order layers compute, in the forward pass of a step of one pack, and others
    begin to be gathered."""
    training = make_sharded_loop(ranks, folder, 2)
    record: list[str] = []
    start_gather = ranks.start_gather

    def start_and_record(*args: Any, **kwargs: Any) -> Any:
        record.append("ahead")
        return start_gather(*args, **kwargs)

    ranks.start_gather = start_and_record  # type: ignore[method-assign]
    layers: nn.ModuleList = training.model.decoder.layers
    for number, layer in enumerate(layers):
        layer.register_forward_pre_hook(lambda *_, number=number: record.append(f"layer {number}"))
    next(training)
    del ranks.start_gather
    return record


def count_read_bytes(ranks: Ranks, folder: str) -> tuple[int, int, int]:
    """Return how many bytes are read to load all weights, and one of two parts, and the bytes of
    all layers."""
    process = psutil.Process()
    before = process.io_counters().read_chars
    network = load_text_network(Path(folder), torch.float32)
    complete = process.io_counters().read_chars
    load_text_network(Path(folder), torch.float32, shards=WeightShards(ranks, 2))
    part = process.io_counters().read_chars
    layers: nn.ModuleList = network.base_model.layers  # pyright: ignore[reportAssignmentType]
    layer_bytes = sum(parameter.nbytes for parameter in layers.parameters())
    return complete - before, part - complete, layer_bytes


# ---------------------------------------------------------------- faults


def train_with_little_memory(ranks: Ranks, folder: str) -> list[tuple[list[str], bytes]]:
    """Train where rank 1 has memory for few tokens, with complete and with sharded weights; return
    verdicts and weights of each."""
    outcomes: list[tuple[list[str], bytes]] = []
    for size in (1, ranks.world):
        training = make_sharded_loop(ranks, folder, size)
        limit_memory(training)
        outcomes.append(collect_outcome(training))
    return outcomes


def train_all_weights_with_little_memory(ranks: Ranks, folder: str) -> list[FullOutcome]:
    """Train where rank 1 has memory for few tokens, with complete weights and with parts."""
    outcomes: list[FullOutcome] = []
    for size in (1, ranks.world):
        outcome = train_all_weights(ranks, folder, size, "rows", method="full", has_memory=False)
        outcomes.append(outcome)
    return outcomes


def run_out_of_memory_together(ranks: Ranks, folder: str) -> str:
    """Let rank 1 have no memory for its tokens of a document, and rank 0 wait for them; return what
    rank 0 says."""
    training = make_sharded_loop(ranks, folder, 2, context_parallel_size=2)
    return fail_on_second_rank(ranks, training)


def _fail(_: Batch) -> Tensor:
    raise MachineError("no disk")


def measure_where_the_last_rank_fails(ranks: Ranks, folder: str) -> str:
    """Let the last rank fail while the others need its part of a layer; return what this one
    says."""
    model = load_model(folder, ranks, ranks.world)
    model.network.eval()
    model.ranks = ranks
    ranks.is_lockstep = True
    if ranks.rank == ranks.world - 1:
        model.compute_hidden = _fail  # type: ignore[method-assign]
    try:
        list(compute_nll(model, make_documents("rows", 1), 20))
    except TunesmithError as error:
        return str(error)
    return "no error"


def fail_on_rank_1(ranks: Ranks, folder: str) -> str:
    """Let rank 1 fail while rank 0 needs its part of a layer; return what each rank says."""
    training = make_sharded_loop(ranks, folder, 2)
    if ranks.rank == 1:
        training.model.compute_hidden = _fail  # type: ignore[method-assign]
    try:
        next(training)
    except RankFailed as error:
        return f"failed: {error.message}"
    except MachineError as error:
        return error.message
    return "no error"
