"""Rows of different adapters in one forward equal each adapter alone, and PEFT."""

import contextlib
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import Tensor

from tiny_models import (
    LORA,
    VOCABULARY,
    collate_documents,
    make_tiny_document,
    make_tiny_model,
    make_tiny_network,
)
from tunesmith.core.errors import InputError
from tunesmith.data.collate import collate
from tunesmith.data.packing import pack_step
from tunesmith.model.adapter_bank import AdapterBank, RowRange
from tunesmith.model.adapters import scaled_adapter
from tunesmith.model.bank_linear import BankLinear
from tunesmith.model.causal_lm import PackedCausalLM
from tunesmith.model.hub.adapter_config import AdapterFolder, read_adapter
from tunesmith.model.kernels import lora
from tunesmith.model.paged_cache import CacheRow, PagedKVCache
from tunesmith.model.save import load_adapter, save_adapter

pytestmark = pytest.mark.filterwarnings(
    "ignore:.is_gradient_checkpointing. is deprecated:FutureWarning"
)
# heads with and without bias, clamps in place, stock layers, states, shared experts
FAMILIES = ("llama", "qwen2", "gemma3", "olmo", "phi3", "lfm2", "qwen3_5", "deepseek_v3")
NUM_BLOCKS = 16
SETTINGS: dict[str, dict[str, Any]] = {
    "r4": {},
    "r8": {"lora_r": 8, "lora_alpha": 20, "seed": 4},
    "r64": {"lora_r": 64, "lora_alpha": 32, "seed": 5, "lora_target_modules": "attention"},
    "rslora": {"lora_r": 16, "use_rslora": True, "seed": 6},
    "dora": {"use_dora": True, "seed": 7},
}
# each adapter, the base, and one adapter at two scales
VARIANTS = [(key, 1.0) for key in SETTINGS] + [("", 1.0), ("r8", 0.5), ("dora", 0.5), ("r4", 0.0)]


def get_settings(family: str, key: str) -> dict[str, Any]:
    """Return the settings of an adapter; PEFT has no DoRA for the dense MLPs of this family."""
    if family == "deepseek_v3" and key == "dora":
        return SETTINGS[key] | {"lora_target_modules": "attention"}
    return SETTINGS[key]


def save_base(family: str, folder: Path) -> Path:
    make_tiny_network(family).save_pretrained(folder)
    return folder


def save_tiny_adapter(family: str, folder: Path, base: Path, **settings: Any) -> AdapterFolder:
    """Write an adapter whose B and magnitudes are not those of its start."""
    model = make_tiny_model(family, **settings)
    save_adapter(model.network, folder, LORA | settings, base)
    return read_adapter(folder, base)


def make_adapted_model(family: str, folder: AdapterFolder, **settings: Any) -> PackedCausalLM:
    """Return a model with one adapter, as a run has it."""
    model = make_tiny_model(family, **settings)
    load_adapter(model.network, folder.weights_path)
    return model


def make_prompts(num_prompts: int) -> list[list[int]]:
    lengths = (7, 13, 3, 19, 11, 1, 9, 16, 5)
    generator = torch.Generator().manual_seed(8)
    return [
        torch.randint(3, VOCABULARY, (lengths[i % len(lengths)],), generator=generator).tolist()
        for i in range(num_prompts)
    ]


def generate_greedily(
    model: PackedCausalLM,
    prompts: Sequence[Sequence[int]],
    bank: AdapterBank | None = None,
    variants: Sequence[tuple[str, float]] = (),
) -> tuple[list[list[int]], Tensor]:
    """Return five tokens of each row, and the logits [rows, 5, V] they were chosen from."""
    cache = PagedKVCache(len(prompts), NUM_BLOCKS)
    cache_rows = [cache.add_row() for _ in prompts]
    tokens: list[list[int]] = [[] for _ in prompts]
    all_logits: list[Tensor] = []
    for step in range(5):
        lengths = [len(prompt) if step == 0 else 1 for prompt in prompts]
        rows: list[RowRange] = []
        for (key, scale), length in zip(variants, lengths, strict=bool(variants)):
            rows.append((key, scale, length))
        with bank.use_rows(rows) if bank else contextlib.nullcontext():
            hidden_BH = run_step(model, prompts, tokens, cache, cache_rows)
        with torch.no_grad():
            logits_BV = model.head.compute_logits(hidden_BH)
        all_logits.append(logits_BV)
        for row, token in zip(tokens, logits_BV.argmax(-1).tolist(), strict=True):
            row.append(token)
    return tokens, torch.stack(all_logits, 1)


