"""The training loop, the same one for every method, loss, packing and device.

    for event in TrainingLoop(model, load_documents, config, steps=steps): ...

Iterating runs the training and yields its events; `save`, `restore` and `stop` are legal between
two events, and all state is in the object. A step that does not fit in memory is repeated with
smaller packs, which changes its speed and not its update. Of several ranks each computes its
share of every step; rank 0 says what comes next, and the loops of the others do it
(follow.py).

In: a PackedCausalLM with trainable parameters, a function from step to documents, the plan's
values. Out: TrainStep, CheckResult and TrainingEnd events. Left out: reactions to events (guard,
run folder, display), evaluation, choosing any value (plan)."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from pydantic import NonNegativeInt, PositiveInt
from torch import Tensor

from tunesmith.core.errors import GateError, MachineError
from tunesmith.core.events import CheckResult, Event, Rollback, TrainingEnd, TrainStep
from tunesmith.core.hardware import read_peak_bytes, release_memory
from tunesmith.core.json_io import parse_as
from tunesmith.core.ranks import SINGLE_PROCESS, Ranks
from tunesmith.core.token_shard import TokenShard, refuse_group_size
from tunesmith.core.types import Document, Json, Pack, PlanConfig
from tunesmith.data.collate import collate
from tunesmith.data.packing import count_computed_tokens, group_units, pack_step, share_out
from tunesmith.data.sampler import prefetch
from tunesmith.model.adapters import get_trainable_parameters
from tunesmith.model.causal_lm import PackedCausalLM
from tunesmith.model.kernels import ops
from tunesmith.model.layer_shards import get_complete_shape
from tunesmith.model.machine_errors import OutOfMemory, machine_errors
from tunesmith.model.new_embeddings import collect_new_rows
from tunesmith.model.safetensors_io import find_nonfinite
from tunesmith.model.weight_shards import join_ranks
from tunesmith.train.all_reduce import StepShare, check_replicas, sum_step
from tunesmith.train.checkpoint import (
    RESTORE_CHECKPOINT_FIX,
    TRAINER_STATE_FILE,
    iter_state,
    read_state,
    write_state,
)
from tunesmith.train.kto import measure_kl, split_mismatched
from tunesmith.train.losses import LossConfig, LossNormalizer, compute_step_terms
from tunesmith.train.neftune import add_embedding_noise
from tunesmith.train.optimizer import (
    SCALE_KIND,
    LossScale,
    OptimizerInBackward,
    clip_gradients,
    compute_learning_rate,
    make_optimizer,
    set_learning_rate,
    step_optimizer,
)
from tunesmith.train.update_norms import sum_update_ratios

# What rank 0 tells the others: take the step, restore the checkpoint, compare the weights, send
# their parts of the state.
STEP = "step"
RESTORE = "restore"
COMPARE = "compare"
COLLECT = "collect"
MAX_BAD_STEPS = 3  # consecutive non-finite steps that end a run


@dataclass(frozen=True)
class TrainerState:
    """The position of a checkpoint: what a loop goes on with besides weights and moments."""

    step: NonNegativeInt
    seconds: float
    bad_steps: NonNegativeInt
    pack_length: PositiveInt
    ratios: tuple[tuple[int, float], ...]
    rollbacks: tuple[Rollback, ...]


POSITION_FIELDS = tuple(field.name for field in dataclasses.fields(TrainerState))


def build_loss_config(config: PlanConfig) -> LossConfig:
    """Return the loss of preference pairs, or of rows and banned spans."""
    label_smoothing = config.label_smoothing or 0.0
    if config.loss is not None:
        return LossConfig(
            config.loss,
            config.beta or 0.0,
            config.gamma or 0.0,
            config.nll_coefficient or 0.0,
            label_smoothing=label_smoothing,
            desirable_weight=1.0 if config.desirable_weight is None else config.desirable_weight,
            undesirable_weight=(
                1.0 if config.undesirable_weight is None else config.undesirable_weight
            ),
        )
    if config.ban_coefficient is not None:
        return LossConfig(ban_coefficient=config.ban_coefficient)
    return LossConfig(label_smoothing=label_smoothing)


class TrainingLoop:
    """A training in progress: weights, optimizer, position.

    `step` counts finished optimizer steps. `pack_length` starts as the plan's and shrinks when
    memory runs out. `ratios` are (finished steps, rehearsal ratio from then on). `rollbacks` change
    the steps after the one that each went back to. Everything that happens is a function of the
    step and these."""

    def __init__(
        self,
        model: PackedCausalLM,
        load_documents: Callable[..., Sequence[Document]],
        config: PlanConfig,
        *,
        steps: int,
        warmup_steps: int | None = None,
        ranks: Ranks = SINGLE_PROCESS,
    ) -> None:
        """`load_documents(step)` returns the documents of step 1..steps, always the same ones.

        After the rehearsal ratio has changed it is also passed `changes=ratio_changes`."""
        self.model = model
        self.load_documents = load_documents
        self.config = config
        self.ranks = ranks
        refuse_group_size(config.context_parallel_size, ranks)
        self.total_steps = steps
        if warmup_steps is None:
            warmup_steps = math.ceil(steps * config.warmup_ratio)
        self.warmup_steps = warmup_steps
        self.loss_config = build_loss_config(config)
        self.parameters = get_trainable_parameters(model.network)
        # where ranks train weights together, `parameters` are the pieces of this one
        self.shards = model.shards if model.shards and model.shards.trained else None
        if self.shards is not None:
            self.parameters = self.shards.find_pieces(self.parameters)
        self.optimizer = make_optimizer(
            self.parameters.values(),
            weight_decay=config.weight_decay,
            kind=config.optim,
            rows=[rows.rows_KH for rows in collect_new_rows(model.network).values()],
            rows_lr_factor=config.new_rows_lr_factor or 1.0,
        )
        self.optimizer_in_backward = OptimizerInBackward(self.optimizer, self.parameters)
        self.loss_scale = LossScale.from_dtype(model.dtype)
        self.update_ratios: dict[str, float] = {}  # of weights trained in pieces, at a probe
        self.step = 0
        self.seconds = 0.0
        self.bad_steps = 0
        self.pack_length = config.pack_length
        self.ratios: tuple[tuple[int, float], ...] = ()
        self.rollbacks: tuple[Rollback, ...] = ()
        self._step_documents: Sequence[Document] = ()  # of the step that is taken
        # those of a step that did not fit or overflowed, to be computed again
        self._retry_documents: Sequence[Document] | None = None
        self._prefetched: Iterator[Sequence[Document]] | None = None
        self._is_stopped = False
        self._is_done = False

    def __iter__(self) -> Iterator[Event]:
        return self

    def __next__(self) -> Event:
        if self._is_done:
            raise StopIteration
        if self._is_stopped or self.step >= self.total_steps:
            self._is_done = True
            self._drop_prefetched()
            reason = "stopped" if self._is_stopped else "finished"
            return TrainingEnd(self.step, reason, self.seconds)
        changes = {"ratios": self.ratios, "rollbacks": self.rollbacks}
        self.ranks.send(STEP, step=self.step, **changes)
        return self._take_step()

    def stop(self) -> None:
        """Make the next event a TrainingEnd."""
        self._is_stopped = True

    def set_rehearsal_ratio(self, ratio: float) -> None:
        """Set the share of rehearsal tokens from the next step on."""
        self.ratios = (*self.ratios, (self.step, ratio))
        self._drop_prefetched()

    def set_rollbacks(self, rollbacks: Sequence[Rollback]) -> None:
        """Set all rollbacks so far, also those that are newer than the restored checkpoint."""
        self.rollbacks = tuple(rollbacks)
        self._drop_prefetched()

    def set_changes(self, ratios: Json, rollbacks: Json) -> None:
        """Take over the rehearsal ratios and rollbacks of rank 0, as its command has them."""
        new_ratios = parse_as(tuple[tuple[int, float], ...], ratios)
        new_rollbacks = parse_as(tuple[Rollback, ...], rollbacks)
        if (new_ratios, new_rollbacks) != (self.ratios, self.rollbacks):
            self.ratios = new_ratios
            self.set_rollbacks(new_rollbacks)

    @property
    def ratio_changes(self) -> tuple[tuple[int, float], ...]:
        """(finished steps, rehearsal ratio) of every change, by rollbacks too, in order."""
        rollback_ratios: list[tuple[int, float]] = []
        for rollback in self.rollbacks:
            if rollback.rehearsal_ratio is not None:
                # Ratios set after the step that this rollback went back to are void.
                rollback_ratios = [change for change in rollback_ratios if change[0] < rollback.to]
                rollback_ratios.append((rollback.to, rollback.rehearsal_ratio))
        return tuple(sorted((*self.ratios, *rollback_ratios), key=lambda change: change[0]))

    def compare_ranks(self) -> None:
        """Raise MachineError unless all ranks have the same weights, bit by bit."""
        self.ranks.send(COMPARE)
        parts = 1 if self.shards is None else self.shards.size
        check_replicas(self.parameters, self.ranks, parts)

    def save(self, folder: Path) -> None:
        """Write everything that `restore` needs to continue bitwise the same.

        Raise MachineError if the weights of the ranks differ, GateError if one is not finite."""
        self.compare_ranks()
        state = TrainerState(**{name: getattr(self, name) for name in POSITION_FIELDS})
        position = dataclasses.asdict(state)
        if self.loss_scale is not None:
            position["loss_scale"] = dataclasses.asdict(self.loss_scale)
        if self.shards is not None:
            self.ranks.send(COLLECT)
        layers = () if self.shards is None else self.shards.trained
        write_state(folder, self.parameters, self.optimizer, position, layers)

    def send_state(self) -> None:
        """Send this rank's parts of weights and moments to rank 0, which saves them."""
        if self.shards is not None and self.ranks.rank < self.shards.size:
            for _ in iter_state(self.parameters, self.optimizer, self.shards.trained):
                pass

    @property
    def state_bytes(self) -> int:
        """The bytes of a checkpoint: weights and two moments."""
        shapes = [get_complete_shape(parameter) for parameter in self.parameters.values()]
        itemsize = next(iter(self.parameters.values())).element_size()
        return 3 * itemsize * sum(shape.numel() for shape in shapes)

    def restore(self, folder: Path) -> None:
        """Restore the state that `save` wrote, on any number of ranks; the next event is of the
        step after it."""
        self.ranks.send(RESTORE, folder=str(folder.absolute()))
        stored = read_state(folder, self.parameters, self.optimizer)
        file = folder / TRAINER_STATE_FILE
        parse = partial(parse_as, where=str(file), fix=RESTORE_CHECKPOINT_FIX)
        position = parse(TrainerState, stored)
        if self.shards is not None:
            self.shards.release()  # the layers with the weights before
        for name in POSITION_FIELDS:
            setattr(self, name, getattr(position, name))
        if self.loss_scale is not None:
            self.loss_scale = parse(LossScale, stored.get("loss_scale"))
        if self.step:  # so that a probe of this step measures its update
            set_learning_rate(self.optimizer, self._compute_learning_rate(self.step - 1))
        self._measure_pieces()
        self._drop_prefetched()
        self._is_stopped = False
        self._is_done = False

    def _drop_prefetched(self) -> None:
        if self._prefetched is not None:
            self._prefetched.close()  # type: ignore[attr-defined]
        self._prefetched = None
        self._retry_documents = None

    def _load_next_documents(self) -> Sequence[Document]:
        if self._retry_documents is not None:
            documents = self._retry_documents
            self._retry_documents = None
            return documents
        if self._prefetched is None:
            remaining = range(self.step + 1, self.total_steps + 1)
            load_documents = self.load_documents
            if self.ratio_changes:
                load_documents = partial(load_documents, changes=self.ratio_changes)
            self._prefetched = prefetch(remaining, load_documents)
        documents = next(self._prefetched)
        skipped_rows: set[str] = set()
        for rollback in self.rollbacks:
            if rollback.to <= self.step:
                skipped_rows.update(rollback.rows)
        if not skipped_rows:
            return documents
        # A skipped row keeps its slot in the step, and nothing takes its place.
        return [document for document in documents if document.id not in skipped_rows]

    # ------------------------------------------------------------ one step

    def _take_step(self) -> Event:
        documents = self._step_documents = self._load_next_documents()
        started = time.perf_counter()
        mismatched: Sequence[Document] | None = None
        if self.loss_config.loss == "kto":
            documents, mismatched = split_mismatched(documents)
        normalizer = LossNormalizer.from_documents(documents)
        packs_by_rank = self.pack_documents(documents) if normalizer else []
        packs = [pack for rank_packs in packs_by_rank for pack in rank_packs]
        share = self._compute_share(packs_by_rank, normalizer, mismatched)
        if packs and self.ranks.world > 1:
            share = sum_step(self.parameters, share, self.ranks, self.shards)
        if share.out_of_memory:
            return self._shrink_packs(documents, share.out_of_memory)
        with machine_errors():
            return self._apply_update(documents, packs, started, share.loss, share.num_targets)

    def _compute_share(
        self,
        packs_by_rank: Sequence[Sequence[Pack]],
        normalizer: LossNormalizer,
        mismatched: Sequence[Document] | None,
    ) -> StepShare:
        """Compute the gradients of this rank's packs; with `mismatched`, KTO's KL term first."""
        with join_ranks(self.model.shards, can_tell=self.config.context_parallel_size == 1):
            try:
                with machine_errors():
                    if mismatched is not None:
                        kl = measure_kl(self.model, mismatched, self.pack_length)
                        self.loss_config = dataclasses.replace(self.loss_config, kl=kl)
                    return StepShare(*self._forward_backward(packs_by_rank, normalizer))
            except OutOfMemory as error:
                message = error.message
            if self.config.context_parallel_size > 1:
                # the others wait for this rank inside of a layer
                fix = "lower pack_length, max_length or lora_r, or raise context_parallel_size"
                raise MachineError(message, where=self.ranks.name, fix=fix)
            # Outside the except block, where the traceback no longer holds the step's tensors.
            self.optimizer.zero_grad(set_to_none=True)
            self.model.network.zero_grad(set_to_none=True)  # of sharded weights, not yet summed
            self.model.network.eval()
            release_memory()  # the smaller packs need blocks of other sizes
            return StepShare(None, 0, message)

    def _apply_update(
        self,
        documents: Sequence[Document],
        packs: Sequence[Pack],
        started: float,
        loss_sum: Tensor | None,
        supervised_tokens: int,
    ) -> Event:
        learning_rate = self._compute_learning_rate(self.step)
        should_update = bool(supervised_tokens) and not self._updates_in_backward(packs)
        updates_first = should_update and self._can_skip_updates
        update_rate = learning_rate if updates_first else None
        loss, grad_norm = self._clip_and_step(packs, loss_sum, supervised_tokens, update_rate)
        has_overflowed = math.isfinite(loss) and not math.isfinite(grad_norm)
        if self.loss_scale and has_overflowed and self.loss_scale.halve():
            return self._repeat_step(self.loss_scale)
        self.step += 1
        if not math.isfinite(loss) or not math.isfinite(grad_norm):
            return self._refuse_step(documents, loss, grad_norm)
        self.bad_steps = 0
        set_learning_rate(self.optimizer, learning_rate)  # of a step without an update, too
        if should_update and not updates_first:
            step_optimizer(self.optimizer, learning_rate)
        if should_update and self.loss_scale:
            self.loss_scale.count_update()
        self._measure_pieces()
        self.optimizer.zero_grad(set_to_none=True)
        seconds = time.perf_counter() - started
        self.seconds += seconds
        return TrainStep(
            step=self.step,
            loss=loss,
            tokens=sum(len(document) for document in documents),
            supervised_tokens=supervised_tokens,
            seconds=seconds,
            learning_rate=learning_rate,
            grad_norm=grad_norm,
            peak_bytes=read_peak_bytes(self.model.device.type),
            task_tokens=_count_task_tokens(documents),
            shared_tokens=sum(sum(pack.prefix_lengths) for pack in packs),
        )

    @property
    def _can_skip_updates(self) -> bool:
        """Whether the device itself keeps a step that is not finite from the weights."""
        return ops.is_gpu(self.model.device) and isinstance(self.optimizer, torch.optim.AdamW)

    def _clip_and_step(
        self,
        packs: Sequence[Pack],
        loss_sum: Tensor | None,
        supervised_tokens: int,
        update_rate: float | None,
    ) -> tuple[float, float]:
        """Clip the gradients unless they are already applied. Return the loss, and their norm
        before: together, since a GPU has to finish its work for every read. With `update_rate`, the
        update is launched before, and skipped there if one of them is not finite."""
        if loss_sum is None:
            return 0.0, 0.0
        if not supervised_tokens:
            return float(loss_sum), 0.0
        if self._updates_in_backward(packs):
            return float(loss_sum), self.optimizer_in_backward.grad_norm
        if self.loss_scale:
            self.loss_scale.remove_from_gradients(self.parameters.values())
        max_norm = self.config.max_grad_norm
        if self.shards is None:
            norm = clip_gradients(self.parameters.values(), max_norm)
        else:
            combine = self.shards.combine_norms
            norm = clip_gradients(self.parameters.values(), max_norm, combine)
        loss_and_norm = torch.stack((loss_sum.double(), norm.double()))
        if update_rate is not None:
            should_skip = ~torch.isfinite(loss_and_norm).all()
            step_optimizer(self.optimizer, update_rate, should_skip)
        loss, grad_norm = loss_and_norm.tolist()
        return loss, grad_norm

    def _compute_learning_rate(self, step: int) -> float:
        """Return the rate of the step after `step` finished ones."""
        learning_rate = compute_learning_rate(
            step,
            peak=self.config.learning_rate,
            warmup_steps=self.warmup_steps,
            total_steps=self.total_steps,
            schedule=self.config.lr_scheduler_type,
            kwargs=self.config.lr_scheduler_kwargs or {},
        )
        lr_factor = 1.0
        for rollback in self.rollbacks:
            if rollback.to <= step:
                lr_factor *= rollback.lr_factor
        return lr_factor * learning_rate

    def _forward_backward(
        self, packs_by_rank: Sequence[Sequence[Pack]], normalizer: LossNormalizer
    ) -> tuple[Tensor | None, int]:
        """Compute the gradients of this rank's packs in the step's mean loss; return their part of
        it, None without packs, and their supervised tokens."""
        supervised_tokens = 0
        total: Tensor | None = None
        context = self.config.context_parallel_size
        self.ranks.form_groups(context)
        group = self.ranks.rank // context
        packs = packs_by_rank[group] if packs_by_rank else ()
        num_earlier = sum(map(len, packs_by_rank[:group]))
        self.model.network.train()
        for index, pack in enumerate(packs, start=num_earlier):
            # The seed of dropout follows from the position, so a resumed run draws the same.
            position = [self.config.seed, self.step, index]
            shard: TokenShard | None = None
            num_tokens = count_computed_tokens(pack)
            if num_tokens < context:  # not one for each rank of the group: its first one takes all
                if self.ranks.rank % context:
                    continue
            elif context > 1:
                shard = TokenShard(self.ranks, context, num_tokens)
                position.append(shard.index)
            batch = collate(pack, str(self.model.device), shard)
            if self.config.neftune_noise_alpha:
                size = self.model.embedding_size
                batch = add_embedding_noise(batch, pack, size, self.config, self.step)
            torch.manual_seed(hash(tuple(position)) & 0x7FFFFFFFFFFFFFFF)
            terms = compute_step_terms(self.model, batch, normalizer, self.loss_config)
            loss = torch.stack([t.coefficient * t.sum / t.count for t in terms.values()]).sum()
            total = loss.detach() if total is None else total + loss.detach()
            supervised_tokens += sum(batch.num_targets)
            if self.loss_scale:
                (loss * self.loss_scale.value).backward()
            elif self._updates_in_backward(packs):
                self._backward_with_updates(loss)
            else:
                loss.backward()
        self.model.network.eval()
        return total, supervised_tokens

    def _updates_in_backward(self, packs: Sequence[Pack]) -> bool:
        """Return whether the step updates weights in backward: only steps of a single pack do.

        The gradients of several packs must be summed first."""
        return self.config.step_in_backward and len(packs) == 1

    def _backward_with_updates(self, loss: Tensor) -> None:
        """Update weights in backward if the loss is finite; _apply_update refuses other steps."""
        self.optimizer_in_backward.grad_norm = math.nan
        if math.isfinite(float(loss.detach())):
            learning_rate = self._compute_learning_rate(self.step)
            with self.optimizer_in_backward.updating(self.step + 1, learning_rate):
                loss.backward()

    def pack_documents(self, documents: Sequence[Document]) -> list[list[Pack]]:
        """Return the packs of each rank, or of each group of ranks that share their documents."""
        should_share = self.config.share_prefixes
        get_group = self.model.get_rotation_key
        parts = share_out(
            documents,
            self.ranks.world // self.config.context_parallel_size,
            self.model.embedding_size,
            should_share=should_share,
            get_group=get_group,
        )
        packs_by_rank: list[list[Pack]] = []
        for part in parts:
            packs_by_rank.append(
                pack_step(part, self.pack_length, should_share=should_share, get_group=get_group)
            )
        return packs_by_rank

    def _shrink_packs(self, documents: Sequence[Document], message: str) -> CheckResult:
        """Halve pack_length and repeat the step.

        A document or a pair is never split: raise MachineError if one alone does not fit."""
        self.optimizer.zero_grad(set_to_none=True)
        packs = [pack for packs in self.pack_documents(documents) for pack in packs]
        divisible_packs = [pack for pack in packs if len(group_units(pack.documents)) > 1]
        if not divisible_packs:
            longest = max(packs, key=count_computed_tokens)
            unit = "document" if len(longest.documents) == 1 else "pair"
            num_tokens = count_computed_tokens(longest)
            raise MachineError(
                f"{message}; each pack holds one {unit}, the longest has {num_tokens:,} tokens",
                where=f"step {self.step + 1}: {longest.documents[0].id}",
                fix="lower max_length or lora_r, choose a smaller model, or free memory",
            )
        largest = max(map(count_computed_tokens, divisible_packs))
        self.pack_length = largest // 2
        self._retry_documents = self._step_documents
        evidence = (
            f"{message}; packs of {largest:,} tokens become packs of {self.pack_length:,}: "
            "same step, same update"
        )
        return CheckResult("memory", "warn", evidence, self.step + 1)

    def _repeat_step(self, loss_scale: LossScale) -> CheckResult:
        """Take the step again with the smaller scale that is now set."""
        self.optimizer.zero_grad(set_to_none=True)
        self._retry_documents = self._step_documents
        evidence = (
            f"gradients overflowed in fp16: the step is repeated with half the loss scale, "
            f"{loss_scale.value:g}; {loss_scale.overflows} repeated so far"
        )
        return CheckResult(SCALE_KIND, "ok", evidence, self.step + 1)

    def _refuse_step(
        self, documents: Sequence[Document], loss: float, grad_norm: float
    ) -> CheckResult:
        """Skip a non-finite step before the optimizer sees it.

        Raise GateError if a weight is non-finite, or after MAX_BAD_STEPS such steps in a row."""
        self.optimizer.zero_grad(set_to_none=True)
        self.bad_steps += 1
        if parameter_name := self._find_nonfinite_weight():
            raise GateError(
                f"{parameter_name} is not finite since the previous update; "
                "the rows of this step are not the cause",
                where=f"step {self.step}",
                fix="lower learning_rate; the newest checkpoint has finite weights",
            )
        rows = ", ".join(dict.fromkeys(document.id for document in documents))
        evidence = f"step {self.step}: loss {loss}, gradient norm {grad_norm}; rows: {rows}"
        if self.bad_steps >= MAX_BAD_STEPS:
            raise GateError(
                f"{self.bad_steps} consecutive non-finite steps, none applied ({evidence})",
                fix="lower learning_rate, or look at these rows with `tunesmith data show`",
            )
        return CheckResult("non-finite", "warn", evidence, self.step)

    def _measure_pieces(self) -> None:
        """Measure the last update where a probe follows it: no rank could do so alone."""
        probe_steps = self.config.probe_steps
        if self.shards is not None and probe_steps and self.step % probe_steps == 0:
            self.update_ratios = sum_update_ratios(self.parameters, self.optimizer, self.ranks)

    def _find_nonfinite_weight(self) -> str:
        """Return the name of a weight that is not finite on any rank, empty if all are."""
        name = find_nonfinite(self.parameters)
        if self.shards is None:
            return name
        return next(filter(None, self.ranks.gather(name)), "")


def _count_task_tokens(documents: Sequence[Document]) -> dict[str, int]:
    """Return the number of tokens of each named task."""
    task_tokens: dict[str, int] = {}
    for document in documents:
        if document.task:
            task_tokens[document.task] = task_tokens.get(document.task, 0) + len(document)
    return task_tokens
