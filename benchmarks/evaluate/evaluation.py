"""Measure the time of the evaluations before and after training on the demo, by part.

    python -m benchmarks.evaluate.evaluation [--items 32] [--general 10000] [--all]

Uses the demo's items and general text up to these sizes (`--all`: all of them). The adapter has
small random weights, so answers are as long as the base model's; a trained one stops earlier.
Before: answers, their loss, general text. After: the same with the base as reference, and the scale
curve. No cache is used.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import time
from tempfile import TemporaryDirectory
from typing import Any

import torch

from tunesmith import api
from tunesmith.evaluate.adapter_scaling import measure_scale_curve
from tunesmith.evaluate.general_text import sample_texts
from tunesmith.evaluate.items import EvalItems, build_eval_items
from tunesmith.evaluate.measure import measure_items
from tunesmith.model.adapters import get_trainable_parameters
from tunesmith.session import inputs, planner
from tunesmith.session.session import Session, open_session
from tunesmith.train.base_reference import ADAPTER_DISABLED


def limit_items(items: EvalItems, session: Session, count: int, tokens: int) -> EvalItems:
    rows = {question.id for question in items.prompts[:count]}
    return dataclasses.replace(
        items,
        prompts=items.prompts[:count],
        test_documents=tuple(document for document in items.test_documents if document.id in rows),
        general_texts=sample_texts(items.general_texts, session.renderer.encode_text, tokens),
    )


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--items", type=int, default=32)
    parser.add_argument("--general", type=int, default=10_000)
    parser.add_argument("--all", action="store_true")
    options = parser.parse_args()
    with TemporaryDirectory() as folder:
        run_inputs = api.load_demo_inputs(f"{folder}/run")
        assert isinstance(run_inputs, inputs.RunInputs)
        plan = planner.make_plan(run_inputs)
        session = open_session(plan, run_inputs)
    items = build_eval_items(plan, run_inputs)
    items = items if options.all else limit_items(items, session, options.items, options.general)
    general = sum(len(session.renderer.encode_text(text.text)) for text in items.general_texts)
    print(json.dumps({"items": len(items.prompts), "general_tokens": general}), flush=True)
    generator, total = torch.Generator().manual_seed(0), 0.0
    for parameter in get_trainable_parameters(session.model.network).values():
        parameter.data += 0.002 * torch.randn(parameter.shape, generator=generator)
    done: dict[str, Any] = {}
    works = {
        "before": lambda: measure_items(session, items, step=0),
        "after": lambda: measure_items(session, items, step=1, base_references=ADAPTER_DISABLED),
        "scales": lambda: measure_scale_curve(
            session, items, step=1, before=done["before"], after=done["after"]
        ),
    }
    for name, work in works.items():
        started = time.perf_counter()
        done[name] = work()
        seconds = time.perf_counter() - started
        total += seconds
        print(json.dumps({"part": name, "seconds": round(seconds, 1)}), flush=True)
    print(json.dumps({"seconds": round(total, 1), "of 90": round(total / 90, 2)}))


if __name__ == "__main__":
    main()
