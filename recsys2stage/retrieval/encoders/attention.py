"""Attention with relative biases; on a CPU, block by block in cache, without any (B, H, L, L) tensor in memory.

    softmax_attention     softmax_j(q_i·k_j / √K + b_ij) v_j              Vaswani et al. 2017, with a bias
    pointwise_attention   SiLU(s · q_i·k_j + b_ij) / n · v_j              HSTU: Zhai et al. 2024, eq. 2
    bias_attention        b_ij v_j                                        a channel of FuXi-α: Ye et al. 2025

with b_ij = position[i, j] + table[bucket of the time from j to i]. On a CPU the weights are computed for a few rows and
queries at a time and recomputed in backward. On other devices, and under torch.compile, the same formulas use full
tensors, which the compiler can fuse.
"""

from collections.abc import Iterator
from typing import Any, Literal, NamedTuple

import torch
from jaxtyping import Float, Integer
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from recsys2stage.retrieval.encoders.layers import dropout_mask, use_cpu_blocks
from recsys2stage.shapes import Heads, Lengths

TILE = 32  # queries per block
BLOCK = 1 << 18  # attention weights per block: 1 MB; about four such tensors are live at once


class Bias(NamedTuple):
    """Bias added to the logit of query i and key j: position[i, j] + table[buckets[i, j]]; None terms are left out."""

    position: Float[Tensor, "#H L L"] | None = None
    buckets: Integer[Tensor, "B L L"] | None = None
    table: Float[Tensor, "#H N"] | None = None

    def __bool__(self) -> bool:
        """Whether any term is present."""
        return self.position is not None or self.table is not None


def softmax_attention(
    q: Heads, k: Heads, v: Heads, bias: Bias, causal: bool = True, lengths: Lengths | None = None, dropout: float = 0.0
) -> Heads:
    """Softmax attention: causal, or bidirectional over all non-padding positions.

    Args:
        q: queries.
        k: keys.
        v: values.
        bias: added to the logits.
        causal: whether a position attends only to itself and earlier positions.
        lengths: history lengths; required when not causal.
        dropout: dropout probability of the attention weights.
    """
    if causal:
        lengths = None  # padding is at the end, so the causal mask covers it
    else:
        assert lengths is not None, "bidirectional attention needs lengths to mask the padding"
        lengths = lengths.clamp(min=1)  # an empty history attends to one padded position; a softmax over none is 0 / 0
    if use_cpu_blocks(q) and (bias or dropout):
        return _blockwise(q, k, v, bias, lengths, _Options("softmax", causal, q.size(-1) ** -0.5, 1.0, dropout))
    if causal and not bias:
        return F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, is_causal=True)
    mask = _attention_mask(q.size(2), causal, lengths, q.device)
    if bias:
        mask = _full_bias(bias, q.dtype).masked_fill(~mask, -torch.inf)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout)


def pointwise_attention(
    q: Heads, k: Heads, v: Heads, bias: Bias, scale: float = 1.0, divisor: float = 1.0, dropout: float = 0.0
) -> Heads:
    """HSTU's causal attention: SiLU(scale · q·k + bias) / divisor instead of a softmax.

    Args:
        q: queries.
        k: keys.
        v: values.
        bias: added to the logits.
        scale: factor of the dot products.
        divisor: divides the attention weights.
        dropout: dropout probability of the attention weights.
    """
    if use_cpu_blocks(q):
        return _blockwise(q, k, v, bias, None, _Options("silu", True, scale, divisor, dropout))
    logits = scale * q @ k.mT
    if bias:
        logits = logits + _full_bias(bias, q.dtype)
    weights = (F.silu(logits) / divisor).masked_fill(~_attention_mask(q.size(2), True, None, q.device), 0)
    return F.dropout(weights, dropout) @ v


