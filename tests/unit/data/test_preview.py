import json

import numpy as np
from rich.console import Console

from tunesmith.core.types import Document
from tunesmith.data.dataset import open_dataset
from tunesmith.data.preview import escape_invisible, iter_pieces, render_preview, split_by_weight
from tunesmith.data.truncation import PreparedRow
from tunesmith.recipe.fields import DataSource


def shown(prepared, words, **options):
    return [text.plain for text in render_preview(prepared, words, **options)]


def prepare(write, words, *messages):
    row = {
        "messages": [{"role": role, "content": content, **more} for role, content, more in messages]
    }
    return open_dataset([DataSource(path=write(json.dumps(row)))], words).render_row(0)[1]


def test_trained_runs_are_marked_without_colour(write, words):
    prepared = prepare(write, words, ("user", "2 + 2?", {}), ("assistant", "it is 4", {}))
    header, tokens = shown(prepared, words)
    assert header == "train.jsonl:1  12 tokens, 4 trained"
    assert tokens == "◆<s>user2 + 2?◆</s>◆<s>assistant⟦it is 4◆</s>⟧"


def test_trained_runs_are_green_and_control_tokens_stand_out(write, words):
    prepared = prepare(write, words, ("user", "hi", {}), ("assistant", "ok", {}))
    _, text = render_preview(prepared, words)
    styles = {text.plain[span.start : span.end]: str(span.style) for span in text.spans}
    assert styles["hi"] == "dim"
    assert styles["ok"] == "bold green"
    assert styles["◆<s>"] == "dim reverse"
    assert styles["◆</s>"] == "bold green reverse"
    console = Console(force_terminal=True, color_system="standard")
    with console.capture() as captured:
        console.print(text)
    assert "\x1b[1;32m" in captured.get()


def test_a_document_is_split_where_the_weight_changes(write, words):
    prepared = prepare(write, words, ("user", "2 + 2?", {}), ("assistant", "it is 4", {}))
    (document,) = prepared.documents
    parts = split_by_weight(document, words, 100)
    assert [part.weight for part in parts] == [0, 1]
    assert parts[1].text == "it is 4</s>"
    assert "".join(part.text for part in parts) == words.decode(document.tokens_L.tolist())
    assert split_by_weight(document, words, len(document) - 1)[1].text == "it is 4"


def test_other_weights_and_ids_are_said(write, words):
    prepared = prepare(write, words, ("user", "hi", {}), ("assistant", "ok", {"weight": 0.5}))
    assert (
        shown(prepared, words, should_show_ids=True)[1]
        == "◆<s>‹0›user‹3›hi‹2›◆</s>‹1›◆<s>‹0›assistant‹5›⟦×0.5 ok‹4›◆</s>‹1›⟧"
    )


def test_a_dropped_row_and_notes_are_said(words):
    prepared = PreparedRow(
        "r:1", (), drop_reason="longer than max_length", notes=("control \x1b[31m text",)
    )
    assert shown(prepared, words) == [
        "r:1  dropped: longer than max_length",
        "note: control \\u{1b}[31m text",
    ]


def test_several_documents_are_numbered(words):
    document = Document("r:1", np.array([0, 1], np.int32), np.array([0, 1], np.float32))
    headers = shown(PreparedRow("r:1", (document, document)), words)[::2]
    assert headers == [
        "r:1  document 1 of 2  2 tokens, 1 trained",
        "r:1  document 2 of 2  2 tokens, 1 trained",
    ]


def test_white_space_and_steering_characters_are_visible():
    assert escape_invisible("\n\n") == "⏎\n⏎\n"
    assert escape_invisible("  ") == "␣␣"
    assert escape_invisible(" a b\t") == " a b⇥"
    assert (
        escape_invisible("\x1b[2J\u202e\u200b\x00é漢😀")
        == "\\u{1b}[2J\\u{202e}\\u{200b}\\u{0}é漢😀"
    )


class Bytes:
    """One token a byte, as byte-level tokenizers do with rare characters."""

    control_ids = frozenset[int]()

    def decode(self, ids):
        return bytes(ids).decode("utf-8", errors="replace")


class EatsFirstSpace(Bytes):
    def decode(self, ids):
        return super().decode(ids).removeprefix(" ")


def of_bytes(text, weights=None):
    raw = np.frombuffer(text.encode(), np.uint8).astype(np.int32)
    return Document("r", raw, np.array(weights or [0] * len(raw), np.float32))


def test_a_character_of_several_tokens_is_one_piece():
    pieces = list(iter_pieces(of_bytes("a€😀b"), Bytes()))
    assert [piece.text for piece in pieces] == ["a", "€", "😀", "b"]
    assert [len(piece.ids) for piece in pieces] == [1, 3, 4, 1]


def test_pieces_never_cross_a_change_of_weight_and_lose_no_token():
    document = of_bytes("a€\ufffdb", [0, 0, 0, 1, 1, 1, 1, 1])
    pieces = list(iter_pieces(document, Bytes()))
    assert [i for piece in pieces for i in piece.ids] == document.tokens_L.tolist()
    assert [(piece.weight, len(piece.ids)) for piece in pieces][:2] == [(0, 1), (0, 2)]


def test_a_space_that_the_tokenizer_eats_at_the_start_is_kept_inside():
    assert [piece.text for piece in iter_pieces(of_bytes("a b"), EatsFirstSpace())] == [
        "a",
        " ",
        "b",
    ]


def test_what_is_not_to_be_learnt_is_told_from_what_is(words):
    sides = ("chosen", "rejected", "banned", "")
    documents = tuple(
        Document(
            "train.jsonl:1", np.array([0, 1], np.int32), np.array([0, 1], np.float32), side=side
        )
        for side in sides
    )
    headers = shown(PreparedRow("train.jsonl:1", documents), words)[::2]
    assert [header.rpartition(" tokens, 1 ")[2] for header in headers] == [
        "trained (chosen)",
        "trained (rejected)",
        "trained away from",
        "trained",
    ]
