"""The plan: every value that a run obeys, by whom and why, and what the run will take.

In: the recipe and the facts (machine, model, data reports). Out: a Plan; nothing else may start a run. Pure: nothing is
read or loaded here.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

from tunesmith.core.errors import InputError, MachineError
from tunesmith.core.types import Choice, DataReport, Machine, ModelSpec, Plan
from tunesmith.plan.confidence import with_evidence
from tunesmith.plan.constraints import never_choices
from tunesmith.plan.disk import GENERAL_TOKENS, disk_needed, most_checkpoints
from tunesmith.plan.guard import guard_choices
from tunesmith.plan.memory_budget import answer_tokens, needed, phases
from tunesmith.plan.mixture import epoch_of
from tunesmith.plan.new_tokens import rows_choice, trained_rows
from tunesmith.plan.rehearsal import MOST, rehearsal_choices
from tunesmith.plan.rules import RULES, Known, SavedShare, nothing_saved
from tunesmith.plan.rules_cpt import CPT_RULES, LITTLE
from tunesmith.recipe.mappings import PairLoss
from tunesmith.recipe.schema import KEYS, Recipe

PAIR_KEYS = {"loss": "name", **{key: key for key in PairLoss.model_fields if key != "name"}}  # of the plan -> of `loss`
ADAPTER_KEYS = ("lora_r", "lora_alpha", "lora_dropout", "lora_target_modules", "use_rslora", "use_dora")
EXTRA = (("method", "qlora", "4-bit weights", "lora"), ("optim", "adamw_8bit", "8-bit moments", "adamw"))
FITS = 1.15  # a prediction counts as fitting when this much of it is free
BATCHES = ("batch_size", "batch_tokens")  # what a step holds: from then on the steps of a run are known


def decide(
    recipe: Recipe,
    *,
    machine: Machine,
    model: ModelSpec,
    data: Mapping[str, DataReport],
    output_dir: Path,
    now: str,
    fixed: Mapping[str, Choice] | None = None,
    saved_share: SavedShare = nothing_saved,
) -> Plan:
    """`fixed`: what an adapter to go on with, a mixture or the tokenizer has decided already. `saved_share`: of the
    tokens, when documents share prefixes, by batch_size and pack_length. InputError: an impossible wish; MachineError:
    no room."""
    wishes = _wishes(recipe)
    has_schema = wishes["schema"] is not None
    decided: dict[str, Any] = {}
    choices: dict[str, Choice] = {}
    held_out = _held_out(recipe, data)
    fixed = fixed or {}
    epoch = epoch_of(data["data"], fixed.get("mixture"))
    known = Known(machine, model, epoch, decided, has_schema, recipe.max_steps, recipe.stage, saved_share, *held_out)
    for key, decide_by_rule in (CPT_RULES if known.stage == "cpt" else RULES).items():
        if key in ADAPTER_KEYS and decided.get("method") == "full":
            continue
        if key in PAIR_KEYS and known.stage != "preference":
            continue
        wish = wishes.get(key, "auto")  # what changes speed alone is no recipe key
        if key in fixed:
            choices[key] = _agreed(key, wish, fixed[key])
        else:
            choices[key] = decide_by_rule(known) if wish == "auto" else Choice(wish, "you", "the recipe says so")
        decided[key] = choices[key].value
        if key in BATCHES and (longer := known.longer()):
            choices["num_train_epochs"], decided["num_train_epochs"] = longer, longer.value
    choices |= {key: choice for key, choice in fixed.items() if key not in RULES}
    choices |= never_choices(recipe.never, data["data"]) | guard_choices(recipe.guard, known)
    decided["forgetting_margin"] = choices["forgetting_margin"].value
    choices |= rehearsal_choices(recipe.rehearsal, known, data.get("rehearsal"))
    choices |= rows_choice(choices.get("add_tokens"), known)
    decided["new_rows"] = trained_rows(choices)
    choices["activations"] = _activations(known, model, choices, wishes["activations"])
    decided["activations"] = choices["activations"].value
    choices |= _given(recipe, wishes, output_dir, now)
    _check_lengths(decided, model)
    _check_libraries(decided, machine)
    return Plan(
        recipe=recipe.model_dump(mode="json", by_alias=True),
        choices=with_evidence(choices, known),
        machine=machine,
        model=model,
        data=dict(data),
        steps=known.steps,
        tokens_per_epoch=epoch.tokens,
        memory_bytes=_memory(known, model, choices),
        warnings=tuple(_warnings(known, data)),
        disk_bytes=_disk(recipe, known, data, choices),
        phase_bytes=_phases(known, model, choices),
        saved_share=known.saved if decided["share_prefixes"] else 0.0,
    )


def _wishes(recipe: Recipe) -> dict[str, Any]:
    """By the keys of the plan: those of the recipe, and of its `loss` each by itself."""
    wishes = {KEYS[name]: getattr(recipe, name) for name in KEYS}
    return wishes | {key: getattr(recipe.loss, name) for key, name in PAIR_KEYS.items()}


def _given(recipe: Recipe, wishes: Mapping[str, Any], output_dir: Path, now: str) -> dict[str, Choice]:
    """What no rule decides."""
    given = {key: _plain(wishes[key]) for key in ("template", "overlong", "seed", "stage")}
    found = {
        key: Choice(value, "you" if _set(recipe, key) else "rule", _WHY[key])
        for key, value in (given | {"output_dir": str(output_dir)}).items()
    }
    return found | {"now": Choice(now, "rule", "dates in chat templates are frozen at this moment")}


_WHY = {
    "output_dir": "the run folder",
    "template": "the model's own chat template, unless the recipe names one",
    "overlong": "what happens to documents over max_length; always counted",
    "seed": "order of rows, start of the adapter, samples",
    "stage": "sft trains on answers, cpt on every token of texts, preference on the difference between two answers",
}


def _agreed(key: str, wish: Any, fixed: Choice) -> Choice:
    """What is fixed, unless the recipe wishes for something else."""
    if not agrees(wish, fixed.value):
        what = f"{key} is {words(wish)} in the recipe, but {words(fixed.value)} in the adapter to go on with"
        raise InputError(what, where=key, fix=f"leave {key} out, or leave adapter_from out to start a new adapter")
    return fixed


def agrees(wish: Any, value: Any) -> bool:
    """A wish of the recipe, and what is decided already."""
    return wish == "auto" or words(wish) == words(value)


def words(value: Any) -> str:
    """Names in order; 16 and 16.0 are the same."""
    if isinstance(value, tuple):
        return ", ".join(sorted(cast("tuple[str, ...]", value)))
    return f"{value:g}" if isinstance(value, float) else str(value)


def _set(recipe: Recipe, key: str) -> bool:
    return key in recipe.model_fields_set


def _plain(value: Any) -> Any:
    return str(value) if isinstance(value, Path) else value


def _check_lengths(decided: dict[str, Any], model: ModelSpec) -> None:
    if decided["max_length"] > model.context_length:
        raise InputError(
            f"max_length {decided['max_length']:,} is over the model's context of {model.context_length:,} tokens",
            where="max_length",
            fix="lower it, or leave it at auto",
        )
    if decided["pack_length"] < decided["max_length"]:
        raise InputError(
            f"pack_length {decided['pack_length']:,} is below max_length {decided['max_length']:,}",
            where="pack_length",
            fix="a document must fit in a pack: raise pack_length or lower max_length",
        )

    if decided.get("batch_tokens", decided["max_length"]) < decided["max_length"]:
        raise InputError(
            f"batch_tokens {decided['batch_tokens']:,} is below max_length {decided['max_length']:,}",
            where="batch_tokens",
            fix="a step takes at least one window: raise batch_tokens or lower max_length",
        )


def _check_libraries(decided: dict[str, Any], machine: Machine) -> None:
    if "bitsandbytes" in machine.versions:
        return
    for key, value, what, other in EXTRA:
        if decided[key] == value:
            fix = f"pip install 'tunesmith[qlora]', or use {key}: {other}"
            raise InputError(f"{what} need bitsandbytes, which is not installed", where=f"{key}: {value}", fix=fix)


def _packs(known: Known, choices: Mapping[str, Choice]) -> tuple[int, int, int]:
    """Tokens of the largest pack of a step, and of the longest row; and how many packs there are in all."""
    sides = 2 if known.stage == "preference" else 1  # documents of a row, together in a pack
    longest = sides * known.data.length_percentiles.get("max", 1)
    if known.stage == "cpt":
        step_tokens = known["batch_tokens"]
    else:
        step_tokens = known["batch_size"] * sides * known.data.length_percentiles.get("p90", 1)
    if known["share_prefixes"]:
        step_tokens = int(step_tokens * (1 - known.saved))
    if "rehearsal_length" in choices:  # a step may have a piece of a text, or several
        longest = max(longest, choices["rehearsal_length"].value)
        ratio = choices["rehearsal_ratio"].value if "rehearsal_margin" not in choices else MOST
        step_tokens = int(step_tokens / (1 - ratio)) + longest
    most = sides * known["pack_length"]
    packs = known.steps * math.ceil(step_tokens / known["pack_length"])
    return min(max(min(known["pack_length"], step_tokens), longest), most), min(longest, most), packs


def _memory(known: Known, model: ModelSpec, choices: Mapping[str, Choice]) -> dict[str, int]:
    step, _, packs = _packs(known, choices)
    return _held(known, model, step, packs)


def _held_out(recipe: Recipe, data: Mapping[str, DataReport]) -> tuple[int, bool]:
    """How many questions are asked before and after, and whether anything is measured then."""
    questions = data["test_data"].rows if "test_data" in data and recipe.stage != "cpt" else 0
    return questions, bool({"eval_data", "test_data"} & data.keys()) or recipe.retention_data is not None


def _held(known: Known, model: ModelSpec, pack_tokens: int, packs: int) -> dict[str, int]:
    layouts = 2 if known["weight_layout"] == "blocked" else 1
    held = {"pack_tokens": pack_tokens, "packs": packs, "layouts": layouts, "cache_tokens": _answer_tokens(known)}
    return needed(model, known.machine, measured=known.measured, **held, **_size(known.decided))


def _answer_tokens(known: Known) -> int:
    longest = known.data.length_percentiles.get("max", 1)
    share = known.data.supervised_tokens / max(1, known.data.tokens)
    return answer_tokens(
        known.model, known.machine, questions=known.questions, longest=longest, share=share, dtype=known["dtype"]
    )


def _phases(known: Known, model: ModelSpec, choices: Mapping[str, Choice]) -> dict[str, int]:
    *tokens, packs = _packs(known, choices)
    step, longest = (_held(known, model, own, packs) for own in tokens)
    return phases(step, longest, model, cache_tokens=_answer_tokens(known), dtype=known["dtype"])


def _activations(known: Known, model: ModelSpec, choices: Mapping[str, Choice], wish: str) -> Choice:
    """All that fit are kept: what is computed anew costs time."""
    if wish != "auto":
        return Choice(wish, "you", "the recipe says so")
    free = known.machine.available_bytes
    for policy, why in ACTIVATIONS.items():
        known.decided["activations"] = policy
        needed = _memory(known, model, choices)["peak"] * FITS
        if needed <= free or policy == "recompute":
            return Choice(policy, "rule", f"{why}; with that, {needed / 1e9:.1f} GB of {free / 1e9:.1f} free")
    raise AssertionError("the last policy is always taken")


ACTIVATIONS = {
    "keep": "nothing is computed twice",
    "selective": "all of them do not fit: the MLP's are computed again in the backward",
    "recompute": "little room: layer by layer, all are computed again in the backward",
}


def _disk(recipe: Recipe, known: Known, data: Mapping[str, DataReport], choices: Mapping[str, Choice]) -> int:
    selecting = "eval_data" in data or "rehearsal_margin" in choices
    eval_steps = known["eval_steps"] if selecting else None
    checkpoints = most_checkpoints(steps=known.steps, save_steps=known["save_steps"], eval_steps=eval_steps)
    kept_tokens = 0
    if known["method"] == "full" or "adapter_sha256" in choices:  # no switch brings the base back
        kept_tokens += GENERAL_TOKENS if recipe.retention_data is not None else 0
        kept_tokens += data["test_data"].supervised_tokens if "test_data" in data and known.stage != "cpt" else 0
    return disk_needed(known.model, checkpoints=checkpoints, kept_tokens=kept_tokens, **_size(known.decided))


SIZE_KEYS = ("method", "dtype", "optim", "activations", "step_in_backward")


def _size(decided: Mapping[str, Any]) -> dict[str, Any]:
    """What the weights take."""
    adapter = {"rank": decided.get("lora_r", 0), "dora": decided.get("use_dora", False)}
    adapter |= {"new_rows": decided.get("new_rows", 0)}
    return {key: decided[key] for key in SIZE_KEYS} | adapter


def fits(plan: Plan) -> bool:
    """Its machine has the memory, and some to spare."""
    return plan.memory_bytes["peak"] * FITS <= plan.machine.available_bytes


def refuse_without_room(plan: Plan) -> None:
    """Raises MachineError when memory or disk will not do: said before anything is loaded."""
    peak, free = plan.memory_bytes["peak"], plan.machine.available_bytes
    if not fits(plan):
        raise MachineError(
            f"the run needs about {peak / 1e9:.1f} GB, {free / 1e9:.1f} GB are free on this machine",
            where="plan",
            fix="lower pack_length or lora_r, use method: qlora, a smaller model, or a machine with more memory"
            + (f": {plan.fits_on} of the table would do" if plan.fits_on else ""),
        )
    if plan.disk_bytes > plan.machine.disk_free_bytes:
        raise MachineError(
            f"the run folder needs up to {plan.disk_bytes:,} bytes, {plan.machine.disk_free_bytes:,} are free",
            where=str(plan["output_dir"]),
            fix="free some room, or set output_dir to another disk",
        )


def _warnings(known: Known, data: Mapping[str, DataReport]) -> list[str]:
    """What the user should know before starting."""
    found: list[str] = []
    rate, small = known["learning_rate"], known.model.parameters < 1e9
    if small and known["method"] != "full":
        instead = "compare two or three" if known.stage == "preference" else "`tunesmith tune lr` tries five"
        found.append(f"learning rates below 1B parameters are extrapolations ({rate:g} here): {instead}")
    if known["method"] == "qlora" and known["dtype"] == "fp32":
        found.append("4-bit weights are widened to fp32 for products, and embeddings and head take 4 bytes a value")
    if known.steps < 100:
        many = "1 step" if known.steps == 1 else f"{known.steps} steps"
        found.append(f"only {many}: results depend on the learning rate and the seed more than usual")
    if known.stage == "cpt" and known.data.tokens < LITTLE:
        found.append(
            f"{known.data.tokens:,} tokens of text: they teach a model how such texts are written, hardly what they say"
            " (EntiGraph 2024: 1.3M tokens made an 8B model's answers worse)"
        )
    if "test_data" not in data:
        found.append("no held-out rows: nothing will show whether the run worked; give test_data or eval_split")
    elif data["test_data"].rows < 20:
        found.append(f"{data['test_data'].rows} test rows: only very large changes can be told from chance")
    for role, report in data.items():
        found += [f"{role}: {f.message}" for f in report.findings if f.level != "info"]
        lost = sum(report.dropped.values())
        if lost:
            found.append(f"{role}: {lost:,} of {report.rows:,} rows lose all their documents and keep empty slots")
    return list(dict.fromkeys(found))
