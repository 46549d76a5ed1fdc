"""The bases that are fine-tuned most are taken as they are published: a plan needs config.json
alone, in the keys that its maker writes."""

import json
from pathlib import Path

import pytest

from popular_bases import PUBLISHED
from popular_configs import PublishedModel
from tunesmith.core.errors import InputError
from tunesmith.core.types import ModelSpec
from tunesmith.model.hub.resolve import resolve_model
from tunesmith.model.hub.spec import read_spec

LINES = 25  # of the ranking of November 2026, docs/reference/models.md
MODELS = {f"{line} {model.name}": model for line, models in PUBLISHED.items() for model in models}
ACCEPTED = [name for name, model in MODELS.items() if not model.refused]
REFUSED = [name for name, model in MODELS.items() if model.refused]


def read_published(model: PublishedModel, folder: Path) -> ModelSpec:
    (folder / "config.json").write_text(json.dumps(model.config))
    return read_spec(resolve_model(str(folder / "config.json"), needs_weights=False))


def test_all_but_one_line_of_the_ranking_are_taken() -> None:
    taken = {
        line for line, models in PUBLISHED.items() if not any(model.refused for model in models)
    }
    assert list(PUBLISHED) == list(range(1, LINES + 1))
    assert len(taken) >= 24


@pytest.mark.parametrize("name", ACCEPTED)
def test_a_popular_base_is_taken(name: str, tmp_path: Path) -> None:
    model = MODELS[name]
    spec = read_published(model, tmp_path)
    mixers = spec.layer_mixers
    attention = sum("attention" in mixer for mixer in mixers)
    recurrent = sum(mixer not in ("attention", "") for mixer in mixers)
    assert (attention, recurrent) == model.layers
    assert 0 < spec.active_parameters <= spec.block_parameters < spec.parameters
    if model.billions is not None:
        assert spec.parameters / 1e9 == pytest.approx(model.billions, rel=0.02)


@pytest.mark.parametrize("name", REFUSED)
def test_the_others_are_refused_by_name(name: str, tmp_path: Path) -> None:
    model = MODELS[name]
    with pytest.raises(InputError, match=rf"{model.config['model_type']}.*{model.refused}"):
        read_published(model, tmp_path)


@pytest.mark.parametrize(
    ("name", "billions"),
    [("11 Qwen3-30B-A3B", 3.3), ("2 Qwen3.6-35B-A3B", 3), ("7 gpt-oss-20b", 3.6)],
)
def test_parameters_that_a_token_meets(name: str, billions: float, tmp_path: Path) -> None:
    """The makers count the head among them, and not the embedding."""
    spec = read_published(MODELS[name], tmp_path)
    active = (spec.active_parameters + spec.head_parameters) / 1e9
    assert active == pytest.approx(billions, abs=0.5)
