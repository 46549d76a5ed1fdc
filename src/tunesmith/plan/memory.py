"""What a run takes in main memory at its peak, by component, and on disk.

In: the shape of the model and the settings of the plan. Out: bytes. The saved activations are those
of our own layers (model/layers.py), per token and layer 4 H (inputs and outputs of two norms),
2 Q + 2 KV (q, k, v and the output of attention) and 2 F (gate and up), and the inputs of further
norms. Left out: a correction from earlier runs (session/run_history.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple, NotRequired, TypedDict, Unpack

from tunesmith.core.model_spec import ModelSpec, PartShape

# python, torch and transformers imported (480 MB), what the first matmuls leave (80 MB) and what
# the comparison with transformers before step 1 leaves
PROCESS_BYTES = 630_000_000
# code that oneDNN compiles for each new pack size, and caches up to this many sizes
KERNEL_BYTES = 3_000_000
MAX_KERNEL_SIZES = 100
# the same of experts: each gets another number of tokens in every pack; measured with 16
EXPERT_KERNEL_BYTES = 200_000_000
# unusable free heap, relative to the activations; measured, docs/guides/plan.md
FRAGMENTATION_SHARE = 0.2
# what evaluation keeps through the run and leaves in the heap
EVALUATION_BYTES = 60_000_000
CHUNK_TARGETS = 128  # targets whose logits are computed at once
OUTPUT_NORM_TYPES = ("gemma2", "gemma3", "gemma4")  # norms after attention and MLP
# norms of q and k
QK_NORM_TYPES = (
    *("apertus", "exaone4", "gemma3", "gemma4", "hunyuan", "lfm", "olmo2", "olmo3", "olmo_hybrid"),
    *("olmoe", "qwen3"),
)
HYBRID_TYPES = {
    *("lfm2", "lfm2_moe", "lfm3", "olmo_hybrid", "granitemoehybrid", "falcon_h1", "nemotron_h"),
    *("qwen3_5_text", "qwen3_5_moe_text", "qwen3_next"),
}
# with MLPs of ours (model/layers.py); those of transformers save the activation and the product too
REPLACED_MLP_TYPES = {
    *("llama", "mistral", "qwen2", "qwen3", "granite", "gemma", "gemma2", "gemma3_text"),
    *("qwen3_moe", "mixtral", "deepseek_v3", "glm4_moe", "glm4_moe_lite", "olmoe"),
    *("qwen3_next", "qwen3_5_text", "qwen3_5_moe_text", "olmo_hybrid"),
}
# with norms of ours; those of transformers save their inputs in fp32
REPLACED_NORM_TYPES = {*REPLACED_MLP_TYPES, *HYBRID_TYPES, "gpt_oss"}
INNER_NORM_TYPES = ("bitnet",)  # norms before o_proj and down_proj
# 4 bits per weight, one byte per block of 64, 4 bytes per 256 blocks
MASTER_BYTES = 4  # of a trained weight
NF4_BYTES = 0.5 + (1 + 4 / 256) / 64
MXFP4_BYTES = 0.5 + 1 / 32  # 4 bits per weight, one byte per group of 32
RETAINED_CHECKPOINTS = 2  # as core/run_dir.py keeps them
GENERAL_TEXT_TOKENS = 100_000  # of retention_data that are measured, at most
ALL_LINEAR = "all-linear"
EXPERTS = "experts"
NO_PART = PartShape(0, 0, 0, 0, 0)
Method = Literal["lora", "qlora", "full"]
Targets = str | Sequence[str]  # a value of lora_target_modules


def count_lora_parameters(spec: ModelSpec, rank: int, targets: Targets = ALL_LINEAR) -> int:
    """Return the parameters of adapters: rank * (inputs + outputs) of each linear.

    Names and expressions count as all linears but those of experts."""
    return rank * sum(part.inputs + part.outputs for part in _list_parts(spec, targets))


def count_dora_magnitudes(spec: ModelSpec, targets: Targets = ALL_LINEAR) -> int:
    """Return DoRA's magnitudes: one per output of each linear."""
    return sum(part.outputs for part in _list_parts(spec, targets))


def _list_parts(spec: ModelSpec, targets: Targets) -> list[PartShape]:
    """Return the parts of the layers that `lora_target_modules` names."""
    words = {targets} if isinstance(targets, str) else set(targets)
    if not words <= spec.parts.keys():  # all-linear, or names of layers
        words |= spec.parts.keys() - {EXPERTS}
    return [part for word, part in spec.parts.items() if word in words]


