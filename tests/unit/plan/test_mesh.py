"""How the GPUs of a target share a run: its weights, its documents, and whether they pay."""

import dataclasses
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from llama_sizes import LLAMA_8B, LLAMA_70B, LLAMA_405B
from tunesmith.core.errors import InputError, MachineError
from tunesmith.core.json_io import parse_as, to_jsonable
from tunesmith.core.mesh import Mesh
from tunesmith.core.types import ModelSpec, Plan
from tunesmith.plan.build import build_plan, refuse_if_too_large
from tunesmith.plan.hardware_presets import HARDWARE_PRESETS, choose_machine, parse_target
from tunesmith.plan.mesh import (
    explain_batch,
    list_fewer_gpus,
    make_option,
    refuse_shared_documents,
)
from tunesmith.plan.mesh_time import estimate_mesh_step
from tunesmith.plan.method_comparison import estimate_method
from tunesmith.plan.rules import RuleContext
from tunesmith.recipe.schema import Recipe

Planner = Callable[..., Plan]


def get_mesh(plan: Plan) -> Mesh:
    assert plan.mesh is not None
    return plan.mesh.mesh


def test_weights_are_replicated_where_a_step_fits_on_one_gpu(plan: Planner) -> None:
    made = plan(LLAMA_8B, "8xh100")
    assert get_mesh(made) == Mesh(8, 1, shard=1)
    assert get_mesh(made).replicate == 8
    assert made.mesh is not None
    assert made.mesh.missing == ""
    assert made.mesh.command == (
        "torchrun --standalone --nproc-per-node 8 -m tunesmith train recipe.yaml"
    )
    one = plan(LLAMA_8B, "h100").memory_bytes
    assert made.memory_bytes["weights"] == one["weights"], "each GPU has all of them"
    assert made.memory_bytes["activations"] < one["activations"] / 5, "and a part of the rows"


def test_a_model_that_fits_no_gpu_is_sharded_inside_a_node(plan: Planner) -> None:
    made = plan(LLAMA_70B, "8xh100", method="lora")
    mesh = get_mesh(made)
    assert 2 < mesh.shard <= 8
    assert mesh.replicate * mesh.shard == 8
    parts = made.memory_bytes
    block_bytes = 2 * made.model.block_parameters
    rest_bytes = 2 * (made.model.parameters - made.model.block_parameters)
    assert parts["weights"] == pytest.approx(rest_bytes + block_bytes / mesh.shard, rel=1e-6)
    assert parts["gathered"] == pytest.approx(2 * block_bytes / 80, rel=1e-6)
    assert parts["peak"] == sum(parts.values()) - parts["peak"]
    two_nodes = get_mesh(plan(LLAMA_70B, "2x8xh100", method="lora"))
    assert two_nodes.shard <= 8, "the network between nodes is slower than the links inside"


def test_four_bits_are_chosen_where_they_make_a_copy_fit(plan: Planner) -> None:
    """Nothing is gathered then, and each GPU is a copy."""
    made = plan(LLAMA_70B, "8xh100")
    assert (made.config.method, get_mesh(made).shard) == ("qlora", 1)


def test_a_plan_that_this_version_cannot_run_says_so_and_train_refuses_it(plan: Planner) -> None:
    made = plan(LLAMA_70B, "8xh100", method="lora", modules_to_save=["lm_head"])
    assert made.mesh is not None
    assert made.mesh.missing == "modules_to_save with sharded weights"
    message = "needs modules_to_save with sharded weights, which this version cannot run"
    with pytest.raises(InputError, match=message) as refusal:
        refuse_if_too_large(made)
    assert "a step fits on one GPU" in refusal.value.fix
    estimate = estimate_method(made)
    assert (estimate.has_enough_memory, estimate.missing) == (True, made.mesh.missing)
    refuse_if_too_large(plan(LLAMA_8B, "8xh100"))


