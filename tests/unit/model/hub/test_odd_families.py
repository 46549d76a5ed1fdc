"""Configs of the newer families that are legal and rare: read for what the weights are, or refused
by name."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from quick_families import leave_others_to_slow
from tiny_models import CONFIGS
from tunesmith.core.errors import InputError
from tunesmith.model.hub.config_values import ROPE_TYPES, check_rotation
from tunesmith.model.hub.spec import read_spec
from tunesmith.model.text_network import check_weight_shapes


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


@pytest.mark.parametrize("family", ["qwen3_moe", "qwen3_5", "granitemoehybrid", "lfm2"])
def test_layers_that_no_mixer_knows_are_refused_by_name(family: str, tmp_path: Path) -> None:
    folder = save_changed(family, tmp_path)
    edit_config(folder, layer_types=["full_attention", "retention", "full_attention"])
    message = rf"{CONFIGS[family].model_type} has layers.* retention:"
    with pytest.raises(InputError, match=message) as caught:
        read_spec(folder)
    assert caught.value.fix


@pytest.mark.parametrize(
    ("family", "key"),
    [("qwen3_5", "hidden_act"), ("falcon_h1", "hidden_act"), ("nemotron_h", "mamba_hidden_act")],
)
def test_recurrent_layers_with_another_activation_are_refused(
    family: str, key: str, tmp_path: Path
) -> None:
    folder = save_changed(family, tmp_path)
    edit_config(folder, **{key: "gelu"})
    with pytest.raises(InputError, match=rf"{key} is 'gelu', but recurrent layers") as caught:
        read_spec(folder)
    assert caught.value.fix


@pytest.mark.parametrize("family", ["llama", "olmo2", "qwen3"])
def test_a_window_that_a_type_ignores_is_no_reason_to_refuse_it(
    family: str, tmp_path: Path
) -> None:
    folder = save_changed(family, tmp_path)
    edit_config(folder, sliding_window=0, layer_types=None)
    assert read_spec(folder).model_type == family


@pytest.mark.parametrize("family", ["mistral", "starcoder2", "gpt_oss", "cwm"])
def test_a_window_of_no_tokens_is_refused(family: str, tmp_path: Path) -> None:
    """transformers then attends to all tokens alike, or fails."""
    folder = save_changed(family, tmp_path)
    edit_config(folder, sliding_window=0)
    with pytest.raises(InputError, match="sliding_window is 0: no token would see") as caught:
        read_spec(folder)
    assert ("null" in caught.value.fix) == (family == "starcoder2")


def test_words_of_layers_do_not_hide_a_window_of_all_layers(tmp_path: Path) -> None:
    CONFIGS["mixtral"].save_pretrained(tmp_path)
    edit_config(tmp_path, sliding_window=0, layer_types=["full_attention"] * 2)
    with pytest.raises(InputError, match="sliding_window is 0: no token would see another"):
        read_spec(tmp_path)


@pytest.mark.parametrize("family", ["gemma2", "gpt_oss", "granite_swa", "mellum"])
def test_layers_of_windows_need_one(family: str, tmp_path: Path) -> None:
    """transformers fails in the first forward."""
    CONFIGS[family].save_pretrained(tmp_path)
    edit_config(tmp_path, sliding_window=None)
    message = "layer_types has sliding_attention, but sliding_window is null"
    with pytest.raises(InputError, match=message) as caught:
        read_spec(tmp_path)
    assert "full_attention" in caught.value.fix


def test_a_window_that_transformers_leaves_to_the_kind_of_attention_is_refused(
    tmp_path: Path,
) -> None:
    """OLMoE's masks have no window, flash attention would have one."""
    folder = save_changed("olmoe", tmp_path)
    edit_config(folder, sliding_window=6)
    with pytest.raises(InputError, match="olmoe has a sliding_window of 6, which trans") as caught:
        read_spec(folder)
    assert "null" in caught.value.fix
    edit_config(folder, sliding_window=None)
    assert read_spec(folder).model_type == "olmoe"


@pytest.mark.parametrize(
    ("family", "key"),
    [
        ("gemma2", "attn_logit_softcapping"),
        ("gemma2", "final_logit_softcapping"),
        ("gemma4", "final_logit_softcapping"),
        ("nanochat", "final_logit_softcapping"),
    ],
)
def test_a_cap_of_zero_is_refused(family: str, key: str, tmp_path: Path) -> None:
    """transformers then divides by 0, and all logits are equal."""
    folder = save_changed(family, tmp_path)
    edit_config(folder, **{key: 0.0})
    with pytest.raises(InputError, match=rf"{key} is 0\.0: nothing is left") as caught:
        read_spec(folder)
    assert "null" in caught.value.fix
    edit_config(folder, **{key: None})
    read_spec(folder)


