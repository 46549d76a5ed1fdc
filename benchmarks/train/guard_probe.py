"""Measure the cost of a guard probe in training steps.

    python -m benchmarks.train.guard_probe [RECIPE] [--prompts 8 16 32] [--rounds 3]

Steps and probes run in turn in this process (default: the demo's recipe); the medians are printed.
The plan's own estimate is in plan/guard.py.
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
from tunesmith.session import inputs, planner
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
    args = parser.parse_args()
    with TemporaryDirectory() as folder:
        run_inputs = api.load_inputs(
            args.recipe, output_dir=f"{folder}/run", guard={"probe_steps": 1}
        )
        assert isinstance(run_inputs, inputs.RunInputs)
        plan = planner.make_plan(run_inputs)
        session = open_session(plan, run_inputs)
    texts, training = (
        load_general_texts(run_inputs),
        TrainingLoop(session.model, session.load_documents, plan.config, steps=plan.steps),
    )
    print(
        "| prompts | probe, s | step, s | tokens per step | steps per probe |\n"
        "|---|---|---|---|---|"
    )
    for count in args.prompts:
        config = dataclasses.replace(plan.config, probe_prompts=count)
        chosen = build_prompt_set(dataclasses.replace(plan, config=config), run_inputs, texts)
        assert chosen is not None
        probes, taken, steps = GenerationProbe(session, chosen), list[float](), list[TrainStep]()
        for _ in range(args.rounds):
            session.model.network.eval()
            taken.append(
                seconds(lambda p=probes: list(p.run_probe(training.step, training.optimizer)))
            )
            while len(steps) < 3 * (len(taken)):
                event = next(training)
                if isinstance(event, TrainStep):
                    steps.append(event)
        step, probe = median(train_step.seconds for train_step in steps), median(taken)
        tokens = median(train_step.tokens for train_step in steps)
        print(
            f"| {len(chosen.prompts)} | {probe:.2f} | {step:.2f} | {tokens:.0f} "
            f"| {probe / step:.2f} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