def test_updates_in_the_backward_pass_are_for_one_gpu(plan: Planner) -> None:
    how: dict[str, Any] = {"method": "full", "max_grad_norm": 0, "batch_size": 4, "longest": 500}
    one, two = (plan({}, target, **how) for target in ("h100", "2xh100"))
    assert one.config.step_in_backward
    refuse_if_too_large(one)
    with pytest.raises(InputError, match="max_grad_norm: 0") as refusal:
        refuse_if_too_large(two)
    assert "set max_grad_norm: 1" in refusal.value.fix


def test_more_gpus_are_a_way_out_of_too_little_memory_if_they_share_weights(plan: Planner) -> None:
    made = plan(LLAMA_70B, "h100", method="lora")
    with pytest.raises(MachineError) as refusal:
        refuse_if_too_large(made)
    assert "more GPUs" not in refusal.value.fix
    real = dataclasses.replace(made.machine, num_gpus=8, num_nodes=0)
    with pytest.raises(MachineError) as refusal:
        refuse_if_too_large(dataclasses.replace(made, machine=real, mesh=None))
    assert "more GPUs help if they hold the weights together: --dp-shard-size" in refusal.value.fix


def test_what_fits_nowhere_is_said_with_the_memory_it_would_take(plan: Planner) -> None:
    made = plan(LLAMA_405B, "8xh100", method="lora")
    assert made.mesh is not None
    assert made.mesh.mesh.shard == 8
    reasons = {choice.name: choice.reason for choice in made.mesh.choices}
    assert reasons["dp_shard_size"].startswith("even shared by all GPUs, a step needs 1")
    assert not make_option(made).has_enough_memory


def test_a_long_document_is_divided_over_the_gpus_that_share_its_heads(plan: Planner) -> None:
    short = plan(LLAMA_8B, "8xrtx4090", method="qlora", longest=4_000, max_length=4_000)
    made = plan(LLAMA_8B, "8xrtx4090", method="qlora", longest=60_000, max_length=60_000)
    assert get_mesh(short).context == 1
    mesh = get_mesh(made)
    assert mesh.context in (2, 4, 8)
    assert mesh.document_groups == 8 // mesh.context
    assert made.mesh is not None
    assert made.mesh.missing == ""
    assert made.mesh.command.endswith(f"train recipe.yaml --context-parallel-size {mesh.context}")
    assert made.config.context_parallel_size == mesh.context
    assert made.mesh.step.exchange_seconds > 0
    assert made.memory_bytes["peak"] * 1.15 <= made.machine.available_bytes
    one_head = LLAMA_8B | {"num_kv_heads": 1}
    stuck = plan(one_head, "8xrtx4090", method="qlora", longest=60_000, max_length=60_000)
    assert get_mesh(stuck).context == 1, "a KV head is not divided"


def test_the_recipe_says_how_many_gpus_share_a_document(plan: Planner) -> None:
    made = plan(LLAMA_8B, "8xh100", context_parallel_size=4)
    assert get_mesh(made) == Mesh(8, 1, context=4)
    assert made.reasons["context_parallel_size"].decided_by == "user"
    too_large = plan(LLAMA_405B, "8xh100", method="lora", context_parallel_size=4)
    assert not make_option(too_large).has_enough_memory
    assert get_mesh(too_large).context == too_large.config.context_parallel_size == 4


@pytest.mark.parametrize(
    ("model", "wishes", "problem"),
    [
        ({"num_kv_heads": 1}, {}, "32 query heads and 1 KV head: not divisible"),
        ({"num_heads": 9}, {}, "9 query heads and 8 KV heads: not divisible"),
        ({}, {"stage": "preference"}, "one number of all its tokens"),
        (
            {},
            {"target": "4xh100", "context_parallel_size": 8},
            "has 4 GPUs, which groups of 8 do not divide",
        ),
        ({}, {"target": "h100"}, "has 1 GPU, which groups of 2 do not divide"),
    ],
)
def test_documents_that_gpus_cannot_share_are_refused(
    plan: Planner, model: dict[str, Any], wishes: dict[str, Any], problem: str
) -> None:
    wishes = {"target": "8xh100", "context_parallel_size": 2} | wishes
    with pytest.raises(InputError, match=problem) as refusal:
        plan(LLAMA_8B | model, wishes.pop("target"), **wishes)
    assert refusal.value.where == f"context_parallel_size: {wishes['context_parallel_size']}"


