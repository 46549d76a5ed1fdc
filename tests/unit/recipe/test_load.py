"""Reading recipe files: every mistake is named, with its line."""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from tunesmith.cli.args import parse_flags
from tunesmith.core.errors import InputError
from tunesmith.data.readers.sources import open_source
from tunesmith.recipe.explain import REPLACEMENTS
from tunesmith.recipe.fields import is_self_generated
from tunesmith.recipe.load import dump_recipe, is_flag_value, load_recipe
from tunesmith.recipe.schema import ALIASES, KEYS


def write(folder: Path, text: str) -> Path:
    path = folder / "recipe.yaml"
    path.write_text(text)
    return path


def refusal(folder: Path, text: str, **flags: str) -> str:
    with pytest.raises(InputError) as caught:
        load_recipe(write(folder, text), flags)
    return str(caught.value).replace(f"{folder}/", "")


GOOD = "model: tiny\ndata: train.jsonl\n"


def test_input_paths_are_relative_to_the_recipe_and_flags_to_the_current_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "model").mkdir()
    here = tmp_path / "here"
    here.mkdir()
    monkeypatch.chdir(here)
    text = (
        "model: model\ndata: [a.jsonl, {path: sub/b.jsonl}]\nresponse_schema: s.json\n"
        "chat_template: t.jinja\noutput_dir: runs/x\n"
    )
    recipe = load_recipe(write(tmp_path, text), {"test-data": "c.jsonl"})
    assert recipe.model == str(tmp_path / "model")
    assert [source.path for source in recipe.data] == [
        tmp_path / "a.jsonl",
        tmp_path / "sub/b.jsonl",
    ]
    assert recipe.response_schema == tmp_path / "s.json"
    assert recipe.chat_template == tmp_path / "t.jinja"
    assert recipe.test_data[0].path == here / "c.jsonl"
    assert recipe.output_dir == Path("runs/x")


def test_a_model_that_is_no_folder_here_stays_a_name(tmp_path: Path) -> None:
    assert load_recipe(write(tmp_path, GOOD), {"model": "org/name"}).model == "org/name"


def test_flags_win_and_dashes_equal_underscores(tmp_path: Path) -> None:
    recipe = load_recipe(
        write(tmp_path, GOOD + "learning_rate: 1e-4\nlora-r: 4\n"),
        {
            "learning-rate": "2e-4",
            "lora_rank": "8",
            "lora_target_modules": "[q_proj, v_proj]",
            "use-rslora": "true",
        },
    )
    assert (recipe.learning_rate, recipe.lora_r, recipe.use_rslora) == (2e-4, 8, True)
    assert recipe.lora_target_modules == ("q_proj", "v_proj")


def test_a_flag_can_unset_a_key(tmp_path: Path) -> None:
    recipe = load_recipe(
        write(tmp_path, GOOD + "eval_data: e.jsonl\n"), {"eval_data": "null", "eval_split": "0.2"}
    )
    assert (recipe.eval_data, recipe.eval_split) == ((), 0.2)


def test_no_file_is_needed() -> None:
    assert load_recipe(None, {"model": "tiny", "data": "/x/a.jsonl"}).data[0].path == Path(
        "/x/a.jsonl"
    )


