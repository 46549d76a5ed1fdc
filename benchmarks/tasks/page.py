"""Write docs/results/tasks.md from the results of the tasks.

The page has the tasks, what each step of the advice did, and the guard at other rates and on runs
that should collapse. Left out: the runs (run.py).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from benchmarks.tasks.make import TASKS

Result = dict[str, Any]
UNGRADED = ("loss", "bits_per_byte", "json_valid", "schema_valid", "empty")  # never deciding alone
INTRO = """# Foreign tasks: does following the advice help?

Ten tasks that no rule was tuned for, built from packages of Debian (`python -m
benchmarks.tasks.build`; [code](../../benchmarks/tasks/make.py)), each with what a first user
writes: model, data, test data. On each: the default run, then step 1 of what its report says to do
next, then step 1 of that (`python -m benchmarks.tasks.run`). Further tasks are held back, and
decide whether a change of a rule helps. SmolLM2-135M-Instruct, two CPU cores; rows are divided by
group. Other work ran beside: minutes are no measure of speed.

"""
ARM_HEAD = "| task | run | metric | before | after | forecast | change | verdict | min |"
CHANGE = "{difference:+.3f} [{low:.3f}, {high:.3f}], {verdict}"
GUARD_HEAD = "| task | run | exit | rollbacks | first cause | min |"


def write_page(path: Path, tasks: str, results: list[Result]) -> None:
    parts = [INTRO, "## Tasks\n\n", tasks]
    parts += ["\n## Runs\n\n", *_count(results), write_table(ARM_HEAD, iter_arm_cells(results))]
    steps = [step for result in results for step in iter_steps(result)]
    parts += ["\n## Steps\n\n", *(steps or ["No step has run yet.\n"])]
    guard = list(iter_guard_cells(results))
    if guard:
        parts += ["\n## Guard\n\n", write_table(GUARD_HEAD, iter(guard))]
    path.write_text("".join(parts), encoding="utf-8")


def write_table(head: str, rows: Iterator[tuple[str, ...]]) -> str:
    lines = [head, "|---" * (head.count("|") - 1) + "|"]
    lines += [f"| {' | '.join(cells)} |" for cells in rows]
    return "\n".join(lines) + "\n"


# ---------------------------------------------------------------- runs


def select_graded(measures: Sequence[Result]) -> list[Result]:
    """Return those of the test rows that grade answers, else those of likelihood."""
    tested = [each for each in measures if each["metric"].startswith("test ")]
    graded = [each for each in tested if each["metric"].split()[1] not in UNGRADED]
    return graded or tested


def iter_arm_cells(results: list[Result]) -> Iterator[tuple[str, ...]]:
    for result in results:
        for arm in result["arms"]:
            score = next(iter(select_graded(arm.get("scores", ()))), None)
            change = next(iter(select_graded(arm.get("against", ()))), None)
            verdict = arm.get("verdict", "")
            yield (
                result["task"],
                arm["arm"],
                score["metric"].partition(" ")[2] if score else "",
                f"{score['before']:.3f}" if score else "",
                f"{score['after']:.3f}" if score else "",
                f"{arm['low']:+.3f} to {arm['high']:+.3f}" if arm.get("low") is not None else "",
                CHANGE.format(**change) if change else "",
                f"{verdict} (exit {arm['exit']})" if arm["exit"] else verdict,
                f"{arm['minutes']:.0f}",
            )


def iter_steps(result: Result) -> Iterator[str]:
    for arm in result["arms"][1:]:
        yield f"- {result['task']}, {arm['arm']}: {arm['reason']}\n  `{arm['command']}`\n"
        if "measured" in arm:
            steps, seconds = arm["measured"]["steps"], arm["measured"]["seconds"]
            yield f"  forecast: {steps[0]} steps, {seconds[0] or 0:.0f} s; "
            yield f"it took {steps[1]}, {seconds[1]:.0f} s\n"


def _count(results: list[Result]) -> Iterator[str]:
    steps = [arm["measured"] for result in results for arm in result["arms"] if "measured" in arm]
    held = [each["held"] for each in steps if each["held"] is not None]
    yield f"{len(results)} of {len(TASKS)} tasks have run, with {len(steps)} steps that train"
    if steps:
        worse = sum(bool(each["worse"]) for each in steps)
        yield f": {worse} made a graded metric significantly worse by its items; "
        yield f"{sum(held)} of {len(held)} forecasts held the change"
    dates = {arm["date"] for result in results for arm in result["arms"]}
    yield f". Run on {', '.join(sorted(dates))}; the [log](../log.md) says what followed.\n\n"


# ---------------------------------------------------------------- guard


def iter_guard_cells(results: list[Result]) -> Iterator[tuple[str, ...]]:
    for result in results:
        for arm in result["guard"]:
            causes = arm["rollbacks"] or arm["alarms"] or [""]
            cells = (str(arm["exit"]), str(len(arm["rollbacks"])), causes[0][:90])
            yield result["task"], arm["arm"], *cells, f"{arm['minutes']:.0f}"
