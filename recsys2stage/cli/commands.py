"""The commands other than fit, validate and test: each loads artifacts, calls the package and writes an artifact."""

import inspect
import logging
import shutil
import time
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import torch
from tqdm import tqdm

from recsys2stage import columns as c
from recsys2stage.artifacts import (
    DATA,
    RUN,
    ParquetStream,
    atomic_write,
    fingerprint,
    read_array,
    read_json,
    read_manifest,
    take,
    verify,
    write_json,
    write_manifest,
)
from recsys2stage.checkpoints import build, read_checkpoint
from recsys2stage.data.batches import in_chunks
from recsys2stage.data.dataset import Dataset, no_items, sample_users
from recsys2stage.data.ids import given_ids, read_id_lines
from recsys2stage.data.options import Part, Seen, check_least, check_option
from recsys2stage.data.prepare import prepare
from recsys2stage.data.request_inputs import as_seconds, format_time
from recsys2stage.data.side_tables import user_specs
from recsys2stage.data.simulate import simulate
from recsys2stage.evaluation.compare import TARGET, check_baseline_run, compare, read_baseline_run
from recsys2stage.evaluation.evaluate import (
    beyond_accuracy,
    describe,
    num_negatives,
    protocol_line,
    rank_users,
    summarise,
)
from recsys2stage.evaluation.plots import write_figures
from recsys2stage.evaluation.report import MAIN_METRICS, against_text, as_markdown, as_table
from recsys2stage.mining.mine import mine_negatives
from recsys2stage.ranking.bundle import POPULARITY, RERANKER, bundle_manifest, check_split
from recsys2stage.ranking.reranker import Reranker
from recsys2stage.ranking.signals.base import FOLDER as SIGNALS
from recsys2stage.recommender import Recommender
from recsys2stage.retrieval.index import DESCRIPTION, VECTORS, Exact, Index, measure
from recsys2stage.retrieval.towers import TOWERS, TwoTower
from recsys2stage.serving.requests import DatasetRequests, FileRequests, resolve_target_actions
from recsys2stage.trust import Trust, arguments, trusts

RERANKER_OPTIONS = ("num_items", "features", "scorer", "feature_dim", "signals", "scores_cold", "without")
KEPT = (  # fields copied from the manifest of the index to that of the bundle
    *("vector_dim", "items", "has_time", "request_time", "next_action", "actions", "split_hash", "towers"),
    *("repeats", "newest_time", "user_features"),
)

logger = logging.getLogger("recsys2stage")


@trusts
def export_index(
    retriever: Path = RUN / "retriever/best.ckpt",
    data: Path = DATA,
    output: Path | None = None,
    index: Index | None = None,
    measured: int = 1000,
    trust: Trust = None,
) -> None:
    """Export a retriever's item vectors as an index that serves without the training data.

    Recall against exact search and latency are measured on validation histories and written to the manifest.

    Args:
        retriever: checkpoint of a retriever.
        data: prepared dataset.
        output: folder to write; None: index, next to the retriever's folder.
        index: how to search, exactly (Exact) or by a faiss factory string (Faiss); None: Exact.
        measured: number of users to measure recall and latency on; 0: none.
        trust: modules outside this package from which the checkpoint may load classes.
    """
    check_least("measured", measured, 0)
    dataset, output = Dataset(data), output or retriever.parent.parent / "index"
    options, weights = read_checkpoint(retriever, "towers", "recsys fit --config configs/NAME/retriever.yaml")
    for name, expected in {"num_items": int, "request_time": str, "next_action": str, "actions": list | None}.items():
        take(options, name, expected, retriever)
    if options["num_items"] != dataset.num_items:
        raise ValueError(
            f"{retriever} has {options['num_items']} items but {data} has {dataset.num_items}; fit again on {data}"
        )
    dataset.check_split(retriever, options["split_hash"])
    towers = {name: options[name] for name in inspect.signature(TwoTower).parameters if name in options}
    index = index or Exact()
    with torch.inference_mode():
        vectors = build(TwoTower, towers, weights, retriever).all_item_vectors().numpy()
    index.build(vectors)
    facts = {
        "vector_dim": vectors.shape[1],
        "items": dataset.num_items,
        "has_time": dataset.has_time,
        "request_time": options["request_time"],
        "next_action": options["next_action"],
        "actions": options["actions"] or [],
        "split_hash": dataset.manifest["split_hash"],
        "repeats": dataset.protocol["repeats"],
        "newest_time": int(dataset.last_times.max()) if dataset.has_time else None,
        "user_features": user_specs(dataset),
        "towers": towers,
    }
    with atomic_write(output, "index") as folder:
        folder.mkdir()
        index.save(folder)
        torch.save(weights, folder / TOWERS)
        np.save(folder / POPULARITY, dataset.train_counts)
        (folder / c.ITEM_TABLE).write_bytes((dataset.path / c.ITEM_TABLE).read_bytes())
        parents = {"retriever": retriever, "data": data}
        made = {"index": read_json(folder / DESCRIPTION, dict, "recsys export-index"), "measured": measured}
        write_manifest(folder, "index", made, parents, **facts)
        users = np.random.default_rng(0).permutation(dataset.users("val"))[:measured]
        if len(users):
            recommender = Recommender.load(folder, trust=[type(index).__module__])  # the caller's own class
            recommender.check(dataset)
            queries = [
                recommender.queries(
                    dataset.histories(users[part], "val", recommender.towers.max_length),
                    dataset.request_times(users[part], "val"),
                    dataset.target_action(users[part], "val", recommender.next_action),
                )
                for part in in_chunks(len(users), 64)
            ]
            k, seen = min(100, dataset.num_items), dataset.filtered_items(users, "val")
            facts["measured"] = measure(index, np.concatenate(queries), k, (seen.values, seen.offsets))
            write_manifest(folder, "index", made, parents, **facts)
    print(f"{output}: {dataset.num_items:,} items, {facts.get('measured', 'not measured')}")


