"""Cached states of users in the service: the same answers as without, counted, and gone with the user."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import polars as pl
import pytest
from http_client import TestClient, served
from pipeline_fixtures import Run

Clients = tuple[TestClient, TestClient]


@pytest.fixture
def clients(trained: Run, tmp_path: Path) -> Iterator[Clients]:
    """A service with cached states and one without, on one store."""
    store = tmp_path / "store.sqlite"
    with (
        served(trained.bundle, trained.data, store) as cached,
        served(trained.bundle, trained.data, store, cached_states=0) as plain,
    ):
        yield cached, plain


def outcomes(client: TestClient) -> dict[str, float]:
    lines = [line for line in client.get("/metrics").text.splitlines() if line.startswith("recsys_encoded_total{")]
    return {line.split('"')[1]: float(line.split()[-1]) for line in lines}


def gauge(client: TestClient, name: str) -> float:
    (line,) = [line for line in client.get("/metrics").text.splitlines() if line.startswith(f"recsys_{name} ")]
    return float(line.split()[-1])


def same_answers(clients: Clients, *bodies: dict[str, Any]) -> None:
    cached, plain = (client.post("/v1/recommend/batch", json={"requests": bodies}).json() for client in clients)
    for one, other in zip(cached["responses"], plain["responses"], strict=True):
        assert [row["item_id"] for row in one["items"]] == [row["item_id"] for row in other["items"]]
        scores = [[row["score"] for row in answer["items"]] for answer in (one, other)]
        assert scores[0] == pytest.approx(scores[1], abs=1e-4)


def test_returning_users_get_the_answers_of_the_whole_history(clients: Clients, trained: Run) -> None:
    cached, plain = clients
    model = cached.app.state.service.engine.recommender  # type: ignore[attr-defined]  # of starlette
    newest = (model.newest_time or 0) + 1_000
    users = pl.read_parquet(trained.data / "users.parquet")["user_id"].cast(pl.String).to_list()[:3]
    ids = [str(item) for item in model.catalogue.items["item_id"][:6]]
    new = ["new-1", "new-2"]

    def send(user: str, *events: tuple[str, int]) -> None:
        body = {"events": [{"user_id": user, "item_id": item, "time": newest + late} for item, late in events]}
        assert cached.post("/v1/events", json=body).status_code < 300

    def ask(later: int) -> None:
        names = [*users, *new, new[0]]  # one of them twice
        same_answers(clients, *({"user_id": user, "request_time": newest + later, "k": 5} for user in names))

    for user in new:
        send(user, (ids[0], 0), (ids[1], 10), (ids[2], 20))
    ask(1_000)
    first = outcomes(cached)
    assert first["miss"] + first.get("window", 0) == 5
    assert first["hit"] == 1
    ask(50_000)  # the same histories at another time
    assert outcomes(cached)["hit"] >= first["hit"] + 3
    send(new[0], (ids[3], 60_000))
    send(new[1], (ids[4], 5))  # late: before an event whose position was final
    ask(90_000)
    assert outcomes(cached)["changed"] >= 1
    history = {"items": ids[:3], "times": [newest] * 3}
    same_answers(clients, {"history": history, "request_time": newest, "k": 5})
    assert outcomes(cached)["anonymous"] == 1
    assert outcomes(plain) == {}
    assert gauge(cached, "cached_states") == 5
    assert 0 < gauge(cached, "cached_states_bytes") < 256 << 20
    assert gauge(plain, "cached_states") == 0


def test_an_erased_user_leaves_no_state(clients: Clients, trained: Run) -> None:
    cached, plain = clients
    user = str(pl.read_parquet(trained.data / "users.parquet")["user_id"][0])
    service = cached.app.state.service  # type: ignore[attr-defined]  # of starlette
    assert cached.post("/v1/recommend", json={"user_id": user}).status_code == 200
    assert len(service.engine.states) == 1
    assert cached.delete(f"/v1/users/{user}").status_code < 300
    assert len(service.engine.states) == 0
    # erased by another worker, which cannot reach the state of this one: the next request for the user drops it
    other = str(pl.read_parquet(trained.data / "users.parquet")["user_id"][1])
    assert cached.post("/v1/recommend", json={"user_id": other}).status_code == 200
    assert plain.delete(f"/v1/users/{other}").status_code < 300
    assert cached.post("/v1/recommend", json={"user_id": other}).status_code == 404
    assert len(service.engine.states) == 0
