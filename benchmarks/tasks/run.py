"""Follow the advice of tunesmith on the ten tasks, as a first user would, and write the page.

    python -m benchmarks.tasks.run [--only NAME ...] [--minutes M]
    python -m benchmarks.tasks.run --rates 1/3,1,3 | --collapse [--only NAME ...] [--minutes M]

Each task: the default run, step 1 of what its report says to do next, then step 1 of that. In:
folders of `benchmarks.tasks.build`. Out: results/NAME.json, and docs/results/tasks.md after each
run, the default runs of all tasks first; run folders are in build/tasks/NAME/runs/. What has a
result does not run again, and no run starts after M minutes (0: only the page). With --rates, only
the guard is looked at: runs at other learning rates, which it should not stop. With --collapse,
runs that it should: 30 times the rate, answers of other rows, one row again and again.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict
from datetime import date
from fractions import Fraction
from pathlib import Path
from typing import Any

from benchmarks.tasks.build import OUT
from benchmarks.tasks.make import TASKS
from benchmarks.tasks.page import write_page
from benchmarks.tasks.scores import score_step

from tunesmith.core.events import CheckResult
from tunesmith.core.json_io import parse_as, read_json
from tunesmith.core.run_dir import RECORD_FILE, read_events, read_rollbacks
from tunesmith.core.types import Comparison
from tunesmith.evaluate.statistics import judge_comparison

RESULTS = Path(__file__).parent / "results"
PAGE = Path(__file__).parents[2] / "docs" / "results" / "tasks.md"
ARMS = ("default", "step 1", "step 2")
COLLAPSES = ("rate x 30", "shuffled answers", "one row")
Result = dict[str, Any]


def call(folder: Path, *args: str) -> subprocess.CompletedProcess[str]:
    """Run `tunesmith ARGS` in a folder."""
    command = [sys.executable, "-m", "tunesmith", *args]
    env = {**os.environ, "COLUMNS": "100"}
    return subprocess.run(command, cwd=folder, env=env, check=False, capture_output=True, text=True)


def shorten(output: str) -> str:
    """Return the end of an output without the lines of single steps and of passed checks."""
    lines = (line for line in output.splitlines() if not line.startswith(("step ", "ok  ")))
    return "\n".join(lines)[-6000:]


def call_for_json(folder: Path, *args: str) -> Any:
    """Return what a command prints as JSON. Raises RuntimeError with its errors."""
    done = call(folder, *args, "--json")
    if done.returncode:
        raise RuntimeError(f"tunesmith {shlex.join(args)}: {done.stderr[-2000:]}")
    return json.loads(done.stdout)


# ---------------------------------------------------------------- advice


def choose_step(folder: Path, arms: list[Result]) -> Result | None:
    """Return the default, or what the last run's report says now; None if that is no run."""
    if not arms:
        return {"reason": "", "command": "tunesmith train recipe.yaml --output-dir runs/default"}
    run = arms[-1].get("run")
    if run and not (folder / run).exists():
        print(f"{folder / run} is gone: to start anew, delete results/{folder.name}.json")
    if not run or not (folder / run).exists():
        return None
    return next(iter(call_for_json(folder, "report", run)["verdict"]["next_steps"]), None)


def run_arm(folder: Path, step: Result, arms: list[Result]) -> Result:
    program, *args = shlex.split(step["command"])
    if program != "tunesmith":
        raise RuntimeError(f"not a command of tunesmith: {step['command']}")
    run = args[args.index("--output-dir") + 1] if "--output-dir" in args else ""
    if run:  # of an attempt that was killed
        shutil.rmtree(folder / run, ignore_errors=True)
    start = time.monotonic()
    done = call(folder, *args)
    result = {
        "arm": ARMS[len(arms)],
        **step,
        "exit": done.returncode,
        "minutes": round((time.monotonic() - start) / 60, 1),
        "date": date.today().isoformat(),
        "output": shorten(done.stdout),
        "errors": shorten(done.stderr),
    }
    if run:
        result |= read_run(folder, run)
        last = next((each["run"] for each in reversed(arms) if each.get("scores")), "")
        if last and result["scores"]:
            result["against"] = compare(folder, last, run)
            result["measured"] = asdict(score_step(folder / last, folder / run))
    return result


def read_run(folder: Path, run: str) -> Result:
    """Return what a run folder holds: its scores, its verdict, its next steps, its guard."""
    record = folder / run / RECORD_FILE
    comparisons = read_json(record)["comparisons"] if record.exists() else []
    report = call_for_json(folder, "report", run)["verdict"]
    return {
        "run": run,
        "scores": [
            {
                "metric": f"{each['task']} {each['metric']}",
                "before": each["before"]["value"],
                "after": each["after"]["value"],
                "n": each["after"]["n"],
                "verdict": judge_comparison(parse_as(Comparison, each)),
            }
            for each in comparisons
        ],
        "verdict": report["name"],
        "level": report["level"],
        "reasons": report["reasons"],
        "next": report["next_steps"],
        "guard": read_guard(folder / run),
    }


def compare(folder: Path, first: str, second: str) -> list[Result]:
    """Return what `tunesmith compare` says of the second run against the first."""
    comparisons = call_for_json(folder, "compare", first, second)["comparisons"]
    return [
        {
            "metric": f"{each['task']} {each['metric']}",
            **{key: each[key] for key in ("difference", "low", "high")},
            "verdict": judge_comparison(parse_as(Comparison, each)),
        }
        for each in comparisons
    ]


