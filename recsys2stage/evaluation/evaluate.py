"""Evaluation of both stages and the baselines on the same users, with full ranking or sampled negatives."""

import re
from typing import Any, NamedTuple

import numpy as np
import torch

from recsys2stage.data.batches import in_chunks
from recsys2stage.data.dataset import At, Dataset
from recsys2stage.data.summary import progress
from recsys2stage.evaluation.baselines import Baseline, Popularity, fit_baselines
from recsys2stage.evaluation.by_gap import metrics_by_gap
from recsys2stage.evaluation.cohorts import cohorts
from recsys2stage.evaluation.compare import paired_differences
from recsys2stage.evaluation.ranked_items import RankedItems
from recsys2stage.evaluation.report import STAGES
from recsys2stage.evaluation.targets import Targets, gaps
from recsys2stage.metrics import (
    bootstrap,
    compute_calibration,
    compute_exposure,
    compute_rank,
    interval,
)
from recsys2stage.options import STRETCH, Part, RequestTime
from recsys2stage.recommender import Recommender

TOP = 10  # length of the lists that the beyond-accuracy metrics measure

SEEN_FILTER = {"filter": "seen items", "keep": "none, seen items are ranked too"}

VALIDATION_ITEM = "in the input at test time; the ranker trains on it"
REFITTED = "; retriever, signals and baselines learned again from all events before the test targets"

SAMPLED = (
    "sampled: 1 positive and {} random negatives; sampled metrics are not comparable to full ranking and may order "
    "models differently (Krichene & Rendle 2020)"
)


def num_negatives(protocol: str) -> int | None:
    """Number of sampled negatives per target; None: full ranking.

    Args:
        protocol: full, or sampled-N, such as sampled-100.
    """
    if protocol == "full":
        return None
    if sampled := re.fullmatch(r"sampled-([1-9]\d*)", protocol):
        return int(sampled[1])
    raise ValueError(
        f"protocol is {protocol!r}, expected full or sampled-N with N from 1 on; set protocol to sampled-100, for "
        "example"
    )


class RankingResult(NamedTuple):
    """Ranks of n targets, and top-10 counts of their lists."""

    ranks: dict[str, np.ndarray]  # model -> (n,) int64, rank of the target, from 1
    candidate_rank: np.ndarray  # (n,) int64, rank of the target among the K candidates, from 1; K + 1 if not among them
    top_counts: dict[str, np.ndarray]  # model -> (V + 1,) int64, lists with the item in their top 10; {} if sampled
    confidence: np.ndarray  # (n,) float32, the ranker's largest probability; NaN without a ranker or a history
    hit: np.ndarray  # (n,) bool, whether the item with that probability is the target


