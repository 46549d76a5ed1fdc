"""Keys of the recipe that take a mapping, or one word for it: the loss of pairs, and the guard.

In: a value as YAML holds it. Out: a frozen model with a wish for every key, "auto" where there is
none."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

from tunesmith.recipe.fields import Auto, Count, NotNegative, Positive


def normalize_loss(value: Any) -> Any:
    """`sigmoid` is what other tools call the loss of DPO."""
    return "dpo" if value == "sigmoid" else value


class PairLoss(BaseModel):
    """How the two answers of a pair are told apart."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: Auto | Annotated[Literal["dpo", "orpo", "simpo"], BeforeValidator(normalize_loss)] = (
        Field(
            default="auto",
            description="dpo compares with the model as it was, orpo and simpo need no reference.",
        )
    )
    beta: Auto | Positive = Field(
        default="auto", description="How strongly pairs are told apart; ORPO's lambda."
    )
    gamma: Auto | NotNegative = Field(
        default="auto", description="Margin that SimPO wants between the two answers."
    )
    nll_coefficient: Auto | NotNegative = Field(
        default="auto", description="Coefficient of the plain loss on the chosen answers."
    )


def _as_pair_loss(value: Any) -> Any:
    return {"name": value} if isinstance(value, str) else value


PairLossField = Annotated[
    PairLoss,
    BeforeValidator(
        _as_pair_loss, json_schema_input_type=Literal["auto", "dpo", "orpo", "simpo"] | PairLoss
    ),
]


def _normalize_off(value: Any) -> Any:
    """YAML reads off as false."""
    return "off" if value is False else value


GuardAction = (
    Auto | Annotated[Literal["off", "warn", "rollback", "stop"], BeforeValidator(_normalize_off)]
)


class GuardConfig(BaseModel):
    """What a run does about what it sees of itself."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    collapse: GuardAction = Field(
        default="auto",
        description="When answers repeat, break or turn into noise: go back and on, stop, or say so.",
    )
    forgetting: GuardAction = Field(
        default="auto",
        description="When general text of retention_data gets worse by more than the margin.",
    )
    margin: Auto | Positive = Field(
        default="auto", description="Bits per byte that general text may lose."
    )
    patience: Auto | Count = Field(
        default="auto",
        description="Looks at eval_data without a better one, after which the run ends.",
    )
    probe_steps: Auto | Count = Field(
        default="auto",
        description="Steps between two probes of what the model says; auto: at most 5% of the time.",
    )


def _as_guard(value: Any) -> Any:
    return (
        {"collapse": "off", "forgetting": "off"}
        if value in (False, "off")
        else {}
        if value == "auto"
        else value
    )


GuardField = Annotated[
    GuardConfig,
    BeforeValidator(_as_guard, json_schema_input_type=Literal["auto", "off"] | GuardConfig),
]
