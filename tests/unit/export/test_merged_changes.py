"""An export whose merge lost a part of the adapter fails, however little that moves the answers."""

import shutil
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from tiny_export import judge_export, make_export_job, save_run
from tunesmith.core.errors import GateError
from tunesmith.export.export import TARGETS
from tunesmith.export.parity import (
    MAX_ROWS,
    LiveOutputs,
    check_changes,
    compare_outputs,
    compute_export_outputs,
    compute_live_outputs,
    sample_changes,
)
from tunesmith.model.experts import ExpertLoraTensors
from tunesmith.model.merge import WeightDelta, merge_into_network
from tunesmith.model.save import LoraTensors, ModuleTensor, TokenRowTensors

Weights = dict[str, Tensor]


@pytest.fixture(scope="module")
def little_trained(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_run(tmp_path_factory.mktemp("run"), tiny_llama, learning_rate=0.002)


@pytest.fixture(scope="module")
def live(little_trained: Path, tmp_path_factory: pytest.TempPathFactory) -> LiveOutputs:
    return compute_live_outputs(make_export_job(little_trained, tmp_path_factory.mktemp("live")))


def lose(base: Weights, merged: Weights, part: str, share: float = 0.0) -> Weights:
    """Return the merged weights, with a share of the change where the name has `part`."""
    return {
        name: torch.lerp(base[name].float(), merged[name].float(), share).to(merged[name])
        if part in name
        else merged[name]
        for name in merged
    }


def swap_layers(base: Weights, merged: Weights) -> Weights:
    """Return the weights with the change of each layer in the other."""
    swapped = dict(merged)
    for name in merged:
        other = name.replace(".layers.0.", ".layers.@.").replace(".layers.1.", ".layers.0.")
        other = other.replace("@", "1")
        if other != name:
            swapped[name] = base[name] + merged[other] - base[other]
    return swapped


LOSSES: dict[str, Callable[[Weights, Weights], Weights]] = {
    "one matrix": lambda base, merged: lose(base, merged, "layers.1.mlp.gate_proj"),
    "one module": lambda base, merged: lose(base, merged, "o_proj"),
    "one layer": lambda base, merged: lose(base, merged, "layers.1."),
    "half of a matrix": lambda base, merged: lose(base, merged, "layers.0.mlp.up_proj", 0.5),
    "half of all": lambda base, merged: lose(base, merged, "", 0.5),
    "twice the change of a matrix": lambda base, merged: lose(base, merged, "1.mlp.down_proj", 2),
    "the layers swapped": swap_layers,
}


@pytest.mark.promise
@pytest.mark.parametrize("name", LOSSES)
def test_a_merge_that_lost_a_part_of_the_adapter_fails(
    name: str, little_trained: Path, live: LiveOutputs, tmp_path: Path
) -> None:
    job = make_export_job(little_trained, tmp_path)
    TARGETS["merged"][""].write(job)
    judge_export(job, "merged", live)
    file = job.folder / "model.safetensors"
    base = load_file(job.run.model_spec.path / "model.safetensors")
    damaged = LOSSES[name](base, load_file(file))
    save_file(
        {key: tensor.contiguous() for key, tensor in damaged.items()},
        file,
        metadata={"format": "pt"},
    )
    with pytest.raises(GateError, match="of the parameters that training changed lack a part"):
        judge_export(job, "merged", live)


@pytest.fixture(scope="module")
def barely_trained(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose change is far below the last bit of the weights."""
    return save_run(tmp_path_factory.mktemp("run"), tiny_llama, learning_rate=1e-5)


FORMS = [("merged", ""), ("peft", ""), *(("gguf", kind) for kind in TARGETS["gguf"])]


@pytest.mark.promise
@pytest.mark.parametrize(("target", "kind"), FORMS)
def test_a_sound_export_of_a_tiny_change_is_complete(
    target: str, kind: str, barely_trained: Path, tmp_path: Path
) -> None:
    """Of larger changes, the exports of test_targets.py are."""
    job = make_export_job(barely_trained, tmp_path, kind)
    live = compute_live_outputs(job)
    form = TARGETS[target][kind]
    form.write(job)
    reread = form.reload(job)
    parity = compare_outputs(job, live, compute_export_outputs(job, reread), reread)
    assert len(live.changes) == 14
    assert parity.lost == ()


@pytest.mark.parametrize("factor", [0, 1e-30, 1e-12])
def test_a_q8_export_loses_nothing_of_an_adapter_that_changes_nothing(
    factor: float, little_trained: Path, live: LiveOutputs, tmp_path: Path
) -> None:
    job = make_export_job(little_trained, tmp_path, "q8_0")
    name = next(path for path in job.run.loras if path.endswith("layers.1.mlp.up_proj"))
    lora = job.run.loras[name]
    assert isinstance(lora, LoraTensors)
    loras = {**job.run.loras, name: replace(lora, b_OR=factor * lora.b_OR)}
    job = replace(job, run=replace(job.run, loras=loras))
    form = TARGETS["gguf"]["q8_0"]
    form.write(job)
    samples = compute_live_outputs(job).changes
    assert check_changes(samples, form.reload(job).network).lost == ()
    assert {sample.key for sample in live.changes} - {sample.key for sample in samples} == {name}


class Layers(nn.Module):
    """A linear, a stack of experts, an embedding and a norm."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.linear = nn.Linear(32, 48)
        self.mlp = nn.Module()
        self.mlp.experts = nn.Module()
        self.mlp.experts.is_transposed = False
        self.mlp.experts.down_proj = nn.Parameter(torch.randn(6, 40, 24, generator=generator))
        self.embedding = nn.Embedding(50, 32)
        self.norm = nn.LayerNorm(32)


def make_changes() -> Mapping[str, WeightDelta]:
    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))

    return {
        "linear": LoraTensors(draw(2, 32), 0.01 * draw(48, 2), 2.0),
        "mlp.experts": ExpertLoraTensors(draw(6, 2, 24), 0.01 * draw(6, 40, 2), 2.0),
        "embedding": TokenRowTensors(45, draw(5, 32)),
        "norm": ModuleTensor("norm.weight", draw(32)),
    }


