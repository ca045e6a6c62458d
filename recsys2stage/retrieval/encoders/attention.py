"""Attention with relative biases, on a CPU in blocks that fit into cache: nothing of size (B, H, L, L) is in memory.

    softmax_attention     softmax_j(q_i·k_j / √K + b_ij) v_j              Vaswani et al. 2017, with a bias
    pointwise_attention   SiLU(s · q_i·k_j + b_ij) / n · v_j              HSTU: Zhai et al. 2024, eq. 2
    bias_attention        b_ij v_j                                        a channel of FuXi-α: Ye et al. 2025

with b_ij = position[i, j] + table[bucket of the time from j to i]. On a CPU the weights of a few rows and queries at a
time are made, used and forgotten, and made again for the gradient. Elsewhere, and under torch.compile, the same
formulas stand in whole tensors, for the compiler to fuse.
"""

from collections.abc import Iterator
from typing import Any, Literal, NamedTuple

import torch
from jaxtyping import Float, Integer
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from recsys2stage.retrieval.encoders.layers import in_cache, kept
from recsys2stage.shapes import Heads, Lengths

TILE = 32  # queries at a time
BLOCK = 1 << 18  # weights at a time: 1 MB, of which some four are in flight


class Bias(NamedTuple):
    """What joins the logit of query i and key j: position[i, j] + table[buckets[i, j]], as far as they are given."""

    position: Float[Tensor, "#H L L"] | None = None
    buckets: Integer[Tensor, "B L L"] | None = None
    table: Float[Tensor, "#H N"] | None = None

    def __bool__(self) -> bool:
        """Whether there is anything to join."""
        return self.position is not None or self.table is not None


def softmax_attention(
    q: Heads, k: Heads, v: Heads, bias: Bias, causal: bool = True, lengths: Lengths | None = None, dropout: float = 0.0
) -> Heads:
    """Attention over each place and what came before it, or, where it is not causal, over all real places.

    Args:
        q: queries.
        k: keys.
        v: values.
        bias: joins the logits.
        causal: whether a place sees only itself and what came before.
        lengths: number of real places, for attention that is not causal.
        dropout: share of weights dropped.
    """
    if causal:
        lengths = None  # what is padded comes after whatever is real, and is not seen
    else:
        assert lengths is not None, "attention to both sides needs to know what is padding"
        lengths = lengths.clamp(min=1)  # an empty history sees one padded place, not nothing, which were 0 / 0
    if in_cache(q) and (bias or dropout):
        return _blocks(q, k, v, bias, lengths, _Kind("softmax", causal, q.size(-1) ** -0.5, 1.0, dropout))
    if causal and not bias:
        return F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, is_causal=True)
    mask = _seen(q.size(2), causal, lengths, q.device)
    if bias:
        mask = _whole(bias, q.dtype).masked_fill(~mask, -torch.inf)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout)


def pointwise_attention(
    q: Heads, k: Heads, v: Heads, bias: Bias, scale: float = 1.0, divisor: float = 1.0, dropout: float = 0.0
) -> Heads:
    """HSTU's causal attention: SiLU(scale · q·k + bias) / divisor in the place of a softmax.

    Args:
        q: queries.
        k: keys.
        v: values.
        bias: joins the logits.
        scale: of the products.
        divisor: of the weights.
        dropout: share of weights dropped.
    """
    if in_cache(q):
        return _blocks(q, k, v, bias, None, _Kind("silu", True, scale, divisor, dropout))
    logits = scale * q @ k.mT
    if bias:
        logits = logits + _whole(bias, q.dtype)
    weights = (F.silu(logits) / divisor).masked_fill(~_seen(q.size(2), True, None, q.device), 0)
    return F.dropout(weights, dropout) @ v


