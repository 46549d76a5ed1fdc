"""Keys of the recipe's objective: a run in which each makes a difference, for
test_recipe_keys.py."""

from __future__ import annotations

import pytest
from pydantic import ValidationError

from tiny_recipe_runs import Lab
from tunesmith.core.errors import InputError


def read_rates(lab: Lab, **keys: object) -> list[float]:
    return [step.learning_rate for step in lab.steps(**keys)]


def train_on(lab: Lab) -> None:
    tokens: dict[str, int] = {}
    for value in ("answers", "all", "user"):
        steps = lab.baseline.steps if value == "answers" else lab.steps(train_on=value)
        tokens[value] = sum(step.supervised_tokens for step in steps)
    assert tokens["all"] > tokens["answers"] + tokens["user"] > tokens["user"] > 0
    with pytest.raises(ValidationError, match="train_on"):
        lab.events(train_on="narrator")
    with pytest.raises(ValidationError, match="a role is repeated"):
        lab.events(train_on=["user", "user"])


def lr_scheduler_type(lab: Lab) -> None:
    assert read_rates(lab, lr_scheduler_type="constant") == [0.01, 0.01, 0.01]
    rates = read_rates(lab, lr_scheduler_type="cosine")
    assert rates == pytest.approx([0.01, 0.0075, 0.0025])


def warmup_ratio(lab: Lab) -> None:
    rates = read_rates(lab, warmup_ratio=0.6, lr_scheduler_type="constant_with_warmup")
    assert rates == [0, 0.005, 0.01]
    with pytest.raises(ValidationError, match="constant has no warm-up"):
        lab.events(warmup_ratio=0.6, lr_scheduler_type="constant")


def lr_scheduler_kwargs(lab: Lab) -> None:
    stable = {"lr_scheduler_type": "warmup_stable_decay"}
    assert read_rates(lab, **stable) == pytest.approx([0.01, 0.01, 0.01])
    long_warmup = read_rates(lab, **stable, warmup_ratio=0.95)  # no step is left for a decay
    assert long_warmup == pytest.approx([0, 0.01 / 3, 0.02 / 3])
    assert read_rates(lab, **stable, warmup_ratio=0.03, max_steps=1) == [0]
    decay = {"num_decay_steps": 2, "decay_type": "linear", "min_lr_ratio": 0.5}
    rates = read_rates(lab, **stable, lr_scheduler_kwargs=decay)
    assert rates == pytest.approx([0.01, 0.01, 0.0075])
    root = {"lr_scheduler_type": "inverse_sqrt", "lr_scheduler_kwargs": {"timescale": 3}}
    assert read_rates(lab, **root)[1] == pytest.approx(0.01 / (4 / 3) ** 0.5)
    with pytest.raises(InputError, match="num_decay_steps 4 is more than the 3 steps"):
        lab.events(**stable, lr_scheduler_kwargs={"num_decay_steps": 4})
    with pytest.raises(ValidationError, match="no effect without lr_scheduler_type: inverse_sqrt"):
        lab.events(lr_scheduler_type="linear", lr_scheduler_kwargs={"timescale": 3})


def label_smoothing(lab: Lab) -> None:
    plain = lab.baseline.steps[0].loss
    assert lab.steps(label_smoothing=0.2)[0].loss != pytest.approx(plain, rel=1e-3)
    pairs = [
        {"prompt": f"{n} and {n}", "chosen": f"{2 * n}", "rejected": f"no {n}"} for n in range(1, 7)
    ]
    preference = {"stage": "preference", "data": lab.rows(pairs, "pairs.jsonl")}
    first = lab.steps(**preference)
    assert lab.steps(**preference, label_smoothing=0.2)[-1].loss != first[-1].loss
    with pytest.raises(ValidationError, match="no effect with orpo"):
        lab.events(**preference, loss="orpo", label_smoothing=0.2)
    with pytest.raises(ValidationError, match=r"below 0\.5"):
        lab.events(**preference, label_smoothing=0.5)

    rows = [
        {"prompt": f"{n} and {n}", "completion": f"no {n}", "negative": "whole"} for n in range(6)
    ]
    good = [{"prompt": f"{n} and {n}", "completion": f"{2 * n}"} for n in range(6)]
    with pytest.raises(InputError, match="cannot be combined with `never`"):
        lab.events(data=lab.rows([*rows, *good], "bad.jsonl"), label_smoothing=0.1)


def neftune_noise_alpha(lab: Lab) -> None:
    plain = lab.baseline.steps
    noisy = lab.steps(neftune_noise_alpha=20)
    assert noisy[0].loss != plain[0].loss
    with pytest.raises(ValidationError, match="noise is drawn per document"):
        lab.events(neftune_noise_alpha=20, share_prefixes=True)
