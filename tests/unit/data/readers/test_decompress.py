"""The files that rows come in: each gives the rows that were put into it, in any order, and says
where they stand."""

import bz2
import csv
import gzip
import hashlib
import io
import json
import lzma
import os
import sys
import tracemalloc
from datetime import date
from decimal import Decimal

import pytest

from tunesmith.core.errors import InputError, MachineError
from tunesmith.data.readers import local_file
from tunesmith.data.readers.invalid_row import InvalidRow
from tunesmith.data.readers.sources import open_source

ROWS = [{"prompt": f'what is {n}?\n"yes", é', "completion": "1,5\t€ " * n} for n in range(5)]


def lines(rows):
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()


def table(rows, **dialect):
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, rows[0], **dialect)
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue().encode()


def parquet(rows, **options):
    pyarrow, written = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    file = io.BytesIO()
    content = (
        pyarrow.Table.from_pylist(rows)
        if rows
        else pyarrow.table({"text": pyarrow.array([], "string")})
    )
    written.write_table(content, file, **options)
    return file.getvalue()


CONTAINERS = {
    "x.jsonl": lines(ROWS),
    "x.ndjson": b"\xef\xbb\xbf" + lines(ROWS).replace(b"\n", b"\r\n\r\n"),
    "lines.json": lines(ROWS),
    "array.json": json.dumps(ROWS).encode(),
    "pretty.json": b"\xef\xbb\xbf" + json.dumps(ROWS, indent=2, ensure_ascii=False).encode(),
    "x.csv": table(ROWS),
    "excel.csv": b"\xef\xbb\xbf" + table(ROWS, quoting=csv.QUOTE_ALL),
    "x.TSV": table(ROWS, delimiter="\t", lineterminator="\n"),
    "x.jsonl.gz": gzip.compress(lines(ROWS)),
    "two.jsonl.gz": gzip.compress(lines(ROWS[:2])) + gzip.compress(lines(ROWS[2:])),
    "x.csv.gz": gzip.compress(table(ROWS)),
    "x.json.gz": gzip.compress(json.dumps(ROWS).encode()),
}


@pytest.mark.parametrize("name", CONTAINERS)
def test_a_container_gives_the_rows_that_were_put_into_it(name, write):
    source = open_source(write(CONTAINERS[name], name))
    assert [source.read_row(i).data for i in (4, 0, 2, 1, 3)] == [ROWS[i] for i in (4, 0, 2, 1, 3)]
    assert len({source.get_id(i) for i in range(5)}) == 5
    assert all(source.get_id(i).startswith(name) for i in range(5))


def test_the_fingerprint_is_of_the_bytes_of_the_file(write):
    path = write(CONTAINERS["x.jsonl.gz"], "x.jsonl.gz")
    assert open_source(path).fingerprint == hashlib.sha256(path.read_bytes()).hexdigest()


def test_ids_say_where_a_row_stands(write):
    def ids(name):
        source = open_source(write(CONTAINERS[name], name))
        return [source.get_id(i) for i in range(3)], str(source.get_location(2))

    assert ids("x.csv") == (["x.csv:2", "x.csv:4", "x.csv:6"], "x.csv:6")
    assert ids("array.json")[0] == ["array.json[0]", "array.json[1]", "array.json[2]"]
    assert ids("array.json")[1].startswith("array.json:1:1")
    assert ids("pretty.json")[1] == "pretty.json:10:3"


# ---------------------------------------------------------------- JSON arrays


def test_errors_in_an_array_name_line_and_column(write):
    source = open_source(write('[{"a": 1}, {"b": NaN},\n {"c":\n  "\\ud83d"}, 5]', "x.json"))
    assert source.read_row(0).data == {"a": 1}
    for index, where in {1: "x.json:1:12", 2: "x.json:3:4", 3: "x.json:3:14"}.items():
        with pytest.raises(InvalidRow) as caught:
            source.read_row(index)
        assert caught.value.where == where


@pytest.mark.parametrize(
    ("content", "says"),
    [("[]", "has no rows"), ("[{}", "x.json:1:4"), ('[{"a": x}]', "x.json:1:8")],
)
def test_an_array_that_is_none_is_refused(content, says, write):
    with pytest.raises(InputError, match=says):
        open_source(write(content, "x.json"))


