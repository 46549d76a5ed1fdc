"""Configs of the newer families that are legal and rare: read for what the weights are, or refused
by name."""

import copy
import json
import sys
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForCausalLM
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from quick_families import leave_others_to_slow
from tiny_models import CONFIGS
from tunesmith.core.errors import InputError
from tunesmith.model.hub.config_values import ROPE_TYPES, check_rotation
from tunesmith.model.hub.families import find_family
from tunesmith.model.hub.spec import read_spec
from tunesmith.model.hub.transformers_families import find_causal_class
from tunesmith.model.text_network import check_weight_shapes

CAPPED = ("attn", "final")
SIZES = (
    *(("deepseek_v3", key) for key in ("v_head_dim", "n_shared_experts", "intermediate_size")),
    *(("qwen3_next", "linear_num_value_heads"), ("falcon_h1", "mamba_d_conv"), ("gpt2", "n_inner")),
    *(("gemma4", "hidden_size_per_layer_input"), ("llama", "num_hidden_layers")),
)


def save_changed(family: str, folder: Path, **changes: Any) -> Path:
    """Save random weights of a family with some values of its config changed."""
    config = copy.deepcopy(CONFIGS[family])
    for key, value in changes.items():
        setattr(config, key, value)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return folder


def edit_config(folder: Path, *removed: str, **changed: Any) -> None:
    path = folder / "config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    kept = {key: value for key, value in config.items() if key not in removed}
    path.write_text(json.dumps(kept | changed), encoding="utf-8")


@pytest.mark.parametrize("family", leave_others_to_slow(CONFIGS))
def test_the_words_of_the_layers_are_those_of_the_weights(family: str, tmp_path: Path) -> None:
    spec = read_spec(save_changed(family, tmp_path))
    assert spec.num_layers == len(spec.layer_mixers)


@pytest.mark.parametrize("family", ["qwen3_next", "lfm2_moe", "nemotron_h", "gemma4"])
def test_a_model_without_a_layer_of_experts_has_none(family: str, tmp_path: Path) -> None:
    spec = read_spec(save_changed(family, tmp_path))
    assert (spec.num_experts, spec.num_experts_per_token) == (0, 0)
    assert spec.active_parameters == spec.block_parameters


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors:UserWarning")
def test_a_shared_mlp_of_no_width_is_refused(tmp_path: Path) -> None:
    folder = save_changed("granitemoehybrid-experts", tmp_path, shared_intermediate_size=0)
    with pytest.raises(InputError, match=r"shared_mlp\.\w+\.weight holds no values"):
        read_spec(folder)


@pytest.mark.parametrize("family", ["granitemoehybrid", "granitemoehybrid-experts"])
def test_layers_that_the_config_calls_otherwise_are_refused(family: str, tmp_path: Path) -> None:
    """Without layer_types, transformers takes all layers of this type for recurrent ones."""
    folder = save_changed(family, tmp_path)
    edit_config(folder, "layer_types", "layers_block_type")
    with pytest.raises(InputError, match="says 0 attention layers, the weights have 1"):
        read_spec(folder)