def test_layers_that_carry_a_state_refuse_shared_documents(
    make_context: Callable[..., RuleContext], make_spec: Callable[..., ModelSpec]
) -> None:
    context = make_context()
    context = dataclasses.replace(context, model=make_spec(LLAMA_8B))
    hybrid = dataclasses.replace(context.model, layer_mixers=("delta", "attention"))
    refuse_shared_documents(context, 2)
    with pytest.raises(InputError, match="layers of delta, which read tokens in their order"):
        refuse_shared_documents(dataclasses.replace(context, model=hybrid), 2)


def test_full_fine_tuning_holds_a_shard_of_everything(plan: Planner) -> None:
    made = plan(LLAMA_8B, "8xa100-80gb", method="full", optim="adamw")
    mesh = get_mesh(made)
    assert mesh.shard > 1
    parts = made.memory_bytes
    assert parts["weights"] == 0, "16-bit copies exist where they are gathered"
    assert parts["trained"] == pytest.approx(16 * made.model.parameters / mesh.shard, rel=1e-6)


# ---------------------------------------------------------------- time


def test_computing_and_all_that_gpus_wait_for_add_up(plan: Planner) -> None:
    made = plan(LLAMA_70B, "8xh100", method="lora", batch_size=16)
    assert made.mesh is not None
    step = made.mesh.step
    low, high = step.seconds
    assert low == pytest.approx(step.compute_seconds[0] + step.gather_seconds + step.reduce_seconds)
    assert low <= high
    shard = made.mesh.mesh.shard
    block_bytes = 2 * made.model.block_parameters
    moved = 2 * block_bytes * (shard - 1) / shard
    assert step.gather_seconds == pytest.approx(moved / HARDWARE_PRESETS["h100"].link)
    adapter_bytes = 4 * 16 * sum(part.inputs + part.outputs for part in made.model.parts.values())
    summed = 2 * adapter_bytes * 7 / 8 / HARDWARE_PRESETS["h100"].link
    assert step.reduce_seconds == pytest.approx(summed)


def test_few_rows_do_not_fill_many_gpus_and_the_plan_names_the_batch_that_would(
    plan: Planner,
) -> None:
    made = plan(LLAMA_8B, "8xh100", method="lora", batch_size=4, learning_rate=1e-4)
    assert made.mesh is not None
    batch = made.mesh.batch
    assert made.mesh.step.busy_share < 0.5
    assert batch is not None
    assert batch.busy_share >= 0.8
    assert math.log2(batch.batch_size / 4) % 1 == 0
    # a batch below 16 rows has the rate of 16
    assert batch.learning_rate == pytest.approx(1e-4 * math.sqrt(batch.batch_size / 16), rel=0.05)
    assert batch.steps == math.ceil(3 * 1000 / batch.batch_size)
    text = explain_batch(made.mesh, unit="rows")
    assert text.startswith("8 GPUs do not pay with 1,200 tokens per step")
    assert f"{batch.batch_size} rows per step keep them busy" in text
    assert "(yours, grown with the square root of the batch from 16 rows on)" in text
    filled = plan(LLAMA_8B, "8xh100", method="lora", batch_size=batch.batch_size)
    assert filled.mesh is not None
    assert filled.mesh.batch is None
    assert filled.mesh.step.busy_share == pytest.approx(batch.busy_share)


@pytest.mark.parametrize(
    ("stage", "key", "size"),
    [("sft", "batch_size", 4), ("preference", "batch_size", 4), ("cpt", "batch_tokens", 4096)],
)
def test_a_rate_by_rule_is_that_of_a_plan_with_the_larger_batch(
    plan: Planner, stage: str, key: str, size: int
) -> None:
    made = plan(LLAMA_8B, "8xh100", method="lora", stage=stage, **{key: size})
    assert made.mesh is not None
    batch = made.mesh.batch
    assert batch is not None
    assert batch.batch_size > size
    wishes = {"stage": stage, key: batch.batch_size}
    filled = plan(LLAMA_8B, "8xh100", method="lora", **wishes)
    assert batch.learning_rate == filled.config.learning_rate
    assert batch.steps == filled.steps
    text = explain_batch(made.mesh, unit="rows")
    assert f"learning_rate {batch.learning_rate:g} (by the rule, for that batch)" in text


