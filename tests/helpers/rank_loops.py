"""Training loops that the tests of several ranks run in processes of their own."""

import dataclasses
import os
import signal
import subprocess
import time
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
from torch import distributed
from torch.distributed.distributed_c10d import _set_pg_timeout

from tiny_loop import SETTINGS, make_step_documents, select_steps
from tiny_models import continue_document, make_tiny_document, make_tiny_model
from tunesmith.core import ranks as core_ranks
from tunesmith.core.errors import MachineError
from tunesmith.core.events import CheckResult, Rollback
from tunesmith.core.ranks import END, Ranks
from tunesmith.core.types import Batch, Document
from tunesmith.train.all_reduce import sum_step
from tunesmith.train.follow import Follower
from tunesmith.train.loop import TrainingLoop
from tunesmith.train.losses import LossNormalizer

STEPS = 20
KINDS = ("rows", "prefixes", "pairs", "full", "accumulated")
SHORT_SILENCE = timedelta(seconds=3)  # of a running pulse; a start may take longer
LONG_DOCUMENT = 90  # tokens: more than all others of its step together


def make_documents(kind: str, step: int) -> list[Document]:
    if kind == "prefixes":  # two prompts, each with several answers
        documents: list[Document] = []
        for prompt_length in (40, 25):
            prompt = make_tiny_document(prompt_length, step)
            for seed in range(4):
                documents.append(continue_document(prompt, prompt_length, 5 + 3 * seed, seed))
        return documents
    if kind == "prompt":  # whose short answer is in the last part of the pack
        return [make_tiny_document(LONG_DOCUMENT, step, first_target=LONG_DOCUMENT - 2)]
    documents = list(make_step_documents(step))
    if kind == "long":
        documents.insert(3, make_tiny_document(LONG_DOCUMENT, step))
    if kind != "pairs":
        return documents
    pairs: list[Document] = []
    for number, document in enumerate(documents):
        rejected = make_tiny_document(4 + number, 100 * step + 50 + number)
        for side, one in (("chosen", document), ("rejected", rejected)):
            pairs.append(dataclasses.replace(one, id=f"{step}.{number}", side=side))
    return pairs


def make_loop(ranks: Ranks, kind: str, context: int = 1, **model_settings: Any) -> TrainingLoop:
    changes: dict[str, Any] = {"pack_length": 200, "context_parallel_size": context}
    if kind == "accumulated":
        changes["pack_length"] = 20
    if kind == "alone":  # a document of one token has a pack of its own
        changes["pack_length"] = 1
    if kind == "prefixes":
        changes["share_prefixes"] = True
    if kind == "pairs":
        changes |= {"loss": "simpo", "beta": 2.0, "gamma": 0.5, "nll_coefficient": 0.1}
    method = "full" if kind == "full" else "lora"
    model = make_tiny_model(method=method, **model_settings)
    return TrainingLoop(
        model,
        lambda step: make_documents(kind, step),
        dataclasses.replace(SETTINGS, **changes),
        steps=STEPS,
        ranks=ranks,
    )


def iterate_alone(ranks: Ranks) -> None:
    """Let every rank take its steps by itself: rank 0 sends no commands."""
    ranks.send = lambda *_, **__: None  # pyright: ignore[reportAttributeAccessIssue]


def follow_loop(ranks: Ranks, training: TrainingLoop) -> None:
    """Do what rank 0 says with a loop until it ends."""
    follower = Follower(ranks)
    follower.training = training
    while (command := ranks.receive())["do"] != END:
        follower.run_command(**command)


Training = tuple[list[float], list[tuple[int, int]], np.ndarray]


def train_loop(ranks: Ranks, kind: str, context: int = 1, family: str = "llama") -> Training:
    """Return losses, counts of tokens, and the final weights."""
    training = make_loop(ranks, kind, context, family=family)
    iterate_alone(ranks)
    steps = select_steps(list(training))
    counts = [(step.tokens, step.supervised_tokens) for step in steps]
    return [step.loss for step in steps], counts, get_weights(training)