def rank_users(
    dataset: Dataset,
    recommender: Recommender,
    users: np.ndarray,
    at: At,
    batch_size: int = 256,
    negatives: int | None = None,
    seed: int = 0,
    baselines: dict[str, Baseline] | None = None,
) -> RankingResult:
    """Ranks each target with every model and counts the items in the top 10.

    The retriever and the baselines rank all items except the seen ones (with `repeats: keep`, all items). The ranker
    re-ranks the retriever's candidates; items outside them follow in the retriever's order. Its probabilities are a
    softmax over the candidates.

    Args:
        dataset: prepared dataset.
        recommender: both stages, or the first.
        users: (n,) user of each target; a user may have several.
        at: (n,) indices of the targets, or `val` or `test` for each user's (first) target.
        batch_size: targets per batch.
        negatives: number of sampled negatives that each target is ranked against; None: full ranking.
        seed: of the samples, which depend on seed and user only and so are the same for every model.
        baselines: fitted baselines by name; None: the default ones.
    """
    baselines = fit_baselines(None, dataset) if baselines is None else baselines
    popularity = Popularity().fit(dataset)
    vectors = recommender.towers.all_item_vectors().detach().float()
    names = [*baselines, *(name for name in STAGES if recommender.reranker or "ranker" not in name)]
    parts: dict[str, list[np.ndarray]] = {name: [] for name in [*names, "candidate_rank", "confidence", "hit"]}
    top_counts = {name: np.zeros(dataset.num_items + 1, dtype=np.int64) for name in names}
    targets = Targets.of(dataset, users, at)
    events, counted = targets.events, np.isin(targets.events, targets.requests().events)  # a basket has one list
    for part in progress(list(in_chunks(len(users), batch_size)), "rank targets"):
        batch, own = users[part], events[part]
        padded = dataset.histories(batch, own, recommender.towers.max_length)
        filtered, target = dataset.filtered_items(batch, own), dataset.targets(batch, own)
        pool = RankedItems.of(filtered, target, dataset.num_items, batch, negatives, seed)
        history = dataset.seen(batch, own)
        most_popular = pool.baseline_ranks(popularity, history)
        tops: dict[str, np.ndarray] = {}
        for name, baseline in baselines.items():
            parts[name].append(pool.baseline_ranks(baseline, history))
            if negatives is None:
                tops[name] = baseline.best(history, pool.excluded, TOP)
        target_action = dataset.target_action(batch, own, recommender.next_action)
        request_times = dataset.request_times(batch, own)
        queries = recommender.queries(padded, request_times, target_action)
        candidates = recommender.candidates(queries, filtered, padded, request_times)
        items, depth = candidates.items, candidates.items.shape[1]
        retriever_rank, scores, tops["retriever"] = pool.retriever_ranks(queries, vectors, items, TOP)
        new = padded.lengths == 0  # served by popularity
        parts["retriever"].append(np.where(new, most_popular, retriever_rank))
        is_target = items == target[:, None]
        parts["candidate_rank"].append(np.where(is_target.any(1), is_target.argmax(1), depth) + 1)
        confidence, hit = np.full(len(batch), np.nan, np.float32), np.zeros(len(batch), dtype=bool)
        if recommender.reranker:
            ranked = pool.holds(items)
            above = ((scores[:, 1:] >= scores[:, :1]) & ranked & ~is_target).sum(1)
            inputs = recommender.candidate_batch(queries, candidates, padded, request_times)
            for name, masked in (("ranker", False), ("ranker_ids_masked", True)):
                logits = recommender.rerank(inputs, ids_masked=masked)
                logits[~ranked] = -np.inf
                rank = second_stage_rank(np.where(ranked, items, -1), logits, target, retriever_rank, above)
                parts[name].append(np.where(new, most_popular, rank))
                tops[name] = top_items(torch.from_numpy(logits), items)
                if not masked:
                    confidence, hit = top_probability(logits, is_target)
        parts["confidence"].append(np.where(new, np.float32(np.nan), confidence))
        parts["hit"].append(hit)
        fallback = popularity.best(history, pool.excluded, TOP) if negatives is None and new.any() else None
        for name, top in tops.items() if negatives is None else ():
            served = top if fallback is None else np.where(new[:, None], fallback, top)
            served = served[counted[part]]
            top_counts[name] += np.bincount(served[served > 0], minlength=dataset.num_items + 1)
    merged = {name: np.concatenate(values) for name, values in parts.items()}
    ranks = {name: merged[name] for name in names}
    return RankingResult(
        ranks, merged["candidate_rank"], {} if negatives else top_counts, merged["confidence"], merged["hit"]
    )


def top_items(scores: torch.Tensor, items: np.ndarray) -> np.ndarray:
    """The TOP items of each row by score, best first, (B, TOP); padded with −1.

    Args:
        scores: (B, W), −inf for excluded items.
        items: (B, W) item of each score.
    """
    top = np.full((len(scores), TOP), -1)
    best, column = (part.numpy() for part in scores.topk(min(TOP, scores.shape[1])))
    top[:, : column.shape[1]] = np.where(best > -np.inf, np.take_along_axis(items, column, axis=1), -1)
    return top


