"""Several stages in one recipe: the same bytes as the runs by hand, one folder, gone on with in any
stage."""

import shutil
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

import tunesmith
from tiny_runs import (
    build_sum_rows,
    make_chat_row,
    make_tiny_recipe,
    select_steps,
    train,
    write_rows,
)
from tunesmith import api
from tunesmith.core.errors import InputError
from tunesmith.core.events import CheckpointSaved, CheckResult, Event, StageStart
from tunesmith.core.json_io import read_json
from tunesmith.core.types import Json
from tunesmith.export.export import export_run
from tunesmith.plan.stages import StagedPlan, read_staged_plan
from tunesmith.recipe.schema import Stages
from tunesmith.train import stages

pytestmark = pytest.mark.promise


WEIGHTS = Path("adapter", "adapter_model.safetensors")


def texts(first: int, count: int) -> list[Json]:
    return [
        {"text": f"Text number {n}. " + "It goes on and on. " * (n % 5)}
        for n in range(first, first + count)
    ]


def keys(model: Path, folder: Path) -> tuple[Json, Json, Json]:
    """Of both stages, of continued pretraining, of fine-tuning."""
    folder.mkdir(parents=True, exist_ok=True)
    both = {
        "model": str(model),
        "learning_rate": 0.01,
        "warmup_ratio": 0,
        "lora_r": 2,
        "dtype": "fp32",
        "save_steps": 2,
    }
    files = {
        "general": texts(90, 3),
        "texts": texts(1, 12),
        "test-texts": texts(50, 4),
        "rows": build_sum_rows(1, 8),
    }
    location = {
        name: str(write_rows(folder / f"{name}.jsonl", rows)) for name, rows in files.items()
    }
    test_rows = str(write_rows(folder / "test-rows.jsonl", build_sum_rows(60, 4)))
    general = {"retention_data": location["general"]}
    cpt = {
        "data": location["texts"],
        "test_data": location["test-texts"],
        "max_length": 60,
        "batch_tokens": 150,
    }
    sft = {"data": location["rows"], "test_data": test_rows, "batch_size": 2}
    both["num_train_epochs"] = 1
    return both | general | {"attention": "sdpa"}, cpt, sft


def wish(model: Path, folder: Path, **changed: Any) -> Stages:
    both, cpt, sft = keys(model, folder)
    provided = {
        **both,
        "stage": [{"cpt": cpt}, {"sft": sft}],
        "output_dir": str(folder / "run"),
        **changed,
    }
    made = api.read_recipe(provided)
    assert isinstance(made, Stages)
    return made


def planned(made: Stages) -> StagedPlan:
    return stages.make_staged_plan(stages.load_stage_inputs(made))


def trained(made: Stages) -> list[Event]:
    run_inputs = stages.load_stage_inputs(made)
    return list(api.train(stages.make_staged_plan(run_inputs), run_inputs))


def until(events: Any, stage: int, saved: int | None) -> None:
    """Follows a run to a checkpoint of a stage, or to its beginning, then leaves it, as a killed
    process does."""
    seen = 0
    with suppress(StopIteration):
        while True:
            event = next(events)
            seen = event.step if isinstance(event, StageStart) else seen
            if seen == stage and (
                saved is None or (isinstance(event, CheckpointSaved) and event.step == saved)
            ):
                break
    events.close()


@pytest.fixture(scope="module")
def straight(
    tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, list[Event]]:
    folder = tmp_path_factory.mktemp("stages")
    return folder / "run", trained(wish(tiny_folder, folder))


def test_stages_are_the_runs_by_hand(
    straight: tuple[Path, list[Event]], tiny_folder: Path, tmp_path: Path
) -> None:
    both, cpt, sft = keys(tiny_folder, tmp_path)
    alone = {"output_dir": str(tmp_path / "one"), "batch_size": "auto", "stage": "cpt"}
    by_hand = {key: value for key, value in both.items() if key != "model"}
    first = train(make_tiny_recipe(tiny_folder, tmp_path, **(by_hand | cpt | alone)))
    more = {"output_dir": str(tmp_path / "two"), "adapter_from": str(tmp_path / "one")}
    second = train(make_tiny_recipe(tiny_folder, tmp_path, **(by_hand | sft | more)))
    run_folder, events = straight
    assert [step.loss for step in select_steps(events)] == [
        step.loss for step in select_steps([*first, *second])
    ]
    for name, location in (("one", "1-cpt"), ("two", "2-sft")):
        assert (run_folder / "stages" / location / WEIGHTS).read_bytes() == (
            tmp_path / name / WEIGHTS
        ).read_bytes()


