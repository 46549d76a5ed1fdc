"""A GGUF that we write, read by others: the gguf package, transformers, and our own converter."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tiny_export import make_export_job, save_model, save_run
from tunesmith.core.errors import GateError
from tunesmith.export.gguf import (
    get_model_path,
    reload_gguf,
    write_gguf,
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
