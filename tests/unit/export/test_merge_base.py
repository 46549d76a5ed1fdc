"""An adapter that was trained on 4-bit weights is merged into those weights, dequantized."""

import dataclasses
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tiny_export import make_export_job, save_run
from tunesmith.core.types import Pack
from tunesmith.data.collate import collate
from tunesmith.export.export import export_run
from tunesmith.export.hf import write_merged_folder
from tunesmith.export.parity import compute_live_outputs, compute_mean_kl
from tunesmith.model.quantization import roundtrip_nf4
from tunesmith.session.reopen import load_trained_session

Q_PROJ = "model.layers.0.self_attn.q_proj.weight"


@pytest.fixture(scope="module")
def narrow(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run on 4-bit weights."""
    return save_run(tmp_path_factory.mktemp("narrow"), tiny_llama, method="qlora")


@pytest.mark.promise
def test_the_live_model_is_the_one_that_was_trained(narrow: Path, tmp_path: Path) -> None:
    job = make_export_job(narrow, tmp_path)
    bench = load_trained_session(narrow)
    batches = [collate(Pack((witness.document,)), "cpu") for witness in job.examples]
    with torch.no_grad():
        trained = tuple(
            bench.model.head.compute_logits(bench.model.compute_hidden(batch)).float()
            for batch in batches
        )
    ours = compute_live_outputs(job).logits
    unquantized = dataclasses.replace(job.run, quantized_paths=frozenset())
    original = compute_live_outputs(dataclasses.replace(job, run=unquantized)).logits
    assert compute_mean_kl(trained, ours) < 1e-9
    assert compute_mean_kl(trained, original) > 1e-4


def test_the_merged_weights_are_those_of_the_base_and_the_adapter(
    narrow: Path, tmp_path: Path
) -> None:
    job = make_export_job(narrow, tmp_path)
    write_merged_folder(job)
    stored = load_file(job.run.model_spec.path / "model.safetensors")[Q_PROJ].float()
    lora = job.run.loras[Q_PROJ.removesuffix(".weight")]
    merged = load_file(tmp_path / "model.safetensors")[Q_PROJ]
    assert torch.equal(merged, lora.merge_into(roundtrip_nf4(stored)).bfloat16())


@pytest.mark.parametrize(("target", "kind"), [("peft", None), ("gguf", "f32")])
def test_exports_without_rounding_are_the_run(
    target: str, kind: str | None, narrow: Path, tmp_path: Path
) -> None:
    assert export_run(narrow, target, kind=kind, out=tmp_path / target).parity.mean_kl < 1e-9
