"""Probes: what the model says while it trains, on a few fixed prompts, and how far it is from where
it began.

    probe_set(plan, facts, texts) -> ProbeSet   prompts of eval_data, never of test_data; short
    general texts Probes(bench, chosen).take(step, optimizer) -> Scores and Samples

A probe writes short greedy answers, and reads them with the adapter off: would the base write that?
It reads the expected answers, and text that is not trained: the general texts if there are any,
else the prompts themselves. All measures are by item, and those of step 0 are what later ones are
compared with. Nothing here changes the model, and no random number of training is used. Left out:
which numbers are bad (train/guard.py), when to look (guarded.py)."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from tunesmith.core.events import EXPECTED_TASK, PROBE_TASK, GenerationSample, Score
from tunesmith.core.types import Batch, Document, Example, GenerationOutput, Plan
from tunesmith.data.chat_template.renderer import Renderer
from tunesmith.data.checks import language_id
from tunesmith.data.dataset import Dataset
from tunesmith.data.sampler import permutation
from tunesmith.evaluate.constraint_violations import find_matches
from tunesmith.evaluate.degeneration import (
    compute_compression_ratio,
    compute_foreign_share,
    compute_repetition,
    count_distinct_ngrams,
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
    compute_adapter_ratios,
    compute_update_ratios,
    compute_weight_norms,
)

MAX_PROMPT_TOKENS = 64  # of a text that is gone on with
# rows looked at for each prompt that is taken: the shortest are, since prompts cost what they are
# long
CANDIDATES_PER_PROMPT = 4
MAX_TEXTS, MAX_TEXT_CHARS = 8, 512
MAX_POSITIONS = 128  # whose whole distribution is compared
RATE_METRICS = {"same_answer", "end_rate", "json", "language"}  # 0 or 1 an answer
PROMPT_ROLES = (
    "eval_data",
    "rehearsal",
    "retention_data",
)  # where prompts come from: the first that has two


@dataclass(frozen=True)
class GuardPrompt:
    """A prompt, and the document of the prompt and the expected answer, whose last target ends it
    if `ends`."""

    question: EvalPrompt
    document: Document
    has_end: bool

    @property
    def answer_tokens(self) -> list[int]:
        return self.document.tokens_L[len(self.question.prompt_ids) :].tolist()


@dataclass(frozen=True)
class GuardPromptSet:
    prompts: tuple[GuardPrompt, ...]
    texts: tuple[GeneralText, ...]  # short pieces of general texts


# ---------------------------------------------------------------- which prompts


def build_prompt_set(
    plan: Plan, inputs: RunInputs, texts: Sequence[GeneralText]
) -> GuardPromptSet | None:
    """None when no role has two prompts: of one prompt nothing can be said. `texts`: those of
    `retention_data`."""
    short_texts = _truncate_texts(texts)
    for role in PROMPT_ROLES:
        if role in inputs.datasets:
            candidates = _build_row_prompts(
                inputs.datasets[role], inputs.renderer, plan.config.probe_prompts
            )
        else:
            role_texts = [text for text in texts if role == "retention_data"]
            candidates = [
                _build_text_prompt(text.id, text.text, inputs.renderer)
                for text in role_texts[:: max(1, len(role_texts) // 8)]
            ]
        usable = [prompt for prompt in candidates if prompt is not None][
            : plan.config.probe_prompts
        ]
        if len(usable) > 1:
            return GuardPromptSet(tuple(usable), short_texts)
    return None


def _truncate_texts(texts: Sequence[GeneralText]) -> tuple[GeneralText, ...]:
    """The beginnings of a few, as many of each domain."""
    domains = list(dict.fromkeys(text.domain for text in texts))
    texts_per_domain = max(2, MAX_TEXTS // max(1, len(domains)))
    selected = [
        text
        for domain in domains
        for text in [candidate for candidate in texts if candidate.domain == domain][
            :texts_per_domain
        ]
    ]
    return tuple(dataclasses.replace(text, text=text.text[:MAX_TEXT_CHARS]) for text in selected)


def _build_row_prompts(dataset: Dataset, renderer: Renderer, count: int) -> list[GuardPrompt]:
    """Rows by chance, and of those the shortest, in the order of the file."""
    sampled_rows = permutation(0, 0, len(dataset))[: CANDIDATES_PER_PROMPT * count].tolist()
    candidates: list[tuple[int, int, GuardPrompt]] = []
    for row in sampled_rows:
        example = dataset.read_example(row)
        prompt = (
            _build_text_prompt(example.id, example.text, renderer)
            if example.text and not example.prompt
            else None
        )
        prompt = prompt or _build_example_prompt(example, renderer)
        if prompt is not None:
            candidates.append((len(prompt.document), row, prompt))
    shortest = sorted(candidates, key=lambda candidate: candidate[:2])[:count]
    return [prompt for _, _, prompt in sorted(shortest, key=lambda candidate: candidate[1])]


def _build_example_prompt(example: Example, renderer: Renderer) -> GuardPrompt | None:
    """None for a row that asks nothing, or whose answer is bad."""
    if example.negative or (example.text is not None and not example.prompt):
        return None
    plain_example = dataclasses.replace(example, rejected=None, banned_spans=())
    documents = renderer.render(plain_example).documents
    if not documents:
        return None
    question = build_prompts([plain_example], renderer)[0]
    prompt_length, total_length = (
        len(question.prompt_ids),
        len(question.prompt_ids) + question.num_expected_tokens,
    )
    tokens_L = documents[-1].tokens_L[:total_length]
    return GuardPrompt(
        question,
        _build_document(prompt_length, example.id, tokens_L),
        int(tokens_L[-1]) in renderer.end_ids,
    )


def _build_text_prompt(row_id: str, text: str, renderer: Renderer) -> GuardPrompt | None:
    """A text's beginning, to be gone on with."""
    tokens = list(renderer.encode_text(text[: 8 * (MAX_PROMPT_TOKENS + PROBE_NEW_TOKENS)]))[
        : MAX_PROMPT_TOKENS + PROBE_NEW_TOKENS
    ]
    prompt_length = min(MAX_PROMPT_TOKENS, len(tokens) // 2)
    if not prompt_length:
        return None
    prompt_text, expected = (
        renderer.decode(tokens[:prompt_length]),
        renderer.decode(tokens[prompt_length:]),
    )
    question = EvalPrompt(
        row_id, tuple(tokens[:prompt_length]), prompt_text, expected, len(tokens) - prompt_length
    )
    return GuardPrompt(
        question,
        _build_document(prompt_length, row_id, np.array(tokens, dtype=np.int32)),
        has_end=False,
    )


def _build_document(prompt_length: int, row_id: str, tokens_L: np.ndarray) -> Document:
    weights_L = np.zeros(len(tokens_L), dtype=np.float32)
    weights_L[prompt_length:] = 1
    return Document(row_id, tokens_L, weights_L)


# ---------------------------------------------------------------- measuring


class GenerationProbe:
    """The probes of a run. The first `take` is of the model before training: what later ones are
    compared with."""

    def __init__(self, session: Session, prompt_set: GuardPromptSet) -> None:
        self.session, self.prompt_set = session, prompt_set
        self.base_norms = compute_weight_norms(session.model.network)
        self.has_adapter = session.plan.config.method != "full"
        self._base_stats: list[_DocumentStats] = []

    def run_probe(
        self, step: int, optimizer: torch.optim.Optimizer
    ) -> Iterator[Score | GenerationSample]:
        """The model must be in evaluation mode."""
        questions = [prompt.question for prompt in self.prompt_set.prompts]
        outputs = iter_answers(
            self.session.model, questions, self.session.renderer, max_new_tokens=PROBE_NEW_TOKENS
        )
        answers = [measurements for _, measurements in sorted(outputs, key=lambda pair: pair[0])]
        found = [
            *self._measure_generations(answers),
            *self._measure_expected_loss(),
            *self._measure_texts(),
        ]
        if self.has_adapter:
            found.append(self._measure_base_loss(answers))
            found.append(
                _build_layer_measurement(
                    "adapter_share",
                    compute_adapter_ratios(self.session.model.network, self.base_norms),
                )
            )
        found.append(
            _build_layer_measurement(
                "update_ratio",
                compute_update_ratios(self.session.model.network, optimizer, self.base_norms),
            )
        )
        yield from (
            compute_score(measurement, step=step)
            for measurement in found
            if len(measurement.values) > 1
        )
        for question, answer in zip(questions, answers, strict=True):
            yield GenerationSample(
                step, question.id, question.prompt_text, answer.text, question.expected
            )

    def measure_forgetting(self, step: int) -> Iterator[Score]:
        """What general text has lost, alone: for a look that is no probe."""
        yield from (
            compute_score(measurement, step=step)
            for measurement in self._measure_texts()
            if measurement.metric == "forgotten"
        )

    def measure_expected(self) -> Iterator[Score]:
        """The same measures of what should be said, where it has them."""
        answers = [prompt.answer_tokens for prompt in self.prompt_set.prompts]
        ends = [
            float(prompt.has_end and len(answer) <= PROBE_NEW_TOKENS)
            for prompt, answer in zip(self.prompt_set.prompts, answers, strict=True)
        ]
        texts = [prompt.question.expected for prompt in self.prompt_set.prompts]
        for measurement in self._measure_answers(
            [answer[:PROBE_NEW_TOKENS] for answer in answers], texts, ends
        ):
            yield compute_score(dataclasses.replace(measurement, task=EXPECTED_TASK))

    def _measure_answers(
        self, tokens: Sequence[Sequence[int]], texts: Sequence[str], ends: Sequence[float]
    ) -> list[MetricValues]:
        """What is compared with the expected answers too."""
        distinct_counts, ngram_counts = count_distinct_ngrams(tokens)
        ratios = [
            count / max(1, total)
            for count, total in zip(distinct_counts, ngram_counts, strict=True)
        ]
        return [
            dataclasses.replace(
                self._build_measurement("distinct", ratios),
                weights=tuple(float(max(1, total)) for total in ngram_counts),
            ),
            self._build_measurement("same_answer", flag_identical_answers(texts)),
            self._build_measurement("end_rate", ends),
            self._build_measurement("length", [float(len(answer)) for answer in tokens]),
        ]

    def _measure_generations(self, answers: Sequence[GenerationOutput]) -> list[MetricValues]:
        tokens, texts = [answer.tokens for answer in answers], [answer.text for answer in answers]
        ends = [float(answer.finish_reason == "end") for answer in answers]
        questions = [prompt.question for prompt in self.prompt_set.prompts]
        expected_scripts = find_scripts(
            text for one in questions for text in (one.prompt_text, one.expected)
        ) | {"LATIN"}
        measurements = [
            *self._measure_answers(tokens, texts, ends),
            self._build_measurement(
                "repetition", [compute_repetition(answer) for answer in tokens]
            ),
            self._build_measurement(
                "compressed", [compute_compression_ratio(text) for text in texts]
            ),
            self._build_measurement(
                "foreign", [compute_foreign_share(text, expected_scripts) for text in texts]
            ),
        ]
        if language_id.is_installed():
            expected_languages = {
                language_id.detect_language(text)
                for one in questions
                for text in (one.prompt_text, one.expected)
            } | {-1}
            measurements.append(
                self._build_measurement(
                    "language",
                    [
                        float(language_id.detect_language(text) not in expected_languages)
                        for text in texts
                    ],
                )
            )
        if {"json_valid", "schema_valid"} & set(self.session.plan.config.metrics):
            valid_flags = [
                is_json(answer.text, is_truncated=answer.finish_reason == "length")
                for answer in answers
            ]
            measurements.append(
                self._build_measurement("json", [float(constraint) for constraint in valid_flags])
            )
        for one in self.session.inputs.recipe.never:
            broken_flags = [
                bool(find_matches(one, text, questions[i].id)) for i, text in enumerate(texts)
            ]
            measurements.append(
                self._build_measurement(
                    f"breaks {one.name}", [float(value) for value in broken_flags]
                )
            )
        return measurements

    def _measure_base_loss(self, answers: Sequence[GenerationOutput]) -> MetricValues:
        """Nats a token of the answers under the base: gibberish is unlikely to it."""
        documents = [
            _build_document(
                len(prompt.question.prompt_ids),
                prompt.question.id,
                np.array((*prompt.question.prompt_ids, *answer.tokens), np.int32),
            )
            for prompt, answer in zip(self.prompt_set.prompts, answers, strict=True)
        ]
        plan = self.session.plan
        with scaled_adapter(self.session.model.network, 0):
            likelihoods = compute_nll(
                self.session.model,
                documents,
                plan.config.pack_length,
                share=plan.config.share_prefixes,
            )
            return self._build_measurement(
                "base_loss", [nats / count for _, nats, count in sorted(likelihoods)]
            )

    def _measure_expected_loss(self) -> list[MetricValues]:
        """How likely expected answers and their ends are; and, without general texts, what became
        of the prompts."""
        prompts, ids = (
            self.prompt_set.prompts,
            tuple(prompt.question.id for prompt in self.prompt_set.prompts),
        )
        positions = 0 if self.prompt_set.texts else MAX_POSITIONS // len(prompts)
        stats = _measure_documents(
            self.session, [(prompt.document, positions) for prompt in prompts]
        )
        measurements = [
            self._build_measurement(
                "answer_loss",
                [document_stats.nats / document_stats.count for document_stats in stats],
            )
        ]
        if all(prompt.has_end for prompt in prompts):
            measurements.append(
                self._build_measurement(
                    "end_loss", [document_stats.last_nats for document_stats in stats]
                )
            )
        return (
            measurements
            if self.prompt_set.texts
            else [*measurements, *self._measure_drift(ids, stats)]
        )

    def _measure_texts(self) -> list[MetricValues]:
        """What became of general text."""
        texts, renderer = self.prompt_set.texts, self.session.renderer
        if not texts:
            return []
        tokens = [np.array(renderer.encode_text(text.text), dtype=np.int32) for text in texts]
        documents = [
            _build_document(1, text.id, tokens_L)
            for text, tokens_L in zip(texts, tokens, strict=True)
        ]
        stats = _measure_documents(
            self.session,
            [(document, max(1, MAX_POSITIONS // len(texts))) for document in documents],
        )
        measurements = self._measure_drift(tuple(text.id for text in texts), stats)
        lost_bits = [
            (current.nats - base.nats) / math.log(2) / len(text.text.encode())
            for text, current, base in zip(texts, stats, self._base_stats, strict=True)
        ]
        domains = tuple(text.domain for text in texts)
        forgotten = MetricValues(
            PROBE_TASK,
            "forgotten",
            measurements[0].ids,
            tuple(lost_bits),
            groups=domains,
            higher_is_better=False,
        )
        return [*measurements, forgotten]

    def _measure_drift(
        self, ids: tuple[str, ...], stats: list[_DocumentStats]
    ) -> list[MetricValues]:
        """Text that nothing trains, beside what the model before training found of it: the first
        readings."""
        self._base_stats = self._base_stats or stats
        kl = [
            current.compute_kl(base) for current, base in zip(stats, self._base_stats, strict=True)
        ]
        entropy = tuple(document_stats.entropy for document_stats in stats)
        return [_make_measurement("entropy", ids, entropy), _make_measurement("kl", ids, kl)]

    def _build_measurement(self, metric: str, values: Sequence[float]) -> MetricValues:
        ids = tuple(prompt.question.id for prompt in self.prompt_set.prompts)
        return _make_measurement(
            metric, ids, values, is_rate=metric in RATE_METRICS or metric.startswith("breaks ")
        )


@dataclass(frozen=True, eq=False)
class _DocumentStats:
    """What a model found of a document: nats and number of its targets, of the last one, and its
    whole distribution at a few places [P, V], as log-probabilities."""

    nats: float
    count: int
    last_nats: float
    logp_PV: Tensor

    @property
    def entropy(self) -> float:
        return float(-(self.logp_PV.exp() * self.logp_PV).sum(-1).mean())

    def compute_kl(self, base: _DocumentStats) -> float:
        """KL(base || this), nats a token."""
        return float((base.logp_PV.exp() * (base.logp_PV - self.logp_PV)).sum(-1).mean())


@torch.no_grad()
def _measure_documents(
    session: Session, requests: Sequence[tuple[Document, int]]
) -> list[_DocumentStats]:
    """Of each document, with so many places, evenly spaced over what is no answer, or over all of a
    text."""
    sampled_positions = [_sample_positions(document, count) for document, count in requests]
    weighted_documents: list[Document] = []
    for (document, _), positions in zip(requests, sampled_positions, strict=True):
        weights_L = document.weights_L.copy()
        weights_L[positions] = 1
        weighted_documents.append(dataclasses.replace(document, weights_L=weights_L))

    def measure_batch(
        model: PackedCausalLM, batch: Batch, positions: Sequence[int]
    ) -> list[_DocumentStats]:
        hidden_S = model.compute_hidden(batch)
        losses_S = measure_target_losses(hidden_S, model.head, batch.targets_S)
        stats: list[_DocumentStats] = []
        for number, index in enumerate(positions):
            in_document_S = batch.document_S == number
            (target_positions,) = np.nonzero(weighted_documents[index].weights_L)
            is_trained = torch.from_numpy(requests[index][0].weights_L[target_positions] > 0).to(
                losses_S.device
            )
            is_sampled = torch.from_numpy(np.isin(target_positions, sampled_positions[index])).to(
                losses_S.device
            )
            nats = losses_S[in_document_S][is_trained].double()
            logp_PV = torch.log_softmax(
                model.head.compute_logits(hidden_S[in_document_S][is_sampled]).float(), -1
            ).cpu()
            stats.append(_DocumentStats(float(nats.sum()), len(nats), float(nats[-1]), logp_PV))
        return stats

    stats_by_index = dict(
        map_documents(
            session.model, weighted_documents, session.plan.config.pack_length, measure_batch
        )
    )
    return [stats_by_index[index] for index in range(len(requests))]


def _sample_positions(document: Document, count: int) -> list[int]:
    first_target = int(np.flatnonzero(document.weights_L)[0])
    candidates = range(1, first_target if first_target > 1 else len(document))
    return list(candidates[:: max(1, math.ceil(len(candidates) / count))]) if count else []


def _build_layer_measurement(metric: str, values: dict[str, float]) -> MetricValues:
    return _make_measurement(metric, tuple(values), tuple(values.values()))


def _make_measurement(
    metric: str, ids: tuple[str, ...], values: Sequence[float], *, is_rate: bool = False
) -> MetricValues:
    """Weights keep values that are all 0, and are no rate, from being taken for one."""
    return MetricValues(
        PROBE_TASK, metric, ids, tuple(values), weights=() if is_rate else (1.0,) * len(ids)
    )
