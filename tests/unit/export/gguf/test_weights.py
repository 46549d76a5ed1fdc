"""A GGUF that we write, read by others: the gguf package, transformers, and our own converter."""

from dataclasses import replace
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from tiny_export import make_export_job, save_model, save_run
from tunesmith.core.errors import GateError
from tunesmith.export.gguf import (
    ADAPTER_FILE,
    get_model_path,
    read_adapter,
    reload_gguf,
    write_gguf,
    write_lora,
)
from tunesmith.export.parity import ExportJob
from tunesmith.model.gguf.convert import convert
from tunesmith.model.gguf.reader import read_gguf
from tunesmith.model.hub.validate import read_headers
from tunesmith.model.merge import iter_merged_tensors
from tunesmith.model.reference_load import load_config_dict

OTHERS = ("llama", "qwen2")  # of test_targets.py; with the biases of llama-bias
FAMILIES = [
    *("llama-wide", "llama-bias", "qwen3"),
    *(pytest.param(family, marks=pytest.mark.slow) for family in OTHERS),
]


@pytest.fixture(scope="module", params=FAMILIES)
def job(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> ExportJob:
    """A run on a model of each family, at work as a GGUF without rounding."""
    folder = tmp_path_factory.mktemp(request.param)
    path = save_run(folder / "work", save_model(folder / "model", request.param))
    return make_export_job(path, folder / "export", "f32")


def exact(job: ExportJob) -> dict[str, torch.Tensor]:
    return dict(iter_merged_tensors(read_headers(job.run.model_spec.path), job.run.loras))


def test_transformers_reads_the_weights_that_were_merged(job: ExportJob) -> None:
    write_gguf(job)
    result = dict(reload_gguf(job).network.named_parameters())
    expected = exact(job)
    assert result.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(result[name], tensor), name


def test_our_converter_makes_a_model_folder_of_it(job: ExportJob, tmp_path: Path) -> None:
    write_gguf(job)
    convert(get_model_path(job), tmp_path)
    result = load_file(tmp_path / "model.safetensors")
    for name, tensor in exact(job).items():
        assert torch.equal(result[name], tensor.bfloat16()), name
    base, again = load_config_dict(job.run.model_spec.path), load_config_dict(tmp_path)
    for key in (
        "rope_parameters",
        "rms_norm_eps",
        "tie_word_embeddings",
        "max_position_embeddings",
        "vocab_size",
    ):
        assert again[key] == base[key], key


def test_the_adapter_alone_is_the_same_delta(job: ExportJob) -> None:
    write_lora(job)
    loras = read_adapter(job.folder / ADAPTER_FILE, job.run.model_spec)
    assert loras.keys() == job.run.loras.keys()
    for path, lora in job.run.loras.items():
        nothing = torch.zeros(len(lora.b_OR), lora.a_RI.shape[1])
        assert torch.allclose(
            loras[path].merge_into(nothing), lora.merge_into(nothing), rtol=1e-6, atol=0
        ), path


def test_the_adapter_as_llama_cpp_applies_it(job: ExportJob) -> None:
    """By the rule of llama.cpp: W x + alpha / rank * B (A x), on the tensors of the file as they
    lie there."""
    write_gguf(job)
    write_lora(job)
    adapter, merged = (
        gguf.GGUFReader(file) for file in (job.folder / ADAPTER_FILE, get_model_path(job))
    )
    alpha = float(adapter.fields["adapter.lora.alpha"].contents())
    assert [adapter.fields[f"{k}.type"].contents() for k in ("general", "adapter")] == [
        "adapter",
        "lora",
    ]
    plain = replace(job, run=replace(job.run, loras={}), export_type="f16")
    write_gguf(plain)
    base = {tensor.name: tensor.data for tensor in gguf.GGUFReader(get_model_path(plain)).tensors}
    halves = {tensor.name: tensor.data for tensor in adapter.tensors}
    for tensor in merged.tensors:
        if (a := halves.get(f"{tensor.name}.lora_a")) is not None:
            b = halves[f"{tensor.name}.lora_b"]
            again = base[tensor.name].astype(np.float32) + alpha / len(a) * (b @ a)
            np.testing.assert_allclose(again, tensor.data, atol=2e-3, err_msg=tensor.name)


def test_types_of_the_tensors(finished: Path, tmp_path: Path) -> None:
    job = make_export_job(finished, tmp_path, "q8_0")
    write_gguf(job)
    kinds = {
        tensor.name: tensor.quant_type.name for tensor in read_gguf(get_model_path(job)).tensors
    }
    assert kinds["token_embd.weight"] == kinds["blk.0.attn_q.weight"] == "Q8_0"
    assert kinds["blk.1.ffn_down.weight"] == "F16"  # rows of 48 do not fill blocks of 32
    assert kinds["blk.0.attn_norm.weight"] == kinds["output_norm.weight"] == "F32"
    assert "output.weight" not in kinds  # tied


def test_values_that_a_type_cannot_hold_are_refused(finished: Path, tmp_path: Path) -> None:
    job = make_export_job(finished, tmp_path, "f16")
    job.run.loras["model.layers.0.mlp.down_proj"].b_OR[0] = 1e6
    with pytest.raises(GateError, match=r"blk\.0\.ffn_down\.weight has values that F16 cannot"):
        write_gguf(job)
