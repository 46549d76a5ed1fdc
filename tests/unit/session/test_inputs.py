"""The facts of a plan: who is trained on, who is held out, what the renderer is, and that they can
be found again."""

import dataclasses
import json
import shutil
from datetime import datetime
from itertools import chain
from pathlib import Path
from typing import Any

import pytest

import tunesmith
from tiny_runs import (
    END,
    build_sum_rows,
    make_tiny_recipe,
    plan_recipe,
    save_model_folder,
    write_eval_files,
    write_rows,
)
from tunesmith.core.errors import InputError, MachineError
from tunesmith.core.json_io import dump_json, parse_as
from tunesmith.core.types import Plan
from tunesmith.data.dataset import Dataset
from tunesmith.plan.build import refuse_if_too_large
from tunesmith.session import inputs, planner

MOMENT = datetime(2026, 2, 3, 4, 5, 6, 789)


def ids(dataset: Dataset) -> list[str]:
    return [dataset.get_id(index) for index in range(len(dataset))]


def roles(model: Path, folder: Path, **changed: Any) -> dict[str, list[str]]:
    datasets = inputs.load_inputs(make_tiny_recipe(model, folder, **changed))
    return {role: ids(dataset) for role, dataset in datasets.datasets.items()}


@pytest.mark.parametrize(
    ("metrics", "says"),
    [(["exactmatch"], "unknown metric 'exactmatch'"), (["schema_valid"], "needs a schema")],
)
def test_a_metric_that_is_none_is_refused_without_rows_to_measure(
    metrics: list[str], says: str, tiny_folder: Path, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match=says):
        tunesmith.plan(make_tiny_recipe(tiny_folder, tmp_path, metrics=metrics))


def test_the_plan_names_code_of_the_repository_that_is_not_run(
    tiny_folder: Path, tmp_path: Path
) -> None:
    model = tmp_path / "model"
    shutil.copytree(tiny_folder, model)
    config = json.loads((model / "config.json").read_text())
    code = {"AutoModelForCausalLM": "modeling_x.XForCausalLM"}
    (model / "config.json").write_text(json.dumps(config | {"auto_map": code}))
    plan = tunesmith.plan(make_tiny_recipe(model, tmp_path))
    (warning,) = [text for text in plan.warnings if "modeling_x.XForCausalLM" in text]
    assert "never run: LlamaForCausalLM of transformers" in warning


def test_general_text_that_is_not_there_is_refused_by_the_plan(
    tiny_folder: Path, tmp_path: Path
) -> None:
    wish = make_tiny_recipe(tiny_folder, tmp_path, retention_data=tmp_path / "general.jsonl")
    with pytest.raises(InputError, match="no such file"):
        tunesmith.plan(wish)


def test_each_role_is_its_own_file(tiny_folder: Path, tmp_path: Path) -> None:
    datasets = roles(tiny_folder, tmp_path, **write_eval_files(tmp_path))
    assert {role: rows[0] for role, rows in datasets.items()} == {
        "data": "train.jsonl:1",
        "eval_data": "eval.jsonl:1",
        "test_data": "test.jsonl:1",
    }


def test_without_test_data_half_of_the_held_out_rows_is_kept_for_the_end(
    tiny_folder: Path, tmp_path: Path
) -> None:
    held_out = str(write_rows(tmp_path / "e.jsonl", build_sum_rows(500, 40)))
    datasets = roles(tiny_folder, tmp_path, eval_data=held_out)
    assert 12 <= len(datasets["test_data"]) <= 28
    assert sorted(datasets["eval_data"] + datasets["test_data"]) == sorted(
        f"e.jsonl:{n}" for n in range(1, 41)
    )
    assert datasets["data"] == [f"train.jsonl:{n}" for n in range(1, 7)]


def test_a_share_of_the_data_is_held_out_and_halved_and_the_seed_chooses(
    tiny_folder: Path, tmp_path: Path
) -> None:
    data = str(write_rows(tmp_path / "all.jsonl", build_sum_rows(500, 60)))
    first = roles(tiny_folder, tmp_path, data=data, eval_split=0.5)
    assert sorted(chain(*first.values())) == sorted(f"all.jsonl:{n}" for n in range(1, 61))
    assert all(len(rows) >= 6 for rows in first.values())
    assert roles(tiny_folder, tmp_path, data=data, eval_split=0.5) == first
    assert roles(tiny_folder, tmp_path, data=data, eval_split=0.5, seed=1) != first


