"""What an encoder with attention keeps of the first positions of a history."""

from jaxtyping import Float
from torch import Tensor

from recsys2stage.retrieval.encoders.base import Memory

SPARE = 32  # positions that a memory grows by, so that most events need no new one


class KeysValues(Memory):
    """Keys and values of the first positions of one history, in every layer.

    Args:
        layers: of the encoder.
        like: keys of one layer, (H, P, K), for sizes and device.
        most: longest history.
    """

    truncatable = True  # a prefix of it is the memory of a shorter history

    def __init__(self, layers: int, like: Float[Tensor, "H P K"], most: int) -> None:
        self.positions, self.most = 0, most
        self.planes = like.new_empty(2 * layers, like.size(0), 0, like.size(2))
        self.reserve(like.size(1))

    @property
    def nbytes(self) -> int:
        """Bytes of memory, with the room for further positions."""
        return self.planes.nbytes

    def reserve(self, positions: int) -> None:
        """Makes room for positions."""
        if positions > self.planes.size(2):
            room = min(self.most, -(-(positions + SPARE // 2) // SPARE) * SPARE)
            grown = self.planes.new_empty(*self.planes.shape[:2], max(room, positions), self.planes.size(3))
            grown[:, :, : self.positions] = self.planes[:, :, : self.positions]
            self.planes = grown

    def truncate(self, positions: int) -> None:
        """Forgets later positions."""
        self.positions = positions
