"""Checks of single rows: what is wrong with what one row says.

Each is a function from a row to (kind, what to show of it), and one line in `ROW_CHECKS`; its rows
are counted while all of them are read (reading.py). They are heuristics over words and signs, made
for English where they are about words: a count is a reason to look at the rows that are named, not
a verdict."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import NamedTuple

from tunesmith.core.types import Finding
from tunesmith.data.checks.context import CheckContext, Level, choose_level
from tunesmith.data.checks.ngrams import hash_ngrams
from tunesmith.data.checks.pii import find_personal_data, find_secrets
from tunesmith.data.checks.text_stats import CheckCounts, RowFinder, RowTexts

Matches = Iterator[tuple[str, str]]

# ---------------------------------------------------------------- answers that stop, or say nothing

MAX_PHRASE_WORDS, LONG_TEXT_WORDS = (
    7,
    30,
)  # words, of an answer that is more than a phrase, and of a text
OPEN_END = re.compile(
    r"\b(?:and|or|but|the|an?|of|to|with|in|for|from|by|as|than|is|are|that|which|because|und|der|die|das|et|les?|la|y|el)"
    r"(?:\.\.\.|…)?$",
    re.IGNORECASE,
)
OPEN_ITEM = re.compile(r"\n[ \t]*(?:[-*]|\d{1,3}[.)])$")
OPEN_JSON = re.compile(r"\{\s*(?:[\"}]|$)|\[\s*(?:[\"{\[\]\d-]|true|false|null|$)")
MARKED_CUT = re.compile(
    r"(?:\[(?:truncated|cut|continued|\.\.\.)\]|\((?:to be )?continued\))$", re.IGNORECASE
)
CUT_MARK = re.compile(r"(?<!: )(?:\.\.\.|…)$")
CONTINUE_OFFER = re.compile(
    r"(?:would you like|do you want|shall|should) (?:me to|i) (?:continue|go on)\b[^.?!]{0,40}\?$",
    re.IGNORECASE,
)
SENTENCE = re.compile(r"[.!?] +\w")
LIST_LINE = re.compile(
    r"\s*(?:[-*+#>|]|\d+[.)]|```|https?:)"
)  # of a list, table, heading: needs no full stop
EMPTY_ANSWERS = frozenset(
    [
        "null",
        "nan",
        "n/a",
        "undefined",
        "[deleted]",
        "[removed]",
        "todo",
        "tbd",
        "(no answer)",
        "[object object]",
    ]
)


def find_unfinished(row: RowTexts) -> Matches:
    """Answers that stop before their end."""
    tail = row.answer.rstrip()
    if tail.count("```") % 2:
        yield "leave a code fence open", ""
    elif OPEN_JSON.match(tail):
        if sum(map(tail.count, "{[")) > sum(map(tail.count, "}]")):
            yield "leave JSON open", ""
    elif OPEN_ITEM.search(tail[-40:]):
        yield "stop in a list", ""
    elif MARKED_CUT.search(tail[-24:]) or CONTINUE_OFFER.search(tail[-80:]):
        yield "say that they go on", ""
    elif kind := _find_open_sentence(tail):
        yield kind, ""


def _find_open_sentence(tail: str) -> str:
    words = len(tail.split(None, LONG_TEXT_WORDS))
    if tail.endswith((",", "(", ":", " -", "–")) or OPEN_END.search(tail[-16:]):
        return "stop in a sentence" if words > MAX_PHRASE_WORDS else ""
    if words <= LONG_TEXT_WORDS:
        return ""
    if CUT_MARK.search(tail[-16:]):
        return "end in dots"
    last = tail.rpartition("\n")[2]
    is_open = (
        tail[-1].isalnum()
        and tail.isascii()
        and SENTENCE.search(last)
        and not LIST_LINE.match(last)
    )
    return "stop in a sentence" if is_open else ""


def find_empty_answers(row: RowTexts) -> Matches:
    """Words that stand for no answer."""
    answer = row.answer.strip()
    if answer.lower() in EMPTY_ANSWERS or (answer and not any(map(str.isalnum, answer))):
        yield answer[:12], ""


# ---------------------------------------------------------------- manners

REFUSAL = re.compile(
    r"\bi(?: am|'m) (?:unable|not able|not allowed|not comfortable) |"
    r"\bi (?:cannot|can't|can not|won't|will not|must decline to|have to decline to) "
    r"(?:help|assist|provide|answer|fulfil|comply|create|generate|discuss|engage|support|write|give|share|do that)|"
    r"\bi(?: must| have to) (?:decline|refuse)|\bi won't be able to (?:help|assist|answer|fulfil|do)|"
    r"\bnot something i (?:can|am able to) (?:do|help)|\bi(?:'d| would) rather not (?:answer|say|discuss)|"
    r"\bit (?:would|is) not (?:be )?appropriate for me to|\bmy (?:guidelines|policies) (?:prevent|forbid|do)|"
    r"\b(?:against|violates?) (?:my|our) (?:\w+ )?(?:guidelines|polic|programming)",
)
APOLOGY = re.compile(
    r"\W*(?:(?:i(?: am|'m)|we(?: are|'re)) (?:so |very |really |truly |deeply )*sorry|sorry\b|"
    r"(?:please accept )?(?:my |our |i |we )?(?:do )?(?:sincere(?:st|ly)? |deepest )?apolog)",
)
AI_DISCLAIMER = re.compile(
    r"\b(?:as|being) an? (?:conversational |helpful |large |machine )?"
    r"(?:ai|artificial intelligence|(?:language|learning) model|chat ?bot|virtual assistant)\b"
    r"(?! (?:researcher|engineer|developer|expert|scientist|student|company|lab|team|artist|lead|ethicist))|"
    r"\bi(?: am|'m)(?: \w+,)? (?:just |only |merely |simply )?an? (?:large )?"
    r"(?:ai\b|artificial intelligence|language model|chat ?bot)|\bi(?: am|'m)(?: called)? chatgpt\b|"
    r"\bi was (?:trained|developed|created|built|made) by (?:openai|anthropic|google|meta|microsoft|alibaba|mistral)\b|"
    r"\bmy (?:knowledge cut-?off|last (?:knowledge )?update|training data)\b|"
    r"\bi (?:don't|do not) have (?:personal (?:opinions|beliefs|feelings|experiences)|feelings|access to real[- ]time)",
)
SORRY = re.compile(
    r"\bi (?:do |sincerely |deeply )*apologi[sz]e\b|\b(?:my|our) (?:sincere |deepest )?apologies\b|\bmy bad\b|"
    r"\bforgive (?:me\b|(?:my|our) (?:\w+ )?(?:error|mistake|delay|confusion))|\bregret any (?:confusion|inconvenience)"
)
REFUSAL_CHARS = 300  # characters in which an answer refuses
APOLOGY_CHARS = 60  # in which it apologises


def find_refusals(row: RowTexts) -> Matches:
    if REFUSAL.search(row.plain_answer, 0, REFUSAL_CHARS):
        yield "refuse", ""


def find_apologies(row: RowTexts) -> Matches:
    if APOLOGY.match(row.plain_answer) or SORRY.search(row.plain_answer, 0, APOLOGY_CHARS):
        yield "apologise", ""


def find_disclaimers(row: RowTexts) -> Matches:
    if AI_DISCLAIMER.search(row.plain_answer):
        yield "speak as an AI", ""


# ---------------------------------------------------------------- text that is none

CHAT_MARKERS = re.compile(
    r"<\|[a-z]\w{1,30}\|>|<｜[\w▁]{2,40}｜>"
    r"|\[INST\](?=[^\]]*\[/INST\])|<</?SYS>>|\A<s>|</s>\Z|<(?:start|end)_of_turn>"
    r"|^### ?(?:Instruction|Response|Human|Assistant|Input):|^(?:Human|USER|ASSISTANT|Assistant): ",
    re.MULTILINE,
)
PLACEHOLDERS = re.compile(
    r"\{\{ ?\w+ ?\}\}|\[(?:your|insert) [^\]\n]{0,40}\]|\[enter (?:your|the|a) [^\]\n]{0,40}\]|"
    r"\[(?:(?:first|last|full|company|customer|client|recipient|sender|product|job|phone|email) ?)?"
    r"(?:name|title|company|date|address|number|phone(?:[_ ]number)?|email|position|city|link|url)\](?!\()|"
    r"<(?:insert|your)\b[^>\n]{0,40}>|<(?:(?:first|last|full|company) )?(?:name|company|position|date|email)>|"
    r"\{(?:first|last|full|user|company|customer)_?name\}|%firstname%|%lastname%|"
    r"\blorem ipsum\b|\bxx+[-/]xx+\b|_{8,}",
)
MARKER_SIGNS = (
    "<|",
    "<｜",
    "INST]",
    "SYS>>",
    "s>",
    "_of_turn>",
    "###",
    "Human: ",
    "USER: ",
    "SISTANT: ",
    "sistant: ",
)
PLACEHOLDER_SIGN = re.compile(r"[\[<{]|lorem|xx[-/]|%|___")  # quick to look for
INVISIBLE_CHARS = {
    "control characters": "\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f",
    "invisible characters": "\u00ad\u200b\u2060-\u2064\ufeff\ufff9-\ufffb",
    "direction overrides": "\u202a-\u202e\u2066-\u2069",
    "hidden tag characters": "\U000e0001\U000e0020-\U000e007f\U000e0100-\U000e01ef",
    "U+FFFD, text that was lost": "\ufffd",
    "private characters": "\ue000-\uf8ff",
}
ANY_INVISIBLE = re.compile(f"[{''.join(INVISIBLE_CHARS.values())}]")
INVISIBLE_PATTERNS = {kind: re.compile(f"[{signs}]") for kind, signs in INVISIBLE_CHARS.items()}
# The flags of Scotland and others are made of tags; one selector behind a Chinese character chooses
# its form.
FLAG = re.compile("\U0001f3f4[\U000e0020-\U000e007f]+|(?<=[\u3400-\u9fff])[\U000e0100-\U000e01ef]")
MOJIBAKE = re.compile("Ã[\u0080-\u00bf©¨ª«¼¶¤±³º§]|â€[™œ\u009d\u009c“”¦]|Â[\u00a0°»«£]|ï»¿")


def find_chat_markers(row: RowTexts) -> Matches:
    """Signs of a chat template inside a text: of another tool's export, or of an attack."""
    for text in row.texts:
        if any(sign in text for sign in MARKER_SIGNS) and (match := CHAT_MARKERS.search(text)):
            yield repr(match[0].strip()), ""
            return


