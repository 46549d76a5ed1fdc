"""The heavy things that a run works with, made once from its plan: the model with its adapter, the
renderer, the rows.

In: a Plan and the Facts it was made from. Out: a Workbench. The stock model's answers to a few real
documents are taken before any module is replaced; they are the oracle of the proof. Left out: the
order of a run (run.py)."""

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
from tunesmith.core.types import Document, Example, Plan, PlanValue, require
from tunesmith.data.chat_template.render_notes import CONTROL_LIKE_TEXT
from tunesmith.data.chat_template.renderer import Renderer
from tunesmith.data.dataset import Dataset
from tunesmith.data.packing import count_input_tokens
from tunesmith.data.pretraining import PretrainingCorpus, WindowSampler
from tunesmith.data.rehearsal import RehearsalSampler
from tunesmith.data.sampler import RatioChanges, StepSampler, TaskMixture
from tunesmith.data.tokenizer.chat_tokenizer import MAX_PIECE_CHARS
from tunesmith.data.truncation import PreparedRow
from tunesmith.model.adapters import METHODS
from tunesmith.model.causal_lm import (
    DTYPES,
    Network,
    PackedCausalLM,
    compute_stock_logits,
    encode_stock_conversation,
    get_sliding_window,
    load_network,
    wrap_model,
)
from tunesmith.model.new_embeddings import init_new_rows
from tunesmith.model.quantization import build_truncated_network, load_quantized
from tunesmith.model.save import load_adapter, stock_with_adapter
from tunesmith.model.target_modules import GROUPS
from tunesmith.session.inputs import RunInputs
from tunesmith.session.preflight_probe import (
    PreflightSamples,
    TokenIdCheck,
    WindowedText,
    choose_documents,
    choose_positions,
    choose_sharing_documents,
)

PROBE_ROWS = 200  # of the training rows, from which the proof's documents are chosen
STOCK_ID_ROWS = 20


@dataclass(frozen=True, eq=False)
class Session:
    plan: Plan
    inputs: RunInputs
    model: PackedCausalLM
    sampler: StepSampler | WindowSampler
    samples: PreflightSamples
    reference_logps: Mapping[int, Sequence[float]] = field(
        default_factory=dict[int, Sequence[float]]
    )  # by row, kept ones
    rehearsal: RehearsalSampler | None = None

    @property
    def renderer(self) -> Renderer:
        return self.inputs.renderer

    @property
    def rows(self) -> Dataset:
        return self.inputs.datasets["data"]

    def load_documents(self, step: int, changes: RatioChanges = ()) -> Sequence[Document]:
        """The documents of optimizer step 1..steps; a pure function of the plan, the files, and the
        changes of the rehearsal ratio so far."""
        if isinstance(self.sampler, WindowSampler):
            documents = self.sampler.read_documents(step, changes)
        else:
            documents = [
                document
                for row in self.sampler.get_rows(step)
                for document in self._load_row_documents(row)
            ]
        return documents + (self.rehearsal.read_documents(step, changes) if self.rehearsal else [])

    def _load_row_documents(self, row: int) -> Sequence[Document]:
        documents = self.rows.render_documents(row)
        if not self.reference_logps or not documents:
            return documents
        pairs = zip(documents, self.reference_logps[row], strict=True)
        return [dataclasses.replace(document, reference_logp=value) for document, value in pairs]


def open_session(plan: Plan, inputs: RunInputs) -> Session:
    """Loads the model, asks it about the probe documents, then makes it ours: adapter, layers,
    attention. An adapter to go on with is part of the model that is asked, and so are the first
    rows of new tokens."""
    torch.set_flush_denormal(
        True
    )  # stays on: torch's threads keep what they were started with, so it cannot be undone
    inputs = _apply_length_limit(plan, inputs)
    rows, network, adapter = (
        inputs.datasets["data"],
        _load_base_network(plan, inputs),
        inputs.adapter,
    )
    with nullcontext() if adapter is None else stock_with_adapter(network, adapter):
        samples = _choose_samples(network, inputs, rows, should_share=plan.config.share_prefixes)
    model = _wrap_network(network, plan, inputs)
    return Session(
        plan,
        inputs,
        model,
        _make_sampler(plan, inputs),
        samples,
        rehearsal=build_rehearsal(plan, inputs),
    )


def load_starting_model(plan: Plan, inputs: RunInputs) -> PackedCausalLM:
    """The model that training starts from, to read or write with."""
    model = _wrap_network(_load_base_network(plan, inputs), plan, inputs)
    model.network.eval()
    return model


def open_eval_session(plan: Plan, inputs: RunInputs, model: PackedCausalLM) -> Session:
    """To measure any model by the items of a plan; nothing is proven."""
    return Session(
        plan, inputs, model, _make_sampler(plan, inputs), PreflightSamples((), (), frozenset())
    )


