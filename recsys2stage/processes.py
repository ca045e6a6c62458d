"""Collective operations between the processes of a fit, one process per device.

Without a process group, and in a group of one, each of them returns what it was given.
"""

import torch
from torch import Tensor
from torch import distributed as dist


def num_processes() -> int:
    """Number of processes of the fit."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def share_of(count: int) -> int:
    """The part of this process in a number that all processes share; the parts differ by at most 1."""
    processes = num_processes()
    rank = dist.get_rank() if processes > 1 else 0
    return count // processes + (rank < count % processes)


def gather_rows(rows: Tensor) -> Tensor:
    """The rows of all processes, those of process 0 first; each process may have another number of rows.

    Args:
        rows: (N, ...) of this process; has no gradient in the result.

    Returns:
        (sum of N over the processes, ...)
    """
    processes = num_processes()
    if processes == 1:
        return rows
    rows = rows.detach().contiguous()
    counts = [torch.zeros(1, dtype=torch.int64, device=rows.device) for _ in range(processes)]
    dist.all_gather(counts, torch.tensor([len(rows)], device=rows.device))
    lengths = torch.cat(counts).tolist()
    padded = rows.new_zeros(max(lengths), *rows.shape[1:])  # all_gather needs equal shapes
    padded[: len(rows)] = rows
    parts = [torch.empty_like(padded) for _ in range(processes)]
    dist.all_gather(parts, padded)
    return torch.cat([part[:length] for part, length in zip(parts, lengths, strict=True)])


def global_mean(mean: Tensor, rows: int | Tensor) -> Tensor:
    """The mean over the rows of all processes, from the means over the rows of each.

    DistributedDataParallel averages gradients over processes, as if each had as many rows. The gradient that this
    function returns is scaled such that their average is the gradient of the mean over all rows.

    Args:
        mean: scalar, over the rows of this process.
        rows: their number, or the sum of their weights (a scalar) in a weighted mean.
    """
    processes = num_processes()
    if processes == 1:
        return mean
    own_rows = torch.as_tensor(rows, dtype=torch.float64, device=mean.device)
    total = own_rows.clone()
    dist.all_reduce(total)
    own = mean * (own_rows * processes / total).to(mean.dtype)
    value = own.detach().clone()
    dist.all_reduce(value)
    return own + (value / processes - own.detach())


def average_sparse(gradient: Tensor) -> Tensor:
    """The average over all processes of a sparse gradient with one sparse dimension, coalesced.

    Rows are gathered, since NCCL cannot reduce sparse tensors. What is sent grows with the rows that have a gradient,
    not with the table.
    """
    gradient = gradient.coalesce()
    processes = num_processes()
    if processes == 1:
        return gradient
    rows, values = gather_rows(gradient.indices()[0]), gather_rows(gradient.values())
    return torch.sparse_coo_tensor(rows[None], values / processes, gradient.shape, check_invariants=False).coalesce()


def copy_from_first(*tensors: Tensor) -> None:
    """Overwrites tensors with those of process 0."""
    if num_processes() > 1:
        for tensor in tensors:
            dist.broadcast(tensor.detach(), 0)
