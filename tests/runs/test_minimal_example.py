"""The minimal example trains an adapter that PEFT loads, and refuses an unproven model."""

import runpy
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from tiny_runs import build_sum_rows, write_rows
from tunesmith.model.lm_head import LMHead

EXAMPLE = Path(__file__).parents[2] / "examples" / "minimal_sft.py"


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # PEFT's call
def test_it_trains_an_adapter_that_peft_loads(
    tiny_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = write_rows(tmp_path / "rows.jsonl", build_sum_rows(0, 24))
    runpy.run_path(str(EXAMPLE))["main"](tiny_folder, rows, tmp_path / "adapter")
    losses = [float(line.split()[-1]) for line in capsys.readouterr().out.splitlines()]
    assert len(losses) == 6
    assert losses[-1] < losses[0]
    base = AutoModelForCausalLM.from_pretrained(tiny_folder, dtype=torch.float32)
    tokens = torch.tensor([[5, 6, 7]])
    before = base(tokens).logits
    tuned = PeftModel.from_pretrained(base, tmp_path / "adapter")
    assert not torch.allclose(tuned(tokens).logits, before, atol=1e-3)


def test_a_wrong_forward_is_refused(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = write_rows(tmp_path / "rows.jsonl", build_sum_rows(0, 24))
    right = LMHead.compute_logits
    monkeypatch.setattr(LMHead, "compute_logits", lambda head, hidden: 1.1 * right(head, hidden))
    with pytest.raises(AssertionError, match="not close"):
        runpy.run_path(str(EXAMPLE))["main"](tiny_folder, rows, tmp_path / "adapter")
    assert not (tmp_path / "adapter").exists()