def find_placeholders(row: RowTexts) -> Matches:
    """Places of a form that nobody filled in."""
    if PLACEHOLDER_SIGN.search(row.plain_answer) and (
        match := PLACEHOLDERS.search(row.plain_answer)
    ):
        yield match[0][:30], ""


def find_invisible_chars(row: RowTexts) -> Matches:
    """Characters that no reader sees, and text in the wrong encoding."""
    for text in row.texts:
        if ANY_INVISIBLE.search(text):
            text = FLAG.sub("", text)
            for kind, pattern in INVISIBLE_PATTERNS.items():
                if pattern.search(text):
                    yield kind, ""
        if not text.isascii() and MOJIBAKE.search(text):
            yield "UTF-8 read as Latin-1", ""


# ---------------------------------------------------------------- answers that repeat

MIN_ECHO_SHARE, MIN_ECHO_WORDS = 0.9, 8
MIN_LOOP_LINES = 4  # times the same line
MIN_LOOP_WORDS = 24  # from which a share says something
MIN_UNIQUE_WORDS, MIN_UNIQUE_PHRASES = (
    0.25,
    0.34,
)  # different ones of all words, and of all runs of three
NUMBERED = re.compile(r"\d+[.):]|[^\w]+")  # what begins an item, and signs
REPEATED_LETTER = re.compile(r"(\w)\1{39,}")


