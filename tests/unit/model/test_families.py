"""On every family: packed = one document at a time = stock model, and no document influences
another."""

import dataclasses

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from expert_configs import RECURRENT_EXPERTS
from quick_families import QUICK_FAMILIES, leave_others_to_slow
from tiny_models import (
    CONFIGS,
    EXPERT_FAMILIES,
    HYBRID_CONFIGS,
    LENGTHS,
    STOCK_NORMS,
    STOCK_TOLERANCE,
    STOCK_TOLERANCES,
    VOCABULARY,
    assert_unchanged,
    collate_documents,
    compute_max_difference,
    compute_mean_loss,
    compute_step_gradients,
    make_stock_network,
    make_tiny_document,
    make_tiny_documents,
    make_tiny_model,
    make_tiny_network,
    select_targets,
)
from tunesmith.core.types import Document
from tunesmith.data.collate import collate
from tunesmith.data.packing import pack_step
from tunesmith.model.causal_lm import PackedCausalLM, compute_stock_logits, wrap_model
from tunesmith.model.layers import (
    ATTENTION_CLASSES,
    MLP_CLASSES,
    NORM_OFFSETS,
    RMSNorm,
    build_replacement,
)
from tunesmith.model.target_modules import is_transposed_linear
from tunesmith.train.losses import sum_weights

SINGLE_PACK, PACK_EACH = 10**6, 1
METHODS = ("lora", "full")
PRUNED_FAMILIES = (
    *("llama", "mistral", "qwen2", "qwen3", "granite", "internlm3", "iquestcoder", "qwen3_moe"),
    "mixtral",
)
CHUNK_EDGES = (130, 70, 64, 65, 3, 128, 1)  # of 32 tokens (ours) and of 64 (transformers')
RECURRENT_FAMILIES = (*HYBRID_CONFIGS, *RECURRENT_EXPERTS)
# their stock networks compute in fp64, but for norms that are ours
WIDE_FAMILIES = (
    *("llama", "llama-tied", "llama-64", "mistral", "qwen2", "qwen3", "gemma3", "granite"),
    *("olmo", "olmo2", "smollm3", "phi3", "apertus", "arcee", "bitnet", "cwm", "ministral3"),
    *("granite4", "phi", "starcoder2", "gpt2", "gpt2-scaled", "gpt_neox", "gpt_neox-sequential"),
    *("lfm2", "lfm3", "lfm2_moe", "lfm2_moe-experts"),
    *("qwen2_moe", "qwen3_moe", "olmoe", "mixtral", "gpt_oss", "flex_olmo", "granitemoe"),
    *("granitemoeshared", "minimax_m2", "internlm3", "nanochat"),
    *("hyperclovax", "iquestcoder", "jais2", "minicpm3", "persimmon"),
    *("cohere2_moe-sigmoid", "mellum"),
)
ROUTING_BIASES = ("e_score_correction_bias", "expert_bias")  # what a router counts, not learns
# experts are frozen, or have an adapter
EXPERT_METHODS = ("lora", "experts")
# by default full training on one family of each kind of mixer: its packs are those of LoRA
QUICK_FULL = ("llama", "gpt2", "qwen3_5", "lfm2", "nemotron_h")
CASES = [
    (family, method)
    for family in CONFIGS
    for method in (EXPERT_METHODS if family in EXPERT_FAMILIES else METHODS)
]
QUICK_CASES = [case for case in CASES if case[1] != "full" or case[0] in QUICK_FULL]
SLOW_CASES = [
    pytest.param(case, marks=pytest.mark.slow) for case in CASES if case not in QUICK_CASES
]


@pytest.fixture(
    scope="module", params=[*leave_others_to_slow(QUICK_CASES), *SLOW_CASES], ids="-".join
)
def case(request: pytest.FixtureRequest) -> tuple[PackedCausalLM, float]:
    """Return a model in fp64 and the tolerance of two exact computations: stock norms compute in
    fp32."""
    family, method = request.param
    tolerance = 1e-6 if family in STOCK_NORMS else 1e-10
    if method == "experts":
        targets = ["attention", "experts"]
        return make_tiny_model(family, torch.float64, lora_target_modules=targets), tolerance
    return make_tiny_model(family, torch.float64, method=method), tolerance


