"""What all three tools have in common, because they stand on the same trainer: steps, schedule,
precision, saving.

Each topic takes its keys from the draft and puts our values, or leaves them with a reason.
"""

from __future__ import annotations

from typing import Any

from tunesmith.recipe.importers.draft import RecipeDraft

# The names that they share with us. The rest of a tool's names stands in its own file.
SAME_KEYS = {
    key: key
    for key in (
        *("learning_rate", "num_train_epochs", "weight_decay", "max_grad_norm", "seed"),
        *("lora_r", "lora_alpha", "lora_dropout", "use_rslora", "use_dora"),
    )
}
HUB_DATASET_REASON = "not a file here: save its rows in the file that the recipe names"
SCHEDULES = {
    "linear": "linear",
    "cosine": "cosine",
    "constant": "constant",
    "constant_with_warmup": "constant",
}
LOSS_NAMES = {"sigmoid": "dpo", "dpo": "dpo", "orpo": "orpo", "simpo": "simpo"}
DTYPES = {"bf16": "bf16", "bfloat16": "bf16", "fp32": "fp32", "float32": "fp32", "float": "fp32"}


def translate_model(draft: RecipeDraft, key: str) -> None:
    """A folder where there is one, else the name as it is."""
    name = draft.pop_scalar(key)
    if name is None:
        raise draft.make_error(key, f"{key} is missing: no model is named")
    draft.set_value("model", draft.find_path(str(name)) or str(name), key)


def translate_lora(draft: RecipeDraft, source: str, *, is_4bit: bool = False) -> None:
    """LoRA, on 4-bit weights where theirs are: NF4 with double quantisation here, whatever theirs
    is."""
    if draft.remaining.get("load_in_4bit") or draft.remaining.get("quantization_bit") == 4:
        is_4bit = True
        draft.pop_value("quantization_bit")
    if is_4bit:
        draft.pop_value("load_in_4bit")
        for key in ("bnb_4bit_quant_type", "quantization_type", "quantization_method"):
            value = draft.pop_scalar(key)
            if value not in (None, "nf4", "bnb", "bitsandbytes"):
                draft.skip_key(key, value, "4-bit weights are NF4 of bitsandbytes here")
        for key in ("double_quantization", "use_bnb_nested_quant", "bnb_4bit_use_double_quant"):
            if draft.pop_value(key) is False:
                draft.skip_key(
                    key, False, "always on: the scales are quantised too", is_important=False
                )
    draft.set_value("method", "qlora" if is_4bit else "lora", source)


def translate_preference(draft: RecipeDraft, loss: Any, source: str, **loss_keys: str) -> None:
    """Training on preferences: the keys of our `loss` (`beta`, `gamma`, `nll_coefficient`) by
    theirs, and its name."""
    if loss not in LOSS_NAMES:
        raise draft.make_error(
            source, f"{source}: {loss}: of preferences, dpo, orpo and simpo are trained here"
        )
    draft.set_value("stage", "preference", source)
    loss_config, sources = {"name": LOSS_NAMES[loss]}, [source]
    for recipe_key, config_key in loss_keys.items():
        value = draft.pop_value(config_key)
        if value is None:
            continue
        if recipe_key == "gamma" and loss != "simpo":
            draft.skip_key(config_key, value, "only SimPO has a margin", is_important=False)
            continue
        loss_config[recipe_key] = value
        sources.append(config_key)
    draft.set_value(
        "loss", loss_config if len(loss_config) > 1 else loss_config["name"], ", ".join(sources)
    )


def translate_pretraining(draft: RecipeDraft, source: str) -> None:
    """Continued pretraining: a step counts tokens, which are theirs when their rows are packed
    full."""
    draft.set_value("stage", "cpt", source)
    rows, length = draft.values.pop("batch_size", None), draft.values.get("max_length")
    note = draft.notes.pop("batch_size", "")
    if rows and length:
        draft.set_value(
            "batch_tokens", int(rows * length), f"{note}, each of {int(length):,} tokens"
        )
    elif rows:
        draft.skip_key("batch_size", rows, "a step counts tokens here: set batch_tokens")
    if "overlong" in draft.values:
        del draft.values["overlong"], draft.notes["overlong"]


