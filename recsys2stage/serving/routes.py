"""The routes of the service, with their documentation for OpenAPI."""

import asyncio
from collections.abc import Sequence
from typing import Annotated, Any

from fastapi import APIRouter, Header, Query, Request
from fastapi.responses import Response

from recsys2stage.serving.deliveries import MAX_KEY
from recsys2stage.serving.problems import nearest, wrong
from recsys2stage.serving.schemas import (
    MAX_ID,
    Accepted,
    BatchAnswer,
    BatchRequest,
    EventsRequest,
    ItemsAnswer,
    ProblemDetails,
    Ranked,
    RankRequest,
    Recommended,
    RecommendRequest,
    SimilarAnswer,
    SimilarRequest,
    UserAnswer,
    UsersAnswer,
)
from recsys2stage.serving.service import Service, json_response

Limit = Annotated[int, Query(ge=1, le=1_000, description="Most entries of the page.")]
Key = Annotated[
    str | None,
    Header(
        alias="Idempotency-Key",
        min_length=1,
        max_length=MAX_KEY,
        description="Of this delivery, such as a UUID: remembered for a day.",
    ),
]
Offset = Annotated[int, Query(ge=0, le=1_000_000_000, description="Number of entries to skip.")]

PROBLEM = {"model": ProblemDetails, "content": {"application/problem+json": {}}}
WRONG: dict[int | str, dict[str, Any]] = {
    400: PROBLEM | {"description": "The body is no JSON."},
    401: PROBLEM | {"description": "No valid API key."},
    413: PROBLEM | {"description": "The body is too large."},
    422: PROBLEM | {"description": "A value is wrong: which, what is expected, and the next step."},
}
COMPUTED: dict[int | str, dict[str, Any]] = WRONG | {
    404: PROBLEM | {"description": "The user or item is not known."},
    429: PROBLEM | {"description": "Too many requests wait; see Retry-After."},
    504: PROBLEM | {"description": "The request took too long."},
}

router = APIRouter()


def service_of(request: Request) -> Service:
    """What the application serves with."""
    return request.app.state.service


def check_query(request: Request, names: Sequence[str]) -> None:
    """Raises a Problem for a parameter that a route does not have."""
    for name, value in request.query_params.multi_items():
        if name not in names:
            raise wrong(name, value, f"there is no parameter {name!r}; {nearest(name, names)}")


@router.post("/v1/recommend", response_model=Recommended, responses=COMPUTED, tags=["recommendations"])
async def recommend(body: RecommendRequest, request: Request) -> Response:
    """Recommend items to a known user, or to a history."""
    return await service_of(request).answer(request, body)


@router.post("/v1/recommend/batch", response_model=BatchAnswer, responses=COMPUTED, tags=["recommendations"])
async def recommend_batch(body: BatchRequest, request: Request) -> Response:
    """Answer several requests together; the n-th has the request id ID.n."""
    service = service_of(request)
    service.check_count("requests", body.requests)
    return await service.answer_all(request, body.requests)


@router.post("/v1/rank", response_model=Ranked, responses=COMPUTED, tags=["recommendations"])
async def rank(body: RankRequest, request: Request) -> Response:
    """Rank these candidates, as if the retriever had found them. Seen ones are ranked, too."""
    return await service_of(request).answer(request, body)


@router.post("/v1/similar", response_model=SimilarAnswer, responses=COMPUTED, tags=["recommendations"])
async def similar(body: SimilarRequest, request: Request) -> Response:
    """Find items like one, by the retriever's vectors."""
    return await service_of(request).answer(request, body)


@router.post("/v1/events", response_model=Accepted, status_code=202, responses=WRONG, tags=["users"])
async def keep_events(body: EventsRequest, request: Request, idempotency_key: Key = None) -> Response:
    """Keep events. They are on disk before the answer is sent, and known to the next request of their users.

    A delivery that comes again under the same key is answered the same and kept once.
    """
    service = service_of(request)
    service.check_count("events", body.events)
    answer, repeated = await service.keep_events(body.events, idempotency_key)
    return json_response(answer, {"Idempotency-Replayed": "true"} if repeated else None, status=202)


@router.get("/v1/items", response_model=ItemsAnswer, responses=WRONG, tags=["catalogue"])
async def items(
    request: Request,
    q: Annotated[str, Query(max_length=MAX_ID, description="Words that the title must contain, in any case.")] = "",
    limit: Limit = 20,
    offset: Offset = 0,
    item_id: Annotated[
        list[str] | None, Query(max_length=1_000, description="Only these; unknown ones are skipped.")
    ] = None,
) -> Response:
    """Search items by title and features, the most popular first.

    Further parameters are item features: a class (several: all of them), or a number or range such as 10..20.
    """
    engine, own = service_of(request).engine, ("q", "limit", "offset", "item_id")
    features, named = engine.features, [name for name in request.query_params if name not in own]
    check_query(request, [*own, *(name for name in features.kinds if name not in own)])
    conditions = {name: features.condition(name, request.query_params.getlist(name)) for name in named}
    among = None if item_id is None else engine.recommender.catalogue.numbers(item_id)
    total, found = await asyncio.to_thread(features.search, q, conditions, limit, offset, among)
    return json_response({"total": total, "items": found})


@router.get("/v1/users", response_model=UsersAnswer, responses=WRONG, tags=["users"])
async def users(request: Request, limit: Limit = 20, offset: Offset = 0) -> Response:
    """List known users: those of the data, then those with new events only."""
    check_query(request, ["limit", "offset"])
    total, found = await asyncio.to_thread(service_of(request).histories.users, limit, offset)
    return json_response({"total": total, "users": found})


@router.get("/v1/users/{user_id:path}", response_model=UserAnswer, responses=COMPUTED, tags=["users"])
async def user(user_id: str, request: Request, limit: Limit = 100, offset: Offset = 0) -> Response:
    """The events of a user, newest first."""
    check_query(request, ["limit", "offset"])
    return json_response(await asyncio.to_thread(service_of(request).user_page, user_id, limit, offset))


@router.delete("/v1/users/{user_id:path}", status_code=204, responses=WRONG, tags=["users"])
async def erase(user_id: str, request: Request) -> Response:
    """Erase every stored event and impression of a user, and hide a user of the data for good."""
    if not 1 <= len(user_id) <= MAX_ID:
        raise wrong("user_id", user_id, f"the id has {len(user_id)} characters, expected 1 to {MAX_ID}; correct it")
    await asyncio.to_thread(service_of(request).erase, user_id)
    return Response(status_code=204)


@router.get("/v1/info", tags=["service"])
async def info(request: Request) -> Response:
    """The bundle, its protocol and metrics, the item features that filters read, and the limits of requests."""
    return json_response(service_of(request).info)


@router.get("/healthz", tags=["service"])
async def healthz() -> Response:
    """Whether the process lives."""
    return json_response({"status": "alive"})


@router.get("/readyz", tags=["service"])
async def readyz(request: Request) -> Response:
    """Whether the bundle is loaded and warmed."""
    service_of(request)
    return json_response({"status": "ready"})  # no more: probes need no key


@router.get("/metrics", tags=["service"])
async def metrics(request: Request) -> Response:
    """Metrics in the text format of Prometheus."""
    content, kind = await asyncio.to_thread(request.app.state.metrics.render)
    return Response(content, media_type=kind)