@pytest.mark.parametrize("family", ["qwen2_moe", "qwen2", "qwen3", "smollm3"])
def test_layers_of_windows_without_use_sliding_window_are_refused(
    family: str, tmp_path: Path
) -> None:
    """In Qwen2 MoE no token would see another, in SmolLM3 only masks have a window, and the others
    fail in the first forward."""
    folder = save_changed(family, tmp_path)
    edit_config(folder, use_sliding_window=False, sliding_window=8, layer_types=None)
    read_spec(folder)
    edit_config(folder, layer_types=["sliding_attention", "full_attention"])
    message = "layer_types has sliding_attention, but use_sliding_window is off"
    with pytest.raises(InputError, match=message) as caught:
        read_spec(folder)
    assert "use_sliding_window" in caught.value.fix
    edit_config(folder, use_sliding_window=True)
    read_spec(folder)


@pytest.mark.parametrize(
    ("family", "key"),
    [
        *(("deepseek_v3", key) for key in ("v_head_dim", "n_shared_experts", "intermediate_size")),
        *(("qwen3_next", key) for key in ("linear_num_value_heads", "num_key_value_heads")),
        *(("falcon_h1", key) for key in ("mamba_d_conv", "num_attention_heads")),
        *(("gemma4", key) for key in ("head_dim", "hidden_size_per_layer_input")),
        ("gpt2", "n_inner"),
        ("llama", "num_hidden_layers"),
    ],
)
def test_a_size_below_zero_is_refused_by_name(family: str, key: str, tmp_path: Path) -> None:
    """transformers builds tensors from it."""
    CONFIGS[family].save_pretrained(tmp_path)
    edit_config(tmp_path, **{key: -1})
    with pytest.raises(InputError, match=rf"{key} is -1, less than 0") as caught:
        read_spec(tmp_path)
    assert f"correct {key}" in caught.value.fix


@pytest.mark.parametrize(
    ("family", "key"),
    [
        ("llama", "head_dim"),
        ("qwen3", "head_dim"),
        ("qwen3_moe", "head_dim"),
        ("deepseek_v3", "qk_rope_head_dim"),
    ],
)
@pytest.mark.parametrize("size", [1, 3])
def test_heads_of_an_odd_size_cannot_be_rotated(
    family: str, key: str, size: int, tmp_path: Path
) -> None:
    """transformers takes a head of one value for one of two."""
    CONFIGS[family].save_pretrained(tmp_path)
    edit_config(tmp_path, architectures=["any"], **{key: size})
    with pytest.raises(InputError, match=rf"{key} is {size}, but a rotation turns") as caught:
        read_spec(tmp_path)
    assert f"correct {key}" in caught.value.fix


@pytest.mark.parametrize("family", ["deepseek_v2", "granite_swa", "granitemoe_swa"])
def test_rotations_that_cannot_be_chosen_by_document_are_refused(
    family: str, tmp_path: Path
) -> None:
    """One is complex; those of each base are modules of their own, whose frequencies a pack would
    share."""
    CONFIGS[family].save_pretrained(tmp_path)
    rotation = {"rope_type": "dynamic", "rope_theta": 100.0, "factor": 4.0}
    edit_config(tmp_path, architectures=["any"], rope_parameters=rotation)
    with pytest.raises(InputError, match=rf"{family} with a rotation that depends on") as caught:
        read_spec(tmp_path)
    assert "rope_type" in caught.value.fix


@pytest.mark.parametrize("key", ["rope_type", "type"])
def test_an_unknown_rotation_is_refused_by_its_name(key: str) -> None:
    """transformers says KeyError when it builds the network, long after the plan."""
    for name in ROPE_TYPES:
        check_rotation({"rope_parameters": {key: name}}, "llama", 16, "config.json")
    for text in (
        {"rope_scaling": {key: "spiral"}},
        {"rope_parameters": {"full_attention": {key: "spiral"}}},
    ):
        with pytest.raises(InputError, match="rope_type 'spiral' is unknown") as caught:
            check_rotation(text, "llama", 16, "config.json")
        assert "known: default, linear, dynamic" in caught.value.fix


def test_the_older_name_of_longrope_is_known_for_phi3_only() -> None:
    text = {"rope_scaling": {"type": "su"}}
    check_rotation(text, "phi3", 16, "config.json")
    with pytest.raises(InputError, match="rope_type 'su' is unknown"):
        check_rotation(text, "llama", 16, "config.json")


def test_the_known_rotations_are_those_of_transformers() -> None:
    assert set(ROPE_INIT_FUNCTIONS) | {"default"} <= set(ROPE_TYPES)


