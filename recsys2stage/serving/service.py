"""What a worker serves with: the engine, the users' histories, the store, and the queue in front of the engine."""

import asyncio
import json
import time
from collections.abc import Mapping, Sequence
from typing import Any

from fastapi import Request
from fastapi.responses import Response

from recsys2stage import __version__
from recsys2stage.columns import YEAR_2100
from recsys2stage.retrieval.states import UserStates
from recsys2stage.serving.batching import Batcher
from recsys2stage.serving.deliveries import Delivery
from recsys2stage.serving.engine import Computed, Engine, Result
from recsys2stage.serving.histories import Histories, UserEvents
from recsys2stage.serving.monitoring import Metrics
from recsys2stage.serving.packed import load_known_users
from recsys2stage.serving.problems import Problem, problem_body, request_id_of, shorten, wrong
from recsys2stage.serving.schemas import NewEvent, RecommendRequest
from recsys2stage.serving.settings import Settings
from recsys2stage.serving.store import Event, Store

DAY = 86_400
ENCODER = json.JSONEncoder(allow_nan=False, separators=(",", ":"))  # made once: json.dumps makes one at each call


class Service:
    """Everything that the routes use.

    Args:
        settings: how to serve.
        metrics: where batches, stages and caches are counted.
    """

    def __init__(self, settings: Settings, metrics: Metrics) -> None:
        self.settings, self.metrics = settings, metrics
        self.engine = Engine.load(settings.bundle, settings.trust)
        self.engine.warm()
        if settings.cached_states:
            self.engine.states = UserStates(settings.cached_states << 20)
        model = self.engine.recommender
        known = load_known_users(settings.bundle, settings.data)
        self.store = Store(settings.store_path)
        self.histories = Histories(self.store, known, model.catalogue, model.has_time, settings.cached_events)
        self.batcher = Batcher(self.compute, settings.batch_size, settings.queue, metrics.observe_batch)
        metrics.watch("queue_length", lambda: self.batcher.waiting)
        metrics.watch("cached_users", lambda: self.histories.cached_users)
        metrics.watch("cached_events", lambda: self.histories.cached_events)
        states = self.engine.states
        if states is not None:
            metrics.watch("cached_states", lambda: len(states))
            metrics.watch("cached_states_bytes", lambda: states.nbytes)
        metrics.watch("impressions_waiting", lambda: self.store.pending)
        self.info = self._info()

    def close(self) -> None:
        """Answers what waits, and writes what is to be kept."""
        self.batcher.close()
        self.store.close()

    def compute(self, bodies: Sequence[Computed], waited: Sequence[float]) -> list[Result | Problem]:
        """Answers a batch of requests, in the thread of the queue."""
        histories: list[UserEvents | None] = []
        for body in bodies:
            user_id = getattr(body, "user_id", None)
            histories.append(None if user_id is None else self.histories.events(user_id))
            if user_id is not None and histories[-1] is None and self.engine.states is not None:
                self.engine.states.forget(user_id)  # erased, perhaps by another worker
        results = self.engine.compute(bodies, histories)
        if self.engine.states is not None:
            self.metrics.observe_states(self.engine.states.take_outcomes())
        return [
            result._replace(stages={"queue": seconds, **result.stages}) if isinstance(result, Result) else result
            for result, seconds in zip(results, waited, strict=True)
        ]

    def erase(self, user_id: str) -> None:
        """Erases what the service has of a user, and hides the user of the prepared data for good."""
        self.histories.delete(user_id)
        if self.engine.states is not None:
            self.engine.states.forget(user_id)

    async def answer(self, request: Request, body: Computed) -> Response:
        """The answer to one request, logged as an impression, with the time of each stage in its header."""
        start = time.perf_counter()
        self.check_limits(body)
        (result,) = await self.batcher.submit(body)
        if isinstance(result, Exception):
            raise result
        content = self.finish(result, request_id_of(request))
        stages = result.stages | {"total": time.perf_counter() - start}
        timing = ", ".join(f"{name};dur={1e3 * seconds:.2f}" for name, seconds in stages.items())
        return json_response(content, {"Server-Timing": timing})

    async def answer_all(self, request: Request, bodies: Sequence[RecommendRequest]) -> Response:
        """The answers to several requests, each with an id of its own; a problem in the place of one that is wrong."""
        results: list[Any] = [None] * len(bodies)
        for place, body in enumerate(bodies):
            try:
                self.check_limits(body)
            except Problem as problem:
                results[place] = problem
        places = [place for place, result in enumerate(results) if result is None]
        if places:
            for place, result in zip(places, await self.batcher.submit(*(bodies[p] for p in places)), strict=True):
                results[place] = result
        responses = []
        for place, result in enumerate(results):
            request_id = f"{request_id_of(request)}.{place}"
            if isinstance(result, Problem):
                responses.append(result.body(request_id))
            elif isinstance(result, Exception):
                detail = f"the request could not be computed; the log names the cause under {request_id}"
                responses.append(problem_body(500, "internal", detail, request_id))
            else:
                responses.append(self.finish(result, request_id))
        return json_response({"responses": responses})

    def finish(self, result: Result, request_id: str) -> dict[str, Any]:
        """Completes an answer, and logs it as an impression."""
        self.metrics.observe_stages(result.stages)
        items = result.fields["items"]
        kept = self.store.log_impression(
            request_id,
            self.engine.identity,
            result.fields.get("user_id"),
            [row["item_id"] for row in items],
            [row["rank"] for row in items],
            time.time(),
        )
        self.metrics.impressions.labels("queued" if kept else "dropped").inc()
        return {"request_id": request_id, **result.fields}

    def check_limits(self, body: Any) -> None:
        """Raises a Problem for a request that is larger than the settings allow."""
        most, longest = self.settings.max_k, self.settings.max_list
        reach = getattr(body, "k", 0) + getattr(body, "offset", 0)
        if reach > most:
            raise wrong("k", body.k, f"k and offset are {reach:,} together, expected at most {most:,}; ask for fewer")
        lists = {name: getattr(body, name, None) for name in ("exclude", "allow", "shown", "items")}
        history = getattr(body, "history", None)
        lists["history.items"] = None if history is None else history.items
        for name, condition in getattr(body, "filters", {}).items():
            for kind in ("any", "all", "none"):
                lists[f"filters.{name}.{kind}"] = getattr(condition, kind)
        for name, entries in lists.items():
            if entries is not None and len(entries) > longest:
                hint = "send the newest" if name == "history.items" else "send fewer"
                detail = f"the list has {len(entries):,} entries, expected at most {longest:,}; {hint}"
                raise wrong(name, len(entries), detail)

    def check_count(self, name: str, entries: Sequence[Any]) -> None:
        """Raises a Problem for a body with more requests or events than the settings allow."""
        if len(entries) > self.settings.max_batch:
            detail = f"the list has {len(entries):,} entries, expected at most {self.settings.max_batch:,}"
            raise wrong(name, len(entries), f"{detail}; send several bodies")

    async def keep_events(self, events: Sequence[NewEvent], key: str | None = None) -> tuple[dict[str, int], bool]:
        """Keeps events; returns once they are on disk.

        Args:
            events: as sent.
            key: of the delivery: if the same events came before under the same key, they are not kept again.

        Returns:
            The answer, and whether the events had come before.
        """
        now, model = int(time.time()), self.engine.recommender
        latest = min(max(now, model.newest_time or 0) + DAY, YEAR_2100)
        for place, event in enumerate(events):
            if event.time is not None and event.time > latest:
                raise wrong(
                    f"events.{place}.time",
                    event.time,
                    f"{event.time} lies in the future, expected at most {latest}; send seconds since 1970",
                )
        rows = [
            Event(
                event.user_id,
                event.item_id,
                now if event.time is None else event.time,
                event.rating,
                event.action,
                event.request_id,
            )
            for event in events
        ]
        unknown = int((model.catalogue.numbers([event.item_id for event in events]) == 0).sum())
        delivery = None if key is None else Delivery(key, json.dumps([event.model_dump() for event in events]))
        await asyncio.wrap_future(self.store.submit(rows, delivery))
        repeated = delivery is not None and delivery.outcome == "repeated"
        if delivery is not None and delivery.outcome == "other":
            raise wrong(
                "Idempotency-Key",
                key,
                f"the key {shorten(key)} came with other events before, expected a new key for each delivery; send "
                "them with another key",
            )
        if not repeated:
            self.metrics.events.inc(len(rows))
        return {"accepted": len(rows), "unknown_items": unknown}, repeated

    def user_page(self, user_id: str, limit: int, offset: int) -> dict[str, Any]:
        """A page of a user's events, newest first."""
        events = self.histories.events(user_id)
        if events is None:
            raise Problem(
                404,
                "unknown-user",
                f"user_id {shorten(user_id)} is not known, expected a user of the data or of earlier events; "
                "/v1/users lists some",
                "user_id",
                user_id,
            )
        model, features, count = self.engine.recommender, self.engine.features, len(events)
        rows = []
        for place in range(count - 1 - offset, max(count - 1 - offset - limit, -1), -1):
            item = int(events.items[place])
            stored = events.stored is not None and bool(events.stored[place])
            rating = 0.0 if events.ratings is None else float(events.ratings[place])
            action = 0 if events.actions is None else int(events.actions[place])
            rows.append(
                {
                    "item_id": features.ids[item - 1] if item else events.unknown_ids.get(place, ""),
                    "title": features.titles[item - 1] if item else None,
                    "time": int(events.times[place]) if model.has_time else None,
                    "rating": rating or None,
                    "action": model.actions[action - 1] if action else None,
                    "source": "store" if stored else "data",
                }
            )
        return {"user_id": user_id, "events": rows, "total": count}

    def _info(self) -> dict[str, Any]:
        engine, model = self.engine, self.engine.recommender
        return {
            "name": "recsys2stage",
            "version": __version__,
            "bundle": {
                "hash": engine.identity,
                "created": engine.facts.get("created"),
                "path": engine.facts.get("path"),
            },
            "items": engine.features.count,
            "stages": ["retriever"] + (["ranker"] if model.reranker is not None else []),
            "candidates": model.num_candidates,
            "max_length": model.towers.max_length,
            "request_time": model.request_time,
            "needs_times": model.needs_times,
            "next_action": model.next_action,
            "actions": model.actions,
            "features": engine.features.describe(),
            "user_features": [
                {"name": spec["name"], "kind": spec["kind"], "values": spec["classes"]} for spec in model.user_features
            ],
            "has_time": model.has_time,
            "newest_time": model.newest_time,
            "protocol": {"seen": model.seen, "request_time": model.request_time, "next_action": model.next_action},
            "metrics": engine.facts.get("metrics"),
            "limits": self.settings.limits,
        }


def json_response(content: Mapping[str, Any], headers: Mapping[str, str] | None = None, status: int = 200) -> Response:
    """A JSON response in ASCII, so that it can hold any text."""
    return Response(ENCODER.encode(content), status, dict(headers or {}), "application/json")
