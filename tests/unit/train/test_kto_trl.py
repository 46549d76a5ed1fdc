"""The same loss and gradients as TRL's KTOTrainer on the same rows, its KL term included."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from test_kto import compute_step  # type: ignore[import-not-found]
from transformers import AutoModelForCausalLM, AutoTokenizer

from tiny_runs import make_tiny_recipe, save_model_folder, write_rows
from tunesmith.data.sampler import build_mismatched
from tunesmith.model.adapters import METHODS, get_trainable_parameters
from tunesmith.model.causal_lm import load_network, wrap_model
from tunesmith.session import inputs
from tunesmith.train.kto import measure_kl, measure_logps
from tunesmith.train.losses import LossConfig

pytestmark = [pytest.mark.promise, pytest.mark.slow, pytest.mark.filterwarnings("ignore")]
ROWS: list[dict[str, Any]] = [
    {
        "prompt": [{"role": "user", "content": f"{n} and {n}"}],
        "completion": [{"role": "assistant", "content": f"it is {m}"}],
        "label": label,
    }
    for n, m, label in ((1, 2, True), (2, 40, False), (3, 6, True), (12, 7, False))
]


@torch.no_grad()
def shake(*parameter_lists: Any) -> None:
    for parameters in zip(*parameter_lists, strict=True):
        count = parameters[0].numel()
        noise = -0.005 * torch.cos(torch.arange(count, dtype=torch.float64))
        for parameter in parameters:
            parameter.add_(noise.view_as(parameter))


def make_trainer(folder: Path, out: Path, weights: dict[str, float]) -> Any:
    """Return TRL's trainer of the rows, in fp64."""
    from trl import KTOConfig, KTOTrainer

    from datasets import Dataset

    config = KTOConfig(
        str(out),
        report_to=[],
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        per_device_train_batch_size=4,
        beta=0.3,
        **weights,
    )
    return KTOTrainer(
        model=AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64),
        ref_model=AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64),
        args=config,
        train_dataset=Dataset.from_list(ROWS),
        processing_class=AutoTokenizer.from_pretrained(folder, pad_token="<|text|>"),
    )


def test_kto_is_that_of_its_trainer(tmp_path: Path) -> None:
    folder = save_model_folder(tmp_path / "model")
    weights = {"desirable_weight": 1.3, "undesirable_weight": 0.7}
    trainer = make_trainer(folder, tmp_path / "out", weights)
    recipe = make_tiny_recipe(
        folder,
        tmp_path,
        stage="preference",
        loss="kto",
        data=str(write_rows(tmp_path / "rows.jsonl", ROWS)),
    )
    rows = inputs.load_inputs(recipe).datasets["data"]
    documents = [rows.render_documents(index)[0] for index in range(len(ROWS))]
    for document, row in zip(documents, trainer.train_dataset, strict=True):
        # TRL trains the line break after the end token, too
        ours = document.tokens_L.tolist()
        assert ours == [*row["prompt_ids"], *row["completion_ids"]]
    documents = [
        dataclasses.replace(d, weights_L=trl_weights(row))
        for d, row in zip(documents, trainer.train_dataset, strict=True)
    ]
    network = load_network(folder, torch.float64)
    METHODS["full"](network, {})
    model = wrap_model(network, torch.float64)
    mismatched = build_mismatched(documents, 10**6)
    documents = add_references(model, documents)
    mismatched = add_references(model, mismatched)
    shake(list(network.parameters()), list(trainer.model.parameters()))
    trainer.model.train()
    batch = trainer.data_collator(list(trainer.train_dataset))
    loss = trainer.compute_loss(trainer.model, batch)
    loss.backward()
    kl = measure_kl(model, mismatched, 10**6)
    assert kl == pytest.approx(trainer._metrics["train"]["kl"][-1], abs=1e-5)
    assert kl > 0
    objective = LossConfig("kto", beta=0.3, kl=kl, **weights)
    ours, gradients = compute_step(model, documents, objective, 10**6)
    assert ours == pytest.approx(float(loss.detach()), abs=1e-5)
    theirs = [p.grad for _, p in trainer.model.named_parameters()]
    assert gradients.keys() == get_trainable_parameters(network).keys()
    for gradient, other in zip(gradients.values(), theirs, strict=True):
        assert other is not None
        assert float((gradient - other).norm() / other.norm()) < 1e-5


def test_pairs_are_mismatched_as_by_its_trainer(tmp_path: Path) -> None:
    """TRL takes the chosen answers of all rows, then the rejected ones, and mismatches them within
    a device batch. With as many rows as the batch, its pairs of prompt and answer are ours."""
    from trl import KTOConfig, KTOTrainer

    from datasets import Dataset

    folder = save_model_folder(tmp_path / "model")
    rows = [
        {
            "prompt": [{"role": "user", "content": f"{n} and {n}"}],
            "chosen": [{"role": "assistant", "content": f"it is {2 * n}"}],
            "rejected": [{"role": "assistant", "content": f"no {n}"}],
        }
        for n in range(1, 5)
    ]
    trainer = KTOTrainer(
        model=AutoModelForCausalLM.from_pretrained(folder),
        args=KTOConfig(
            str(tmp_path / "out"), report_to=[], use_cpu=True, bf16=False,
            gradient_checkpointing=False, per_device_train_batch_size=len(rows),
        ),
        train_dataset=Dataset.from_list(rows),
        processing_class=AutoTokenizer.from_pretrained(folder, pad_token="<|text|>"),
    )  # fmt: skip
    recipe = make_tiny_recipe(
        folder,
        tmp_path,
        stage="preference",
        loss="kto",
        data=str(write_rows(tmp_path / "rows.jsonl", rows)),
    )
    ours = inputs.load_inputs(recipe).datasets["data"]
    documents = [document for row in range(len(rows)) for document in ours.render_documents(row)]
    measured = [document.tokens_L.tolist() for document in build_mismatched(documents, 10**6)]
    theirs = [[*row["prompt_ids"], *row["KL_completion_ids"]] for row in trainer.train_dataset]
    assert len(measured) == 2 * len(rows)
    assert sorted(measured) == sorted(theirs)


def trl_weights(row: Any) -> Any:
    import numpy as np

    prompt = [0.0] * len(row["prompt_ids"])
    return np.array([*prompt, *[1.0] * len(row["completion_ids"])], np.float32)


def add_references(model: Any, documents: Any) -> Any:
    import dataclasses

    logps = measure_logps(model, documents, 10**6)
    return [
        dataclasses.replace(document, reference_logp=logp)
        for document, logp in zip(documents, logps, strict=True)
    ]
