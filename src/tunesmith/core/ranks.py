"""The processes of one run: who this one is, and what they say to each other.

    with open_ranks() as ranks:        from torchrun's variables; one process without them
        ranks.send("step", ...)                  a command of rank 0, which the others `receive`
        answers = ranks.gather(answer)           JSON of each rank, to all
        ranks.sum_(tensor)                       the sum over ranks, in place

With one process every method returns what it was given, and torch.distributed is not imported. JSON
travels as bytes over gloo, never as a pickle; tensors of a GPU over NCCL. Between two messages a
rank may compute for hours: a thread of each rank joins a sum every few seconds, and when one has
been missing for almost two minutes, the others end with exit code 3. Left out: what is said
(train/follow.py)."""

from __future__ import annotations

import json
import logging
import os
import re
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

import psutil

from tunesmith.core.errors import GateError, InputError, MachineError, TunesmithError
from tunesmith.core.formatting import format_count
from tunesmith.core.hardware import count_cores, count_gpus, set_allocator
from tunesmith.core.json_io import dump_json
from tunesmith.core.progress_log import logger

if TYPE_CHECKING:
    from torch import Tensor

THREADS_VARIABLE = "OMP_NUM_THREADS"
WORLD_VARIABLE = "WORLD_SIZE"
VARIABLES = ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
MAX_PORT = 65_535
RESTART_VARIABLE = "TORCHELASTIC_RESTART_COUNT"
SAFE_PATH_VARIABLE = "PYTHONSAFEPATH"
LAUNCH_FIX = (
    "start the ranks with torchrun, which sets it: "
    "torchrun --standalone --nproc-per-node 2 -m tunesmith train recipe.yaml"
)
LOST_FIX = "look for the message of the rank that ended first"
PULSE_SECONDS = 5.0  # between two signs of life
START = timedelta(seconds=100)  # for all ranks to appear: with their imports, under two minutes
KNOCK_SECONDS = 0.1  # between two looks whether rank 0 listens
SILENCE = timedelta(seconds=110)  # after which a rank counts as lost: with a pulse, two minutes
PATIENCE = timedelta(days=7)  # of messages: the pulse watches over them
END_SECONDS = 10.0  # for the ranks to hear of the end
END = "end"  # the command after which no other comes
# of collectives: since torch 2.13, and before
GATHER_NAMES = ("all_gather_single", "all_gather_into_tensor")
REDUCE_NAMES = ("reduce_scatter_single", "reduce_scatter_tensor")
# Errors that one rank tells the others, by exit code.
PROBLEMS = {error.exit_code: error for error in (InputError, MachineError, GateError)}


class RankFailed(MachineError):
    """Another rank cannot go on; it knows why."""


