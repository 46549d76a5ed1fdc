"""What all three tools have in common, because they stand on the same trainer: steps, schedule, precision, saving.

Each topic takes its keys from the draft and puts our values, or leaves them with a reason.
"""

from __future__ import annotations

from typing import Any

from tunesmith.recipe.importers.draft import Draft

# The names that they share with us. The rest of a tool's names stands in its own file.
SAME = {
    key: key
    for key in (
        *("learning_rate", "num_train_epochs", "weight_decay", "max_grad_norm", "seed"),
        *("lora_r", "lora_alpha", "lora_dropout", "use_rslora", "use_dora"),
    )
}
FROM_HUB = "not a file here: save its rows in the file that the recipe names"
SCHEDULES = {"linear": "linear", "cosine": "cosine", "constant": "constant", "constant_with_warmup": "constant"}
LOSSES = {"sigmoid": "dpo", "dpo": "dpo", "orpo": "orpo", "simpo": "simpo"}
PRECISIONS = {"bf16": "bf16", "bfloat16": "bf16", "fp32": "fp32", "float32": "fp32", "float": "fp32"}


def model(draft: Draft, key: str) -> None:
    """A folder where there is one, else the name as it is."""
    name = draft.word(key)
    if name is None:
        raise draft.refusal(key, f"{key} is missing: no model is named")
    draft.put("model", draft.locate(str(name)) or str(name), key)


def low_rank(draft: Draft, source: str, *, four_bits: bool = False) -> None:
    """LoRA, on 4-bit weights where theirs are: NF4 with double quantisation here, whatever theirs is."""
    if draft.given.get("load_in_4bit") or draft.given.get("quantization_bit") == 4:
        four_bits = True
        draft.take("quantization_bit")
    if four_bits:
        draft.take("load_in_4bit")
        for key in ("bnb_4bit_quant_type", "quantization_type", "quantization_method"):
            value = draft.word(key)
            if value not in (None, "nf4", "bnb", "bitsandbytes"):
                draft.leave(key, value, "4-bit weights are NF4 of bitsandbytes here")
        for key in ("double_quantization", "use_bnb_nested_quant", "bnb_4bit_use_double_quant"):
            if draft.take(key) is False:
                draft.leave(key, False, "always on: the scales are quantised too", matters=False)
    draft.put("method", "qlora" if four_bits else "lora", source)


def pairs(draft: Draft, loss: Any, source: str, **names: str) -> None:
    """Training on preferences: the keys of our `loss` (`beta`, `gamma`, `nll_coefficient`) by theirs, and its name."""
    if loss not in LOSSES:
        raise draft.refusal(source, f"{source}: {loss}: of preferences, dpo, orpo and simpo are trained here")
    draft.put("stage", "preference", source)
    wish, sources = {"name": LOSSES[loss]}, [source]
    for ours, theirs in names.items():
        value = draft.take(theirs)
        if value is None:
            continue
        if ours == "gamma" and loss != "simpo":
            draft.leave(theirs, value, "only SimPO has a margin", matters=False)
            continue
        wish[ours] = value
        sources.append(theirs)
    draft.put("loss", wish if len(wish) > 1 else wish["name"], ", ".join(sources))


def texts(draft: Draft, source: str) -> None:
    """Continued pretraining: a step counts tokens, which are theirs when their rows are packed full."""
    draft.put("stage", "cpt", source)
    rows, length = draft.values.pop("batch_size", None), draft.values.get("max_length")
    note = draft.notes.pop("batch_size", "")
    if rows and length:
        draft.put("batch_tokens", int(rows * length), f"{note}, each of {int(length):,} tokens")
    elif rows:
        draft.leave("batch_size", rows, "a step counts tokens here: set batch_tokens")
    if "overlong" in draft.values:
        del draft.values["overlong"], draft.notes["overlong"]


def adapter(draft: Draft, key: str) -> None:
    """An adapter to go on with: a folder here."""
    name = draft.word(key)
    if name is None:
        return
    if found := draft.locate(str(name)):
        draft.put("adapter_from", found, key)
    else:
        draft.leave(key, name, "there is no such folder: set adapter_from")


def new_tokens(draft: Draft, key: str, whole: tuple[str, ...]) -> None:
    """Tokens to add. The matrices that other tools train whole for them, under one of the keys `whole`, have their
    new rows trained here."""
    value = draft.take(key)
    if not value:
        return
    texts = value.split(",") if isinstance(value, str) else value
    draft.put("add_tokens", [str(text).strip() for text in texts], key)
    for other in whole:
        modules = draft.given.get(other)
        names = modules.split(",") if isinstance(modules, str) else modules
        if isinstance(names, list) and {str(name).strip() for name in names} <= {"embed_tokens", "lm_head"}:
            why = "the new tokens' rows are trained and saved without it"
            draft.leave(other, draft.take(other), why, matters=False)


def held_out(draft: Draft, key: str) -> None:
    """A share of the rows; a number of rows has no counterpart."""
    value = draft.number(key)
    if value and value < 1:
        draft.put("eval_split", value, key)
    elif value:
        draft.leave(key, value, "a share of the rows here: set eval_split, or eval_data")


