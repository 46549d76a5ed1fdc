"""LLaMA-Factory: one flat YAML. Its data sets are names that dataset_info.json explains."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tunesmith.core.errors import InputError
from tunesmith.core.json_io import read_json
from tunesmith.core.types import Json
from tunesmith.recipe.importers import common
from tunesmith.recipe.importers.draft import Draft, described

# fmt: off
SIGNS = frozenset((
    "finetuning_type", "cutoff_len", "dataset", "dataset_dir", "lora_rank", "lora_target", "template", "do_train",
    "quantization_bit", "preprocessing_num_workers", "plot_loss", "adapter_name_or_path", "val_size",
    "max_samples", "flash_attn", "train_dataset", "model_class",
))
# fmt: on
SAME = common.SAME | {"lora_rank": "lora_r", "cutoff_len": "max_length"}
# Their columns of an alpaca row -> ours.
ALPACA = {
    "prompt": "instruction",
    "query": "input",
    "response": "output",
    "system": "system",
    "history": "history",
}
SHAREGPT_TAGS = {"role_tag": "from", "content_tag": "value", "user_tag": "human", "assistant_tag": "gpt"}
OPENAI_TAGS = {"role_tag": "role", "content_tag": "content", "user_tag": "user", "assistant_tag": "assistant"}


def translate(draft: Draft) -> None:
    stage = draft.word("stage") or "sft"
    if stage not in ("sft", "dpo", "pt"):
        raise draft.refusal("stage", f"stage: {stage}: sft, dpo and pt have a counterpart here")
    if draft.given.get("val_size") and draft.given.get("eval_dataset"):
        raise draft.refusal("val_size", "val_size and eval_dataset contradict each other: keep one")
    common.model(draft, "model_name_or_path")
    draft.rename(SAME)
    if "max_length" in draft.values:
        draft.put("overlong", "truncate", "what LLaMA-Factory does with rows over cutoff_len")
    _method(draft)
    common.target_modules(draft, "lora_target", everything=("all",))
    common.adapter(draft, "adapter_name_or_path")
    for key in ("add_tokens", "new_special_tokens"):
        common.new_tokens(draft, key, whole=("additional_target",))
    _datasets(draft, stage)
    common.held_out(draft, "val_size")
    common.chat_template(draft, "template", own=())
    common.batch_size(draft, "per_device_train_batch_size", micro_default=8)
    common.steps(draft)
    common.schedule(draft, "lr_scheduler_type")
    common.optimizer(draft, "optim")
    common.precision(draft)
    common.saving(draft)
    common.folder(draft)
    if stage == "dpo":
        loss = draft.word("pref_loss") or "sigmoid"
        common.pairs(draft, loss, "pref_loss", beta="pref_beta", gamma="simpo_gamma", nll_coefficient="pref_ftx")
    elif stage == "pt":
        common.texts(draft, "stage")


def _method(draft: Draft) -> None:
    method = draft.word("finetuning_type") or "lora"
    if method == "lora":
        common.low_rank(draft, "finetuning_type")
    elif method == "full":
        draft.put("method", method, "finetuning_type")
    else:
        draft.leave("finetuning_type", method, "lora and full are the methods here")


# ---------------------------------------------------------------- data sets


def _datasets(draft: Draft, stage: str) -> None:
    folder = str(draft.word("dataset_dir") or "data")
    most = draft.number("max_samples")
    for key, ours in (("dataset", "data"), ("eval_dataset", "eval_data")):
        names = draft.take(key)
        if names is None:
            continue
        names = names if isinstance(names, list) else str(names).split(",")
        sources = [_source(draft, str(name).strip(), folder, most, stage) for name in names]
        draft.put(ours, sources, key)


def _source(draft: Draft, name: str, folder: str, most: float | None, stage: str) -> Json:
    """One data set by its name, as dataset_info.json describes it."""
    info_file = _info_file(draft, folder)
    info = _entry(info_file, name)
    if info is None:
        why = "is not in it" if info_file else f"was not found in {folder}/"
        draft.leave(f"dataset {name}", name, f"dataset_info.json {why}: set the path of its file")
        return {"path": name if Path(name).suffix else f"{name}.jsonl"}
    if "file_name" not in info:
        draft.leave(f"dataset {name}", _hub_name(info), common.FROM_HUB)
        source: Json = {"path": f"{name}.jsonl"}
    else:
        file = str(info["file_name"])
        source = {"path": draft.locate(file, info_file.parent) or f"{folder}/{file}"}  # type: ignore[union-attr]
    source |= _format(draft, name, info, stage)
    counts = [int(count) for count in (most, info.get("num_samples")) if count]
    return source | ({"max_examples": min(counts)} if counts else {})


def _info_file(draft: Draft, folder: str) -> Path | None:
    for place in (f"{folder}/dataset_info.json", "dataset_info.json", "data/dataset_info.json"):
        for base in (Path.cwd(), draft.config.absolute().parent):
            if (base / place).is_file():
                return base / place
    return None


def _entry(file: Path | None, name: str) -> Json | None:
    content = read_json(file) if file else {}
    entry = content.get(name) if isinstance(content, dict) else None
    if entry is not None and not isinstance(entry, dict):
        raise InputError(f"{name}: expected a mapping", where=str(file))
    return entry


def _hub_name(info: Json) -> Any:
    return next((info[key] for key in ("hf_hub_url", "ms_hub_url", "om_hub_url", "script_url") if key in info), info)


def _format(draft: Draft, name: str, info: Json, stage: str) -> Json:
    columns: Json = info.get("columns") or {}
    if bool(info.get("ranking")) != (stage == "dpo") or "kto_tag" in columns:
        what = "holds preferences, which stage: dpo trains" if info.get("ranking") else "holds no pairs (ranking: true)"
        raise draft.refusal("dataset", f"{name} {what}, not stage: {stage}" if stage != "dpo" else f"{name} {what}")
    if stage == "pt":
        return described("text", {"text": columns.get("prompt", "instruction")})
    if stage == "dpo":
        return _pairs(draft, name, info, columns)
    for kind in ("images", "videos", "audios"):
        if kind in columns:
            draft.leave(f"dataset {name}: {kind}", columns[kind], "only text is trained here")
    if info.get("formatting", "alpaca") == "alpaca":
        return described("alpaca", {ours: columns.get(theirs) for theirs, ours in ALPACA.items()})
    tags = SHAREGPT_TAGS | (info.get("tags") or {})
    messages, tools, system = columns.get("messages", "conversations"), columns.get("tools"), columns.get("system")
    if SHAREGPT_TAGS.items() <= tags.items():
        return described("sharegpt", {"conversations": messages, "tools": tools, "system": system})
    if not OPENAI_TAGS.items() <= tags.items():
        reason = "a message has role and content, or from and value, here"
        draft.leave(f"dataset {name}: tags", info.get("tags"), reason)
    if system:
        draft.leave(f"dataset {name}: system", system, "the system prompt is the first message here")
    return described("messages", {"messages": messages, "tools": tools})


def _pairs(draft: Draft, name: str, info: Json, columns: Json) -> Json:
    chosen, rejected = columns.get("chosen", "chosen"), columns.get("rejected", "rejected")
    if info.get("formatting", "alpaca") != "alpaca":
        columns = {"prompt": columns.get("messages", "conversations")}
        draft.leave(f"dataset {name}: tags", info.get("tags"), "look at the rows with `tunesmith data show`")
    elif columns.get("query"):
        draft.leave(f"dataset {name}: query", columns["query"], "a pair has one prompt: put both into one column")
    return described(
        "preference", {"prompt": columns.get("prompt", "instruction"), "chosen": chosen, "rejected": rejected}
    )
