"""Checks of single rows: refusals, placeholders, chat markers, secrets and the like.

A check is a function from a row to (kind, excerpt) pairs, and one line in ROW_CHECKS at the bottom.
`text_stats.py` runs them while it reads all rows. They are heuristics, and those about words are
made for English: a count is a reason to look at the rows, not a verdict."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from tunesmith.core.types import Finding
from tunesmith.data.checks.context import CheckContext, Level, choose_level, describe_rows
from tunesmith.data.checks.ngrams import exclude_values, hash_ngrams, sort_unique
from tunesmith.data.checks.pii import find_personal_data, find_secrets
from tunesmith.data.checks.text_stats import CheckCounts, RowFinder, RowTexts

Matches = Iterator[tuple[str, str]]

# ---------------------------------------------------------------- unfinished and empty answers

MAX_PHRASE_WORDS = 7  # answers up to this length may lack a full stop
LONG_TEXT_WORDS = 30  # longer answers should end a sentence
OPEN_END = re.compile(
    r"\b(?:and|or|but|the|an?|of|to|with|in|for|from|by|as|than|is|are|that|which|because|und"
    r"|der|die|das|et|les?|la|y|el)"
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
# a line of a list, table or heading, which needs no full stop
LIST_LINE = re.compile(r"\s*(?:[-*+#>|]|\d+[.)]|```|https?:)")
EMPTY_ANSWERS = frozenset({
    "null", "nan", "n/a", "undefined", "[deleted]", "[removed]", "todo", "tbd", "(no answer)",
    "[object object]",
})  # fmt: skip


def find_unfinished(row: RowTexts) -> Matches:
    """Find answers that are cut off."""
    tail = row.answer.rstrip()
    if tail.count("```") % 2:
        yield "open code fence", ""
    elif OPEN_JSON.match(tail):
        if sum(map(tail.count, "{[")) > sum(map(tail.count, "}]")):
            yield "open JSON", ""
    elif OPEN_ITEM.search(tail[-40:]):
        yield "cut-off list", ""
    elif MARKED_CUT.search(tail[-24:]) or CONTINUE_OFFER.search(tail[-80:]):
        yield "announced continuation", ""
    elif kind := _find_open_sentence(tail):
        yield kind, ""


def _find_open_sentence(tail: str) -> str:
    words = len(tail.split(None, LONG_TEXT_WORDS))
    if tail.endswith((",", "(", ":", " -", "–")) or OPEN_END.search(tail[-16:]):
        return "cut-off sentence" if words > MAX_PHRASE_WORDS else ""
    if words <= LONG_TEXT_WORDS:
        return ""
    if CUT_MARK.search(tail[-16:]):
        return "trailing dots"
    last_line = tail.rpartition("\n")[2]
    if not tail[-1].isalnum() or not tail.isascii() or LIST_LINE.match(last_line):
        return ""
    return "cut-off sentence" if SENTENCE.search(last_line) else ""


def find_empty_answers(row: RowTexts) -> Matches:
    """Find answers such as N/A, null or ---."""
    answer = row.answer.strip()
    if answer.lower() in EMPTY_ANSWERS or (answer and not any(map(str.isalnum, answer))):
        yield answer[:12], ""


# ---------------------------------------------------------------- refusals, apologies, disclaimers

REFUSAL = re.compile(
    r"\bi(?: am|'m) (?:unable|not able|not allowed|not comfortable) |"
    r"\bi (?:cannot|can't|can not|won't|will not|must decline to|have to decline to) "
    r"(?:help|assist|provide|answer|fulfil|comply|create|generate|discuss|engage|support|write"
    r"|give|share|do that)|"
    r"\bi(?: must| have to) (?:decline|refuse)|\bi won't be able to (?:help|assist|answer"
    r"|fulfil|do)|"
    r"\bnot something i (?:can|am able to) (?:do|help)|\bi(?:'d| would) rather not (?:answer"
    r"|say|discuss)|"
    r"\bit (?:would|is) not (?:be )?appropriate for me to|\bmy (?:guidelines"
    r"|policies) (?:prevent|forbid|do)|"
    r"\b(?:against|violates?) (?:my|our) (?:\w+ )?(?:guidelines|polic|programming)",
)
APOLOGY = re.compile(
    r"\W*(?:(?:i(?: am|'m)|we(?: are|'re)) (?:so |very |really |truly |deeply )*sorry|sorry\b|"
    r"(?:please accept )?(?:my |our |i |we )?(?:do )?(?:sincere(?:st|ly)? |deepest )?apolog)",
)
AI_DISCLAIMER = re.compile(
    r"\b(?:as|being) an? (?:conversational |helpful |large |machine )?"
    r"(?:ai|artificial intelligence|(?:language|learning) model|chat ?bot|virtual assistant)\b"
    r"(?! (?:researcher|engineer|developer|expert|scientist|student|company|lab|team|artist"
    r"|lead|ethicist))|"
    r"\bi(?: am|'m)(?: \w+,)? (?:just |only |merely |simply )?an? (?:large )?"
    r"(?:ai\b|artificial intelligence|language model|chat ?bot)|\bi(?: am"
    r"|'m)(?: called)? chatgpt\b|"
    r"\bi was (?:trained|developed|created|built|made) by (?:openai|anthropic|google|meta"
    r"|microsoft|alibaba|mistral)\b|"
    r"\bmy (?:knowledge cut-?off|last (?:knowledge )?update|training data)\b|"
    r"\bi (?:don't|do not) have (?:personal (?:opinions|beliefs|feelings|experiences)|feelings"
    r"|access to real[- ]time)",
)
SORRY = re.compile(
    r"\bi (?:do |sincerely |deeply )*apologi[sz]e\b|\b(?:my|our) (?:sincere "
    r"|deepest )?apologies\b|\bmy bad\b|"
    r"\bforgive (?:me\b|(?:my|our) (?:\w+ )?(?:error|mistake|delay|confusion))"
    r"|\bregret any (?:confusion|inconvenience)"
)
REFUSAL_CHARS = 300  # searched from the start of an answer
APOLOGY_CHARS = 60


def find_refusals(row: RowTexts) -> Matches:
    if REFUSAL.search(row.plain_answer, 0, REFUSAL_CHARS):
        yield "refusal", ""


def find_apologies(row: RowTexts) -> Matches:
    if APOLOGY.match(row.plain_answer, 0, REFUSAL_CHARS) or SORRY.search(
        row.plain_answer, 0, APOLOGY_CHARS
    ):
        yield "apology", ""


def find_disclaimers(row: RowTexts) -> Matches:
    if AI_DISCLAIMER.search(row.plain_answer):
        yield "AI disclaimer", ""


# ---------------------------------------------------------------- markers, placeholders, encoding

CHAT_MARKERS = re.compile(
    r"<\|[a-z]\w{1,30}\|>|<｜[\w▁]{2,40}｜>"
    r"|\[INST\](?=[^\]]*\[/INST\])|\[/INST\]|<</?SYS>>|\A<s>|</s>\Z|<(?:start|end)_of_turn>"
    r"|^### ?(?:Instruction|Response|Human|Assistant|Input):"
    r"|^(?:Human|USER|ASSISTANT|Assistant): ",
    re.MULTILINE,
)
PLACEHOLDERS = re.compile(
    r"\{\{ ?\w+ ?\}\}|\[(?:your|insert) [^\]\n]{0,40}\]|\[enter (?:your|the|a) [^\]\n]{0,40}\]|"
    r"\[(?:(?:first|last|full|company|customer|client|recipient|sender|product|job|phone|email) ?)?"
    r"(?:name|title|company|date|address|number|phone(?:[_ ]number)?|email|position|city|link"
    r"|url)\](?!\()|"
    r"<(?:insert|your)\b[^>\n]{0,40}>|<(?:(?:first|last|full|company) )?(?:name|company"
    r"|position|date|email)>|"
    r"\{(?:first|last|full|user|company|customer)_?name\}|%firstname%|%lastname%|"
    r"\blorem ipsum\b|\bxx+[-/]xx+\b|_{8,}",
)
# Fast tests before the patterns.
MARKER_HINTS = (
    "<|", "<｜", "INST]", "SYS>>", "s>", "_of_turn>", "###", "Human: ", "USER: ", "SISTANT: ",
    "sistant: ",
)  # fmt: skip
PLACEHOLDER_HINT = re.compile(r"[\[<{]|lorem|xx[-/]|%|___")
INVISIBLE_CHARS = {
    "control characters": "\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f",
    "invisible characters": "\u00ad\u200b\u2060-\u2064\ufeff\ufff9-\ufffb",
    "bidi controls": "\u202a-\u202e\u2066-\u2069",
    "Unicode tag characters": "\U000e0001\U000e0020-\U000e007f\U000e0100-\U000e01ef",
    "U+FFFD replacement characters": "\ufffd",
    "private-use characters": "\ue000-\uf8ff",
}
ANY_INVISIBLE = re.compile(f"[{''.join(INVISIBLE_CHARS.values())}]")
INVISIBLE_PATTERNS = {kind: re.compile(f"[{chars}]") for kind, chars in INVISIBLE_CHARS.items()}
# Legitimate uses: tag characters in flags (Scotland), a variation selector after a CJK character.
FLAG = re.compile("\U0001f3f4[\U000e0020-\U000e007f]+|(?<=[\u3400-\u9fff])[\U000e0100-\U000e01ef]")
HTML_ENTITY = re.compile(
    r"(?<!`)&(?:amp|lt|gt|quot|apos|nbsp|copy|euro|hellip|[mn]dash|[lr][sda]quo"
    r"|[A-Za-z](?:acute|grave|uml|circ|cedil|tilde|ring|slash)|szlig|#\d{2,5}|#[xX][0-9a-fA-F]{2,4});"
)
HTML_SOURCE = re.compile(r"</?[a-z]\w*[ />]|```|\b(?:html|xml|entit|escap)", re.IGNORECASE)
MOJIBAKE = re.compile("Ã[\u0080-\u00bf©¨ª«¼¶¤±³º§]|â€[™œ\u009d\u009c“”¦]|Â[\u00a0°»«£]|ï»¿")


def find_chat_markers(row: RowTexts) -> Matches:
    """Find markers of a chat template in text: from another tool's export, or an attack."""
    for text in row.texts:
        if any(hint in text for hint in MARKER_HINTS) and (match := CHAT_MARKERS.search(text)):
            yield repr(match[0].strip()), ""
            return