PLAIN = {"rope_type": "default", "rope_theta": 100.0}
DYNAMIC = PLAIN | {"rope_type": "dynamic", "factor": 4.0}
PARTS = {"sliding_attention": PLAIN, "full_attention": PLAIN | {"rope_theta": 5000.0}}
STRANGE_PARTS = {"sliding_attention": PLAIN, "full_attention": DYNAMIC}
STRANGE_LAYERS = {"layer_types": ["full_attention", "retention", "full_attention"]}
WINDOWS = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 8}
NO_WINDOW = "sliding_window is 0: no token would see"
# family, changes of config.json, what the error says, a word of its fix
REFUSED: list[tuple[str, dict[str, Any], str, str]] = [
    *(
        (name, STRANGE_LAYERS, "transformers cannot load.*layer_types", "")
        for name in ("qwen3_5", "lfm2")
    ),
    ("qwen3_5", {"hidden_act": "gelu"}, "hidden_act is 'gelu', but recurrent", "silu"),
    ("nemotron_h", {"mamba_hidden_act": "gelu"}, "mamba_hidden_act is 'gelu', but rec", "silu"),
    # transformers then attends to all tokens alike, or fails
    *((name, {"sliding_window": 0}, NO_WINDOW, "") for name in ("mistral", "gpt_oss", "cwm")),
    ("starcoder2", {"sliding_window": 0}, NO_WINDOW, "null"),
    ("mixtral", {"sliding_window": 0, "layer_types": ["full_attention"] * 2}, NO_WINDOW, ""),
    *(
        (name, {"sliding_window": None}, "sliding_window is null", "full_attention")
        for name in ("gemma2", "gpt_oss", "granite_swa", "mellum")
    ),
    # transformers divides by it, and all logits are equal
    *(("gemma2", {f"{k}_logit_softcapping": 0.0}, "is 0.0: nothing", "null") for k in CAPPED),
    ("gemma4", {"final_logit_softcapping": 0.0}, "is 0.0: nothing is left", "null"),
    ("nanochat", {"final_logit_softcapping": 0.0}, "is 0.0: nothing is left", "null"),
    *(
        (name, WINDOWS | {"use_sliding_window": False}, "is off", "full_attention")
        for name in ("qwen2_moe", "qwen2", "qwen3", "smollm3")
    ),
    *((name, {key: -1}, f"{key} is -1, less than 0", f"correct {key}") for name, key in SIZES),
    # complex, or modules of their own, whose frequencies a pack would share
    *(
        (name, {"rope_parameters": DYNAMIC}, f"{name} with a rotation that depends", "rope_type")
        for name in ("deepseek_v2", "granite_swa", "granitemoe_swa")
    ),
    ("qwen3_5", {"linear_num_key_heads": 3}, "4 heads .* cannot share 3 keys", ""),
    ("qwen3_moe", {"num_experts_per_tok": 20}, "each token goes to 20 experts of 8", ""),
    ("gemma4-experts", {"top_k_experts": 20}, "each token goes to 20 experts of 6", ""),
    # transformers 5.24 slices the embeddings that are not there
    ("gemma4", {"hidden_size_per_layer_input": 0}, "num_kv_shared_layers and hidden_size_per", ""),
]


@pytest.mark.parametrize(("family", "changes", "message", "fix"), REFUSED)
def test_a_config_of_rare_values_is_refused_by_name(
    family: str, changes: dict[str, Any], message: str, fix: str, tmp_path: Path
) -> None:
    config = CONFIGS[family]
    config.save_pretrained(tmp_path)
    removed = [key for key, value in changes.items() if value is ...]
    changes = {key: value for key, value in changes.items() if value is not ...}
    described = find_family(config.model_type)
    assert described is not None
    names = [described.causal_class]
    edit_config(tmp_path, *removed, **{"architectures": names} | changes)
    with pytest.raises(InputError, match=message) as caught:
        read_spec(tmp_path)
    assert fix in caught.value.fix
    assert caught.value.fix


@pytest.mark.parametrize("family", ["gemma2", "mixtral", "nanochat"])
def test_null_is_no_window_and_no_cap(family: str, tmp_path: Path) -> None:
    folder = save_changed(family, tmp_path)
    key = "sliding_window" if family == "mixtral" else "final_logit_softcapping"
    edit_config(folder, **{key: None})
    assert read_spec(folder).model_type == family


@pytest.mark.parametrize("key", ["rope_parameters", "rope_scaling"])
def test_a_rotation_by_length_is_refused_of_one_kind_of_layers_too(key: str) -> None:
    with pytest.raises(InputError, match="deepseek_v2 with a rotation that depends on"):
        check_rotation({key: STRANGE_PARTS}, "deepseek_v2", "config.json")
    check_rotation({key: PARTS}, "deepseek_v2", "config.json")


@pytest.mark.parametrize("key", ["rope_type", "type"])
def test_an_unknown_rotation_is_refused_by_its_name(key: str) -> None:
    """transformers says KeyError when it builds the network, long after the plan."""
    for name in ROPE_TYPES:
        check_rotation({"rope_parameters": {key: name}}, "llama", "config.json")
    for text in (
        {"rope_scaling": {key: "spiral"}},
        {"rope_parameters": {"full_attention": {key: "spiral"}}},
    ):
        with pytest.raises(InputError, match="rope_type 'spiral' is unknown") as caught:
            check_rotation(text, "llama", "config.json")
        assert "known: default, linear, dynamic" in caught.value.fix


