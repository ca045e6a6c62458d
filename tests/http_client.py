"""The service in this process: an application with its lifespan, called without a socket."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

for name in ("fastapi", "uvicorn", "prometheus_client", "httpx"):
    pytest.importorskip(name, reason="the extra serve is not installed")

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # starlette will want another client
    from fastapi.testclient import TestClient as TestClient

from recsys2stage.serving.app import create_app  # noqa: E402  after the skip
from recsys2stage.serving.settings import Settings  # noqa: E402


@contextmanager
def served(bundle: Path, data: Path | None, store: Path, **options: Any) -> Iterator[TestClient]:
    """A client of the service; `client.app.state.service` is what it serves with."""
    settings = Settings(bundle=bundle, data=data, store=store, log_requests=False, **options)
    with TestClient(create_app(settings), raise_server_exceptions=False) as client:
        yield client
