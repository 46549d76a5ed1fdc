"""Every operation on tracked text is checked against a list of (character, origin) pairs."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tunesmith.data.chat_template.tracked_str import (
    TEMPLATE,
    TOOLS,
    VALUE,
    TrackedStr,
    UntrackedTextError,
    concat,
    find_shared_origin,
    get_message_index,
    get_plain_text,
    get_runs,
    iter_spans,
    make_origin,
    stringify,
    track_str,
)

Pairs = list[tuple[str, int]]

letters = st.text(alphabet="ab \n<|>é", max_size=8)
texts = st.lists(st.tuples(letters, st.integers(0, 9)), max_size=5).map(
    lambda parts: concat([track_str(text, origin) for text, origin in parts])
)


def pairs(text: str) -> Pairs:
    assert type(text) is TrackedStr
    return [
        (get_plain_text(text)[i], origin)
        for start, end, origin in iter_spans(text)
        for i in range(start, end)
    ]


@given(texts, texts)
def test_joining_keeps_the_origins(left: TrackedStr, right: TrackedStr) -> None:
    assert pairs(left + right) == pairs(left) + pairs(right)
    assert pairs(left * 3) == pairs(left) * 3
    parts = [left, right, left]
    expected: Pairs = []
    for i, part in enumerate(parts):
        expected += (pairs(right) if i else []) + pairs(part)
    assert pairs(right.join(parts)) == expected


@given(texts, st.integers(-12, 12), st.integers(-12, 12), st.sampled_from([-3, -1, 1, 2]))
def test_slices_keep_the_origins(text: TrackedStr, start: int, end: int, step: int) -> None:
    assert pairs(text[start:end:step]) == pairs(text)[start:end:step]
    assert [pairs(letter)[0] for letter in text] == pairs(text)
    if text:
        assert pairs(text[-1]) == pairs(text)[-1:]


@given(texts, st.sampled_from([None, " ", "ab", "\n", "<"]))
def test_trimming_keeps_the_origins(text: TrackedStr, chars: str | None) -> None:
    for name in ("strip", "lstrip", "rstrip"):
        cut = getattr(text, name)(chars)
        assert get_plain_text(cut) == getattr(get_plain_text(text), name)(chars)
        start = 0 if name == "rstrip" else len(text) - len(get_plain_text(text).lstrip(chars))
        assert pairs(cut) == pairs(text)[start : start + len(cut)] or not cut


@pytest.mark.promise
@given(texts, st.sampled_from([None, " ", "ab", "\n", "a"]), st.integers(-1, 3))
def test_splitting_keeps_the_origins(text: TrackedStr, sep: str | None, most: int) -> None:
    for name in ("split", "rsplit"):
        parts = getattr(text, name)(sep, most)
        assert [get_plain_text(part) for part in parts] == getattr(get_plain_text(text), name)(
            sep, most
        )
        if sep is not None:
            assert pairs(track_str(sep, 99).join(parts)) == _with_separators(text, parts, sep)
    lines = text.splitlines(True)
    assert [get_plain_text(line) for line in lines] == get_plain_text(text).splitlines(True)
    assert pairs(concat(lines)) == pairs(text)
    assert [get_plain_text(line) for line in text.splitlines()] == get_plain_text(text).splitlines()


def _with_separators(text: TrackedStr, parts: list[TrackedStr], sep: str) -> Pairs:
    """The characters of the text, those of each separator with origin 99."""
    result: Pairs = []
    at = 0
    for i, part in enumerate(parts):
        if i:
            result += [(letter, 99) for letter in sep]
            at += len(sep)
        result += pairs(text)[at : at + len(part)]
        at += len(part)
    return result


@given(texts, st.sampled_from(["a", "ab", " ", "<|"]), texts, st.integers(-1, 2))
def test_replace_keeps_the_origins(text: TrackedStr, old: str, new: TrackedStr, count: int) -> None:
    result = text.replace(old, new, count)
    assert get_plain_text(result) == get_plain_text(text).replace(old, get_plain_text(new), count)
    assert pairs(result) == pairs(new.join(text.split(old, count)))


@given(texts, st.sampled_from(["a", "ab", "zz"]))
def test_partition_and_affixes_keep_the_origins(text: TrackedStr, sep: str) -> None:
    for name in ("partition", "rpartition"):
        parts = getattr(text, name)(sep)
        assert tuple(map(get_plain_text, parts)) == getattr(get_plain_text(text), name)(sep)
        assert pairs(concat(parts)) == pairs(text)
    assert (
        pairs(text.removeprefix("a"))
        == pairs(text)[len(text) - len(get_plain_text(text).removeprefix("a")) :]
    )
    assert (
        pairs(text.removesuffix("a")) == pairs(text)[: len(get_plain_text(text).removesuffix("a"))]
    )


@given(texts)
def test_letters_change_in_place(text: TrackedStr) -> None:
    for name in ("upper", "lower", "title", "capitalize", "swapcase", "casefold"):
        changed = getattr(text, name)()
        assert get_plain_text(changed) == getattr(get_plain_text(text), name)()
        assert [origin for _, origin in pairs(changed)] == [origin for _, origin in pairs(text)]


def test_a_change_of_length_needs_a_single_origin() -> None:
    assert track_str("straße", 7).upper() == "STRASSE"
    assert pairs(track_str("ß", 7).upper()) == [("S", 7), ("S", 7)]
    with pytest.raises(UntrackedTextError, match="upper"):
        (track_str("a", 1) + track_str("ß", 2)).upper()


def test_plain_text_is_refused_where_it_meets_tracked_text() -> None:
    text = track_str("abc", 4)
    for mix in (
        lambda: text + "x",
        lambda: "x" + text,
        lambda: text.join(["x", "y"]),
        lambda: stringify("x"),
    ):
        with pytest.raises(UntrackedTextError, match="unknown origin"):
            mix()
    assert text + "" is text
    assert "" + text is text
    with pytest.raises(TypeError):
        text + 1  # type: ignore[operator]


def test_every_method_of_str_gives_tracked_text_or_plain_text() -> None:
    """Plain results are refused later; what must not happen is tracked text with wrong runs."""
    text = track_str("ab ", 4) + track_str("Cd\n", 5)
    arguments = {
        "center": (20,),
        "ljust": (20,),
        "rjust": (20,),
        "zfill": (20,),
        "join": (["x"],),
        "replace": ("a", "b"),
    }
    for name in set(dir(str)) - {"maketrans", "format", "format_map", "__init_subclass__"}:
        if name.startswith("_"):
            continue
        try:
            result = getattr(text, name)(*arguments.get(name, ()))
        except (TypeError, UntrackedTextError):
            continue
        if type(result) is TrackedStr:
            assert sum(text._runs[::2]) == len(text)
            assert sum(result._runs[::2]) == len(result), name


def test_values_without_a_writer() -> None:
    assert pairs(stringify(12)) == [("1", VALUE), ("2", VALUE)]
    assert stringify(None) == "None"
    assert pairs(stringify([track_str("x", TOOLS)])) == [(letter, TOOLS) for letter in "['x']"]


def test_the_origin_of_a_structure_is_its_only_writer() -> None:
    first, second = (
        track_str("x", make_origin(2, "content")),
        track_str("y", make_origin(3, "content")),
    )
    assert find_shared_origin({track_str("key"): first}) == make_origin(2, "content")
    assert find_shared_origin([track_str("a"), {track_str("b"): 1}]) == TEMPLATE
    assert find_shared_origin([1, 2]) == VALUE
    assert find_shared_origin([first, second]) == VALUE
    with pytest.raises(UntrackedTextError):
        find_shared_origin(["plain"])
    with pytest.raises(UntrackedTextError, match="function"):
        find_shared_origin([test_values_without_a_writer])


def test_messages_and_fields_have_their_own_origins() -> None:
    origins = [
        make_origin(i, field)
        for i in range(3)
        for field in ("content", "reasoning", "tool_calls", "other")
    ]
    assert len(set(origins)) == 12
    assert [get_message_index(origin) for origin in origins] == [0] * 4 + [1] * 4 + [2] * 4
    assert {get_message_index(origin) for origin in (TEMPLATE, VALUE, TOOLS)} == {-1}


def test_a_text_is_repeated_and_replaced_as_plain_text_is() -> None:
    text = track_str("aba", 4) + track_str("a", 5)
    assert [pairs(text * times) for times in (0, -1)] == [[], []]
    assert pairs(2 * text) == 2 * pairs(text)
    assert text.replace("a", track_str("c")) == "cbcc"
    assert text.split("a") == text.rsplit("a") == ["", "b", "", ""]
    with pytest.raises(UntrackedTextError, match="replace of an empty text"):
        text.replace("", text)


def test_neighbors_of_one_writer_are_one_run() -> None:
    text = track_str("a", 4)
    assert [get_runs(value) for value in (track_str(""), text + text)] == [(), (2, 4)]
    assert get_runs(text + track_str("b", 5) + text) == (1, 4, 1, 5, 1, 4)


def test_tracked_text_is_a_string_for_everything_else() -> None:
    text = track_str("role", 5)
    assert {"role": 1}[text] == 1
    assert f"{text}" == "role"
    assert str(text) is text
