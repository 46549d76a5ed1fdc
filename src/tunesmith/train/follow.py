"""Ranks other than 0: they do what rank 0 says, and neither write nor judge nor talk.

    follow(ranks) -> exit code

    run       load the inputs of a plan and compare them with those of rank 0
    open      load the model
    begin     read what was measured before training, and be ready
    report    say what went wrong so far
    start, score, generate, weights   as rank 0 measures (follow_measuring.py)
    step, restore, compare, collect   as the loop of rank 0 does
    gather    send a part of a layer, which rank 0 needs
    end       leave with the exit code of rank 0

What a rank does between two commands follows from the plan and the files, so it is what rank 0
does. A problem waits for `report`: rank 0 ends the run with its sentence.

In: the ranks, and a run folder that is only read. Out: nothing but the sums of gradients. Left out:
sending the commands (run.py, loop.py)."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from tunesmith.core.errors import InputError, TunesmithError
from tunesmith.core.events import CheckResult
from tunesmith.core.json_io import parse_as
from tunesmith.core.ranks import END, Ranks
from tunesmith.core.run_dir import PLAN_FILE
from tunesmith.core.sealed_json import read_sealed_json
from tunesmith.core.types import Json, Plan
from tunesmith.model.machine_errors import machine_errors
from tunesmith.model.weight_shards import GATHER, count_sharing_ranks
from tunesmith.session import inputs
from tunesmith.session.fingerprint import build_fingerprint
from tunesmith.session.identity import ROUNDING_PREFIX, hash_source, list_changes
from tunesmith.session.inputs import RunInputs
from tunesmith.session.session import Session, open_session
from tunesmith.train.base_reference import read_references
from tunesmith.train.follow_measuring import SOURCE_CHANGE, START, MeasuringFollower
from tunesmith.train.generated_rows import read_synthetic_pairs
from tunesmith.train.loop import COLLECT, COMPARE, RESTORE, STEP, TrainingLoop
from tunesmith.train.signals import GracefulStop

RUN = "run"
OPEN = "open"
BEGIN = "begin"
REPORT = "report"
MAX_CHANGES = 5  # that a message lists


def follow(ranks: Ranks) -> int:
    """Do what rank 0 says until it ends; return its exit code."""
    with GracefulStop(is_patient=True) as stop:
        follower = Follower(ranks)
        while (command := ranks.receive())["do"] != END:
            ranks.has_signal = bool(stop.signal_number)
            follower.run_command(**command)
    return command["code"]


def check_ranks(ranks: Ranks) -> None:
    """Let the other ranks say what went wrong; raise the first problem, with its rank."""
    ranks.send(REPORT)
    ranks.gather_answers(None)


def _require_shared_folder(path: Path, plan: Json) -> None:
    """Raise InputError if the run folder of rank 0 is not here."""
    file = path / PLAN_FILE
    if not file.is_file() or read_sealed_json(file) != plan:
        raise InputError(
            "this machine does not see the run folder of rank 0",
            where=str(path),
            fix="put output_dir on a disk that all machines share",
        )


def start_ranks(ranks: Ranks, path: Path, plan: Plan, fingerprint: Json) -> tuple[CheckResult, ...]:
    """Give the other ranks a run; return the event that says how the work is shared.

    Raise InputError for a rank with other files, libraries or disks."""
    if ranks.world == 1:
        return ()
    ranks.send(
        RUN, path=str(path.absolute()), plan=plan, fingerprint=fingerprint, source=hash_source()
    )
    check_ranks(ranks)
    ranks.send(OPEN)
    evidence = f"{ranks.world} processes share each step, and sum their gradients"
    context = plan.config.context_parallel_size
    if context > 1:
        evidence += f"; {context} of them share each document"
    sharing = count_sharing_ranks(plan.config.dp_shard_size, ranks.world)
    if sharing > 1:
        evidence += f"; {sharing} of them hold the weights once"
    batch_size = plan.config.batch_size
    if batch_size is not None and batch_size < ranks.world // context:
        evidence += f"; a step has {batch_size} rows, so some of them wait: raise batch_size"
        return (CheckResult("ranks", "warn", evidence),)
    return (CheckResult("ranks", "ok", evidence),)


class Follower:
    """A rank that is not rank 0. `training` is its share of the run's."""

    def __init__(self, ranks: Ranks) -> None:
        self.ranks = ranks
        self.measuring = MeasuringFollower(ranks)
        self._path = Path()
        self._plan: Plan | None = None
        self._inputs: RunInputs | None = None
        self._session: Session | None = None
        self.training: TrainingLoop | None = None
        self._commands: dict[str, Callable[..., None]] = {
            RUN: self._load_inputs,
            OPEN: self._open_session,
            BEGIN: self._begin,
            REPORT: self._report,
            STEP: self._take_step,
            RESTORE: self._restore,
            COMPARE: self._compare,
            COLLECT: self._collect,
            GATHER: self._gather_layer,
            **self.measuring.commands,
        }

    @property
    def problem(self) -> TunesmithError | None:
        """The error of this rank, which rank 0 hears with the next report or results."""
        return self.measuring.problem

    def run_command(self, do: str, **arguments: Any) -> None:
        """Do a command. After a problem nothing is prepared any more."""
        is_preparing = do in (START, RUN, OPEN, BEGIN)
        if is_preparing and self.problem is not None:
            return
        try:
            with machine_errors():
                self._commands[do](**arguments)
        except TunesmithError as error:
            if not is_preparing:
                raise
            self.measuring.problem = error

    def _load_inputs(self, path: str, plan: Json, fingerprint: Json, source: str) -> None:
        self._session = self.training = None  # of the stage before
        self.measuring.use_model(None, None)
        self._path = Path(path)
        _require_shared_folder(self._path, plan)
        self._plan = parse_as(Plan, plan)
        self._inputs = inputs.reload_inputs_unchecked(self._plan, self._path)
        # The first rank of a machine reads the weights, the others have the same files.
        base_sha256 = fingerprint["base_sha256"] if self.ranks.local else None
        recipe = fingerprint["recipe"]
        local = build_fingerprint(self._plan, self._inputs, recipe, base_sha256)
        changes = [] if source == hash_source() else [SOURCE_CHANGE]
        for change in list_changes(fingerprint, local):
            if not change.startswith(ROUNDING_PREFIX):
                changes.append(change)
        if changes:
            listed = "\n  ".join(changes[:MAX_CHANGES])
            message = f"other inputs than rank 0 has:\n  {listed}"
            fix = "give every machine the same files, recipe and libraries"
            raise InputError(message, where=self.ranks.name, fix=fix)

    def _open_session(self) -> None:
        assert self._plan
        assert self._inputs
        self._session = open_session(self._plan, self._inputs, self.ranks)
        self.measuring.use_model(self._session.model, self._inputs.renderer.decode)

    def _begin(self) -> None:
        assert self._plan
        assert self._session
        session, _ = read_synthetic_pairs(self._session, self._path)
        self._session = session = read_references(session, self._path)
        self.training = TrainingLoop(
            session.model,
            session.load_documents,
            self._plan.config,
            steps=self._plan.steps,
            ranks=self.ranks,
        )

    def _report(self) -> None:
        with suppress(TunesmithError):  # rank 0 ends the run with it
            self.ranks.gather_answers(None, self.problem)

    def _take_step(self, step: int, ratios: Json, rollbacks: Json) -> None:
        assert self.training
        assert step == self.training.step, "all ranks have made the same steps"
        self.training.set_changes(ratios, rollbacks)
        next(self.training)

    def _gather_layer(self, layer: int) -> None:
        assert self._session
        assert self._session.model.shards
        self._session.model.shards.serve(layer)

    def _restore(self, folder: str) -> None:
        assert self.training
        self.training.restore(Path(folder))

    def _compare(self) -> None:
        assert self.training
        self.training.compare_ranks()

    def _collect(self) -> None:
        assert self.training
        self.training.send_state()
