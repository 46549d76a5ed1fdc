"""What an adapter that was trained on 4-bit weights is merged into: `tunesmith export --base`."""

import dataclasses
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tiny_export import make_export_job, save_run
from tunesmith.core.errors import GateError, InputError
from tunesmith.core.types import Pack
from tunesmith.data.collate import collate
from tunesmith.export.export import export_run
from tunesmith.export.hf import write_merged_folder
from tunesmith.export.parity import compute_live_logits, compute_mean_kl
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
    ours = compute_live_logits(job.run, job.examples)
    original = compute_live_logits(
        dataclasses.replace(job.run, quantized_paths=frozenset()), job.examples
    )
    assert compute_mean_kl(trained, ours) < 1e-9
    assert compute_mean_kl(trained, original) > 1e-4


def test_auto_takes_the_nearer_one_and_says_how_far_both_are(narrow: Path, tmp_path: Path) -> None:
    made = export_run(narrow, "merged", out=tmp_path / "merged")
    assert made.base.base == "dequantized"
    assert made.base.mean_kl["dequantized"] < 0.1 * made.base.mean_kl["original"]
    assert made.parity.mean_kl == pytest.approx(made.base.mean_kl["dequantized"], rel=1e-3)


@pytest.mark.parametrize("base", ["original", "dequantized"])
def test_the_merged_weights_are_those_of_the_base_and_the_adapter(
    base: str, narrow: Path, tmp_path: Path
) -> None:
    job = dataclasses.replace(make_export_job(narrow, tmp_path), base=base)
    write_merged_folder(job)
    stored = load_file(job.run.model_spec.path / "model.safetensors")[Q_PROJ].float()
    begin = roundtrip_nf4(stored) if base == "dequantized" else stored
    wanted = job.run.loras[Q_PROJ.removesuffix(".weight")].merge_into(begin)
    assert torch.equal(load_file(tmp_path / "model.safetensors")[Q_PROJ], wanted.bfloat16())


def test_the_original_base_is_refused_where_it_is_too_far(narrow: Path, tmp_path: Path) -> None:
    with pytest.raises(GateError, match=r"(?s)mean KL.*--base dequantized"):
        export_run(narrow, "gguf", kind="f32", base="original", out=tmp_path / "gguf")
    assert not (tmp_path / "gguf").exists()
    assert export_run(narrow, "gguf", kind="f32", out=tmp_path / "gguf").parity.mean_kl < 1e-9


def test_the_adapter_alone_is_compared_beside_the_weights_that_it_was_trained_beside(
    narrow: Path, tmp_path: Path
) -> None:
    for target, kind in (("peft", None), ("gguf", "lora")):
        made = export_run(narrow, target, kind=kind, out=tmp_path / target)
        assert made.parity.mean_kl < 1e-9
        assert made.base.mean_kl == {}


@pytest.mark.parametrize(
    ("target", "kind", "base", "problem"),
    [
        ("merged", None, "orginal", "unknown base 'orginal'"),
        ("peft", None, "original", "only the adapter is exported"),
        ("gguf", "lora", "dequantized", "only the adapter is exported"),
    ],
)
def test_wishes_that_have_no_effect(
    target: str, kind: str | None, base: str, problem: str, narrow: Path, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match=problem):
        export_run(narrow, target, kind=kind, base=base, out=tmp_path / "x")
    assert not (tmp_path / "x").exists()


def test_a_run_on_whole_weights_has_one_base(finished: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="not quantized to 4 bits"):
        export_run(finished, "merged", base="dequantized", out=tmp_path / "x")
