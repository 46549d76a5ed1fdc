"""Machines to plan for: by name, by size, and the smallest that would do."""

from collections.abc import Callable

import pytest

from tunesmith.core.errors import InputError
from tunesmith.core.types import Machine
from tunesmith.plan.hardware_presets import (
    HARDWARE_PRESETS,
    Target,
    choose_machine,
    describe_target,
    list_machines,
    match_preset,
    parse_size,
    parse_target,
)
from tunesmith.plan.rules import RuleContext


@pytest.fixture
def here(make_context: Callable[..., RuleContext]) -> Machine:
    return make_context().machine


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("24GB", 24 * 10**9),
        ("16GiB", 2**34),
        ("1.5 tb", 1.5 * 10**12),
        ("800M", 800 * 10**6),
        ("2000000", 2 * 10**6),
    ],
)
def test_sizes_are_read_in_their_units(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize(
    "text",
    ["", "GB", "-24GB", "24 bananas", "24GBGB", "0GB", "1B", "1e9", "9" * 30, "nan", "24G\n1"],
)
def test_what_is_no_size_is_refused(text: str) -> None:
    with pytest.raises(InputError, match="is not a memory size") as refusal:
        parse_size(text)
    assert (refusal.value.where, "24GB" in refusal.value.fix) == ("--memory", True)


def test_a_target_is_an_empty_card_with_the_software_that_is_here(here: Machine) -> None:
    made = choose_machine(here, "H100", None)
    assert (made.device, made.available_bytes, made.has_bf16_matmul) == ("cuda", 80 * 10**9, True)
    assert (made.cores, made.disk_free_bytes) == (here.cores, here.disk_free_bytes)
    assert made.versions["bitsandbytes"] == "assumed"
    assert match_preset(made) == HARDWARE_PRESETS["h100"]
    assert (choose_machine(here, None, None), match_preset(here)) == (here, None)
    with pytest.raises(InputError, match="unknown machine: 'h1000'") as refusal:
        choose_machine(here, "h1000", None)
    assert "rtx4090" in refusal.value.fix


def test_fit_only_takes_away(here: Machine) -> None:
    assert choose_machine(here, None, "6GB").available_bytes == 6 * 10**9
    assert choose_machine(here, None, "600GB").available_bytes == here.available_bytes
    assert choose_machine(here, "a100_80gb", "24GB").available_bytes == 24 * 10**9


@pytest.mark.parametrize(
    ("text", "target"),
    [
        ("h100", Target("h100")),
        ("8xh100", Target("h100", 8)),
        ("8 x H100", Target("h100", 8)),
        ("2xRTX4090", Target("rtx4090", 2)),
        ("8xa100_80gb", Target("a100-80gb", 8)),
        ("4x8xh100", Target("h100", 8, 4)),
    ],
)
def test_targets_are_nodes_by_gpus_by_card(text: str, target: Target, here: Machine) -> None:
    assert parse_target(text) == target
    assert parse_target(str(target)) == target
    machine = choose_machine(here, text, None)
    assert (machine.num_gpus, machine.num_nodes) == (target.num_gpus, target.num_nodes)
    assert machine.memory_bytes == target.preset.memory_bytes, "of one GPU"
    assert describe_target(machine) == str(target)


@pytest.mark.parametrize(
    ("text", "fix"),
    [
        ("h100:8", "8xh100"),
        ("8 a100-80gb", "a100-80gb"),
        ("2x4x8xh100", "4x8xh100"),
        ("8xv100", "use one of l4, "),
        ("0xh100", "1 to 16 GPUs"),
        ("0x8xh100", "1 to 16 GPUs"),
        ("64xh100", "4x8xh100"),
        ("99999x8xh100", "4x8xh100"),
        ("", "use one of l4, "),
    ],
)
def test_other_ways_to_write_a_target_are_refused_with_the_form(text: str, fix: str) -> None:
    with pytest.raises(InputError) as refusal:
        parse_target(text)
    assert refusal.value.where == "--target"
    assert fix in refusal.value.fix


def test_cards_grow_and_have_links(here: Machine) -> None:
    """SXM cards have NVLink, of which every generation is faster; a network is slower."""
    sizes = [machine.memory_bytes for machine in list_machines(here).values()]
    assert sizes == sorted(sizes)
    for name, preset in HARDWARE_PRESETS.items():
        assert min(preset.flops / 100, preset.bandwidth) > 1e11, name
        assert preset.link > 4 * preset.network > 0, name
    links = {name: preset.link / 1e9 for name, preset in HARDWARE_PRESETS.items()}
    assert links["rtx4090"] == pytest.approx(22, rel=0.02)
    assert links["h100"] == pytest.approx(350, rel=0.02)
    assert links["l4"] < links["rtx5090"] < links["a100-80gb"] < links["h100"] < links["b200"]