@pytest.mark.parametrize(
    ("line", "key", "value"),
    [
        ("template: none", "chat_template", "none"),
        ("schema: /s.json", "response_schema", Path("/s.json")),
        ("skip_bad: true", "skip_invalid", True),
        ("overlong: truncate", "on_overlong", "truncate"),
        ("activations: selective", "gradient_checkpointing", "selective"),
        ("context: 2", "context_parallel_size", 2),
        ("shard: 4", "dp_shard_size", 4),
        ("activations: recompute", "gradient_checkpointing", "full"),
        ("gradient_checkpointing: recompute", "gradient_checkpointing", "full"),
        ("gradient_checkpointing: keep", "gradient_checkpointing", "none"),
        ("gradient_checkpointing: true", "gradient_checkpointing", "full"),
        ("gradient_checkpointing: false", "gradient_checkpointing", "none"),
        ("attention: kernel", "attention", "cpu_kernel"),
        ("attention: documents", "attention", "sdpa"),
        ("attention: mask", "attention", "dense_mask"),
    ],
)
def test_former_keys_and_values_are_aliases(
    tmp_path: Path, line: str, key: str, value: object
) -> None:
    assert getattr(load_recipe(write(tmp_path, GOOD + line + "\n")), key) == value
    name, _, text = line.partition(": ")
    assert getattr(load_recipe(write(tmp_path, GOOD), {name: text}), key) == value


@pytest.mark.parametrize("data", ["self", "[self]", "{path: self}", "self-generated"])
def test_self_generated_rehearsal_has_a_former_name(tmp_path: Path, data: str) -> None:
    recipe = load_recipe(write(tmp_path, GOOD + f"rehearsal: {{data: {data}}}\n"))
    assert recipe.rehearsal is not None
    assert recipe.rehearsal.is_self_generated
    assert str(recipe.rehearsal.data[0].path) == "self-generated"


@pytest.mark.parametrize(
    "source",
    [
        "{path: self-generated, max_examples: 20}",
        "{path: self-generated, format: text}",
        "{path: self, weight: 2}",
        "{path: self-generated, unknown: 1}",
        "[{path: self-generated}, {path: other.jsonl}]",
        "[self-generated, other.jsonl]",
    ],
)
def test_generated_rehearsal_has_no_other_keys_and_no_company(source: str, tmp_path: Path) -> None:
    """Such an entry names a file, which does not exist; its keys are not dropped without a word."""
    value = yaml.safe_load(source)
    assert not is_self_generated(value)
    text = f"{GOOD}rehearsal: {{data: {source}}}\n"
    if "unknown" in source:
        assert "unknown" in refusal(tmp_path, text)
        return
    first = load_recipe(write(tmp_path, text), {}).rehearsal.data[0]
    assert first.path.parent == tmp_path
    with pytest.raises(InputError, match="no such file"):
        open_source(first.path)


def test_generated_rehearsal_is_recognized_as_a_plan_stores_it(tmp_path: Path) -> None:
    recipe = load_recipe(write(tmp_path, GOOD + "rehearsal: {data: {path: self-generated}}\n"), {})
    stored = recipe.model_dump(mode="json")["rehearsal"]["data"]
    assert is_self_generated(stored)
    assert is_self_generated("self-generated")
    assert is_self_generated([{"path": "self"}])


@pytest.mark.parametrize("key", ["skip-bad", "skip_bad", "skip-invalid"])
def test_a_former_name_of_a_switch_takes_no_file_for_its_value(key: str) -> None:
    assert not is_flag_value(key, "recipe.yaml")
    assert is_flag_value(key, "false")
    assert parse_flags([f"--{key}", "recipe.yaml"]) == (Path("recipe.yaml"), {key: "true"})


@pytest.mark.parametrize("key", ["lr", "learning-rate", "cutoff_len", "activations"])
def test_former_names_of_keys_that_are_no_switch_need_a_value(key: str) -> None:
    with pytest.raises(InputError, match=f"--{key} has no value"):
        parse_flags([f"--{key}"])


@pytest.mark.parametrize("key", ["gradient-checkpointing", "activations"])
def test_a_missing_value_names_the_values(key: str) -> None:
    with pytest.raises(InputError) as caught:
        parse_flags([f"--{key}"])
    assert caught.value.fix == f"write --{key} VALUE: auto, none, selective or full"
    with pytest.raises(InputError) as caught:
        parse_flags(["--batch-size", "--seed", "1"])
    assert caught.value.fix == "write --batch-size VALUE"


