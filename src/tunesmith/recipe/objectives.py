"""Recipe values that decide what is trained and how strongly: trained text, losses, schedules.

In: values as YAML holds them. Out: validated values, and the contradictions between them, once
they are. Left out: the other keys (schema.py) and values that are "auto" (plan/)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field

from tunesmith.recipe.fields import (
    Auto,
    Count,
    NotNegative,
    Positive,
    RecipeMapping,
    Share,
    accept_names,
    setting,
    wrap_list,
)

Problem = tuple[str, str]  # key, message
Problems = list[Problem]

# ---------------------------------------------------------------- trained text


def _parse_train_on(value: Any) -> Any:
    return value if value in ("answers", "all") else wrap_list(value)


def _check_roles(roles: tuple[str, ...]) -> tuple[str, ...]:
    if len(set(roles)) < len(roles):
        raise ValueError("a role is repeated")
    return roles


Role = Annotated[
    Literal["system", "user", "assistant", "tool"],
    accept_names({"human": "user", "gpt": "assistant", "developer": "system"}),
]
TrainOn = Annotated[
    Literal["answers", "all"]
    | Annotated[tuple[Role, ...], Field(min_length=1), AfterValidator(_check_roles)],
    BeforeValidator(_parse_train_on, json_schema_input_type=Literal["answers", "all"] | list[Role]),
]


# ---------------------------------------------------------------- preference losses

LossName = Annotated[Literal["dpo", "orpo", "simpo", "kto"], accept_names({"sigmoid": "dpo"})]
# field of `loss` -> the only loss that has it
SINGLE_LOSS_FIELDS = {"gamma": "simpo", "desirable_weight": "kto", "undesirable_weight": "kto"}
SMOOTHED_LOSSES = ("auto", "dpo", "simpo")


class PairLoss(RecipeMapping):
    """The loss of preference rows."""

    name: Auto | LossName = setting(
        "auto",
        "dpo, orpo and simpo take pairs, kto single answers with a label; dpo and kto "
        "use a reference model.",
    )
    beta: Auto | Positive = setting("auto", "Strength of the preference term; lambda of ORPO.")
    gamma: Auto | NotNegative = setting("auto", "Target margin of SimPO.")
    nll_coefficient: Auto | NotNegative = setting(
        "auto", "Coefficient of the SFT loss on chosen answers."
    )
    desirable_weight: Auto | NotNegative = setting(
        "auto", "Factor of KTO on the loss of desirable answers."
    )
    undesirable_weight: Auto | NotNegative = setting(
        "auto", "Factor of KTO on the loss of undesirable answers."
    )


def _parse_pair_loss(value: Any) -> Any:
    return {"name": value} if isinstance(value, str) else value


PairLossField = Annotated[
    PairLoss,
    BeforeValidator(
        _parse_pair_loss,
        json_schema_input_type=Literal["auto", "dpo", "orpo", "simpo", "kto"] | PairLoss,
    ),
]


# ---------------------------------------------------------------- schedules

ScheduleName = Literal[
    "linear",
    "cosine",
    "constant",
    "constant_with_warmup",
    "inverse_sqrt",
    "warmup_stable_decay",
]
DecayType = Literal["linear", "cosine", "1-sqrt"]
# schedule -> the fields of `lr_scheduler_kwargs` that it reads
SCHEDULE_FIELDS = {
    "inverse_sqrt": ("timescale",),
    "warmup_stable_decay": ("num_decay_steps", "decay_type", "min_lr_ratio"),
}


class SchedulerKwargs(RecipeMapping):
    """Arguments of single schedules, named as in transformers."""

    num_decay_steps: Auto | Count = setting(
        "auto", "Last steps of warmup_stable_decay; auto: a tenth of the run."
    )
    decay_type: DecayType = setting("cosine", "Shape of the decay of warmup_stable_decay.")
    min_lr_ratio: Share = setting(0.0, "Fraction of the peak at both ends of warmup_stable_decay.")
    timescale: Auto | Count = setting(
        "auto",
        "Steps after which inverse_sqrt has fallen to 0.71; auto: those of the "
        "warm-up, else 10,000.",
    )


def _parse_scheduler_kwargs(value: Any) -> Any:
    return {} if value in (None, "auto") else value


SchedulerKwargsField = Annotated[
    SchedulerKwargs,
    BeforeValidator(
        _parse_scheduler_kwargs, json_schema_input_type=Literal["auto"] | SchedulerKwargs
    ),
]


# ---------------------------------------------------------------- contradictions


def find_objective_contradictions(settings: Mapping[str, Any]) -> Iterator[Problem]:
    """Yield (key, message) for keys of the objective that contradict each other or have no
    effect. Takes validated values."""
    stage = settings.get("stage", "sft")
    if settings.get("train_on", "answers") != "answers" and stage == "cpt":
        yield "train_on", "train_on has no effect with stage: cpt, which trains every token"
    if settings.get("train_on", "answers") != "answers" and stage == "preference":
        message = "train_on has no effect with stage: preference, which compares answers"
        yield "train_on", message
    if settings.get("share_prefixes") is True and settings.get("neftune_noise_alpha"):
        message = "share_prefixes contradicts neftune_noise_alpha: noise is drawn per document"
        yield "share_prefixes", message
    schedule = settings.get("lr_scheduler_type")
    if schedule == "constant" and settings.get("warmup_ratio"):
        message = "constant has no warm-up; set lr_scheduler_type: constant_with_warmup"
        yield "warmup_ratio", message
    defaults = SchedulerKwargs()
    for field, value in vars(settings.get("lr_scheduler_kwargs", defaults)).items():
        if value == getattr(defaults, field) or field in SCHEDULE_FIELDS.get(str(schedule), ()):
            continue
        owner = next(name for name, fields in SCHEDULE_FIELDS.items() if field in fields)
        message = f"{field} has no effect without lr_scheduler_type: {owner}"
        yield "lr_scheduler_kwargs", message


def find_loss_contradictions(settings: Mapping[str, Any]) -> Iterator[Problem]:
    """Yield (key, message) for settings of preference losses that have no effect."""
    loss: PairLoss = settings.get("loss", PairLoss())
    name = loss.name
    for field, owner in SINGLE_LOSS_FIELDS.items():
        if getattr(loss, field) == "auto" or name == owner:
            continue
        if name == "auto":
            yield "loss", f"loss: {field} has no effect with dpo; add name: {owner}"
        else:
            yield "loss", f"loss: {field} has no effect with {name}, only with {owner}"
    if settings.get("label_smoothing") and name not in SMOOTHED_LOSSES:
        message = f"label_smoothing has no effect with {name}, only with dpo and simpo"
        yield "label_smoothing", message
    if settings.get("label_smoothing", 0) >= 0.5:
        message = "label_smoothing must be below 0.5 with pairs: half of all labels are wrong then"
        yield "label_smoothing", message
