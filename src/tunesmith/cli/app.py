"""The command line: each verb is a function and a line in `VERBS`.

    tunesmith VERB [recipe.yaml] [--key value ...]

Results go to stdout (one JSON object with --json), progress and errors to stderr. Exit codes: 0 ok,
1 a bug in tunesmith, 2 the user's input, 3 the machine, 4 a gate refused, 130 and 143 interrupted,
141 the reader of a pipe left.
Imports are inside the functions so that --help loads no model library. Left out: verbs on data
(data.py), verbs that train (run.py) or measure (eval.py), parsing and printing (args.py)."""

from __future__ import annotations

import gc
import inspect
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, NoReturn

import typer
from typer.main import get_command

from tunesmith import __version__, api
from tunesmith.cli import data as data_commands
from tunesmith.cli import eval as eval_commands
from tunesmith.cli import run as run_commands
from tunesmith.cli import serve as serve_commands
from tunesmith.cli.args import (
    AdviseArgs,
    AllowCode,
    AsJson,
    RecipeArgs,
    RunArgs,
    parse_advise_args,
    parse_recipe_args,
    refuse_old_words,
)
from tunesmith.cli.ending import (
    CLOSED_PIPE_CODE,
    INTERRUPTED_CODES,
    USAGE_ERROR,
    end_process,
    exit_on_machine_error,
    exit_with_error,
    explain_bug,
    ignore_signals,
    to_input_error,
    unwind_on_signals,
)
from tunesmith.cli.help import (
    VerbCommand,
    VerbGroup,
    find_panel,
    format_examples,
    option,
    switch,
)
from tunesmith.cli.launch import GpusOption, check_processes, launch, list_flags, main_rank
from tunesmith.cli.output import (
    hide_download_bars,
    print_result,
    write_stderr,
)
from tunesmith.core.errors import (
    MACHINE_ERRNOS,
    PATH_ERRNOS,
    InputError,
    TunesmithError,
    to_machine_error,
    to_path_error,
)
from tunesmith.core.library_output import escape_library_output
from tunesmith.core.ranks import is_distributed
from tunesmith.core.types import Plan
from tunesmith.plan.stages import StagedPlan

# ---------------------------------------------------------------- verbs


def init(
    path: Annotated[Path, typer.Argument(metavar="RECIPE.yaml", help="File to write.")] = Path(
        "recipe.yaml"
    ),
    from_config: Annotated[
        Path | None,
        option("CONFIG.yaml", "Translate a LLaMA-Factory, Axolotl or TRL config.", "--from"),
    ] = None,
    model: Annotated[
        str | None, option("MODEL", "Base model: hub id, folder, GGUF file or built-in name.")
    ] = None,
    data: Annotated[str | None, option("PATH", "Training data; train.jsonl by default.")] = None,
    as_json: AsJson = False,
) -> None:
    """Write a commented recipe, or translate another config."""
    from tunesmith.recipe.template import format_untranslated

    result = api.init(path, model=model, data=data, from_config=from_config)
    if from_config:
        write_stderr(f"{from_config} is a config of {result.tool}: {result.reason}\n")
    for line in format_untranslated(result.untranslated):
        write_stderr(f"{line}\n")
    print_result(result, f"wrote {result.recipe} and {result.schema}", as_json=as_json)


def doctor(as_json: AsJson = False) -> None:
    """Check hardware and packages."""
    from tunesmith.cli.views.plan import render_diagnosis

    diagnosis = api.doctor()
    print_result(diagnosis, render_diagnosis(diagnosis), as_json=as_json)


def advise(  # noqa: PLR0913 - every option is a flag
    args: AdviseArgs = None,
    measure: Annotated[bool, switch("--measure", "Measure on the recipe's eval_data.")] = False,
    documents: Annotated[Path | None, option("PATH", "Texts for retrieval.")] = None,
    minutes: Annotated[float, option("N", "Minutes for --measure; rerun to continue.")] = (10.0),
    target: Annotated[float | None, option("SCORE", "Score that is good enough, 0 to 1.")] = None,
    margin: Annotated[float, option("X", "Score that training must add to pay.")] = (0.1),
    base: Annotated[str | None, option("MODEL", "Another base model to try with prompts.")] = None,
    out: Annotated[Path, option("FOLDER", "Folder for measured results.")] = Path("runs/advise"),
    gpus: GpusOption = None,
    as_json: AsJson = False,
) -> None:
    """Recommend whether to fine-tune, by rules or by measurement."""
    if measure and gpus is not None:
        flags = list_flags(measure=True, documents=documents, minutes=minutes, json=as_json)
        flags += list_flags(target=target, margin=margin, base=base, out=out)
        raise typer.Exit(launch(gpus, ["advise", *(args or ()), *flags]))
    if measure:
        from tunesmith.cli.views.measured_advice import report_experiment

        with main_rank() as ranks:
            results = api.advise_measured(
                parse_recipe_args(args),
                documents=documents,
                minutes=minutes,
                target=target,
                margin=margin,
                base=base,
                folder=out,
                ranks=ranks,
            )
            for result in results:
                if (view := report_experiment(result)) is not None:
                    print_result(result, view, as_json=as_json)
        return
    if documents or target is not None or base or gpus is not None:
        flags = "--documents, --target, --base and --gpus"
        message = f"{flags} have no effect without --measure"
        raise InputError(message, where="command line", fix="add --measure")
    from tunesmith.cli.views.advice import render_advice

    path, answers = parse_advise_args(args)
    advice = api.advise(path, **answers)
    print_result(advice, render_advice(advice), as_json=as_json)


