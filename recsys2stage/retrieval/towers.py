"""The two-tower model: histories to query vectors, items to item vectors; a score is their inner product."""

import functools
from collections.abc import Hashable, Iterator, Sequence
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from recsys2stage.columns import MASK, PAD
from recsys2stage.options import MAX_LENGTH, MAX_WIDTH, check_integer, check_option
from recsys2stage.retrieval.encoders import EncoderFactory
from recsys2stage.retrieval.encoders.base import Memory, declares, is_inference
from recsys2stage.retrieval.encoders.layers import use_cpu_blocks
from recsys2stage.retrieval.inputs import InputFactory
from recsys2stage.retrieval.items import ItemsFactory, ItemTable
from recsys2stage.retrieval.states import Continuable, UserStates
from recsys2stage.retrieval.users import UserFactory
from recsys2stage.shapes import Embedded, History, Lengths, Similarity, Times

TOWERS = "towers.pt"  # file of their weights in an exported folder
POSITIONS = 256  # of histories that are computed together on a CPU: their intermediate results stay in cache


class TwoTower(nn.Module, Continuable):
    """A sequence encoder over histories, and an item table shared by histories and candidates.

    Args:
        num_items: V.
        max_length: maximum history length L.
        dim: width D.
        encoder: called with (dim, max_length).
        items: called with (num_items, dim, features).
        tied: whether histories and candidates share one item table; otherwise candidates have their own.
        item_bias: whether each item has a learned bias, added to its score: one more dimension, 1 in every query.
        similarity: score of query and item: cosine or dot product.
        inputs: event inputs added to the item embeddings, each called with (dim, actions); None: none.
        user: tower of user features, called with (dim, user_features); None: user features are ignored.
        features: declared item features.
        user_features: declared user features.
        actions: action types.
    """

    def __init__(
        self,
        num_items: int,
        max_length: int,
        dim: int,
        encoder: EncoderFactory,
        items: ItemsFactory = ItemTable,
        tied: bool = True,
        item_bias: bool = False,
        similarity: Similarity = "cosine",
        inputs: Sequence[InputFactory] | None = None,
        user: UserFactory | None = None,
        features: Sequence[dict[str, Any]] | None = None,
        user_features: Sequence[dict[str, Any]] | None = None,
        actions: Sequence[str] | None = None,
    ) -> None:
        super().__init__()
        check_option("similarity", similarity, Similarity)
        check_integer("dim", dim, 1, MAX_WIDTH, example=64)
        check_integer("max_length", max_length, 1, MAX_LENGTH, example=200)
        self.max_length, self.similarity = max_length, similarity
        self.items = items(num_items, dim, features or ())
        self.untied = None if tied else items(num_items, dim, features or ())
        self.bias = nn.Embedding(num_items + 1, 1, padding_idx=PAD) if item_bias else None
        self.inputs = nn.ModuleList(make(dim, actions or ()) for make in inputs or ())
        self.user = None if user is None else user(dim, user_features or ())
        self.encoder = encoder(dim, max_length + (self.user is not None and self.user.token))
        self.mask = None if self.encoder.causal else nn.Parameter(0.02 * torch.randn(dim))  # embedding of masked events
        if self.bias is not None:
            nn.init.zeros_(self.bias.weight)

    def forward(self, history: History) -> Float[Tensor, "B L D"]:
        """States at every position; `query_vectors` turns them into queries."""
        states: Tensor = self.encoder(*self.encoder_inputs(history))
        return states[:, self.tokens :]

    @property
    def tokens(self) -> int:
        """The number of positions of the encoder before the first event: 1 with a user token, else 0."""
        return int(self.user is not None and self.user.token)

    def encoder_inputs(self, history: History, later: bool = False) -> tuple[Embedded, Lengths, Times, Times | None]:
        """The arguments of the encoder.

        Args:
            history: B histories.
            later: whether these are only later events of longer histories, so that there is no user token.
        """
        x = self.items(history.items.clamp(min=PAD))
        if self.mask is not None:
            x = torch.where((history.items == MASK)[..., None], self.mask.to(x.dtype), x)
        for add in self.inputs:
            x = add(x, history)
        if self.user is None:
            return x, history.lengths, history.times, history.request
        user = self.user(history.user, x.size(0))
        x = self.user.condition(x, user)
        if later or not self.user.token:
            return x, history.lengths, history.times, history.request
        x = torch.cat([user[:, None].to(x.dtype), x], dim=1)  # the user is the first token
        return x, history.lengths + 1, *self.encoder_times(history)

    def encoder_times(self, history: History) -> tuple[Times, Times | None]:
        """Seconds and request time of each position of the encoder; a user token has the time of the first event."""
        times, request, first = history.times, history.request, history.times[:, :1]
        if not self.tokens:
            return times, request
        return torch.cat([first, times], dim=1), None if request is None else torch.cat([first, request], dim=1)

    def query_vectors(self, states: Float[Tensor, "*S D"]) -> Float[Tensor, "*S E"]:
        """Query vectors of states, of width E = D; with item biases, E = D + 1 and the last element is 1."""
        query = unit(states) if self.similarity == "cosine" else full_precision(states)
        return query if self.bias is None else F.pad(query, (0, 1), value=1.0)

    def queries(
        self,
        history: History,
        states: UserStates | None = None,
        users: Sequence[Hashable | None] | None = None,
    ) -> Float[Tensor, "B E"]:
        """Query vector at the newest position of each history; for an empty history, the state of padding.

        Args:
            history: B histories, newest `max_length` events at most.
            states: what was computed of the users' earlier events; only the events after it are computed, and it is
                kept for the next call. The result is that without states, to rounding. None: computes all events.
            users: with states, the user of each history; None for one that is not kept. Any history may be given for
                a user: what is kept is used as far as both are equal.
        """
        if self.mask is not None:
            history = append_masked_event(history)
        if self.training or not is_inference(history.items):
            last = (history.lengths - 1).clamp(min=0)
            return self.query_vectors(self(history)[torch.arange(last.size(0), device=last.device), last])
        if states is None:
            return self.query_vectors(self.newest_states(history))
        return self.query_vectors(states.newest_states(self, history, users or [None] * len(history.lengths)))

    @functools.cached_property
    def extends(self) -> bool:
        """Whether states of users can be kept: the encoder is causal, and all parts take new events alone."""
        user = self.user is None or declares(type(self.user), "local", "condition")
        return self.encoder.extends and user and all(declares(type(add), "local", "forward") for add in self.inputs)

    def newest_states(self, history: History, keep: list[Memory] | None = None) -> Float[Tensor, "B D"]:
        """States at the newest position of each history.

        Args:
            history: B histories, with a masked event if the encoder is bidirectional.
            keep: gets the memory of each history, as in `Encoder.newest`.
        """
        parts, order = list[Tensor](), list[int]()
        kept: list[Memory] | None = None if keep is None else []
        for rows, part in alike(history):
            parts.append(self.encoder.newest(*self.encoder_inputs(part), keep=kept))
            order += rows
        if len(parts) == 1 and order == sorted(order):
            if keep is not None:
                keep += kept or []
            return parts[0]
        places = torch.tensor(order, device=history.lengths.device).argsort()
        if keep is not None and kept is not None:
            keep += [kept[place] for place in places.tolist()]
        return torch.cat(parts)[places]

    def item_vectors(self, items: Int[Tensor, " U"]) -> Float[Tensor, "U E"]:
        """Item vectors; the inner product with a query is the score. With item biases, the last element is the bias."""
        vectors = (self.untied or self.items)(items)
        vectors = unit(vectors) if self.similarity == "cosine" else full_precision(vectors)
        return vectors if self.bias is None else torch.cat([vectors, self.bias(items).to(vectors.dtype)], dim=-1)

    def all_item_vectors(self) -> Float[Tensor, "V E"]:
        """Vectors of items 1..V."""
        return self.item_vectors(torch.arange(1, self.items.num_items + 1, device=self.items.table.weight.device))

    def load_item_tables(
        self, features: Sequence[dict[str, Any]], user_features: Sequence[dict[str, Any]], trained: Tensor
    ) -> None:
        """Loads item and user features and which items are cold, once, before training.

        Args:
            features: declared item features with their arrays.
            user_features: declared user features with their arrays.
            trained: (V + 1,) bool, True for items with training events.
        """
        for table in (self.items, self.untied):
            if table is not None:
                table.load_item_tables(features, trained)
        if self.user is not None:
            self.user.load_user_features(user_features)


