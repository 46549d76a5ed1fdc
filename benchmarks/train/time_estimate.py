"""Compare the predictions of `plan --benchmark` with the time and memory of a run.

    python -m benchmarks.train.time_estimate [demo full long texts ...]

Each recipe is planned and trained in its own process: the demo, full fine-tuning with larger
batches of the same data, a large rank without prefix sharing, and continued pretraining on the
general texts. Prints predicted and measured seconds of the steps and of the run from call to
record, and the memory peak.
"""

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


def measure_recipe(name: str) -> None:
    recipe, changes = RECIPES[name]
    with TemporaryDirectory() as folder:
        plan = tunesmith.plan(recipe, benchmark=True, output_dir=f"{folder}/run", **changes)
        assert isinstance(plan, Plan)
        began = time.perf_counter()
        steps = [event for event in tunesmith.train(plan) if isinstance(event, TrainStep)]
        total_seconds = time.perf_counter() - began
    seconds, peak = sum(step.seconds for step in steps), max(step.peak_bytes for step in steps)
    print(f"{name}: {len(steps)} steps; {plan.seconds_source}")
    for what, predicted, taken in (
        ("steps, s", plan.seconds[0], seconds),
        ("run, s", plan.total_seconds, total_seconds),
        ("peak, GB", plan.memory_bytes["peak"] / 1e9, peak / 1e9),
    ):
        line = {"quantity": what, "predicted": round(predicted, 2), "measured": round(taken, 2)}
        print(json.dumps(line | {"ratio": round(predicted / taken, 2)}), flush=True)


def main() -> None:
    for name in sys.argv[1:] or RECIPES:
        import_line = "from benchmarks.train.time_estimate import measure_recipe"
        code = f"{import_line}; measure_recipe({name!r})"
        subprocess.run([sys.executable, "-c", code], check=True)


if __name__ == "__main__":
    main()