def run_step(
    model: PackedCausalLM,
    prompts: Sequence[Sequence[int]],
    tokens: list[list[int]],
    cache: PagedKVCache,
    rows: list[CacheRow],
) -> Tensor:
    if not tokens[0]:
        return model.prefill(rows, prompts, cache)
    return model.decode_step(rows, [row[-1] for row in tokens], cache)


def prefill(model: PackedCausalLM, prompts: Sequence[Sequence[int]]) -> Tensor:
    cache = PagedKVCache(len(prompts), NUM_BLOCKS)
    return model.prefill([cache.add_row() for _ in prompts], prompts, cache)


def relative(ours: Tensor, theirs: Tensor) -> float:
    return float((ours - theirs).norm() / theirs.norm())


# ---------------------------------------------------------------- equal to each alone


@pytest.mark.parametrize("family", FAMILIES)
def test_a_mixed_batch_equals_each_adapter_alone(family: str, tmp_path: Path) -> None:
    base = save_base(family, tmp_path / "base")
    mixed = make_tiny_model(family, method=None)
    bank = AdapterBank(mixed)
    folders: dict[str, AdapterFolder] = {}
    for key in SETTINGS:
        settings = get_settings(family, key)
        folders[key] = save_tiny_adapter(family, tmp_path / key, base, **settings)
        assert bank.load(key, folders[key]) > 0
    prompts = make_prompts(len(VARIANTS))
    tokens, logits = generate_greedily(mixed, prompts, bank, VARIANTS)
    base_tokens, base_logits = generate_greedily(make_tiny_model(family, method=None), prompts)
    for row, (key, scale) in enumerate(VARIANTS):
        if not key:
            assert tokens[row] == base_tokens[row]
            assert relative(logits[row], base_logits[row]) < 1e-5
            continue
        alone = make_adapted_model(family, folders[key], **get_settings(family, key))
        with scaled_adapter(alone.network, scale):
            alone_tokens, alone_logits = generate_greedily(alone, [prompts[row]])
        assert tokens[row] == alone_tokens[0], key
        assert relative(logits[row], alone_logits[0]) < 1e-5, key
        if scale:
            assert relative(logits[row, 0], base_logits[row, 0]) > 1e-2, key


@pytest.mark.skipif(not lora.is_available(), reason="needs a C compiler and AVX512-BF16")
@pytest.mark.parametrize("family", ["llama-64", "qwen2", "phi3", "qwen3_5"])
def test_in_bf16_the_kernel_gives_what_torch_gives(family: str, tmp_path: Path) -> None:
    base = save_base(family, tmp_path / "base")
    bank = AdapterBank(model := make_tiny_model(family, torch.bfloat16, method=None))
    for key in SETTINGS:
        bank.load(key, save_tiny_adapter(family, tmp_path / key, base, **SETTINGS[key]))
    linears = [module for module in model.network.modules() if isinstance(module, BankLinear)]
    assert all(linear.has_kernel for linear in linears)
    prompts = make_prompts(len(VARIANTS))
    rows = [(*variant, len(prompt)) for variant, prompt in zip(VARIANTS, prompts, strict=True)]
    with bank.use_rows(rows):
        ours = prefill(model, prompts).float()
    wide = make_tiny_model(family, method=None)
    bank = AdapterBank(wide)
    for key in SETTINGS:
        bank.load(key, read_adapter(tmp_path / key, base))
    with bank.use_rows(rows):
        theirs = prefill(wide, prompts)
    plain = prefill(make_tiny_model(family, method=None), prompts)
    for row, (key, scale) in enumerate(VARIANTS):
        assert relative(ours[row], theirs[row]) < 0.08
        if key and scale:
            assert relative(plain[row], theirs[row]) > 0.15


