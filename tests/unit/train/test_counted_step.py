"""Steps on ranks that are not there: what they send and hold, beside the prediction."""

import json
from pathlib import Path
from typing import Any

import pytest

from counted_step import CountedStep, count_step
from tiny_runs import build_sum_rows, make_tiny_recipe, save_model_folder, write_rows
from tunesmith.core.errors import InputError
from tunesmith.session import inputs, planner

pytestmark = pytest.mark.promise


FULL: dict[str, Any] = {"method": "full", "lora_r": "auto"}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model_folder(tmp_path_factory.mktemp("dry") / "model", num_kv_heads=2)


def count(
    model: Path, folder: Path, num_ranks: int, target: str | None = None, **changes: Any
) -> CountedStep:
    rows = write_rows(folder / "rows.jsonl", build_sum_rows(1, 32))
    how = {"data": str(rows), "batch_size": 16} | changes
    recipe = make_tiny_recipe(model, folder / "x", **how)
    run_inputs = inputs.load_inputs(recipe, needs_weights=False).with_machine(target, None)
    return count_step(planner.make_plan(run_inputs), run_inputs, num_ranks)


@pytest.mark.parametrize("changes", [{"dtype": "bf16"}, FULL])
def test_one_sum_of_gradients_is_sent(model: Path, tmp_path: Path, changes: dict[str, Any]) -> None:
    counted = count(model, tmp_path, 8, **changes)
    assert [(name, calls) for name, (calls, _) in counted.messages.items()] == [("allreduce", 1)]
    assert counted.weight_bytes == pytest.approx(counted.planned_weight_bytes, rel=0.01)
    assert counted.peak_bytes > counted.weight_bytes
    assert counted.rank_tokens < counted.step_tokens / 6


@pytest.mark.parametrize(("policy", "calls"), [("none", 8), ("full", 10)])
def test_ranks_that_share_documents_exchange_them_around_attention(
    model: Path, tmp_path: Path, policy: str, calls: int
) -> None:
    """Twice for each of two layers, forward and backward; the last one is not recomputed."""
    changes = {"gradient_checkpointing": policy, "max_length": 128}
    shared = count(model, tmp_path, 2, context_parallel_size=2, **changes)
    assert shared.messages["alltoall_base"][0] == calls


@pytest.mark.parametrize(
    ("shard", "changes"), [(2, {"gradient_checkpointing": "full"}), (4, {}), (2, FULL), (4, FULL)]
)
def test_ranks_that_hold_weights_together_gather_each_layer_once_in_a_pass(
    model: Path, tmp_path: Path, changes: dict[str, Any], shard: int
) -> None:
    """The last layer of a forward is that with which the backward begins."""
    how: dict[str, Any] = {"dtype": "bf16", "optim": "adamw", **changes}
    counted = count(model, tmp_path, 4, target="4xh100", dp_shard_size=shard, **how)
    calls = {name: calls for name, (calls, _) in counted.messages.items()}
    is_full = "method" in changes
    assert calls["allgather_base"] == 3 + 2 * is_full, "with all else, and the norm"
    assert calls.get("reduce_scatter_base", 0) == 3 * is_full
    assert counted.weight_bytes == pytest.approx(counted.planned_weight_bytes, rel=0.02)


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a model without weights, whose own memory is far more than that of a few tokens."""
    folder = save_model_folder(tmp_path_factory.mktemp("large") / "model")
    (folder / "model.safetensors").unlink()
    config = json.loads((folder / "config.json").read_text())
    sizes = {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 12}
    heads = {"num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 128}
    (folder / "config.json").write_text(json.dumps(config | sizes | heads | {"vocab_size": 32000}))
    return folder


@pytest.mark.parametrize(
    ("changes", "tolerance"), [({"method": "lora", "lora_r": 16}, 0.05), (FULL, 0.1)]
)
def test_the_peak_of_8_ranks_is_within_10_percent_of_the_plan(
    large: Path, tmp_path: Path, changes: dict[str, Any], tolerance: float
) -> None:
    how: dict[str, Any] = {"dtype": "bf16", "dp_shard_size": 8, "gradient_checkpointing": "full"}
    counted = count(large, tmp_path, 8, target="8xh100", batch_size=8, **how, **changes)
    assert counted.planned_peak_bytes == pytest.approx(counted.peak_bytes, rel=tolerance)


@pytest.mark.parametrize("shard", [1, 8])
def test_weights_in_4_bits_are_counted(large: Path, tmp_path: Path, shard: int) -> None:
    how: dict[str, Any] = {
        "method": "qlora",
        "dtype": "bf16",
        "dp_shard_size": shard,
        "batch_size": 8,
    }
    counted = count(large, tmp_path, 8, target="8xh100", **how)
    assert counted.weight_bytes == pytest.approx(counted.planned_weight_bytes, rel=0.02)
    assert counted.planned_peak_bytes == pytest.approx(counted.peak_bytes, rel=0.1)


def test_the_memory_of_a_rank_falls_with_their_number(model: Path, tmp_path: Path) -> None:
    """No rank has less than its weights and the longest document."""
    peaks = [count(model, tmp_path, num_ranks, dtype="bf16") for num_ranks in (2, 8)]
    assert peaks[0].weight_bytes == peaks[1].weight_bytes
    assert peaks[1].peak_bytes < 0.6 * peaks[0].peak_bytes


@pytest.mark.parametrize(
    ("changes", "num_ranks", "problem"),
    [
        ({"dp_shard_size": 2}, 3, r"dp_shard_size is 2, but .* processes \(3\) is not a multiple"),
        ({"context_parallel_size": 2}, 3, r"processes \(3\) is not a multiple"),
        (FULL | {"max_grad_norm": 0}, 2, "before several ranks could sum"),
    ],
)
def test_what_it_cannot_count_is_refused(
    model: Path, tmp_path: Path, changes: dict[str, Any], num_ranks: int, problem: str
) -> None:
    with pytest.raises(InputError, match=problem):
        count(model, tmp_path, num_ranks, **changes)
