"""What a run folder holds at its fullest: predicted by hand, and beside real ones."""

from collections.abc import Callable
from pathlib import Path

import pytest

from tiny_runs import build_sum_rows, make_tiny_recipe, plan_recipe, write_eval_files, write_rows
from tunesmith.core.events import CheckpointSaved
from tunesmith.core.run_dir import RunFolder
from tunesmith.plan.memory import Footprint, count_max_checkpoints, estimate_disk_bytes
from tunesmith.plan.rules import RuleContext
from tunesmith.train import run


def test_checkpoints_of_all_trained_weights_and_of_the_base_what_no_switch_brings_back(
    make_context: Callable[..., RuleContext],
) -> None:
    spec = make_context().model
    lora = Footprint("lora", "bf16", rank=16)
    assert estimate_disk_bytes(spec, lora, checkpoints=5) == 5 * 16 * 305_280 * 12
    full = Footprint("full", "bf16")
    assert estimate_disk_bytes(spec, full, checkpoints=2) == 2 * spec.parameters * 12
    states = estimate_disk_bytes(spec, full, checkpoints=0, cached_tokens=1000)
    assert states == 576 * 2 * (1000 + spec.vocab_size)
    states = estimate_disk_bytes(spec, lora, checkpoints=0, cached_tokens=1000)
    assert states == 576 * 2 * 1000, "its head is the base's"
    small = estimate_disk_bytes(spec, Footprint("full", "bf16", optim="adamw_8bit"), checkpoints=1)
    assert small == pytest.approx(spec.parameters * (4 + 2 * 260 / 256), abs=1)


@pytest.mark.parametrize(
    ("steps", "save_steps", "eval_steps", "held"),
    [
        (100, 10, None, 4),  # the newest two, a good one, one being written
        (100, 10, 10, 5),  # and the best one
        (100, 50, None, 2),  # of step 50, and of an interrupt
        (3, 9, 1, 3),  # the best so far after steps 1 and 2, and an interrupt's
        (1, 1, 1, 1),
    ],
)
def test_no_more_checkpoints_than_are_kept_nor_than_are_written(
    steps: int, save_steps: int, eval_steps: int | None, held: int
) -> None:
    assert count_max_checkpoints(steps=steps, save_steps=save_steps, eval_steps=eval_steps) == held


def test_a_run_folder_keeps_four_while_a_fifth_is_written(tmp_path: Path) -> None:
    held = 0
    with RunFolder.create(tmp_path) as folder:
        for step in range(1, 8):
            with folder.checkpoint(step, metadata={}, keep_steps={1, 2}) as target:
                (target / "state").write_bytes(b"0" * step)
                held = len(list(target.parent.iterdir()))
    assert held == count_max_checkpoints(steps=100, save_steps=1, eval_steps=1) == 5


@pytest.mark.promise
@pytest.mark.parametrize("method", ["lora", "full"])
def test_a_real_run_holds_no_more_than_its_plan_says(
    method: str, tiny_folder: Path, tmp_path: Path
) -> None:
    files = write_eval_files(tmp_path)
    data = str(write_rows(tmp_path / "train.jsonl", build_sum_rows(1, 16)))
    rank = {"lora_r": 64} if method == "lora" else {"lora_r": "auto"}
    wish = make_tiny_recipe(
        tiny_folder, tmp_path, data=data, method=method, **rank, save_steps=1, eval_steps=1, **files
    )
    plan, fullest, held = plan_recipe(wish), 0, 0
    for event in run.train(plan):
        if isinstance(event, CheckpointSaved):
            sizes = {
                path.parent: path.stat().st_size
                for path in Path(plan.config.output_dir).rglob("state.safetensors")
            }
            held, fullest = (
                max(held, len(sizes)),
                max(fullest, sum(sizes.values()) + max(sizes.values())),
            )
    assert held >= 2
    assert fullest <= plan.disk_bytes
