"""The export for Ollama: a folder with a GGUF and the Modelfile that `ollama create NAME -f Modelfile` takes.

In: a finished run. Out: the folder. Prompts are rendered back through the Modelfile's own template, the weights through
the GGUF.
"""

from __future__ import annotations

from dataclasses import replace

from tunesmith.core.errors import InputError
from tunesmith.export.gguf.write import model_file, reread_gguf, write_gguf
from tunesmith.export.modelfile import INSTEAD, choose, parsed, tokens_of, written
from tunesmith.export.parity import Job, Reread

OLLAMA = "0.17.1"  # older ones read GGUF files out of bounds (CVE-2026-7482)
MODELFILE = "Modelfile"


def write_ollama(job: Job) -> None:
    run = job.run
    if not job.chats:
        raise InputError("the run has no conversation to see its template by", where="template", fix=INSTEAD)
    served = choose(run.saved / "tokenizer.json", run.renderer, [witness.messages for witness in job.chats])
    about = f"{run.weights.name}, trained in {run.name}\nneeds Ollama {OLLAMA} or newer"
    (job.folder / MODELFILE).write_text(written(served, model_file(job).name, about), encoding="utf-8")
    write_gguf(job)


def reread_ollama(job: Job) -> Reread:
    served = parsed((job.folder / MODELFILE).read_text(encoding="utf-8"))
    file, renderer = job.run.saved / "tokenizer.json", job.run.renderer
    rendered = [tokens_of(served.prompt(witness.messages), file, renderer) for witness in job.chats]
    return replace(reread_gguf(job), rendered=rendered)