def test_no_batch_of_little_data_fills_many_gpus(plan: Planner) -> None:
    made = plan({}, "4x8xh100", batch_size=16)  # 135M: launches take longer than computing
    assert made.mesh is not None
    assert made.mesh.batch is not None
    assert made.mesh.batch.batch_size == 0
    assert explain_batch(made.mesh, unit="rows").endswith(
        "no batch of this data fills them: use fewer GPUs"
    )


def test_a_row_is_not_divided(plan: Planner) -> None:
    """With fewer rows than GPUs, some have none, and the step takes as long as a long row."""
    eight = plan(LLAMA_8B, "8xh100", batch_size=4)
    four = plan(LLAMA_8B, "4xh100", batch_size=4)
    assert eight.mesh is not None
    assert four.mesh is not None
    assert eight.mesh.step.gpu_tokens == four.mesh.step.gpu_tokens == 400
    assert eight.mesh.step.busy_share < four.mesh.step.busy_share


def test_more_gpus_are_faster_where_rows_are_many_and_never_more_than_so_many_times(
    plan: Planner,
) -> None:
    rates: list[float] = []
    for target in ("h100", "2xh100", "4xh100", "8xh100"):
        made = plan(LLAMA_8B, target, batch_size=256)
        assert made.mesh is not None
        rates.append(made.mesh.step.tokens_per_second[1])
    for number, rate in zip((2, 4, 8), rates[1:], strict=True):
        assert 0.9 * number < rate / rates[0] <= number


def test_shared_prefixes_save_less_on_each_of_many_gpus(plan: Planner) -> None:
    def save_half_of_a_full_step(batch_size: int, pack_length: int) -> float:
        del pack_length
        return 0.5 if batch_size >= 64 else 0.1

    how: dict[str, Any] = {"batch_size": 64, "saved_share": save_half_of_a_full_step}
    one, eight = (plan(LLAMA_8B, target, **how) for target in ("h100", "8xh100"))
    assert one.mesh is not None
    assert eight.mesh is not None
    assert one.config.share_prefixes
    assert eight.mesh.step.tokens == pytest.approx(one.mesh.step.tokens * 0.9 / 0.5, rel=0.01)


@pytest.mark.parametrize("stage", ["cpt", "preference"])
def test_every_stage_has_a_mesh_and_a_batch_in_its_own_unit(plan: Planner, stage: str) -> None:
    made = plan({}, "8xh100", stage=stage)
    assert made.mesh is not None
    assert made.mesh.mesh.replicate == 8
    batch = made.mesh.batch
    assert batch is not None
    of_plan = made.config.batch_tokens if stage == "cpt" else made.config.batch_size
    assert of_plan is not None
    assert batch.batch_size == 0 or math.log2(batch.batch_size / of_plan) % 1 == 0
    assert made.seconds == (), "session/inputs.py adds it"


def test_less_memory_than_the_card_has_may_need_a_shard(plan: Planner) -> None:
    shards = [
        get_mesh(plan(LLAMA_8B, "8xh100", method="lora", memory=memory)).shard
        for memory in ("80GB", "16GB")
    ]
    assert shards[0] == 1 < shards[1]


# ---------------------------------------------------------------- what else there is


def test_other_ways_are_fewer_gpus(plan: Planner) -> None:
    made = plan(LLAMA_8B, "4x8xh100")
    fewer = list_fewer_gpus(made.machine)
    sizes = [(machine.num_nodes, machine.num_gpus) for machine in fewer]
    assert sizes == [(1, 1), (1, 2), (1, 4), (1, 8), (2, 8)]
    option = make_option(made)
    assert (option.target, option.method, option.missing) == ("4x8xh100", "lora", "")
    assert option.has_enough_memory


