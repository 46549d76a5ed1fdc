"""The objects that a run works with, built once from its plan: model, samplers, preflight samples.

In: a Plan and its RunInputs. Out: a Session. The stock model's logits for a few real documents are
computed before any module is replaced; preflight compares with them. Left out: the order of a run
(train/run.py).
"""

from __future__ import annotations

import bisect
import dataclasses
import itertools
import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch

from tunesmith.core.errors import InputError
from tunesmith.core.formatting import format_count
from tunesmith.core.ranks import SINGLE_PROCESS, Ranks
from tunesmith.core.sealed_json import RESTORE_FIX
from tunesmith.core.types import Document, Example, Plan, PlanValue, require
from tunesmith.data.chat_template.assistant_spans import is_training_answers, weigh_messages
from tunesmith.data.chat_template.render_notes import CONTROL_LIKE_TEXT
from tunesmith.data.chat_template.renderer import Renderer
from tunesmith.data.dataset import Dataset
from tunesmith.data.packing import count_input_tokens
from tunesmith.data.pretraining import PretrainingCorpus, WindowSampler
from tunesmith.data.rehearsal import RehearsalSampler
from tunesmith.data.sampler import RatioChanges, StepSampler, TaskMixture, build_mismatched
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
from tunesmith.model.compare_layers import StockNetwork
from tunesmith.model.new_embeddings import init_new_rows
from tunesmith.model.quantization import build_truncated_network, load_quantized
from tunesmith.model.save import load_adapter, stock_with_adapter
from tunesmith.model.target_modules import has_only_words, match_saved_parameters
from tunesmith.model.weight_shards import WeightShards, count_sharing_ranks, join_ranks
from tunesmith.session.family_proof import is_unnamed, wrap_proven
from tunesmith.session.inputs import RunInputs
from tunesmith.session.preflight_probe import (
    PreflightSamples,
    RoleMask,
    TokenIdCheck,
    WindowedText,
    build_role_mask,
    choose_documents,
    choose_positions,
    choose_sharing_documents,
    compute_oracle_logits,
    mark_banned,
    mark_longer,
)

EXTREME_ROWS = 3  # shortest and longest rows of the others
MAX_CHECKED_BYTES = 2**23  # of a text whose windows are compared with it
PROBE_ROWS = 200  # training rows from which the preflight documents are chosen
SHOW_FIX = "inspect the rows with `tunesmith data show`"
STOCK_ID_ROWS = 20  # training rows whose token ids are compared with transformers

NO_SAMPLES = PreflightSamples((), (), frozenset())

CUBLAS_ENV = "CUBLAS_WORKSPACE_CONFIG"
CUBLAS_SETTING = ":4096:8"  # one of the two that torch takes in the deterministic mode


@dataclass(frozen=True, eq=False)
class Session:
    plan: Plan
    inputs: RunInputs
    model: PackedCausalLM
    sampler: StepSampler | WindowSampler
    samples: PreflightSamples
    # row -> log-probabilities of its documents before training, where the loss needs them
    reference_logps: Mapping[int, Sequence[float]] = field(
        default_factory=dict[int, Sequence[float]]
    )
    # step -> the same of its mismatched documents, in KTO
    mismatched_logps: Mapping[int, Sequence[float]] = field(
        default_factory=dict[int, Sequence[float]]
    )
    rehearsal: RehearsalSampler | None = None

    @property
    def renderer(self) -> Renderer:
        return self.inputs.renderer

    @property
    def rows(self) -> Dataset:
        return self.inputs.datasets["data"]

    def load_documents(self, step: int, changes: RatioChanges = ()) -> Sequence[Document]:
        """Return the documents of an optimizer step, counted from 1: a pure function of the plan,
        the files, and the changes of the rehearsal ratio so far."""
        if isinstance(self.sampler, WindowSampler):
            documents = self.sampler.read_documents(step, changes)
        else:
            documents: list[Document] = []
            for row in self.sampler.get_rows(step):
                documents += self._load_row_documents(row)
            if self.plan.config.loss == "kto":
                documents += self._build_mismatched(documents, step)
        if self.rehearsal is None:
            return documents
        return documents + self.rehearsal.read_documents(step, changes)

    def _build_mismatched(self, documents: Sequence[Document], step: int) -> Sequence[Document]:
        """Return the documents that KTO's KL term of a step is measured on."""
        mismatched = build_mismatched(documents, self.plan.config.max_length)
        if not self.mismatched_logps:
            return mismatched
        return _add_logps(mismatched, self.mismatched_logps.get(step, ()))

    def _load_row_documents(self, row: int) -> Sequence[Document]:
        documents = self.rows.render_documents(row)
        if not self.reference_logps or not documents:
            return documents
        return _add_logps(documents, self.reference_logps.get(row, ()))


