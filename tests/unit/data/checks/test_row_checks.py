"""Checks of single rows: each kind is found, and similar text is not."""

import pytest

from tunesmith.core.types import Example
from tunesmith.data.checks import row_checks
from tunesmith.data.checks.pii import mask_secrets, mask_text
from tunesmith.data.checks.row_checks import ROW_CHECKS
from tunesmith.data.checks.text_stats import extract_row_texts


def row(answer, prompt="How do I set the clock?"):
    turns = ({"role": "user", "content": prompt}, {"role": "assistant", "content": answer})
    return extract_row_texts(Example("rows:1", messages=turns, turn_weights=(0, 1)))


def kinds(check, answer, **more):
    return [kind for kind, _ in ROW_CHECKS[check].find(row(answer, **more))]


LONG = (
    "Turn the small wheel until the hand stands on the hour."
    " Then press it in and wait for the click that says "
)
PROBLEMS = [
    ("unfinished", "```python\nprint(1)", "open code fence"),
    ("unfinished", '{"total": 3, "items": [', "open JSON"),
    ("unfinished", "Turn the wheel, press the knob, then wait for the", "cut-off sentence"),
    ("unfinished", "Turn the wheel, press the knob, wait for a click,", "cut-off sentence"),
    (
        "unfinished",
        LONG + "that all is well and the hands move as they should again",
        "cut-off sentence",
    ),
    ("unfinished", LONG + "that all is well and the hands move as they should...", "trailing dots"),
    ("unfinished", "Here are three ways to set it that most people find:", "cut-off sentence"),
    (
        "unfinished",
        "The wheel turns the hands, and the knob moves the alarm, but",
        "cut-off sentence",
    ),
    ("unfinished", "1. Turn the wheel\n2. Press the knob\n3.", "cut-off list"),
    ("unfinished", "Turn the wheel. Would you like me to continue?", "announced continuation"),
    ("unfinished", "Turn the wheel. [continued]", "announced continuation"),
    ("empty_answers", " N/A ", "N/A"),
    ("empty_answers", "---", "---"),
    ("refusals", "I’m unable to help with clocks.", "refusal"),
    ("refusals", "I cannot provide that.", "refusal"),
    ("apologies", "I'm so sorry, the clock is broken.", "apology"),
    ("apologies", "Apologies for the wait.", "apology"),
    ("apologies", "We are sorry for the wait.", "apology"),
    ("apologies", "Please accept our sincerest apologies.", "apology"),
    ("disclaimers", "As an AI language model, I tell no time.", "AI disclaimer"),
    ("disclaimers", "I'm ChatGPT, a language model.", "AI disclaimer"),
    ("disclaimers", "It is late. I don’t have personal opinions.", "AI disclaimer"),
    ("chat_markers", "Fine.<|im_end|>\n<|im_start|>user", "'<|im_end|>'"),
    ("chat_markers", "Well.\n### Response: turn it", "'### Response:'"),
    ("placeholders", "Dear [Your Name], turn the wheel.", "[your name]"),
    ("placeholders", "Hello {{ customer }}!", "{{ customer }}"),
    ("invisible_chars", "Turn\u200b it", "invisible characters"),
    ("invisible_chars", "Turn \u202eit", "bidi controls"),
    ("invisible_chars", "Turn\U000e0041 it", "Unicode tag characters"),
    ("invisible_chars", "Turn\x00 it", "control characters"),
    ("invisible_chars", "Turn \ufffd it", "U+FFFD replacement characters"),
    ("invisible_chars", "dÃ©jÃ\xa0 vu", "mojibake (UTF-8 read as Latin-1)"),
    ("invisible_chars", "Turn it, don&#39;t press it &amp; wait", "HTML entities"),
    ("invisible_chars", "Caf&eacute; is open", "HTML entities"),
    ("echoes_prompt", "Tell me how do I set the old clock in the hall", "echoed prompt"),
    ("loops", "The clock stands in the hall.\n" * 5, "repeated line"),
    ("loops", "The clock stands in the hall and it ticks. " * 12, "repeated phrase"),
    ("loops", "It is " + "very " * 40 + "late", "repeated phrase"),
    ("loops", "W" + "o" * 60, "repeated letter"),
    ("loops", " ".join(map(str, range(10**5))) + " and so on" * 10**5, "repeated phrase"),
    ("refusals", "I'd rather not answer that.", "refusal"),
    ("refusals", "This violates our content policy.", "refusal"),
    ("apologies", "You're right, and I apologize. It is late.", "apology"),
    ("disclaimers", "As a conversational AI, I tell no time.", "AI disclaimer"),
    ("chat_markers", "Fine.<｜end▁of▁sentence｜>", "'<｜end▁of▁sentence｜>'"),
    ("chat_markers", "<|channel|>final<|message|>Fine.", "'<|channel|>'"),
    ("placeholders", "Dear <NAME>, turn the wheel.", "<name>"),
    ("placeholders", "Thank you for choosing [Company Name].", "[company name]"),
    ("invisible_chars", "Turn it\U000e0141\U000e0142", "Unicode tag characters"),
]


