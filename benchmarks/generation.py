"""Tokens a second of generation for an evaluation: ours beside `transformers` `generate` with padding.

    python -m benchmarks.generation [--model FOLDER] [--prompts 64] [--new 96] [--batch 8 16 32]

Both answer the first prompts of the demo's test rows greedily, in bf16, with the same end tokens, in one process, one
after the other. `transformers` gets the prompts sorted by length and padded on the left, at each of the batch sizes;
its best one counts. A token is one of an answer, its end token included; what comes after an end is none. Prints the
ratio, and how many answers are the same: bf16 sums in another order decide otherwise where two tokens are nearly as
likely.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

from tunesmith import facts, verbs
from tunesmith.demo import RECIPE
from tunesmith.evaluate.tasks import questions_of
from tunesmith.infer.engine import generate
from tunesmith.measure import asking
from tunesmith.model.load import adopt, load_network
from tunesmith.types import Request

Answers = list[tuple[int, ...]]


def ours(
    folder: Path, prompts: Sequence[tuple[int, ...]], new: int, ends: Sequence[int], decode
) -> tuple[Answers, float]:
    model = adopt(load_network(folder, torch.bfloat16), torch.bfloat16, blocked=True)
    requests = [Request(prompt, new) for prompt in prompts]
    warm = [Request(prompts[0], 2)]
    list(generate(model, warm, decode=decode, end_ids=ends))
    started = time.perf_counter()
    found = dict(generate(model, requests, decode=decode, end_ids=ends))
    answers = [found[place].tokens for place in range(len(prompts))]
    return answers, report("tunesmith", answers, time.perf_counter() - started)


@torch.no_grad()
def theirs(network, prompts: Sequence[tuple[int, ...]], new: int, ends: Sequence[int], batch: int) -> Answers:
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


def report(name: str, answers: Answers, seconds: float) -> float:
    tokens = sum(map(len, answers))
    print(
        json.dumps({"who": name, "tokens": tokens, "seconds": round(seconds, 2), "tok_s": round(tokens / seconds, 1)})
    )
    return tokens / seconds


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", default=None)
    parser.add_argument("--prompts", type=int, default=64)
    parser.add_argument("--new", type=int, default=96)
    parser.add_argument("--batch", type=int, nargs="+", default=[8, 16, 32])
    options = parser.parse_args()
    known = verbs.gather(RECIPE, output_dir="runs/unused", **({"model": options.model} if options.model else {}))
    assert isinstance(known, facts.Facts)
    renderer, folder = known.renderer, known.model.path
    prompts = [one.prompt for one in questions_of(asking(known), renderer)][: options.prompts]
    lengths = sorted(map(len, prompts))
    print(json.dumps({"prompts": len(prompts), "shortest": lengths[0], "longest": lengths[-1], "new": options.new}))
    mine, speed = ours(folder, prompts, options.new, renderer.end_ids, renderer.decode)
    network = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, local_files_only=True).eval()
    best = 0.0
    for batch in options.batch:
        started = time.perf_counter()
        yours = theirs(network, prompts, options.new, renderer.end_ids, batch)
        best = max(best, report(f"transformers, batch {batch}", yours, time.perf_counter() - started))
        same = sum(a == b for a, b in zip(mine, yours, strict=True))
        print(json.dumps({"same answers": same, "of": len(prompts)}))
    print(json.dumps({"ratio": round(speed / best, 2)}))


if __name__ == "__main__":
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    main()
