"""The verb `chat`: questions from stdin, answers to stdout."""

from __future__ import annotations

from typing import Annotated

import typer

from tunesmith import api
from tunesmith.cli.args import AsJson, RunArg, read_questions
from tunesmith.cli.output import print_result
from tunesmith.core.sampling import SamplingParams

DEFAULTS = SamplingParams()


def chat(  # noqa: PLR0913 - every option of sampling is a flag
    folder: RunArg,
    system: Annotated[
        str | None,
        typer.Option(
            metavar="TEXT", help="System message; that of the rows by default.", show_default=False
        ),
    ] = None,
    temperature: Annotated[
        float, typer.Option(metavar="X", help="Sample at this temperature; 0 is greedy.")
    ] = DEFAULTS.temperature,
    top_p: Annotated[
        float, typer.Option(metavar="X", help="Sample from tokens with this total probability.")
    ] = DEFAULTS.top_p,
    top_k: Annotated[
        int, typer.Option(metavar="N", help="Sample from the N likeliest tokens; 0: all.")
    ] = DEFAULTS.top_k,
    min_p: Annotated[
        float, typer.Option(metavar="X", help="Least probability, relative to the likeliest token.")
    ] = DEFAULTS.min_p,
    repetition_penalty: Annotated[
        float, typer.Option(metavar="X", help="Penalize tokens of the conversation; 1: none.")
    ] = DEFAULTS.repetition_penalty,
    seed: Annotated[
        int, typer.Option(metavar="N", help="Seed of the sampling; same seed, same answers.")
    ] = DEFAULTS.seed,
    max_new_tokens: Annotated[
        int, typer.Option(metavar="N", help="Longest answer, in tokens.")
    ] = DEFAULTS.max_new_tokens,
    as_json: AsJson = False,
) -> None:
    """Chat with a trained adapter, one message per line."""
    sampling = SamplingParams(
        temperature=temperature,
        top_p=top_p,
        top_k=top_k,
        min_p=min_p,
        repetition_penalty=repetition_penalty,
        seed=seed,
        max_new_tokens=max_new_tokens,
    )
    for answer in api.chat(folder, read_questions(), sampling, system=system):
        print_result({"answer": answer}, answer, as_json=as_json)
