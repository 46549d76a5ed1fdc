"""Modules trained in full beside an adapter: their gradient against the stock model, and PEFT
reading what is saved; and adapters of PEFT, of every kind that is read, computed as PEFT does."""

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel

from tiny_models import (
    LORA,
    collate_documents,
    compute_max_difference,
    compute_step_gradients,
    make_stock_network,
    make_tiny_documents,
    make_tiny_network,
)
from tunesmith.core.errors import InputError
from tunesmith.core.types import Batch, Document
from tunesmith.model.adapters import METHODS, get_trainable_parameters, scaled_adapter
from tunesmith.model.causal_lm import PackedCausalLM, load_network, wrap_model
from tunesmith.model.hub.adapter_config import AdapterFolder, read_adapter
from tunesmith.model.lm_head import compute_target_losses
from tunesmith.model.merge import merge_into_network, read_loras, read_saved_modules
from tunesmith.model.save import load_adapter, save_adapter, stock_with_adapter
from tunesmith.model.trained_modules import TrainedModules, get_trained_modules
from tunesmith.train.losses import sum_weights

pytestmark = [
    pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:Model has .tie_word_embeddings:UserWarning"),
    pytest.mark.filterwarnings("ignore:The following .*_pattern keys did not:RuntimeWarning"),
    pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to True:UserWarning"),
]  # PEFT's
DOCUMENT = make_tiny_documents()[3]
FAMILIES = ["llama", "llama-tied", "qwen3", "gemma3", "granite", "cohere"]
MODULES = [
    ["embed_tokens", "lm_head"],
    ["embed_tokens"],
    ["lm_head"],
    ["norm"],
    ["mlp", "model.norm"],
    ["layers.1.self_attn"],
    ["embed_tokens", "lm_head", "layernorm", "down_proj"],
]
# by default each list on one family, and what a tied head shares; all pairs in `make slow`
QUICK_PAIRS = {(FAMILIES[i % len(FAMILIES)], i) for i in range(len(MODULES))}
QUICK_PAIRS |= {("llama-tied", 0), ("llama-tied", 2)}
CASES = [
    pytest.param(family, modules, marks=() if (family, index) in QUICK_PAIRS else pytest.mark.slow)
    for family in FAMILIES
    for index, modules in enumerate(MODULES)
]


def adapted(
    family: str, modules: Sequence[str], dtype: torch.dtype = torch.float32, **settings: Any
) -> PackedCausalLM:
    """Return a wrapped model whose adapter and modules are not at their start."""
    network = make_tiny_network(family, dtype)
    METHODS["lora"](network, LORA | {"modules_to_save": modules} | settings)
    generator = torch.Generator().manual_seed(1)
    for parameter in get_trainable_parameters(network).values():
        parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)
    return wrap_model(network, dtype)


def trained(model: PackedCausalLM) -> TrainedModules:
    modules = get_trained_modules(model.network)
    assert modules is not None
    return modules


@torch.no_grad()
def logits(model: PackedCausalLM, batch: Batch | None = None) -> Tensor:
    batch = batch or collate_documents([DOCUMENT])
    return model.head.compute_logits(model.compute_hidden(batch))


@torch.no_grad()
def their_logits(network: torch.nn.Module, document: Document = DOCUMENT) -> Tensor:
    tokens = torch.from_numpy(document.tokens_L[:-1]).long()[None]
    return network(input_ids=tokens, use_cache=False).logits[
        0, collate_documents([document]).positions_S
    ]


# ---------------------------------------------------------------- training


def stock_gradients(network: PreTrainedModel, documents: Sequence[Document]) -> dict[str, Tensor]:
    """Return the gradients of all parameters for the mean loss of a step, by transformers."""
    network.requires_grad_(True)
    total = torch.zeros((), dtype=torch.float64)
    for document in documents:
        tokens = torch.from_numpy(document.tokens_L).long()
        out = network(input_ids=tokens[None, :-1], use_cache=False).logits[0]
        losses = cross_entropy(out, tokens[1:], reduction="none")
        total = total + (losses * torch.from_numpy(document.weights_L[1:])).sum()
    (total / sum_weights(documents)).backward()
    return {name: p.grad for name, p in network.named_parameters() if p.grad is not None}