def find_placeholders(row: RowTexts) -> Matches:
    """Find placeholders of a form that nobody filled in."""
    if not PLACEHOLDER_HINT.search(row.plain_answer):
        return
    if match := PLACEHOLDERS.search(row.plain_answer):
        yield match[0][:30], ""


def find_invisible_chars(row: RowTexts) -> Matches:
    """Find characters that no reader sees, and text decoded wrongly or not to the end: HTML
    entities count where the row has no HTML and does not speak of it."""
    for text in row.texts:
        if ANY_INVISIBLE.search(text):
            text = FLAG.sub("", text)
            for kind, pattern in INVISIBLE_PATTERNS.items():
                if pattern.search(text):
                    yield kind, ""
        if not text.isascii() and MOJIBAKE.search(text):
            yield "mojibake (UTF-8 read as Latin-1)", ""
        if "&" in text and HTML_ENTITY.search(text) and not any(map(HTML_SOURCE.search, row.texts)):
            yield "HTML entities", ""


# ---------------------------------------------------------------- repetition

MIN_ECHO_SHARE = 0.9  # of an answer's trigrams
MIN_ECHO_WORDS = 8
MIN_EQUAL_WORDS = 4  # of an answer that is the whole prompt
MIN_LOOP_LINES = 4  # occurrences of one line
MIN_LOOP_WORDS = 24  # shorter answers are not checked for repetition
MIN_UNIQUE_WORDS = 0.25  # distinct-1
MIN_UNIQUE_TRIGRAMS = 0.34  # distinct-3
NUMBERED = re.compile(r"\d+[.):]|[^\w]+")  # item numbers and punctuation
# 40 of them; with {39,}, re would keep 80 bytes for each letter that follows
REPEATED_LETTER = re.compile(r"(\w)\1{39}")
# from the end of an answer, where loops are: a list of all its words takes 60 bytes for each
MAX_LOOP_CHARS = 2**20