@pytest.mark.parametrize(
    ("check", "answer", "kind"),
    PROBLEMS,
    ids=[f"{check}-{i}" for i, (check, *_) in enumerate(PROBLEMS)],
)
def test_what_is_wrong_is_found(check, answer, kind):
    prompt = (
        "Tell me, how do I set the old clock in the hall?" if check == "echoes_prompt" else "How?"
    )
    assert kinds(check, answer, prompt=prompt) == [kind]


@pytest.mark.parametrize(("num_new", "is_echo"), [(0, True), (1, True), (2, False), (20, False)])
def test_an_echo_repeats_nine_of_ten_trigrams(num_new, is_echo):
    """Of the answer, each counted once: the prompt may have others."""
    words = [f"word{i}" for i in range(12)]
    prompt = " ".join([*words, "and", "more"])
    new_words = [f"new{i}" for i in range(num_new)]  # each makes one trigram
    answer = " ".join([*words, *new_words])
    assert kinds("echoes_prompt", answer, prompt=prompt) == ["echoed prompt"] * is_echo
    repeated = " ".join([*words, *words, *new_words])
    assert kinds("echoes_prompt", repeated, prompt=f"{prompt} {' '.join(words * 2)}") == (
        ["echoed prompt"] * is_echo
    )


def test_a_repeated_letter_is_sought_at_the_end(monkeypatch):
    answer = "W" + "o" * 60 + " and then nothing"
    assert kinds("loops", answer) == ["repeated letter"]
    monkeypatch.setattr(row_checks, "MAX_LOOP_CHARS", 50)
    assert kinds("loops", answer) == []
    assert kinds("loops", f"{answer} {answer[:-17]}") == ["repeated letter"]


FINE = [
    "Turn the wheel until the hand stands on the hour, then press it in.",
    "billing",
    '{"total": 3}',
    "```python\nprint(1)\n```",
    "- turn the wheel\n- press the knob\n- wait for the click and see that the hand moves on as "
    "it should",
    "She said sorry to the clockmaker, who could not help with the old one.",
    "The AI lab sells clocks: 1,234,567,890,123 of them, it says.",
    "Zu spät! Ça va? \U0001f3f4\U000e0067\U000e0062\U000e0073\U000e0063\U000e0074\U000e007f 日本 "
    "👩‍👩‍👧 می‌خواهم",
    "[OPTIONS] are optional, and {expr1} must be a list of strings that are not empty at all",
    "[2024-05-01 10:00] the server has started and it listens",
    "As an AI researcher at a hospital she set clocks. Use <s>old</s> tags; [INST] is shown on "
    "the statement.",
    "葛\U000e0100飾区 has a clock. Clone git@github.com:clocks/hall.git and the key "
    "AKIAIOSFODNN7EXAMPLE is none.",
    "| hour | bell |\n|---|---|\n"
    + "\n".join(f"| {hour} | {hour} times |" for hour in range(1, 30)),
    "Escape it in HTML: &amp; is an ampersand. AT&T; R&D; x &lt y.",
    "<p>Clocks &amp; bells</p>",
    "This clock was born of need in 1999, on 12 Main lines, for 3 Big Way stations; the 4 West and "
    "2 East roads meet here. Free Software Foundation, 51 Franklin Street, Boston.",
    "The Streets of 1920 were Square. Chapter 12 Dr. Weg 3, der Weg 5 ist weit.",
    "Write to clock@example.com, or call 555 0100. Version 4.1.2.2026, order 2026-11-25.",
    "",
]


