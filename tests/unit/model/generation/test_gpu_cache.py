"""The KV cache of a GPU takes at most half of the memory that is free there."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tunesmith.core.types import GenerationRequest
from tunesmith.model.generation import engine
from tunesmith.model.generation.engine import compute_max_batch_rows

TOKEN_BYTES = 2**17  # of a model like Qwen3-8B


def count_rows(device: str) -> int:
    model: Any = SimpleNamespace(
        device=torch.device(device), cache_bytes_per_token=TOKEN_BYTES, state_bytes_per_row=0
    )
    request = GenerationRequest(tuple(range(1000)), max_new_tokens=24)
    return compute_max_batch_rows(model, [request])


@pytest.mark.parametrize(("free_bytes", "rows"), [(2**40, 64), (2**33, 32), (2**30, 4), (2**20, 1)])
def test_rows_follow_the_free_memory(
    monkeypatch: pytest.MonkeyPatch, free_bytes: int, rows: int
) -> None:
    """1,024 tokens of a row take 128 MiB; 8 GiB are the most that a cache takes."""
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (free_bytes, 2**40))
    assert count_rows("cuda") == rows


def test_what_torch_has_freed_counts_as_free(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    monkeypatch.setattr(engine, "release_memory", lambda: calls.append("released"))
    monkeypatch.setattr(
        engine, "read_free_gpu_bytes", lambda: 2**30 if calls else pytest.fail("too early")
    )
    assert count_rows("cuda") == 4
    assert count_rows("cpu") == 8, "1 GiB of main memory, whatever is free"
