"""The heavy things that a run works with, made once from its plan: the model with its adapter, the renderer, the rows.

In: a Plan and the Facts it was made from. Out: a Workbench. The stock model's answers to a few real documents are taken
before any module is replaced; they are the oracle of the proof. Left out: the order of a run (run.py).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tunesmith.core.errors import InputError
from tunesmith.core.types import Choice, Document, Example, Plan
from tunesmith.data.chat_template.assistant_spans import FOREIGN
from tunesmith.data.chat_template.renderer import Renderer
from tunesmith.data.dataset import Dataset
from tunesmith.data.mixture import Mixture
from tunesmith.data.packing import fed_tokens
from tunesmith.data.pretraining import Corpus, Stream
from tunesmith.data.rehearsal import Rehearsal
from tunesmith.data.sampler import Changes, Schedule
from tunesmith.data.tokenizer.chat_tokenizer import LONG_TEXT
from tunesmith.data.truncation import Prepared
from tunesmith.model.adapters import METHODS
from tunesmith.model.causal_lm import (
    DTYPES,
    LanguageModel,
    Network,
    adopt,
    load_network,
    shortest_window,
    stock_ids,
    stock_logits,
)
from tunesmith.model.new_embeddings import start_rows
from tunesmith.model.quantization import load_quantized
from tunesmith.model.save import beside_stock, load_adapter
from tunesmith.model.target_modules import GROUPS
from tunesmith.model.truncated import part_of
from tunesmith.session.inputs import Facts
from tunesmith.session.preflight_probe import Cut, Probe, StockIds, checked_places, choose_alike, choose_documents

PROBE_ROWS = 200  # of the training rows, from which the proof's documents are chosen
STOCK_ID_ROWS = 20


@dataclass(frozen=True, eq=False)
class Workbench:
    plan: Plan
    facts: Facts
    model: LanguageModel
    schedule: Schedule | Stream
    probe: Probe
    references: Mapping[int, Sequence[float]] = field(default_factory=dict[int, Sequence[float]])  # by row, kept ones
    rehearsal: Rehearsal | None = None

    @property
    def renderer(self) -> Renderer:
        return self.facts.renderer

    @property
    def rows(self) -> Dataset:
        return self.facts.datasets["data"]

    def documents_of(self, step: int, changes: Changes = ()) -> Sequence[Document]:
        """The documents of optimizer step 1..steps; a pure function of the plan, the files, and the changes of the
        rehearsal ratio so far."""
        if isinstance(self.schedule, Stream):
            documents = self.schedule.documents_of(step, changes)
        else:
            documents = [document for row in self.schedule.rows_of(step) for document in self._of_row(row)]
        return documents + (self.rehearsal.documents_of(step, changes) if self.rehearsal else [])

    def _of_row(self, row: int) -> Sequence[Document]:
        documents = self.rows.documents(row)
        if not self.references or not documents:
            return documents
        kept = zip(documents, self.references[row], strict=True)
        return [dataclasses.replace(document, reference=value) for document, value in kept]


def set_up(plan: Plan, facts: Facts) -> Workbench:
    """Loads the model, asks it about the probe documents, then makes it ours: adapter, layers, attention. An adapter to
    go on with is part of the model that is asked, and so are the first rows of new tokens."""
    torch.set_flush_denormal(True)  # stays on: torch's threads keep what they were started with, so it cannot be undone
    facts = _under_plan(plan, facts)
    rows, network, start = facts.datasets["data"], _stock(plan, facts), facts.adapter
    with nullcontext() if start is None else beside_stock(network, start):
        probe = _probe(network, facts, rows, share=plan["share_prefixes"])
    model = _ours(network, plan, facts)
    return Workbench(plan, facts, model, _scheduled(plan, facts), probe, rehearsal=rehearsal_of(plan, facts))


def model_at_start(plan: Plan, facts: Facts) -> LanguageModel:
    """The model that training starts from, to read or write with."""
    model = _ours(_stock(plan, facts), plan, facts)
    model.network.eval()
    return model


def only_model(plan: Plan, facts: Facts, model: LanguageModel) -> Workbench:
    """To measure any model by the items of a plan; nothing is proven."""
    return Workbench(plan, facts, model, _scheduled(plan, facts), Probe((), (), frozenset()))


def _stock(plan: Plan, facts: Facts) -> Network:
    load = load_quantized if plan["method"] == "qlora" else load_network
    network = load(facts.model.path, DTYPES[plan["dtype"]], facts.machine.device)
    start_rows(network, facts.renderer.tokenizer.new)
    return network


def _ours(network: Network, plan: Plan, facts: Facts) -> LanguageModel:
    METHODS[plan["method"]](network, {key: choice.value for key, choice in plan.choices.items()})
    if facts.adapter is not None:
        load_adapter(network, facts.adapter.weights)
    blocked, activations = plan["weight_layout"] == "blocked", plan["activations"]
    return adopt(network, DTYPES[plan["dtype"]], plan["attention"], blocked=blocked, activations=activations)


def set_up_part(plan: Plan, facts: Facts, layers: int) -> Workbench:
    """With the first layers and made-up weights, to be measured; there is nothing to prove about them."""
    facts = dataclasses.replace(_under_plan(plan, facts), adapter=None)
    network = part_of(facts.model.path, DTYPES[plan["dtype"]], layers, quantized=plan["method"] == "qlora")
    start_rows(network, facts.renderer.tokenizer.new)
    if "lora_target_modules" in plan.choices and plan["lora_target_modules"] not in GROUPS:
        everything = Choice("all-linear", "rule", "the layers that are named may not be there")
        plan = dataclasses.replace(plan, choices=plan.choices | {"lora_target_modules": everything})
    bench = only_model(plan, facts, _ours(network, plan, facts))
    return dataclasses.replace(bench, rehearsal=rehearsal_of(plan, facts))


def _scheduled(plan: Plan, facts: Facts) -> Schedule | Stream:
    return _stream(plan, facts.corpus) if facts.corpus else _schedule(plan, facts.datasets["data"])


def _stream(plan: Plan, corpus: Corpus) -> Stream:
    """Rehearsal takes the place of windows: a step has `batch_tokens` with it."""
    ratio = plan["rehearsal_ratio"] if "rehearsal_ratio" in plan.choices else 0
    tokens, epochs = plan["batch_tokens"], plan["num_train_epochs"]
    return Stream.of(corpus, step_tokens=tokens, epochs=epochs, seed=plan["seed"], ratio=ratio)


def _schedule(plan: Plan, rows: Dataset) -> Schedule:
    mixture = Mixture.of(rows, plan["mixture"]) if "mixture" in plan.choices else None
    schedule = Schedule(
        rows=len(rows) if mixture is None else len(mixture),
        batch_size=plan["batch_size"],
        epochs=plan["num_train_epochs"],
        seed=plan["seed"],
        max_steps=plan.steps,
        mixture=mixture,
    )
    if schedule.steps < plan.steps:  # rows went away, and the user wants to go on without them
        what = f"{len(rows):,} rows are enough for {schedule.steps:,} steps, the plan has {plan.steps:,}"
        raise InputError(what, where=rows.path, fix="put the rows back, or start a new run with another output_dir")
    return schedule


def rehearsal_of(plan: Plan, facts: Facts) -> Rehearsal | None:
    """The rehearsal rows under a plan."""
    rows = facts.datasets.get("rehearsal")
    if rows is None:
        return None
    texts = plan["stage"] == "cpt"
    return Rehearsal.of(
        rows,
        tokens=plan.data["rehearsal"].tokens,
        length=plan["rehearsal_length"],
        step_tokens=plan["batch_tokens"] if texts else plan.tokens_per_epoch / plan.rows_per_epoch * plan["batch_size"],
        ratio=plan["rehearsal_ratio"],
        replaces=texts,
        seed=plan["seed"],
    )


def _under_plan(plan: Plan, facts: Facts) -> Facts:
    if facts.corpus is not None:
        return facts
    rows = facts.datasets["data"].limited(plan["max_length"], plan["overlong"])
    return dataclasses.replace(facts, datasets={**facts.datasets, "data": rows})


def _probe(network: Network, facts: Facts, rows: Dataset, *, share: bool) -> Probe:
    """Documents of the first rows, and the stock model's word on them."""
    if facts.corpus is not None:
        return _probe_of_texts(network, facts.corpus)
    whole: list[Document] = []
    cut: list[Document] = []  # without the end of an answer, or only what is bad in it: no witness if there are others
    ids: list[StockIds] = []
    for index in range(min(PROBE_ROWS, len(rows))):
        example, prepared = rows.understand(index)
        (cut if prepared.truncated or example.banned else whole).extend(prepared.documents)
        if len(ids) < STOCK_ID_ROWS and (found := _as_stock(facts, example, prepared)):
            ids.append(found)
    documents = choose_documents(whole or cut, shortest_window(network))
    if not documents:
        raise InputError("no row trains anything", where=rows.path, fix="look at them with `tunesmith data show`")
    end_ids = frozenset(facts.renderer.end_ids)
    alike = choose_alike(whole or cut) if share else ()
    return Probe(documents, _stock_logits(network, documents), end_ids, tuple(ids), alike)


