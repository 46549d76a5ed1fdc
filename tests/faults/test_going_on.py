"""What a run goes on from: a checkpoint that can be trusted, and what it stood on when it began."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from tiny_runs import (
    build_sum_rows,
    make_tiny_recipe,
    plan_recipe,
    read_adapter_bytes,
    run_until_saved,
    save_model_folder,
    select_steps,
    train,
    write_eval_files,
    write_rows,
)
from tunesmith.core.errors import InputError
from tunesmith.core.events import CheckResult, Event, TrainStep
from tunesmith.core.json_io import read_json
from tunesmith.core.sealed_json import read_sealed_json
from tunesmith.data.sampler import StepSampler
from tunesmith.recipe.schema import Recipe
from tunesmith.train import run

# ---------------------------------------------------------------- a flipped byte


@pytest.fixture(scope="module")
def broken_off(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, bytes]:
    """A run that was left with checkpoints of steps 1 and 2, and the adapter of one that was not.
    Not to be changed."""
    folder = tmp_path_factory.mktemp("broken-off")
    straight = make_tiny_recipe(tiny_folder, folder / "straight", save_steps=1, lora_dropout=0.1)
    train(straight)
    run_until_saved(
        run.train(
            plan_recipe(make_tiny_recipe(tiny_folder, folder, save_steps=1, lora_dropout=0.1))
        ),
        step=2,
    )
    return folder / "run", read_adapter_bytes(straight)


@pytest.fixture
def copied(broken_off: tuple[Path, bytes], tmp_path: Path) -> Path:
    return shutil.copytree(broken_off[0], tmp_path / "run")


def flip(file: Path, location: float) -> None:
    """One bit of the byte that stands at this share of the file."""
    content = bytearray(file.read_bytes())
    content[int(location * (len(content) - 1))] ^= 1
    file.write_bytes(content)


def verdicts(events: list[Event], kind: str) -> list[str]:
    return [
        event.evidence for event in events if isinstance(event, CheckResult) and event.kind == kind
    ]


@pytest.mark.parametrize(
    ("name", "location"),
    [
        ("state.safetensors", 0.02),  # the header
        ("state.safetensors", 0.3),
        ("state.safetensors", 0.999),
        ("trainer_state.json", 0.5),
        ("manifest.json", 0.0),
        ("manifest.json", 0.5),
        ("manifest.json", 0.999),
    ],
)
def test_fault_24_a_flipped_byte_is_seen_and_the_checkpoint_before_is_taken(
    name: str, location: float, copied: Path, broken_off: tuple[Path, bytes]
) -> None:
    flip(copied / "checkpoints" / "step-2" / name, location)
    with pytest.raises(
        InputError, match=r"step-2: manifest\.json is missing or broken|step-2: .* was changed"
    ):
        next(run.resume(copied, checkpoint=2))
    events = list(run.resume(copied))
    (warning,) = verdicts(events, "checkpoint")
    assert warning.startswith("skipped checkpoints/step-2: ")
    assert verdicts(events, "resume") == ["from checkpoints/step-1"]
    assert [step.step for step in select_steps(events)] == [2, 3]
    assert (copied / "adapter" / "adapter_model.safetensors").read_bytes() == broken_off[1]


def test_fault_24_weights_and_both_moments_are_in_the_file_that_is_checked(
    broken_off: tuple[Path, bytes],
) -> None:
    header = (broken_off[0] / "checkpoints" / "step-2" / "state.safetensors").read_bytes()[8:]
    assert all(
        f'"{part}.model.layers.0'.encode() in header for part in ("weight", "exp_avg", "exp_avg_sq")
    )


def test_an_older_checkpoint_can_be_named(copied: Path, broken_off: tuple[Path, bytes]) -> None:
    with pytest.raises(
        InputError, match=r"no checkpoint of step 3\n  fix: use one of these steps: 1, 2"
    ):
        next(run.resume(copied, checkpoint=3))
    assert [step.step for step in select_steps(list(run.resume(copied, checkpoint=1)))] == [2, 3]
    assert (copied / "adapter" / "adapter_model.safetensors").read_bytes() == broken_off[1]


def test_a_renamed_checkpoint_is_not_taken_for_another_step(copied: Path) -> None:
    (copied / "checkpoints" / "step-2").rename(copied / "checkpoints" / "step-3")
    with pytest.raises(InputError, match="its manifest names step 2"):
        next(run.resume(copied, checkpoint=3))


def test_a_run_without_any_good_checkpoint_starts_over(
    copied: Path, broken_off: tuple[Path, bytes]
) -> None:
    for step in (1, 2):
        flip(copied / "checkpoints" / f"step-{step}" / "manifest.json", 0.5)
    events = list(run.resume(copied))
    assert len(verdicts(events, "checkpoint")) == 2
    assert [step.step for step in select_steps(events)] == [1, 2, 3]
    assert (copied / "adapter" / "adapter_model.safetensors").read_bytes() == broken_off[1]


def test_a_manifest_says_what_the_checkpoint_belongs_to(broken_off: tuple[Path, bytes]) -> None:
    manifest = read_json(broken_off[0] / "checkpoints" / "step-2" / "manifest.json")
    assert manifest["step"] == 2
    assert manifest["plan"]["learning_rate"] == 0.01
    assert manifest["versions"].keys() >= {"torch", "transformers", "tokenizers", "numpy"}
    hashes = [
        *manifest["base_sha256"].values(),
        *manifest["templates"].values(),
        *manifest["data"].values(),
    ]
    assert {len(actual) for actual in [*hashes, manifest["tokenizer"], manifest["renderer"]]} == {
        64
    }


# ---------------------------------------------------------------- drift


@pytest.fixture(scope="module")
def custom(tmp_path_factory: pytest.TempPathFactory) -> Recipe:
    """A run over files of its own, left after its first checkpoint."""
    folder = tmp_path_factory.mktemp("own")
    wish = make_tiny_recipe(
        save_model_folder(folder / "model"),
        folder,
        **write_eval_files(folder),
        metrics=["bits_per_byte"],
        save_steps=1,
        eval_steps=1,
    )
    run_until_saved(run.train(plan_recipe(wish)), step=1)
    return wish


def in_json(key: str, value: object) -> Callable[[Path], None]:
    def change(file: Path) -> None:
        file.write_text(json.dumps(read_json(file) | {key: value}))

    return change


def in_recipe(file: Path) -> None:
    file.write_text(yaml.safe_dump(yaml.safe_load(file.read_text()) | {"learning_rate": 0.02}))


def in_plan(file: Path) -> None:
    plan = read_sealed_json(file)
    plan["settings"]["learning_rate"]["value"] = 0.5
    file.write_text(json.dumps(plan))


def in_tokenizer(file: Path) -> None:
    data = read_json(file)
    data["model"]["vocab"] |= {"a": data["model"]["vocab"]["b"], "b": data["model"]["vocab"]["a"]}
    file.write_text(json.dumps(data))


def last_byte(file: Path) -> None:
    flip(file, 1)


def one_more(file: Path) -> None:
    file.write_text(file.read_text() + file.read_text().splitlines()[0] + "\n")


def versions(file: Path) -> None:
    identity = read_sealed_json(file)
    identity["versions"]["torch"] = "2.6.0"
    file.write_text(json.dumps(identity))


DRIFTS: dict[str, tuple[str, Callable[[Path], None], str]] = {
    "data": ("train.jsonl", one_more, r"data\.data: sha256 \w{12} -> sha256 \w{12}"),
    "test data": ("test.jsonl", one_more, r"data\.test_data: sha256 "),
    "general text": ("general.jsonl", one_more, r"data\.retention_data: sha256 "),
    "recipe": ("run/recipe.yaml", in_recipe, r"recipe\.learning_rate: 0\.01 -> 0\.02"),
    "plan": ("run/plan.json", in_plan, r"plan\.learning_rate: 0\.01 -> 0\.5"),
    "weights": ("model/model.safetensors", last_byte, r"base_sha256\.model\.safetensors: sha256 "),
    "config": (
        "model/config.json",
        in_json("rms_norm_eps", 1e-5),
        r"config\.rms_norm_eps: 1e-06 -> 1e-05",
    ),
    "tokenizer": ("model/tokenizer.json", in_tokenizer, "tokenizer: sha256 "),
    "template": (
        "model/chat_template.jinja",
        lambda file: file.write_text(file.read_text() + " "),
        "templates.def",
    ),
    "end token": (
        "model/generation_config.json",
        in_json("eos_token_id", 0),
        r"end_ids: \[257, 258\] -> \[257, 0, ",
    ),
    "library": ("run/fingerprint.json", versions, r"versions\.torch: 2\.6\.0 -> \d"),
}


@pytest.mark.parametrize("what", DRIFTS)
def test_fault_30_a_run_that_stands_on_something_else_is_refused_field_by_field(
    what: str, custom: Recipe
) -> None:
    assert isinstance(custom.output_dir, Path)
    name, change, message = DRIFTS[what]
    file = custom.output_dir.parent / name
    content = file.read_bytes()
    change(file)
    try:
        with pytest.raises(
            InputError, match=rf"(?s)inputs have changed.*\n  {message}.*allow-changes"
        ) as refusal:
            next(run.resume(custom.output_dir))
    finally:
        file.write_bytes(content)
    assert refusal.value.exit_code == 2
    fields = [line.partition(":")[0].strip() for line in refusal.value.message.splitlines()[1:]]
    assert len(fields) == len(set(fields)) <= 2


@pytest.mark.promise
@pytest.mark.parametrize("what", ["test data", "plan", "weights"])
def test_fault_30_what_is_allowed_to_differ_is_in_the_record(what: str, tmp_path: Path) -> None:
    model = save_model_folder(tmp_path / "model")
    held_out = write_eval_files(tmp_path)
    wish = make_tiny_recipe(model, tmp_path, **held_out, metrics=["bits_per_byte"], save_steps=1)
    run_until_saved(run.train(plan_recipe(wish)), step=1)
    name, change, _ = DRIFTS[what]
    change(tmp_path / name)
    run_until_saved(run.resume(tmp_path / "run", allow_changes=True), step=2)
    with pytest.raises(InputError, match="inputs have changed"):
        next(run.resume(tmp_path / "run"))
    events = list(run.resume(tmp_path / "run", allow_changes=True))
    assert [step.step for step in select_steps(events)] == [3]
    drift = read_json(tmp_path / "run" / "record.json")["input_changes"]
    assert drift == verdicts(events, "changed input")
    assert len(drift) == 1
    if what == "plan":
        assert select_steps(events)[0].learning_rate == pytest.approx(0.5 / 3)


def test_rows_that_went_away_cannot_be_allowed(custom: Recipe) -> None:
    assert isinstance(custom.output_dir, Path)
    file = custom.output_dir.parent / "train.jsonl"
    content = file.read_bytes()
    write_rows(file, build_sum_rows(1, 4))
    try:
        with pytest.raises(InputError, match="4 rows are enough for 2 steps, but the plan has 3"):
            list(run.resume(custom.output_dir, allow_changes=True))
    finally:
        file.write_bytes(content)


def test_another_processor_is_said_and_not_refused(copied: Path) -> None:
    identity = read_sealed_json(copied / "fingerprint.json")
    identity["machine"]["device"] = "Pentium II"
    (copied / "fingerprint.json").write_text(json.dumps(identity))
    events = list(run.resume(copied))
    (messages,) = verdicts(events, "rounding")
    assert messages.startswith("machine.device: Pentium II -> ")
    assert read_json(copied / "record.json")["input_changes"] == []


def test_a_run_of_another_version_is_refused(copied: Path) -> None:
    plan = read_sealed_json(copied / "plan.json")
    plan["recipe"]["beta"] = 0.1
    (copied / "plan.json").write_text(json.dumps(plan))
    with pytest.raises(InputError, match="the recipe in the plan is invalid") as refused:
        list(run.resume(copied))
    assert "beta: Extra inputs" in refused.value.message


# ---------------------------------------------------------------- the order of rows


def test_fault_31_the_order_of_rows_is_a_function_of_seed_epoch_and_index() -> None:
    """Written down: any other order is another run. Asked for in any order, by any process, it is
    the same."""
    schedule = StepSampler(num_rows=7, batch_size=3, epochs=2, seed=5)
    expected = [(2, 4, 3), (1, 5, 0), (6, 4, 5), (1, 6, 0), (2, 3)]
    assert [schedule.get_rows(step) for step in (1, 2, 3, 4, 5)] == expected
    assert [
        StepSampler(num_rows=7, batch_size=3, epochs=2, seed=5).get_rows(step) for step in (5, 2)
    ] == [
        expected[4],
        expected[1],
    ]
    assert [
        row
        for rows in StepSampler(num_rows=7, batch_size=2, epochs=2, seed=5).iter_steps(0)
        for row in rows[1]
    ] == [row for rows in expected for row in rows]


@pytest.mark.promise
def test_fault_31_another_pack_length_sees_the_same_rows(tiny_folder: Path, tmp_path: Path) -> None:
    """Also when it changes in the middle of a run."""
    seen: dict[str, list[TrainStep]] = {}
    for name, length in (("wide", 2048), ("narrow", 60)):
        wish = make_tiny_recipe(
            tiny_folder, tmp_path / name, max_length=60, pack_length=length, save_steps=1
        )
        seen[name] = select_steps(train(wish))
    wish = make_tiny_recipe(
        tiny_folder, tmp_path / "mixed", max_length=60, pack_length=2048, save_steps=1
    )
    run_until_saved(run.train(plan_recipe(wish)), step=1)
    position = tmp_path / "mixed" / "run" / "checkpoints" / "step-1" / "trainer_state.json"
    assert read_json(position)["pack_length"] == 2048
    plan = tmp_path / "mixed" / "run" / "plan.json"
    values = read_sealed_json(plan)
    values["settings"]["pack_length"]["value"] = 60
    plan.write_text(json.dumps(values))
    seen["mixed"] = select_steps(list(run.resume(tmp_path / "mixed" / "run", allow_changes=True)))
    for name, tail in (("narrow", 0), ("mixed", 1)):
        for item, other in zip(seen["wide"][tail:], seen[name], strict=True):
            assert (item.step, item.tokens, item.supervised_tokens) == (
                other.step,
                other.tokens,
                other.supervised_tokens,
            )
            assert item.loss == pytest.approx(other.loss, rel=1e-5)
