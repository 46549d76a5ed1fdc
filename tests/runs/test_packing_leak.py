"""The example shows what its page says: plain packing leaks, tunesmith's does not."""

import runpy
from pathlib import Path

import pytest

EXAMPLE = Path(__file__).parents[2] / "examples" / "packing_leak.py"
MODEL_TYPES = (
    *("qwen3_5_text", "qwen3_next", "olmo_hybrid"),
    *("granitemoehybrid", "lfm2", "falcon_h1"),
)


@pytest.mark.promise
@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_plain_packing_leaks_and_ours_does_not(
    model_type: str, capsys: pytest.CaptureFixture[str]
) -> None:
    runpy.run_path(str(EXAMPLE))["main"]([model_type])
    _, line = capsys.readouterr().out.splitlines()
    name, plain, padding_free, ours = line.split()
    assert name == model_type
    assert float(plain) > 0.01, "the leak is real"
    assert padding_free == "ValueError", "no kernels on a CPU"
    assert float(ours) < 1e-5


def test_the_page_lists_every_family() -> None:
    assert set(runpy.run_path(str(EXAMPLE))["LAYERS"]) == set(MODEL_TYPES)
