"""The code of a run on a GPU that is not there: each case of cases.py, in one process of its own,
because fake tensors of a GPU need a shim that is loaded before torch.

A case fails on tensors of different devices in one operation, and on operations whose shape depends
on values. Numbers are those of one step, counted. Where the shim does not compile, as with another
torch, the tests are skipped and say why."""

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

import shim
from cases import CASES, FAMILY_CONFIGS, LARGE_CASES, SHARED_LAYOUTS
from large_models import (
    FEWER,
    LARGE_MODELS,
    MORE,
    POLICIES,
    RANK,
    count_layer,
    extend,
    name_case,
)
from shared_folder import lock_shared_folder
from tiny_models import EXPERT_FAMILIES
from tunesmith.model.flash_attention import is_merging_cheaper
from tunesmith.model.hub.families import EQUAL_TYPES, TEXT_FAMILIES
from tunesmith.plan.memory import Footprint, MemoryParts, estimate_gpu_memory

pytestmark = pytest.mark.promise


FOLDER = Path(__file__).parent
CHECKPOINT_CASES = ("resume", "rollback")
RANK_CASES = {"eight ranks": "sft", "eight ranks, full": "full"}  # and the same in one process
EXPERT_CASES = [f"family {family}" for family in EXPERT_FAMILIES]
# they read likelihoods and tokens, one pack or token after another
OTHER_CASES = ("preflight", "answers", "answers after a shared prefix", "sampled answers")
OTHER_CASES += ("sampled answers, deterministic",)
OTHER_CASES += tuple(f"attention over {name}" for name in SHARED_LAYOUTS)
OTHER_CASES += ("likelihoods", "likelihoods with shared prefixes", "mismatched answers", "kto")
OTHER_CASES += ("norms",)
STEP_CASES = [
    name
    for name in (*CASES, *CHECKPOINT_CASES)
    if name.partition(",")[0] not in (*OTHER_CASES, *EXPERT_CASES)
]
# the records of the others hold copies from before the step, too
PURE_STEP_CASES = [
    name
    for name in (*STEP_CASES, *EXPERT_CASES)
    if name not in LARGE_CASES and name not in CHECKPOINT_CASES
]
# (model, policy) of what is counted for a whole model
LARGE = [(name, policy) for name, model in LARGE_MODELS.items() for policy in model.policies]
QWEN = "Qwen3-8B"
Results = dict[str, dict[str, Any]]
needs_triton = pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed")


@pytest.fixture(scope="session")
def results(tmp_path_factory: pytest.TempPathFactory) -> Results:
    """Run the cases, once for all workers of this test run."""
    with lock_shared_folder(tmp_path_factory, "fakecuda") as (folder, is_new):
        if is_new:
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
        ("flash attention in fp32", "_flash_attention_forward of torch.float32"),
        ("flash attention, misaligned", "_flash_attention_forward of rows that are not aligned"),
        pytest.param("a strided kernel", "mix_rows of a strided tensor", marks=needs_triton),
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


def test_what_is_run_directly_is_what_torch_says_of_fake_tensors(results: Results) -> None:
    assert results["results"]["error"] == ""


@pytest.mark.parametrize("name", [*CASES, *CHECKPOINT_CASES, "weights", "4-bit weights"])
def test_it_runs(results: Results, name: str) -> None:
    assert results[name]["error"] == ""