def batch_size(draft: Draft, micro_key: str, micro_default: int) -> None:
    """Rows a step: what one device takes at once, times how often it does before it updates."""
    accumulation_key = "gradient_accumulation_steps"
    micro, accumulation = draft.number(micro_key), draft.number(accumulation_key)
    if micro is None and accumulation is None:
        return
    micro, accumulation = micro or micro_default, accumulation or 1
    source = f"{micro_key} {micro} x {accumulation_key} {accumulation}, on one device"
    draft.put("batch_size", int(micro * accumulation), source)


def steps(draft: Draft) -> None:
    """`max_steps` below 1 means none. Warm-up counted in steps becomes a share when their number is known."""
    limit, warmup, ratio = draft.number("max_steps"), draft.number("warmup_steps"), draft.number("warmup_ratio")
    if limit and limit > 0:
        draft.put("max_steps", int(limit), "max_steps")
    if warmup and warmup >= 1 and not (limit and limit > 0):
        reason = "here a share: set warmup_ratio to this divided by the number of steps that `tunesmith plan` prints"
        draft.leave("warmup_steps", warmup, reason)
    elif warmup:
        share = warmup if warmup < 1 else warmup / limit
        draft.put("warmup_ratio", round(share, 4), "warmup_steps")
        ratio = None  # where both are given, theirs takes the steps
    if ratio is not None:
        draft.put("warmup_ratio", ratio, "warmup_ratio")


def schedule(draft: Draft, key: str) -> None:
    value = draft.word(key)
    if value in SCHEDULES:
        draft.put("lr_scheduler_type", SCHEDULES[value], key)
    elif value is not None:
        draft.leave(key, value, "linear, cosine and constant are the schedules here")


def optimizer(draft: Draft, key: str) -> None:
    value = draft.word(key)
    if value is None or value in ("adamw", "adamw_torch", "adamw_torch_fused", "adamw_hf"):
        return
    if value in ("adamw_8bit", "adamw_bnb_8bit", "paged_adamw_8bit"):
        draft.put("optim", "adamw_8bit", key)
    elif "adamw" in str(value):
        draft.leave(key, value, "AdamW, its state in fp32", matters=False)
    else:
        draft.leave(key, value, "the optimizer is AdamW; another one wants another learning rate")


def precision(draft: Draft, *dtype_keys: str) -> None:
    """bf16 and fp32 are what there is. `auto` and a plain false leave it to the rule."""
    half = {key: draft.word(key) for key in ("fp16", "float16")}
    full = {key: draft.word(key) for key in ("bf16", "bfloat16", "pure_bf16", "float32", *dtype_keys)}
    wanted = {key: value for key, value in full.items() if value not in (None, False, "auto", "")}
    if (used := [key for key, value in half.items() if value]) and wanted:
        raise draft.refusal(used[0], f"{used[0]} and {next(iter(wanted))} contradict each other: keep one")
    for key, value in wanted.items():
        if key in dtype_keys and value not in PRECISIONS:
            draft.leave(key, value, "bf16 and fp32 are the number formats here")
        else:
            draft.put("dtype", PRECISIONS[value] if key in dtype_keys else PRECISIONS[key.removeprefix("pure_")], key)
    for key in used:
        draft.leave(key, True, "bf16 and fp32 are the number formats here")


def saving(draft: Draft) -> None:
    """Whole numbers of steps are the same here; shares of the run and whole epochs have no counterpart."""
    no_evaluation = any(draft.given.get(key) in ("no", False) for key in ("eval_strategy", "evaluation_strategy"))
    for key in ("save_steps", "eval_steps"):
        value = draft.number(key)
        if value is None or (key == "eval_steps" and no_evaluation):
            continue
        if value >= 1:
            draft.put(key, int(value), key)
        else:
            draft.leave(key, value, f"a number of steps here; {key} is decided by a rule", matters=False)
    for key in ("save_strategy", "eval_strategy", "evaluation_strategy", "saves_per_epoch", "evals_per_epoch"):
        value = draft.take(key)
        if value not in (None, False, "no", "steps"):
            ours = "save_steps" if key.startswith("save") else "eval_steps"
            draft.leave(key, value, f"set {ours}, a number of steps", matters=False)


def folder(draft: Draft) -> None:
    """Their output folder, unless something is in it: a run folder has to be new."""
    value: Any = draft.word("output_dir")
    if value is None:
        return
    if draft.locate(str(value)):
        draft.leave("output_dir", value, "it exists; a run folder must be new", matters=False)
    else:
        draft.put("output_dir", str(value), "output_dir")


def target_modules(draft: Draft, key: str, *, everything: tuple[str, ...]) -> None:
    """A list, a regular expression for whole paths, or their word for all linear layers."""
    value = draft.take(key)
    if isinstance(value, str) and value not in everything:
        if set(value) & set("^$*\\|("):
            draft.put("lora_target_modules", value, key)
            return
        value = [name.strip() for name in value.split(",")]
    if value:
        draft.put("lora_target_modules", value if isinstance(value, list) else "all-linear", key)


def chat_template(draft: Draft, key: str, own: tuple[str, ...]) -> None:
    """A built-in template of theirs is not ours: the model's own is used, or a .jinja file."""
    value = draft.word(key)
    if value is None or value in own:
        return
    if isinstance(value, str) and value.endswith(".jinja") and (found := draft.locate(value)):
        draft.put("template", found, key)
    else:
        draft.leave(key, value, "the model's own chat template is used; look with `tunesmith data show`")
