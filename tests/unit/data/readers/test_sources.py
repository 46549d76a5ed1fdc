import json
import os
import tracemalloc

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tunesmith.core.errors import InputError
from tunesmith.data.readers import row_index, sources
from tunesmith.data.readers.decode import SourceLocation, decode_json
from tunesmith.data.readers.invalid_row import InvalidRow
from tunesmith.data.readers.sources import open_source


def rows_of(path):
    source = open_source(path)
    return [source.read_row(i) for i in range(len(source))]


def test_rows_have_the_name_and_line_of_their_file_and_can_be_read_in_any_order(write):
    source = open_source(write('{"a": 1}\n\n  \n{"a": 2}\n{"a": 3}'))
    assert [source.read_row(i).data["a"] for i in (2, 0, 1)] == [3, 1, 2]
    assert [source.get_id(i) for i in range(3)] == [
        "train.jsonl:1",
        "train.jsonl:4",
        "train.jsonl:5",
    ]


@pytest.mark.parametrize("is_folder", [False, True])
def test_the_length_of_a_row_is_known_without_reading(is_folder, write, tmp_path):
    """The rows of a run are ranked by it, so a file must not be opened once for every row."""
    if is_folder:
        texts = ["one", "a longer text"]
        for number, text in enumerate(texts):
            (tmp_path / f"{number}.txt").write_text(text)
        source = open_source(tmp_path)
        files = sorted(tmp_path.glob("*.txt"))
    else:
        texts = ['{"a": 1}', '{"a": "longer"}']
        files = [write("\n".join(texts))]
        source = open_source(files[0])
    lengths = [source.read_raw(index, 0)[1] for index in range(2)]
    for file in files:
        file.unlink()
    assert [source.get_num_bytes(index) for index in range(2)] == lengths
    assert lengths[0] < lengths[1]


def test_byte_order_mark_and_crlf_are_fine(write):
    rows = rows_of(write(b'\xef\xbb\xbf{"text": "a\\r\\nb"}\r\n{"text": "c"}\r\n\r\n'))
    assert [row.data for row in rows] == [{"text": "a\r\nb"}, {"text": "c"}]


def test_plain_text_is_one_row_with_unix_line_ends(write):
    (row,) = rows_of(write(b"\xef\xbb\xbfone\r\n\r\ntwo \xe2\x82\xac\n", "book.txt"))
    assert (row.id, row.data) == ("book.txt:1", {"text": "one\n\ntwo €\n"})


