"""What the plan says of tokens that a recipe adds: their numbers, how they start, what is trained and saved of them.

In: the new tokens and the model's shape. Out: a Choice a key, or none without new tokens. Pure.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from tunesmith.core.types import Choice, ModelSpec, NewToken
from tunesmith.plan.rules import Known, rule

SOURCE = (
    "Koto 2021, IndoBERTweet; Hewitt 2021, Initializing New Word Embeddings for Pretrained Language Models; unverified"
)
SHOWN = 5
ROWS_TIMES, MOST_ROWS_RATE = 10.0, 0.01


def added(tokens: Sequence[NewToken], model: ModelSpec) -> dict[str, Choice]:
    """Text -> number of each."""
    if not tokens:
        return {}
    more = 1 + max(token.id for token in tokens) - model.vocab_size
    room = f"the embedding grows by {more:,} rows" if more > 0 else "the embedding has spare rows for them"
    pieces = ", ".join(f"{len(token.pieces)} for {token.text}" for token in tokens[:SHOWN])
    why = f"one token each, starting as the mean of the pieces that it was until now ({pieces}); {room}"
    return {"add_tokens": Choice({token.text: token.id for token in tokens}, "you", why, SOURCE)}


def rows_choice(tokens: Choice | None, known: Known) -> dict[str, Choice]:
    """Beside an adapter: the new rows of the embedding and of the head, nothing else of either. All weights are
    trained anyway with method: full."""
    if tokens is None or known["method"] == "full":
        return {}
    model = known.model
    modules = ("embed_tokens",) if model.tied_head else ("embed_tokens", "lm_head")
    values = len(tokens.value) * len(modules) * model.hidden_size
    why = (
        f"of {' and '.join(modules)}{' (the head is tied to it)' * model.tied_head} the rows of the new tokens are "
        f"trained and saved with the adapter, {values:,} values; all other rows stay as they are, to the bit"
    )
    return {"modules_to_save": rule(modules, why, "PEFT: trainable_token_indices"), "new_rows_times": times(known)}


def times(known: Known) -> Choice:
    """Adam moves a value by about the rate in a step, however large it is: what starts from nothing needs the rates of
    a pretraining, 1e-3 to 1e-2."""
    value = max(1.0, min(ROWS_TIMES, MOST_ROWS_RATE / known["learning_rate"]))
    why = f"new rows learn at {value * known['learning_rate']:.2g}: they start from nothing, the adapter beside a model"
    return rule(round(value, 3), why, "measured: docs/methods.md")


def trained_rows(choices: Mapping[str, Choice]) -> int:
    """Rows of any matrix that are trained beside an adapter."""
    if "modules_to_save" not in choices:
        return 0
    return len(choices["add_tokens"].value) * len(choices["modules_to_save"].value)
