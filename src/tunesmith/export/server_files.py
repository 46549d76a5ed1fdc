"""The files that start a server of another project with the adapters of finished runs.

In: a Deployment. Out: file name -> text: a start script and a compose file, or a manifest, with
`verify.sh` and `LIMITS.md`. An engine is a function and a line in ENGINES. Flags and fields are
those of the version that LIMITS.md names; none of these engines runs here, so `verify.sh` is part
of every export. Left out: the adapters themselves, and what an engine cannot hold (servers.py)."""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import yaml

from tunesmith.core.types import Json

BASE_NAME = "base"  # the model without an adapter, in requests
TEMPLATE_FILE = "chat_template.jinja"
ADAPTERS_DIR = "adapters"
GENERATION_DIR = "generation"  # with the end tokens that were trained
MODEL_DIR = "model"  # with the GGUF of llama-server
MAX_LORAS_IN_BATCH = 16
VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
VLLM_IMAGE = "vllm/vllm-openai:v0.33.0"
SGLANG_IMAGE = "lmsysorg/sglang:v0.5.23"
GPU: Json = {"driver": "nvidia", "count": 1, "capabilities": ["gpu"]}


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


@dataclass(frozen=True)
class Engine:
    """A server of another project. `limits` are sentences for LIMITS.md."""

    title: str
    version: str
    build_files: Callable[[Deployment], dict[str, str]]
    limits: tuple[str, ...]
    port: int = 8000
    model_prefix: str = ""  # before the name of an adapter in requests


def build_server_files(engine: Engine, deployment: Deployment) -> dict[str, str]:
    """Return every text of an export by its name."""
    files = engine.build_files(deployment)
    files["verify.sh"] = _build_verify_script(engine, deployment)
    files["LIMITS.md"] = _build_limits(engine, deployment)
    return files


# ---------------------------------------------------------------- start scripts


def _build_vllm(deployment: Deployment) -> dict[str, str]:
    modules: list[str] = []
    for adapter in deployment.adapters:
        path = f"{ADAPTERS_DIR}/{adapter.name}"
        module = {"name": adapter.name, "path": path, "base_model_name": BASE_NAME}
        modules.append(shlex.quote(json.dumps(module)))
    options = [
        'vllm serve "$MODEL"',
        *([f"--revision {deployment.revision}"] if deployment.revision else []),
        f"--served-model-name {BASE_NAME}",
        f"--dtype {deployment.dtype}",
        '--max-model-len "$MAX_MODEL_LEN"',
        '--host "$HOST" --port "$PORT"',
        *([f"--chat-template {TEMPLATE_FILE}"] if deployment.has_template else []),
        f"--generation-config {GENERATION_DIR}",
        f"--enable-lora --max-lora-rank {deployment.vllm_rank}",
        f"--max-loras {deployment.max_loras} --max-cpu-loras {len(deployment.adapters)}",
        *(f"{'--lora-modules ' if i == 0 else '  '}{text}" for i, text in enumerate(modules)),
    ]
    script = _build_start_script(deployment, options, "VLLM_API_KEY is the key that clients send.")
    compose = _build_compose("vllm", VLLM_IMAGE, {"VLLM_API_KEY": "${VLLM_API_KEY:-}"}, GPU)
    return {"serve.sh": script, "compose.yaml": compose}


def _build_sglang(deployment: Deployment) -> dict[str, str]:
    paths = [f"{adapter.name}={ADAPTERS_DIR}/{adapter.name}" for adapter in deployment.adapters]
    options = [
        'python3 -m sglang.launch_server --model-path "$MODEL"',
        *([f"--revision {deployment.revision}"] if deployment.revision else []),
        f"--served-model-name {BASE_NAME}",
        f"--dtype {deployment.dtype}",
        '--context-length "$MAX_MODEL_LEN"',
        '--host "$HOST" --port "$PORT"',
        *([f"--chat-template {TEMPLATE_FILE}"] if deployment.has_template else []),
        f"--enable-lora --max-lora-rank {deployment.max_rank}",
        f"--max-loras-per-batch {deployment.max_loras}",
        *(f"{'--lora-paths ' if i == 0 else '  '}{path}" for i, path in enumerate(paths)),
        '${API_KEY:+--api-key "$API_KEY"}',
    ]
    script = _build_start_script(deployment, options, "API_KEY is the key that clients send.")
    compose = _build_compose("sglang", SGLANG_IMAGE, {"API_KEY": "${API_KEY:-}"}, GPU)
    return {"serve.sh": script, "compose.yaml": compose}


def _build_llama_server(deployment: Deployment) -> dict[str, str]:
    (adapter,) = deployment.adapters
    options = [
        f'"${{LLAMA_SERVER:-llama-server}}" --model {MODEL_DIR}/{deployment.model_file}',
        f"--alias {adapter.name}",
        '--ctx-size "$MAX_MODEL_LEN"',
        '--host "$HOST" --port "$PORT"',
        "--jinja",
    ]
    script = _build_start_script(
        deployment, options, "LLAMA_API_KEY is the key that clients send.", has_model=False
    )
    environment = {"LLAMA_API_KEY": "${LLAMA_API_KEY:-}", "LLAMA_SERVER": "/app/llama-server"}
    return {"serve.sh": script, "compose.yaml": _build_compose("llama", "", environment)}


