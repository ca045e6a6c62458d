"""Rankers of one set of candidate lists beside each other, and averages of several: accuracy and time of a request.

    python benchmarks/rankers.py RUN --data DATA MLP=runs/a/best.ckpt 'three seeds=runs/a/best.ckpt,runs/b/best.ckpt'
    python benchmarks/rankers.py RUN --validation ...    without the test, to choose a row; records nothing
    python benchmarks/rankers.py RUN --show    print the recorded rows only

RUN holds candidates/ and, for the test, a bundle/, which finds the candidates of the test users, once for all rows.
Several checkpoints of a row are averaged as by `recsys export-bundle --average`. Validation metrics are those of the
validation lists, which selected the checkpoints; test metrics are those of the candidates in service, and a target that
was not retrieved counts as 0. Differences to the first row are paired, with a standard error clustered by user. The
time is the ranker's CPU time in one thread for one request: features, scorer and order, without retrieval and signals.
"""

import argparse
import json
import shlex
import sys
import time
from collections.abc import Iterable
from datetime import date
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from exchange import check_one_target
from tables import ROOT, commit
from torch import Tensor

from recsys2stage.checkpoints import build, read_checkpoint
from recsys2stage.cli.export import RERANKER_OPTIONS
from recsys2stage.columns import PAD
from recsys2stage.data.batches import in_chunks
from recsys2stage.data.dataset import Dataset
from recsys2stage.metrics import compute_metrics, compute_rank
from recsys2stage.ranking.average import Average, SecondStage, average_weights
from recsys2stage.ranking.candidates import Candidates, Lists
from recsys2stage.ranking.ranker import NOT_RETRIEVED
from recsys2stage.ranking.reranker import Reranker
from recsys2stage.recommender import Recommender

FILE = ROOT / "docs/measured/second_stage_scorers.jsonl"
TIMED, WARM = 100, 10  # requests


class Scored(NamedTuple):
    """One ranker and its logits of all lists, −inf at padding, in batches."""

    ranker: Reranker
    validation: list[Tensor]
    test: list[Tensor]


def load(path: Path) -> Reranker:
    options, weights = read_checkpoint(path, "reranker", "recsys fit")
    options = {"mask_ids": False} | options
    own = {"dim": options["vector_dim"]} | {name: options[name] for name in RERANKER_OPTIONS}
    reranker: Reranker = build(Reranker, own, weights, path)
    return reranker.freeze()


@torch.inference_mode()
def score_lists(ranker: Reranker, lists: Iterable[Lists]) -> list[Tensor]:
    batches = [batch.candidates for batch in lists]
    return [ranker(batch).masked_fill(batch.items == PAD, -torch.inf) for batch in batches]


def ranks(logits: Iterable[Tensor], lists: Iterable[Lists]) -> np.ndarray:
    """Rank of the positive of each list, (n,)."""
    parts = []
    for values, batch in zip(logits, lists, strict=True):
        rank = compute_rank(values, batch.positive.clamp(min=0))
        parts.append(torch.where(batch.positive >= 0, rank, NOT_RETRIEVED).numpy())
    return np.concatenate(parts)


def test_lists(bundle: Path, dataset: Dataset, size: int) -> list[Lists]:
    """The candidates of all test users, as in an evaluation."""
    recommender = Recommender.load(bundle)
    recommender.check(dataset)
    users, found = dataset.users("test"), []
    for part in in_chunks(len(users), size):
        batch = users[part]
        padded = dataset.histories(batch, "test", recommender.towers.max_length)
        action = dataset.target_action(batch, "test", recommender.next_action)
        times = dataset.request_times(batch, "test")
        queries = recommender.queries(padded, times, action)
        candidates = recommender.candidates(queries, dataset.filtered_items(batch, "test"), padded, times)
        is_target = candidates.items == dataset.targets(batch, "test")[:, None]
        positive = torch.from_numpy(np.where(is_target.any(1), is_target.argmax(1), -1))
        found.append(Lists(recommender.candidate_batch(queries, candidates, padded, times), positive))
    return found


@torch.inference_mode()
def request_ms(ranker: SecondStage, lists: list[Lists]) -> float:
    """Median CPU milliseconds of one request with all its candidates."""
    batch, taken = lists[0].candidates, []
    for number in range(WARM + TIMED):
        row = number % len(batch.items)
        one = type(batch)(*(value[row : row + 1] for value in batch))
        start = time.process_time()
        ranker(one).argsort(descending=True)
        taken.append(time.process_time() - start)
    return 1e3 * float(np.median(taken[WARM:]))


