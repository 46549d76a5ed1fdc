"""On every family: a shared prefix computed once gives the same step, and branches do not see each
other."""

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from quick_families import leave_others_to_slow
from tiny_models import (
    CONFIGS,
    STOCK_NORMS,
    VOCABULARY,
    assert_unchanged,
    collate_documents,
    compute_max_difference,
    compute_mean_loss,
    compute_step_gradients,
    continue_document,
    make_branching_documents,
    make_tiny_document,
    make_tiny_model,
    select_targets,
)
from tunesmith.core.types import Batch
from tunesmith.data.collate import collate
from tunesmith.data.packing import count_computed_tokens, pack_step
from tunesmith.model.causal_lm import PackedCausalLM
from tunesmith.model.lm_head import measure_target_losses
from tunesmith.train.losses import merge_shared_targets, sum_weights

SINGLE_PACK, PACK_EACH = 10**6, 1


CASES = [*((family, "lora") for family in CONFIGS), ("llama-tied", "full")]


@pytest.fixture(scope="module", params=leave_others_to_slow(CASES), ids="-".join)
def case(request: pytest.FixtureRequest) -> tuple[PackedCausalLM, float]:
    """Return a model in fp64 and the tolerance of two exact computations: stock norms compute in
    fp32."""
    family, method = request.param
    return make_tiny_model(
        family, torch.float64, method=method
    ), 1e-6 if family in STOCK_NORMS else 1e-10


def owners_of(batch: Batch) -> list[set[int]]:
    """Return the documents of each segment."""
    ends = torch.tensor(batch.layout.starts) + torch.tensor(batch.layout.lengths)
    owners: list[set[int]] = [set() for _ in ends]
    for index in range(len(batch.ids)):
        last = int(batch.positions_S[batch.document_S == index].max())
        for segment in batch.layout.get_path(int((ends > last).nonzero()[0])):
            owners[segment].add(index)
    return owners


def test_the_tests_documents_share_something_at_every_depth() -> None:
    batch = collate_documents(make_branching_documents(), share=True)
    assert max(len(batch.layout.get_path(i)) for i in range(len(batch.layout.lengths))) == 3
    assert max(map(len, owners_of(batch))) == 6
    assert len(batch.tokens_T) < 0.7 * sum(map(len, make_branching_documents()))


def test_shared_equals_not_shared(case: tuple[PackedCausalLM, float]) -> None:
    """The loss is equal to 1e-12 with our norms, and so is every gradient."""
    model, tolerance = case
    loss, gradients = compute_step_gradients(
        model, make_branching_documents(), SINGLE_PACK, share=True
    )
    plain_loss, plain = compute_step_gradients(model, make_branching_documents(), SINGLE_PACK)
    assert abs(loss - plain_loss) <= (1e-12 if tolerance < 1e-6 else 1e-6) * plain_loss
    assert compute_max_difference(gradients, plain) <= tolerance


def test_no_partition_and_no_order_changes_the_shared_step(
    case: tuple[PackedCausalLM, float],
) -> None:
    model, tolerance = case
    documents = make_branching_documents()
    loss, gradients = compute_step_gradients(model, documents, SINGLE_PACK)
    for arranged, pack_length in (
        (documents[::-1], SINGLE_PACK),
        (documents, 100),
        (documents[::-1], 64),
    ):
        other_loss, other = compute_step_gradients(model, arranged, pack_length, share=True)
        assert abs(loss - other_loss) <= tolerance * loss
        assert compute_max_difference(other, gradients) <= tolerance


def test_every_document_has_a_separate_loss(case: tuple[PackedCausalLM, float]) -> None:
    model, tolerance = case
    documents = make_branching_documents()
    batch = collate_documents(documents, share=True)
    with torch.no_grad():
        losses_S = measure_target_losses(model.compute_hidden(batch), model.head, batch.targets_S)
        for index, id in enumerate(batch.ids):
            (document,) = {d.id: d for d in documents if d.id == id}.values()
            alone = collate_documents([document])
            expected = measure_target_losses(
                model.compute_hidden(alone), model.head, alone.targets_S
            )
            torch.testing.assert_close(
                losses_S[batch.document_S == index], expected, rtol=tolerance, atol=tolerance
            )


def test_no_gradient_reaches_another_branch(case: tuple[PackedCausalLM, float]) -> None:
    """d loss(document) / d embedding is exactly 0 outside of its path from the root, and nonzero on
    it."""
    model, _ = case
    batch, embedded = collate_documents(make_branching_documents(), share=True), []

    def as_leaf(_module: nn.Module, _inputs: object, output: Tensor) -> Tensor:
        embedded.append(output.detach().requires_grad_())
        return embedded[-1]

    owners, segment_T = (
        owners_of(batch),
        torch.repeat_interleave(torch.tensor(batch.layout.lengths)),
    )
    hook = model.network.get_input_embeddings().register_forward_hook(as_leaf)
    for index in range(len(batch.ids)):
        document_targets = select_targets(batch, index)
        compute_mean_loss(model, document_targets, 1.0).backward()
        felt = embedded.pop().grad[0].abs().sum(-1)
        is_visible = torch.tensor([index in owners[segment] for segment in segment_T.tolist()])
        is_visible &= batch.positions_T <= batch.positions_T[document_targets.positions_S].max()
        assert (felt[is_visible] > 0).all()
        assert not felt[~is_visible].any()
    hook.remove()
    model.network.zero_grad(set_to_none=True)


