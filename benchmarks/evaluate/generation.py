"""Tokens a second of generation for an evaluation: ours beside `transformers` `generate` with
padding.

    python -m benchmarks.evaluate.generation [--prompts 64] [--new 96] [--batch 8 16 32 64] [--rounds 2] [--adapter]

Both answer the first prompts of the demo's test rows greedily, in bf16, with the same end tokens,
in one process, in turn. Ours is the model as a run measures it before training: its adapter there
and off; with `--adapter` on, and the other side has PEFT's, of the same shape. `transformers` gets
the prompts sorted by length and padded on the left, at each of the batch sizes; its best one
counts. A token is one of an answer, its end token included; what comes after an end is none. Prints
the ratio, and how many answers are the same: bf16 sums in another order decide otherwise where two
tokens are nearly as likely. New adapters add nothing, so that both sides answer as the base does.
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
from tunesmith.session import inputs
from tunesmith.session.session import load_starting_model

Answers = list[tuple[int, ...]]


def ours(
    model: PackedCausalLM, prompts: Sequence[tuple[int, ...]], new: int, ends: Sequence[int], decode
) -> Answers:
    found = dict(
        generate(
            model,
            [GenerationRequest(prompt, new) for prompt in prompts],
            decode=decode,
            end_ids=ends,
        )
    )
    return [found[place].tokens for place in range(len(prompts))]


@torch.no_grad()
def theirs(
    network, prompts: Sequence[tuple[int, ...]], new: int, ends: Sequence[int], batch: int
) -> Answers:
    answers: dict[int, tuple[int, ...]] = {}
    places = sorted(range(len(prompts)), key=lambda place: len(prompts[place]))
    for start in range(0, len(places), batch):
        group = places[start : start + batch]
        width = max(len(prompts[place]) for place in group)
        ids = torch.full((len(group), width), ends[0])
        mask = torch.zeros(len(group), width, dtype=torch.int64)
        for row, place in enumerate(group):
            ids[row, width - len(prompts[place]) :] = torch.tensor(prompts[place])
            mask[row, width - len(prompts[place]) :] = 1
        out = network.generate(
            input_ids=ids,
            attention_mask=mask,
            max_new_tokens=new,
            do_sample=False,
            num_beams=1,
            eos_token_id=list(ends),
            pad_token_id=ends[0],
        )
        for row, place in enumerate(group):
            answers[place] = until_end(out[row, width:].tolist(), ends)
    return [answers[place] for place in range(len(prompts))]


def until_end(tokens: Sequence[int], ends: Sequence[int]) -> tuple[int, ...]:
    stop = next((place + 1 for place, token in enumerate(tokens) if token in ends), len(tokens))
    return tuple(tokens[:stop])


def timed(name: str, work: Callable[[], Answers]) -> tuple[Answers, float]:
    """The answers, and tokens a second."""
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
    known = api.load_inputs(DEMO_RECIPE, output_dir="runs/unused")
    assert isinstance(known, inputs.RunInputs)
    renderer, plan = known.renderer, inputs.make_plan(known)
    prompts = [one.prompt_ids for one in build_prompts(load_test_prompts(known), renderer)][
        : options.prompts
    ]
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
    model = load_starting_model(plan, known)
    network: Any = AutoModelForCausalLM.from_pretrained(
        known.model.path, dtype=torch.bfloat16, local_files_only=True
    )
    if options.adapter:
        settings = LoraConfig(
            r=plan.config.lora_r, lora_alpha=plan.config.lora_alpha, target_modules="all-linear"
        )
        network = get_peft_model(network, settings).to(torch.bfloat16)
    else:
        scale_adapter(model.network, 0)
    network.eval()
    work = partial(ours, model, new=options.new, ends=renderer.end_ids, decode=renderer.decode)
    rest = partial(theirs, network, new=options.new, ends=renderer.end_ids)
    for either in (work, partial(rest, batch=1)):
        either(prompts[:1])  # what the first product of a process takes counts for neither
    speeds: dict[str, list[float]] = {}
    for _ in range(options.rounds):
        mine, speed = timed("tunesmith", partial(work, prompts))
        speeds.setdefault("tunesmith", []).append(speed)
        for batch in options.batch:
            name = f"transformers, batch {batch}"
            yours, speed = timed(name, partial(rest, prompts, batch=batch))
            speeds.setdefault(name, []).append(speed)
            same = sum(a == b for a, b in zip(mine, yours, strict=True))
            print(json.dumps({"same answers": same, "of": len(prompts)}))
    middle = {name: median(found) for name, found in speeds.items()}
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