def translate_adapter(draft: RecipeDraft, key: str) -> None:
    """An adapter to go on with: a folder here."""
    name = draft.pop_scalar(key)
    if name is None:
        return
    if path := draft.find_path(str(name)):
        draft.set_value("adapter_from", path, key)
    else:
        draft.skip_key(key, name, "there is no such folder: set adapter_from")


def translate_new_tokens(draft: RecipeDraft, key: str, module_keys: tuple[str, ...]) -> None:
    """Tokens to add. The matrices that other tools train whole for them, under one of the keys
    `whole`, have their new rows trained here."""
    value = draft.pop_value(key)
    if not value:
        return
    texts = value.split(",") if isinstance(value, str) else value
    draft.set_value("add_tokens", [str(text).strip() for text in texts], key)
    for module_key in module_keys:
        modules = draft.remaining.get(module_key)
        names = modules.split(",") if isinstance(modules, str) else modules
        if isinstance(names, list) and {str(name).strip() for name in names} <= {
            "embed_tokens",
            "lm_head",
        }:
            reason = "the new tokens' rows are trained and saved without it"
            draft.skip_key(module_key, draft.pop_value(module_key), reason, is_important=False)


def translate_eval_split(draft: RecipeDraft, key: str) -> None:
    """A share of the rows; a number of rows has no counterpart."""
    value = draft.pop_number(key)
    if value and value < 1:
        draft.set_value("eval_split", value, key)
    elif value:
        draft.skip_key(key, value, "a share of the rows here: set eval_split, or eval_data")


def translate_batch_size(draft: RecipeDraft, micro_key: str, micro_default: int) -> None:
    """Rows a step: what one device takes at once, times how often it does before it updates."""
    accumulation_key = "gradient_accumulation_steps"
    micro, accumulation = draft.pop_number(micro_key), draft.pop_number(accumulation_key)
    if micro is None and accumulation is None:
        return
    micro, accumulation = micro or micro_default, accumulation or 1
    source = f"{micro_key} {micro} x {accumulation_key} {accumulation}, on one device"
    draft.set_value("batch_size", int(micro * accumulation), source)


def translate_steps(draft: RecipeDraft) -> None:
    """`max_steps` below 1 means none. Warm-up counted in steps becomes a share when their number is
    known."""
    limit, warmup, ratio = (
        draft.pop_number("max_steps"),
        draft.pop_number("warmup_steps"),
        draft.pop_number("warmup_ratio"),
    )
    if limit and limit > 0:
        draft.set_value("max_steps", int(limit), "max_steps")
    if warmup and warmup >= 1 and not (limit and limit > 0):
        reason = "here a share: set warmup_ratio to this divided by the number of steps that `tunesmith plan` prints"
        draft.skip_key("warmup_steps", warmup, reason)
    elif warmup:
        share = warmup if warmup < 1 else warmup / limit
        draft.set_value("warmup_ratio", round(share, 4), "warmup_steps")
        ratio = None  # where both are given, theirs takes the steps
    if ratio is not None:
        draft.set_value("warmup_ratio", ratio, "warmup_ratio")


def translate_schedule(draft: RecipeDraft, key: str) -> None:
    value = draft.pop_scalar(key)
    if value in SCHEDULES:
        draft.set_value("lr_scheduler_type", SCHEDULES[value], key)
    elif value is not None:
        draft.skip_key(key, value, "linear, cosine and constant are the schedules here")


def translate_optimizer(draft: RecipeDraft, key: str) -> None:
    value = draft.pop_scalar(key)
    if value is None or value in ("adamw", "adamw_torch", "adamw_torch_fused", "adamw_hf"):
        return
    if value in ("adamw_8bit", "adamw_bnb_8bit", "paged_adamw_8bit"):
        draft.set_value("optim", "adamw_8bit", key)
    elif "adamw" in str(value):
        draft.skip_key(key, value, "AdamW, its state in fp32", is_important=False)
    else:
        draft.skip_key(
            key, value, "the optimizer is AdamW; another one wants another learning rate"
        )


