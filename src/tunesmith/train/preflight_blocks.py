"""Preflight: block by block, our network computes what transformers does.

In: our model, the stock's modules, and packs of the probed documents. Out: a CheckResult, or
GateError that names the block. Logits say little about a wrong block: in bf16 two correct networks
differ by percents, with experts and recurrent layers by tenths, since each layer amplifies the
rounding of those below, and a router that decides otherwise changes a token at once. So each block
is given transformers' own inputs and computes in fp32, whole documents, packed and with shared
prefixes; transformers computes each document alone. What a correct block differs by is then the
rounding of fp32.

A bf16 model also computes in bf16, with the products and kernels that it is trained with, where its
blocks differ by more. Left out: running the networks (model/compare_layers.py), the choice of
documents (session/preflight_probe.py)."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np
import torch

from tunesmith.core.errors import GateError
from tunesmith.core.events import CheckResult
from tunesmith.core.formatting import format_count
from tunesmith.core.types import Document, Pack
from tunesmith.data.collate import collate
from tunesmith.data.packing import count_input_tokens, pack_step
from tunesmith.data.prefix_sharing import build_segments
from tunesmith.model.causal_lm import PackedCausalLM
from tunesmith.model.compare_layers import (
    ComparedPack,
    Difference,
    StockNetwork,
    compare_gradients,
    compare_layers,
)
from tunesmith.model.experts import Experts
from tunesmith.model.layers import MIXERS
from tunesmith.session.preflight_probe import (
    ISOLATION_TOKENS,
    REPORT_FIX,
    Corruption,
    Subject,
    choose_packed_documents,
    leave_unchanged,
    truncate,
)

# Largest difference of a token in a correct block in fp32, relative to the norm of its output. The
# worst of the families of the tests, random networks, was 3e-6, that of SmolLM2 3e-7.
TOKEN_TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-5}
# The same of all tokens of a block in bf16, of which the worst of the families was 0.75%.
BLOCK_TOLERANCE = {torch.bfloat16: 0.03, torch.float16: 0.01}
# Part of the tokens that a correct router may send elsewhere: two scores that differ by rounding.
TIED_TOKENS = 0.005
BLOCK_FIX = "this model family is not supported yet; please report it"
NO_STOCK_MODULES = "transformers' modules were not kept"
KIND = "blocks match transformers"
GRADIENT_KIND = "gradients match transformers"
# Largest difference of a gradient in bf16, of all tokens; the worst of the families was 7.8%, that
# of SmolLM2 7.0%. In fp32 a token's differs by 2.4e-6 at most, in SmolLM2 by 1.3e-5.
GRADIENT_TOLERANCE = {torch.bfloat16: 0.25, torch.float16: 0.1}


def check_blocks(subject: Subject) -> CheckResult:
    """Check every block, the sums between them, the embedding and the head, in fp32; once."""
    if subject.block_result is None:
        subject.block_result = _compare_blocks(subject)
    return subject.block_result


def _compare_blocks(subject: Subject) -> CheckResult:
    model = subject.model
    samples = subject.samples
    stock = samples.stock
    if stock is None:
        return CheckResult.from_items(KIND, 0, "", if_none=NO_STOCK_MODULES)
    _refuse_changed_weights(model, stock, is_adapted=samples.is_adapted)
    wide_dtype = torch.promote_types(model.dtype, torch.float32)
    documents = choose_packed_documents(samples.documents)
    packs = [build_compared_pack(model, documents, corrupt=subject.corrupt)]
    if samples.sharing_documents:
        packs.append(build_compared_pack(model, samples.sharing_documents, should_share=True))
    differences: list[Difference] = []
    for difference in compare_layers(model, stock, packs, wide_dtype):
        _refuse_difference(difference, difference.worst_token, TOKEN_TOLERANCE[wide_dtype])
        _refuse_choices(difference)
        differences.append(difference)
    num_tokens = sum(pack.batch.layout.num_tokens for pack in packs)
    evidence = (
        f"{len(differences)} parts in {_name_dtype(wide_dtype)} on transformers' inputs, "
        f"{num_tokens} tokens in {format_count(len(packs), 'pack')}, differ by "
        f"{max(difference.worst_token for difference in differences):.1e} at most"
        f"{_describe_choices(differences)}"
    )
    if model.dtype != wide_dtype:
        worst = _compare_as_trained(model, stock, packs[0])
        evidence += f"; in {_name_dtype(model.dtype)} by {worst:.2%}"
    return CheckResult.from_items(KIND, len(differences), evidence, if_none="there is no block")


def _compare_as_trained(model: PackedCausalLM, stock: StockNetwork, pack: ComparedPack) -> float:
    """Compare the blocks in the model's own dtype; return the largest difference of one."""
    worst = 0.0
    for difference in compare_layers(model, stock, [pack], model.dtype):
        _refuse_difference(difference, difference.mean, BLOCK_TOLERANCE[model.dtype])
        worst = max(worst, difference.mean)
    return worst


