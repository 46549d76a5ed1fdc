"""GGUFs of Qwen3 MoE and LFM2: what transformers' own reader makes of them computes what the run
does, and the gguf package finds llama.cpp's names and sizes. Others are refused by name."""

from pathlib import Path
from typing import Any

import gguf
import pytest
import torch

from tiny_export import make_export_job, save_model, save_run
from tunesmith.core.errors import InputError
from tunesmith.export.gguf import build_architecture, get_model_path, reload_gguf, write_gguf
from tunesmith.export.parity import ExportJob
from tunesmith.model.causal_lm import compute_stock_logits, load_network
from tunesmith.model.gguf.convert import convert
from tunesmith.model.hub.spec import read_spec
from tunesmith.model.merge import merge_into_network
from tunesmith.model.reference_load import load_config_dict

TOKENS = list(range(5, 45))
PLACES = [0, 7, 39]


@pytest.fixture(scope="module", params=["qwen3_moe", "lfm2"])
def job(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> ExportJob:
    folder = tmp_path_factory.mktemp(request.param)
    path = save_run(folder / "work", save_model(folder / "model", request.param))
    written = make_export_job(path, folder / "export", "f32")
    write_gguf(written)
    return written


@pytest.mark.promise
def test_transformers_computes_what_the_run_does(job: ExportJob) -> None:
    base = job.run.model_spec.path
    merged = load_network(base, torch.float32)
    before = compute_stock_logits(merged, TOKENS, PLACES)
    merge_into_network(merged, job.run.changes)
    expected = compute_stock_logits(merged, TOKENS, PLACES)
    logits = compute_stock_logits(reload_gguf(job).network, TOKENS, PLACES)
    assert (logits - expected).norm() < 1e-5 * expected.norm()
    assert (before - expected).norm() > 1e-3 * expected.norm()


def read_value(reader: gguf.GGUFReader, key: str) -> Any:
    return reader.fields[key].contents()


def test_names_and_sizes_are_those_of_llama_cpp(job: ExportJob) -> None:
    reader = gguf.GGUFReader(get_model_path(job))
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    if job.run.model_spec.model_type == "qwen3_moe":
        assert read_value(reader, "general.architecture") == "qwen3moe"
        for key, value in {
            "expert_count": 4,
            "expert_used_count": 2,
            "expert_feed_forward_length": 32,
        }.items():
            assert read_value(reader, f"qwen3moe.{key}") == value
        assert list(tensors["blk.0.ffn_gate_exps.weight"].shape) == [64, 32, 4]
        assert list(tensors["blk.1.ffn_down_exps.weight"].shape) == [32, 64, 4]
        assert tensors["blk.0.ffn_gate_inp.weight"].tensor_type.name == "F32"
        return
    assert read_value(reader, "general.architecture") == "lfm2"
    assert read_value(reader, "lfm2.attention.head_count_kv") == [0, 2, 0]
    assert read_value(reader, "lfm2.shortconv.l_cache") == 3
    assert list(tensors["blk.0.shortconv.conv.weight"].shape) == [3, 64]
    assert tensors["blk.0.shortconv.conv.weight"].tensor_type.name == "F32"
    assert read_value(reader, "lfm2.feed_forward_length") == tensors["blk.0.ffn_up.weight"].shape[1]
    assert "token_embd_norm.weight" in tensors


def test_such_a_file_is_no_base(job: ExportJob, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="cannot be converted to a base"):
        convert(get_model_path(job), tmp_path)


@pytest.mark.parametrize(
    ("family", "changed", "message"),
    [
        ("qwen3_moe", {"norm_topk_prob": False}, "norm_topk_prob: false"),
        ("qwen3_moe", {"mlp_only_layers": [0]}, "layers without experts"),
        # tensors that llama.cpp does not ask for, or of another shape: it loads no such file
        ("qwen3_moe", {"attention_bias": True}, "a bias of o_proj in a qwen3moe"),
        ("qwen3", {"attention_bias": True}, "a bias of o_proj in a qwen3"),
        ("lfm2", {"head_dim": 32}, "an lfm2 with 4 heads of 32 in hidden states of 64"),
        ("lfm2", {"conv_bias": True}, "the bias of convolutions"),
    ],
)
def test_what_a_gguf_cannot_express_is_refused(
    family: str, changed: dict[str, Any], message: str, tmp_path: Path
) -> None:
    spec = read_spec(save_model(tmp_path, family, **changed))
    with pytest.raises(InputError, match=message) as refused:
        build_architecture(load_config_dict(tmp_path), spec)
    assert "merged or peft" in (refused.value.fix or "")
