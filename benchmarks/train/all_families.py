"""Try every decoder and multimodal model that transformers has; write docs/results/all_families.md.

    python -m benchmarks.train.all_families [MODEL_TYPE ...]

Each type is built from its default config, made tiny (tests/helpers/transformers_configs.py), with
random weights. It is accepted if its config.json is, and if ours computes what transformers does:
three documents in one pack, their last tokens from the cache, against one document at a time, in
fp32 (session/family_proof.py). With names, those types are tried and printed.
"""

from __future__ import annotations

import sys
import tempfile
from datetime import date
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
)

ROOT = Path(__file__).parents[2]
sys.path.append(str(ROOT / "tests" / "helpers"))

from transformers_configs import list_whole_types, make_config  # noqa: E402
from tunesmith.core.errors import TunesmithError  # noqa: E402
from tunesmith.model.hub.spec import read_spec  # noqa: E402
from tunesmith.model.hub.text_class import LOAD_ERRORS, build_network, load_text_config  # noqa: E402
from tunesmith.session.family_proof import TOLERANCE, wrap_and_measure  # noqa: E402

PAGE = ROOT / "docs" / "results" / "all_families.md"
CLASS_NAMES = dict(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES) | MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES
HEADER = """\
# Every decoder of transformers {version}: accepted or refused, and why

{count} model types that transformers maps to a causal class or to one that answers to text and
images, each as a tiny random model of its default config, on {day}
(`python -m benchmarks.train.all_families`): **{accepted} accepted**. Accepted means: the folder is
taken, and with three documents in one pack, their last tokens from the cache, the logits are those
of transformers, which gets one document at a time. The same is computed, with your weights,
whenever a family is loaded that has no entry in [models](../reference/models.md); before training,
preflight looks closer. Of a multimodal model the text part is trained. "Not tried": the default
config cannot be made tiny; such a folder may still be taken. Of {num_bases} bases in use
(`BASES` in the script, a judgment), {accepted_bases} are accepted; granitemoehybrid,
not tried here, is measured in [families](families.md).

| `model_type` | | difference of logits, or why not |
|---|---|---|
"""
# bases that are fine-tuned much; the order of docs/reference/models.md, then others of 2026
BASES = """
llama qwen2 qwen3 qwen3_moe qwen3_5 qwen3_5_moe qwen3_next qwen3_vl qwen3_vl_moe qwen2_5_vl
qwen4_exp gemma3_text gemma3 gemma3n gemma4 gemma4_unified gpt_oss mistral mistral3 mistral4
mistral_large4 phi3 phi4_multimodal lfm2 lfm3 lfm2_vl smollm3 smolvlm granitemoehybrid glm4_moe
glm4_moe_lite glm4v_moe glm_moe_dsa glm5_next nemotron_h olmo3 olmo_hybrid falcon_h1 deepseek_v3
deepseek_v32 deepseek_v4 muse_glimmer minimax_m2 minimax_m3_vl hy_v3 exaone4_5 kimi_k25 step3p7
mimo_v2_flash mllama llama4 apertus1p5 minicpmv4_7 laguna
"""


def try_type(model_type: str) -> tuple[str, str]:
    """Return accepted, refused or not tried, and the difference or the reason."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        try:
            config: Any = make_config(model_type)
            config.architectures = [CLASS_NAMES[model_type]]
            config.save_pretrained(folder)
        except (*LOAD_ERRORS, RuntimeError) as error:
            return "not tried", describe(error, folder)
        try:
            read_spec(folder)
            network: Any = build_network(load_text_config(folder), dtype=torch.float32)
            fill(network)
            _, difference = wrap_and_measure(network, torch.float32)
        except TunesmithError as error:
            return "refused", describe(error, folder)
    if difference <= TOLERANCE["fp32"]:
        return "accepted", f"{difference:.0e}"
    return "refused", f"the logits of a pack differ by {difference:.0%}"


def fill(network: Any) -> None:
    """Give all weights random values of a size at which every layer counts."""
    generator = torch.Generator().manual_seed(0)
    for name, weight in network.named_parameters():
        noise = torch.randn(weight.shape, generator=generator)
        weight.data = weight.data + 0.3 * noise if "norm" in name else 0.2 * noise
    network.requires_grad_(False).eval()


def describe(error: Exception, folder: Path) -> str:
    """Return the message of an error in one line of a table."""
    message = error.message if isinstance(error, TunesmithError) else str(error)
    text = message.replace(str(folder), "").replace("|", "/")
    return " ".join(text.split())[:160]


def main() -> None:
    transformers.logging.set_verbosity_error()
    names = sys.argv[1:] or sorted(list_whole_types())
    rows: list[str] = []
    results: dict[str, str] = {}
    for model_type in names:
        results[model_type], reason = try_type(model_type)
        rows.append(f"| `{model_type}` | {results[model_type]} | {reason} |")
        print(rows[-1], flush=True)
    if sys.argv[1:]:
        return
    accepted = {name for name, result in results.items() if result == "accepted"}
    bases = BASES.split()
    header = HEADER.format(
        version=transformers.__version__,
        day=date.today(),
        count=len(names),
        accepted=len(accepted),
        num_bases=len(bases),
        accepted_bases=len(accepted.intersection(bases)),
    )
    PAGE.write_text(header + "\n".join(rows) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
