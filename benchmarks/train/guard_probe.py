"""What a probe of the guard costs, in steps of the run it watches, beside what the plan thinks.

    python -m benchmarks.train.guard_probe [RECIPE] [--prompts 8 16 32] [--rounds 3]

Steps and probes of one process in turn (RECIPE: the demo's own, if none is given). The median of
each counts. The plan counts in tokens of a forward (plan/guard.py): its estimate is printed beside.
"""

from __future__ import annotations

import argparse
import dataclasses
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

from tunesmith import api
from tunesmith.core.events import TrainStep
from tunesmith.evaluate.items import load_general_texts
from tunesmith.recipe.demo import DEMO_RECIPE
from tunesmith.session import inputs
from tunesmith.session.session import open_session
from tunesmith.train.guard.probes import GenerationProbe, build_prompt_set
from tunesmith.train.loop import TrainingLoop


def seconds(work: Callable[[], Any]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("recipe", type=Path, nargs="?", default=DEMO_RECIPE)
    parser.add_argument("--prompts", type=int, nargs="+", default=[8, 16, 32])
    parser.add_argument("--rounds", type=int, default=3)
    given = parser.parse_args()
    with TemporaryDirectory() as folder:
        known = api.load_inputs(given.recipe, output_dir=f"{folder}/run", guard={"probe_steps": 1})
        assert isinstance(known, inputs.RunInputs)
        plan = inputs.make_plan(known)
        bench = open_session(plan, known)
    texts, training = (
        load_general_texts(known),
        TrainingLoop(bench.model, bench.load_documents, plan.config, steps=plan.steps),
    )
    print(
        "| prompts | probe, s | step, s | tokens of a step | steps a probe |\n|---|---|---|---|---|"
    )
    for count in given.prompts:
        config = dataclasses.replace(plan.config, probe_prompts=count)
        chosen = build_prompt_set(dataclasses.replace(plan, config=config), known, texts)
        assert chosen is not None
        probes, taken, steps = GenerationProbe(bench, chosen), list[float](), list[TrainStep]()
        for _ in range(given.rounds):
            bench.model.network.eval()
            taken.append(
                seconds(lambda p=probes: list(p.run_probe(training.step, training.optimizer)))
            )
            while len(steps) < 3 * (len(taken)):
                event = next(training)
                if isinstance(event, TrainStep):
                    steps.append(event)
        step, probe = median(one.seconds for one in steps), median(taken)
        tokens = median(one.tokens for one in steps)
        print(
            f"| {len(chosen.prompts)} | {probe:.2f} | {step:.2f} | {tokens:.0f} | {probe / step:.2f} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