@torch.no_grad()
def test_other_tokens_in_a_branch_leave_all_others_bitwise_equal(
    case: tuple[PackedCausalLM, float],
) -> None:
    model, _ = case
    batch = collate_documents(make_branching_documents(), share=True)
    everything = dataclasses.replace(batch, positions_S=torch.arange(len(batch.tokens_T)))
    before, layout = model.compute_hidden(everything), batch.layout
    for segment, (start, length) in enumerate(zip(layout.starts, layout.lengths, strict=True)):
        tokens = batch.tokens_T.clone()
        tokens[start : start + length] = (tokens[start : start + length] + 7) % VOCABULARY
        after_change = model.compute_hidden(dataclasses.replace(everything, tokens_T=tokens))
        below = [segment in layout.get_path(i) for i in range(len(layout.lengths))]
        is_below = torch.repeat_interleave(torch.tensor(below), torch.tensor(layout.lengths))
        assert_unchanged(model, after_change[~is_below], before[~is_below])
        assert (after_change[is_below] != before[is_below]).any(-1)[:1].all()


# ---------------------------------------------------------------- what is counted


def test_a_shared_target_sums_the_weights_of_its_documents() -> None:
    prompt = make_tiny_document(30)
    documents = [continue_document(prompt, 30, 4, seed) for seed in range(3)]
    batch = collate_documents(documents, share=True)
    once, _ = merge_shared_targets(batch)
    assert float(once.weights_S.sum()) == sum_weights(documents)
    inside = once.positions_S < 29
    assert once.weights_S[inside].tolist() == [
        3 * w for w in prompt.weights_L[1:30][prompt.weights_L[1:30] > 0]
    ]
    assert (
        len(once.targets_S)
        < len(batch.targets_S)
        == sum(int((d.weights_L > 0).sum()) for d in documents)
    )
    assert len(set(zip(once.positions_S.tolist(), once.targets_S.tolist(), strict=True))) == len(
        once.targets_S
    )
    plain = collate_documents(documents)
    assert merge_shared_targets(plain)[0] is plain


def test_the_end_of_a_shared_part_predicts_a_token_for_each_branch() -> None:
    prompt = make_tiny_document(30)
    documents = [continue_document(prompt, 30, 1, seed) for seed in range(4)]
    for document in documents:
        document.weights_L[30] = 1
    batch = collate_documents(documents, share=True)
    assert (batch.positions_S == 29).sum() == 4
    model = make_tiny_model(dtype=torch.float64)
    assert model.compute_hidden(batch).shape[0] == len(batch.targets_S)
    loss, gradients = compute_step_gradients(model, documents, SINGLE_PACK, share=True)
    plain_loss, plain = compute_step_gradients(model, documents, SINGLE_PACK)
    assert loss == pytest.approx(plain_loss, rel=1e-12)
    assert compute_max_difference(gradients, plain) <= 1e-10


# ---------------------------------------------------------------- any trie, and narrow numbers

branches = st.lists(
    st.tuples(st.integers(0, 6), st.integers(1, 45), st.integers(1, 20)), min_size=1, max_size=7
)


@settings(max_examples=10, deadline=None)
@given(branches, st.integers(1, 150))
def test_any_trie_is_the_same_step(drawn: list[tuple[int, int, int]], pack_length: int) -> None:
    documents = [make_tiny_document(40)]
    for index, (parent, fed, length) in enumerate(drawn):
        documents.append(continue_document(documents[parent % len(documents)], fed, length, index))
    model = make_tiny_model("qwen2", torch.float64)
    loss, gradients = compute_step_gradients(model, documents, pack_length, share=True)
    plain_loss, plain = compute_step_gradients(model, documents, PACK_EACH)
    assert loss == pytest.approx(plain_loss, rel=1e-12)
    assert compute_max_difference(gradients, plain) <= 1e-10
    packs = pack_step(documents, pack_length, should_share=True)
    assert sum(count_computed_tokens(p) for p in packs) <= sum(
        len(collate(p).tokens_T) for p in pack_step(documents, 10**6)
    )


@pytest.mark.parametrize("family", ["llama-64", "qwen2", "gemma2", "olmo2"])
def test_in_bf16_sharing_adds_no_error(family: str) -> None:
    prompt = make_tiny_document(115, 1)
    documents = [
        *make_branching_documents(),
        *(continue_document(prompt, 101, 40 + 9 * seed, seed) for seed in range(4)),
    ]
    _, exact = compute_step_gradients(make_tiny_model(family, torch.float64), documents, PACK_EACH)
    model = make_tiny_model(family, torch.bfloat16)
    errors = []
    for share, pack_length in ((True, SINGLE_PACK), (False, PACK_EACH)):
        _, gradients = compute_step_gradients(model, documents, pack_length, share=share)
        difference = torch.cat(
            [(gradients[name].double() - exact[name]).flatten() for name in exact]
        )
        errors.append(
            float(difference.norm() / torch.cat([g.flatten() for g in exact.values()]).norm())
        )
    assert errors[0] <= 1.5 * errors[1]
    assert errors[1] < 0.1