def make_trained_model(family: str) -> PackedCausalLM:
    """Return a model in fp64 of which everything is trained but experts, which never are."""
    if family not in EXPERT_FAMILIES:
        return make_tiny_model(family, torch.float64, method="full")
    model = make_tiny_model(family, torch.float64, method=None)
    for name, parameter in model.network.named_parameters():
        is_frozen = ".experts." in name or name.endswith(ROUTING_BIASES)
        parameter.requires_grad_(not is_frozen)
    return model


def widen_norms(network: nn.Module) -> None:
    """Replace the stock norms that compute in fp32 by ours, which compute in fp64."""
    for parent in list(network.modules()):
        for name, child in list(parent.named_children()):
            if type(child).__name__ in NORM_OFFSETS:
                setattr(parent, name, build_replacement(child))


def stock_gradients(
    family: str, documents: list[Document], *, has_wide_norms: bool = False
) -> tuple[float, dict[str, Tensor]]:
    """Return the loss and the gradient of every weight from transformers, one document at a
    time."""
    network = make_stock_network(family, torch.float64)
    if has_wide_norms:
        widen_norms(network)
    network.requires_grad_(True)
    count, total = sum_weights(documents), 0.0
    for document in documents:
        tokens_L, weights_L = (
            torch.from_numpy(document.tokens_L).long(),
            torch.from_numpy(document.weights_L),
        )
        logits = network(input_ids=tokens_L[None, :-1], use_cache=False).logits[0].double()
        losses = F.cross_entropy(logits, tokens_L[1:], reduction="none")
        loss = (losses * weights_L[1:].double()).sum() / count
        loss.backward()
        total += float(loss.detach())
    gradients = {name: p.grad for name, p in network.named_parameters() if p.grad is not None}
    for name in filter(is_transposed_linear, gradients):
        gradients[name] = gradients[name].t()
    return total, gradients


# ---------------------------------------------------------------- equal to the stock model


def compare_with_stock(
    family: str, documents: list[Document], *, has_wide_norms: bool = False
) -> tuple[float, float]:
    """Return how far one pack's loss, relative to it, and gradients are from transformers'."""
    expected_loss, expected = stock_gradients(family, documents, has_wide_norms=has_wide_norms)
    loss, gradients = compute_step_gradients(make_trained_model(family), documents, SINGLE_PACK)
    if family in EXPERT_FAMILIES:
        expected = {name: expected[name] for name in gradients}
    return abs(loss - expected_loss) / expected_loss, compute_max_difference(gradients, expected)


@pytest.mark.parametrize("family", leave_others_to_slow(CONFIGS))
def test_loss_and_every_gradient_equal_the_stock_model(family: str) -> None:
    tolerance = STOCK_TOLERANCES.get(family, STOCK_TOLERANCE)  # transformers' norms are fp32
    loss, gradients = compare_with_stock(family, make_tiny_documents())
    assert loss < 0.2 * tolerance
    assert gradients < tolerance


@pytest.mark.parametrize("family", leave_others_to_slow(RECURRENT_FAMILIES))
def test_documents_at_the_edges_of_chunks_equal_the_stock_model(family: str) -> None:
    tolerance = STOCK_TOLERANCES.get(family, STOCK_TOLERANCE)
    loss, gradients = compare_with_stock(family, make_tiny_documents(CHUNK_EDGES))
    assert loss < 0.2 * tolerance
    assert gradients < tolerance


@pytest.mark.parametrize("family", leave_others_to_slow(WIDE_FAMILIES))
def test_without_the_rounding_of_norms_gradients_are_equal(family: str) -> None:
    loss, gradients = compare_with_stock(family, make_tiny_documents(), has_wide_norms=True)
    assert loss < 0.2e-10
    assert gradients < 1e-10