def estimate_activation_bytes(
    spec: ModelSpec,
    tokens: int,
    dtype_bytes: int,
    *,
    checkpointing: str = "none",
    use_dora: bool = False,
) -> int:
    """Return the bytes saved for the backward pass of a pack, and the widest layer's temporaries.

    DoRA also saves the outputs of attention and MLP. Checkpointing `selective` recomputes gate and
    up; `full` saves only the inputs of all layers but one."""
    saved = compute_saved_bytes(spec, dtype_bytes, use_dora=use_dora)
    if checkpointing == "selective":
        saved -= count_recomputed_values(spec) * dtype_bytes
    if checkpointing == "full":
        saved = spec.num_layers * spec.hidden_size * dtype_bytes + saved // spec.num_layers
    return tokens * (saved + compute_temporary_bytes(spec, dtype_bytes))


def compute_saved_bytes(spec: ModelSpec, dtype_bytes: int, *, use_dora: bool = False) -> int:
    """Return the bytes per token that all layers save for the backward pass.

    Inputs and outputs of the norms; of attention, what lies between its linears; of recurrent
    layers, the input of their last linear and what core/model_spec.py counts; gate and up of
    MLPs and of the experts that a token meets."""
    q = spec.num_heads * spec.head_dim
    kv = spec.num_kv_heads * spec.head_dim
    attention = spec.parts.get("attention", NO_PART)
    recurrent = spec.parts.get("recurrent", NO_PART)
    mlp = spec.parts.get("mlp", NO_PART)
    # layers that are only a mixer or only an MLP have one norm
    num_norms = spec.num_layers * (1 if "" in spec.layer_mixers else 2)
    norm_inputs = num_norms * spec.hidden_size
    norm_inputs += attention.layers * (q + kv) * spec.model_type.startswith(QK_NORM_TYPES)
    input_bytes = dtype_bytes if spec.model_type in REPLACED_NORM_TYPES else 4
    layer_values = 2 * spec.hidden_size * use_dora
    layer_values += 2 * spec.hidden_size * spec.model_type.startswith(OUTPUT_NORM_TYPES)
    layer_values += (q + spec.intermediate_size) * spec.model_type.startswith(INNER_NORM_TYPES)
    values = num_norms * spec.hidden_size + spec.num_layers * layer_values
    values += attention.inner_outputs + attention.inner_inputs + recurrent.inner_inputs
    values += mlp.inner_outputs + spec.parts.get(EXPERTS, NO_PART).inner_outputs
    values += 2 * mlp.inner_inputs * (spec.model_type not in REPLACED_MLP_TYPES)
    saved_bytes = norm_inputs * input_bytes + values * dtype_bytes
    if spec.recurrent is not None:
        saved_bytes += recurrent.layers * spec.recurrent.compute_saved_bytes(dtype_bytes)
    router_bytes = (dtype_bytes + 4) * spec.num_experts + 32 * spec.num_experts_per_token
    return saved_bytes + spec.parts.get(EXPERTS, NO_PART).layers * router_bytes


def count_norm_inputs(spec: ModelSpec) -> int:
    """Return the values per token that the norms of all layers read."""
    q = spec.num_heads * spec.head_dim
    kv = spec.num_kv_heads * spec.head_dim
    values = 2 * spec.hidden_size
    values += 2 * spec.hidden_size * spec.model_type.startswith(OUTPUT_NORM_TYPES)
    values += (q + kv) * spec.model_type.startswith(QK_NORM_TYPES)
    values += (q + spec.intermediate_size) * spec.model_type.startswith(INNER_NORM_TYPES)
    return spec.num_layers * values


def count_recomputed_values(spec: ModelSpec) -> int:
    """Return the values per token that `gradient_checkpointing: selective` does not save: gate and
    up of our MLPs and of the experts that a token meets."""
    words = ["mlp", EXPERTS] if spec.model_type in REPLACED_MLP_TYPES else [EXPERTS]
    return sum(spec.parts.get(word, NO_PART).inner_outputs for word in words)


