"""Machines to plan for: by name, by size, and the smallest that would do."""

from collections.abc import Callable

import pytest

from tunesmith.core.errors import InputError
from tunesmith.core.types import Machine
from tunesmith.plan.hardware_presets import (
    HARDWARE_PRESETS,
    choose_machine,
    list_machines,
    match_preset,
    parse_size,
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


def test_every_row_of_the_table_has_its_source_and_they_grow(here: Machine) -> None:
    assert all(
        target.source and target.flops > 1e13 and target.bandwidth > 1e11
        for target in HARDWARE_PRESETS.values()
    )
    sizes = [machine.memory_bytes for machine in list_machines(here).values()]
    assert sizes == sorted(sizes)