def _add_logps(documents: Sequence[Document], logps: Sequence[float]) -> Sequence[Document]:
    """Return documents with their log-probabilities before training. Raise InputError for another
    number of them, as a changed file of the run has."""
    if len(documents) != len(logps):
        counts = f"stored log-probabilities: {len(logps)}, documents: {len(documents)}"
        message = f"{counts}; reference.json or mismatched.json of the run has changed"
        fix = f"{RESTORE_FIX}, or start a new run"
        where = documents[0].id if documents else ""
        raise InputError(message, where=where, fix=fix)
    pairs = zip(documents, logps, strict=True)
    return [dataclasses.replace(document, reference_logp=value) for document, value in pairs]


def open_session(
    plan: Plan,
    inputs: RunInputs,
    ranks: Ranks = SINGLE_PROCESS,
    *,
    with_samples: bool = True,
) -> Session:
    """Load the model, compute its stock logits for the preflight documents, then replace its
    modules: adapter, layers, attention.

    The stock model includes the adapter that training starts from, and the initial rows of new
    tokens. `with_samples=False` leaves out what only preflight needs. All `ranks` open the session
    together if the plan shards weights."""
    size = count_sharing_ranks(plan.config.dp_shard_size, ranks.world)
    shards = WeightShards(ranks, size) if size > 1 else None
    with join_ranks(shards):
        return _open_session(plan, inputs, shards, with_samples=with_samples)


def _open_session(
    plan: Plan, inputs: RunInputs, shards: WeightShards | None, *, with_samples: bool
) -> Session:
    # for the rest of the process: torch's threads keep the mode that they were started with
    torch.set_flush_denormal(True)
    set_deterministic(plan.config.deterministic)
    inputs = _apply_length_limit(plan, inputs)
    network = _load_base_network(plan, inputs, shards)
    rehearsal = build_rehearsal(plan, inputs)
    samples = NO_SAMPLES
    if with_samples:
        samples = _prepare_samples(network, plan, inputs, rehearsal)
    model = _wrap_network(network, plan, inputs, shards)
    return Session(
        plan,
        inputs,
        model,
        _make_sampler(plan, inputs),
        samples,
        rehearsal=rehearsal,
    )


def _prepare_samples(
    network: Network, plan: Plan, inputs: RunInputs, rehearsal: RehearsalSampler | None
) -> PreflightSamples:
    """Return what preflight compares the wrapped model with, of the network that it will wrap."""
    adapter = inputs.adapter
    with nullcontext() if adapter is None else stock_with_adapter(network, adapter):
        samples = _choose_samples(network, plan, inputs, rehearsal)
        samples = dataclasses.replace(
            samples,
            oracle=compute_oracle_logits(network, samples.documents),
            full_pack=require(plan.config.pack_length) if is_unnamed(network) else 0,
        )
    return dataclasses.replace(samples, stock=StockNetwork(network), is_adapted=adapter is not None)


def load_starting_model(plan: Plan, inputs: RunInputs) -> PackedCausalLM:
    """Load the model that training starts from, in eval mode."""
    set_deterministic(plan.config.deterministic)
    model = _wrap_network(_load_base_network(plan, inputs), plan, inputs)
    model.network.eval()
    return model


def set_deterministic(is_on: bool) -> None:
    """Let torch take algorithms whose sums have one order, for the rest of the process: flash
    attention's backward, sums over indices, cuBLAS without several streams. Our Triton kernels have
    no others. An operation without such an algorithm raises RuntimeError."""
    if is_on:
        os.environ.setdefault(CUBLAS_ENV, CUBLAS_SETTING)  # cuBLAS reads it at its first product
        # our kernels write all of what they are given: nothing is to be filled before
        torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    torch.use_deterministic_algorithms(is_on)


