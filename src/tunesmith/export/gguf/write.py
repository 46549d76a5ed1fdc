"""The exports for llama.cpp and what is built on it: a merged model, or the adapter alone, as one GGUF file.

In: a finished run. Out: `model-TYPE.gguf`, or `adapter.gguf`, which is loaded beside a GGUF of the same base. Read back
by transformers' own GGUF reader, with tokenizer and template rebuilt from the file alone.
"""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory

from tunesmith.export.gguf.metadata import architecture, vocabulary
from tunesmith.export.gguf.weights import read_adapter, write_adapter, write_model
from tunesmith.export.parity import Job, Reread
from tunesmith.model.gguf.convert import write_settings
from tunesmith.model.gguf.reader import read_gguf
from tunesmith.model.gguf.tokenizer import special_id
from tunesmith.model.merge import add_to_network
from tunesmith.model.reference_load import config_of, load_gguf, stock_prompts

ADAPTER = "adapter.gguf"
BASE_NAME = "general.base_model.0.name"


def model_file(job: Job) -> Path:
    return job.folder / f"model-{job.kind}.gguf"


def write_gguf(job: Job) -> None:
    run, spec = job.run, job.run.weights
    sizes, factors = architecture(config_of(spec.path), spec)
    name = {"general.name": f"{Path(spec.name).name} {run.name}"}
    metadata = name | sizes | vocabulary(run.saved, run.renderer, spec.vocab_size)
    write_model(model_file(job), spec, run.changes, metadata, factors, job.kind, job.narrow)


def reread_gguf(job: Job) -> Reread:
    """Weights by transformers' reader; tokenizer, template and end tokens from the file alone."""
    file = model_file(job)
    with TemporaryDirectory() as scratch:
        settings, parsed = Path(scratch), read_gguf(file)
        write_settings(parsed, settings)
        rendered = stock_prompts(
            settings, [(witness.messages, witness.tools) for witness in job.chats], job.run.recipe.chat_template_kwargs
        )
        ends = (special_id(parsed, name) for name in ("eos", "eot", "eom"))
        end_ids = tuple(dict.fromkeys(index for index in ends if index is not None))
        return Reread(load_gguf(file, settings, job.run.device), rendered, end_ids)


def write_lora(job: Job) -> None:
    run = job.run
    architecture(config_of(run.weights.path), run.weights)  # refuses what no GGUF could hold
    metadata = {"general.name": run.name, "general.base_model.count": 1}
    write_adapter(job.folder / ADAPTER, run.weights, run.loras, {**metadata, BASE_NAME: run.weights.name})


def reread_lora(job: Job) -> Reread:
    """The adapter of the file on the stock base; it holds no tokenizer, so prompts and ends are the run's own."""
    network = job.run.base_network()
    add_to_network(network, read_adapter(job.folder / ADAPTER, job.run.weights))
    return Reread(network, [witness.rendered for witness in job.chats], job.run.renderer.end_ids)
