"""Several ranks over gloo on this machine, for tests: processes that have torch loaded already."""

import multiprocessing
import os
import sys
import traceback
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection
from typing import Any

from torch.distributed import TCPStore

from tunesmith.core.ranks import Ranks, open_ranks
from tunesmith.plan import memory

SECONDS = 600  # after which a rank hangs, also on a busy machine


def run_ranks(work: Callable[..., Any], world: int, *args: Any) -> list[Any]:
    """Return what `work(ranks, *args)` returns on each rank; `work` must be importable.

    Raise AssertionError with the traceback of a rank that fails."""
    results = run_processes(call_on_rank, world, work, *args)
    for result in results:
        assert not isinstance(result, str) or not result.startswith("Traceback"), result
    return results


def run_in_turn(works: Sequence[tuple[Any, ...]], world: int) -> list[list[Any]]:
    """Return what each work (function, *arguments) returns on each rank, in processes that start
    once. What fails, or waits until rank 0 leaves, comes last."""
    by_rank = run_ranks(call_in_turn, world, works)
    return [list(results) for results in zip(*by_rank, strict=True)]


def run_processes(main: Callable[..., Any], world: int, *args: Any) -> list[Any]:
    """Return what `main(*args)` sends from each process, which has torchrun's variables; None if
    it dies."""
    context = multiprocessing.get_context("forkserver")
    # Python's fork server does not take over sys.path, and does not say when an import fails.
    os.environ["PYTHONPATH"] = os.pathsep.join(sys.path)
    context.set_forkserver_preload(["rank_process_imports"])
    # as torchrun does: the parent has the store, at a port that was free when it took it
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    readers: list[Connection] = []
    processes: list[Any] = []
    for rank in range(world):
        reader, writer = context.Pipe(duplex=False)
        variables = {
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(world),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(store.port),
            "TORCHELASTIC_USE_AGENT_STORE": "True",
        }
        answer_tokens = memory.MIN_COMPLETE_TOKENS  # which conftest.py may have cut
        work = (writer, variables, answer_tokens, main, args)
        process = context.Process(target=_start, args=work, daemon=True)
        process.start()
        writer.close()
        readers.append(reader)
        processes.append(process)
    results = [_read(reader) for reader in readers]
    for process in processes:
        process.join(SECONDS)
        assert process.exitcode is not None, "a rank hangs"
    return results


def _read(reader: Connection) -> Any:
    try:
        assert reader.poll(SECONDS), "a rank hangs"
        return reader.recv()
    except EOFError:
        return None


def _start(
    writer: Connection,
    variables: dict[str, str],
    answer_tokens: int,
    main: Callable[..., Any],
    args: Sequence[Any],
) -> None:
    os.environ.update(variables)
    memory.MIN_COMPLETE_TOKENS = answer_tokens
    import torch

    torch.set_num_threads(1)
    try:
        writer.send(main(*args))
    except BaseException:  # noqa: BLE001 - an exit, too: nobody else prints it before os._exit
        writer.send(traceback.format_exc())
    os._exit(0)


def call_on_rank(work: Callable[..., Any], *args: Any) -> Any:
    with open_ranks() as ranks:
        return work(ranks, *args)


def call_in_turn(ranks: Ranks, works: Sequence[tuple[Any, ...]]) -> list[Any]:
    results: list[Any] = []
    for work, *args in works:
        results.append(work(ranks, *args))
        vars(ranks).pop("send", None)  # which a work may have replaced
    return results


def get_own_part(ranks: Ranks, items: Sequence[Any]) -> Any:
    return items[ranks.rank]