def bias_attention(v: Heads, bias: Bias) -> Heads:
    """The bias itself as causal attention weights: a channel that mixes values by position or by time alone."""
    shared = (bias.position is None or len(bias.position) == 1) and (bias.table is None or len(bias.table) == 1)
    heads = v.size(1)
    if shared:  # heads that share their weights are one wide head
        v = v.transpose(1, 2).flatten(2)[:, None]
    if in_cache(v):
        mixed = _blocks(None, None, v, bias, None, _Kind("identity", True, 1.0, 1.0, 0.0))
    else:
        mixed = _whole(bias, v.dtype).masked_fill(~_seen(v.size(2), True, None, v.device), 0) @ v
    return mixed[:, 0].view(len(v), v.size(2), heads, -1).transpose(1, 2) if shared else mixed


def _seen(length: int, causal: bool, lengths: Tensor | None, device: torch.device) -> Tensor:
    """Which key each query sees, (L, L) or (B, 1, 1, L)."""
    if causal:
        return torch.ones(length, length, dtype=torch.bool, device=device).tril()
    assert lengths is not None
    return (torch.arange(length, device=device) < lengths[:, None])[:, None, None]


def _whole(bias: Bias, dtype: torch.dtype) -> Tensor:
    """The bias of every pair, (1 or B, 1 or H, L, L)."""
    parts = [] if bias.position is None else [bias.position[None]]
    if bias.table is not None and bias.buckets is not None:
        parts.append(bias.table[:, bias.buckets.int()].transpose(0, 1))
    return sum(parts[1:], start=parts[0]).to(dtype)


class _Kind(NamedTuple):
    activation: Literal["softmax", "silu", "identity"]
    causal: bool
    scale: float
    divisor: float
    dropout: float


def _blocks(q: Tensor | None, k: Tensor | None, v: Tensor, bias: Bias, lengths: Tensor | None, kind: _Kind) -> Tensor:
    exact = v.dtype if v.dtype == torch.float64 else torch.float32
    with torch.autocast("cpu", enabled=False):
        qkv = [None if x is None else x.to(exact).contiguous() for x in (q, k, v)]
        tables = [None if x is None else x.to(exact) for x in (bias.position, bias.table)]
        out: Tensor = _Blocks.apply(*qkv, *tables, bias.buckets, lengths, kind)  # type: ignore[no-untyped-call]  # torch: no types
    return out.to(v.dtype)


class _Blocks(torch.autograd.Function):
    """The weights of some rows and TILE queries at a time, made in forward and again in backward."""

    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor | None,
        k: Tensor | None,
        v: Tensor,
        position: Tensor | None,
        table: Tensor | None,
        buckets: Tensor | None,
        lengths: Tensor | None,
        kind: _Kind,
    ) -> Tensor:
        given = _Given(q, k, position, table, buckets, lengths, kind)
        ctx.save_for_backward(v, *given[:-1])
        ctx.kind, ctx.seed = kind, int(torch.randint(2**62, ())) if kind.dropout else 0
        draws, out = torch.Generator().manual_seed(ctx.seed), torch.empty_like(v)
        for rows, tile, keys in _plan(v, kind.causal):
            _, weights, keep = _weights(given, rows, tile, keys, draws)
            out[rows, :, tile] = (weights if keep is None else weights * keep) @ v[rows, :, keys]
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        v, *saved = ctx.saved_tensors
        q, k, position, table, buckets, lengths = saved
        given, kind = _Given(q, k, position, table, buckets, lengths, ctx.kind), ctx.kind
        d_out = gradients[0].contiguous()
        d_v = torch.zeros_like(v)
        d_q, d_k, d_position, d_table = (None if x is None else torch.zeros_like(x) for x in (q, k, position, table))
        draws = torch.Generator().manual_seed(ctx.seed)
        with torch.autocast("cpu", enabled=False):  # a backward within autocast would turn it on
            for rows, tile, keys in _plan(v, kind.causal):
                logits, weights, keep = _weights(given, rows, tile, keys, draws)
                d_mixed = d_out[rows, :, tile]
                d_v[rows, :, keys] += (weights if keep is None else weights * keep).mT @ d_mixed
                d_weights = d_mixed @ v[rows, :, keys].mT
                if keep is not None:
                    d_weights *= keep
                if kind.activation == "softmax":
                    d_logits = torch._softmax_backward_data(d_weights, weights, -1, weights.dtype)
                elif kind.activation == "silu":
                    d_logits = _hide_ahead(torch.ops.aten.silu_backward(d_weights, logits).div_(kind.divisor), tile)
                else:
                    d_logits = _hide_ahead(d_weights, tile)
                if q is not None and k is not None and d_q is not None and d_k is not None:
                    d_q[rows, :, tile] = (d_logits @ k[rows, :, keys]).mul_(kind.scale)
                    d_k[rows, :, keys] += d_logits.mT @ (kind.scale * q[rows, :, tile])
                if position is not None and d_position is not None:
                    d_position[:, tile, keys] += d_logits.sum_to_size(1, *position[:, tile, keys].shape)[0]
                if table is not None and d_table is not None:
                    d_bias = d_logits.sum_to_size(len(d_logits), len(table), *d_logits.shape[2:])
                    bucket = buckets[rows, tile, keys].reshape(-1).long()
                    for head in range(len(table)):
                        d_table[head].scatter_add_(0, bucket, d_bias[:, head].reshape(-1))
        return d_q, d_k, d_v, d_position, d_table, None, None, None


