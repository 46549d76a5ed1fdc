"""Which layers get an adapter, how it is initialised, and how it is scaled."""

import pytest
import torch
from torch import Tensor, nn

from tiny_models import (
    LORA,
    collate_documents,
    compute_max_difference,
    compute_step_gradients,
    make_tiny_documents,
    make_tiny_model,
    make_tiny_network,
)
from tunesmith.core.errors import InputError
from tunesmith.model.adapters import (
    METHODS,
    add_lora,
    find_linears,
    find_lora_layers,
    get_trainable_parameters,
    make_all_trainable,
    scaled_adapter,
)
from tunesmith.model.causal_lm import PackedCausalLM, wrap_model
from tunesmith.model.lora import Fp32MasterLinear, LoraLinear


@torch.no_grad()
def hidden(model: PackedCausalLM) -> Tensor:
    return model.compute_hidden(collate_documents(make_tiny_documents()))


# ---------------------------------------------------------------- targets


@pytest.mark.parametrize(
    ("family", "per_layer"), [("llama", 7), ("llama-tied", 7), ("phi3", 4), ("gemma2", 7)]
)
def test_all_linears_are_those_of_the_layers(family: str, per_layer: int) -> None:
    paths = find_linears(make_tiny_network(family))
    assert len(paths) == 2 * per_layer
    assert all(path.startswith("model.layers.") for path in paths)


@pytest.mark.parametrize("name", ["qproj", "proj", "lm_head", "layers.7.mlp.up_proj"])
def test_an_unknown_target_is_an_error_that_lists_the_names(name: str) -> None:
    with pytest.raises(InputError, match=name) as caught:
        add_lora(make_tiny_network(), LORA | {"lora_target_modules": ["q_proj", name]})
    assert caught.value.where == "lora_target_modules"
    assert "down_proj, gate_proj, k_proj" in caught.value.fix


def test_only_targets_are_adapted_and_trained() -> None:
    model = make_tiny_model(lora_target_modules=["v_proj", "layers.0.mlp.down_proj"])
    adapted = [
        "model.layers.0.self_attn.v_proj",
        "model.layers.0.mlp.down_proj",
        "model.layers.1.self_attn.v_proj",
    ]
    assert list(find_lora_layers(model.network)) == adapted
    assert list(get_trainable_parameters(model.network)) == [
        f"{path}.{ab}" for path in adapted for ab in ("lora_A", "lora_B")
    ]


# ---------------------------------------------------------------- a new adapter


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_new_adapter_changes_nothing(dtype: torch.dtype) -> None:
    network = make_tiny_network(dtype=dtype)
    add_lora(network, LORA)
    assert torch.equal(
        hidden(wrap_model(network, dtype)), hidden(make_tiny_model(dtype=dtype, method=None))
    )


def test_scale_is_alpha_over_r_or_its_root() -> None:
    for rslora, scale in ((False, 6 / 4), (True, 6 / 2)):
        layers = find_lora_layers(make_tiny_model(use_rslora=rslora).network)
        assert {layer.scale for layer in layers.values()} == {scale}


def test_every_layer_starts_differently_and_by_the_seed() -> None:
    starts = []
    for seed in (3, 3, 4):
        network = make_tiny_network()
        add_lora(network, LORA | {"seed": seed})
        starts.append([layer.lora_A for layer in find_lora_layers(network).values()])
    assert all(
        torch.equal(actual, other) for actual, other in zip(starts[0], starts[1], strict=True)
    )
    assert not any(
        torch.equal(actual, other) for actual, other in zip(starts[0], starts[2], strict=True)
    )
    assert not torch.equal(starts[0][0], starts[0][1])


def test_before_or_after_adopting_is_the_same() -> None:
    for method in METHODS:
        networks = make_tiny_network(), make_tiny_network()
        METHODS[method](networks[0], LORA)
        before = wrap_model(networks[0], torch.float32)
        after = wrap_model(networks[1], torch.float32)
        METHODS[method](networks[1], LORA)
        for network in networks:
            for layer in find_lora_layers(network).values():
                layer.lora_B.data.fill_(0.01)
        (loss, gradients), (other_loss, others) = (
            compute_step_gradients(m, make_tiny_documents(), 50) for m in (before, after)
        )
        assert loss == other_loss
        assert compute_max_difference(gradients, others) == 0


# ---------------------------------------------------------------- full training


@pytest.mark.parametrize("family", ["llama", "llama-tied", "gemma2"])
def test_full_training_has_fp32_masters_of_everything(family: str) -> None:
    network = make_tiny_network(family, torch.bfloat16)
    names = {name: p.numel() for name, p in network.named_parameters()}
    make_all_trainable(network, {})
    model = wrap_model(network, torch.bfloat16)
    assert {
        name: p.numel() for name, p in get_trainable_parameters(network).items()
    } == names  # tied weights once
    assert {p.dtype for p in network.parameters()} == {torch.float32}
    assert sum(isinstance(m, Fp32MasterLinear) for m in network.modules()) == 14
    _, gradients = compute_step_gradients(model, make_tiny_documents(), 50)
    assert {g.dtype for g in gradients.values()} == {torch.float32}


def test_a_tied_weight_gets_both_of_its_gradients() -> None:
    """Embedding and head get gradients; equality with the stock model is in test_families."""
    _, gradients = compute_step_gradients(
        make_tiny_model("llama-tied", method="full"), make_tiny_documents(), 50
    )
    fed = collate_documents(make_tiny_documents()).tokens_T.unique()
    embedding = gradients["model.embed_tokens.weight"]
    assert (embedding.abs().sum(-1) > 0).all()  # the head's softmax reaches every row
    assert embedding[fed].norm() > 0


# ---------------------------------------------------------------- turned down


def test_factor_0_is_the_base_bitwise_and_1_the_adapter() -> None:
    for dtype in (torch.float32, torch.bfloat16):
        model, base = make_tiny_model(dtype=dtype), make_tiny_model(dtype=dtype, method=None)
        trained = hidden(model)
        with scaled_adapter(model.network, 0):
            assert torch.equal(hidden(model), hidden(base))
        with scaled_adapter(model.network, 1):
            assert torch.equal(hidden(model), trained)
        assert not torch.equal(trained, hidden(base))
        assert torch.equal(hidden(model), trained)


def test_factors_between_scale_the_adapter() -> None:
    model = make_tiny_model(dtype=torch.float64)
    with scaled_adapter(model.network, 0.5):
        half = hidden(model)
    for layer in find_lora_layers(model.network).values():
        layer.lora_B.data *= 0.5
    torch.testing.assert_close(hidden(model), half, rtol=1e-12, atol=1e-12)


def fails_inside(network: nn.Module) -> None:
    with scaled_adapter(network, 0), scaled_adapter(network, 0.5):
        raise KeyError


def test_scales_come_back_after_an_error() -> None:
    model = make_tiny_model()
    before = [layer.scale for layer in find_lora_layers(model.network).values()]
    with pytest.raises(KeyError):
        fails_inside(model.network)
    assert [layer.scale for layer in find_lora_layers(model.network).values()] == before
    assert isinstance(model.network.get_submodule("model.layers.0.mlp.up_proj"), LoraLinear)