def make_dora() -> Mapping[str, WeightDelta]:
    lora = make_changes()["linear"]
    assert isinstance(lora, LoraTensors)
    return {"linear": LoraTensors(lora.a_RI, lora.b_OR, 2.0, torch.linspace(0.5, 2, 48))}


@pytest.mark.parametrize("changes", [make_changes(), make_dora()], ids=["all kinds", "dora"])
def test_each_kind_of_change_is_there_or_lost(changes: Mapping[str, WeightDelta]) -> None:
    torch.manual_seed(0)
    network = Layers().requires_grad_(False)
    samples = sample_changes(network, changes, None)
    assert all(len(sample.rows_K) <= MAX_ROWS for sample in samples)
    assert {lost.key for lost in check_changes(samples, network).lost} == set(changes)
    merge_into_network(network, changes)  # type: ignore[arg-type]
    assert check_changes(samples, network).lost == ()


@pytest.mark.parametrize("is_lost", [False, True])
def test_square_matrices_are_read_as_the_module_stores_them(is_lost: bool) -> None:
    """gpt-oss multiplies by [I, O]; here both sizes are equal."""
    torch.manual_seed(0)
    network = Layers().requires_grad_(False)
    experts = network.mlp.experts
    experts.is_transposed = True
    experts.down_proj = nn.Parameter(torch.randn(6, 24, 24), requires_grad=False)
    delta = ExpertLoraTensors(torch.randn(6, 2, 24), torch.randn(6, 24, 2), 0.1)
    samples = sample_changes(network, {"mlp.experts": delta}, None)
    for expert in range(6):
        change_OI = 0.1 * delta.b_EOR[expert] @ delta.a_ERI[expert]
        experts.down_proj[expert] += change_OI if is_lost else change_OI.t()
    lost = check_changes(samples, network).lost
    assert [item.key for item in lost] == ["mlp.experts"] * is_lost


@pytest.mark.parametrize("factor", [0, 1e-30, 1e-12])
@pytest.mark.parametrize("dtype", [torch.float16, None])
def test_nothing_is_lost_of_a_change_that_cannot_be_seen(
    factor: float, dtype: torch.dtype | None
) -> None:
    """An expert that no token chose, or a new token's row without a gradient, is as in the base;
    rounding to 8 bits changes it."""
    torch.manual_seed(0)
    network = Layers().requires_grad_(False)
    changes = dict(make_changes())
    lora, experts = changes["linear"], changes["mlp.experts"]
    assert isinstance(lora, LoraTensors)
    assert isinstance(experts, ExpertLoraTensors)
    changes["linear"] = replace(lora, b_OR=factor * lora.b_OR)
    chosen = torch.tensor([1, 1, 0, 1, 1, 1])[:, None, None]
    changes["mlp.experts"] = replace(
        experts, b_EOR=torch.where(chosen == 1, experts.b_EOR, factor * experts.b_EOR)
    )
    changes["embedding"] = TokenRowTensors(45, network.embedding.weight[45:] * (1 + factor))
    changes["norm"] = ModuleTensor("norm.weight", network.norm.weight + factor)
    samples = sample_changes(network, changes, dtype)
    base = {name: parameter.clone() for name, parameter in network.named_parameters()}
    merge_into_network(network, changes)  # type: ignore[arg-type]
    for parameter in network.parameters():
        round_to_steps(parameter)
    assert check_changes(samples, network).lost == ()
    for name, parameter in network.named_parameters():
        parameter.copy_(base[name])
        round_to_steps(parameter)
    assert [lost.key for lost in check_changes(samples, network).lost] == ["mlp.experts"]


