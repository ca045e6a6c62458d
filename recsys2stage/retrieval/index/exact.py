"""Exact search: scores every item."""

import logging
import re

import numpy as np
import torch
from jaxtyping import Bool, Float32

from recsys2stage.retrieval.index.base import Index
from recsys2stage.retrieval.index.rows import Exclude, SearchResult, best_first, chunks, empty_result, take_rows

logger = logging.getLogger("recsys2stage")

FEW = 8  # where at most 1 / FEW of the items are allowed, only these are scored
DEVICES = ("cpu", "cuda", "mps", "xpu")


class Exact(Index):
    """Brute-force search: scores every item. Reference for recall; fast enough for up to a few 100,000 items.

    Args:
        device: torch device that computes the scores, for example cpu or cuda. Falls back to the CPU if the machine
            does not have it.

    Raises:
        ValueError: for an unknown device name.
    """

    def __init__(self, device: str = "cpu") -> None:
        if device.partition(":")[0] not in DEVICES or not re.fullmatch(r"[a-z]+(:\d+)?", device):
            raise ValueError(f"device is {device!r}, expected {', '.join(DEVICES)}, or with a number, such as cuda:1")
        self.device = device  # as given: a saved index may be loaded on a machine that has it

    def search(
        self,
        queries: Float32[np.ndarray, "B D"],
        k: int,
        exclude: Exclude | None = None,
        allowed: Bool[np.ndarray, "*rows V"] | None = None,
    ) -> SearchResult:
        exclude, allowed = self._check(queries, k, exclude), self._check_allowed(queries, allowed)
        top_scores, top_items = empty_result(len(queries), k)
        top, many = min(k, len(self.vectors)), np.arange(len(queries))
        if allowed is not None:
            few = FEW * allowed.sum(1) <= len(self.vectors)
            top_scores[few], top_items[few] = self._search_allowed(
                queries[few], k, take_rows(exclude, np.flatnonzero(few)), allowed[few]
            )
            many = np.flatnonzero(~few)
        for rows in chunks(many, len(self.vectors)):
            items, offsets = take_rows(exclude, rows)
            scores = (
                torch.from_numpy(np.ascontiguousarray(queries[rows])).to(self._table.device) @ self._table.T
            )  # (b, V)
            owners = np.repeat(np.arange(len(rows)), np.diff(offsets))[items > 0]
            excluded = owners * len(self.vectors) + items[items > 0] - 1
            scores.view(-1)[torch.from_numpy(excluded).to(scores.device)] = -torch.inf
            if allowed is not None:
                scores.masked_fill_(torch.from_numpy(~allowed[rows]).to(scores.device), -torch.inf)
            best, columns = scores.topk(top)
            # topk returns any of the items that tie at the k-th score, so rows with such a tie are fully sorted
            tied = ((best[:, -1] > -torch.inf) & ((scores >= best[:, -1:]).sum(1) > top)).nonzero().squeeze(1)
            if len(tied):
                ordered = scores[tied].sort(dim=1, descending=True, stable=True)
                best[tied], columns[tied] = ordered.values[:, :top], ordered.indices[:, :top]
            top_scores[rows, :top], top_items[rows, :top] = best_first(best.cpu().numpy(), columns.cpu().numpy() + 1)
        return top_scores, top_items

    def _prepare(self) -> None:
        self._table = torch.from_numpy(self.vectors).to(available_device(self.device))  # (V, D)


def available_device(device: str) -> str:
    """`device`, or the CPU with a warning if this machine or this build of torch does not have it."""
    try:
        torch.empty(0, device=device)
    except (AssertionError, RuntimeError):  # raised without the backend, and without the device
        logger.warning("the index is for the device %s, which this machine does not have; searching on the CPU", device)
        return "cpu"
    return device
