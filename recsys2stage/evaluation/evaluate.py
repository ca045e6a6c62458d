"""Both stages and two baselines, side by side on the same users, in full ranking or among sampled items."""

import re
from typing import Any, NamedTuple

import numpy as np
import torch
from tqdm import tqdm

from recsys2stage import columns as c
from recsys2stage.data.batches import Ragged, in_chunks
from recsys2stage.data.dataset import Dataset
from recsys2stage.data.options import Part, RequestTime
from recsys2stage.evaluation.baselines import Markov, Popularity
from recsys2stage.evaluation.cohorts import cohorts
from recsys2stage.evaluation.compare import paired
from recsys2stage.evaluation.report import TITLES
from recsys2stage.metrics import (
    bootstrap,
    compute_calibration,
    compute_exposure,
    compute_metrics,
    compute_rank,
    interval,
)
from recsys2stage.recommender import Recommender

TOP = 10  # how many items a user is shown, for what is measured of the shown

SEEN_FILTER = {"filter": "all items the user has met", "keep": "none, seen items are ranked too"}

SAMPLED = (
    "sampled: 1 positive and {} random negatives; sampled metrics are not comparable to full ranking and may order "
    "models differently (Krichene & Rendle 2020)"
)


def negatives_of(protocol: str) -> int | None:
    """How many random items a target is ranked among; None: the whole catalogue.

    Args:
        protocol: full, or sampled-N, such as sampled-100.
    """
    if protocol == "full":
        return None
    if sampled := re.fullmatch(r"sampled-([1-9]\d*)", protocol):
        return int(sampled[1])
    raise ValueError(f"protocol is {protocol!r}, expected full or sampled-N with N from 1 on, such as sampled-100")


class Outcome(NamedTuple):
    """What came of the targets of n users."""

    ranks: dict[str, np.ndarray]  # model -> (n,) int64, rank of the target, from 1
    place: np.ndarray  # (n,) int64, place of the target among the K candidates, from 1; K + 1 where it is not there
    shown: dict[str, np.ndarray]  # model -> (V + 1,) int64, in how many users' top 10 an item is; in full ranking only
    confidence: np.ndarray  # (n,) float32, the ranker's largest probability; NaN where it gave none
    hit: np.ndarray  # (n,) bool, whether that item is the target


def rank_users(
    dataset: Dataset,
    recommender: Recommender,
    users: np.ndarray,
    split: Part,
    batch_size: int = 256,
    negatives: int | None = None,
    seed: int = 0,
) -> Outcome:
    """Rank of each user's target by every model, and what the models show.

    The retriever and the baselines rank all items but the seen ones that the protocol filters (with `repeats: keep`
    none). The ranker orders the retriever's candidates anew; what lies outside them keeps the retriever's order below.
    Its probabilities are a softmax over the candidates.

    Args:
        negatives: each order is restricted to the target and so many random items; None: to none.
        seed: of the draw, which is a function of seed and user alone and so the same for every model.
    """
    baselines: dict[str, Popularity | Markov] = {"popularity": Popularity(dataset), "markov": Markov(dataset)}
    vectors = recommender.towers.every_item().detach().float()
    names = [name for name in TITLES if recommender.reranker or "ranker" not in name]
    parts: dict[str, list[np.ndarray]] = {name: [] for name in [*names, "place", "confidence", "hit"]}
    often = {name: np.zeros(dataset.num_items + 1, dtype=np.int64) for name in names}
    for part in tqdm(list(in_chunks(len(users), batch_size)), desc=f"rank {split} targets", unit="batch"):
        batch = users[part]
        padded = dataset.histories(batch, split, recommender.towers.max_length)
        known, target = dataset.known(batch, split), dataset.targets(batch, split)
        excluded = outside_ranking(known, target, dataset.num_items, batch, negatives, seed)
        last = padded.items[np.arange(len(batch)), np.maximum(padded.lengths - 1, 0)]
        tops: dict[str, np.ndarray] = {}
        for name, baseline in baselines.items():
            scores = torch.from_numpy(baseline.scores(last)[:, 1:])
            parts[name].append(_filtered_rank(scores, excluded, target))
            tops[name] = top_of(scores)
        target_action = dataset.target_action(batch, split, recommender.next_action)
        now = dataset.request_times(batch, split)
        queries = recommender.queries(padded, now, target_action)
        scores = torch.from_numpy(queries) @ vectors.T  # (B, V)
        first = _filtered_rank(scores, excluded, target)
        new = padded.lengths == 0  # served by popularity
        parts["retriever"].append(np.where(new, parts["popularity"][-1], first))
        tops["retriever"] = top_of(scores)
        candidates = recommender.candidates(queries, known, padded, now)
        items = candidates.items
        there = items == target[:, None]
        parts["place"].append(np.where(there.any(1), there.argmax(1), items.shape[1]) + 1)
        confidence, hit = np.full(len(batch), np.nan, np.float32), np.zeros(len(batch), dtype=bool)
        if recommender.reranker:
            own = scores.gather(1, torch.from_numpy(target - 1)[:, None])
            listed = scores.gather(1, torch.from_numpy(np.maximum(items - 1, 0)))
            ranked = ~np.take_along_axis(excluded, np.maximum(items, c.PAD), axis=1)
            before = ((listed >= own).numpy() & ranked & ~there).sum(1)
            shown = recommender.listed(queries, candidates, padded, now)
            for name, masked in (("ranker", False), ("ranker_ids_masked", True)):
                logits = recommender.rerank(shown, ids_masked=masked)
                logits[~ranked] = -np.inf
                second = second_rank(np.where(ranked, items, -1), logits, target, first, before)
                parts[name].append(np.where(new, parts["popularity"][-1], second))
                tops[name] = top_of(torch.from_numpy(logits), items)
                if not masked:
                    confidence, hit = first_choice(logits, there)
        parts["confidence"].append(np.where(new, np.float32(np.nan), confidence))
        parts["hit"].append(hit)
        for name, top in tops.items():
            seen = np.where(new[:, None], tops["popularity"], top)
            often[name] += np.bincount(seen[seen > 0], minlength=dataset.num_items + 1)
    whole = {name: np.concatenate(values) for name, values in parts.items()}
    ranks = {name: whole[name] for name in names}
    return Outcome(ranks, whole["place"], {} if negatives else often, whole["confidence"], whole["hit"])