class Ranks:
    """This process among `world` ones: `rank` counts over all machines, `local` on this one.

    `restarts` counts how often torchrun has started the group again. `has_signal` says that a rank
    has caught one: each step tells the others. `is_lockstep`: all ranks run the same code, so rank
    0 sends no commands."""

    def __init__(self, rank: int = 0, world: int = 1, local: int = 0, restarts: int = 0) -> None:
        self.rank = rank
        self.world = world
        self.local = local
        self.restarts = restarts
        self.has_signal = False
        self.is_lockstep = False
        self.pulse: Pulse | None = None
        self._exchange_groups: dict[int, Any] = {}
        self._replica_groups: dict[int, Any] = {}

    @property
    def is_main(self) -> bool:
        """Whether this is rank 0, which alone plans, writes, judges and talks."""
        return self.rank == 0

    @property
    def name(self) -> str:
        return f"rank {self.rank} on {socket.gethostname()}"

    def __enter__(self) -> Self:
        if self.world > 1:
            self._connect()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """End all ranks with this one, if it is rank 0, under its exit code."""
        if self.pulse is None:
            return
        if self.is_main:
            code = error.exit_code if isinstance(error, TunesmithError) else int(error is not None)
            # Ranks in the middle of a step do not listen; they notice that this process is gone.
            sending = threading.Thread(target=self._send_end, args=(code,), daemon=True)
            sending.start()
            sending.join(END_SECONDS)
        self.pulse.stop(has_goodbye=error is None)

    def _connect(self) -> None:
        import torch
        from torch import distributed
        from torch.distributed.distributed_c10d import PrefixStore
        from torch.distributed.rendezvous import rendezvous

        has_gpu = torch.cuda.is_available()
        if has_gpu and self.local >= torch.cuda.device_count():
            raise InputError(
                f"local rank {self.local} has no GPU: there are {torch.cuda.device_count()} here",
                where=self.name,
                fix="start as many processes as the machine has GPUs: --nproc-per-node",
            )
        if has_gpu:
            set_allocator()
            torch.cuda.set_device(self.local)
        try:
            _wait_for_main_rank(is_main=self.is_main)
            store, _, _ = next(rendezvous("env://", timeout=START))
            # torchrun keeps its store: without a prefix, ranks read addresses of those before.
            store = PrefixStore(f"tunesmith/{self.restarts}", store)
            distributed.init_process_group(
                "gloo", store=store, rank=self.rank, world_size=self.world, timeout=START
            )
            # before a group whose members have time: one may be gone while they form it
            self.pulse = Pulse(self, distributed.new_group(backend="gloo", timeout=SILENCE))
            self._backend = "cpu:gloo,cuda:nccl" if has_gpu else "gloo"
            self._group: Any = distributed.new_group(backend=self._backend, timeout=PATIENCE)
        except (RuntimeError, ValueError) as error:
            if self.pulse is not None:
                self.pulse.stop(has_goodbye=False)
            raise MachineError(
                f"rendezvous of {self.world} ranks failed: {_shorten(error)}",
                where=f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}",
                fix="check that every machine runs the same command and reaches this address",
            ) from error

    def _send_end(self, code: int) -> None:
        with suppress(MachineError):  # those that are gone need no end
            self.send(END, code=code)

    # ------------------------------------------------------------ messages

    def send(self, command: str, **arguments: Any) -> None:
        """Send a command to the other ranks; they `receive` it. Does nothing on those, and in
        lockstep."""
        if self.world > 1 and self.is_main and not self.is_lockstep:
            self._send_json({"do": command, **arguments})

    def receive(self) -> dict[str, Any]:
        """Wait for the next command of rank 0."""
        return self._send_json(None)

    def _send_json(self, value: Any) -> Any:
        """Return the value of rank 0, which must be JSON."""
        if self.world == 1:
            return value
        import torch
        from torch import distributed

        content = dump_json(value) if self.is_main else b""
        size = torch.tensor([len(content)])
        with _lost_ranks():
            distributed.broadcast(size, src=0, group=self._group)
            content_B = _to_tensor(content, int(size))
            distributed.broadcast(content_B, src=0, group=self._group)
        return _parse(content_B)

    def gather(self, value: Any) -> list[Any]:
        """Return the value of each rank, by rank; they must be JSON."""
        if self.world == 1:
            return [value]
        import torch
        from torch import distributed

        content = dump_json(value)
        sizes = torch.zeros(self.world, dtype=torch.int64)
        sizes[self.rank] = len(content)
        self.sum_(sizes)
        room = int(sizes.max())
        parts = [torch.empty(room, dtype=torch.uint8) for _ in range(self.world)]
        with _lost_ranks():
            distributed.all_gather(parts, _to_tensor(content, room), group=self._group)
        return [_parse(part[:size]) for part, size in zip(parts, sizes.tolist(), strict=True)]

    def gather_answers(self, value: Any, problem: TunesmithError | None = None) -> list[Any]:
        """Return the value of each rank, by rank, or raise the problem of one, which names its
        rank: the first that is no consequence of another. Values must be JSON."""
        answer = {"value": value, "problem": None if problem is None else self._describe(problem)}
        answers = self.gather(answer)
        problems = [each["problem"] for each in answers if each["problem"] is not None]
        if problems:
            first = min(problems, key=lambda described: described["is_consequence"])
            error = PROBLEMS[first["exit_code"]]
            raise error(first["message"], where=first["where"], fix=first["fix"])
        return [each["value"] for each in answers]

    def gather_in_lockstep(
        self, key: str, value: Any = None, problem: TunesmithError | None = None
    ) -> list[Any]:
        """Gather answers under a key; raise InputError if another rank has another key."""
        answers = self.gather_answers([key, value], problem)
        for rank, (rank_key, _) in enumerate(answers):
            if rank_key != answers[0][0]:
                raise InputError(
                    f"rank {rank} measures other items than rank 0, or with other versions",
                    where=f"{self.world} ranks",
                    fix="give every machine the same files, tunesmith and torch",
                )
        return [value for _, value in answers]

    def _describe(self, problem: TunesmithError) -> dict[str, Any]:
        where = problem.where
        if not self.is_main and where != self.name:
            where = f"{self.name}: {where}".removesuffix(": ")
        return {
            "message": problem.message,
            "where": where,
            "fix": problem.fix,
            "exit_code": problem.exit_code,
            "is_consequence": isinstance(problem, RankFailed),
        }

    def sum_(self, tensor: Tensor) -> None:
        """Replace a tensor by its sum over ranks: the same bits on each."""
        if self.world == 1:
            return
        from torch import distributed

        with _lost_ranks():
            distributed.all_reduce(tensor, group=self._group)

    def form_groups(self, size: int) -> None:
        """Form groups of `size` neighboring ranks that `exchange` tensors. All ranks call it."""
        if size == 1 or size in self._exchange_groups:
            return
        from torch import distributed

        for first in range(0, self.world, size):
            members = list(range(first, first + size))
            with _lost_ranks():
                group = distributed.new_group(members, backend=self._backend, timeout=PATIENCE)
            if self.rank in members:
                self._exchange_groups[size] = group

    def form_replicas(self, size: int) -> None:
        """Form groups of ranks that are `size` apart. All ranks call it."""
        from torch import distributed

        for first in range(size):
            members = list(range(first, self.world, size))
            with _lost_ranks():
                group = distributed.new_group(members, backend=self._backend, timeout=PATIENCE)
            if self.rank in members:
                self._replica_groups[size] = group

    def sum_replicas(self, tensor: Tensor, *, size: int) -> None:
        """Replace a tensor by its sum over the ranks that are `size` apart."""
        from torch import distributed

        with _lost_ranks():
            distributed.all_reduce(tensor, group=self._replica_groups[size])

    def exchange(
        self,
        sent: Tensor,
        received: Tensor,
        sent_rows: list[int],
        received_rows: list[int],
        *,
        size: int,
    ) -> None:
        """Send rows to each rank of this one's group of `size`, in their order, and receive."""
        from torch import distributed

        group = self._exchange_groups[size]
        with _lost_ranks():
            distributed.all_to_all_single(received, sent, received_rows, sent_rows, group=group)

    def gather_parts(self, parts: Tensor, part: Tensor, *, size: int) -> None:
        """Write a tensor of each rank of this one's group of `size` into `parts`, by rank."""
        self._run_collective(GATHER_NAMES, parts, part, size)

    def start_gather(self, parts: Tensor, part: Tensor, *, size: int) -> Callable[[], None]:
        """Begin to `gather_parts`; return what waits until they are there."""
        work = self._run_collective(GATHER_NAMES, parts, part, size, is_async=True)

        def wait() -> None:
            with _lost_ranks():
                work.wait()

        return wait

    def gather_words(self, word: int, *, size: int) -> list[int]:
        """Return the number of each rank of this one's group of `size`."""
        import torch

        words = torch.zeros(size, dtype=torch.int64)
        self.gather_parts(words, torch.tensor([word]), size=size)
        return words.tolist()

    def reduce_parts(self, part: Tensor, parts: Tensor, *, size: int) -> None:
        """Write the sum of this rank's part of a tensor over its group of `size` into `part`."""
        self._run_collective(REDUCE_NAMES, part, parts, size)

    def _run_collective(
        self,
        names: tuple[str, str],
        received: Tensor,
        sent: Tensor,
        size: int,
        *,
        is_async: bool = False,
    ) -> Any:
        """Run a collective in this rank's group of `size`, under the name that torch has for it;
        with `is_async`, start it and return its work."""
        from torch import distributed

        name, old_name = names
        run = getattr(distributed, name if hasattr(distributed, name) else old_name)
        with _lost_ranks():
            return run(received, sent, group=self._exchange_groups[size], async_op=is_async)