def test_layers_with_a_rank_and_a_scale_of_their_own(tmp_path: Path) -> None:
    base = save_base("llama", tmp_path / "base")
    settings = {
        "rank_pattern": {"model.layers.0.self_attn.q_proj": 13},
        "alpha_pattern": {"model.layers.1.mlp.down_proj": 30},
    }
    folder = save_tiny_adapter("llama", tmp_path / "pattern", base, **settings)
    mixed = make_tiny_model(method=None)
    bank = AdapterBank(mixed)
    bank.load("pattern", folder)
    prompts = make_prompts(2)
    _, logits = generate_greedily(mixed, prompts, bank, [("pattern", 1.0), ("", 1.0)])
    alone = make_adapted_model("llama", folder, **settings)
    assert relative(logits[0], generate_greedily(alone, prompts[:1])[1][0]) < 1e-5


@pytest.mark.parametrize("family", ["llama", "qwen3_5"])
def test_a_pack_of_documents_with_different_adapters(family: str, tmp_path: Path) -> None:
    """Likelihoods: the last layer computes the positions with a target only."""
    base = save_base(family, tmp_path / "base")
    mixed = make_tiny_model(family, method=None)
    bank = AdapterBank(mixed)
    for key in ("r8", "dora"):
        bank.load(key, save_tiny_adapter(family, tmp_path / key, base, **SETTINGS[key]))
    keys = {9: "r8", 14: "", 21: "dora", 6: "r8"}  # by the length of the document
    (pack,) = pack_step([make_tiny_document(n, first_target=3) for n in keys], 10**6)
    batch = collate(pack)
    with bank.use_rows([(keys[n], 1.0, n) for n in batch.layout.lengths]), torch.no_grad():
        hidden_SH = mixed.compute_hidden(batch)
    for index, document in enumerate(pack.documents):
        length = batch.layout.lengths[index]
        with bank.use_rows([(keys[length], 1.0, length)]), torch.no_grad():
            alone_SH = mixed.compute_hidden(collate_documents([document]))
        assert relative(hidden_SH[batch.document_S == index], alone_SH) < 1e-5


# ---------------------------------------------------------------- equal to PEFT


@pytest.mark.filterwarnings("ignore:Already found a .peft_config. attribute:UserWarning")
@pytest.mark.parametrize("family", ["llama", "gemma3", "phi3"])
def test_a_mixed_batch_equals_peft(family: str, tmp_path: Path) -> None:
    """PEFT refuses DoRA in a mixed batch; its DoRA alone is in test_dora.py."""
    base = save_base(family, tmp_path / "base")
    mixed = make_tiny_model(family, method=None)
    bank = AdapterBank(mixed)
    peft_model: Any = None
    keys = ["r4", "", "r64", "rslora", "r4", "r8"]
    for key in sorted({*keys} - {""}):
        folder = save_tiny_adapter(family, tmp_path / key, base, **SETTINGS[key])
        bank.load(key, folder)
        if peft_model is None:
            stock = make_tiny_network(family)
            peft_model = PeftModel.from_pretrained(stock, str(folder.path), adapter_name=key)
        else:
            peft_model.load_adapter(str(folder.path), adapter_name=key)
    prompts = [prompt[:7] for prompt in make_prompts(30) if len(prompt) >= 7][: len(keys)]
    tokens, logits = generate_greedily(mixed, prompts, bank, [(key, 1.0) for key in keys])
    context = torch.tensor(prompts)
    for step in range(5):
        with torch.no_grad():
            theirs = peft_model(
                input_ids=context,
                adapter_names=[key or "__base__" for key in keys],
                use_cache=False,
            ).logits[:, -1]
        assert relative(logits[:, step], theirs) < 1e-5
        assert [row[step] for row in tokens] == theirs.argmax(-1).tolist()
        context = torch.cat((context, theirs.argmax(-1)[:, None]), 1)


# ---------------------------------------------------------------- loading and removing


def test_without_rows_the_model_is_the_base(tmp_path: Path) -> None:
    base = save_base("llama", tmp_path / "base")
    model = make_tiny_model(method=None)
    prompts = make_prompts(3)
    _, before = generate_greedily(model, prompts)
    bank = AdapterBank(model)
    bank.load("r4", save_tiny_adapter("llama", tmp_path / "r4", base))
    _, after = generate_greedily(model, prompts)
    torch.testing.assert_close(after, before, rtol=0, atol=0)