@pytest.mark.parametrize("family", leave_others_to_slow(CONFIGS))
def test_logits_equal_the_stock_model(family: str) -> None:
    tokens = make_tiny_document(31).tokens_L[:31].tolist()
    network, places = make_tiny_network(family), [0, 5, 30]
    expected = compute_stock_logits(network, tokens, places)
    model = wrap_model(network, torch.float32)
    batch = dataclasses.replace(
        collate_documents([make_tiny_document(31)]), positions_S=torch.tensor(places)
    )
    torch.testing.assert_close(
        model.head.compute_logits(model.compute_hidden(batch)), expected, rtol=1e-4, atol=1e-4
    )


@pytest.mark.parametrize("family", leave_others_to_slow(CONFIGS))
def test_every_listed_class_is_replaced(family: str) -> None:
    """Norms of queries and keys are replaced too, inside of the attention module."""
    network = make_tiny_network(family)
    stock = {type(module).__name__ for module in network.modules()}
    model = wrap_model(network, torch.float32)
    class_names = {type(module).__name__ for module in model.network.modules()}
    assert not class_names & {*NORM_OFFSETS, *ATTENTION_CLASSES, *MLP_CLASSES}
    assert bool(stock & NORM_OFFSETS.keys()) == any(
        isinstance(module, RMSNorm) for module in model.network.modules()
    )
    assert model.is_pruned == (family.split("-")[0] in PRUNED_FAMILIES)


def test_quick_families_have_each_class_of_layer() -> None:
    """Whatever a family is wrapped with, `make test` meets it."""
    classes = {family: list_layer_classes(family) for family in CONFIGS}
    quick = set[type].union(*(classes[family] for family in QUICK_FAMILIES & CONFIGS.keys()))
    assert quick == set[type].union(*classes.values())


def list_layer_classes(family: str) -> set[type]:
    modules = wrap_model(make_tiny_network(family), torch.float32).network.modules()
    return {type(module) for module in modules if type(module).__module__.startswith("tunesmith")}


# ---------------------------------------------------------------- packed = alone


def test_packed_equals_documents_alone(case: tuple[PackedCausalLM, float]) -> None:
    model, tolerance = case
    loss, gradients = compute_step_gradients(model, make_tiny_documents(), SINGLE_PACK)
    alone_loss, alone = compute_step_gradients(model, make_tiny_documents(), PACK_EACH)
    assert abs(loss - alone_loss) <= tolerance * alone_loss
    assert compute_max_difference(gradients, alone) <= tolerance


def test_every_adapter_has_a_gradient(case: tuple[PackedCausalLM, float]) -> None:
    model, _ = case
    _, gradients = compute_step_gradients(model, make_tiny_documents(), SINGLE_PACK)
    assert not [name for name, x in gradients.items() if "lora_" in name and not x.any()]


def test_no_partition_and_no_order_changes_the_step(case: tuple[PackedCausalLM, float]) -> None:
    """1 x 8 = 8 x 1, and everything between."""
    model, tolerance = case
    documents = [*make_tiny_documents(), make_tiny_document(5, 40)]
    loss, gradients = compute_step_gradients(model, documents, SINGLE_PACK)
    shuffled = [
        documents[i]
        for i in torch.randperm(len(documents), generator=torch.Generator().manual_seed(2))
    ]
    for arranged, pack_length in (
        (documents, PACK_EACH),
        (documents, 20),
        (documents[::-1], 33),
        (shuffled, 50),
    ):
        other_loss, other = compute_step_gradients(model, arranged, pack_length)
        assert abs(loss - other_loss) <= tolerance * loss
        assert compute_max_difference(other, gradients) <= tolerance


def test_any_partition_by_hand_changes_nothing(case: tuple[PackedCausalLM, float]) -> None:
    """Any packing, not only the packer's: a step is the sum over its documents."""
    model, tolerance = case
    documents = make_tiny_documents()
    _, gradients = compute_step_gradients(model, documents, SINGLE_PACK)
    parameters, count = dict(model.network.named_parameters()), sum_weights(documents)
    for part in (documents[:2], documents[2:3], documents[3:]):
        compute_mean_loss(model, collate_documents(part), count).backward()
    summed = {name: parameters[name].grad for name in gradients}
    model.network.zero_grad(set_to_none=True)
    assert (
        compute_max_difference({name: g for name, g in summed.items() if g is not None}, gradients)
        <= tolerance
    )


