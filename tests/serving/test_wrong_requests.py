"""Wrong requests: each gets a 4xx with the value, what is expected, and the next step."""

import json
import re
from collections.abc import Iterator
from typing import Any

import pytest
from http_client import TestClient, served
from pipeline_fixtures import Run

LONG = 300
LIMITS = {"max_k": 500, "max_list": 200, "max_batch": 5, "max_body": 50_000}
EVENTS, RECOMMEND, RANK, SIMILAR, BATCH = (
    f"POST /v1/{route}" for route in ("events", "recommend", "rank", "similar", "recommend/batch")
)
HISTORY = {"items": ["10", "10"], "times": [10**9, 10**9 + 5]}
ONE = {"user_id": "1", "item_id": "2"}
NEXT = r"(correct|send|add|leave|did you mean|ask for|search|swap|check|lists|try|give|convert|divide|later time)"

WRONG: dict[str, tuple[str, Any, int, str, str, str]] = {  # name -> route, body, status, value, expectation, next step
    "no JSON": (RECOMMEND, b'{"user_id": "1"', 400, "byte 15", "expected a JSON object", "check"),
    "an empty body": (RECOMMEND, b"", 422, "body", "missing", "add"),
    "latin-1": (RECOMMEND, '{"user_id": "é"}'.encode("latin-1"), 400, "", "expected a JSON object in UTF-8", "check"),
    "a list": (RECOMMEND, [1], 422, r"\[1\]", "expected an object", "correct"),
    "null": (RECOMMEND, b"null", 422, "body", "", NEXT),
    "nobody": (RECOMMEND, {"k": 3}, 422, "neither user_id nor history", "exactly one", "send"),
    "two users": (RECOMMEND, {"user_id": "1", "history": HISTORY}, 422, "both", "exactly one", "send"),
    "an unknown user": (RECOMMEND, {"user_id": "nobody"}, 404, "'nobody'", "expected a user", "send a history"),
    "a number as user": (RECOMMEND, {"user_id": 1}, 422, "user_id is 1", "expected text", "in quotes"),
    "an empty user": (RECOMMEND, {"user_id": ""}, 422, "''", "at least 1 character", "correct"),
    "half a character": (
        RECOMMEND,
        b'{"user_id": "\\ud800"}',
        422,
        "ud800",
        "expected text of valid Unicode",
        "correct",
    ),
    "a long id": (RECOMMEND, {"user_id": "x" * 2000}, 422, "xxx", "at most 1024", "correct"),
    "a typo": (RECOMMEND, {"user_id": "1", "offest": 1}, 422, "offest", "no field", "did you mean 'offset'"),
    "a typo within": (
        RECOMMEND,
        {"history": HISTORY | {"time": []}},
        422,
        "history.time",
        "no field",
        "did you mean 'times'",
    ),
    "k of zero": (RECOMMEND, {"user_id": "1", "k": 0}, 422, "k is 0", "expected at least 1", "correct"),
    "k below zero": (RECOMMEND, {"user_id": "1", "k": -3}, 422, "k is -3", "expected at least 1", "correct"),
    "half a k": (RECOMMEND, {"user_id": "1", "k": 2.5}, 422, "k is 2.5", "expected an integer", "correct"),
    "k as text": (RECOMMEND, {"user_id": "1", "k": "5"}, 422, "k is '5'", "expected an integer", "correct"),
    "k as truth": (RECOMMEND, {"user_id": "1", "k": True}, 422, "k is True", "expected an integer", "correct"),
    "a large k": (RECOMMEND, {"user_id": "1", "k": 400, "offset": 200}, 422, "600", "at most 500", "ask for fewer"),
    "k beyond 64 bits": (RECOMMEND, {"user_id": "1", "k": 10**30}, 422, "k is 1000", "expected at most", "correct"),
    "an offset below zero": (RECOMMEND, {"user_id": "1", "offset": -1}, 422, "offset is -1", "at least 0", "correct"),
    "too diverse": (RECOMMEND, {"user_id": "1", "diversity": 1.5}, 422, "1.5", "expected at most 1", "correct"),
    "no number": (RECOMMEND, b'{"user_id": "1", "diversity": NaN}', 422, "nan", "expected a finite number", "correct"),
    "infinite": (RECOMMEND, b'{"user_id": "1", "diversity": Infinity}', 422, "inf", "finite", "correct"),
    "seen": (RECOMMEND, {"user_id": "1", "seen": "hide"}, 422, "'hide'", "expected 'keep' or 'filter'", "correct"),
    "explain as text": (
        RECOMMEND,
        {"user_id": "1", "explain": "yes"},
        422,
        "'yes'",
        "expected true or false",
        "correct",
    ),
    "a text as list": (RECOMMEND, {"user_id": "1", "exclude": "12"}, 422, "'12'", "expected a list", "correct"),
    "numbers as ids": (RECOMMEND, {"user_id": "1", "exclude": [12]}, 422, "exclude.0 is 12", "expected text", "quotes"),
    "a long list": (RECOMMEND, {"user_id": "1", "exclude": ["1"] * LONG}, 422, "300", "at most 200", "send fewer"),
    "a long history": (RECOMMEND, {"history": {"items": ["1"] * LONG}}, 422, "300", "at most 200", "send the newest"),
    "an allow list of strangers": (
        RECOMMEND,
        {"user_id": "1", "allow": ["?"]},
        422,
        "'[?]'",
        "expected ids such as",
        "search",
    ),
    "a history of strangers": (
        *(RECOMMEND, {"history": {"items": ["x", "y"], "times": [1, 2]}}, 422),
        *("none of the 2 item ids, for example 'x'", "expected ids such as", "search /v1/items"),
    ),
    "no times": (
        RECOMMEND,
        {"history": {"items": ["1"]}},
        422,
        r"history\.times is missing",
        r"read.* times",
        "send seconds",
    ),
    "dates": (
        *(RECOMMEND, {"history": HISTORY | {"times": ["2024-05-01", 1]}}, 422, r"history\.times\.0 is '2024-05-01'"),
        *("expected seconds since 1970, such as 1714521600", "convert"),
    ),
    "a list as history": (
        *(RECOMMEND, {"history": ["1"]}, 422),
        *(r"history is \['1'\]", r'expected \{"items": \[\.\.\.\], "times": \[\.\.\.\]\}', "send"),
    ),
    "one time for two": (
        RECOMMEND,
        {"history": HISTORY | {"times": [1]}},
        422,
        "2 events but .* 1",
        "",
        "give one for each",
    ),
    "times back": (
        RECOMMEND,
        {"history": HISTORY | {"times": [9, 5]}},
        422,
        "from 9 .* to 5",
        "ascending",
        "oldest first",
    ),
    "milliseconds": (
        RECOMMEND,
        {"history": HISTORY | {"times": [10**12] * 2}},
        422,
        "1000000000000",
        "at most",
        "correct",
    ),
    "ratings as text": (
        RECOMMEND,
        {"history": HISTORY | {"ratings": ["a", 1]}},
        422,
        "'a'",
        "expected a number",
        "correct",
    ),
    "a request before the events": (
        *(RECOMMEND, {"history": HISTORY, "request_time": 5}, 422),
        *("request_time is 5", "before the newest event", "give a later time"),
    ),
    "an action": (RECOMMEND, {"user_id": "1", "action": "buy"}, 422, "'buy'", "without target action", "leave it out"),
    "user features": (
        RECOMMEND,
        {"history": HISTORY, "user": {"age": 3}},
        422,
        "'age'",
        "declare none",
        "leave it out",
    ),
    "features of a known user": (
        RECOMMEND,
        {"user_id": "1", "user": {}},
        422,
        "user_id",
        "history only",
        "leave it out",
    ),
    "an unknown feature": (
        *(RECOMMEND, {"user_id": "1", "filters": {"genre": {"any": ["Drama"]}}}, 422),
        *("'genre'", "no item feature", "did you mean 'genres'"),
    ),
    "an unknown class": (
        *(RECOMMEND, {"user_id": "1", "filters": {"genres": {"all": ["drama"]}}}, 422),
        *("'drama'", "no class", "did you mean 'Drama'"),
    ),
    "a class of another language": (
        *(RECOMMEND, {"user_id": "1", "filters": {"genres": {"all": ["xyzw"]}}}, 422),
        *("'xyzw'", "expected .*[a-zA-Z.]; ", "/v1/info lists them"),
    ),
    "an empty filter": (RECOMMEND, {"user_id": "1", "filters": {"genres": {}}}, 422, "{}", "expected any", "leave"),
    "a range of classes": (
        *(RECOMMEND, {"user_id": "1", "filters": {"genres": {"min": 3}}}, 422),
        *("genres", "expected any, all or none", "leave out min"),
    ),
    "a range that descends": (
        *(RECOMMEND, {"user_id": "1", "filters": {"genres": {"min": 3, "max": 2}}}, 422),
        *("min 3 above its max 2", "expected min <= max", "swap"),
    ),
    "a filter of a typo": (
        *(RECOMMEND, {"user_id": "1", "filters": {"genres": {"anny": []}}}, 422),
        *("anny", "no field", "did you mean 'any'"),
    ),
    "nothing to rank": (RANK, {"user_id": "1", "items": []}, 422, r"\[\]", "a list of at least 1", "correct"),
    "strangers to rank": (RANK, {"user_id": "1", "items": ["?"]}, 422, "'[?]'", "expected ids such as", "search"),
    "no items": (RANK, {"user_id": "1"}, 422, "items", "missing", "add"),
    "like nothing": (SIMILAR, {"item_id": "?"}, 404, "'[?]'", "expected an id such as", "search /v1/items"),
    "an empty batch": (BATCH, {"requests": []}, 422, r"\[\]", "a list of at least 1", "correct"),
    "a large batch": (BATCH, {"requests": [{"user_id": "1"}] * 6}, 422, "6", "at most 5", "send several"),
    "a wrong one of a batch": (
        BATCH,
        {"requests": [{"user_id": "1", "kk": 1}]},
        422,
        "requests.0.kk",
        "no field",
        "did you mean 'k'",
    ),
    "no events": (EVENTS, {"events": []}, 422, r"\[\]", "a list of at least 1", "correct"),
    "many events": (EVENTS, {"events": [ONE] * 6}, 422, "6", "at most 5", "send several"),
    "an event of nobody": (EVENTS, {"events": [{"item_id": "1"}]}, 422, "events.0.user_id", "missing", "add"),
    "an event to come": (
        EVENTS,
        {"events": [ONE | {"time": 4 * 10**9}]},
        422,
        "4000000000",
        "in the future",
        "send seconds",
    ),
    "an event before 1970": (EVENTS, {"events": [ONE | {"time": -1}]}, 422, "is -1", "at least 0", "correct"),
    "half a second": (
        EVENTS,
        {"events": [ONE | {"time": 1.5}]},
        422,
        "is 1.5",
        "expected seconds since 1970",
        "convert",
    ),
    "an infinite rating": (
        EVENTS,
        b'{"events": [{"user_id": "1", "item_id": "2", "rating": 1e999}]}',
        422,
        "inf",
        "finite",
        "correct",
    ),
    "a large body": (EVENTS, b" " * 60_000 + b"{}", 413, "60,002", "at most 50,000", "send fewer"),
    "an unknown path": ("GET /v1/recomend", None, 404, "recomend", "expected a path", "lists"),
    "the wrong method": ("GET /v1/recommend", None, 405, "GET", "expected POST", "lists"),
    "a page without entries": ("GET /v1/items?limit=0", None, 422, "'0'", "at least 1", "correct"),
    "a page of text": ("GET /v1/items?offset=two", None, 422, "'two'", "expected an integer", "correct"),
    "an unknown parameter": ("GET /v1/items?genre=Drama", None, 422, "genre", "no parameter", "did you mean 'genres'"),
    "a class nobody has": ("GET /v1/items?genres=Dramma", None, 422, "Dramma", "no class", "did you mean 'Drama'"),
    "an unknown user's events": ("GET /v1/users/nobody", None, 404, "'nobody'", "expected a user", "lists"),
    "an unknown parameter of users": ("GET /v1/users?page=2", None, 422, "page", "no parameter", "expected limit"),
}