class _Given(NamedTuple):
    """What the weights of all blocks are made from."""

    q: Tensor | None
    k: Tensor | None
    position: Tensor | None
    table: Tensor | None
    buckets: Tensor | None
    lengths: Tensor | None
    kind: _Kind


def _plan(v: Tensor, causal: bool) -> Iterator[tuple[slice, slice, slice]]:
    """Blocks of rows, queries and keys; where attention is causal, a tile needs only the keys up to its end."""
    count, heads, length, _ = v.shape
    for start in range(0, length, TILE):
        tile = slice(start, min(start + TILE, length))
        keys = slice(0, tile.stop if causal else length)
        together = max(1, BLOCK // (heads * TILE * keys.stop))
        for row in range(0, count, together):
            yield slice(row, row + together), tile, keys


def _weights(
    given: _Given, rows: slice, tile: slice, keys: slice, draws: torch.Generator
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Logits (b, H, T, L), weights and, where there is dropout, what each weight is multiplied with."""
    q, k, position, table, buckets, lengths, kind = given
    logits = None
    if q is not None and k is not None:
        logits = (q[rows, :, tile] * kind.scale) @ k[rows, :, keys].mT
    if table is not None and buckets is not None:
        bucket = buckets[rows, tile, keys]
        shape, flat = bucket.shape, bucket.reshape(-1).int()
        between = torch.stack([head.index_select(0, flat).view(shape) for head in table.unbind()], dim=1)
        logits = between if logits is None else logits.add_(between)
    if position is not None:
        own = position[None, :, tile, keys]
        if logits is None:
            logits = own.clone()  # what lies ahead is filled in in place
        elif q is None:
            logits = logits + own  # it may have more heads than the table
        else:
            logits.add_(own)
    assert logits is not None
    if kind.activation == "softmax":
        if lengths is None:
            _hide_ahead(logits, tile, -torch.inf)
        else:
            padding = torch.arange(keys.stop) >= lengths[rows, None]
            logits.masked_fill_(padding[:, None, None], -torch.inf)
        weights = logits.softmax(-1)
    elif kind.activation == "silu":
        weights = _hide_ahead(F.silu(logits).div_(kind.divisor), tile)
    else:
        weights = _hide_ahead(logits, tile)
    keep = None
    if kind.dropout:
        chosen, scale = kept(weights.shape, kind.dropout, draws)
        keep = chosen.to(weights.dtype).mul_(scale)
    return logits, weights, keep


def _hide_ahead(weights: Tensor, tile: slice, value: float = 0.0) -> Tensor:
    """Fills what lies ahead of each query, in place: the upper triangle of the last square."""
    size = tile.stop - tile.start
    weights[..., tile].masked_fill_(torch.ones(size, size, dtype=torch.bool).triu(1), value)
    return weights
