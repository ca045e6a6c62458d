"""The routes: the lists are those of `recsys recommend`, filters leave min(k, n), and what is told is remembered."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
from closeness import same_lists
from http_client import TestClient, served
from pipeline_fixtures import K, Run, recsys

from recsys2stage.data.dataset import Dataset
from recsys2stage.evaluation.evaluate import rank_users
from recsys2stage.recommender import Recommender

COLUMNS = ["item_id", "score", "rank", "retriever_score"]


@pytest.fixture(scope="module")
def client(informed: Run, tmp_path_factory: pytest.TempPathFactory) -> Iterator[TestClient]:
    """Both stages with all signals and the request time."""
    with served(informed.bundle, informed.data, tmp_path_factory.mktemp("store") / "store.sqlite") as client:
        yield client


@pytest.fixture(scope="module")
def first(trained: Run, tmp_path_factory: pytest.TempPathFactory) -> Iterator[TestClient]:
    """The first stage alone."""
    with served(trained.index, trained.data, tmp_path_factory.mktemp("store") / "store.sqlite") as client:
        yield client


@pytest.fixture(scope="module")
def dataset(informed: Run) -> Dataset:
    return Dataset(informed.data)


@pytest.fixture(scope="module")
def newest(dataset: Dataset) -> int:
    """Time of the newest event of the log: when the requests are made."""
    return int(dataset.times.max())


@pytest.fixture(scope="module")
def catalogue(informed: Run) -> pl.DataFrame:
    return pl.read_parquet(informed.bundle / "items.parquet").with_columns(pl.col("item_id").cast(pl.String))


def ask(client: TestClient, route: str = "recommend", **body: Any) -> dict[str, Any]:
    answer = client.post(f"/v1/{route}", json=body)
    assert answer.status_code == 200, answer.text
    return answer.json()


def ids_of(answer: dict[str, Any], name: str = "items") -> list[str]:
    return [row["item_id"] for row in answer[name]]


def as_frame(answers: list[dict[str, Any]], like: pl.DataFrame) -> pl.DataFrame:
    rows = [{"user_id": answer["user_id"]} | row for answer in answers for row in answer["items"]]
    frame = pl.DataFrame(rows).select("user_id", *COLUMNS)
    return frame.with_columns(pl.col("user_id", "item_id").cast(pl.Int64)).cast(dict(like.schema))


@pytest.fixture(scope="module")
def verb(informed: Run, tmp_path_factory: pytest.TempPathFactory) -> pl.DataFrame:
    """What `recsys recommend` gives everybody."""
    output = tmp_path_factory.mktemp("verb") / "recommendations.parquet"
    recsys("recommend", "--bundle", informed.bundle, "--data", informed.data, "--output", output)
    return pl.read_parquet(output).select("user_id", *COLUMNS)


def test_known_users_get_the_lists_of_the_verb(client: TestClient, verb: pl.DataFrame, newest: int) -> None:
    users = verb["user_id"].unique().sort().cast(pl.String).to_list()
    requests = [{"user_id": user, "request_time": newest} for user in users]
    answers = []
    for start in range(0, len(requests), 50):
        answers += ask(client, "recommend/batch", requests=requests[start : start + 50])["responses"]
    assert len(answers) == 150
    same_lists(as_frame(answers, verb), verb)


def test_a_request_gets_the_same_alone_and_among_others(client: TestClient, newest: int) -> None:
    """Whatever the others ask for: lists of other lengths, filters, candidates to rank."""
    asked = [
        {"user_id": str(user), "request_time": newest, "k": 1 + user % 7}
        | ({"filters": {"genres": {"any": ["Drama", "Comedy"]}}} if user % 3 == 0 else {})
        | ({"k": 110, "seen": "keep"} if user % 5 == 0 else {})
        | ({"diversity": 0.5} if user % 4 == 0 else {})
        for user in range(1, 31)
    ]
    together = ask(client, "recommend/batch", requests=asked)["responses"]
    for request, other in zip(asked, together, strict=True):
        one = ask(client, **request)
        assert ids_of(one) == ids_of(other)
        for row, also in zip(one["items"], other["items"], strict=True):
            assert row["score"] == pytest.approx(also["score"], rel=1e-5, abs=1e-5)
            assert row["retriever_rank"] == also["retriever_rank"]


def test_a_raw_history_gets_what_the_library_gives(client: TestClient, informed: Run, newest: int) -> None:
    library = Recommender.load(informed.bundle)
    for user in ("3", "77"):
        events = client.get(f"/v1/users/{user}").json()["events"][::-1]
        history = {
            name: [event[field] for event in events] for name, field in (("items", "item_id"), ("times", "time"))
        }
        history["ratings"] = [event["rating"] for event in events]
        answer = ask(client, history=history, request_time=newest, k=20)
        rows = library.recommend(history["items"], 20, history["times"], newest, ratings=history["ratings"])
        assert answer["known_events"] == len(events)
        assert ids_of(answer) == [str(row["item_id"]) for row in rows]
        assert [row["score"] for row in answer["items"]] == pytest.approx([row["score"] for row in rows], abs=1e-5)
        assert ids_of(ask(client, user_id=user, request_time=newest, k=20)) == ids_of(answer)


def test_a_history_before_the_target_has_it_where_the_evaluation_ranks_it(
    client: TestClient, informed: Run, dataset: Dataset, catalogue: pl.DataFrame
) -> None:
    users = dataset.users("test")[:12]
    ranks = rank_users(dataset, Recommender.load(informed.bundle), users, "test").ranks["ranker"].tolist()
    ids = catalogue.sort("item")["item_id"].to_list()
    requests, targets = [], []
    for user in users:
        start, end = int(dataset.offsets[user]), int(dataset.val_ends[user])
        history: dict[str, Any] = {
            "items": [ids[item - 1] for item in dataset.items[start:end]],
            "times": dataset.times[start:end].tolist(),
        }
        if dataset.ratings is not None:
            history["ratings"] = dataset.ratings[start:end].tolist()
        requests.append({"history": history, "request_time": int(dataset.times[end]), "k": dataset.num_items})
        targets.append(ids[dataset.items[end] - 1])
    answers = ask(client, "recommend/batch", requests=requests)["responses"]
    places = [ids_of(answer).index(target) + 1 for answer, target in zip(answers, targets, strict=True)]
    assert places == ranks


def passing(catalogue: pl.DataFrame, filters: dict[str, dict[str, Any]]) -> set[str]:
    """Ids that pass filters on genres, by definition."""
    found = set()
    for item, genres in catalogue.select("item_id", "genres").iter_rows():
        own, condition = set(genres or []), filters.get("genres", {})
        if (
            ("any" not in condition or own & set(condition["any"]))
            and own >= set(condition.get("all", []))
            and not own & set(condition.get("none", []))
        ):
            found.add(item)
    return found


@pytest.mark.parametrize("stages", ["both", "first"])
def test_filters_that_leave_n_items_give_min_k_n(
    client: TestClient, first: TestClient, catalogue: pl.DataFrame, newest: int, stages: str
) -> None:
    """The n eligible ones, in the retriever's order where it has the last word."""
    serving, rng = client if stages == "both" else first, np.random.default_rng(1)
    genres = catalogue["genres"].explode().drop_nulls().unique().sort().to_list()
    ids = catalogue["item_id"].to_list()
    for user in ("5", "6"):
        seen = {event["item_id"] for event in serving.get(f"/v1/users/{user}?limit=1000").json()["events"]}
        whole = ids_of(ask(serving, user_id=user, request_time=newest, k=len(ids)))
        for _ in range(12):
            condition = {
                kind: rng.choice(genres, size=rng.integers(1, 3), replace=False).tolist()
                for kind in ("any", "all", "none")
                if rng.random() < 0.5
            }
            filters = {"genres": condition} if condition else {}
            allow = (
                rng.choice(ids, size=int(rng.choice([2, 60])), replace=False).tolist() if rng.random() < 0.5 else None
            )
            exclude, shown = (rng.choice(ids, size=5, replace=False).tolist() for _ in range(2))
            eligible = passing(catalogue, filters) - seen - set(exclude) - set(shown)
            eligible &= set(ids if allow is None else allow)
            for k in (3, 200):
                request = {"filters": filters, "allow": allow, "exclude": exclude, "shown": shown, "k": k}
                answer = ask(serving, user_id=user, request_time=newest, **request)
                got = ids_of(answer)
                assert len(got) == len(set(got)) == min(k, len(eligible))
                assert set(got) <= eligible
                assert [row["rank"] for row in answer["items"]] == list(range(1, 1 + len(got)))
                if stages == "first":
                    assert got == [item for item in whole if item in eligible][:k]


