"""What the data check says of single rows: each kind is found, and its neighbours are not."""

import pytest

from tunesmith.data.audit.private import masked
from tunesmith.data.audit.reading import row_of
from tunesmith.data.audit.said import ROW_CHECKS
from tunesmith.types import Example


def row(answer, prompt="How do I set the clock?"):
    turns = ({"role": "user", "content": prompt}, {"role": "assistant", "content": answer})
    return row_of(Example("rows:1", messages=turns, turn_weights=(0, 1)))


def kinds(check, answer, **more):
    return [kind for kind, _ in ROW_CHECKS[check].find(row(answer, **more))]


LONG = "Turn the small wheel until the hand stands on the hour. Then press it in and wait for the click that says "
FOUND = [
    ("unfinished", "```python\nprint(1)", "leave a code fence open"),
    ("unfinished", '{"total": 3, "items": [', "leave JSON open"),
    ("unfinished", "Turn the wheel, press the knob, then wait for the", "stop in a sentence"),
    ("unfinished", "Turn the wheel, press the knob, wait for a click,", "stop in a sentence"),
    ("unfinished", LONG + "that all is well and the hands move as they should again", "stop in a sentence"),
    ("unfinished", LONG + "that all is well and the hands move as they should...", "end in dots"),
    ("says_nothing", " N/A ", "N/A"),
    ("says_nothing", "---", "---"),
    ("refusals", "I’m unable to help with clocks.", "refuse"),
    ("refusals", "I cannot provide that.", "refuse"),
    ("apologies", "I'm so sorry, the clock is broken.", "apologise"),
    ("apologies", "Apologies for the wait.", "apologise"),
    ("apologies", "We are sorry for the wait.", "apologise"),
    ("apologies", "Please accept our sincerest apologies.", "apologise"),
    ("disclaimers", "As an AI language model, I tell no time.", "speak as an AI"),
    ("disclaimers", "I'm ChatGPT, a language model.", "speak as an AI"),
    ("disclaimers", "It is late. I don’t have personal opinions.", "speak as an AI"),
    ("markers", "Fine.<|im_end|>\n<|im_start|>user", "'<|im_end|>'"),
    ("markers", "Well.\n### Response: turn it", "'### Response:'"),
    ("holes", "Dear [Your Name], turn the wheel.", "[your name]"),
    ("holes", "Hello {{ customer }}!", "{{ customer }}"),
    ("unseen", "Turn\u200b it", "invisible characters"),
    ("unseen", "Turn \u202eit", "direction overrides"),
    ("unseen", "Turn\U000e0041 it", "hidden tag characters"),
    ("unseen", "Turn\x00 it", "control characters"),
    ("unseen", "Turn \ufffd it", "U+FFFD, text that was lost"),
    ("unseen", "dÃ©jÃ\xa0 vu", "UTF-8 read as Latin-1"),
    ("copied_prompt", "Tell me how do I set the old clock in the hall", "say the question again"),
    ("loops", "The clock stands in the hall.\n" * 5, "repeat a line"),
]


@pytest.mark.parametrize(
    ("check", "answer", "kind"), FOUND, ids=[f"{check}-{i}" for i, (check, *_) in enumerate(FOUND)]
)
def test_what_is_wrong_is_found(check, answer, kind):
    prompt = "Tell me, how do I set the old clock in the hall?" if check == "copied_prompt" else "How?"
    assert kinds(check, answer, prompt=prompt) == [kind]


FINE = [
    "Turn the wheel until the hand stands on the hour, then press it in.",
    "billing",
    '{"total": 3}',
    "```python\nprint(1)\n```",
    "- turn the wheel\n- press the knob\n- wait for the click and see that the hand moves on as it should",
    "She said sorry to the clockmaker, who could not help with the old one.",
    "The AI lab sells clocks: 1,234,567,890,123 of them, it says.",
    "Zu spät! Ça va? \U0001f3f4\U000e0067\U000e0062\U000e0073\U000e0063\U000e0074\U000e007f 日本 👩‍👩‍👧 می‌خواهم",
    "Write to clock@example.com, or call 555 0100. Version 4.1.2.2026, order 2026-11-25.",
    "",
]


@pytest.mark.parametrize("answer", FINE, ids=range(len(FINE)))
def test_what_is_fine_is_not(answer):
    assert {check: found for check in ROW_CHECKS if (found := kinds(check, answer))} == {}


PRIVATE = [
    ("secrets", "AWS keys", "AKIAIOSFODNN7EXAMPLE"),
    ("secrets", "GitHub tokens", "ghp_" + "a1B2" * 9),
    ("secrets", "Google keys", "AIza" + "Sy0" * 11 + "ab"),
    ("secrets", "API keys", "sk-proj-abc123def456ghi789jkl"),
    ("secrets", "private keys", "-----BEGIN RSA PRIVATE KEY-----"),
    ("secrets", "signed tokens", "eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiIxMjM0.dBjftJeZ4CVP-mB92K27uhbUJU1p1r"),
    ("secrets", "passwords in a URL", "postgres://admin:hunter22@db.internal"),
    ("personal", "email addresses", "maria.weber@gmx.de"),
    ("personal", "phone numbers", "+49 (0)89 1234 5678"),
    ("personal", "card numbers", "4111 1111 1111 1111"),
    ("personal", "IBANs", "DE89 3704 0044 0532 0130 00"),
    ("personal", "US social security numbers", "078-05-1120"),
]


@pytest.mark.parametrize(("check", "kind", "text"), PRIVATE, ids=[kind for _, kind, _ in PRIVATE])
def test_secrets_and_personal_data_are_found_and_never_shown_whole(check, kind, text):
    found = dict(ROW_CHECKS[check].find(row(f"It is {text}, keep it.")))
    assert list(found) == [kind]
    assert text not in found[kind]
    assert "…" in found[kind]


def test_check_digits_tell_numbers_from_cards_and_accounts():
    text = "4111 1111 1111 1112 and DE89 3704 0044 0532 0130 01, and password = 'hunter' but token: 'aaaaaaaaaaaa'"
    assert kinds("personal", text) == kinds("secrets", text) == []
    assert kinds("secrets", 'password = "s3cret-Pass9"') == ["passwords"]


def test_a_mask_keeps_the_ends():
    assert masked("AKIAIOSFODNN7EXAMPLE") == "AK…LE (20 characters)"
    assert masked("abcdefg") == "a…g (7 characters)"


def test_all_turns_are_searched_for_what_nobody_should_see():
    turns = ({"role": "system", "content": "key AKIAIOSFODNN7EXAMPLE"}, {"role": "user", "content": "\u200bhi"})
    example = Example("rows:1", messages=(*turns, {"role": "assistant", "content": "ho"}), turn_weights=(0, 0, 1))
    assert [kind for kind, _ in ROW_CHECKS["secrets"].find(row_of(example))] == ["AWS keys"]
    assert [kind for kind, _ in ROW_CHECKS["unseen"].find(row_of(example))] == ["invisible characters"]
