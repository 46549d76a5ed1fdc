"""Few products are kept, unless the user says otherwise."""

import os

import pytest

from tunesmith.model.malloc import CAPACITY, KEPT_PRODUCTS, keep_little


def test_few_products_are_kept_unless_the_user_says_how_many(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(CAPACITY, raising=False)
    keep_little()
    assert os.environ[CAPACITY] == KEPT_PRODUCTS
    monkeypatch.setenv(CAPACITY, "500")
    keep_little()
    assert os.environ[CAPACITY] == "500"
