"""Importer for LLaMA-Factory: one flat YAML, with data sets described in dataset_info.json."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from tunesmith.core.errors import InputError
from tunesmith.core.json_io import read_json
from tunesmith.core.types import Json
from tunesmith.recipe.importers import key_map
from tunesmith.recipe.importers.draft import RecipeDraft, check_kinds, describe_format

SIGNATURE_KEYS = frozenset(
    [
        "finetuning_type",
        "cutoff_len",
        "dataset",
        "dataset_dir",
        "lora_rank",
        "lora_target",
        "template",
        "do_train",
        "quantization_bit",
        "preprocessing_num_workers",
        "plot_loss",
        "adapter_name_or_path",
        "val_size",
        "max_samples",
        "flash_attn",
        "train_dataset",
        "model_class",
    ]
)
SAME_KEYS = key_map.SAME_KEYS | {"lora_rank": "lora_r", "cutoff_len": "max_length"}
# by loss: the fields of our `loss`, and their keys
LOSS_KEYS = {
    "dpo": {"beta": "pref_beta", "nll_coefficient": "pref_ftx"},
    "orpo": {"beta": "pref_beta", "nll_coefficient": "pref_ftx"},
    "simpo": {"beta": "pref_beta", "gamma": "simpo_gamma", "nll_coefficient": "pref_ftx"},
    "kto": {
        "beta": "pref_beta",
        "desirable_weight": "kto_chosen_weight",
        "undesirable_weight": "kto_rejected_weight",
    },
}
NLL_DEFAULTS = {"dpo": 0.0, "simpo": 0.0}
NLL_REASON = "its NLL is a mean over tokens here; in LLaMA-Factory a mean over answers"
# their columns of an alpaca row -> ours
ALPACA_COLUMNS = {
    "prompt": "instruction",
    "query": "input",
    "response": "output",
    "system": "system",
    "history": "history",
}
# kinds of the values in dataset_info.json
ENTRY_KINDS = {
    "file_name": ("a text",),
    "hf_hub_url": ("a text",),
    "subset": ("a text",),
    "split": ("a text",),
    "formatting": ("a text",),
    "ranking": ("true or false",),
    "num_samples": ("a number",),
    "columns": ("a mapping to texts",),
    "tags": ("a mapping to texts",),
}
SHAREGPT_TAGS = {
    "role_tag": "from",
    "content_tag": "value",
    "user_tag": "human",
    "assistant_tag": "gpt",
}
OPENAI_TAGS = {
    "role_tag": "role",
    "content_tag": "content",
    "user_tag": "user",
    "assistant_tag": "assistant",
}


def translate(draft: RecipeDraft) -> None:
    stage = draft.pop_scalar("stage") or "sft"
    if stage not in ("sft", "dpo", "kto", "pt"):
        message = f"stage: {stage} is not supported: use sft, dpo, kto or pt"
        raise draft.make_error("stage", message)
    if draft.remaining.get("val_size") and draft.remaining.get("eval_dataset"):
        raise draft.make_error(
            "val_size", "val_size and eval_dataset contradict each other: keep one"
        )
    key_map.translate_model(draft, "model_name_or_path")
    draft.rename_keys(SAME_KEYS)
    if draft.remaining.get("do_train") is False:
        draft.skip_key("do_train", draft.pop_value("do_train"), "a recipe is always trained")
    draft.set_value("on_overlong", "truncate", "LLaMA-Factory truncates at cutoff_len")
    _translate_method(draft)
    key_map.translate_target_modules(draft, "lora_target", all_linear_names=("all",))
    key_map.translate_adapter(draft, "adapter_name_or_path")
    for key in ("add_tokens", "new_special_tokens"):
        key_map.translate_new_tokens(draft, key, module_keys=("additional_target",))
    if draft.values.get("method") != "full":
        key_map.translate_modules_to_save(draft, "additional_target")
    _translate_datasets(draft, stage)
    key_map.translate_eval_split(draft, "val_size")
    key_map.translate_chat_template(draft, "template", default_names=())
    key_map.translate_batch_size(draft, "per_device_train_batch_size", micro_default=8)
    key_map.translate_steps(draft)
    key_map.translate_schedule(draft, "lr_scheduler_type")
    key_map.translate_optimizer(draft, "optim")
    key_map.translate_precision(draft)
    key_map.translate_saving(draft)
    key_map.translate_output_dir(draft)
    if stage in ("dpo", "kto"):
        _translate_preference(draft, stage)
    elif stage == "pt":
        key_map.translate_pretraining(draft, "stage")
    key_map.translate_trained_text(draft, "train_on_prompt")
    key_map.translate_objective(draft)


def _translate_method(draft: RecipeDraft) -> None:
    method = draft.pop_scalar("finetuning_type") or "lora"
    if method == "lora":
        key_map.translate_lora(draft, "finetuning_type")
    elif method == "full":
        draft.set_value("method", method, "finetuning_type")
    else:
        draft.skip_key("finetuning_type", method, "supported methods: lora, full")


def _translate_preference(draft: RecipeDraft, stage: str) -> None:
    """Translate the loss; ORPO has an NLL term of its own, to which pref_ftx is added."""
    source = "pref_loss" if stage == "dpo" else "stage"
    loss = draft.pop_scalar("pref_loss") or "sigmoid" if stage == "dpo" else "kto"
    share = draft.pop_number("pref_ftx")
    if share is not None:
        draft.remaining["pref_ftx"] = share + (loss == "orpo")
    key_map.translate_preference(draft, loss, source, LOSS_KEYS, NLL_DEFAULTS)
    if loss == "orpo" or (share and loss != "kto"):
        draft.skip_key(f"{source} {loss}", None, NLL_REASON, is_important=False)


# ---------------------------------------------------------------- data sets


def _translate_datasets(draft: RecipeDraft, stage: str) -> None:
    folder = draft.pop_text("dataset_dir") or "data"
    max_samples = draft.pop_number("max_samples")
    for key, recipe_key in (("dataset", "data"), ("eval_dataset", "eval_data")):
        names = draft.pop_texts(key)
        if not names:
            continue
        sources: list[Json] = []
        for name in names:
            sources.append(_build_source(draft, name, folder, max_samples, stage))
        note = f"{key}, max_samples" if max_samples else key
        draft.set_value(recipe_key, sources, note)


def _build_source(
    draft: RecipeDraft, name: str, folder: str, max_samples: float | None, stage: str
) -> Json:
    """Build the source of a data set from its entry in dataset_info.json."""
    info_file = _find_info_file(draft, folder)
    info = _read_entry(info_file, name)
    if info_file is None or info is None:
        reason = "not in dataset_info.json: set the path of its file"
        if info_file is None:
            reason = f"no dataset_info.json in {folder}/: set the path of its file"
        draft.skip_key(f"dataset {name}", name, reason)
        source: Json = {"path": name if Path(name).suffix else f"{name}.jsonl"}
        return source | ({"max_examples": int(max_samples)} if max_samples else {})
    hub_source = key_map.make_hub_source(
        str(info.get("hf_hub_url", "")), config=info.get("subset"), split=info.get("split")
    )
    if "file_name" not in info and hub_source is not None:
        source = hub_source
    elif "file_name" not in info:
        draft.skip_key(f"dataset {name}", _get_hub_name(info), key_map.HUB_DATASET_REASON)
        source = {"path": f"{name}.jsonl"}
    else:
        file = str(info["file_name"])
        source = {"path": draft.find_path(file, info_file.parent) or f"{folder}/{file}"}
    source |= _parse_format(draft, name, info, stage)
    counts = [int(count) for count in (max_samples, info.get("num_samples")) if count]
    return source | ({"max_examples": min(counts)} if counts else {})


def _find_info_file(draft: RecipeDraft, folder: str) -> Path | None:
    for relative_path in (
        f"{folder}/dataset_info.json",
        "dataset_info.json",
        "data/dataset_info.json",
    ):
        for base in (Path.cwd(), draft.config_path.absolute().parent):
            if os.path.isfile(base / relative_path):
                return base / relative_path
    return None


def _read_entry(file: Path | None, name: str) -> Json | None:
    content = read_json(file) if file else {}
    entry = content.get(name) if isinstance(content, dict) else None
    if entry is not None and not isinstance(entry, dict):
        raise InputError(f"{name}: expected a mapping", where=str(file))
    if entry is not None:
        check_kinds(entry, ENTRY_KINDS, f"{file}: {name}")
    return entry


def _get_hub_name(info: Json) -> Any:
    for key in ("hf_hub_url", "ms_hub_url", "om_hub_url", "script_url"):
        if key in info:
            return info[key]
    return info


def _parse_format(draft: RecipeDraft, name: str, info: Json, stage: str) -> Json:
    columns: Json = info.get("columns") or {}
    _refuse_wrong_stage(draft, name, info, stage)
    if stage == "pt":
        return describe_format("text", {"text": columns.get("prompt", "instruction")})
    if info.get("ranking"):
        return _parse_pairs(draft, name, info, columns)
    for kind in ("images", "videos", "audios"):
        if kind in columns:
            draft.skip_key(f"dataset {name}: {kind}", columns[kind], "only text is trained")
    if info.get("formatting", "alpaca") == "alpaca":
        alpaca = {ours: columns.get(theirs) for theirs, ours in ALPACA_COLUMNS.items()}
        alpaca["label"] = columns.get("kto_tag")
        return describe_format("alpaca", alpaca)
    tags = SHAREGPT_TAGS | (info.get("tags") or {})
    messages = columns.get("messages", "conversations")
    tools = columns.get("tools")
    system = columns.get("system")
    if SHAREGPT_TAGS.items() <= tags.items():
        sharegpt = {"conversations": messages, "tools": tools, "system": system}
        sharegpt["label"] = columns.get("kto_tag")
        return describe_format("sharegpt", sharegpt)
    if not OPENAI_TAGS.items() <= tags.items():
        reason = "a message must have role and content, or from and value"
        draft.skip_key(f"dataset {name}: tags", info.get("tags"), reason)
    if system:
        reason = "the system prompt must be the first message"
        draft.skip_key(f"dataset {name}: system", system, reason)
    label = columns.get("kto_tag")
    return describe_format("messages", {"messages": messages, "tools": tools, "label": label})


def _refuse_wrong_stage(draft: RecipeDraft, name: str, info: Json, stage: str) -> None:
    is_paired = bool(info.get("ranking"))
    if is_paired and stage not in ("dpo", "kto"):
        message = f"{name} has preference pairs, which need stage: dpo, not {stage}"
        raise draft.make_error("dataset", message)
    is_kto = "kto_tag" in (info.get("columns") or {})
    if stage == "kto" and not (is_kto or is_paired):
        raise draft.make_error("dataset", f"{name} has no labels (columns: kto_tag)")
    if (is_kto and stage != "kto") or (stage == "dpo" and not is_paired):
        raise draft.make_error("dataset", f"{name} has no preference pairs (ranking: true)")


def _parse_pairs(draft: RecipeDraft, name: str, info: Json, columns: Json) -> Json:
    chosen = columns.get("chosen", "chosen")
    rejected = columns.get("rejected", "rejected")
    if info.get("formatting", "alpaca") != "alpaca":
        columns = {"prompt": columns.get("messages", "conversations")}
        reason = "check the rows with `tunesmith data show`"
        draft.skip_key(f"dataset {name}: tags", info.get("tags"), reason)
    elif columns.get("query"):
        reason = "a pair has a single prompt: merge both into one column"
        draft.skip_key(f"dataset {name}: query", columns["query"], reason)
    prompt = columns.get("prompt", "instruction")
    return describe_format("preference", {"prompt": prompt, "chosen": chosen, "rejected": rejected})