def can_amplify_rounding(model: PackedCausalLM) -> bool:
    """Return whether two correct networks may differ by far more than any of their blocks: by
    rounding to 16 bits, which grows from layer to layer in every network, or with routers and
    recurrent layers."""
    modules = model.network.modules()
    is_rounded = model.dtype.itemsize < 4
    return is_rounded or any(isinstance(module, (Experts, *MIXERS)) for module in modules)


def _refuse_difference(difference: Difference, error: float, tolerance: float) -> None:
    """Raise GateError for a part that differs by more than rounding, or is NaN."""
    if not error <= tolerance:
        raise GateError(
            f"{difference.path} is off by {error:.2%} of its norm from transformers', on the same "
            f"inputs: more than {tolerance:.2%}",
            where="preflight",
            fix=BLOCK_FIX,
        )


def _describe_choices(differences: Sequence[Difference]) -> str:
    """Return how many decisions of routers were equal, empty without routers."""
    num_choices = sum(difference.num_choices for difference in differences)
    num_equal = sum(difference.num_equal_choices for difference in differences)
    return f", router decisions equal at {num_equal:,}/{num_choices:,}" if num_choices else ""


def check_gradients(subject: Subject) -> CheckResult:
    """Check the gradients of the input and the adapters of each kind of layer, on the beginnings of
    two documents in a pack, in fp32 and in the model's dtype."""
    model = subject.model
    samples = subject.samples
    stock = samples.stock
    if stock is None:
        return CheckResult.from_items(GRADIENT_KIND, 0, "", if_none=NO_STOCK_MODULES)
    documents = [truncate(document, ISOLATION_TOKENS) for document in samples.documents[:2]]
    pack = build_compared_pack(model, documents)
    wide_dtype = torch.promote_types(model.dtype, torch.float32)
    differences: list[Difference] = []
    for difference in compare_gradients(model, stock, pack, wide_dtype):
        _refuse_difference(difference, difference.worst_token, TOKEN_TOLERANCE[wide_dtype])
        differences.append(difference)
    worst = max((difference.worst_token for difference in differences), default=0.0)
    num_adapters = sum(difference.is_adapter for difference in differences)
    num_layers = f"{len(differences) - num_adapters} of {len(model.decoder.layers)}"
    evidence = (
        f"{len(differences)} gradients ({num_layers} layers, {num_adapters} adapters) in "
        f"{_name_dtype(wide_dtype)}, {pack.batch.layout.num_tokens} tokens, differ by {worst:.1e} "
        "at most"
    )
    if model.dtype != wide_dtype:
        worst = 0.0
        for difference in compare_gradients(model, stock, pack, model.dtype):
            _refuse_difference(difference, difference.mean, GRADIENT_TOLERANCE[model.dtype])
            worst = max(worst, difference.mean)
        evidence += f"; in {_name_dtype(model.dtype)} by {worst:.1%}"
    if_none = "there is no layer"
    return CheckResult.from_items(GRADIENT_KIND, len(differences), evidence, if_none=if_none)


def build_compared_pack(
    model: PackedCausalLM,
    documents: Sequence[Document],
    *,
    should_share: bool = False,
    corrupt: Corruption = leave_unchanged,
) -> ComparedPack:
    """Return one pack of documents, and where in them each of its tokens is."""
    (pack,) = pack_step(
        documents,
        sum(map(len, documents)),
        should_share=should_share,
        get_group=model.get_rotation_key,
    )
    tokens: list[torch.Tensor] = []
    for document in pack.documents:
        inputs_L = document.tokens_L[: count_input_tokens(document)].astype(np.int64)
        tokens.append(torch.from_numpy(inputs_L).to(model.device))
    index_T = torch.from_numpy(_find_sources(pack)).to(model.device)
    return ComparedPack(tuple(tokens), corrupt(collate(pack, model.device)), index_T)


def _find_sources(pack: Pack) -> np.ndarray:
    """Return the place of each token of a pack among the tokens of its documents."""
    lengths = [count_input_tokens(document) for document in pack.documents]
    offsets = [0, *itertools.accumulate(lengths)]
    segments, _ = build_segments(lengths, pack.prefix_lengths or (0,) * len(lengths))
    places: list[np.ndarray] = []
    for segment in segments:
        start = offsets[segment.document]
        places.append(np.arange(start + segment.begin, start + segment.end))
    return np.concatenate(places)


def _refuse_changed_weights(
    model: PackedCausalLM, stock: StockNetwork, *, is_adapted: bool
) -> None:
    name = stock.find_changed_weight(model.network, is_adapted=is_adapted)
    if name is not None:
        raise GateError(
            f"{name} changed before the first step",
            where="preflight",
            fix=REPORT_FIX,
        )


def _name_dtype(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _refuse_choices(difference: Difference) -> None:
    num_other = difference.num_choices - difference.num_equal_choices
    if num_other > 1 + TIED_TOKENS * difference.num_choices:
        raise GateError(
            f"{difference.path} sends {num_other} of {difference.num_choices} tokens to other "
            "experts than transformers' router, on the same inputs",
            where="preflight",
            fix=BLOCK_FIX,
        )


def explain_missing_modules(subject: Subject) -> str:
    return "" if subject.samples.stock else NO_STOCK_MODULES
