"""Tokens that a recipe adds: their numbers, who may write them, and whether the rows hold them.

    new_tokens(tokenizer, texts, templates) -> NewToken...     for `ChatTokenizer.from_folder(folder, new)`

A new token is ordinary text, one id in every message: the recipe says so. One that the chat
template writes itself is structural instead: the template and answers make it, other text does not;
where it marks turns, only the template does. Left out: their rows in the model (model/new_rows.py).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

from tunesmith.core.errors import InputError
from tunesmith.core.types import Document, NewToken
from tunesmith.data.chat_template.template import ChatTemplate
from tunesmith.data.tokenizer.chat_tokenizer import ChatTokenizer, read_json

ADD_TOKENS_KEY = "add_tokens"


def make_new_tokens(
    tokenizer: ChatTokenizer, texts: Sequence[str], templates: Iterable[ChatTemplate]
) -> tuple[NewToken, ...]:
    """Numbered from the tokenizer's last one on. Raises InputError for a text that is a token
    already."""
    first_id, sources = tokenizer.size, [template.source for template in templates]
    tokens: list[NewToken] = []
    for offset, text in enumerate(texts):
        pieces = tokenizer.encode_continuation(text)
        existing_id = tokenizer.token_to_id(text)
        if existing_id is None and len(pieces) == 1 and tokenizer.decode(pieces).strip() == text:
            existing_id = pieces[0]
        if existing_id is not None:
            message = f"{text!r} is one token already, number {existing_id}"
            raise InputError(
                message, where=ADD_TOKENS_KEY, fix="leave it out: it needs no row of its own"
            )
        if not pieces:
            raise InputError(
                f"the tokenizer makes nothing of {text!r}", where=ADD_TOKENS_KEY, fix="leave it out"
            )
        is_ordinary = not any(text in source for source in sources)
        tokens.append(NewToken(text, first_id + offset, tuple(pieces), is_ordinary))
    return tuple(tokens)


def refuse_unused_tokens(documents: Iterable[Document], tokens: Sequence[NewToken]) -> None:
    """InputError for a token that no document holds: nothing would train it. Looks no further than
    it must."""
    missing = {token.id for token in tokens}
    for document in documents if missing else ():
        missing.difference_update(document.tokens_L.tolist())
        if not missing:
            return
    if missing:
        names = ", ".join(repr(token.text) for token in tokens if token.id in missing)
        message = f"no training row holds {names}: nothing would train the new row"
        fix = "leave it out, or write it as the rows do; one that the chat template writes counts in answers only"
        raise InputError(message, where=ADD_TOKENS_KEY, fix=fix)


def refuse_other_tokens(adapter: Path, ids: Sequence[int], tokens: Sequence[NewToken]) -> None:
    """InputError unless the tokens are those of the adapter in a folder, which has rows for
    `ids`."""
    texts = _read_token_texts(adapter, ids)
    if [token.id for token in tokens] != list(ids) or any(
        texts.get(t.id, t.text) != t.text for t in tokens
    ):
        raise _make_mismatch_error(adapter, ids)


def _make_mismatch_error(adapter: Path, ids: Sequence[int]) -> InputError:
    if not ids:
        message = (
            "the adapter to go on with was trained without new tokens: it has no rows for them"
        )
        fix = "merge it first (tunesmith export RUN --to merged), and add the tokens to the merged model"
        return InputError(message, where=ADD_TOKENS_KEY, fix=fix)
    texts = _read_token_texts(adapter, ids)
    names = [texts.get(index, f"token {index}") for index in ids]
    message = f"the adapter to go on with has rows for {len(ids)} new tokens, and the recipe adds others or none"
    return InputError(
        message, where=ADD_TOKENS_KEY, fix=f"set add_tokens: [{', '.join(map(repr, names))}]"
    )


def _read_token_texts(adapter: Path, ids: Sequence[int]) -> dict[int, str]:
    """As the tokenizer beside an adapter has them, if there is one."""
    added = read_json(adapter / "tokenizer.json").get("added_tokens")
    entries = [
        token for token in (added if isinstance(added, list) else []) if isinstance(token, dict)
    ]
    return {token["id"]: str(token.get("content")) for token in entries if token.get("id") in ids}
