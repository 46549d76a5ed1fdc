"""The files that start a server of another project with the adapters of finished runs.

    build_server_files("vllm", deployment) -> file name -> text

In: a Deployment. Out: the rendered files of server_templates/TARGET/: a start script and a compose
file, or a manifest, and `LIMITS.md`; with them `verify.sh`, since none of these engines runs here.
Left out: the adapters, and what an engine cannot hold (servers.py)."""

from __future__ import annotations

import shlex
from dataclasses import dataclass
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined

TEMPLATES = Path(__file__).parent / "server_templates"
MAX_LORAS_IN_BATCH = 16
VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
ENGINES = {  # target -> the name of its server in messages
    "vllm": "vLLM",
    "sglang": "SGLang",
    "llama-server": "llama-server",
    "kserve": "KServe",
    "ray": "Ray Serve LLM",
}


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
