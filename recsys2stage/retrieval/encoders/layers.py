"""Layers that several encoders are made of: norms, feed-forwards, and a dropout that is quick on a CPU."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

IN_CACHE = 1 << 16  # numbers at a time, 256 KB


def in_cache(x: Tensor) -> bool:
    """Whether to work through a tensor in parts that stay in cache, as memory bandwidth is what binds a CPU.

    Elsewhere, and under torch.compile, whole expressions are better, for the compiler to fuse.
    """
    return x.device.type == "cpu" and not torch.compiler.is_compiling()


def without_autocast(x: Tensor) -> AbstractContextManager[None]:
    """Operations on the tensor's device in the precision of their inputs; a device without autocast needs nothing."""
    kind = x.device.type
    return torch.autocast(kind, enabled=False) if torch.amp.is_autocast_available(kind) else nullcontext()


def row_blocks(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Tensors (..., D) together, as blocks of rows (r, D) that stay in cache."""
    size = max(1, IN_CACHE // max(x.size(-1) for x in tensors))
    return zip(*(torch.split(x.reshape(-1, x.size(-1)), size) for x in tensors), strict=True)


class Dropout(nn.Module):
    """nn.Dropout at a fraction of its time on a CPU, where drawing one random number for each element dominates.

    One 64-bit draw decides four elements, so that the probability is a multiple of 2^-16.

    Args:
        p: share of elements that are set to zero in training; the others are multiplied by 1 / (1 − p).
    """

    def __init__(self, p: float) -> None:
        super().__init__()
        if not 0 <= p < 1:
            raise ValueError(f"dropout is {p}, expected a share from 0 to below 1")
        self.p = p

    def forward(self, x: Float[Tensor, "*S"]) -> Float[Tensor, "*S"]:
        if not (self.training and self.p):
            return x
        if not in_cache(x):
            return F.dropout(x, self.p)
        return _Drop.apply(x, self.p)  # type: ignore[no-untyped-call]  # torch: no types

    def extra_repr(self) -> str:
        return f"p={self.p}"


class _Drop(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, p: float) -> Tensor:
        keep, scale = kept(x.shape, p)
        ctx.save_for_backward(keep)
        ctx.scale = scale
        return keep.to(x.dtype).mul_(x).mul_(scale)  # a product with a bool tensor itself takes five times as long

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (keep,) = ctx.saved_tensors
        return keep.to(gradients[0].dtype).mul_(gradients[0]).mul_(ctx.scale), None


def kept(shape: torch.Size, p: float, generator: torch.Generator | None = None) -> tuple[Tensor, float]:
    """Which elements dropout keeps, drawn on the CPU, and the factor of those.

    Args:
        shape: of the elements.
        p: share that is dropped.
        generator: of the draws; None: torch's own.
    """
    count, dropped = shape.numel(), min(round(p * 65_536), 65_535)
    draws = torch.empty((count + 3) // 4, dtype=torch.int64).random_(-(2**63), None, generator=generator)
    keep = draws.view(torch.int16)[:count].view(shape) >= dropped - 32_768
    return keep, 1 / (1 - dropped / 65_536)


class Norm(nn.Module, ABC):
    """Normalises the last axis, then scales it by learned weights.

    Args:
        dim: D.
        eps: added to the mean square.
        affine: whether there are weights to learn.
    """

    weight: nn.Parameter | None

    def __init__(self, dim: int, eps: float = 1e-6, affine: bool = True) -> None:
        super().__init__()
        self.dim, self.eps = dim, eps
        self.register_parameter("weight", nn.Parameter(torch.ones(dim)) if affine else None)

    @abstractmethod
    def forward(self, x: Float[Tensor, "*S D"]) -> Float[Tensor, "*S D"]:
        """The same shape, normalised."""

    def extra_repr(self) -> str:
        return f"{self.dim}, eps={self.eps}, affine={self.weight is not None}"


class RMSNorm(Norm):
    """x / sqrt(mean(x²) + eps) * weight (Zhang & Sennrich 2019, eq. 4)."""

    def forward(self, x: Float[Tensor, "*S D"]) -> Float[Tensor, "*S D"]:
        if self.weight is None or self.weight.dtype != x.dtype or not in_cache(x):
            weight = None if self.weight is None else self.weight.to(x.dtype)
            return F.rms_norm(x, (self.dim,), weight, self.eps)
        return _RMSNorm.apply(x, self.weight, self.eps)  # type: ignore[no-untyped-call]  # torch: no types


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        out = torch.empty_like(x, memory_format=torch.contiguous_format)
        scale = x.new_empty(*x.shape[:-1], 1)
        for xs, ss, ys in row_blocks(x, scale, out):
            torch.linalg.vector_norm(xs, dim=-1, keepdim=True, out=ss)
            ss.square_().div_(x.size(-1)).add_(eps).rsqrt_()
            torch.mul(xs, ss, out=ys).mul_(weight)
        ctx.save_for_backward(x, weight, scale)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, scale = ctx.saved_tensors
        d_x = torch.empty_like(x, memory_format=torch.contiguous_format)
        d_weight = torch.zeros_like(weight)
        for xs, ss, gs, ds in row_blocks(x, scale, gradients[0], d_x):
            normal, pull = xs * ss, gs * weight
            d_weight += (gs * normal).sum(0)
            along = (pull * normal).mean(-1, keepdim=True)
            torch.mul(pull.sub_(normal.mul_(along)), ss, out=ds)
        return d_x, d_weight, None


class LayerNorm(Norm):
    """(x − mean) / sqrt(variance + eps) * weight + bias (Ba et al. 2016)."""

    bias: nn.Parameter | None

    def __init__(self, dim: int, eps: float = 1e-6, affine: bool = True) -> None:
        super().__init__(dim, eps, affine)
        self.register_parameter("bias", nn.Parameter(torch.zeros(dim)) if affine else None)

    def forward(self, x: Float[Tensor, "*S D"]) -> Float[Tensor, "*S D"]:
        return F.layer_norm(x, (self.dim,), self.weight, self.bias, self.eps)


NormFactory = Callable[[int], Norm]


class FeedForward(nn.Module, ABC):
    """A map of each place by itself through a wider layer, W2(dropout(hidden(x))).

    Args:
        dim: D.
        dropout: of the hidden layer (set by the encoder).
        expansion: hidden width as a multiple of `dim`.
        bias: whether the linear maps have biases.
    """

    def __init__(self, dim: int, dropout: float, expansion: float = 4.0, bias: bool = True) -> None:
        super().__init__()
        self.width = round(expansion * dim)
        self.w1 = nn.Linear(dim, self.width, bias=bias)
        self.w2 = nn.Linear(self.width, dim, bias=bias)
        self.dropout = Dropout(dropout)

    def forward(self, x: Float[Tensor, "*S D"]) -> Float[Tensor, "*S D"]:
        return self.w2(self.dropout(self.hidden(x)))

    @abstractmethod
    def hidden(self, x: Float[Tensor, "*S D"]) -> Float[Tensor, "*S W"]:
        """The hidden layer after its activation."""


FeedForwardFactory = Callable[[int, float], FeedForward]


class ReLU(FeedForward):
    """ReLU(W1 x), as in the original transformer and SASRec (Kang & McAuley 2018, section III.B)."""

    def hidden(self, x: Float[Tensor, "*S D"]) -> Float[Tensor, "*S W"]:
        return F.relu(self.w1(x))


class GELU(FeedForward):
    """GELU(W1 x) (Hendrycks & Gimpel 2016), as in BERT."""

    def hidden(self, x: Float[Tensor, "*S D"]) -> Float[Tensor, "*S W"]:
        return F.gelu(self.w1(x))


class _Gated(FeedForward):
    """activation(W1 x) * W3 x (Shazeer 2020).

    Args:
        dim: D.
        dropout: of the hidden layer (set by the encoder).
        expansion: hidden width as a multiple of `dim`.
        bias: whether the linear maps have biases.
        equal_parameters: shrink the hidden width to 2/3, so that three matrices weigh as much as two of an ungated one.
    """

    def __init__(
        self, dim: int, dropout: float, expansion: float = 4.0, bias: bool = False, equal_parameters: bool = False
    ) -> None:
        super().__init__(dim, dropout, expansion * 2 / 3 if equal_parameters else expansion, bias)
        self.w3 = nn.Linear(dim, self.width, bias=bias)


class SwiGLU(_Gated):
    """SiLU(W1 x) * W3 x (Shazeer 2020, section 2)."""

    def hidden(self, x: Float[Tensor, "*S D"]) -> Float[Tensor, "*S W"]:
        return F.silu(self.w1(x)) * self.w3(x)


class GeGLU(_Gated):
    """GELU(W1 x) * W3 x (Shazeer 2020, section 2)."""

    def hidden(self, x: Float[Tensor, "*S D"]) -> Float[Tensor, "*S W"]:
        return F.gelu(self.w1(x)) * self.w3(x)
