"""Around the routes: keys, limits, time, request ids, the log, CORS, metrics."""

import asyncio
import base64
import json
import logging
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from fastapi import FastAPI, Request

from recsys2stage.serving.middleware import install
from recsys2stage.serving.monitoring import JsonLines, Metrics
from recsys2stage.serving.settings import Settings

KEYS = ("a" * 20, "b" * 24)


@pytest.fixture
def keys(tmp_path: Path) -> Path:
    path = tmp_path / "keys.txt"
    path.write_text("\n".join(KEYS))
    return path


class Service:
    """Calls an application without a network."""

    def __init__(self, app: FastAPI) -> None:
        self.app = app

    def request(self, method: str, path: str, **more: Any) -> httpx.Response:
        async def call() -> httpx.Response:
            transport = httpx.ASGITransport(self.app, raise_app_exceptions=False)
            async with httpx.AsyncClient(transport=transport, base_url="http://service") as http:
                return await http.request(method, path, **more)

        return asyncio.run(call())

    def get(self, path: str, **more: Any) -> httpx.Response:
        return self.request("GET", path, **more)

    def post(self, path: str, **more: Any) -> httpx.Response:
        return self.request("POST", path, **more)


def service(**options: Any) -> Service:
    """A small application behind the middleware."""
    app, metrics = FastAPI(), Metrics()
    install(app, Settings(Path("bundle"), **options), metrics)

    @app.post("/echo/{user}")
    async def echo(request: Request, user: str) -> dict[str, Any]:
        request.state.fields["items"] = 3
        return {"size": len(await request.body()), "request_id": request.state.request_id}

    @app.get("/healthz")
    async def health() -> dict[str, str]:
        return {"status": "ok"}

    @app.get("/slow")
    async def slow() -> None:
        await asyncio.sleep(5)

    @app.get("/broken")
    async def broken() -> None:
        raise RuntimeError("secret detail")

    @app.get("/metrics")
    async def measured() -> str:
        return metrics.render()[0].decode()

    return Service(app)


def test_without_a_key_there_is_401_and_nothing_else(keys: Path) -> None:
    served = service(api_keys=keys)
    for headers in (
        {},
        {"X-API-Key": ""},
        {"X-API-Key": "a" * 19},
        {"X-API-Key": "a" * 21},
        {"Authorization": f"Bearer {KEYS[0]}x"},
        {"Authorization": f"Basic {KEYS[0]}"},
        {"Authorization": "Basic ///"},
        {"Authorization": KEYS[0]},
        {"Cookie": f"key={KEYS[0]}"},
    ):
        for method, path in (("POST", "/echo/u"), ("GET", "/nowhere"), ("GET", "/openapi.json"), ("GET", "/metrics")):
            answer = served.request(method, path, headers=headers)
            assert answer.status_code == 401
            assert answer.json() == {"type": "about:blank", "title": "Unauthorized", "status": 401}
            assert answer.headers["content-type"] == "application/problem+json"
            assert "Basic" in answer.headers["www-authenticate"]
    assert served.get("/healthz").json() == {"status": "ok"}, "a load balancer has no key"


def test_a_key_opens_in_three_ways(keys: Path) -> None:
    served = service(api_keys=keys)
    for key in KEYS:
        password = base64.b64encode(f"anybody:{key}".encode()).decode()
        for headers in (
            {"X-API-Key": key},
            {"Authorization": f"Bearer {key}"},
            {"Authorization": f"bearer  {key}"},
            {"Authorization": f"Basic {password}"},
        ):
            assert served.post("/echo/u", headers=headers).status_code == 200


async def endless() -> AsyncIterator[bytes]:
    while True:
        yield b"x" * 100


def test_a_body_may_be_as_long_as_the_limit() -> None:
    served = service(max_body=2_048)
    assert served.post("/echo/u", content=b"x" * 2_048).json()["size"] == 2_048
    for body in (b"x" * 2_049, endless()):  # declared, and in chunks
        answer = served.post("/echo/u", content=body)
        assert answer.status_code == 413
        problem = answer.json()
        assert problem["status"] == 413
        assert "bytes, expected at most 2,048; send fewer" in problem["detail"]
    assert served.post("/echo/u").json()["size"] == 0