def test_an_array_is_read_at_once_but_not_kept_in_memory(write):
    path = write(json.dumps([{"text": "x" * 10_000, "n": n} for n in range(500)]), "x.json")
    tracemalloc.start()
    source = open_source(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.reset_peak()
    assert sum(source.read_row(i).data["n"] for i in range(500)) == 124_750
    reading_peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert path.stat().st_size > 5_000_000
    assert peak < 2.5 * path.stat().st_size, "the file as bytes, and as text"
    assert reading_peak < 200_000, "a row at a time"


# ---------------------------------------------------------------- CSV


@pytest.mark.parametrize(
    ("content", "where", "says"),
    [
        ("a,b\n1,2\n3\n", "x.csv:3", "1 field, but the header has 2"),
        ("a,b\n1,2\n3,4,5\n", "x.csv:3", "3 fields, but the header has 2"),
        ('a,b\n1,2\n"x"y,2\n', "x.csv:3", "not CSV: ',' expected after '\"'"),
        ('a,b\n1,2\n3,"4\n', "x.csv:3", "not CSV: unexpected end of data"),
        (b"a,b\n1,2\n\xc3\xa9\xe9,2\n", "x.csv:3:2", "byte 0xe9 at offset 10 is not UTF-8"),
        (b'a,b\n1,2\n"x\ny\0z",2\n', "x.csv:4:2", "a NUL character at byte 12"),
    ],
)
def test_a_broken_record_is_named_and_the_others_are_read(content, where, says, write):
    source = open_source(write(content, "x.csv"))
    assert source.read_row(0).data == {"a": "1", "b": "2"}
    with pytest.raises(InvalidRow) as caught:
        source.read_row(1)
    assert (caught.value.where, says in caught.value.message) == (where, True), caught.value.message


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("", "is empty"),
        ("prompt,completion\n", "has no rows"),
        ("prompt,,c\n1,2,3\n", "a column has no name"),
        ("a,b,a\n1,2,3\n", "two columns have the same name"),
        ("prompt;completion\n1;2\n", "separated by semicolons"),
        ('"a"b,c\n1,2\n', "the header is not CSV"),
        (b"\xff\xfea\0,\0b\0\n", "header: byte 0xff at offset 0 is not UTF-8"),
    ],
)
def test_a_table_without_a_header_or_rows_is_refused(content, says, write):
    with pytest.raises(InputError, match=says):
        open_source(write(content, "x.csv"))


def test_values_of_a_table_are_the_strings_that_stand_there(write):
    source = open_source(write('a,b\n 1 ,\n\n"x\r\ny",null\n', "x.csv"))
    assert [source.read_row(i).data for i in range(2)] == [
        {"a": " 1 ", "b": ""},
        {"a": "x\r\ny", "b": "null"},
    ]


# ---------------------------------------------------------------- gzip


def test_what_packs_too_well_is_a_bomb(write, monkeypatch):
    monkeypatch.setattr(local_file, "UNCHECKED_BYTES", 100_000)
    path = write(gzip.compress(b'{"text": "' + b"a" * 5_000_000 + b'"}'), "x.jsonl.gz")
    assert path.stat().st_size < 6000
    with pytest.raises(InputError, match="decompresses to more than 200 times its size"):
        open_source(path)


@pytest.mark.parametrize(
    "spoil",
    [lambda raw: raw[:-20], lambda raw: b"PK" + raw, lambda raw: raw[:30] + b"\0" + raw[31:]],
)
def test_a_damaged_gzip_file_is_refused(spoil, write):
    with pytest.raises(InputError, match="damaged gzip file"):
        open_source(write(spoil(CONTAINERS["x.csv.gz"]), "x.csv.gz"))


@pytest.mark.parametrize("name", ["x.gz", "x.jsonl.gz.gz", "x.parquet.gz", "x.zip", "passwd"])
def test_other_files_are_refused_with_what_can_be_read(name, write):
    with pytest.raises(InputError, match=r"cannot read .*") as caught:
        open_source(write("x", name))
    assert (
        ".jsonl, .ndjson, .json, .csv, .tsv, .txt, .md (or any of them as .gz), .parquet, "
        "or a folder" in caught.value.fix
    )


@pytest.mark.parametrize(
    "raw", [CONTAINERS["x.csv.gz"], b"PAR1....", b"PK\x03\x04...."], ids=["gzip", "Parquet", "zip"]
)
def test_a_packed_file_under_another_name_is_recognised(raw, write):
    with pytest.raises(
        InputError,
        match=r"the content is (gzip|Parquet|zip \(as \.xlsx and \.docx are\)), not text",
    ):
        open_source(write(raw, "x.csv"))


@pytest.mark.parametrize(
    ("raw", "kind", "fix"),
    [
        (b"\x28\xb5\x2f\xfd\x04", "zstd", "unpack it"),
        (lzma.compress(b"{}"), "xz", "unpack it"),
        (bz2.compress(b"{}"), "bzip2", "unpack it"),
        (b"ARROW1\0\0", "Arrow", "convert it"),
        (b"SQLite format 3\0", "SQLite", "export its table"),
        (b"version https://git-lfs.github.com/spec/v1\n", "Git LFS", "git lfs pull"),
    ],
)
@pytest.mark.parametrize("name", ["x.jsonl", "x.csv", "x.txt"])
def test_what_is_no_text_is_named_with_what_to_do(raw, kind, fix, name, write):
    with pytest.raises(InputError, match=f"the content is .*{kind}, not text") as caught:
        open_source(write(raw, name))
    assert fix in caught.value.fix