def open_eval_session(plan: Plan, inputs: RunInputs, model: PackedCausalLM) -> Session:
    """Open a session that evaluates any model with the inputs of a plan, without preflight."""
    return Session(plan, inputs, model, _make_sampler(plan, inputs), NO_SAMPLES)


def _load_base_network(
    plan: Plan, inputs: RunInputs, shards: WeightShards | None = None
) -> Network:
    load = load_quantized if plan.config.method == "qlora" else load_network
    network = load(inputs.model.path, DTYPES[plan.config.dtype], inputs.machine.device, shards)
    init_new_rows(network, inputs.renderer.tokenizer.new_tokens)
    return network


def _wrap_network(
    network: Network,
    plan: Plan,
    inputs: RunInputs,
    shards: WeightShards | None = None,
    wrap: Callable[..., PackedCausalLM] = wrap_proven,
) -> PackedCausalLM:
    if shards is not None and plan.config.method == "full":
        shards.train(network)
    METHODS[plan.config.method](network, plan.values)
    if inputs.adapter is not None:
        load_adapter(network, inputs.adapter.weights_path)
    return wrap(
        network,
        DTYPES[plan.config.dtype],
        plan.config.attention,
        should_block_weights=plan.config.weight_layout == "blocked",
        gradient_checkpointing=plan.config.gradient_checkpointing,
        shards=shards,
    )


def open_truncated_session(
    plan: Plan, inputs: RunInputs, layers: int, shards: WeightShards | None = None
) -> Session:
    """Open a session with the first layers and random weights, to time steps. No preflight."""
    inputs = dataclasses.replace(_apply_length_limit(plan, inputs), adapter=None)
    network = build_truncated_network(
        inputs.model.path,
        DTYPES[plan.config.dtype],
        layers,
        is_quantized=plan.config.method == "qlora",
    )
    if shards is not None:
        shards.add_network(network)
    init_new_rows(network, inputs.renderer.tokenizer.new_tokens)
    targets = plan.config.lora_target_modules
    if targets is not None and not has_only_words(targets):
        all_linear = PlanValue("all-linear", "rule", "the named layers may have been cut off")
        plan = plan.with_settings(lora_target_modules=all_linear)
    if plan.config.modules_to_save:
        plan = _drop_missing_modules(plan, network)
    # weights that are all equal prove nothing
    model = _wrap_network(network, plan, inputs, shards, wrap_model)
    session = open_eval_session(plan, inputs, model)
    return dataclasses.replace(session, rehearsal=build_rehearsal(plan, inputs))


def _drop_missing_modules(plan: Plan, network: Network) -> Plan:
    """Return the plan without the modules to save that are in layers that were cut off."""
    names = [name for name, _ in network.named_parameters(remove_duplicate=False)]
    modules = require(plan.config.modules_to_save)
    present = tuple(module for module in modules if match_saved_parameters(names, [module]))
    return plan.with_settings(modules_to_save=PlanValue(present, "user", "those of these layers"))


