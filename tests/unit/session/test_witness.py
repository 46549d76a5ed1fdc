"""An adapter folder proves that it is applied to its base; each spoiled case is refused by name."""

import dataclasses
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from tiny_models import LORA
from tiny_runs import save_model_folder
from tunesmith.core.errors import InputError
from tunesmith.data.chat_template.renderer import Renderer
from tunesmith.model.adapter_bank import AdapterBank
from tunesmith.model.adapters import add_lora, get_trainable_parameters
from tunesmith.model.causal_lm import PackedCausalLM, load_network, wrap_model
from tunesmith.model.hub.adapter_config import read_adapter
from tunesmith.model.hub.validate import read_model_json
from tunesmith.model.save import load_adapter, save_adapter, save_serving_files
from tunesmith.session.identity import (
    Provenance,
    build_provenance,
    check_provenance,
    hash_weight_files,
    read_provenance,
    write_provenance,
)
from tunesmith.session.witness import (
    DISTINCT,
    WitnessCheck,
    check_witness,
    judge_witness,
    record_answers,
    score_answer,
)

Tensors = dict[str, Tensor]
NOW = datetime(2026, 3, 4)
DAY = "2026-03-04"
VARIABLES = {"tone": "brief"}
TEMPLATE = (
    "{% for m in messages %}{{ '<|start|>' + m['role'] + tone + '\n' + m['content'] + '<|end|>' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|start|>assistant\n' }}{% endif %}"
)


def save_run_adapter(path: Path, base: Path, *, size: float = 0.3, **settings: Any) -> Path:
    """Save an adapter with everything that a run writes into its folder."""
    merged = LORA | settings
    model = make_model(base, merged)
    generator = torch.Generator().manual_seed(1)
    for name, parameter in get_trainable_parameters(model.network).items():
        if "magnitude" not in name:
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.data = (size if "lora_B" in name else 1) * noise
    renderer = Renderer.from_folder(base, now=NOW, variables=VARIABLES)
    save_adapter(model.network, path, merged, base)
    sources = {name: template.source for name, template in renderer.templates.items()}
    save_serving_files(path, base, templates=sources, end_ids=renderer.end_ids)
    provenance = build_provenance(
        "tiny",
        hash_weight_files(base),
        read_model_json(base / "config.json"),
        renderer,
        DAY,
        schema={"type": "object"},
        weights_sha256=read_adapter(path, base).sha256,
        golden_answers=record_answers(model, renderer),
    )
    write_provenance(path, provenance)
    return path


def make_model(base: Path, settings: dict[str, Any] | None) -> PackedCausalLM:
    network = load_network(base, torch.float32)
    if settings:
        add_lora(network, settings)
    return wrap_model(network, torch.float32)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = save_model_folder(tmp_path_factory.mktemp("witness") / "base")
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    return folder