def _build_start_script(
    deployment: Deployment, options: list[str], key_note: str, *, has_model: bool = True
) -> str:
    """Return a script whose settings are environment variables; it passes further flags on."""
    lines = ["#!/usr/bin/env bash", f"# {key_note}", "set -euo pipefail", 'cd "$(dirname "$0")"']
    if has_model and deployment.hub_name:
        lines.append(f"MODEL=${{MODEL:-{deployment.hub_name}}}")
    elif has_model:
        lines.append(f"MODEL=${{MODEL:?set it to the folder of {_strip_shell(deployment.base)}}}")
    lines += [
        "HOST=${HOST:-127.0.0.1}",
        "PORT=${PORT:-8000}",
        f"MAX_MODEL_LEN=${{MAX_MODEL_LEN:-{deployment.context_length}}}",
        "exec " + " \\\n  ".join([*options, '"$@"']),
    ]
    return "\n".join(lines) + "\n"


def _strip_shell(text: str) -> str:
    """Return the text without what a shell reads inside ${...:?...}."""
    return "".join(character for character in text if character.isalnum() or character in " ._/@-")


def _build_compose(service: str, image: str, environment: Json, device: Json | None = None) -> str:
    """Return a compose file that runs serve.sh. Without a default image, the variable is needed."""
    variable = f"{service.upper()}_IMAGE"
    fallback = f":-{image}" if image else ":?name the image and its version"
    definition: Json = {
        "image": f"${{{variable}{fallback}}}",
        "entrypoint": ["bash", "/export/serve.sh"],
        "environment": {"HOST": "0.0.0.0", "PORT": "8000", "MODEL": "${MODEL:-}", **environment},
        "ports": ["127.0.0.1:${PORT:-8000}:8000"],
        "volumes": [".:/export:ro", "models:/root/.cache/huggingface"],
        "security_opt": ["no-new-privileges:true"],
        "restart": "on-failure:3",
    }
    if device is not None:
        definition["deploy"] = {"resources": {"reservations": {"devices": [device]}}}
    return _dump_yaml({"services": {service: definition}, "volumes": {"models": {}}})


# ---------------------------------------------------------------- manifests


def _build_kserve(deployment: Deployment) -> dict[str, str]:
    first = f"/mnt/lora/{deployment.adapters[0].name}"
    arguments = [f"--max-model-len {deployment.context_length}", f"--dtype {deployment.dtype}"]
    if deployment.has_template:
        arguments.append(f"--chat-template {first}/{TEMPLATE_FILE}")
    arguments.append(f"--generation-config {first}")
    adapters = [
        {"name": adapter.name, "uri": f"pvc://tunesmith-adapters/{adapter.name}"}
        for adapter in deployment.adapters
    ]
    uri = f"hf://{deployment.hub_name}" if deployment.hub_name else "pvc://tunesmith-models/base"
    environment = {"name": "VLLM_ADDITIONAL_ARGS", "value": " ".join(arguments)}
    manifest: Json = {
        "apiVersion": "serving.kserve.io/v1alpha1",
        "kind": "LLMInferenceService",
        "metadata": {"name": "tunesmith"},
        "spec": {
            "model": {
                "uri": uri,
                "name": BASE_NAME,
                "lora": {
                    "maxRank": deployment.vllm_rank,
                    "maxAdapters": deployment.max_loras,
                    "maxCpuAdapters": len(deployment.adapters),
                    "adapters": adapters,
                },
            },
            "replicas": 1,
            "router": {"route": {}, "gateway": {}, "scheduler": {}},
            "template": {
                "containers": [
                    {
                        "name": "main",
                        "env": [environment],
                        "resources": {"limits": {"nvidia.com/gpu": "1"}},
                    }
                ]
            },
        },
    }
    return {"llminferenceservice.yaml": _dump_yaml(manifest)}


def _build_ray(deployment: Deployment) -> dict[str, str]:
    config: Json = {
        "model_loading_config": {
            "model_id": BASE_NAME,
            "model_source": deployment.hub_name or "MODEL",
        },
        "lora_config": {
            "dynamic_lora_loading_path": "s3://BUCKET/adapters",
            "max_num_adapters_per_replica": deployment.max_loras,
        },
        "engine_kwargs": {
            "dtype": deployment.dtype,
            "max_model_len": deployment.context_length,
            "enable_lora": True,
            "max_lora_rank": deployment.vllm_rank,
            "max_loras": deployment.max_loras,
        },
        "deployment_config": {"autoscaling_config": {"min_replicas": 1, "max_replicas": 1}},
    }
    if deployment.revision:
        config["engine_kwargs"]["revision"] = deployment.revision
    application = {
        "name": "tunesmith",
        "route_prefix": "/",
        "import_path": "ray.serve.llm:build_openai_app",
        "args": {"llm_configs": [config]},
    }
    return {"serve.yaml": _dump_yaml({"applications": [application]})}


