"""Exports for llama.cpp and engines built on it: a merged model, or an adapter, as a GGUF file.

In: an ExportJob. Out: `model-TYPE.gguf`, or `adapter.gguf`, which is loaded with a GGUF of the same
base. Read back by transformers' own GGUF reader, with tokenizer and template from the file alone.
"""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory

from tunesmith.export.gguf.metadata import build_architecture, build_vocabulary
from tunesmith.export.gguf.weights import read_adapter, write_adapter, write_model
from tunesmith.export.parity import ExportJob, ReloadedExport
from tunesmith.model.gguf.convert import write_settings
from tunesmith.model.gguf.reader import read_gguf
from tunesmith.model.gguf.tokenizer import find_special_id
from tunesmith.model.merge import merge_into_network
from tunesmith.model.reference_load import encode_stock_prompts, load_config_dict, load_gguf
from tunesmith.model.save import select_linear_loras

ADAPTER_FILE = "adapter.gguf"
BASE_NAME_KEY = "general.base_model.0.name"


def get_model_path(job: ExportJob) -> Path:
    return job.folder / f"model-{job.export_type}.gguf"


def write_gguf(job: ExportJob) -> None:
    run = job.run
    spec = run.model_spec
    sizes, rope_factors = build_architecture(load_config_dict(spec.path), spec)
    metadata = {
        "general.name": f"{Path(spec.name).name} {run.name}",
        **sizes,
        **build_vocabulary(run.saved_dir, run.renderer, spec.vocab_size),
    }
    write_model(
        get_model_path(job),
        spec,
        run.changes,
        metadata,
        rope_factors,
        job.export_type,
        job.dequantized_paths,
    )


def reload_gguf(job: ExportJob) -> ReloadedExport:
    """Load weights by transformers' reader; tokenizer, template and end tokens from the file."""
    file = get_model_path(job)
    with TemporaryDirectory() as temp_dir:
        settings_dir = Path(temp_dir)
        gguf_file = read_gguf(file)
        write_settings(gguf_file, settings_dir)
        chats = [(example.messages, example.tools) for example in job.chat_examples]
        rendered_ids = encode_stock_prompts(
            settings_dir, chats, job.run.recipe.chat_template_kwargs
        )
        special_ids = [find_special_id(gguf_file, name) for name in ("eos", "eot", "eom")]
        end_ids = tuple(dict.fromkeys(index for index in special_ids if index is not None))
        return ReloadedExport(load_gguf(file, settings_dir), rendered_ids, end_ids)


def write_lora(job: ExportJob) -> None:
    run = job.run
    # Refuses a model that no GGUF can express.
    build_architecture(load_config_dict(run.model_spec.path), run.model_spec)
    metadata = {
        "general.name": run.name,
        "general.base_model.count": 1,
        BASE_NAME_KEY: run.model_spec.name,
    }
    write_adapter(
        job.folder / ADAPTER_FILE, run.model_spec, select_linear_loras(run.loras), metadata
    )


def reload_lora(job: ExportJob) -> ReloadedExport:
    """Merge the file's adapter into the stock base. It has no tokenizer, so prompts and end tokens
    are the run's own."""
    network = job.run.load_base_network()
    merge_into_network(network, read_adapter(job.folder / ADAPTER_FILE, job.run.model_spec))
    rendered_ids = [example.rendered_ids for example in job.chat_examples]
    return ReloadedExport(network, rendered_ids, job.run.renderer.end_ids)
