"""Preflight checks of tokens: what they say, and the texts and windows that they refuse."""

import dataclasses
from typing import Any, cast

import numpy as np
import pytest

from tunesmith.core.errors import GateError
from tunesmith.core.types import Document
from tunesmith.session.preflight_probe import (
    BANNED_SUFFIX,
    PreflightSamples,
    RoleMask,
    Subject,
    TokenIdCheck,
    WindowedText,
)
from tunesmith.train.preflight_tokens import (
    check_eos_supervised,
    check_role_masks,
    check_supervised_tokens,
    check_text_eos,
    check_token_ids,
    check_window_coverage,
    explain_short_answers,
    swap_end,
    swap_role_masks,
)

END = 2
BOS = 1


def make_document(tokens: list[int], weights: list[float], id: str = "rows:1") -> Document:
    return Document(id, np.array(tokens, np.int32), np.array(weights, np.float32))


def make_subject(*documents: Document, **others: object) -> Subject:
    """Samples without a model, which checks of tokens do not need."""
    values = {"end_ids": frozenset({END}), "folder_end_ids": frozenset({END}), **others}
    samples = PreflightSamples(documents, (), **values)  # type: ignore[arg-type]
    return Subject(cast("Any", None), samples)


def make_text(tokens: list[int], ends: list[int]) -> WindowedText:
    """A text in windows that end at `ends`, each of which repeats the last token of the one
    before."""
    windows: list[Document] = []
    for start, end in zip([0, *(end - 1 for end in ends[:-1])], ends, strict=True):
        part = tokens[start:end]
        windows.append(make_document(part, [0.0, *[1.0] * (len(part) - 1)]))
    return WindowedText(make_document(tokens, [1.0] * len(tokens), "texts:1"), tuple(windows))


TEXT = make_text([BOS, 5, 6, 7, END], [3, 5])
SHORT_TEXT = make_text([BOS, 9, END], [3])


def change_window(text: WindowedText, index: int, **changed: object) -> Subject:
    windows = list(text.windows)
    windows[index] = dataclasses.replace(windows[index], **changed)  # type: ignore[arg-type]
    return make_subject(texts=(SHORT_TEXT, dataclasses.replace(text, windows=tuple(windows))))


def test_supervised_tokens_of_all_documents_are_counted() -> None:
    first = make_document([3, 4, END], [0, 0.5, 1])
    second = make_document([3, 4, 5, END], [0, -1, 0, 1])
    result = check_supervised_tokens(make_subject(first, second))
    assert (result.level, result.num_checked, result.evidence) == ("ok", 7, "4 of 7")
    unsupervised = make_document([3, 4], [0, 0], "rows:9")
    first_supervised = make_document([3, 4], [1, 1], "rows:9")
    for wrong in (unsupervised, first_supervised):
        with pytest.raises(GateError) as refused:
            check_supervised_tokens(make_subject(first, wrong))
        assert refused.value.where == "preflight: rows:9"


def test_an_answer_ends_with_its_last_target() -> None:
    ended = make_document([3, END, 4], [0, 1, 0])
    result = check_eos_supervised(make_subject(ended, ended))
    assert (result.level, result.num_checked) == ("ok", 2)
    assert result.evidence == "2 answers end with EOS"
    open_end = make_document([3, END, 4], [0, 1, 1], "rows:9")
    with pytest.raises(GateError, match="last supervised token is 4") as refused:
        check_eos_supervised(make_subject(ended, open_end))
    assert refused.value.where == "preflight: rows:9"


EOS = 7
ENDS = {"folder_end_ids": frozenset({EOS}), "end_texts": {END: "<end>", EOS: "<eos>"}}
BOTH = ENDS | {"end_ids": frozenset({END, EOS})}


