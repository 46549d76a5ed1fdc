"""What preflight checks: the model, a few real documents, and packs of them.

In: documents of the first rows. Out: PreflightSamples, a Subject, and batches. Left out: the checks
(train/preflight.py)."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from torch import Tensor

from tunesmith.core.events import CheckResult
from tunesmith.core.types import Batch, Document, Example, PackLayout
from tunesmith.data.chat_template.renderer import Renderer
from tunesmith.data.collate import Device, collate
from tunesmith.data.packing import count_input_tokens, pack_step
from tunesmith.data.prefix_sharing import group_by_prefix
from tunesmith.model.causal_lm import (
    Network,
    PackedCausalLM,
    compute_cached_logits,
    compute_stock_logits,
    has_attention_layer,
)
from tunesmith.model.compare_layers import StockNetwork
from tunesmith.model.rotary import get_shortest_limit

MAX_PACKED_DOCUMENTS = 3  # enough to see a leak or shifted labels, in seconds
# tokens of each document in the isolation check; not a whole block of a kernel
ISOLATION_TOKENS = 72
FORK_TOKENS = 40  # tokens kept before and after the point where shared documents diverge
WORSE_SIDES = ("rejected", "undesirable")
CHAINED_SUFFIX = " and more"  # of the id of rows that are concatenated
TRUNCATED_SUFFIX = ", truncated"  # of the id of a document without its end
BANNED_SUFFIX = ", banned"  # of the id of a document that only trains away from its answer
MIN_CHECKED_CHARS = 12  # of an untrained message that must not be among the targets
MAX_CHECKED_POSITIONS = 64  # per document, for which logits are compared
MAX_CHECKED_TARGETS = 16  # of these, that predict a target, if the others do not
ORACLE_TOKENS = 32  # of the document on which the stock model is compared with itself
NO_ORACLE = "every document has one token"
REPORT_FIX = "please report this"


@dataclass(frozen=True, eq=False)
class WindowedText:
    """A text, and the windows that are trained on."""

    document: Document
    windows: tuple[Document, ...]


class TokenIdCheck(NamedTuple):
    """Whether a row has the token ids of transformers: all of them, or those of its prompts."""

    row_id: str
    is_equal: bool
    is_full_row: bool = True


@dataclass(frozen=True)
class RoleMask:
    """The targets of a document as text, the rest of it, and the messages of each kind."""

    row_id: str
    targets: str  # decoded, without white space
    others: str
    trained: tuple[str, ...]  # contents of messages, without white space
    untrained: tuple[str, ...] = ()
    missing_targets: int = 0  # tokens that train_on: all trains
    skipped: int = 0  # messages that cannot be compared

    @property
    def has_distinct_targets(self) -> bool:
        return any(content not in self.others for content in self.trained)

    def swap(self) -> RoleMask:
        """Return the mask with targets where there are none."""
        return dataclasses.replace(self, targets=self.others, others=self.targets)


@dataclass(frozen=True, eq=False)
class OracleLogits:
    """The stock model's logits [2, V] of the last two tokens of a short document, computed without
    and with its cache."""

    document_id: str
    num_tokens: int
    plain_PV: Tensor
    cached_PV: Tensor


@dataclass(frozen=True, eq=False)
class PreflightSamples:
    """A few real documents, and what the stock model computes for them."""

    documents: tuple[Document, ...]
    reference_logits: tuple[Tensor, ...]  # [P, V] each, at its `choose_positions`
    end_ids: frozenset[int]  # of tokens that end an answer or a text
    token_id_checks: tuple[TokenIdCheck, ...] = ()
    # two or three that share a prefix and diverge, empty if none do; None without prefix sharing
    sharing_documents: tuple[Document, ...] | None = None
    texts: tuple[WindowedText, ...] | None = None  # stage: cpt
    role_masks: tuple[RoleMask, ...] | None = None  # of the first rows; None: answers are trained
    has_trained_answers: bool = True
    is_quantized: bool = False  # the plan's method keeps weights in 4 bits
    stock: StockNetwork | None = None  # to compare blocks with
    is_adapted: bool = False  # training starts from an adapter
    oracle: OracleLogits | str = NO_ORACLE  # or why nothing was compared
    full_pack: int = 0  # tokens of the run's packs if no table names the family: one is compared
    folder_end_ids: frozenset[int] = frozenset()  # ends by generation_config and tokenizer
    end_texts: Mapping[int, str] = field(default_factory=dict[int, str])  # of all end tokens


Corruption = Callable[[Batch], Batch]


def leave_unchanged(batch: Batch) -> Batch:
    return batch


@dataclass(eq=False)
class Subject:
    """The model under test and its samples. `corrupt` is what an injected fault does to batches.

    `logit_error` is the largest difference from transformers that the check of logits accepted, and
    `block_result` that of the blocks, which the check of logits may need. Hidden states are kept,
    since several checks need the same documents."""

    model: PackedCausalLM
    samples: PreflightSamples
    corrupt: Corruption = leave_unchanged
    logit_error: float = 0.0
    block_result: CheckResult | None = None
    hidden_cache: dict[bytes, tuple[Tensor, Tensor]] = field(
        default_factory=dict[bytes, tuple[Tensor, Tensor]]
    )

    def with_corrupt_batches(self, corrupt: Corruption) -> Subject:
        return dataclasses.replace(self, corrupt=corrupt, block_result=None)

    def with_samples(self, **changes: Any) -> Subject:
        return dataclasses.replace(self, samples=dataclasses.replace(self.samples, **changes))

    def compute_unpacked(self, document: Document, positions_S: Tensor) -> Tensor:
        """Return hidden states [S, H] of a document that is alone in its pack.

        `positions_S` must be targets or checked positions of the document."""
        key = document.tokens_L.tobytes() + document.weights_L.tobytes()
        if key not in self.hidden_cache:
            device = self.model.device
            batch = pack_documents([document], device)
            target_positions = np.flatnonzero(document.weights_L) - 1
            positions = np.union1d(target_positions, choose_positions(document))
            positions_P = torch.from_numpy(positions).to(device)
            batch = dataclasses.replace(batch, positions_S=positions_P)
            self.hidden_cache[key] = (positions_P, self.model.compute_hidden(batch))
        positions_P, hidden_PH = self.hidden_cache[key]
        return hidden_PH[torch.searchsorted(positions_P, positions_S)]


def build_role_mask(
    example: Example,
    documents: Sequence[Document],
    weights: Sequence[float],
    renderer: Renderer,
    *,
    trains_all: bool,
) -> RoleMask:
    """Return the mask of a row as text. `weights` are those of its messages.

    A message that the template changes cannot be compared, and neither can a trained one that is
    not written more often than untrained text has it. An untrained one may occur in other text if
    it is short, and in trained text: an answer, its reasoning, or the arguments of a tool call."""
    targets = ""
    others = ""
    full_text = ""
    missing_targets = 0
    for document in documents:
        is_target_L = document.weights_L > 0
        full_text += _decode_words(document.tokens_L, renderer)
        targets += _decode_words(document.tokens_L[is_target_L], renderer)
        others += _decode_words(document.tokens_L[~is_target_L], renderer)
        missing_targets += len(document) - 1 - int(is_target_L.sum())
    trained_text = ""
    untrained_text = ""
    for message, weight in zip(example.messages, weights, strict=True):
        if weight:
            trained_text += _join_strings(message)
        else:
            untrained_text += _join_strings(message)
    # templates write tools into the system message, which may be trained
    trained_words = _select_words(trained_text + _join_strings(example.tools))
    trained: list[str] = []
    untrained: list[str] = []
    contents = [remove_spaces(message["content"]) for message in example.messages]
    for content, weight in zip(contents, weights, strict=True):
        if not content or content not in full_text:
            continue
        if weight:
            if full_text.count(content) > untrained_text.count(content):
                trained.append(content)
        elif len(content) >= MIN_CHECKED_CHARS and _select_words(content) not in trained_words:
            untrained.append(content)
    return RoleMask(
        example.id,
        targets,
        others,
        tuple(trained),
        tuple(untrained),
        missing_targets if trains_all and all(weights) else 0,
        sum(map(bool, contents)) - len(trained) - len(untrained),
    )


def _join_strings(value: Any) -> str:
    """Return the keys and values of a JSON value in their order, without white space."""
    if isinstance(value, Mapping):
        pairs = cast("Mapping[str, Any]", value).items()
        return "".join(key + _join_strings(item) for key, item in pairs)
    if isinstance(value, (list, tuple)):
        return "".join(map(_join_strings, cast("Sequence[Any]", value)))
    return remove_spaces(value if isinstance(value, str) else json.dumps(value))


def _select_words(text: str) -> str:
    """Return the letters and digits of a text, which templates keep where they quote it."""
    return "".join(letter for letter in text.casefold() if letter.isalnum())


def remove_spaces(text: str) -> str:
    return "".join(text.split())


def _decode_words(tokens: np.ndarray, renderer: Renderer) -> str:
    """Decode tokens without control tokens and white space."""
    words = [token for token in tokens.tolist() if token not in renderer.control_ids]
    return remove_spaces(renderer.decode(words))


def choose_documents(candidates: Sequence[Document], window: int | None) -> tuple[Document, ...]:
    """Choose the shortest, two in between and the longest document, shortest first; and the
    shortest and the longest rejected answer.

    With a sliding window, at least one is longer than it (rows are concatenated if needed). A
    single document is returned twice, since the isolation check needs two."""
    ranked = sorted((document for document in candidates if count_input_tokens(document)), key=len)
    rejected = [document for document in ranked if document.side in WORSE_SIDES]
    others = [document for document in ranked if document.side not in WORSE_SIDES]
    indices = sorted({0, len(others) // 4, len(others) // 2, len(others) - 1}) if others else []
    chosen = [others[index] for index in indices]
    if rejected:
        chosen += [rejected[index] for index in {0, len(rejected) - 1}]
    # without their sides, documents are packed one by one
    chosen = sorted((dataclasses.replace(document, side="") for document in chosen), key=len)
    if window and ranked and all(count_input_tokens(document) <= window for document in chosen):
        chosen.append(_chain_documents(ranked, window + 1 + len(ranked[0])))
    return tuple(chosen * 2 if len(chosen) == 1 else chosen)


def choose_packed_documents(documents: Sequence[Document]) -> tuple[Document, ...]:
    """Choose the shortest documents and the longest one, of documents in ascending length.

    Together in one pack, since what depends on the length must not reach the others."""
    shortest = documents[:-1][: MAX_PACKED_DOCUMENTS - 1]
    return (*shortest, documents[-1])


def choose_sharing_documents(candidates: Sequence[Document]) -> tuple[Document, ...]:
    """Choose the three shortest documents, or two, of which two share a prefix and diverge.

    If no two do, a document and a copy with another ending; none if all are too short to share
    anything."""
    documents: list[Document] = []
    inputs: list[np.ndarray] = []
    for document in candidates:
        if num_tokens := count_input_tokens(document):
            documents.append(dataclasses.replace(document, side=""))
            inputs.append(document.tokens_L[:num_tokens])
    order, _ = group_by_prefix(inputs, [(index,) for index in range(len(documents))])
    ranked = [documents[index] for (index,) in order]
    groups: list[list[Document]] = []
    for size in (MAX_PACKED_DOCUMENTS, 2):
        groups += [ranked[start : start + size] for start in range(len(ranked) - size + 1)]
    groups.sort(key=lambda group: (-len(group), sum(map(len, group))))
    if documents:
        longest = sorted(documents, key=len)[-1]
        groups.append([longest, _change_ending(longest)])
    for group in groups:
        if find_siblings(pack_with_sharing(group).layout):
            return tuple(group)
    return ()


def _change_ending(document: Document) -> Document:
    half = len(document) // 2
    tokens_L = np.concatenate([document.tokens_L[:half], np.roll(document.tokens_L[half:], 1)])
    return dataclasses.replace(document, tokens_L=tokens_L)


def mark_longer(truncated: Sequence[Document], complete: Sequence[Document]) -> list[Document]:
    """Return the longest truncated document if it is longer than all complete ones, with an id that
    keeps it out of the check of its end."""
    longest = max(truncated, key=count_input_tokens, default=None)
    limit = max(map(count_input_tokens, complete), default=0)
    if longest is None or count_input_tokens(longest) <= limit:
        return []
    return [dataclasses.replace(longest, id=f"{longest.id}{TRUNCATED_SUFFIX}")]


def mark_banned(documents: Sequence[Document]) -> list[Document]:
    """Return documents with ids that keep them out of the check of their ends."""
    return [dataclasses.replace(d, id=f"{d.id}{BANNED_SUFFIX}") for d in documents]


def truncate(document: Document, num_tokens: int) -> Document:
    """Return the first input tokens as a document whose last token is its target."""
    num_tokens = min(num_tokens, count_input_tokens(document))
    return _target_last_token(document.id, document.tokens_L[: num_tokens + 1])


def _target_last_token(id: str, tokens_L: np.ndarray) -> Document:
    weights_L = np.zeros(len(tokens_L), np.float32)
    weights_L[-1] = 1
    return Document(id, tokens_L, weights_L)


def choose_positions(document: Document) -> list[int]:
    """Return evenly spaced positions of the input tokens, with the first and the last, and of those
    that predict a target, of which a short answer has few."""
    num_inputs = count_input_tokens(document)
    spaced = np.linspace(0, num_inputs - 1, MAX_CHECKED_POSITIONS).astype(int)
    predicting = np.flatnonzero(document.weights_L[1 : num_inputs + 1])
    chosen = np.linspace(0, len(predicting) - 1, min(len(predicting), MAX_CHECKED_TARGETS))
    return np.union1d(spaced, predicting[chosen.astype(int)]).tolist()


def _chain_documents(documents: Sequence[Document], tokens: int) -> Document:
    """Concatenate rows to a document of this length."""
    count = 1 + tokens // max(1, min(map(len, documents)))
    repeated = [documents[index % len(documents)].tokens_L for index in range(count)]
    tokens_L = np.concatenate(repeated)[:tokens]
    weights_L = np.ones(len(tokens_L), np.float32)
    weights_L[0] = 0
    return Document(f"{documents[0].id}{CHAINED_SUFFIX}", tokens_L, weights_L)


def compute_oracle_logits(network: Network, documents: Sequence[Document]) -> OracleLogits | str:
    """Compute the last tokens of the shortest document, or of its beginning, in two ways. Return
    the reason if there is nothing to compare.

    The beginning is shorter than any length from which on the rotation depends on the length: keys
    in the cache would be rotated for another one. The stock rotary embedding also keeps the
    frequencies of an earlier, longer document unless this one is shorter than its limit."""
    if not has_attention_layer(network):
        return "transformers' cache needs an attention layer, but the model has none"
    limit = ORACLE_TOKENS
    rotation_limit = get_shortest_limit(network)
    if rotation_limit is not None:
        limit = min(limit, rotation_limit - 1)
        if limit < 2:
            return "the rotation of two tokens depends on their number"
    for document in documents:
        num_tokens = min(count_input_tokens(document), limit)
        if num_tokens < 2:
            continue
        tokens = document.tokens_L[:num_tokens].tolist()
        return OracleLogits(
            document.id,
            num_tokens,
            compute_stock_logits(network, tokens, [num_tokens - 2, num_tokens - 1]),
            compute_cached_logits(network, tokens),
        )
    return NO_ORACLE


# ---------------------------------------------------------------- packs


def find_siblings(layout: PackLayout) -> tuple[int, int] | None:
    """Return the first two segments with the same parent."""
    for segment, parent in enumerate(layout.parents):
        if parent >= 0 and parent in layout.parents[:segment]:
            return layout.parents.index(parent), segment
    return None


def pack_documents(documents: Sequence[Document], device: Device = "cpu") -> Batch:
    (pack,) = pack_step(documents, sum(map(len, documents)))
    return collate(pack, device)


def fill_pack(documents: Sequence[Document], pack_length: int) -> tuple[Document, ...]:
    """Return documents with so many copies of the last that they fill a pack."""
    missing = pack_length - sum(map(count_input_tokens, documents))
    copies = max(0, missing // count_input_tokens(documents[-1]))
    return (*documents, *(documents[-1],) * copies)


def pack_beyond(documents: Sequence[Document], limit: int, device: Device = "cpu") -> Batch:
    """Return one pack of documents, the last one repeated until the pack is well over `limit`."""
    num_tokens = sum(map(count_input_tokens, documents))
    missing = max(0, 3 * limit // 2 - num_tokens)
    repeats = -(-missing // count_input_tokens(documents[-1]))
    return pack_documents([*documents, *[documents[-1]] * repeats], device)


def pack_with_sharing(
    documents: Sequence[Document],
    get_group: Callable[[int], Hashable] | None = None,
    device: Device = "cpu",
) -> Batch:
    """Return one pack in which common prefixes are shared, inside of a group."""
    num_tokens = sum(map(len, documents))
    (pack,) = pack_step(documents, num_tokens, should_share=True, get_group=get_group)
    return collate(pack, device)


def trim_to_fork(documents: Sequence[Document]) -> list[Document]:
    """Cut documents to the tokens around the point where they diverge, which is enough to see
    whether branches see each other."""
    (pack,) = pack_step(documents, sum(map(len, documents)), should_share=True)
    begin = max(0, min(pack.prefix_lengths[1:]) - FORK_TOKENS)
    end = max(pack.prefix_lengths) + FORK_TOKENS
    trimmed: list[Document] = []
    for document in pack.documents:
        last = min(end, count_input_tokens(document))
        trimmed.append(_target_last_token(document.id, document.tokens_L[begin : last + 1]))
    return trimmed
