"""Time measured on a few made-up layers: steps of the plan, without weights, of every method."""

import dataclasses
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from tiny_runs import make_tiny_recipe
from tunesmith.core.errors import InputError, MachineError
from tunesmith.core.types import Document
from tunesmith.model.causal_lm import load_network
from tunesmith.model.quantization import build_truncated_network
from tunesmith.plan.flops import count_computed_tokens
from tunesmith.session import inputs, planner
from tunesmith.train import calibrate
from tunesmith.train.calibrate import choose_depth
from tunesmith.train.time_estimate import EvalCostEstimate, add_run_seconds


@pytest.fixture
def fast_benchmark(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calibrate, "SECONDS_PER_DEPTH", 0.02)
    monkeypatch.setattr(calibrate, "MIN_SECONDS", 0.001)


@pytest.mark.parametrize("method", ["lora", "qlora", "full"])
def test_a_plan_gets_its_time_without_weights(
    method: str, fast_benchmark: None, tiny_folder: Path, tmp_path: Path
) -> None:
    del fast_benchmark
    alone = tmp_path / "alone"
    shutil.copytree(tiny_folder, alone, ignore=shutil.ignore_patterns("*.safetensors"))
    wish = make_tiny_recipe(
        alone, tmp_path, method=method, lora_r="auto", lora_target_modules="auto"
    )
    run_inputs = inputs.load_inputs(wish, needs_weights=False)
    plan = planner.make_plan(run_inputs)
    timed = calibrate.calibrate_plan(plan, run_inputs)
    assert timed.seconds[0] > 0
    assert "of 1 and 2 of 2 layers" in timed.seconds_source
    assert (
        dataclasses.replace(timed, seconds=plan.seconds, seconds_source=plan.seconds_source) == plan
    )
    assert (
        add_run_seconds(timed, EvalCostEstimate(plan, run_inputs)).total_seconds > timed.seconds[0]
    )


def test_a_step_is_its_layers_and_the_rest(
    fast_benchmark: None, tiny_folder: Path, tmp_path: Path
) -> None:
    del fast_benchmark
    run_inputs = inputs.load_inputs(
        make_tiny_recipe(tiny_folder, tmp_path, lora_target_modules=["layers.1.mlp.up_proj"])
    )
    plan = planner.make_plan(run_inputs)
    actual = calibrate.measure_calibration(plan, run_inputs)
    assert actual.compute_token_seconds(4) == pytest.approx(
        actual.other_seconds + 4 * actual.layer_seconds
    )
    assert actual.gemm_flops > 1e6
    assert actual.steps >= 2
    assert count_computed_tokens(plan) > 0


def test_large_steps_are_cut_and_pairs_stay_together(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = planner.make_plan(inputs.load_inputs(make_tiny_recipe(tiny_folder, tmp_path)))
    monkeypatch.setattr(calibrate, "MAX_STEP_FLOPS", 1)  # 256 tokens
    some = torch.zeros(200, dtype=torch.int32).numpy()
    sides: list[Any] = ["chosen", "rejected"] * 3
    documents = [Document(str(i), some, some, side) for i, side in enumerate(sides)]
    assert len(calibrate._make_truncator(plan, 2)(documents)) == 2
    assert (
        len(
            calibrate._make_truncator(plan, 2)(
                [dataclasses.replace(item, side="") for item in documents]
            )
        )
        == 2
    )
    monkeypatch.setattr(calibrate, "MAX_STEP_FLOPS", 1e15)
    assert len(calibrate._make_truncator(plan, 2)(documents)) == 6


def test_another_machine_cannot_be_measured_and_what_does_not_fit_neither(
    tiny_folder: Path, tmp_path: Path
) -> None:
    run_inputs = inputs.load_inputs(make_tiny_recipe(tiny_folder, tmp_path))
    plan = planner.make_plan(run_inputs)
    with pytest.raises(InputError, match="only the CPU of this machine"):
        calibrate.measure_calibration(
            dataclasses.replace(plan, machine=dataclasses.replace(plan.machine, device="cuda")),
            run_inputs,
        )
    small = dataclasses.replace(
        plan, machine=dataclasses.replace(plan.machine, available_bytes=1000)
    )
    with pytest.raises(MachineError, match="two layers and the embeddings"):
        calibrate.measure_calibration(small, run_inputs)


def test_made_up_weights_are_the_stock_shapes(tiny_folder: Path) -> None:
    network = build_truncated_network(tiny_folder, torch.float32, 1, is_quantized=False)
    names = {name for name, _ in network.named_parameters()}
    assert not any(".layers.1." in name for name in names)
    stock = load_network(tiny_folder, torch.float32)
    expected = {
        name: parameter.shape
        for name, parameter in stock.named_parameters()
        if ".layers.1." not in name
    }
    assert {name: parameter.shape for name, parameter in network.named_parameters()} == expected
    assert any(len(shape) == 2 and shape[0] != shape[1] for shape in expected.values())
    assert all(float(parameter.min()) > 0 for parameter in network.parameters())
    assert not any(
        parameter.is_meta or parameter.requires_grad for parameter in network.parameters()
    )


@pytest.mark.parametrize(
    ("mixers", "max_layers", "depth"),
    [
        (("attention",) * 30, 6, 6),
        (("delta", "delta", "delta", "attention") * 6, 6, 5),
        (("delta", "delta", "delta", "attention") * 6, 3, 3),
        (("mamba2", "attention") * 9, 6, 5),
        (("conv", "conv", "attention", "conv", "attention", "conv", "conv", "attention"), 6, 6),
        (("attention", "attention"), 2, 2),
    ],
)
def test_the_deeper_model_adds_entire_patterns_of_layers(
    mixers: tuple[str, ...], max_layers: int, depth: int
) -> None:
    assert choose_depth(mixers, max_layers) == depth
