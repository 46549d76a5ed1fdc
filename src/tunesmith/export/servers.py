"""Hand finished runs over to a server of another project: vLLM, SGLang, llama-server, KServe, Ray.

    export_servers(runs, "vllm", out) -> ServerExport

The adapters are exported and verified as by `--to peft` (llama-server: one GGUF, as by `--to
gguf`); beside them are the files that start the server, `verify.sh` and `LIMITS.md`. What an engine
cannot hold is refused by name before anything is written. The files are the rendered ones of
server_templates/TARGET/: a start script and a compose file, or a manifest. None of these engines
runs here, hence `verify.sh`. Left out: running the server."""

from __future__ import annotations

import json
import re
import shlex
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from tunesmith.core.atomic import atomic_dir
from tunesmith.core.errors import InputError
from tunesmith.core.hub_names import COMMIT, split_revision
from tunesmith.core.types import __version__
from tunesmith.export.export import export_run
from tunesmith.export.hf import MERGE_FIX, has_expert_adapters
from tunesmith.export.parity import Parity
from tunesmith.export.request import ENGINES, LLAMA_SERVER, choose_server_path
from tunesmith.export.source_run import SourceRun, open_source_run
from tunesmith.model.hub.adapter_config import ADAPTER_CONFIG_FILE
from tunesmith.model.hub.validate import read_model_json
from tunesmith.model.save import LoraTensors, select_linear_loras
from tunesmith.session.identity import hash_weight_files
from tunesmith.train.model_card import find_hub_name

TEMPLATES = Path(__file__).parent / "server_templates"
MAX_LORAS_IN_BATCH = 16
VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,62}")
GENERATION_FILE = "generation_config.json"


@dataclass(frozen=True)
class ServedAdapter:
    """A run and the name that requests use for it."""

    name: str
    run_path: str


@dataclass(frozen=True)
class Deployment:
    """The base and the adapters of a server. `hub_name` is empty for a base that is not on the hub;
    `base` names it for people. `model_file` is the GGUF of llama-server."""

    adapters: tuple[ServedAdapter, ...]
    base: str
    hub_name: str
    revision: str
    dtype: str
    context_length: int
    max_rank: int
    end_ids: tuple[int, ...]
    has_template: bool = True
    model_file: str = ""

    @property
    def max_loras(self) -> int:
        return min(len(self.adapters), MAX_LORAS_IN_BATCH)

    @property
    def vllm_rank(self) -> int:
        """The smallest rank that vLLM offers and that holds every adapter."""
        return next(rank for rank in VLLM_RANKS if rank >= self.max_rank)

    @property
    def shell_base(self) -> str:
        """The base without what a shell reads inside ${...:?...}."""
        return "".join(char for char in self.base if char.isalnum() or char in " ._/@-")