# ---------------------------------------------------------------- blind


def test_no_gradient_reaches_another_document(case: tuple[PackedCausalLM, float]) -> None:
    """d loss(document j) / d embedding(token of document i) is exactly 0."""
    model, _ = case
    batch, embedded = collate_documents(make_tiny_documents()), []

    def as_leaf(_module: nn.Module, _inputs: object, output: Tensor) -> Tensor:
        embedded.append(output.detach().requires_grad_())
        return embedded[-1]

    hook = model.network.get_input_embeddings().register_forward_hook(as_leaf)
    for index, (start, length) in enumerate(
        zip(batch.layout.starts, batch.layout.lengths, strict=True)
    ):
        compute_mean_loss(model, select_targets(batch, index), 1.0).backward()
        felt = embedded.pop().grad[0].abs().sum(-1)
        assert (felt[start : start + length] > 0).all()
        felt[start : start + length] = 0
        assert not felt.any()
    hook.remove()
    model.network.zero_grad(set_to_none=True)


@torch.no_grad()
def test_other_tokens_elsewhere_leave_outputs_bitwise_equal(
    case: tuple[PackedCausalLM, float],
) -> None:
    """With experts equal up to rounding: a product of other rows may round a row otherwise."""
    model, _ = case
    batch = collate_documents(make_tiny_documents())
    before = model.compute_hidden(batch)
    for index, (start, length) in enumerate(
        zip(batch.layout.starts, batch.layout.lengths, strict=True)
    ):
        tokens = batch.tokens_T.clone()
        tokens[start : start + length] = (tokens[start : start + length] + 7) % VOCABULARY
        after, alone = (
            model.compute_hidden(dataclasses.replace(batch, tokens_T=tokens)),
            batch.document_S == index,
        )
        assert_unchanged(model, after[~alone], before[~alone])
        assert (after[alone] != before[alone]).any(-1).all()


def test_the_network_cannot_run_without_a_layout() -> None:
    """A plain transformers call without a layout is an error, with stock and with our modules."""
    ids = torch.ones(1, 4, dtype=torch.long)
    for family in ("llama", "olmo2", "qwen3_5", "lfm2", "falcon_h1"):
        model = make_tiny_model(family)
        with pytest.raises(TypeError, match="layout"):
            model.network(input_ids=ids)
        with pytest.raises(TypeError, match="layout"):
            model.network(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False)


# ---------------------------------------------------------------- narrow, and boundaries


@pytest.mark.parametrize("family", ["llama-64", "qwen2", "gemma2", "olmo2"])
def test_in_bf16_packing_adds_no_error(family: str) -> None:
    documents = [
        make_tiny_document(length, index) for index, length in enumerate((*LENGTHS, 70, 90))
    ]
    _, exact = compute_step_gradients(make_tiny_model(family, torch.float64), documents, PACK_EACH)
    model = make_tiny_model(family, torch.bfloat16)
    errors = []
    for pack_length in (SINGLE_PACK, PACK_EACH):
        _, gradients = compute_step_gradients(model, documents, pack_length)
        difference = torch.cat(
            [(gradients[name].double() - exact[name]).flatten() for name in exact]
        )
        errors.append(
            float(difference.norm() / torch.cat([g.flatten() for g in exact.values()]).norm())
        )
    assert errors[0] <= 1.5 * errors[1]
    assert errors[1] < 0.1


def test_targets_stay_inside_their_documents() -> None:
    """There are as many targets as tokens after the first ones; a first token is never a target."""
    documents = make_tiny_documents()
    batches = [collate(pack) for pack in pack_step(documents, 40)]
    assert sum(len(b.targets_S) for b in batches) == sum(
        int((d.weights_L[1:] > 0).sum()) for d in documents
    )
    for batch in batches:
        starts = torch.tensor(batch.layout.starts)[batch.document_S]
        lengths = torch.tensor(batch.layout.lengths)[batch.document_S]
        assert ((batch.positions_S >= starts) & (batch.positions_S < starts + lengths)).all()