@pytest.mark.parametrize(
    ("line", "where", "says"),
    [
        (b'{"a": 1', "train.jsonl:2:8", "not JSON"),
        (b'{"a": 1} {"a": 2}', "train.jsonl:2:10", "not JSON"),
        (b"[1, 2]", "train.jsonl:2", "the row is a list"),
        (b"null", "train.jsonl:2", "the row is null"),
        (b'{"a": "\xe9t\xe9"}', "train.jsonl:2:8", "byte 0xe9 at offset 16 is not UTF-8"),
        (b'{"a": "x\x00y"}', "train.jsonl:2:9", "not JSON: Invalid control character"),
        (b'{"a": "x\\u0000y"}', "train.jsonl:2:9", "\\u0000 at byte 17 is a NUL character"),
        (
            b'{"a": "\\\\u0000\\ud83d"}',
            "train.jsonl:2:15",
            "\\ud83d at byte 23 is a lone surrogate",
        ),
        (
            b'{"a": "\xc3\xa9\\ude00\\ud83d"}',
            "train.jsonl:2:9",
            "\\ude00 at byte 18 is a lone surrogate",
        ),
        (b'{"a": "\xed\xa0\xbd"}', "train.jsonl:2:8", "is not UTF-8"),
        (b'{"a": NaN}', "train.jsonl:2", "NaN is not JSON"),
        (b'{"a": [-Infinity]}', "train.jsonl:2", "-Infinity is not JSON"),
        (b'{"a": 1e999}', "train.jsonl:2", "the number 1e999 is too large"),
        (b'{"a": {"b": 1, "c": 2, "b": 3}}', "train.jsonl:2", "the key 'b' appears twice"),
        (b'{"a": ' + b"9" * 5000 + b"}", "train.jsonl:2", "a number has thousands of digits"),
        (b'{"a": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", "train.jsonl:2", "nested deeper"),
        (b'{"a": ' + b"[" * 150 + b"]" * 150 + b"}", "train.jsonl:2", "nested deeper"),
    ],
)
def test_a_broken_row_is_named_by_line_and_column(write, line, where, says):
    source = open_source(write(b'{"a": 0}\n' + line + b'\n{"a": 2}\n'))
    with pytest.raises(InputError) as caught:
        source.read_row(1)
    assert caught.value.where == where
    assert says in caught.value.message
    assert caught.value.fix
    assert source.read_row(2).data == {"a": 2}  # the others are still readable


def test_characters_that_only_look_suspicious_are_kept(write):
    line = r'{"pair": "\ud83d\ude00", "path": "C:\\u0000", "brackets": "' + "[" * 500 + '"}'
    (row,) = rows_of(write(line))
    assert row.data == {"pair": "😀", "path": "C:\\u0000", "brackets": "[" * 500}


def test_arguments_of_tool_calls_stay_byte_for_byte(write):
    arguments = (
        '{"z": 1.0, "a": null, "big": 123456789012345678901, '
        '"deep": {"k": [true, 0.1, "é"]}, "": -2}'
    )
    line = f'{{"as_object": {arguments}, "as_string": {json.dumps(arguments)}}}'
    (row,) = rows_of(write(line))
    assert json.dumps(row.data["as_object"], ensure_ascii=False) == arguments
    assert row.data["as_string"] == arguments


@pytest.mark.parametrize(
    ("content", "says"),
    [("", "is empty"), ("\n \r\n\n", "has no rows"), (b"\xef\xbb\xbf", "has no rows")],
)
def test_an_empty_file_is_refused(write, content, says):
    with pytest.raises(InputError, match=says):
        open_source(write(content))


def test_files_that_are_not_plain_data_are_refused_before_reading(write, tmp_path):
    write("{}")
    os.mkfifo(tmp_path / "pipe.jsonl")
    for name, says in {
        "trian.jsonl": r"did you mean .*train\.jsonl",
        ".": "no .txt or .md file in this folder",
        "pipe.jsonl": "not a regular file",
        "no/such/folder.jsonl": "no such file",
    }.items():
        with pytest.raises(InputError, match=says):
            open_source(tmp_path / name)


def test_an_endless_line_is_refused_without_being_held_and_reading_goes_on(write, monkeypatch):
    monkeypatch.setattr(sources, "MAX_ROW_BYTES", 1000)
    monkeypatch.setattr(row_index, "CHUNK_BYTES", 500)
    path = write('{"a": 1}\n{"a": "' + "x" * 3_000_000 + '"}\n{"a": 3}')
    tracemalloc.start()
    source = open_source(path)
    assert [source.get_id(i) for i in range(3)] == [
        "train.jsonl:1",
        "train.jsonl:2",
        "train.jsonl:3",
    ]
    with pytest.raises(InvalidRow, match="the row has 3,000,010 bytes") as caught:
        source.read_row(1)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert (caught.value.where, caught.value.reason) == ("train.jsonl:2", "too long")
    assert source.read_row(2).data == {"a": 3}
    assert peak < 400_000


def test_a_file_that_changes_while_in_use_is_noticed(write):
    path = write('{"a": 1}\n{"a": 2}\n')
    source = open_source(path)
    path.write_text('{"a": 1}\n{"a": 2}\n{"a": 3}\n')
    with pytest.raises(InputError, match="changed"):
        source.read_row(0)
    path.unlink()
    with pytest.raises(InputError, match="can no longer be read: No such file"):
        source.read_row(0)


@given(
    st.binary(max_size=60) | st.text(max_size=40).map(lambda text: json.dumps({"a": text}).encode())
)
def test_any_bytes_are_an_object_or_a_clear_error(raw):
    data, problem = None, None
    try:
        data = decode_json(raw, SourceLocation("train.jsonl"))
    except InputError as error:
        problem = error
    if problem:
        assert problem.where.startswith("train.jsonl:")
        assert problem.fix
    else:
        assert data == json.loads(raw)
        assert json.dumps(data, ensure_ascii=False).encode()


def test_memory_does_not_grow_with_the_length_of_the_rows(write):
    path = write("".join(json.dumps({"text": "x" * 10_000, "n": n}) + "\n" for n in range(300)))
    tracemalloc.start()
    source = open_source(path)
    assert sum(source.read_row(i).data["n"] for i in range(300)) == 44_850
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert path.stat().st_size > 3_000_000
    assert peak < 400_000