def test_the_whole_is_measured_from_the_base(straight: tuple[Path, list[Event]]) -> None:
    folder, events = straight
    record = api.read_record(folder)
    assert record.steps == len(select_steps(events)) == api.read_plan(folder).steps
    assert record.tokens == sum(step.tokens for step in select_steps(events))
    actual = {(item.task, item.metric): item for item in record.comparisons}
    first, second = (
        api.read_record(folder / "stages" / name).comparisons for name in ("1-cpt", "2-sft")
    )
    base = {(item.task, item.metric): item.before.value for item in first}
    end = {(item.task, item.metric): item.after.value for item in second}
    assert actual["1-cpt test", "bits_per_byte"].before.value == pytest.approx(
        base["test", "bits_per_byte"]
    )
    assert actual["2-sft test", "loss"].after.value == pytest.approx(end["test", "loss"])
    general = actual["general text", "bits_per_byte"]
    assert (general.before.value, general.after.value) == pytest.approx(
        (base["general text", "bits_per_byte"], end["general text", "bits_per_byte"]), rel=1e-4
    )
    assert [
        item.difference for item in stages.evaluate_stages(folder).comparisons
    ] == pytest.approx([item.difference for item in record.comparisons])


@pytest.mark.parametrize(("stage", "saved"), [(1, None), (1, 2), (2, None), (2, 2)])
def test_a_run_goes_on_in_any_stage(
    stage: int,
    saved: int | None,
    straight: tuple[Path, list[Event]],
    tiny_folder: Path,
    tmp_path: Path,
) -> None:
    until(api.train(planned(wish(tiny_folder, tmp_path))), stage, saved)
    again = list(api.resume(tmp_path / "run"))
    begun = [event.step for event in again if isinstance(event, StageStart)]
    assert begun == list(range(stage, 3))
    for location in ("1-cpt", "2-sft"):
        mine, theirs = (
            folder / "stages" / location / WEIGHTS for folder in (tmp_path / "run", straight[0])
        )
        assert mine.read_bytes() == theirs.read_bytes()
    record, full = (api.read_record(folder) for folder in (tmp_path / "run", straight[0]))
    assert record.comparisons == full.comparisons
    with pytest.raises(InputError, match="this run is finished"):
        list(api.resume(tmp_path / "run"))


def test_the_plan_of_a_later_stage_is_known_before_the_first(
    straight: tuple[Path, list[Event]],
) -> None:
    folder, _ = straight
    before, after = read_staged_plan(folder).plans[1], api.read_plan(folder / "stages" / "2-sft")
    assert before.config.between_stages == after.config.between_stages == "continue adapter"
    differ = {
        key
        for key in after.values
        if key not in before.values or before.values[key] != after.values[key]
    }
    assert differ == {"adapter_sha256", "adapter_from"}


def test_what_comes_after_a_run_takes_the_last_stage(
    straight: tuple[Path, list[Event]], tmp_path: Path
) -> None:
    folder = straight[0]
    assert isinstance(next(tunesmith.chat(folder, ["1 and 1"])), str)
    assert export_run(folder, "peft", out=tmp_path / "peft").path == str(tmp_path / "peft")
    assert (tmp_path / "peft" / "adapter_model.safetensors").exists()
    by_default = folder / "export" / "peft"  # of the run, not in the folder of its last stage
    assert export_run(folder, "peft").path == str(by_default)
    assert (by_default / "adapter_model.safetensors").exists()


def test_a_run_may_go_on_from_stages(
    straight: tuple[Path, list[Event]], tiny_folder: Path, tmp_path: Path
) -> None:
    events = train(
        make_tiny_recipe(tiny_folder, tmp_path, adapter_from=str(straight[0]), max_steps=1)
    )
    assert len(select_steps(events)) == 1
    assert read_json(tmp_path / "run" / "plan.json")["settings"]["adapter_from"]["value"].endswith(
        "2-sft/adapter"
    )