def test_pages_by_offset_are_parts_of_one_list(client: TestClient, newest: int) -> None:
    for diversity in (0.0, 0.4):
        asked = {"user_id": "9", "request_time": newest, "diversity": diversity, "stages": True}
        whole = ask(client, k=60, **asked)
        parts = [ask(client, k=15, offset=offset, **asked) for offset in (0, 15, 30, 45)]
        assert [row for part in parts for row in part["items"]] == whole["items"]
        assert [item for part in parts for item in ids_of(part, "retrieved")] == ids_of(whole, "retrieved")
        assert whole["items"][0]["rank"] == 1
        assert ask(client, k=5, offset=900, **asked)["items"] == []


def test_both_stages_are_shown_with_their_places(client: TestClient, newest: int) -> None:
    answer = ask(client, user_id="11", request_time=newest, k=K, stages=True)
    place = {row["item_id"]: row["rank"] for row in answer["retrieved"]}
    assert list(place.values()) == list(range(1, K + 1))
    scores = [row["score"] for row in answer["retrieved"]]
    assert scores == sorted(scores, reverse=True)
    assert {row["item_id"]: row["retriever_rank"] for row in answer["items"]} == place
    assert ids_of(answer) != ids_of(answer, "retrieved")


def test_a_diverse_list_is_less_alike(client: TestClient, newest: int) -> None:
    engine = client.app.state.service.engine  # type: ignore[attr-defined]

    def likeness(diversity: float) -> float:
        answer = ask(client, user_id="12", request_time=newest, k=10, diversity=diversity)
        vectors = engine.units[engine.recommender.catalogue.numbers(ids_of(answer))]
        return float((vectors @ vectors.T).mean())

    values = [likeness(diversity) for diversity in (0.0, 0.5, 1.0)]
    assert values[0] > values[1] > values[2]