def test_other_tools_names_are_understood(tmp_path: Path) -> None:
    text = (
        "model_name_or_path: tiny\nfinetuning_type: lora\ndata: a.jsonl\ncutoff_len: 512\n"
        "epochs: 2\nval_size: 0.1\n"
    )
    recipe = load_recipe(write(tmp_path, text))
    assert (recipe.model, recipe.method, recipe.max_length) == ("tiny", "lora", 512)
    assert (recipe.num_train_epochs, recipe.eval_split) == (2, 0.1)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (
            "learning_rat: 1",
            "recipe.yaml:3: unknown key 'learning_rat'; did you mean 'learning_rate'?",
        ),
        ("cutof_len: 1", "did you mean 'cutoff_len'?"),
        ("zzz: 1", "unknown key 'zzz'; `tunesmith schema` lists all"),
        ("micro_batch_size: 4", "set batch_size, the data rows per optimizer step"),
        (
            "guard: x",
            "guard: expected 'auto' or 'off' or a mapping {collapse, forgetting, margin, patience, "
            "probe_steps}",
        ),
        (
            "guard: {collapse: go}",
            "guard.collapse: expected 'auto' or 'off' or 'warn' or 'rollback' or 'stop'",
        ),
        ("loss: {beta: 0}", "loss.beta: expected 'auto' or a number above 0, found the number 0"),
        ("loss: {bet: 1}", "loss: unknown key 'bet'; did you mean 'beta'?"),
        ("loss: bpo", "expected 'auto' or 'dpo' or 'orpo' or 'simpo' or 'kto', found 'bpo'"),
        ("pref_beta: 1", "'pref_beta' is not a key here: set loss: {beta: ...}"),
        ("report_to: wandb", "run `tunesmith train RECIPE --track wandb` (or tensorboard)"),
        ("eval_strategy: steps", "leave it out, or set eval_steps and save_steps"),
        ("load_best_model_at_end: true", "the checkpoint that is best on eval_data is used"),
        ("max_new_tokens: 8", "the longest expected answer sets the limit"),
        (
            "never: [{match: '('}]",
            "recipe.yaml:3: never[0].match: not a regular expression: missing )",
        ),
        ("never: [{match: 'a*'}]", "never[0].match: the pattern matches an empty answer"),
        ("never: [{match: a, mod: ban}]", "never[0]: unknown key 'mod'; did you mean 'mode'?"),
        (
            "never: [{mode: ban}]",
            "never[0]: set exactly one of match, text, check, not none of them",
        ),
        (
            "never: [{match: a, mode: stop}]",
            "never[0].mode: expected 'filter' or 'ban' or 'pair', found 'stop'",
        ),
        (
            "never: [3]",
            "never[0]: expected a text or a mapping {match, text, check, name, mode}",
        ),
        ("method: dora", "method: 'dora' is not a value here: set use_dora: true"),
        ("load_in_4bit: true", "set method: qlora"),
        ("learning_rate: fast", "expected 'auto' or a number above 0 and at most 1, found 'fast'"),
        ("seed: on", "found true (YAML reads on, yes, off and no as true and false"),
        ("model: other", "recipe.yaml:3: 'model' is repeated"),
        ("base_model: other", "recipe.yaml:3: 'base_model' and 'model' are the same key: keep one"),
        (
            "eval_data: [{path: e.jsonl, formt: x}]",
            "eval_data[0]: unknown key 'formt'; did you mean 'format'?",
        ),
        ("eval_data:\n  - {format: x}", "recipe.yaml:4: eval_data[0] has no 'path'"),
        (
            "eval_data: [{path: e.jsonl, format: x}]",
            "eval_data[0].format: expected 'auto' or 'messages' or 'completion'",
        ),
        (
            "eval_data: [{path: e.jsonl, max_examples: all}]",
            "eval_data[0].max_examples: expected a whole number of at",
        ),
        (
            "eval_data: [7]",
            "eval_data[0]: expected a path or a mapping {path, format, columns, ...}, found the",
        ),
        (
            "chat_template: chatml",
            "expected 'auto' or 'none' or the path of a .jinja file, found 'chatml'",
        ),
        ("output_dir: 2026-01-01", "found the date 2026-01-01 (quote it to make it a string)"),
        (
            "metrics: {a: [1]}",
            "expected 'auto' or a list of names, or of {name: value}, found the mapping {'a': [1]}",
        ),
        ("lora_r:", "lora_r: expected 'auto' or a whole number of at least 1, found nothing"),
        ("test_data: train.jsonl", "recipe.yaml:3: test_data and data name the same file"),
        ("1: 2", "unknown key '1'"),
        ("max_length: [", "recipe.yaml:4:1: not YAML"),
        (
            "model: !!python/object/apply:os.system [ls]",
            "recipe.yaml:3:8: not YAML: could not determine a constructor",
        ),
    ],
)
def test_each_mistake_says_where_and_what(tmp_path: Path, line: str, message: str) -> None:
    assert message in refusal(tmp_path, GOOD + line + "\n")