def test_the_older_name_of_longrope_is_known_for_phi3_only() -> None:
    text = {"rope_scaling": {"type": "su"}}
    check_rotation(text, "phi3", "config.json")
    with pytest.raises(InputError, match="rope_type 'su' is unknown"):
        check_rotation(text, "llama", "config.json")


def test_the_known_rotations_are_those_of_transformers() -> None:
    assert set(ROPE_INIT_FUNCTIONS) | {"default"} <= set(ROPE_TYPES)


@pytest.mark.parametrize("family", ["gemma3", "gemma4", "gemma4_unified", "lfm3", "mellum"])
def test_types_that_rotate_their_layers_otherwise_have_a_rotation_for_each_kind(
    family: str, tmp_path: Path
) -> None:
    config = CONFIGS[family].to_dict()
    assert set(config["rope_parameters"]) <= {"sliding_attention", "full_attention"}
    assert read_spec(save_changed(family, tmp_path)).num_layers


@pytest.mark.parametrize("name", ["InternLM3ForCausalLM", "LlamaForCausalLM"])
def test_a_type_may_name_its_class_or_the_one_that_transformers_builds(
    name: str, tmp_path: Path
) -> None:
    folder = save_changed("internlm3", tmp_path)
    edit_config(folder, architectures=[name])
    assert read_spec(folder).architecture == "LlamaForCausalLM"
    edit_config(folder, architectures=["Qwen3ForCausalLM"])
    with pytest.raises(InputError, match="a model of type internlm3 is a LlamaForCausalLM"):
        read_spec(folder)


@pytest.mark.parametrize(
    ("family", "key"),
    [("llama", "attention_bias"), ("glm4_moe", "attention_bias"), ("starcoder2", "use_bias")],
)
def test_biases_that_the_config_does_not_know_are_refused(
    family: str, key: str, tmp_path: Path
) -> None:
    """transformers leaves them out, so that nothing it is compared with would show it."""
    folder = save_changed(family, tmp_path)
    check_weight_shapes(folder)
    edit_config(folder, **{key: False})
    with pytest.raises(InputError, match=r"have .*\.bias, but by config\.json") as caught:
        check_weight_shapes(folder)
    assert key in caught.value.fix


def test_one_expert_is_counted(tmp_path: Path) -> None:
    folder = save_changed("qwen3_moe", tmp_path, num_experts=1, num_experts_per_tok=1)
    assert read_spec(folder).num_experts == 1


def test_layers_may_choose_different_numbers_of_experts(tmp_path: Path) -> None:
    """The files of Hunyuan-A13B have a number for each layer."""
    folder = save_changed("hunyuan_v1_moe", tmp_path, moe_topk=[2, 3])
    assert read_spec(folder).num_experts_per_token == 3


def test_attention_alone_may_have_another_activation(tmp_path: Path) -> None:
    assert read_spec(save_changed("lfm2", tmp_path / "lfm2")).model_type == "lfm2"
    layers = ["full_attention"] * 3
    qwen = save_changed("qwen3_5", tmp_path / "qwen", hidden_act="gelu", layer_types=layers)
    assert read_spec(qwen).model_type.startswith("qwen3_5")


def test_shared_keys_need_no_embeddings_in_a_model_without_them(tmp_path: Path) -> None:
    changes = {"hidden_size_per_layer_input": 0, "num_kv_shared_layers": 0}
    spec = read_spec(save_changed("gemma4", tmp_path, **changes))
    assert spec.per_layer_rows == 0


def test_tokens_end_where_the_smaller_table_ends(tmp_path: Path) -> None:
    spec = read_spec(save_changed("gemma4", tmp_path, vocab_size_per_layer_input=90))
    assert (spec.vocab_size, spec.token_rows) == (97, 90)
    edit_config(tmp_path, pad_token_id=90)
    with pytest.raises(InputError, match="pad_token_id 90 is not a token of the model"):
        read_spec(tmp_path)


def test_a_type_whose_code_needs_a_library_that_is_not_installed_has_no_class(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    kind = CONFIG_MAPPING["cohere2"]
    assert find_causal_class(kind) is not None
    monkeypatch.setitem(sys.modules, kind.__module__.replace("configuration", "modeling"), None)
    assert find_causal_class(kind) is None