def test_a_split_far_from_its_share_is_a_warning(tiny_folder: Path, tmp_path: Path) -> None:
    """A row is held out by its hash alone, so few rows may fall on one side."""

    def list_warnings(rows: int, seed: int) -> list[str]:
        test = str(write_rows(tmp_path / "test.jsonl", build_sum_rows(900, 4)))
        data = str(write_rows(tmp_path / f"{rows}.jsonl", build_sum_rows(500, rows)))
        recipe = make_tiny_recipe(
            tiny_folder, tmp_path, data=data, test_data=test, eval_split=0.4, seed=seed
        )
        plan = plan_recipe(recipe)
        num_held_out = plan.data["eval_data"].rows
        warnings = [warning for warning in plan.warnings if warning.startswith("eval_split")]
        is_far = abs(num_held_out - 0.4 * rows) > max(1, 0.12 * rows)
        assert len(warnings) == is_far, (num_held_out, warnings)
        return warnings

    few = [warning for seed in range(12) for warning in list_warnings(20, seed)]
    assert any("0.4 of 20 rows are 8, but the hash split holds out" in each for each in few)
    assert not list_warnings(200, 0)


def test_without_held_out_rows_there_is_only_training_data(
    tiny_folder: Path, tmp_path: Path
) -> None:
    assert roles(tiny_folder, tmp_path).keys() == {"data"}


@pytest.mark.parametrize("role", ["eval_data", "test_data"])
def test_a_role_of_one_row_is_refused_by_name(role: str, tiny_folder: Path, tmp_path: Path) -> None:
    lonely = str(write_rows(tmp_path / "one.jsonl", build_sum_rows(500, 1)))
    files = write_eval_files(tmp_path) | {role: lonely}
    with pytest.raises(
        InputError,
        match=rf"{role}: .*one\.jsonl: one row: a score on it has no confidence interval",
    ):
        inputs.load_inputs(make_tiny_recipe(tiny_folder, tmp_path, **files))


@pytest.mark.promise
def test_facts_of_a_plan_are_found_again(tiny_folder: Path, tmp_path: Path) -> None:
    run_inputs = inputs.load_inputs(
        make_tiny_recipe(tiny_folder, tmp_path, **write_eval_files(tmp_path), seed=5), now=MOMENT
    )
    plan = parse_as(Plan, json.loads(dump_json(planner.make_plan(run_inputs))))
    again = inputs.reload_inputs(plan)
    assert (again.recipe, again.model, again.output_dir) == (
        run_inputs.recipe,
        run_inputs.model,
        run_inputs.output_dir,
    )
    assert again.now == run_inputs.now == MOMENT.replace(microsecond=0)
    assert again.renderer.fingerprint == run_inputs.renderer.fingerprint
    assert {role: d.fingerprint for role, d in again.datasets.items()} == {
        role: d.fingerprint for role, d in run_inputs.datasets.items()
    }
    assert planner.make_plan(again).reasons.keys() == plan.reasons.keys()
    assert [planner.make_plan(again).values[key] for key in plan.reasons] == [
        planner.make_plan(run_inputs).values[key] for key in plan.reasons
    ]


def test_a_changed_file_is_named_with_what_it_was(tiny_folder: Path, tmp_path: Path) -> None:
    plan = planner.make_plan(inputs.load_inputs(make_tiny_recipe(tiny_folder, tmp_path)))
    write_rows(tmp_path / "train.jsonl", build_sum_rows(2, 6))
    with pytest.raises(
        InputError, match=rf"data: .*train\.jsonl: .*{plan.data['data'].fingerprint[:12]}"
    ):
        inputs.reload_inputs(plan)


