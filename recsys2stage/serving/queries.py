"""Requests against a bundle: ids, features and actions are numbered and checked."""

import time
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from recsys2stage.data.ids import none_known
from recsys2stage.data.request_inputs import class_code, encode_users
from recsys2stage.ranking.histories import Events, parse_events
from recsys2stage.recommender import Recommender
from recsys2stage.serving.filters import ItemFeatures
from recsys2stage.serving.histories import UserEvents
from recsys2stage.serving.problems import Problem, nearest, shorten, wrong
from recsys2stage.serving.schemas import RankRequest, RecommendRequest, Selection, UserPart


class Query(NamedTuple):
    """A request, resolved against the bundle."""

    body: RecommendRequest | RankRequest
    events: Events
    request_time: int
    excluded: np.ndarray  # item numbers, ascending
    allowed: np.ndarray | None  # (V,) bool
    target_action: int | None
    given: np.ndarray  # numbers of the items to rank; empty for a search
    shown: np.ndarray  # item numbers

    @property
    def need(self) -> int:
        """Length of the list that is computed."""
        return 1 if isinstance(self.body, RankRequest) else self.body.k + self.body.offset


class Resolver:
    """Resolves requests.

    Args:
        model: the recommender.
        features: the catalogue with its declared features.
    """

    def __init__(self, model: Recommender, features: ItemFeatures) -> None:
        self.model, self.features = model, features

    def resolve(self, body: RecommendRequest | RankRequest, known: UserEvents | None) -> Query:
        """Numbers and checks what a request names.

        Raises:
            Problem: for a user, action, feature or class that the bundle does not know.
        """
        model = self.model
        events = self._events(body, known)
        request_time = self._request_time(body, events)
        target_action = None
        if body.action is not None:
            if model.next_action == "none":
                raise wrong(
                    "action",
                    body.action,
                    f"{shorten(body.action)} is given to a model without target action; leave it out",
                )
            if body.action not in model.actions:
                raise wrong(
                    "action",
                    body.action,
                    f"there is no action {shorten(body.action)}; {nearest(body.action, model.actions)}",
                )
            target_action = model.target_action_number(body.action)
        none = np.zeros(0, dtype=np.int64)
        if isinstance(body, RankRequest):
            given = model.catalogue.numbers(list(dict.fromkeys(body.items)))
            if not given.any():
                raise wrong("items", body.items[0], self._none_known("items", body.items))
            excluded = model.excluded_items(events, model.seen)
            return Query(body, events, request_time, excluded, None, target_action, given[given > 0], none)
        shown = model.catalogue.numbers(body.shown)
        excluded = model.excluded_items(events, model.seen_rule(body.seen), [*body.exclude, *body.shown])
        return Query(body, events, request_time, excluded, self.allowed(body), target_action, none, shown[shown > 0])

    def _events(self, body: UserPart, known: UserEvents | None) -> Events:
        model = self.model
        if body.history is None:
            if known is None:
                raise Problem(
                    404,
                    "unknown-user",
                    f"user_id {shorten(body.user_id)} is not known, expected a user of the data or of earlier events; "
                    "send a history instead",
                    "user_id",
                    body.user_id,
                )
            return Events(known.items, known.times, known.ratings, known.actions, known.user)
        history = body.history
        if history.items and model.needs_times and history.times is None:
            detail = f"is missing: {model.time_readers}; send seconds since 1970, one for each item"
            raise Problem(422, "wrong-value", f"history.times {detail}", "history.times")
        if model.reads_actions:
            for place, name in enumerate(history.actions or []):
                if name is not None and name not in model.actions:
                    detail = f"there is no action {shorten(name)}; {nearest(name, model.actions, 'null is unknown')}"
                    raise wrong(f"history.actions.{place}", name, detail)
        try:
            events = parse_events(
                model.catalogue,
                history.items,
                history.times,
                history.ratings,
                history.actions,
                model.newest_time,
                model.reads_actions,
            )
        except ValueError as error:
            raise wrong("history", None, str(error)) from error
        if history.items and not len(events.known):
            raise wrong("history.items", history.items[0], self._none_known("history.items", history.items))
        if body.user is not None:
            self._check_classes(body.user)
            try:
                events = events._replace(user=encode_users(model.user_features, [body.user], "user"))
            except (ValueError, TypeError, OverflowError) as error:
                raise wrong("user", body.user, f"{error}; correct it or leave it out") from error
        return events

    def _check_classes(self, user: Mapping[str, Any]) -> None:
        """Raises a Problem for a class of a user feature that the training data do not have."""
        for spec in self.model.user_features:
            value, classes = user.get(spec["name"]), spec["classes"]
            if classes is None or value is None:
                continue
            codes = {name: code for code, name in enumerate(classes, start=1)}
            for one in value if isinstance(value, list) else [value]:
                if one is not None and not class_code(one.strip() if isinstance(one, str) else one, codes):
                    step = f"{nearest(str(one)[:100], classes)} Null: unknown"
                    raise wrong(f"user.{spec['name']}", one, f"{spec['name']} has no class {shorten(one)}; {step}")

    def _none_known(self, field: str, ids: Sequence[str]) -> str:
        return f"{none_known(ids, '')}, expected ids such as {self.model.example_id!r}; search /v1/items"

    def _request_time(self, body: UserPart, events: Events) -> int:
        newest = events.newest
        if body.request_time is None:
            return max(int(time.time()), newest)
        try:
            return self.model.request_seconds(body.request_time, newest)
        except ValueError as error:
            raise wrong("request_time", body.request_time, str(error)) from error

    def allowed(self, body: Selection) -> np.ndarray | None:
        """The mask of items that may be recommended, (V,) bool; None: all."""
        mask = self.features.mask(body.filters)
        if body.allow is None:
            return mask
        try:
            allowed = self.model.allowed_items(body.allow)
        except ValueError:
            raise wrong("allow", body.allow[0], self._none_known("allow", body.allow)) from None
        return allowed if mask is None else allowed & mask