def test_rows_that_change_between_stages_are_noticed(tiny_folder: Path, tmp_path: Path) -> None:
    until(api.train(planned(wish(tiny_folder, tmp_path))), 2, None)
    write_rows(tmp_path / "rows.jsonl", build_sum_rows(20, 8))
    with pytest.raises(InputError, match=r"the file has changed since the plan.*"):
        list(api.resume(tmp_path / "run"))


def test_what_a_later_stage_cannot_do_is_said_before_the_first(
    tiny_folder: Path, tmp_path: Path
) -> None:
    _, cpt, sft = keys(tiny_folder, tmp_path)
    rows = str(
        write_rows(tmp_path / "bad.jsonl", [*build_sum_rows(1, 4), make_chat_row("question", " ")])
    )
    made = wish(tiny_folder, tmp_path, stage=[{"cpt": cpt}, {"sft": sft | {"data": rows}}])
    with pytest.raises(InputError, match="1 of 9 rows cannot be used"):
        trained(made)
    assert not (tmp_path / "run").exists()


def test_preference_may_come_first(tiny_folder: Path, tmp_path: Path) -> None:
    _, _, sft = keys(tiny_folder, tmp_path)
    pairs = [
        {"prompt": f"{n} and {n}", "chosen": f"{2 * n}", "rejected": f"no {n}"} for n in range(1, 7)
    ]
    first = {"data": str(write_rows(tmp_path / "pairs.jsonl", pairs)), "batch_size": 2}
    events = trained(
        wish(
            tiny_folder, tmp_path, stage=[{"preference": first}, {"sft": sft | {"test_data": None}}]
        )
    )
    assert [event.name for event in events if isinstance(event, StageStart)] == [
        "preference",
        "sft",
    ]
    assert [v.level for v in events if isinstance(v, CheckResult) and v.level == "stop"] == []


def test_a_folder_that_was_moved_goes_on(tiny_folder: Path, tmp_path: Path) -> None:
    until(api.train(planned(wish(tiny_folder, tmp_path))), 1, 2)
    moved = Path(shutil.move(tmp_path / "run", tmp_path / "moved"))
    list(api.resume(moved))
    assert (moved / "stages" / "2-sft" / WEIGHTS).exists()


# ---------------------------------------------------------------- merged between stages

OTHER_RANK, ALL_WEIGHTS = "another rank", "all weights"


def merging(model: Path, folder: Path, kind: str) -> Stages:
    """The first stage leaves what no adapter can go on from; no answers are generated."""
    both, cpt, sft = keys(model, folder)
    del both["lora_r"]
    first = {"method": "full"} if kind == ALL_WEIGHTS else {"lora_r": 3}
    second = {"lora_r": 2, "metrics": ["bits_per_byte"]}
    stage = [{"cpt": cpt | first}, {"sft": sft | second}]
    return wish(model, folder, lora_r="auto", stage=stage)


