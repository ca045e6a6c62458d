"""Requests that are made up from the OpenAPI document, right and wrong: none gets a 5xx."""

import warnings
from collections.abc import Iterator
from typing import Any

import pytest
from http_client import TestClient, served
from pipeline_fixtures import Run

pytest.importorskip("schemathesis", reason="schemathesis is not installed")
with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # of its dependencies
    import schemathesis
    from hypothesis import HealthCheck, given, settings
    from hypothesis.errors import HypothesisDeprecationWarning

STATUSES = {200, 202, 204, 400, 404, 405, 413, 415, 422}


@pytest.fixture(scope="module")
def client(informed: Run, tmp_path_factory: pytest.TempPathFactory) -> Iterator[TestClient]:
    with served(informed.bundle, informed.data, tmp_path_factory.mktemp("store") / "s.sqlite", max_k=200) as client:
        yield client


def attack(client: TestClient, cases: int) -> list[int]:
    """The statuses of so many requests."""
    app: Any = client.app
    schema = schemathesis.openapi.from_asgi("/openapi.json", app)
    statuses: list[int] = []

    @settings(
        max_examples=cases, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck)
    )
    @given(case=schema.as_strategy())
    def send(case: Any) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            arguments = case.as_transport_kwargs(base_url="http://testserver")
        answer = client.request(
            **{
                name: arguments[name]
                for name in ("method", "url", "headers", "params", "json", "content")
                if name in arguments
            },
            **({"content": arguments["data"]} if isinstance(arguments.get("data"), bytes | str) else {}),
        )
        statuses.append(answer.status_code)
        assert answer.status_code in STATUSES, (case.method, case.path, case.body, answer.status_code, answer.text)
        if answer.status_code >= 400:
            assert answer.headers["content-type"] == "application/problem+json"
            assert answer.json()["detail"]

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", HypothesisDeprecationWarning)  # of how schemathesis draws
        send()
    return statuses


def test_no_request_gets_a_5xx(client: TestClient) -> None:
    statuses = attack(client, 200)
    assert len(statuses) >= 200
    assert {200, 422} <= set(statuses)


@pytest.mark.slow
def test_none_of_many_requests_gets_a_5xx(client: TestClient) -> None:
    assert len(attack(client, 5_000)) >= 5_000
