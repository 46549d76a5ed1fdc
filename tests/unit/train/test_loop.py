"""The loop: packing changes nothing, bad steps never reach the weights, and the same run gives the
same bytes."""

import dataclasses
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from tiny_loop import (
    LENGTHS,
    SETTINGS,
    STEPS,
    are_equal,
    copy_weights,
    make_step_documents,
    run_straight_and_resumed,
    select_steps,
)
from tiny_models import (
    END,
    LORA,
    collate_documents,
    continue_document,
    make_tiny_document,
    make_tiny_model,
    make_tiny_network,
)
from tunesmith.core.errors import GateError
from tunesmith.core.events import CheckResult, Event, Rollback, TrainingEnd, TrainStep
from tunesmith.core.types import Document
from tunesmith.model.adapters import METHODS, get_trainable_parameters
from tunesmith.model.causal_lm import PackedCausalLM, wrap_model
from tunesmith.model.lm_head import measure_target_losses
from tunesmith.train.loop import MAX_BAD_STEPS, TrainingLoop
from tunesmith.train.optimizer import compute_learning_rate, get_moments


def run_training(
    documents: Callable[[int], Sequence[Document]] = make_step_documents,
    *,
    model: PackedCausalLM | None = None,
    num_steps: int = STEPS,
    warmup_steps: int = 2,
    **changed: Any,
) -> tuple[list[Event], dict[str, Tensor]]:
    """A whole run; its events and the trained weights."""
    model = model or make_tiny_model()
    config = dataclasses.replace(SETTINGS, **changed)
    events = list(
        TrainingLoop(model, documents, config, steps=num_steps, warmup_steps=warmup_steps)
    )
    return events, copy_weights(model)


# ---------------------------------------------------------------- packing is speed, not trajectory


def test_packed_steps_equal_unpacked_steps() -> None:
    (packed, ours), (alone, theirs) = (run_training(pack_length=length) for length in (10**6, 1))
    for item, other in zip(select_steps(packed), select_steps(alone), strict=True):
        assert item.loss == pytest.approx(other.loss, rel=1e-5)
        assert item.grad_norm == pytest.approx(other.grad_norm, rel=1e-3)
    for name in ours:
        assert float((ours[name] - theirs[name]).norm() / theirs[name].norm()) < 1e-4
    assert select_steps(packed)[-1].loss != pytest.approx(select_steps(packed)[0].loss, rel=1e-3)


def make_branching_documents(step: int) -> Sequence[Document]:
    """Other documents at every step, which begin alike."""
    prompt, other = make_tiny_document(24, step), make_tiny_document(40, 100 + step)
    tails = ((prompt, 24, 9), (prompt, 20, 5), (other, 31, 12), (other, 40, 1), (other, 30, 17))
    return [continue_document(*tail, index) for index, tail in enumerate(tails)]


def test_steps_with_shared_prefixes_equal_steps_without() -> None:
    runs = [
        run_training(make_branching_documents, pack_length=length, share_prefixes=length > 1)
        for length in (10**6, 80, 1)
    ]
    (_, ours), (_, halved), (alone, theirs) = runs
    assert select_steps(runs[0][0]) != select_steps(alone), "other numbers on the way"
    for item, two, other in zip(*(select_steps(events) for events, _ in runs), strict=True):
        assert item.loss == pytest.approx(other.loss, rel=1e-5)
        assert two.loss == pytest.approx(other.loss, rel=1e-5)
        assert (item.tokens, item.supervised_tokens) == (other.tokens, other.supervised_tokens)
    for name in ours:
        assert float((ours[name] - theirs[name]).norm() / theirs[name].norm()) < 1e-4
        assert float((halved[name] - theirs[name]).norm() / theirs[name].norm()) < 1e-4


def test_two_runs_are_bitwise_equal_and_seeds_matter() -> None:
    """With dropout, whose masks come from seed, step and pack."""
    runs = [run_training(model=make_tiny_model(lora_dropout=0.2), seed=seed) for seed in (5, 5, 6)]
    losses = [[event.loss for event in select_steps(events)] for events, _ in runs]
    assert losses[0] == losses[1]
    assert are_equal(runs[0][1], runs[1][1])
    assert losses[0] != losses[2]


