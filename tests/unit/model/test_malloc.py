"""Few products are kept, unless the user says otherwise."""

import os

import pytest

from tunesmith.model.malloc import CAPACITY_ENV, MAX_PRIMITIVES, limit_onednn_cache


def test_few_products_are_kept_unless_the_user_says_how_many(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv(CAPACITY_ENV, raising=False)
    limit_onednn_cache()
    assert os.environ[CAPACITY_ENV] == MAX_PRIMITIVES
    monkeypatch.setenv(CAPACITY_ENV, "500")
    limit_onednn_cache()
    assert os.environ[CAPACITY_ENV] == "500"