@pytest.mark.parametrize(("family", "modules"), CASES)
def test_the_gradient_is_the_stock_models(family: str, modules: list[str]) -> None:
    """In fp64, over packs of several documents, with the adapter at zero."""
    documents = make_tiny_documents()
    network = make_tiny_network(family, torch.float64)
    METHODS["lora"](network, LORA | {"modules_to_save": modules})
    model = wrap_model(network, torch.float64)
    gradients: dict[str, Tensor] = {}
    parameters = trained(model).masters
    count = sum_weights(documents)
    batch = collate_documents(documents)
    losses_S = compute_target_losses(model.compute_hidden(batch), model.head, batch.targets_S)
    ((losses_S * batch.weights_S).sum() / count).backward()
    for name, parameter in parameters.items():
        assert parameter.grad is not None, name
        gradients[name] = parameter.grad.clone()
    theirs = stock_gradients(make_tiny_network(family, torch.float64), documents)
    wanted = {name: theirs[name] for name in gradients}
    assert compute_max_difference(gradients, wanted) < 5e-6
    model.network.zero_grad(set_to_none=True)
    _, packed = compute_step_gradients(model, documents, 64)
    ids = {id(parameter): name for name, parameter in parameters.items()}
    ours: dict[str, Tensor] = {}
    for key, parameter in get_trainable_parameters(model.network).items():
        if id(parameter) in ids:
            ours[ids[id(parameter)]] = packed[key]
    assert compute_max_difference(ours, wanted) < 5e-6


@pytest.mark.parametrize("modules", MODULES)
@pytest.mark.parametrize(
    ("family", "dtype"),
    [("llama", torch.float32), ("llama-tied", torch.bfloat16), ("gemma3", torch.float32)],
)
def test_at_scale_0_the_model_is_the_base(
    family: str, modules: list[str], dtype: torch.dtype
) -> None:
    model = adapted(family, modules, dtype)
    base = wrap_model(make_tiny_network(family, dtype), dtype)
    changed = logits(model)
    with scaled_adapter(model.network, 0):
        assert torch.equal(logits(model), logits(base))
    assert torch.equal(logits(model), changed)
    assert not torch.equal(changed, logits(base))
    half = adapted(family, modules, torch.float32)
    before = {name: p.detach().clone() for name, p in trained(half).masters.items()}
    with scaled_adapter(half.network, 0.5):
        base_network = make_tiny_network(family)
        for name, parameter in trained(half).masters.items():
            middle = (base_network.get_parameter(name) + before[name]) / 2
            torch.testing.assert_close(parameter.detach(), middle)
    assert all(torch.equal(p, before[name]) for name, p in trained(half).masters.items())


def test_a_linear_that_is_trained_in_full_has_no_adapter() -> None:
    model = adapted("llama", ["down_proj"])
    names = get_trainable_parameters(model.network)
    assert not [name for name in names if "down_proj.lora" in name]
    assert sum("lora_A" in name for name in names) == 2 * 6
    assert sum(name.endswith("down_proj.weight") for name in names) == 2


