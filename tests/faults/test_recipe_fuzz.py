"""Any recipe is either understood or refused with an InputError, whatever stands in it and through
whichever door."""

from __future__ import annotations

import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from hypothesis_budget import explore
from tunesmith.core.errors import InputError
from tunesmith.core.json_io import dump_json
from tunesmith.recipe.explain import REPLACEMENTS
from tunesmith.recipe.load import load_recipe
from tunesmith.recipe.schema import ALIASES, KEYS, Recipe

KNOWN = sorted({*KEYS, *ALIASES, *REPLACEMENTS})
WORDS = (
    *(
        "auto",
        "none",
        "lora",
        "full",
        "sft",
        "qlora",
        "bf16",
        "linear",
        "drop",
        "all-linear",
        "exact_match",
        "cpu_kernel",
    ),
    *(
        "1e-4",
        "0.5",
        "-1",
        "yes",
        "off",
        "~",
        "null",
        "NaN",
        "[",
        "{a: b",
        "*a",
        "&a",
        "!!python/object:os.system",
    ),
    *(
        "a.jsonl",
        "/dev/zero",
        "../../etc/passwd",
        "x.jinja",
        "",
        " ",
        "\0",
        "\ud800",
        "🤗",
        "text",
        "messages",
        "=",
    ),
)
FIELDS = ("path", "format", "columns", "max_examples", "weight", "messages", "content")

texts = st.sampled_from(WORDS) | st.text(max_size=12)
numbers = (
    st.integers() | st.floats() | st.sampled_from([0, 1, 2, 10**30, -0.0, 1e-300, 1e308, 2**32])
)
plain = st.none() | st.booleans() | numbers | texts
dates = st.dates() | st.datetimes()
values = st.recursive(
    plain,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(FIELDS) | texts, inner, max_size=3)
    ),
    max_leaves=6,
)
names = st.sampled_from(KNOWN).flatmap(
    lambda name: st.sampled_from([name, name.replace("_", "-"), name.upper()])
)
keys = names | texts
recipes = st.dictionaries(keys, values | dates, max_size=6)
needed = st.fixed_dictionaries(
    {}, optional={"model": st.just("a") | values, "data": st.just("a.jsonl") | values}
)
nearly = st.dictionaries(keys, values | dates, max_size=1).map(
    lambda item: {"model": "a", "data": "a.jsonl"} | item
)
wishes = nearly | st.builds(lambda some, more: {**some, **more}, recipes, needed)


def outcome(
    path: Path | None, flags: dict[str, str] | None = None, arguments: tuple[Any, ...] = ()
) -> str:
    """Which of the two it was. An error says where, and can be shown; a Recipe can be written."""
    try:
        recipe = load_recipe(path, flags, arguments=arguments)
    except InputError as error:
        return "refused" if error.where and dump_json(str(error)) else "refused without a place"
    assert Recipe.model_validate(recipe.model_dump(exclude_unset=True)) == recipe
    return "understood"


def recipes_explored(cases: int, seconds: float) -> Counter[str]:
    seen: Counter[str] = Counter()
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "recipe.yaml"

        @given(wishes, st.sampled_from(["file", "raw", "flags", "arguments"]), st.data())
        def explored(wish: dict[str, Any], door: str, data: st.DataObject) -> None:
            if door == "arguments":
                seen[outcome(None, arguments=(wish,))] += 1
            elif door == "flags":
                flags = {
                    key: value if isinstance(value, str) else str(value)
                    for key, value in wish.items()
                }
                seen[outcome(None, flags)] += 1
            else:
                text = yaml.safe_dump(wish, allow_unicode=True, sort_keys=False)
                if door == "raw":
                    cut, put = data.draw(st.integers(0, len(text))), data.draw(texts)
                    text = text[:cut] + put + text[cut + data.draw(st.integers(0, 3)) :]
                file.write_bytes(text.encode(errors="surrogatepass"))
                seen[outcome(file)] += 1

        explore(explored, cases, seconds)
    return seen


@pytest.mark.promise
def test_any_recipe_is_understood_or_refused() -> None:
    seen = recipes_explored(250, 60)
    assert seen.keys() == {"refused", "understood"}


def test_a_flag_that_is_nested_without_end_is_refused() -> None:
    with pytest.raises(InputError, match="command line: not YAML"):
        load_recipe(None, {"data": "[" * 100_000})
