"""The code of a run on a GPU that is not there: each case of cases.py, in one process of its own,
because fake tensors of a GPU need a shim that is loaded before torch.

A case fails on tensors of different devices in one operation, and on operations whose shape depends
on values. Numbers are those of one step, counted. Where the shim does not compile, as with another
torch, the tests are skipped and say why."""

import dataclasses
import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock

from cases import CASES, LARGE, LARGE_TOKENS, POLICIES, SHARED_LAYOUTS
from layer_shapes import describe_layers
from tiny_models import EXPERT_FAMILIES
from tunesmith.core.types import ModelSpec
from tunesmith.model.merged_attention import is_merging_cheaper
from tunesmith.plan.memory_gpu import estimate_gpu_memory

FOLDER = Path(__file__).parent
CHECKPOINT_CASES = ("resume", "rollback")
RANK_CASES = {"eight ranks": "sft", "eight ranks, full": "full"}  # and the same in one process
EXPERT_CASES = [f"family {family}" for family in EXPERT_FAMILIES]
# they read likelihoods and tokens, one pack or token after another
OTHER_CASES = ("preflight", "answers", "answers after a shared prefix", "sampled answers")
OTHER_CASES += ("sampled answers, deterministic",)
OTHER_CASES += tuple(f"attention over {name}" for name in SHARED_LAYOUTS)
OTHER_CASES += ("likelihoods", "likelihoods with shared prefixes", "mismatched answers", "kto")
STEP_CASES = [
    name
    for name in (*CASES, *CHECKPOINT_CASES)
    if name.partition(",")[0] not in (*OTHER_CASES, *EXPERT_CASES)
]
# the records of the others hold copies from before the step, too
PURE_STEP_CASES = [
    name for name in (*STEP_CASES, *EXPERT_CASES) if not name.startswith(("8B", *CHECKPOINT_CASES))
]
Results = dict[str, dict[str, Any]]
needs_triton = pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed")


@pytest.fixture(scope="session")
def results(tmp_path_factory: pytest.TempPathFactory) -> Results:
    """Run the cases, once for all workers of this test run."""
    base = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        base = base.parent
    folder = base / "fakecuda"
    with FileLock(f"{folder}.lock"):
        if not folder.exists():
            folder.mkdir()
            run_cases(folder)
    found: dict[str, Any] = json.loads((folder / "results.json").read_text(encoding="utf-8"))
    if "problem" in found:
        pytest.skip(found["problem"])
    return found


def run_cases(folder: Path) -> None:
    helpers = FOLDER.parent / "helpers"
    environment = os.environ | {"PYTHONPATH": str(helpers), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, str(FOLDER / "cases.py"), str(folder)],
        capture_output=True,
        text=True,
        check=False,
        env=environment,
        cwd=folder,
    )
    assert (folder / "results.json").exists(), done.stderr[-2000:]


@pytest.mark.parametrize(
    ("name", "error"),
    [
        ("mixed devices", "aten::add of tensors on"),
        ("an index on the host", "aten::index of tensors on"),
        ("a shape that depends on values", "DynamicOutputShape"),
        ("a sum in any order", "cumsum has no deterministic algorithm"),
    ],
)
def test_faults_are_seen(results: Results, name: str, error: str) -> None:
    assert error in results[name]["error"]


def test_reads_kernels_and_bytes_are_counted(results: Results) -> None:
    assert results["two reads"]["reads"] == 2
    # the second copy is queued
    assert (results["two copies"]["uploads"], results["two copies"]["waits"]) == (2, 1)
    one_kernel = results["one kernel"]
    assert (one_kernel["step_kernels"], one_kernel["peak_bytes"]) == (1, 12)


@pytest.mark.parametrize("name", [*CASES, *CHECKPOINT_CASES, "weights", "4-bit weights"])
def test_it_runs(results: Results, name: str) -> None:
    assert results[name]["error"] == ""


@pytest.mark.parametrize("name", RANK_CASES)
def test_one_of_eight_ranks_sends_one_message_a_step(results: Results, name: str) -> None:
    assert results[name]["error"] == ""
    assert results[name]["kernels"]["c10d::allreduce_"] == 1
    assert results[name]["kernels"]["aten::mm"] == results[RANK_CASES[name]]["kernels"]["aten::mm"]


@pytest.mark.parametrize("name", STEP_CASES)
def test_a_step_reads_the_device_once(results: Results, name: str) -> None:
    assert results[name].get("reads") == 1


@pytest.mark.parametrize("name", EXPERT_CASES)
def test_a_layer_of_experts_reads_how_many_tokens_each_has(results: Results, name: str) -> None:
    assert results[name].get("reads") in (2, 3)


@pytest.mark.parametrize("name", PURE_STEP_CASES)
def test_a_step_waits_for_no_copy_from_the_host(results: Results, name: str) -> None:
    assert results[name].get("waits") == 0


def test_kto_also_reads_the_likelihoods_of_its_kl_term(results: Results) -> None:
    assert results["kto"]["reads"] == 2


def test_a_token_is_read_with_the_check_of_its_logits(results: Results) -> None:
    """Three answers of four tokens, two at a time: eight forwards."""
    assert results["answers"]["reads"] == 2 * 8


