"""The story of a run; read this first.

    plan -> prove -> measure -> train, saving and evaluating -> measure again -> record

In: a Plan. Out: events as they happen, and a run folder that holds everything: plan.json, data.json, events.jsonl,
checkpoints/, adapter/, record.json. `resume` tells the same story from the last checkpoint
on. The events are the only coupling to whoever watches: the command line prints them, the folder keeps them.
"""

from __future__ import annotations

from collections.abc import Generator, Iterable, Iterator
from contextlib import closing
from pathlib import Path

import yaml

from tunesmith import facts
from tunesmith.atomic import new_folder, remove_folder, sha256_of
from tunesmith.data.dataset import Dataset
from tunesmith.errors import InputError
from tunesmith.facts import Facts
from tunesmith.infer.engine import stream
from tunesmith.jsonfile import from_json, read_json
from tunesmith.measure import Items, Measured, compare_all, eval_loss, items_of, measure
from tunesmith.model.adapters import adapter_scaled
from tunesmith.model.saved import load_adapter, save_adapter, save_model, save_serving_files
from tunesmith.plan.plan import refuse_without_room
from tunesmith.runfolder import RunFolder
from tunesmith.train.interrupts import StopWish
from tunesmith.train.preflight import prove
from tunesmith.train.training import Settings, Training
from tunesmith.types import Comparison, Event, Json, Plan, Request, RunRecord, Saved, StepResult, Verdict
from tunesmith.version import __version__
from tunesmith.workbench import Workbench, set_up

BEFORE = "before.json"


def train(plan: Plan, known: Facts | None = None) -> Iterator[Event]:
    """A new run; `known` are the facts that the plan was made from, gathered again if not given. Raises MachineError or
    InputError before anything is loaded when it cannot fit or be measured, GateError when the proof fails."""
    refuse_without_room(plan)
    known = known or facts.regather(plan)
    items = items_of(plan, known)
    with RunFolder.create(Path(plan["output_dir"])) as folder:
        folder.write_text("recipe.yaml", yaml.safe_dump(plan.recipe, sort_keys=False, allow_unicode=True))
        folder.write_json("plan.json", plan)
        folder.write_json("data.json", plan.data)
        yield from _keep(folder, _story(folder, plan, known, items))


def resume(path: Path) -> Iterator[Event]:
    """Goes on after the newest valid checkpoint. Raises InputError when the data or the renderer has changed."""
    plan = from_json(Plan, read_json(path / "plan.json"))
    with RunFolder.open(path) as folder:
        if (path / "record.json").exists():
            raise InputError("this run is finished", where=str(path), fix="start a new one with another output_dir")
        known = facts.regather(plan)
        yield from _keep(folder, _story(folder, plan, known, items_of(plan, known)))


def _keep(folder: RunFolder, events: Iterator[Event]) -> Iterator[Event]:
    """Every event is on disk before anyone sees it."""
    for event in events:
        folder.append_event(event)
        yield event


def _story(folder: RunFolder, plan: Plan, known: Facts, items: Items) -> Iterator[Event]:
    bench = set_up(plan, known)
    proof = prove(bench.model, bench.probe)
    yield from proof
    before = _before(folder, bench, items)
    yield from before.scores(step=0)
    training = Training(bench.model, bench.documents_of, Settings.of(plan))
    if (checkpoint := folder.latest_checkpoint()) is not None:
        training.restore(checkpoint)
    with StopWish() as wish, closing(_trained(folder, bench, training, items)) as events:
        for event in events:
            yield event
            if wish.signal and isinstance(event, StepResult):
                yield _checkpoint(folder, training)
                raise wish.interruption(f"go on with: tunesmith resume {folder.path}")
    adapter = _save(folder, bench)
    after = measure(bench, items, step=training.step)
    yield from after.scores(step=training.step)
    folder.write_json("record.json", _record(folder, plan, proof, (before, after), adapter))


def _before(folder: RunFolder, bench: Workbench, items: Items) -> Measured:
    """The base model's measures; taken once, before any weight has changed."""
    if not (folder.path / BEFORE).exists():
        folder.write_json(BEFORE, measure(bench, items, step=0))
    return from_json(Measured, read_json(folder.path / BEFORE))


def _trained(folder: RunFolder, bench: Workbench, training: Training, items: Items) -> Generator[Event]:
    """The training's own events, with a checkpoint and a held-out loss where the plan wants them."""
    plan = bench.plan
    for event in training:
        yield event
        if not isinstance(event, StepResult):
            continue
        if event.step % plan["eval_steps"] == 0 and items.eval_documents:
            yield eval_loss(bench, items, step=event.step)
        if event.step % plan["save_steps"] == 0 and event.step < plan.steps:
            yield _checkpoint(folder, training)


