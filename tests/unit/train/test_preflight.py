"""The proof passes where all is well, on every family, and names each broken thing."""

import dataclasses
from collections.abc import Sequence
from itertools import cycle
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import Phi3Config

import rotary_configs
from preflight_models import get_refusal, prepare_model, prepare_sharing_model
from quick_families import leave_others_to_slow
from tiny_models import (
    CONFIGS,
    END,
    EXPERT_FAMILIES,
    SIZES,
    WINDOW,
    continue_document,
    make_tiny_document,
    make_tiny_documents,
)
from tunesmith.core.errors import GateError
from tunesmith.core.events import CheckResult
from tunesmith.core.types import Batch, Document, Pack, PackLayout
from tunesmith.data.collate import Device
from tunesmith.data.packing import count_input_tokens
from tunesmith.model.adapters import METHODS
from tunesmith.model.attention import BACKENDS, AttentionConfig, reference_attention
from tunesmith.model.causal_lm import PackedCausalLM
from tunesmith.model.rotary import DocumentRotary
from tunesmith.session import preflight_probe as probe_module
from tunesmith.session.preflight_probe import (
    PreflightSamples,
    RoleMask,
    Subject,
    TokenIdCheck,
    WindowedText,
    choose_documents,
    choose_sharing_documents,
    find_siblings,
    mark_longer,
    pack_with_sharing,
)
from tunesmith.train import preflight
from tunesmith.train.preflight import CHECKS, Check, run_preflight

# ---------------------------------------------------------------- all is well


def test_a_run_without_shared_prefixes_has_no_check_of_them() -> None:
    model, samples = prepare_model()
    verdicts = run_preflight(model, samples)
    assert len(verdicts) == 1 + sum(check.applies(Subject(model, samples)) for check in CHECKS)
    assert "prefix-shared loss = unshared loss" not in {verdict.kind for verdict in verdicts}


@pytest.mark.parametrize("family", leave_others_to_slow(CONFIGS))
def test_the_proof_passes_on_every_family(family: str) -> None:
    verdicts = {verdict.kind: verdict for verdict in run_preflight(*prepare_sharing_model(family))}
    assert {verdict.level for verdict in verdicts.values()} == {"ok"}
    assert verdicts["negative controls"] is list(verdicts.values())[-1]
    isolation = "isolated " if family in EXPERT_FAMILIES else "isolated bitwise"
    assert isolation in verdicts["prefix-shared loss = unshared loss"].evidence
    assert "attends to its sibling" in verdicts["negative controls"].evidence


BF16_FAMILIES = ["llama-64", "gemma2", "granite", "olmo2"]


@pytest.mark.parametrize(
    ("family", "method"), list(zip(BF16_FAMILIES, cycle(METHODS), strict=False))
)
def test_the_proof_passes_in_bf16(family: str, method: str) -> None:
    assert run_preflight(*prepare_model(family, torch.bfloat16, method=method))


def test_the_proof_leaves_the_model_as_it_is() -> None:
    model, samples = prepare_model(method="full")
    before = {name: p.detach().clone() for name, p in model.network.named_parameters()}
    run_preflight(model, samples)
    assert all(
        torch.equal(p, before[name]) and p.grad is None
        for name, p in model.network.named_parameters()
    )


@pytest.mark.parametrize(
    "candidates",
    [
        [make_tiny_document(12)],
        [make_tiny_document(12, first_target=12)],
        [make_tiny_document(3, first_target=3), make_tiny_document(3, first_target=3)],
        [make_tiny_document(1, seed) for seed in range(5)],
    ],
    ids=["one row", "one row with one target", "equal rows with one target", "rows of one token"],
)
def test_few_and_small_rows_are_proven_too(candidates: list[Document]) -> None:
    assert run_preflight(*prepare_model(candidates=candidates))


# ---------------------------------------------------------------- the choice of documents


def test_a_truncated_document_is_chosen_if_it_is_the_longest() -> None:
    complete, truncated = make_tiny_documents((4, 9)), make_tiny_documents((7, 30, 12))
    (longest,) = mark_longer(truncated, complete)
    assert len(longest) == 31
    assert mark_longer(truncated, make_tiny_documents((30,))) == mark_longer([], complete) == []
    unfinished = dataclasses.replace(longest, tokens_L=np.where(longest.tokens_L == END, 3, 4))
    model, samples = prepare_model(candidates=[*complete, unfinished])
    assert run_preflight(model, samples)


