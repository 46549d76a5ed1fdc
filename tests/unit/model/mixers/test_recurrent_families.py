"""Families whose layers carry state: what the tests of all families do not cover."""

import copy
import dataclasses
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from torch import Tensor

import tiny_models
from expert_configs import RECURRENT_EXPERTS
from hybrid_configs import CONV_FAMILIES, HYBRID_TOLERANCES
from preflight_models import get_refusal, prepare_model
from tiny_models import (
    LENGTHS,
    LORA,
    collate_documents,
    compute_max_difference,
    compute_step_gradients,
    make_tiny_document,
    make_tiny_documents,
    make_tiny_model,
    make_tiny_network,
)
from tunesmith.core.types import PackLayout
from tunesmith.model.causal_lm import PackedCausalLM, load_network, wrap_model
from tunesmith.model.hub.spec import read_spec
from tunesmith.model.layers import MIXER_CLASSES, MIXERS
from tunesmith.model.mixers import convolution, gated_delta
from tunesmith.model.mixers.scan import ScanInputs, ScanShape
from tunesmith.model.paged_cache import BLOCK_TOKENS, CacheRow, PagedKVCache
from tunesmith.model.save import save_adapter
from tunesmith.train.preflight import run_preflight

RECURRENT = (*HYBRID_TOLERANCES, *CONV_FAMILIES)
FAMILIES = pytest.mark.parametrize("family", RECURRENT)
ALL_FAMILIES = pytest.mark.parametrize("family", [*RECURRENT, *RECURRENT_EXPERTS])
SCAN_FAMILIES = pytest.mark.parametrize("family", HYBRID_TOLERANCES)
# PEFT refuses an adapter for their out_proj
NO_OUT_PROJ = {"falcon_h1", "nemotron_h"}
EDGES = (130, 70, 64, 65, 3, 128, 1)  # of chunks
SINGLE_PACK, PACK_EACH = 10**6, 1

pytestmark = pytest.mark.filterwarnings(
    "ignore:.is_gradient_checkpointing. is deprecated:FutureWarning"
)  # PEFT's


def choose_targets(family: str) -> str:
    """Return all linears of the mixers that PEFT can adapt."""
    name = r"(?!out_proj)\w*proj\w*" if family in NO_OUT_PROJ else r"\w*proj\w*"
    return rf".*\.(linear_attn|self_attn|mamba|mixer|conv)\.{name}"


# ---------------------------------------------------------------- training


@FAMILIES
def test_every_stock_mixer_is_replaced(family: str) -> None:
    network = make_tiny_network(family)
    num_stock = sum(type(module).__name__ in MIXER_CLASSES for module in network.modules())
    wrap_model(network, torch.float32)
    assert not any(type(module).__name__ in MIXER_CLASSES for module in network.modules())
    assert sum(isinstance(module, MIXERS) for module in network.modules()) == num_stock > 0


@pytest.mark.parametrize("family", CONV_FAMILIES)
def test_a_short_convolution_is_the_stock_one(family: str) -> None:
    """The whole network compares to 5e-6 only, because stock norms compute in fp32."""
    network = make_tiny_network(family, torch.float64).requires_grad_(True)
    stock = next(m for m in network.modules() if MIXER_CLASSES.get(type(m).__name__))
    x = torch.randn(1, 31, 48, generator=torch.Generator().manual_seed(0)).double()
    leaves = [x.requires_grad_(), *stock.parameters()]
    out = MIXER_CLASSES[type(stock).__name__](stock)(x, layout=PackLayout((0,), (31,)))
    expected = stock(x)
    torch.testing.assert_close(out, expected, rtol=1e-10, atol=1e-10)
    direction = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).double()
    theirs = torch.autograd.grad(expected, leaves, direction)
    for actual, wanted in zip(torch.autograd.grad(out, leaves, direction), theirs, strict=True):
        torch.testing.assert_close(actual, wanted, rtol=1e-10, atol=1e-10)


@FAMILIES
def test_documents_at_the_edges_of_chunks(family: str) -> None:
    documents = make_tiny_documents(EDGES)
    model = make_tiny_model(family, torch.float64, method="full")
    loss, gradients = compute_step_gradients(model, documents, SINGLE_PACK)
    alone_loss, alone = compute_step_gradients(model, documents, PACK_EACH)
    assert abs(loss - alone_loss) < 1e-6 * alone_loss
    assert compute_max_difference(gradients, alone) < 1e-6


def measure_error(actual: Tensor, expected: Tensor) -> float:
    centered = expected - expected.mean(-1, keepdim=True)
    return float((actual - expected).norm() / centered.norm())


