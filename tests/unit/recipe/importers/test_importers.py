"""Configs of other tools become recipes that load; what could not be translated is named, nothing
is made up."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from trainer_configs import AXOLOTL, LLAMAFACTORY, TRL, write_config, write_datasets
from tunesmith.core.errors import InputError
from tunesmith.recipe.importers.convert import TOOLS, Translation, translate
from tunesmith.recipe.importers.draft import UntranslatedKey


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def translated(text: str, **overrides: Any) -> Translation:
    return translate(write_config(Path.cwd(), text), Path.cwd() / "recipe.yaml", overrides)


def changed(text: str, *lines: str, without: Iterable[str] = ()) -> Translation:
    """The config with some keys left out and some lines added."""
    remaining_lines = [line for line in text.splitlines() if line.partition(":")[0] not in without]
    return translated("\n".join([*remaining_lines, *lines]) + "\n")


def untranslated_by_key(translation: Translation) -> dict[str, UntranslatedKey]:
    return {entry.key: entry for entry in translation.untranslated}


# ---------------------------------------------------------------- whole configs


def test_llamafactory() -> None:
    write_datasets(Path.cwd())
    translation = translated(LLAMAFACTORY)
    assert (translation.tool, translation.reason) == (
        "LLaMA-Factory",
        "it has do_train, finetuning_type, lora_rank, lora_target",
    )
    assert translation.values == {
        "model": "org/base-7b-instruct",
        "learning_rate": 1e-4,
        "num_train_epochs": 3.0,
        "lora_r": 8,
        "max_length": 1024,
        "on_overlong": "truncate",
        "method": "lora",
        "lora_target_modules": ["q_proj", "v_proj"],
        "data": [
            {
                "path": "sets/tickets.json",
                "format": "sharegpt",
                "columns": {"conversations": "turns"},
                "max_examples": 500,
            },
            {
                "path": "sets/manual.jsonl",
                "format": "alpaca",
                "columns": {"instruction": "question", "output": "answer"},
                "max_examples": 40,
            },
        ],
        "eval_split": 0.1,
        "batch_size": 16,
        "warmup_ratio": 0.1,
        "lr_scheduler_type": "cosine",
        "dtype": "bf16",
        "save_steps": 200,
        "eval_steps": 100,
        "output_dir": "saves/tickets",
        "neftune_noise_alpha": 5,
    }
    lost = [entry.key for entry in translation.untranslated if entry.is_important]
    assert lost == ["template", "deepspeed"]
    assert (
        untranslated_by_key(translation)["hf_hub_token"].value == "..."
    )  # a secret is not copied into a recipe


def test_axolotl() -> None:
    write_config(Path.cwd(), "", "data/chats.jsonl")
    translation = translated(AXOLOTL)
    assert translation.tool == "Axolotl"
    assert translation.values == {
        "model": "org/base-8b",
        "learning_rate": 2e-4,
        "weight_decay": 0.0,
        "lora_r": 32,
        "lora_alpha": 16,
        "lora_dropout": 0.05,
        "max_length": 4096,
        "num_train_epochs": 4,
        "method": "qlora",
        "optim": "adamw_8bit",
        "lora_target_modules": "all-linear",
        "on_overlong": "truncate",
        "data": [
            {"path": "data/chats.jsonl", "format": "sharegpt"},
            {"path": "hf://org/instructions", "format": "alpaca"},
        ],
        "eval_split": 0.05,
        "batch_size": 8,
        "max_steps": 200,
        "warmup_ratio": 0.05,
        "lr_scheduler_type": "cosine",
        "output_dir": "./outputs/qlora",
    }
    lost = {entry.key for entry in translation.untranslated if entry.is_important}
    assert lost == {
        "fsdp",
        *("datasets[1].type", "datasets[1].split"),
    }
    assert "always on" in untranslated_by_key(translation)["sample_packing"].reason
    assert "dp_shard_size divides the weights" in untranslated_by_key(translation)["fsdp"].reason
    assert (
        not {"wandb_project", "wandb_entity", "strict"} & untranslated_by_key(translation).keys()
    )  # empty and false ask for nothing


def test_trl() -> None:
    translation = translated(TRL)
    assert translation.tool == "TRL"
    assert translation.values == {
        "model": "org/base-0.5b",
        "learning_rate": 2e-4,
        "num_train_epochs": 1,
        "lora_r": 16,
        "max_length": 2048,
        "on_overlong": "truncate",
        "method": "lora",
        "lora_target_modules": ["q_proj", "v_proj"],
        "data": [{"path": "hf://org/capybara"}],
        "batch_size": 16,
        "dtype": "bf16",
    }
    lost = [entry for entry in translation.untranslated if entry.is_important]
    assert [entry.key for entry in lost] == ["assistant_only_loss"]
    assert "prompts are trained there" in lost[0].reason


@pytest.mark.parametrize(
    ("lines", "data", "eval_split"),
    [
        ("datasets: [{path: org/a, name: en}, {path: org/b, split: new}]",
         [{"path": "hf://org/a", "config": "en"}, {"path": "hf://org/b", "split": "new"}], None),
        ("dataset_mixture:\n  test_split_size: 0.02\n  seed: 0\n  datasets:\n"
         "  - {id: org/a, config: en, split: new, columns: [messages], weight: 1.0}",
         [{"path": "hf://org/a", "config": "en", "split": "new"}], 0.02),
        ("dataset_mixer: {org/a: 1.0, org/b: 0.5}",
         [{"path": "hf://org/a"}, {"path": "hf://org/b"}], None),
        ("datasets: [{path: mine.jsonl}]\ntest_split_size: 0.1", [{"path": "mine.jsonl"}], 0.1),
    ],
    ids=["datasets", "dataset_mixture", "dataset_mixer", "a file"],
)  # fmt: skip
def test_mixtures_of_trl(lines: str, data: list[dict[str, str]], eval_split: float | None) -> None:
    Path("mine.jsonl").touch()
    translation = changed(TRL, lines, without=["dataset_name"])
    assert translation.values["data"] == data
    assert translation.values.get("eval_split") == eval_split
    lost = {entry.key for entry in translation.untranslated if entry.is_important}
    shares = {"dataset_mixer.weight of org/b"} if "0.5" in lines else set()
    assert lost == {"assistant_only_loss"} | shares


@pytest.mark.parametrize(
    "lines", ["dataset_mixture: [org/a]", "datasets: org/a", "datasets: [{path: [org/a]}]"]
)
def test_a_mixture_of_another_form_is_refused_by_its_line(lines: str) -> None:
    with pytest.raises(InputError, match=r"dataset|path") as refusal:
        changed(TRL, lines, without=["dataset_name"])
    assert re.search(r"yml:\d+", refusal.value.where)


def test_variables_of_the_template_and_a_revision_are_kept() -> None:
    lines = "chat_template_kwargs: {enable_thinking: false}\nmodel_revision: v1.0"
    values = changed(TRL, lines).values
    assert values["chat_template_kwargs"] == {"enable_thinking": False}
    assert values["model"] == "org/base-0.5b@v1.0"
    values = changed(LLAMAFACTORY, "enable_thinking: false").values
    assert values["chat_template_kwargs"] == {"enable_thinking": False}


def test_pairs_have_no_use_for_trained_prompts() -> None:
    translation = changed(LLAMAFACTORY, "train_on_prompt: true", "stage: dpo", without=["stage"])
    assert "train_on" not in translation.values
    assert not untranslated_by_key(translation)["train_on_prompt"].is_important


def test_trl_splits_of_a_data_set_of_the_hub() -> None:
    lines = "dataset_config: en\ndataset_train_split: train_sft\ndataset_test_split: test_sft"
    values = changed(TRL, lines).values
    assert values["data"] == [{"path": "hf://org/capybara", "config": "en", "split": "train_sft"}]
    assert values["eval_data"] == [
        {"path": "hf://org/capybara", "config": "en", "split": "test_sft"}
    ]


def test_overrides_win() -> None:
    translation = translated(TRL, model="tiny", data="mine.jsonl")
    assert (translation.values["model"], translation.values["data"]) == ("tiny", "mine.jsonl")
    assert "dataset_name" not in untranslated_by_key(translation)


# ---------------------------------------------------------------- single topics


@pytest.mark.parametrize(
    ("lines", "values"),
    [
        (["warmup_steps: 20"], {}),
        (["warmup_steps: 0.1"], {"warmup_ratio": 0.1}),
        (
            ["warmup_steps: 20", "max_steps: 100", "warmup_ratio: 0.5"],
            {"warmup_ratio": 0.2, "max_steps": 100},
        ),
        (["max_steps: -1", "warmup_ratio: 0"], {"warmup_ratio": 0}),
        (["lr_scheduler: constant_with_warmup"], {"lr_scheduler_type": "constant_with_warmup"}),
        (["lr_scheduler: rex"], {}),
        (["bf16: true"], {"dtype": "bf16"}),
        (["float32: true"], {"dtype": "fp32"}),
        (["fp16: true"], {"dtype": "fp16"}),
        (["bf16: false"], {}),
        (["micro_batch_size: 3"], {"batch_size": 3}),
        (["gradient_accumulation_steps: 4"], {"batch_size": 4}),
        (["save_steps: 0.25", "eval_steps: 50", "eval_strategy: no"], {}),
        (["save_steps: 100", "eval_steps: 50"], {"save_steps": 100, "eval_steps": 50}),
        (["learning_rate: 1e-5"], {"learning_rate": 1e-5}),
        (["val_set_size: 0"], {}),
        (["val_set_size: 500"], {}),
        (["chat_template: tokenizer_default"], {}),
        (["chat_template: jinja", "chat_template_jinja: t.jinja"], {"chat_template": "t.jinja"}),
        (["adapter: lora", "lora_target_modules: [q_proj]", "lora_target_linear: true"], {}),
    ],
)
def test_one_topic(lines: list[str], values: dict[str, Any]) -> None:
    write_config(Path.cwd(), "{{ messages }}", "t.jinja")
    adapter = [] if any(line.startswith("adapter") for line in lines) else ["adapter: lora"]
    translation = translated(
        "\n".join(["base_model: tiny", "datasets: [{path: a.jsonl}]", *adapter, *lines])
    )
    fixed = {"model", "data", "method", "lora_target_modules"}
    assert {key: value for key, value in translation.values.items() if key not in fixed} == values
    assert translation.values["method"] == "lora"


def test_steps_of_warm_up_without_a_number_of_steps_are_named() -> None:
    assert (
        "warmup_ratio"
        in untranslated_by_key(changed(AXOLOTL, without=["max_steps"]))["warmup_steps"].reason
    )


def test_without_an_adapter_all_weights_are_trained() -> None:
    translation = changed(AXOLOTL, without=["adapter", "lora_target_linear", "load_in_4bit"])
    assert translation.values["method"] == "full"
    assert not {key for key in translation.values if key.startswith("lora_")}
    assert "trains no adapter" in untranslated_by_key(translation)["lora_r"].reason


@pytest.mark.parametrize(
    "key",
    ["relora", "frobnicate", "dataset_shard_num", "dataloader_drop_last", "tokenized_path"],
)
def test_keys_that_may_change_the_training_come_first(key: str) -> None:
    assert untranslated_by_key(changed(AXOLOTL, f"{key}: true"))[key].is_important
    assert key not in untranslated_by_key(changed(AXOLOTL, f"{key}: false"))


def test_a_config_that_only_evaluates_is_said_to_train_now() -> None:
    translation = changed(LLAMAFACTORY, "do_train: false", without=["do_train"])
    assert untranslated_by_key(translation)["do_train"].is_important
    assert not untranslated_by_key(translated(LLAMAFACTORY))["do_train"].is_important


def test_a_pattern_of_layers_stays_a_pattern() -> None:
    lines = [
        "base_model: tiny",
        "datasets: [{path: a.jsonl}]",
        "adapter: lora",
        "lora_target_modules: '.*[qv]_proj'",
    ]
    assert translated("\n".join(lines)).values["lora_target_modules"] == ".*[qv]_proj"


def test_dora_keeps_its_name() -> None:
    assert changed(AXOLOTL, "peft_use_dora: true").values["use_dora"] is True
    assert changed(LLAMAFACTORY, "use_dora: true").values["use_dora"] is True


def test_an_output_folder_that_is_there_is_not_used_again() -> None:
    (Path.cwd() / "outputs" / "qlora").mkdir(parents=True)
    translation = translated(AXOLOTL)
    assert "output_dir" not in translation.values
    assert "must be new" in untranslated_by_key(translation)["output_dir"].reason


def test_an_adapter_to_go_on_with() -> None:
    assert (
        "no such folder"
        in untranslated_by_key(changed(AXOLOTL, "lora_model_dir: old/adapter"))[
            "lora_model_dir"
        ].reason
    )
    (Path.cwd() / "old" / "adapter").mkdir(parents=True)
    assert changed(AXOLOTL, "lora_model_dir: old/adapter").values["adapter_from"] == "old/adapter"
    assert (
        changed(LLAMAFACTORY, "adapter_name_or_path: old/adapter").values["adapter_from"]
        == "old/adapter"
    )


def test_paths_are_relative_to_the_recipe() -> None:
    write_config(Path.cwd(), "", "data/chats.jsonl")
    config = write_config(Path.cwd(), AXOLOTL)
    translation = translate(config, Path.cwd() / "recipes" / "new" / "recipe.yaml")
    assert translation.values["data"][0]["path"] == "../../data/chats.jsonl"


# ---------------------------------------------------------------- data sets


@pytest.mark.parametrize(
    ("entry", "source"),
    [
        ("{path: a.jsonl, type: chat_template}", {"path": "a.jsonl", "format": "messages"}),
        ("{path: a.jsonl, type: sharegpt}", {"path": "a.jsonl", "format": "sharegpt"}),
        (
            "{path: a.jsonl, type: completion, field: body}",
            {"format": "text", "columns": {"text": "body"}},
        ),
        (
            "{path: json, data_files: a.jsonl, type: alpaca}",
            {"path": "a.jsonl", "format": "alpaca"},
        ),
        (
            "{path: deep, data_files: [b.jsonl], type: completion}",
            {"path": "deep/b.jsonl", "format": "text"},
        ),
        ("{path: org/set, type: oasst}", {"path": "hf://org/set"}),
        (
            "{path: org/set, name: en, split: train_sft, revision: v1, type: alpaca}",
            {
                "path": "hf://org/set",
                "revision": "v1",
                "config": "en",
                "split": "train_sft",
                "format": "alpaca",
            },
        ),
        (
            "{path: org/set, data_files: [x.jsonl], type: alpaca}",
            {"path": "hf://org/set", "data_files": ["x.jsonl"], "format": "alpaca"},
        ),
        ("{path: ./gone.csv}", {"path": "./gone.csv"}),
        (
            "{path: a.jsonl, type: "
            "{field_instruction: q, field_output: a, format: '{instruction}'}}",
            {"format": "alpaca", "columns": {"instruction": "q", "output": "a"}},
        ),
        (
            "{path: a.jsonl, type: chat_template, field_messages: turns, "
            "roles: {user: [human], assistant: [gpt]}}",
            {"format": "messages", "columns": {"messages": "turns"}},
        ),
    ],
)
def test_axolotl_data_sets(entry: str, source: dict[str, Any]) -> None:
    write_config(Path.cwd(), "", "a.jsonl")
    write_config(Path.cwd(), "", "deep/b.jsonl")
    translation = translated(f"base_model: tiny\nadapter: lora\ndatasets: [{entry}]\n").values[
        "data"
    ]
    assert [{"path": "a.jsonl"} | source] == translation


@pytest.mark.parametrize(
    ("name", "source", "untranslated_value"),
    [
        ("openai", {"path": "sets/openai.jsonl", "format": "messages"}, ""),
        ("remote", {"path": "hf://org/rows", "format": "alpaca"}, ""),
        ("pictures", {"path": "sets/p.json", "format": "sharegpt"}, "images"),
        ("nothing", {"path": "nothing.jsonl"}, "nothing"),
    ],
)
def test_llamafactory_data_sets(name: str, source: dict[str, Any], untranslated_value: str) -> None:
    write_datasets(Path.cwd())
    translation = changed(LLAMAFACTORY, f"dataset: {name}", without=["dataset", "max_samples"])
    assert translation.values["data"] == [source]
    assert untranslated_value in {
        str(entry.value) for entry in translation.untranslated if entry.key.startswith("dataset")
    } | {""}


def test_without_dataset_info_the_names_stay_to_be_filled_in() -> None:
    translation = translated(LLAMAFACTORY)
    assert [source["path"] for source in translation.values["data"]] == [
        "tickets.jsonl",
        "manual.jsonl",
    ]
    assert "dataset_info.json" in untranslated_by_key(translation)["dataset tickets"].reason


# ---------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("text", "where", "message"),
    [
        ("a: [1\n", "config.yml:2:1", "not YAML"),
        ("- one\n", "config.yml:1", "expected a mapping"),
        ("", "config.yml", "not a config of LLaMA-Factory, Axolotl, TRL"),
        ("colour: red\n", "config.yml", "not a config of LLaMA-Factory, Axolotl, TRL"),
        ("model: tiny\ndata: a.jsonl\n", "config.yml", "already a tunesmith recipe"),
        ("cutoff_len: 3\nmicro_batch_size: 1\n", "config.yml", "keys of two tools"),
        (
            "base_model: a\nbase_model: b\n",
            "config.yml:2",
            "'base_model' is repeated",
        ),
        ("datasets: [{path: a.jsonl}]\n", "config.yml", "base_model is missing"),
        ("base_model: a\nadapter: lora\n", "config.yml", "no data set is named"),
        ("base_model: a\ndatasets: a.jsonl\n", "config.yml:2", "expected a list of mappings"),
        (
            "base_model: a\ndatasets: [{path: a}]\nrl: grpo\n",
            "config.yml:3",
            "use dpo, orpo, simpo or kto",
        ),
        ("base_model: a\ndatasets: []\nreward_model: true\n", "config.yml:3", "is not supported"),
        ("stage: ppo\ndataset: a\n", "config.yml:1", "use sft, dpo, kto or pt"),
        (
            "model_name_or_path: a\nval_size: 0.1\neval_dataset: b\n",
            "config.yml:2",
            "contradict each other",
        ),
        (
            "base_model: a\nval_set_size: 0.1\ntest_datasets: [{path: b}]\n",
            "config.yml:2",
            "contradict",
        ),
        (
            "base_model: a\nadapter: lora\nbf16: true\nfp16: true\n",
            "config.yml:4",
            "contradict each other",
        ),
        (
            "base_model: a\nmicro_batch_size: auto\n",
            "config.yml:2",
            "expected a number, found 'auto'",
        ),
        (
            "base_model: a\nsequence_len: long\ndatasets: [{path: b}]\n",
            "config.yml",
            "expected 'auto' or a whole",
        ),
        (TRL + "max_seq_length: 512\n", "config.yml:16", "contradict each other: 512 and 2048"),
    ],
)
def test_what_cannot_be_translated_is_refused_by_line(text: str, where: str, message: str) -> None:
    with pytest.raises(InputError, match=re.escape(message)) as raised:
        translated(text)
    assert raised.value.where.endswith(where)


PAIR_LINES = ("stage: dpo", "dataset: pairs", "pref_beta: 0.2", "pref_ftx: 0.5")


@pytest.mark.parametrize(
    ("theirs", "ours"), [("sigmoid", "dpo"), ("orpo", "orpo"), ("simpo", "simpo")]
)
def test_preferences_of_llamafactory(theirs: str, ours: str) -> None:
    write_datasets(Path.cwd())
    lines = (*PAIR_LINES, f"pref_loss: {theirs}", "simpo_gamma: 0.7")
    translation = changed(LLAMAFACTORY, *lines, without=["stage", "dataset", "eval_dataset"]).values
    margin = {"gamma": 0.7} if ours == "simpo" else {}
    assert translation["stage"] == "preference"
    share = 1.5 if ours == "orpo" else 0.5  # added to ORPO's own
    assert translation["loss"] == {"name": ours, "beta": 0.2, "nll_coefficient": share} | margin
    assert translation["data"][0]["format"] == "preference"


def test_preferences_of_axolotl() -> None:
    rows = "datasets: [{path: a.jsonl, type: chatml.ultra, field_chosen: good}]\n"
    translation = translated("base_model: a\nadapter: lora\nrl: orpo\norpo_alpha: 0.3\n" + rows)
    assert (translation.values["stage"], translation.values["loss"]) == (
        "preference",
        {"name": "orpo", "beta": 0.3},
    )
    assert translation.values["data"] == [
        {"path": "a.jsonl", "format": "preference", "columns": {"chosen": "good"}}
    ]
    assert "datasets[0].type" in untranslated_by_key(translation)


CONTINUED = {
    "LLaMA-Factory": "model_name_or_path: a\nstage: pt\ndataset: c4\n"
    "per_device_train_batch_size: 2\n"
    "gradient_accumulation_steps: 4\ncutoff_len: 512\nlora_rank: 8\n",
    "Axolotl": "base_model: a\npretraining_dataset: {path: c4}\nmicro_batch_size: 2\n"
    "gradient_accumulation_steps: 4\nsequence_len: 512\nadapter: lora\n",
}


@pytest.mark.parametrize("tool", CONTINUED)
def test_continued_pretraining_counts_tokens(tool: str) -> None:
    translation = translated(CONTINUED[tool])
    assert translation.tool == tool
    assert (
        translation.values["stage"],
        translation.values["batch_tokens"],
        translation.values["max_length"],
    ) == (
        "cpt",
        4096,
        512,
    )
    assert not {"batch_size", "on_overlong"} & translation.values.keys()
    without = changed(CONTINUED[tool], without=["cutoff_len", "sequence_len"])
    assert "batch_tokens" not in without.values
    assert "batch_size" in untranslated_by_key(without)


KEYS = sorted(
    {
        *(key for rules in TOOLS.values() for key in rules["signature"].split()),
        *yaml.safe_load(AXOLOTL + LLAMAFACTORY),
    }
)
VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-2, 9)
    | st.floats(allow_nan=False)
    | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=2) | st.dictionaries(st.sampled_from(["path", "type", "a"]), inner)
    ),
    max_leaves=4,
)


@pytest.mark.promise
@settings(
    max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    st.dictionaries(st.sampled_from(KEYS), VALUES, max_size=8),
    st.sampled_from([AXOLOTL, LLAMAFACTORY, TRL]),
)
def test_strange_values_are_translated_or_refused(odd: dict[str, Any], text: str) -> None:
    try:
        assert translated(yaml.safe_dump(yaml.safe_load(text) | odd)).values["data"]
    except InputError as error:
        assert error.where  # noqa: PT017 - which of the two it is, is open


def test_new_tokens_come_along() -> None:
    """Modules trained in full for new tokens are not needed."""
    translation = changed(
        AXOLOTL, "tokens: ['<n>', '[sum]']", "lora_modules_to_save: [embed_tokens, lm_head]"
    )
    assert translation.values["add_tokens"] == ["<n>", "[sum]"]
    assert untranslated_by_key(translation)["lora_modules_to_save"].is_important is False
    write_datasets(Path.cwd())
    translation = changed(
        LLAMAFACTORY, "new_special_tokens: '<n>, [sum]'", "additional_target: q_proj"
    )
    assert translation.values["add_tokens"] == ["<n>", "[sum]"]
    assert translation.values["modules_to_save"] == ["q_proj"]


def test_modules_trained_in_full_come_along() -> None:
    write_datasets(Path.cwd())
    for example, line in (
        (AXOLOTL, "lora_modules_to_save: [embed_tokens, lm_head]"),
        (LLAMAFACTORY, "additional_target: embed_tokens,lm_head"),
    ):
        translation = changed(example, line)
        assert translation.values["modules_to_save"] == ["embed_tokens", "lm_head"]
