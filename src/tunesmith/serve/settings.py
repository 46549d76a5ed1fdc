"""What a server serves and within which limits: command line arguments or serve.yaml.

    read_settings(["runs/demo-1@0.5"]) -> ServeSettings
    read_settings(["serve.yaml"])

In: names of runs, checkpoints and adapter folders, or one YAML file. Out: checked settings; a wrong
key is an InputError with file:line. Paths in a file are relative to it. Left out: what the models
are (sources.py)."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    model_validator,
)

from tunesmith.core.errors import InputError
from tunesmith.core.formatting import suggest_name
from tunesmith.plan.hardware_presets import parse_size
from tunesmith.recipe.yaml_lines import YamlMapping, read_yaml

MODEL_NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,63}", re.ASCII)
BASE_NAME = "base"  # under which the base model itself is served
SECONDS = re.compile(r"(\d+(?:\.\d+)?) ?(s|m|h)?")
SECOND_UNITS = {"s": 1, "m": 60, "h": 3600}
RESERVED_SHARE = 8  # one row of so many more is for clients that have none
YAML_SUFFIXES = (".yaml", ".yml")
REMOVED_KEYS = {
    "shadow": "mirror requests in your gateway",
    "steps": "set `share`; to raise it, change serve.yaml and start the server again",
    "at_least": "GET /admin/routes shows how many answers were counted, and their interval",
    "scales": "give each scale a name: {from: RUN@0.5}",
    "state_dir": "leave it out: what a canary has counted ends with the server",
}


def _parse_bytes(value: Any) -> Any:
    if not isinstance(value, str):
        return value
    try:
        return parse_size(value)
    except InputError:
        raise ValueError("write a size as 512MB or 1GiB") from None


def _parse_seconds(value: Any) -> Any:
    if not isinstance(value, str):
        return value
    match = SECONDS.fullmatch(value.strip())
    if match is None:
        raise ValueError("write a time as 30s or 2m")
    return float(match[1]) * SECOND_UNITS[match[2] or "s"]


Bytes = Annotated[int, BeforeValidator(_parse_bytes), Field(gt=0)]
Seconds = Annotated[float, BeforeValidator(_parse_seconds), Field(gt=0, le=86_400)]
Percent = Annotated[float, Field(gt=0, le=100)]
Check = Literal["cut", "looped", "failed", "schema_invalid", "violated"]


class Settings(BaseModel):
    """Values of serve.yaml: an unknown key is an error."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class Limits(Settings):
    """Where a server says no."""

    adapters: Bytes = 512 * 10**6  # adapters in memory; others are loaded when asked for
    keys_and_values: Bytes = 10**9
    rows: Annotated[int, Field(ge=1, le=512)] = 32  # answers at a time
    waiting: Annotated[int, Field(ge=1, le=100_000)] = 256  # answers that wait for a row
    wait: Seconds = 30.0  # 429 if the queue is longer
    request: Seconds = 120.0  # 504 after
    body: Bytes = 10**6
    drain: Seconds = 30.0  # for running answers after SIGTERM

    @property
    def reserved_rows(self) -> int:
        """Rows beyond `rows` for clients that have none, so that they do not wait for an answer of
        others to end; none below eight rows."""
        return self.rows // RESERVED_SHARE


class ModelSource(Settings):
    """Where a model comes from, and how it may be used."""

    source: Annotated[str, Field(alias="from", min_length=1)]
    constrain: bool = False  # the run's response_schema is the default response_format
    pin: bool = False  # stays in memory
    unproven: bool = False  # serve an adapter that holds nothing to check it by


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


class ServeSettings(Settings):
    """Everything of serve.yaml; flags of the command line replace single values."""

    models: dict[str, ModelSource] = Field(default_factory=dict)
    routes: dict[str, RouteSettings] = Field(default_factory=dict)
    base: str | None = None  # the base of the models, if left out
    models_dir: Path | None = None  # below which PUT finds adapters
    keep_content: Path | None = None  # where feedback is written; without it, nothing is kept
    host: str = "127.0.0.1"
    port: Annotated[int, Field(ge=0, le=65_535)] = 8000
    hosts: tuple[str, ...] = ()  # further values of the Host header
    keys: Path | None = None  # the key file
    auth: bool = True
    open_metrics: bool = False  # /ready and /metrics need no key
    dtype: Literal["auto", "bf16", "fp16", "fp32"] = "auto"
    limits: Limits = Limits()

    @property
    def is_loopback(self) -> bool:
        return self.host in ("localhost", "::1") or self.host.startswith("127.")


def read_settings(sources: Sequence[str], **flags: Any) -> ServeSettings:
    """Return the settings of a YAML file or of names of models. `flags` that are not None replace
    its values. Raises InputError."""
    changes = {key: value for key, value in flags.items() if value is not None}
    if len(sources) == 1 and sources[0].endswith(YAML_SUFFIXES):
        mapping = read_yaml(Path(sources[0]))
        for key, line in mapping.duplicates:
            message = f"{key} occurs twice"
            raise InputError(message, where=f"{mapping.name}:{line}", fix="keep one of them")
        settings = _locate(mapping, Path(sources[0]).parent)
    else:
        mapping = YamlMapping("command line")
        settings = {"models": name_models(sources)}
    try:
        checked = ServeSettings.model_validate(settings | changes)
    except ValidationError as error:
        raise _explain(error, mapping) from None
    check_settings(checked)
    return checked


