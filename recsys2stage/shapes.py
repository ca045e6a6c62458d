"""Shape notation of all modules, and the tensor types they share.

B batch, L history, D width, H heads, K width of a head, V items (tables have V + 1 rows: row 0 is padding),
M target positions, U distinct items, C candidates, F numeric features, P values of a feature, N buckets of a relative
bias or negatives per position, R newest events that a scorer reads, S signal features.

Histories are left-aligned: the oldest event first, padding at the end, with explicit lengths.
"""

from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from jaxtyping import Float, Int
from torch import Tensor

from recsys2stage.options import MAX_LAYERS, MAX_LENGTH, MAX_WIDTH, check_integer

Similarity = Literal["cosine", "dot"]  # of a query vector and an item vector
Items = Int[Tensor, "B L"]  # item numbers, 0 after the end of the history
Times = Int[Tensor, "B L"]  # seconds
Ratings = Float[Tensor, "B L"]  # as in the log; 0 after the end
Actions = Int[Tensor, "B L"]  # action types, numbered from 1; 0 is unknown
Lengths = Int[Tensor, " B"]
Embedded = Float[Tensor, "B L D"]
Rows = Float[Tensor, "B T D"]  # T of the positions of embedded events
Heads = Float[Tensor, "B H L K"]


class History(NamedTuple):
    """Event histories of users, the request at each position, and the users' features.

    `request` at position i is the request time of the target at i: the next event or, in masked-item prediction, the
    masked event itself. None: the model does not read the request time. `target_action` is the action type of the same
    target; None: the model does not read it.
    """

    items: Items
    lengths: Lengths
    times: Times
    request: Times | None
    ratings: Ratings | None = None
    actions: Actions | None = None
    target_action: Actions | None = None
    user: tuple[Tensor, ...] | None = None  # (B, P) values of each declared user feature, in order; None: unknown

    def take(self, rows: slice) -> "History":
        """Selects users."""
        fields = {name: field[rows] for name, field in self._asdict().items() if isinstance(field, Tensor)}
        return self._replace(**fields, user=None if self.user is None else tuple(values[rows] for values in self.user))

    def select(self, rows: Tensor | None, length: int) -> "History":
        """Selects users by their numbers (None: all), and the first `length` positions."""
        own = self if rows is None else History(*(_at(field, rows) for field in self))
        return own._cut(slice(length))

    def newest(self, count: int) -> "History":
        """The last `count` positions, of histories without padding."""
        return self._cut(slice(-count, None))._replace(lengths=self.lengths.clamp(max=count))

    def _cut(self, positions: slice) -> "History":
        """Selects positions, and leaves the lengths as they are."""
        request, ratings, actions, target_action = (
            None if field is None else field[:, positions]
            for field in (self.request, self.ratings, self.actions, self.target_action)
        )
        return self._replace(
            items=self.items[:, positions],
            times=self.times[:, positions],
            request=request,
            ratings=ratings,
            actions=actions,
            target_action=target_action,
        )


def _at(field: Any, rows: Tensor) -> Any:
    if isinstance(field, tuple):
        return tuple(values[rows] for values in field)
    return None if field is None else field[rows]


class CandidateBatch(NamedTuple):
    """Candidates of B requests and the ranker's inputs. Columns without a candidate hold item 0."""

    state: Float[Tensor, "B D"]  # query vectors of the users
    items: Int[Tensor, "B C"]
    score: Float[Tensor, "B C"]  # the retriever's: product of the user's query and the item's vector
    rank: Int[Tensor, "B C"]  # the retriever's, from 1
    signals: Float[Tensor, "B C S"]
    recent: Int[Tensor, "B R"]  # the newest items of the history, newest first, padded with 0
    ages: Float[Tensor, "B R"]  # log(1 + seconds from each of them to the request), padded with 0


@dataclass(frozen=True)
class Shape:
    """Sizes that an encoder passes to its position and time encodings."""

    dim: int
    max_length: int
    heads: int = 1
    layers: int = 1
    causal: bool = True  # whether a position sees only itself and earlier positions

    def __post_init__(self) -> None:
        check_integer("dim", self.dim, 1, MAX_WIDTH, example=64)
        check_integer("max_length", self.max_length, 1, MAX_LENGTH + 2, example=200)  # with masked event and user
        check_integer("heads", self.heads, 1, self.dim, example=2)
        check_integer("layers", self.layers, 1, MAX_LAYERS, example=2)
        if self.dim % self.heads:
            raise ValueError(f"dim {self.dim} is not a multiple of heads {self.heads}; change one of them")
