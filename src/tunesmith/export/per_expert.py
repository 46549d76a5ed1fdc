"""The adapters of experts as vLLM takes them: two matrices for each matrix of each expert.

    write_per_expert(job)     adapter_config.json and adapter_model.safetensors
    reload_per_expert(job)    the base with every matrix of that file merged

In: an ExportJob. vLLM names the experts of a model as its files do (experts.3.gate_proj, or w1 of
Mixtral), and reads PEFT's stacks of experts otherwise than PEFT does (vLLM 52198). A base whose
files hold the experts in one tensor has no such names, and is refused. PEFT does not load this
form. Left out: the split itself (model/expert_adapters.py), and running vLLM."""

from __future__ import annotations

from math import sqrt
from pathlib import Path

from safetensors.torch import load_file
from torch import Tensor

from tunesmith.core.errors import InputError
from tunesmith.core.json_io import dump_json, read_json_object
from tunesmith.core.types import Json
from tunesmith.export.hf import read_end_ids, render_prompts, write_peft
from tunesmith.export.parity import ExportJob, ReloadedExport
from tunesmith.export.source_run import SourceRun
from tunesmith.model.causal_lm import Network
from tunesmith.model.expert_adapters import (
    GATED_PARTS,
    ExpertLoraTensors,
    split_into_experts,
)
from tunesmith.model.hub.adapter_config import (
    ADAPTER_CONFIG_FILE,
    ADAPTER_WEIGHTS_FILE,
    PREFIX,
    name_in_text_class,
)
from tunesmith.model.hub.expert_names import OUTPUT_STACK
from tunesmith.model.hub.stored_tensors import EXPERT, read_naming
from tunesmith.model.hub.validate import read_headers, read_model_json
from tunesmith.model.merge import merge_into_network
from tunesmith.model.safetensors_io import write_tensors
from tunesmith.model.save import LoraTensors
from tunesmith.session.identity import drop_golden_answers

LORA_A = ".lora_A.weight"
LORA_B = ".lora_B.weight"
OLD_WORDS = {"w1": "gate_proj", "w3": "up_proj", "w2": OUTPUT_STACK}  # of Mixtral
MERGE_FIX = "export it with --to merged, and serve the merged model"


def has_expert_adapters(run: SourceRun) -> bool:
    """Return whether the run trained adapters of routed experts."""
    return any(isinstance(lora, ExpertLoraTensors) for lora in run.loras.values())


def refuse_stacked_experts(run: SourceRun) -> None:
    """Raise InputError for a run that this form cannot hold."""
    where = str(run.path)
    if not has_expert_adapters(run):
        message = "this run has no adapters of experts"
        raise InputError(message, where=where, fix="export it with --to peft, without --type")
    words = {name.rpartition(".")[2] for name in name_experts(run.model_spec.path)}
    if words != {*GATED_PARTS, OUTPUT_STACK}:
        message = (
            "vLLM takes adapters of experts where the files of the base hold gate, up and down of "
            "each expert by themselves, and does not read stacks as PEFT does (vLLM 52198)"
        )
        raise InputError(message, where=where, fix=MERGE_FIX)
    if run.token_rows or run.modules:
        message = "with adapters of experts, vLLM takes neither new tokens nor modules_to_save"
        raise InputError(message, where=where, fix=MERGE_FIX)


def name_experts(base: Path) -> dict[str, str]:
    """Return the matrix of an expert in the text class, ...mlp.experts.3.gate_proj, -> its name in
    the files of the base. Empty if they hold all experts in one tensor."""
    naming = read_naming(read_model_json(base / "config.json"))
    names: dict[str, str] = {}
    for stored_name in read_headers(base):
        match = EXPERT.fullmatch(naming.name_parameter(stored_name) or "")
        if match:
            path, index, word = match.groups()
            module = f"{path}.{index}.{OLD_WORDS.get(word, word)}"
            names[module] = stored_name.removesuffix(".weight")
    return names


def write_per_expert(job: ExportJob) -> None:
    """Write the adapter as for PEFT, then split its stacks. The config names plain modules: with
    target_parameters a server would look for stacks."""
    write_peft(job)
    file = job.folder / ADAPTER_WEIGHTS_FILE
    split = split_into_experts(load_file(file), job.run.model_spec.num_experts)
    stored_names = name_experts(job.run.model_spec.path)
    renamed: dict[str, Tensor] = {}
    for name, tensor in split.items():
        path, _, part = name.removeprefix(PREFIX).rpartition(".lora_")
        path = stored_names.get(name_in_text_class(path), path)
        renamed[f"{PREFIX}{path}.lora_{part}"] = tensor
    write_tensors(renamed, file, metadata={"format": "pt"})
    config = read_json_object(job.folder / ADAPTER_CONFIG_FILE)
    config.pop("target_parameters")
    modules = [name.removesuffix(LORA_A) for name in renamed if name.endswith(LORA_A)]
    config["target_modules"] = sorted({module.rpartition(".")[2] for module in modules})
    (job.folder / ADAPTER_CONFIG_FILE).write_bytes(dump_json(config, indent=2))
    drop_golden_answers(job.folder)  # they name the hash of the stacked file


def reload_per_expert(job: ExportJob) -> ReloadedExport:
    """Merge the written matrices into the stock base, one by one under their names."""
    network = job.run.load_base_network()
    tensors = load_file(job.folder / ADAPTER_WEIGHTS_FILE)
    scale = _compute_scale(read_json_object(job.folder / ADAPTER_CONFIG_FILE))
    modules = {stored: module for module, stored in name_experts(job.run.model_spec.path).items()}
    for name in tensors:
        if not name.endswith(LORA_A):
            continue
        path = name.removeprefix(PREFIX).removesuffix(LORA_A)
        b_OR = tensors[name.removesuffix(LORA_A) + LORA_B].float()
        lora = LoraTensors(tensors[name].float(), b_OR, scale, None)
        if path in modules:
            _merge_expert(network, modules[path], lora)
        else:
            merge_into_network(network, {name_in_text_class(path): lora})
    return ReloadedExport(network, render_prompts(job), read_end_ids(job.folder))


def _merge_expert(network: Network, module: str, lora: LoraTensors) -> None:
    """Merge into the rows of one expert's matrix in transformers' stack [E, O, I]."""
    path, index, word = module.rsplit(".", 2)
    is_output = word == OUTPUT_STACK
    stack = network.get_parameter(f"{path}.{OUTPUT_STACK if is_output else 'gate_up_proj'}")
    num_rows = lora.b_OR.shape[0]
    begin = num_rows if word == GATED_PARTS[1] else 0
    matrix_OI = stack.data[int(index), begin : begin + num_rows]
    matrix_OI.copy_(lora.merge_into(matrix_OI.float()))


def _compute_scale(config: Json) -> float:
    rank = config["r"]
    return config["lora_alpha"] / (sqrt(rank) if config["use_rslora"] else rank)
