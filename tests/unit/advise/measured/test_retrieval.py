"""Documents as passages: searched by their words, or refused by name."""

from __future__ import annotations

from pathlib import Path

import pytest

from tunesmith.advise.measured.retrieval import (
    MAX_WORDS,
    MIN_WORDS,
    OVERLAP_WORDS,
    PassageIndex,
    open_passages,
    split_passages,
)
from tunesmith.core.errors import InputError


def test_the_passage_with_the_rare_words_comes_first() -> None:
    passages = PassageIndex(
        [
            "the cat sat on the mat",
            "the dog barked at the cat",
            "version 3.8.1 of nettle",
            "of the of",
        ]
    )
    assert passages.search("Which version has nettle?", 2)[0] == "version 3.8.1 of nettle"
    assert passages.search("dogs barking", 1) == ["the dog barked at the cat"], "words are stemmed"
    assert passages.search('"?* AND NEAR(', 3) == [], "nothing of a question is syntax"
    assert passages.search("", 3) == []


def test_paragraphs_are_passages_with_headings_joined_and_long_ones_windowed() -> None:
    paragraph = " ".join(f"w{n}" for n in range(MIN_WORDS))
    long = " ".join(f"v{n}" for n in range(MAX_WORDS + 50))
    passages = list(split_passages(f"\n\nHeading\n\n{paragraph}\n \n{long}\n\nend"))
    assert passages[0] == f"Heading\n\n{paragraph}"
    assert [len(text.split()) for text in passages[1:]] == [MAX_WORDS, 50 + OVERLAP_WORDS, 1]
    assert passages[2].split()[:OVERLAP_WORDS] == passages[1].split()[-OVERLAP_WORDS:]
    assert {word for text in passages[1:3] for word in text.split()} == set(long.split()), (
        "nothing is lost"
    )
    assert list(split_passages(" \n\n ")) == []


def test_folders_and_rows_are_read(tmp_path: Path) -> None:
    (tmp_path / "a.md").write_text("one text about herons")
    (tmp_path / "b.txt").write_text("another about owls")
    assert len(open_passages(tmp_path).search("herons owls", 9)) == 2
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"text": "of owls"}\n{"text": "of herons"}\n')
    assert open_passages(rows).search("herons?", 1) == ["of herons"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("missing.txt", None, "no such file"),
        ("empty.txt", b"", "empty"),
        ("blank.txt", b" \n\n ", "no row"),
        ("blank.jsonl", b'{"text": " "}\n', "no words"),
        ("latin.txt", "caf\xe9".encode("latin-1"), "UTF-8"),
        ("rows.jsonl", b'{"body": "x"}\n', "no `text`"),
        ("file.pdf", b"%PDF", "cannot read .pdf"),
    ],
)
def test_unusable_documents_are_refused_by_name(
    tmp_path: Path, name: str, content: bytes | None, message: str
) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=message) as refusal:
        open_passages(tmp_path / name)
    assert name in str(refusal.value)
    with pytest.raises(InputError):
        open_passages(tmp_path / "no folder")
