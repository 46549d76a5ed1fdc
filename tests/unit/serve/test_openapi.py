"""Whatever the OpenAPI document allows, and what it does not: the server never fails (5xx)."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import hypothesis
import pytest
import schemathesis

from tiny_server import LiveServer, make_settings, serving
from tunesmith.serve.app import ROUTES, build_openapi

pytestmark = pytest.mark.promise


SCHEMA = schemathesis.openapi.from_dict(build_openapi(ROUTES))


@pytest.fixture(scope="module")
def fuzzed(
    writer: Path, adapters: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[LiveServer]:
    """Return a server of its own: the fuzzer may add and remove models."""
    folder = tmp_path_factory.mktemp("models")
    settings = make_settings({"small": adapters["small"]}, base=str(writer), models_dir=folder)
    with serving(settings) as server:
        yield server


def test_every_route_is_in_the_document(fuzzed: LiveServer) -> None:
    with fuzzed.client() as http:
        document = http.get("/openapi.json").json()
    for endpoint in ROUTES:
        operation = document["paths"][endpoint.path][endpoint.method.lower()]
        assert operation["summary"]
        assert ("security" in operation) == (endpoint.scope is not None)
        assert ("requestBody" in operation) == (endpoint.body is not None)


@SCHEMA.exclude(path="/admin/drain").parametrize()
@hypothesis.settings(max_examples=6, deadline=None, derandomize=True)
def test_nothing_is_a_server_error(case: Any, fuzzed: LiveServer) -> None:
    response = case.call(base_url=fuzzed.url, timeout=60)
    assert response.status_code < 500, f"{case.as_curl_command()}\n{response.text}"
