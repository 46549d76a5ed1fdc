import csv
import io
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tunesmith.core.errors import InputError
from tunesmith.data.readers import row_index
from tunesmith.data.readers.row_index import (
    find_elements,
    find_full_text,
    find_lines,
    find_records,
)


def cut(raw, spans):
    return [raw[span.start : span.end] for span in spans]


def elements(raw):
    return cut(raw, find_elements(io.BytesIO(raw), "x.json"))


json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.text(st.sampled_from('a"\\[]{},:\n é'), max_size=8),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3)
    ),
    max_leaves=8,
)


@given(
    st.lists(json_values, max_size=6),
    st.sampled_from([None, 0, 3]),
    st.booleans(),
    st.booleans(),
)
def test_elements_of_any_array_are_located(values, indent, ascii_only, has_mark):
    text = json.dumps(values, indent=indent, ensure_ascii=ascii_only)
    mark = b"\xef\xbb\xbf" if has_mark else b""
    raw = mark + b" \n" + text.encode() + b"\r\n"
    assert [json.loads(element) for element in elements(raw)] == values


def test_elements_know_where_they_begin():
    raw = '[{"a": "é\n"},\n\n  {"b": 1}, {"c": 2}\n]'.encode()
    for mark in (b"", b"\xef\xbb\xbf"):
        spans = find_elements(io.BytesIO(mark + raw), "x.json")
        assert [(p.line, p.column) for p in spans] == [(1, 2), (4, 3), (4, 13)]


@pytest.mark.parametrize(
    ("raw", "where", "says"),
    [
        (b'{"a": []}', "x.json:1:1", "Expecting '['"),
        (b'[{"a": 1},\n {"b": "x}]', "x.json:2:8", "Unterminated string"),
        (b"[{}, {", "x.json:1:7", "Expecting property name"),
        (b"[{}", "x.json:1:4", "Expecting ',' delimiter"),
        (b"[", "x.json:1:2", "Expecting value"),
        (b"[{},]", "x.json:1:5", "Expecting value"),
        (b"[,{}]", "x.json:1:2", "Expecting value"),
        (b"[{},", "x.json:1:5", "Expecting value"),
        (b"[1}", "x.json:1:3", "Expecting ',' delimiter"),
        (b'[{"a": }, {"b": 1}]', "x.json:1:8", "Expecting value"),
        (b"[{}]\n[{}]", "x.json:2:1", "Extra data"),
    ],
)
def test_a_broken_array_is_the_files_error(raw, where, says):
    with pytest.raises(InputError, match=r"^x\.json") as caught:
        elements(raw)
    assert says in caught.value.message
    assert caught.value.where == where


@pytest.mark.parametrize(
    ("raw", "element"),
    [
        (b'[{"a": }, {"b": 1}]', 1),
        (b'[{"a": 1},\n {"b": "x}]', 2),
        (b"[" + b"{}," * 41 + b'{"a" 1}]', 42),
        (b"[{}, " + b"[" * 100_000 + b"]" * 100_000 + b"]", 2),
    ],
)
def test_a_broken_array_names_its_element(raw, element):
    with pytest.raises(InputError, match=rf"element {element}\b"):
        elements(raw)


def test_an_element_that_only_the_strict_decoder_refuses_is_no_reason_to_stop():
    raw = b'[{"a": NaN}, {"b": "\x00"}, {"c": 1, "c": 2}, {"d": "\xe9"}, {"e": 1e999}, 5]'
    assert elements(raw) == [
        b'{"a": NaN}',
        b'{"b": "\x00"}',
        b'{"c": 1, "c": 2}',
        b'{"d": "\xe9"}',
        b'{"e": 1e999}',
        b"5",
    ]


def test_an_array_that_is_too_large_or_too_deep_is_refused(monkeypatch):
    with pytest.raises(InputError, match="nested too deep"):
        elements(b"[" + b"[" * 100_000 + b"]" * 100_001)
    monkeypatch.setattr(row_index, "MAX_ARRAY_BYTES", 10)
    assert elements(b"[{}, {},1]") == [b"{}", b"{}", b"1"]
    with pytest.raises(InputError, match="a JSON array of 11 bytes") as caught:
        elements(b"[{}, {}, 1]")
    assert caught.value.fix == "convert it to JSON Lines: jq -c '.[]' x.json > NEW.jsonl"