def test_what_happens_between_events_changes_nothing() -> None:
    """Someone draws random numbers and runs the model between two steps: same bytes."""
    straight, expected = run_training(model=make_tiny_model(lora_dropout=0.2))
    model = make_tiny_model(lora_dropout=0.2)
    events: list[Event] = []
    for event in TrainingLoop(model, make_step_documents, SETTINGS, steps=STEPS):
        events.append(event)
        torch.rand(7)
        assert not model.network.training
        with torch.no_grad():
            model.compute_hidden(collate_documents([make_tiny_document(9)]))
    assert are_equal(copy_weights(model), expected)
    assert [event.loss for event in select_steps(events)] == [
        event.loss for event in select_steps(straight)
    ]


# ---------------------------------------------------------------- what a step is


def test_the_loss_is_the_mean_over_the_weights() -> None:
    """By hand, document by document; twice the weights are the same step."""
    model, documents = make_tiny_model(dtype=torch.float64), make_step_documents(1)
    total = weight = 0.0
    for document in documents:
        batch = collate_documents([document])
        losses = measure_target_losses(model.compute_hidden(batch), model.head, batch.targets_S)
        total, weight = (
            total + float((losses * batch.weights_S).sum()),
            weight + float(batch.weights_S.sum()),
        )
    double = [dataclasses.replace(d, weights_L=2 * d.weights_L) for d in documents]
    results = [
        select_steps(
            run_training(
                lambda _, ds=ds: ds, model=make_tiny_model(dtype=torch.float64), num_steps=1
            )[0]
        )[0]
        for ds in (documents, double)
    ]
    assert results[0].loss == pytest.approx(total / weight, rel=1e-12)
    assert results[1].loss == pytest.approx(results[0].loss, rel=1e-12)
    assert results[1].grad_norm == pytest.approx(results[0].grad_norm, rel=1e-12)


def test_a_row_of_more_weight_pulls_more() -> None:
    heavy = [
        dataclasses.replace(d, weights_L=d.weights_L * (5 if i == 3 else 1))
        for i, d in enumerate(make_step_documents(1))
    ]
    item, other = (
        run_training(lambda _, ds=ds: ds, num_steps=1)[0] for ds in (make_step_documents(1), heavy)
    )
    assert select_steps(item)[0].loss != pytest.approx(select_steps(other)[0].loss, rel=1e-4)


def test_counts_are_of_the_documents() -> None:
    documents = make_step_documents(1)
    result = select_steps(run_training(lambda _: documents, num_steps=1)[0])[0]
    assert result.tokens == sum(len(d) for d in documents) == sum(LENGTHS) + len(LENGTHS)
    assert result.supervised_tokens == sum(np.count_nonzero(d.weights_L) for d in documents)
    assert result.seconds > 0
    assert result.peak_bytes > 0


def test_the_rate_follows_the_schedule() -> None:
    events, _ = run_training()
    rates = [
        compute_learning_rate(s, peak=2e-3, warmup_steps=2, total_steps=6, schedule="linear")
        for s in range(6)
    ]
    assert [event.learning_rate for event in select_steps(events)] == rates


def test_a_step_without_documents_changes_nothing_but_the_schedule() -> None:
    model = make_tiny_model()
    training = TrainingLoop(
        model,
        lambda step: [] if step in (1, 3) else make_step_documents(step),
        SETTINGS,
        steps=STEPS,
    )
    before = copy_weights(model)
    first = next(training)
    assert isinstance(first, TrainStep)
    assert (first.loss, first.tokens, first.supervised_tokens, first.grad_norm) == (0.0, 0, 0, 0.0)
    assert are_equal(copy_weights(model), before)
    second, before = next(training), copy_weights(model)
    third = next(training)
    assert isinstance(second, TrainStep)
    assert isinstance(third, TrainStep)
    assert (third.step, third.learning_rate) == (
        3,
        compute_learning_rate(2, peak=2e-3, warmup_steps=2, total_steps=6, schedule="linear"),
    )
    assert are_equal(copy_weights(model), before)
    assert len(select_steps(list(training))) == 3


def test_training_learns() -> None:
    """One document again and again: its loss falls far."""
    for method in ("lora", "full"):
        model = make_tiny_model(method=method)
        events, _ = run_training(
            lambda _: [make_tiny_document(17)],
            model=model,
            num_steps=30,
            learning_rate=1e-2,
            warmup_steps=0,
        )
        losses = [event.loss for event in select_steps(events)]
        assert losses[-1] < 0.5 * losses[0]


