"""What trained weights belong to: every reader refuses them with a base that computes something
else, and folders that an older tunesmith wrote."""

import json
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path

import pytest

import tunesmith
from tiny_runs import make_tiny_recipe, plan_recipe, save_model_folder, train, write_eval_files
from tunesmith.core.errors import InputError
from tunesmith.core.json_io import read_json
from tunesmith.core.sealed_json import read_sealed_json
from tunesmith.core.types import Plan
from tunesmith.recipe.schema import Recipe
from tunesmith.report.trackers import export_run

pytestmark = pytest.mark.promise


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Recipe:
    folder = tmp_path_factory.mktemp("trained")
    model = save_model_folder(folder / "model")
    recipe = make_tiny_recipe(model, folder, **write_eval_files(folder), save_steps=1)
    train(recipe)
    return recipe


def get_run(recipe: Recipe) -> Path:
    return Path(str(recipe.output_dir))


def exhaust(events: Iterable[object]) -> None:
    for _ in events:
        pass


def continue_adapter(run: Path) -> Plan:
    model = run.parent / "model"
    return plan_recipe(make_tiny_recipe(model, run.parent / "next", adapter_from=str(run)))


READERS: dict[str, Callable[[Path], object]] = {
    "eval": tunesmith.evaluate,
    "eval at a scale": lambda run: tunesmith.evaluate(f"{run}@0.5"),
    "eval of a checkpoint": lambda run: tunesmith.evaluate(run / "checkpoints" / "step-2"),
    "compare": lambda run: tunesmith.compare(run, f"{run}@0.5"),
    "chat": lambda run: exhaust(tunesmith.chat(run, "1 and 1")),
    "export peft": lambda run: tunesmith.export(run, "peft", out=run.parent / "exported"),
    "export merged": lambda run: tunesmith.export(run, "merged", out=run.parent / "exported"),
    "adapter_from": continue_adapter,
}


@pytest.mark.parametrize("reader", READERS)
def test_a_base_that_computes_something_else_is_refused(reader: str, trained: Recipe) -> None:
    run = get_run(trained)
    config = run.parent / "model" / "config.json"
    before = config.read_text()
    changed = json.loads(before)
    changed["rope_parameters"]["rope_theta"] = 500_000.0
    config.write_text(json.dumps(changed))
    try:
        with pytest.raises(
            InputError, match=r"config\.json rope_parameters\.rope_theta: 10000\.0 "
        ):
            READERS[reader](run)
    finally:
        config.write_text(before)
    assert not (run.parent / "exported").exists()


def test_the_same_config_in_other_words_is_accepted(trained: Recipe) -> None:
    run = get_run(trained)
    config = run.parent / "model" / "config.json"
    before = config.read_text()
    changed = json.loads(before)
    changed |= {"rope_theta": changed.pop("rope_parameters")["rope_theta"], "use_cache": False}
    del changed["attention_bias"]
    config.write_text(json.dumps(changed | {"transformers_version": "4.50.0"}))
    try:
        assert list(tunesmith.chat(run, "1 and 1"))
        assert continue_adapter(run).config.adapter_sha256
    finally:
        config.write_text(before)


# ---------------------------------------------------------------- older folders


@pytest.fixture
def older(trained: Recipe, tmp_path: Path) -> Path:
    """A finished run in the words of format 1: choices in plan.json, identity.json, renamed keys
    in the adapter's tunesmith.json."""
    run = Path(shutil.copytree(get_run(trained), tmp_path / "run"))
    shutil.copytree(get_run(trained).parent / "model", tmp_path / "model")
    plan = read_sealed_json(run / "plan.json")
    del plan["format"]
    plan["choices"] = plan.pop("settings")
    (run / "plan.json").write_text(json.dumps(plan))
    (run / "fingerprint.json").rename(run / "identity.json")
    record = read_sealed_json(run / "record.json")
    record["plan"] = plan
    (run / "record.json").write_text(json.dumps(record))
    make_older_provenance(run / "adapter" / "tunesmith.json")
    return run


def make_older_provenance(file: Path) -> None:
    provenance = read_json(file)
    for key in ("format", "config"):
        del provenance[key]
    prompts = provenance.pop("reference_prompts")
    provenance["golden"] = [prompt | {"ids": prompt.pop("token_ids")} for prompt in prompts]
    file.write_text(json.dumps(provenance))


OPENERS: dict[str, Callable[[Path], object]] = READERS | {
    "resume": lambda run: exhaust(tunesmith.resume(run)),
    "report": tunesmith.write_report,
    "compare with base": lambda run: tunesmith.compare("base", run),
    "read_plan": tunesmith.read_plan,
    "read_record": tunesmith.read_record,
    "track": lambda run: export_run(run, "tensorboard"),
}


@pytest.mark.parametrize("opener", OPENERS)
def test_an_older_run_says_that_it_is_older(opener: str, older: Path) -> None:
    before = {path: path.read_bytes() for path in sorted(older.rglob("*")) if path.is_file()}
    with pytest.raises(InputError, match="run folder format 1 is not supported") as caught:
        OPENERS[opener](older)
    assert caught.value.where.endswith("plan.json")
    assert caught.value.fix
    after = {path: path.read_bytes() for path in sorted(older.rglob("*")) if path.is_file()}
    assert after == before


@pytest.mark.parametrize("opener", sorted(OPENERS.keys() - {"eval at a scale", "compare"}))
@pytest.mark.parametrize("is_finished", [True, False])
def test_an_older_run_of_stages_says_that_it_is_older(
    opener: str, is_finished: bool, older: Path, tmp_path: Path
) -> None:
    staged = tmp_path / "staged"
    stage = Path(shutil.copytree(older, staged / "stages" / "1-sft"))
    plan = read_json(stage / "plan.json")
    content = {"output_dir": str(staged), "plans": [plan]}
    (staged / "stages.json").write_text(json.dumps(content))
    if is_finished:
        shutil.copy(stage / "record.json", staged / "record.json")
    with pytest.raises(InputError, match="run folder format 1 is not supported"):
        OPENERS[opener](staged)


def test_an_older_adapter_folder_says_what_to_do(trained: Recipe, tmp_path: Path) -> None:
    model = get_run(trained).parent / "model"
    adapter = Path(shutil.copytree(get_run(trained) / "adapter", tmp_path / "adapter"))
    (adapter / "manifest.json").unlink()  # of the version that wrote it, it would fit
    make_older_provenance(adapter / "tunesmith.json")
    recipe = make_tiny_recipe(model, tmp_path, adapter_from=str(adapter))
    with pytest.raises(InputError, match="written by an older tunesmith: it has no") as caught:
        plan_recipe(recipe)
    assert caught.value.where == str(adapter / "tunesmith.json")
    (adapter / "tunesmith.json").unlink()
    assert any("no hash of the weights" in warning for warning in plan_recipe(recipe).warnings)


@pytest.mark.parametrize("number", [3, 5, "4", None, [], 4.5])
def test_provenance_of_another_format_is_refused(
    number: object, trained: Recipe, tmp_path: Path
) -> None:
    model = get_run(trained).parent / "model"
    adapter = Path(shutil.copytree(get_run(trained) / "adapter", tmp_path / "adapter"))
    provenance = adapter / "tunesmith.json"
    provenance.write_text(json.dumps(read_json(provenance) | {"format": number}))
    (adapter / "manifest.json").unlink()  # else the file is refused as changed
    with pytest.raises(InputError, match="written by an"):
        plan_recipe(make_tiny_recipe(model, tmp_path, adapter_from=str(adapter)))
