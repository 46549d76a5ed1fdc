"""Which layers `lora_target_modules` selects."""

from pathlib import Path

import pytest
from peft import LoraConfig
from peft.tuners.tuners_utils import _check_lora_target_modules_mamba, check_target_module_exists
from torch import nn
from transformers import PreTrainedConfig

from tiny_models import make_tiny_network
from tunesmith.core.errors import InputError
from tunesmith.model.adapters import find_linears
from tunesmith.model.hub.validate import TensorHeader, read_headers
from tunesmith.model.target_modules import (
    find_part,
    list_linear_paths,
    select_saved_parameters,
    select_targets,
)

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


@pytest.mark.parametrize(
    ("path", "part"),
    [
        ("self_attn.q_proj", "attention"),
        ("self_attn.kv_a_proj_with_mqa", "attention"),
        ("attn.c_proj", "attention"),
        ("attention.dense", "attention"),
        ("linear_attn.in_proj_qkv", "recurrent"),
        ("linear_attn.o_proj", "recurrent"),
        ("mamba.in_proj", "recurrent"),
        ("conv.out_proj", "recurrent"),
        ("mlp.up_proj", "mlp"),
        ("feed_forward.w2", "mlp"),
        ("shared_mlp.input_linear", "mlp"),
        ("mlp.shared_expert.gate_proj", "mlp"),
        ("mixer.shared_experts.up_proj", "mlp"),
        ("mixer.k_proj", "attention"),
        ("mixer.in_proj", "recurrent"),
        ("mixer.down_proj", "mlp"),
        ("mlp.experts", "experts"),
        ("mlp.experts.gate_up_proj", "experts"),
        ("mixer.experts", "experts"),
        ("mlp.gate", "router"),
        ("mlp.router", "router"),
        ("router.proj", "router"),
        ("mixer.gate", "router"),
        ("mlp.shared_expert_gate", "router"),
        ("per_layer_input_gate", ""),
    ],
)
def test_a_linear_belongs_to_a_part_of_its_layer(path: str, part: str) -> None:
    assert find_part(f"model.layers.3.{path}") == part


SPARSE_HYBRID = [
    f"model.layers.{path}"
    for path in (
        *("0.linear_attn.in_proj_qkv", "0.linear_attn.out_proj", "0.mlp.experts", "0.mlp.gate"),
        *("1.self_attn.q_proj", "1.mlp.shared_expert.up_proj", "1.mlp.shared_expert_gate"),
    )
]


@pytest.mark.parametrize(
    ("targets", "selected"),
    [
        ("attention", [4]),
        ("recurrent", [0, 1]),
        ("mlp", [5]),
        ("experts", [2]),
        ("all-linear", [0, 1, 4, 5]),
        (["attention", "mlp"], [4, 5]),
        (["all-linear", "experts"], [0, 1, 2, 4, 5]),
        (["experts", "q_proj"], [2, 4]),
        (r".*gate|.*\.up_proj", [5]),
    ],
)
def test_words_stand_alone_or_in_a_list_and_leave_routers_out(
    targets: str | list[str], selected: list[int]
) -> None:
    assert select_targets(SPARSE_HYBRID, targets) == [SPARSE_HYBRID[i] for i in selected]


@pytest.mark.parametrize("targets", ["experts", "recurrent", ["attention", "experts"]])
def test_a_word_that_a_model_has_no_layer_for_is_refused(targets: str | list[str]) -> None:
    word = targets if isinstance(targets, str) else targets[-1]
    with pytest.raises(InputError, match=f"no linear layer belongs to {word}"):
        select_targets(PATHS, targets)


@pytest.mark.parametrize("name", ["gate", "shared_expert_gate"])
def test_a_router_has_no_adapter_by_name_either(name: str) -> None:
    with pytest.raises(InputError, match=f"no linear layer is called {name}"):
        select_targets(SPARSE_HYBRID, [name])


@pytest.mark.parametrize("model_type", ["falcon_h1", "nemotron_h", "mamba2", "granitemoehybrid"])
def test_what_peft_refuses_to_load_is_no_target(model_type: str) -> None:
    paths = ["model.layers.0.mamba.in_proj", "model.layers.0.mamba.out_proj"]
    network = nn.Module()
    network.config = PreTrainedConfig()
    network.config.model_type = model_type
    try:
        _check_lora_target_modules_mamba(LoraConfig(), network, "out_proj")
    except ValueError:
        assert select_targets(paths, "all-linear", model_type) == paths[:1]
        with pytest.raises(InputError, match="PEFT could not load an adapter"):
            select_targets(paths, ["out_proj"], model_type)
    else:
        assert model_type == "granitemoehybrid"
        assert select_targets(paths, "all-linear", model_type) == paths


def test_experts_are_one_path_however_they_are_stored() -> None:
    shapes = {
        "model.layers.0.mlp.experts.gate_up_proj": (4, 6, 8),
        "model.layers.0.mlp.experts.down_proj": (4, 8, 3),
        "model.layers.1.mlp.experts.0.up_proj.weight": (3, 8),
        "model.layers.1.mlp.experts.1.up_proj.weight": (3, 8),
        "model.layers.1.mlp.gate.weight": (4, 8),
        "model.layers.1.self_attn.q_proj.weight": (8, 8),
        "model.layers.1.self_attn.q_norm.weight": (8,),
        "model.layers.1.conv.conv.weight": (8, 1, 3),
        "model.embed_tokens.weight": (9, 8),
    }
    headers = {name: TensorHeader(Path(), "F32", shape, 0, 0) for name, shape in shapes.items()}
    assert list_linear_paths(headers) == [
        "model.layers.0.mlp.experts",
        "model.layers.1.mlp.experts",
        "model.layers.1.self_attn.q_proj",
    ]


@pytest.mark.parametrize("text", ["q_proj", "attn", ".*q_prj", "\0", "self_attn"])
def test_what_matches_nothing_is_an_error_that_shows_a_path(text: str) -> None:
    with pytest.raises(InputError, match="no linear layer") as caught:
        select_targets(PATHS, text)
    assert caught.value.where == "lora_target_modules"
    assert "paths look like model.layers.0.self_attn.q_proj" in caught.value.fix
    assert "[down_proj, gate_proj" in caught.value.fix


def test_a_regular_expression_that_never_ends_is_ended() -> None:
    with pytest.raises(InputError, match=r"takes more than 0.3 s on 14 paths"):
        select_targets(PATHS, r"(([\w.])*)*!", seconds=0.3)


@pytest.mark.parametrize("module", ["experts", "gate", "down_proj", "mlp"])
def test_experts_and_routers_are_not_trained_in_full(module: str) -> None:
    names = [
        "model.layers.0.mlp.experts.down_proj",
        "model.layers.0.mlp.gate.weight",
        "model.layers.1.mlp.down_proj.weight",
    ]
    if module == "down_proj":
        selected = select_saved_parameters(names, [module], is_tied=False)
        assert selected == names[2:], "the experts' path does not end in it"
        return
    with pytest.raises(InputError, match="experts or to a router, which stay frozen"):
        select_saved_parameters(names, [module], is_tied=False)