def find_echoed_prompt(row: RowTexts) -> Matches:
    """Find answers that repeat the question. Short extracts of a long prompt are fine."""
    answer = row.get_words(row.answer)
    prompt = row.get_words(row.prompt)
    if len(answer) >= MIN_EQUAL_WORDS and np.array_equal(answer, prompt):
        yield "echoed prompt", ""
        return
    if len(answer) < MIN_ECHO_WORDS or not len(prompt) or 2 * len(answer) < len(prompt):
        return
    prompt_grams = sort_unique(hash_ngrams(prompt, 3))
    answer_grams = sort_unique(hash_ngrams(answer, 3))
    num_new = len(exclude_values(answer_grams, prompt_grams))
    if len(answer_grams) - num_new >= MIN_ECHO_SHARE * len(answer_grams):
        yield "echoed prompt", ""


def find_loops(row: RowTexts) -> Matches:
    """Find answers that repeat one line, phrase or letter over and over."""
    lines = [line.strip() for line in row.answer.split("\n") if len(line) > 20]
    if len(lines) >= MIN_LOOP_LINES and max(map(lines.count, set(lines[:50]))) >= MIN_LOOP_LINES:
        yield "repeated line", ""
        return
    words = row.plain_answer[-MAX_LOOP_CHARS:].split()
    if len(words) >= MIN_LOOP_WORDS and len(set(words)) < MIN_UNIQUE_WORDS * len(words):
        words = [word for word in words if not NUMBERED.fullmatch(word)]
        trigrams = set(zip(words, words[1:], words[2:], strict=False))
        is_repetitive = len(trigrams) < MIN_UNIQUE_TRIGRAMS * (len(words) - 2)
        if len(words) >= MIN_LOOP_WORDS and is_repetitive:
            yield "repeated phrase", ""
    elif REPEATED_LETTER.search(row.answer, max(0, len(row.answer) - MAX_LOOP_CHARS)):
        yield "repeated letter", ""


