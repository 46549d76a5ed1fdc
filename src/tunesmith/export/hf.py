"""Exports that are transformers folders: the adapter as it is, and the merged model.

In: an ExportJob. Out: `adapter_config.json` and weights for PEFT, or a model folder without an
adapter. Both contain the tokenizer, the chat template and the generation config with the trained
end tokens. The form `per-expert` holds two matrices for each matrix of each expert: vLLM names the
experts of a model as its files do (experts.3.gate_proj, or w1 of Mixtral), and reads PEFT's stacks
of experts otherwise than PEFT does (vLLM 52198). PEFT does not load this form.
"""

from __future__ import annotations

import shutil
from math import sqrt
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from tunesmith.core.atomic import MANIFEST
from tunesmith.core.errors import InputError
from tunesmith.core.formatting import hide_folders
from tunesmith.core.hub_names import COMMIT, split_revision
from tunesmith.core.json_io import dump_json, read_json_object
from tunesmith.core.types import Json
from tunesmith.export.parity import ExportJob, ReloadedExport
from tunesmith.export.source_run import SourceRun
from tunesmith.model.causal_lm import Network, load_network
from tunesmith.model.experts import (
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
from tunesmith.model.hub.validate import WEIGHTS_FILE, read_headers, read_model_json
from tunesmith.model.merge import (
    merge_into_network,
    read_loras,
    read_saved_modules,
    read_token_rows,
    write_merged_weights,
)
from tunesmith.model.reference_load import encode_stock_prompts
from tunesmith.model.safetensors_io import write_tensors
from tunesmith.model.save import LoraTensors, rescale_adapter, save_config
from tunesmith.session.identity import PROVENANCE_FILE as PROVENANCE
from tunesmith.session.identity import update_weights_hash
from tunesmith.train.model_card import CARD_FILE, find_hub_name, note_scale

LORA_A = ".lora_A.weight"
LORA_B = ".lora_B.weight"
OLD_WORDS = {"w1": "gate_proj", "w3": "up_proj", "w2": OUTPUT_STACK}  # of Mixtral
MERGE_FIX = "export it with --to merged, and serve the merged model"


def write_peft(job: ExportJob) -> None:
    """Copy the adapter folder; at another scale, change its config, the rows and modules
    that are trained in full, and the model card."""
    _copy_files(job)
    if job.run.scale != 1:
        rescale_adapter(job.folder, job.run.scale, job.run.token_rows, job.run.modules)
        update_weights_hash(job.folder, job.folder / ADAPTER_WEIGHTS_FILE)
        note_scale(job.folder, job.run.scale, job.run.scale_points)


def write_hub(job: ExportJob) -> None:
    """Write the adapter as for PEFT, without the names of folders of this machine."""
    write_peft(job)
    config_file = job.folder / ADAPTER_CONFIG_FILE
    config = read_json_object(config_file)
    config_file.write_bytes(dump_json({**config, **_name_base(job.run)}, indent=2))
    paths = job.run.plan.list_paths()
    for name in (ADAPTER_CONFIG_FILE, PROVENANCE, CARD_FILE):
        file = job.folder / name
        if file.is_file():
            file.write_text(hide_folders(file.read_text("utf-8"), paths), encoding="utf-8")


def _name_base(run: SourceRun) -> dict[str, str]:
    """Return the base in the words of PEFT: its name on the hub and its commit, if it has them."""
    name = find_hub_name(run.model_spec)
    if not name:
        return {"base_model_name_or_path": Path(run.model_spec.name).name}
    commit = split_revision(run.recipe.model)[1] or run.model_spec.path.name
    revision = {"revision": commit} if COMMIT.fullmatch(commit) else {}
    return {"base_model_name_or_path": name, **revision}


def reload_peft(job: ExportJob) -> ReloadedExport:
    """Merge the exported adapter into the stock base, as its own files describe it."""
    network = job.run.load_base_network()
    base_dir = job.run.model_spec.path
    loras = read_loras(job.folder, base_dir)
    token_rows = read_token_rows(job.folder, base_dir)
    modules = read_saved_modules(job.folder, base_dir)
    merge_into_network(network, {**loras, **token_rows, **modules})
    return ReloadedExport(network, render_prompts(job), read_end_ids(job.folder))


def write_merged_folder(job: ExportJob) -> None:
    """Write the base's config, its weights merged in fp32 and cast once, and the serving files."""
    run = job.run
    _copy_files(job, ADAPTER_CONFIG_FILE, ADAPTER_WEIGHTS_FILE, PROVENANCE, WEIGHTS_FILE, CARD_FILE)
    save_config(job.folder, run.model_spec.path, run.model_spec.vocab_size, is_packed=True)
    write_merged_weights(
        run.model_spec.path, run.changes, job.folder / WEIGHTS_FILE, job.dequantized_paths
    )


def reload_merged(job: ExportJob) -> ReloadedExport:
    network = load_network(job.folder, torch.float32)
    return ReloadedExport(network, render_prompts(job), read_end_ids(job.folder))


def _copy_files(job: ExportJob, *excluded: str) -> None:
    """Copy file by file: `copytree` would collect errors and lose the errno of a full disk."""
    for file in sorted(job.run.saved_dir.rglob("*")):
        if file.is_file() and file.name not in (MANIFEST, *excluded):
            target = job.folder / file.relative_to(job.run.saved_dir)
            target.parent.mkdir(exist_ok=True)
            shutil.copyfile(file, target)


def render_prompts(job: ExportJob) -> list[tuple[int, ...]]:
    """Return the ids of the prompts as transformers renders them from the exported files."""
    chats = [(example.messages, example.tools) for example in job.chat_examples]
    return encode_stock_prompts(job.folder, chats, job.run.recipe.chat_template_kwargs)


def read_end_ids(folder: Path) -> tuple[int, ...]:
    """Return the end tokens of an exported folder."""
    end_ids = read_model_json(folder / "generation_config.json").get("eos_token_id")
    return (end_ids,) if isinstance(end_ids, int) else tuple(end_ids or ())


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
    update_weights_hash(job.folder, file)


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
