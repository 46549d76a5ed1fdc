"""Runs on the text part of a multimodal checkpoint: proven, trained, exported and put back."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from rich.console import Console
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText

from text_part_configs import make_multimodal_configs, make_multimodal_expert_configs
from tiny_runs import (
    make_chat_row,
    make_tiny_recipe,
    plan_recipe,
    save_model_folder,
    train,
    write_rows,
)
from tunesmith.cli.views.plan import render_plan
from tunesmith.core.errors import InputError
from tunesmith.core.events import CheckResult, TrainStep
from tunesmith.export.export import export_run
from tunesmith.model.causal_lm import load_network

pytestmark = [
    pytest.mark.promise,
    pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning"),
]
WHOLE_CONFIGS = make_multimodal_configs() | make_multimodal_expert_configs()
TOWER = re.compile("tower|projector|visual")
IDS = torch.randint(3, 90, (1, 21), generator=torch.Generator().manual_seed(5))


@pytest.fixture(
    scope="module",
    params=["gemma4", "mistral3", pytest.param("qwen3_vl_moe", marks=pytest.mark.slow)],
)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder of a whole model with one token per byte."""
    folder = save_model_folder(tmp_path_factory.mktemp("whole") / request.param)
    config: Any = WHOLE_CONFIGS[request.param]
    config.text_config.vocab_size = 259
    if request.param == "gemma4":
        config.text_config.vocab_size_per_layer_input = 259
    config.text_config.max_position_embeddings = 512
    torch.manual_seed(0)
    whole = AutoModelForImageTextToText.from_config(config)
    for parameter in whole.parameters():
        parameter.data.normal_(0, 0.1)
    whole.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def run_folder(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a run in which the proof has passed."""
    recipe = make_tiny_recipe(folder, tmp_path_factory.mktemp("run"))
    assert plan_recipe(recipe).model.tensor_prefix == "model.language_model."
    events = train(recipe)
    checks = [event for event in events if isinstance(event, CheckResult)]
    assert checks
    assert all(check.level != "stop" for check in checks), checks
    assert [event.step for event in events if isinstance(event, TrainStep)] == [1, 2, 3]
    return Path(str(recipe.output_dir))


@torch.no_grad()
def compute_logits(network: Any) -> torch.Tensor:
    return network(input_ids=IDS, use_cache=False).logits


def test_peft_loads_the_adapter_on_the_whole_model(folder: Path, run_folder: Path) -> None:
    whole: Any = AutoModelForImageTextToText.from_pretrained(folder).eval()
    before = compute_logits(whole)
    theirs = PeftModel.from_pretrained(whole, run_folder / "adapter").eval()
    stored = load_file(run_folder / "adapter" / "adapter_model.safetensors")
    applied = {name for name, _ in theirs.named_parameters() if ".lora_" in name}
    assert len(applied) == len(stored) > 0
    assert not torch.equal(compute_logits(theirs), before)


def test_the_merged_export_is_the_whole_model_again(
    folder: Path, run_folder: Path, tmp_path: Path
) -> None:
    export_run(run_folder, "merged", out=tmp_path / "merged")
    before = load_file(folder / "model.safetensors")
    after = load_file(tmp_path / "merged" / "model.safetensors")
    assert after.keys() == before.keys()
    towers = [name for name in before if TOWER.search(name)]
    assert towers
    assert all(torch.equal(before[name], after[name]) for name in towers)
    whole: Any = AutoModelForImageTextToText.from_pretrained(tmp_path / "merged").eval()
    base: Any = AutoModelForImageTextToText.from_pretrained(folder).eval()
    adapted = PeftModel.from_pretrained(base, run_folder / "adapter").eval()
    torch.testing.assert_close(compute_logits(whole), compute_logits(adapted), rtol=1e-4, atol=1e-4)
    text: Any = load_network(tmp_path / "merged", torch.float32)
    assert torch.equal(compute_logits(text), compute_logits(whole))


def test_a_gguf_is_refused_by_name(run_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="GGUF of") as caught:
        export_run(run_folder, "gguf", out=tmp_path / "gguf")
    assert "merged" in caught.value.fix


def test_the_plan_says_what_is_not_loaded(folder: Path, tmp_path: Path) -> None:
    console = Console(width=200, record=True)
    console.print(render_plan(plan_recipe(make_tiny_recipe(folder, tmp_path))))
    assert "text part only: " in console.export_text()


def test_rows_with_images_are_refused_by_number(folder: Path, tmp_path: Path) -> None:
    row = make_chat_row("what is this?", "a cat")
    row["messages"][0]["content"] = [
        {"type": "image_url", "image_url": {"url": "https://example.com/cat.png"}},
        {"type": "text", "text": "what is this?"},
    ]
    rows = write_rows(tmp_path / "rows.jsonl", [make_chat_row("a", "b"), row] * 2)
    with pytest.raises(InputError, match=r"rows\.jsonl:2.*the row has an image") as caught:
        train(make_tiny_recipe(folder, tmp_path / "strict", data=str(rows)))
    assert "--skip-invalid" in caught.value.fix
    plan = plan_recipe(
        make_tiny_recipe(folder, tmp_path / "lenient", data=str(rows), skip_invalid=True)
    )
    assert plan.data["data"].documents == 2


def test_new_tokens_have_no_row_in_the_second_table(folder: Path, tmp_path: Path) -> None:
    rows = write_rows(tmp_path / "rows.jsonl", [make_chat_row("a", "b <new>")] * 4)
    recipe = make_tiny_recipe(folder, tmp_path / "a", data=str(rows), add_tokens=["<new>"])
    if folder.name != "gemma4":
        assert plan_recipe(recipe).config.add_tokens == {"<new>": 259}
        return
    with pytest.raises(InputError, match="a second table of tokens"):
        plan_recipe(recipe)


def test_qlora_and_noise(folder: Path, tmp_path: Path) -> None:
    """The adapter of a 4-bit base, trained with noise on the embeddings."""
    recipe = make_tiny_recipe(folder, tmp_path, method="qlora", neftune_noise_alpha=5)
    events = train(recipe)
    assert sum(isinstance(event, TrainStep) for event in events) == 3
    config = json.loads((tmp_path / "run" / "adapter" / "adapter_config.json").read_text())
    assert all(path.startswith("model.language_model.layers.") for path in config["target_modules"])