def round_to_steps(weight: Tensor) -> None:
    """Round to 8 bits in place."""
    step = float(weight.abs().max()) / 127
    weight.copy_((weight / step).round() * step)


@pytest.mark.parametrize("is_lost", [False, True])
def test_eight_bits_hide_no_loss(is_lost: bool) -> None:
    """Rounding to 8 bits is ten times the change of a value here."""
    torch.manual_seed(0)
    network = nn.Module()
    network.linear = nn.Linear(1024, 256, bias=False).requires_grad_(False)
    weight = network.linear.weight
    step = float(weight.abs().max()) / 127
    lora = LoraTensors(torch.randn(4, 1024), torch.randn(256, 4), 0.05 * step)
    samples = sample_changes(network, {"linear": lora}, torch.float16)
    if not is_lost:
        merge_into_network(network, {"linear": lora})  # type: ignore[arg-type]
    round_to_steps(weight)
    lost = check_changes(samples, network).lost
    assert [item.key for item in lost] == ["linear"] * is_lost


@pytest.mark.parametrize(("factor", "unchecked"), [(1e-2, 0), (1e-6, 1)])
def test_a_change_that_eight_bits_hide_is_counted(factor: float, unchecked: int) -> None:
    torch.manual_seed(0)
    network = Layers().requires_grad_(False)
    lora = LoraTensors(torch.randn(2, 32), factor * torch.randn(48, 2), 1.0)
    samples = sample_changes(network, {"linear": lora}, None)
    merge_into_network(network, {"linear": lora})  # type: ignore[arg-type]
    round_to_steps(network.linear.weight)
    check = check_changes(samples, network)
    assert (check.lost, check.changed, check.unchecked) == ((), 1, unchecked)


def test_a_change_that_16_bits_leave_nothing_of_is_counted() -> None:
    torch.manual_seed(0)
    network = Layers().requires_grad_(False)
    lora = LoraTensors(torch.randn(2, 32), 1e-7 * torch.randn(48, 2), 1.0)
    network.linear.weight.copy_(network.linear.weight.bfloat16())
    samples = sample_changes(network, {"linear": lora}, torch.bfloat16)
    merge_into_network(network, {"linear": lora})  # type: ignore[arg-type]
    network.linear.weight.copy_(network.linear.weight.bfloat16())
    assert check_changes(samples, network).unchecked == 1


@pytest.mark.parametrize(("target", "kind"), [("merged", ""), ("gguf", "q8_0"), ("gguf", "bf16")])
def test_a_fully_trained_model_that_lost_its_training_fails(
    target: str, kind: str, fully_trained: Path, tmp_path: Path
) -> None:
    job = make_export_job(fully_trained, tmp_path / "job", kind)
    live = compute_live_outputs(job)
    TARGETS[target][kind].write(job)
    judge_export(job, target, live)
    lost = make_export_job(fully_trained, tmp_path / "lost", kind)
    weights = lost.run.base_dir / "model.safetensors"
    saved_dir = shutil.copytree(lost.run.saved_dir, tmp_path / "saved")
    shutil.copy(weights, saved_dir)
    spec = replace(lost.run.model_spec, path=saved_dir)
    lost = replace(lost, run=replace(lost.run, saved_dir=saved_dir, model_spec=spec))
    TARGETS[target][kind].write(lost)
    with pytest.raises(GateError, match="it loses what training changed"):
        judge_export(lost, target, live)


@pytest.mark.parametrize("share", [0.0, 0.5, 0.9, 0.97, 1.03, 1.1, 2.0])
def test_a_share_of_a_change_is_measured_on_rows_from_end_to_end(share: float) -> None:
    """A share off by less than 5% is none that a merge loses."""
    torch.manual_seed(0)
    network = Layers().requires_grad_(False)
    changes = make_changes()
    samples = sample_changes(network, changes, None)
    rows = {(sample.key, sample.expert): sample.rows_K.tolist() for sample in samples}
    assert rows["linear", None] == [round(row) for row in torch.linspace(0, 47, 16).tolist()]
    assert [expert for key, expert in rows if key == "mlp.experts"] == [0, 2, 3, 5]
    assert rows["embedding", None] == [45, 46, 47, 48, 49]
    base = {name: parameter.clone() for name, parameter in network.named_parameters()}
    merge_into_network(network, changes)  # type: ignore[arg-type]
    for name, parameter in network.named_parameters():
        parameter.copy_(torch.lerp(base[name], parameter, share))
    check = check_changes(samples, network)
    assert (check.changed, check.unchecked) == (4, 0)
    is_lost = abs(share - 1) > 0.05
    assert [lost.key for lost in check.lost] == list(changes) * is_lost
    assert [lost.share for lost in check.lost] == pytest.approx([share] * 4 * is_lost, abs=1e-3)
