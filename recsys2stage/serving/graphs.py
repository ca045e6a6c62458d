"""Both stages as modules of plain tensors, for export: their inputs by name, and random values of these.

B batch, L history, C candidates, E width of query and item vectors, S signal values, R newest events.
"""

import copy
from abc import ABC, abstractmethod
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from recsys2stage import columns as c
from recsys2stage.data.batches import Padded
from recsys2stage.ranking.average import Average, SecondStage
from recsys2stage.ranking.reranker import Reranker
from recsys2stage.recommender import Recommender
from recsys2stage.retrieval.encoders.mamba4rec import Mamba2
from recsys2stage.retrieval.inputs import fields_read
from recsys2stage.retrieval.towers import TwoTower
from recsys2stage.shapes import CandidateBatch, History

BATCH, LENGTH, CANDIDATES = "batch", "length", "candidates"  # axes of any size
USER = "user."  # prefix of the inputs of user features
MAX_GAP = 24  # log2 of the longest random time between two events: 194 days

Values = dict[str, np.ndarray]  # of the inputs, by name


class Port(NamedTuple):
    """An input or output of a graph; an axis is a name (any size) or a number."""

    name: str
    dtype: torch.dtype
    axes: tuple[str | int, ...]

    def as_json(self) -> dict[str, Any]:
        return {"name": self.name, "type": str(self.dtype).removeprefix("torch."), "shape": list(self.axes)}


class Graph(nn.Module, ABC):
    """One stage as a function of tensors, in the order of `inputs`, and the same stage of the recommender itself."""

    name: str
    title: str  # for messages
    free: str  # the axis besides the batch that has any size
    longest: int | None  # its maximum; None: none
    inputs: list[Port]
    output: Port

    @abstractmethod
    def forward(self, *values: Tensor) -> Tensor: ...

    @abstractmethod
    def random(self, batch: int, size: int, seed: int) -> Values:
        """Random values of all inputs, for a batch and a size of the free axis."""

    @abstractmethod
    def reference(self, values: Values) -> np.ndarray:
        """The output as the recommender computes it."""

    def named(self, values: tuple[Tensor, ...]) -> dict[str, Tensor]:
        return {port.name: value for port, value in zip(self.inputs, values, strict=True)}


class FixedVectors(nn.Module):
    """Vectors of all items, computed once: a lookup instead of a tower.

    Args:
        vectors: (V + 1, D), row 0 is padding.
    """

    vectors: Tensor

    def __init__(self, vectors: Tensor) -> None:
        super().__init__()
        self.register_buffer("vectors", vectors.detach().clone())

    def forward(self, items: Tensor) -> Tensor:
        return F.embedding(items, self.vectors)


