"""Generation probes: what the model answers during training, and how far it is from its base.

    build_prompt_set(plan, inputs, texts) -> GuardPromptSet    prompts of eval_data, never test_data
    GenerationProbe(session, prompt_set).run_probe(step, optimizer) -> Scores and GenerationSamples

A probe writes short greedy answers and reads them with the adapter off: would the base model write
that? It also reads the expected answers, and general texts, if there are any: prompts are no text
that stays as it was. All scores are by item; later ones are compared with those of step 0.

Nothing here changes the model or draws a random number of training. Left out: which scores are bad
(detectors.py), when to probe (guarded_loop.py)."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from tunesmith.core.events import EXPECTED_TASK, PROBE_TASK, GenerationSample, Score
from tunesmith.core.types import Batch, Document, Example, GenerationOutput, Plan
from tunesmith.data.chat_template.renderer import Renderer
from tunesmith.data.checks import language_id
from tunesmith.data.dataset import Dataset
from tunesmith.data.sampler import permute_rows
from tunesmith.evaluate.constraint_violations import find_matches
from tunesmith.evaluate.degeneration import (
    compute_foreign_share,
    compute_repetition,
    count_distinct_bigrams,
    find_scripts,
    flag_identical_answers,
    is_json,
)
from tunesmith.evaluate.general_text import GeneralText
from tunesmith.evaluate.generate_until import EvalPrompt, build_prompts, iter_answers
from tunesmith.evaluate.loglikelihood import compute_nll, map_documents
from tunesmith.evaluate.results import MetricValues, compute_score
from tunesmith.model.adapters import scaled_adapter
from tunesmith.model.causal_lm import PackedCausalLM
from tunesmith.model.lm_head import measure_target_losses
from tunesmith.plan.guard import PROBE_NEW_TOKENS
from tunesmith.session.inputs import RunInputs
from tunesmith.session.session import Session
from tunesmith.train.update_norms import (
    compute_update_ratios,
    compute_weight_norms,
)

MAX_PROMPT_TOKENS = 64  # of a text that is to be continued
# Rows read per prompt: the shortest become prompts, because a probe costs what they are long.
CANDIDATES_PER_PROMPT = 4
MAX_TEXTS = 8
MAX_TEXT_CHARS = 512
MAX_POSITIONS = 128  # positions with a full next-token distribution
# of every evaluation, with or without a probe
LOSS_METRICS = {"answer_loss_rise", "forgotten", "kl", "entropy"}
RATE_METRICS = {"same_answer", "end_rate", "json", "language"}  # 0 or 1 per answer
PROMPT_ROLES = ("eval_data", "rehearsal", "retention_data")  # the first with two prompts is used


@dataclass(frozen=True)
class GuardPrompt:
    """A prompt, and a document of prompt and expected answer.

    `has_end`: the last target of the document is an end token."""

    question: EvalPrompt
    document: Document
    has_end: bool

    @property
    def answer_tokens(self) -> list[int]:
        return self.document.tokens_L[len(self.question.prompt_ids) :].tolist()


@dataclass(frozen=True)
class GuardPromptSet:
    role: str  # of the data that the prompts are from
    prompts: tuple[GuardPrompt, ...]
    texts: tuple[GeneralText, ...]  # beginnings of general texts

    @property
    def is_held_out(self) -> bool:
        """Whether training should make the expected answers likelier."""
        return self.role == "eval_data"


# ---------------------------------------------------------------- choosing prompts


def build_prompt_set(
    plan: Plan, inputs: RunInputs, texts: Sequence[GeneralText]
) -> GuardPromptSet | None:
    """Return the prompts of a run, None if no data role has two.

    `texts` are those of retention_data."""
    short_texts = _truncate_texts(texts)
    count = plan.config.probe_prompts
    for role in PROMPT_ROLES:
        candidates: list[GuardPrompt] = []
        if role in inputs.datasets:
            candidates = _build_row_prompts(inputs.datasets[role], inputs.renderer, count)
        elif role == "retention_data":
            for text in texts[:: max(1, len(texts) // 8)]:
                prompt = _build_text_prompt(text.id, text.text, inputs.renderer)
                if prompt is not None:
                    candidates.append(prompt)
        if len(candidates[:count]) > 1:
            return GuardPromptSet(role, tuple(candidates[:count]), short_texts)
    return None


def _truncate_texts(texts: Sequence[GeneralText]) -> tuple[GeneralText, ...]:
    """Return the beginnings of a few texts, equally many of each domain."""
    by_domain: dict[str, list[GeneralText]] = {}
    for text in texts:
        short_text = dataclasses.replace(text, text=text.text[:MAX_TEXT_CHARS])
        by_domain.setdefault(text.domain, []).append(short_text)
    texts_per_domain = max(2, MAX_TEXTS // max(1, len(by_domain)))
    selected: list[GeneralText] = []
    for domain_texts in by_domain.values():
        selected += domain_texts[:texts_per_domain]
    return tuple(selected)


def _build_row_prompts(dataset: Dataset, renderer: Renderer, count: int) -> list[GuardPrompt]:
    """Return prompts of the shortest among randomly drawn rows, in file order."""
    drawn_rows = permute_rows(0, 0, len(dataset))[: CANDIDATES_PER_PROMPT * count].tolist()
    candidates: list[tuple[int, int, GuardPrompt]] = []  # length, row, prompt
    for row in drawn_rows:
        example = dataset.read_example(row)
        prompt: GuardPrompt | None = None
        if example.text and not example.prompt:
            prompt = _build_text_prompt(example.id, example.text, renderer)
        if prompt is None:
            prompt = _build_example_prompt(example, renderer)
        if prompt is not None:
            candidates.append((len(prompt.document), row, prompt))
    shortest = sorted(candidates, key=lambda candidate: candidate[:2])[:count]
    return [prompt for _, _, prompt in sorted(shortest, key=lambda candidate: candidate[1])]


def _build_example_prompt(example: Example, renderer: Renderer) -> GuardPrompt | None:
    """Return the prompt of a row, None if it has none or its answer is a bad one."""
    if example.negative or (example.text is not None and not example.prompt):
        return None
    plain_example = dataclasses.replace(example, rejected=None, banned_spans=())
    documents = renderer.render(plain_example).documents
    if not documents:
        return None
    (question,) = build_prompts([plain_example], renderer)
    prompt_length = len(question.prompt_ids)
    tokens_L = documents[-1].tokens_L[: prompt_length + question.num_expected_tokens]
    document = _build_document(prompt_length, example.id, tokens_L)
    return GuardPrompt(question, document, has_end=int(tokens_L[-1]) in renderer.end_ids)


def _build_text_prompt(row_id: str, text: str, renderer: Renderer) -> GuardPrompt | None:
    """Return the beginning of a text as a prompt, and what follows as the expected answer."""
    max_tokens = MAX_PROMPT_TOKENS + PROBE_NEW_TOKENS
    tokens = list(renderer.encode_text(text[: 8 * max_tokens]))[:max_tokens]
    prompt_length = min(MAX_PROMPT_TOKENS, len(tokens) // 2)
    if not prompt_length:
        return None
    question = EvalPrompt(
        row_id,
        prompt_ids=tuple(tokens[:prompt_length]),
        prompt_text=renderer.decode(tokens[:prompt_length]),
        expected=renderer.decode(tokens[prompt_length:]),
        num_expected_tokens=len(tokens) - prompt_length,
    )
    document = _build_document(prompt_length, row_id, np.array(tokens, dtype=np.int32))
    return GuardPrompt(question, document, has_end=False)


def _build_document(prompt_length: int, row_id: str, tokens_L: np.ndarray) -> Document:
    weights_L = np.zeros(len(tokens_L), dtype=np.float32)
    weights_L[prompt_length:] = 1
    return Document(row_id, tokens_L, weights_L)


# ---------------------------------------------------------------- measuring


class GenerationProbe:
    """The probes of a run; the first one measures the model before training, as the baseline."""

    def __init__(self, session: Session, prompt_set: GuardPromptSet) -> None:
        self.session = session
        self.prompt_set = prompt_set
        self.prompt_ids = tuple(prompt.question.id for prompt in prompt_set.prompts)
        self.base_norms = compute_weight_norms(session.model.network)
        self.has_adapter = session.plan.config.method != "full"
        # by the first probe: of untrained text, and nats per token of expected answers
        self._base_stats: list[_DocumentStats] = []
        self._base_answer_losses: list[float] = []

    def run_probe(
        self,
        step: int,
        optimizer: torch.optim.Optimizer,
        update_ratios: Mapping[str, float] | None = None,
    ) -> Iterator[Score | GenerationSample]:
        """Yield all scores and answers; the model must be in evaluation mode. `update_ratios` are
        those that the optimizer of one rank cannot tell."""
        model = self.session.model
        questions = [prompt.question for prompt in self.prompt_set.prompts]
        outputs = iter_answers(
            model, questions, self.session.renderer, max_new_tokens=PROBE_NEW_TOKENS
        )
        answers = [output for _, output in sorted(outputs, key=lambda pair: pair[0])]
        measurements = [
            *self._measure_generations(answers),
            *self._measure_expected_loss(),
            *self._measure_texts(),
        ]
        if self.has_adapter:
            measurements.append(self._measure_base_loss(answers))
        ratios = dict(update_ratios or {})
        ratios = ratios or compute_update_ratios(model.network, optimizer, self.base_norms)
        measurements.append(_build_layer_metric("update_ratio", ratios))
        for measurement in measurements:
            if len(measurement.values) > 1:
                yield compute_score(measurement, step=step)
        for question, answer in zip(questions, answers, strict=True):
            yield GenerationSample(
                step, question.id, question.prompt_text, answer.text, question.expected
            )

    def measure_losses(self, step: int) -> Iterator[Score]:
        """Yield only what expected answers and general text have lost, for an evaluation without
        a probe."""
        for measurement in (*self._measure_expected_loss(), *self._measure_texts()):
            if measurement.metric in LOSS_METRICS:
                yield compute_score(measurement, step=step)

    def measure_expected(self) -> Iterator[Score]:
        """Yield the scores of the expected answers, for the metrics that they have."""
        tokens: list[list[int]] = []
        texts: list[str] = []
        ends: list[float] = []
        for prompt in self.prompt_set.prompts:
            answer = prompt.answer_tokens
            tokens.append(answer[:PROBE_NEW_TOKENS])
            texts.append(prompt.question.expected)
            ends.append(float(prompt.has_end and len(answer) <= PROBE_NEW_TOKENS))
        for measurement in self._measure_answers(tokens, texts, ends):
            yield compute_score(dataclasses.replace(measurement, task=EXPECTED_TASK))

    def _measure_answers(
        self, tokens: Sequence[Sequence[int]], texts: Sequence[str], ends: Sequence[float]
    ) -> list[MetricValues]:
        """Return the metrics that expected answers have too."""
        distinct_counts, ngram_counts = count_distinct_bigrams(tokens)
        totals = [max(1, total) for total in ngram_counts]
        ratios = [count / total for count, total in zip(distinct_counts, totals, strict=True)]
        weights = tuple(float(total) for total in totals)
        return [
            dataclasses.replace(self._build_metric("distinct", ratios), weights=weights),
            self._build_metric("same_answer", flag_identical_answers(texts)),
            self._build_metric("end_rate", ends),
            self._build_metric("length", [float(len(answer)) for answer in tokens]),
        ]

    def _measure_generations(self, answers: Sequence[GenerationOutput]) -> list[MetricValues]:
        """Return the metrics of the model's answers."""
        tokens = [answer.tokens for answer in answers]
        texts = [answer.text for answer in answers]
        ends = [float(answer.finish_reason == "end") for answer in answers]
        prompt_texts: list[str] = []  # prompts and expected answers
        for prompt in self.prompt_set.prompts:
            prompt_texts += [prompt.question.prompt_text, prompt.question.expected]
        scripts = find_scripts(prompt_texts) | {"LATIN"}
        metrics: dict[str, Sequence[float]] = {
            "repetition": [compute_repetition(answer) for answer in tokens],
            "foreign": [compute_foreign_share(text, scripts) for text in texts],
        }
        if language_id.is_installed():
            # -1: a text that is too short to tell.
            languages = {language_id.detect_language(text) for text in prompt_texts} | {-1}
            metrics["language"] = [
                float(language_id.detect_language(text) not in languages) for text in texts
            ]
        if {"json_valid", "schema_valid"} & set(self.session.plan.config.metrics):
            metrics["json"] = [
                float(is_json(answer.text, is_truncated=answer.finish_reason == "length"))
                for answer in answers
            ]
        for constraint in self.session.inputs.recipe.never:
            metrics[f"breaks {constraint.name}"] = [
                float(bool(find_matches(constraint, text, row_id)))
                for text, row_id in zip(texts, self.prompt_ids, strict=True)
            ]
        measurements = self._measure_answers(tokens, texts, ends)
        for name, values in metrics.items():
            measurements.append(self._build_metric(name, values))
        return measurements

    def _measure_base_loss(self, answers: Sequence[GenerationOutput]) -> MetricValues:
        """Return the nats per token of each answer under the base model."""
        documents: list[Document] = []
        for prompt, answer in zip(self.prompt_set.prompts, answers, strict=True):
            prompt_ids = prompt.question.prompt_ids
            tokens_L = np.array((*prompt_ids, *answer.tokens), np.int32)
            documents.append(_build_document(len(prompt_ids), prompt.question.id, tokens_L))
        config = self.session.plan.config
        model = self.session.model
        with scaled_adapter(model.network, 0):
            nlls = sorted(
                compute_nll(model, documents, config.pack_length, share=config.share_prefixes)
            )
        return self._build_metric("base_loss", [nats / count for _, nats, count in nlls])

    def _measure_expected_loss(self) -> list[MetricValues]:
        """Return the loss of expected answers, what it rose by since the first probe, and that of
        their EOS."""
        prompts = self.prompt_set.prompts
        stats = _measure_documents(self.session, [prompt.document for prompt in prompts], 0)
        losses = [document_stats.nats / document_stats.count for document_stats in stats]
        self._base_answer_losses = self._base_answer_losses or losses
        rises = [loss - base for loss, base in zip(losses, self._base_answer_losses, strict=True)]
        measurements = [self._build_metric("answer_loss", losses)]
        if self.prompt_set.is_held_out:
            measurements.append(self._build_metric("answer_loss_rise", rises))
        if all(prompt.has_end for prompt in prompts):
            measurements.append(self._build_metric("end_loss", [s.last_nats for s in stats]))
        return measurements

    def _measure_texts(self) -> list[MetricValues]:
        """Return entropy and KL(base || tuned) on general texts, and the bits per byte lost."""
        texts = self.prompt_set.texts
        if not texts:
            return []
        documents: list[Document] = []
        for text in texts:
            tokens_L = np.array(self.session.renderer.encode_text(text.text), dtype=np.int32)
            documents.append(_build_document(1, text.id, tokens_L))
        stats = _measure_documents(self.session, documents, max(1, MAX_POSITIONS // len(texts)))
        text_ids = tuple(text.id for text in texts)
        self._base_stats = self._base_stats or stats
        pairs = zip(stats, self._base_stats, strict=True)
        kl = [current.compute_kl(base) for current, base in pairs]
        entropy = [text_stats.entropy for text_stats in stats]
        lost_bits = [
            (current.nats - base.nats) / math.log(2) / len(text.text.encode())
            for text, current, base in zip(texts, stats, self._base_stats, strict=True)
        ]
        forgotten = MetricValues(
            PROBE_TASK,
            "forgotten",
            text_ids,
            tuple(lost_bits),
            weights=(1.0,) * len(texts),  # before training all are 0, which is no rate
            strata=tuple(text.domain for text in texts),
            higher_is_better=False,
        )
        drift = [_make_metric("entropy", text_ids, entropy), _make_metric("kl", text_ids, kl)]
        return [*drift, forgotten]

    def _build_metric(self, metric: str, values: Sequence[float]) -> MetricValues:
        is_rate = metric in RATE_METRICS or metric.startswith("breaks ")
        return _make_metric(metric, self.prompt_ids, values, is_rate=is_rate)


def _build_layer_metric(metric: str, values: dict[str, float]) -> MetricValues:
    return _make_metric(metric, tuple(values), tuple(values.values()))


def _make_metric(
    metric: str, ids: tuple[str, ...], values: Sequence[float], *, is_rate: bool = False
) -> MetricValues:
    # Weights, so that values which are all 0 and no rate are not taken for a rate.
    weights = () if is_rate else (1.0,) * len(ids)
    return MetricValues(PROBE_TASK, metric, ids, tuple(values), weights=weights)


@dataclass(frozen=True, eq=False)
class _DocumentStats:
    """A model's loss on a document and its next-token distributions at a few positions.

    `nats` are summed over `count` targets, `last_nats` are those of the last target;
    `logp_PV` are log-probabilities [positions, vocabulary]."""

    nats: float
    count: int
    last_nats: float
    logp_PV: Tensor

    @property
    def entropy(self) -> float:
        """Mean entropy of the next token in nats."""
        return float(-(self.logp_PV.exp() * self.logp_PV).sum(-1).mean())

    def compute_kl(self, base: _DocumentStats) -> float:
        """Return KL(base || this) in nats per token."""
        return float((base.logp_PV.exp() * (base.logp_PV - self.logp_PV)).sum(-1).mean())


@torch.no_grad()
def _measure_documents(
    session: Session, documents: Sequence[Document], num_positions: int
) -> list[_DocumentStats]:
    """Return the stats of each document, with distributions at about `num_positions` positions.

    The positions are evenly spaced over a text."""
    sampled_positions = [_sample_positions(document, num_positions) for document in documents]
    weighted_documents: list[Document] = []
    for document, positions in zip(documents, sampled_positions, strict=True):
        weights_L = document.weights_L.copy()
        weights_L[positions] = 1
        weighted_documents.append(dataclasses.replace(document, weights_L=weights_L))

    def measure_batch(
        model: PackedCausalLM, batch: Batch, indices: Sequence[int]
    ) -> list[_DocumentStats]:
        hidden_S = model.compute_hidden(batch)
        losses_S = measure_target_losses(hidden_S, model.head, batch.targets_S)
        stats: list[_DocumentStats] = []
        for number, index in enumerate(indices):
            in_document_S = batch.document_S == number
            (target_positions,) = np.nonzero(weighted_documents[index].weights_L)
            is_trained = documents[index].weights_L[target_positions] > 0
            is_sampled = np.isin(target_positions, sampled_positions[index])
            nats = losses_S[in_document_S][torch.from_numpy(is_trained).to(losses_S.device)]
            nats = nats.double()
            hidden_P = hidden_S[in_document_S][torch.from_numpy(is_sampled).to(losses_S.device)]
            logp_PV = torch.log_softmax(model.head.compute_logits(hidden_P).float(), -1).cpu()
            stats.append(_DocumentStats(float(nats.sum()), len(nats), float(nats[-1]), logp_PV))
        return stats

    pack_length = session.plan.config.pack_length
    results = map_documents(session.model, weighted_documents, pack_length, measure_batch)
    stats_by_index = dict(results)
    return [stats_by_index[index] for index in range(len(documents))]


def _sample_positions(document: Document, count: int) -> list[int]:
    if not count:
        return []
    candidates = range(1, len(document))
    return list(candidates[:: max(1, math.ceil(len(candidates) / count))])