def test_a_plan_with_a_mesh_is_read_as_it_was_written(plan: Planner) -> None:
    made = plan(LLAMA_70B, "8xh100", method="lora", batch_size=4)
    assert parse_as(Plan, to_jsonable(made)).mesh == made.mesh
    assert plan(LLAMA_8B, "h100").mesh is not None
    assert get_mesh(plan(LLAMA_8B, "h100")) == Mesh()


def test_this_machine_has_no_mesh(make_context: Callable[..., RuleContext]) -> None:
    context = make_context()
    made = build_plan(
        Recipe.model_validate({"model": "smollm2", "data": "train.jsonl"}),
        machine=dataclasses.replace(context.machine, num_gpus=8),
        model=context.model,
        data={"data": context.data},
        output_dir=Path("runs/run-1"),
        now="2026-01-01T00:00:00",
    )
    assert made.mesh is None


# ---------------------------------------------------------------- published rates

TITAN = "torchtitan, December 2024"
# what: (where, model, method, activations, tokens of a row, rows of a GPU, target, shard, tokens
# per second of a GPU, and where that lies in the predicted range)
PUBLISHED_RATES: dict[str, tuple[str, dict[str, Any], str, str, int, int, str, int, float, str]] = {
    "70B LoRA": ("torchtune", LLAMA_70B, "lora", "full", 2048, 2, "8xa100-80gb", 8, 437, "above"),
    "405B QLoRA": (
        *("torchtune", LLAMA_405B, "qlora", "full", 2048, 2, "8xa100-80gb", 8, 82, "above"),
    ),
    "70B LoRA, H100": ("NeMo", LLAMA_70B, "lora", "selective", 4096, 1, "8xh100", 8, 1092, "in"),
    "and 16": ("NeMo", LLAMA_70B, "lora", "selective", 4096, 1, "2x8xh100", 8, 985, "in"),
    "8B full": (TITAN, LLAMA_8B, "full", "selective", 8192, 2, "8xh100", 8, 5762, "in"),
    "8B compiled": (TITAN, LLAMA_8B, "full", "selective", 8192, 2, "8xh100", 8, 6667, "in"),
    "8B on 128": (TITAN, LLAMA_8B, "full", "selective", 8192, 2, "16x8xh100", 128, 6514, "in"),
    "8B full, torchao": (
        "torchao",
        LLAMA_8B,
        "full",
        "selective",
        8192,
        1,
        "8xh100",
        8,
        6150,
        "in",
    ),
}


@pytest.mark.parametrize("what", PUBLISHED_RATES)
def test_published_rates_lie_where_the_page_says(
    what: str, make_context: Callable[..., RuleContext], make_spec: Callable[..., ModelSpec]
) -> None:
    """docs/results/plan.md has this table: most are in the predicted range, the others are said."""
    _, sizes, method, policy, length, rows, target, shard, published, where = PUBLISHED_RATES[what]
    context = make_context(
        method=method,
        gradient_checkpointing=policy,
        pack_length=length * rows,
        lora_r=16,
        use_dora=False,
        modules_to_save=(),
        step_in_backward=False,
        share_prefixes=False,
        max_length=length,
    )
    machine = choose_machine(context.machine, target, None)
    num_gpus = machine.num_gpus * machine.num_nodes
    batch = dataclasses.replace(context.settings["batch_size"], value=rows * num_gpus)
    data = dataclasses.replace(
        context.data,
        rows=1000,
        tokens=1000 * length,
        supervised_tokens=1000 * length,
        length_percentiles={"p90": length, "max": length},
    )
    context = dataclasses.replace(
        context,
        machine=machine,
        model=make_spec(sizes),
        data=data,
        mesh=Mesh(num_gpus, machine.num_nodes, shard),
        settings=context.settings | {"batch_size": batch},
    )
    step = estimate_mesh_step(context, parse_target(target).preset)
    waiting = step.exchange_seconds + step.reduce_seconds
    # these trainers gather a layer while the one before computes
    seconds = [max(compute, step.gather_seconds) + waiting for compute in step.compute_seconds]
    high, low = (step.tokens / second / num_gpus for second in seconds)
    assert where == ("below" if published < low else "above" if published > high else "in")
