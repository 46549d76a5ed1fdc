"""Experiments as their folders define them: arms, claims, and guesses written before they ran.

    load_experiments() -> every Experiment, in the order of evidence per minute

In: `experiments/NAME/experiment.toml`. Out: frozen pydantic models; a key that does not exist is
refused. Paths of a recipe begin with `demo/`, `recipes/` or `built/`, the folder that the
experiment's `build.py` fills. Left out: running the arms (arms.py) and judging them (claims.py).
"""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

import tunesmith
from tunesmith.core.types import Json
from tunesmith.evaluate.metrics import BITS_PER_BYTE

EXPERIMENTS = Path(__file__).parent
DEFINITION_FILE = "experiment.toml"
BUILD_FILE = "build.py"
DEMO = Path(tunesmith.__file__).parent / "recipe" / "demo"
RECIPES = EXPERIMENTS.parent / "recipes"
QUICK_STEPS = 2
QUICK_ROWS = 3  # of test_data and eval_data
GENERAL_TEXTS = "demo/general.jsonl"
LIKELIHOODS = ("loss", BITS_PER_BYTE)  # metrics that need no answers
UNTRAINED = " before"  # after the name of an arm: its model before training


class _Frozen(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Answering(_Frozen):
    """How an arm answers `eval_data` without a run folder, as `advise --measure` does."""

    shots: int = 0
    passages: int = 0
    is_constrained: bool = False
    examples: int = 0

    @property
    def has_randomness(self) -> bool:
        """Whether a seed draws anything: rows to train on or to show."""
        return self.examples > 0 or self.shots > 0


class Arm(_Frozen):
    """One way to train or to answer. `recipe` changes the recipe of the experiment."""

    recipe: Json = {}
    seeds: tuple[int, ...] = (0,)
    answering: Answering | None = None
    documents: str = ""  # of the passages
    # what it gave before a change of the product, after which it ran again: no test of its guess
    rerun: str = ""


class Claim(_Frozen):
    """A difference `arm` minus `against` on one metric, which is expected to be so.

    higher, lower: by more than `margin`. equal: within +-`margin`.
    guess: the difference that we expected, from and to, written before the experiment ran."""

    text: str
    arm: str
    against: str
    task: str = "test"
    metric: str = "loss"
    expect: Literal["higher", "lower", "equal"]
    margin: float = Field(default=0.0, ge=0)
    guess: tuple[float, float]

    @model_validator(mode="after")
    def _check_margin(self) -> Claim:
        if self.expect == "equal" and not self.margin:
            raise ValueError("an equality needs a margin")
        if self.guess[0] > self.guess[1]:
            raise ValueError("the guess ends before it begins")
        return self


class Plot(_Frozen):
    """A plot of one metric. It shows the mean of each arm with its interval."""

    task: str = "test"
    metric: str = "loss"
    label: str


class Experiment(_Frozen):
    name: str
    title: str
    rule: str  # E1 to E12 of the rules
    guide: str = ""  # what the guide says, if it is a claim of the guide
    about: str  # what was done, on which data
    earlier: str = ""  # what was measured before, without a guess; its links begin in docs/results
    later: str = ""  # what limits the result, or was changed, after it was seen
    order: int  # of running: evidence per minute
    minutes: float  # expected, on two idle cores
    settings: tuple[str, ...] = ()  # of the plan, whose rules it tests
    recipe: Json
    arms: dict[str, Arm]
    claims: tuple[Claim, ...] = Field(min_length=1)
    plots: tuple[Plot, ...] = Field(min_length=1)

    @model_validator(mode="after")
    def _check_claims(self) -> Experiment:
        names = {*self.arms, *(name + UNTRAINED for name in self.arms)}
        for claim in self.claims:
            if missing := {claim.arm, claim.against} - names:
                raise ValueError(f"no arm {min(missing)!r}: {claim.text}")
        return self

    @property
    def folder(self) -> Path:
        return EXPERIMENTS / self.name

    def list_sides(self) -> set[str]:
        """Return what claims read: an arm, or an arm before training."""
        return {side for claim in self.claims for side in (claim.arm, claim.against)}

    def has_randomness(self, side: str) -> bool:
        """Whether a side of a claim depends on the seed. The model before training does not, nor do
        its answers to prompts without drawn rows, which are greedy."""
        if side.endswith(UNTRAINED):
            return False
        answering = self.arms[side].answering
        return answering is None or answering.has_randomness

    def find_reruns(self, claim: Claim) -> str:
        """Return what the arms of a claim gave before they ran again on a changed product."""
        sides = (claim.arm, claim.against)
        arms = (self.arms[side] for side in sides if not side.endswith(UNTRAINED))
        return "; ".join(arm.rerun for arm in arms if arm.rerun)


def load_experiments(root: Path = EXPERIMENTS) -> list[Experiment]:
    files = root.glob(f"*/{DEFINITION_FILE}")
    return sorted((load_experiment(file) for file in files), key=lambda each: each.order)


def load_experiment(file: Path) -> Experiment:
    values: dict[str, Any] = tomllib.loads(file.read_text(encoding="utf-8"))
    return Experiment.model_validate({"name": file.parent.name, **values})


def strip_seed_suffix(name: str) -> str:
    """Return the arm of a side of a claim."""
    return name.removesuffix(UNTRAINED)


def resolve_recipe(recipe: Json, built: Path) -> Json:
    """Return the recipe with the paths of this machine."""
    roots = {"demo": DEMO, "recipes": RECIPES, "built": built}
    return {key: _resolve_value(value, roots) for key, value in recipe.items()}


def _resolve_value(value: Any, roots: dict[str, Path]) -> Any:
    if isinstance(value, dict):
        return {key: _resolve_value(item, roots) for key, item in value.items()}
    if isinstance(value, list):
        return [_resolve_value(item, roots) for item in value]
    if isinstance(value, str):
        root, slash, rest = value.partition("/")
        if slash and root in roots:
            return str(roots[root] / rest)
    return value


def shorten_experiment(experiment: Experiment, model: Path, general_texts: Path) -> Experiment:
    """Return the experiment for `--quick`: two steps of a small model on few rows.

    Only the arms of the first claim remain."""
    claim = experiment.claims[0]
    names = dict.fromkeys((strip_seed_suffix(claim.arm), strip_seed_suffix(claim.against)))
    arms = {name: experiment.arms[name].model_copy(update={"seeds": (0,)}) for name in names}
    recipe = {**experiment.recipe, "model": str(model), "max_steps": QUICK_STEPS}
    recipe.pop("num_train_epochs", None)
    for key in ("eval_data", "test_data"):
        source = recipe.get(key, "")
        path = source["path"] if isinstance(source, dict) else source
        if path.startswith(("demo/", "built/")):  # the rows of recipes/ are few, of several kinds
            recipe[key] = {"path": path, "max_examples": QUICK_ROWS}
    if "retention_data" in recipe:
        recipe["retention_data"] = str(general_texts)
    if claim.metric in LIKELIHOODS and "metrics" in recipe:
        recipe["metrics"] = BITS_PER_BYTE  # answers of a random model run to their limit
    change = {"recipe": recipe, "arms": arms, "claims": (claim,)}
    return experiment.model_copy(update=change)