def compute_temporary_bytes(spec: ModelSpec, dtype_bytes: int) -> int:
    """Return the bytes per token that the widest layer computes with in its backward pass: its
    MLP, or the copies of a token for its experts."""
    experts = spec.parts.get(EXPERTS, NO_PART)
    if not experts.layers:
        return 6 * spec.intermediate_size * dtype_bytes
    copies = spec.num_experts_per_token * 2 * spec.hidden_size
    return (copies + 3 * experts.inner_outputs // experts.layers) * dtype_bytes


class CacheSize(NamedTuple):
    """The rows that are generated side by side, and the tokens that they have room for."""

    rows: int
    tokens: int


NO_CACHE = CacheSize(0, 0)


def compute_cache_bytes(spec: ModelSpec, cache: CacheSize, dtype_bytes: int) -> int:
    """Return the bytes of keys and values, and of the states of recurrent layers."""
    token_bytes = spec.cache_values * dtype_bytes
    row_bytes = 0
    if spec.recurrent is not None:
        layers = spec.parts["recurrent"].layers
        row_bytes = layers * spec.recurrent.compute_state_bytes(dtype_bytes)
    return cache.tokens * token_bytes + cache.rows * row_bytes


class ModelFootprint(TypedDict):
    """The settings that decide what a run takes apart from its packs."""

    method: Method
    dtype: str
    rank: int
    targets: NotRequired[Targets]  # of the adapter; all linears
    dora: NotRequired[bool]
    new_rows: NotRequired[int]  # trained rows of new tokens, in embedding and head
    module_parameters: NotRequired[int]  # of modules trained in full beside the adapter
    optim: NotRequired[str]
    gradient_checkpointing: NotRequired[str]
    step_in_backward: NotRequired[bool]  # keeps only the gradient of the largest tensor


def estimate_peak_memory(
    spec: ModelSpec,
    *,
    pack_tokens: int,
    packs: int = 1,
    layouts: int = 1,
    has_evaluation: bool = True,
    **footprint: Unpack[ModelFootprint],
) -> dict[str, int]:
    """Return bytes by component, with "peak".

    `packs` is the number of packs in the run, each of a different size; `layouts` how many copies
    of the frozen matrices are kept (model/frozen_weight.py). 4-bit weights and 8-bit moments are
    dequantized one at a time."""
    is_bf16 = footprint["dtype"] == "bf16"
    dtype_bytes = get_dtype_bytes(footprint["dtype"])
    saved = estimate_activation_bytes(
        spec,
        pack_tokens,
        dtype_bytes,
        checkpointing=footprint.get("gradient_checkpointing", "none"),
        use_dora=footprint.get("dora", False),
    )
    # fp32 matmuls are not oneDNN's, and their loss has temporaries
    kernel_bytes = KERNEL_BYTES * min(packs, MAX_KERNEL_SIZES)
    kernel_bytes += EXPERT_KERNEL_BYTES * bool(spec.num_experts)
    logit_bytes = CHUNK_TARGETS * spec.vocab_size * dtype_bytes
    parts = {
        "process": PROCESS_BYTES,
        **estimate_fixed_memory(spec, layouts=layouts, **footprint),
        "activations": saved,
        "fragments": int(saved * FRAGMENTATION_SHARE),
        "kernels": kernel_bytes if is_bf16 else 0,
        "evaluation": EVALUATION_BYTES if has_evaluation else 0,
        "head": logit_bytes if is_bf16 else 4 * logit_bytes,
    }
    return parts | {"peak": sum(parts.values())}


def estimate_fixed_memory(
    spec: ModelSpec, *, layouts: int, **footprint: Unpack[ModelFootprint]
) -> dict[str, int]:
    """Return the bytes by component that do not depend on the packs."""
    method = footprint["method"]
    dtype_bytes = get_dtype_bytes(footprint["dtype"])
    # adapted layers alone have a second copy, and experts are not among them
    block_bytes = (spec.block_parameters - spec.expert_parameters) * dtype_bytes
    weight_bytes = (layouts - 1) * block_bytes
    if method != "full":
        weight_bytes += compute_frozen_bytes(spec, method, dtype_bytes)
    elif dtype_bytes == 2:  # bf16 copies of the fp32 master weights
        weight_bytes += block_bytes
    dequantized_bytes = 2 * spec.hidden_size * spec.intermediate_size * dtype_bytes
    state_bytes = 4 + compute_moment_bytes(**footprint)  # master weight and moments
    trained_bytes = int(count_trained_parameters(spec, **footprint) * state_bytes)
    return {
        "weights": weight_bytes,
        "widened": dequantized_bytes if method == "qlora" or spec.packed_parameters else 0,
        "trained": trained_bytes + _estimate_gradient_bytes(spec, **footprint),
        "update": _estimate_update_bytes(spec, **footprint),
    }


def get_dtype_bytes(dtype: str) -> int:
    return 4 if dtype == "fp32" else 2


def compute_frozen_bytes(spec: ModelSpec, method: str, dtype_bytes: int) -> int:
    """Return the bytes of the weights below an adapter: experts in MXFP4 stay so, and QLoRA holds
    the other matrices of the layers in 4 bits."""
    wide_parameters = spec.block_parameters - spec.packed_parameters
    rest_bytes = (spec.parameters - spec.block_parameters) * dtype_bytes
    weight_bytes = NF4_BYTES if method == "qlora" else dtype_bytes
    packed_bytes = spec.packed_parameters * MXFP4_BYTES
    return rest_bytes + int(wide_parameters * weight_bytes + packed_bytes)


def count_trained_parameters(spec: ModelSpec, **footprint: Unpack[ModelFootprint]) -> int:
    if footprint["method"] == "full":
        return spec.parameters
    targets = footprint.get("targets", ALL_LINEAR)
    num_trained = count_lora_parameters(spec, footprint["rank"], targets)
    num_trained += footprint.get("new_rows", 0) * spec.hidden_size
    num_trained += footprint.get("module_parameters", 0)
    if footprint.get("dora"):
        num_trained += count_dora_magnitudes(spec, targets)
    return num_trained


def _estimate_gradient_bytes(spec: ModelSpec, **footprint: Unpack[ModelFootprint]) -> int:
    """Return the bytes of gradients in fp32."""
    if footprint.get("step_in_backward"):
        return 4 * spec.vocab_size * spec.hidden_size
    return 4 * count_trained_parameters(spec, **footprint)


def compute_moment_bytes(**footprint: Unpack[ModelFootprint]) -> float:
    """Return the bytes of Adam's two moments per trained weight."""
    return 2 * (1 + 4 / 256) if footprint.get("optim") == "adamw_8bit" else 8


def _estimate_update_bytes(spec: ModelSpec, **footprint: Unpack[ModelFootprint]) -> int:
    """Return the bytes of dequantized moments and temporaries of the largest tensors."""
    largest = spec.vocab_size * spec.hidden_size if footprint["method"] == "full" else 0
    update = 4 * 4 * largest if footprint.get("optim") == "adamw_8bit" else 0
    matrix = spec.vocab_size * spec.hidden_size
    has_trained_matrix = footprint.get("module_parameters", 0) >= matrix
    # measured: the gradient of an embedding or a head is summed through three fp32 copies
    return update + (3 * 4 * matrix if has_trained_matrix else 0)


# ---------------------------------------------------------------- disk


def estimate_disk_bytes(
    spec: ModelSpec,
    *,
    checkpoints: int,
    cached_tokens: int = 0,
    **footprint: Unpack[ModelFootprint],
) -> int:
    """Return the bytes of the run folder at its largest.

    A checkpoint has each trained weight in fp32 and its moments. The final weights are smaller, and
    written when no checkpoint is. Events, results and tokenizer files, a few megabytes, are left
    out. See `count_max_checkpoints` and `estimate_base_states_bytes`."""
    state_bytes = 4 + compute_moment_bytes(**footprint)
    checkpoint_bytes = int(count_trained_parameters(spec, **footprint) * state_bytes)
    base_states_bytes = estimate_base_states_bytes(spec, cached_tokens, **footprint)
    return checkpoints * checkpoint_bytes + base_states_bytes


def count_max_checkpoints(*, steps: int, save_steps: int, eval_steps: int | None) -> int:
    """Return the largest number of checkpoints at one time, which the run can actually write.

    Kept are the newest two, the last good one, the best one if there is eval_data (`eval_steps`),
    and the one being written. Written are those that are due, the best at each evaluation, and that
    of an interrupt."""
    written = 1 + (steps - 1) // save_steps
    if eval_steps:
        written += (steps - 1) // eval_steps
    return min(RETAINED_CHECKPOINTS + 1 + bool(eval_steps) + 1, written)


def estimate_base_states_bytes(
    spec: ModelSpec, tokens: int, **footprint: Unpack[ModelFootprint]
) -> int:
    """Return the bytes of the base's final hidden states on the evaluated tokens, and of its head
    if it is trained. They are kept when no switch brings the base back."""
    if not tokens:
        return 0
    dtype_bytes = get_dtype_bytes(footprint["dtype"])
    has_trained_head = footprint["method"] == "full" or footprint.get("new_rows")
    head_rows = spec.vocab_size if has_trained_head else 0
    return (tokens + head_rows) * dtype_bytes * spec.hidden_size
