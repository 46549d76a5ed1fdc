"""The witness of an adapter: a few answers that only this adapter on its base gives, recorded at
the end of a run and measured again wherever the adapter is applied.

    golden_answers = record_answers(model, renderer)       # at the end of a run
    adapter = read_adapter(folder, base)
    check = check_witness(model, adapter, read_provenance(folder))  # with the adapter applied

The recorded tokens are scored, not generated again: one rounding can change a text, and changes
the mean log-probability of its tokens by less than a hundredth. A change of the weights that is
smaller than what bf16 rounds is seen by the hash of the file only. Left out: base, tokenizer,
template and variables as files (`check_provenance`, which comes first)."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch

from tunesmith.core.errors import InputError
from tunesmith.core.types import Document, GenerationRequest, Json
from tunesmith.data.chat_template.renderer import Renderer
from tunesmith.data.collate import collate
from tunesmith.data.packing import pack_step
from tunesmith.model.adapter_bank import AdapterBank
from tunesmith.model.adapters import scaled_adapter
from tunesmith.model.causal_lm import PackedCausalLM
from tunesmith.model.generation.engine import generate
from tunesmith.model.hub.adapter_config import AdapterFolder
from tunesmith.session.identity import GoldenAnswer, Provenance

ANSWER_TOKENS = 16
# of the mean log-probability in nats; between bf16 and fp32 it differs by 0.003 (SmolLM2-135M)
TOLERANCE = 0.02
# of the mean difference of a token's log-probability; between bf16 and fp32 it is 0.027
TOKEN_TOLERANCE = 0.05
# such differences of adapter and base, from which the two can be told apart
DISTINCT = 2 * TOKEN_TOLERANCE
PROMPTS = (
    "Name three colours that road signs often have.",
    "What is 17 + 25?",
    "Write one sentence about a lighthouse in winter.",
    "Which steps does it take to make tea?",
    "Meet Ana in Oslo on Friday at ten. Where and when is the meeting?",
)

Status = Literal["proven", "unproven", "indistinct", "refused"]


@dataclass(frozen=True)
class WitnessCheck:
    """Whether a model is the one that an adapter's record was made with.

    proven: it is. unproven: there is no record. indistinct: it answers as recorded, but so does the
    base. refused: it is another model."""

    status: Status
    evidence: str


# ---------------------------------------------------------------- record


def record_answers(model: PackedCausalLM, renderer: Renderer) -> tuple[GoldenAnswer, ...]:
    """Answer PROMPTS greedily with the adapter of a model, and score the answers with and without
    it."""
    model.network.eval()
    golden_answers: list[GoldenAnswer] = []
    for messages, prompt_ids, answer_ids in _answer_prompts(model, renderer):
        logprobs = score_answer(model, prompt_ids, answer_ids)
        with scaled_adapter(model.network, 0):
            base_logprobs = score_answer(model, prompt_ids, answer_ids)
        golden_answers.append(
            GoldenAnswer(messages, prompt_ids, answer_ids, logprobs, base_logprobs)
        )
    return tuple(golden_answers)


def _answer_prompts(
    model: PackedCausalLM, renderer: Renderer
) -> list[tuple[tuple[Json, ...], tuple[int, ...], tuple[int, ...]]]:
    """Return messages, prompt and greedy answer of each prompt that the template can render."""
    conversations: list[tuple[Json, ...]] = []
    requests: list[GenerationRequest] = []
    for text in PROMPTS:
        messages: tuple[Json, ...] = ()
        if renderer.has_template:
            messages = ({"role": "user", "content": text},)
        try:
            prompt_ids = (
                renderer.encode_prompt(messages) if messages else renderer.encode_text(text)
            )
        except InputError:
            continue
        if len(prompt_ids) + ANSWER_TOKENS < model.context_length:
            conversations.append(messages)
            requests.append(GenerationRequest(tuple(prompt_ids), ANSWER_TOKENS))
    outputs = dict(generate(model, requests, decode=renderer.decode, end_ids=renderer.end_ids))
    return [
        (messages, request.tokens, outputs[index].tokens)
        for index, (messages, request) in enumerate(zip(conversations, requests, strict=True))
    ]


@torch.no_grad()
def score_answer(
    model: PackedCausalLM,
    prompt_ids: Sequence[int],
    answer_ids: Sequence[int],
    *,
    bank: AdapterBank | None = None,
    key: str = "",
) -> tuple[float, ...]:
    """Return the log-probability of each token of an answer, in nats; with a bank, under the
    adapter of a key."""
    tokens_L = np.array([*prompt_ids, *answer_ids], np.int32)
    weights_L = np.zeros(len(tokens_L), np.float32)
    weights_L[len(prompt_ids) :] = 1
    (pack,) = pack_step([Document("witness", tokens_L, weights_L)], len(tokens_L))
    batch = collate(pack, model.device)
    rows = bank.use_rows([(key, 1.0, len(batch.tokens_T))]) if bank else nullcontext()
    with rows:
        hidden_SH = model.compute_hidden(batch)
    logprobs_SV = model.head.compute_logits(hidden_SH).float().log_softmax(-1)
    logprobs_S = logprobs_SV.gather(1, batch.targets_S[:, None])[:, 0]
    return tuple(round(value, 5) for value in logprobs_S.tolist())


# ---------------------------------------------------------------- check


def check_witness(
    model: PackedCausalLM,
    adapter: AdapterFolder,
    provenance: Provenance | None,
    *,
    bank: AdapterBank | None = None,
    key: str = "",
) -> WitnessCheck:
    """Say whether a model with an adapter, its own or that of a key of its bank, is the one that
    the adapter's provenance was recorded with."""
    if refusal := check_recorded_weights(adapter, provenance):
        return refusal
    golden_answers = provenance.golden_answers if provenance is not None else ()
    measured: list[tuple[float, ...]] = []
    for golden in golden_answers:
        scores = score_answer(model, golden.prompt_ids, golden.answer_ids, bank=bank, key=key)
        measured.append(scores)
    return judge_witness(golden_answers, measured)


