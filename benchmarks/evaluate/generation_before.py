"""Compare the generation of this tree with that of an earlier commit.

    python -m benchmarks.evaluate.generation_before 00c9f0b [--prompts 64] [--new 48] [--rounds 3]
        [--distinct]

Both trees answer the first prompts of the demo's test rows greedily in bf16, in processes of their
own that work in turn, with as many threads as OMP_NUM_THREADS says. Every answer has all its
tokens. With `--distinct`, the prompts have no common beginning. Prints tokens per second of the
clock and of the processor, the peak of the memory, the number of equal answers, and the ratio of
the medians of processor time, which other work on the machine changes less than the clock's.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

ROOT = Path(__file__).parents[2]


def answer_jobs() -> None:
    """Load the demo's model from the tree in PYTHONPATH and answer jobs from standard input."""
    from tunesmith import api
    from tunesmith.core.types import GenerationRequest
    from tunesmith.evaluate.generate_until import build_prompts
    from tunesmith.evaluate.items import load_test_prompts
    from tunesmith.model.adapters import scale_adapter
    from tunesmith.model.generation.engine import generate
    from tunesmith.recipe.demo import DEMO_RECIPE
    from tunesmith.session import planner
    from tunesmith.session.session import load_starting_model

    run_inputs = api.load_inputs(DEMO_RECIPE, output_dir="runs/unused")
    model = load_starting_model(planner.make_plan(run_inputs), run_inputs)
    scale_adapter(model.network, 0)
    model.network.eval()
    renderer = run_inputs.renderer
    prompts = [item.prompt_ids for item in build_prompts(load_test_prompts(run_inputs), renderer)]
    for line in sys.stdin:
        job = json.loads(line)
        chosen = prompts[: job["prompts"]]
        if job["distinct"]:
            chosen = [(100 + index, *prompt) for index, prompt in enumerate(chosen)]
        requests = [GenerationRequest(prompt, job["new"]) for prompt in chosen]
        clock = time.perf_counter()
        processor = time.process_time()
        outputs = dict(generate(model, requests, decode=renderer.decode, end_ids=()))
        result = {
            "clock": time.perf_counter() - clock,
            "processor": time.process_time() - processor,
            "peak_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024,
            "answers": [outputs[index].tokens for index in range(len(requests))],
        }
        print(json.dumps(result), flush=True)


def start_side(tree: Path) -> subprocess.Popen[str]:
    environment = os.environ | {"PYTHONPATH": str(tree / "src"), "TOKENIZERS_PARALLELISM": "false"}
    command = [sys.executable, __file__, "--answer-jobs"]
    return subprocess.Popen(
        command,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=environment,
        cwd=tree,
    )


def run_job(side: subprocess.Popen[str], job: dict[str, int | bool]) -> dict:
    assert side.stdin is not None
    assert side.stdout is not None
    side.stdin.write(json.dumps(job) + "\n")
    side.stdin.flush()
    return json.loads(side.stdout.readline())


def compare(revision: str, job: dict[str, int | bool], rounds: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        command = ["git", "archive", revision]
        archive = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, check=True)
        subprocess.run(["tar", "-x", "-C", folder], input=archive.stdout, check=True)
        sides = {"before": start_side(Path(folder)), "now": start_side(ROOT)}
        for side in sides.values():
            run_job(side, job | {"prompts": 2, "new": 2})  # warm-up
        seconds: dict[str, list[float]] = {name: [] for name in sides}
        for round_number in range(rounds):
            results: dict[str, dict] = {}
            for name in sorted(sides, reverse=round_number % 2 == 1):
                results[name] = run_job(sides[name], job)
                seconds[name].append(results[name]["processor"])
            pairs = zip(results["before"]["answers"], results["now"]["answers"], strict=True)
            line: dict[str, object] = {"same answers": sum(a == b for a, b in pairs)}
            for name, result in results.items():
                tokens = sum(map(len, result["answers"]))
                line[name] = {
                    "tok_s": round(tokens / result["clock"], 1),
                    "tok_cpu_s": round(tokens / result["processor"], 1),
                    "peak_mb": result["peak_mb"],
                }
            print(json.dumps(line), flush=True)
        for side in sides.values():
            side.communicate()
    ratio = median(seconds["before"]) / median(seconds["now"])
    result = {"before": revision, "rounds": rounds, "speed now / before": round(ratio, 3)}
    print(json.dumps(result))


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("revision", nargs="?", default="00c9f0b")
    parser.add_argument("--prompts", type=int, default=64)
    parser.add_argument("--new", type=int, default=48)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--distinct", action="store_true")
    parser.add_argument("--answer-jobs", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.answer_jobs:
        answer_jobs()
        return
    job = {"prompts": options.prompts, "new": options.new, "distinct": options.distinct}
    compare(options.revision, job, options.rounds)


if __name__ == "__main__":
    main()
