"""Files that name or divide parameters otherwise than the network: each is read to the bit, on
every family whose layers differ."""

import re
import shutil
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

from quick_families import leave_others_to_slow
from text_part_configs import make_multimodal_expert_configs
from tiny_models import CONFIGS, LORA, make_stock_network, make_tiny_network
from tunesmith.core.errors import InputError
from tunesmith.model.adapters import METHODS, find_linears, get_trainable_parameters
from tunesmith.model.causal_lm import load_network
from tunesmith.model.hub.families import UNIFORM_CLASSES
from tunesmith.model.hub.spec import read_model_headers, read_spec
from tunesmith.model.hub.stored_tensors import read_text_tensors
from tunesmith.model.merge import read_loras, write_merged_weights
from tunesmith.model.quantization import build_truncated_network
from tunesmith.model.save import save_adapter
from tunesmith.model.target_modules import is_transposed_linear, list_linear_paths
from tunesmith.model.text_network import check_weight_shapes

pytestmark = pytest.mark.filterwarnings(
    "ignore:.is_gradient_checkpointing. is deprecated:FutureWarning"
)  # PEFT's
WHOLE_CONFIGS = make_multimodal_expert_configs()
ADAPTED = re.compile(
    r".*language_model\.layers.*\.(self_attn\.\w_proj\.weight|experts\.(\d+\.)?\w+_proj(\.weight)?)"
)
RECURRENT = re.compile(
    r".*\.(A_log|dt_bias|D|o_norm\.weight|(linear_attn|mamba|mixer)\.norm\.weight)"
)
FAMILIES = [name for name, config in CONFIGS.items() if config.model_type not in UNIFORM_CLASSES]