def plan(
    args: RecipeArgs = None,
    target: Annotated[
        str | None, option("GPU", "Plan for these GPUs: h100, 8xh100 or 4x8xh100.")
    ] = None,
    memory: Annotated[str | None, option("SIZE", "Plan for this much memory: 24GB.")] = None,
    compare: Annotated[
        bool, switch("--compare", "Compare full fine-tuning, LoRA and QLoRA.")
    ] = False,
    benchmark: Annotated[
        bool, switch("--benchmark", "Time a few real steps (about 10 s).")
    ] = False,
    why: Annotated[str | None, option("KEY", "Explain one setting.")] = None,
    show_all: Annotated[bool, switch("--all", "Show all settings, with full reasons.")] = False,
    as_json: AsJson = False,
) -> None:
    """Show the settings with their reasons, memory and time."""
    recipe = parse_recipe_args(args)
    from tunesmith.cli.views.plan import render_method_estimates, render_plan, render_setting

    views = {"--compare": compare, "--why": why is not None, "--all": show_all}
    if compare:  # --why may explain a setting that is measured
        views["--benchmark"] = benchmark
    chosen = [flag for flag, is_chosen in views.items() if is_chosen]
    if len(chosen) > 1:
        message = f"{' and '.join(chosen)} cannot be combined"
        raise InputError(message, where="command line", fix="pass one of them")
    inputs = api.load_inputs(recipe, needs_weights=False)
    if compare:
        _refuse_unusable_rows(api.plan(inputs), inputs)
        methods = api.compare_methods(inputs, target=target, memory=memory)
        print_result({"methods": methods}, render_method_estimates(methods), as_json=as_json)
        return
    run_plan = api.plan(inputs, target=target, memory=memory, benchmark=benchmark)
    _refuse_unusable_rows(run_plan, inputs)
    view = (
        render_plan(run_plan, show_all=show_all) if why is None else render_setting(run_plan, why)
    )
    print_result(run_plan, view, as_json=as_json)


def _refuse_unusable_rows(plan: Plan | StagedPlan, inputs: api.AnyInputs) -> None:
    """Refuse the rows that `train` would refuse."""
    from tunesmith.data.rejects import refuse_unusable_rows

    plans = plan.plans if isinstance(plan, StagedPlan) else (plan,)
    stages = inputs if isinstance(inputs, tuple) else (inputs,)
    for stage_plan, stage in zip(plans, stages, strict=True):
        skip_invalid = stage.recipe.skip_invalid
        refuse_unusable_rows(stage.datasets, stage_plan.data, skip_invalid=skip_invalid)


def tune_lr(
    args: RecipeArgs = None,
    steps: Annotated[int, option("N", "Steps per learning rate.", min=10)] = 40,
    as_json: AsJson = False,
) -> None:
    """Pick a learning rate from five short runs."""
    recipe = parse_recipe_args(args)
    from tunesmith.cli.views.learning_rates import render_rates, report_rates

    table = report_rates(api.tune_lr(recipe, steps=steps))
    print_result(table, render_rates(table), as_json=as_json)


def tune_sweep(
    args: RecipeArgs = None,
    minutes: Annotated[
        float | None, option("N", "Minutes; starts no trial that would end later.")
    ] = None,
    gpus: Annotated[int | None, option("N", "Run N trials at once, one per GPU.", min=1)] = None,
    allow_code: AllowCode = False,
    as_json: AsJson = False,
) -> None:
    """Run the recipe's sweep; test the winner of eval_data once."""
    recipe = parse_recipe_args(args)
    if gpus is not None:
        check_processes(gpus)
    from tunesmith.cli.views.sweep import render_sweep, report_sweep

    events = api.tune_sweep(recipe, minutes=minutes, gpus=gpus, allow_code=allow_code)
    record = report_sweep(events)
    print_result(record, render_sweep(record), as_json=as_json)


