"""Find secrets and personal data in texts, by pattern and, where there are any, check digits.

They are never shown in full: `mask_text` keeps the ends. Names have no pattern and are left out;
postal addresses are found as they are written in English, German, French and Spanish."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from functools import partial
from typing import NamedTuple

from tunesmith.data.checks.text_stats import RowTexts


class SecretPattern(NamedTuple):
    # a fast test: only a text with one of these is searched
    markers: tuple[str, ...] | re.Pattern[str]
    pattern: re.Pattern[str]
    is_valid: Callable[[str], bool]  # whether a match is a real one


def mask_text(text: str) -> str:
    """Return the ends of a match and its length."""
    num_visible = 2 if len(text) >= 12 else 1
    return f"{text[:num_visible]}…{text[-num_visible:]} ({len(text)} characters)"


def is_luhn_valid(number: str) -> bool:
    """Check the Luhn digit of a card number (ISO/IEC 7812-1). Repetitions of one digit are not
    valid."""
    digits = [int(character) for character in number if character.isdigit()]
    if not 13 <= len(digits) <= 19 or len(set(digits)) < 2:
        return False
    doubled = [2 * digit - 9 * (digit > 4) for digit in digits[-2::-2]]
    return (sum(doubled) + sum(digits[-1::-2])) % 10 == 0


def is_iban_valid(text: str) -> bool:
    """Check the check digits of an IBAN (ISO 13616)."""
    text = text.replace(" ", "")
    digits = "".join(str(int(character, 36)) for character in text[4:] + text[:4])
    return len(text) >= 15 and int(digits) % 97 == 1


def has_letters_and_digits(text: str) -> bool:
    """Tell a random key from a word or placeholder."""
    return any(map(str.isdigit, text)) and any(map(str.isalpha, text)) and len(set(text)) > 7


def make_pattern(
    markers: str | re.Pattern[str], pattern: str, is_valid: Callable[[str], bool] = bool
) -> SecretPattern:
    """Build a pattern. `markers` are separated by spaces, or a pattern themselves."""
    if isinstance(markers, str):
        return SecretPattern(tuple(markers.split()), re.compile(pattern), is_valid)
    return SecretPattern(markers, re.compile(pattern), is_valid)


SECRETS = {
    "AWS keys": make_pattern("AKIA ASIA", r"\b(?:AKIA|ASIA)[0-9A-Z]{16}\b"),
    "GitHub tokens": make_pattern(
        "ghp_ gho_ ghu_ ghs_ ghr_ github_pat_",
        r"\b(?:gh[pousr]_[A-Za-z0-9]{36}|github_pat_\w{60,})",
    ),
    "Slack tokens": make_pattern("xox", r"\bxox[abpors]-[\w-]{10,}"),
    "Google keys": make_pattern("AIza", r"\bAIza[\w-]{35}"),
    "API keys": make_pattern(
        "sk- sk_ rk- rk_",
        r"\b(?:sk|rk)[-_](?:live|test|proj|ant|or)?[-_]?[\w-]{20,}",
        has_letters_and_digits,
    ),
    "Hugging Face tokens": make_pattern("hf_", r"\bhf_[A-Za-z0-9]{30,}"),
    "GitLab tokens": make_pattern("glpat-", r"\bglpat-[\w-]{20,}"),
    "npm tokens": make_pattern("npm_", r"\bnpm_[A-Za-z0-9]{36}\b"),
    "PyPI tokens": make_pattern("pypi-", r"\bpypi-[\w-]{60,}"),
    "SendGrid keys": make_pattern("SG.", r"\bSG\.[\w-]{22}\.[\w-]{43}"),
    "Slack webhooks": make_pattern(
        "hooks.slack.com/", r"\bhooks\.slack\.com/services/\w+/\w+/\w{16,}"
    ),
    "cloud tokens": make_pattern(
        "dop_v1_ dapi shpat_ key- SK",
        r"\b(?:dop_v1_[0-9a-f]{64}|(?:dapi|shpat_|key-|SK)[0-9a-f]{32})\b",
    ),
    "bot tokens": make_pattern(":AA", r"\b\d{8,10}:AA[\w-]{33}"),
    "storage keys": make_pattern("AccountKey=", r"\bAccountKey=([A-Za-z0-9+/]{40,}={0,2})"),
    "passwords in a header": make_pattern(
        "Basic ", r"\bAuthorization: Basic ([A-Za-z0-9+/]{12,}={0,2})"
    ),
    "private keys": make_pattern("-----BEGIN", r"-----BEGIN [A-Z ]*PRIVATE KEY-----"),
    "JSON Web Tokens": make_pattern(
        "eyJ", r"(?<![\w-])eyJ[\w-]{10,2000}\.eyJ[\w-]{10,8000}\.[\w-]{10,2000}"
    ),
    "passwords in a URL": make_pattern(
        re.compile("://[^/]*@"), r"\b\w+://[^\s:/@]{1,60}:[^\s:/@]{4,60}@[\w.-]+"
    ),
    "passwords": make_pattern(
        re.compile("[:=] ?[\"']"),
        r"(?i)\b(?:password|passwd|api_?key|secret|token)\b[\"']? ?[:=] ?"
        r"[\"']([^\s\"']{8,80})[\"']",
        has_letters_and_digits,
    ),
    "passwords in environment variables": make_pattern(
        "PASSWORD= PASSWD= SECRET= TOKEN= KEY=",
        r"\b[A-Z_]*(?:PASSWORD|PASSWD|SECRET|TOKEN|(?:API|ACCESS|PRIVATE)_?KEY)"
        r"=([^\s\"'$<{]{8,100})",
        has_letters_and_digits,
    ),
    "passwords in a command": make_pattern(
        "curl", r"\bcurl\b[^\n]{0,80} -u [\w.-]{1,40}:([^\s\"':]{6,60})", has_letters_and_digits
    ),
    "passwords in a sentence": make_pattern(
        "assword is", r"\b[Pp]assword is ([^\s\"'<]{8,60})", has_letters_and_digits
    ),
}
DATE = (
    r"(?:\d{1,2}(?:[./-]|\. ?|(?:st|nd|rd|th)? )(?:\d{1,2}|[^\W\d_]{3,10}\.?)[./ -] ?\d{2,4}"
    r"|\d{4}-\d\d?-\d\d?|[A-Z][a-z]{2,8}\.? \d{1,2}(?:st|nd|rd|th)?,? \d{4})"
)
STREET = (
    r"Street|St|Avenue|Ave|Road|Rd|Boulevard|Blvd|Lane|Ln|Drive|Dr|Court|Ct|Place|Square|Terrace"
    r"|Crescent|Close|Highway|Parkway|Way"
)
NAME = r"[A-Z0-9][\w'’.]{0,20}"
PERSONAL_DATA = {
    "dates of birth": make_pattern(
        re.compile(r"(?i)b[io]r(?:th|n)|\bdob\b|gebor|geburt|n[ée]e? le|naci|nat[oa] il"),
        r"(?i:\b(?:born(?: on)?|date of birth|birth ?(?:date|day)|dob|geboren(?: am)?|geburtsdatum"
        r"|née? le|date de naissance|nacid[oa] el|fecha de nacimiento|nat[oa] il)\b)"
        rf"(?:[\"']?\s?[:=]|\s?is|\s?was)?\s?[\"'(]?({DATE})",
    ),
    "postal addresses": make_pattern(
        re.compile(r"\d"),
        rf"\b\d{{1,5}}[A-Za-z]?,? (?:{NAME} ){{1,3}}(?:{STREET})\b\.?(?=,|\n| [A-Z#]|\.?$|[.;)])"
        r"|\b[A-ZÄÖÜ][\wäöüß-]{2,24}(?:straße|strasse|str\.|gasse|allee|platz|weg|damm|ufer)"
        r" \d{1,4} ?[a-z]?\b"
        r"|\b\d{1,4}(?: ?bis)?,? (?:rue|avenue|boulevard|place|chemin|impasse|quai|allée)"
        r" (?:de |du |des |la |le |les |l['’]|d['’])*[A-ZÉÈ][\w'’ -]{2,30}, ?\d{5}\b"
        r"|\b(?:[Cc]alle|C/|[Aa]venida|Avda\.|[Pp]laza|[Vv]ia|[Pp]iazza|[Cc]orso)"
        r" (?:de |del |la |las |los |di )*[A-ZÁÉÍÓÚ][\w'’ ]{2,30},? \d{1,4}\b",
    ),
    "email addresses": make_pattern(
        "@", r"(?<![\w.+:/-])[\w.+-]{1,64}@(?:[\w-]{1,63}\.){1,127}[A-Za-z]{2,24}\b"
    ),
    "phone numbers": make_pattern(
        re.compile(r"[+(]\d"),
        r"(?<![\w.])\+\d{1,3}[ \-./(]*\d(?:[ \-./()]*\d){6,12}(?!\d)|\(\d{3}\) \d{3}-\d{4}",
    ),
    "card numbers": make_pattern(
        re.compile(r"\d\d[\d -]\d"), r"(?<![\d.,-])\d(?:[ -]?\d){12,18}(?![\d.,-]\d)", is_luhn_valid
    ),
    "IBANs": make_pattern(
        re.compile(r"[A-Z][A-Z]\d\d"),
        r"\b[A-Z]{2}\d{2}(?: ?[A-Z0-9]{4}){2,7}(?: ?[A-Z0-9]{1,3})?\b",
        is_iban_valid,
    ),
    "US social security numbers": make_pattern(
        re.compile(r"\d-\d\d-\d"), r"(?<![\d-])(?!000|666|9)\d{3}-(?!00)\d\d-(?!0000)\d{4}(?![\d-])"
    ),
}
FAKE_IDENTITY = re.compile(
    r"@(?:[\w-]+\.)*example(?:\.(?:com|org|net))?\b|@localhost\b|noreply|^git@|^AKIA\w+EXAMPLE$"
    r"|^(?:51 Franklin|59 Temple|675 Mass)",  # the FSF, in notices of licences
    re.IGNORECASE,
)


def find_secrets(row: RowTexts) -> Iterator[tuple[str, str]]:
    """Find keys, tokens and passwords: each kind with its first match, masked."""
    return _find_kinds(row, SECRETS)


def find_personal_data(row: RowTexts) -> Iterator[tuple[str, str]]:
    """Find addresses and numbers of people: each kind with its first match, masked. Example
    addresses do not count."""
    return _find_kinds(row, PERSONAL_DATA)


def mask_secrets(text: str) -> str:
    """Mask all secrets and personal data in a text that quotes rows."""
    for secret_pattern in (*SECRETS.values(), *PERSONAL_DATA.values()):
        if _has_marker(secret_pattern, text):
            text = secret_pattern.pattern.sub(partial(_mask_match, secret_pattern), text)
    return text


def _mask_match(secret_pattern: SecretPattern, match: re.Match[str]) -> str:
    secret = match[match.lastindex or 0]
    if not secret_pattern.is_valid(secret):
        return match[0]
    return match[0].replace(secret, mask_text(secret))


def _find_kinds(row: RowTexts, patterns: dict[str, SecretPattern]) -> Iterator[tuple[str, str]]:
    for kind, secret_pattern in patterns.items():
        for text in row.texts:
            if _has_marker(secret_pattern, text) and (match := _find_first(secret_pattern, text)):
                yield kind, mask_text(match)
                break


def _has_marker(secret_pattern: SecretPattern, text: str) -> bool:
    markers = secret_pattern.markers
    if isinstance(markers, tuple):
        return any(marker in text for marker in markers)
    return markers.search(text) is not None


def _find_first(secret_pattern: SecretPattern, text: str) -> str:
    for match in secret_pattern.pattern.finditer(text):
        secret = match[match.lastindex or 0]
        if secret_pattern.is_valid(secret) and not FAKE_IDENTITY.search(secret):
            return secret
    return ""