def bias_attention(v: Heads, bias: Bias) -> Heads:
    """Causal attention with the bias itself as weights: a channel that mixes values by position or time only."""
    shared = (bias.position is None or len(bias.position) == 1) and (bias.table is None or len(bias.table) == 1)
    heads = v.size(1)
    if shared:  # heads with the same weights are computed as one wide head
        v = v.transpose(1, 2).flatten(2)[:, None]
    if use_cpu_blocks(v):
        mixed = _blockwise(None, None, v, bias, None, _Options("identity", True, 1.0, 1.0, 0.0))
    else:
        mixed = _full_bias(bias, v.dtype).masked_fill(~_attention_mask(v.size(2), True, None, v.device), 0) @ v
    return mixed[:, 0].view(v.size(0), v.size(2), heads, -1).transpose(1, 2) if shared else mixed


def _attention_mask(length: int, causal: bool, lengths: Tensor | None, device: torch.device) -> Tensor:
    """Boolean mask of the keys each query attends to, (L, L) or (B, 1, 1, L)."""
    if causal:
        return torch.ones(length, length, dtype=torch.bool, device=device).tril()
    assert lengths is not None
    return (torch.arange(length, device=device) < lengths[:, None])[:, None, None]


def _full_bias(bias: Bias, dtype: torch.dtype) -> Tensor:
    """The bias as a full tensor, (1 or B, 1 or H, L, L)."""
    parts = [] if bias.position is None else [bias.position[None]]
    if bias.table is not None and bias.buckets is not None:
        parts.append(bias.table[:, bias.buckets.long()].transpose(0, 1))
    return sum(parts[1:], start=parts[0]).to(dtype)


class _Options(NamedTuple):
    activation: Literal["softmax", "silu", "identity"]
    causal: bool
    scale: float
    divisor: float
    dropout: float


def _blockwise(
    q: Tensor | None, k: Tensor | None, v: Tensor, bias: Bias, lengths: Tensor | None, options: _Options
) -> Tensor:
    exact = v.dtype if v.dtype == torch.float64 else torch.float32
    with torch.autocast("cpu", enabled=False):
        qkv = [None if x is None else x.to(exact).contiguous() for x in (q, k, v)]
        tables = [None if x is None else x.to(exact) for x in (bias.position, bias.table)]
        out: Tensor = _Blockwise.apply(*qkv, *tables, bias.buckets, lengths, options)  # type: ignore[no-untyped-call]  # torch: no types
    return out.to(v.dtype)


class _Blockwise(torch.autograd.Function):
    """Blockwise attention: weights of a few rows and TILE queries at a time, recomputed in backward."""

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
        options: _Options,
    ) -> Tensor:
        inputs = _Inputs(q, k, position, table, buckets, lengths, options)
        ctx.save_for_backward(v, *inputs[:-1])
        ctx.options, ctx.seed = options, int(torch.randint(2**62, ())) if options.dropout else 0
        generator, out = torch.Generator().manual_seed(ctx.seed), torch.empty_like(v)
        for rows, tile, keys in _block_slices(v, options.causal):
            _, weights, keep = _weights(inputs, rows, tile, keys, generator)
            out[rows, :, tile] = (weights if keep is None else weights * keep) @ v[rows, :, keys]
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        v, *saved = ctx.saved_tensors
        q, k, position, table, buckets, lengths = saved
        inputs, options = _Inputs(q, k, position, table, buckets, lengths, ctx.options), ctx.options
        d_out = gradients[0].contiguous()
        d_v = torch.zeros_like(v)
        d_q, d_k, d_position, d_table = (None if x is None else torch.zeros_like(x) for x in (q, k, position, table))
        generator = torch.Generator().manual_seed(ctx.seed)
        with torch.autocast("cpu", enabled=False):  # backward may run inside the caller's autocast
            for rows, tile, keys in _block_slices(v, options.causal):
                logits, weights, keep = _weights(inputs, rows, tile, keys, generator)
                d_mixed = d_out[rows, :, tile]
                d_v[rows, :, keys] += (weights if keep is None else weights * keep).mT @ d_mixed
                d_weights = d_mixed @ v[rows, :, keys].mT
                if keep is not None:
                    d_weights *= keep
                if options.activation == "softmax":
                    d_logits = torch._softmax_backward_data(d_weights, weights, -1, weights.dtype)
                elif options.activation == "silu":
                    d_logits = _mask_future(torch.ops.aten.silu_backward(d_weights, logits).div_(options.divisor), tile)
                else:
                    d_logits = _mask_future(d_weights, tile)
                if q is not None and k is not None and d_q is not None and d_k is not None:
                    d_q[rows, :, tile] = (d_logits @ k[rows, :, keys]).mul_(options.scale)
                    d_k[rows, :, keys] += d_logits.mT @ (options.scale * q[rows, :, tile])
                if position is not None and d_position is not None:
                    d_position[:, tile, keys] += d_logits.sum_to_size(1, *position[:, tile, keys].shape)[0]
                if table is not None and d_table is not None:
                    d_bias = d_logits.sum_to_size(len(d_logits), len(table), *d_logits.shape[2:])
                    bucket = buckets[rows, tile, keys].reshape(-1).long()
                    for head in range(len(table)):
                        d_table[head].scatter_add_(0, bucket, d_bias[:, head].reshape(-1))
        return d_q, d_k, d_v, d_position, d_table, None, None, None