@pytest.mark.parametrize(
    ("modules", "message"),
    [
        (["emb_tokens"], "no module with weights has a path that ends in emb_tokens"),
        (["norm", "lmhead"], "ends in lmhead"),
    ],
)
def test_a_name_without_a_match_is_refused(modules: list[str], message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        adapted("llama", modules)
    assert "embed_tokens" in caught.value.fix


def test_a_linear_that_files_hold_transposed_is_refused() -> None:
    """PEFT would store its weight [I, O], which fits a square one either way."""
    with pytest.raises(InputError, match=r"transformer\.h\.0\.attn\.c_proj\.weight is stored"):
        adapted("gpt2", ["attn.c_proj"])
    assert trained(adapted("starcoder2", ["c_proj"])).masters, "others are not transposed"


# ---------------------------------------------------------------- files of ours


@pytest.mark.parametrize(
    ("family", "modules"),
    [
        *CASES,
        # the embedding has another name, or config.json does not say that the head is tied
        *(
            ("gpt2", modules)
            for modules in (["wte"], ["lm_head"], ["wte", "lm_head", "wpe", "ln_f"])
        ),
        *(("gpt2-scaled", modules) for modules in (["wte"], ["lm_head", "ln_1"])),
        ("gpt_neox", ["embed_in", "lm_head", "dense_4h_to_h"]),
        *(("starcoder2", modules) for modules in (["embed_tokens"], ["lm_head", "c_fc"])),
    ],
)
def test_peft_loads_the_modules_with_equal_logits(
    family: str, modules: list[str], tmp_path: Path
) -> None:
    model = adapted(family, modules)
    base = tmp_path / "base"
    make_stock_network(family).save_pretrained(base)
    settings = LORA | {"modules_to_save": modules}
    save_adapter(model.network, tmp_path / "adapter", settings, base)
    theirs = PeftModel.from_pretrained(make_stock_network(family), tmp_path / "adapter")
    torch.testing.assert_close(their_logits(theirs).float(), logits(model), rtol=1e-5, atol=1e-5)
    assert_read_as_theirs(tmp_path / "adapter", base, family, logits(model))


def assert_read_as_theirs(folder: Path, base: Path, family: str, expected: Tensor) -> AdapterFolder:
    """Assert that the loaded, the hooked and the merged network have the expected logits."""
    adapter = read_adapter(folder, base)
    network = make_tiny_network(family)
    METHODS["lora"](network, settings_of(adapter))
    load_adapter(network, adapter.weights_path)
    close: Callable[..., None] = torch.testing.assert_close
    close(logits(wrap_model(network, torch.float32)), expected, rtol=1e-4, atol=1e-4)
    hooked = load_network(base, torch.float32)
    before = their_logits(hooked)
    with stock_with_adapter(hooked, adapter):
        close(their_logits(hooked), expected, rtol=1e-4, atol=1e-4)
    assert torch.equal(their_logits(hooked), before)
    merge_into_network(hooked, {**read_loras(folder, base), **read_saved_modules(folder, base)})
    close(their_logits(hooked), expected, rtol=1e-3, atol=1e-3)
    return adapter


def settings_of(adapter: AdapterFolder) -> dict[str, Any]:
    return LORA | {
        "lora_r": adapter.rank,
        "lora_alpha": adapter.alpha,
        "use_rslora": adapter.use_rslora,
        "use_dora": adapter.use_dora,
        "lora_target_modules": adapter.target_modules,
        "modules_to_save": adapter.saved_modules,
        "rank_pattern": adapter.rank_pattern,
        "alpha_pattern": adapter.alpha_pattern,
    }


# ---------------------------------------------------------------- files of PEFT


def peft_adapter(family: str, folder: Path, **config: Any) -> tuple[Path, Path, torch.nn.Module]:
    """Save an adapter far from zero with PEFT; return it, its base and PEFT's model."""
    settings = {
        "r": 4,
        "lora_alpha": 6,
        "task_type": "CAUSAL_LM",
        "target_modules": "all-linear",
    } | config
    make_tiny_network(family).save_pretrained(folder / "base")
    network = get_peft_model(make_tiny_network(family), LoraConfig(**settings))
    generator = torch.Generator().manual_seed(7)
    for parameter in network.parameters():
        if parameter.requires_grad:
            noise = 0.2 * torch.randn(parameter.shape, generator=generator)
            parameter.data = parameter.data + noise
    network.save_pretrained(folder / "adapter")
    return folder / "adapter", folder / "base", network.eval()


PEFT_CONFIGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "rslora": {"use_rslora": True},
    "dora": {"use_dora": True},
    "dora and rslora": {"use_dora": True, "use_rslora": True},
    "fan_in_fan_out": {"fan_in_fan_out": True},
    "layers_to_transform": {"target_modules": ["q_proj", "up_proj"], "layers_to_transform": [1]},
    "regex": {"target_modules": r".*\.0\.(self_attn\.(q|k)_proj|mlp\.down_proj)"},
    "exclude_modules": {"exclude_modules": ["k_proj"]},
    "rank_pattern": {"rank_pattern": {"q_proj": 2, r"layers\.1\.mlp\.(up|gate)_proj": 7}},
    "alpha_pattern": {"alpha_pattern": {"^model.layers.0.mlp.up_proj": 40, "v_proj": 3.5}},
    "first pattern wins": {
        "rank_pattern": {r"0.*_proj": 3, "q_proj": 5},
        "alpha_pattern": {"layers.1.self_attn.o_proj": 1, "o_proj": 33, "_proj": 2},
    },
    "patterns, rslora": {
        "use_rslora": True,
        "rank_pattern": {"q_proj": 9, "down_proj": 1},
        "alpha_pattern": {"down_proj": 20},
    },
    "patterns, dora": {
        "use_dora": True,
        "rank_pattern": {"k_proj": 6},
        "alpha_pattern": {"k_proj": 20},
    },
    "names within names": {"rank_pattern": {"proj": 3, "gate_proj": 2, "layers.0.mlp": 5}},
    "head and embedding": {"modules_to_save": ["lm_head", "embed_tokens"]},
    "norms": {"modules_to_save": ["norm"]},
    "an MLP": {"target_modules": ["q_proj"], "modules_to_save": ["layers.0.mlp"]},
    "names of nothing": {"target_modules": ["q_proj"], "modules_to_save": ["norm", "wte"]},
    "everything": {
        "use_rslora": True,
        "target_modules": ["q_proj", "up_proj", "down_proj"],
        "rank_pattern": {"q_proj": 2},
        "alpha_pattern": {"up_proj": 5},
        "modules_to_save": ["input_layernorm", "v_proj"],
    },
}