class RetrieverGraph(Graph):
    """Query vectors of histories, (B, E): the newest events of each user, oldest first, padded with 0 at the end.

    Inputs are those that the model may read: items, lengths, times (seconds), request_time, ratings, actions and
    target_action (numbers from 1, 0 is unknown) and a `user.NAME` for each user feature.

    Args:
        recommender: the exported one.
    """

    name, free = "retriever", LENGTH

    def __init__(self, recommender: Recommender) -> None:
        super().__init__()
        self.stages = (recommender,)  # in a tuple: only the copy of its towers is a submodule
        self.towers, self.longest = exportable_towers(recommender.towers), recommender.towers.max_length
        self.title = f"the retriever ({type(recommender.towers.encoder).__name__})"
        self.request_time, events = recommender.request_time, (BATCH, LENGTH)
        fields, timed = fields_read(recommender.towers.inputs), recommender.towers.encoder.reads_times
        reads_actions = bool(fields & {"actions", "target_action"})
        inputs = [
            (True, Port("items", torch.int64, events)),
            (True, Port("lengths", torch.int64, (BATCH,))),
            (timed, Port("times", torch.int64, events)),
            (timed and self.request_time == "target", Port("request_time", torch.int64, (BATCH,))),
            ("ratings" in fields, Port("ratings", torch.float32, events)),
            (reads_actions, Port("actions", torch.int64, events)),
            (recommender.next_action != "none", Port("target_action", torch.int64, (BATCH,))),
        ]
        self.inputs = [port for read, port in inputs if read]
        self.features = recommender.user_features if recommender.towers.user is not None else []
        for feature in self.features:
            dtype = torch.float32 if feature["kind"] == "numeric" else torch.int64  # classes, 0 is unknown
            self.inputs.append(Port(f"{USER}{feature['name']}", dtype, (BATCH, int(feature["values"]))))
        self.output = Port("queries", torch.float32, (BATCH, recommender.vectors.shape[1]))

    def forward(self, *values: Tensor) -> Tensor:
        given = self.named(values)
        items, lengths = given["items"], given["lengths"]
        times, request, target_action = given.get("times", torch.zeros_like(items)), None, None
        last = torch.arange(items.size(1), device=items.device) == (lengths - 1).clamp(min=0)[:, None]
        if self.request_time == "last_event":
            request = times
        elif "request_time" in given:
            request = shifted(times, last, given["request_time"])
        if "target_action" in given:
            target_action = shifted(given["actions"], last, given["target_action"])
        user = tuple(given[f"{USER}{feature['name']}"] for feature in self.features) or None
        history = History(items, lengths, times, request, given.get("ratings"), given.get("actions"), target_action)
        return self.towers.queries(history._replace(user=user))

    def random(self, batch: int, size: int, seed: int) -> Values:
        rng, (recommender,) = np.random.default_rng(seed), self.stages
        lengths = rng.integers(1, size + 1, batch)
        lengths[0] = size
        real = np.arange(size) < lengths[:, None]
        # gaps of all magnitudes, half of them at the bounds of log2 buckets, and some of 0
        gaps = np.where(rng.random((batch, size + 1)) < 0.5, 2.0 ** (MAX_GAP * rng.random((batch, size + 1))), 0)
        gaps = np.where(gaps == 0, 2 ** rng.integers(0, MAX_GAP, (batch, size + 1)) - 1, gaps).astype(np.int64)
        seconds = (recommender.newest_time or 0) + gaps.cumsum(1)
        rows, newest = np.arange(batch), lengths - 1
        actions = rng.integers(0, len(recommender.actions) + 1, (batch, size + 1))
        values: Values = {
            "items": np.where(real, rng.integers(1, len(recommender.vectors), (batch, size)), c.PAD),
            "lengths": lengths,
            "times": np.where(real, seconds[:, :-1], 0),
            "request_time": seconds[rows, newest + 1],
            "ratings": np.where(real, rng.integers(0, 11, (batch, size)) / 2, 0).astype(np.float32),
            "actions": np.where(real, actions[:, :-1], c.UNKNOWN),
            "target_action": actions[rows, newest + 1],
        }
        for feature in self.features:
            shape = (batch, int(feature["values"]))
            numbers = np.where(rng.random(shape) < 0.8, 100 * rng.random(shape), np.nan).astype(np.float32)
            classes = rng.integers(0, max(1, int(feature["size"])), shape)  # 0 is unknown
            values[f"{USER}{feature['name']}"] = numbers if feature["kind"] == "numeric" else classes
        return {port.name: values[port.name] for port in self.inputs}

    def reference(self, values: Values) -> np.ndarray:
        user = tuple(values[f"{USER}{feature['name']}"] for feature in self.features) or None
        times = values.get("times", np.zeros_like(values["items"]))
        padded = Padded(values["items"], times, values["lengths"], values.get("ratings"), values.get("actions"), user)
        return self.stages[0].queries(padded, values.get("request_time"), values.get("target_action"))