@trusts
def export_bundle(
    index: Path = RUN / "index",
    ranker: Path = RUN / "ranker/best.ckpt",
    output: Path | None = None,
    candidates: int | None = None,
    trust: Trust = None,
) -> None:
    """Export both stages as one folder for serving, which needs no training data.

    Args:
        index: folder written by export-index.
        ranker: checkpoint of a ranker.
        output: folder to write; None: bundle, next to the index.
        candidates: number of candidates that the ranker scores per request; None: as in its training.
        trust: modules outside this package from which the checkpoint may load classes.
    """
    if candidates is not None:
        check_least("candidates", candidates, other="null for the number in the ranker's training")
    options, weights = read_checkpoint(ranker, "reranker", "recsys fit --config configs/NAME/ranker.yaml")
    reranker = {name: take(options, name, object, ranker) for name in RERANKER_OPTIONS}
    arguments(Reranker, reranker, ranker)  # fail before writing a bundle that cannot be loaded
    for name in ("vector_dim", "num_candidates", "recent"):
        take(options, name, int, ranker)
    output, candidates = output or index.parent / "bundle", candidates or options["num_candidates"]
    indexed = read_manifest(index, "index", f"recsys export-index --output {index}")
    for name in KEPT:
        take(indexed, name, object, index / c.MANIFEST)
    take(weights, "vectors", torch.Tensor, ranker)
    verify(index, indexed, f"recsys export-index --output {index}")
    if options["split_hash"] != indexed["split_hash"]:
        raise ValueError(
            f"{ranker} was trained on data with split hash {str(options['split_hash'])[:12]}…, but {index} is of "
            f"{str(indexed['split_hash'])[:12]}…; mine with this index and fit again"
        )
    if not np.array_equal(weights["vectors"][1:].numpy(), read_array(index / VECTORS)):
        raise ValueError(f"{ranker} was trained with other item vectors than those of {index}; mine and fit again")
    with atomic_write(output, "bundle") as folder:
        folder.mkdir()
        for file in Path(index).iterdir():
            if file.name != c.MANIFEST:
                (folder / file.name).write_bytes(file.read_bytes())
        torch.save(weights, folder / RERANKER)
        if options["signals"]:
            made = read_manifest(ranker.parent, "ranker", f"recsys fit --output {ranker.parent}")
            mined = take(made["parents"], "candidates", dict, ranker.parent / c.MANIFEST)
            path, make = mined["path"], f"recsys mine-negatives --output {mined['path']}"
            if fingerprint(path) != mined["hash"]:
                raise ValueError(f"{ranker} was trained on other candidates than those now in {path}; fit again")
            verify(path, read_manifest(path, "candidates", make), make)
            shutil.copytree(Path(path) / SIGNALS, folder / SIGNALS)
        write_manifest(
            folder,
            "bundle",
            options={"candidates": candidates},
            parents={"index": index, "ranker": ranker, "data": indexed["parents"]["data"]["path"]},
            candidates=candidates,
            reranker={"dim": options["vector_dim"], **reranker},
            recent=options["recent"],
            **{name: indexed[name] for name in KEPT},
        )
    print(f"{output}: both stages, {candidates} candidates")