@pytest.mark.parametrize("answer", FINE, ids=range(len(FINE)))
def test_what_is_fine_is_not(answer):
    assert {check: matches for check in ROW_CHECKS if (matches := kinds(check, answer))} == {}


PRIVATE = [
    ("secrets", "AWS keys", "AKIAQ7DFH2LMNX5TRV4W"),
    ("secrets", "GitHub tokens", "ghp_" + "a1B2" * 9),
    ("secrets", "Google keys", "AIza" + "Sy0" * 11 + "ab"),
    ("secrets", "API keys", "sk-proj-abc123def456ghi789jkl"),
    ("secrets", "private keys", "-----BEGIN RSA PRIVATE KEY-----"),
    (
        "secrets",
        "JSON Web Tokens",
        "eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiIxMjM0.dBjftJeZ4CVP-mB92K27uhbUJU1p1r",
    ),
    ("secrets", "passwords in a URL", "postgres://admin:hunter22@db.internal"),
    ("secrets", "GitLab tokens", "glpat-x1Y2z3A4b5C6d7E8f9G0"),
    ("secrets", "npm tokens", "npm_" + "a1B2" * 9),
    ("secrets", "PyPI tokens", "pypi-" + "AgEIcHlwaS5vcmc" * 6),
    ("secrets", "SendGrid keys", "SG." + "a1B2c3" * 3 + "abcd." + "x9Y8" * 10 + "abc"),
    (
        "secrets",
        "Slack webhooks",
        "https://hooks.slack.com/services/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",
    ),
    ("secrets", "cloud tokens", "dapi" + "0a1b2c3d" * 4),
    ("secrets", "bot tokens", "1234567890:AA" + "x1Y" * 11),
    ("secrets", "storage keys", "AccountKey=" + "a1B2" * 21 + "=="),
    ("secrets", "passwords in a header", "Authorization: Basic c3ZjLXJlcG9ydDpIZXJic3QhMjAyMw=="),
    ("secrets", "passwords in environment variables", "MYSQL_ROOT_PASSWORD=8dK!x03vQz"),
    ("secrets", "passwords in a command", "curl -u admin:b1rchTree!9 -X POST"),
    ("secrets", "passwords in a sentence", "the password is Summer2024!Kiel now"),
    ("personal", "email addresses", "maria.weber@gmx.de"),
    ("personal", "phone numbers", "+49 (0)89 1234 5678"),
    ("personal", "card numbers", "4111 1111 1111 1111"),
    ("personal", "IBANs", "DE89 3704 0044 0532 0130 00"),
    ("personal", "postal addresses", "742 Evergreen Terrace"),
    ("personal", "postal addresses", "1600 West Park Avenue"),
    ("personal", "postal addresses", "Lindenstraße 12a"),
    ("personal", "postal addresses", "14 rue de la Paix, 75002"),
    ("personal", "postal addresses", "Calle de Alcalá 45"),
    ("personal", "US social security numbers", "078-05-1120"),
]


@pytest.mark.parametrize(("check", "kind", "text"), PRIVATE, ids=[kind for _, kind, _ in PRIVATE])
def test_secrets_and_personal_data_are_found_and_never_shown_whole(check, kind, text):
    matches = dict(ROW_CHECKS[check].find(row(f"It is {text}, keep it.")))
    assert list(matches) == [kind]
    assert text not in matches[kind]
    assert "…" in matches[kind]