def translate_precision(draft: RecipeDraft, *dtype_keys: str) -> None:
    """bf16 and fp32 are what there is. `auto` and a plain false leave it to the rule."""
    fp16_values = {key: draft.pop_scalar(key) for key in ("fp16", "float16")}
    dtype_values = {
        key: draft.pop_scalar(key)
        for key in ("bf16", "bfloat16", "pure_bf16", "float32", *dtype_keys)
    }
    requested = {
        key: value for key, value in dtype_values.items() if value not in (None, False, "auto", "")
    }
    if (fp16_keys := [key for key, value in fp16_values.items() if value]) and requested:
        raise draft.make_error(
            fp16_keys[0],
            f"{fp16_keys[0]} and {next(iter(requested))} contradict each other: keep one",
        )
    for key, value in requested.items():
        if key in dtype_keys and value not in DTYPES:
            draft.skip_key(key, value, "bf16 and fp32 are the number formats here")
        else:
            draft.set_value(
                "dtype",
                DTYPES[value] if key in dtype_keys else DTYPES[key.removeprefix("pure_")],
                key,
            )
    for key in fp16_keys:
        draft.skip_key(key, True, "bf16 and fp32 are the number formats here")


def translate_saving(draft: RecipeDraft) -> None:
    """Whole numbers of steps are the same here; shares of the run and whole epochs have no
    counterpart."""
    is_eval_disabled = any(
        draft.remaining.get(key) in ("no", False)
        for key in ("eval_strategy", "evaluation_strategy")
    )
    for key in ("save_steps", "eval_steps"):
        value = draft.pop_number(key)
        if value is None or (key == "eval_steps" and is_eval_disabled):
            continue
        if value >= 1:
            draft.set_value(key, int(value), key)
        else:
            draft.skip_key(
                key,
                value,
                f"a number of steps here; {key} is decided by a rule",
                is_important=False,
            )
    for key in (
        "save_strategy",
        "eval_strategy",
        "evaluation_strategy",
        "saves_per_epoch",
        "evals_per_epoch",
    ):
        value = draft.pop_value(key)
        if value not in (None, False, "no", "steps"):
            steps_key = "save_steps" if key.startswith("save") else "eval_steps"
            draft.skip_key(key, value, f"set {steps_key}, a number of steps", is_important=False)


def translate_output_dir(draft: RecipeDraft) -> None:
    """Their output folder, unless something is in it: a run folder has to be new."""
    value: Any = draft.pop_scalar("output_dir")
    if value is None:
        return
    if draft.find_path(str(value)):
        draft.skip_key(
            "output_dir", value, "it exists; a run folder must be new", is_important=False
        )
    else:
        draft.set_value("output_dir", str(value), "output_dir")


def translate_target_modules(
    draft: RecipeDraft, key: str, *, all_linear_names: tuple[str, ...]
) -> None:
    """A list, a regular expression for whole paths, or their word for all linear layers."""
    value = draft.pop_value(key)
    if isinstance(value, str) and value not in all_linear_names:
        if set(value) & set("^$*\\|("):
            draft.set_value("lora_target_modules", value, key)
            return
        value = [name.strip() for name in value.split(",")]
    if value:
        draft.set_value(
            "lora_target_modules", value if isinstance(value, list) else "all-linear", key
        )


def translate_chat_template(draft: RecipeDraft, key: str, default_names: tuple[str, ...]) -> None:
    """A built-in template of theirs is not ours: the model's own is used, or a .jinja file."""
    value = draft.pop_scalar(key)
    if value is None or value in default_names:
        return
    if isinstance(value, str) and value.endswith(".jinja") and (path := draft.find_path(value)):
        draft.set_value("template", path, key)
    else:
        draft.skip_key(
            key, value, "the model's own chat template is used; look with `tunesmith data show`"
        )
