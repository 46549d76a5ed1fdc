"""The time that `plan --benchmark` predicts beside the time that a run takes, and the memory beside
the peak.

    python -m benchmarks.train.time_estimate [demo full long texts ...]

Each recipe is planned and trained in a process of its own: the demo as it is, all of the weights
and more rows a step of the same data, documents that share nothing with a large rank, and continued
pretraining on the general texts. Prints predicted and taken: of the steps, of the whole run from
the call to its record, and the peak of memory."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import tunesmith
from tunesmith.core.events import TrainStep
from tunesmith.core.types import Plan
from tunesmith.recipe.demo import DEMO_RECIPE

DEMO = Path(tunesmith.__file__).parent / "recipe" / "demo"
TEXTS = {"model": "smollm2-135m-instruct", "stage": "cpt", "data": str(DEMO / "general.jsonl")}
ROWS = {
    "data": "train.jsonl",
    "eval_data": "eval.jsonl",
    "test_data": "test.jsonl",
    "response_schema": "schema.json",
}
CHAT = {"model": "smollm2-135m-instruct"} | {key: str(DEMO / name) for key, name in ROWS.items()}
RECIPES: dict[str, tuple[Any, dict[str, Any]]] = {
    "demo": (DEMO_RECIPE, {}),
    "full": (CHAT, {"method": "full", "batch_size": 8, "max_steps": 24}),
    "long": (CHAT, {"batch_size": 16, "share_prefixes": False, "max_steps": 12, "lora_r": 64}),
    "texts": (TEXTS, {"method": "lora", "max_steps": 12, "batch_tokens": 4096}),
}


def one(name: str) -> None:
    wish, changes = RECIPES[name]
    with TemporaryDirectory() as folder:
        plan = tunesmith.plan(wish, benchmark=True, output_dir=f"{folder}/run", **changes)
        assert isinstance(plan, Plan)
        began = time.perf_counter()
        steps = [event for event in tunesmith.train(plan) if isinstance(event, TrainStep)]
        whole = time.perf_counter() - began
    seconds, peak = sum(step.seconds for step in steps), max(step.peak_bytes for step in steps)
    print(f"{name}: {len(steps)} steps; {plan.seconds_source}")
    for what, predicted, taken in (
        ("steps, s", plan.seconds[0], seconds),
        ("whole run, s", plan.total_seconds, whole),
        ("peak, GB", plan.memory_bytes["peak"] / 1e9, peak / 1e9),
    ):
        line = {"of": what, "predicted": round(predicted, 2), "taken": round(taken, 2)}
        print(json.dumps(line | {"ratio": round(predicted / taken, 2)}), flush=True)


def main() -> None:
    for name in sys.argv[1:] or RECIPES:
        subprocess.run(
            [
                sys.executable,
                "-c",
                f"from benchmarks.train.time_estimate import one; one({name!r})",
            ],
            check=True,
        )


if __name__ == "__main__":
    main()
