"""Both stages and two baselines, side by side on the same users, in full ranking or among sampled items."""

import itertools
import re
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from recsys2stage import columns as c
from recsys2stage.baselines import Markov, Popularity
from recsys2stage.dataset import Dataset, Part, Ragged, RequestTime
from recsys2stage.metrics import bootstrap, interval, metrics_of, rank_of
from recsys2stage.recommend import Recommender, in_chunks

TITLES = {
    "popularity": "popularity",
    "markov": "markov",
    "retriever": "retriever",
    "ranker": "ranker",
    "ranker_ids_masked": "ranker, ids masked",
}

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


def rank_users(
    dataset: Dataset,
    recommender: Recommender,
    users: np.ndarray,
    split: Part,
    batch_size: int = 256,
    negatives: int | None = None,
    seed: int = 0,
) -> dict[str, np.ndarray]:
    """Rank of each user's target by every model, from 1, (n,) int64.

    The retriever and the baselines rank all items that the user has not met. The ranker orders the retriever's
    candidates anew; what lies outside them keeps the retriever's order below.

    Args:
        negatives: each order is restricted to the target and so many random items; None: to none.
        seed: of the draw, which is a function of seed and user alone and so the same for every model.
    """
    baselines: dict[str, Popularity | Markov] = {"popularity": Popularity(dataset), "markov": Markov(dataset)}
    vectors = recommender.towers.every_item().detach().float()
    parts: dict[str, list[np.ndarray]] = {name: [] for name in TITLES if recommender.reranker or "ranker" not in name}
    parts["found"] = []
    for part in tqdm(list(in_chunks(len(users), batch_size)), desc=f"rank {split} targets", unit="batch"):
        batch = users[part]
        padded = dataset.histories(batch, split, recommender.towers.max_length)
        known, target = dataset.known(batch, split), dataset.targets(batch, split)
        barred = outside_ranking(known, target, dataset.num_items, batch, negatives, seed)
        last = padded.items[np.arange(len(batch)), np.maximum(padded.lengths - 1, 0)]
        for name, baseline in baselines.items():
            scores = torch.from_numpy(baseline.scores(last)[:, 1:])
            parts[name].append(_filtered_rank(scores, barred, target))
        asked = dataset.asked(batch, split, recommender.next_action)
        queries = recommender.queries(padded, dataset.request_times(batch, split), asked)
        scores = torch.from_numpy(queries) @ vectors.T  # (B, V)
        first = _filtered_rank(scores, barred, target)
        new = padded.lengths == 0  # served by popularity
        parts["retriever"].append(np.where(new, parts["popularity"][-1], first))
        retriever_score, items = recommender.candidates(queries, known)
        parts["found"].append((items == target[:, None]).any(1))
        if recommender.reranker:
            own = scores.gather(1, torch.from_numpy(target - 1)[:, None])
            listed = scores.gather(1, torch.from_numpy(np.maximum(items - 1, 0)))
            ranked = ~np.take_along_axis(barred, np.maximum(items, c.PAD), axis=1)
            before = ((listed >= own).numpy() & ranked & (items != target[:, None])).sum(1)
            for name, masked in (("ranker", False), ("ranker_ids_masked", True)):
                logits = recommender.rerank(queries, items, retriever_score, ids_masked=masked)
                logits[~ranked] = -np.inf
                second = second_rank(np.where(ranked, items, -1), logits, target, first, before)
                parts[name].append(np.where(new, parts["popularity"][-1], second))
    return {name: np.concatenate(values) for name, values in parts.items()}


def outside_ranking(
    known: Ragged, target: np.ndarray, num_items: int, users: np.ndarray, negatives: int | None, seed: int
) -> np.ndarray:
    """Which items a target is not ranked among: padding, the known, and those that were not drawn, (B, V + 1) bool.

    Args:
        known: what each user has met.
        target: (B,) items.
        num_items: V.
        users: (B,) numbers of the users, for the draw.
        negatives: how many items are drawn for each user, uniformly and without replacement, from those neither known
            nor the target; all of them where fewer are left. None: nothing is drawn, all are ranked.
        seed: of the draw.
    """
    barred = np.zeros((len(target), num_items + 1), dtype=bool)
    barred[:, c.PAD] = barred[known.rows, known.values] = True
    if negatives is None:
        return barred
    for row, user in enumerate(users.tolist()):
        unmet = ~barred[row]
        unmet[target[row]] = False
        left = np.flatnonzero(unmet)
        drawn = np.random.default_rng([seed, user]).choice(left, min(negatives, len(left)), replace=False)
        barred[row] = True
        barred[row, drawn] = barred[row, target[row]] = False
    return barred


def _filtered_rank(scores: torch.Tensor, barred: np.ndarray, target: np.ndarray) -> np.ndarray:
    scores.masked_fill_(torch.from_numpy(barred[:, 1:]), -torch.inf)
    return rank_of(scores, torch.from_numpy(target - 1)).numpy()


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
    among = rank_of(torch.from_numpy(logits), torch.from_numpy(place.argmax(1))).numpy()
    below = (items > 0).sum(1) + first - before
    return np.where(found, among, below)


def summarise(
    dataset: Dataset, ranks: dict[str, np.ndarray], users: np.ndarray, split: Part, resamples: int, seed: int
) -> dict[str, Any]:
    """Means with 95 % bootstrap intervals, the paired difference of the two stages, and cohorts."""
    names = [name for name in TITLES if name in ranks]
    values = {name: metrics_of(ranks[name]) for name in names}
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
        report["comparison"] = {
            metric: _paired(values["ranker"][metric], values["retriever"][metric], resamples, seed)
            for metric in metrics
        }
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
        for cohort, groups in (
            ("history_length", history_cohorts(dataset, users, split)),
            ("target_popularity", popularity_cohorts(dataset, users, split)),
        )
    }
    return report