SINGLE_PROCESS = Ranks()


class Pulse:
    """Signs of life: a thread that joins a sum of the ranks that leave, until all do.

    It ends the process when a rank is missing: the main thread may wait for that rank in a call
    that nothing interrupts."""

    def __init__(self, ranks: Ranks, group: Any) -> None:
        self.ranks = ranks
        self.group = group
        self._has_goodbye = True
        self._is_leaving = threading.Event()
        self._thread = threading.Thread(target=self._run, name="pulse", daemon=True)
        self._thread.start()

    def stop(self, *, has_goodbye: bool) -> None:
        """Stop; with `has_goodbye`, wait until all ranks do."""
        self._has_goodbye = has_goodbye
        self._is_leaving.set()
        if has_goodbye:
            self._thread.join()

    def _run(self) -> None:
        import torch
        from torch import distributed

        num_leaving = 0
        while num_leaving < self.ranks.world:
            is_leaving = self._is_leaving.wait(PULSE_SECONDS)
            if not self._has_goodbye:
                return
            leaving = torch.tensor([int(is_leaving)])
            try:
                distributed.all_reduce(leaving, group=self.group)
            except RuntimeError as error:
                if not self._is_leaving.is_set():
                    _end_process(self.ranks, error)
                return
            num_leaving = int(leaving)


