"""Adapters of experts for vLLM: every matrix has the name and the shape of one in the base's
files, and adding them there gives the model that PEFT loads from the run."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from tiny_export import save_model, save_run
from tiny_models import make_tiny_network
from tunesmith.cli import app
from tunesmith.core.errors import InputError
from tunesmith.export.export import export_run
from tunesmith.export.hf import name_experts
from tunesmith.export.servers import export_servers

pytestmark = pytest.mark.filterwarnings(  # PEFT reads the property
    "ignore:.is_gradient_checkpointing. is deprecated:FutureWarning"
)
IDS = torch.randint(3, 40, (1, 30), generator=torch.Generator().manual_seed(5))
ADAPTER = "adapter_model.safetensors"


@torch.no_grad()
def compute_logits(network: Any) -> Tensor:
    return network.eval()(input_ids=IDS, use_cache=False).logits


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("experts") / "base", "qwen3_moe")


@pytest.fixture(scope="module")
def run(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    targets = ["attention", "experts"]
    return save_run(tmp_path_factory.mktemp("run"), base, lora_target_modules=targets, lora_r=4)


@pytest.mark.promise
def test_vllm_gets_the_matrices_of_each_expert(run: Path, base: Path, tmp_path: Path) -> None:
    result = export_servers([run], "vllm", scale=0.5, out=tmp_path / "out")
    parity = result.runs[0].parity
    assert parity.same_answers == parity.prompts
    folder = tmp_path / "out" / "adapters" / run.name
    tensors = load_file(folder / ADAPTER)
    config = json.loads((folder / "adapter_config.json").read_text())
    assert config["target_modules"] == [
        *("down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj")
    ]
    assert "target_parameters" not in config

    stored = load_file(base / "model.safetensors")
    scale = config["lora_alpha"] / config["r"]
    for name in [name for name in tensors if name.endswith(".lora_A.weight")]:
        path = name.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
        delta = tensors[name.replace("lora_A", "lora_B")].float() @ tensors[name].float()
        stored[f"{path}.weight"] = stored[f"{path}.weight"].float() + scale * delta
    merged = tmp_path / "merged"
    merged.mkdir()
    (merged / "config.json").write_text((base / "config.json").read_text())
    save_file(stored, merged / "model.safetensors", metadata={"format": "pt"})
    ours = AutoModelForCausalLM.from_pretrained(merged, dtype=torch.float32)

    export_run(run, "peft", scale=0.5, out=tmp_path / "peft")
    stock = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    theirs = PeftModel.from_pretrained(stock, tmp_path / "peft")
    expected = compute_logits(theirs)
    torch.testing.assert_close(compute_logits(ours), expected, rtol=1e-5, atol=1e-5)
    plain = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    assert (compute_logits(plain) - expected).abs().max() > 0.01, "the adapter has an effect"


def test_the_verb_writes_this_form_too(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--to", "peft", "--type", "per-expert", "--out", str(tmp_path / "out"), "--json"]
    with pytest.raises(SystemExit) as ended:
        app.main(["export", str(run), *words])
    assert not ended.value.code
    assert json.loads(capsys.readouterr().out)["type"] == "per-expert"
    names = load_file(tmp_path / "out" / ADAPTER)
    assert "base_model.model.model.layers.1.mlp.experts.3.up_proj.lora_B.weight" in names


@pytest.mark.parametrize(
    ("family", "name"),
    [
        ("mixtral", "model.layers.1.block_sparse_moe.experts.2.w3"),
        ("olmoe", "model.layers.1.mlp.experts.2.up_proj"),
        ("deepseek_v3", "model.layers.1.mlp.experts.2.up_proj"),
    ],
)
def test_experts_are_called_as_in_the_files(family: str, name: str, tmp_path: Path) -> None:
    make_tiny_network(family).save_pretrained(tmp_path)
    names = name_experts(tmp_path)
    assert names["model.layers.1.mlp.experts.2.up_proj"] == name
    assert set(names.values()) < {key.removesuffix(".weight") for key in load_names(tmp_path)}


def load_names(folder: Path) -> set[str]:
    return set(load_file(folder / "model.safetensors"))


@pytest.mark.parametrize("family", ["gpt_oss", "granitemoehybrid-experts"])
def test_experts_in_one_tensor_have_no_names(family: str, tmp_path: Path) -> None:
    make_tiny_network(family).save_pretrained(tmp_path)
    assert name_experts(tmp_path) == {}


def test_what_this_form_cannot_hold_is_refused(run: Path, finished: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no adapters of experts"):
        export_run(finished, "peft", kind="per-expert", out=tmp_path / "a")
    with pytest.raises(InputError, match="SGLang does not support adapters of experts") as caught:
        export_servers([run], "sglang", out=tmp_path / "b")
    assert "--to merged" in caught.value.fix
