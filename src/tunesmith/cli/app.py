"""The command line: one verb, one function, one line in `VERBS`.

    tunesmith VERB [recipe.yaml] [--key value ...]

Results go to stdout (as one JSON object with --json), progress and errors to stderr. Exit codes: 0
ok, 1 a bug in tunesmith, 2 the user's input, 3 the machine, 4 a gate said no, 130 and 143
interrupted. Nothing heavy is imported before a verb needs it: that is why imports stand inside the
functions, here and in verbs.py only. Left out: the verbs on data (clidata.py), those that run
(clirun.py), those that measure (clieval.py), how words become a recipe and results text
(commandline.py)."""

from __future__ import annotations

import inspect
import json
import sys
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Annotated, Any

import typer
from typer.main import get_command

from tunesmith import __version__, api
from tunesmith.cli import data as data_commands
from tunesmith.cli import eval as eval_commands
from tunesmith.cli import run as run_commands
from tunesmith.cli.args import (
    AdviseArgs,
    AsJson,
    RecipeArgs,
    RunArg,
    parse_advise_args,
    parse_recipe_args,
    print_result,
    read_questions,
)
from tunesmith.core.errors import InputError, TunesmithError
from tunesmith.core.json_io import dump_json

USAGE_ERROR: type[Exception] = typer.BadParameter.__mro__[1]  # click's own, or typer's copy of it


@dataclass(frozen=True)
class ErrorOutput:
    """What --json prints under `error` when a verb refuses."""

    kind: str
    message: str
    where: str
    fix: str
    exit_code: int


# ---------------------------------------------------------------- verbs