def test_answers_end_where_the_model_folder_says() -> None:
    ended = make_document([3, 4, EOS, 5], [0, 1, 1, 0])
    subject = make_subject(ended, ended, **BOTH)
    result = check_eos_supervised(subject)
    assert (result.level, result.num_checked) == ("ok", 2)
    assert explain_short_answers(subject) == ""
    with pytest.raises(GateError, match="token 4, but the model folder ends them in <eos>"):
        check_eos_supervised(swap_end(subject))


@pytest.mark.parametrize(
    ("tokens", "weights"),
    [
        ([3, 4, END, EOS], [0, 1, 1, 0]),  # `<|END_TEXT|><|END_OF_TURN_TOKEN|>`
        ([3, 4, END, 8, EOS], [0, 1, 1, 0, 0]),
        ([3, 4, EOS, END], [0, 1, 1, 1]),  # through the next header
    ],
    ids=["behind", "after a line", "inside"],
)
def test_another_end_than_the_folders_is_refused(tokens: list[int], weights: list[float]) -> None:
    wrong = make_document(tokens, weights, "rows:9")
    with pytest.raises(
        GateError, match="end in <end>, but the model folder ends them in <eos>"
    ) as e:
        check_eos_supervised(make_subject(wrong, **BOTH))
    assert e.value.where == "preflight: rows:9"


def test_an_end_that_the_folder_does_not_name_is_a_warning() -> None:
    subject = make_subject(make_document([3, 4, END, 8], [0, 1, 1, 0]), **BOTH)
    result = check_eos_supervised(subject)
    assert (result.level, result.num_checked) == ("warn", 1)
    assert "<end>" in result.evidence
    assert "names <eos> as the end, not <end>" in result.evidence
    with pytest.raises(GateError, match="ends them in <end>"):
        check_eos_supervised(swap_end(make_subject(make_document([3, 4, END], [0, 1, 1]), **BOTH)))
    assert explain_short_answers(make_subject(make_document([3, END], [0, 1]), **BOTH)) != ""


@pytest.mark.parametrize("is_trained", [False, True])
def test_only_trained_answers_have_an_end(is_trained: bool) -> None:
    banned = make_document([3, 4], [0, -1], f"rows:1{BANNED_SUFFIX}")
    open_end = make_document([3, 4], [0, 1])
    assert check_eos_supervised(make_subject(banned)).level == "warn"
    subject = make_subject(open_end, has_trained_answers=is_trained)
    if is_trained:
        with pytest.raises(GateError, match="not an end token"):
            check_eos_supervised(subject)
    else:
        assert check_eos_supervised(subject).level == "warn"


def test_rows_with_other_token_ids_are_named() -> None:
    checks = (TokenIdCheck("rows:1", True), TokenIdCheck("rows:2", True))
    result = check_token_ids(make_subject(token_id_checks=checks))
    assert (result.num_checked, result.evidence) == (2, "2 rows, leading BOS included")
    prompts = (TokenIdCheck("rows:3", True, is_full_row=False),) * 2
    result = check_token_ids(make_subject(token_id_checks=checks + prompts))
    assert result.evidence == "4 rows, leading BOS included; only the prompts of 2"
    wrong = (*checks, TokenIdCheck("rows:4", False, is_full_row=False))
    with pytest.raises(GateError, match="token ids differ") as refused:
        check_token_ids(make_subject(token_id_checks=wrong))
    assert refused.value.where == "preflight: rows:4"


def test_a_text_ends_with_the_only_eos_and_it_is_trained() -> None:
    result = check_text_eos(make_subject(texts=(TEXT, SHORT_TEXT)))
    assert (result.level, result.num_checked) == ("ok", 2)
    assert result.evidence == "2 texts end with a supervised EOS and contain no other"
    # some tokenizers begin a text with the token that ends it
    same_token = make_text([END, 5, END], [3])
    assert check_text_eos(make_subject(texts=(same_token,))).level == "ok"


