"""States of users: what a causal encoder computed of their events, kept for the next request.

Every position but the newest is final: the next event is known, so its time and action, which the position's state
reads as request time and target action, will not change. A state holds what the encoder keeps of the final positions
(`KeysValues` or `Recurrence`) and all that it was computed from. A request uses it as far as the history at hand is
equal to that, and computes the rest, so a late event, an erased one or another action cannot leave a stale state. The
newest position is computed at every request, as it depends on the request time.
"""

import threading
from abc import ABC, abstractmethod
from collections import Counter, OrderedDict
from collections.abc import Hashable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from recsys2stage.options import check_integer
from recsys2stage.retrieval.encoders.base import Encoder, Memory
from recsys2stage.shapes import Embedded, History, Lengths, Times

OUTCOMES = {
    "hit": "all that is kept of the user was used",
    "changed": "earlier events of the user changed, and are computed again from there",
    "window": "the history fills the model's longest and has moved on, so all positions changed",
    "miss": "nothing is kept of the user",
    "anonymous": "the history has no user",
    "unsupported": "the encoder sees both sides, or a part of it cannot take new events alone",
}
FIELDS = ("items", "times", "request", "target_action", "actions", "ratings")  # of an event, that a state may depend on
OVERHEAD = 2_000  # bytes of a state besides its arrays, roughly
LONGEST = 64  # events that are computed after a state; more are computed with the whole history, which is as quick


class Continuable(ABC):
    """What states need of a model; `TwoTower` is one."""

    encoder: Encoder
    max_length: int

    @property
    @abstractmethod
    def extends(self) -> bool:
        """Whether states of users can be kept: the encoder is causal, and all parts take new events alone."""

    @property
    @abstractmethod
    def tokens(self) -> int:
        """The number of positions of the encoder before the first event: 1 with a user token, else 0."""

    @abstractmethod
    def encoder_inputs(self, history: History, later: bool = False) -> tuple[Embedded, Lengths, Times, Times | None]:
        """The arguments of the encoder.

        Args:
            history: B histories.
            later: whether these are only later events of longer histories, so that there is no user token.
        """

    @abstractmethod
    def encoder_times(self, history: History) -> tuple[Times, Times | None]:
        """Seconds and request time of each position of the encoder; a user token has the time of the first event."""

    @abstractmethod
    def newest_states(self, history: History, keep: list[Memory] | None = None) -> Float[Tensor, "B D"]:
        """States at the newest position of each history.

        Args:
            history: B histories, with a masked event if the encoder is bidirectional.
            keep: gets the memory of each history, as in `Encoder.newest`.
        """


class State(NamedTuple):
    """The final positions of one user's history."""

    memory: Memory
    inputs: np.ndarray  # (FIELDS, P) int64, what they were computed from; 0 for a field that is missing
    user: tuple[bytes, ...]  # the user's features

    @property
    def nbytes(self) -> int:
        return self.memory.nbytes + self.inputs.nbytes + OVERHEAD


