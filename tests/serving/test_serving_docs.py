"""The requests of docs/serving.md are requests of this service."""

import json
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from http_client import TestClient, served
from pipeline_fixtures import Run

PAGE = Path(__file__).parent.parent.parent / "docs" / "serving.md"


@pytest.fixture(scope="module")
def client(trained: Run, tmp_path_factory: pytest.TempPathFactory) -> Iterator[TestClient]:
    with served(trained.bundle, trained.data, tmp_path_factory.mktemp("store") / "s.sqlite") as client:
        yield client


def requests() -> Iterator[tuple[str, str, str | None]]:
    """Method, path and body of each call of curl."""
    for block in re.findall(r"^```bash\n(.*?)^```$", PAGE.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE):
        for command in re.findall(r"^curl .*?(?=^curl |\Z)", block.replace("\\\n", " "), re.DOTALL | re.MULTILINE):
            words = shlex.split(command)
            url = urlsplit("//" + next(word for word in words if word.startswith("localhost")))
            body = words[words.index("-d") + 1] if "-d" in words else None
            method = words[words.index("-X") + 1] if "-X" in words else "POST" if body else "GET"
            yield method, f"{url.path}?{url.query}".rstrip("?"), body


def test_every_route_has_an_example(client: TestClient) -> None:
    shown = {(method, path.partition("?")[0]) for method, path, _ in requests()}
    for path, methods in client.get("/openapi.json").json()["paths"].items():
        pattern = re.sub(r"\\{.*?\\}", ".+", re.escape(path))
        for method in methods:
            assert any(method.upper() == one and re.fullmatch(pattern, other) for one, other in shown), (method, path)


def test_the_examples_are_requests_of_this_service(client: TestClient) -> None:
    """Their ids and features are of the demo; nothing else may be wrong."""
    for method, path, body in requests():
        answer = client.request(method, path, content=body, headers={"Content-Type": "application/json"})
        if answer.status_code < 400 or "offest" in (body or ""):
            continue
        detail = answer.json()["detail"]
        of_the_demo = (
            r"knows none of|does not know the item|no item feature 'decade'|no parameter 'decade'|request_time is"
        )
        assert re.search(of_the_demo, detail), (path, body, detail)


def test_the_answers_have_the_fields_of_the_schema(client: TestClient) -> None:
    spec = client.get("/openapi.json").json()["components"]["schemas"]
    blocks = re.findall(r"^```json\n(.*?)^```$", PAGE.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)
    answers = [json.loads(block) for block in blocks]
    names = ["Recommended", "Recommended", "BatchAnswer", "Ranked", "SimilarAnswer", "ItemsAnswer"]
    for answer, name in zip(answers, names, strict=False):
        assert set(answer) <= set(spec[name]["properties"]), name
        assert set(spec[name]["required"]) <= set(answer), name
    info = client.get("/v1/info").json()
    assert set(answers[len(names)]) == set(info)
    assert set(answers[-1]) == {"type", "title", "status", "detail", "instance", "errors"}
