"""Macro-F1 of labels as a mean of items.

Macro-F1 is the mean F1 of the labels that are expected (sklearn's `f1_score(average="macro")` with
these as `labels`); an answer that is none of them counts against the recall of the expected one. It
is no mean of items, so each item's value is macro-F1 plus the item's influence on it: the
infinitesimal jackknife (Jaeckel 1972; Efron 1982), widened for labels with few items as by HC3
(MacKinnon and White 1985). Their mean is macro-F1 itself, so that pairing, groups and intervals are
those of every other metric."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import numpy as np

Pair = tuple[str, str]  # expected, answered


def pair_labels(expected: Sequence[str], answers: Sequence[str]) -> tuple[Pair, ...]:
    """Return the expected label and the answered one, "" if that is no expected label."""
    stripped = [label.strip() for label in expected]
    labels = set(stripped)
    answered = [answer.strip() for answer in answers]
    return tuple(
        (label, answer if answer in labels else "")
        for label, answer in zip(stripped, answered, strict=True)
    )


def compute_macro_f1_values(pairs: Sequence[Pair], strata: Sequence[str] = ()) -> tuple[float, ...]:
    """Return macro-F1 of an item's stratum plus its influence, one value per item."""
    names = np.array(strata or ("",) * len(pairs))
    values = np.zeros(len(pairs))
    for name in dict.fromkeys(names.tolist()):
        is_in_N = names == name
        values[is_in_N] = _compute_stratum([pairs[row] for row in np.flatnonzero(is_in_N).tolist()])
    return tuple(values.tolist())


def _compute_stratum(pairs: Sequence[Pair]) -> np.ndarray:
    """Return F + n dF/dw of each item's weight w, where F1 of a label is 2 right / total."""
    labels = list(dict.fromkeys(expected for expected, _ in pairs))
    total = Counter(label for pair in pairs for label in pair)
    right = Counter(expected for expected, answered in pairs if expected == answered)
    f1 = {label: 2 * right[label] / total[label] for label in labels}
    expected = Counter(label for label, _ in pairs)
    widened = {label: n / max(0.5 * n, n - 1) for label, n in expected.items()}
    slope = {label: widened[label] * len(pairs) / len(labels) / total[label] for label in labels}
    macro = sum(f1.values()) / len(labels)
    values = np.full(len(pairs), macro)
    for index, pair in enumerate(pairs):
        if pair[0] == pair[1]:
            values[index] += 2 * slope[pair[0]] * (1 - f1[pair[0]])
            continue
        for label in pair:
            values[index] -= slope.get(label, 0.0) * f1.get(label, 0.0)
    return values