def init(
    path: Annotated[Path, typer.Argument(metavar="RECIPE.yaml", help="The file to write.")] = Path(
        "recipe.yaml"
    ),
    from_config: Annotated[
        Path | None,
        typer.Option(
            "--from",
            help="Translate this config of LLaMA-Factory, Axolotl or TRL.",
            show_default=False,
        ),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(
            help="Base model: a name, a folder or a GGUF file; else the built-in one.",
            show_default=False,
        ),
    ] = None,
    data: Annotated[
        str | None, typer.Option(help="Training rows; else train.jsonl.", show_default=False)
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Write a commented recipe and its schema for editors, or translate the config of another
    tool."""
    from tunesmith.recipe.template import format_untranslated

    result = api.init(path, model=model, data=data, from_config=from_config)
    origin = f"{from_config} is a config of {result.tool}: {result.reason}\n" if from_config else ""
    sys.stderr.write(
        origin + "".join(f"{line}\n" for line in format_untranslated(result.untranslated))
    )
    print_result(result, f"wrote {result.recipe} and {result.schema}", as_json=as_json)


def doctor(
    model: Annotated[
        str | None, typer.Option(help="Fetch this model and see what fits.", show_default=False)
    ] = None,
    as_json: AsJson = False,
) -> None:
    """What this machine has, lacks and can train."""
    from tunesmith.cli.views.tables import render_diagnosis

    diagnosis = api.doctor(model)
    print_result(diagnosis, render_diagnosis(diagnosis), as_json=as_json)


def advise(
    args: AdviseArgs = None,
    measure: Annotated[
        bool, typer.Option("--measure", help="Try it on the recipe's eval_data.")
    ] = False,
    documents: Annotated[
        Path | None,
        typer.Option(metavar="PATH", help="Texts to look answers up in.", show_default=False),
    ] = None,
    minutes: Annotated[
        float, typer.Option(help="For measuring; it goes on where it stopped.")
    ] = 10.0,
    target: Annotated[
        float | None,
        typer.Option(metavar="SCORE", help="What is good enough, 0 to 1.", show_default=False),
    ] = None,
    metric: Annotated[
        str | None, typer.Option(help="Which metric decides.", show_default=False)
    ] = None,
    out: Annotated[
        Path, typer.Option(metavar="FOLDER", help="Where measured answers are kept.")
    ] = Path("runs/advise"),
    as_json: AsJson = False,
) -> None:
    """Should this be fine-tuned? By rules in a moment, or measured on your own items with
    --measure."""
    if measure:
        from tunesmith.advising import advise_measured
        from tunesmith.cli.views.measured_advice import report_experiment

        options = {
            "documents": documents,
            "minutes": minutes,
            "target": target,
            "metric": metric,
            "folder": out,
        }
        for result in advise_measured(parse_recipe_args(args), **options):
            if (view := report_experiment(result)) is not None:
                print_result(result, view, as_json=as_json)
        return
    if documents or target is not None or metric:
        raise InputError(
            "documents, target and metric are for measuring",
            where="command line",
            fix="add --measure",
        )
    from tunesmith.cli.views.advice import render_advice

    path, answers = parse_advise_args(args)
    advice = api.advise(path, **answers)
    print_result(advice, render_advice(advice), as_json=as_json)


def plan(
    args: RecipeArgs = None,
    target: Annotated[
        str | None,
        typer.Option(help="Plan for this GPU: h100, a100-80gb, rtx4090, ...", show_default=False),
    ] = None,
    memory: Annotated[
        str | None,
        typer.Option(metavar="SIZE", help="Plan for this much memory: 24GB.", show_default=False),
    ] = None,
    compare: Annotated[
        bool, typer.Option("--compare", help="Full, LoRA and QLoRA side by side.")
    ] = False,
    benchmark: Annotated[
        bool, typer.Option("--calibrate", help="Measure how long it will take, in 10 s.")
    ] = False,
    why: Annotated[
        str | None,
        typer.Option(metavar="KEY", help="All that stands behind one value.", show_default=False),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Every value of a run with its reason, and the memory that it takes. Trains nothing."""
    recipe = parse_recipe_args(args)
    from tunesmith.cli.views.tables import render_method_estimates, render_plan, render_setting

    if compare and why is not None:
        raise InputError(
            "--compare and --why are two questions", where="command line", fix="ask one of them"
        )
    if compare:
        methods = api.compare_methods(recipe, target=target, fit=memory)
        print_result({"methods": methods}, render_method_estimates(methods), as_json=as_json)
        return
    run_plan = api.plan(recipe, target=target, fit=memory, calibrate=benchmark)
    print_result(
        run_plan,
        render_plan(run_plan) if why is None else render_setting(run_plan, why),
        as_json=as_json,
    )


def tune_lr(
    args: RecipeArgs = None,
    steps: Annotated[int, typer.Option(min=10, help="Steps at each rate.")] = 40,
    out: Annotated[Path, typer.Option(metavar="FILE.svg", help="Where to draw the curve.")] = Path(
        "learning-rates.svg"
    ),
    as_json: AsJson = False,
) -> None:
    """Short runs at five learning rates from the same start; picks one by the held-out loss."""
    recipe = parse_recipe_args(args)
    from tunesmith.cli.views.lr_finder import report_lr_result

    for result in api.tune_lr(recipe, steps=steps):
        if (view := report_lr_result(result, out)) is not None:
            print_result(result, view, as_json=as_json)


def chat(folder: RunArg, as_json: AsJson = False) -> None:
    """Talk to a trained adapter; one question a line."""
    for answer in api.chat(folder, read_questions()):
        print_result({"answer": answer}, answer, as_json=as_json)


def export(
    folder: RunArg,
    to: Annotated[
        str,
        typer.Option(metavar="TARGET", help="peft, merged, gguf or ollama.", show_default=False),
    ],
    type: Annotated[
        str | None,
        typer.Option(help="Of a GGUF: f16, q8_0, bf16, f32, or lora alone.", show_default=False),
    ] = None,
    base: Annotated[
        str,
        typer.Option(
            help="After qlora, what the adapter is merged into: original, dequantized or auto."
        ),
    ] = "auto",
    scale: Annotated[
        float,
        typer.Option(help="The adapter times this: less of it forgets less; `train` offers one."),
    ] = 1.0,
    out: Annotated[
        Path | None, typer.Option(help="A new folder; else RUN/export/TARGET.", show_default=False)
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Hand out a finished run in another form, once it is shown to answer as the run does."""
    from tunesmith.cli.views.tables import render_export

    result = api.export(folder, to, type=type, base=base, scale=scale, out=out)
    print_result(result, render_export(result), as_json=as_json)


def schema(as_json: AsJson = False) -> None:
    """The JSON schema of a recipe, for editors and other programs."""
    if as_json:
        print_result({"schema": api.schema()}, as_json=True)
    else:
        sys.stdout.write(json.dumps(api.schema(), indent=2) + "\n")


VERBS: dict[str, Callable[..., None]] = {
    "demo": run_commands.demo,
    "init": init,
    "doctor": doctor,
    "advise": advise,
    **data_commands.VERBS,
    "plan": plan,
    "tune lr": tune_lr,
    "train": run_commands.train,
    "resume": run_commands.resume,
    "eval": eval_commands.evaluate,
    "compare": eval_commands.compare,
    "report": run_commands.report,
    "chat": chat,
    "export": export,
    "schema": schema,
}

GROUPS = {
    "data": "What is wrong with the rows, and what the model sees of them.",
    "tune": "Which value of a recipe is best, measured on short runs.",
}


# ---------------------------------------------------------------- the program


def build_app() -> typer.Typer:
    """The program made from `VERBS`; a verb of two words goes into a group."""
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    app.callback(invoke_without_command=True)(_print_version_or_help)
    groups = {name: typer.Typer(help=text) for name, text in GROUPS.items()}
    for name, verb in VERBS.items():
        *group, last = name.split()
        has_args = "args" in inspect.signature(verb).parameters
        parent = groups[group[0]] if group else app
        parent.command(last, context_settings={"ignore_unknown_options": has_args})(verb)
    for name, group in groups.items():
        group.callback(invoke_without_command=True)(_print_group_help)
        app.add_typer(group, name=name)
    return app


def _print_version_or_help(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
) -> None:
    """Decides whether a language model should be fine-tuned, does it right, and proves that it
    worked."""
    if version:
        typer.echo(f"tunesmith {__version__}")
    elif context.invoked_subcommand is None:
        typer.echo(context.get_help())


def _print_group_help(context: typer.Context) -> None:
    if context.invoked_subcommand is None:
        typer.echo(context.get_help())


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs one verb and exits with its code."""
    words = sys.argv[1:] if arguments is None else list(arguments)
    sys.excepthook = _explain_bug
    try:
        sys.exit(get_command(build_app()).main(words, prog_name="tunesmith", standalone_mode=False))
    except TunesmithError as error:
        _exit_with_error(error, as_json="--json" in words)
    except USAGE_ERROR as error:
        _exit_with_error(_to_input_error(error), as_json="--json" in words)
    except (KeyboardInterrupt, typer.Abort):
        sys.exit(130)


def _to_input_error(usage: Any) -> InputError:
    """What the parser has to say about the words, said like everything else."""
    verb = usage.ctx.command_path if usage.ctx else "tunesmith"
    return InputError(usage.format_message(), where="command line", fix=f"see `{verb} --help`")


def _exit_with_error(error: TunesmithError, *, as_json: bool) -> None:
    if as_json:
        error_output = ErrorOutput(
            type(error).__name__, error.message, error.where, error.fix, error.exit_code
        )
        sys.stdout.write(dump_json({"tunesmith": __version__, "error": error_output}).decode())
    sys.stderr.write(f"error: {error}\n")
    sys.exit(error.exit_code)


def _explain_bug(
    kind: type[BaseException], error: BaseException, trace: TracebackType | None
) -> None:
    traceback.print_exception(kind, error, trace)
    sys.stderr.write(
        f"this is a bug in tunesmith {__version__}: please report it with the lines above\n"
    )


if __name__ == "__main__":
    main()
