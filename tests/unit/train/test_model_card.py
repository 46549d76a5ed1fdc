"""The model card: facts of the record, valid for the Hub, and no claim without a measurement."""

from dataclasses import replace
from pathlib import Path

import yaml
from huggingface_hub import ModelCard

import fake_runs
from tiny_runs import make_tiny_recipe, train, write_eval_files
from tunesmith.core.atomic import verify_dir
from tunesmith.core.types import ModelSpec, Plan, PlanValue
from tunesmith.train.model_card import CARD_FILE, escape_markdown, render_card, write_card

HOSTILE = "a|b\n# owned <script>alert(1)</script> [x](http://y) `code` **b** \u202e\x00"


def make_plan(model: ModelSpec = fake_runs.MODEL, **values: object) -> Plan:
    values = {"output_dir": "runs/support-json", "lora_r": 16, **values}
    settings = {key: PlanValue(value, "user", "") for key, value in values.items()}
    return replace(fake_runs.PLAN, model=model).with_settings(**settings)


def render_for(model: ModelSpec) -> str:
    return render_card(fake_runs.make_record(make_plan(model)), {})


def read_metadata(card: str) -> dict:
    return yaml.safe_load(card.split("---\n")[1])


def test_the_card_has_the_facts_of_the_record() -> None:
    text = render_card(fake_runs.make_record(make_plan()), fake_runs.FINGERPRINT)
    assert ModelCard(text).data.to_dict()["library_name"] == "peft"
    assert read_metadata(text) == {
        "library_name": "peft",
        "pipeline_tag": "text-generation",
        "tags": ["tunesmith", "lora", "sft"],
    }
    for line in (
        "# support-json",
        "| test, exact\\_match | 80 | 0.100 | 0.800 | +0.700 (+0.600 to +0.800) | better |",
        "| general text, bits\\_per\\_byte (lower is better) | 80 | 0.900 | 1.000 "
        "| +0.100 (+0.080 to +0.120) | worse |",
        "| data | a.jsonl | 1,200 | 90,000 | `` |",
        "| `lora_r` | `16` |",
        "| steps | 30 over 90,000 tokens |",
        "- few rows",
        f"| base model.safetensors | `{'ab' * 32}` |",
    ):
        assert line in text.splitlines(), line


def test_data_of_the_hub_is_named_with_its_commit() -> None:
    """Of a local file, the last part is named, since the rest names the user's folders."""
    plan = make_plan()
    report = replace(plan.data["data"], path="hf://org/rows@a650a41eaaf6/data/train.jsonl")
    plan = replace(plan, data=plan.data | {"data": report})
    card = render_card(fake_runs.make_record(plan), {})
    assert "| data | hf://org/rows@a650a41eaaf6/data/train.jsonl | 1,200 " in card
    assert "| test_data | a.jsonl | 1,200 " in card


def test_base_and_license_are_named_only_if_known(tmp_path: Path) -> None:
    snapshot = tmp_path / "models--some--base" / "snapshots" / "1"
    snapshot.mkdir(parents=True)
    hub_model = replace(fake_runs.MODEL, name="some/base", path=snapshot)
    card = render_for(hub_model)
    assert read_metadata(card)["base_model"] == "some/base"
    assert "license" not in read_metadata(card)
    assert 'from_pretrained("some/base")' in card
    (snapshot / "README.md").write_text(
        "---\nlanguage: en\nlicense: apache-2.0\n---\nMIT in the text"
    )
    assert read_metadata(render_for(hub_model))["license"] == "apache-2.0"
    with (snapshot / "README.md").open("ab") as file:
        file.truncate(2**40)
    assert read_metadata(render_for(hub_model))["license"] == "apache-2.0", "read from its start"
    builtin_model = replace(fake_runs.MODEL, origin="SmolLM2 (Apache-2.0), from a wheel")
    assert read_metadata(render_for(builtin_model))["license"] == "apache-2.0"
    assert "base_model" not in read_metadata(render_for(builtin_model))


def test_what_was_not_measured_is_not_claimed() -> None:
    text = render_card(fake_runs.make_record(make_plan(), comparisons=()), {})
    assert "Nothing was measured" in text
    assert "better" not in text
    full = render_card(fake_runs.make_record(make_plan(method="full")), {})
    assert read_metadata(full)["library_name"] == "transformers"
    assert "peft" not in full.lower()


def test_hostile_text_stays_text() -> None:
    escaped = escape_markdown(HOSTILE)
    assert "\n" not in escaped
    assert escaped == (
        r"a\|b \# owned \<script\>alert(1)\</script\> \[x\](http://y) \`code\` \*\*b\*\*"
    )
    plan = replace(make_plan(output_dir=f"runs/{HOSTILE.replace('/', '')}"), warnings=(HOSTILE,))
    text = render_card(fake_runs.make_record(plan, input_changes=(HOSTILE,)), {})
    assert "\n# owned" not in text
    assert "<script" not in text.replace("\\<script", "")


def test_several_stages_are_named(tmp_path: Path) -> None:
    record = fake_runs.make_record(make_plan(), adapter=str(tmp_path))
    write_card(record, fake_runs.FINGERPRINT, stages=["1-cpt", "2-sft"])
    assert "Trained in stages: 1-cpt, 2-sft" in (tmp_path / CARD_FILE).read_text()


def test_a_run_writes_the_card_and_its_folder_stays_verified(
    tiny_folder: Path, tmp_path: Path
) -> None:
    train(make_tiny_recipe(tiny_folder, tmp_path, **write_eval_files(tmp_path / "files")))
    adapter = tmp_path / "run" / "adapter"
    assert ModelCard.load(adapter / CARD_FILE).data.to_dict()["tags"] == [
        "tunesmith",
        "lora",
        "sft",
    ]
    assert verify_dir(adapter) == ""
    (adapter / CARD_FILE).write_text("mine")
    assert verify_dir(adapter) == ""