def _make_sampler(plan: Plan, inputs: RunInputs) -> StepSampler | WindowSampler:
    """Return the sampler of rows, or of windows, where rehearsal takes the place of some."""
    if inputs.corpus is None:
        return _make_step_sampler(plan, inputs.datasets["data"])
    return WindowSampler.from_corpus(
        inputs.corpus,
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
    if sampler.total_steps < plan.steps:  # rows are missing, and the user allowed changes
        raise InputError(
            f"{format_count(len(rows), 'row')} are enough for {sampler.total_steps:,} steps, but "
            f"the plan has {plan.steps:,}",
            where=rows.path,
            fix="restore the rows, or start a new run with another output_dir",
        )
    return sampler


def build_rehearsal(plan: Plan, inputs: RunInputs) -> RehearsalSampler | None:
    """Return the sampler of rehearsal rows, if there are any."""
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
    network: Network, plan: Plan, inputs: RunInputs, rehearsal: RehearsalSampler | None
) -> PreflightSamples:
    """Choose documents of the first rows and the extreme ones; compute their stock logits."""
    is_quantized = plan.config.method == "qlora"
    mixed_in = [] if rehearsal is None else _read_long_rehearsal(rehearsal)
    if inputs.corpus is not None:
        samples = _choose_text_samples(network, inputs.corpus, mixed_in)
        return dataclasses.replace(samples, is_quantized=is_quantized)
    rows = inputs.datasets["data"]
    complete: list[Document] = []
    truncated: list[Document] = []  # used only if no document has a whole answer
    cut: list[Document] = []  # truncated ones without a ban
    id_checks: list[TokenIdCheck] = []
    for index in [*range(min(PROBE_ROWS, len(rows))), *_find_extreme_rows(rows)]:
        example, prepared = rows.render_row(index)
        if example.banned_spans:
            truncated += mark_banned(prepared.documents)
        elif prepared.num_truncated:
            truncated += prepared.documents
            cut += prepared.documents
        else:
            complete += prepared.documents
        if len(id_checks) < STOCK_ID_ROWS:
            id_check = _check_token_ids(inputs, example, prepared)
            id_checks += [] if id_check is None else [id_check]
    candidates = complete or truncated
    candidates += mark_longer([*cut, *mixed_in], candidates)
    documents = choose_documents(candidates, get_sliding_window(network))
    if not documents:
        raise InputError("no row has a target", where=rows.path, fix=SHOW_FIX)
    return PreflightSamples(
        documents,
        _compute_reference_logits(network, documents),
        end_ids=frozenset(inputs.renderer.end_ids),
        folder_end_ids=frozenset(inputs.renderer.tokenizer.end_ids),
        end_texts={token: inputs.renderer.decode([token]) for token in inputs.renderer.end_ids},
        token_id_checks=tuple(id_checks),
        sharing_documents=(
            choose_sharing_documents(candidates) if plan.config.share_prefixes else None
        ),
        is_quantized=is_quantized,
        role_masks=_build_role_masks(inputs, rows, plan.config.train_on),
        has_trained_answers=is_training_answers(plan.config.train_on or "answers"),
    )


def _build_role_masks(
    inputs: RunInputs, rows: Dataset, train_on: str | tuple[str, ...] | None
) -> tuple[RoleMask, ...] | None:
    """Return what the first rows train as text, None if they train answers."""
    if train_on is None:
        return None
    masks: list[RoleMask] = []
    for index in range(min(STOCK_ID_ROWS, len(rows))):
        example, prepared = rows.render_row(index)
        is_comparable = example.messages and not example.banned_spans
        if is_comparable and prepared.documents and not prepared.num_truncated:
            mask = build_role_mask(
                example,
                prepared.documents,
                weigh_messages(example, train_on),
                inputs.renderer,
                trains_all=train_on == "all",
            )
            masks.append(mask)
    return tuple(masks)


def _find_extreme_rows(rows: Dataset) -> list[int]:
    """Return the shortest and the longest rows after the first PROBE_ROWS, by their bytes: a few of
    each that have documents, since a row over max_length has none."""
    sizes = {index: rows.get_row_bytes(index) for index in range(PROBE_ROWS, len(rows))}
    ranked = sorted(sizes, key=sizes.__getitem__)
    extremes: list[int] = []
    for order in (ranked, ranked[::-1]):
        extremes += _find_usable_rows(rows, order) or _find_usable_rows(rows, order, skip=True)
    return extremes


def _find_usable_rows(rows: Dataset, order: Sequence[int], *, skip: bool = False) -> list[int]:
    """Return a few rows that have documents, among the first PROBE_ROWS in `order`.

    With `skip`, among the first that have any: rows over max_length come first or not at all."""

    def has_documents(index: int) -> bool:
        return bool(rows.render_row(index)[1].documents)

    start = bisect.bisect_left(order, True, key=has_documents) if skip else 0
    usable = (index for index in order[start : start + PROBE_ROWS] if has_documents(index))
    return list(itertools.islice(usable, EXTREME_ROWS))


def _read_long_rehearsal(rehearsal: RehearsalSampler) -> list[Document]:
    """Return documents of the longest rehearsal rows, which are packed with those of the data."""
    rows = rehearsal.dataset
    ranked = sorted(range(len(rows)), key=rows.get_row_bytes, reverse=True)
    documents: list[Document] = []
    for row in ranked[:PROBE_ROWS]:
        documents += rehearsal.read_row(row)
        if len(documents) >= EXTREME_ROWS:
            break
    return documents


