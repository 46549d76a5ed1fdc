"""The model card: facts of the record, valid for the hub, and nothing that nobody measured."""

from dataclasses import replace
from pathlib import Path

import yaml
from huggingface_hub import ModelCard

import fake_runs
from tiny_runs import measured_files, recipe, train
from tunesmith.core.atomic import verify_dir
from tunesmith.core.types import ModelSpec, Plan, PlanValue
from tunesmith.train.model_card import CARD_FILE, escape_markdown, render_card, write_card

HOSTILE = "a|b\n# owned <script>alert(1)</script> [x](http://y) `code` **b** \u202e\x00"


def planned(model: ModelSpec = fake_runs.MODEL, **choices: object) -> Plan:
    values = {"output_dir": "runs/support-json", "lora_r": 16, **choices}
    made = {key: PlanValue(value, "user", "") for key, value in values.items()}
    return replace(fake_runs.PLAN, model=model).with_settings(**made)


def head_of(text: str) -> dict:
    return yaml.safe_load(text.split("---\n")[1])


def test_its_facts_are_those_of_the_record() -> None:
    text = render_card(fake_runs.make_record(planned()), fake_runs.FINGERPRINT)
    assert ModelCard(text).data.to_dict()["library_name"] == "peft"
    assert head_of(text) == {
        "library_name": "peft",
        "pipeline_tag": "text-generation",
        "tags": ["tunesmith", "lora", "sft"],
    }
    for line in (
        "# support-json",
        "| test, exact\\_match | 80 | 0.100 | 0.800 | +0.700 (+0.600 to +0.800) | better |",
        "| general text, bits\\_per\\_byte (lower is better) | 80 | 0.900 | 1.000 | +0.100 (+0.080 to +0.120) |"
        " worse |",
        "| data | a.jsonl | 1,200 | 90,000 | `` |",
        "| `lora_r` | `16` |",
        "| steps | 30 over 90,000 tokens |",
        "- few rows",
        f"| base model.safetensors | `{'ab' * 32}` |",
    ):
        assert line in text.splitlines(), line


def test_a_base_and_a_licence_are_named_only_if_known(tmp_path: Path) -> None:
    snapshot = tmp_path / "models--some--base" / "snapshots" / "1"
    snapshot.mkdir(parents=True)
    hub = replace(fake_runs.MODEL, name="some/base", path=snapshot)
    text = render_card(fake_runs.make_record(planned(hub)), {})
    assert (head_of(text)["base_model"], "license" in head_of(text)) == ("some/base", False)
    assert 'from_pretrained("some/base")' in text
    (snapshot / "README.md").write_text(
        "---\nlanguage: en\nlicense: apache-2.0\n---\nMIT in the text"
    )
    assert head_of(render_card(fake_runs.make_record(planned(hub)), {}))["license"] == "apache-2.0"
    built_in = replace(fake_runs.MODEL, origin="SmolLM2 (Apache-2.0), from a wheel")
    assert (
        head_of(render_card(fake_runs.make_record(planned(built_in)), {}))["license"] == "apache-2.0"
    )
    assert "base_model" not in head_of(render_card(fake_runs.make_record(planned(built_in)), {}))


def test_what_was_not_measured_is_not_claimed() -> None:
    text = render_card(fake_runs.make_record(planned(), comparisons=()), {})
    assert "Nothing was measured" in text
    assert "better" not in text
    full = render_card(fake_runs.make_record(planned(method="full")), {})
    assert head_of(full)["library_name"] == "transformers"
    assert "peft" not in full.lower()


def test_words_of_others_are_words() -> None:
    made = escape_markdown(HOSTILE)
    assert "\n" not in made
    assert made == (
        "a\\|b \\# owned \\<script\\>alert(1)\\</script\\> \\[x\\](http://y) \\`code\\` \\*\\*b\\*\\*"
    )
    plan = replace(planned(output_dir=f"runs/{HOSTILE.replace('/', '')}"), warnings=(HOSTILE,))
    text = render_card(fake_runs.make_record(plan, input_changes=(HOSTILE,)), {})
    assert "\n# owned" not in text
    assert "<script" not in text.replace("\\<script", "")


def test_several_stages_are_named(tmp_path: Path) -> None:
    record = fake_runs.make_record(planned(), adapter=str(tmp_path))
    write_card(record, fake_runs.FINGERPRINT, stages=["1-cpt", "2-sft"])
    assert "trained in stages: 1-cpt, 2-sft" in (tmp_path / CARD_FILE).read_text()


def test_a_run_leaves_it_and_the_folder_is_whole(tiny_folder: Path, tmp_path: Path) -> None:
    train(recipe(tiny_folder, tmp_path, **measured_files(tmp_path / "files")))
    adapter = tmp_path / "run" / "adapter"
    assert ModelCard.load(adapter / CARD_FILE).data.to_dict()["tags"] == [
        "tunesmith",
        "lora",
        "sft",
    ]
    assert verify_dir(adapter) == ""
    (adapter / CARD_FILE).write_text("mine")
    assert verify_dir(adapter) == ""