def test_one_rotation_for_a_pack_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Longrope: the longest document of a pack decided how the others are rotated."""
    factors = {"short_factor": [1.0] * 6, "long_factor": [3.0] * 6}
    rope = {"rope_type": "longrope", "rope_theta": 100.0, "original_max_position_embeddings": 32}
    config = Phi3Config(
        **SIZES, rope_parameters=rope | factors, original_max_position_embeddings=32
    )
    monkeypatch.setitem(CONFIGS, "phi3-longrope", config)
    model, samples = prepare_model(
        "phi3-longrope", candidates=make_tiny_documents((5, 6, 7, 8, 9, 90))
    )
    assert all(result.level == "ok" for result in run_preflight(model, samples))

    def set_longest(self: DocumentRotary, lengths: Sequence[int], segments: Sequence[int]) -> None:
        self._lengths, self._segment_lengths = (max(lengths),) * len(lengths), tuple(segments)

    monkeypatch.setattr(DocumentRotary, "set_lengths", set_longest)
    with pytest.raises(GateError, match="packed loss"):
        run_preflight(model, samples)


def test_a_window_needs_a_document_longer_than_itself() -> None:
    short = make_tiny_documents((3, 4, 5))
    assert all(count_input_tokens(d) <= WINDOW for d in choose_documents(short, window=None))
    chosen = choose_documents(short, window=WINDOW)
    assert count_input_tokens(chosen[-1]) > WINDOW
    assert len(choose_documents(make_tiny_documents((3, 4, 30)), window=WINDOW)) == 3


def test_documents_that_train_nothing_are_no_candidates() -> None:
    nothing = dataclasses.replace(make_tiny_document(6), weights_L=np.zeros(7, np.float32))
    assert choose_documents([nothing], window=None) == ()
    assert nothing not in choose_documents([nothing, *make_tiny_documents((4, 5))], window=None)


# ---------------------------------------------------------------- each fault has its message


def leaky_attention(
    q: Tensor, k: Tensor, v: Tensor, layout: PackLayout, rule: AttentionConfig
) -> Tensor:
    """Attention that does not know where documents end."""
    return reference_attention(q, k, v, PackLayout((0,), (layout.num_tokens,)), rule)


def attend_without_window(
    q: Tensor, k: Tensor, v: Tensor, layout: PackLayout, rule: AttentionConfig
) -> Tensor:
    return reference_attention(q, k, v, layout, dataclasses.replace(rule, window=None))


def attend_without_softcap(
    q: Tensor, k: Tensor, v: Tensor, layout: PackLayout, rule: AttentionConfig
) -> Tensor:
    return reference_attention(q, k, v, layout, dataclasses.replace(rule, softcap=None))


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_attention_that_ignores_the_layout(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(BACKENDS, "broken", leaky_attention)
    model, samples = prepare_model(family)
    model.backend = "broken"
    assert "attend to each other" in get_refusal(model, samples)


@pytest.mark.parametrize(
    ("family", "broken"),
    [
        ("mistral", attend_without_window),
        ("phi3", attend_without_window),
        ("gemma2", attend_without_softcap),
    ],
)
def test_attention_that_ignores_a_rule(
    family: str, broken: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also when all rows are shorter than the window: they are chained."""
    monkeypatch.setitem(BACKENDS, "broken", broken)  # type: ignore[arg-type]
    model, samples = prepare_model(family, candidates=make_tiny_documents((3, 4, 5)))
    model.backend = "broken"
    assert "logits differ from transformers" in get_refusal(model, samples)