# ---------------------------------------------------------------- tools


def find_tool_order(row: RowTexts) -> Matches:
    """Find tool results without a call, in another order than the calls, and calls without one."""
    waiting: list[str | None] = []  # ids of the calls that no result followed yet
    for message in row.example.messages:
        if message["role"] != "tool":
            if waiting:
                yield "call without a result", ""
            waiting = [call.get("id") for call in message.get("tool_calls") or ()]
        elif not waiting:
            yield "result without a call", ""
        else:
            called = waiting.pop(0)
            answered = message.get("tool_call_id")
            if called and answered and called != answered:
                yield "results in another order than calls", ""


# ---------------------------------------------------------------- table and findings


class RowCheck(NamedTuple):
    find: RowFinder
    description: str  # predicate of "3 of 9 rows", plural
    level: Level | None  # None: chosen by the share of rows
    fix: str
    can_check_text: bool = False  # also for plain text, which has no question and answer


ROW_CHECKS: dict[str, RowCheck] = {
    "unfinished": RowCheck(
        find_unfinished, "have an unfinished answer", None, "complete the answers, or drop the rows"
    ),
    "empty_answers": RowCheck(
        find_empty_answers, "have an empty answer", None, "write the answers, or drop the rows"
    ),
    "refusals": RowCheck(
        find_refusals, "have an answer that refuses", None,
        "keep only intended refusals; `never:` filters the others",
    ),
    "apologies": RowCheck(
        find_apologies, "have an answer that starts with an apology", None,
        "drop those that the model should not learn",
    ),
    "disclaimers": RowCheck(
        find_disclaimers, "have an AI disclaimer in the answer", None,
        "rewrite the answers, or filter them with `never:`",
    ),
    "chat_markers": RowCheck(
        find_chat_markers, "contain chat-template markers as text", "warn",
        "split the text into messages: as text, markers are what the model learns to write", True,
    ),
    "placeholders": RowCheck(
        find_placeholders, "have placeholders in the answer", None, "fill them in, or drop the rows"
    ),
    "invisible_chars": RowCheck(
        find_invisible_chars, "contain invisible or wrongly decoded characters", "warn",
        "remove them, or re-decode the source", True,
    ),
    "echoes_prompt": RowCheck(
        find_echoed_prompt, "have an answer that repeats the prompt", None,
        "drop the rows, unless answers are passages of the prompt",
    ),
    "loops": RowCheck(find_loops, "have a repetitive answer", None, "drop the rows"),
    "tool_order": RowCheck(
        find_tool_order, "have tool results that do not follow their calls", "warn",
        "put each result after its call, in the order of the calls",
    ),
    "secrets": RowCheck(
        find_secrets, "contain likely secrets", "error",
        "revoke and remove them: a model can repeat its training data", True,
    ),
    "personal": RowCheck(
        find_personal_data, "contain personal data", "warn",
        "remove data used without consent: a model can repeat its training data", True,
    ),
}  # fmt: skip
# Kinds that say no more than their check does.
PLAIN_KINDS = frozenset({"refusal", "apology", "AI disclaimer", "echoed prompt"})


def get_row_finders() -> dict[str, RowFinder]:
    return {name: check.find for name, check in ROW_CHECKS.items()}


def check_rows(context: CheckContext) -> Iterator[Finding]:
    """Yield one finding per check of single rows that matched."""
    if context.text_stats is None:
        return
    num_rows = len(context.dataset)
    is_plain_text = all(part.format == "text" for part in context.dataset.parts)
    for name, counts in context.text_stats.roles[context.role].check_counts.items():
        check = ROW_CHECKS[name]
        if is_plain_text and not check.can_check_text:
            continue
        message = describe_rows(counts.num_rows, num_rows, check.description)
        message += _format_kinds(counts)
        level = check.level or choose_level(counts.num_rows, num_rows)
        yield Finding(name, level, message, counts.num_rows, tuple(counts.examples), check.fix)


def _format_kinds(counts: CheckCounts) -> str:
    if counts.kinds.keys() <= PLAIN_KINDS:
        return ""
    kinds = counts.kinds.most_common(6)
    if len(kinds) == 1 and kinds[0][1] == counts.num_rows:
        return f": {kinds[0][0]}"
    return ": " + ", ".join(f"{kind} ({count:,})" for kind, count in kinds)