def find_echoed_prompt(row: RowTexts) -> Matches:
    """Answers that say the question again."""
    answer, prompt = row.get_words(row.answer), row.get_words(row.prompt)
    if len(answer) < MIN_ECHO_WORDS or not len(prompt) or 2 * len(answer) < len(prompt):
        return  # or taken out of a longer text
    answer_grams, prompt_grams = (
        set(hash_ngrams(answer, 3).tolist()),
        set(hash_ngrams(prompt, 3).tolist()),
    )
    if len(answer_grams & prompt_grams) >= MIN_ECHO_SHARE * len(answer_grams):
        yield "say the question again", ""


def find_loops(row: RowTexts) -> Matches:
    """Answers with one line, phrase or letter over and over."""
    lines = [line.strip() for line in row.answer.split("\n") if len(line) > 20]
    if len(lines) >= MIN_LOOP_LINES and max(map(lines.count, set(lines[:50]))) >= MIN_LOOP_LINES:
        yield "repeat a line", ""
        return
    words = row.plain_answer.split()
    if len(words) >= MIN_LOOP_WORDS and len(set(words)) < MIN_UNIQUE_WORDS * len(words):
        content_words = [word for word in words if not NUMBERED.fullmatch(word)]
        trigrams = set(zip(content_words, content_words[1:], content_words[2:], strict=False))
        if len(content_words) >= MIN_LOOP_WORDS and len(trigrams) < MIN_UNIQUE_PHRASES * (
            len(content_words) - 2
        ):
            yield "repeat a phrase", ""
    elif REPEATED_LETTER.search(row.answer):
        yield "repeat a letter", ""