@trusts
def recommend(
    bundle: Path = RUN / "bundle",
    data: Path | None = None,
    histories: Path | None = None,
    users: list[str | int] | Path | None = None,
    output: Path | None = None,
    k: int = 10,
    request_time: int | None = None,
    action: str | None = None,
    seen: Seen | None = None,
    batch_size: int = 32,
    trust: Trust = None,
) -> None:
    """Recommend for users of the data, or for histories in a file.

    The Parquet file has the columns user_id, item_id, score, rank and retriever_score.

    Args:
        bundle: folder written by export-bundle, or by export-index (first stage only).
        data: prepared dataset with the users; None: the one the bundle was made from.
        histories: CSV or Parquet with user_id, item_id and, for models with request time, time in seconds; oldest first
            if there is no time. Optional: rating, action (name of the action type) and the user features of the model.
            These users need not be in the data.
        users: user ids: a list, or a text file with one per line, compared as text (0012 is not 12); None: all.
        output: Parquet file to write; None: recommendations.parquet, next to the bundle.
        k: number of items per user.
        request_time: seconds since 1970, no earlier than any user's newest event; None: the log's newest event.
        action: target action, for models with next_action: one name for all users, a CSV or Parquet file with user_id
            and action, or a .json of {user_id: action}. None, and for users not in the file: the model's next_action
            if it is an action, else unknown.
        seen: keep or filter seen items; None: keep if the data were prepared with repeats: keep, else filter.
        batch_size: users per batch.
        trust: modules outside this package from which the bundle may load classes.
    """
    recommender, output = Recommender.load(bundle), output or bundle.parent / "recommendations.parquet"
    if isinstance(users, Path):
        if not users.is_file():
            raise ValueError(f"--users {users} is not a file; give one with an id per line or a list: --users '[5, 7]'")
        users = [line for line in read_id_lines(users) if line.strip()]
    only = None if users is None else given_ids(users)
    if histories is not None:
        requests: DatasetRequests | FileRequests = FileRequests(histories, recommender, only)
    else:
        dataset = Dataset(data or bundle_manifest(bundle)["parents"]["data"]["path"])
        check_split(dataset, bundle)
        requests = DatasetRequests(dataset, recommender, only)
    if not len(requests.user_ids):
        raise ValueError("there are no users to recommend for: --users is empty")
    keep_seen, item_ids = recommender.seen_rule(seen) == "keep", recommender.catalogue.items[c.ITEM_ID].to_numpy()
    request_time, when = time_of_requests(request_time, recommender, requests)
    target_action = None if action is None else resolve_target_actions(requests.user_ids, action, recommender)
    with atomic_write(output) as temporary, ParquetStream(temporary) as stream:
        for part in tqdm(list(in_chunks(len(requests.user_ids), batch_size)), desc="recommend", unit="batch"):
            history, seen_items = requests.read(part)
            excluded = no_items(len(history.lengths)) if keep_seen else seen_items
            times = np.full(len(history.lengths), request_time)
            actions = None if target_action is None else target_action[part]
            ranking = recommender.rank(history, excluded, times, k, actions)
            row, column = np.nonzero(ranking.items > 0)
            stream.write(
                {
                    c.USER_ID: requests.user_ids[part][row],
                    c.ITEM_ID: item_ids[ranking.items[row, column] - 1],
                    c.SCORE: ranking.score[row, column],
                    c.RANK: (column + 1).astype(np.int32),
                    c.RETRIEVER_SCORE: ranking.retriever_score[row, column],
                }
            )
    print(f"{output}: {k} items for each of {len(requests.user_ids):,} users{when}")


