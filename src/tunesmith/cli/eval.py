"""Verbs that use models: `eval`, `compare`, `chat` and `verify`."""

from __future__ import annotations

import os
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tunesmith import api
from tunesmith.cli.args import AllowCode, AsJson, RunArg, read_questions
from tunesmith.cli.help import option, switch
from tunesmith.cli.launch import GpusOption, launch, list_flags, lockstep
from tunesmith.cli.output import print_result
from tunesmith.core.errors import GateError, InputError
from tunesmith.core.sampling import SamplingParams

if TYPE_CHECKING:
    from tunesmith.evaluate.regression_gate import EvalReport

GREEDY = SamplingParams()


def evaluate(
    target: Annotated[
        str,
        typer.Argument(
            metavar="TARGET",
            help="RUN, RUN@0.5, RUN/checkpoints/step-N, adapter or model.",
            show_default=False,
        ),
    ],
    data: Annotated[
        Path | None, option("FILE", "Evaluate on this file, not the run's rows.")
    ] = None,
    metrics: Annotated[
        str | None, option("LIST", "Metrics instead of the run's: 'chrf, numeric: 0.1'.")
    ] = None,
    gate: Annotated[bool, switch("--gate", "Exit with code 4 if a gate fails.")] = False,
    allow_code: AllowCode = False,
    gpus: GpusOption = None,
    as_json: AsJson = False,
) -> None:
    """Evaluate a run before and after training, or any model."""
    if gpus is not None:
        flags = list_flags(data=data, metrics=metrics, gate=gate, allow_code=allow_code)
        flags += list_flags(json=as_json)
        raise typer.Exit(launch(gpus, ["eval", target, *flags]))
    from tunesmith.cli.progress import measuring

    with lockstep() as ranks, measuring() if ranks.is_main else nullcontext():
        report = api.evaluate(
            target, data=data, metrics=metrics, allow_code=allow_code, ranks=ranks
        )
    _show_report(report, target, gate=gate, as_json=as_json)


def _show_report(report: EvalReport, target: str, *, gate: bool, as_json: bool) -> None:
    """Print a report; raise GateError if a gate fails."""
    from tunesmith.cli.views.results import render_comparisons, render_gates, render_scores
    from tunesmith.cli.views.verdict import render_errors

    output: dict[str, Any] = {
        "scores": report.scores,
        "comparisons": report.comparisons,
        "errors": report.errors,
    }
    views = [
        render_comparisons(report.comparisons)
        if report.comparisons
        else render_scores(report.scores)
    ]
    if report.errors is not None:
        views.append(render_errors(report.errors))
    gates = report.check_gates() if gate else ()
    if gate:
        output["gates"] = gates
        views.append(render_gates(gates))
    print_result(output, *views, as_json=as_json)
    if failed := [result.name for result in gates if not result.passed]:
        raise GateError(f"failed: {', '.join(failed)}", where=target)


def compare(
    a: Annotated[
        str, typer.Argument(metavar="A", help="An eval TARGET, `base`, or a JSONL file of answers.")
    ],
    b: Annotated[str, typer.Argument(metavar="B", help="Like A; differences are B minus A.")],
    allow_code: AllowCode = False,
    as_json: AsJson = False,
) -> None:
    """Compare two models item by item, with significance tests."""
    from tunesmith.cli.progress import measuring
    from tunesmith.cli.views.results import render_model_comparison

    with measuring(start="comparing"):  # of finished runs, no model is loaded
        comparison = api.compare(a, b, allow_code=allow_code)
    print_result(comparison, render_model_comparison(comparison), as_json=as_json)


def chat(  # noqa: PLR0913 - every option of sampling is a flag
    folder: RunArg,
    system: Annotated[
        str | None, option("TEXT", "System message; that of the training rows by default.")
    ] = None,
    temperature: Annotated[
        float, option("X", "Sample at this temperature; 0 is greedy.")
    ] = GREEDY.temperature,
    top_p: Annotated[
        float, option("X", "Nucleus sampling: top tokens with this total probability.")
    ] = GREEDY.top_p,
    top_k: Annotated[
        int, option("N", "Sample from the N likeliest tokens; 0: all.")
    ] = GREEDY.top_k,
    min_p: Annotated[
        float, option("X", "Minimum probability relative to the top token.")
    ] = GREEDY.min_p,
    repetition_penalty: Annotated[
        float, option("X", "Penalty on repeated tokens; 1 is off.")
    ] = GREEDY.repetition_penalty,
    seed: Annotated[int, option("N", "Sampling seed.")] = GREEDY.seed,
    max_new_tokens: Annotated[
        int, option("N", "Maximum tokens to generate.")
    ] = GREEDY.max_new_tokens,
    as_json: AsJson = False,
) -> None:
    """Chat with a trained model, one message per line."""
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


def verify(
    folder: RunArg,
    url: Annotated[str, option("URL", "OpenAI-compatible API: http://localhost:8000/v1.")],
    model: Annotated[str | None, option("NAME", "Model to ask; the only one by default.")] = None,
    key_env: Annotated[
        str | None, option("VARIABLE", "Environment variable that holds the API key.")
    ] = None,
    items: Annotated[int, option("N", "Test rows to ask, at most.")] = 64,
    as_json: AsJson = False,
) -> None:
    """Check that a server gives a run's answers; exit 4 if not."""
    from tunesmith.cli.progress import measuring
    from tunesmith.cli.views.verification import render_verification

    with measuring(start="asking the server"):
        result = api.verify(folder, url, model=model, key=_read_key(key_env), items=items)
    print_result(result, render_verification(result), as_json=as_json)
    if not result.is_run:
        raise GateError(result.problem, where=url)


def _read_key(variable: str | None) -> str:
    """Return the key in an environment variable. Raises InputError for one that is not set."""
    if variable is None:
        return ""
    if not os.environ.get(variable):
        message = f"the environment variable {variable!r:.80} is not set"
        raise InputError(message, where="--key-env", fix="set it to the key")
    return os.environ[variable]
