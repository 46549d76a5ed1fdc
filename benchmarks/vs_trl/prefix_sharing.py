"""Measure prefix sharing against the same run without it, and against TRL.

    chat rows, a system prompt of 100 to 120 tokens   with and without sharing, TRL's fastest
    DPO, two short answers to a long prompt           with and without sharing

The sides run in turn. The ideal speed-up is tokens without sharing over tokens with it. Left out:
TRL settings that are slower on rows of such lengths (speed.py tries all of them).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from datetime import datetime
from functools import partial

from benchmarks.data.rows import make_pairs, select_rows
from benchmarks.vs_trl.job import write_documents
from benchmarks.vs_trl.prepare import OUR_BATCH, Bench
from benchmarks.vs_trl.speed import (
    GROUPED,
    OURS,
    PACK_LENGTH,
    Setting,
    run_timed_job,
    run_trl,
    take_median,
    tokens_per_second,
)

from tunesmith.core.types import Document, Json
from tunesmith.data.chat_template.renderer import Renderer
from tunesmith.data.packing import compute_saved_share

SYSTEM = (
    "You are the documentation assistant of a Python team. You are given the source of one "
    "function or class whose docstring was taken out, and you write it again. Say what it does, "
    "what it takes, what it returns and what it raises, as far as the code shows it; never guess "
    "at what cannot be read there. Use the present tense and plain words, and keep the names of "
    "parameters as they are written. One to three sentences, no examples, no markdown, "
    "no quotes. Answer with the text alone."
)
ROW_TOKENS = range(220, 501)  # about 330 on average
SETTINGS = [Setting(1), Setting(8, GROUPED)]  # TRL's two fastest on rows of these lengths


def prefix(bench: Bench) -> Json:
    renderer = Renderer.from_folder(bench.spec.path, now=datetime(2026, 1, 1))
    rows = bench.size.rows // 4
    _, chats = select_rows(renderer, rows, system=SYSTEM, row_tokens=ROW_TOKENS)
    both = make_pairs(renderer, rows // 2)
    return {"chat": part(bench, "chat", chats, SETTINGS), "pairs": part(bench, "pairs", both, [])}


def part(
    bench: Bench, name: str, documents: Sequence[Document], settings: Sequence[Setting]
) -> Json:
    """Run tunesmith with and without sharing, and TRL, in turn."""
    bench_documents = replace_documents(bench, name, documents)
    sides: dict[str, Callable[[], Json]] = {
        "shared": partial(run_tunesmith, bench_documents, share=True),
        "alone": partial(run_tunesmith, bench_documents, share=False),
    }
    sides |= {setting.name: partial(run_trl, bench_documents, setting) for setting in settings}
    runs: dict[str, list[Json]] = {side: [] for side in sides}
    for _ in range(bench.size.rounds):
        for side, run in sides.items():
            runs[side].append(run())
    theirs = [take_median(runs[setting.name]) for setting in settings]
    return {
        "saved": compute_saved_share(
            [(document,) for document in documents], OUR_BATCH, PACK_LENGTH
        ),
        "rows": bench_documents.describe_rows(),
        "shared": take_median(runs["shared"]),
        "alone": take_median(runs["alone"]),
        "trl": max(theirs, key=tokens_per_second, default=None),
        "runs": runs,
    }


def replace_documents(bench: Bench, name: str, documents: Sequence[Document]) -> Bench:
    """Return the same benchmark with other rows, in a new folder."""
    folder = bench.folder / name
    folder.mkdir()
    (folder / "adapter").symlink_to(bench.folder / "adapter")
    size = replace(bench.size, rows=len(documents), seconds=bench.size.round_seconds / 2)
    other = replace(bench, folder=folder, documents=list(documents), size=size)
    write_documents(other.documents_file, documents)
    return other


def run_tunesmith(bench: Bench, *, share: bool) -> Json:
    options = {"pack_length": PACK_LENGTH, "blocked": True, "share_prefixes": share}
    name = "tunesmith, shared prefixes" if share else "tunesmith, no sharing"
    return run_timed_job(OURS, replace(bench.job, options=options), name, bench.spec)
