"""Export of a dataset to a peer library, and ranks from its vectors; runs in the environment of this package."""

import numpy as np
import torch

from recsys2stage.data.batches import in_chunks, spans
from recsys2stage.data.dataset import Dataset
from recsys2stage.metrics import compute_rank


def check_one_target(dataset: Dataset) -> None:
    """Exits for a split with several targets per user, of which only the first would be measured."""
    if dataset.listed_targets is not None:
        raise SystemExit(
            f"{dataset.path} has the split {dataset.protocol['split']} with several targets per user, expected one; "
            "prepare it with LeaveOneOut or GlobalTime"
        )


def export(dataset: Dataset) -> dict[str, np.ndarray]:
    """Exports events, by user in chronological order, and test requests without their targets.

    Returns:
        train_user, train_item, train_time and train_held: training events and each user's first validation event,
            where `train_held` is true;
        history_user, history_item, history_time: all events before each user's test target;
        request_user, request_time: user and time of each test request.
    """
    check_one_target(dataset)
    users = dataset.users("test")
    held = np.zeros(dataset.num_users, dtype=np.int64)
    held[dataset.users("val")] = 1
    ranges = {
        "train": spans(dataset.offsets[:-1], dataset.train_ends + held),
        "history": spans(dataset.offsets[users], dataset.ends(users, "test")),
    }
    owners = {"train": np.arange(dataset.num_users), "history": users}
    events = {"request_user": users, "request_time": dataset.request_times(users, "test")}
    for name, rows in ranges.items():
        events[f"{name}_user"] = owners[name][rows.rows]
        events[f"{name}_item"] = dataset.items[rows.values].astype(np.int64)
        events[f"{name}_time"] = np.asarray(dataset.times[rows.values])
    events["train_held"] = ranges["train"].values >= dataset.train_ends[events["train_user"]]
    return events


def ranks(dataset: Dataset, vectors: dict[str, np.ndarray], batch_size: int = 256) -> np.ndarray:
    """Rank of each user's test target by dot products, (B,) int64, in the order of `dataset.users("test")`.

    Args:
        vectors: users (n,) and user_vectors (n, D), items (m,) and item_vectors (m, D). Missing items score −∞, and so
            do all items of missing users.
        batch_size: users per batch.
    """
    check_one_target(dataset)
    users = dataset.users("test")
    row = np.full(dataset.num_users, -1)
    row[vectors["users"]] = np.arange(len(vectors["users"]))
    items, columns = torch.from_numpy(vectors["item_vectors"]), torch.from_numpy(vectors["items"] - 1)
    parts = []
    for part in in_chunks(len(users), batch_size):
        batch = users[part]
        scores = torch.full((len(batch), dataset.num_items), -torch.inf)
        scores[:, columns] = torch.from_numpy(vectors["user_vectors"][row[batch]]) @ items.T
        scores[torch.from_numpy(row[batch] < 0)] = -torch.inf
        seen = dataset.filtered_items(batch, "test")
        scores[seen.rows, seen.values - 1] = -torch.inf
        parts.append(compute_rank(scores, torch.from_numpy(dataset.targets(batch, "test") - 1)).numpy())
    return np.concatenate(parts)