def test_all_mistakes_are_listed_at_once_in_the_order_of_the_file(tmp_path: Path) -> None:
    text = "lora_r: x\nmodle: tiny\nlora_alpha: [1]\neval_split: 2\neval_data: e.jsonl\n"
    lines = refusal(tmp_path, text, dropout="1").splitlines()
    assert lines[0].startswith("recipe.yaml: 8 problems")
    starts = [line.split()[0] for line in lines[1:]]
    assert starts == ["recipe.yaml:"] * 2 + [f"recipe.yaml:{n}:" for n in (1, 2, 3, 4, 4)] + [
        "command"
    ]
    assert "'model' is missing" in lines[1]
    assert "'data' is missing" in lines[2]
    assert "'--dropout'; did you mean 'lora_dropout'?" in lines[8]


def test_mistakes_in_flags_name_the_flag(tmp_path: Path) -> None:
    assert refusal(tmp_path, GOOD, **{"lora-r": "many"}).startswith(
        "command line: --lora-r: expected 'auto' or a whole"
    )


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "2 problems"),
        (b"- a\n- b\n", "recipe.yaml:1: expected a mapping"),
        (b"model: \xff\n", "byte 7 is not UTF-8"),
        (
            b"\xef\xbb\xbfmodel: tiny\r\ndata:\r\n",
            "recipe.yaml:2: data: expected a path or a mapping",
        ),
        (b"model: \x07\n", "not YAML: unacceptable character #x0007"),
        (b"output_dir: 2026-99-99\n", "invalid value: month must be in 1..12"),
        (b"a: &a [x, *a]\n", "unknown key 'a'"),
        (b"[" * 100_000, "nested more than 50 levels deep"),
        (b"#" * 1_000_001, "too many for a recipe"),
        (b"model: a\n---\nmodel: b\n", "recipe.yaml:2:1: not YAML: but found another document"),
    ],
)
def test_files_that_are_no_recipe(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "recipe.yaml").write_bytes(content)
    with pytest.raises(InputError) as caught:
        load_recipe(tmp_path / "recipe.yaml")
    assert message in str(caught.value)


def test_missing_files_and_devices_are_refused(tmp_path: Path) -> None:
    for path in (tmp_path / "none.yaml", tmp_path, Path("/dev/zero")):
        with pytest.raises(InputError, match=r"no such file|not a file") as caught:
            load_recipe(path)
        assert caught.value.fix
    write(tmp_path, GOOD)
    with pytest.raises(InputError) as caught:
        load_recipe(tmp_path)
    assert caught.value.fix == f"pass {tmp_path / 'recipe.yaml'}"