def _as_stock(facts: Facts, example: Example, prepared: Prepared) -> StockIds | None:
    """Whether a row's ids are those of transformers: all, or, where the render notes that it writes the row otherwise,
    those of the prompts. None for what transformers would not write alike: its templates write the date of today, ours
    that of the plan."""
    documents = [document.tokens_L for document in prepared.documents if document.side != "rejected"]
    turns = [turn for turn, weight in enumerate(example.turn_weights) if weight > 0]
    if not documents or not example.messages or FOREIGN in prepared.notes or len(documents) not in (1, len(turns)):
        return None

    def same(ours_L: np.ndarray, count: int, *, prompt: bool) -> bool:
        wanted = facts.renderer.as_wanted(example.messages[:count], example.tools)
        template, told = _template_text(facts.recipe.template), facts.recipe.chat_template_kwargs
        added = facts.recipe.add_tokens
        ids = stock_ids(facts.model.path, wanted, example.tools, template, told, added, prompt=prompt)
        shorter = min(len(ours_L), len(ids)) if prompt else len(ours_L)  # a document may be cut
        return bool(np.array_equal(ours_L[:shorter], ids[:shorter]))

    whole = len(documents) == 1 and not prepared.notes
    if whole:
        equal = same(documents[0], len(example.messages), prompt=False)
    else:
        pairs = zip(documents * len(turns) if len(documents) == 1 else documents, turns, strict=True)
        equal = all(same(ours_L, turn, prompt=True) for ours_L, turn in pairs)
    return StockIds(example.id, equal, whole) if equal or not facts.renderer.dated else None