def _end_process(ranks: Ranks, error: RuntimeError) -> None:
    """End the process: torchrun or the scheduler starts the group again, or reports it."""
    if ranks.is_main:
        logger.error("another rank has ended or is silent: %s; %s", _shorten(error), LOST_FIX)
    os._exit(MachineError.exit_code)


def open_ranks() -> Ranks:
    """Return the ranks that torchrun's variables describe. Raises InputError if some are missing
    or contradict each other."""
    world = _read_number(WORLD_VARIABLE) if WORLD_VARIABLE in os.environ else 1
    if world == 1:
        return Ranks()
    for name in VARIABLES:
        if not os.environ.get(name):
            message = f"{WORLD_VARIABLE} is {world}, but {name} is not set"
            raise InputError(message, where="environment", fix=LAUNCH_FIX)
    rank = _read_number("RANK")
    if not 0 <= rank < world:
        message = f"RANK is {rank}, but {WORLD_VARIABLE} is {world}"
        raise InputError(message, where="environment", fix=LAUNCH_FIX)
    if _read_number("MASTER_PORT") > MAX_PORT:
        message = f"MASTER_PORT is {os.environ['MASTER_PORT']:.40}, but the last port is {MAX_PORT}"
        raise InputError(message, where="environment", fix=LAUNCH_FIX)
    restarts = _read_number(RESTART_VARIABLE) if RESTART_VARIABLE in os.environ else 0
    return Ranks(rank, world, _read_number("LOCAL_RANK"), restarts)


