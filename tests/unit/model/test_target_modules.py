"""Which layers `lora_target_modules` selects."""

import time
from pathlib import Path

import pytest
from peft import LoraConfig
from peft.tuners.tuners_utils import check_target_module_exists

from tiny_models import make_tiny_network
from tunesmith.core.errors import InputError
from tunesmith.model.adapters import find_linears
from tunesmith.model.hub.validate import read_headers
from tunesmith.model.target_modules import list_linear_paths, select_targets

PATHS = list(find_linears(make_tiny_network()))
QUERIES = ["model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.q_proj"]


@pytest.mark.parametrize("family", ["llama-tied", "phi3", "gemma2", "qwen3"])
def test_the_files_of_a_model_tell_its_linears(family: str, tmp_path: Path) -> None:
    network = make_tiny_network(family)
    network.save_pretrained(tmp_path)
    assert sorted(list_linear_paths(read_headers(tmp_path))) == sorted(find_linears(network))


@pytest.mark.parametrize(
    ("family", "attention", "mlp"),
    [("llama", ("q_proj", "k_proj", "v_proj", "o_proj"), 3), ("phi3", ("o_proj", "qkv_proj"), 2)],
)
def test_words_are_blocks_of_a_layer(family: str, attention: tuple[str, ...], mlp: int) -> None:
    paths = list(find_linears(make_tiny_network(family)))
    first = select_targets(paths, "attention")
    assert {path.rpartition(".")[2] for path in first} == set(attention)
    assert len(select_targets(paths, "mlp")) == 2 * mlp
    assert select_targets(paths, "all-linear") == paths
    assert sorted(first + select_targets(paths, "mlp")) == sorted(paths)


def test_a_list_has_names_and_paths() -> None:
    assert select_targets(PATHS, ["q_proj"]) == QUERIES
    assert select_targets(PATHS, ["up_proj", "layers.1.self_attn.q_proj"]) == [
        "model.layers.0.mlp.up_proj",
        "model.layers.1.self_attn.q_proj",
        "model.layers.1.mlp.up_proj",
    ]
    assert select_targets(PATHS, [PATHS[3]]) == [PATHS[3]]


@pytest.mark.parametrize(
    "pattern", [r".*\.q_proj", r"model\.layers\.\d+\.self_attn\.q_proj", r".*\.1\.mlp\.\w+"]
)
def test_a_regular_expression_means_what_it_means_to_peft(pattern: str) -> None:
    config = LoraConfig(target_modules=pattern)
    theirs = [path for path in PATHS if check_target_module_exists(config, path)]
    assert select_targets(PATHS, pattern) == theirs != []


@pytest.mark.parametrize("text", ["q_proj", "attn", ".*q_prj", "\0", "self_attn"])
def test_what_matches_nothing_is_an_error_that_shows_a_path(text: str) -> None:
    with pytest.raises(InputError, match="no linear layer") as caught:
        select_targets(PATHS, text)
    assert caught.value.where == "lora_target_modules"
    assert "paths look like model.layers.0.self_attn.q_proj" in caught.value.fix
    assert "[down_proj, gate_proj" in caught.value.fix


def test_a_regular_expression_that_never_ends_is_ended() -> None:
    started = time.perf_counter()
    with pytest.raises(InputError, match=r"takes more than 0.3 s on 14 paths"):
        select_targets(PATHS, r"(([\w.])*)*!", seconds=0.3)
    assert time.perf_counter() - started < 5