@pytest.fixture(scope="module", params=leave_others_to_slow(FAMILIES))
def family(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def folder(family: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("stored") / family
    make_stock_network(family).save_pretrained(folder)
    return folder


def test_every_tensor_is_the_one_that_transformers_loads(folder: Path) -> None:
    theirs = AutoModelForCausalLM.from_pretrained(folder).state_dict()
    ours = load_network(folder, torch.float32).state_dict()
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        expected = tensor.t() if is_transposed_linear(name) else tensor
        assert torch.equal(ours[name], expected), name


def test_dtypes_in_bf16_are_those_of_transformers(folder: Path) -> None:
    """Biases of routers stay in fp32. So do decays and norms of recurrent layers, which these files
    hold in fp32: transformers rounds them, serving engines do not (test_text_network.py)."""
    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).state_dict()
    ours = load_network(folder, torch.bfloat16).state_dict()
    expected = {name: tensor.dtype for name, tensor in theirs.items()}
    expected |= dict.fromkeys(filter(RECURRENT.fullmatch, theirs), torch.float32)
    assert {name: tensor.dtype for name, tensor in ours.items()} == expected


def test_a_config_alone_promises_what_is_stored(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes((folder / "config.json").read_bytes())
    promised = {name: header.shape for name, header in read_model_headers(tmp_path).items()}
    stored = {name: header.shape for name, header in read_model_headers(folder).items()}
    assert promised == stored
    spec = read_spec(folder)
    assert read_spec(tmp_path).block_parameters == spec.block_parameters
    assert spec.active_parameters <= spec.block_parameters
    has_experts = any(".experts." in name for name in stored)
    assert has_experts == (spec.active_parameters < spec.block_parameters)


def test_linears_are_those_of_the_network(folder: Path) -> None:
    network = load_network(folder, torch.float32)
    paths = [
        path for path in list_linear_paths(read_model_headers(folder)) if ".experts" not in path
    ]
    linears = [path for path in find_linears(network) if ".experts" not in path]
    assert sorted(paths) == sorted(linears)


def test_the_first_layers_alone_run(folder: Path) -> None:
    network: Any = build_truncated_network(folder, torch.float32, 2, is_quantized=False)
    assert len(network.base_model.layers) == 2
    assert compute_logits(network).isfinite().all()


# ---------------------------------------------------------------- other forms of experts


def change_tensors(folder: Path, change: Callable[[dict[str, Tensor]], dict[str, Tensor]]) -> None:
    file = folder / "model.safetensors"
    save_file(change(load_file(file)), file, metadata={"format": "pt"})


@pytest.fixture
def qwen3_moe(tmp_path: Path) -> Path:
    make_tiny_network("qwen3_moe").save_pretrained(tmp_path)
    return tmp_path


def test_experts_in_one_tensor_are_read_as_well(qwen3_moe: Path) -> None:
    expected: Any = load_network(qwen3_moe, torch.float32)
    experts = {
        name: parameter.clone()
        for name, parameter in expected.named_parameters()
        if ".experts." in name
    }
    stored = read_text_tensors(qwen3_moe).parameters
    assert stored[next(iter(experts))].num_experts == 8

    def stack(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        rest = {name: tensor for name, tensor in tensors.items() if ".experts." not in name}
        return rest | experts

    change_tensors(qwen3_moe, stack)
    fused = load_network(qwen3_moe, torch.float32).state_dict()
    for name, tensor in expected.state_dict().items():
        assert torch.equal(fused[name], tensor)


def save_whole_model(config: Any, folder: Path) -> Path:
    """Save a multimodal checkpoint, every weight of which has an effect."""
    torch.manual_seed(0)
    whole = AutoModelForImageTextToText.from_config(config)
    for parameter in whole.parameters():
        parameter.data.normal_(0, 0.2)
    for name, buffer in whole.named_buffers():
        if name.endswith("layer_scalar"):
            buffer.fill_(0.7)
    whole.save_pretrained(folder)
    return folder


@pytest.fixture
def qwen3_vl_moe(tmp_path: Path) -> Path:
    """Return a multimodal checkpoint, whose files hold the experts transposed."""
    return save_whole_model(WHOLE_CONFIGS["qwen3_vl_moe-square"], tmp_path / "whole")


IDS = torch.randint(3, 80, (1, 21), generator=torch.Generator().manual_seed(5))


@torch.no_grad()
def compute_logits(network: Any) -> Tensor:
    return network(input_ids=IDS, use_cache=False).logits


def test_transposed_experts_of_a_multimodal_checkpoint(qwen3_vl_moe: Path) -> None:
    spec = read_spec(qwen3_vl_moe)
    assert (spec.model_type, spec.num_experts, spec.num_experts_per_token) == ("qwen3_moe", 4, 2)
    expected = compute_logits(AutoModelForImageTextToText.from_pretrained(qwen3_vl_moe).eval())
    logits = compute_logits(load_network(qwen3_vl_moe, torch.float32))
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-6)


def save_expert_adapter(base: Path, folder: Path) -> Any:
    """Save an adapter with an effect, and return the network that has it."""
    settings = LORA | {"lora_target_modules": ["attention", "experts"]}
    network = load_network(base, torch.float32)
    METHODS["lora"](network, settings)
    generator = torch.Generator().manual_seed(1)
    for parameter in get_trainable_parameters(network).values():
        parameter.data += 0.05 * torch.randn(parameter.shape, generator=generator)
    save_adapter(network, folder, settings, base)
    return network


def test_peft_loads_adapters_of_experts_on_the_whole_model(
    qwen3_vl_moe: Path, tmp_path: Path
) -> None:
    network = save_expert_adapter(qwen3_vl_moe, tmp_path / "adapter")
    parameters = get_trainable_parameters(network)
    whole: Any = AutoModelForImageTextToText.from_pretrained(qwen3_vl_moe).eval()
    before = compute_logits(whole)
    theirs = PeftModel.from_pretrained(whole, tmp_path / "adapter").eval()
    assert sum(".lora_" in name for name, _ in theirs.named_parameters()) == len(parameters)
    logits = compute_logits(theirs)
    torch.testing.assert_close(logits, compute_logits(network), rtol=1e-5, atol=1e-5)
    assert (logits - before).abs().max() > 0.01


def stack_experts(folder: Path) -> None:
    """Rewrite a multimodal checkpoint with the experts of a layer in one tensor, as some are
    published."""
    stacks = load_network(folder, torch.float32).named_parameters()
    experts = {
        name.replace("model.", "model.language_model.", 1): parameter.data.clone()
        for name, parameter in stacks
        if ".experts." in name
    }
    change_tensors(folder, lambda t: {n: t[n] for n in t if ".experts." not in n} | experts)


@pytest.mark.parametrize(
    "name",
    [
        "qwen3_vl_moe",
        *(
            pytest.param(name, marks=pytest.mark.slow)
            for name in (*WHOLE_CONFIGS, "qwen3_5_moe-stacked")
            if name != "qwen3_vl_moe"
        ),
    ],
)
def test_merged_experts_are_those_of_the_adapter_on_the_whole_model(
    name: str, tmp_path: Path
) -> None:
    """All else comes back byte for byte, in the layout of the files."""
    config = WHOLE_CONFIGS[name.removesuffix("-stacked")]
    base = save_whole_model(config, tmp_path / "whole")
    if name.endswith("-stacked"):
        stack_experts(base)
    network = save_expert_adapter(base, tmp_path / "adapter")
    loras = read_loras(tmp_path / "adapter", base)
    merged = tmp_path / "merged"
    merged.mkdir()
    shutil.copyfile(base / "config.json", merged / "config.json")
    write_merged_weights(base, loras, merged / "model.safetensors")
    before, after = (load_file(path / "model.safetensors") for path in (base, merged))
    assert {key: x.shape for key, x in before.items()} == {key: x.shape for key, x in after.items()}
    changed = [key for key in before if not torch.equal(before[key], after[key])]
    assert changed == [key for key in before if ADAPTED.fullmatch(key)]
    assert any("visual" in key or "vision_tower" in key for key in before)
    whole: Any = AutoModelForImageTextToText.from_pretrained(base).eval()
    logits = compute_logits(AutoModelForImageTextToText.from_pretrained(merged).eval())
    assert (logits - compute_logits(whole)).abs().max() > 0.01
    adapted = PeftModel.from_pretrained(whole, tmp_path / "adapter").eval()
    for expected in (adapted, network):
        torch.testing.assert_close(logits, compute_logits(expected), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda t: {n: v for n, v in t.items() if "layers.1.mlp.experts.5.up_proj" not in n},
            r"no model\.layers\.1\.mlp\.experts\.5\.up_proj\.weight",
        ),
        (
            lambda t: {n: v for n, v in t.items() if ".experts.7." not in n},
            r"gate_up_proj has shape \[7, 48, 48\], config.json says \[8, 48, 48\]",
        ),
        (
            lambda t: {n: v[:20].clone() if "experts.3.gate" in n else v for n, v in t.items()},
            r"differ: model\.layers\.0\.mlp\.experts\.3\.gate_proj\.weight is F32 \[20, 48\]",
        ),
        (
            lambda t: {n: v.long() if "0.mlp.experts.3.up" in n else v for n, v in t.items()},
            r"differ: model\.layers\.0\.mlp\.experts\.3\.up_proj\.weight is I64",
        ),
        (
            lambda t: t | {"model.layers.1.mlp.experts.down_proj": torch.zeros(8, 48, 24)},
            r"hold model\.layers\.1\.mlp\.experts\.down_proj twice, once expert by expert",
        ),
        (
            lambda t: {n: v for n, v in t.items() if "layers.0.mlp.gate." not in n},
            r"no model\.layers\.0\.mlp\.gate\.weight",
        ),
        (
            lambda t: {n: v for n, v in t.items() if "layers.1.self_attn.q_proj" not in n},
            r"no model\.layers\.1\.self_attn\.q_proj\.weight",
        ),
        (
            lambda t: {n: v.flatten() if "1.self_attn.o_proj" in n else v for n, v in t.items()},
            r"layers\.1\.self_attn\.o_proj\.weight has shape \[3072\], config.json says \[48, 64\]",
        ),
    ],
)
def test_missing_experts_are_refused_by_name(
    qwen3_moe: Path, change: Callable[[dict[str, Tensor]], dict[str, Tensor]], message: str
) -> None:
    change_tensors(qwen3_moe, change)
    with pytest.raises(InputError, match=message) as caught:
        check_weight_shapes(qwen3_moe)
    assert caught.value.fix
    with suppress(InputError):  # a plan may not notice it, and does not fail in another way
        read_spec(qwen3_moe)


