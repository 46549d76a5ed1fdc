import pytest

from tunesmith.core.errors import InputError
from tunesmith.data.readers import hub_splits
from tunesmith.data.readers.hub_splits import HubChoice, choose_files

README = """---
license: mit
configs:
- config_name: en
  default: true
  data_files:
  - split: train
    path: en/train-*
  - split: test
    path: [en/test.jsonl]
- config_name: de
  data_dir: de
  data_files: "**/*.jsonl"
---
# Rows
"""
FILES = ["README.md", "en/train-1.jsonl", "en/train-2.jsonl", "en/test.jsonl", "de/x/all.jsonl"]


def choose(files: list[str], readme: str = "", default: str = "train", **choice) -> list[str]:
    return list(
        choose_files(files, readme, HubChoice(**choice), where="data", default_split=default)
    )


def test_configs_of_the_readme_name_the_files() -> None:
    assert choose(FILES, README) == ["en/train-1.jsonl", "en/train-2.jsonl"]
    assert choose(FILES, README, config="en", split="test") == ["en/test.jsonl"]
    assert choose(FILES, README, config="de") == ["de/x/all.jsonl"]
    assert choose(FILES, README.replace("\n", "\r\n")) == ["en/train-1.jsonl", "en/train-2.jsonl"]


@pytest.mark.parametrize(
    ("files", "splits"),
    [
        (
            ["data/train_sft-00000-of-00002.jsonl", "data/train_sft-00001-of-00002.jsonl"],
            {
                "train_sft": [
                    "data/train_sft-00000-of-00002.jsonl",
                    "data/train_sft-00001-of-00002.jsonl",
                ]
            },
        ),
        (
            ["train.jsonl", "my-dev.jsonl", "eval.jsonl", "notes.jsonl"],
            {"train": ["train.jsonl"], "validation": ["my-dev.jsonl"], "test": ["eval.jsonl"]},
        ),
        (
            ["train/a.jsonl", "train/b.jsonl", "validation/c.jsonl"],
            {"train": ["train/a.jsonl", "train/b.jsonl"], "validation": ["validation/c.jsonl"]},
        ),
        (["b.csv", "a.csv", "dataset_infos.json", ".hidden.csv"], {"train": ["a.csv", "b.csv"]}),
        (["constrained.jsonl", "latest.jsonl"], {"train": ["constrained.jsonl", "latest.jsonl"]}),
    ],
)
def test_names_of_files_and_folders(files: list[str], splits: dict[str, list[str]]) -> None:
    for split, expected in splits.items():
        assert choose(files, split=split) == expected
    with pytest.raises(InputError, match="no split 'nosuch'") as caught:
        choose(files, split="nosuch")
    assert all(split in caught.value.fix for split in splits)


def test_the_default_split_is_that_of_the_key_or_the_only_one() -> None:
    files = ["train.jsonl", "validation.jsonl"]
    assert choose(files, default="validation") == ["validation.jsonl"]
    assert choose(["validation.jsonl"]) == ["validation.jsonl"]
    with pytest.raises(InputError, match="which split is not set"):
        choose(files, default="test")


def test_files_by_name_and_pattern() -> None:
    files = ["a/1.jsonl", "a/b/2.jsonl", "3.jsonl", "x[1].jsonl"]
    assert choose(files, data_files=("a/*.jsonl",)) == ["a/1.jsonl"]
    assert choose(files, data_files=("a/**/*.jsonl",)) == ["a/1.jsonl", "a/b/2.jsonl"]
    assert choose(files, data_files=("3.jsonl", "a/1.jsonl")) == ["3.jsonl", "a/1.jsonl"]
    assert choose(files, data_files=("x[1].jsonl",)) == ["x[1].jsonl"]
    with pytest.raises(InputError, match="no file matches"):
        choose(files, data_files=("3.jsonl", "4.jsonl"))


@pytest.mark.parametrize(
    ("files", "choice", "message"),
    [
        (["rows.py", "data.zip"], {}, "code from the hub is never run"),
        (["rows.py", "train.jsonl"], {}, "code from the hub is never run"),
        (["a.arrow", "b.arrow", "state.json"], {}, "it has .arrow files, .json files"),
        (["train.jsonl", "train.csv"], {}, "several types, .csv and .jsonl"),
        (["train.jsonl"], {"split": "train[:10]"}, "slices of a split"),
        (["train.jsonl"], {"config": "en"}, "lists no configs"),
        (["a.pkl"], {"data_files": ("a.pkl",)}, "a.pkl cannot be read"),
        (["a.csv"], {"data_files": ("**/" * 9 + "a.csv",)}, "too long"),
    ],
)
def test_what_is_refused(files: list[str], choice: dict, message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        choose(files, **choice)
    assert caught.value.fix


@pytest.mark.parametrize(
    ("readme", "message"),
    [
        ("---\nconfigs: [\n---\n", "not valid YAML"),
        ("---\nconfigs:\n- data_files: [{split: train}]\n---\n", "are not patterns"),
        ("---\nconfigs:\n- data_files: nosuch-*\n---\n", "no file matches"),
        (README.replace("  default: true\n", ""), "several configs"),
    ],
)
def test_metadata_that_cannot_be_used(readme: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        choose(FILES, readme)


def test_other_metadata_do_not_count() -> None:
    for readme in ("# no metadata", "---\nlicense: mit\n---\n", "---\n- a list\n---\n"):
        assert choose(["train.jsonl"], readme) == ["train.jsonl"]


def test_parquet_needs_pyarrow(monkeypatch: pytest.MonkeyPatch) -> None:
    assert choose(["train.parquet"]) == ["train.parquet"]
    monkeypatch.setattr(hub_splits, "find_spec", lambda _: None)
    with pytest.raises(InputError, match="needs pyarrow"):
        choose(["train.parquet"])