def test_a_replaced_adapter_answers_from_the_next_rows_on(tmp_path: Path) -> None:
    base = save_base("llama", tmp_path / "base")
    model = make_tiny_model(method=None)
    bank = AdapterBank(model)
    old = save_tiny_adapter("llama", tmp_path / "old", base)
    new = save_tiny_adapter("llama", tmp_path / "new", base, **SETTINGS["r8"])
    bank.load("a", old)
    bank.load("b", new)
    prompt = make_prompts(1)
    _, old_logits = generate_greedily(model, prompt, bank, [("a", 1.0)])
    _, new_logits = generate_greedily(model, prompt, bank, [("b", 1.0)])
    with bank.use_rows([("a", 1.0, len(prompt[0]))]), torch.no_grad():
        loader = threading.Thread(target=bank.load, args=("a", new))
        loader.start()
        loader.join()
        during = model.head.compute_logits(prefill(model, prompt))
    _, after = generate_greedily(model, prompt, bank, [("a", 1.0)])
    assert torch.equal(during, old_logits[:, 0])
    assert torch.equal(after, new_logits)
    assert not torch.equal(old_logits, new_logits)
    bank.remove("a")
    with pytest.raises(InputError, match="no adapter a is loaded"), bank.use_rows([("a", 1.0, 1)]):
        pass


def test_an_error_inside_leaves_the_base(tmp_path: Path) -> None:
    base = save_base("llama", tmp_path / "base")
    model = make_tiny_model(method=None)
    bank = AdapterBank(model)
    bank.load("r4", save_tiny_adapter("llama", tmp_path / "r4", base))
    prompts = make_prompts(2)
    _, before = generate_greedily(model, prompts)
    rows = [("r4", 1.0, len(prompt)) for prompt in [*prompts, prompts[0]]]
    with pytest.raises(AssertionError, match="other rows"), bank.use_rows(rows):
        prefill(model, prompts)
    assert torch.equal(generate_greedily(model, prompts)[1], before)


def test_adapters_that_change_more_than_linears_are_refused(tmp_path: Path) -> None:
    base = save_base("llama", tmp_path / "base")
    bank = AdapterBank(make_tiny_model(method=None))
    saved = {"modules_to_save": ["norm"]}
    folder = save_tiny_adapter("llama", tmp_path / "saved", base, **saved)
    with pytest.raises(InputError, match="modules trained in full"):
        bank.load("saved", folder)
    experts_base = save_base("qwen3_moe", tmp_path / "experts-base")
    targets = {"lora_target_modules": ("attention", "experts")}
    experts = save_tiny_adapter("qwen3_moe", tmp_path / "experts", experts_base, **targets)
    bank = AdapterBank(make_tiny_model("qwen3_moe", method=None))
    with pytest.raises(InputError, match="an adapter of experts"):
        bank.load("experts", experts)
    assert bank.keys == ()


def test_nan_is_refused(tmp_path: Path) -> None:
    base = save_base("llama", tmp_path / "base")
    path = save_tiny_adapter("llama", tmp_path / "r4", base).weights_path
    content = bytearray(path.read_bytes())
    content[-4:] = b"\x00\x00\xc0\x7f"
    path.write_bytes(content)
    with pytest.raises(InputError, match="NaN"):
        AdapterBank(make_tiny_model(method=None)).load("r4", read_adapter(path.parent, base))


def test_a_file_that_changes_is_refused_or_not_seen(tmp_path: Path) -> None:
    """Written over in place, as a copy does it: the bank has mapped nothing."""
    base = save_base("llama", tmp_path / "base")
    model = make_tiny_model(method=None)
    bank = AdapterBank(model)
    folder = save_tiny_adapter("llama", tmp_path / "r4", base)
    other = save_tiny_adapter("llama", tmp_path / "other", base, seed=9)
    bank.load("r4", folder)
    prompts = make_prompts(1)
    _, before = generate_greedily(model, prompts, bank, [("r4", 1.0)])
    folder.weights_path.write_bytes(other.weights_path.read_bytes())
    _, after = generate_greedily(model, prompts, bank, [("r4", 1.0)])
    assert torch.equal(after, before)
    with pytest.raises(InputError, match="is not the recorded file: its sha256 differs"):
        bank.load("r4", folder)