def _check_token_ids(
    inputs: RunInputs, example: Example, prepared: PreparedRow
) -> TokenIdCheck | None:
    """Compare the token ids of a row with transformers: all, or those of its prompts if the row is
    rendered turn by turn.

    Returns None for rows that transformers renders differently on purpose: with control tokens in
    their text, or with today's date in place of the plan's; and for rows with empty prompts, where
    there is nothing to compare."""
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

    template = inputs.recipe.chat_template
    source = template.read_text(encoding="utf-8") if isinstance(template, Path) else None

    def count_equal_ids(ours_L: np.ndarray, count: int, *, is_prompt: bool) -> int | None:
        """Return how many ids were compared; None if one differs."""
        ids = encode_stock_conversation(
            inputs.model.path,
            inputs.renderer.normalize_messages(example.messages[:count], example.tools),
            example.tools,
            source,
            inputs.recipe.chat_template_kwargs,
            inputs.recipe.add_tokens,
            add_generation_prompt=is_prompt,
        )
        # a document may be truncated
        num_compared = min(len(ours_L), len(ids)) if is_prompt else len(ours_L)
        is_same = np.array_equal(ours_L[:num_compared], ids[:num_compared])
        return num_compared if is_same else None

    is_full_row = len(documents) == 1 and not prepared.notes
    if is_full_row:
        counts = [count_equal_ids(documents[0], len(example.messages), is_prompt=False)]
    else:
        if len(documents) == 1:
            documents = documents * len(turns)
        pairs = zip(documents, turns, strict=True)
        counts = [count_equal_ids(ours_L, turn, is_prompt=True) for ours_L, turn in pairs]
    is_equal = None not in counts
    if not any(counts) and is_equal:
        return None
    if not is_equal and inputs.renderer.has_date:
        return None
    return TokenIdCheck(example.id, is_equal, is_full_row)


def _choose_text_samples(
    network: Network, corpus: PretrainingCorpus, mixed_in: Sequence[Document]
) -> PreflightSamples:
    """Choose documents among the first windows; and texts, encoded as a whole, each with its
    windows."""
    lengths_W = corpus.lengths_W
    extremes = {int(lengths_W.argmin()), int(lengths_W.argmax())} if len(corpus) else set[int]()
    probe_windows = extremes.union(range(min(PROBE_ROWS, len(corpus))))
    windows = [corpus.read_window(index) for index in sorted(probe_windows)]
    windows += mark_longer(mixed_in, windows)
    documents = choose_documents(windows, get_sliding_window(network))
    if not documents:
        raise InputError("no text has a target", where=corpus.dataset.path, fix=SHOW_FIX)
    rows = corpus.dataset.with_max_length(None, "drop")  # a text over it is cut into windows
    texts: list[WindowedText] = []
    for row in _choose_text_rows(corpus):
        row_windows = tuple(corpus.read_window(index) for index in corpus.get_windows(row))
        texts += [WindowedText(document, row_windows) for document in rows.render_documents(row)]
    return PreflightSamples(
        documents,
        _compute_reference_logits(network, documents),
        end_ids=frozenset({rows.renderer.text_end_id}),
        texts=tuple(texts),
    )


def _choose_text_rows(corpus: PretrainingCorpus) -> list[int]:
    """Return the first texts that are not long, the shortest that have several windows, and if all
    are long the shortest ones."""
    rows = corpus.dataset
    encoded = np.flatnonzero(corpus.tokens_N)
    ranked = encoded[np.argsort(corpus.tokens_N[encoded], kind="stable")].tolist()
    first = encoded[:PROBE_ROWS].tolist()
    chosen = [row for row in first if rows.get_row_bytes(row) <= MAX_PIECE_CHARS][:STOCK_ID_ROWS]
    several = (row for row in ranked if len(corpus.get_windows(row)) > 1)
    chosen += itertools.islice(several, EXTREME_ROWS)
    shortest = dict.fromkeys(chosen or ranked[:EXTREME_ROWS])
    return [row for row in shortest if rows.get_row_bytes(row) <= MAX_CHECKED_BYTES]


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
