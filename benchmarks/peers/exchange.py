"""What a peer is given of a prepared dataset, and the ranks by what it gives back; runs here, not where RecTools is."""

import numpy as np
import torch

from recsys2stage.data.batches import in_chunks, spans
from recsys2stage.data.dataset import Dataset
from recsys2stage.metrics import compute_rank


def export(dataset: Dataset) -> dict[str, np.ndarray]:
    """What a peer may know: events by user and in order, and requests without their answers.

    Returns:
        train_user, train_item, train_time and train_held: training events and each user's first validation event,
            which `train_held` marks;
        history_user, history_item, history_time: all events before each user's test target;
        request_user, request_time: who asks, and when.
    """
    users = dataset.users("test")
    held = np.zeros(dataset.num_users, dtype=np.int64)
    held[dataset.users("val")] = 1
    found = {
        "train": spans(dataset.offsets[:-1], dataset.train_ends + held),
        "history": spans(dataset.offsets[users], dataset.ends(users, "test")),
    }
    owners = {"train": np.arange(dataset.num_users), "history": users}
    events = {"request_user": users, "request_time": dataset.request_times(users, "test")}
    for name, places in found.items():
        events[f"{name}_user"] = owners[name][places.rows]
        events[f"{name}_item"] = dataset.items[places.values].astype(np.int64)
        events[f"{name}_time"] = np.asarray(dataset.times[places.values])
    events["train_held"] = found["train"].values >= dataset.train_ends[events["train_user"]]
    return events


def ranks(dataset: Dataset, vectors: dict[str, np.ndarray], batch_size: int = 256) -> np.ndarray:
    """Rank of each user's test target by dot products, (B,) int64, in the order of `dataset.users("test")`.

    Args:
        vectors: users (n,) and user_vectors (n, D), items (m,) and item_vectors (m, D). Items that are left out score
            −∞; to users that are left out all do.
        batch_size: users scored at a time.
    """
    users = dataset.users("test")
    row = np.full(dataset.num_users, -1)
    row[vectors["users"]] = np.arange(len(vectors["users"]))
    items, columns = torch.from_numpy(vectors["item_vectors"]), torch.from_numpy(vectors["items"] - 1)
    found = []
    for part in in_chunks(len(users), batch_size):
        batch = users[part]
        scores = torch.full((len(batch), dataset.num_items), -torch.inf)
        scores[:, columns] = torch.from_numpy(vectors["user_vectors"][row[batch]]) @ items.T
        scores[torch.from_numpy(row[batch] < 0)] = -torch.inf
        known = dataset.known(batch, "test")
        scores[known.rows, known.values - 1] = -torch.inf
        found.append(compute_rank(scores, torch.from_numpy(dataset.targets(batch, "test") - 1)).numpy())
    return np.concatenate(found)
