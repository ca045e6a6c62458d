"""The scan of Mamba-2: a linear recurrence over a history, in chunks of matrix products."""

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from recsys2stage.retrieval.encoders.layers import use_cpu_blocks, without_autocast

MIN_LOG_DECAY = -60.0  # e^-60 is negligible; denormals, not far below it, are 80 times slower on a CPU


def scan(
    v: Float[Tensor, "B L H K"],
    b: Float[Tensor, "B L S"],
    c: Float[Tensor, "B L S"],
    dt: Float[Tensor, "B L H"],
    rate: Float[Tensor, " H"],
    chunk_length: int,
) -> Float[Tensor, "B L H K"]:
    """Computes y of the recurrence in chunks: matrix products inside a chunk, a recurrence between chunks.

    With u_i = dt_i v_i, s_i the sum of -rate · dt from a chunk's first position to its position i, and h the state
    before the chunk (Dao & Gu 2024, section 6),

        y_i = Σ_{j ≤ i} (c_i·b_j) e^(s_i - s_j) u_j + e^(s_i) c_i h
        h after the chunk = e^(s_n) h + Σ_j e^(s_n - s_j) b_j u_j,  n its last position

    Args:
        v: inputs (x in Mamba-2).
        b: input projection into the state (B).
        c: output projection from the state (C).
        dt: step sizes (Δ).
        rate: decay rates (−A).
        chunk_length: P; L is a multiple of it.
    """
    if use_cpu_blocks(v):
        return _Scan.apply(v, b, c, dt, rate, chunk_length)  # type: ignore[no-untyped-call]  # torch: no types
    return _full_scan(v, b, c, dt, rate, chunk_length)


def _full_scan(v: Tensor, b: Tensor, c: Tensor, dt: Tensor, rate: Tensor, chunk_length: int) -> Tensor:
    """Computes all n chunks of length P at once; the recurrence between them is one product with n × n weights."""
    u, b, c, s = (_chunked(x, chunk_length) for x in (v * dt[..., None], b, c, dt * -rate))
    s = s.cumsum(2).transpose(2, 3)  # (B, n, H, P)
    inside = (c @ b.mT).tril()[:, :, None] * (s[..., None] - s[..., None, :]).clamp(max=0).exp()
    y = (inside @ u.transpose(2, 3)).transpose(2, 3)
    added = torch.einsum("bnphk,bnhp,bnps->bnshk", u, (s[..., -1:] - s).exp(), b)
    total = s[..., -1].cumsum(1)  # (B, n, H)
    between = (F.pad(total[:, :-1], (0, 0, 1, 0))[:, :, None] - total[:, None]).clamp(max=0).exp()  # (B, n, n, H)
    earlier = torch.ones_like(between[0, :, :, 0]).tril(-1)
    states = torch.einsum("bnmh,nm,bmshk->bnshk", between, earlier, added)
    return (y + torch.einsum("bnps,bnshk,bnhp->bnphk", c, states, s.exp())).reshape(v.shape)


def _chunked(x: Tensor, chunk_length: int) -> Tensor:
    return x.reshape(len(x), -1, chunk_length, *x.shape[2:])