@pytest.mark.parametrize(
    ("family", "key", "value"),
    [
        ("granite", "logits_scaling", 1.0),
        ("cohere", "logit_scale", 1.0),
        ("gemma2", "final_logit_softcapping", None),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_wrong_head(family: str, key: str, value: float | None, dtype: torch.dtype) -> None:
    model, samples = prepare_model(family, dtype)
    setattr(model.network.config, key, value)
    # the logits of a network in 16 bits may differ more: its head is compared on equal inputs
    reason = "logits differ from transformers" if dtype == torch.float32 else "the head is off by"
    assert reason in get_refusal(model, samples)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")], ids=str)
def test_a_model_that_is_no_number(bad: float) -> None:
    model, samples = prepare_model()
    model.network.get_parameter("model.norm.weight").data[0] = bad
    assert "logits differ from transformers" in get_refusal(model, samples)


def test_an_adapter_that_is_not_nothing_yet() -> None:
    model, samples = prepare_model()
    model.network.get_parameter("model.layers.0.mlp.up_proj.lora_B").data += 0.3
    assert "logits differ from transformers" in get_refusal(model, samples)


def test_labels_that_are_shifted(monkeypatch: pytest.MonkeyPatch) -> None:
    """By what lays out packs for training itself, so that a pack and a document alone agree about
    them."""
    right = probe_module.collate

    def collate_shifted(pack: Pack, device: Device) -> Batch:
        batch = right(pack, device)
        return dataclasses.replace(batch, targets_S=batch.tokens_T[batch.positions_S])

    monkeypatch.setattr(probe_module, "collate", collate_shifted)
    assert "labels" in get_refusal(*prepare_model())


def test_targets_that_are_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    right = probe_module.collate

    def collate_fewer(pack: Pack, device: Device) -> Batch:
        batch = right(pack, device)
        remaining = {
            name: getattr(batch, name)[:-1]
            for name in ("positions_S", "targets_S", "weights_S", "document_S")
        }
        return dataclasses.replace(batch, **remaining)

    monkeypatch.setattr(probe_module, "collate", collate_fewer)
    assert "labels" in get_refusal(*prepare_model())


def test_answers_without_their_end_token() -> None:
    model, samples = prepare_model()
    what = get_refusal(model, dataclasses.replace(samples, end_ids=frozenset({END + 1})))
    assert f"last supervised token is {END}, not an end token" in what


def test_chained_rows_need_no_end_token() -> None:
    model, samples = prepare_model("mistral", candidates=make_tiny_documents((3, 4, 5)))
    assert samples.documents[-1].tokens_L[-1] != END
    assert run_preflight(model, samples)


def test_ids_that_are_not_the_tokenizers() -> None:
    model, samples = prepare_model()
    samples = dataclasses.replace(
        samples, token_id_checks=(TokenIdCheck("rows:1", True), TokenIdCheck("rows:8", False))
    )
    with pytest.raises(GateError, match="token ids differ") as caught:
        run_preflight(model, samples)
    assert caught.value.where == "preflight: rows:8"
    actual = (TokenIdCheck("rows:1", True), TokenIdCheck("rows:2", True, is_full_row=False))
    messages = "2 rows, leading BOS included; only the prompts of 1"
    assert messages in [
        verdict.evidence
        for verdict in run_preflight(model, dataclasses.replace(samples, token_id_checks=actual))
    ]
    nothing = run_preflight(model, dataclasses.replace(samples, token_id_checks=()))
    assert [
        verdict.level
        for verdict in nothing
        if verdict.kind == "token ids match apply_chat_template"
    ] == ["warn"]


@pytest.mark.parametrize("first", [0.0, 1.0], ids=["nothing", "the first token"])
def test_a_document_that_trains_nothing_or_its_first_token(first: float) -> None:
    model, samples = prepare_model()
    *others, last = samples.documents
    weights_L = np.zeros(len(last), np.float32)
    weights_L[0] = first
    empty = dataclasses.replace(last, weights_L=weights_L)
    assert "no token of this document is supervised" in get_refusal(
        model, dataclasses.replace(samples, documents=(*others, empty))
    )


# ---------------------------------------------------------------- negative controls


def pass_always(_: Subject) -> CheckResult:
    return CheckResult("a check", "ok", "", num_checked=1)


BLIND = {"run": pass_always}
HARMLESS = {"corrupt": lambda subject: subject}  # type: ignore[var-annotated]


def prepare_everything() -> tuple[PackedCausalLM, PreflightSamples]:
    """A model and samples to which every fault applies."""
    model, samples = prepare_sharing_model("llama-dynamic")
    mask = RoleMask("rows:1", "answer", "question", ("answer",), ("question",))
    document = make_tiny_document(6)
    tokens_L = np.where(document.tokens_L == END, 3, document.tokens_L)
    tokens_L[-1] = END
    weights_L = np.ones(len(tokens_L), np.float32)
    weights_L[0] = 0
    window = dataclasses.replace(document, tokens_L=tokens_L, weights_L=weights_L)
    text = WindowedText(window, (window,))
    return model, dataclasses.replace(samples, role_masks=(mask,), texts=(text,))


@pytest.mark.parametrize("changed", [BLIND, HARMLESS], ids=["blind check", "harmless fault"])
@pytest.mark.parametrize("check", [c for c in CHECKS if c.fault], ids=lambda check: check.fault)
def test_a_check_that_cannot_fail_is_noticed(
    check: Check, changed: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every fault of the table is injected, and what lets one pass is refused by its name."""
    monkeypatch.setitem(CONFIGS, "llama-dynamic", rotary_configs.CONFIGS["llama-dynamic"])
    model, samples = prepare_everything()
    if not check.applies(Subject(model, samples)):
        samples = dataclasses.replace(samples, texts=None)
    assert not check.why_impossible(Subject(model, samples))
    alone = dataclasses.replace(check, **changed)
    monkeypatch.setattr(preflight, "CHECKS", (alone,))
    assert f"did not detect an injected fault ({check.fault})" in get_refusal(model, samples)


def test_every_fault_of_the_table_is_detected(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(CONFIGS, "llama-dynamic", rotary_configs.CONFIGS["llama-dynamic"])
    model, samples = prepare_everything()
    answers = dataclasses.replace(samples, texts=None)
    injected: set[str] = set()
    for each in (samples, answers):
        controls = run_preflight(model, each)[-1]
        assert controls.level == "ok"
        injected |= set(controls.evidence.partition(": ")[2].split(", "))
    assert injected == {check.fault for check in CHECKS if check.fault}


# ---------------------------------------------------------------- pairs


def test_both_sides_of_pairs_are_proven() -> None:
    sides = [
        dataclasses.replace(make_tiny_document(length, number), side=side)
        for number, lengths in enumerate(((20, 9), (33, 14), (12, 40)))
        for side, length in zip(("chosen", "rejected"), lengths, strict=True)
    ]
    chosen = choose_documents(sides, None)
    rejected = {d.tokens_L.tobytes() for d in sides if d.side == "rejected"}
    assert sum(d.tokens_L.tobytes() in rejected for d in chosen) == 2, (
        "the shortest and the longest"
    )
    assert {9, 40} <= {count_input_tokens(d) for d in chosen}
    assert all(verdict.level == "ok" for verdict in run_preflight(*prepare_model(candidates=sides)))


# ---------------------------------------------------------------- shared prefixes


def test_the_shortest_documents_that_part_are_chosen() -> None:
    prompt = make_tiny_document(30)
    alike = [continue_document(prompt, 30, length) for length in (9, 20, 5)]
    chosen = choose_sharing_documents([*make_tiny_documents((80, 90)), *alike])
    assert sorted(d.id for d in chosen) == sorted(d.id for d in alike)
    pair = [
        dataclasses.replace(d, side=side)
        for d, side in zip(alike, ("chosen", "rejected"), strict=False)
    ]
    assert [d.side for d in choose_sharing_documents(pair)] == ["", ""]
    assert find_siblings(
        pack_with_sharing(choose_sharing_documents(make_tiny_documents((3, 60)))).layout
    ) == (1, 2), "one, and its like"
    assert (
        choose_sharing_documents(make_tiny_documents((3, 4))) == choose_sharing_documents([]) == ()
    )


def test_branches_that_see_each_other_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def attend_to_siblings(
        q: Tensor, k: Tensor, v: Tensor, layout: PackLayout, rule: AttentionConfig
    ) -> Tensor:
        parents = tuple(i - 1 for i in range(len(layout.lengths))) if layout.parents else ()
        return reference_attention(q, k, v, dataclasses.replace(layout, parents=parents), rule)

    model, samples = prepare_sharing_model()
    model.backend = "broken"
    monkeypatch.setitem(BACKENDS, "broken", attend_to_siblings)
    assert "documents in a pack attend to each other" in get_refusal(model, samples)


def test_a_shared_part_that_computes_something_else_is_named(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def attend_without_prefix(
        q: Tensor, k: Tensor, v: Tensor, layout: PackLayout, rule: AttentionConfig
    ) -> Tensor:
        return reference_attention(q, k, v, dataclasses.replace(layout, parents=()), rule)

    model, samples = prepare_sharing_model()
    model.backend = "broken"
    monkeypatch.setitem(BACKENDS, "broken", attend_without_prefix)
    assert "prefix-shared loss" in get_refusal(model, samples)
