"""The training loop: one for every method, loss, packing and device.

In: a LanguageModel with something trainable, a function from step to documents, Settings. Iterating a `Training` runs
it and yields its events; between two events `save`, `restore` and `stop` are legal. All state is in the object. A step
that does not fit in memory is computed again in smaller packs, which changes its speed and not its update.
Left out: what to do about an event (guard, run folder, display), evaluation, the choice of any value (plan).
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from tunesmith.core.errors import GateError, MachineError
from tunesmith.core.events import Done, Event, Rollback, StepResult, Verdict
from tunesmith.core.hardware import peak_bytes
from tunesmith.core.json_io import from_json
from tunesmith.core.types import Document, Pack, Plan
from tunesmith.data.collate import collate
from tunesmith.data.packing import computed_tokens, pack_step, units
from tunesmith.data.sampler import prefetch
from tunesmith.model.adapters import trainable
from tunesmith.model.causal_lm import LanguageModel
from tunesmith.model.new_embeddings import new_rows
from tunesmith.model.oom import OutOfMemory, memory_errors
from tunesmith.model.safetensors_io import first_not_finite
from tunesmith.train.checkpoint import read_state, write_state
from tunesmith.train.losses import Counts, Objective, step_terms
from tunesmith.train.optimizer import clip, make_optimizer, rate_at, update
from tunesmith.train.optimizer_in_backward import InBackward

POSITION = ("step", "seconds", "bad_steps", "pack_length", "ratios")  # kept beside the tensors, and the rollbacks
BAD_STEPS = 3  # non-finite steps in a row after which there is nothing to wait for


NO_PAIRS = Objective()


@dataclass(frozen=True)
class Settings:
    """The plan's values that the loop obeys."""

    steps: int
    pack_length: int
    learning_rate: float
    warmup_steps: int
    schedule: str
    weight_decay: float
    max_grad_norm: float
    seed: int
    share_prefixes: bool = False
    objective: Objective = NO_PAIRS
    optim: str = "adamw"
    new_rows_times: float = 1.0  # the learning rate, for the rows of new tokens
    in_backward: bool = False  # weights are updated while gradients are computed; nothing is clipped then

    @classmethod
    def of(cls, plan: Plan) -> Settings:
        return cls(
            steps=plan.steps,
            pack_length=plan["pack_length"],
            learning_rate=plan["learning_rate"],
            warmup_steps=math.ceil(plan.steps * plan["warmup_ratio"]),
            schedule=plan["lr_scheduler_type"],
            weight_decay=plan["weight_decay"],
            max_grad_norm=plan["max_grad_norm"],
            seed=plan["seed"],
            share_prefixes=plan["share_prefixes"],
            objective=_objective(plan),
            optim=plan["optim"],
            new_rows_times=plan["new_rows_times"] if "new_rows_times" in plan.choices else 1.0,
            in_backward=plan["step_in_backward"],
        )


def _objective(plan: Plan) -> Objective:
    if "loss" in plan.choices:
        return Objective(plan["loss"], plan["beta"], plan["gamma"], plan["nll_coefficient"])
    return Objective(ban=plan["ban_coefficient"]) if "ban_coefficient" in plan.choices else NO_PAIRS