def top_probability(logits: np.ndarray, is_target: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The largest probability of each list, (B,), NaN if empty, and whether it is the target's, (B,) bool.

    Args:
        logits: (B, K), −inf for padding.
        is_target: (B, K) bool.
    """
    best, column = torch.from_numpy(logits).softmax(1).max(1)
    return best.numpy(), is_target[np.arange(len(is_target)), column.numpy()]


def second_stage_rank(
    items: np.ndarray, logits: np.ndarray, target: np.ndarray, retriever_rank: np.ndarray, above: np.ndarray
) -> np.ndarray:
    """Rank of each target after the second stage, (B,) int64.

    Args:
        items: (B, K) candidates, padded with −1.
        logits: (B, K) the second stage's scores.
        target: (B,) items.
        retriever_rank: (B,) rank by the retriever over the catalogue.
        above: (B,) number of other candidates that the retriever scores at least as high as the target.
    """
    is_target = items == target[:, None]
    among = compute_rank(torch.from_numpy(logits), torch.from_numpy(is_target.argmax(1))).numpy()
    below = (items > 0).sum(1) + retriever_rank - above
    return np.where(is_target.any(1), among, below)


def summarise(
    dataset: Dataset, ranks: dict[str, np.ndarray], users: np.ndarray, at: At, resamples: int, seed: int
) -> dict[str, Any]:
    """Mean metrics with 95 % bootstrap intervals, the paired difference of the stages with its test, and cohorts.

    Args:
        dataset: prepared dataset.
        ranks: model -> (n,) ranks of the targets.
        users: (n,) user of each target, ascending.
        at: (n,) indices of the targets, or `val` or `test` for each user's (first) target.
        resamples: of intervals and tests, which sample users with all their targets.
        seed: of both.
    """
    names = [*ranks]
    targets = Targets.of(dataset, users, at)
    values = {name: targets.metrics(ranks[name]) for name in names}
    requests = targets.requests()
    metrics = list(values[names[0]])
    table = np.stack([values[name][metric] for name in names for metric in metrics], axis=1)
    means = bootstrap(table, resamples, seed, requests.users)
    low, high = interval(means)
    columns = [(name, metric) for name in names for metric in metrics]
    models: dict[str, dict[str, dict[str, float]]] = {name: {} for name in names}
    for j, (name, metric) in enumerate(columns):
        models[name][metric] = {"value": float(table[:, j].mean()), "low": float(low[j]), "high": float(high[j])}
    report: dict[str, Any] = {"users": len(np.unique(users)), "targets": len(users), "models": models}
    if dataset.baskets:
        report["baskets"] = len(requests.users)
    if "ranker" in names:
        report["comparison"] = paired_differences(
            values["ranker"], values["retriever"], resamples, seed, requests.users
        )
    report["cohorts"] = {
        cohort: {
            label: {"users": len(np.unique(requests.users[member])), "targets": int(member.sum())}
            | {
                name: {m: float(values[name][m][member].mean()) for m in ("hr@10", "ndcg@10", "recall@100")}
                for name in names
            }
            for label, member in groups
            if member.any()
        }
        for cohort, groups in cohorts(dataset, requests.users, requests.events).items()
    }
    if dataset.has_time:
        report["by_gap"] = metrics_by_gap(values, gaps(dataset, requests), requests.users, resamples, seed)
    return report


def beyond_accuracy(dataset: Dataset, outcome: RankingResult, k: int, targets: Targets | None = None) -> dict[str, Any]:
    """Recall of the candidates and, in full ranking, exposure metrics and the ranker's calibration.

    Args:
        dataset: prepared dataset.
        outcome: of `rank_users`.
        k: number of candidates.
        targets: the ranked targets; None: each has a list of its own.
    """
    recall = np.average(outcome.candidate_rank <= k, weights=None if targets is None else targets.weights())
    report: dict[str, Any] = {"candidates": {"k": k, "recall": float(recall)}}
    if not outcome.top_counts:
        return report
    report["exposure"] = {
        name: compute_exposure(counts, dataset.train_counts)
        for name, counts in outcome.top_counts.items()
        if name != "ranker_ids_masked"
    }
    confidence, hit = outcome.confidence, outcome.hit
    if targets is not None and targets.baskets is not None:  # the first item is a hit if it is any of the basket
        _, first, basket = np.unique(targets.baskets, return_index=True, return_inverse=True)
        confidence, hit = confidence[first], np.bincount(basket, hit) > 0
    scored = np.isfinite(confidence)
    if scored.any():
        report["calibration"] = compute_calibration(confidence[scored], hit[scored])
    return report


def describe(
    dataset: Dataset,
    request_time: RequestTime,
    split: Part,
    next_action: str = "none",
    negatives: int | None = None,
    seed: int = 0,
) -> dict[str, Any]:
    """The evaluation protocol, as stored in the report.

    Args:
        negatives: number of sampled negatives; None: full ranking.
        seed: of the samples.
    """
    return {
        **dataset.protocol,
        "evaluated": split,
        "ranking": "full, over all rated items" if negatives is None else SAMPLED.format(negatives),
        **({} if negatives is None else {"negatives_seed": seed}),
        "seen_filter": SEEN_FILTER[dataset.seen_rule],
        "validation_item": VALIDATION_ITEM + (REFITTED if dataset.until == "test" else ", the retriever never does"),
        **({} if dataset.until == "val" else {"refit": STRETCH[dataset.until]}),
        "request_time": request_time,
        **({} if next_action == "none" else {"next_action": next_action}),
        "score_ties": "counted against the target",
        "split_hash": dataset.manifest["split_hash"],
    }


def protocol_line(protocol: dict[str, Any], users: int, num_items: int, targets: int | None = None) -> str:
    """The protocol as one line of text.

    Args:
        protocol: from `describe`.
        users: number of users.
        num_items: V.
        targets: number of targets; None: one per user.
    """
    filters = [
        text.format(protocol[key])
        for key, text in (("min_rating", "ratings ≥ {}"), ("core", "{}-core"), ("cold_items", "{} of items withheld"))
        if protocol.get(key)
    ]
    held = f" ({rule})" if (rule := split_rule(protocol)) else ""
    measured = f"{protocol['evaluated']} targets of {users:,} users"
    if targets not in (None, users):
        measured = f"{targets:,} {measured}"
    keeps = protocol["seen_filter"] == SEEN_FILTER["keep"]
    without = ", seen ones included" if keeps else f" without {protocol['seen_filter']}"
    return "protocol: " + "; ".join(
        [
            f"{protocol['split']} split{held}, {measured}",
            f"full ranking of {num_items:,} items{without}"
            if protocol["ranking"].startswith("full")
            else f"{protocol['ranking']}; negatives sampled from {num_items:,} items{without}",
            f"equal times in {protocol['tie_break']}",
            f"repeats: {protocol['repeats']}",
            *filters,
            f"validation item {protocol['validation_item']}",
            f"request time: {protocol['request_time']}",
            *([f"next action: {protocol['next_action']}"] if "next_action" in protocol else []),
            f"score ties {protocol['score_ties']}",
        ]
    )


def split_rule(protocol: dict[str, Any]) -> str:
    """What the options of a split mean, as text; empty for one target per user and part."""
    val = protocol.get("val", 1)
    match protocol["split"]:
        case "LeaveOneOut" if val > 1:
            return f"{val} events of each user validate"
        case "SessionStarts":
            return (
                f"events {protocol['gap']:,} s or more after the one before: at most {protocol['test']} of each user "
                f"test, {val} before them validate"
            )
        case "Baskets":
            return f"events of equal time are one basket: each user's last tests, at most {val} before it validate"
    return ""