def check_settings(settings: ServeSettings) -> None:
    """Raise InputError for settings that contradict each other."""
    for name in settings.models:
        check_name(name, where="models")
    for name, route in settings.routes.items():
        check_route(name, route, settings)
    if not settings.models and settings.base is None and settings.models_dir is None:
        fix = "name a run, or a base: tunesmith serve runs/demo-1"
        raise InputError("there is nothing to serve", where="command line", fix=fix)
    if not settings.auth and not settings.is_loopback:
        message = (
            f"without keys, only this machine may reach the server, but host is {settings.host}"
        )
        raise InputError(message, where="--no-auth", fix="leave --no-auth or --host out")


def check_name(name: str, *, where: str) -> None:
    """Raise InputError for a name that could be mistaken for another or for a path."""
    if not MODEL_NAME.fullmatch(name) or name == BASE_NAME:
        message = f"{name!r:.80} cannot be the name of a model"
        fix = "use a-z, 0-9, '.', '_' and '-', at most 64, other than `base`"
        raise InputError(message, where=where, fix=fix)


def check_route(name: str, route: RouteSettings, settings: ServeSettings) -> None:
    """Raise InputError for a route whose name is taken, or that needs what is not set."""
    where = f"routes.{name}"
    check_name(name, where=where)
    if name in settings.models:
        fix = "use another name for the route"
        raise InputError("this is the name of a model", where=where, fix=fix)
    for key, model in route.list_models():
        if model not in settings.models and model != BASE_NAME:
            names = [*settings.models, BASE_NAME]
            fix = suggest_name(model, names, f"models: {', '.join(names)}")
            raise InputError(f"there is no model {model!r:.80}", where=f"{where}.{key}", fix=fix)


def name_source(source: str) -> str:
    """Return the name of a run or an adapter folder, RUN-step-N of a checkpoint, without path and
    scale."""
    path = Path(source.partition("@")[0])
    if path.parent.name == "checkpoints":
        return f"{path.parent.parent.name}-{path.name}"
    return path.parent.name if path.name == "adapter" else path.name


def name_models(sources: Sequence[str]) -> dict[str, Any]:
    """Return name -> source. Raises InputError for two models of one name, and for a settings file
    among others."""
    models: dict[str, Any] = {}
    for source in sources:
        if source.endswith(YAML_SUFFIXES):
            message = "a settings file is served alone"
            raise InputError(message, where=source, fix="name the other models in it")
        name = name_source(source).lower().replace(" ", "-")
        if name in models:
            fix = "give them names in a serve.yaml"
            raise InputError(f"two models have the name {name}", where=source, fix=fix)
        models[name] = {"from": source}
    return models


def _locate(mapping: YamlMapping, folder: Path) -> dict[str, Any]:
    """Return the values with paths relative to `folder`; a model may be its source alone."""
    values = dict(mapping.values)
    models = values.get("models") or {}
    if isinstance(models, dict):
        located: dict[str, Any] = {}
        for name, model in models.items():
            fields = dict(model) if isinstance(model, dict) else {"from": model}
            if isinstance(fields.get("from"), str):
                fields["from"] = str(folder / fields["from"])
            located[str(name)] = fields
        values["models"] = located
    for key in ("models_dir", "keys", "keep_content"):
        if isinstance(values.get(key), str):
            values[key] = folder / Path(values[key]).expanduser()
    base = values.get("base")
    if isinstance(base, str) and (folder / base).is_dir():
        values["base"] = str(folder / base)
    return values


def _explain(error: ValidationError, mapping: YamlMapping) -> InputError:
    """Return the first problem with its place in the file."""
    detail = error.errors()[0]
    path = tuple("from" if part == "source" else part for part in detail["loc"])
    key = ".".join(map(str, path))
    message = f"{key}: {detail['msg'].removeprefix('Value error, ')}"
    fix = ""
    if detail["type"] == "extra_forbidden":
        message = f"{key}: unknown key"
        fields = _find_parent(path).model_fields
        names = [field.alias or name for name, field in fields.items()]
        fix = suggest_name(str(path[-1]), names, f"keys: {', '.join(names)}")
        if path[-1] in REMOVED_KEYS:
            message = f"{key}: not supported any more"
            fix = REMOVED_KEYS[str(path[-1])]
    if path[-1] == "watch" and detail["type"] == "tuple_type":
        fix = "list the checks, and give them one `margin`: watch: [cut, looped], margin: 0.05"
    return InputError(message, where=mapping.format_location(path), fix=fix)


def _find_parent(path: Sequence[str | int]) -> type[Settings]:
    """Return the class that has the last key of a path."""
    if path[0] == "routes" and len(path) > 2:
        return RouteSettings if len(path) == 3 else CanarySettings
    return {1: ServeSettings, 2: Limits, 3: ModelSource}[len(path)]
