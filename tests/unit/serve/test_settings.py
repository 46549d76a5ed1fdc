"""Settings from the command line and from serve.yaml; a wrong key is told with its line."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tunesmith.core.errors import InputError
from tunesmith.serve.settings import Limits, read_settings

YAML = """
base: smollm2-135m-instruct
models:
  json: runs/demo-1@0.75
  json-next: {from: runs/demo-2, constrain: true, pin: true}
limits: {adapters: 256MB, keys_and_values: 1GB, rows: 16, wait: 30s, request: 2m, body: 2MB}
models_dir: runs
"""


def write_yaml(folder: Path, text: str) -> str:
    (folder / "serve.yaml").write_text(text)
    return str(folder / "serve.yaml")


def test_a_file(tmp_path: Path) -> None:
    settings = read_settings([write_yaml(tmp_path, YAML)])
    assert settings.models["json"].source == str(tmp_path / "runs/demo-1@0.75")
    assert settings.models["json-next"].pin
    assert settings.limits.adapters == 256 * 10**6
    assert settings.limits.request == 120
    assert settings.models_dir == tmp_path / "runs"
    assert settings.base == "smollm2-135m-instruct"


def test_the_example_and_the_guide_load(tmp_path: Path) -> None:
    root = Path(__file__).parents[3]
    example = read_settings([str(root / "recipes" / "serve.yaml")])
    assert list(example.models) == ["demo", "demo-half", "demo-json"]
    assert example.limits == Limits()  # the values of the example are the defaults
    guide = (root / "docs" / "guides" / "serve.md").read_text()
    blocks = re.findall(r"^```yaml\n(.*?)^```", guide, flags=re.MULTILINE | re.DOTALL)
    models, routes = (read_settings([write_yaml(tmp_path, block)]) for block in blocks)
    assert models.models["json-next"].pin
    assert list(routes.routes) == ["prod"]


def test_flags_replace_the_file(tmp_path: Path) -> None:
    settings = read_settings([write_yaml(tmp_path, YAML)], port=9, base="other", dtype=None)
    assert settings.port == 9
    assert settings.base == "other"
    assert settings.dtype == "auto"


def test_names_of_runs() -> None:
    settings = read_settings(["runs/demo-1@0.5", "runs/a/checkpoints/step-8", "runs/B b/adapter"])
    assert {name: model.source for name, model in settings.models.items()} == {
        "demo-1": "runs/demo-1@0.5",
        "a-step-8": "runs/a/checkpoints/step-8",
        "b-b": "runs/B b/adapter",
    }


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("modles: {}", r"serve.yaml:1: modles: unknown key"),
        ("models:\n  json: {from: a, pinn: true}", r"serve.yaml:2: models.json.pinn: unknown key"),
        ("limits:\n  rows: 0", r"serve.yaml:2: limits.rows: .*greater than or equal to 1"),
        ("limits:\n  wait: soon", r"serve.yaml:2: limits.wait: write a time as 30s"),
        ("limits:\n  adapters: lots", r"serve.yaml:2: limits.adapters: write a size"),
        ("base: a\nbase: b", r"serve.yaml:2: base occurs twice"),
        ("models:\n  base: runs/a", "'base' cannot be the name of a model"),
        ("models:\n  ../x: runs/a", "cannot be the name of a model"),
        ("port: 8000", "there is nothing to serve"),
    ],
)
def test_a_wrong_file_is_told_with_its_line(text: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=message):
        read_settings([write_yaml(tmp_path, text)])


def test_a_settings_file_is_served_alone(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="served alone"):
        read_settings(["runs/demo-1", write_yaml(tmp_path, YAML)])


def test_two_models_of_one_name() -> None:
    with pytest.raises(InputError, match="two models have the name demo-1"):
        read_settings(["runs/demo-1", "old/demo-1@0.5"])


@pytest.mark.parametrize("host", ["0.0.0.0", "192.168.0.1", "::", "example.org"])
def test_no_auth_is_for_this_machine_only(host: str) -> None:
    with pytest.raises(InputError, match="without keys"):
        read_settings(["runs/a"], host=host, auth=False)
    assert not read_settings(["runs/a"], host="127.0.0.2", auth=False).auth


ROUTED = "models: {a: runs/a, b: runs/b}\n"


def test_routes(tmp_path: Path) -> None:
    text = (
        "routes:\n  ab: {arms: {a: 90, b: 10}, sticky: request}\n"
        "  prod: {arms: {a: 100}, canary: {model: b, watch: [cut]}}\n"
    )
    settings = read_settings([write_yaml(tmp_path, ROUTED + text)])
    assert settings.routes["ab"].arms == {"a": 90, "b": 10}
    canary = settings.routes["prod"].canary
    assert canary is not None
    assert (canary.share, canary.watch, canary.margin) == (5, ("cut",), 0.05)


@pytest.mark.parametrize(
    ("route", "message"),
    [
        ("prod: {arms: {a: 90, b: 5}}", r"serve.yaml:3: routes.prod: .* sum to 95, not to 100"),
        ("prod: {arms: {a: 90, c: 10}}", r"routes.prod.arms.c: there is no model 'c'"),
        ("prod: {arms: {}}", r"serve.yaml:3: routes.prod.arms: .*at least 1"),
        ("prod: {arms: {a: 110, b: -10}}", r"serve.yaml:3: routes.prod.arms.a: .*equal to 100"),
        ("a: {arms: {b: 100}}", r"routes.a: this is the name of a model"),
        ("base: {arms: {b: 100}}", r"routes.base: 'base' cannot be the name"),
        ("../x: {arms: {b: 100}}", r"cannot be the name"),
        ("prod: {arms: {a: 100}, armz: 1}", r"serve.yaml:3: routes.prod.armz: unknown key"),
        ("prod: {arms: {a: 100}, canary: {model: c}}", "routes.prod.canary.model: there is no"),
        (
            "prod: {arms: {a: 100}, canary: {model: a}}",
            "serve.yaml:3: routes.prod: .*one arm, which is another model",
        ),
        (
            "prod: {arms: {a: 100}, canary: {model: b, marg: 0.1}}",
            "serve.yaml:3: routes.prod.canary.marg: unknown key",
        ),
        ("prod: {arms: {a: 100}, canary: {model: b, watch: [cutt]}}", "canary.watch.0: .*'cut'"),
    ],
)
def test_a_wrong_route_is_told_by_its_key(route: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=message):
        read_settings([write_yaml(tmp_path, f"{ROUTED}routes:\n  {route}")])


@pytest.mark.parametrize(
    ("text", "fix"),
    [
        ("routes: {prod: {arms: {a: 100}, shadow: {model: b, share: 5}}}", "mirror requests"),
        ("routes: {prod: {arms: {a: 100}, canary: {model: b, steps: [5, 100]}}}", "`share`"),
        ("routes: {prod: {arms: {a: 100}, canary: {model: b, at_least: 9}}}", "GET /admin/routes"),
        ("routes: {prod: {arms: {a: 100}, canary: {model: b, watch: {cut: 0.1}}}}", "`margin`"),
        ("state_dir: x", "leave it out"),
    ],
)
def test_a_key_that_went_is_refused_with_what_to_use(text: str, fix: str, tmp_path: Path) -> None:
    with pytest.raises(InputError) as error:
        read_settings([write_yaml(tmp_path, f"{ROUTED}{text}")])
    assert error.value.where.endswith("serve.yaml:2")
    assert fix in error.value.fix