def test_a_shim_that_does_not_compile_is_the_reason_to_skip(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken = tmp_path / "shim.cpp"
    broken.write_text("int install_absent_device( {\n")
    monkeypatch.setattr(shim, "SOURCE", broken)
    assert "shim.cpp does not compile with this torch: " in shim.build_shim(tmp_path)
    assert "error" in shim.build_shim(tmp_path)
    monkeypatch.setattr(shim.shutil, "which", lambda _name: None)
    assert shim.build_shim(tmp_path) == "no C++ compiler"


def test_every_type_of_the_table_is_trained() -> None:
    types = {config.model_type for config in FAMILY_CONFIGS.values()}
    assert types >= TEXT_FAMILIES.keys() - EQUAL_TYPES.keys()


@needs_triton
def test_latent_attention_over_a_shared_prefix_is_merged(results: Results) -> None:
    """So that the layout of its heads is seen by our kernel."""
    kernels = results["latent attention with shared prefixes"]["kernels"]
    assert kernels["tunesmith::mix_rows"] > 0


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
    for model, policy in LARGE:
        fewer, more = (results[name_case(model, policy, n)]["uploads"] for n in (FEWER, MORE))
        # the pack, and the offsets of its documents
        assert more <= fewer <= 2


# ---------------------------------------------------------------- what a layer costs


# kernels of a layer, forward and backward, and bytes that it saves per token: the numbers of today,
# so that a change that adds to them is seen
BUDGETS = {"none": (64, 113_500), "selective": (69, 64_200), "full": (90, 8_600)}
# of a pack in the whole model
MAX_KERNELS = 2_900
MAX_MOVED_BYTES = 450e9


@needs_triton
@pytest.mark.parametrize("policy", POLICIES)
def test_a_layer_launches_no_more_kernels(results: Results, policy: str) -> None:
    assert count_layer(results, QWEN, policy, "step_kernels") <= BUDGETS[policy][0]


@needs_triton
@pytest.mark.parametrize("policy", POLICIES)
def test_a_layer_saves_no_more_bytes(results: Results, policy: str) -> None:
    assert (
        count_layer(results, QWEN, policy, "saved_bytes") / LARGE_MODELS[QWEN].num_tokens
        <= BUDGETS[policy][1]
    )


@needs_triton
def test_a_pack_of_an_8b_model_stays_in_its_budget(results: Results) -> None:
    assert 2_000 < extend(results, QWEN, "none", "step_kernels") <= MAX_KERNELS
    assert 300e9 < extend(results, QWEN, "none", "step_bytes") <= MAX_MOVED_BYTES


# tokens per second of an H100 by its roofline: what is asked, and less than is possible
ROOFLINE_RATES = {QWEN: (17_000, 25_000), "Llama-3-8B": (15_000, 25_000)}


@needs_triton
@pytest.mark.parametrize("model", ROOFLINE_RATES)
def test_a_pack_is_as_fast_as_asked_by_the_roofline(results: Results, model: str) -> None:
    seconds = extend(results, model, "none", "step_seconds")
    low, high = ROOFLINE_RATES[model]
    assert low <= LARGE_MODELS[model].num_tokens / seconds < high


def test_the_roofline_is_that_of_the_slower_of_bytes_and_operations(results: Results) -> None:
    """An addition of 12 bytes takes the time of a kernel, a product of 2,048 rows its 17 GFLOP,
    the same of 16 columns its bytes."""
    assert results["one kernel"]["step_seconds"] == 2e-6
    square, skinny = (
        results[f"a product, {name}"]["step_seconds"] for name in ("square", "skinny")
    )
    assert square == pytest.approx(2 * 2048**3 / 652.74e12)
    assert skinny == pytest.approx(2 * (2048**2 + 2 * 16 * 2048) / 2.68e12)


# ---------------------------------------------------------------- shared prefixes


@pytest.mark.parametrize("name", SHARED_LAYOUTS)
def test_the_way_to_share_prefixes_moves_fewer_bytes(results: Results, name: str) -> None:
    merged, gathered = (
        results[f"attention over {name}, {way}"]["step_bytes"] for way in ("merged", "gathered")
    )
    sizes = LARGE_MODELS[QWEN].sizes
    heads = (sizes["num_attention_heads"], sizes["num_key_value_heads"])
    assert is_merging_cheaper(SHARED_LAYOUTS[name], *heads, None) == (merged < gathered)


def test_merging_keeps_no_keys_for_each_answer(results: Results) -> None:
    """Forty answers after a prefix of 1,000 tokens."""
    merged, gathered = (
        results[f"attention over short answers, {way}"]["peak_bytes"]
        for way in ("merged", "gathered")
    )
    assert merged < gathered / 3


# ---------------------------------------------------------------- what a plan predicts


def predict(model: str, num_layers: int, policy: str, folder: Path) -> MemoryParts:
    large = LARGE_MODELS[model]
    return estimate_gpu_memory(
        large.describe(num_layers, folder),
        Footprint("lora", "bf16", rank=RANK, gradient_checkpointing=policy),
        pack_tokens=large.num_tokens,
    )


# of a peak that the plan leaves out: copies of adapters in 16 bits, tables of the rotary embedding,
# inputs of the last norm
MAX_MISSING = {"SmolLM2-135M": 0.02}


@needs_triton
@pytest.mark.parametrize(("model", "policy"), LARGE)
def test_the_plan_predicts_the_peak(
    results: Results, model: str, policy: str, tmp_path: Path
) -> None:
    """Without the CUDA context and the fragments, which nothing here has."""
    parts = predict(model, LARGE_MODELS[model].num_layers, policy, tmp_path)
    predicted = parts.peak - parts.context - parts.fragments
    counted = extend(results, model, policy, "peak_bytes")
    assert (1 - MAX_MISSING.get(model, 0)) * counted <= predicted <= 1.1 * counted
    assert counted <= parts.peak


@needs_triton
@pytest.mark.parametrize("model", LARGE_MODELS)
def test_the_plan_counts_what_a_layer_saves(results: Results, model: str, tmp_path: Path) -> None:
    fewer, more = (predict(model, n, "none", tmp_path).activations for n in (FEWER, MORE))
    counted = count_layer(results, model, "none", "saved_bytes")
    assert more - fewer == pytest.approx(counted, rel=0.02)
