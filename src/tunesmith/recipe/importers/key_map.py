"""What keys of other tools become: the conversions that rows of keys.yaml name.

Each takes the keys of one topic from the draft and sets ours, or skips them with a reason. Left
out: data sets (data_sets.py)."""

from __future__ import annotations

from typing import Any, get_args

from tunesmith.core.types import Json
from tunesmith.recipe.importers.draft import RecipeDraft
from tunesmith.recipe.objectives import SCHEDULE_FIELDS, ScheduleName

CONTRADICTION = "contradict each other: keep one"
MASK_SWITCHES = ("assistant_only_loss", "completion_only_loss", "train_on_responses_only")
QUANT_KEYS = ("bnb_4bit_quant_type", "quantization_type", "quantization_method", "quant_method")
SCHEDULES = get_args(ScheduleName)
LOSS_NAMES = {"sigmoid": "dpo", "dpo": "dpo", "orpo": "orpo", "simpo": "simpo", "kto": "kto"}
DTYPES = {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32", "float": "fp32"}
DTYPES |= {name: name for name in ("bf16", "fp16", "fp32")}
ORPO_REASON = "the NLL term of ORPO covers the answer; in Axolotl it covers the prompt, too"
NLL_REASON = "its NLL is a mean over tokens here; in LLaMA-Factory a mean over answers"


def rename(draft: RecipeDraft, same: str, names: dict[str, str]) -> None:
    """Translate keys with the same meaning, those of `same` also with the same name."""
    for config_key, recipe_key in ({key: key for key in same.split()} | names).items():
        value = draft.pop_value(config_key)
        if value is not None:
            draft.set_value(recipe_key, value, config_key)


def choose_value(
    draft: RecipeDraft, key: str, to: str, values: dict[Any, Any], reason: str = ""
) -> None:
    """Translate a key with few values; null is the default of a recipe, and others are skipped."""
    value = draft.pop_scalar(key)
    if value is not None and value not in values:
        draft.skip_key(key, value, reason)
    elif (choice := values.get(value)) is not None and to not in draft.values:
        draft.set_value(to, choice, key)


def refuse_both(draft: RecipeDraft, first: str, second: str) -> None:
    if draft.remaining.get(first) and draft.remaining.get(second):
        raise draft.make_error(first, f"{first} and {second} {CONTRADICTION}")


# ---------------------------------------------------------------- model and method


def translate_model(draft: RecipeDraft, key: str) -> None:
    """Translate the model: a local folder if it exists, else the name."""
    name = draft.pop_text(key)
    if name is None:
        raise draft.make_error(key, f"{key} is missing")
    revision = draft.pop_text("model_revision")
    if revision not in (None, "main") and not draft.find_path(name):
        name = f"{name}@{revision}"
        key = f"{key}, model_revision"
    draft.set_value("model", draft.find_path(name) or name, key)


def translate_method(
    draft: RecipeDraft, key: str, names: Json, default: str, reason: str, note: str = ""
) -> None:
    """Translate the method; a config without the key has the `default`, for which `note` is the
    source."""
    value = draft.pop_scalar(key)
    method = default if value in (None, "") else names.get(value)
    if method is None:
        draft.skip_key(key, value, reason)
    elif method == "full":
        draft.set_value("method", "full", note or key)
    else:
        _translate_lora(draft, key, is_4bit=method == "qlora")


def _translate_lora(draft: RecipeDraft, source: str, *, is_4bit: bool) -> None:
    """Translate LoRA; 4-bit weights of any kind become NF4 with double quantization."""
    four_bit = {"load_in_4bit": True, "quantization_bit": 4, "quant_bits": 4}
    if keys := [key for key, value in four_bit.items() if draft.remaining.get(key) == value]:
        is_4bit = True
        source = f"{source}, {keys[0]}"
        draft.pop_value(keys[0])
    if is_4bit:
        draft.pop_value("load_in_4bit")
        for key in QUANT_KEYS:
            value = draft.pop_scalar(key)
            if value not in (None, "nf4", "bnb", "bitsandbytes"):
                draft.skip_key(key, value, "4-bit weights are always NF4 of bitsandbytes")
        for key in ("double_quantization", "use_bnb_nested_quant", "bnb_4bit_use_double_quant"):
            if draft.pop_value(key) is False:
                draft.skip_unneeded(key, False, "always on")
    draft.set_value("method", "qlora" if is_4bit else "lora", source)


def translate_adapter(draft: RecipeDraft, key: str) -> None:
    """Translate the adapter to continue training, which must be a local folder."""
    name = draft.pop_text(key)
    if name is None:
        return
    if path := draft.find_path(name):
        draft.set_value("adapter_from", path, key)
    else:
        draft.skip_key(key, name, "no such folder: set adapter_from")


def translate_target_modules(draft: RecipeDraft, key: str, all_linear: str) -> None:
    """Translate a list, a regular expression for full paths, or their name for all linears."""
    pattern = draft.remaining.get(key)
    if isinstance(pattern, str) and set(pattern) & set("^$*\\|("):
        draft.set_value("lora_target_modules", draft.pop_text(key), key)
    elif names := draft.pop_texts(key):
        value = "all-linear" if names == [all_linear] else names
        draft.set_value("lora_target_modules", value, key)


def translate_modules_to_save(draft: RecipeDraft, key: str) -> None:
    """Translate the modules that are trained in full beside an adapter."""
    if names := draft.pop_texts(key):
        draft.set_value("modules_to_save", names, key)


def translate_new_tokens(draft: RecipeDraft, key: str, module_key: str) -> None:
    """Translate new tokens.

    Other tools train the full embedding and head for them, listed under `module_key`; here their
    new rows are trained, so that key is not needed."""
    texts = draft.pop_texts(key)
    if not texts:
        return
    draft.set_value("add_tokens", texts, key)
    modules = draft.pop_texts(module_key)
    if modules and set(modules) <= {"embed_tokens", "lm_head"}:
        reason = "the new tokens' rows are trained and saved without it"
        draft.skip_unneeded(module_key, modules, reason)
    elif modules:
        draft.remaining[module_key] = modules


# ---------------------------------------------------------------- what is trained


def translate_trained_switches(draft: RecipeDraft) -> None:
    """Translate the switches of the mask of TRL and Unsloth; with assistant_only_loss,
    completion_only_loss has nothing left to decide. Pairs read none of them."""
    key = next((k for k in MASK_SWITCHES if draft.remaining.get(k) is not None), "")
    is_answers = draft.remaining.get(key)
    for switch in MASK_SWITCHES:
        draft.pop_value(switch)
    if draft.values.get("stage") == "preference":
        return
    if key:
        draft.set_value("train_on", "answers" if is_answers else "all", key)
    else:
        reason = "prompts are trained there (no assistant_only_loss); set train_on: all for that"
        draft.skip_key("assistant_only_loss", False, reason)


def translate_train_on_prompt(draft: RecipeDraft) -> None:
    """Translate LLaMA-Factory's switch of the mask, which pairs do not read."""
    if draft.pop_value("train_on_prompt") and draft.values.get("stage") == "preference":
        draft.skip_unneeded("train_on_prompt", True, "pairs compare answers")
    elif draft.document.values.get("train_on_prompt"):
        draft.set_value("train_on", "all", "train_on_prompt")


def translate_template_kwargs(draft: RecipeDraft, key: str) -> None:
    """Translate variables of the chat template: a mapping, or one of them by its name."""
    value = draft.pop_value(key)
    if value is not None and key != "chat_template_kwargs":
        value = {key: value}
    if not isinstance(value or {}, dict):
        raise draft.make_error(key, f"{key}: expected a mapping, found {value!r:.60}")
    if value:
        draft.set_value("chat_template_kwargs", value, key)


def set_overlong_default(draft: RecipeDraft, note: str, unless_null: str = "") -> None:
    if draft.document.values.get(unless_null, True) is not None:
        draft.set_value("on_overlong", "truncate", note)


def translate_eval_split(draft: RecipeDraft, key: str) -> None:
    """Translate the held-out fraction; a number of rows has no counterpart."""
    value = draft.pop_number(key)
    if value and value < 1:
        draft.set_value("eval_split", value, key)
    elif value:
        draft.skip_key(key, value, "must be a fraction: set eval_split, or eval_data")


def translate_chat_template(
    draft: RecipeDraft, key: str, file_key: str = "", default: str | None = None
) -> None:
    """Translate a .jinja file; instead of the tool's built-in templates the model's is used."""
    value = draft.pop_scalar(key)
    file = draft.pop_text(file_key)
    value = value if file is None else file
    if value is None or value == default:
        return
    if isinstance(value, str) and value.endswith(".jinja") and (path := draft.find_path(value)):
        draft.set_value("chat_template", path, key)
    else:
        reason = "the model's own chat template is used; see `tunesmith data show`"
        draft.skip_key(key, value, reason)


def skip_pad_token(draft: RecipeDraft, key: str) -> None:
    tokens = draft.remaining.get(key)
    if isinstance(tokens, dict) and tokens.keys() == {"pad_token"}:
        draft.skip_unneeded(key, draft.pop_value(key), "there is no padding")


# ---------------------------------------------------------------- steps and optimizer


def use_other_name(draft: RecipeDraft, key: str, other: str) -> None:
    """Read a key as if it had the other name."""
    if key in draft.remaining:
        draft.remaining.setdefault(other, draft.remaining.pop(key))


def translate_batch_size(draft: RecipeDraft, key: str, default: int) -> None:
    """Translate rows per step: micro batch size x gradient accumulation, on one device."""
    accumulation_key = "gradient_accumulation_steps"
    micro = draft.pop_number(key)
    accumulation = draft.pop_number(accumulation_key)
    if micro is None and accumulation is None:
        return
    micro = micro or default
    accumulation = accumulation or 1
    source = f"{key} {micro} x {accumulation_key} {accumulation}, on one device"
    draft.set_value("batch_size", int(micro * accumulation), source)


def translate_steps(draft: RecipeDraft) -> None:
    """Translate steps and warm-up; `max_steps` below 1 means none.

    Warm-up in steps becomes a ratio if the number of steps is known."""
    max_steps = draft.pop_number("max_steps") or 0
    warmup = draft.pop_number("warmup_steps")
    ratio = draft.pop_number("warmup_ratio")
    if max_steps > 0:
        draft.set_value("max_steps", int(max_steps), "max_steps")
    if warmup and warmup >= 1 and max_steps <= 0:
        reason = "a ratio here: set warmup_ratio to it divided by the steps of `tunesmith plan`"
        draft.skip_key("warmup_steps", warmup, reason)
    elif warmup:
        steps_ratio = warmup if warmup < 1 else warmup / max_steps
        draft.set_value("warmup_ratio", round(steps_ratio, 4), "warmup_steps")
        ratio = None  # with both, these tools use the steps
    if ratio is not None:
        draft.set_value("warmup_ratio", ratio, "warmup_ratio")


def translate_schedule(draft: RecipeDraft, key: str) -> None:
    """Translate the schedule and its arguments, after the warm-up."""
    value = draft.pop_scalar(key)
    if value in SCHEDULES:
        draft.set_value("lr_scheduler_type", value, key)
    elif value is not None:
        draft.skip_key(key, value, f"supported schedules: {', '.join(SCHEDULES)}")
    if value == "constant" and (warmup := draft.values.pop("warmup_ratio", None)):
        draft.skip_key(draft.notes.pop("warmup_ratio"), warmup, "a constant rate has no warm-up")
    kwargs = draft.pop_value("lr_scheduler_kwargs") or {}
    if not isinstance(kwargs, dict):
        draft.skip_key("lr_scheduler_kwargs", kwargs, "expected a mapping")
        return
    fields = SCHEDULE_FIELDS.get(str(value), ())
    supported = {name: argument for name, argument in kwargs.items() if name in fields}
    if supported:
        draft.set_value("lr_scheduler_kwargs", supported, "lr_scheduler_kwargs")
    for name in kwargs.keys() - supported.keys():
        reason = f"supported with {value}: {', '.join(fields) or 'none'}"
        draft.skip_key(f"lr_scheduler_kwargs.{name}", kwargs[name], reason)


def translate_precision(draft: RecipeDraft, dtype_keys: list[str]) -> None:
    """Translate the number format; `auto` and false leave it to the rule.

    `dtype_keys` hold the format of the weights; in mixed precision, a switch has that of the
    products."""
    requested: Json = {}
    for key in ("bf16", "bfloat16", "pure_bf16", "float32", "fp16", "float16"):
        if draft.pop_scalar(key) not in (None, False, "auto", ""):
            requested[key] = DTYPES[key.removeprefix("pure_")]
    if len(set(requested.values())) > 1:
        raise draft.make_error([*requested][-1], f"{' and '.join(requested)} {CONTRADICTION}")
    for key in dtype_keys:
        value = draft.pop_scalar(key)
        name = DTYPES.get(str(value).removeprefix("torch."))
        if value in (None, False, "auto", ""):
            continue
        if name is None:
            draft.skip_key(key, value, "supported number formats: bf16, fp16 and fp32")
        elif name not in requested.values() and requested:
            draft.skip_key(key, value, f"weights have the format of {next(iter(requested))} here")
        else:
            requested[key] = name
    if requested:
        draft.set_value("dtype", next(iter(requested.values())), ", ".join(requested))


def translate_smoothing(draft: RecipeDraft) -> None:
    for key in ("label_smoothing_factor", "label_smoothing"):
        if (value := draft.pop_number(key)) and draft.values.get("stage", "sft") != "preference":
            draft.set_value("label_smoothing", value, key)
        elif value:
            draft.skip_key(key, value, "pairs are smoothed by dpo_label_smoothing")


def translate_saving(draft: RecipeDraft) -> None:
    """Translate numbers of steps; fractions of the run and epochs have no counterpart."""
    strategies = [draft.remaining.get(key) for key in ("eval_strategy", "evaluation_strategy")]
    is_eval_disabled = any(strategy in ("no", False) for strategy in strategies)
    for key in ("save_steps", "eval_steps"):
        value = draft.pop_number(key)
        if value is None or (key == "eval_steps" and is_eval_disabled):
            continue
        if value >= 1:
            draft.set_value(key, int(value), key)
        else:
            reason = f"must be a number of steps; {key} is decided by a rule"
            draft.skip_unneeded(key, value, reason)
    strategy_keys = ("save_strategy", "eval_strategy", "evaluation_strategy")
    for key in (*strategy_keys, "saves_per_epoch", "evals_per_epoch"):
        value = draft.pop_value(key)
        if value not in (None, False, "no", "steps"):
            steps_key = "save_steps" if key.startswith("save") else "eval_steps"
            draft.skip_unneeded(key, value, f"set {steps_key}, a number of steps")


def translate_output_dir(draft: RecipeDraft) -> None:
    """Translate the output folder, unless it exists: a run folder must be new."""
    value = draft.pop_text("output_dir")
    if value is not None and draft.find_path(value):
        draft.skip_unneeded("output_dir", value, "it exists; a run folder must be new")
    elif value is not None:
        draft.set_value("output_dir", value, "output_dir")


# ---------------------------------------------------------------- stages


def check_stage(draft: RecipeDraft, key: str) -> None:
    stage = draft.pop_scalar(key) or "sft"
    if stage not in ("sft", "dpo", "kto", "pt"):
        message = f"stage: {stage} is not supported: use sft, dpo, kto or pt"
        raise draft.make_error(key, message)


def refuse_stage(draft: RecipeDraft, key: str) -> None:
    if draft.remaining.get(key):
        raise draft.make_error(key, f"{key} is not supported")


def translate_stage(
    draft: RecipeDraft, key: str, kinds: Json, losses: Json, marks: str = ""
) -> None:
    """Translate the stage that `key` names, unless another key did; without it, `marks` are keys
    of DPO alone."""
    value = draft.pop_text(key)
    if draft.values.get("stage") == "preference":
        return
    kind = kinds.get(value or "")
    if value is not None and kind is None:
        raise draft.make_error(key, f"{key}: {value} is not supported: use {', '.join(kinds)}")
    mark = next((mark for mark in marks.split() if mark in draft.remaining), "")
    if value is None and mark:
        kind = "dpo"
        key = mark
        draft.skip_key(f"{key} of trl dpo", None, "set loss: orpo if this is for trl orpo")
    if kind == "pt":
        _translate_pretraining(draft, key)
    elif kind not in (None, "sft"):
        _translate_preference(draft, kind, key, losses, {"dpo": 0.0, "simpo": 1.0})


def translate_axolotl_stage(
    draft: RecipeDraft, losses: Json, nll_defaults: Json, beta_keys: list[str]
) -> None:
    loss = draft.pop_scalar("rl")
    if not loss:
        if draft.notes.get("data") == "pretraining_dataset":
            _translate_pretraining(draft, "pretraining_dataset")
        return
    set_keys = [key for key in beta_keys if draft.remaining.get(key) is not None]
    beta = set_keys[0] if set_keys else beta_keys[0]
    for key in set_keys[1:]:
        draft.skip_unneeded(key, draft.pop_value(key), f"{beta} is used")
    loss_keys = {name: {"beta": beta, **keys} for name, keys in losses.items()}
    _translate_preference(draft, loss, "rl", loss_keys, nll_defaults)
    if loss == "orpo":
        draft.skip_key("rl orpo", None, ORPO_REASON)


def translate_llamafactory_stage(draft: RecipeDraft, losses: Json, nll_defaults: Json) -> None:
    """Translate the stage; ORPO has an NLL term of its own, to which pref_ftx is added."""
    stage = draft.document.values.get("stage")
    if stage == "pt":
        _translate_pretraining(draft, "stage")
    if stage not in ("dpo", "kto"):
        return
    source = "pref_loss" if stage == "dpo" else "stage"
    loss = draft.pop_scalar("pref_loss") or "sigmoid" if stage == "dpo" else "kto"
    share = draft.pop_number("pref_ftx")
    if share is not None:
        draft.remaining["pref_ftx"] = share + (loss == "orpo")
    _translate_preference(draft, loss, source, losses, nll_defaults)
    if loss == "orpo" or (share and loss != "kto"):
        draft.skip_unneeded(f"{source} {loss}", None, NLL_REASON)


def _translate_preference(
    draft: RecipeDraft, loss: Any, source: str, loss_keys: Json, nll_defaults: Json
) -> None:
    """Translate preference training.

    `loss_keys` map, by loss, the fields of our `loss` to their keys; `nll_defaults` are the
    coefficients of a config that sets none, of the losses whose term is not part of them."""
    if loss not in LOSS_NAMES:
        message = f"{source}: {loss} is not supported: use dpo, orpo, simpo or kto"
        raise draft.make_error(source, message)
    draft.set_value("stage", "preference", source)
    name = LOSS_NAMES[loss]
    loss_config: Json = {"name": name}
    sources = [source]
    for recipe_key, config_key in loss_keys[name].items():
        value = draft.pop_number(config_key)
        if value is not None:
            loss_config[recipe_key] = value
            sources.append(config_key)
    if name in nll_defaults and "nll_coefficient" not in loss_config:
        loss_config["nll_coefficient"] = nll_defaults[name]
        sources.append(f"no {loss_keys[name]['nll_coefficient']}")
    value = loss_config if len(loss_config) > 1 else name
    draft.set_value("loss", value, ", ".join(sources))
    unread = {their: ours for keys in loss_keys.values() for ours, their in keys.items()}
    smoothing = draft.pop_number("dpo_label_smoothing")
    for config_key, recipe_key in unread.items():
        if (value := draft.pop_number(config_key)) is not None:
            is_important = recipe_key == "nll_coefficient"
            reason = f"{name} does not read it"
            draft.skip_key(config_key, value, reason, is_important=is_important)
    if smoothing and name == "dpo":
        draft.set_value("label_smoothing", smoothing, "dpo_label_smoothing")
    elif smoothing:
        draft.skip_key("dpo_label_smoothing", smoothing, f"{name} does not read it")


def _translate_pretraining(draft: RecipeDraft, source: str) -> None:
    """Translate continued pretraining: a step of packed rows becomes a number of tokens."""
    draft.set_value("stage", "cpt", source)
    rows = draft.values.pop("batch_size", None)
    note = draft.notes.pop("batch_size", "")
    length = draft.values.get("max_length")
    if length is not None and not isinstance(length, (int, float)):
        raise draft.make_error(draft.notes["max_length"], f"expected a number, found {length!r}")
    if rows and length:
        tokens_note = f"{note}, {int(length):,} tokens each"
        draft.set_value("batch_tokens", int(rows * length), tokens_note)
    elif rows:
        draft.skip_key("batch_size", rows, "a step counts tokens: set batch_tokens")
    draft.values.pop("on_overlong", None)
    draft.notes.pop("on_overlong", None)
