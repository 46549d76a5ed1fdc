"""How long a step takes on several GPUs, and how much of it they compute.

In: the settings that are decided so far, with a mesh, and the preset of the GPUs. Out: a MeshStep.
A step takes the time to compute and to wait: for gathered weights, as if each layer came right
before it computes, for exchanges within a document, and for the sum of the gradients. A row is not
divided, so with few rows some GPUs wait. All is counted from data sheets and assumed shares of
them, and nothing was measured on several GPUs."""

from __future__ import annotations

import dataclasses
import math

from tunesmith.core.mesh import Mesh, MeshStep
from tunesmith.core.types import ModelSpec
from tunesmith.plan.activations import ALL_LINEAR, NO_PART
from tunesmith.plan.flops import MFU_RANGE, compute_target_flops, compute_token_flops
from tunesmith.plan.gpu_time import compute_launch_seconds
from tunesmith.plan.hardware_presets import HardwarePreset
from tunesmith.plan.memory import (
    MASTER_BYTES,
    NF4_BYTES,
    compute_frozen_bytes,
    count_trained_parameters,
    get_dtype_bytes,
)
from tunesmith.plan.rules import RuleContext
from tunesmith.plan.step_memory import collect_footprint, estimate_savings

WEIGHT_READS = 2  # of all weights in a pack: forward and backward
GATHERS = 2  # of sharded weights in a pack: forward and backward
GRADIENT_BYTES = 4  # gradients are summed in fp32


def estimate_mesh_step(context: RuleContext, preset: HardwarePreset) -> MeshStep:
    """Predict the time of a step on the mesh of the context."""
    mesh = context.mesh
    tokens = estimate_mean_tokens(context)
    group_tokens = tokens / mesh.document_groups
    if mesh.document_groups > 1:
        group_tokens = min(tokens, max(group_tokens, _estimate_long_row(context)))
    packs = math.ceil(group_tokens / (context["pack_length"] * context.documents_per_row))
    token_seconds = _compute_token_flops(context) / preset.flops / MFU_RANGE[1]
    floor = packs * _compute_floor(context, preset)
    fixed = packs * _compute_dequantize_seconds(context, preset)
    compute = group_tokens / mesh.context * token_seconds
    fast = max(compute + fixed, floor)
    slow = max(compute * MFU_RANGE[1] / MFU_RANGE[0] + fixed, floor)
    gather = packs * _compute_gather_seconds(context, preset)
    exchange = _compute_exchange_seconds(context, preset, group_tokens / mesh.context)
    reduction = _compute_reduce_seconds(context, preset)
    waiting = gather + exchange + reduction
    return MeshStep(
        tokens=round(tokens),
        gpu_tokens=round(group_tokens / mesh.context),
        compute_seconds=(fast, slow),
        gather_seconds=gather,
        exchange_seconds=exchange,
        reduce_seconds=reduction,
        seconds=(fast + waiting, slow + waiting),
        busy_share=tokens / mesh.num_gpus * token_seconds / (fast + waiting),
    )


def estimate_mean_tokens(context: RuleContext) -> float:
    """Return the computed tokens of a step on average, on all GPUs together."""
    if context.stage == "cpt":
        tokens = float(context["batch_tokens"])
    else:
        tokens = context["batch_size"] * context.data.tokens / max(1, context.data.rows)
    tokens *= 1 - estimate_savings(context)
    if "rehearsal_ratio" in context:
        tokens /= 1 - context["rehearsal_ratio"]
    return max(1.0, tokens)


def _estimate_long_row(context: RuleContext) -> int:
    """Return the tokens of a long row, which one group of GPUs computes alone."""
    if context.stage == "cpt":
        return context["max_length"]
    return context.documents_per_row * context.data.length_percentiles.get("p90", 1)


def _compute_token_flops(context: RuleContext) -> float:
    """Return the operations per token of a step, with the head's for the supervised share."""
    model = context.model
    method = context["method"]
    is_full = method == "full"
    token_flops = compute_token_flops(
        model,
        method,
        context["gradient_checkpointing"],
        0 if is_full else context["lora_r"],
        ALL_LINEAR if is_full else context["lora_target_modules"],
    )
    supervised_share = context.data.supervised_tokens / max(1, context.data.tokens)
    return token_flops + supervised_share * compute_target_flops(model, method)