def test_shown_items_are_not_repeated_and_count_for_diversity(client: TestClient, newest: int) -> None:
    asked = {"user_id": "12", "request_time": newest, "k": 6}
    shown = ids_of(ask(client, **asked))
    plain = ids_of(ask(client, **asked, shown=shown))
    assert not set(plain) & set(shown)
    diverse = ids_of(ask(client, **asked, shown=shown, diversity=0.7))
    alone = ids_of(ask(client, **asked, exclude=shown, diversity=0.7))
    assert diverse != alone


def test_candidates_are_ranked_as_in_a_recommendation(client: TestClient, newest: int) -> None:
    """With the same scores; what the model does not know is reported."""
    whole = ask(client, user_id="13", request_time=newest, k=K)
    some = ids_of(whole)[2:30:3]
    answer = ask(client, "rank", user_id="13", request_time=newest, items=[*some[::-1], "nowhere", some[0]])
    assert ids_of(answer) == some
    assert answer["unknown"] == ["nowhere"]
    scores = {row["item_id"]: row["score"] for row in whole["items"]}
    assert [row["score"] for row in answer["items"]] == pytest.approx(
        [scores[item] for item in some], rel=1e-5, abs=1e-5
    )
    seen = client.get("/v1/users/13").json()["events"][0]["item_id"]
    assert seen in ids_of(ask(client, "rank", user_id="13", request_time=newest, items=[seen, *some]))


def test_similar_items_are_the_nearest_by_cosine(client: TestClient, catalogue: pl.DataFrame) -> None:
    vectors = client.app.state.service.engine.recommender.vectors[1:]  # type: ignore[attr-defined]
    unit = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    ids = catalogue.sort("item")["item_id"].to_list()
    own = unit @ unit[7]
    order = [item for item in np.argsort(-own, kind="stable") if item != 7]
    answer = ask(client, "similar", item_id=ids[7], k=12)
    assert ids_of(answer) == [ids[item] for item in order[:12]]
    assert [row["score"] for row in answer["items"]] == pytest.approx(own[order[:12]].tolist(), abs=1e-5)
    few = [ids[3], ids[7], ids[50]]
    assert set(ids_of(ask(client, "similar", item_id=ids[7], k=12, allow=few))) == {ids[3], ids[50]}