@ALL_FAMILIES
@torch.no_grad()
def test_plain_transformers_leaks_and_ours_does_not(family: str) -> None:
    """The stock network on the same pack, with the positions of each document, is wrong; so the
    documents are such that a leak would show."""
    documents = make_tiny_documents((70, 33, 97))
    batch = collate_documents(documents)
    everything = dataclasses.replace(batch, positions_S=torch.arange(len(batch.tokens_T)))
    network = make_tiny_network(family)
    alone = [
        network(input_ids=tokens[None], use_cache=False).logits[0]
        for tokens in batch.tokens_T.split(batch.layout.lengths)
    ]
    packed = network(
        input_ids=batch.tokens_T[None], position_ids=batch.positions_T[None], use_cache=False
    ).logits[0]
    model = wrap_model(network, torch.float32)
    ours = model.head.compute_logits(model.compute_hidden(everything))
    lengths = batch.layout.lengths
    for index, expected in enumerate(alone):
        if index:
            assert measure_error(packed.split(lengths)[index], expected) > 0.01
        assert measure_error(ours.split(lengths)[index], expected) < 1e-5
    single = []
    for name in batch.ids:
        batch = collate_documents([document for document in documents if document.id == name])
        batch = dataclasses.replace(batch, positions_S=torch.arange(len(batch.tokens_T)))
        single.append(model.head.compute_logits(model.compute_hidden(batch)))
    assert measure_error(ours, torch.cat(single)) < 1e-6


@pytest.mark.parametrize("family", ["qwen3_5", "granitemoehybrid", "lfm2"])
def test_in_bf16_packing_adds_no_error(family: str) -> None:
    documents = make_tiny_documents((*LENGTHS, 70, 90))
    _, exact = compute_step_gradients(make_tiny_model(family, torch.float64), documents, PACK_EACH)
    model = make_tiny_model(family, torch.bfloat16)
    errors = []
    for pack_length in (SINGLE_PACK, PACK_EACH):
        _, gradients = compute_step_gradients(model, documents, pack_length)
        flat = torch.cat([(gradients[name].double() - exact[name]).flatten() for name in exact])
        errors.append(float(flat.norm()))
    assert errors[0] <= 1.5 * errors[1]


@FAMILIES
def test_recomputed_layers_have_the_same_gradients(family: str) -> None:
    documents = make_tiny_documents()
    _, expected = compute_step_gradients(
        make_tiny_model(family, torch.float64), documents, SINGLE_PACK
    )
    model = make_tiny_model(family, torch.float64, gradient_checkpointing="full")
    model.network.train()
    _, gradients = compute_step_gradients(model, documents, SINGLE_PACK)
    assert compute_max_difference(gradients, expected) < 1e-9


@FAMILIES
@torch.no_grad()
def test_noise_of_zero_changes_no_embedding(family: str) -> None:
    model = make_tiny_model(family)
    batch = collate_documents([make_tiny_document(9)])
    noisy = dataclasses.replace(batch, embedding_noise_TH=torch.zeros(9, 48))
    assert torch.equal(model.compute_hidden(noisy), model.compute_hidden(batch))


@FAMILIES
def test_a_mixer_without_a_layout_is_an_error(family: str) -> None:
    model = make_tiny_model(family)
    mixer = next(module for module in model.network.modules() if isinstance(module, MIXERS))
    with pytest.raises(TypeError, match="layout"):
        mixer(hidden_states=torch.ones(1, 4, 48))


@FAMILIES
def test_peft_loads_the_adapter_on_the_stock_model(family: str, tmp_path: Path) -> None:
    settings = LORA | {"lora_target_modules": choose_targets(family)}
    model = make_tiny_model(family, **settings)
    document = make_tiny_document(31, first_target=1)
    batch = collate_documents([document])
    _, gradients = compute_step_gradients(model, [document], SINGLE_PACK)
    mixer_names = (".conv.", ".linear_attn.", ".mamba.", ".mixer.")
    assert any(part in name for name in gradients for part in mixer_names)
    assert all(gradient.abs().max() > 0 for gradient in gradients.values())
    with torch.no_grad():
        expected = model.head.compute_logits(model.compute_hidden(batch))
        save_adapter(model.network, tmp_path, settings, Path("base-model"))
        theirs = PeftModel.from_pretrained(make_tiny_network(family), tmp_path)
        logits = theirs(input_ids=batch.tokens_T[None], use_cache=False).logits[0]
    torch.testing.assert_close(logits[batch.positions_S], expected, rtol=1e-5, atol=1e-5)


# ---------------------------------------------------------------- the proof


