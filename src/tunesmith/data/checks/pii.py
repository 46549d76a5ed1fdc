"""Secrets and personal data in texts, by their form and, where they have one, their check digits.

Never shown whole: `masked` keeps the ends. Names and addresses have no form that could be found without a model, and
are left out.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import NamedTuple

from tunesmith.data.checks.text_stats import Row


class Form(NamedTuple):
    signs: tuple[str, ...] | re.Pattern[str]  # a text without any is not searched; plain ones are quick to look for
    pattern: re.Pattern[str]
    holds: Callable[[str], bool]  # whether a match is what it looks like


def masked(text: str) -> str:
    """The ends of a match, and how long it is."""
    kept = 2 if len(text) >= 12 else 1
    return f"{text[:kept]}…{text[-kept:]} ({len(text)} characters)"


def luhn(number: str) -> bool:
    """The check digit of card numbers (ISO/IEC 7812-1); a number of one digit is none."""
    digits = [int(sign) for sign in number if sign.isdigit()]
    if not 13 <= len(digits) <= 19 or len(set(digits)) < 2:
        return False
    doubled = [2 * digit - 9 * (digit > 4) for digit in digits[-2::-2]]
    return (sum(doubled) + sum(digits[-1::-2])) % 10 == 0


def iban(text: str) -> bool:
    """The check digits of an IBAN (ISO 13616)."""
    text = text.replace(" ", "")
    return len(text) >= 15 and int("".join(str(int(sign, 36)) for sign in text[4:] + text[:4])) % 97 == 1


def mixed(text: str) -> bool:
    """Letters and digits: no word, no placeholder."""
    return any(map(str.isdigit, text)) and any(map(str.isalpha, text)) and len(set(text)) > 7


def form(signs: str | re.Pattern[str], pattern: str, holds: Callable[[str], bool] = bool) -> Form:
    """`signs`: plain ones with spaces between, or a pattern."""
    return Form(tuple(signs.split()) if isinstance(signs, str) else signs, re.compile(pattern), holds)


SECRETS = {
    "AWS keys": form("AKIA ASIA", r"\b(?:AKIA|ASIA)[0-9A-Z]{16}\b"),
    "GitHub tokens": form(
        "ghp_ gho_ ghu_ ghs_ ghr_ github_pat_", r"\b(?:gh[pousr]_[A-Za-z0-9]{36}|github_pat_\w{60,})"
    ),
    "Slack tokens": form("xox", r"\bxox[abpors]-[\w-]{10,}"),
    "Google keys": form("AIza", r"\bAIza[\w-]{35}"),
    "API keys": form("sk- sk_ rk- rk_", r"\b(?:sk|rk)[-_](?:live|test|proj|ant|or)?[-_]?[\w-]{20,}", mixed),
    "Hugging Face tokens": form("hf_", r"\bhf_[A-Za-z0-9]{30,}"),
    "GitLab tokens": form("glpat-", r"\bglpat-[\w-]{20,}"),
    "npm tokens": form("npm_", r"\bnpm_[A-Za-z0-9]{36}\b"),
    "PyPI tokens": form("pypi-", r"\bpypi-[\w-]{60,}"),
    "SendGrid keys": form("SG.", r"\bSG\.[\w-]{22}\.[\w-]{43}"),
    "Slack webhooks": form("hooks.slack.com/", r"\bhooks\.slack\.com/services/\w+/\w+/\w{16,}"),
    "cloud tokens": form(
        "dop_v1_ dapi shpat_ key- SK", r"\b(?:dop_v1_[0-9a-f]{64}|(?:dapi|shpat_|key-|SK)[0-9a-f]{32})\b"
    ),
    "bot tokens": form(":AA", r"\b\d{8,10}:AA[\w-]{33}"),
    "storage keys": form("AccountKey=", r"\bAccountKey=([A-Za-z0-9+/]{40,}={0,2})"),
    "passwords in a header": form("Basic ", r"\bAuthorization: Basic ([A-Za-z0-9+/]{12,}={0,2})"),
    "private keys": form("-----BEGIN", r"-----BEGIN [A-Z ]*PRIVATE KEY-----"),
    "signed tokens": form("eyJ", r"\beyJ[\w-]{10,}\.eyJ[\w-]{10,}\.[\w-]{10,}"),
    "passwords in a URL": form(re.compile("://[^/]*@"), r"\b\w+://[^\s:/@]{1,60}:[^\s:/@]{4,60}@[\w.-]+"),
    "passwords": form(
        re.compile("[:=] ?[\"']"),
        r"(?i)\b(?:password|passwd|api_?key|secret|token)\b[\"']? ?[:=] ?[\"']([^\s\"']{8,80})[\"']",
        mixed,
    ),
    "passwords of the environment": form(
        "PASSWORD= PASSWD= SECRET= TOKEN= KEY=",
        r"\b[A-Z_]*(?:PASSWORD|PASSWD|SECRET|TOKEN|(?:API|ACCESS|PRIVATE)_?KEY)=([^\s\"'$<{]{8,100})",
        mixed,
    ),
    "passwords in a command": form("curl", r"\bcurl\b[^\n]{0,80} -u [\w.-]{1,40}:([^\s\"':]{6,60})", mixed),
    "passwords in a sentence": form("assword is", r"\b[Pp]assword is ([^\s\"'<]{8,60})", mixed),
}
PERSONAL = {
    "email addresses": form("@", r"(?<![\w.+:/-])[\w.+-]{1,64}@(?:[\w-]{1,63}\.)+[A-Za-z]{2,24}\b"),
    "phone numbers": form(
        re.compile(r"[+(]\d"), r"(?<![\w.])\+\d{1,3}[ \-./(]*\d(?:[ \-./()]*\d){6,12}(?!\d)|\(\d{3}\) \d{3}-\d{4}"
    ),
    "card numbers": form(re.compile(r"\d\d[\d -]\d"), r"(?<![\d.,-])\d(?:[ -]?\d){12,18}(?![\d.,-]\d)", luhn),
    "IBANs": form(re.compile(r"[A-Z][A-Z]\d\d"), r"\b[A-Z]{2}\d{2}(?: ?[A-Z0-9]{4}){2,7}(?: ?[A-Z0-9]{1,3})?\b", iban),
    "US social security numbers": form(
        re.compile(r"\d-\d\d-\d"), r"(?<![\d-])(?!000|666|9)\d{3}-(?!00)\d\d-(?!0000)\d{4}(?![\d-])"
    ),
}
NOBODY = re.compile(
    r"@(?:[\w-]+\.)*example(?:\.(?:com|org|net))?\b|@localhost\b|noreply|^git@|^AKIA\w+EXAMPLE$", re.IGNORECASE
)


def secrets(row: Row) -> Iterator[tuple[str, str]]:
    """Keys, tokens and passwords, by kind, the first of each masked."""
    return _found(row, SECRETS)


def personal(row: Row) -> Iterator[tuple[str, str]]:
    """Addresses and numbers of people, by kind, the first of each masked. Addresses of nobody do not count."""
    return _found(row, PERSONAL)


def hidden(text: str) -> str:
    """The text with every secret and every personal datum masked: for what quotes rows."""
    for form in (*SECRETS.values(), *PERSONAL.values()):
        if _signed(form, text):
            text = form.pattern.sub(lambda match, form=form: _masked_in(match, form), text)
    return text


def _masked_in(match: re.Match[str], form: Form) -> str:
    said = match[match.lastindex or 0]
    return match[0].replace(said, masked(said)) if form.holds(said) else match[0]


def _found(row: Row, forms: dict[str, Form]) -> Iterator[tuple[str, str]]:
    for kind, form in forms.items():
        for text in row.texts:
            if _signed(form, text) and (match := _first(form, text)):
                yield kind, masked(match)
                break


def _signed(form: Form, text: str) -> bool:
    signs = form.signs
    return any(sign in text for sign in signs) if isinstance(signs, tuple) else signs.search(text) is not None


def _first(form: Form, text: str) -> str:
    for match in form.pattern.finditer(text):
        said = match[match.lastindex or 0]
        if form.holds(said) and not NOBODY.search(said):
            return said
    return ""