def check_recorded_weights(
    adapter: AdapterFolder, provenance: Provenance | None
) -> WitnessCheck | None:
    """Return a refusal if the recorded answers are those of other weights."""
    if provenance is None or not provenance.golden_answers:
        return None
    if adapter.sha256 == provenance.weights_sha256:
        return None
    hashes = f"sha256 {provenance.weights_sha256[:12]} -> {adapter.sha256[:12]}"
    return WitnessCheck("refused", f"the weights are not those of the record: {hashes}")


def judge_witness(
    golden_answers: Sequence[GoldenAnswer], measured: Sequence[Sequence[float]]
) -> WitnessCheck:
    """Compare log-probabilities of the recorded answers with the record: their mean, and token by
    token, where a wrong model is nearer to another one's."""
    if not golden_answers:
        return WitnessCheck("unproven", "there are no recorded answers to check it by")
    scores = list(itertools.chain.from_iterable(measured))
    recorded = list(itertools.chain.from_iterable(a.logprobs for a in golden_answers))
    base = list(itertools.chain.from_iterable(a.base_logprobs for a in golden_answers))
    if not all(map(math.isfinite, scores)):
        return WitnessCheck("refused", "a log-probability is NaN or infinite")
    change = sum(scores) / len(scores) - sum(recorded) / len(recorded)
    distance = _compute_distance(scores, recorded)
    base_distance = _compute_distance(scores, base)
    evidence = (
        f"{len(scores)} recorded tokens: mean log-probability {change:+.3f} nats from the record; "
        f"a token differs by {distance:.3f} from the adapter's and {base_distance:.3f} from the "
        "base's"
    )
    is_same = abs(change) <= TOLERANCE and distance <= TOKEN_TOLERANCE
    if not is_same:
        return WitnessCheck("refused", evidence)
    if _compute_distance(recorded, base) < DISTINCT:
        return WitnessCheck("indistinct", f"{evidence}: the two cannot be told apart")
    return WitnessCheck("proven" if distance < base_distance else "refused", evidence)


def _compute_distance(ours: Sequence[float], theirs: Sequence[float]) -> float:
    """Return the mean absolute difference."""
    return sum(abs(a - b) for a, b in zip(ours, theirs, strict=True)) / len(ours)