class UserStates:
    """States of the users that were asked for last, up to a number of bytes; pass it to `TwoTower.queries`.

    Use one for each model: its states fit no other weights. One thread computes with it; others may forget users.

    Args:
        max_bytes: maximum memory of all states, bytes; the least recently used state is removed first.
    """

    def __init__(self, max_bytes: int) -> None:
        check_integer("max_bytes", max_bytes, 0, 1 << 50, example=1 << 28)
        self.max_bytes, self.nbytes = max_bytes, 0
        self.outcomes: Counter[str] = Counter()  # histories by the names of OUTCOMES
        self._states: OrderedDict[Hashable, State] = OrderedDict()
        self._forgotten: set[Hashable] = set()  # since the last call, whose histories may be older
        self._lock = threading.Lock()

    def __len__(self) -> int:
        """The number of users."""
        return len(self._states)

    def forget(self, user: Hashable) -> None:
        """Drops what is kept of a user."""
        with self._lock:
            self._forgotten.add(user)
            self._remove(user)

    def take_outcomes(self) -> Counter[str]:
        """The `outcomes` since the last call."""
        taken, self.outcomes = self.outcomes, Counter()
        return taken

    def newest_states(self, towers: Continuable, history: History, users: Sequence[Hashable | None]) -> Tensor:
        """States of B histories at their newest positions, (B, D), as `TwoTower.newest_states` without memories."""
        if len(users) != len(history.lengths):
            raise ValueError(f"there are {len(users)} users and {len(history.lengths)} histories; give one for each")
        if not towers.extends:
            self.outcomes.update("anonymous" if user is None else "unsupported" for user in users)
            return towers.newest_states(history)
        inputs = positions_of(history)
        waiting, found = list(range(len(users))), list[tuple[list[int], Tensor]]()
        while waiting:  # a user's second request in a batch finds the state that the first one leaves
            now, later, seen = list[int](), list[int](), set[Hashable]()
            for row in waiting:
                (later if users[row] is not None and users[row] in seen else now).append(row)
                seen.add(users[row])
            found += self._compute(towers, history, inputs, users, now)
            waiting = later
        with self._lock:
            self._forgotten.clear()
        if len(found) == 1 and len(users) == 1:
            return found[0][1]
        places = torch.tensor([row for rows, _ in found for row in rows]).argsort()
        return torch.cat([states for _, states in found])[places.to(history.lengths.device)]

    def _compute(
        self,
        towers: Continuable,
        history: History,
        inputs: np.ndarray,
        users: Sequence[Hashable | None],
        rows: Sequence[int],
    ) -> list[tuple[list[int], Tensor]]:
        """States of some rows, no two of one user."""
        lengths, anonymous, cold = history.lengths.tolist(), list[int](), list[int]()
        warm: dict[int, list[tuple[int, State]]] = {}  # by the number of events that are computed
        keys = {row: user_key(history, row) for row in rows if users[row] is not None}
        for row in rows:
            if users[row] is None:
                self.outcomes["anonymous"] += 1
                anonymous.append(row)
                continue
            state = self._take(users[row])
            outcome, usable = self._usable(state, inputs[row], keys[row], lengths[row], towers)
            self.outcomes[outcome] += 1
            if state is None or not usable:
                cold.append(row)
            else:
                state.memory.truncate(usable + towers.tokens)
                warm.setdefault(lengths[row] - usable, []).append((row, state))
        found = []
        for count, held in warm.items():
            own = [row for row, _ in held]
            found.append((own, self._extend(towers, history, own, [state.memory for _, state in held], count)))
            for row, state in held:
                self._keep(users[row], state.memory, inputs[row], lengths[row], keys[row])
        if anonymous:
            found.append((anonymous, towers.newest_states(history.select(torch.tensor(anonymous), inputs.shape[2]))))
        if cold:
            memories: list[Memory] = []
            states = towers.newest_states(history.select(torch.tensor(cold), inputs.shape[2]), memories)
            found.append((cold, states))
            for row, memory in zip(cold, memories, strict=True):
                self._keep(users[row], memory, inputs[row], lengths[row], keys[row])
        return found

    def _usable(
        self, state: State | None, inputs: np.ndarray, user: tuple[bytes, ...], length: int, towers: Continuable
    ) -> tuple[str, int]:
        """An outcome, and how many positions of a state are those of a history."""
        if state is None:
            return "miss", 0
        held = state.inputs.shape[1]
        most = min(held, length - 1)
        common = 0
        if state.user == user and most > 0:
            equal = (state.inputs[:, :most] == inputs[:, :most]).all(0)
            common = most if equal.all() else int(equal.argmin())
        if common < held and not state.memory.truncatable:
            common = 0
        if common == held and length - common <= LONGEST:
            return "hit", common
        if not common and length == towers.max_length:
            return "window", 0
        return "changed", common if length - common <= LONGEST else 0

    def _extend(
        self, towers: Continuable, history: History, rows: list[int], memories: list[Memory], count: int
    ) -> Tensor:
        """States of rows whose last `count` events are not in their memories, (b, D)."""
        lengths = history.lengths.tolist()
        parts = [
            (history if len(lengths) == 1 else history.take(slice(row, row + 1))).select(None, lengths[row])
            for row in rows
        ]
        new = concatenated([part.newest(count) for part in parts])
        times = [towers.encoder_times(part) for part in parts]
        x = towers.encoder_inputs(new, later=True)[0]
        return towers.encoder.extend(x, memories, [own[0] for own in times], [own[1] for own in times])

    def _take(self, user: Hashable) -> State | None:
        with self._lock:
            return self._remove(user)

    def _remove(self, user: Hashable) -> State | None:
        state = self._states.pop(user, None)
        if state is not None:
            self.nbytes -= state.nbytes
        return state

    def _keep(self, user: Hashable, memory: Memory, inputs: np.ndarray, length: int, key: tuple[bytes, ...]) -> None:
        """Keeps the state of all positions but the newest."""
        if length < 2:  # no position is final
            return
        state = State(memory, inputs[:, : length - 1].copy(), key)
        with self._lock:
            if user in self._forgotten or state.nbytes > self.max_bytes:
                return
            self._states[user] = state
            self.nbytes += state.nbytes
            while self.nbytes > self.max_bytes:
                self._remove(next(iter(self._states)))


def positions_of(history: History) -> np.ndarray:
    """All that the states of positions may depend on, besides user features: (B, FIELDS, L) int64."""
    found = np.zeros((len(history.items), len(FIELDS), history.items.size(1)), dtype=np.int64)
    for number, name in enumerate(FIELDS):
        field = getattr(history, name)
        if field is not None:
            values = field.cpu()
            found[:, number] = (values if name != "ratings" else values.float().view(torch.int32)).numpy()
    return found


def user_key(history: History, row: int) -> tuple[bytes, ...]:
    """A user's features as bytes, without the padding of multi-valued ones."""
    if history.user is None:
        return ()
    return tuple(values[row].cpu().numpy().tobytes().rstrip(b"\0") for values in history.user)


def concatenated(parts: Sequence[History]) -> History:
    """One batch of histories of one length."""
    if len(parts) == 1:
        return parts[0]
    fields = list[Any]()
    for own in zip(*parts, strict=True):
        if own[0] is None:
            fields.append(None)
        elif isinstance(own[0], tuple):
            fields.append(tuple(torch.cat(values) for values in zip(*own, strict=True)))
        else:
            fields.append(torch.cat(own))
    return History(*fields)