@pytest.mark.parametrize("method", ["lora", "full"])
def test_bf16_follows_fp32(method: str) -> None:
    """The narrow copies of trained weights are those of the weights as they are now."""
    runs = [
        run_training(
            lambda _: make_step_documents(1),
            model=make_tiny_model("llama-64", dtype, method=method),
            num_steps=8,
            warmup_steps=0,
        )
        for dtype in (torch.bfloat16, torch.float32)
    ]
    narrow, wide = ([event.loss for event in select_steps(events)] for events, _ in runs)
    assert wide[-1] < 0.97 * wide[0]
    assert narrow[-1] - narrow[0] == pytest.approx(wide[-1] - wide[0], rel=0.15)
    assert {w.dtype for w in runs[0][1].values()} == {torch.float32}


# ---------------------------------------------------------------- what is no number


def make_poisoned_documents(step: int) -> list[Document]:
    *others, last = make_step_documents(step)
    return [
        *others,
        dataclasses.replace(last, id="bad:7", weights_L=np.where(last.weights_L > 0, np.inf, 0)),
    ]


def test_a_step_that_is_no_number_is_skipped() -> None:
    model = make_tiny_model()
    training = TrainingLoop(
        model,
        lambda step: make_poisoned_documents(step) if step == 3 else make_step_documents(step),
        SETTINGS,
        steps=STEPS,
    )
    for _ in range(2):
        next(training)
    before, updates = (
        copy_weights(model),
        [int(s["step"]) for s in training.optimizer.state.values()],
    )
    verdict = next(training)
    assert isinstance(verdict, CheckResult)
    assert (verdict.kind, verdict.level, verdict.step) == ("non-finite", "warn", 3)
    assert "bad:7" in verdict.evidence
    assert are_equal(copy_weights(model), before)
    assert [int(s["step"]) for s in training.optimizer.state.values()] == updates
    assert [event.step for event in select_steps(list(training))] == [4, 5, 6]
    assert all(torch.isfinite(w).all() for w in copy_weights(model).values())


def test_a_gradient_that_is_no_number_is_skipped() -> None:
    """Though the loss is one."""
    model = make_tiny_model()
    hook = next(iter(get_trainable_parameters(model.network).values())).register_hook(
        lambda g: g * math.inf
    )
    training, before = (
        TrainingLoop(model, make_step_documents, SETTINGS, steps=STEPS),
        copy_weights(model),
    )
    assert isinstance(next(training), CheckResult)
    assert are_equal(copy_weights(model), before)
    hook.remove()
    assert isinstance(next(training), TrainStep)


def test_many_in_a_row_end_the_run() -> None:
    model = make_tiny_model()
    training = TrainingLoop(
        model,
        lambda step: make_step_documents(step) if step == 1 else make_poisoned_documents(step),
        SETTINGS,
        steps=STEPS,
    )
    next(training)
    before = copy_weights(model)
    for _ in range(MAX_BAD_STEPS - 1):
        assert isinstance(next(training), CheckResult)
    with pytest.raises(GateError, match="bad:7"):
        next(training)
    assert are_equal(copy_weights(model), before)


def test_a_good_step_in_between_starts_the_count_again() -> None:
    events, _ = run_training(
        lambda step: make_step_documents(step) if step % 3 == 0 else make_poisoned_documents(step),
        num_steps=9,
    )
    assert [type(event) for event in events] == [CheckResult, CheckResult, TrainStep] * 3 + [
        TrainingEnd
    ]


@pytest.mark.parametrize(
    "dtype", [pytest.param(torch.float32, marks=pytest.mark.slow), torch.bfloat16], ids=str
)
def test_a_poisoned_model_never_trains(dtype: torch.dtype) -> None:
    """A NaN in any one weight of the base reaches the loss, through every kernel on the way."""
    names = (
        "embed_tokens.weight",
        "input_layernorm.weight",
        "q_proj.weight",
        "v_proj.weight",
        "up_proj.weight",
    )
    for name in (*names, "down_proj.weight", "norm.weight", "lm_head.weight"):
        network = make_tiny_network("llama-64", dtype)
        weight = next(p for n, p in network.named_parameters() if n.endswith(name))
        weight.data.view(-1)[3 if weight.dim() == 1 else slice(None)] = math.nan
        METHODS["lora"](network, LORA)
        model = wrap_model(network, dtype)
        before = copy_weights(model)
        with pytest.raises(GateError):
            list(TrainingLoop(model, make_step_documents, SETTINGS, steps=STEPS))
        assert are_equal(copy_weights(model), before)


# ---------------------------------------------------------------- stopping, and going on


