"""Verbs of the server: `serve`, and `keys` for its API keys.

Each verb is a function; cli/app.py has the table. Imports are inside the functions, so that --help
loads no web server. Left out: what a request does (serve/)."""

from __future__ import annotations

import logging
import sys
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any

import typer

from tunesmith.cli.args import AsJson
from tunesmith.cli.help import option, switch
from tunesmith.cli.output import print_result, write_stderr
from tunesmith.core.errors import InputError

KeysFile = Annotated[Path | None, option("FILE", "Key file; ~/.config/tunesmith/keys.json.")]

ModelsFolder = Annotated[
    Path | None, option("FOLDER", "Folder from which PUT /admin/models may load runs.")
]

WatchedUrl = Annotated[
    str | None, typer.Option(metavar="URL", help="Not supported any more.", hidden=True)
]

SourcesArg = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="RUN | serve.yaml",
        help="RUN, RUN@0.5, adapter folders, or a settings file.",
        show_default=False,
    ),
]


def serve(  # noqa: PLR0913 - every option is a flag
    sources: SourcesArg = None,
    base: Annotated[str | None, option("MODEL", "Base model; that of the runs by default.")] = None,
    host: Annotated[str | None, option("HOST", "Address; 127.0.0.1 by default.")] = None,
    port: Annotated[int | None, option("N", "Port; 8000 by default.")] = None,
    models_dir: ModelsFolder = None,
    keys: KeysFile = None,
    no_auth: Annotated[
        bool, switch("--no-auth", "Serve without keys, on this machine only.")
    ] = False,
    open_metrics: Annotated[
        bool, switch("--open-metrics", "Serve /metrics and /ready without a key.")
    ] = False,
    dtype: Annotated[
        str | None, option("TYPE", "bf16, fp16 or fp32; the run's by default.")
    ] = None,
    watch: WatchedUrl = None,
) -> None:
    """Serve runs on one base through an OpenAI-compatible API."""
    if watch is not None:
        fix = f"read {watch.rstrip('/')}/metrics, for example with Prometheus"
        raise InputError("a running server is no longer shown here", where="--watch", fix=fix)
    settings_flags: dict[str, Any] = {
        "base": base,
        "host": host,
        "port": port,
        "models_dir": models_dir,
        "keys": keys,
        "auth": False if no_auth else None,
        "open_metrics": open_metrics or None,
        "dtype": dtype,
    }
    sys.exit(_serve_until_signal(sources or (), settings_flags))


def _serve_until_signal(sources: Sequence[str], settings_flags: Mapping[str, Any]) -> int:
    """Serve, and return the exit code. A wrong name is refused before torch is loaded."""
    _require_extra()
    import asyncio

    from tunesmith.evaluate.model_ref import parse_model_ref
    from tunesmith.serve.settings import read_settings

    settings = read_settings(sources, **settings_flags)
    for model in settings.models.values():
        parse_model_ref(model.source)
    from tunesmith.serve.server import prepare_server, run_server

    _log_to_stderr()
    prepared = prepare_server(settings)
    if prepared.new_key:
        write_stderr(f"API key, shown once: {prepared.new_key}\n")
    with prepared.base.scratch:
        return asyncio.run(run_server(prepared))


def _require_extra() -> None:
    """Raise InputError without the libraries of the extra."""
    for library in ("starlette", "uvicorn", "prometheus_client"):
        if find_spec(library) is None:
            message = f"serving needs {library}, which is not installed"
            raise InputError(
                message, where="serve", fix="pip install '.[serve]' in tunesmith's folder"
            )


def _log_to_stderr() -> None:
    """Send the access log and messages of the server to stderr, a line each."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(message)s"))
    for name in ("tunesmith", "uvicorn.error"):
        logging.getLogger(name).addHandler(handler)
    logging.getLogger("tunesmith").setLevel(logging.INFO)
    logging.getLogger("uvicorn.error").setLevel(logging.WARNING)


# ---------------------------------------------------------------- keys


def add_key(
    name: Annotated[str, typer.Argument(metavar="NAME", help="Name of the key, for the log.")],
    scope: Annotated[
        str, option("SCOPE", "infer, feedback, metrics or admin; with commas.")
    ] = "infer",
    models: Annotated[str | None, option("NAMES", "Only these models, with commas.")] = None,
    keys: KeysFile = None,
    as_json: AsJson = False,
) -> None:
    """Create an API key; it is shown only once."""
    from tunesmith.serve import keys as key_files

    scopes: Any = _split_words(scope)
    names = _split_words(models or "")
    if models is not None and not names:  # an empty variable of a script must not mean all
        raise InputError("it names no model", where="--models", fix="leave it out for all models")
    path = keys or key_files.find_keys_file()
    secret, key = key_files.add_key(path, name, scopes=scopes, models=names)
    output = {"key": secret, "name": key.name, "scopes": key.scopes, "models": key.models}
    print_result(output, secret, as_json=as_json)


def _split_words(text: str) -> list[str]:
    return [word.strip() for word in text.split(",") if word.strip()]


def list_keys(keys: KeysFile = None, as_json: AsJson = False) -> None:
    """List the API keys: names, scopes and models."""
    from tunesmith.serve import keys as key_files

    path = keys or key_files.find_keys_file()
    entries = key_files.read_keys(path)
    lines: list[str] = []
    for key in entries:
        models = ", ".join(key.models) or "all models"
        lines.append(f"{key.name}  {', '.join(key.scopes)}  {models}  {key.created}")
    output = [
        {"name": key.name, "scopes": key.scopes, "models": key.models, "created": key.created}
        for key in entries
    ]
    print_result({"keys": output}, "\n".join(lines) or f"no keys in {path}", as_json=as_json)


def remove_key(
    name: Annotated[str, typer.Argument(metavar="NAME", help="Name of the key.")],
    keys: KeysFile = None,
    as_json: AsJson = False,
) -> None:
    """Remove an API key; running servers refuse it at once."""
    from tunesmith.serve import keys as key_files

    path = keys or key_files.find_keys_file()
    key_files.remove_key(path, name)
    print_result({"removed": name}, f"removed {name}", as_json=as_json)


VERBS = {
    "serve": serve,
    "keys add": add_key,
    "keys list": list_keys,
    "keys remove": remove_key,
}
