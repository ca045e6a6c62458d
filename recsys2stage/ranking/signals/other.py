"""OtherRetriever: scores and candidates of a second retriever."""

import io
import json
from pathlib import Path

import numpy as np
import torch

from recsys2stage.artifacts import read_manifest, take, verify
from recsys2stage.checkpoints import build, load_tensors, trained_until
from recsys2stage.data.batches import Padded, Ragged, as_history
from recsys2stage.data.dataset import Dataset
from recsys2stage.options import STRETCH
from recsys2stage.ranking.signals.base import Proposer, Requests
from recsys2stage.ranking.signals.keys import ROWS_IN_FLIGHT, slice_rows, top_by_score
from recsys2stage.retrieval.index import Index
from recsys2stage.retrieval.inputs import fields_read
from recsys2stage.retrieval.towers import TOWERS, TwoTower

KEPT = {"towers": dict, "request_time": str}  # fields of its index's manifest
DESCRIBED = "described"  # the table with these fields, as JSON
ROWS_AT_ONCE = 64  # histories per encoder batch


class OtherRetriever(Proposer):
    """The score of a second retriever (another encoder, loss or seed) trained on the same split.

    The errors of two retrievers differ, so their ensemble ranks better. The second retriever is stored in the tables.
    It encodes every history again in mining, evaluation and serving. It gets the same request time as the first one.

    Proposals are the nearest items in its vector space, by exact search.

    Args:
        index: folder written by export-index for the second retriever.
        candidates: number of items proposed for each request; 0: none.
    """

    reads_allowed = True
    by_id = True
    names = ("score",)

    def __init__(self, index: str, candidates: int = 0) -> None:
        super().__init__(candidates)
        self.index = str(index)
        self._cache: tuple[Padded, np.ndarray, np.ndarray] | None = None  # last histories, request times and queries

    def fit(self, dataset: Dataset, vectors: np.ndarray) -> None:
        folder = Path(self.index)
        make = f"recsys export-index --output {folder}"
        manifest = read_manifest(folder, "index", make)
        dataset.check_split(folder, take(manifest, "split_hash", str, folder))
        if (fold := take({"fold": None, **manifest}, "fold", str | None, folder)) != dataset.fold:
            theirs, ours = (f"fold {one}" if one else "no user" for one in (fold, dataset.fold))
            raise ValueError(
                f"the retriever of {folder} was fitted on all users but {theirs}, expected all but {ours}, as the "
                "first retriever was; fit it with the same data.fold and export its index"
            )
        until = trained_until(manifest, folder)
        if until != dataset.until:
            raise ValueError(
                f"{folder} was trained on {STRETCH[until]}, expected {STRETCH[dataset.until]}, as the first retriever; "
                f"give the index of one that was: {make}"
            )
        verify(folder, manifest, make)
        own = Index.load(folder).vectors
        kept = {name: take(manifest, name, kind, folder) for name, kind in KEPT.items()}
        tables = {
            "vectors": np.concatenate([np.zeros_like(own[:1]), own]),
            "weights": np.frombuffer((folder / TOWERS).read_bytes(), dtype=np.uint8),
            DESCRIBED: np.frombuffer(json.dumps(kept).encode(), dtype=np.uint8),
        }
        self.restore(tables)
        if read := fields_read(self._towers.inputs) - {"ratings"}:
            raise ValueError(
                f"the retriever of {folder} reads {', '.join(sorted(read))} of events, which signals do not receive; "
                "choose one without such inputs"
            )

    def restore(self, tables: dict[str, np.ndarray]) -> None:
        super().restore(tables)
        self._cache = None
        try:
            self._options = json.loads(np.asarray(tables[DESCRIBED]).tobytes())
            weights = np.asarray(tables["weights"]).tobytes()
        except (KeyError, ValueError, RecursionError) as error:
            raise ValueError(f"the tables of {type(self).__name__} are incomplete ({error!r}); mine again") from error
        where, make = f"the second retriever of {type(self).__name__}", "recsys mine-negatives"
        towers, _ = (take(self._options, name, kind, where) for name, kind in KEPT.items())
        self._towers: TwoTower = build(TwoTower, towers, load_tensors(io.BytesIO(weights), where, make), where)
        if "vectors" not in tables or len(tables["vectors"]) != self._towers.items.num_items + 1:
            raise ValueError(f"{where} has not as many item vectors as items; mine again: {make}")

    @property
    def reads_times(self) -> bool:
        return self._options["request_time"] != "none" or bool(self._towers.encoder.reads_times)

    @property
    def reads_ratings(self) -> bool:
        return "ratings" in fields_read(self._towers.inputs)

    @property
    def reads_user(self) -> bool:
        return self._towers.user is not None

    def __call__(self, requests: Requests) -> np.ndarray:
        vectors, items = np.asarray(self.tables["vectors"]), requests.items.clip(min=0)
        score = np.matmul(vectors[items], self._queries(requests)[..., None])[..., 0]
        return np.where(items > 0, score, np.float32(0))[..., None]

    @torch.inference_mode()
    def _queries(self, requests: Requests) -> np.ndarray:
        """(B, D) float32; zero where there is no history."""
        if self._cache and self._cache[0] is requests.history and np.array_equal(self._cache[1], requests.request_time):
            return self._cache[2]  # `propose` and `__call__` take the same requests
        queries = np.zeros((len(requests.request_time), self.tables["vectors"].shape[1]), dtype=np.float32)
        nonempty = np.flatnonzero(requests.history.lengths)
        for begin in range(0, len(nonempty), ROWS_AT_ONCE):
            rows = nonempty[begin : begin + ROWS_AT_ONCE]
            padded = _newest(requests.history, rows, self._towers.max_length)
            history = as_history(padded, self._options["request_time"], requests.request_time[rows])
            queries[rows] = self._towers.queries(history).float().numpy()
        self._cache = requests.history, requests.request_time, queries
        return queries

    def propose(self, requests: Requests, excluded: Ragged) -> np.ndarray:
        vectors, queries = np.asarray(self.tables["vectors"]), self._queries(requests)
        items = np.arange(len(vectors))
        proposals = np.zeros((len(queries), self.candidates), dtype=np.int64)
        for begin in range(0, len(queries), ROWS_IN_FLIGHT):
            rows = slice(begin, begin + ROWS_IN_FLIGHT)
            scores = queries[rows] @ vectors.T
            scores[np.asarray(requests.history.lengths)[rows] == 0] = -np.inf
            own = slice_rows(excluded, begin, begin + len(scores))
            allowed = None if requests.allowed is None else requests.allowed[rows]
            proposals[rows] = top_by_score(scores, items, own, self.candidates, allowed)
        return proposals


def _newest(padded: Padded, rows: np.ndarray, length: int) -> Padded:
    """Selected rows, truncated to their newest `length` events."""
    lengths = np.asarray(padded.lengths)[rows]
    kept = np.minimum(lengths, length)
    position = (lengths - kept)[:, None] + np.arange(max(int(kept.max(initial=0)), 1))
    real = np.arange(position.shape[1]) < kept[:, None]
    position = np.where(real, position, 0)

    def part(values: np.ndarray) -> np.ndarray:
        return np.where(real, np.take_along_axis(values[rows], position, axis=1), values.dtype.type(0))

    return Padded(
        items=part(padded.items),
        times=part(padded.times),
        lengths=kept,
        ratings=None if padded.ratings is None else part(padded.ratings),
        user=None if padded.user is None else tuple(values[rows] for values in padded.user),
    )
