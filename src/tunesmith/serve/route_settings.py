"""The keys of `routes` in serve.yaml: arms with their shares, and a canary.

    RouteSettings(arms={"json": 90, "json-next": 10}).list_models()

In: what a user has written. Out: checked values; shares that do not sum to 100 are an error of
their key. Left out: whether the models exist (settings.py), what a route does (routes.py)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

Percent = Annotated[float, Field(gt=0, le=100)]
Check = Literal["cut", "looped", "failed", "schema_invalid", "violated"]


class Settings(BaseModel):
    """Values of serve.yaml: an unknown key is an error."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class CanarySettings(Settings):
    """A new model that answers a share of the requests, until it answers worse.

    margin: 0.05 allows it a rate of bad answers that is 5 percentage points above the stable
    model's. An answer is bad if one of the checks of `watch` fails."""

    model: str
    share: Percent = 5.0
    watch: Annotated[tuple[Check, ...], Field(min_length=1)] = ("cut", "looped", "failed")
    margin: Annotated[float, Field(ge=0, lt=1)] = 0.05


class RouteSettings(Settings):
    """A name for several models. `arms`: model -> share in percent."""

    arms: Annotated[dict[str, Percent], Field(min_length=1)]
    sticky: Literal["user", "request"] = "user"  # who keeps an arm
    canary: CanarySettings | None = None

    @model_validator(mode="after")
    def _check_arms(self) -> RouteSettings:
        total = sum(self.arms.values())
        if abs(total - 100) > 1e-6:
            raise ValueError(f"the shares of the arms sum to {total:g}, not to 100")
        if self.canary is not None and (len(self.arms) > 1 or self.canary.model in self.arms):
            raise ValueError("a route with a canary has one arm, which is another model")
        return self

    def list_models(self) -> Iterator[tuple[str, str]]:
        """Yield (key, model) of everything that this route uses."""
        for model in self.arms:
            yield f"arms.{model}", model
        if self.canary is not None:
            yield "canary.model", self.canary.model