def difference(values: np.ndarray, first: np.ndarray, users: np.ndarray) -> list[float]:
    """Mean difference to the first row, and its standard error clustered by user."""
    gain, number = values - first, np.unique(users, return_inverse=True)[1]
    residual = np.bincount(number, gain - gain.mean())
    return [round(float(gain.mean()), 5), round(float(np.sqrt(np.square(residual).sum()) / len(gain)), 5)]


def measure(options: argparse.Namespace) -> None:
    dataset = None if options.validation else Dataset(options.data)
    if dataset is not None:
        check_one_target(dataset)
    data = Candidates(options.run / "candidates", batch_size=64)
    data.setup("validate")
    validation = list(data.val_dataloader())
    users, test = {"val": data.lists.user[data.lists.fold == "select"]}, list[Lists]()
    if dataset is not None:
        users["test"], test = dataset.users("test"), test_lists(options.run / "bundle", dataset, 64)
    known: dict[str, Scored] = {}
    firsts: dict[str, np.ndarray] = {}
    for row in options.rows:
        label, _, paths = row.rpartition("=")
        for path in paths.split(","):
            if path not in known:
                ranker = load(Path(path))
                known[path] = Scored(ranker, score_lists(ranker, validation), score_lists(ranker, test))
        members = [known[path] for path in paths.split(",")]
        weights = torch.ones(1)
        if len(members) > 1:
            targets = [lists.positive for lists in validation]
            scored = [
                [(own, positive, own > -torch.inf) for own, positive in zip(one.validation, targets, strict=True)]
                for one in members
            ]
            weights = average_weights(scored)
        whole: SecondStage = members[0].ranker
        if len(members) > 1:
            whole = Average([one.ranker for one in members], weights).freeze()
        measured: dict[str, Any] = {"run": options.run.name, "label": label, "date": date.today().isoformat()}
        for name in users:
            lists = validation if name == "val" else test
            batches = zip(*(getattr(one, "validation" if name == "val" else "test") for one in members), strict=True)
            metrics = compute_metrics(ranks((torch.stack(each, dim=-1) @ weights for each in batches), lists), [10])
            measured |= {
                f"{name}_{metric}@10": round(float(metrics[f"{metric}@10"].mean()), 4) for metric in ("hr", "ndcg")
            }
            first = firsts.setdefault(name, metrics["ndcg@10"])
            measured[f"{name}_difference"] = difference(metrics["ndcg@10"], first, users[name])
        measured |= {
            "request_ms": round(request_ms(whole, test or validation), 2),
            "commit": commit(),
            "command": shlex.join(sys.argv),
        }
        print(json.dumps(measured), flush=True)
        if not (options.no_record or options.validation):
            with FILE.open("a") as out:
                out.write(json.dumps(measured) + "\n")


def show(run: str) -> None:
    print("| ranker | validation NDCG@10 | test HR@10 | test NDCG@10 | difference | ms |")
    print("|---|---|---|---|---|---|")
    for row in map(json.loads, FILE.read_text().splitlines()):
        if row["run"] == run:
            print(
                f"| {row['label']} | {row['val_ndcg@10']:.4f} | {row['test_hr@10']:.4f} | {row['test_ndcg@10']:.4f} "
                f"| {row['test_difference'][0]:+.4f} ± {row['test_difference'][1]:.4f} "
                f"| {row['request_ms']:.1f} |"
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="folder with candidates/ and bundle/")
    parser.add_argument("rows", nargs="*", help="LABEL=CHECKPOINT[,CHECKPOINT...]")
    parser.add_argument("--data", type=Path, help="prepared dataset")
    parser.add_argument("--validation", action="store_true", help="measure the validation lists only, record nothing")
    parser.add_argument("--no-record", action="store_true", help="print only")
    parser.add_argument("--show", action="store_true", help="print the recorded rows only")
    options = parser.parse_intermixed_args()
    torch.set_num_threads(1)
    if not options.show:
        measure(options)
    if FILE.exists() and not options.validation:
        show(options.run.name)


if __name__ == "__main__":
    main()
