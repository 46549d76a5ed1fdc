"""Compare the generation speed of evaluation with `transformers` `generate` with padding.

    python -m benchmarks.evaluate.generation [--prompts 64] [--new 96] [--batch 8 16 32 64]
        [--rounds 2] [--adapter]

Both answer the first prompts of the demo's test rows greedily in bf16 with the same end tokens, in
turn. Our adapter is present and disabled, as in the evaluation before training; with `--adapter`
it is enabled, and `transformers` has a PEFT adapter of the same shape. New adapters are zero, so
both sides answer like the base model. `transformers` gets the prompts sorted by length and padded
on the left; its best batch size counts. Answer tokens count up to and including the end token.
Prints the ratio and the number of equal answers: bf16 sums in another order decide otherwise where
two tokens are nearly equally likely.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Callable, Sequence
from functools import partial
from statistics import median
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from tunesmith import api
from tunesmith.core.types import GenerationRequest
from tunesmith.evaluate.generate_until import build_prompts
from tunesmith.evaluate.items import load_test_prompts
from tunesmith.model.adapters import scale_adapter
from tunesmith.model.causal_lm import PackedCausalLM
from tunesmith.model.generation.engine import generate
from tunesmith.recipe.demo import DEMO_RECIPE
from tunesmith.session import inputs, planner
from tunesmith.session.session import load_starting_model

Answers = list[tuple[int, ...]]


def generate_tunesmith(
    model: PackedCausalLM, prompts: Sequence[tuple[int, ...]], new: int, ends: Sequence[int], decode
) -> Answers:
    results = dict(
        generate(
            model,
            [GenerationRequest(prompt, new) for prompt in prompts],
            decode=decode,
            end_ids=ends,
        )
    )
    return [results[i].tokens for i in range(len(prompts))]


@torch.no_grad()
def generate_transformers(
    network, prompts: Sequence[tuple[int, ...]], new: int, ends: Sequence[int], batch: int
) -> Answers:
    answers: dict[int, tuple[int, ...]] = {}
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    for start in range(0, len(order), batch):
        group = order[start : start + batch]
        width = max(len(prompts[i]) for i in group)
        ids = torch.full((len(group), width), ends[0])
        mask = torch.zeros(len(group), width, dtype=torch.int64)
        for row, i in enumerate(group):
            ids[row, width - len(prompts[i]) :] = torch.tensor(prompts[i])
            mask[row, width - len(prompts[i]) :] = 1
        out = network.generate(
            input_ids=ids,
            attention_mask=mask,
            max_new_tokens=new,
            do_sample=False,
            num_beams=1,
            eos_token_id=list(ends),
            pad_token_id=ends[0],
        )
        for row, i in enumerate(group):
            answers[i] = cut_at_end(out[row, width:].tolist(), ends)
    return [answers[i] for i in range(len(prompts))]


def cut_at_end(tokens: Sequence[int], ends: Sequence[int]) -> tuple[int, ...]:
    stop = next((i + 1 for i, token in enumerate(tokens) if token in ends), len(tokens))
    return tuple(tokens[:stop])


def time_answers(name: str, work: Callable[[], Answers]) -> tuple[Answers, float]:
    """Return the answers and tokens per second."""
    started = time.perf_counter()
    answers = work()
    seconds, tokens = time.perf_counter() - started, sum(map(len, answers))
    line = {
        "who": name,
        "tokens": tokens,
        "seconds": round(seconds, 2),
        "tok_s": round(tokens / seconds, 1),
    }
    print(json.dumps(line), flush=True)
    return answers, tokens / seconds


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--prompts", type=int, default=64)
    parser.add_argument("--new", type=int, default=96)
    parser.add_argument("--batch", type=int, nargs="+", default=[8, 16, 32, 64])
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--adapter", action="store_true")
    options = parser.parse_args()
    run_inputs = api.load_inputs(DEMO_RECIPE, output_dir="runs/unused")
    assert isinstance(run_inputs, inputs.RunInputs)
    renderer, plan = run_inputs.renderer, planner.make_plan(run_inputs)
    prompts = [
        prompt.prompt_ids for prompt in build_prompts(load_test_prompts(run_inputs), renderer)
    ][: options.prompts]
    lengths = sorted(map(len, prompts))
    print(
        json.dumps(
            {
                "prompts": len(prompts),
                "shortest": lengths[0],
                "longest": lengths[-1],
                "new": options.new,
            }
        )
    )
    model = load_starting_model(plan, run_inputs)
    network: Any = AutoModelForCausalLM.from_pretrained(
        run_inputs.model.path, dtype=torch.bfloat16, local_files_only=True
    )
    if options.adapter:
        rank = int(plan.config.lora_r or 0)
        alpha = int(plan.config.lora_alpha or 0)
        settings = LoraConfig(r=rank, lora_alpha=alpha, target_modules="all-linear")
        network = get_peft_model(network, settings).to(torch.bfloat16)
    else:
        scale_adapter(model.network, 0)
    network.eval()
    work = partial(
        generate_tunesmith, model, new=options.new, ends=renderer.end_ids, decode=renderer.decode
    )
    rest = partial(generate_transformers, network, new=options.new, ends=renderer.end_ids)
    for generate_answers in (work, partial(rest, batch=1)):
        generate_answers(prompts[:1])  # warm-up
    compare_speeds(prompts, work, rest, options.batch, options.rounds)


def compare_speeds(
    prompts: Sequence[tuple[int, ...]],
    work: Callable[..., Any],
    rest: Callable[..., Any],
    batch_sizes: list[int],
    rounds: int,
) -> None:
    """Time tunesmith and transformers in turn, print each run and the ratio of the medians."""
    speeds: dict[str, list[float]] = {}
    for _ in range(rounds):
        mine, speed = time_answers("tunesmith", partial(work, prompts))
        speeds.setdefault("tunesmith", []).append(speed)
        for batch in batch_sizes:
            name = f"transformers, batch {batch}"
            yours, speed = time_answers(name, partial(rest, prompts, batch=batch))
            speeds.setdefault(name, []).append(speed)
            same = sum(a == b for a, b in zip(mine, yours, strict=True))
            print(json.dumps({"same answers": same, "of": len(prompts)}))
    middle = {name: median(values) for name, values in speeds.items()}
    mine = middle.pop("tunesmith")
    print(
        json.dumps(
            {
                "tunesmith": mine,
                "best": max(middle.values()),
                "ratio": round(mine / max(middle.values()), 2),
            }
        )
    )


if __name__ == "__main__":
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    main()