def _compute_floor(context: RuleContext, preset: HardwarePreset) -> float:
    """Return the least time of a pack, however few its tokens are: its kernels are launched, and
    all weights are read."""
    launch = 3 * compute_launch_seconds(context.model)
    weight_bytes = compute_frozen_bytes(
        context.model, context["method"], get_dtype_bytes(context["dtype"])
    )
    return max(launch, WEIGHT_READS * weight_bytes / preset.bandwidth)


def _compute_dequantize_seconds(context: RuleContext, preset: HardwarePreset) -> float:
    """Return the time in which a pack turns 4-bit weights into 16 bits: read once and written once
    in every pass."""
    if context["method"] != "qlora":
        return 0.0
    passes = WEIGHT_READS + (context["gradient_checkpointing"] == "full")
    moved_bytes = context.model.block_parameters * (NF4_BYTES + 2)
    return passes * moved_bytes / preset.bandwidth


def _compute_gather_seconds(context: RuleContext, preset: HardwarePreset) -> float:
    """Return the time in which the weights of a pack come from the other GPUs of the shard group,
    and go back as gradients in full fine-tuning."""
    mesh = context.mesh
    model = context.model
    dtype_bytes = get_dtype_bytes(context["dtype"])
    if context["method"] == "full":
        rest = model.parameters - model.block_parameters  # gathered once a step
        moved_bytes = model.block_parameters * (GATHERS * MASTER_BYTES + GRADIENT_BYTES)
        moved_bytes += rest * (MASTER_BYTES + GRADIENT_BYTES)
    else:
        rest = (model.parameters - model.block_parameters) * dtype_bytes
        moved_bytes = GATHERS * (compute_frozen_bytes(model, context["method"], dtype_bytes) - rest)
    link = preset.link if mesh.shard <= mesh.gpus_per_node else preset.network
    return moved_bytes * (mesh.shard - 1) / mesh.shard / link


def _compute_exchange_seconds(
    context: RuleContext, preset: HardwarePreset, gpu_tokens: float
) -> float:
    """Return the time of the all-to-alls around attention: a part of what they take stays here."""
    size = context.mesh.context
    return count_exchanged_bytes(context, gpu_tokens) * (size - 1) / size / preset.link


def count_exchanged_bytes(context: RuleContext, gpu_tokens: float) -> int:
    """Return the bytes that a GPU gives to the all-to-alls around attention, in which the GPUs that
    share a document change tokens for heads: q, k, v and the output."""
    attention = context.model.parts.get("attention", NO_PART)
    values = attention.inner_outputs + attention.inner_inputs
    passes = count_layer_passes(context) / context.model.num_layers
    return int(passes * gpu_tokens * values * get_dtype_bytes(context["dtype"]))


def count_layer_passes(context: RuleContext) -> int:
    """Return how many layers a pack goes through: forward, backward, and again where they are
    recomputed, which the last one is not."""
    layers = context.model.num_layers
    return 2 * layers + (layers - 1 if context["gradient_checkpointing"] == "full" else 0)


def _compute_reduce_seconds(context: RuleContext, preset: HardwarePreset) -> float:
    """Return the time to sum the gradients of all copies. Those of sharded weights are scattered
    while they are gathered, and only their shards are summed here."""
    mesh = context.mesh
    footprint = collect_footprint(context)
    gradient_bytes = GRADIENT_BYTES * count_trained_parameters(context.model, **footprint)
    if context["method"] != "full" or mesh.shard == 1:
        return _sum_over(gradient_bytes, mesh, preset)
    copies_per_node = max(1, mesh.gpus_per_node // mesh.shard)
    copies = dataclasses.replace(mesh, num_gpus=copies_per_node * mesh.num_nodes, shard=1)
    if mesh.shard > mesh.gpus_per_node:
        copies = Mesh(num_gpus=mesh.replicate, num_nodes=mesh.replicate)
    return _sum_over(gradient_bytes / mesh.shard, copies, preset)


def _sum_over(num_bytes: float, mesh: Mesh, preset: HardwarePreset) -> float:
    """Return the time of an all-reduce: inside a node, then a part of each GPU between nodes."""
    gpus = mesh.gpus_per_node
    nodes = mesh.num_nodes
    inside = 2 * num_bytes * (gpus - 1) / gpus / preset.link
    return inside + 2 * num_bytes / gpus * (nodes - 1) / nodes / preset.network


def can_divide_documents(model: ModelSpec) -> bool:
    """Return whether GPUs can change tokens for heads in every layer: recurrent ones read tokens in
    their order."""
    return set(model.layer_mixers) == {"attention"}