@pytest.mark.parametrize("rope_type", ["dynamic", "longrope"])
@pytest.mark.parametrize("key", ["rope_parameters", "rope_scaling"])
@pytest.mark.parametrize("family", ["deepseek_v2", "granite_swa", "granitemoe_swa"])
def test_such_rotations_are_refused_of_one_type_of_layers_too(
    family: str, key: str, rope_type: str
) -> None:
    plain = {"rope_type": "default", "rope_theta": 100.0}
    text = {key: {"sliding_attention": plain, "full_attention": plain | {"rope_type": rope_type}}}
    with pytest.raises(InputError, match=rf"{family} with a rotation that depends on"):
        check_rotation(text, family, 16, "config.json")
    check_rotation({key: {"full_attention": plain}}, family, 16, "config.json")


@pytest.mark.parametrize("key", ["rope_parameters", "rope_scaling"])
@pytest.mark.parametrize("family", ["granite_swa", "granitemoe_swa", "cwm", "qwen2"])
def test_a_rotation_for_each_kind_of_layers_is_refused_where_all_rotate_alike(
    family: str, key: str, tmp_path: Path
) -> None:
    """transformers takes the parts for parameters, and fails on what is missing."""
    CONFIGS[family].save_pretrained(tmp_path)
    plain = {"rope_type": "default", "rope_theta": 100.0}
    parts = {"sliding_attention": plain, "full_attention": plain | {"rope_theta": 5000.0}}
    edit_config(tmp_path, "rope_parameters", **{key: parts})
    message = rf"{family} rotates .* alike, but {key} has parts for full_attention, sliding_attent"
    with pytest.raises(InputError, match=message) as caught:
        read_spec(tmp_path)
    assert ("layer_rope_theta" in caught.value.fix) == family.endswith("_swa")


@pytest.mark.parametrize("family", ["gemma3", "gemma4", "gemma4_unified", "lfm3", "mellum"])
def test_types_that_rotate_their_layers_otherwise_have_a_rotation_for_each_kind(
    family: str, tmp_path: Path
) -> None:
    config = CONFIGS[family].to_dict()
    assert set(config["rope_parameters"]) <= {"sliding_attention", "full_attention"}
    assert read_spec(save_changed(family, tmp_path)).num_layers


def test_a_part_that_is_rotated_in_one_type_of_layers_may_be_of_an_odd_head() -> None:
    partial = {"full_attention": {"rope_type": "default", "partial_rotary_factor": 0.5}}
    check_rotation({"rope_parameters": partial}, "llama", 15, "config.json")
    with pytest.raises(InputError, match="head_dim is 15, but a rotation turns"):
        check_rotation({"rope_parameters": {"full_attention": {}}}, "llama", 15, "config.json")


def test_heads_that_are_not_rotated_may_have_an_odd_size(tmp_path: Path) -> None:
    gpt2 = save_changed("gpt2", tmp_path / "gpt2", n_embd=36, n_head=4)
    assert read_spec(gpt2).model_type == "gpt2"
    nemotron = save_changed("nemotron_h", tmp_path / "nemotron_h", head_dim=5)
    assert read_spec(nemotron).model_type == "nemotron_h"


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


def test_heads_that_cannot_share_keys_are_refused(tmp_path: Path) -> None:
    folder = save_changed("qwen3_5", tmp_path)
    edit_config(folder, linear_num_key_heads=3)
    with pytest.raises(InputError, match=r"4 heads .* cannot share 3 keys"):
        read_spec(folder)


def test_a_layer_with_too_few_experts_is_refused_while_planning(tmp_path: Path) -> None:
    folder = save_changed("qwen3_moe", tmp_path)
    file = folder / "model.safetensors"
    tensors = load_file(file)
    kept = {name: tensor for name, tensor in tensors.items() if "1.mlp.experts.7." not in name}
    save_file(kept, file, metadata={"format": "pt"})
    with pytest.raises(InputError, match=r"layers\.1\..*holds 7 experts, config\.json says 8"):
        read_spec(folder)


@pytest.mark.parametrize(
    ("family", "key"), [("qwen3_moe", "num_experts_per_tok"), ("gemma4-experts", "top_k_experts")]
)
def test_more_experts_per_token_than_there_are_is_refused(
    family: str, key: str, tmp_path: Path
) -> None:
    folder = save_changed(family, tmp_path)
    edit_config(folder, **{key: 20})
    with pytest.raises(InputError, match=r"each token goes to 20 experts of [68]"):
        read_spec(folder)


def test_shared_keys_without_embeddings_per_layer_are_refused(tmp_path: Path) -> None:
    """transformers 5.24 fails on such a model: it slices the embeddings that are not there."""
    folder = save_changed("gemma4", tmp_path, hidden_size_per_layer_input=0)
    with pytest.raises(InputError, match=r"num_kv_shared_layers .* hidden_size_per_layer_input 0"):
        read_spec(folder)


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
