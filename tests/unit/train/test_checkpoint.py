"""A checkpoint holds the weights, the moments and the position, and gives them back bit by bit."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from damages import FORGED_VALUES, REMOVED, cut
from tunesmith.core.errors import GateError, InputError
from tunesmith.model.save import STATE_FILE
from tunesmith.train.checkpoint import TRAINER_STATE_FILE, read_state, write_state
from tunesmith.train.optimizer import get_moments, make_optimizer, step_optimizer

POSITION = {"step": 7, "ratio_changes": [[3, 0.25]]}
Parameters = dict[str, nn.Parameter]


def make_parameters(seed: int = 0) -> Parameters:
    generator = torch.Generator().manual_seed(seed)
    return {
        "layer.a": nn.Parameter(torch.randn(4, 3, generator=generator)),
        "layer.b": nn.Parameter(torch.randn(5, generator=generator)),
    }


def update(parameters: Parameters, optimizer: torch.optim.Optimizer, count: int = 3) -> None:
    for number in range(count):
        for parameter in parameters.values():
            parameter.grad = torch.cos(parameter.detach() + number)
        step_optimizer(optimizer, 0.01)


def make_trained(count: int = 3, seed: int = 0) -> tuple[Parameters, torch.optim.Optimizer]:
    parameters = make_parameters(seed)
    optimizer = make_optimizer(parameters.values(), weight_decay=0.1)
    update(parameters, optimizer, count)
    return parameters, optimizer


def test_a_restored_run_goes_on_as_if_it_had_not_stopped(tmp_path: Path) -> None:
    parameters, optimizer = make_trained()
    write_state(tmp_path, parameters, optimizer, POSITION)
    others, other_optimizer = make_trained(count=1, seed=1)
    position = read_state(tmp_path, others, other_optimizer)
    assert position == POSITION | {"updates": 3}
    for name, parameter in parameters.items():
        assert torch.equal(parameter, others[name])
        moments = get_moments(optimizer, parameter)
        restored = get_moments(other_optimizer, others[name])
        assert moments.keys() == restored.keys() == {"exp_avg", "exp_avg_sq"}
        assert all(torch.equal(moments[key], restored[key]) for key in moments)
        assert int(other_optimizer.state[others[name]]["step"]) == 3
    update(parameters, optimizer)
    update(others, other_optimizer)
    assert all(torch.equal(parameters[name], others[name]) for name in parameters)


def test_a_file_names_each_tensor(tmp_path: Path) -> None:
    parameters, optimizer = make_trained()
    write_state(tmp_path, parameters, optimizer, POSITION)
    expected: set[str] = set()
    for name in parameters:
        expected |= {f"weight.{name}", f"exp_avg.{name}", f"exp_avg_sq.{name}"}
    assert set(load_file(tmp_path / STATE_FILE)) == expected
    assert json.loads((tmp_path / TRAINER_STATE_FILE).read_text()) == POSITION | {"updates": 3}


def test_a_state_before_the_first_update_forgets_the_moments(tmp_path: Path) -> None:
    parameters, optimizer = make_trained(count=0)
    write_state(tmp_path, parameters, optimizer, POSITION)
    others, other_optimizer = make_trained(count=2, seed=1)
    assert read_state(tmp_path, others, other_optimizer)["updates"] == 0
    for name, parameter in others.items():
        assert torch.equal(parameter, parameters[name])
        assert get_moments(other_optimizer, parameter) == {}


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_weights_and_moments_that_are_not_finite_are_refused(bad: float, tmp_path: Path) -> None:
    parameters, optimizer = make_trained()
    optimizer.state[parameters["layer.b"]]["exp_avg"][2] = bad
    with pytest.raises(GateError):
        write_state(tmp_path, parameters, optimizer, POSITION)


def test_the_state_of_another_model_is_refused(tmp_path: Path) -> None:
    parameters, optimizer = make_trained()
    write_state(tmp_path, parameters, optimizer, POSITION)
    others = {"layer.c": parameters["layer.a"]}
    with pytest.raises(InputError):
        read_state(tmp_path, others, make_optimizer(others.values(), weight_decay=0.0))


@pytest.mark.parametrize("damage", ["missing moment", "other shape", "cut", "no file"])
def test_a_state_whose_tensors_are_damaged_is_refused(damage: str, tmp_path: Path) -> None:
    parameters, optimizer = make_trained()
    write_state(tmp_path, parameters, optimizer, POSITION)
    file = tmp_path / STATE_FILE
    tensors = {name: tensor.clone() for name, tensor in load_file(file).items()}
    if damage == "missing moment":
        del tensors["exp_avg_sq.layer.a"]
    tensors["exp_avg.layer.b"] = torch.zeros(5 if damage != "other shape" else 6)
    save_file(tensors, file)
    if damage == "cut":
        cut(file)
    if damage == "no file":
        file.unlink()
    with pytest.raises(InputError):
        read_state(tmp_path, *make_trained(seed=1))


def test_a_weight_that_was_never_updated_has_no_moments_again(tmp_path: Path) -> None:
    parameters, optimizer = make_trained()
    del optimizer.state[parameters["layer.b"]]
    write_state(tmp_path, parameters, optimizer, POSITION)
    others, other_optimizer = make_trained(seed=1)
    read_state(tmp_path, others, other_optimizer)
    assert get_moments(other_optimizer, others["layer.b"]) == {}
    update(parameters, optimizer)
    update(others, other_optimizer)
    assert all(torch.equal(parameters[name], others[name]) for name in parameters)


@pytest.mark.parametrize("value", FORGED_VALUES)
def test_a_number_of_updates_of_another_type_is_refused(value: str, tmp_path: Path) -> None:
    parameters, optimizer = make_trained()
    write_state(tmp_path, parameters, optimizer, POSITION)
    file = tmp_path / TRAINER_STATE_FILE
    position = json.loads(file.read_text()) | {"updates": FORGED_VALUES[value]}
    file.write_text(json.dumps({k: v for k, v in position.items() if v is not REMOVED}))
    with pytest.raises(InputError) as caught:
        read_state(tmp_path, *make_trained(seed=1))
    assert TRAINER_STATE_FILE in caught.value.where
    assert "restore the checkpoint" in caught.value.fix
    for content in (b"", b"null", b"[]", b"{}", b"\xff", b"3"):
        file.write_bytes(content)
        with pytest.raises(InputError):
            read_state(tmp_path, *make_trained(seed=1))


@pytest.mark.parametrize("scales", [(), ("absmax1",), ("absmax2",)])
def test_moments_in_8_bits_without_their_scales_are_refused(
    scales: tuple[str, ...], tmp_path: Path
) -> None:
    parameters, optimizer = make_trained()
    write_state(tmp_path, parameters, optimizer, POSITION)
    tensors = load_file(tmp_path / STATE_FILE)
    for number, name in ((1, "exp_avg"), (2, "exp_avg_sq")):
        moment = tensors.pop(f"{name}.layer.a")
        tensors[f"state{number}.layer.a"] = torch.zeros(moment.shape, dtype=torch.uint8)
    tensors |= {f"{scale}.layer.a": torch.ones(1) for scale in scales}
    save_file(tensors, tmp_path / STATE_FILE)
    with pytest.raises(InputError, match=r"the moments of layer\.a are incomplete"):
        read_state(tmp_path, *make_trained())