class _Inputs(NamedTuple):
    """Inputs of the attention weights."""

    q: Tensor | None
    k: Tensor | None
    position: Tensor | None
    table: Tensor | None
    buckets: Tensor | None
    lengths: Tensor | None
    options: _Options


def _block_slices(v: Tensor, causal: bool) -> Iterator[tuple[slice, slice, slice]]:
    """Blocks as slices of rows, queries and keys; a causal block only needs the keys up to its last query."""
    count, heads, length, _ = v.shape
    for start in range(0, length, TILE):
        tile = slice(start, min(start + TILE, length))
        keys = slice(0, tile.stop if causal else length)
        rows = max(1, BLOCK // (heads * TILE * keys.stop))
        for row in range(0, count, rows):
            yield slice(row, row + rows), tile, keys


def _weights(
    inputs: _Inputs, rows: slice, tile: slice, keys: slice, generator: torch.Generator
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Logits (b, H, T, L), attention weights and the dropout factor of each weight (None without dropout)."""
    q, k, position, table, buckets, lengths, options = inputs
    logits = None
    if q is not None and k is not None:
        logits = (q[rows, :, tile] * options.scale) @ k[rows, :, keys].mT
    if table is not None and buckets is not None:
        bucket = buckets[rows, tile, keys]
        shape, flat = bucket.shape, bucket.reshape(-1).int()
        time_bias = torch.stack([head.index_select(0, flat).view(shape) for head in table.unbind()], dim=1)
        logits = time_bias if logits is None else logits.add_(time_bias)
    if position is not None:
        position_bias = position[None, :, tile, keys]
        if logits is None:
            logits = position_bias.clone()  # _mask_future writes in place
        elif q is None:
            logits = logits + position_bias  # not in place: the position bias may have more heads than the table
        else:
            logits.add_(position_bias)
    assert logits is not None
    if options.activation == "softmax":
        if lengths is None:
            _mask_future(logits, tile, -torch.inf)
        else:
            padding = torch.arange(keys.stop) >= lengths[rows, None]
            logits.masked_fill_(padding[:, None, None], -torch.inf)
        weights = logits.softmax(-1)
    elif options.activation == "silu":
        weights = _mask_future(F.silu(logits).div_(options.divisor), tile)
    else:
        weights = _mask_future(logits, tile)
    keep = None
    if options.dropout:
        mask, scale = dropout_mask(weights.shape, options.dropout, generator)
        keep = mask.to(weights.dtype).mul_(scale)
    return logits, weights, keep


def _mask_future(weights: Tensor, tile: slice, value: float = 0.0) -> Tensor:
    """Fills the keys after each query, in place: the upper triangle of the last T columns."""
    size = tile.stop - tile.start
    weights[..., tile].masked_fill_(torch.ones(size, size, dtype=torch.bool).triu(1), value)
    return weights