def test_metrics_are_names_with_arguments(tmp_path: Path) -> None:
    listed = "metrics: [field_f1, numeric: 0.01, {regex: 'a: b'}, mine.py:score, contains: b.py]\n"
    recipe = load_recipe(write(tmp_path, GOOD + listed))
    custom_metric = f"{tmp_path}/mine.py:score"  # relative to the recipe, as all files are
    assert recipe.metrics == (
        "field_f1",
        "numeric: 0.01",
        "regex: a: b",
        custom_metric,
        "contains: b.py",
    )
    assert (
        load_recipe(None, arguments=[recipe.model_dump(exclude_unset=True)]).metrics
        == recipe.metrics
    )
    assert load_recipe(write(tmp_path, GOOD + "metrics: {numeric: 0.01}\n")).metrics == (
        "numeric: 0.01",
    )


def test_strange_names_are_names(tmp_path: Path) -> None:
    recipe = load_recipe(write(tmp_path, f"model: {'x' * 5000}\ndata: ~nobody-of-this-name/a\n"))
    assert recipe.model == "x" * 5000
    assert recipe.data[0].path == tmp_path / "~nobody-of-this-name/a"
    assert "data[0].path: expected a path, found 'a\\u{0}b'" in refusal(
        tmp_path, 'model: "~nobody"\ndata: "a\\0b"\n'
    )
    with pytest.raises(InputError, match="no such file"):
        load_recipe(tmp_path / ("x" * 5000))


def test_a_missing_recipe_is_told_with_the_one_that_is_there(tmp_path: Path) -> None:
    write(tmp_path, GOOD)
    for name in ("nosuch.yaml", "x"):
        with pytest.raises(InputError, match="no such file") as caught:
            load_recipe(tmp_path / name)
        assert caught.value.fix == f"did you mean {tmp_path / 'recipe.yaml'}?"


def test_a_bomb_of_anchors_ends(tmp_path: Path) -> None:
    levels = "".join(f"  k{n}: &k{n} [{', '.join([f'*k{n - 1}'] * 9)}]\n" for n in range(1, 30))
    bomb = f"levels:\n  k0: &k0 x\n{levels}"
    message = refusal(tmp_path, GOOD + bomb + "metrics: *k29\neval_data: *k29\nseed: *k29\n")
    assert (
        "metrics: expected 'auto' or a list of names, or of {name: value}, found the list ["
        in message
    )
    assert len(message) < 10_000


def test_a_written_recipe_reads_back_equal_from_any_folder(tmp_path: Path) -> None:
    text = (
        GOOD
        + "eval_data: [{path: e.jsonl, max_examples: 5}]\nlearning_rate: 1e-4\n"
        + "response_schema: s.json\nmetrics: json_valid\n"
    )
    recipe = load_recipe(write(tmp_path, text))
    other = tmp_path / "run"
    other.mkdir()
    (other / "recipe.yaml").write_text(dump_recipe(recipe))
    assert load_recipe(other / "recipe.yaml") == recipe


def test_no_key_is_both_accepted_and_refused() -> None:
    assert not set(REPLACEMENTS) & set(KEYS)


KEY = st.sampled_from([*KEYS, *ALIASES, *REPLACEMENTS, "path", "1", "null"])
PLAIN = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | st.dates()
VALUE = st.recursive(
    PLAIN, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEY, inner, max_size=3)
)


@pytest.mark.promise
@settings(max_examples=150, deadline=None, derandomize=True)
@given(
    values=st.dictionaries(KEY, VALUE, max_size=6),
    flags=st.dictionaries(KEY, st.text(max_size=8), max_size=3),
)
def test_whatever_is_written_is_a_recipe_or_a_clear_refusal(
    values: dict[str, Any], flags: dict[str, str]
) -> None:
    with TemporaryDirectory() as folder:
        path = write(Path(folder), yaml.safe_dump({"model": "tiny", "data": "a.jsonl"} | values))
        try:
            recipe = load_recipe(path, flags)
        except InputError:
            return
        path.write_text(dump_recipe(recipe))
        assert load_recipe(path) == recipe
