"""The pages say what the program says: tables are made from the code, every verb has a page, and no
page names a verb, an option or a file that the program lacks."""

from __future__ import annotations

import importlib.util
import inspect
import re
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import get_args, get_type_hints

import pytest

from tunesmith.advise.rules.facts import FACTS
from tunesmith.cli import app
from tunesmith.core import run_dir
from tunesmith.recipe.load import load_recipe
from tunesmith.recipe.schema import ALIASES, KEYS
from tunesmith.report.page import REPORT_FILE
from tunesmith.train.base_reference import REFERENCE_FILE
from tunesmith.train.generated_rows import PAIRS_FILE

ROOT = Path(__file__).parents[2]
OPTION_FLAGS = {"show_all": "--all"}  # where a flag has not the name of its parameter
DOCS = ROOT / "docs"


def import_build() -> ModuleType:
    spec = importlib.util.spec_from_file_location("docs_build", DOCS / "build.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


build = import_build()
# the guide of a verb, where it has not the verb's name
PAGES = {
    "runs": "guides/train",
    "tune lr": "guides/tune",
    "tune sweep": "guides/sweep",
    "eval": "guides/evaluate",
    "compare": "guides/evaluate",
    "resume": "guides/train",
    "demo": "guides/train",
    "data check": "guides/data",
    "data show": "guides/data",
    "data curate": "guides/data",
    "data review": "guides/data",
    "data reviewed": "guides/data",
    "data export-reviews": "guides/data",
    "data import-reviews": "guides/data",
    "data lock": "guides/data",
    "data split": "guides/data",
    "schema": "reference/recipe",
    "keys add": "guides/serve",
    "keys list": "guides/serve",
    "keys remove": "guides/serve",
}


def test_the_table_of_keys_is_the_schema() -> None:
    """After a change of a key or an option: python docs/build.py --tables."""
    pages = [page for page in build.list_pages() if "<!-- table: " in page.read_text()]
    assert DOCS / "reference" / "recipe.md" in pages
    assert DOCS / "reference" / "cli.md" in pages
    for page in pages:
        assert build.replace_tables(page.read_text()) == page.read_text(), page.name


@pytest.mark.parametrize("page", ["README.md", "docs/reference/recipe.md"])
def test_the_recipes_of_the_pages_load(page: str, tmp_path: Path) -> None:
    blocks = re.findall(
        r"^```yaml\n(.*?)^```", (ROOT / page).read_text(), flags=re.MULTILINE | re.DOTALL
    )
    assert blocks
    for block in blocks:
        (tmp_path / "recipe.yaml").write_text(block)
        assert load_recipe(tmp_path / "recipe.yaml")


# ---------------------------------------------------------------- pages


def test_every_verb_has_a_page_with_its_options() -> None:
    for name, verb in app.VERBS.items():
        page = (DOCS / f"{PAGES.get(name, f'guides/{name}')}.md").read_text()
        assert f"tunesmith {name}" in page, name
        positional = {
            "args",
            "folder",
            "folders",
            "path",
            "as_json",
            "from_config",
            "target",
            "a",
            "b",
            "sources",
            "tables",
            "name",
        }
        options = set(inspect.signature(verb).parameters) - positional
        flags = {OPTION_FLAGS.get(option, f"--{option.replace('_', '-')}") for option in options}
        assert {flag for flag in flags if flag not in page} == set(), name


def test_every_page_is_in_the_index_and_every_link_leads_somewhere() -> None:
    index = (DOCS / "index.md").read_text()
    for page in DOCS.rglob("*.md"):
        name = str(page.relative_to(DOCS))
        assert name == "index.md" or f"({name})" in index, name
    for page in [*DOCS.rglob("*.md"), ROOT / "README.md", ROOT / "CONTRIBUTING.md"]:
        for link in re.findall(r"\]\(([^)#:]+)\)", page.read_text()):
            assert (page.parent / link).exists(), f"{page.name}: {link}"


@pytest.mark.parametrize("page", ["design/faults.md", "security.md", "guides/export.md"])
def test_every_test_that_a_page_names_exists(page: str) -> None:
    named = re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", (DOCS / page).read_text())
    assert named
    for file, test in named:
        assert re.search(rf"^def {test}\(", (ROOT / file).read_text(), flags=re.MULTILINE), (
            f"{page}: {file}::{test}"
        )


@pytest.mark.parametrize(
    "page", [ROOT / "README.md", *sorted(DOCS.rglob("*.md"))], ids=lambda page: page.stem
)
def test_every_output_is_there(page: Path) -> None:
    """A line of capitals is a placeholder; a block without output is one that was never built."""
    text = page.read_text()
    assert not re.findall(r"^[A-Z]+(?:_[A-Z]+)+$", text, flags=re.MULTILINE)
    assert not re.findall(r"<!-- (?:\$|table:) .* -->\n<!-- end -->", text), "run `make docs`"


# ---------------------------------------------------------------- stale words

# a history of names is no description of the program
CURRENT_PAGES = [
    ROOT / "README.md",
    *sorted(page for page in DOCS.rglob("*.md") if page != DOCS / "log.md"),
]
COMMAND = re.compile(r"(?:^|[`$|(]|&&) *tunesmith((?: [^`|;&#\n]*)?)", re.MULTILINE)
CODE = re.compile(r"^```.*?^```|`[^`\n]+`|^<!-- \$ .*?-->", re.MULTILINE | re.DOTALL)
FLAG = re.compile(r"(?<![\w-])--([a-z][\w-]*)")
DATA_FILE = re.compile(r"`([^`\s*<>]+\.(?:jsonl?|html|yaml))`")
PLACEHOLDER = re.compile(r"[A-Z]+")
RUN_FILES = {value for name, value in vars(run_dir).items() if name.endswith(("_FILE", "_DIR"))} | {
    REPORT_FILE,
    REFERENCE_FILE,
    PAIRS_FILE,
    "data.json",
}
COMMON_FLAGS = {"help", "version", "key"}  # --key value stands for any
RECIPE_FLAGS = {name.replace("_", "-") for name in (*KEYS, *ALIASES)}
FACT_FLAGS = {name.replace("_", "-") for name in FACTS}
SCRIPTS = [
    file.read_text()
    for folder in ("src", "benchmarks", "experiments", "docs")
    for file in (ROOT / folder).rglob("*.py")
]
OTHER_FLAGS = {"enable-lora", "lora"}  # of vLLM and llama-server
SCRIPT_FLAGS = {
    name for text in SCRIPTS for name in re.findall(r'add_argument\(\s*"--([a-z-]+)"', text)
}
KNOWN_FILES = {
    name for text in SCRIPTS for name in re.findall(r"[\w.-]+\.(?:jsonl?|html|yaml)\b", text)
}


def list_flags(verb: str) -> set[str]:
    """The options of a verb, with those that its recipe or its facts give it."""
    flags: set[str] = set()
    hints = get_type_hints(app.VERBS[verb], include_extras=True)
    for name in inspect.signature(app.VERBS[verb]).parameters:
        default = get_args(hints[name])[1].default
        has_name = isinstance(default, str) and default.startswith("--")
        flags.add(default.removeprefix("--") if has_name else name.replace("_", "-"))
    if "args" in hints:
        flags |= RECIPE_FLAGS
    return flags | FACT_FLAGS if verb == "advise" else flags


def find_stale_commands(page: str) -> Iterator[str]:
    """Yield each command and lone option in code that the program would refuse."""
    all_flags = COMMON_FLAGS | OTHER_FLAGS | SCRIPT_FLAGS
    all_flags = all_flags.union(*map(list_flags, app.VERBS))
    for code in CODE.findall(page):
        text = code.replace("\\\n", " ")
        for words in COMMAND.findall(text):
            yield from find_problems(words.split())
        if re.fullmatch(r"`--[^`]*`", text):
            for flag in FLAG.findall(text):
                if flag.replace("_", "-") not in all_flags:
                    yield f"--{flag}"


def find_problems(words: list[str]) -> Iterator[str]:
    if not words or words[0].startswith("-") or PLACEHOLDER.fullmatch(words[0]):
        return
    group = words[0] in app.GROUPS
    if group and (len(words) == 1 or words[1].startswith("-")):
        return
    verb = " ".join(words[: 1 + group])
    if verb not in app.VERBS:
        yield f"tunesmith {verb}"
        return
    flags = COMMON_FLAGS | list_flags(verb)
    for flag in FLAG.findall(" ".join(words)):
        if flag.replace("_", "-") not in flags:
            yield f"tunesmith {verb} --{flag}"


def find_stale_files(page: str) -> Iterator[str]:
    """Yield each data file that no run folder has, or that no code names and that is not there."""
    prose = re.sub(r"^```.*?^```$", "", page, flags=re.MULTILINE | re.DOTALL)
    for name in DATA_FILE.findall(prose):
        path = Path(name)
        # RUN/FILE, RUN/FOLDER/..., runs/NAME/FILE, runs/NAME/FOLDER/...
        in_run = path.parts[1:] if path.parts[0] == "RUN" else path.parts[2:]
        if path.parts[0] in ("RUN", "runs") and in_run:
            if in_run[0] not in RUN_FILES:
                yield name
        elif path.name not in KNOWN_FILES and not (ROOT / path).exists():
            yield name


@pytest.mark.parametrize("page", CURRENT_PAGES, ids=lambda page: page.stem)
def test_no_page_names_what_the_program_lacks(page: Path) -> None:
    text = page.read_text()
    assert [*find_stale_commands(text), *find_stale_files(text)] == []


def test_stale_words_are_noticed() -> None:
    page = """
Run `tunesmith trian recipe.yaml` or `tunesmith data review`, with `--calibrate`.
<!-- $ tunesmith plan recipe.yaml --fit 24GB | lines 1-3 -->

```
$ tunesmith init r.yaml && tunesmith data curate r.yaml --keep 3 --out x --ablate
$ tunesmith export RUN \\
    --target gguf --learning-rate 1
```

See `RUN/before.json`, `runs/a/results.jsonl`, `verdicts.jsonl`.
"""
    assert list(find_stale_commands(page)) == [
        "tunesmith trian",
        "tunesmith data review",
        "--calibrate",
        "tunesmith plan --fit",
        "tunesmith data curate --ablate",
        "tunesmith export --target",
        "tunesmith export --learning-rate",
    ]
    assert list(find_stale_files(page)) == [
        "RUN/before.json",
        "runs/a/results.jsonl",
        "verdicts.jsonl",
    ]


def test_words_of_today_are_not_stale() -> None:
    page = """
Run `tunesmith --version`, `tunesmith VERB --help`, `tunesmith data`, `tunesmith tune lr r.yaml`,
`--lr 1e-4`, `tunesmith train r.yaml --learning_rate 1e-4 --allow-code`, `tunesmith advise --need
tone`, `tunesmith init --from x.yml`; see `RUN/checkpoints/step-1`, `record.json`,
`runs/a/plan.json`.
"""
    assert [*find_stale_commands(page), *find_stale_files(page)] == []


def test_the_page_of_the_run_folder_lists_every_file() -> None:
    page = (DOCS / "reference" / "run-folder.md").read_text()
    assert {name for name in RUN_FILES if f"`{name}" not in page} == set()


def test_nobody_is_told_to_install_a_name_that_anybody_may_take() -> None:
    """The package is on no index: it is installed from its folder."""
    files = [*(ROOT / "src").rglob("*.py"), *DOCS.rglob("*.md"), *(ROOT / "recipes").rglob("*.*")]
    named = [str(f) for f in files if re.search(r"install '?tunesmith\b", f.read_text())]
    assert named == []