def test_the_search_finds_titles_with_every_word(client: TestClient, catalogue: pl.DataFrame) -> None:
    popularity = client.app.state.service.engine.recommender.popularity  # type: ignore[attr-defined]
    count = dict(zip(catalogue["item_id"], popularity[catalogue["item"].to_numpy()].tolist(), strict=True))
    for text, genre in (("", None), ("a", "Drama"), ("THE", None), ("night the", None), ("qqq", None)):
        params = {"q": text, "limit": 1000} | ({"genres": genre} if genre else {})
        answer = client.get("/v1/items", params=params).json()
        expected = {
            item
            for item, title, genres in catalogue.select("item_id", "title", "genres").iter_rows()
            if all(word in title.lower() for word in text.lower().split())
            and (genre is None or genre in (genres or []))
        }
        assert set(ids_of(answer)) == expected
        assert answer["total"] == len(expected)
        assert [row["popularity"] for row in answer["items"]] == sorted((count[i] for i in expected), reverse=True)
    page = client.get("/v1/items", params={"limit": 3, "offset": 2}).json()
    assert page["items"] == client.get("/v1/items", params={"limit": 5}).json()["items"][2:]


def test_new_events_are_known_to_the_next_request(client: TestClient, catalogue: pl.DataFrame) -> None:
    ids = catalogue["item_id"].to_list()
    assert client.post("/v1/recommend", json={"user_id": "ann/lee é"}).status_code == 404
    events = [{"user_id": "ann/lee é", "item_id": item, "time": 10**9 + n} for n, item in enumerate(ids[:3])]
    kept = client.post("/v1/events", json={"events": [*events, events[0] | {"item_id": "nowhere", "action": "look"}]})
    assert kept.status_code == 202
    assert kept.json() == {"accepted": 4, "unknown_items": 1}
    answer = ask(client, user_id="ann/lee é", k=120)
    assert answer["known_events"] == 3
    assert answer["fallback"] is None
    assert not set(ids[:3]) & set(ids_of(answer))
    like = ask(client, history={"items": ids[:3], "times": [10**9 + n for n in range(3)]}, k=120)
    assert ids_of(answer) == ids_of(like)
    shown = client.get("/v1/users/ann%2Flee%20%C3%A9").json()
    assert [event["item_id"] for event in shown["events"]] == [ids[2], ids[1], "nowhere", ids[0]]
    assert {event["source"] for event in shown["events"]} == {"store"}
    assert "ann/lee é" in client.get("/v1/users?limit=1000").json()["users"]
    assert client.delete("/v1/users/ann%2Flee%20%C3%A9").status_code == 204
    assert client.post("/v1/recommend", json={"user_id": "ann/lee é"}).status_code == 404


def test_a_delivery_with_a_key_is_kept_once(client: TestClient, catalogue: pl.DataFrame) -> None:
    body = {"events": [{"user_id": "twice", "item_id": catalogue["item_id"][0]}, {"user_id": "twice", "item_id": "x"}]}
    headers = {"Idempotency-Key": "8e03978e"}
    first, again = (client.post("/v1/events", json=body, headers=headers) for _ in range(2))
    assert first.status_code == again.status_code == 202
    assert first.json() == again.json() == {"accepted": 2, "unknown_items": 1}
    assert "idempotency-replayed" not in first.headers
    assert again.headers["idempotency-replayed"] == "true"
    assert client.get("/v1/users/twice").json()["total"] == 2
    other = client.post("/v1/events", json={"events": body["events"][:1]}, headers=headers)
    assert other.status_code == 422
    assert "the key '8e03978e' came with other events before" in other.json()["detail"]
    assert client.post("/v1/events", json=body).status_code == 202  # without a key every delivery is a new one
    assert client.get("/v1/users/twice").json()["total"] == 4
    for key in ("", "k" * 256):
        wrong = client.post("/v1/events", json=body, headers={"Idempotency-Key": key})
        assert wrong.status_code == 422, wrong.text
        assert "Idempotency-Key" in wrong.text


def test_an_erased_user_of_the_data_stays_hidden(client: TestClient) -> None:
    assert client.get("/v1/users/149").status_code == 200
    assert client.delete("/v1/users/149").status_code == 204
    for answer in (client.get("/v1/users/149"), client.post("/v1/recommend", json={"user_id": "149"})):
        assert answer.status_code == 404
    assert "149" not in client.get("/v1/users?limit=1000").json()["users"]


def test_nothing_known_of_a_user_is_said_so(client: TestClient) -> None:
    answer = ask(client, history={"items": []}, k=4, stages=True, explain=True, diversity=0.2)
    assert answer["fallback"] == "popularity"
    assert answer["known_events"] == 0
    assert answer["retrieved"] == []
    assert {row["retriever_score"] for row in answer["items"]} == {None}
    assert client.post("/v1/events", json={"events": [{"user_id": "zoë", "item_id": "nowhere"}]}).status_code == 202
    assert ask(client, user_id="zoë")["fallback"] == "popularity"


