"""LLaMA-Factory: one flat YAML. Its data sets are names that dataset_info.json explains."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tunesmith.core.errors import InputError
from tunesmith.core.json_io import read_json
from tunesmith.core.types import Json
from tunesmith.recipe.importers import common
from tunesmith.recipe.importers.draft import RecipeDraft, describe_format

# fmt: off
SIGNATURE_KEYS = frozenset((
    "finetuning_type", "cutoff_len", "dataset", "dataset_dir", "lora_rank", "lora_target", "template", "do_train",
    "quantization_bit", "preprocessing_num_workers", "plot_loss", "adapter_name_or_path", "val_size",
    "max_samples", "flash_attn", "train_dataset", "model_class",
))
# fmt: on
SAME_KEYS = common.SAME_KEYS | {"lora_rank": "lora_r", "cutoff_len": "max_length"}
# Their columns of an alpaca row -> ours.
ALPACA_COLUMNS = {
    "prompt": "instruction",
    "query": "input",
    "response": "output",
    "system": "system",
    "history": "history",
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
    if stage not in ("sft", "dpo", "pt"):
        raise draft.make_error("stage", f"stage: {stage}: sft, dpo and pt have a counterpart here")
    if draft.remaining.get("val_size") and draft.remaining.get("eval_dataset"):
        raise draft.make_error(
            "val_size", "val_size and eval_dataset contradict each other: keep one"
        )
    common.translate_model(draft, "model_name_or_path")
    draft.rename_keys(SAME_KEYS)
    if "max_length" in draft.values:
        draft.set_value("overlong", "truncate", "what LLaMA-Factory does with rows over cutoff_len")
    _translate_method(draft)
    common.translate_target_modules(draft, "lora_target", all_linear_names=("all",))
    common.translate_adapter(draft, "adapter_name_or_path")
    for key in ("add_tokens", "new_special_tokens"):
        common.translate_new_tokens(draft, key, module_keys=("additional_target",))
    _translate_datasets(draft, stage)
    common.translate_eval_split(draft, "val_size")
    common.translate_chat_template(draft, "template", default_names=())
    common.translate_batch_size(draft, "per_device_train_batch_size", micro_default=8)
    common.translate_steps(draft)
    common.translate_schedule(draft, "lr_scheduler_type")
    common.translate_optimizer(draft, "optim")
    common.translate_precision(draft)
    common.translate_saving(draft)
    common.translate_output_dir(draft)
    if stage == "dpo":
        loss = draft.pop_scalar("pref_loss") or "sigmoid"
        common.translate_preference(
            draft,
            loss,
            "pref_loss",
            beta="pref_beta",
            gamma="simpo_gamma",
            nll_coefficient="pref_ftx",
        )
    elif stage == "pt":
        common.translate_pretraining(draft, "stage")


def _translate_method(draft: RecipeDraft) -> None:
    method = draft.pop_scalar("finetuning_type") or "lora"
    if method == "lora":
        common.translate_lora(draft, "finetuning_type")
    elif method == "full":
        draft.set_value("method", method, "finetuning_type")
    else:
        draft.skip_key("finetuning_type", method, "lora and full are the methods here")


# ---------------------------------------------------------------- data sets


def _translate_datasets(draft: RecipeDraft, stage: str) -> None:
    folder = str(draft.pop_scalar("dataset_dir") or "data")
    max_samples = draft.pop_number("max_samples")
    for key, recipe_key in (("dataset", "data"), ("eval_dataset", "eval_data")):
        names = draft.pop_value(key)
        if names is None:
            continue
        names = names if isinstance(names, list) else str(names).split(",")
        sources = [
            _build_source(draft, str(name).strip(), folder, max_samples, stage) for name in names
        ]
        draft.set_value(recipe_key, sources, key)


def _build_source(
    draft: RecipeDraft, name: str, folder: str, max_samples: float | None, stage: str
) -> Json:
    """One data set by its name, as dataset_info.json describes it."""
    info_file = _find_info_file(draft, folder)
    info = _read_entry(info_file, name)
    if info is None:
        reason = "is not in it" if info_file else f"was not found in {folder}/"
        draft.skip_key(
            f"dataset {name}", name, f"dataset_info.json {reason}: set the path of its file"
        )
        return {"path": name if Path(name).suffix else f"{name}.jsonl"}
    if "file_name" not in info:
        draft.skip_key(f"dataset {name}", _get_hub_name(info), common.HUB_DATASET_REASON)
        source: Json = {"path": f"{name}.jsonl"}
    else:
        file = str(info["file_name"])
        source = {"path": draft.find_path(file, info_file.parent) or f"{folder}/{file}"}  # type: ignore[union-attr]
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
            if (base / relative_path).is_file():
                return base / relative_path
    return None


def _read_entry(file: Path | None, name: str) -> Json | None:
    content = read_json(file) if file else {}
    entry = content.get(name) if isinstance(content, dict) else None
    if entry is not None and not isinstance(entry, dict):
        raise InputError(f"{name}: expected a mapping", where=str(file))
    return entry


def _get_hub_name(info: Json) -> Any:
    return next(
        (
            info[key]
            for key in ("hf_hub_url", "ms_hub_url", "om_hub_url", "script_url")
            if key in info
        ),
        info,
    )


def _parse_format(draft: RecipeDraft, name: str, info: Json, stage: str) -> Json:
    columns: Json = info.get("columns") or {}
    if bool(info.get("ranking")) != (stage == "dpo") or "kto_tag" in columns:
        message = (
            "holds preferences, which stage: dpo trains"
            if info.get("ranking")
            else "holds no pairs (ranking: true)"
        )
        raise draft.make_error(
            "dataset",
            f"{name} {message}, not stage: {stage}" if stage != "dpo" else f"{name} {message}",
        )
    if stage == "pt":
        return describe_format("text", {"text": columns.get("prompt", "instruction")})
    if stage == "dpo":
        return _parse_pairs(draft, name, info, columns)
    for kind in ("images", "videos", "audios"):
        if kind in columns:
            draft.skip_key(f"dataset {name}: {kind}", columns[kind], "only text is trained here")
    if info.get("formatting", "alpaca") == "alpaca":
        return describe_format(
            "alpaca",
            {
                column: columns.get(config_column)
                for config_column, column in ALPACA_COLUMNS.items()
            },
        )
    tags = SHAREGPT_TAGS | (info.get("tags") or {})
    messages, tools, system = (
        columns.get("messages", "conversations"),
        columns.get("tools"),
        columns.get("system"),
    )
    if SHAREGPT_TAGS.items() <= tags.items():
        return describe_format(
            "sharegpt", {"conversations": messages, "tools": tools, "system": system}
        )
    if not OPENAI_TAGS.items() <= tags.items():
        reason = "a message has role and content, or from and value, here"
        draft.skip_key(f"dataset {name}: tags", info.get("tags"), reason)
    if system:
        draft.skip_key(
            f"dataset {name}: system", system, "the system prompt is the first message here"
        )
    return describe_format("messages", {"messages": messages, "tools": tools})


def _parse_pairs(draft: RecipeDraft, name: str, info: Json, columns: Json) -> Json:
    chosen, rejected = columns.get("chosen", "chosen"), columns.get("rejected", "rejected")
    if info.get("formatting", "alpaca") != "alpaca":
        columns = {"prompt": columns.get("messages", "conversations")}
        draft.skip_key(
            f"dataset {name}: tags", info.get("tags"), "look at the rows with `tunesmith data show`"
        )
    elif columns.get("query"):
        draft.skip_key(
            f"dataset {name}: query",
            columns["query"],
            "a pair has one prompt: put both into one column",
        )
    return describe_format(
        "preference",
        {"prompt": columns.get("prompt", "instruction"), "chosen": chosen, "rejected": rejected},
    )