@pytest.mark.parametrize(
    "subject",
    [
        make_subject(texts=(SHORT_TEXT, make_text([BOS, 5, 6], [3]))),
        make_subject(texts=(SHORT_TEXT, make_text([BOS, END, 6], [3]))),
        make_subject(texts=(SHORT_TEXT, make_text([BOS, 5, END, 6, END], [3, 5]))),
        change_window(TEXT, -1, weights_L=np.array([0, 1, 0], np.float32)),
        change_window(TEXT, -1, tokens_L=np.array([6, 7, 8], np.int32)),
    ],
    ids=["no EOS", "EOS too early", "two EOS", "EOS is no target", "a window without EOS"],
)
def test_a_text_without_its_end_is_refused(subject: Subject) -> None:
    with pytest.raises(GateError, match="EOS does not end the text") as refused:
        check_text_eos(subject)
    assert refused.value.where == "preflight: texts:1"


def test_the_targets_of_the_windows_are_the_text_without_its_first_token() -> None:
    result = check_window_coverage(make_subject(texts=(TEXT, SHORT_TEXT)))
    assert (result.level, result.num_checked) == ("ok", 6)
    assert result.evidence == "6 tokens of 2 texts in 3 windows"
    result = check_window_coverage(make_subject(texts=(SHORT_TEXT,)))
    assert result.evidence == "2 tokens of 1 text in 1 window"


@pytest.mark.parametrize(
    ("subject", "num_targets"),
    [
        (change_window(TEXT, 1, weights_L=np.array([0, 0, 1], np.float32)), 3),
        (change_window(TEXT, 1, weights_L=np.array([1, 1, 1], np.float32)), 5),
        (change_window(TEXT, 1, tokens_L=np.array([6, 8, END], np.int32)), 4),
        (make_subject(texts=(dataclasses.replace(TEXT, windows=TEXT.windows[::-1]),)), 4),
        (change_window(TEXT, 0, weights_L=np.array([1, 1, 1], np.float32)), 5),
    ],
    ids=["a lost one", "one twice", "another one", "in another order", "the first one"],
)
def test_other_targets_than_the_text_are_refused(subject: Subject, num_targets: int) -> None:
    message = f"windows have {num_targets} targets for a text of 5 tokens"
    with pytest.raises(GateError, match=message) as refused:
        check_window_coverage(subject)
    assert refused.value.where == "preflight: texts:1"


MASK = RoleMask("rows:1", "answer", "question", ("answer",), ("question",), skipped=2)


def test_messages_are_counted_and_those_that_cannot_be_compared() -> None:
    result = check_role_masks(make_subject(role_masks=(MASK, MASK)))
    assert (result.level, result.num_checked) == ("ok", 4)
    assert result.evidence == (
        "4 messages are targets or not, as train_on says; 4 cannot be compared"
    )
    complete = dataclasses.replace(MASK, skipped=0)
    evidence = check_role_masks(make_subject(role_masks=(complete,))).evidence
    assert evidence == "2 messages are targets or not, as train_on says"


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"missing_targets": 3}, "3 tokens are not targets"),
        ({"trained": ("answer", "x" * 50)}, f"a trained message is not a target: {'x' * 40}\n"),
        ({"untrained": ("question", "answer")}, "an untrained message is a target: answer"),
    ],
)
def test_a_wrong_mask_is_named(changed: dict[str, object], message: str) -> None:
    wrong = dataclasses.replace(MASK, row_id="rows:9", **changed)  # type: ignore[arg-type]
    with pytest.raises(GateError, match=message) as refused:
        check_role_masks(make_subject(role_masks=(MASK, wrong)))
    assert refused.value.where == "preflight: rows:9"


def test_swapped_masks_have_targets_where_none_are_trained() -> None:
    masks = swap_role_masks(make_subject(role_masks=(MASK,))).samples.role_masks
    assert masks is not None
    swapped = masks[0]
    assert (swapped.targets, swapped.others) == ("question", "answer")
    assert MASK.has_distinct_targets
    assert not dataclasses.replace(MASK, others="the answer").has_distinct_targets
    assert swap_role_masks(make_subject()).samples.role_masks == ()