class _Scan(torch.autograd.Function):
    """Computes the weights inside chunks for one head at a time, so that they stay in cache, and recomputes them in
    backward. As s_i scales y_i by e^(s_i) and u_i by e^(-s_i), its gradient is y_i·dy_i - u_i·du_i."""

    @staticmethod
    def forward(ctx: Any, v: Tensor, b: Tensor, c: Tensor, dt: Tensor, rate: Tensor, chunk_length: int) -> Tensor:
        chunks = _Chunks(v, b, c, dt, rate, chunk_length)
        states = chunks.b.mT @ (chunks.u * chunks.decay_to_end).flatten(2)  # added by each chunk, (B n, S, E)
        chunks.carry(states, range(chunks.count))
        y = (chunks.c @ states).view_as(chunks.u).mul_(chunks.decay_from_start)
        for head in range(len(rate)):
            y[:, :, head] += chunks.decay(head).mul_(chunks.products) @ chunks.u[:, :, head]
        y = y.view(v.shape)
        ctx.save_for_backward(v, b, c, dt, rate, states, y)
        ctx.chunk_length = chunk_length
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        v, b, c, dt, rate, states, y = ctx.saved_tensors
        with without_autocast(v):
            chunks = _Chunks(v, b, c, dt, rate, ctx.chunk_length)
            dy_chunks = dy.reshape(chunks.u.shape)
            dy_decayed = (dy_chunks * chunks.decay_from_start).flatten(2)
            dstates = chunks.c.mT @ dy_decayed
            chunks.carry(dstates, range(chunks.count - 1, -1, -1))
            dc = dy_decayed @ states.mT
            db = (chunks.u * chunks.decay_to_end).flatten(2) @ dstates.mT
            du = (chunks.b @ dstates).view_as(chunks.u).mul_(chunks.decay_to_end)
            dproducts = torch.zeros_like(chunks.products)
            for head in range(len(rate)):
                decay, dy_head = chunks.decay(head), dy_chunks[:, :, head]
                dproducts.addcmul_(decay, dy_head @ chunks.u[:, :, head].mT)
                du[:, :, head] += decay.mul_(chunks.products).mT @ dy_head
            dproducts.tril_()
            dc.baddbmm_(dproducts, chunks.b)
            db.baddbmm_(dproducts.mT, chunks.c)
            du = du.view(v.shape)
            ddt = (du * v).sum(-1)
            ds = (dy * y).sum(-1) - dt * ddt
            later = ds.flip(1).cumsum(1).flip(1)  # dt_i is part of s at i and all later positions
            dv = du.mul_(dt[..., None])
            return dv, db.view(b.shape), dc.view(c.shape), ddt - rate * later, -(dt * later).sum((0, 1)), None


class _Chunks:
    """Intermediate results of forward and backward, with the chunks of all histories stacked, (B n, P, ...)."""

    def __init__(self, v: Tensor, b: Tensor, c: Tensor, dt: Tensor, rate: Tensor, chunk_length: int) -> None:
        self.count = v.size(1) // chunk_length
        self.u, self.b, self.c, s = (
            _chunked(x, chunk_length).flatten(0, 1) for x in (v * dt[..., None], b, c, dt * -rate)
        )
        s = s.cumsum(1)  # (B n, P, H)
        self.s = s.permute(2, 0, 1).contiguous()
        self.decay_from_start = s.clamp(min=MIN_LOG_DECAY).exp_()[..., None]
        self.decay_to_end = (s[:, -1:] - s).clamp_(min=MIN_LOG_DECAY).exp_()[..., None]
        self.products = (self.c @ self.b.mT).tril_()  # c_i·b_j

    def decay(self, head: int) -> Tensor:
        """e^(s_i - s_j) of one head; clamped so that the unused part above the diagonal does not overflow."""
        return (self.s[head, :, :, None] - self.s[head, :, None]).clamp_(MIN_LOG_DECAY, 0).exp_()

    def carry(self, states: Tensor, order: range) -> None:
        """Replaces, in place, the state added by each chunk by the state before it; chunks are taken in `order`."""
        decay = self.decay_from_start[:, -1].view(-1, self.count, 1, self.u.size(2), 1)
        added = states.view(-1, self.count, states.size(1), *self.u.shape[2:])  # (B, n, S, H, K)
        state = torch.zeros_like(added[:, 0])
        for chunk in order:
            next_state = torch.addcmul(added[:, chunk], state, decay[:, chunk])
            added[:, chunk] = state
            state = next_state


def final_state(
    v: Float[Tensor, "B L H K"],
    b: Float[Tensor, "B L S"],
    dt: Float[Tensor, "B L H"],
    rate: Float[Tensor, " H"],
    events: Int[Tensor, " B"],
) -> Float[Tensor, "B S H K"]:
    """The state of the recurrence after the first events of each history; arguments as in `scan`."""
    u = v * decay_to(dt, rate, events)[..., None]
    return (b.mT @ u.flatten(2)).view(len(v), b.size(2), *v.shape[2:])


def decay_to(
    dt: Float[Tensor, "B L H"], rate: Float[Tensor, " H"], events: Int[Tensor, " B"]
) -> Float[Tensor, "B L H"]:
    """dt_j e^(s_n - s_j), the weight of position j in the state after n events; 0 from position n on."""
    real = torch.arange(dt.size(1), device=dt.device) < events[:, None]
    dt = dt * real[..., None]
    s = (dt * -rate).cumsum(1)
    return (s[:, -1:] - s).clamp_(min=MIN_LOG_DECAY).exp_().mul_(dt)