@pytest.fixture(scope="module", params=[OTHER_RANK, ALL_WEIGHTS])
def merged(
    request: pytest.FixtureRequest, tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> Any:
    """How the stages differ, and the folder and events of a run over both."""
    folder = tmp_path_factory.mktemp("merged")
    return request.param, folder / "run", trained(merging(tiny_folder, folder, request.param))


def test_what_no_adapter_can_go_on_from_is_merged(
    merged: Any, tiny_folder: Path, tmp_path: Path
) -> None:
    """The same bytes as the runs by hand: the second on the exported model of the first."""
    kind, folder, events = merged
    both, cpt, sft = keys(tiny_folder, tmp_path)
    by_hand = {key: value for key, value in both.items() if key not in ("model", "lora_r")}
    method = {"method": "full", "lora_r": "auto"} if kind == ALL_WEIGHTS else {"lora_r": 3}
    alone = {"output_dir": str(tmp_path / "one"), "batch_size": "auto", "stage": "cpt"}
    train(make_tiny_recipe(tiny_folder, tmp_path, **(by_hand | cpt | alone | method)))
    base = tmp_path / "one" / "model"
    if kind == OTHER_RANK:
        base = tmp_path / "base"
        export_run(tmp_path / "one", "merged", out=base)
        assert [
            v.evidence.split(":")[0]
            for v in events
            if isinstance(v, CheckResult) and v.kind == "merged"
        ] == ["stages/1-cpt/merged"]
    train(
        make_tiny_recipe(base, tmp_path, **(by_hand | sft | {"output_dir": str(tmp_path / "two")}))
    )
    assert (folder / "stages" / "2-sft" / WEIGHTS).read_bytes() == (
        tmp_path / "two" / WEIGHTS
    ).read_bytes()


def test_the_plan_says_why_it_merges(merged: Any) -> None:
    kind, folder, _ = merged
    why = {
        OTHER_RANK: "lora_r is 2 here and 3 in the adapter of 1-cpt, which is merged",
        ALL_WEIGHTS: "1-cpt trains all weights, so its model is the base of this stage",
    }[kind]
    for plan in (read_staged_plan(folder).plans[1], api.read_plan(folder / "stages" / "2-sft")):
        assert plan.config.between_stages == "merged"
        assert plan.reasons["between_stages"].reason.startswith(why)


def test_a_merged_run_is_measured_from_the_base(merged: Any) -> None:
    _, folder, _ = merged
    actual = {(item.task, item.metric): item for item in api.read_record(folder).comparisons}
    first, second = (
        api.read_record(folder / "stages" / name).comparisons for name in ("1-cpt", "2-sft")
    )
    base = {(item.task, item.metric): item.before.value for item in first}
    end = {(item.task, item.metric): item.after.value for item in second}
    assert actual["1-cpt test", "bits_per_byte"].before.value == pytest.approx(
        base["test", "bits_per_byte"], rel=1e-5
    )
    assert actual["2-sft test", "loss"].after.value == pytest.approx(end["test", "loss"], rel=1e-5)
    general = actual["general text", "bits_per_byte"]
    assert (general.before.value, general.after.value) == pytest.approx(
        (base["general text", "bits_per_byte"], end["general text", "bits_per_byte"]), rel=1e-4
    )
    assert isinstance(next(tunesmith.chat(folder, ["1 and 1"])), str)


@pytest.mark.parametrize(("stage", "saved"), [(2, None), (2, 2)])
def test_a_merged_run_goes_on_in_any_stage(
    stage: int, saved: int | None, merged: Any, tiny_folder: Path, tmp_path: Path
) -> None:
    kind, folder, _ = merged
    until(api.train(planned(merging(tiny_folder, tmp_path, kind))), stage, saved)
    list(api.resume(tmp_path / "run"))
    mine, theirs = (item / "stages" / "2-sft" / WEIGHTS for item in (tmp_path / "run", folder))
    assert mine.read_bytes() == theirs.read_bytes()


def test_a_third_stage_goes_on_from_a_merged_base(tiny_folder: Path, tmp_path: Path) -> None:
    """And the last one may train all weights."""
    both, cpt, sft = keys(tiny_folder, tmp_path)
    del both["lora_r"], cpt["test_data"], sft["test_data"]
    first, last = (
        {"cpt": cpt | {"method": "full", "max_steps": 1}},
        {"sft": sft | {"method": "full", "max_steps": 1}},
    )
    two = sft | {"lora_r": 2, "max_steps": 1}
    events = trained(
        wish(tiny_folder, tmp_path, lora_r="auto", stage=[first, {"sft": two}, {"sft": two}, last])
    )
    plans = [
        api.read_plan(location) for location in sorted((tmp_path / "run" / "stages").iterdir())
    ]
    assert [plan.config.between_stages for plan in plans[1:]] == [
        "merged",
        "continue adapter",
        "merged",
    ]
    assert [Path(plan.recipe["model"]).name for plan in plans[1:]] == ["model", "model", "merged"]
    assert len(select_steps(events)) == 4
    assert (tmp_path / "run" / "stages" / "4-sft" / "model" / "model.safetensors").exists()
    assert api.read_record(tmp_path / "run").comparisons[0].task == "general text"


def test_a_merged_model_that_was_changed_is_refused(tiny_folder: Path, tmp_path: Path) -> None:
    until(api.train(planned(merging(tiny_folder, tmp_path, OTHER_RANK))), 2, 2)
    plan = tmp_path / "run" / "stages" / "2-sft" / "plan.json"
    plan.unlink()  # as if it had not begun
    with (tmp_path / "run" / "stages" / "1-cpt" / "merged" / "model.safetensors").open(
        "ab"
    ) as file:
        file.write(b"!")
    with pytest.raises(InputError, match="the merged model is damaged"):
        list(api.resume(tmp_path / "run"))


# ---------------------------------------------------------------- wrong wishes


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ("stage: []", "an empty list trains nothing"),
        (
            "stage: [sft, distill]",
            r"stage\[1\]: expected 'sft' or 'cpt' or 'preference', found 'distill'",
        ),
        ("stage: [sft, rlhf]", r"'rlhf' is not a value here: reward models and reinforcement"),
        ("stage: [sft, dpo]", r"'dpo' is not a value here: set stage: preference and loss: dpo"),
        (
            "stage: [7]",
            r"stage\[0\]: expected a stage or a mapping \{stage: keys\}, found the number 7",
        ),
        (
            "stage:\n  - {sft: {learning_rat: 1}}",
            r"yaml:4: unknown key 'learning_rat'; did you mean 'learning_rate'",
        ),
        (
            "stage:\n  - {sft: {learning_rate: 7}}",
            r"yaml:4: learning_rate: expected 'auto' or a number",
        ),
        (
            "stage:\n  - sft\n  - {cpt: {batch_size: 7}}",
            r"yaml:5: batch_size has no effect with stage: cpt",
        ),
        (
            "stage: [{sft: {output_dir: here}}]",
            r"stage\[0\]: 'output_dir' is the same for all stages",
        ),
        ("stage: [{sft: {}, cpt: {}}]", r"stage\[0\]: expected a stage or a mapping"),
        (
            "batch_size: 4\nstage: [cpt, cpt]",
            r"yaml:3: batch_size has no effect with stage: cpt",
        ),
        ("batch_tokens: 64\nstage: [sft, preference]", "yaml:3: batch_tokens has no effect"),
        ("loss: dpo\nstage: [cpt, sft]", "yaml:3: loss has no effect"),
    ],
)
def test_wrong_stages_are_named_with_their_line(lines: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text(f"model: m\ndata: rows.jsonl\n{lines}\n")
    with pytest.raises(InputError, match=message) as caught:
        api.read_recipe(tmp_path / "recipe.yaml")
    assert "problems" not in caught.value.message, "one problem, reported once"


def test_keys_beside_the_list_hold_for_the_stages_that_use_them(tmp_path: Path) -> None:
    lines = "batch_size: 4\nbatch_tokens: 64\nloss: dpo\nmetrics: [exact_match]"
    (tmp_path / "recipe.yaml").write_text(
        f"model: m\ndata: rows.jsonl\n{lines}\nstage: [cpt, sft, preference]\n"
    )
    made = api.read_recipe(tmp_path / "recipe.yaml")
    assert isinstance(made, Stages)
    assert [item.batch_size for item in made.recipes] == ["auto", 4, 4]
    assert [item.batch_tokens for item in made.recipes] == [64, "auto", "auto"]
    assert [item.loss.name for item in made.recipes] == ["auto", "auto", "dpo"]
    assert [item.metrics for item in made.recipes] == ["auto", ("exact_match",), ("exact_match",)]


def test_flags_win_over_the_keys_of_a_stage(tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text(
        "model: m\nseed: 1\nstage: [{sft: {data: a, seed: 2}}, {sft: {data: b}}]\n"
    )
    made = api.read_recipe(tmp_path / "recipe.yaml")
    assert isinstance(made, Stages)
    assert [item.seed for item in made.recipes] == [2, 1]
    assert [item.data[0].path for item in made.recipes] == [tmp_path / "a", tmp_path / "b"]
    messages = api.read_recipe(tmp_path / "recipe.yaml", seed=3)
    assert isinstance(messages, Stages)
    assert [item.seed for item in messages.recipes] == [3, 3]