class Training:
    """A run in progress: weights, optimizer, position. `step` counts finished optimizer steps; `pack_length` is what
    memory has left of the plan's. `ratios`: (steps done, share of rehearsal from then on), as they were set.
    `rollbacks` change the steps after the one that each went back to: all of this is a function of the step."""

    def __init__(
        self, model: LanguageModel, documents_of: Callable[..., Sequence[Document]], settings: Settings
    ) -> None:
        """`documents_of(step)` gives the documents of step 1..steps, always the same ones. It is also given `ratios`,
        once there are any."""
        self.model, self.documents_of, self.settings = model, documents_of, settings
        self.parameters = trainable(model.network)
        self.optimizer = make_optimizer(
            self.parameters.values(),
            weight_decay=settings.weight_decay,
            kind=settings.optim,
            rows=[rows.rows_KH for rows in new_rows(model.network).values()],
            rows_times=settings.new_rows_times,
        )
        self.in_backward = InBackward(self.optimizer, self.parameters)
        self.step, self.seconds, self.bad_steps = 0, 0.0, 0
        self.pack_length = settings.pack_length
        self.ratios: tuple[tuple[int, float], ...] = ()
        self.rollbacks: tuple[Rollback, ...] = ()
        self._again: Sequence[Document] | None = None  # the documents of a step that did not fit
        self._upcoming: Iterator[Sequence[Document]] | None = None
        self._stopped = self._done = False

    def __iter__(self) -> Iterator[Event]:
        return self

    def __next__(self) -> Event:
        if self._done:
            raise StopIteration
        if self._stopped or self.step >= self.settings.steps:
            self._done = True
            self._forget_upcoming()
            return Done(self.step, "stopped" if self._stopped else "finished", self.seconds)
        return self._take_step()

    def stop(self) -> None:
        """The next event is Done."""
        self._stopped = True

    def rehearse(self, ratio: float) -> None:
        """From the next step on, general rows have this share."""
        self.ratios = (*self.ratios, (self.step, ratio))
        self._forget_upcoming()

    def change(self, rollbacks: Sequence[Rollback]) -> None:
        """All rollbacks so far; those that the checkpoint does not know of were decided after it was written."""
        self.rollbacks = tuple(rollbacks)
        self._forget_upcoming()

    @property
    def changes(self) -> tuple[tuple[int, float], ...]:
        """Every share of rehearsal that was set, whoever set it, in the order in which they hold."""
        raised: list[tuple[int, float]] = []
        for one in self.rollbacks:
            if one.ratio is not None:  # what was set after the step that it went back to does not hold any more
                raised = [*(earlier for earlier in raised if earlier[0] < one.to), (one.to, one.ratio)]
        return tuple(sorted((*self.ratios, *raised), key=lambda change: change[0]))

    def save(self, folder: Path) -> None:
        """All that `restore` needs to go on as if nothing had happened."""
        position = {name: getattr(self, name) for name in POSITION}
        position["rollbacks"] = [dataclasses.asdict(one) for one in self.rollbacks]
        write_state(folder, self.parameters, self.optimizer, position)

    def restore(self, folder: Path) -> None:
        """The state that `save` wrote; the next event is of the step after it."""
        position = read_state(folder, self.parameters, self.optimizer)
        for name in POSITION:
            setattr(self, name, position[name])
        self.ratios = tuple((step, ratio) for step, ratio in position["ratios"])
        self.rollbacks = from_json(tuple[Rollback, ...], position["rollbacks"])
        self._forget_upcoming()
        self._stopped = self._done = False

    def _forget_upcoming(self) -> None:
        if self._upcoming is not None:
            self._upcoming.close()  # type: ignore[attr-defined]
        self._upcoming = self._again = None

    def _next_documents(self) -> Sequence[Document]:
        if self._again is not None:
            documents, self._again = self._again, None
            return documents
        if self._upcoming is None:
            remaining = range(self.step + 1, self.settings.steps + 1)
            changes = {"changes": self.changes} if self.changes else {}
            self._upcoming = prefetch(remaining, partial(self.documents_of, **changes))
        documents, left_out = next(self._upcoming), self._rows_left_out()
        return [document for document in documents if document.id not in left_out] if left_out else documents

    def _rows_left_out(self) -> set[str]:
        """Of the next step: such a row keeps its slot, with nothing in it."""
        return {row for one in self.rollbacks if one.to <= self.step for row in one.rows}

    # ------------------------------------------------------------ one step

    def _take_step(self) -> Event:
        documents, started = self._next_documents(), time.perf_counter()
        counts = Counts.of(documents)
        packs = self._packs(documents) if counts else []
        try:
            with memory_errors():
                loss, supervised = self._forward_backward(packs, counts)
        except OutOfMemory as error:
            said = error.what
        else:
            return self._update(documents, packs, started, loss, supervised)
        return self._smaller_packs(documents, said)

    def _update(
        self, documents: Sequence[Document], packs: Sequence[Pack], started: float, loss: float, supervised: int
    ) -> Event:
        norm, rate = self._norm(packs) if supervised else 0.0, self._rate()
        self.step += 1
        if not math.isfinite(loss) or not math.isfinite(norm):
            return self._refuse_step(documents, loss, norm)
        self.bad_steps = 0
        if supervised and not self._on_the_way(packs):
            with memory_errors():
                update(self.optimizer, rate)
        self.optimizer.zero_grad(set_to_none=True)
        seconds = time.perf_counter() - started
        self.seconds += seconds
        return StepResult(
            step=self.step,
            loss=loss,
            tokens=sum(len(d) for d in documents),
            supervised_tokens=supervised,
            seconds=seconds,
            learning_rate=rate,
            grad_norm=norm,
            peak_bytes=peak_bytes(),
            task_tokens=_task_tokens(documents),
            shared_tokens=sum(sum(pack.shared) for pack in packs),
        )

    def _norm(self, packs: Sequence[Pack]) -> float:
        """Of all gradients, which are clipped by it."""
        if self._on_the_way(packs):
            return self.in_backward.norm
        return clip(self.parameters.values(), self.settings.max_grad_norm)

    def _rate(self) -> float:
        s = self.settings
        lowered = math.prod(one.factor for one in self.rollbacks if one.to <= self.step)
        return lowered * rate_at(
            self.step, peak=s.learning_rate, warmup_steps=s.warmup_steps, total_steps=s.steps, schedule=s.schedule
        )

    def _forward_backward(self, packs: Sequence[Pack], counts: Counts) -> tuple[float, int]:
        """Gradients of the step's mean loss; returns that loss and the number of supervised tokens."""
        supervised = 0
        total: Tensor | None = None
        self.model.network.train()
        for index, pack in enumerate(packs):
            batch = collate(pack, device=str(self.model.device))
            torch.manual_seed(
                hash((self.settings.seed, self.step, index)) & 0x7FFFFFFFFFFFFFFF
            )  # dropout, the same after a resume
            terms = step_terms(self.model, batch, counts, self.settings.objective)
            loss = torch.stack([t.coefficient * t.sum / t.count for t in terms.values()]).sum()
            total = loss.detach() if total is None else total + loss.detach()
            supervised += len(batch.targets_S)
            if self._on_the_way(packs):
                self._update_on_the_way(loss)
            else:
                loss.backward()
        self.model.network.eval()
        return 0.0 if total is None else float(total), supervised

    def _on_the_way(self, packs: Sequence[Pack]) -> bool:
        """Gradients of several packs are summed up first, and then weights are updated as ever."""
        return self.settings.in_backward and len(packs) == 1

    def _update_on_the_way(self, loss: Tensor) -> None:
        """If the loss is finite; else `_update` refuses the step."""
        self.in_backward.norm = math.nan
        if math.isfinite(float(loss.detach())):
            with self.in_backward.taken(self.step + 1, self._rate()):
                loss.backward()

    def _packs(self, documents: Sequence[Document]) -> list[Pack]:
        return pack_step(documents, self.pack_length, share=self.settings.share_prefixes)

    def _smaller_packs(self, documents: Sequence[Document], said: str) -> Verdict:
        """Half of what the largest shared pack held. A document or a pair is never split: alone it must fit."""
        self.optimizer.zero_grad(set_to_none=True)
        self.model.network.eval()
        packs = self._packs(documents)
        shared = [pack for pack in packs if len(units(pack.documents)) > 1]
        if not shared:
            longest = max(packs, key=computed_tokens)
            what = "document" if len(longest.documents) == 1 else "pair"
            raise MachineError(
                f"{said}; packs hold one {what} each by now, the longest has {computed_tokens(longest):,} tokens",
                where=f"step {self.step + 1}: {longest.documents[0].id}",
                fix="lower max_length or lora_r, choose a smaller model, or free memory that other programs hold",
            )
        largest = max(map(computed_tokens, shared))
        self.pack_length, self._again = largest // 2, documents
        evidence = f"{said}; packs of {largest:,} tokens become packs of {self.pack_length:,}: same step, same update"
        return Verdict("memory", "warn", evidence, self.step + 1)

    def _refuse_step(self, documents: Sequence[Document], loss: float, norm: float) -> Verdict:
        """A non-finite step never reaches the optimizer. A few are skipped; many in a row end the run."""
        self.optimizer.zero_grad(set_to_none=True)
        self.bad_steps += 1
        if broken := first_not_finite(self.parameters):
            raise GateError(
                f"step {self.step}: {broken} is not finite since the update before; no row of this step is to blame",
                fix="lower learning_rate; the newest checkpoint holds finite weights",
            )
        rows = ", ".join(dict.fromkeys(d.id for d in documents))
        evidence = f"step {self.step}: loss {loss}, gradient norm {norm}; rows: {rows}"
        if self.bad_steps >= BAD_STEPS:
            raise GateError(
                f"{self.bad_steps} non-finite steps in a row, weights are those before them ({evidence})",
                fix="lower learning_rate, or look at these rows with `tunesmith data show`",
            )
        return Verdict("non-finite", "warn", evidence, self.step)


def _task_tokens(documents: Sequence[Document]) -> dict[str, int]:
    """Tokens of the documents that belong to a named task, by task."""
    found: dict[str, int] = {}
    for document in documents:
        if document.task:
            found[document.task] = found.get(document.task, 0) + len(document)
    return found