def build_server_files(target: str, deployment: Deployment) -> dict[str, str]:
    """Return every text of an export by its name."""
    environment = Environment(
        loader=FileSystemLoader([TEMPLATES / target, TEMPLATES]),
        undefined=StrictUndefined,
        trim_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters["quote"] = shlex.quote
    names = [path.name for path in sorted((TEMPLATES / target).iterdir())]
    texts: dict[str, str] = {}
    for name in [*names, "verify.sh"]:
        values = {"target": target, "deployment": deployment}
        texts[name] = environment.get_template(name).render(values)
    return texts


@dataclass(frozen=True)
class ExportedRun:
    """A run, its name in requests, and how its exported weights compare with it."""

    name: str
    run: str
    parity: Parity


@dataclass(frozen=True)
class ServerExport:
    """The folder of a server, its files, and the runs that it serves."""

    target: str
    path: str
    files: tuple[str, ...]
    runs: tuple[ExportedRun, ...]


def export_servers(
    paths: Sequence[Path],
    target: str,
    *,
    kind: str | None = None,
    scale: float = 1.0,
    out: Path | None = None,
) -> ServerExport:
    """Export runs with the files that start a server.

    Args:
        kind: the type of the GGUF, for llama-server.
        scale: factor on every adapter.
        out: the new folder; None for RUN/export/TARGET of a single run.

    Raises:
        InputError: a run that this engine cannot hold, or runs that one server cannot hold.
        MachineError: verifying an export does not fit in memory.
        GateError: exported weights do not behave as the run does; nothing is written.
    """
    output_path = choose_server_path(paths, target, out)
    names = _choose_names(paths)
    runs = [open_source_run(path) for path in paths]
    if target == LLAMA_SERVER and len(runs) > 1:
        message = "llama-server cannot select an adapter by model name: one run per server"
        raise InputError(message, where="--to llama-server", fix="export each run by itself")
    if target != LLAMA_SERVER:
        for run in runs:
            _refuse_unsupported(run, target)
        _refuse_differences(runs)
    adapters = tuple(
        ServedAdapter(name, str(path.absolute())) for name, path in zip(names, paths, strict=True)
    )
    deployment = _build_deployment(runs, adapters)
    metadata = {"tunesmith": __version__, "target": target}
    exported: list[ExportedRun] = []
    with atomic_dir(output_path, metadata=metadata, key="--out") as folder:
        for name, path in zip(names, paths, strict=True):
            if target == LLAMA_SERVER:
                result = export_run(path, "gguf", kind=kind, scale=scale, out=folder / "model")
                deployment = replace(deployment, model_file=f"model-{result.type}.gguf")
            else:
                adapter_dir = folder / "adapters" / name
                result = export_run(path, "peft", scale=scale, out=adapter_dir)
            exported.append(ExportedRun(name, str(path), result.parity))
        if target != LLAMA_SERVER:
            _write_shared_files(folder, runs[0], names[0])
        for file, text in build_server_files(target, deployment).items():
            (folder / file).write_text(text, encoding="utf-8")
            if file.endswith(".sh"):
                (folder / file).chmod(0o755)
        files = sorted(
            file.relative_to(folder).as_posix() for file in folder.rglob("*") if file.is_file()
        )
    return ServerExport(target, str(output_path), tuple(files), tuple(exported))


def _choose_names(paths: Sequence[Path]) -> list[str]:
    """Return the names of the runs' folders. Raises InputError unless all differ and every engine
    takes them."""
    names = [path.absolute().name for path in paths]
    for name, path in zip(names, paths, strict=True):
        fix = "rename the folder of the run"
        if not NAME.fullmatch(name):
            message = "its name is the model in requests, and may have only letters, digits, . _ -"
            raise InputError(message, where=str(path), fix=fix)
        if names.count(name) > 1:
            raise InputError(f"two runs are called {name}", where=str(path), fix=fix)
    return names


def _refuse_unsupported(run: SourceRun, target: str) -> None:
    """Raise InputError for a run that this engine would not serve as it was trained."""
    for is_beyond, lack, fix in _list_limits(run, target):
        if is_beyond:
            message = f"{ENGINES[target]} {lack}"
            raise InputError(message, where=str(run.path), fix=fix)


def _list_limits(run: SourceRun, target: str) -> Iterator[tuple[bool, str, str]]:
    """Yield (whether the run is beyond a limit, what the engine does not do, the way out)."""
    yield not run.loras, "needs an adapter, but this run trained all weights", MERGE_FIX
    yield bool(run.quantized_paths), "does not load the 4-bit base of this adapter", MERGE_FIX
    tokens = "does not support adapters with embeddings of added tokens"
    yield bool(run.token_rows), tokens, MERGE_FIX
    modules = f"does not support adapters with modules_to_save ({', '.join(run.modules):.80})"
    yield bool(run.modules), modules, MERGE_FIX
    experts = "does not read adapters of experts as PEFT writes them"
    yield has_expert_adapters(run), experts, MERGE_FIX
    linears = select_linear_loras(run.loras).values()
    has_dora = any(lora.magnitude_O is not None for lora in linears)
    yield has_dora, "does not support DoRA adapters", MERGE_FIX
    config = read_model_json(run.saved_dir / ADAPTER_CONFIG_FILE)
    for key in ("rank_pattern", "alpha_pattern"):
        yield bool(config.get(key)), f"gives all layers one rank and alpha: no {key}", MERGE_FIX
    rank = _get_max_rank(run)
    yield rank > VLLM_RANKS[-1], f"takes ranks up to {VLLM_RANKS[-1]}, not rank {rank}", MERGE_FIX
    other_server = "export it with --to vllm or sglang"
    variables = target in ("kserve", "ray") and bool(run.recipe.chat_template_kwargs)
    yield variables, "gives its template no chat_template_kwargs", other_server
    template = target == "ray" and isinstance(run.recipe.chat_template, Path)
    yield template, "renders the base's chat template, but this run has another", other_server


def _refuse_differences(runs: Sequence[SourceRun]) -> None:
    """Raise InputError for runs that one server cannot hold: all share its base, its tokenizer and
    its template with the variables."""
    first = runs[0]
    paths = {run.model_spec.path for run in runs}
    hashes = {path: hash_weight_files(path) for path in paths} if len(paths) > 1 else {}
    for run in runs[1:]:
        difference = ""
        if run.renderer.fingerprint != first.renderer.fingerprint:
            difference = "chat template, chat_template_kwargs or tokenizer"
        if hashes and hashes[run.model_spec.path] != hashes[first.model_spec.path]:
            difference = "base model"
        if difference:
            message = f"its {difference} differs from that of {first.path}; one server uses one"
            fix = "export it to a server of its own"
            raise InputError(message, where=str(run.path), fix=fix)


def _get_max_rank(run: SourceRun) -> int:
    ranks: list[int] = []
    for lora in run.loras.values():
        ranks.append(lora.a_RI.shape[0] if isinstance(lora, LoraTensors) else lora.a_ERI.shape[1])
    return max(ranks)


def _build_deployment(runs: Sequence[SourceRun], adapters: tuple[ServedAdapter, ...]) -> Deployment:
    first = runs[0]
    hub_name = find_hub_name(first.model_spec)
    commit = split_revision(first.recipe.model)[1] or first.model_spec.path.name
    ranks = [_get_max_rank(run) for run in runs if run.loras]
    return Deployment(
        adapters=adapters,
        base=first.model_spec.name,
        hub_name=hub_name,
        revision=commit if hub_name and COMMIT.fullmatch(commit) else "",
        dtype=first.model_spec.dtype,
        context_length=first.model_spec.context_length,
        max_rank=max(ranks, default=1),
        end_ids=first.renderer.end_ids,
        has_template=first.renderer.has_template,
    )


def _write_shared_files(folder: Path, run: SourceRun, name: str) -> None:
    """Write the template with the run's variables in it, and the end tokens that were trained."""
    if run.renderer.has_template:
        source = run.renderer.templates["default"].source
        text = bind_variables(source, run.recipe.chat_template_kwargs, where=str(run.path))
        (folder / "chat_template.jinja").write_text(text, encoding="utf-8")
    (folder / "generation").mkdir()
    generation_file = folder / "adapters" / name / GENERATION_FILE
    shutil.copyfile(generation_file, folder / "generation" / GENERATION_FILE)


def bind_variables(template: str, variables: dict[str, Any], *, where: str) -> str:
    """Return a chat template that sets its variables itself, whatever a request passes.

    Raises InputError for a value that is not a plain one."""
    statements = ""
    for key, value in variables.items():
        if not isinstance(value, bool | int | float | str):
            message = f"chat_template_kwargs: {key} is not a number, a text or true or false"
            raise InputError(message, where=where, fix=MERGE_FIX)
        statements += f"{{% set {key} = {json.dumps(value)} %}}\n"
    # transformers drops the line break after a statement, so the template starts as it did.
    return statements + template