def test_an_element_of_too_many_values_is_refused_before_it_is_decoded(monkeypatch):
    monkeypatch.setattr(row_index, "MAX_ELEMENT_TOKENS", 5)
    assert elements(b'[1, ["]\\"[", [], 2], {"c": 1}]') == [b"1", b'["]\\"[", [], 2]', b'{"c": 1}']
    for raw in (b'[1, [[], [], "a"]]', b'[1, [[], [], "open]'):
        with pytest.raises(InputError, match="element 2: more than 5 texts and brackets"):
            elements(raw)


@given(
    st.lists(
        st.lists(st.text(st.sampled_from('a",\r\n é'), max_size=6), min_size=2, max_size=2),
        max_size=6,
    )
)
def test_records_are_divided_as_the_csv_module_divides_them(rows):
    text = io.StringIO(newline="")
    csv.writer(text, lineterminator="\n", quoting=csv.QUOTE_ALL).writerows(rows)
    raw = text.getvalue().encode()
    spans = [
        next(csv.reader([record.decode()]))
        for record in cut(raw, find_records(io.BytesIO(raw), ","))
    ]
    assert spans == rows


def test_broken_records_are_places_and_the_next_ones_are_found():
    raw = b'a,b\n1,"x"y\n2,"one\ntwo"\n\n3,ok\n4,"never ends\n5,in it\n'
    assert cut(raw, find_records(io.BytesIO(raw), ",")) == [
        b"a,b\n",
        b'1,"x"y\n',
        b'2,"one\ntwo"\n',
        b"3,ok\n",
        b'4,"never ends\n5,in it\n',
    ]
    assert [span.line for span in find_records(io.BytesIO(raw), ",")] == [1, 2, 3, 6, 7]


def test_what_an_open_quote_swallows_is_bounded(monkeypatch):
    monkeypatch.setattr(row_index, "MAX_FIELD_CHARS", 1000)
    usual = csv.field_size_limit(1000)
    raw = b'a\n"open\n' + b"x" * 600 + b"\n" + b"y" * 600 + b"\nlast\n"
    spans = cut(raw, find_records(io.BytesIO(raw), ","))
    csv.field_size_limit(usual)
    assert [len(record) for record in spans] == [2, 6 + 601 + 601, 5]


def test_a_line_that_is_too_long_for_csv_is_a_place(monkeypatch):
    monkeypatch.setattr(row_index, "MAX_ROW_BYTES", 100)
    raw = b'a\n1\n"2' + b"x" * 1000 + b'"\n3\n'
    assert [(span.line, span.end - span.start) for span in find_records(io.BytesIO(raw), ",")] == [
        (1, 2), (2, 2), (3, 1004), (4, 2),
    ]  # fmt: skip


@pytest.mark.parametrize("blank", [b"\n", b"\r\n", b"  \n"])
def test_blank_lines_without_end_are_refused(blank: bytes, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(row_index, "MAX_BLANK_LINES", 10)
    raw = b"a\n" + 10 * blank + b"b\n"
    assert cut(raw, find_lines(io.BytesIO(raw))) == [b"a\n", b"b\n"]
    assert cut(raw, find_full_text(io.BytesIO(100 * raw)))
    raw = b"a\n" + 11 * blank + b"b\n"
    with pytest.raises(InputError, match=r"t.jsonl:12: over 10 blank lines one after another"):
        list(find_lines(io.BytesIO(raw), "t.jsonl"))
    with pytest.raises(InputError, match=r"t.csv:12: over 10 blank lines one after another"):
        list(find_records(io.BytesIO(raw), ",", "t.csv"))


def test_lines_and_whole_texts_leave_out_the_byte_order_mark_only():
    raw = b"\xef\xbb\xbf\none\n \r\ntwo"
    assert cut(raw, find_lines(io.BytesIO(raw))) == [b"one\n", b"two"]
    assert cut(raw, find_full_text(io.BytesIO(raw))) == [b"\none\n \r\ntwo"]
    assert cut(b"\xef\xbb\xbf", find_full_text(io.BytesIO(b"\xef\xbb\xbf"))) == []