@pytest.mark.parametrize(
    "text",
    [
        "born on 3 March 1984", "date of birth: 1984-03-03", "DOB 03/03/1984",
        '"dob": "1984-03-03"', "birthday is March 3rd, 1984", "geboren am 3. März 1984",
        "née le 3 mars 1984",
    ],
)  # fmt: skip
def test_a_date_of_birth_is_found_where_it_is_called_so(text):
    assert kinds("personal", f"She is {text}, it says.") == ["dates of birth"]
    assert kinds("personal", f"The clock stopped {text.split(' ', 1)[1]}") == []


@pytest.mark.parametrize("text", [text for _, _, text in PRIVATE])
def test_what_quotes_a_row_hides_them(text):
    shown = mask_secrets(f"all have the answer 'It is {text}, keep it.'")
    assert text not in shown
    assert shown.startswith("all have the answer 'It is ")
    assert shown.endswith(" keep it.'")
    assert "…" in shown


def test_check_digits_tell_numbers_from_cards_and_accounts():
    text = (
        "4111 1111 1111 1112 and DE89 3704 0044 0532 0130 01, and password = 'hunter'"
        " but token: 'aaaaaaaaaaaa'"
    )
    assert kinds("personal", text) == kinds("secrets", text) == []
    assert kinds("secrets", 'password = "s3cret-Pass9"') == ["passwords"]


def test_a_mask_keeps_the_ends():
    assert mask_text("AKIAQ7DFH2LMNX5TRV4W") == "AK…4W (20 characters)"
    assert mask_text("abcdefg") == "a…g (7 characters)"


def test_all_turns_are_searched_for_what_nobody_should_see():
    turns = (
        {"role": "system", "content": "key AKIAQ7DFH2LMNX5TRV4W"},
        {"role": "user", "content": "\u200bhi"},
    )
    example = Example(
        "rows:1", messages=(*turns, {"role": "assistant", "content": "ho"}), turn_weights=(0, 0, 1)
    )
    assert [kind for kind, _ in ROW_CHECKS["secrets"].find(extract_row_texts(example))] == [
        "AWS keys"
    ]
    assert [kind for kind, _ in ROW_CHECKS["invisible_chars"].find(extract_row_texts(example))] == [
        "invisible characters"
    ]


def test_tool_results_follow_their_calls_in_order():
    question = {"role": "user", "content": "which are they?"}
    calling = {"role": "assistant", "content": "", "tool_calls": [{"id": "a"}, {"id": "b"}]}
    first, second = ({"role": "tool", "content": "x", "tool_call_id": key} for key in "ab")
    answer = {"role": "assistant", "content": "these"}
    nameless = {"role": "tool", "content": "x"}
    for turns, expected in (
        ((calling, first, second, answer), []),
        ((calling, nameless, nameless, answer), []),
        ((calling,), []),
        ((calling, second, first, answer), ["results in another order than calls"] * 2),
        ((calling, first, answer), ["call without a result"]),
        ((first, answer), ["result without a call"]),
    ):
        messages = (question, *turns)
        example = Example("rows:1", messages=messages, turn_weights=(0,) * len(messages))
        found = ROW_CHECKS["tool_order"].find(extract_row_texts(example))
        assert [kind for kind, _ in found] == expected
    conversation = (question, calling, first, second, answer, question, answer)
    example = Example("rows:1", messages=conversation, turn_weights=(0,) * len(conversation))
    assert not list(ROW_CHECKS["tool_order"].find(extract_row_texts(example)))


def test_a_short_answer_that_is_the_whole_question_repeats_it():
    assert kinds("echoes_prompt", "Who looks after it now?", prompt="who looks after it now")
    assert not kinds("echoes_prompt", "printf", prompt="printf")
