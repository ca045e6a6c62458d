"""Exact search: scores every item."""

import logging
import re

import numpy as np
import torch
from jaxtyping import Bool, Float32

from recsys2stage.retrieval.index.base import Index
from recsys2stage.retrieval.index.rows import (
    Exclude,
    SearchResult,
    best_first,
    chunks,
    count_allowed,
    empty_result,
    mask_groups,
    masks_of,
    take_rows,
)
from recsys2stage.retrieval.index.top import block_cells, search_blocks, top_columns

logger = logging.getLogger("recsys2stage")

FEW = 8  # where at most 1 / FEW of the items are allowed, only these are scored
GATHERED = 4096  # of their vectors copied at once, which stay in the processor's cache
DEVICES = ("cpu", "cuda", "mps", "xpu")


class Exact(Index):
    """Brute-force search: scores every item. The reference for recall. A query over a
    million vectors of width 64 takes about 15 ms on one core.

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
        count, rest = len(self.vectors), np.arange(len(queries))
        if allowed is not None:
            few = FEW * count_allowed(allowed, len(queries)) <= count
            for rows, mask in mask_groups(allowed, np.flatnonzero(few)):
                top_scores[rows], top_items[rows] = self._search_few(queries[rows], k, take_rows(exclude, rows), mask)
            rest = np.flatnonzero(~few)
        top, cells = min(k, count), block_cells(count, queries.shape[1], k)
        if self._table.device.type != "cpu":
            cells = None  # a processor of another kind is faster at one large product
        for rows in chunks(rest, cells or count):
            items, offsets = exclude if len(rows) == len(queries) else take_rows(exclude, rows)
            owners, real = np.arange(len(rows)).repeat(np.diff(offsets)), items > 0
            excluded = (
                torch.from_numpy(owners[real]).to(self._table.device),
                torch.from_numpy(items[real].astype(np.int64) - 1).to(self._table.device),
            )
            chosen = torch.from_numpy(np.ascontiguousarray(queries[rows])).to(self._table.device)
            masks = masks_of(allowed, rows)
            if cells is None:
                scores = chosen @ self._table.T  # (b, V)
                scores[excluded] = -torch.inf
                if masks is not None:
                    scores.masked_fill_(torch.from_numpy(~masks).to(scores.device), -torch.inf)
                best, columns = top_columns(scores, top)
            else:
                best, columns = search_blocks(self._table, chosen, top, excluded, masks)
            top_scores[rows, :top], top_items[rows, :top] = best_first(best.cpu().numpy(), columns.cpu().numpy() + 1)
        return top_scores, top_items

    def _search_few(
        self,
        queries: Float32[np.ndarray, "B D"],
        k: int,
        exclude: Exclude,
        mask: Bool[np.ndarray, " V"] | None,
    ) -> SearchResult:
        """Scores only the items of a mask, the same for all queries."""
        top_scores, top_items = empty_result(len(queries), k)
        own = np.arange(len(self.vectors)) if mask is None else np.flatnonzero(mask)
        if not (top := min(k, len(own))):
            return top_scores, top_items
        for rows in chunks(np.arange(len(queries)), len(own)):
            scores = np.empty((len(rows), len(own)), np.float32)
            for start in range(0, len(own), GATHERED):
                part = slice(start, start + GATHERED)
                np.matmul(queries[rows], self.vectors[own[part]].T, out=scores[:, part])
            items, offsets = take_rows(exclude, rows)
            owners, places = np.repeat(np.arange(len(rows)), np.diff(offsets)), np.searchsorted(own, items - 1)
            held = own[np.minimum(places, len(own) - 1)] == items - 1
            scores[owners[held], places[held]] = -np.inf
            best, columns = top_columns(torch.from_numpy(scores), top)
            top_scores[rows, :top], top_items[rows, :top] = best_first(best.numpy(), 1 + own[columns.numpy()])
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