# ---------------------------------------------------------------- guard


def read_guard(run: Path) -> Result:
    """Return the rollbacks of a run and the verdicts of its guard other than ok."""
    events = read_events(run) if run.exists() else []
    rollbacks = read_rollbacks(run) if run.exists() else ()
    return {
        "rollbacks": [f"{e.step} -> {e.to}: {e.evidence}, {e.change}" for e in rollbacks],
        "alarms": [
            f"{e.step}: {e.level} {e.kind}: {e.evidence}"
            for e in events
            if isinstance(e, CheckResult) and e.step and e.level != "ok"
        ],
    }


def run_guard(folder: Path, arm: str) -> Result:
    """Train without test rows, with a changed rate or spoiled rows, and see what the guard does."""
    settings = call_for_json(folder, "plan", "recipe.yaml")["settings"]
    kind, _, factor = arm.partition(" x ")
    recipe = (folder / "recipe.yaml").read_text("utf-8").replace("test_data: test.jsonl\n", "")
    if arm in COLLAPSES[1:]:
        spoil(folder, arm)
        recipe = recipe.replace("data: train.jsonl", "data: spoiled.jsonl", 1)
    (folder / "guard.yaml").write_text(recipe, encoding="utf-8")
    run = "runs/" + arm.replace(" ", "-").replace("/", "-")
    shutil.rmtree(folder / run, ignore_errors=True)
    flags: list[str] = []
    if kind == "rate":
        rate = settings["learning_rate"]["value"] * float(Fraction(factor))
        flags = ["--learning-rate", f"{rate:.3g}"]
    start = time.monotonic()
    done = call(folder, "train", "guard.yaml", "--output-dir", run, *flags)
    minutes = round((time.monotonic() - start) / 60, 1)
    result = {"arm": arm, "exit": done.returncode, "minutes": minutes}
    return {**result, "errors": shorten(done.stderr), **read_guard(folder / run)}


def spoil(folder: Path, arm: str) -> None:
    """Write spoiled.jsonl: answers of other rows, or the first row as often as there are rows."""
    rows = [json.loads(line) for line in (folder / "train.jsonl").read_text("utf-8").splitlines()]
    if arm == "one row":
        rows = [{**rows[0], "id": row["id"]} for row in rows]
    else:
        others = random.Random(0).sample(rows, len(rows))
        rows = [_take_answer(row, other) for row, other in zip(rows, others, strict=True)]
    lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
    (folder / "spoiled.jsonl").write_text("".join(lines), encoding="utf-8")


def _take_answer(row: Result, other: Result) -> Result:
    if "messages" in row:
        return {**row, "messages": [*row["messages"][:-1], other["messages"][-1]]}
    key = "completion" if "completion" in row else "output"
    return {**row, key: other[key]}


# ---------------------------------------------------------------- all


def list_guard_arms(name: str, args: argparse.Namespace) -> Iterator[str]:
    for factor in filter(None, args.rates.split(",")):
        yield f"rate x {factor}"
    if args.collapse:
        # plain text and pairs have no answers to exchange
        yield from COLLAPSES[:: 2 if TASKS[name].recipe else 1]


def run_guard_arms(name: str, args: argparse.Namespace, end: float) -> None:
    result = read_result(name)
    for arm in list_guard_arms(name, args):
        is_done = any(each["arm"] == arm for each in result["guard"])
        if not is_done and time.monotonic() < end:
            result["guard"].append(run_guard(OUT / name, arm))
            store(result)


def run_next_arm(name: str, index: int, end: float) -> None:
    """Run an arm if the one before has a result and this one has none."""
    result = read_result(name)
    if len(result["arms"]) == index and time.monotonic() < end:
        step = choose_step(OUT / name, result["arms"])
        if step is not None:
            result["arms"].append(run_arm(OUT / name, step, result["arms"]))
            store(result)


def read_result(name: str) -> Result:
    file = RESULTS / f"{name}.json"
    return read_json(file) if file.exists() else {"task": name, "arms": [], "guard": []}


def store(result: Result) -> None:
    RESULTS.mkdir(exist_ok=True)
    file = RESULTS / f"{result['task']}.json"
    file.write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    write()
    last = (result["arms"] + result["guard"])[-1]
    print(
        f"{result['task']}, {last['arm']}: exit {last['exit']}, {last['minutes']} min", flush=True
    )


def write() -> None:
    results = map(read_result, TASKS)
    has_run = [result for result in results if result["arms"] or result["guard"]]
    write_page(PAGE, (OUT / "table.md").read_text("utf-8"), has_run)


def main() -> None:
    parser = argparse.ArgumentParser(description="Follow the advice of tunesmith on ten tasks.")
    parser.add_argument("--only", nargs="+", choices=list(TASKS), default=list(TASKS))
    parser.add_argument("--minutes", type=float, default=float("inf"))
    parser.add_argument("--rates", default="")
    parser.add_argument("--collapse", action="store_true")
    args = parser.parse_args()
    end = time.monotonic() + 60 * args.minutes
    if args.rates or args.collapse:
        for name in args.only:
            run_guard_arms(name, args, end)
    else:
        for index in range(len(ARMS)):
            for name in args.only:
                run_next_arm(name, index, end)
    write()


if __name__ == "__main__":
    main()
