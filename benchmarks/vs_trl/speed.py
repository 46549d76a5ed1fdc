"""Measure useful tokens per second and peak memory of tunesmith and of TRL's settings.

Every TRL setting runs once, then tunesmith and the two fastest settings run in turn: a machine's
speed drifts by 10% within minutes, so the medians of a few rounds are compared.

Packing is not a separate setting: on a CPU, TRL computes a pack with a dense mask over all its
tokens, which "padding-free" measures without changing the rows of a step. It counts only if rows in
a forward do not attend to each other, which is tested. Left out: torch.compile, which takes longer
here than all steps.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from statistics import median

from benchmarks.data.rows import group_by_length
from benchmarks.vs_trl.job import Job, Outcome, run_job, write_documents
from benchmarks.vs_trl.prepare import OUR_BATCH, Bench, log

from tunesmith.core.types import Document, Json, ModelSpec
from tunesmith.data.packing import compute_saved_share
from tunesmith.plan.rules import MIN_SAVED_SHARE

OURS, THEIRS = "benchmarks.vs_trl.tunesmith_side", "benchmarks.vs_trl.trl_side"
PACK_LENGTH = 4096  # the plan's choice on a CPU
FINALISTS = 2
PADDED, GROUPED, PADDING_FREE = "padded", "grouped by length", "padding-free"


@dataclass(frozen=True)
class Setting:
    """A TRL setting; the base weights are always bf16.

    `autocast` is TRL's bf16 flag, `fp32_adapter` PEFT's autocast_adapter_dtype; both are on by
    default.
    """

    batch: int
    layout: str = PADDED
    autocast: bool = True
    fp32_adapter: bool = True

    @property
    def name(self) -> str:
        autocast = "autocast" if self.autocast else "no autocast"
        adapter = "fp32 adapter" if self.fp32_adapter else "bf16 adapter"
        return f"batch {self.batch}, {self.layout}, {autocast}, {adapter}"

    def options(self, *, losses: bool = False) -> Json:
        return {
            "padding_free": self.layout == PADDING_FREE,
            "autocast": self.autocast,
            "fp32_adapter": self.fp32_adapter,
            "losses": losses,
        }


# Number formats are tried padded at batch 4; the fastest is used for the other layouts.
FORMATS = [
    Setting(4, PADDED, autocast, fp32_adapter)
    for autocast in (True, False)
    for fp32_adapter in (True, False)
]
LAYOUTS = [(1, PADDED), (2, PADDED), (8, PADDED), (4, GROUPED), (8, GROUPED)]
LAYOUTS += [(2, PADDING_FREE), (4, PADDING_FREE), (8, PADDING_FREE)]


def speed(bench: Bench) -> Json:
    formats = FORMATS[-1:] if bench.quick else FORMATS
    tried = [run_trl(bench, setting) for setting in formats]
    fastest = formats[tried.index(max(tried, key=tokens_per_second))]
    layouts = LAYOUTS[-1:] if bench.quick else LAYOUTS
    others = [replace(fastest, batch=batch, layout=layout) for batch, layout in layouts]
    tried += [run_trl(bench, setting) for setting in others]
    by_speed = sorted(
        zip(tried, [*formats, *others], strict=True), key=lambda pair: -tokens_per_second(pair[0])
    )
    finalists = [setting for run, setting in by_speed if run["is_isolated"]][:FINALISTS]
    ours, theirs = run_rounds(bench, finalists)
    return {
        "tunesmith": take_median(ours)
        | {"peak_bytes": max(run["peak_bytes"] for run in ours), "runs": ours},
        "trl": {
            "best": max(
                (take_median(runs) | {"runs": runs} for runs in theirs), key=tokens_per_second
            ),
            "padded": min(tried[: len(formats)], key=lambda run: run["peak_bytes"]),
            "settings": tried,
        },
    }


def run_rounds(bench: Bench, finalists: list[Setting]) -> tuple[list[Json], list[list[Json]]]:
    """Run tunesmith and the fastest TRL settings in turn."""
    bench = replace(bench, size=replace(bench.size, seconds=bench.size.round_seconds))
    ours: list[Json] = []
    theirs: list[list[Json]] = [[] for _ in finalists]
    for _ in range(bench.size.rounds):
        ours.append(run_tunesmith(bench))
        for setting, runs in zip(finalists, theirs, strict=True):
            runs.append(run_trl(bench, setting))
    return ours, theirs


def take_median(runs: list[Json]) -> Json:
    speeds = ("tokens_per_second", "work_per_second")
    return {"name": runs[0]["name"]} | {key: median(run[key] for run in runs) for key in speeds}


def tokens_per_second(run: Json) -> float:
    return run["tokens_per_second"]


def make_tunesmith_options(documents: Sequence[Document], batch: int) -> Json:
    """Return the plan's choices for these rows."""
    saved = compute_saved_share([(document,) for document in documents], batch, PACK_LENGTH)
    return {
        "pack_length": PACK_LENGTH,
        "blocked": True,
        "share_prefixes": saved >= MIN_SAVED_SHARE["cpu"],
    }


def run_tunesmith(bench: Bench, batch: int = OUR_BATCH) -> Json:
    options = make_tunesmith_options(bench.documents, batch)
    steps = bench.size.rows // batch
    job = replace(bench.job, batch_size=batch, steps=steps, options=options)
    return run_timed_job(OURS, job, "tunesmith", bench.spec)


def run_trl(bench: Bench, setting: Setting) -> Json:
    documents = bench.documents_file
    if setting.layout == GROUPED:
        documents = bench.folder / f"grouped-{setting.batch}.jsonl"
        write_documents(documents, group_by_length(bench.documents, setting.batch))
    steps = bench.size.rows // setting.batch
    job = replace(
        bench.job,
        documents=str(documents),
        batch_size=setting.batch,
        steps=steps,
        options=setting.options(),
    )
    return run_timed_job(THEIRS, job, setting.name, bench.spec)


def run_timed_job(side: str, job: Job, name: str, spec: ModelSpec) -> Json:
    outcome = run_job(side, job)
    leak = "" if outcome.is_isolated else "; does not count: rows attend to each other"
    log(
        f"{name}: {outcome.tokens_per_second:.0f} useful tokens/s, "
        f"{outcome.peak_bytes / 1e9:.2f} GB{leak}"
    )
    return make_result(outcome, name, spec)


def make_result(outcome: Outcome, name: str, spec: ModelSpec) -> Json:
    return {
        "name": name,
        "tokens_per_second": outcome.tokens_per_second,
        "work_per_second": outcome.compute_flops(spec.block_parameters, spec.head_parameters),
        **asdict(outcome),
    }


def measure_losses(bench: Bench) -> Json:
    """Return the losses of equal steps on both sides; TRL with its default number formats."""
    setting, steps = Setting(batch=2), bench.size.loss_steps
    job = replace(bench.job, batch_size=setting.batch, steps=steps, seconds=1e9)
    sides = {
        "tunesmith": (OURS, make_tunesmith_options(bench.documents, setting.batch)),
        "trl": (THEIRS, setting.options(losses=True)),
    }
    losses: Json = {}
    for name, (side, options) in sides.items():
        log(f"{name}: {steps} equal steps")
        outcome = run_job(side, replace(job, options=options))
        losses[name] = [step.loss for step in outcome.steps]
    return losses