class RankerGraph(Graph):
    """Scores of candidates, (B, C), −inf where the item is 0: the inputs are the fields of a `CandidateBatch`.

    Args:
        recommender: the exported one, with a second stage.
    """

    name, free, longest = "ranker", CANDIDATES, None

    def __init__(self, recommender: Recommender) -> None:
        super().__init__()
        assert recommender.reranker is not None
        self.stages = (recommender,)
        members = rankers(recommender.reranker)
        self.title = f"the ranker ({', '.join(type(member.scorer).__name__ for member in members)})"
        self.reranker = exportable_reranker(recommender.reranker)
        self.widths = {"state": recommender.vectors.shape[1], "signals": len(recommender.signal_names)}
        lists, newest = (BATCH, CANDIDATES), (BATCH, recommender.recent)
        inputs = [
            Port("state", torch.float32, (BATCH, self.widths["state"])),
            Port("items", torch.int64, lists),
            Port("score", torch.float32, lists),
            Port("rank", torch.int64, lists),
            Port("signals", torch.float32, (*lists, self.widths["signals"])),
            Port("recent", torch.int64, newest),
            Port("ages", torch.float32, newest),
        ]
        self.inputs = [port for port in inputs if port.axes[-1] != 0]  # without signals, or without newest events
        self.output = Port("scores", torch.float32, lists)

    def forward(self, *values: Tensor) -> Tensor:
        batch = self.batch(self.named(values))
        real = batch.items != c.PAD
        return self.reranker(batch, torch.zeros_like(real)).masked_fill(~real, -torch.inf)

    def batch(self, given: dict[str, Tensor]) -> CandidateBatch:
        """The candidates; inputs of width 0 are added."""
        rows, candidates = given["items"].shape
        empty = {"signals": (rows, candidates, 0), "recent": (rows, 0), "ages": (rows, 0)}
        fields = {name: given["state"].new_zeros(shape) for name, shape in empty.items() if name not in given}
        if "recent" in fields:
            fields["recent"] = fields["recent"].long()
        return CandidateBatch(**given, **fields)

    def random(self, batch: int, size: int, seed: int) -> Values:
        rng, (recommender,) = np.random.default_rng(seed), self.stages
        count, recent = len(recommender.vectors), recommender.recent
        queries = recommender.vectors[rng.integers(1, count, batch)]  # as long as queries are, whatever the similarity
        items = rng.integers(1, count, (batch, size))
        items[1:, rng.integers(0, size) :] = c.PAD  # lists of different lengths
        score = np.einsum("be,bce->bc", queries, recommender.vectors[items]).astype(np.float32)
        newest = np.where(rng.random((batch, recent)) < 0.8, rng.integers(1, count, (batch, recent)), c.PAD)
        values = {
            "state": queries,
            "items": items,
            "score": np.where(items > 0, score, np.float32(0)),
            "rank": np.broadcast_to(np.arange(1, size + 1), items.shape).copy(),
            "signals": 3 * rng.standard_normal((batch, size, self.widths["signals"]), dtype=np.float32),
            "recent": newest,
            "ages": np.where(newest > 0, 20 * rng.random((batch, recent), dtype=np.float32), np.float32(0)),
        }
        return {port.name: values[port.name] for port in self.inputs}

    def reference(self, values: Values) -> np.ndarray:
        return self.stages[0].rerank(self.batch({name: torch.from_numpy(value) for name, value in values.items()}))


def exportable_towers(towers: TwoTower) -> TwoTower:
    """A copy that computes the same query vectors by operations whose shapes do not depend on values or on chunks."""
    twin = copy.deepcopy(towers).eval()
    with torch.no_grad():
        every = towers.items.every()
        twin.items = FixedVectors(torch.cat([torch.zeros_like(every[:1]), every]))  # type: ignore[assignment]
    twin.untied = None
    for module in twin.modules():
        if isinstance(module, Mamba2):
            module.chunk = None
    return twin


def rankers(second: SecondStage) -> list[Reranker]:
    """The rankers of an average, or the only one."""
    return list(second.members) if isinstance(second, Average) else [second]


def exportable_reranker(reranker: SecondStage) -> SecondStage:
    """A copy that looks up the encoded features of items, computed once for all of them, however many there are."""
    twin = copy.deepcopy(reranker).eval()
    for member in rankers(twin):
        if member.features is not None:
            with torch.no_grad():
                member.encoded = member.features(torch.arange(len(member.vectors)))
    return twin


def shifted(values: Tensor, last: Tensor, newest: Tensor) -> Tensor:
    """The value of the next position, and `newest` at the last one, as `batches.shift_left` of arrays.

    Args:
        values: (B, L).
        last: (B, L) True at the last position of each row.
        newest: (B,).
    """
    length = values.size(1)
    following = torch.arange(1, length + 1, device=values.device).clamp(max=length - 1)  # a slice would rule out L = 1
    return torch.where(last, newest[:, None], values[:, following])