def _load_base_network(plan: Plan, inputs: RunInputs) -> Network:
    load = load_quantized if plan.config.method == "qlora" else load_network
    network = load(inputs.model.path, DTYPES[plan.config.dtype], inputs.machine.device)
    init_new_rows(network, inputs.renderer.tokenizer.new_tokens)
    return network


def _wrap_network(network: Network, plan: Plan, inputs: RunInputs) -> PackedCausalLM:
    METHODS[plan.config.method](network, plan.values)
    if inputs.adapter is not None:
        load_adapter(network, inputs.adapter.weights_path)
    is_blocked = plan.config.weight_layout == "blocked"
    return wrap_model(
        network,
        DTYPES[plan.config.dtype],
        plan.config.attention,
        should_block_weights=is_blocked,
        gradient_checkpointing=plan.config.gradient_checkpointing,
    )


def open_truncated_session(plan: Plan, inputs: RunInputs, layers: int) -> Session:
    """With the first layers and made-up weights, to be measured; there is nothing to prove about
    them."""
    inputs = dataclasses.replace(_apply_length_limit(plan, inputs), adapter=None)
    network = build_truncated_network(
        inputs.model.path, DTYPES[plan.config.dtype], layers, is_quantized=plan.config.method == "qlora"
    )
    init_new_rows(network, inputs.renderer.tokenizer.new_tokens)
    targets = plan.config.lora_target_modules
    if targets is not None and targets not in GROUPS:
        all_linear = PlanValue("all-linear", "rule", "the layers that are named may not be there")
        plan = plan.with_settings(lora_target_modules=all_linear)
    session = open_eval_session(plan, inputs, _wrap_network(network, plan, inputs))
    return dataclasses.replace(session, rehearsal=build_rehearsal(plan, inputs))


def _make_sampler(plan: Plan, inputs: RunInputs) -> StepSampler | WindowSampler:
    return (
        _make_window_sampler(plan, inputs.corpus)
        if inputs.corpus
        else _make_step_sampler(plan, inputs.datasets["data"])
    )


def _make_window_sampler(plan: Plan, corpus: PretrainingCorpus) -> WindowSampler:
    """Rehearsal takes the place of windows: a step has `batch_tokens` with it."""
    return WindowSampler.from_corpus(
        corpus,
        step_tokens=require(plan.config.batch_tokens),
        epochs=plan.config.num_train_epochs,
        seed=plan.config.seed,
        rehearsal_ratio=plan.config.rehearsal_ratio or 0,
    )


def _make_step_sampler(plan: Plan, rows: Dataset) -> StepSampler:
    mixture = None
    if plan.config.mixture is not None:
        mixture = TaskMixture.from_dataset(rows, plan.config.mixture)
    sampler = StepSampler(
        num_rows=len(rows) if mixture is None else len(mixture),
        batch_size=require(plan.config.batch_size),
        epochs=plan.config.num_train_epochs,
        seed=plan.config.seed,
        max_steps=plan.steps,
        mixture=mixture,
    )
    if sampler.total_steps < plan.steps:  # rows went away, and the user wants to go on without them
        message = f"{len(rows):,} rows are enough for {sampler.total_steps:,} steps, the plan has {plan.steps:,}"
        raise InputError(
            message,
            where=rows.path,
            fix="put the rows back, or start a new run with another output_dir",
        )
    return sampler


def build_rehearsal(plan: Plan, inputs: RunInputs) -> RehearsalSampler | None:
    """The rehearsal rows under a plan."""
    rows = inputs.datasets.get("rehearsal")
    if rows is None:
        return None
    config = plan.config
    is_pretraining = config.stage == "cpt"
    if is_pretraining:
        step_tokens = require(config.batch_tokens)
    else:
        row_tokens = plan.tokens_per_epoch / plan.rows_per_epoch
        step_tokens = row_tokens * require(config.batch_size)
    return RehearsalSampler.from_dataset(
        rows,
        total_tokens=plan.data["rehearsal"].tokens,
        max_tokens=require(config.rehearsal_length),
        step_tokens=step_tokens,
        ratio=require(config.rehearsal_ratio),
        should_replace_data=is_pretraining,
        seed=config.seed,
    )


def _apply_length_limit(plan: Plan, inputs: RunInputs) -> RunInputs:
    if inputs.corpus is not None:
        return inputs
    rows = inputs.datasets["data"].with_max_length(plan.config.max_length, plan.config.on_overlong)
    return dataclasses.replace(inputs, datasets={**inputs.datasets, "data": rows})


