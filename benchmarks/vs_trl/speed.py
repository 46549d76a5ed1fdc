"""Useful tokens a second and peak memory: every setting of TRL once, then tunesmith and its two
fastest in turn.

A machine's speed drifts by a tenth within minutes, so what is compared ran side by side: the median
of a few rounds.

Packing is not a setting of its own: on a CPU, TRL computes a pack under a dense mask over all its
tokens, and that is what "padding-free" measures, without changing which rows make up a step. It
counts only if the rows of a forward are blind to each other, which is tested in place. Left out:
torch.compile, which takes longer here than all of the steps."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from statistics import median

from benchmarks.data.rows import group_by_length
from benchmarks.vs_trl.job import Job, Outcome, run_job, write_documents
from benchmarks.vs_trl.prepare import Bench, note

from tunesmith.core.types import Document, Json, ModelSpec
from tunesmith.data.packing import compute_saved_share
from tunesmith.plan.rules import MIN_SAVED_SHARE

OURS, THEIRS = "benchmarks.vs_trl.tunesmith_side", "benchmarks.vs_trl.trl_side"
PACK_LENGTH = 4096  # what a plan chooses on a CPU
FINALISTS = 2
PADDED, GROUPED, PADDING_FREE = "padded", "grouped by length", "padding-free"


@dataclass(frozen=True)
class Setting:
    """One way to run TRL. `autocast` is its bf16 flag, `fp32_adapter` PEFT's
    autocast_adapter_dtype: both on is what users get. The base weights are bf16 in all of them."""

    batch: int
    layout: str = PADDED
    autocast: bool = True
    fp32_adapter: bool = True

    @property
    def name(self) -> str:
        products = "autocast" if self.autocast else "no autocast"
        return f"batch {self.batch}, {self.layout}, {products}, {'fp32' if self.fp32_adapter else 'bf16'} adapter"

    def options(self, *, losses: bool = False) -> Json:
        return {
            "padding_free": self.layout == PADDING_FREE,
            "autocast": self.autocast,
            "fp32_adapter": self.fp32_adapter,
            "losses": losses,
        }


# The number formats are tried padded at batch 4; the fastest of them goes on to the other layouts.
FORMATS = [
    Setting(4, PADDED, autocast, fp32_adapter)
    for autocast in (True, False)
    for fp32_adapter in (True, False)
]
LAYOUTS = [(1, PADDED), (2, PADDED), (8, PADDED), (4, GROUPED), (8, GROUPED)]
LAYOUTS += [(2, PADDING_FREE), (4, PADDING_FREE), (8, PADDING_FREE)]


def speed(bench: Bench) -> Json:
    formats = FORMATS[-1:] if bench.quick else FORMATS
    tried = [their_run(bench, setting) for setting in formats]
    fastest = formats[tried.index(max(tried, key=tokens_per_second))]
    layouts = LAYOUTS[-1:] if bench.quick else LAYOUTS
    others = [replace(fastest, batch=batch, layout=layout) for batch, layout in layouts]
    tried += [their_run(bench, setting) for setting in others]
    by_speed = sorted(
        zip(tried, [*formats, *others], strict=True), key=lambda pair: -tokens_per_second(pair[0])
    )
    finalists = [setting for run, setting in by_speed if run["isolated"]][:FINALISTS]
    ours, theirs = rounds(bench, finalists)
    return {
        "tunesmith": middle(ours)
        | {"peak_bytes": max(run["peak_bytes"] for run in ours), "runs": ours},
        "trl": {
            "best": max((middle(runs) | {"runs": runs} for runs in theirs), key=tokens_per_second),
            "padded": min(tried[: len(formats)], key=lambda run: run["peak_bytes"]),
            "settings": tried,
        },
    }


def rounds(bench: Bench, finalists: list[Setting]) -> tuple[list[Json], list[list[Json]]]:
    """tunesmith and the fastest settings of TRL in turn, a few times over."""
    bench = replace(bench, size=replace(bench.size, seconds=bench.size.round_seconds))
    ours: list[Json] = []
    theirs: list[list[Json]] = [[] for _ in finalists]
    for _ in range(bench.size.rounds):
        ours.append(our_run(bench))
        for setting, runs in zip(finalists, theirs, strict=True):
            runs.append(their_run(bench, setting))
    return ours, theirs


def middle(runs: list[Json]) -> Json:
    speeds = ("tokens_per_second", "work_per_second")
    return {"name": runs[0]["name"]} | {key: median(run[key] for run in runs) for key in speeds}


def tokens_per_second(run: Json) -> float:
    return run["tokens_per_second"]


def our_options(documents: Sequence[Document], batch: int) -> Json:
    """What a plan chooses for these rows."""
    saved = compute_saved_share([(document,) for document in documents], batch, PACK_LENGTH)
    return {"pack_length": PACK_LENGTH, "blocked": True, "share_prefixes": saved >= MIN_SAVED_SHARE}


def our_run(bench: Bench) -> Json:
    options = our_options(bench.documents, bench.job.batch)
    return timed(OURS, replace(bench.job, options=options), "tunesmith", bench.spec)


def their_run(bench: Bench, setting: Setting) -> Json:
    documents = bench.documents_file
    if setting.layout == GROUPED:
        documents = bench.folder / f"grouped-{setting.batch}.jsonl"
        write_documents(documents, group_by_length(bench.documents, setting.batch))
    steps = bench.size.rows // setting.batch
    job = replace(
        bench.job,
        documents=str(documents),
        batch=setting.batch,
        steps=steps,
        options=setting.options(),
    )
    return timed(THEIRS, job, setting.name, bench.spec)


def timed(side: str, job: Job, name: str, spec: ModelSpec) -> Json:
    outcome = run_job(side, job)
    leak = "" if outcome.isolated else ", but rows see each other: it does not count"
    note(
        f"{name}: {outcome.tokens_per_second:.0f} useful tokens/s, {outcome.peak_bytes / 1e9:.2f} GB{leak}"
    )
    return as_result(outcome, name, spec)


def as_result(outcome: Outcome, name: str, spec: ModelSpec) -> Json:
    return {
        "name": name,
        "tokens_per_second": outcome.tokens_per_second,
        "work_per_second": outcome.work(spec.block_parameters, spec.head_parameters),
        **asdict(outcome),
    }


def losses(bench: Bench) -> Json:
    """The loss of every one of some equal steps; TRL with the number formats that users get."""
    setting, steps = Setting(batch=2), bench.size.loss_steps
    job = replace(bench.job, batch=setting.batch, steps=steps, seconds=1e9)
    sides = {
        "tunesmith": (OURS, our_options(bench.documents, setting.batch)),
        "trl": (THEIRS, setting.options(losses=True)),
    }
    found: Json = {}
    for name, (side, options) in sides.items():
        note(f"{name}: {steps} equal steps")
        found[name] = [step.loss for step in run_job(side, replace(job, options=options)).steps]
    return found