@FAMILIES
def test_a_state_that_goes_on_into_the_next_document_is_refused(
    family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    scan_pack, convolve_pack = gated_delta.scan_pack, convolution.convolve_pack

    def join_documents(layout: PackLayout) -> PackLayout:
        return PackLayout((0,), (layout.num_tokens,))

    def leak_state(inputs: ScanInputs, shape: ScanShape, layout: PackLayout) -> Tensor:
        return scan_pack(inputs, shape, join_documents(layout))

    def leak_inputs(x: Tensor, weight: Tensor, bias: Tensor | None, layout: PackLayout) -> Tensor:
        return convolve_pack(x, weight, bias, join_documents(layout))

    assert run_preflight(*prepare_model(family))
    monkeypatch.setattr(gated_delta, "scan_pack", leak_state)
    monkeypatch.setattr(convolution, "convolve_pack", leak_inputs)
    assert "documents in a pack" in get_refusal(*prepare_model(family))


# ---------------------------------------------------------------- generation


# Two computations in fp32 (stock beside fp64: 7e-6); in fp64, some norms remain in fp32.
TOKEN_BOUNDS = {torch.float32: 1.5e-5, torch.float64: 1e-7}


def assert_near(hidden_BH: Tensor, expected_BH: Tensor) -> None:
    errors_B = (hidden_BH - expected_BH).norm(dim=-1) / expected_BH.norm(dim=-1)
    assert errors_B.max() < TOKEN_BOUNDS[hidden_BH.dtype]


@torch.no_grad()
def compute_whole(model: PackedCausalLM, tokens: list[int]) -> Tensor:
    """Return the final hidden states of a sequence in one forward."""
    layout = PackLayout((0,), (len(tokens),))
    model.set_layout(layout)
    return model._run_decoder(torch.tensor(tokens), torch.arange(len(tokens)), layout)


@pytest.mark.parametrize("dtype", TOKEN_BOUNDS)
@ALL_FAMILIES
def test_token_by_token_equals_one_forward(family: str, dtype: torch.dtype) -> None:
    model = make_tiny_model(family, dtype)
    model.network.eval()
    rows = [make_tiny_document(n + 14, n).tokens_L[: n + 14].tolist() for n in (75, 1, 64)]
    lengths = [75, 1, 64]
    cache = PagedKVCache(4, num_blocks=8)
    cache_rows = [cache.add_row() for _ in rows]
    prompts = [row[:n] for row, n in zip(rows, lengths, strict=True)]
    hidden = model.prefill(cache_rows, prompts, cache)
    expected = [compute_whole(model, row) for row in rows]
    ours: list[Tensor] = []
    theirs: list[Tensor] = []
    for step in range(14):
        wanted = torch.stack([y[n + step - 1] for y, n in zip(expected, lengths, strict=True)])
        assert_near(hidden, wanted)
        ours.append(hidden)
        theirs.append(wanted)
        tokens = [row[n + step] for row, n in zip(rows, lengths, strict=True)]
        hidden = model.decode_step(cache_rows, tokens, cache)
    whole = torch.stack(theirs)
    assert (torch.stack(ours) - whole).norm() < 1e-5 * whole.norm()


@pytest.mark.parametrize(
    ("family", "key"),
    [
        ("qwen3_5", "linear_conv_kernel_dim"),
        ("granitemoehybrid", "mamba_d_conv"),
        ("lfm2", "conv_L_cache"),
    ],
)
def test_a_convolution_of_one_tap_has_no_history(
    family: str, key: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = copy.deepcopy(tiny_models.CONFIGS[family])
    setattr(config, key, 1)
    monkeypatch.setitem(tiny_models.CONFIGS, family, config)
    test_token_by_token_equals_one_forward(family, torch.float32)
    test_documents_at_the_edges_of_chunks(family)


@FAMILIES
def test_states_follow_their_rows(family: str) -> None:
    """Prompts in chunks, also of one token, rows that leave and join, and rows in any order."""
    model = make_tiny_model(family, torch.float32)
    model.network.eval()
    rows = [make_tiny_document(n, n).tokens_L[:n].tolist() for n in (84, 30, 77, 9)]
    expected = [compute_whole(model, row) for row in rows]
    cache = PagedKVCache(3, num_blocks=8)
    cache_rows: dict[int, CacheRow] = {}

    def extend(**lengths: int) -> None:
        """Run the next tokens of some rows and compare the last hidden states."""
        order = [int(name[1:]) for name in lengths]
        for row in order:
            if row not in cache_rows:
                cache_rows[row] = cache.add_row()
        parts: list[list[int]] = []
        for row, length in zip(order, lengths.values(), strict=True):
            start = cache_rows[row].length
            parts.append(rows[row][start : start + length])
        hidden = model.prefill([cache_rows[row] for row in order], parts, cache)
        wanted = torch.stack([expected[row][cache_rows[row].length - 1] for row in order])
        assert_near(hidden, wanted)

    extend(_0=70, _1=1)
    extend(_1=1, _0=5)
    extend(_2=3, _1=20)
    extend(_0=1, _1=1, _2=1)
    extend(_2=1, _0=1)
    cache.drop_row(cache_rows[0])
    extend(_2=66, _1=1)
    extend(_3=1, _1=3)  # in the slot of row 0, whose state it does not see
    extend(_1=1, _3=1)
    extend(_2=1, _1=1, _3=1)


@FAMILIES
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_row_needs_the_state_bytes_that_are_predicted(family: str, dtype: torch.dtype) -> None:
    model = make_tiny_model(family, dtype, method=None)
    slots = 3
    cache = PagedKVCache(slots, num_blocks=2)
    model.prefill([cache.add_row()], [(5, 6, 7)], cache)
    states = [state for layer in cache._state_buffers.values() for state in layer]
    assert sum(state.nbytes for state in states) == slots * model.state_bytes_per_row > 0
    kv_bytes = sum(x.nbytes for layer in cache._kv_buffers.values() for x in layer)
    assert kv_bytes == 2 * BLOCK_TOKENS * model.cache_bytes_per_token > 0


def test_dense_families_have_no_state() -> None:
    model = make_tiny_model("qwen3")
    assert model.state_bytes_per_row == 0
    assert model.cache_bytes_per_token == 2 * 2 * 2 * 16 * 4


@SCAN_FAMILIES
def test_a_layer_of_a_step_saves_what_the_formula_says(family: str) -> None:
    """The mixer saves its projected input, what decides the decay, the read state and the gated
    norm's output: nothing of the size of a state or a chunk."""
    model = make_tiny_model(family, torch.float32)
    mixer = next(module for module in model.network.modules() if isinstance(module, MIXERS))
    saved: dict[int, int] = {}

    def note(x: Tensor) -> Tensor:
        saved[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    bytes_by_length = []
    for length in (64, 128):
        saved.clear()
        layout = PackLayout((0,), (length,))
        x = torch.randn(1, length, 48, requires_grad=True)
        with torch.autograd.graph.saved_tensors_hooks(note, lambda x: x):
            out = mixer(x, layout=layout)
        bytes_by_length.append(sum(saved.values()))
        del out
    per_token = (bytes_by_length[1] - bytes_by_length[0]) / 64 / 4
    shape = mixer.shape
    channels = mixer.conv1d.weight.shape[0]
    values = shape.num_heads * shape.value_size
    # convolution, gate, read, normed; beside them decays, strengths, and inputs of some linears
    expected = channels + 3 * values
    assert expected <= per_token <= 1.3 * expected + 16 * shape.num_heads + 40


# ---------------------------------------------------------------- the loader

DELTA_LAYERS = ("delta", "attention", "delta")
MAMBA2_LAYERS = ("mamba2", "attention", "mamba2")
LAYER_MIXERS = {
    **dict.fromkeys(("qwen3_5", "qwen3_next", "olmo_hybrid"), DELTA_LAYERS),
    "granitemoehybrid": MAMBA2_LAYERS,
    "falcon_h1": ("attention+mamba2", "attention+mamba2"),
    "nemotron_h": ("mamba2", "attention", ""),
    **dict.fromkeys(CONV_FAMILIES, ("conv", "attention", "conv")),
}


@FAMILIES
def test_a_saved_model_is_read_and_loaded(family: str, tmp_path: Path) -> None:
    """The plan knows the mixer of each layer, and the bytes that a row keeps."""
    network = make_tiny_network(family, torch.bfloat16)
    network.save_pretrained(tmp_path)
    spec = read_spec(tmp_path)
    assert spec.layer_mixers == LAYER_MIXERS[family]
    assert spec.recurrent is not None
    model = wrap_model(load_network(tmp_path, torch.bfloat16), torch.bfloat16)
    num_layers = sum(bool(set(mixer.split("+")) - {"attention", ""}) for mixer in spec.layer_mixers)
    assert num_layers * spec.recurrent.compute_state_bytes(2) == model.state_bytes_per_row
    parameters = dict(model.network.named_parameters())
    for name, parameter in make_tiny_network(family, torch.bfloat16).named_parameters():
        assert torch.equal(parameters[name], parameter)
