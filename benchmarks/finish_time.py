"""The time that `plan --calibrate` predicts beside the time that training takes, and the memory beside the peak.

    python -m benchmarks.finish_time [demo full ...]

Each recipe is planned and trained in a process of its own, on the demo's rows, without held-out rows: what is timed is
the training. Prints the ratio of both.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import tunesmith
from tunesmith.types import StepResult

DEMO = Path(tunesmith.__file__).parent / "demo"
SHARED: dict[str, Any] = {"model": "smollm2-135m-instruct", "data": str(DEMO / "train.jsonl")}
RECIPES: dict[str, dict[str, Any]] = {
    "demo": {"method": "lora", "batch_size": 4, "max_steps": 40},
    "full": {"method": "full", "batch_size": 8, "max_steps": 12},
    "long": {"method": "lora", "batch_size": 16, "share_prefixes": False, "max_steps": 10, "lora_r": 64},
}


def one(name: str) -> None:
    with TemporaryDirectory() as folder:
        wish = SHARED | RECIPES[name] | {"output_dir": f"{folder}/run"}
        plan = tunesmith.plan(wish, calibrate=True)
        steps = [event for event in tunesmith.train(plan) if isinstance(event, StepResult)]
    seconds, peak = sum(step.seconds for step in steps), max(step.peak_bytes for step in steps)
    predicted = plan.memory_bytes["peak"]
    print(f"{name}: {plan.seconds_from}")
    print(json.dumps({"predicted_s": plan.seconds[0], "took_s": seconds, "ratio": plan.seconds[0] / seconds}))
    print(json.dumps({"predicted_GB": predicted / 1e9, "peak_GB": peak / 1e9, "ratio": predicted / peak}))


def main() -> None:
    for name in sys.argv[1:] or RECIPES:
        subprocess.run([sys.executable, "-c", f"from benchmarks.finish_time import one; one({name!r})"], check=True)


if __name__ == "__main__":
    main()