def test_a_slow_request_ends_with_504() -> None:
    served = service(timeout=0.05)
    answer = served.get("/slow")
    assert answer.status_code == 504
    assert "more than 0.05 seconds" in answer.json()["detail"]


def test_an_error_inside_tells_the_caller_nothing_but_the_request_id(caplog: pytest.LogCaptureFixture) -> None:
    served = service()
    answer = served.get("/broken", headers={"X-Request-ID": "r1"})
    assert answer.status_code == 500
    assert answer.json()["instance"] == "r1"
    assert "secret" not in answer.text
    assert any(record.exc_info and "secret detail" in str(record.exc_info[1]) for record in caplog.records)


def test_every_answer_has_a_request_id() -> None:
    served = service()
    assert served.post("/echo/u", headers={"X-Request-ID": "shop-1.2_3"}).json()["request_id"] == "shop-1.2_3"
    given = [served.get("/nowhere").headers["x-request-id"] for _ in range(3)]
    assert len(set(given)) == 3
    for bad in ("", "a b", "x" * 65, "é".encode("latin-1"), '{"a":1}'):
        answer = served.post("/echo/u", headers={"X-Request-ID": bad})
        assert answer.headers["x-request-id"] == answer.json()["request_id"] != bad


def test_the_log_has_a_json_line_for_each_request_without_ids_of_users(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "recsys2stage.serving")
    served = service()
    served.post("/echo/user-4711?q=private", json={"history": ["item-0815"]}, headers={"X-Request-ID": "r1"})
    served.get("/user-4711")
    lines = [json.loads(JsonLines().format(record)) for record in caplog.records if record.name.endswith("serving")]
    first, second = lines
    assert {name: first[name] for name in ("message", "level", "request_id", "method", "route", "status", "items")} == {
        **{"message": "request", "level": "info", "request_id": "r1", "method": "POST", "route": "/echo/{user}"},
        **{"status": 200, "items": 3},
    }
    assert 0 < first["ms"] < 5_000
    assert (second["route"], second["status"]) == ("other", 404)
    for word in ("4711", "0815", "private"):
        assert word not in json.dumps(lines)
    caplog.clear()
    served = service(log_requests=False)
    served.post("/echo/u")
    assert not [record for record in caplog.records if record.name.endswith("serving")]


def test_requests_are_counted_by_route_and_status() -> None:
    served = service()
    for _ in range(3):
        served.post("/echo/u")
    for path in ("/a", "/b"):
        served.get(path)
    served.request("BREW", "/a")
    text = served.get("/metrics").json()
    assert 'recsys_requests_total{method="POST",route="/echo/{user}",status="200"} 3.0' in text
    assert 'recsys_requests_total{method="GET",route="other",status="404"} 2.0' in text, "paths make no series"
    assert 'recsys_requests_total{method="OTHER",route="other"' in text
    assert 'recsys_request_seconds_count{route="/echo/{user}"} 3.0' in text


def test_other_origins_are_answered_only_if_named(keys: Path) -> None:
    asked = {"Origin": "https://shop.example", "Access-Control-Request-Method": "POST"}
    served = service()
    assert "access-control-allow-origin" not in served.post("/echo/u", headers=asked).headers
    served = service(cors=("https://shop.example",), api_keys=keys)
    answer = served.request("OPTIONS", "/echo/u", headers=asked)
    assert answer.status_code == 200, "the preflight request has no key"
    assert answer.headers["access-control-allow-origin"] == "https://shop.example"
    assert served.post("/echo/u", headers=asked).status_code == 401
    answer = served.post("/echo/u", headers=asked | {"X-API-Key": KEYS[0]})
    assert answer.headers["access-control-allow-origin"] == "https://shop.example"
    other = served.post("/echo/u", headers={"Origin": "https://other.example", "X-API-Key": KEYS[0]})
    assert "access-control-allow-origin" not in other.headers


@pytest.fixture(autouse=True)
def quiet() -> None:
    """Other tests may have configured the log of the package."""
    logging.getLogger("recsys2stage").propagate = True