@pytest.mark.parametrize("name", PEFT_CONFIGS)
def test_adapters_of_peft_are_computed_as_peft_does(name: str, tmp_path: Path) -> None:
    # Qwen2 has biases, which the odd half of the configs meets
    family = ("llama", "qwen2")[list(PEFT_CONFIGS).index(name) % 2]
    adapter, base, network = peft_adapter(family, tmp_path, **PEFT_CONFIGS[name])
    assert_read_as_theirs(adapter, base, family, their_logits(network))


def test_a_read_adapter_is_saved_as_it_was(tmp_path: Path) -> None:
    config = PEFT_CONFIGS["everything"]
    folder, base, network = peft_adapter("llama", tmp_path, **config)
    adapter = read_adapter(folder, base)
    own = make_tiny_network()
    METHODS["lora"](own, settings_of(adapter))
    load_adapter(own, adapter.weights_path)
    save_adapter(own, tmp_path / "again", settings_of(adapter), base)
    again = PeftModel.from_pretrained(make_tiny_network(), tmp_path / "again")
    torch.testing.assert_close(their_logits(again), their_logits(network), rtol=1e-5, atol=1e-5)
    restored = read_adapter(tmp_path / "again", base)
    assert (
        dataclasses.replace(
            restored, path=adapter.path, sha256=adapter.sha256, base_name=adapter.base_name
        )
        == adapter
    )


def test_a_head_that_peft_tied_is_read_and_one_that_differs_is_refused(tmp_path: Path) -> None:
    modules = ["embed_tokens", "lm_head"]
    folder, base, _ = peft_adapter("llama-tied", tmp_path, modules_to_save=modules)
    file = folder / "adapter_model.safetensors"
    weights = load_file(file)
    names = [f"base_model.model.{name}.weight" for name in ("model.embed_tokens", "lm_head")]
    weights[names[1]] = weights[names[0]].clone()
    save_file(weights, file)
    network = PeftModel.from_pretrained(make_tiny_network("llama-tied"), folder)
    assert_read_as_theirs(folder, base, "llama-tied", their_logits(network))
    save_file(weights | {names[1]: weights[names[0]] + 1}, file)
    with pytest.raises(InputError, match="lm_head and embed_tokens are one matrix") as caught:
        read_adapter(folder, base)
    assert "merge_and_unload" in caught.value.fix


@pytest.mark.parametrize("module", ["embed_tokens", "lm_head"])
def test_one_of_two_tied_matrices_is_refused(module: str, tmp_path: Path) -> None:
    folder, base, _ = peft_adapter("llama-tied", tmp_path, modules_to_save=[module])
    with pytest.raises(InputError, match=f"a different one for .*{module}"):
        read_adapter(folder, base)


def rewrite(folder: Path, change: Callable[[dict[str, Tensor]], dict[str, Tensor]]) -> None:
    file = folder / "adapter_model.safetensors"
    save_file(change(load_file(file)), file)


NORM = "base_model.model.model.norm.weight"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda w: {k: v for k, v in w.items() if k != NORM},
            "no base_model.model.model.norm.weight",
        ),
        (lambda w: w | {NORM: torch.ones(47)}, r"\[47\]; on this base it must be \[48\]"),
        (lambda w: w | {NORM: torch.ones(48).long()}, r"I64 \[48\]"),
        (lambda w: w | {NORM.replace(".weight", ".scale"): torch.ones(1)}, "not part of a LoRA"),
        (
            lambda w: w | {"base_model.model.lm_head.weight": torch.ones(97, 48)},
            "not part of a LoRA",
        ),
    ],
)
def test_modules_that_do_not_fit_the_base_are_refused(
    change: Callable[[dict[str, Tensor]], dict[str, Tensor]], message: str, tmp_path: Path
) -> None:
    folder, base, _ = peft_adapter("llama", tmp_path, modules_to_save=["model.norm"])
    rewrite(folder, change)
    with pytest.raises(InputError, match=message):
        read_adapter(folder, base)
