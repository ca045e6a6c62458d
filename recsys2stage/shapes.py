"""The alphabet of shapes, used by every module, and the types that cross module borders.

B batch, L history, D width, H heads, K width of a head, V items (tables have V + 1 rows: row 0 is padding),
M answered places, U distinct items, C candidates, F numeric features, P values of a feature, N buckets of a relative
bias or negatives of a place, R newest events that a scorer looks at, S numbers of signals.

Histories are left-aligned: the oldest event first, padding at the end, with explicit lengths.
"""

from dataclasses import dataclass
from typing import Literal, NamedTuple

from jaxtyping import Float, Int
from torch import Tensor

Similarity = Literal["cosine", "dot"]  # of a query and an item
Items = Int[Tensor, "B L"]  # item numbers, 0 after the end of the history
Times = Int[Tensor, "B L"]  # seconds
Ratings = Float[Tensor, "B L"]  # as in the log; 0 after the end
Actions = Int[Tensor, "B L"]  # kinds of events, numbered from 1; 0 is unknown
Lengths = Int[Tensor, " B"]
Embedded = Float[Tensor, "B L D"]
Heads = Float[Tensor, "B H L K"]


class History(NamedTuple):
    """What users did before a request, and what is known of each place's request and of the users.

    `request` at place i is the moment at which the event after place i is asked for, or, where an event is hidden and
    asked for in its own place, that place's own; None when the model is not told. `asked` is, in the same way, the kind
    of action that is asked for.
    """

    items: Items
    lengths: Lengths
    times: Times
    request: Times | None
    ratings: Ratings | None = None
    actions: Actions | None = None
    target_action: Actions | None = None
    user: tuple[Tensor, ...] | None = None  # (B, P) values of each declared user feature, in order; None: not known

    def take(self, rows: slice) -> "History":
        """Some of the users."""
        some = {name: field[rows] for name, field in self._asdict().items() if isinstance(field, Tensor)}
        return self._replace(**some, user=None if self.user is None else tuple(values[rows] for values in self.user))


class CandidateBatch(NamedTuple):
    """Candidates of B requests, and what the second stage is told of each request. Places without one hold item 0."""

    state: Float[Tensor, "B D"]  # query vectors of the users
    items: Int[Tensor, "B C"]
    score: Float[Tensor, "B C"]  # the retriever's: product of the user's query and the item's vector
    rank: Int[Tensor, "B C"]  # the retriever's, from 1
    signals: Float[Tensor, "B C S"]
    recent: Int[Tensor, "B R"]  # the newest items of the history, newest first, 0 past the first event
    ages: Float[Tensor, "B R"]  # log(1 + seconds from each of them to the request), 0 where there is none


@dataclass(frozen=True)
class Shape:
    """Sizes an encoder hands to its position and time encodings."""

    dim: int
    max_length: int
    heads: int = 1
    layers: int = 1
    causal: bool = True  # whether a place sees only itself and what came before

    def __post_init__(self) -> None:
        if self.dim % self.heads:
            raise ValueError(f"dim {self.dim} is not a multiple of heads {self.heads}; change one of them")