# ---------------------------------------------------------------- what is said of them


class RowCheck(NamedTuple):
    find: RowFinder
    description: str  # behind "3 of 9 rows"
    level: Level | None  # None: by the share of the rows
    fix: str
    can_check_text: bool = False  # also where a row is no question with an answer


ROW_CHECKS: dict[str, RowCheck] = {
    "unfinished": RowCheck(find_unfinished, "have an answer that stops early", None, "finish the answers, or drop the rows"),
    "says_nothing": RowCheck(find_empty_answers, "have no answer but a placeholder", None, "write them, or drop the rows"),
    "refusals": RowCheck(
        find_refusals, "refuse in the answer", None, "keep only those that should be refused; `never:` leaves the others out"
    ),
    "apologies": RowCheck(find_apologies, "begin the answer with an apology", None, "drop what the model should not learn"),
    "disclaimers": RowCheck(find_disclaimers, "speak as an AI in the answer", None, "reword them; `never:` leaves them out"),
    "markers": RowCheck(
        find_chat_markers, "hold markers of a chat template as text", "warn",
        "divide them into messages again: as text they teach the model to write markers", True,
    ),
    "holes": RowCheck(find_placeholders, "have an answer with places to fill in", None, "fill them in, or drop the rows"),
    "unseen": RowCheck(
        find_invisible_chars, "hold characters that nobody sees", "warn", "take them out, or decode the source again", True
    ),
    "copied_prompt": RowCheck(find_echoed_prompt, "have an answer that says the question again", None, "drop them"),
    "loops": RowCheck(find_loops, "have an answer that repeats a line", None, "drop them"),
    "secrets": RowCheck(
        find_secrets, "hold what looks like a secret", "error",
        "revoke it, and take it out: a model can give back what it was trained on", True,
    ),
    "personal": RowCheck(
        find_personal_data, "hold personal data", "warn", "take out what nobody agreed to: a model can give it back", True
    ),
}  # fmt: skip


def get_row_finders() -> dict[str, RowFinder]:
    return {name: check.find for name, check in ROW_CHECKS.items()}


def check_rows(context: CheckContext) -> Iterator[Finding]:
    """One for each check of single rows that found something."""
    if context.text_stats is None:
        return
    rows = len(context.dataset)
    is_plain_text = all(part.format == "text" for part in context.dataset.parts)
    for name, counts in context.text_stats.roles[context.role].check_counts.items():
        check = ROW_CHECKS[name]
        if check.can_check_text or not is_plain_text:
            message = (
                f"{counts.num_rows:,} of {rows:,} rows {check.description}{_format_kinds(counts)}"
            )
            level = check.level or choose_level(counts.num_rows, rows)
            yield Finding(name, level, message, counts.num_rows, tuple(counts.examples), check.fix)


def _format_kinds(counts: CheckCounts) -> str:
    if len(counts.kinds) == 1 and next(iter(counts.kinds.values())) == counts.num_rows:
        kind = next(iter(counts.kinds))
        return "" if " " in kind and kind.split()[0] in ("say", "speak", "repeat") else f": {kind}"
    return ": " + ", ".join(f"{count:,} {kind}" for kind, count in counts.kinds.most_common(6))
