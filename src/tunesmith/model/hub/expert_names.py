"""The names of experts in PEFT's files.

PEFT 0.21 adapts a stack of experts [E, O, I] through `target_parameters`. Its wrappers are nested,
so the tensors of the two stacks of a layer are called after the module that holds them, those of
the inputs with one more word:

    <experts>.base_layer.lora_A.weight [E r, I]    <experts>.base_layer.lora_B.weight [O, r E]
    <experts>.lora_A.weight                        <experts>.lora_B.weight     of down_proj

A lies expert by expert, B with the expert as the fastest index. Loads no torch. Left out: the
tensors (model/experts.py). Legend: E experts, O outputs, I inputs, r rank."""

from __future__ import annotations

from collections.abc import Sequence

INNER = "base_layer"  # PEFT's word for what a wrapper wraps
OUTPUT_STACK = "down_proj"
INPUT_STACKS = ("gate_up_proj", "up_proj")
# PEFT 0.21 takes these names in `target_modules` for experts, in models of the types below
MATRIX_NAMES = {"gate_proj", "up_proj", "down_proj", "w1", "w2", "w3"}
# it asks the model type alone, whether or not a layer has experts
PEFT_EXPERT_TYPES = {
    *("afmoe", "beam", "cohere2_moe", "deepseek_v2", "deepseek_v3", "deepseek_v32", "dots1"),
    *("ernie4_5_moe", "exaone_moe", "flex_olmo", "glm4_moe", "glm4_moe_lite", "glm_moe_dsa"),
    *("hunyuan_v1_moe", "longcat_flash", "mellum", "minimax_m2", "mixtral", "olmoe", "qwen3_moe"),
    *("qwen3_next", "sarvam_mla", "solar_open"),
}


def is_expert_path(path: str) -> bool:
    """Return whether PEFT's path of an adapter is that of a stack of experts."""
    return path.removesuffix(f".{INNER}").endswith(".experts")


def is_expert_matrix(name: str) -> bool:
    """Return whether a tensor of the text class is a stack of experts, or a matrix of one expert
    in files that hold them one by one."""
    path, _, word = name.removesuffix(".weight").rpartition(".")
    owner, _, index = path.rpartition(".")
    if index.isdigit() and owner.endswith(".experts"):
        return word in MATRIX_NAMES
    return path.endswith(".experts") and word in (*INPUT_STACKS, OUTPUT_STACK)


def list_stack_names(path: str) -> list[str]:
    """Return the parameters that the stack at PEFT's path of an adapter may be."""
    if not path.endswith(f".{INNER}"):
        return [f"{path}.{OUTPUT_STACK}"]
    return [f"{path.removesuffix(f'.{INNER}')}.{name}" for name in INPUT_STACKS]


def list_expert_modules(paths: Sequence[str]) -> list[str]:
    """Return PEFT's paths with one path for both stacks of a layer: that of the module."""
    modules: dict[str, None] = {}
    for path in paths:
        modules[path.removesuffix(f".{INNER}") if is_expert_path(path) else path] = None
    return list(modules)


def is_target_parameter(path: str, model_type: str, *, has_experts: bool) -> bool:
    """Return whether PEFT has to be given the weight of a module.

    That is so for stacks of experts, and for linears that have the name of a matrix of an expert in
    a model that has experts, or whose type can have some: named in `target_modules`, PEFT would
    look for experts and leave out the dense MLPs and shared experts that are meant."""
    if is_expert_path(path):
        return True
    is_matrix = path.rpartition(".")[2] in MATRIX_NAMES
    return is_matrix and (has_experts or model_type in PEFT_EXPERT_TYPES)