@pytest.mark.parametrize("change", [Tensor.long, lambda v: v.transpose(1, 2).contiguous()])
def test_parts_of_a_convolution_that_differ_are_refused(
    change: Callable[[Tensor], Tensor], tmp_path: Path
) -> None:
    make_tiny_network("olmo_hybrid").save_pretrained(tmp_path)
    name = "model.layers.0.linear_attn.v_conv1d.weight"
    change_tensors(tmp_path, lambda t: t | {name: change(t[name])})
    with pytest.raises(InputError, match=r"parts .* differ: model\.layers\.0\..*conv1d\.weight"):
        read_spec(tmp_path)


@pytest.mark.parametrize(
    ("family", "name"),
    [
        ("glm4_moe", "model.layers.2.eh_proj.weight"),
        ("ernie4_5_moe", "model.mtp_block.0.mlp.up_proj.weight"),
    ],
)
def test_layers_that_predict_further_tokens_are_left_out(
    family: str, name: str, tmp_path: Path
) -> None:
    make_tiny_network(family).save_pretrained(tmp_path)
    before = read_spec(tmp_path)
    extra = torch.ones(7, 5)
    change_tensors(tmp_path, lambda t: t | {name: extra})
    after = read_spec(tmp_path)
    assert after.parameters == before.parameters
    assert (before.omitted_bytes, after.omitted_bytes) == (0, 4 * 35)
    check_weight_shapes(tmp_path)


def test_a_head_that_is_stored_beside_its_embedding(tmp_path: Path) -> None:
    """Mistral Small 3.1 has a head of its own, and a config whose default says otherwise."""
    make_tiny_network("lfm2").save_pretrained(tmp_path)
    embedding = load_file(tmp_path / "model.safetensors")["model.embed_tokens.weight"]
    for is_tied, head in ((True, embedding), (False, embedding + 1)):
        change_tensors(tmp_path, lambda t, head=head: t | {"lm_head.weight": head.clone()})
        assert read_spec(tmp_path).tie_word_embeddings == is_tied
        network = load_network(tmp_path, torch.float32)
        parameters = dict(network.named_parameters())
        assert ("lm_head.weight" in parameters) != is_tied
        expected = AutoModelForCausalLM.from_pretrained(tmp_path)
        assert torch.equal(compute_logits(network), compute_logits(expected.eval()))


def test_nan_in_a_tensor_is_named(tmp_path: Path) -> None:
    make_tiny_network("lfm2").save_pretrained(tmp_path)
    name = "model.layers.1.self_attn.q_proj.weight"
    change_tensors(tmp_path, lambda t: t | {name: t[name] * float("nan")})
    with pytest.raises(InputError, match=rf"{name} holds NaN"):
        load_network(tmp_path, torch.float32)