def test_answers_are_logged_as_impressions(client: TestClient, newest: int, tmp_path: Path) -> None:
    answer = client.post(
        "/v1/recommend", json={"user_id": "20", "request_time": newest, "k": 4}, headers={"X-Request-ID": "my-request"}
    )
    assert answer.headers["x-request-id"] == answer.json()["request_id"] == "my-request"
    batch = ask(client, "recommend/batch", requests=[{"user_id": "21", "k": 2}])["responses"][0]
    event = {"user_id": "20", "item_id": ids_of(answer.json())[1], "request_id": "my-request", "action": "click"}
    assert client.post("/v1/events", json={"events": [event]}).status_code == 202
    service = client.app.state.service  # type: ignore[attr-defined]
    service.store.flush()
    recsys("export-log", "--store", service.settings.store_path, "--output", tmp_path / "log")
    shown = pl.read_parquet(tmp_path / "log" / "impressions.parquet")
    mine = shown.filter(pl.col("request_id") == "my-request")
    assert mine["item_id"].to_list() == ids_of(answer.json())
    assert shown.filter(pl.col("request_id") == batch["request_id"])["item_id"].to_list() == ids_of(batch)
    kept = pl.read_parquet(tmp_path / "log" / "events.parquet").filter(pl.col("request_id") == "my-request")
    assert kept["item_id"].to_list() == [event["item_id"]]


def test_every_stage_has_its_time(client: TestClient, newest: int) -> None:
    answer = client.post("/v1/recommend", json={"user_id": "22", "request_time": newest})
    parts = dict(part.split(";dur=") for part in answer.headers["server-timing"].split(", "))
    assert list(parts) == ["queue", "encode", "search", "signals", "rank", "total"]
    assert sum(map(float, list(parts.values())[:-1])) <= float(parts["total"]) + 0.1


def test_what_is_served_is_told(client: TestClient, first: TestClient, informed: Run) -> None:
    info = client.get("/v1/info").json()
    assert info["stages"] == ["retriever", "ranker"]
    assert info["items"] == 120
    assert info["request_time"] == "target"
    assert info["bundle"]["hash"] == ask(client, user_id="1", k=1)["bundle"]
    genres = next(feature for feature in info["features"] if feature["name"] == "genres")
    assert genres["kind"] == "multi"
    assert "Drama" in genres["values"]
    assert str(informed.folder) not in json.dumps(info)
    assert first.get("/v1/info").json()["stages"] == ["retriever"]
    assert client.get("/healthz").json() == {"status": "alive"}
    assert client.get("/readyz").json()["status"] == "ready"
    assert 'recsys_requests_total{method="POST",route="/v1/recommend",status="200"}' in client.get("/metrics").text


def test_the_examples_of_the_documentation_are_answered(client: TestClient, catalogue: pl.DataFrame) -> None:
    """With ids of this catalogue in the place of theirs."""
    spec = client.get("/openapi.json").json()
    ids, tried = catalogue["item_id"].to_list(), 0
    for path, methods in spec["paths"].items():
        body = methods.get("post", {}).get("requestBody")
        if body is None:
            continue
        name = body["content"]["application/json"]["schema"]["$ref"].rpartition("/")[2]
        for example in spec["components"]["schemas"][name]["examples"]:
            text = json.dumps(example)
            for old, new in zip(("12", "7", "30"), ids, strict=False):
                text = text.replace(f'"{old}"', json.dumps(new))
            answer = client.post(path, json=json.loads(text))
            assert answer.status_code in (200, 202), (path, answer.text)
            tried += 1
    assert tried >= 6


def test_items_are_looked_up_by_id(client: TestClient, catalogue: pl.DataFrame) -> None:
    ids, titles = catalogue["item_id"].cast(pl.String).to_list(), catalogue["title"].to_list()
    found = client.get("/v1/items", params={"item_id": [ids[7], "nowhere", ids[3], ids[7]]}).json()
    assert found["total"] == 2
    assert {item["item_id"]: item["title"] for item in found["items"]} == {ids[3]: titles[3], ids[7]: titles[7]}
    word = titles[3].split()[0]
    both = client.get("/v1/items", params={"item_id": [ids[3], ids[7]], "q": word}).json()
    assert ids[3] in [item["item_id"] for item in both["items"]]
    assert client.get("/v1/items", params={"item_id": "nowhere"}).json() == {"total": 0, "items": []}
