"""Tokens that a recipe adds: their numbers, who may write them, and whether the rows hold them.

    new_tokens(tokenizer, texts, templates) -> NewToken...     for `ChatTokenizer.from_folder(folder, new)`

A new token is ordinary text, one id in every message: the recipe says so. One that the chat template writes itself is
structural instead: the template and answers make it, other text does not; where it marks turns, only the template does.
Left out: their rows in the model (model/new_rows.py).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

from tunesmith.core.errors import InputError
from tunesmith.core.types import Document, NewToken
from tunesmith.data.chat_template.template import ChatTemplate
from tunesmith.data.tokenizer.chat_tokenizer import ChatTokenizer, read_json

KEY = "add_tokens"


def new_tokens(
    tokenizer: ChatTokenizer, texts: Sequence[str], templates: Iterable[ChatTemplate]
) -> tuple[NewToken, ...]:
    """Numbered from the tokenizer's last one on. Raises InputError for a text that is a token already."""
    first, sources = tokenizer.size, [template.source for template in templates]
    found: list[NewToken] = []
    for place, text in enumerate(texts):
        pieces = tokenizer.encode_continuation(text)
        known = tokenizer.id(text)
        if known is None and len(pieces) == 1 and tokenizer.decode(pieces).strip() == text:
            known = pieces[0]
        if known is not None:
            what = f"{text!r} is one token already, number {known}"
            raise InputError(what, where=KEY, fix="leave it out: it needs no row of its own")
        if not pieces:
            raise InputError(f"the tokenizer makes nothing of {text!r}", where=KEY, fix="leave it out")
        ordinary = not any(text in source for source in sources)
        found.append(NewToken(text, first + place, tuple(pieces), ordinary))
    return tuple(found)


def refuse_unseen(documents: Iterable[Document], tokens: Sequence[NewToken]) -> None:
    """InputError for a token that no document holds: nothing would train it. Looks no further than it must."""
    left = {token.id for token in tokens}
    for document in documents if left else ():
        left.difference_update(document.tokens_L.tolist())
        if not left:
            return
    if left:
        names = ", ".join(repr(token.text) for token in tokens if token.id in left)
        what = f"no training row holds {names}: nothing would train the new row"
        fix = "leave it out, or write it as the rows do; one that the chat template writes counts in answers only"
        raise InputError(what, where=KEY, fix=fix)


def refuse_other_tokens(adapter: Path, ids: Sequence[int], tokens: Sequence[NewToken]) -> None:
    """InputError unless the tokens are those of the adapter in a folder, which has rows for `ids`."""
    texts = _texts_of(adapter, ids)
    if [token.id for token in tokens] != list(ids) or any(texts.get(t.id, t.text) != t.text for t in tokens):
        raise _others(adapter, ids)


def _others(adapter: Path, ids: Sequence[int]) -> InputError:
    if not ids:
        what = "the adapter to go on with was trained without new tokens: it has no rows for them"
        fix = "merge it first (tunesmith export RUN --to merged), and add the tokens to the merged model"
        return InputError(what, where=KEY, fix=fix)
    texts = _texts_of(adapter, ids)
    names = [texts.get(index, f"token {index}") for index in ids]
    what = f"the adapter to go on with has rows for {len(ids)} new tokens, and the recipe adds others or none"
    return InputError(what, where=KEY, fix=f"set add_tokens: [{', '.join(map(repr, names))}]")


def _texts_of(adapter: Path, ids: Sequence[int]) -> dict[int, str]:
    """As the tokenizer beside an adapter has them, if there is one."""
    added = read_json(adapter / "tokenizer.json").get("added_tokens")
    known = [token for token in (added if isinstance(added, list) else []) if isinstance(token, dict)]
    return {token["id"]: str(token.get("content")) for token in known if token.get("id") in ids}