def _paired(one: np.ndarray, other: np.ndarray, resamples: int, seed: int) -> dict[str, float | None]:
    """How far one model is above another on the same users; exactly 0 where they are equal."""
    means = bootstrap((one - other)[:, None], resamples, seed)
    low, high = interval(means)
    return {
        "difference": float((one - other).mean()),
        "low": float(low[0]),
        "high": float(high[0]),
        "ratio": float(one.mean() / other.mean()) if other.any() else None,
        "share_of_resamples_above_zero": float((means > 0).mean()),
    }


def history_cohorts(dataset: Dataset, users: np.ndarray, split: Part) -> Iterator[tuple[str, np.ndarray]]:
    """Users by quarter of the number of events before the target."""
    length = dataset.target_places(split)[users] - dataset.offsets[users]
    cuts = np.unique(np.quantile(length, [0, 0.25, 0.5, 0.75, 1]).astype(int))
    for low, high in itertools.pairwise(cuts):
        last = high == cuts[-1]
        yield (
            f"{low}-{high if last else high - 1} events",
            (length >= low) & ((length <= high) if last else (length < high)),
        )
    if len(cuts) == 1:
        yield f"{cuts[0]} events", np.ones(len(users), dtype=bool)


def popularity_cohorts(dataset: Dataset, users: np.ndarray, split: Part) -> Iterator[tuple[str, np.ndarray]]:
    """Users by the training events of their target."""
    count = dataset.train_counts[dataset.targets(users, split)]
    for low, high in ((0, 1), (1, 10), (10, 100), (100, 1000), (1000, 1 << 62)):
        label = "never trained" if low == 0 else f"{low}-{high - 1} events" if high < 1 << 62 else f"{low}+ events"
        yield label, (count >= low) & (count < high)


def describe(
    dataset: Dataset, request_time: RequestTime, split: Part, next_action: str = "none", negatives: int | None = None
) -> dict[str, Any]:
    """Everything a reader must know to compare numbers."""
    return {
        **dataset.protocol,
        "evaluated": split,
        "ranking": "full, over all rated items" if negatives is None else SAMPLED.format(negatives),
        "seen_filter": "all items the user has met" + (", but the target" if dataset.keeps_repeats else ""),
        "validation_item": "in the input at test time, never a training target",
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
    return "protocol: " + "; ".join(
        [
            f"{protocol['split']} split, {protocol['evaluated']} targets of {users:,} users",
            f"full ranking of {num_items:,} items without {protocol['seen_filter']}"
            if protocol["ranking"].startswith("full")
            else f"{protocol['ranking']}; negatives drawn from {num_items:,} items without {protocol['seen_filter']}",
            f"equal times in {protocol['tie_break']}",
            f"repeats: {protocol['repeats']}",
            *filters,
            f"validation item {protocol['validation_item']}",
            f"request time: {protocol['request_time']}",
            *([f"next action: {protocol['next_action']}"] if "next_action" in protocol else []),
            f"score ties {protocol['score_ties']}",
        ]
    )


def as_table(report: dict[str, Any], metrics: tuple[str, ...] = ("hr@10", "ndcg@10", "mrr", "recall@100")) -> str:
    """The headline as a Markdown table: value [95 % interval]."""
    head = [
        "model",
        *(m.replace("hr", "HR").replace("ndcg", "NDCG").replace("mrr", "MRR").replace("rec", "Rec") for m in metrics),
    ]
    rows = [
        [TITLES[name], *("{value:.4f} [{low:.4f}, {high:.4f}]".format(**model[metric]) for metric in metrics)]
        for name, model in report["models"].items()
    ]
    widths = [max(len(row[j]) for row in [head, *rows]) for j in range(len(head))]
    lines = [
        "| " + " | ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)) + " |" for row in [head, *rows]
    ]
    return "\n".join([lines[0], "|" + "|".join("-" * (w + 2) for w in widths) + "|", *lines[1:]])


def as_markdown(report: dict[str, Any], line: str) -> str:
    """The whole report for a reader."""
    parts = ["# Report", line, as_table(report), f"95 % intervals: bootstrap over {report['users']:,} users."]
    if "comparison" in report:
        rows = ["| ranker − retriever | difference | 95 % interval, paired | ratio |", "|---|---|---|---|"]
        rows += [
            f"| {metric} | {d['difference']:+.4f} | [{d['low']:+.4f}, {d['high']:+.4f}] | "
            + ("" if d["ratio"] is None else f"{d['ratio']:.3f}")
            + " |"
            for metric, d in report["comparison"].items()
            if not metric.startswith("recall")
        ]
        parts.append("\n".join(rows))
        parts.append(
            f"Target among the candidates (the ranker's ceiling in full ranking): {report['candidates']['recall']:.4f} "
            f"at K = {report['candidates']['k']}."
        )
    for cohort, groups in report["cohorts"].items():
        names = [name for name in report["models"] if name != "markov"]
        rows = [f"| {cohort.replace('_', ' ')} | users | " + " | ".join(f"{TITLES[n]} NDCG@10" for n in names) + " |"]
        rows.append("|---" * (len(names) + 2) + "|")
        rows += [
            f"| {label} | {group['users']:,} | " + " | ".join(f"{group[n]['ndcg@10']:.4f}" for n in names) + " |"
            for label, group in groups.items()
        ]
        parts.append("\n".join(rows))
    return "\n\n".join(parts) + "\n"