def alike(history: History) -> Iterator[tuple[list[int], History]]:
    """Splits a batch for computation: on a CPU, histories of similar lengths, few enough to stay in cache.

    Returns:
        The rows of each part, and their histories without common padding.
    """
    count, length = history.items.shape
    if not use_cpu_blocks(history.items):
        yield list(range(count)), history
        return
    lengths = history.lengths.clamp(min=1)
    if count == 1:
        yield [0], history if int(lengths[0]) == length else history.select(None, int(lengths[0]))
        return
    sizes, order = (part.tolist() for part in lengths.sort(descending=True, stable=True))
    start = 0
    while start < count:
        rows = order[start : start + max(1, POSITIONS // sizes[start])]
        yield rows, history.select(torch.tensor(rows, device=lengths.device), sizes[start])
        start += len(rows)


def append_masked_event(history: History) -> History:
    """Appends a masked event, at the request time or, without request time, at the time of the newest event.

    The request time and target action of every position are then those of its own event, as bidirectional encoders
    expect.
    """
    items, lengths, times, request = history[:4]
    rows, last = torch.arange(lengths.size(0), device=lengths.device), (lengths - 1).clamp(min=0)
    seconds = (times if request is None else request)[rows, last]
    items, times = F.pad(items, (0, 1)), F.pad(times, (0, 1))
    items[rows, lengths], times[rows, lengths] = MASK, seconds
    ratings = None if history.ratings is None else F.pad(history.ratings, (0, 1))
    actions = None if history.actions is None else F.pad(history.actions, (0, 1))
    target_action = None
    if history.target_action is not None:
        target_action = F.pad(history.target_action, (1, 0))  # at position i it was the action of event i + 1
        if actions is not None:
            target_action[:, 0] = actions[:, 0]
    return History(
        items, lengths + 1, times, None if request is None else times, ratings, actions, target_action, history.user
    )


def unit(x: Tensor) -> Tensor:
    """L2-normalized along the last axis, at full precision even under bf16 autocast."""
    x = full_precision(x)
    return x / torch.linalg.vector_norm(x, dim=-1, keepdim=True).clamp_min(1e-6)


def full_precision(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()