def _choose_samples(
    network: Network, inputs: RunInputs, rows: Dataset, *, should_share: bool
) -> PreflightSamples:
    """Documents of the first rows, and the stock model's word on them."""
    if inputs.corpus is not None:
        return _choose_text_samples(network, inputs.corpus)
    complete: list[Document] = []
    truncated: list[
        Document
        # without the end of an answer, or only what is bad in it: no witness if there are others
    ] = []
    id_checks: list[TokenIdCheck] = []
    for index in range(min(PROBE_ROWS, len(rows))):
        example, prepared = rows.render_row(index)
        (truncated if prepared.num_truncated or example.banned_spans else complete).extend(
            prepared.documents
        )
        if len(id_checks) < STOCK_ID_ROWS and (
            id_check := _check_token_ids(inputs, example, prepared)
        ):
            id_checks.append(id_check)
    documents = choose_documents(complete or truncated, get_sliding_window(network))
    if not documents:
        raise InputError(
            "no row trains anything", where=rows.path, fix="look at them with `tunesmith data show`"
        )
    end_ids = frozenset(inputs.renderer.end_ids)
    sharing_documents = choose_sharing_documents(complete or truncated) if should_share else ()
    return PreflightSamples(
        documents,
        _compute_reference_logits(network, documents),
        end_ids,
        tuple(id_checks),
        sharing_documents,
    )


def _check_token_ids(
    inputs: RunInputs, example: Example, prepared: PreparedRow
) -> TokenIdCheck | None:
    """Whether a row's ids are those of transformers: all, or, where the render notes that it writes
    the row otherwise, those of the prompts. None for what transformers would not write alike: its
    templates write the date of today, ours that of the plan."""
    documents = [
        document.tokens_L for document in prepared.documents if document.side != "rejected"
    ]
    turns = [turn for turn, weight in enumerate(example.turn_weights) if weight > 0]
    if (
        not documents
        or not example.messages
        or CONTROL_LIKE_TEXT in prepared.notes
        or len(documents) not in (1, len(turns))
    ):
        return None

    def has_same_ids(ours_L: np.ndarray, count: int, *, is_prompt: bool) -> bool:
        messages = inputs.renderer.normalize_messages(example.messages[:count], example.tools)
        template, template_kwargs = (
            _read_template(inputs.recipe.chat_template),
            inputs.recipe.chat_template_kwargs,
        )
        added_tokens = inputs.recipe.add_tokens
        ids = encode_stock_conversation(
            inputs.model.path,
            messages,
            example.tools,
            template,
            template_kwargs,
            added_tokens,
            add_generation_prompt=is_prompt,
        )
        num_compared = (
            min(len(ours_L), len(ids)) if is_prompt else len(ours_L)
        )  # a document may be cut
        return bool(np.array_equal(ours_L[:num_compared], ids[:num_compared]))

    is_full_row = len(documents) == 1 and not prepared.notes
    if is_full_row:
        is_equal = has_same_ids(documents[0], len(example.messages), is_prompt=False)
    else:
        pairs = zip(
            documents * len(turns) if len(documents) == 1 else documents, turns, strict=True
        )
        is_equal = all(has_same_ids(ours_L, turn, is_prompt=True) for ours_L, turn in pairs)
    return (
        TokenIdCheck(example.id, is_equal, is_full_row)
        if is_equal or not inputs.renderer.has_date
        else None
    )


def _choose_text_samples(network: Network, corpus: PretrainingCorpus) -> PreflightSamples:
    """The first windows; and the first texts whole, encoded by themselves, beside their windows."""
    windows = [corpus.read_window(i) for i in range(min(PROBE_ROWS, len(corpus)))]
    documents = choose_documents(windows, get_sliding_window(network))
    if not documents:
        fix = "look at them with `tunesmith data show`"
        raise InputError("no text trains anything", where=corpus.dataset.path, fix=fix)
    short_rows = [
        row
        for row in range(min(PROBE_ROWS, len(corpus.dataset)))
        if corpus.dataset.get_row_bytes(row) <= MAX_PIECE_CHARS
    ]
    windowed_texts = tuple(
        WindowedText(document, tuple(corpus.read_window(i) for i in corpus.get_windows(row)))
        for row in short_rows[:STOCK_ID_ROWS]
        for document in corpus.dataset.render_documents(row)
    )
    end_ids = frozenset({corpus.dataset.renderer.text_end_id})
    return PreflightSamples(
        documents, _compute_reference_logits(network, documents), end_ids, texts=windowed_texts
    )


def _compute_reference_logits(
    network: Network, documents: Sequence[Document]
) -> tuple[torch.Tensor, ...]:
    return tuple(
        compute_stock_logits(
            network,
            document.tokens_L[: count_input_tokens(document)].tolist(),
            choose_positions(document),
        )
        for document in documents
    )


def _read_template(template: Any) -> str | None:
    return template.read_text(encoding="utf-8") if isinstance(template, Path) else None