def _checkpoint(folder: RunFolder, training: Training) -> Saved:
    needed = sum(3 * p.numel() * p.element_size() for p in training.parameters.values())
    with folder.checkpoint(training.step, facts={"step": training.step}, needed_bytes=needed) as target:
        training.save(target)
    return Saved(training.step, f"checkpoints/step-{training.step}")


def _save(folder: RunFolder, bench: Workbench) -> Path:
    """The trained weights, with what serving needs to behave as training did."""
    plan, base, network = bench.plan, bench.facts.model.path, bench.model.network
    values = {key: choice.value for key, choice in plan.choices.items()}
    target = folder.path / ("adapter" if plan["method"] == "lora" else "model")
    if target.exists():  # left by an earlier attempt that ended before its record
        remove_folder(target)
    with new_folder(target, facts=_identity(bench)) as scratch:
        if plan["method"] == "lora":
            save_adapter(network, scratch, values, base)
        else:
            save_model(network, scratch, base, bench.model.dtype)
        template = bench.facts.recipe.template
        save_serving_files(
            scratch, base, template=template if isinstance(template, Path) else None, end_ids=bench.renderer.end_ids
        )
    return target


def _identity(bench: Workbench) -> Json:
    """What the weights belong to: kept beside them, so that a stranger can tell."""
    weights = sorted(bench.facts.model.path.glob("*.safetensors"))
    return {
        "tunesmith": __version__,
        "base": bench.facts.model.name,
        "base_sha256": {file.name: sha256_of(file) for file in weights},
        "renderer": bench.renderer.fingerprint,
    }


def _record(
    folder: RunFolder,
    plan: Plan,
    proof: Iterable[Verdict],
    measured: tuple[Measured, Measured],
    adapter: Path,
) -> RunRecord:
    before, after = measured
    steps = [event for event in folder.events() if event["type"] == "step"]
    return RunRecord(
        version=__version__,
        plan=plan,
        proof=tuple(proof),
        comparisons=compare_all(before, after, step=len(steps)),
        steps=len(steps),
        tokens=sum(event["tokens"] for event in steps),
        train_seconds=sum(event["seconds"] for event in steps),
        peak_bytes=max((event["peak_bytes"] for event in steps), default=0),
        adapter=str(adapter),
        samples=tuple(zip(before.samples, after.samples, strict=True)),
    )


# ---------------------------------------------------------------- after a run


def reopen(path: Path) -> Workbench:
    """The workbench of a finished run, its adapter loaded."""
    plan = from_json(Plan, read_json(path / "plan.json"))
    file = path / "adapter" / "adapter_model.safetensors"
    if plan["method"] != "lora":
        raise InputError("only runs with an adapter can be reopened", where=str(path), fix="load model/ as a model")
    if not file.exists():
        raise InputError("this run has no adapter yet", where=str(path), fix=f"finish it: tunesmith resume {path}")
    bench = set_up(plan, facts.regather(plan))
    load_adapter(bench.model.network, file)
    return bench


def evaluate(path: Path) -> tuple[Comparison, ...]:
    """The before/after of a finished run, measured again."""
    bench = reopen(path)
    items, step = items_of(bench.plan, bench.facts), bench.plan.steps
    with adapter_scaled(bench.model.network, 0):
        before = measure(bench, items, step=0)
    return compare_all(before, measure(bench, items, step=step), step=step)


def chat(path: Path, questions: Iterable[str]) -> Iterator[str]:
    """Answers of the trained model, one conversation; each answer comes whole."""
    bench = reopen(path)
    bench.model.network.eval()
    messages: list[Json] = list(_system(bench.rows))
    for question in questions:
        messages.append({"role": "user", "content": question})
        request = Request(bench.renderer.prompt(messages), max_new_tokens=512)
        pieces = stream(bench.model, request, decode=bench.renderer.decode, end_ids=bench.renderer.end_ids)
        answer = "".join(pieces)
        messages.append({"role": "assistant", "content": answer})
        yield answer


def _system(rows: Dataset) -> tuple[Json, ...]:
    """The system message that training rows begin with: served the same way."""
    messages = rows.example(0).messages if len(rows) else ()
    return messages[:1] if messages and messages[0]["role"] == "system" else ()