def top_of(scores: torch.Tensor, items: np.ndarray | None = None) -> np.ndarray:
    """The items of the TOP best scores of each row, best first, (B, TOP); −1 past the last, which has no score.

    Args:
        scores: (B, W), −inf for what is not ranked.
        items: (B, W) whose they are; None: columns are items, from 1.
    """
    top = np.full((len(scores), TOP), -1)
    best, place = (part.numpy() for part in scores.topk(min(TOP, scores.shape[1])))
    chosen = place + 1 if items is None else np.take_along_axis(items, place, axis=1)
    top[:, : place.shape[1]] = np.where(best > -np.inf, chosen, -1)
    return top


def first_choice(logits: np.ndarray, there: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The largest probability of each list, (B,), and whether the target has it, (B,) bool; NaN for an empty list.

    Args:
        logits: (B, K), −inf for no candidate.
        there: (B, K) where the target stands.
    """
    best, place = torch.from_numpy(logits).softmax(1).max(1)
    return best.numpy(), there[np.arange(len(there)), place.numpy()]


def outside_ranking(
    known: Ragged, target: np.ndarray, num_items: int, users: np.ndarray, negatives: int | None, seed: int
) -> np.ndarray:
    """Which items a target is not ranked among: padding, the known, and those that were not drawn, (B, V + 1) bool.

    Args:
        known: the seen items that are filtered for each user.
        target: (B,) items.
        num_items: V.
        users: (B,) numbers of the users, for the draw.
        negatives: how many items are drawn for each user, uniformly and without replacement, from those neither known
            nor the target; all of them where fewer are left. None: nothing is drawn, all are ranked.
        seed: of the draw.
    """
    excluded = np.zeros((len(target), num_items + 1), dtype=bool)
    excluded[:, c.PAD] = excluded[known.rows, known.values] = True
    if negatives is None:
        return excluded
    for row, user in enumerate(users.tolist()):
        unmet = ~excluded[row]
        unmet[target[row]] = False
        left = np.flatnonzero(unmet)
        sampled = np.random.default_rng([seed, user]).choice(left, min(negatives, len(left)), replace=False)
        excluded[row] = True
        excluded[row, sampled] = excluded[row, target[row]] = False
    return excluded


def _filtered_rank(scores: torch.Tensor, excluded: np.ndarray, target: np.ndarray) -> np.ndarray:
    scores.masked_fill_(torch.from_numpy(excluded[:, 1:]), -torch.inf)
    return compute_rank(scores, torch.from_numpy(target - 1)).numpy()


def second_rank(
    items: np.ndarray, logits: np.ndarray, target: np.ndarray, first: np.ndarray, before: np.ndarray
) -> np.ndarray:
    """Rank of each target after the second stage, (B,) int64.

    Args:
        items: (B, K) candidates, −1 past the last.
        logits: (B, K) the second stage's scores.
        target: (B,) items.
        first: (B,) rank by the retriever over the catalogue.
        before: (B,) how many candidates, other than the target, the retriever scores at least as high as the target.
    """
    place = items == target[:, None]
    found = place.any(1)
    among = compute_rank(torch.from_numpy(logits), torch.from_numpy(place.argmax(1))).numpy()
    below = (items > 0).sum(1) + first - before
    return np.where(found, among, below)


def summarise(
    dataset: Dataset, ranks: dict[str, np.ndarray], users: np.ndarray, split: Part, resamples: int, seed: int
) -> dict[str, Any]:
    """Means with 95 % bootstrap intervals, the paired difference of the two stages with its test, and cohorts."""
    names = [name for name in TITLES if name in ranks]
    values = {name: compute_metrics(ranks[name]) for name in names}
    metrics = list(values[names[0]])
    table = np.stack([values[name][metric] for name in names for metric in metrics], axis=1)
    means = bootstrap(table, resamples, seed)
    low, high = interval(means)
    columns = [(name, metric) for name in names for metric in metrics]
    models: dict[str, dict[str, dict[str, float]]] = {name: {} for name in names}
    for j, (name, metric) in enumerate(columns):
        models[name][metric] = {"value": float(table[:, j].mean()), "low": float(low[j]), "high": float(high[j])}
    report: dict[str, Any] = {"users": len(users), "models": models}
    if "ranker" in names:
        report["comparison"] = paired(values["ranker"], values["retriever"], resamples, seed)
    report["cohorts"] = {
        cohort: {
            label: {"users": int(member.sum())}
            | {
                name: {m: float(values[name][m][member].mean()) for m in ("hr@10", "ndcg@10", "recall@100")}
                for name in names
            }
            for label, member in groups
            if member.any()
        }
        for cohort, groups in cohorts(dataset, users, split).items()
    }
    return report


def beyond_accuracy(dataset: Dataset, outcome: Outcome, k: int) -> dict[str, Any]:
    """The candidates' recall and, in full ranking, what is shown and how true the ranker's probabilities are.

    Args:
        k: how many candidates there were.
    """
    report: dict[str, Any] = {"candidates": {"k": k, "recall": float((outcome.place <= k).mean())}}
    if not outcome.shown:
        return report
    report["exposure"] = {
        name: compute_exposure(shown, dataset.train_counts)
        for name, shown in outcome.shown.items()
        if name != "ranker_ids_masked"
    }
    sure = np.isfinite(outcome.confidence)
    if sure.any():
        report["calibration"] = compute_calibration(outcome.confidence[sure], outcome.hit[sure])
    return report


def describe(
    dataset: Dataset,
    request_time: RequestTime,
    split: Part,
    next_action: str = "none",
    negatives: int | None = None,
    seed: int = 0,
) -> dict[str, Any]:
    """Everything a reader must know to compare numbers.

    Args:
        negatives: how many random items a target is ranked among; None: the catalogue.
        seed: of their draw.
    """
    return {
        **dataset.protocol,
        "evaluated": split,
        "ranking": "full, over all rated items" if negatives is None else SAMPLED.format(negatives),
        **({} if negatives is None else {"negatives_seed": seed}),
        "seen_filter": SEEN_FILTER[dataset.seen_rule],
        "validation_item": "in the input at test time; the ranker trains on it, the retriever never does",
        "request_time": request_time,
        **({} if next_action == "none" else {"next_action": next_action}),
        "score_ties": "counted against the target",
        "split_hash": dataset.manifest["split_hash"],
    }


def protocol_line(protocol: dict[str, Any], users: int, num_items: int) -> str:
    """The protocol in one line, for a reader."""
    filters = [
        text.format(protocol[key])
        for key, text in (("min_rating", "ratings ≥ {}"), ("core", "{}-core"), ("cold_items", "{} of items withheld"))
        if protocol.get(key)
    ]
    more = protocol["split"] == "LeaveOneOut" and protocol.get("val", 1) > 1
    held = f" ({protocol['val']} events of each user validate)" if more else ""
    keeps = protocol["seen_filter"] == SEEN_FILTER["keep"]
    without = ", seen ones included" if keeps else f" without {protocol['seen_filter']}"
    return "protocol: " + "; ".join(
        [
            f"{protocol['split']} split{held}, {protocol['evaluated']} targets of {users:,} users",
            f"full ranking of {num_items:,} items{without}"
            if protocol["ranking"].startswith("full")
            else f"{protocol['ranking']}; negatives drawn from {num_items:,} items{without}",
            f"equal times in {protocol['tie_break']}",
            f"repeats: {protocol['repeats']}",
            *filters,
            f"validation item {protocol['validation_item']}",
            f"request time: {protocol['request_time']}",
            *([f"next action: {protocol['next_action']}"] if "next_action" in protocol else []),
            f"score ties {protocol['score_ties']}",
        ]
    )