@trusts
def evaluate(
    bundle: Path = RUN / "bundle",
    data: Path | None = None,
    output: Path | None = None,
    split: Part = "test",
    protocol: str = "full",
    users: int | None = None,
    against: Path | None = None,
    plots: bool = True,
    resamples: int = 1000,
    batch_size: int = 256,
    seed: int = 0,
    trust: Trust = None,
) -> None:
    """Evaluate both stages and two baselines on the same users; write report.json, report.md and ranks.parquet.

    Sampled protocols write report-sampled-100.json, report-sampled-100.md and ranks-sampled-100.parquet, without
    beyond-accuracy metrics, calibration and figures.

    Args:
        bundle: folder written by export-bundle, or by export-index (first stage only).
        data: prepared dataset; None: the one the bundle was made from.
        output: folder of the report; None: the folder of the bundle.
        split: which targets to rank. Select models on val, report test once.
        protocol: full: rank each target among all items, without seen ones unless prepared with repeats: keep; or
            sampled-100: among 100 (or any other number) of these, sampled at random, not comparable to full.
        users: number of users, sampled at random; None: all.
        against: folder of the baseline run's report, to compare both stages with; its targets, users and protocol must
            be the same. None: no comparison.
        plots: also write cohorts.png, ceiling.png, learning.png and calibration.png.
        resamples: number of bootstrap samples of users, and of permutations of each randomisation test.
        batch_size: users per batch.
        seed: random seed of sampling, bootstrap and tests.
        trust: modules outside this package from which the bundle may load classes.
    """
    check_option("split", split, Part)
    check_least("resamples", resamples)
    negatives = num_negatives(protocol)
    recommender, output = Recommender.load(bundle), output or bundle.parent
    dataset = Dataset(data or bundle_manifest(bundle)["parents"]["data"]["path"])
    check_split(dataset, bundle)
    recommender.check(dataset)
    measured = sample_users(dataset.users(split), users, seed)
    if not len(measured):
        raise ValueError(
            f"{dataset.path} has no user with a {split} target; see the counts in its {c.MANIFEST}, or measure on the "
            f"other targets, split {'val' if split == 'test' else 'test'}"
        )
    mark = "" if negatives is None else f"-{protocol}"
    conditions = describe(dataset, recommender.request_time, split, recommender.next_action, negatives, seed)
    targets = dataset.targets(measured, split)
    if against is not None:  # fail before the long evaluation
        baseline = read_baseline_run(against, mark)
        differs = check_baseline_run(baseline, conditions, dataset.num_items, measured, targets)
    outcome = rank_users(dataset, recommender, measured, split, batch_size, negatives, seed)
    report: dict[str, Any] = {"protocol": conditions, "items": dataset.num_items}
    report |= summarise(dataset, outcome.ranks, measured, split, resamples, seed)
    report |= beyond_accuracy(dataset, outcome, recommender.num_candidates)
    if against is not None:
        report["against"] = compare(outcome.ranks, baseline, differs, resamples, seed)
    line = protocol_line(conditions, len(measured), dataset.num_items)
    output.mkdir(parents=True, exist_ok=True)
    with_figures = plots and negatives is None
    figures, missing = write_figures(report, outcome.candidate_rank, bundle, output) if with_figures else ({}, [])
    with atomic_write(output / f"ranks{mark}.parquet") as temporary:
        pl.DataFrame({c.USER: measured, TARGET: targets, **outcome.ranks}).write_parquet(temporary)
    with atomic_write(output / f"report{mark}.md") as temporary:
        temporary.write_text(as_markdown(report, line, figures, missing), encoding="utf-8")
    write_json(output / f"report{mark}.json", report)
    print(f"\n{line}\n\n{as_table(report)}\n")
    if against is not None:
        print(f"{against_text(report, MAIN_METRICS)}\n")
    files = (f"report{mark}.json", f"report{mark}.md", f"ranks{mark}.parquet", *figures)
    print("\n".join([*missing, *(str(output / name) for name in files)]))


def time_of_requests(
    request_time: int | None, recommender: Recommender, requests: DatasetRequests | FileRequests
) -> tuple[int, str]:
    """Request time of all requests in seconds, and a text to print (empty for a model without request time).

    Args:
        request_time: the user's option; None: the time of the newest event of the log.
    """
    timed = recommender.request_time == "target"
    if request_time is None:
        if not timed:
            return 0, ""  # `requests.newest` would read the times of all events
        if requests.newest > time.time():
            logger.warning(
                "the newest event of the log, %s, lies in the future of this machine's clock, and its time is used as "
                "the time of all requests; pass --request_time",
                format_time(requests.newest),
            )
        return requests.newest, f", as of {format_time(requests.newest)}, the newest event of the log"
    now = int(as_seconds([request_time], "request_time", recommender.newest_time)[0])
    late = requests.last_times > now
    if recommender.has_time and late.any():
        first = int(late.argmax())
        raise ValueError(
            f"request_time is {now}, before the newest event of {int(late.sum()):,} of {len(late):,} users, such as "
            f"{requests.last_times[first]} of user {requests.user_ids[first]}; give a later time, or --histories with "
            "only the events before it"
        )
    if not timed:
        logger.warning("the model was trained without request time, so --request_time %s has no effect", now)
    return now, f", as of {format_time(now)}" if timed else ""


COMMANDS: dict[str, Any] = {
    "simulate": simulate,
    "prepare-data": prepare,
    "export-index": export_index,
    "mine-negatives": mine_negatives,
    "export-bundle": export_bundle,
    "recommend": recommend,
    "evaluate": evaluate,
}