def _dump_yaml(value: Any) -> str:
    return yaml.safe_dump(value, sort_keys=False, width=1000, allow_unicode=True)


# ---------------------------------------------------------------- beside every engine


def _build_verify_script(engine: Engine, deployment: Deployment) -> str:
    lines = [
        "#!/usr/bin/env bash",
        "# Asks the server the test rows of each run; exits with 4 unless it answers as they did.",
        "set -uo pipefail",
        f"URL=${{URL:-http://127.0.0.1:{engine.port}/v1}}",
        "status=0",
    ]
    for adapter in deployment.adapters:
        run = shlex.quote(adapter.run_path)
        model = f"{engine.model_prefix}{adapter.name}"
        lines.append(f'tunesmith verify {run} --url "$URL" --model {model} "$@" || status=$?')
    return "\n".join([*lines, 'exit "$status"', ""])


def _build_limits(engine: Engine, deployment: Deployment) -> str:
    ends = ", ".join(map(str, deployment.end_ids))
    lines = [
        f"# {engine.title}: limits",
        "",
        f"Written for {engine.version}, but not run with it: start the server, then run",
        "`bash verify.sh`, which asks it the test rows of each run.",
        "",
        f"- Base: {deployment.base}"
        + (f", revision {deployment.revision}" if deployment.revision else "")
        + f". Trained end tokens: {ends}.",
        *([] if deployment.hub_name or deployment.model_file else [f"- {LOCAL_BASE}"]),
        *(f"- {limit}" for limit in engine.limits),
        "",
    ]
    return "\n".join(lines)


LOCAL_BASE = (
    "The base is not on the hub: set MODEL to its folder, for compose to the path inside the "
    "container, where you mount it."
)
NO_TLS = "The server listens on 127.0.0.1 without TLS; put a gateway before it for anything else."
NEW_NAME = "For new weights use a new name: engines keep cached prompts by name."
SHARED_TEMPLATE = (
    "One chat template serves every adapter; runs with another template or other "
    "chat_template_kwargs need a server of their own."
)
NO_ADAPTER_KINDS = (
    "Not served by adapter: DoRA, new tokens, modules_to_save, adapters of experts, runs on a "
    "4-bit base. Export those with --to merged."
)

ENGINES: dict[str, Engine] = {
    "vllm": Engine(
        "vLLM",
        "vLLM 0.33",
        _build_vllm,
        (
            SHARED_TEMPLATE,
            NO_ADAPTER_KINDS,
            "--max-lora-rank takes 1, 8, 16, 32, 64, 128, 256, 320 or 512; memory is reserved for "
            "that rank in every slot.",
            "--generation-config replaces the sampling defaults of the base; requests name their "
            "own temperature.",
            NEW_NAME,
            NO_TLS,
        ),
    ),
    "sglang": Engine(
        "SGLang",
        "SGLang 0.5.23",
        _build_sglang,
        (
            SHARED_TEMPLATE,
            NO_ADAPTER_KINDS,
            "End tokens are those of the base's files. Where a trained one is missing there, "
            "requests name it in `stop_token_ids`; the check `end` of verify.sh tells.",
            NEW_NAME,
            NO_TLS,
        ),
    ),
    "llama-server": Engine(
        "llama-server",
        "llama.cpp as vendored by llama-cpp-python 0.3.36",
        _build_llama_server,
        (
            "One run per server: the model of a request chooses no adapter there, so the run is "
            "exported as one merged GGUF.",
            "A given text is not scored (no echo), so verify.sh does not measure probability.",
            NO_TLS,
        ),
    ),
    "kserve": Engine(
        "KServe",
        "KServe 0.21, LLMInferenceService v1alpha1, whose image is vLLM",
        _build_kserve,
        (
            "Copy the folders of adapters/ into a PersistentVolumeClaim `tunesmith-adapters`. "
            "Template and end tokens are read from the first adapter's folder.",
            "The image is that of the cluster's LLMInferenceServiceConfig; pin it there.",
            SHARED_TEMPLATE,
            NO_ADAPTER_KINDS,
            "Set URL for verify.sh to the address of the route.",
        ),
    ),
    "ray": Engine(
        "Ray Serve LLM",
        "Ray 2.60",
        _build_ray,
        (
            "Copy the folders of adapters/ to object storage and name it in "
            "`dynamic_lora_loading_path`; a local folder is not taken.",
            f"Requests name an adapter as {BASE_NAME}:NAME.",
            "Chat template and end tokens are those of the base's files; the checks `prompt` and "
            "`end` of verify.sh tell whether they are the run's.",
            NO_ADAPTER_KINDS,
        ),
        model_prefix=f"{BASE_NAME}:",
    ),
}