def export(
    folders: RunArgs,
    to: Annotated[str, option("TARGET", "peft, merged, gguf, ollama or a server such as vllm.")],
    type: Annotated[str | None, option("TYPE", "GGUF type: f16, q8_0, bf16 or f32.")] = None,
    scale: Annotated[float, option("X", "Adapter scale; 1 is as trained.")] = 1.0,
    out: Annotated[
        Path | None, option("FOLDER", "New folder; RUN/export/TARGET by default.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Export runs and check each against its run's answers."""
    from tunesmith.cli.views.results import render_export, render_server_export
    from tunesmith.export.request import ENGINES

    if to in ENGINES:
        served = api.export_servers(folders, to, type=type, scale=scale, out=out)
        print_result(served, render_server_export(served), as_json=as_json)
        return
    folder = _get_single_run(folders, to)
    result = api.export(folder, to, type=type, scale=scale, out=out)
    print_result(result, render_export(result), as_json=as_json)


def _get_single_run(folders: Sequence[Path], target: str) -> Path:
    """Return the only run. Raises InputError for several, which only servers take."""
    if len(folders) > 1:
        message = f"--to {target} takes one run; got {len(folders)}"
        raise InputError(message, where="command line", fix="export them one by one")
    return folders[0]


def schema(as_json: AsJson = False) -> None:
    """Print the JSON schema of a recipe."""
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
    "tune sweep": tune_sweep,
    "train": run_commands.train,
    "resume": run_commands.resume,
    "runs": run_commands.list_runs,
    "eval": eval_commands.evaluate,
    "compare": eval_commands.compare,
    "report": run_commands.report,
    "chat": eval_commands.chat,
    "export": export,
    **serve_commands.VERBS,
    "verify": eval_commands.verify,
    "schema": schema,
}

GROUPS = {
    "data": "Check, view, select, review and split data.",
    "tune": "Find good recipe values with short runs.",
    "keys": "Create, list and revoke the server's API keys.",
}


# ---------------------------------------------------------------- the program


def build_app(first_word: str = "") -> typer.Typer:
    """Build the program from `VERBS`; the first word of a two-word verb is its group.

    If `first_word` is a verb or a group, the others are left out: they take 20 ms."""
    verbs = {name: verb for name, verb in VERBS.items() if name.split()[0] == first_word} or VERBS
    app = typer.Typer(cls=VerbGroup, pretty_exceptions_enable=False)
    app.callback(invoke_without_command=True)(_print_version_or_help)
    groups = {name: typer.Typer(cls=VerbGroup, help=text) for name, text in GROUPS.items()}
    for name, verb in verbs.items():
        *group, last = name.split()
        if group and not groups[group[0]].registered_commands:
            app.add_typer(groups[group[0]], name=group[0], rich_help_panel=find_panel(group[0]))
        has_args = "args" in inspect.signature(verb).parameters
        (groups[group[0]] if group else app).command(
            last,
            cls=VerbCommand,
            context_settings={"ignore_unknown_options": has_args},
            epilog=format_examples(name, has_recipe=has_args and name != "advise"),
            rich_help_panel=None if group else find_panel(name),
        )(verb)
    for group in groups.values():
        group.callback(invoke_without_command=True)(_print_group_help)
    return app


def _print_version_or_help(
    context: typer.Context,
    version: Annotated[bool, switch("--version", "Print the version.")] = False,
) -> None:
    """Decide on, plan, run and measure LLM fine-tuning."""
    if version:
        typer.echo(f"tunesmith {__version__}")
    elif context.invoked_subcommand is None:
        typer.echo(context.get_help())


def _print_group_help(context: typer.Context) -> None:
    if context.invoked_subcommand is None:
        typer.echo(context.get_help())


def main(arguments: Sequence[str] | None = None) -> None:
    """Run one verb and exit with its code."""
    words = sys.argv[1:] if arguments is None else list(arguments)
    escape_library_output()
    sys.excepthook = explain_bug
    if arguments is None:
        gc.freeze()  # what was imported; core/program_start.py has stopped the collector
        gc.enable()
        hide_download_bars()
    with unwind_on_signals():
        try:
            _run_verb(words)
        except (SystemExit, KeyboardInterrupt) as ended:  # the latter while an error is printed
            code = int(ended.code or 0) if isinstance(ended, SystemExit) else 130
            if arguments is None:
                ignore_signals()
                if code in INTERRUPTED_CODES or is_distributed():
                    end_process(code)
    # the frames of the verb are gone, and with them what they had open
    if arguments is None:
        end_process(code)
    sys.exit(code)


def _run_verb(words: list[str]) -> NoReturn:
    as_json = "--json" in words
    try:
        refuse_old_words(words)
        program = get_command(build_app(words[0] if words else ""))
        code = program.main(words, prog_name="tunesmith", standalone_mode=False)
        sys.stdout.flush()  # a full disk is still an error of the verb
        sys.exit(code)
    except TunesmithError as error:
        exit_with_error(error, as_json=as_json)
    except USAGE_ERROR as error:
        exit_with_error(to_input_error(error), as_json=as_json)
    except BrokenPipeError:
        sys.exit(CLOSED_PIPE_CODE)
    except OSError as error:
        if error.errno in PATH_ERRNOS and error.filename is not None:
            exit_with_error(to_path_error(error), as_json=as_json)
        if error.errno not in MACHINE_ERRNOS:
            raise
        exit_with_error(to_machine_error(error, "cannot access a file"), as_json=as_json)
    except (KeyboardInterrupt, typer.Abort):  # Abort is a RuntimeError
        sys.exit(130)
    except (MemoryError, RuntimeError) as error:
        exit_on_machine_error(error, as_json=as_json)
        raise
    except SystemExit as ended:
        # click ends with 1 here, which is our code of a bug
        sys.exit(CLOSED_PIPE_CODE if isinstance(ended.__context__, BrokenPipeError) else ended.code)


if __name__ == "__main__":
    main()