def train_loops(ranks: Ranks, kinds: Sequence[str]) -> dict[str, Training]:
    """Train a loop of each kind, in processes that start once."""
    return {kind: train_loop(ranks, kind) for kind in kinds}


def train_with_shared_documents(ranks: Ranks, cases: Sequence[tuple[str, str]]) -> list[Training]:
    """Train a loop of each kind and family, in processes that start once."""
    return [train_loop(ranks, kind, ranks.world, family) for kind, family in cases]


def get_weights(training: TrainingLoop) -> np.ndarray:
    return torch.cat([p.detach().flatten() for p in training.parameters.values()]).numpy()


# ---------------------------------------------------------------- ranks that share documents


def measure_gradients(
    ranks: Ranks, context: int, family: str, policies: Sequence[str]
) -> list[tuple[dict[str, np.ndarray], int]]:
    """Return the gradients of a step, and the bytes that its forward passes save on this rank, with
    each policy of gradient checkpointing."""
    return [_measure_policy(ranks, context, family, policy) for policy in policies]


def _measure_policy(
    ranks: Ranks, context: int, family: str, policy: str
) -> tuple[dict[str, np.ndarray], int]:
    training = make_loop(ranks, "long", context, family=family, gradient_checkpointing=policy)
    documents = make_documents("long", 1)
    normalizer = LossNormalizer.from_documents(documents)
    frozen = {p.untyped_storage().data_ptr() for p in training.model.network.parameters()}
    saved: dict[int, int] = {}

    def count(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in frozen:
            saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
        share = training._compute_share(training.pack_documents(documents), normalizer, None)
    parameters = training.parameters
    if ranks.world > 1:
        sum_step(parameters, share, ranks)
    gradients = {name: p.grad.numpy() for name, p in parameters.items() if p.grad is not None}
    return gradients, sum(saved.values())


def run_out_of_memory(ranks: Ranks) -> str:
    """Let rank 1 have no memory for its tokens; return what rank 0, which waits for them, says."""
    training = make_loop(ranks, "long", context=2)
    iterate_alone(ranks)
    return fail_on_second_rank(ranks, training)


def fail_on_second_rank(ranks: Ranks, training: TrainingLoop) -> str:
    """Let rank 1 run out of memory in its next step; return what rank 0 says."""

    def fail(_: Batch) -> torch.Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory")

    if ranks.rank == 1:
        training.model.compute_hidden = fail  # type: ignore[method-assign]
    try:
        next(training)
    except MachineError as error:
        if ranks.rank == 1:
            raise
        return error.message
    return "no error"


# ---------------------------------------------------------------- faults

MAX_TOKENS = 35  # that rank 1 has memory for


def train_with_nan(ranks: Ranks) -> tuple[list[str], bytes]:
    """Train on a document whose loss is not finite in step 3; return verdicts and weights."""
    training = make_loop(ranks, "rows")
    iterate_alone(ranks)
    load_documents = training.load_documents

    def load_with_nan(step: int) -> list[Document]:
        documents = list(load_documents(step))
        if step == 3:
            weights_L = np.where(documents[1].weights_L > 0, np.nan, 0).astype(np.float32)
            documents[1] = dataclasses.replace(documents[1], weights_L=weights_L)
        return documents

    training.load_documents = load_with_nan
    return collect_outcome(training)


def train_with_little_memory(ranks: Ranks) -> tuple[list[str], bytes]:
    """Train where rank 1 has memory for few tokens; return verdicts and weights."""
    training = make_loop(ranks, "rows")
    iterate_alone(ranks)
    limit_memory(training)
    return collect_outcome(training)


def limit_memory(training: TrainingLoop) -> None:
    """Let rank 1 run out of memory on a pack of more than MAX_TOKENS."""
    hidden = training.model.compute_hidden

    def compute_with_little_memory(batch: Batch) -> torch.Tensor:
        if training.ranks.rank == 1 and batch.layout.num_tokens > MAX_TOKENS:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return hidden(batch)

    training.model.compute_hidden = compute_with_little_memory  # type: ignore[method-assign]


def collect_outcome(training: TrainingLoop) -> tuple[list[str], bytes]:
    verdicts: list[str] = []
    for event in training:
        if isinstance(event, CheckResult):
            verdicts.append(f"{event.step} {event.kind}: {event.evidence}")
    return verdicts, get_weights(training).tobytes()


def fail_in_a_step(ranks: Ranks) -> str:
    """Let rank 0 fail while rank 1 waits for its gradients; return what rank 1 says."""
    core_ranks.END_SECONDS = 1.0  # which nobody hears
    core_ranks.PULSE_SECONDS = core_ranks.PATIENCE.total_seconds()  # the step notices it
    training = make_loop(ranks, "rows")
    if not ranks.is_main:
        try:
            follow_loop(ranks, training)
        except MachineError as error:
            return error.message
        return "ended"

    def fail(_: Batch) -> torch.Tensor:
        raise ValueError("a bug")

    training.model.compute_hidden = fail  # type: ignore[method-assign]
    next(training)
    return "no error"


def wait_for_silent_rank() -> str:
    """Wait on rank 0 for rank 1, which gives no sign of life until the process of rank 0 ends."""
    core_ranks.PULSE_SECONDS = 0.2
    with core_ranks.open_ranks() as ranks:
        assert ranks.pulse
        if ranks.is_main:
            _set_pg_timeout(SHORT_SILENCE, ranks.pulse.group)
        pid, _ = ranks.gather(os.getpid())
        if ranks.is_main:
            ranks.gather(None)
            return "heard of rank 1"
        ranks.pulse.stop(has_goodbye=False)
        while psutil.pid_exists(pid):
            time.sleep(0.05)
        return "awake"


def stop_while_groups_form(folder: str) -> str:
    """Let the process of rank 1 be stopped before the last group is formed, and killed when that of
    rank 0 has ended."""
    core_ranks.PULSE_SECONDS = 0.2
    core_ranks.PATIENCE = timedelta(minutes=5)
    rank = os.environ["RANK"]
    (Path(folder) / rank).write_text(str(os.getpid()))
    new_group = distributed.new_group

    def stop(*args: Any, **kwargs: Any) -> Any:
        if kwargs["timeout"] == core_ranks.PATIENCE and rank == "1":
            script = 'while kill -0 "$(cat 0)"; do sleep 0.1; done; kill -KILL "$(cat 1)"'
            subprocess.Popen(["sh", "-c", script], cwd=folder, stderr=subprocess.DEVNULL)
            os.kill(os.getpid(), signal.SIGSTOP)
        group = new_group(*args, **kwargs)
        if kwargs["timeout"] == core_ranks.SILENCE and rank == "0":
            _set_pg_timeout(SHORT_SILENCE, group)
        return group

    distributed.new_group = stop
    with core_ranks.open_ranks():
        return "connected"


def drift(ranks: Ranks) -> str:
    """Change one bit of a weight on rank 1; return what the comparison of the ranks says."""
    training = make_loop(ranks, "rows")
    iterate_alone(ranks)
    training.compare_ranks()
    if ranks.rank == 1:
        weight = next(iter(training.parameters.values())).data.view(torch.int32)
        weight.view(-1)[3] ^= 1
    try:
        training.compare_ranks()
    except MachineError as error:
        return error.message
    return ""


def roll_back(ranks: Ranks, folder: str) -> bytes:
    """Save after three steps, roll back to them after five, and train on without a row at half the
    learning rate; return the weights. Ranks other than 0 follow."""
    training = make_loop(ranks, "rows")
    if not ranks.is_main:
        follow_loop(ranks, training)
        return collect_outcome(training)[1]
    for _ in range(3):
        next(training)
    training.save(Path(folder))
    for _ in range(2):
        next(training)
    training.restore(Path(folder))
    skipped = make_documents("rows", 5)[1].id
    training.set_rollbacks(
        [Rollback(5, 3, "spike", "", "half the rate", lr_factor=0.5, rows=(skipped,))]
    )
    return collect_outcome(training)[1]
