"""The export for Ollama: a folder with a GGUF and the Modelfile that `ollama create NAME -f
Modelfile` takes.

In: a finished run. Out: the folder. Prompts are rendered back through the Modelfile's own template,
the weights through the GGUF."""

from __future__ import annotations

from dataclasses import replace

from tunesmith.core.errors import InputError
from tunesmith.export.gguf.write import get_model_path, reload_gguf, write_gguf
from tunesmith.export.modelfile import (
    MODELFILE_HINT,
    choose_template,
    encode_prompt,
    parse_modelfile,
    render_modelfile,
)
from tunesmith.export.parity import ExportJob, ReloadedExport

MIN_OLLAMA_VERSION = "0.17.1"  # older ones read GGUF files out of bounds (CVE-2026-7482)
MODELFILE_NAME = "Modelfile"


def write_ollama(job: ExportJob) -> None:
    run = job.run
    if not job.chat_examples:
        raise InputError(
            "the run has no conversation to see its template by",
            where="template",
            fix=MODELFILE_HINT,
        )
    ollama_template = choose_template(
        run.saved_dir / "tokenizer.json",
        run.renderer,
        [example.messages for example in job.chat_examples],
    )
    comment = (
        f"{run.model_spec.name}, trained in {run.name}\nneeds Ollama {MIN_OLLAMA_VERSION} or newer"
    )
    (job.folder / MODELFILE_NAME).write_text(
        render_modelfile(ollama_template, get_model_path(job).name, comment), encoding="utf-8"
    )
    write_gguf(job)


def reload_ollama(job: ExportJob) -> ReloadedExport:
    ollama_template = parse_modelfile((job.folder / MODELFILE_NAME).read_text(encoding="utf-8"))
    tokenizer_path, renderer = job.run.saved_dir / "tokenizer.json", job.run.renderer
    rendered_ids = [
        encode_prompt(ollama_template.render_prompt(example.messages), tokenizer_path, renderer)
        for example in job.chat_examples
    ]
    return replace(reload_gguf(job), rendered_ids=rendered_ids)
