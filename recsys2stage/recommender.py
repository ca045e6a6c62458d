"""The served recommender: both stages loaded from one folder, without training data or Lightning.

recommender = Recommender.load("runs/ml-1m/bundle")
recommender.recommend(["1193", "661", "914"], k=10)
"""

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from recsys2stage import columns as c
from recsys2stage.data.batches import Ragged
from recsys2stage.data.dataset import Dataset
from recsys2stage.data.ids import none_known
from recsys2stage.data.request_inputs import encode_users, request_seconds
from recsys2stage.options import Seen, check_option
from recsys2stage.ranking.beyond import Recommendations as Recommendations
from recsys2stage.ranking.beyond import RetrievedItems as RetrievedItems
from recsys2stage.ranking.bundle import SPEC, check_split, read_bundle
from recsys2stage.ranking.histories import Events, as_list, pad_events, parse_events
from recsys2stage.ranking.stages import NO_TARGET_ACTION as NO_TARGET_ACTION
from recsys2stage.ranking.stages import Stages
from recsys2stage.retrieval.inputs import check_inputs

logger = logging.getLogger("recsys2stage")


class Recommender(Stages):
    """Recommends items to users given by their raw histories; arguments as in `Stages`."""

    @classmethod
    def load(cls, path: str | Path, trust: Sequence[str] | str | None = ()) -> "Recommender":
        """Loads a bundle (both stages) or an index folder (the first stage alone).

        Every file is checked against its checksum in the manifest. No code that the folder contains or names is run,
        except from the modules in `trust`.

        Args:
            path: folder written by export-bundle or export-index.
            trust: modules outside this package whose classes the folder may name, such as "my_signals".

        Raises:
            ValueError: if the folder is damaged, has another format, or names classes of other modules.
        """
        recommender = cls(**read_bundle(path, trust))
        numbers, reranker = len(recommender.signal_names), recommender.reranker
        if reranker is not None and numbers != len(reranker.signal_mean):
            raise ValueError(
                f"{path} has {numbers} signal values but its ranker reads {len(reranker.signal_mean)}; export both "
                "stages of one run: recsys export-bundle"
            )
        return recommender

    def recommend(
        self,
        history: Sequence[Any],
        k: int = 10,
        times: Sequence[int] | None = None,
        request_time: int | None = None,
        exclude: Sequence[Any] = (),
        ratings: Sequence[float | int | None] | None = None,
        actions: Sequence[str | None] | None = None,
        action: str | None = None,
        user: Mapping[str, Any] | None = None,
        seen: Seen | None = None,
        allow: Sequence[Any] | None = None,
    ) -> list[dict[str, Any]]:
        """The k best items for one user, best first.

        Without a history, or, with a warning, if the model knows none of its items, the most popular items are
        recommended: their score is the number of training events, and their retriever_score is None.

        Args:
            history: item ids as in the raw data, oldest first. Unknown ids are skipped.
            k: number of items; all items that may be recommended if there are fewer.
            times: whole seconds since 1970 of each event, ascending; required if the model reads times.
            request_time: seconds of the request, no earlier than the newest event, for models with request time; None:
                now or, with a warning, the newest event's time if that lies in the future.
            exclude: further item ids not to recommend.
            ratings: of each event, None where missing; read by models with a rating input.
            actions: action type of each event, None where missing; read by models with an action input.
            action: target action, for models with one; None: the one named by the model's next_action, else unknown.
            user: user features by declared name, such as {"gender": "F", "age": 25}: a class, a list of classes or a
                number; read by models with a user tower or the signal Demographics. Missing features are unknown.
                Classes not in the training data are unknown, too, with a warning.
            seen: keep or filter seen items; None: keep if the data were prepared with repeats: keep, else filter.
            allow: ids of the only items that may be recommended; None: all.

        Returns:
            One {"item_id", "title" (if available), "score", "rank", "retriever_score"} per item.

        Raises:
            ValueError: for arguments of another type or outside their range.
        """
        k, seen = self.list_length(k), self.seen_rule(seen)
        events = parse_events(self.catalogue, history, times, ratings, actions, self.newest_time, self.reads_actions)
        if user is not None:
            if not isinstance(user, Mapping):
                raise ValueError(f'user is {user!r}, expected features by name, such as {{"age": 25}}')
            events = events._replace(user=encode_users(self.user_features, [user], "user"))
        if self.needs_times and times is None and len(events.items):
            raise ValueError(
                f"times are missing: {self.time_readers}; pass times: seconds since 1970, one for each item"
            )
        if len(events.items) and not len(events.known):
            logger.warning(
                "%s; expected ids such as %r; the most popular items are recommended, without a retriever score",
                *(none_known(as_list("history", history, "item ids"), " of the history"), self.example_id),
            )
        request = self.request_seconds(request_time, events.newest)
        padded = pad_events([events], self.towers.max_length, "ratings" in self.input_fields, self.reads_actions)
        excluded = self.excluded_items(events, seen, as_list("exclude", exclude, "item ids"))
        target_action = None if action is None else np.array([self.target_action_number(action)])
        one = Ragged(excluded, np.array([0, len(excluded)]))
        allowed = None if allow is None else self.allowed_items(as_list("allow", allow, "item ids"))
        ranking = self.rank(padded, one, np.array([request]), k, target_action, allowed)
        return self.catalogue.rows(ranking)[0]

    @property
    def example_id(self) -> str:
        """An item id that the model knows, for messages."""
        return str(self.catalogue.items[c.ITEM_ID][0])

    def request_seconds(self, request_time: int | None, newest: int) -> int:
        """Request time in seconds: as given, else now or the newest event's time if that lies in the future.

        Args:
            request_time: as given.
            newest: seconds of the newest event of the history.
        """
        return request_seconds(request_time, newest, self.newest_time, self.has_time, self.request_time == "target")

    def excluded_items(self, events: Events, seen: Seen, exclude: Sequence[Any] = ()) -> np.ndarray:
        """Numbers of the items not to recommend: seen ones, if they are filtered, and those excluded by id."""
        others = self.catalogue.numbers(exclude)
        return np.unique(np.concatenate([events.known if seen == "filter" else others[:0], others[others > 0]]))

    def allowed_items(self, allow: Sequence[Any]) -> np.ndarray:
        """The mask of items that are allowed by id, (V,) bool."""
        numbers = self.catalogue.numbers(allow)
        if len(allow) and not numbers.any():
            raise ValueError(f"{none_known(allow, ' of allow')}; expected ids such as {self.example_id!r}")
        allowed = np.zeros(len(self.vectors), dtype=bool)
        allowed[numbers] = True
        return allowed[1:]

    def seen_rule(self, seen: Seen | None) -> Seen:
        """The rule of a request, keep or filter seen items: as given, else as the data were prepared."""
        if seen is not None:
            check_option("seen", seen, Seen)
        return seen or self.seen

    def target_action_number(self, name: str) -> int:
        """The number of a target action, from its name."""
        if self.next_action == "none":
            raise ValueError(NO_TARGET_ACTION)
        if name not in self.actions:
            raise ValueError(f"the target action is {name!r}, expected one of {', '.join(self.actions)}")
        return 1 + self.actions.index(name)

    def check(self, dataset: Dataset) -> None:
        """Raises ValueError if the dataset lacks inputs that the model reads or has other user features or actions."""
        check_inputs(self.towers.inputs, dataset, self.next_action)
        ours, theirs = (
            [tuple(feature[part] for part in SPEC) for feature in features]
            for features in (self.user_features, dataset.manifest["features"]["users"])
        )
        if self.reads_user and ours != theirs:
            raise ValueError(
                f"the model reads the user features (name, kind, classes) {ours}, but {dataset.path} has {theirs}; use "
                "the data it was trained on"
            )
        if self.reads_actions and dataset.action_names != self.actions:
            raise ValueError(
                f"the model was trained with the actions {', '.join(self.actions)}, but {dataset.path} has "
                f"{', '.join(dataset.action_names)}; use the data it was trained on"
            )


def load_recommender(dataset: Dataset, folder: Path) -> Recommender:
    """Loads a bundle or index and checks that it was made from this dataset and its split."""
    check_split(dataset, folder)
    recommender = Recommender.load(folder)
    recommender.check(dataset)
    return recommender
