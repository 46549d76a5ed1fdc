"""The benchmark of GPUs runs: on a CPU, with a tiny config, which measures nothing."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": 300,
    "max_position_embeddings": 1024,
    "tie_word_embeddings": True,
}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return the folder of the config; benchmarks are imported from the checkout."""
    monkeypatch.syspath_prepend(str(ROOT))
    path = tmp_path / "tiny"
    path.mkdir()
    (path / "config.json").write_text(json.dumps(CONFIG))
    return path


@pytest.mark.parametrize("method", ["lora", "qlora"])
def test_our_side_measures_steps_and_predicts_memory(folder: Path, method: str) -> None:
    from benchmarks.gpu.tunesmith_side import run
    from benchmarks.gpu.work import Work

    if method == "qlora":
        pytest.importorskip("bitsandbytes")
    work = Work("tiny", method, 40, 128, str(folder), "cpu", seconds=0.0)
    result = run(work)
    assert result.problem == ""
    assert result.tokens_per_second > 0
    assert result.peak_bytes > 0
    assert result.predicted_bytes > 0


@pytest.mark.parametrize(
    ("name", "teraflops"),
    [
        ("NVIDIA L40S", 362),
        ("NVIDIA L4", 121),
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA GeForce RTX 4090", 165.2),
        ("Tesla T4", 0),
    ],
)
def test_the_rate_of_a_card_is_that_of_its_data_sheet(
    name: str, teraflops: float, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch
    from benchmarks.gpu.tunesmith_side import find_rate
    from benchmarks.gpu.work import Work

    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: name)
    work = Work("tiny", "lora", 40, 128, str(folder), "cuda", seconds=0.0)
    assert find_rate(work) == teraflops * 1e12


def test_every_work_has_its_line(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """In no time, nothing is measured, and the table says so."""
    from benchmarks.gpu import __main__ as benchmark

    arguments = ["--device", "cpu", "--config", str(folder / "config.json"), "--minutes", "0"]
    monkeypatch.setattr(sys, "argv", ["benchmarks.gpu", *arguments])
    assert benchmark.main() == 1
    lines = capsys.readouterr().out.splitlines()
    ours = [line for line in lines if "tunesmith  " in line]
    assert [line.split("tokens")[0].strip() for line in ours] == [
        *("tiny lora, 350", "tiny lora, 2,048", "tiny lora, 4,096"),
        *("tiny qlora, 350", "tiny qlora, 2,048", "tiny qlora, 4,096"),
    ]
    assert all(line.endswith("the time was used up") for line in ours)


def test_without_a_gpu_it_says_where_to_look(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import torch
    from benchmarks.gpu import __main__ as benchmark

    del folder
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", ["benchmarks.gpu"])
    assert benchmark.main() == 3
    assert "tunesmith doctor" in capsys.readouterr().err
