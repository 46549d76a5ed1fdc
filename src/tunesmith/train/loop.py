"""The training loop: one for every method, loss, packing and device.

In: a LanguageModel with something trainable, a function from step to documents, Settings. Iterating
a `Training` runs it and yields its events; between two events `save`, `restore` and `stop` are
legal. All state is in the object. A step that does not fit in memory is computed again in smaller
packs, which changes its speed and not its update. Left out: what to do about an event (guard, run
folder, display), evaluation, the choice of any value (plan)."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from tunesmith.core.errors import GateError, MachineError
from tunesmith.core.events import CheckResult, Event, Rollback, TrainingEnd, TrainStep
from tunesmith.core.hardware import read_peak_bytes
from tunesmith.core.json_io import parse_as
from tunesmith.core.types import Document, Pack, PlanConfig
from tunesmith.data.collate import collate
from tunesmith.data.packing import count_computed_tokens, group_units, pack_step
from tunesmith.data.sampler import prefetch
from tunesmith.model.adapters import get_trainable_parameters
from tunesmith.model.causal_lm import PackedCausalLM
from tunesmith.model.new_embeddings import collect_new_rows
from tunesmith.model.oom import OutOfMemory, memory_errors
from tunesmith.model.safetensors_io import find_nonfinite
from tunesmith.train.checkpoint import read_state, write_state
from tunesmith.train.losses import LossConfig, LossNormalizer, compute_step_terms
from tunesmith.train.optimizer import (
    clip_gradients,
    compute_learning_rate,
    make_optimizer,
    step_optimizer,
)
from tunesmith.train.optimizer_in_backward import OptimizerInBackward

POSITION_FIELDS = (
    "step",
    "seconds",
    "bad_steps",
    "pack_length",
    "ratios",
)  # kept beside the tensors, and the rollbacks
MAX_BAD_STEPS = 3  # non-finite steps in a row after which there is nothing to wait for


def build_loss_config(config: PlanConfig) -> LossConfig:
    """Return the loss of preference pairs, or of rows and banned spans."""
    if config.loss is None:
        return LossConfig(ban_coefficient=config.ban_coefficient or 1.0)
    return LossConfig(
        config.loss, config.beta or 0.0, config.gamma or 0.0, config.nll_coefficient or 0.0
    )


class TrainingLoop:
    """A run in progress: weights, optimizer, position. `step` counts finished optimizer steps;
    `pack_length` is what memory has left of the plan's. `ratios`: (steps done, share of rehearsal
    from then on), as they were set. `rollbacks` change the steps after the one that each went back
    to: all of this is a function of the step."""

    def __init__(
        self,
        model: PackedCausalLM,
        load_documents: Callable[..., Sequence[Document]],
        config: PlanConfig,
        *,
        steps: int,
        warmup_steps: int | None = None,
    ) -> None:
        """`documents_of(step)` gives the documents of step 1..steps, always the same ones. It is
        also given `ratios`, once there are any."""
        self.model, self.load_documents, self.config = model, load_documents, config
        self.total_steps = steps
        if warmup_steps is None:
            warmup_steps = math.ceil(steps * config.warmup_ratio)
        self.warmup_steps = warmup_steps
        self.loss_config = build_loss_config(config)
        self.parameters = get_trainable_parameters(model.network)
        self.optimizer = make_optimizer(
            self.parameters.values(),
            weight_decay=config.weight_decay,
            kind=config.optim,
            rows=[rows.rows_KH for rows in collect_new_rows(model.network).values()],
            rows_lr_factor=config.new_rows_lr_factor or 1.0,
        )
        self.optimizer_in_backward = OptimizerInBackward(self.optimizer, self.parameters)
        self.step, self.seconds, self.bad_steps = 0, 0.0, 0
        self.pack_length = config.pack_length
        self.ratios: tuple[tuple[int, float], ...] = ()
        self.rollbacks: tuple[Rollback, ...] = ()
        # the documents of a step that did not fit
        self._retry_documents: Sequence[Document] | None = None
        self._prefetched: Iterator[Sequence[Document]] | None = None
        self._is_stopped = self._is_done = False

    def __iter__(self) -> Iterator[Event]:
        return self

    def __next__(self) -> Event:
        if self._is_done:
            raise StopIteration
        if self._is_stopped or self.step >= self.total_steps:
            self._is_done = True
            self._drop_prefetched()
            return TrainingEnd(
                self.step, "stopped" if self._is_stopped else "finished", self.seconds
            )
        return self._take_step()

    def stop(self) -> None:
        """The next event is Done."""
        self._is_stopped = True

    def set_rehearsal_ratio(self, ratio: float) -> None:
        """From the next step on, general rows have this share."""
        self.ratios = (*self.ratios, (self.step, ratio))
        self._drop_prefetched()

    def set_rollbacks(self, rollbacks: Sequence[Rollback]) -> None:
        """All rollbacks so far; those that the checkpoint does not know of were decided after it
        was written."""
        self.rollbacks = tuple(rollbacks)
        self._drop_prefetched()

    @property
    def ratio_changes(self) -> tuple[tuple[int, float], ...]:
        """Every share of rehearsal that was set, whoever set it, in the order in which they
        hold."""
        rollback_ratios: list[tuple[int, float]] = []
        for rollback in self.rollbacks:
            if (
                rollback.rehearsal_ratio is not None
            ):  # what was set after the step that it went back to does not hold any more
                rollback_ratios = [
                    *(earlier for earlier in rollback_ratios if earlier[0] < rollback.to),
                    (rollback.to, rollback.rehearsal_ratio),
                ]
        return tuple(sorted((*self.ratios, *rollback_ratios), key=lambda change: change[0]))

    def save(self, folder: Path) -> None:
        """All that `restore` needs to go on as if nothing had happened."""
        position = {name: getattr(self, name) for name in POSITION_FIELDS}
        position["rollbacks"] = [dataclasses.asdict(rollback) for rollback in self.rollbacks]
        write_state(folder, self.parameters, self.optimizer, position)

    def restore(self, folder: Path) -> None:
        """The state that `save` wrote; the next event is of the step after it."""
        position = read_state(folder, self.parameters, self.optimizer)
        for name in POSITION_FIELDS:
            setattr(self, name, position[name])
        self.ratios = tuple((step, ratio) for step, ratio in position["ratios"])
        self.rollbacks = parse_as(tuple[Rollback, ...], position["rollbacks"])
        self._drop_prefetched()
        self._is_stopped = self._is_done = False

    def _drop_prefetched(self) -> None:
        if self._prefetched is not None:
            self._prefetched.close()  # type: ignore[attr-defined]
        self._prefetched = self._retry_documents = None

    def _load_next_documents(self) -> Sequence[Document]:
        if self._retry_documents is not None:
            documents, self._retry_documents = self._retry_documents, None
            return documents
        if self._prefetched is None:
            remaining = range(self.step + 1, self.total_steps + 1)
            keywords = {"changes": self.ratio_changes} if self.ratio_changes else {}
            self._prefetched = prefetch(remaining, partial(self.load_documents, **keywords))
        documents, skipped_rows = next(self._prefetched), self._collect_skipped_rows()
        return (
            [document for document in documents if document.id not in skipped_rows]
            if skipped_rows
            else documents
        )

    def _collect_skipped_rows(self) -> set[str]:
        """Of the next step: such a row keeps its slot, with nothing in it."""
        return {
            row for rollback in self.rollbacks if rollback.to <= self.step for row in rollback.rows
        }

    # ------------------------------------------------------------ one step

    def _take_step(self) -> Event:
        documents, started = self._load_next_documents(), time.perf_counter()
        normalizer = LossNormalizer.from_documents(documents)
        packs = self._pack_documents(documents) if normalizer else []
        try:
            with memory_errors():
                loss, supervised_tokens = self._forward_backward(packs, normalizer)
        except OutOfMemory as error:
            message = error.message
        else:
            return self._apply_update(documents, packs, started, loss, supervised_tokens)
        return self._shrink_packs(documents, message)

    def _apply_update(
        self,
        documents: Sequence[Document],
        packs: Sequence[Pack],
        started: float,
        loss: float,
        supervised_tokens: int,
    ) -> Event:
        grad_norm, learning_rate = (
            self._clip_grad_norm(packs) if supervised_tokens else 0.0,
            self._compute_learning_rate(),
        )
        self.step += 1
        if not math.isfinite(loss) or not math.isfinite(grad_norm):
            return self._refuse_step(documents, loss, grad_norm)
        self.bad_steps = 0
        if supervised_tokens and not self._updates_in_backward(packs):
            with memory_errors():
                step_optimizer(self.optimizer, learning_rate)
        self.optimizer.zero_grad(set_to_none=True)
        seconds = time.perf_counter() - started
        self.seconds += seconds
        return TrainStep(
            step=self.step,
            loss=loss,
            tokens=sum(len(d) for d in documents),
            supervised_tokens=supervised_tokens,
            seconds=seconds,
            learning_rate=learning_rate,
            grad_norm=grad_norm,
            peak_bytes=read_peak_bytes(),
            task_tokens=_count_task_tokens(documents),
            shared_tokens=sum(sum(pack.prefix_lengths) for pack in packs),
        )

    def _clip_grad_norm(self, packs: Sequence[Pack]) -> float:
        """Of all gradients, which are clipped by it."""
        if self._updates_in_backward(packs):
            return self.optimizer_in_backward.grad_norm
        return clip_gradients(self.parameters.values(), self.config.max_grad_norm)

    def _compute_learning_rate(self) -> float:
        config = self.config
        lr_factor = math.prod(
            rollback.lr_factor for rollback in self.rollbacks if rollback.to <= self.step
        )
        return lr_factor * compute_learning_rate(
            self.step,
            peak=config.learning_rate,
            warmup_steps=self.warmup_steps,
            total_steps=self.total_steps,
            schedule=config.lr_scheduler_type,
        )

    def _forward_backward(
        self, packs: Sequence[Pack], normalizer: LossNormalizer
    ) -> tuple[float, int]:
        """Gradients of the step's mean loss; returns that loss and the number of supervised
        tokens."""
        supervised_tokens = 0
        total: Tensor | None = None
        self.model.network.train()
        for index, pack in enumerate(packs):
            batch = collate(pack, device=str(self.model.device))
            torch.manual_seed(
                hash((self.config.seed, self.step, index)) & 0x7FFFFFFFFFFFFFFF
            )  # dropout, the same after a resume
            terms = compute_step_terms(self.model, batch, normalizer, self.loss_config)
            loss = torch.stack([t.coefficient * t.sum / t.count for t in terms.values()]).sum()
            total = loss.detach() if total is None else total + loss.detach()
            supervised_tokens += len(batch.targets_S)
            if self._updates_in_backward(packs):
                self._backward_with_updates(loss)
            else:
                loss.backward()
        self.model.network.eval()
        return 0.0 if total is None else float(total), supervised_tokens

    def _updates_in_backward(self, packs: Sequence[Pack]) -> bool:
        """Gradients of several packs are summed up first, and then weights are updated as ever."""
        return self.config.step_in_backward and len(packs) == 1

    def _backward_with_updates(self, loss: Tensor) -> None:
        """If the loss is finite; else `_update` refuses the step."""
        self.optimizer_in_backward.grad_norm = math.nan
        if math.isfinite(float(loss.detach())):
            with self.optimizer_in_backward.updating(self.step + 1, self._compute_learning_rate()):
                loss.backward()

    def _pack_documents(self, documents: Sequence[Document]) -> list[Pack]:
        return pack_step(documents, self.pack_length, should_share=self.config.share_prefixes)

    def _shrink_packs(self, documents: Sequence[Document], message: str) -> CheckResult:
        """Half of what the largest shared pack held. A document or a pair is never split: alone it
        must fit."""
        self.optimizer.zero_grad(set_to_none=True)
        self.model.network.eval()
        packs = self._pack_documents(documents)
        divisible_packs = [pack for pack in packs if len(group_units(pack.documents)) > 1]
        if not divisible_packs:
            longest = max(packs, key=count_computed_tokens)
            unit = "document" if len(longest.documents) == 1 else "pair"
            raise MachineError(
                f"{message}; packs hold one {unit} each by now, the longest has {count_computed_tokens(longest):,} tokens",
                where=f"step {self.step + 1}: {longest.documents[0].id}",
                fix="lower max_length or lora_r, choose a smaller model, or free memory that other programs hold",
            )
        largest = max(map(count_computed_tokens, divisible_packs))
        self.pack_length, self._retry_documents = largest // 2, documents
        evidence = f"{message}; packs of {largest:,} tokens become packs of {self.pack_length:,}: same step, same update"
        return CheckResult("memory", "warn", evidence, self.step + 1)

    def _refuse_step(
        self, documents: Sequence[Document], loss: float, grad_norm: float
    ) -> CheckResult:
        """A non-finite step never reaches the optimizer. A few are skipped; many in a row end the
        run."""
        self.optimizer.zero_grad(set_to_none=True)
        self.bad_steps += 1
        if parameter_name := find_nonfinite(self.parameters):
            raise GateError(
                f"step {self.step}: {parameter_name} is not finite since the update before; no row of this step is to blame",
                fix="lower learning_rate; the newest checkpoint holds finite weights",
            )
        rows = ", ".join(dict.fromkeys(d.id for d in documents))
        evidence = f"step {self.step}: loss {loss}, gradient norm {grad_norm}; rows: {rows}"
        if self.bad_steps >= MAX_BAD_STEPS:
            raise GateError(
                f"{self.bad_steps} non-finite steps in a row, weights are those before them ({evidence})",
                fix="lower learning_rate, or look at these rows with `tunesmith data show`",
            )
        return CheckResult("non-finite", "warn", evidence, self.step)


def _count_task_tokens(documents: Sequence[Document]) -> dict[str, int]:
    """Tokens of the documents that belong to a named task, by task."""
    task_tokens: dict[str, int] = {}
    for document in documents:
        if document.task:
            task_tokens[document.task] = task_tokens.get(document.task, 0) + len(document)
    return task_tokens