def run_torchrun(num_processes: int, words: Sequence[str]) -> int:
    """Run `tunesmith WORDS` in several processes on this machine, once; return the exit code of
    rank 0, or of the first rank that failed."""
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.run import parse_args, run

    # It reports each process that fails, in lines of its own code; rank 0 has explained that.
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    # It starts `python -m tunesmith` without -P, which would run a tunesmith.py of this folder.
    os.environ[SAFE_PATH_VARIABLE] = "1"
    options = ["--standalone", f"--nproc-per-node={num_processes}", "-m", "tunesmith"]
    try:
        run(parse_args([*options, *words]))
    except ChildFailedError as failed:
        for rank, failure in failed.failures.items():
            if failure.exitcode < 0:  # the number of a signal, of which a rank says nothing itself
                logger.error("rank %d was ended by %s", rank, _name_signal(-failure.exitcode))
        _, first = failed.get_first_failure()
        main = failed.failures.get(0, first)
        # torchrun ends the others when one has failed: that is no code of rank 0
        was_ended = main.exitcode in (-signal.SIGTERM, 128 + signal.SIGTERM)
        code = first.exitcode if was_ended else main.exitcode
        return code if code > 0 else 128 - code
    except SignalException as caught:
        return 128 + int(caught.sigval)
    return 0


def _name_signal(number: int) -> str:
    name = f"signal {number} ({signal.strsignal(number)})"
    if number == signal.SIGKILL:
        name += ", as the system ends a process when memory runs out: look at its log"
    return name


def read_launch_time() -> float:
    """Return when torchrun, the parent of this process, was started: seconds since 1970."""
    return psutil.Process(os.getppid()).create_time()


def is_distributed() -> bool:
    """Return whether this process is one of several ranks."""
    return os.environ.get(WORLD_VARIABLE, "1") != "1"


def refuse_processes(num_processes: int) -> None:
    """Raise InputError for more processes than GPUs, or than cores where there is no GPU, and in a
    process that is one of several."""
    if is_distributed():
        message = f"--gpus starts processes, but {WORLD_VARIABLE} says that this is one of several"
        raise InputError(message, where="command line", fix="leave --gpus out under torchrun")
    if num_processes < 1:
        raise InputError("must be 1 or more", where="--gpus", fix="leave it out")
    num_gpus = count_gpus()
    if num_gpus and num_processes > num_gpus:
        gpus = format_count(num_gpus, "GPU")
        message = f"{num_processes} GPUs requested, but this machine has {gpus}"
        raise InputError(message, where="--gpus", fix=f"use --gpus {num_gpus}")
    cores = count_cores()
    if not num_gpus and num_processes > cores:
        owned = format_count(cores, "core")
        message = f"{num_processes} processes requested, but this machine has no GPU and {owned}"
        raise InputError(message, where="--gpus", fix=f"use --gpus {cores}, or leave it out")


def _wait_for_main_rank(*, is_main: bool) -> None:
    """Wait until rank 0 listens; on rank 0, until the name of its machine is known. torch would try
    again after its timeout, for four minutes in all."""
    address = (os.environ["MASTER_ADDR"], _read_number("MASTER_PORT"))
    end = time.monotonic() + START.total_seconds()
    while True:
        try:
            if is_main:
                socket.getaddrinfo(*address)
            else:
                socket.create_connection(address, timeout=PULSE_SECONDS).close()
        except OSError as error:
            if time.monotonic() > end:
                problem = "MASTER_ADDR is unknown" if is_main else "rank 0 does not listen"
                raise RuntimeError(f"{problem}: {error}") from error
            time.sleep(KNOCK_SECONDS)
        else:
            return


def _read_number(name: str) -> int:
    text = os.environ[name]
    if not text.isdecimal():
        message = f"{name} is {text!r:.40}, not a number"
        raise InputError(message, where="environment", fix=LAUNCH_FIX)
    return int(text)


@contextmanager
def _lost_ranks() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        message = f"another rank has ended: {_shorten(error)}"
        raise MachineError(message, fix=LOST_FIX) from error


def _shorten(error: Exception) -> str:
    """Return what gloo says without its source file and its advice."""
    line = str(error).strip().partition("\n")[0]
    return re.sub(r"\[\S+\.cc:\d+\] ", "", line).partition(". ")[0]


def _to_tensor(content: bytes, size: int) -> Tensor:
    import torch

    return torch.frombuffer(bytearray(content.ljust(size, b" ")), dtype=torch.uint8)


def _parse(content_B: Tensor) -> Any:
    return json.loads(content_B.numpy().tobytes())