def test_the_folder_of_a_run_is_found_when_none_is_wished_for(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs" / "run-1").mkdir(parents=True)
    assert inputs.load_inputs(
        make_tiny_recipe(tiny_folder, tmp_path, output_dir="auto")
    ).output_dir == Path("runs/run-2")


def test_a_template_of_ones_own_takes_the_place_of_the_models(
    tiny_folder: Path, tmp_path: Path
) -> None:
    template = tmp_path / "own.jinja"
    template.write_text(
        "{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}<|end|>{% endfor %}"
        "{% if add_generation_prompt %}[assistant]{% endif %}"
    )
    wish = make_tiny_recipe(tiny_folder, tmp_path, chat_template=str(template))
    run_inputs = inputs.load_inputs(wish)
    (document,) = run_inputs.datasets["data"].render_documents(0)
    assert run_inputs.renderer.decode(document.tokens_L.tolist()).startswith("[user]1 and 1 please")
    assert document.tokens_L[-1] == END


def test_no_template_means_plain_text(tiny_folder: Path, tmp_path: Path) -> None:
    text = str(write_rows(tmp_path / "text.jsonl", [{"text": "first"}]))
    run_inputs = inputs.load_inputs(
        make_tiny_recipe(tiny_folder, tmp_path, chat_template="none", data=text)
    )
    (document,) = run_inputs.datasets["data"].render_documents(0)
    assert not run_inputs.renderer.has_template
    assert run_inputs.renderer.decode(document.tokens_L.tolist()).startswith("first")
    with pytest.raises(InputError, match="template"):
        inputs.load_inputs(make_tiny_recipe(tiny_folder, tmp_path, chat_template="none"))


@pytest.mark.parametrize(("content", "message"), [(None, "no such file"), ("{", "not valid JSON")])
def test_a_broken_schema_is_named(
    content: str | None, message: str, tiny_folder: Path, tmp_path: Path
) -> None:
    path = tmp_path / "s.json"
    if content is not None:
        path.write_text(content)
    run_inputs = inputs.load_inputs(
        make_tiny_recipe(tiny_folder, tmp_path, response_schema=str(path))
    )
    with pytest.raises(InputError, match=rf"response_schema: .*s\.json(:1:2)?: {message}"):
        planner.make_plan(run_inputs)


def test_a_plan_needs_no_weights_and_a_run_does(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    alone = tmp_path / "alone"
    shutil.copytree(tiny_folder, alone, ignore=shutil.ignore_patterns("*.safetensors"))
    wish = make_tiny_recipe(alone, tmp_path)
    made = planner.make_plan(inputs.load_inputs(wish, needs_weights=False))
    full_plan = planner.make_plan(inputs.load_inputs(make_tiny_recipe(tiny_folder, tmp_path)))
    assert (made.memory_bytes, made.steps, made.tokens_per_epoch) == (
        full_plan.memory_bytes,
        full_plan.steps,
        full_plan.tokens_per_epoch,
    )
    assert any("has no weights" in warning for warning in made.warnings)
    with pytest.raises(InputError, match=r"neither model\.safetensors"):
        inputs.load_inputs(wish)
    monkeypatch.setattr(inputs, "FALLBACK_TOKENIZER", str(tiny_folder))
    (alone / "tokenizer.json").unlink()
    counted = planner.make_plan(inputs.load_inputs(wish, needs_weights=False))
    assert counted.tokens_per_epoch == full_plan.tokens_per_epoch
    assert any("counted with the tokenizer of" in warning for warning in counted.warnings)


@pytest.mark.parametrize("wish", [{}, {"dp_shard_size": 8}, {"context_parallel_size": 2}])
def test_a_plan_for_several_gpus_is_compared_with_one(tmp_path: Path, wish: dict[str, int]) -> None:
    model = save_model_folder(tmp_path / "model", num_kv_heads=2)
    run_inputs = inputs.load_inputs(make_tiny_recipe(model, tmp_path, **wish))
    plan = planner.make_plan(run_inputs.with_machine("8xh100", None))
    assert plan.mesh is not None
    assert (plan.mesh.mesh.shard, plan.mesh.mesh.context) == (
        wish.get("dp_shard_size", 1),
        wish.get("context_parallel_size", 1),
    )
    one, all_gpus = plan.mesh.options
    assert (one.target, all_gpus.target) == ("h100", "8xh100")
    assert (all_gpus.seconds, all_gpus.peak_bytes) == (plan.seconds, plan.memory_bytes["peak"])
    too_large = planner.make_plan(run_inputs.with_machine("8xh100", "0.2GB"))
    assert too_large.fits_on


def test_a_plan_that_does_not_fit_names_the_smallest_machine_that_would_do(
    tiny_folder: Path, tmp_path: Path
) -> None:
    run_inputs = inputs.load_inputs(make_tiny_recipe(tiny_folder, tmp_path))
    small = dataclasses.replace(run_inputs.machine, available_bytes=10**6)
    plan = planner.make_plan(dataclasses.replace(run_inputs, machine=small))
    assert plan.fits_on == "l4 (24.0 GB)"
    with pytest.raises(MachineError) as refusal:
        refuse_if_too_large(plan)
    assert "such as l4 (24.0 GB)" in refusal.value.fix
    assert planner.make_plan(run_inputs).fits_on == ""
