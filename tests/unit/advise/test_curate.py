import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

import tunesmith
from tiny_runs import make_chat_row
from tunesmith import InputError
from tunesmith.advise.curate import extract_last_answer, score_rows
from tunesmith.core.atomic import verify_dir
from tunesmith.core.types import Document
from tunesmith.model.causal_lm import load_network, wrap_model
from tunesmith.session.inputs import RunInputs

ROWS = [
    make_chat_row(f"ask {i} {chr(97 + i) * (i % 5 + 1)}", f"answer {i * i} {chr(110 - i)}")
    for i in range(12)
]


@pytest.fixture
def run_inputs(tiny_folder: Path, tmp_path: Path) -> RunInputs:
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return tunesmith.api.load_inputs(model=str(tiny_folder), data=str(tmp_path / "train.jsonl"))


def compute_nats(network: torch.nn.Module, tokens: list[int], first: int) -> float:
    """Return the loss of the tokens from `first` on, by the stock model."""
    with torch.no_grad():
        logits = network(torch.tensor([tokens])).logits[0, first - 1 : -1].double()
    return float(-logits.log_softmax(-1)[range(len(tokens) - first), tokens[first:]].sum())


def test_scores_are_those_of_the_stock_model(run_inputs: RunInputs, tiny_folder: Path) -> None:
    data = run_inputs.datasets["data"]
    scores = score_rows(wrap_model(load_network(tiny_folder, torch.float32), torch.float32), data)
    stock = AutoModelForCausalLM.from_pretrained(tiny_folder, dtype=torch.float32).eval()
    for row in (0, 7):
        (document,) = data.render_documents(row)
        tokens = document.tokens_L.tolist()
        first = int(np.flatnonzero(document.weights_L)[0])
        tokens = tokens[: int(np.flatnonzero(document.weights_L)[-1]) + 1]
        count = len(tokens) - first
        with_question = compute_nats(stock, tokens, first)
        alone = compute_nats(stock, tokens[first - 1 :], 1)
        assert scores.answer_tokens_N[row] == count
        assert scores.perplexity_N[row] == pytest.approx(math.exp(with_question / count), rel=1e-4)
        assert scores.difficulty_N[row] == pytest.approx(
            math.exp((with_question - alone) / count), rel=1e-4
        )


def test_states_of_questions_are_means_of_the_stock_models(
    run_inputs: RunInputs, tiny_folder: Path
) -> None:
    data = run_inputs.datasets["data"]
    model = wrap_model(load_network(tiny_folder, torch.float32), torch.float32)
    vectors = score_rows(model, data).vectors_NV
    stock = AutoModelForCausalLM.from_pretrained(tiny_folder, dtype=torch.float32).eval()
    means = []
    for row in range(len(data)):
        (document,) = data.render_documents(row)
        question = document.tokens_L[: int(np.flatnonzero(document.weights_L)[0]) - 1].tolist()
        with torch.no_grad():
            means.append(
                stock.base_model(torch.tensor([question])).last_hidden_state[0].mean(0).numpy()
            )
    expected = np.stack(means)
    expected = (expected - expected.mean(axis=0)) / expected.std(axis=0)
    np.testing.assert_allclose(
        vectors, expected / np.linalg.norm(expected, axis=1, keepdims=True), atol=2e-3
    )


def test_the_last_answer_of_a_conversation_is_scored() -> None:
    weights = np.array([0, 0, 1, 1, 0, 0, 0.5, 0.5, 0], dtype=np.float32)
    document, first = extract_last_answer(Document("rows:1", np.arange(9, dtype=np.int32), weights))
    assert (first, len(document)) == (6, 8)
    assert document.weights_L.tolist() == [0, 0, 0, 0, 0, 0, 1, 1]


@pytest.mark.promise
def test_the_files_hold_unchanged_rows_and_a_score_for_every_row(
    run_inputs: RunInputs, tmp_path: Path
) -> None:
    to = tmp_path / "golden"
    curated = tunesmith.data_curate(run_inputs, keep=3, to=to)
    assert verify_dir(to) == ""
    source = (tmp_path / "train.jsonl").read_text().splitlines()
    for subset in curated.subsets:
        lines = (to / f"{subset.name}.jsonl").read_text().splitlines()
        assert len(lines) == subset.rows == curated.subsets[0].rows <= 3
        assert set(lines) <= set(source)
    lines = [json.loads(line) for line in (to / "scores.jsonl").read_text().splitlines()]
    assert [line["id"] for line in lines] == [f"train.jsonl:{n}" for n in range(1, 13)]
    assert all(("selected" in line["files"]) == (not line["reason"]) for line in lines)
    selected = [source[n] for n, line in enumerate(lines) if "selected" in line["files"]]
    assert selected == (to / "selected.jsonl").read_text().splitlines()
    assert sum(curated.reasons.values()) == 12 - len(selected)


def test_rows_with_personal_data_are_selected_where_they_belong(
    tiny_folder: Path, tmp_path: Path
) -> None:
    rows = [make_chat_row(f"who {i} is", f"jo{i}@debian.org {i * i}") for i in range(8)]
    data = tmp_path / "mail.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    recipe = {"model": str(tiny_folder), "data": str(data)}
    with pytest.raises(InputError, match=r"no row is good enough: .*personal") as caught:
        tunesmith.data_curate(recipe, keep=2, to=tmp_path / "golden")
    assert "--allow-personal" in caught.value.fix
    curated = tunesmith.data_curate(recipe, keep=2, to=tmp_path / "golden", allow_personal=True)
    assert "personal" not in curated.reasons
    assert len((tmp_path / "golden" / "selected.jsonl").read_text().splitlines()) == 2


@pytest.mark.parametrize(
    ("changes", "keep", "message"),
    [
        ({}, 12, "leaves nothing to select"),
        ({"stage": "cpt", "data": "text.jsonl"}, 1, "these rows have none"),
    ],
    ids=["all", "texts"],
)
def test_unusable_arguments_are_refused(
    tiny_folder: Path,
    tmp_path: Path,
    run_inputs: RunInputs,
    changes: dict[str, str],
    keep: int,
    message: str,
) -> None:
    (tmp_path / "text.jsonl").write_text('{"text": "one two three"}\n{"text": "four five six"}\n')
    changes = {
        key: str(tmp_path / value) if key == "data" else value for key, value in changes.items()
    }
    recipe = {"model": str(tiny_folder), "data": str(tmp_path / "train.jsonl"), **changes}
    with pytest.raises(InputError, match=message):
        tunesmith.data_curate(recipe, keep=keep, to=tmp_path / "golden")
    assert not (tmp_path / "golden").exists()
    (tmp_path / "mine").mkdir()
    with pytest.raises(InputError, match="already exists"):
        tunesmith.data_curate(run_inputs, keep=3, to=tmp_path / "mine")
