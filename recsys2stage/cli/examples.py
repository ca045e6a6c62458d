"""Examples of recommendations in text: a user's newest events, and the first items with their rank in both stages."""

from collections.abc import Callable

import numpy as np

from recsys2stage import columns as c
from recsys2stage.data.batches import Padded
from recsys2stage.data.catalogue import Catalogue
from recsys2stage.ranking.beyond import Recommendations

EVENTS, ITEMS = 5, 5  # of each user


def examples(
    user_ids: np.ndarray, catalogue: Catalogue, count: int, rank: Callable[[slice, int], tuple[Padded, Recommendations]]
) -> list[str]:
    """Text of the newest events and the first recommendations of some users, evenly spaced among all.

    Args:
        user_ids: (U,) ids of all users.
        catalogue: item ids and titles.
        count: number of users.
        rank: histories and lists of a slice of the users, and of a length.
    """
    names = catalogue.items[c.TITLE if c.TITLE in catalogue.items.columns else c.ITEM_ID].to_list()
    ids = catalogue.items[c.ITEM_ID].to_list()

    def name(item: int) -> str:
        return str(ids[item - 1] if names[item - 1] is None else names[item - 1])

    lines: list[str] = []
    for user in np.unique(np.linspace(0, len(user_ids) - 1, count).astype(np.int64)).tolist():
        history, ranking = rank(slice(user, user + 1), len(ids))  # all items, for the retriever's order
        newest = history.items[0, : history.lengths[0]][-EVENTS:]
        events = "; ".join(name(item) for item in newest.tolist()) or "no known events"
        lines += ["", f"user {user_ids[user]}, newest events last: {events}", "  rank  retriever's rank  item"]
        scores, found = ranking.retriever_score[0], ranking.items[0]
        for place, item in enumerate(found[:ITEMS].tolist()):
            if item > 0:
                first = np.isnan(scores[place])  # no history: the most popular items
                theirs = "-" if first else f"{1 + int((scores[found > 0] > scores[place]).sum()):,}"
                lines.append(f"{place + 1:6}  {theirs:>16}  {name(item)}")
    return lines
