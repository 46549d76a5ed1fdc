"""Probes: what the model says while it trains, on a few fixed prompts, and how far it is from where it began.

    probe_set(plan, facts, texts) -> ProbeSet   prompts of eval_data, never of test_data; short general texts
    Probes(bench, chosen).take(step, optimizer) -> Scores and Samples

A probe writes short greedy answers, and reads them with the adapter off: would the base write that? It reads the
expected answers, and text that is not trained: the general texts if there are any, else the prompts themselves. All
measures are by item, and those of step 0 are what later ones are compared with. Nothing here changes the model, and no
random number of training is used. Left out: which numbers are bad (train/guard.py), when to look (guarded.py).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from tunesmith.core.events import EXPECTED, PROBES, Sample, Score
from tunesmith.core.types import Batch, Document, Example, Generation, Plan
from tunesmith.data.chat_template.renderer import Renderer
from tunesmith.data.checks import language_id
from tunesmith.data.dataset import Dataset
from tunesmith.data.sampler import order
from tunesmith.evaluate.constraint_violations import matched
from tunesmith.evaluate.degeneration import compressed, distinct, foreign, is_json, repetition, same, scripts
from tunesmith.evaluate.general_text import GeneralText
from tunesmith.evaluate.generate_until import Question, ask, questions_of
from tunesmith.evaluate.loglikelihood import by_document, negative_log_likelihoods
from tunesmith.evaluate.results import Measurement, score
from tunesmith.model.adapters import adapter_scaled
from tunesmith.model.causal_lm import LanguageModel
from tunesmith.model.lm_head import target_losses
from tunesmith.plan.guard import NEW_TOKENS
from tunesmith.session.inputs import Facts
from tunesmith.session.session import Workbench
from tunesmith.train.update_norms import adapter_shares, update_shares, weight_norms

PROMPT_TOKENS = 64  # of a text that is gone on with
DRAWN = 4  # rows looked at for each prompt that is taken: the shortest are, since prompts cost what they are long
TEXTS, TEXT_CHARACTERS = 8, 512
POSITIONS = 128  # whose whole distribution is compared
RATES = {"same_answer", "end_rate", "json", "language"}  # 0 or 1 an answer
ROLES = ("eval_data", "rehearsal", "retention_data")  # where prompts come from: the first that has two


@dataclass(frozen=True)
class Probe:
    """A prompt, and the document of the prompt and the expected answer, whose last target ends it if `ends`."""

    question: Question
    document: Document
    ends: bool

    @property
    def answer(self) -> list[int]:
        return self.document.tokens_L[len(self.question.prompt) :].tolist()


@dataclass(frozen=True)
class ProbeSet:
    probes: tuple[Probe, ...]
    texts: tuple[GeneralText, ...]  # short pieces of general texts


# ---------------------------------------------------------------- which prompts


def probe_set(plan: Plan, facts: Facts, texts: Sequence[GeneralText]) -> ProbeSet | None:
    """None when no role has two prompts: of one prompt nothing can be said. `texts`: those of `retention_data`."""
    short = _short(texts)
    for role in ROLES:
        if role in facts.datasets:
            found = _of_rows(facts.datasets[role], facts.renderer, plan["probe_prompts"])
        else:
            own = [one for one in texts if role == "retention_data"]
            found = [_of_text(one.id, one.text, facts.renderer) for one in own[:: max(1, len(own) // 8)]]
        usable = [probe for probe in found if probe is not None][: plan["probe_prompts"]]
        if len(usable) > 1:
            return ProbeSet(tuple(usable), short)
    return None


def _short(texts: Sequence[GeneralText]) -> tuple[GeneralText, ...]:
    """The beginnings of a few, as many of each domain."""
    domains = list(dict.fromkeys(text.domain for text in texts))
    each = max(2, TEXTS // max(1, len(domains)))
    kept = [text for domain in domains for text in [one for one in texts if one.domain == domain][:each]]
    return tuple(dataclasses.replace(text, text=text.text[:TEXT_CHARACTERS]) for text in kept)


def _of_rows(rows: Dataset, renderer: Renderer, count: int) -> list[Probe]:
    """Rows by chance, and of those the shortest, in the order of the file."""
    drawn = order(0, 0, len(rows))[: DRAWN * count].tolist()
    found: list[tuple[int, int, Probe]] = []
    for row in drawn:
        example = rows.example(row)
        made = _of_text(example.id, example.text, renderer) if example.text and not example.prompt else None
        made = made or _of_example(example, renderer)
        if made is not None:
            found.append((len(made.document), row, made))
    kept = sorted(found, key=lambda one: one[:2])[:count]
    return [made for _, _, made in sorted(kept, key=lambda one: one[1])]


def _of_example(example: Example, renderer: Renderer) -> Probe | None:
    """None for a row that asks nothing, or whose answer is bad."""
    if example.negative or (example.text is not None and not example.prompt):
        return None
    plain = dataclasses.replace(example, rejected=None, banned=())
    documents = renderer.documents(plain).documents
    if not documents:
        return None
    question = questions_of([plain], renderer)[0]
    begin, end = len(question.prompt), len(question.prompt) + question.expected_tokens
    tokens_L = documents[-1].tokens_L[:end]
    return Probe(question, _read_from(begin, example.id, tokens_L), int(tokens_L[-1]) in renderer.end_ids)


def _of_text(row: str, text: str, renderer: Renderer) -> Probe | None:
    """A text's beginning, to be gone on with."""
    tokens = list(renderer.text_tokens(text[: 8 * (PROMPT_TOKENS + NEW_TOKENS)]))[: PROMPT_TOKENS + NEW_TOKENS]
    begin = min(PROMPT_TOKENS, len(tokens) // 2)
    if not begin:
        return None
    shown, expected = renderer.decode(tokens[:begin]), renderer.decode(tokens[begin:])
    question = Question(row, tuple(tokens[:begin]), shown, expected, len(tokens) - begin)
    return Probe(question, _read_from(begin, row, np.array(tokens, dtype=np.int32)), ends=False)


def _read_from(begin: int, row: str, tokens_L: np.ndarray) -> Document:
    weights_L = np.zeros(len(tokens_L), dtype=np.float32)
    weights_L[begin:] = 1
    return Document(row, tokens_L, weights_L)


# ---------------------------------------------------------------- measuring


class Probes:
    """The probes of a run. The first `take` is of the model before training: what later ones are compared with."""

    def __init__(self, bench: Workbench, chosen: ProbeSet) -> None:
        self.bench, self.chosen = bench, chosen
        self.weights = weight_norms(bench.model.network)
        self.adapted = bench.plan["method"] != "full"
        self._base: list[_Reading] = []

    def take(self, step: int, optimizer: torch.optim.Optimizer) -> Iterator[Score | Sample]:
        """The model must be in evaluation mode."""
        questions = [probe.question for probe in self.chosen.probes]
        asked = ask(self.bench.model, questions, self.bench.renderer, max_new_tokens=NEW_TOKENS)
        answers = [found for _, found in sorted(asked, key=lambda pair: pair[0])]
        found = [*self._said(answers), *self._expected_read(), *self._texts_read()]
        if self.adapted:
            found.append(self._under_base(answers))
            found.append(_by_name("adapter_share", adapter_shares(self.bench.model.network, self.weights)))
        found.append(_by_name("update_ratio", update_shares(self.bench.model.network, optimizer, self.weights)))
        yield from (score(one, step=step) for one in found if len(one.values) > 1)
        for question, answer in zip(questions, answers, strict=True):
            yield Sample(step, question.id, question.shown, answer.text, question.expected)

    def forgotten(self, step: int) -> Iterator[Score]:
        """What general text has lost, alone: for a look that is no probe."""
        yield from (score(one, step=step) for one in self._texts_read() if one.metric == "forgotten")

    def expected(self) -> Iterator[Score]:
        """The same measures of what should be said, where it has them."""
        answers = [probe.answer for probe in self.chosen.probes]
        ends = [float(p.ends and len(a) <= NEW_TOKENS) for p, a in zip(self.chosen.probes, answers, strict=True)]
        texts = [probe.question.expected for probe in self.chosen.probes]
        for one in self._alike([answer[:NEW_TOKENS] for answer in answers], texts, ends):
            yield score(dataclasses.replace(one, task=EXPECTED))

    def _alike(self, tokens: Sequence[Sequence[int]], texts: Sequence[str], ends: Sequence[float]) -> list[Measurement]:
        """What is compared with the expected answers too."""
        new, grams = distinct(tokens)
        shares = [count / max(1, of) for count, of in zip(new, grams, strict=True)]
        return [
            dataclasses.replace(self._by_item("distinct", shares), weights=tuple(float(max(1, of)) for of in grams)),
            self._by_item("same_answer", same(texts)),
            self._by_item("end_rate", ends),
            self._by_item("length", [float(len(answer)) for answer in tokens]),
        ]

    def _said(self, answers: Sequence[Generation]) -> list[Measurement]:
        tokens, texts = [answer.tokens for answer in answers], [answer.text for answer in answers]
        ends = [float(answer.finished == "end") for answer in answers]
        asked = [probe.question for probe in self.chosen.probes]
        usual = scripts(text for one in asked for text in (one.shown, one.expected)) | {"LATIN"}
        found = [
            *self._alike(tokens, texts, ends),
            self._by_item("repetition", [repetition(answer) for answer in tokens]),
            self._by_item("compressed", [compressed(text) for text in texts]),
            self._by_item("foreign", [foreign(text, usual) for text in texts]),
        ]
        if language_id.installed():
            known = {language_id.language(text) for one in asked for text in (one.shown, one.expected)} | {-1}
            found.append(self._by_item("language", [float(language_id.language(text) not in known) for text in texts]))
        if {"json_valid", "schema_valid"} & set(self.bench.plan["metrics"]):
            formed = [is_json(answer.text, cut=answer.finished == "length") for answer in answers]
            found.append(self._by_item("json", [float(one) for one in formed]))
        for one in self.bench.facts.recipe.never:
            broken = [bool(matched(one, text, asked[i].id)) for i, text in enumerate(texts)]
            found.append(self._by_item(f"breaks {one.name}", [float(value) for value in broken]))
        return found

    def _under_base(self, answers: Sequence[Generation]) -> Measurement:
        """Nats a token of the answers under the base: gibberish is unlikely to it."""
        documents = [
            _read_from(len(p.question.prompt), p.question.id, np.array((*p.question.prompt, *a.tokens), np.int32))
            for p, a in zip(self.chosen.probes, answers, strict=True)
        ]
        plan = self.bench.plan
        with adapter_scaled(self.bench.model.network, 0):
            found = negative_log_likelihoods(
                self.bench.model, documents, plan["pack_length"], share=plan["share_prefixes"]
            )
            return self._by_item("base_loss", [nats / count for _, nats, count in sorted(found)])

    def _expected_read(self) -> list[Measurement]:
        """How likely expected answers and their ends are; and, without general texts, what became of the prompts."""
        probes, ids = self.chosen.probes, tuple(probe.question.id for probe in self.chosen.probes)
        positions = 0 if self.chosen.texts else POSITIONS // len(probes)
        readings = _read(self.bench, [(probe.document, positions) for probe in probes])
        found = [self._by_item("answer_loss", [one.nats / one.count for one in readings])]
        if all(probe.ends for probe in probes):
            found.append(self._by_item("end_loss", [one.last for one in readings]))
        return found if self.chosen.texts else [*found, *self._untrained(ids, readings)]

    def _texts_read(self) -> list[Measurement]:
        """What became of general text."""
        texts, renderer = self.chosen.texts, self.bench.renderer
        if not texts:
            return []
        tokens = [np.array(renderer.text_tokens(text.text), dtype=np.int32) for text in texts]
        documents = [_read_from(1, text.id, tokens_L) for text, tokens_L in zip(texts, tokens, strict=True)]
        readings = _read(self.bench, [(document, max(1, POSITIONS // len(texts))) for document in documents])
        found = self._untrained(tuple(text.id for text in texts), readings)
        lost = [
            (now.nats - then.nats) / math.log(2) / len(text.text.encode())
            for text, now, then in zip(texts, readings, self._base, strict=True)
        ]
        domains = tuple(text.domain for text in texts)
        forgotten = Measurement(PROBES, "forgotten", found[0].ids, tuple(lost), groups=domains, higher_is_better=False)
        return [*found, forgotten]

    def _untrained(self, ids: tuple[str, ...], readings: list[_Reading]) -> list[Measurement]:
        """Text that nothing trains, beside what the model before training found of it: the first readings."""
        self._base = self._base or readings
        away = [now.away_from(then) for now, then in zip(readings, self._base, strict=True)]
        entropy = tuple(one.entropy for one in readings)
        return [_measured("entropy", ids, entropy), _measured("kl", ids, away)]

    def _by_item(self, metric: str, values: Sequence[float]) -> Measurement:
        ids = tuple(probe.question.id for probe in self.chosen.probes)
        return _measured(metric, ids, values, rate=metric in RATES or metric.startswith("breaks "))


@dataclass(frozen=True, eq=False)
class _Reading:
    """What a model found of a document: nats and number of its targets, of the last one, and its whole distribution at
    a few places [P, V], as log-probabilities."""

    nats: float
    count: int
    last: float
    logp_PV: Tensor

    @property
    def entropy(self) -> float:
        return float(-(self.logp_PV.exp() * self.logp_PV).sum(-1).mean())

    def away_from(self, base: _Reading) -> float:
        """KL(base || this), nats a token."""
        return float((base.logp_PV.exp() * (base.logp_PV - self.logp_PV)).sum(-1).mean())


@torch.no_grad()
def _read(bench: Workbench, asked: Sequence[tuple[Document, int]]) -> list[_Reading]:
    """Of each document, with so many places, evenly spaced over what is no answer, or over all of a text."""
    places = [_places(document, count) for document, count in asked]
    weighted: list[Document] = []
    for (document, _), own in zip(asked, places, strict=True):
        weights_L = document.weights_L.copy()
        weights_L[own] = 1
        weighted.append(dataclasses.replace(document, weights_L=weights_L))

    def read(model: LanguageModel, batch: Batch, own: Sequence[int]) -> list[_Reading]:
        hidden_S = model.hidden(batch)
        losses_S = target_losses(hidden_S, model.head, batch.targets_S)
        found: list[_Reading] = []
        for number, index in enumerate(own):
            own_S = batch.document_S == number
            (at,) = np.nonzero(weighted[index].weights_L)
            trained = torch.from_numpy(asked[index][0].weights_L[at] > 0).to(losses_S.device)
            watched = torch.from_numpy(np.isin(at, places[index])).to(losses_S.device)
            nats = losses_S[own_S][trained].double()
            logp_PV = torch.log_softmax(model.head.logits(hidden_S[own_S][watched]).float(), -1).cpu()
            found.append(_Reading(float(nats.sum()), len(nats), float(nats[-1]), logp_PV))
        return found

    found = dict(by_document(bench.model, weighted, bench.plan["pack_length"], read))
    return [found[index] for index in range(len(asked))]


def _places(document: Document, count: int) -> list[int]:
    first = int(np.flatnonzero(document.weights_L)[0])
    free = range(1, first if first > 1 else len(document))
    return list(free[:: max(1, math.ceil(len(free) / count))]) if count else []


def _by_name(metric: str, values: dict[str, float]) -> Measurement:
    return _measured(metric, tuple(values), tuple(values.values()))


def _measured(metric: str, ids: tuple[str, ...], values: Sequence[float], *, rate: bool = False) -> Measurement:
    """Weights keep values that are all 0, and are no rate, from being taken for one."""
    return Measurement(PROBES, metric, ids, tuple(values), weights=() if rate else (1.0,) * len(ids))
