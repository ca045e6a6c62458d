"""Shared layers: dropout and norms that are fast on a CPU, and feed-forward layers."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from recsys2stage.options import check_number

CACHE_BLOCK = 1 << 16  # numbers per block, 256 KB


def use_cpu_blocks(x: Tensor) -> bool:
    """Whether to process a tensor in blocks that stay in cache: on a CPU, memory bandwidth is the bottleneck.

    On other devices, and under torch.compile, full tensors are faster: the compiler fuses their operations.
    """
    return x.device.type == "cpu" and not torch.compiler.is_compiling()


def without_autocast(x: Tensor) -> AbstractContextManager[None]:
    """Context that disables autocast on the tensor's device; does nothing on a device without autocast."""
    device = x.device.type
    return torch.autocast(device, enabled=False) if torch.amp.is_autocast_available(device) else nullcontext()


def row_blocks(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Splits tensors (..., D) alike into blocks of rows (r, D) that stay in cache."""
    size = max(1, CACHE_BLOCK // max(x.size(-1) for x in tensors))
    return zip(*(torch.split(x.reshape(-1, x.size(-1)), size) for x in tensors), strict=True)


class Dropout(nn.Module):
    """nn.Dropout, faster on a CPU, where sampling one random number per element dominates.

    One random 64-bit integer decides four elements, so the probability is rounded to a multiple of 2^-16.

    Args:
        p: probability that an element is zeroed in training; the others are multiplied by 1 / (1 − p).
    """

    def __init__(self, p: float) -> None:
        super().__init__()
        check_number("dropout", p, low=0, below=1, example=0.2, what="a share")
        self.p = p

    def forward(self, x: Float[Tensor, "*S"]) -> Float[Tensor, "*S"]:
        if not (self.training and self.p):
            return x
        if not use_cpu_blocks(x):
            return F.dropout(x, self.p)
        return _Drop.apply(x, self.p)  # type: ignore[no-untyped-call]  # torch: no types

    def extra_repr(self) -> str:
        return f"p={self.p}"


class _Drop(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, p: float) -> Tensor:
        keep, scale = dropout_mask(x.shape, p)
        ctx.save_for_backward(keep)
        ctx.scale = scale
        return keep.to(x.dtype).mul_(x).mul_(scale)  # multiplying by a bool tensor is five times slower

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (keep,) = ctx.saved_tensors
        return keep.to(gradients[0].dtype).mul_(gradients[0]).mul_(ctx.scale), None


def dropout_mask(shape: torch.Size, p: float, generator: torch.Generator | None = None) -> tuple[Tensor, float]:
    """Samples on the CPU a bool mask of the elements that dropout keeps; returns it with their scale factor.

    Args:
        shape: shape of the mask.
        p: dropout probability.
        generator: random generator; None: torch's default.
    """
    count, dropped = shape.numel(), min(round(p * 65_536), 65_535)
    random = torch.empty((count + 3) // 4, dtype=torch.int64).random_(-(2**63), None, generator=generator)
    keep = random.view(torch.int16)[:count].view(shape) >= dropped - 32_768
    return keep, 1 / (1 - dropped / 65_536)


class Norm(nn.Module, ABC):
    """Base class: normalizes the last axis, then applies a learned scale.

    Args:
        dim: D.
        eps: added to the mean square.
        affine: whether to learn the scale (and shift).
    """

    weight: nn.Parameter | None

    def __init__(self, dim: int, eps: float = 1e-6, affine: bool = True) -> None:
        super().__init__()
        check_number("eps", eps, above=0, below=1, example=1e-6)
        self.dim, self.eps = dim, eps
        self.register_parameter("weight", nn.Parameter(torch.ones(dim)) if affine else None)

    @abstractmethod
    def forward(self, x: Float[Tensor, "*S D"]) -> Float[Tensor, "*S D"]:
        """Returns the normalized tensor."""

    def extra_repr(self) -> str:
        return f"{self.dim}, eps={self.eps}, affine={self.weight is not None}"


class RMSNorm(Norm):
    """x / sqrt(mean(x²) + eps) * weight (Zhang & Sennrich 2019, eq. 4)."""

    def forward(self, x: Float[Tensor, "*S D"]) -> Float[Tensor, "*S D"]:
        if self.weight is None or self.weight.dtype != x.dtype or not use_cpu_blocks(x):
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
        return torch.layer_norm(x, (self.dim,), self.weight, self.bias, self.eps)


NormFactory = Callable[[int], Norm]


class FeedForward(nn.Module, ABC):
    """Base class of position-wise feed-forward layers, W2(dropout(hidden(x))).

    Args:
        dim: D.
        dropout: of the hidden layer (set by the encoder).
        expansion: hidden width as a multiple of `dim`.
        bias: whether the linear layers have biases.
    """

    def __init__(self, dim: int, dropout: float, expansion: float = 4.0, bias: bool = True) -> None:
        super().__init__()
        check_number("expansion", expansion, above=0, high=1000, example=4.0)
        self.width = max(1, round(expansion * dim))
        self.w1 = nn.Linear(dim, self.width, bias=bias)
        self.w2 = nn.Linear(self.width, dim, bias=bias)
        self.dropout = Dropout(dropout)

    def forward(self, x: Float[Tensor, "*S D"]) -> Float[Tensor, "*S D"]:
        return self.w2(self.dropout(self.hidden(x)))

    @abstractmethod
    def hidden(self, x: Float[Tensor, "*S D"]) -> Float[Tensor, "*S W"]:
        """Returns the hidden layer after its activation."""


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
        bias: whether the linear layers have biases.
        equal_parameters: multiply the hidden width by 2/3, so that the three matrices have as many parameters as
            the two of an ungated layer.
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
