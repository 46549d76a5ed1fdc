"""A saved adapter that is not the trained one is refused by the layer that differs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tiny_models import LORA, make_tiny_model
from tunesmith.core.errors import GateError
from tunesmith.model.adapters import find_lora_layers
from tunesmith.model.save import check_saved_adapter, save_adapter


@pytest.mark.parametrize(
    "settings", [{}, {"use_rslora": True, "lora_r": 3}, {"use_dora": True}], ids=str
)
def test_an_adapter_is_read_back_as_it_was_trained(
    settings: dict[str, Any], tmp_path: Path
) -> None:
    network = make_tiny_model(**settings).network
    save_adapter(network, tmp_path, LORA | settings, Path("base"))
    check_saved_adapter(network, tmp_path)


@pytest.mark.parametrize("factor", [2.0, 0.5, 1.001, -1.0, 0.0])
def test_a_layer_of_another_scale_than_the_file_says_is_refused(
    factor: float, tmp_path: Path
) -> None:
    network = make_tiny_model().network
    save_adapter(network, tmp_path, LORA, Path("base"))
    path, layer = list(find_lora_layers(network).items())[-1]
    layer.scale *= factor
    with pytest.raises(GateError, match=rf"{path} was trained and measured .* scale of "):
        check_saved_adapter(network, tmp_path)


def test_a_tensor_of_other_values_is_refused(tmp_path: Path) -> None:
    network = make_tiny_model().network
    save_adapter(network, tmp_path, LORA, Path("base"))
    file = tmp_path / "adapter_model.safetensors"
    tensors = load_file(file)
    name = next(iter(tensors))
    tensors[name] = torch.nextafter(tensors[name], torch.tensor(9.0))
    save_file(tensors, file)
    with pytest.raises(GateError, match=r"has another .*lora_.* than the trained one"):
        check_saved_adapter(network, tmp_path)
    del tensors[name]
    save_file(tensors, file)
    with pytest.raises(GateError, match="the saved adapter differs in "):
        check_saved_adapter(network, tmp_path)