@pytest.fixture(scope="module")
def client(informed: Run, tmp_path_factory: pytest.TempPathFactory) -> Iterator[TestClient]:
    with served(informed.bundle, informed.data, tmp_path_factory.mktemp("store") / "s.sqlite", **LIMITS) as client:
        yield client


def send(client: TestClient, route: str, body: Any) -> Any:
    method, path = route.split()
    content = body if isinstance(body, bytes | None) else json.dumps(body).encode()
    return client.request(method, path, content=content, headers={"Content-Type": "application/json"})


def test_there_are_fifty() -> None:
    assert len(WRONG) >= 50


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_request_is_told_what_is_expected(client: TestClient, name: str) -> None:
    route, body, status, value, expectation, step = WRONG[name]
    answer = send(client, route, body)
    assert answer.status_code == status, answer.text
    assert answer.headers["content-type"] == "application/problem+json"
    problem = answer.json()
    assert problem["status"] == status
    assert problem["instance"] == answer.headers["x-request-id"]
    detail = problem["detail"]
    assert detail.count("\n") == 0
    assert len(detail) < 400
    for what in (value, expectation, step):
        assert re.search(what, detail), detail
    if "errors" in problem:
        assert all({"field", "value", "detail"} <= set(error) for error in problem["errors"])


def test_all_errors_of_a_request_are_told(client: TestClient) -> None:
    problem = send(client, RECOMMEND, {"user_id": 1, "k": 0, "offest": 2}).json()
    assert {error["field"] for error in problem["errors"]} == {"user_id", "k", "offest"}


def test_json_without_its_content_type_is_told_the_header(client: TestClient) -> None:
    answer = client.post("/v1/recommend", content=b'{"user_id": "1"}', headers={"Content-Type": "text/plain"})
    assert answer.status_code == 415
    assert "the Content-Type is 'text/plain', expected application/json; send this header" in answer.json()["detail"]


def test_one_wrong_request_of_a_batch_leaves_the_others(client: TestClient) -> None:
    good, bad, large = {"user_id": "1", "k": 2}, {"user_id": "nobody"}, {"user_id": "1", "k": 501}
    responses = send(client, BATCH, {"requests": [good, bad, large, good]}).json()["responses"]
    assert [response.get("status", 200) for response in responses] == [200, 404, 422, 200]
    assert responses[0]["items"] == responses[3]["items"]
    assert len({response.get("request_id") or response["instance"] for response in responses}) == 4