def test_stop_ends_after_the_step() -> None:
    training = TrainingLoop(make_tiny_model(), make_step_documents, SETTINGS, steps=STEPS)
    next(training)
    training.stop()
    done = next(training)
    assert isinstance(done, TrainingEnd)
    assert (done.step, done.reason) == (1, "stopped")
    assert list(training) == []


def test_a_run_ends_by_itself() -> None:
    events, _ = run_training()
    assert [event.step for event in select_steps(events)] == [1, 2, 3, 4, 5, 6]
    assert isinstance(events[-1], TrainingEnd)
    assert (events[-1].step, events[-1].reason) == (6, "finished")
    assert events[-1].seconds == pytest.approx(sum(event.seconds for event in select_steps(events)))


@pytest.mark.parametrize(
    ("method", "dtype"), [("lora", torch.float32), ("full", torch.bfloat16)], ids=str
)
def test_a_resumed_run_is_bitwise_the_straight_one(
    method: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    """Also when the model has run, and even trained, before its state came back, and when its files
    change after."""
    straight, expected = run_training(model=make_tiny_model("llama-64", dtype, method=method))
    first = TrainingLoop(
        make_tiny_model("llama-64", dtype, method=method),
        make_step_documents,
        SETTINGS,
        steps=STEPS,
    )
    for _ in range(3):
        next(first)
    first.save(tmp_path)
    model = make_tiny_model("llama-64", dtype, method=method)
    training = TrainingLoop(model, make_step_documents, SETTINGS, steps=STEPS)
    next(training)
    with torch.no_grad():
        model.compute_hidden(collate_documents([make_tiny_document(9)]))
    training.restore(tmp_path)
    for file in tmp_path.iterdir():
        with file.open("r+b") as opened:
            opened.write(bytes(file.stat().st_size))
    resumed = select_steps(list(training))
    assert [(e.step, e.loss, e.grad_norm) for e in resumed] == [
        (e.step, e.loss, e.grad_norm) for e in select_steps(straight)[3:]
    ]
    assert are_equal(copy_weights(model), expected)


@pytest.mark.parametrize("method", ["lora", "full"])
def test_a_resumed_run_with_8_bit_moments_is_bitwise_the_straight_one(
    method: str, tmp_path: Path
) -> None:
    """Of a rank at which A and B are large enough to have them; norms and biases have theirs in
    fp32."""
    wish = dataclasses.replace(SETTINGS, optim="adamw_8bit")

    def make_loop() -> TrainingLoop:
        return TrainingLoop(
            make_tiny_model(method=method, lora_r=96), make_step_documents, wish, steps=STEPS
        )

    straight, second = run_straight_and_resumed(make_loop, tmp_path)
    assert are_equal(copy_weights(straight.model), copy_weights(second.model))
    remaining = [get_moments(second.optimizer, p) for p in second.parameters.values()]
    assert {actual["state1"].dtype for actual in remaining} == {torch.uint8, torch.float32}


def test_the_end_token_is_what_is_learned_last() -> None:
    """The tests' documents are like real ones: each ends in a trained end token."""
    assert all(d.tokens_L[-1] == END and d.weights_L[-1] == 1 for d in make_step_documents(1))


def test_a_second_rollback_undoes_what_was_set_after_it() -> None:
    training = TrainingLoop(
        make_tiny_model("llama-64", torch.float32), make_step_documents, SETTINGS, steps=STEPS
    )
    raised = [
        Rollback(30, 20, "forgotten", "", "", rehearsal_ratio=0.2),
        Rollback(25, 10, "forgotten", "", "", rehearsal_ratio=0.4),
    ]
    training.set_rollbacks(raised[:1])
    assert training.ratio_changes == ((20, 0.2),)
    training.set_rollbacks(raised)
    assert training.ratio_changes == ((10, 0.4),), "from step 20 on it is not lowered again"


def test_rollbacks_scale_the_rate_from_the_step_that_they_return_to() -> None:
    config = dataclasses.replace(SETTINGS, lr_scheduler_type="constant", warmup_ratio=0.0)
    training = TrainingLoop(make_tiny_model(), make_step_documents, config, steps=STEPS)
    spikes = [(3, 2, 0.5), (5, 4, 0.25)]
    training.set_rollbacks(
        [Rollback(step, to, "spike", "", "", lr_factor=factor) for step, to, factor in spikes]
    )
    rates = [event.learning_rate for event in select_steps(list(training))]
    factors = [1, 1, 0.5, 0.5, 0.125, 0.125]
    assert rates == pytest.approx([config.learning_rate * factor for factor in factors])