@pytest.fixture(scope="module")
def saved(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter folder; tests copy it before they change it."""
    return save_run_adapter(tmp_path_factory.mktemp("adapter") / "adapter", base)


def read_record(folder: Path) -> Provenance:
    provenance = read_provenance(folder)
    assert provenance is not None
    return provenance


def check_in_bank(folder: Path, base: Path) -> WitnessCheck:
    """Open a folder alone, as a server does, beside another adapter."""
    provenance = read_record(folder)
    variables = provenance.variables
    renderer = Renderer.from_folder(folder, now=NOW, variables=variables)
    check_provenance(folder, base, renderer, DAY)
    bank = AdapterBank(model := make_model(base, None))
    adapter = read_adapter(folder, base)
    bank.load("one", adapter)
    return check_witness(model, adapter, provenance, bank=bank, key="one")


def respoil(source: Path, target: Path, base: Path, change: Callable[[Tensors], Tensors]) -> Path:
    """Copy an adapter with changed weights and a record that names their hash, so that the answers
    alone can tell."""
    target.mkdir()
    for file in source.iterdir():
        if file.is_file():
            (target / file.name).write_bytes(file.read_bytes())
    weights = target / "adapter_model.safetensors"
    save_file(change(load_file(source / weights.name)), weights, metadata={"format": "pt"})
    changed = dataclasses.replace(
        read_record(source), weights_sha256=read_adapter(target, base).sha256
    )
    write_provenance(target, changed)
    return target


def swap_layers(tensors: Tensors) -> Tensors:
    """Exchange A and B of a projection between two layers: names and shapes stay right."""
    swapped = dict(tensors)
    for part in ("lora_A", "lora_B"):
        first, second = (
            f"base_model.model.model.layers.{layer}.mlp.down_proj.{part}.weight" for layer in (0, 1)
        )
        swapped[first], swapped[second] = tensors[second], tensors[first]
    return swapped


def zero_b(tensors: Tensors) -> Tensors:
    return {n: t.zero_() if "lora_B" in n else t for n, t in tensors.items()}


# ---------------------------------------------------------------- the record


def test_the_record_of_an_adapter(saved: Path) -> None:
    provenance = read_record(saved)
    assert provenance.variables == VARIABLES
    assert provenance.schema == {"type": "object"}
    assert len(provenance.golden_answers) == 5
    for golden in provenance.golden_answers:
        assert 1 <= len(golden.answer_ids) <= 16
        assert len(golden.logprobs) == len(golden.base_logprobs) == len(golden.answer_ids)
        assert all(logprob <= 0 for logprob in golden.logprobs)
        assert golden.logprobs != golden.base_logprobs


def test_scores_are_the_log_probabilities_of_the_tokens(base: Path) -> None:
    model = make_model(base, None)
    prompt, answer = (7, 8, 9), (30, 31, 257)
    with torch.no_grad():
        network = load_network(base, torch.float32)
        logits = network(input_ids=torch.tensor([[*prompt, *answer]]), use_cache=False).logits[0]
    expected = logits.log_softmax(-1)[[2, 3, 4], list(answer)]
    scores = torch.tensor(score_answer(model, prompt, answer))
    torch.testing.assert_close(scores, expected, rtol=0, atol=2e-5)


# ---------------------------------------------------------------- what it proves


@pytest.mark.parametrize(
    "settings",
    [{}, {"use_dora": True}, {"lora_r": 16, "use_rslora": True}],
    ids=["lora", "dora", "rslora"],
)
def test_a_folder_alone_proves_itself_in_a_bank(
    settings: dict[str, Any], base: Path, tmp_path: Path
) -> None:
    check = check_in_bank(save_run_adapter(tmp_path / "adapter", base, **settings), base)
    assert check.status == "proven", check.evidence


def test_a_model_with_the_adapter_alone(saved: Path, base: Path) -> None:
    model = make_model(base, LORA)
    adapter = read_adapter(saved, base)
    assert check_witness(model, adapter, read_record(saved)).status == "refused"  # not applied
    load_adapter(model.network, saved / "adapter_model.safetensors")
    assert check_witness(model, adapter, read_record(saved)).status == "proven"


def test_without_a_record_nothing_is_proven(saved: Path, base: Path) -> None:
    old = dataclasses.replace(read_record(saved), golden_answers=(), weights_sha256="")
    adapter = read_adapter(saved, base)
    for provenance in (None, old):
        check = check_witness(make_model(base, None), adapter, provenance)
        assert check == WitnessCheck("unproven", "there are no recorded answers to check it by")


def test_a_hardly_trained_adapter_says_so(base: Path, tmp_path: Path) -> None:
    check = check_in_bank(save_run_adapter(tmp_path / "adapter", base, size=1e-4), base)
    assert check.status == "indistinct"
    assert "cannot be told apart" in check.evidence


# ---------------------------------------------------------------- spoiled cases


@pytest.mark.parametrize("change", [swap_layers, zero_b])
def test_other_weights_are_refused_by_their_answers(
    change: Callable[[Tensors], Tensors], saved: Path, base: Path, tmp_path: Path
) -> None:
    check = check_in_bank(respoil(saved, tmp_path / "spoiled", base, change), base)
    assert check.status == "refused"
    assert "recorded tokens" in check.evidence


def test_other_weights_are_refused_by_their_hash(saved: Path, base: Path, tmp_path: Path) -> None:
    spoiled = respoil(saved, tmp_path / "spoiled", base, lambda tensors: tensors)
    write_provenance(spoiled, dataclasses.replace(read_record(saved), weights_sha256="0" * 64))
    check = check_in_bank(spoiled, base)
    assert check.status == "refused"
    assert "sha256 000000000000" in check.evidence


def test_a_base_with_the_same_shapes_is_refused(saved: Path, tmp_path: Path) -> None:
    other = save_model_folder(tmp_path / "other", seed=1)
    (other / "chat_template.jinja").write_text(TEMPLATE)
    with pytest.raises(InputError, match=r"base weights model\.safetensors: sha256"):
        check_in_bank(saved, other)
    model = make_model(other, None)
    bank = AdapterBank(model)
    adapter = read_adapter(saved, other)
    bank.load("one", adapter)
    check = check_witness(model, adapter, read_record(saved), bank=bank, key="one")
    assert check.status == "refused"


def test_another_key_of_the_bank_is_refused(saved: Path, base: Path, tmp_path: Path) -> None:
    model = make_model(base, None)
    bank = AdapterBank(model)
    adapter = read_adapter(saved, base)
    other = save_run_adapter(tmp_path / "other", base, size=0.2)
    bank.load("one", adapter)
    bank.load("other", read_adapter(other, base))
    for key in ("", "other"):
        check = check_witness(model, adapter, read_record(saved), bank=bank, key=key)
        assert check.status == "refused"


def test_nan_is_refused(saved: Path) -> None:
    golden_answers = read_record(saved).golden_answers
    measured = [golden.logprobs for golden in golden_answers]
    assert judge_witness(golden_answers, measured).status == "proven"
    measured[2] = (float("nan"), *measured[2][1:])
    check = judge_witness(golden_answers, measured)
    assert check == WitnessCheck("refused", "a log-probability is NaN or infinite")


def test_another_template_is_refused(saved: Path, base: Path) -> None:
    check_provenance(saved, base, Renderer.from_folder(base, now=NOW, variables=VARIABLES), DAY)
    template = base.parent / "other.jinja"
    template.write_text(TEMPLATE.replace("assistant", "model"))
    renderer = Renderer.from_folder(base, template=template, now=NOW, variables=VARIABLES)
    with pytest.raises(InputError, match="chat template default: sha256"):
        check_provenance(saved, base, renderer, DAY)


@pytest.mark.parametrize("variables", [{"tone": "long"}, {}])
def test_other_variables_are_refused(variables: dict[str, Any], saved: Path, base: Path) -> None:
    renderer = Renderer.from_folder(base, now=NOW, variables=variables)
    with pytest.raises(InputError) as caught:
        check_provenance(saved, base, renderer, DAY)
    problems = caught.value.message.split("\n  ")[1:]
    assert problems[0] == f"chat_template_kwargs: {VARIABLES} -> {variables}"
    assert not any("special tokens" in problem for problem in problems)


def test_renamed_modules_are_refused(saved: Path, base: Path, tmp_path: Path) -> None:
    def rename(tensors: Tensors) -> Tensors:
        return {name.replace("layers.1", "layers.7"): t for name, t in tensors.items()}

    with pytest.raises(InputError, match="not a linear layer of the base's decoder"):
        respoil(saved, tmp_path / "renamed", base, rename)


def test_small_changes_of_the_mean_are_rounding(saved: Path) -> None:
    golden_answers = read_record(saved).golden_answers
    for change, status in ((0.015, "proven"), (0.03, "refused"), (-DISTINCT, "refused")):
        measured = [[value + change for value in golden.logprobs] for golden in golden_answers]
        assert judge_witness(golden_answers, measured).status == status