def _probe_of_texts(network: Network, corpus: Corpus) -> Probe:
    """The first windows; and the first texts whole, encoded by themselves, beside their windows."""
    windows = [corpus.document(i) for i in range(min(PROBE_ROWS, len(corpus)))]
    documents = choose_documents(windows, shortest_window(network))
    if not documents:
        fix = "look at them with `tunesmith data show`"
        raise InputError("no text trains anything", where=corpus.rows.path, fix=fix)
    short = [row for row in range(min(PROBE_ROWS, len(corpus.rows))) if corpus.rows.row_bytes(row) <= LONG_TEXT]
    cut = tuple(
        Cut(whole, tuple(corpus.document(i) for i in corpus.windows_of(row)))
        for row in short[:STOCK_ID_ROWS]
        for whole in corpus.rows.documents(row)
    )
    ends = frozenset({corpus.rows.renderer.text_end})
    return Probe(documents, _stock_logits(network, documents), ends, texts=cut)


def _stock_logits(network: Network, documents: Sequence[Document]) -> tuple[torch.Tensor, ...]:
    return tuple(
        stock_logits(network, document.tokens_L[: fed_tokens(document)].tolist(), checked_places(document))
        for document in documents
    )


def _template_text(template: Any) -> str | None:
    return template.read_text(encoding="utf-8") if isinstance(template, Path) else None
