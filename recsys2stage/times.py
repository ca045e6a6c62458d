"""When an event happened and when its successor is asked for. Hooks are neutral by default, like those of positions.

`Time` itself is the encoding that says nothing.
"""

from collections.abc import Callable

import torch
from torch import nn

from recsys2stage.shapes import Embedded, Shape, Times


class Time(nn.Module):
    """No time; the base of all encodings."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()

    def embed(self, x: Embedded, times: Times, request: Times | None) -> Embedded:
        """Added to the input, once.

        Args:
            x: embedded items.
            times: seconds of each event.
            request: seconds at which the event after each place is asked for; None when the model is not told.
        """
        return x


TimeFactory = Callable[[Shape], Time]


class RequestGap(Time):
    """A learned vector for the gap between an event and the request that follows it, in log2 buckets.

    Bucket = floor(log2(1 + gap in seconds)), capped. It tells a model whether the next event belongs to the same
    sitting or comes a year later.

    Args:
        shape: sizes of the encoder.
        buckets: number of gaps told apart; 32 reach 68 years.
    """

    def __init__(self, shape: Shape, buckets: int = 32) -> None:
        super().__init__(shape)
        self.table = nn.Embedding(buckets, shape.dim)
        nn.init.normal_(self.table.weight, std=0.02)

    def embed(self, x: Embedded, times: Times, request: Times | None) -> Embedded:
        if request is None:
            raise ValueError(
                "RequestGap needs to know when a recommendation is asked for, but request_time is 'none'; "
                "set data.init_args.request_time to 'target', or leave out the time encoding"
            )
        gap = (request - times).clamp(min=0).double()  # float32 would round gaps of years
        bucket = torch.log2(1 + gap).long().clamp(max=self.table.num_embeddings - 1)
        return x + self.table(bucket)
