"""The keys of `routes` in serve.yaml: arms with their shares, shadow and canary.

    RouteSettings(arms={"json": 90, "json-next": 10}).list_models()

In: what a user has written. Out: checked values; shares that do not sum to 100 and steps that do
not grow are an error of their key. Left out: whether the models exist (settings.py), what a route
does (routes.py)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

Percent = Annotated[float, Field(gt=0, le=100)]
Margin = Annotated[float, Field(ge=0, lt=1)]
DEFAULT_STEPS = (5.0, 25.0, 50.0, 100.0)


class Settings(BaseModel):
    """Values of serve.yaml: an unknown key is an error."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class CheckMargins(Settings):
    """The margins of the checks: 0.05 allows the canary a rate of bad answers that is 5 percentage
    points above the stable model's. A check without a margin is not judged."""

    cut: Margin | None = 0.05  # no end before max_tokens
    looped: Margin | None = 0.05  # most of it is a repetition
    failed: Margin | None = 0.02  # NaN, or not complete in time
    schema_invalid: Margin | None = None  # under the schema of the request, or of the stable run
    violated: Margin | None = None  # matches a `never` of the runs
    thumbs_down: Margin | None = None  # of answers with feedback: `bad`

    @model_validator(mode="after")
    def _check_count(self) -> CheckMargins:
        if not self.named:
            raise ValueError("at least one check needs a margin")
        return self

    @property
    def named(self) -> dict[str, float]:
        """Check -> margin, of the checks that are judged."""
        margins = {name: getattr(self, name) for name in type(self).model_fields}
        return {name: margin for name, margin in margins.items() if margin is not None}


class ShadowSettings(Settings):
    """A model that answers a share of the requests again, for comparison only."""

    model: str
    share: Percent  # of the requests


class CanarySettings(Settings):
    """A new model that takes over the route in steps, as long as its answers are no worse."""

    model: str
    steps: tuple[Annotated[float, Field(ge=0, le=100)], ...] = DEFAULT_STEPS  # its share
    at_least: Annotated[int, Field(ge=30, le=10**6)] = 200  # its answers before the next step
    watch: CheckMargins = CheckMargins()

    @model_validator(mode="after")
    def _check_steps(self) -> CanarySettings:
        steps = self.steps
        if len(steps) < 2 or list(steps) != sorted(set(steps)) or steps[-1] != 100:
            raise ValueError("steps are shares in percent that grow, with 100 as the last")
        return self


class RouteSettings(Settings):
    """A name for several models. `arms`: model -> share in percent."""

    arms: Annotated[dict[str, Percent], Field(min_length=1)]
    sticky: Literal["user", "request"] = "user"  # who keeps an arm
    shadow: ShadowSettings | None = None
    canary: CanarySettings | None = None

    @model_validator(mode="after")
    def _check_arms(self) -> RouteSettings:
        total = sum(self.arms.values())
        if abs(total - 100) > 1e-6:
            raise ValueError(f"the shares of the arms sum to {total:g}, not to 100")
        if self.canary is None:
            return self
        if len(self.arms) > 1 or self.canary.model in self.arms:
            raise ValueError("a route with a canary has one arm, which is another model")
        has_pairs = self.shadow is not None and self.shadow.model == self.canary.model
        if self.canary.steps[0] == 0 and not has_pairs:
            raise ValueError("a canary that starts at 0 needs a shadow of the same model")
        return self

    def list_models(self) -> Iterator[tuple[str, str]]:
        """Yield (key, model) of everything that this route uses."""
        for model in self.arms:
            yield f"arms.{model}", model
        if self.shadow is not None:
            yield "shadow.model", self.shadow.model
        if self.canary is not None:
            yield "canary.model", self.canary.model