def test_a_full_disk_is_the_machines_error_and_says_how_to_go_on(write, monkeypatch):
    monkeypatch.setattr(local_file, "DISK_CHECK_BYTES", 10)
    monkeypatch.setattr(local_file, "MIN_FREE_BYTES", 2**60)
    with pytest.raises(
        MachineError, match=r"no space left .* a temporary copy of .*x\.jsonl\.gz\n  fix: .*TMPDIR"
    ):
        open_source(write(CONTAINERS["x.jsonl.gz"], "x.jsonl.gz"))


def test_temporary_files_have_no_name_and_are_gone_with_the_source(write, monkeypatch, tmp_path):
    (tmp_path / "t").mkdir()
    monkeypatch.setenv("TMPDIR", str(tmp_path / "t"))
    source = open_source(write(CONTAINERS["x.csv.gz"], "x.csv.gz"))
    assert list((tmp_path / "t").iterdir()) == []
    descriptor = source.content._file.fileno()
    assert os.fstat(descriptor).st_size == len(CONTAINERS["x.csv"])
    del source
    with pytest.raises(OSError, match="descriptor"):
        os.fstat(descriptor)


# ---------------------------------------------------------------- Parquet


def test_parquet_rows_are_json_rows(write):
    call = {"type": "function", "function": {"name": "f", "arguments": '{"z":  1.0}'}}
    rows = [
        {
            "messages": [
                {"role": "user", "content": "a"},
                {"role": "assistant", "content": None, "tool_calls": [call]},
            ],
            "day": date(2026, 1, 2),
            "price": Decimal("1.10"),
            "score": float("nan"),
            "n": 2**60,
            "picture": b"\xff",
        },
        {"messages": [{"role": "user", "content": "é"}], "n": None},
    ]
    source = open_source(write(parquet(rows, row_group_size=1), "x.parquet"))
    first, second = source.read_row(0), source.read_row(1)
    assert (first.id, second.id) == ("x.parquet:1", "x.parquet:2")
    assert first.data == {
        "messages": [{"role": "user", "content": "a"}, {"role": "assistant", "tool_calls": [call]}],
        "day": "2026-01-02",
        "price": "1.10",
        "score": None,
        "n": 2**60,
    }
    assert second.data["messages"] == [{"role": "user", "content": "é"}], (
        "null in an object is a missing key"
    )


def test_rows_of_many_row_groups_can_be_read_in_any_order(write):
    source = open_source(
        write(parquet([{"text": f"row {n}"} for n in range(1000)], row_group_size=70), "x.parquet")
    )
    assert [source.read_row(i).data["text"] for i in (999, 3, 500)] == [
        "row 999",
        "row 3",
        "row 500",
    ]


def test_a_parquet_file_of_another_kind_is_refused(write):
    with pytest.raises(InputError, match="no column has text"):
        open_source(write(parquet([{"image": {"bytes": b"x", "path": "p"}}]), "x.parquet"))
    good = parquet(ROWS)
    for raw in (good[:-30], b"PAR1", good[:40] + bytes(20) + good[60:]):
        with pytest.raises(InputError, match="damaged Parquet file"):
            open_source(write(raw, "x.parquet"))
    with pytest.raises(InputError, match="has no rows"):
        open_source(write(parquet([]), "x.parquet"))


def test_without_pyarrow_the_extra_is_named(write, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(InputError, match=r"needs pyarrow\n  fix: pip install '\.\[parquet\]'"):
        open_source(write(b"PAR1", "x.parquet"))


# ---------------------------------------------------------------- folders


def test_a_folder_of_texts_is_a_row_a_file_in_the_order_of_names(tmp_path):
    for name, text in {
        "b.md": "# B\r\n",
        "a/z.TXT": "z",
        "a/b/c.txt": "\ufeffc",
        ".git/x.txt": "no",
        "c.pdf": "no",
    }.items():
        (tmp_path / "notes" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "notes" / name).write_bytes(text.encode())
    source = open_source(tmp_path / "notes")
    assert [
        (source.read_row(i).id, source.read_row(i).data["text"]) for i in range(len(source))
    ] == [
        ("notes/b.md", "# B\n"),
        ("notes/a/z.TXT", "z"),
        ("notes/a/b/c.txt", "c"),
    ]
    before = source.fingerprint
    (tmp_path / "notes" / "b.md").write_text("# C")
    assert open_source(tmp_path / "notes").fingerprint != before
    with pytest.raises(InputError, match="changed while it was in use"):
        source.read_row(0)


def test_a_folder_without_texts_is_refused(tmp_path):
    (tmp_path / "x.jsonl").write_text("{}")
    with pytest.raises(InputError, match=r"no \.txt or \.md file in this folder"):
        open_source(tmp_path)