def test_weights_are_copied_and_checked_one_by_one(results: Results) -> None:
    """21 tensors, and two tables; the check of a tensor reads once."""
    for name in ("weights", "4-bit weights"):
        assert 21 <= results[name]["reads"] <= 23
    assert results["weights"]["uploads"] == 23


def test_a_layer_copies_nothing_from_the_host(results: Results) -> None:
    for policy in POLICIES:
        fewer, more = (results[f"8B, {n} layers, {policy}"]["uploads"] for n in (2, 3))
        # the pack, and the offsets of its documents
        assert more <= fewer <= 2


# ---------------------------------------------------------------- what a layer costs


def count_layer(results: Results, policy: str, key: str) -> int:
    """Return what one more layer of an 8B model adds."""
    fewer, more = (results[f"8B, {n} layers, {policy}"][key] for n in (2, 3))
    return more - fewer


# kernels of a layer, forward and backward, and bytes that it saves per token: the numbers of today,
# so that a change that adds to them is seen
BUDGETS = {"none": (64, 113_500), "selective": (69, 64_200), "full": (90, 8_600)}
NUM_LAYERS = 36
# of a pack in the whole model
MAX_KERNELS = 2_900
MAX_MOVED_BYTES = 450e9


def extend(results: Results, policy: str, key: str) -> int:
    """Return the number of an 8B model with all its layers."""
    two_layers = results[f"8B, 2 layers, {policy}"][key]
    return two_layers + (NUM_LAYERS - 2) * count_layer(results, policy, key)


@needs_triton
@pytest.mark.parametrize("policy", POLICIES)
def test_a_layer_launches_no_more_kernels(results: Results, policy: str) -> None:
    assert count_layer(results, policy, "step_kernels") <= BUDGETS[policy][0]


@needs_triton
@pytest.mark.parametrize("policy", POLICIES)
def test_a_layer_saves_no_more_bytes(results: Results, policy: str) -> None:
    assert count_layer(results, policy, "saved_bytes") / LARGE_TOKENS <= BUDGETS[policy][1]


@needs_triton
def test_a_pack_of_an_8b_model_stays_in_its_budget(results: Results) -> None:
    assert 2_000 < extend(results, "none", "step_kernels") <= MAX_KERNELS
    assert 300e9 < extend(results, "none", "step_bytes") <= MAX_MOVED_BYTES


# ---------------------------------------------------------------- shared prefixes


@pytest.mark.parametrize("name", SHARED_LAYOUTS)
def test_the_way_to_share_prefixes_moves_fewer_bytes(results: Results, name: str) -> None:
    merged, gathered = (
        results[f"attention over {name}, {way}"]["step_bytes"] for way in ("merged", "gathered")
    )
    heads = (LARGE["num_attention_heads"], LARGE["num_key_value_heads"])
    assert is_merging_cheaper(SHARED_LAYOUTS[name], *heads, None) == (merged < gathered)


def test_merging_keeps_no_keys_for_each_answer(results: Results) -> None:
    """Forty answers after a prefix of 1,000 tokens."""
    merged, gathered = (
        results[f"attention over short answers, {way}"]["peak_bytes"]
        for way in ("merged", "gathered")
    )
    assert merged < gathered / 3


# ---------------------------------------------------------------- what a plan predicts


def describe_large(num_layers: int) -> ModelSpec:
    """Return the model of the 8B cases as a plan sees it."""
    hidden_size = LARGE["hidden_size"]
    spec = ModelSpec(
        name="8B",
        path=Path("8B"),
        architecture="Qwen3ForCausalLM",
        model_type="qwen3",
        num_layers=num_layers,
        hidden_size=hidden_size,
        num_heads=LARGE["num_attention_heads"],
        num_kv_heads=LARGE["num_key_value_heads"],
        head_dim=LARGE["head_dim"],
        intermediate_size=LARGE["intermediate_size"],
        vocab_size=LARGE["vocab_size"],
        context_length=LARGE["max_position_embeddings"],
        tie_word_embeddings=False,
        parameters=0,
        dtype="bfloat16",
    )
    spec = describe_layers(spec)
    matrices = 2 * LARGE["vocab_size"] * hidden_size
    return dataclasses.replace(spec, parameters=spec.block_parameters + matrices)


@needs_triton
@pytest.mark.parametrize("policy", POLICIES)
def test_the_plan_predicts_the_peak(results: Results, policy: str) -> None:
    """Without the CUDA context and the fragments, which nothing here has."""
    parts = estimate_gpu_memory(
        describe_large(NUM_LAYERS),
        pack_tokens=LARGE_TOKENS,
        method="lora",
        dtype="bf16",
        rank=16,
        gradient_checkpointing=policy,
    )
    predicted = parts["peak"] - parts["context"] - parts["fragments"]
    counted = extend(results, policy, "peak_bytes")
    assert counted <= predicted <= 1.1 * counted


@needs_triton
def test_the_plan_counts_what_a_layer_saves(results: Results) -> None:
    fewer, more = (
        estimate_gpu_memory(
            describe_large(n), pack_tokens=LARGE_TOKENS, method="lora", dtype="bf16", rank=16
        )["activations"]
        for n in (2, 3)
    )
    assert more - fewer == pytest.approx(count_layer(results, "none", "saved_bytes"), rel=0.02)
