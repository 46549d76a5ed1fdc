"""Tokens that a recipe adds (`add_tokens`).

    make_new_tokens(tokenizer, texts, templates) -> NewTokens for ChatTokenizer.from_folder

A new token is ordinary text: it has one id in every message. If the chat template writes it, it is
structural: template and answers make it, other text does not. If it marks turns, only the template
does. Left out: their embeddings (`model/new_embeddings.py`)."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

from tunesmith.core.errors import InputError
from tunesmith.core.json_io import read_json_object
from tunesmith.core.types import Document, NewToken
from tunesmith.data.chat_template.template import ChatTemplate
from tunesmith.data.tokenizer.chat_tokenizer import ChatTokenizer
from tunesmith.data.tokenizer.tokenizer_json import MAX_VALUES

ADD_TOKENS_KEY = "add_tokens"
MERGE_FIX = "merge it with PEFT's merge_and_unload, save the model, and set model: to its folder"
MAX_SHOWN = 3  # tokens that an error names


def make_new_tokens(
    tokenizer: ChatTokenizer, texts: Sequence[str], templates: Iterable[ChatTemplate]
) -> tuple[NewToken, ...]:
    """Return the new tokens, with the ids after the tokenizer's last. Raises InputError for a text
    that is one token already."""
    first_id = tokenizer.size
    sources = [template.source for template in templates]
    tokens: list[NewToken] = []
    for offset, text in enumerate(texts):
        pieces = tokenizer.encode_continuation(text)
        existing_id = tokenizer.token_to_id(text)
        if existing_id is None and len(pieces) == 1 and tokenizer.decode(pieces).strip() == text:
            existing_id = pieces[0]
        if existing_id is not None:
            message = f"{text!r} is already one token (id {existing_id})"
            raise InputError(message, where=ADD_TOKENS_KEY, fix="remove it from add_tokens")
        if not pieces:
            message = f"the tokenizer encodes {text!r} to no tokens"
            raise InputError(message, where=ADD_TOKENS_KEY, fix="remove it from add_tokens")
        is_ordinary = not any(text in source for source in sources)
        tokens.append(NewToken(text, first_id + offset, tuple(pieces), is_ordinary))
    return tuple(tokens)


def refuse_unused_tokens(documents: Iterable[Document], tokens: Sequence[NewToken]) -> None:
    """Raise InputError for a token that no document contains: nothing would train it. Reads no more
    documents than needed."""
    missing = {token.id for token in tokens}
    if not missing:
        return
    for document in documents:
        missing.difference_update(document.tokens_L.tolist())
        if not missing:
            return
    names = ", ".join(repr(token.text) for token in tokens if token.id in missing)
    raise InputError(
        f"no training row contains {names}: its embedding would not be trained",
        where=ADD_TOKENS_KEY,
        fix="remove it, or spell it as in the rows; a token of the template counts in answers only",
    )


def refuse_existing_tokens(adapter: Path, ids: Sequence[int], tokenizer: ChatTokenizer) -> None:
    """Raise InputError for an adapter with embeddings of tokens that the base already has."""
    new_tokens = tokenizer.new_tokens
    first_new_id = new_tokens[0].id if new_tokens else tokenizer.size
    existing = [token_id for token_id in ids if token_id < first_new_id]
    if not existing:
        return
    texts = [f"{tokenizer.decode([token_id])!r:.40}" for token_id in existing[:MAX_SHOWN]]
    more = f" and {len(existing) - MAX_SHOWN:,} more" if len(existing) > MAX_SHOWN else ""
    message = (
        f"the adapter trains embeddings of tokens that the base already has: {', '.join(texts)}"
        f"{more} (trainable_token_indices); only those of new tokens can be continued"
    )
    raise InputError(message, where=str(adapter), fix=MERGE_FIX)


def refuse_other_tokens(adapter: Path, ids: Sequence[int], tokens: Sequence[NewToken]) -> None:
    """Raise InputError unless the tokens are those of an adapter folder, which has embeddings for
    `ids`."""
    texts = _read_token_texts(adapter, ids)
    is_same_text = all(texts.get(token.id, token.text) == token.text for token in tokens)
    if [token.id for token in tokens] == list(ids) and is_same_text:
        return
    if not ids:
        message = "the adapter was trained without new tokens: it has no embeddings for them"
        fix = "merge it (tunesmith export RUN --to merged), then add tokens to the merged model"
        raise InputError(message, where=ADD_TOKENS_KEY, fix=fix)
    message = f"the adapter has embeddings for {len(ids)} new tokens, but the recipe differs"
    if any(token_id not in texts for token_id in ids):
        message = (
            f"the adapter has embeddings for {len(ids)} new tokens, but there is no tokenizer.json "
            "in its folder that names them"
        )
        fix = f"copy the tokenizer.json of its training into its folder, or {MERGE_FIX}"
        raise InputError(message, where=ADD_TOKENS_KEY, fix=fix)
    fix = f"set add_tokens: [{', '.join(repr(texts[token_id]) for token_id in ids)}]"
    raise InputError(message, where=ADD_TOKENS_KEY, fix=fix)


def _read_token_texts(adapter: Path, ids: Sequence[int]) -> dict[int, str]:
    """Return the texts of tokens from the tokenizer saved with an adapter, if there is one."""
    tokenizer = read_json_object(
        adapter / "tokenizer.json", is_optional=True, max_values=MAX_VALUES
    )
    added = tokenizer.get("added_tokens")
    texts: dict[int, str] = {}
    for token in added if isinstance(added, list) else []:
        if isinstance(token, dict) and token.get("id") in ids:
            texts[token["id"]] = str(token.get("content"))
    return texts
