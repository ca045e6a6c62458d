"""The verbs that carry data from stage to stage: load, call what does the work, write an artifact."""

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
from recsys2stage.data.ids import given_ids, lines_of
from recsys2stage.data.options import Part, Seen, check_least, check_option
from recsys2stage.data.prepare import prepare
from recsys2stage.data.request_inputs import as_seconds, date_of
from recsys2stage.data.side_tables import user_specs
from recsys2stage.data.simulate import simulate
from recsys2stage.evaluation.compare import TARGET, check_baseline_run, compare, read_baseline_run
from recsys2stage.evaluation.evaluate import (
    beyond_accuracy,
    describe,
    negatives_of,
    protocol_line,
    rank_users,
    summarise,
)
from recsys2stage.evaluation.plots import draw
from recsys2stage.evaluation.report import HEADLINE, against_text, as_markdown, as_table
from recsys2stage.mining.mine import mine_negatives
from recsys2stage.ranking.bundle import POPULARITY, RERANKER, bundle_manifest, check_split
from recsys2stage.ranking.reranker import Reranker
from recsys2stage.ranking.signals.base import FOLDER as SIGNALS
from recsys2stage.recommender import Recommender
from recsys2stage.retrieval.index import DESCRIPTION, VECTORS, Exact, Index, measure
from recsys2stage.retrieval.towers import TOWERS, TwoTower
from recsys2stage.serving.requests import DatasetRequests, FileRequests, target_actions_of
from recsys2stage.trust import Trust, arguments, trusts

RERANKER_OPTIONS = ("num_items", "features", "scorer", "feature_dim", "signals", "scores_cold", "without")

KEPT = (  # of an index's manifest in a bundle's
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
        output: folder to write; None: index, beside the retriever's folder.
        index: how to search, exactly (Exact) or by a faiss factory string (Faiss); None: Exact.
        measured: how many users to measure recall and latency on; 0: none.
        trust: modules outside this package whose classes the checkpoint may name.
    """
    check_least("measured", measured, 0)
    dataset, output = Dataset(data), output or retriever.parent.parent / "index"
    options, weights = read_checkpoint(retriever, "towers", "recsys fit --config configs/NAME/retriever.yaml")
    for name, kind in {"num_items": int, "request_time": str, "next_action": str, "actions": list | None}.items():
        take(options, name, kind, retriever)
    if options["num_items"] != dataset.num_items:
        raise ValueError(
            f"{retriever} knows {options['num_items']} items but {data} has {dataset.num_items}; "
            "it was trained on other data, fit again"
        )
    dataset.check_split(retriever, options["split_hash"])
    towers = {name: options[name] for name in inspect.signature(TwoTower).parameters if name in options}
    index = index or Exact()
    with torch.inference_mode():
        vectors = build(TwoTower, towers, weights, retriever).every_item().numpy()
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
        users = dataset.users("val")
        users = np.random.default_rng(0).permutation(users)[:measured]
        if len(users):
            recommender = Recommender.load(folder, trust=[type(index).__module__])  # named by whoever runs this
            recommender.check(dataset)
            queries = np.concatenate(
                [
                    recommender.queries(
                        dataset.histories(users[part], "val", recommender.towers.max_length),
                        dataset.request_times(users[part], "val"),
                        dataset.target_action(users[part], "val", recommender.next_action),
                    )
                    for part in in_chunks(len(users), 64)
                ]
            )
            known = dataset.known(users, "val")
            facts["measured"] = measure(index, queries, min(100, dataset.num_items), (known.values, known.offsets))
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
    """Put both stages into one folder that another process serves from.

    Args:
        index: folder written by export-index.
        ranker: checkpoint of a ranker.
        output: folder to write; None: bundle, beside the index.
        candidates: how many candidates the ranker orders at each request; None: as many as it was trained to.
        trust: modules outside this package whose classes the checkpoint may name.
    """
    if candidates is not None:
        check_least("candidates", candidates, other="null for as many as the ranker was trained to order")
    options, weights = read_checkpoint(ranker, "reranker", "recsys fit --config configs/NAME/ranker.yaml")
    second = {name: take(options, name, object, ranker) for name in RERANKER_OPTIONS}
    arguments(Reranker, second, ranker)  # a bundle that would not load is not written
    for name in ("vector_dim", "num_candidates", "recent"):
        take(options, name, int, ranker)
    output, candidates = output or index.parent / "bundle", candidates or options["num_candidates"]
    first = read_manifest(index, "index", f"recsys export-index --output {index}")
    for name in KEPT:
        take(first, name, object, index / c.MANIFEST)
    take(weights, "vectors", torch.Tensor, ranker)
    verify(index, first, f"recsys export-index --output {index}")
    if options["split_hash"] != first["split_hash"]:
        raise ValueError(
            f"{ranker} was trained on data with split hash {str(options['split_hash'])[:12]}…, but {index} is of "
            f"{str(first['split_hash'])[:12]}…; mine beside this index and fit again"
        )
    if not np.array_equal(weights["vectors"][1:].numpy(), read_array(index / VECTORS)):
        raise ValueError(f"{ranker} was trained beside other item vectors than those of {index}; mine and fit again")
    with atomic_write(output, "bundle") as folder:
        folder.mkdir()
        for file in Path(index).iterdir():
            if file.name != c.MANIFEST:
                (folder / file.name).write_bytes(file.read_bytes())
        torch.save(weights, folder / RERANKER)
        if options["signals"]:
            made = read_manifest(ranker.parent, "ranker", f"recsys fit --output {ranker.parent}")
            mined = take(made["parents"], "candidates", dict, ranker.parent / c.MANIFEST)
            if fingerprint(mined["path"]) != mined["hash"]:
                raise ValueError(
                    f"{ranker} was trained on other candidates than those now in {mined['path']}; fit again"
                )
            make = f"recsys mine-negatives --output {mined['path']}"
            verify(mined["path"], read_manifest(mined["path"], "candidates", make), make)
            shutil.copytree(Path(mined["path"]) / SIGNALS, folder / SIGNALS)
        write_manifest(
            folder,
            "bundle",
            options={"candidates": candidates},
            parents={"index": index, "ranker": ranker, "data": first["parents"]["data"]["path"]},
            candidates=candidates,
            reranker={"dim": options["vector_dim"], **second},
            recent=options["recent"],
            **{name: first[name] for name in KEPT},
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
        bundle: folder written by export-bundle (or by export-index: the first stage alone).
        data: prepared dataset whose users to recommend for; None: the one the bundle was made from.
        histories: CSV or Parquet with user_id, item_id and, where the model is told the request time, time in seconds;
            oldest first where there is no time. It may have rating and action, the name of the kind of event, and the
            declared user features, for models that look at them. These users need not be in the data.
        users: only these user ids, as a list or as a text file with one a line, each as it is written: 0012 is not 12;
            None: all.
        output: Parquet file to write; None: recommendations.parquet, beside the bundle.
        k: how many items a user.
        request_time: seconds at which the recommendations are made, no earlier than any user's newest event; None: the
            newest event of the log.
        action: the kind of action to recommend for, where the model is told: a name, for everybody; or a CSV or Parquet
            file with user_id and action, or a .json of {user_id: action}. None, and for users not in the file: the kind
            that the model's next_action names, else an unknown one.
        seen: whether items that a user has seen may be recommended, keep or filter; None: as the data were prepared,
            keep with repeats: keep, else filter.
        batch_size: users at a time.
        trust: modules outside this package whose classes the bundle may name.
    """
    recommender, output = Recommender.load(bundle), output or bundle.parent / "recommendations.parquet"
    if isinstance(users, Path):
        if not users.is_file():
            raise ValueError(f"--users {users} is not a file; give one with an id a line, or a list: --users '[5, 7]'")
        users = [line for line in lines_of(users) if line.strip()]
    only = None if users is None else given_ids(users)
    if histories is not None:
        requests: DatasetRequests | FileRequests = FileRequests(histories, recommender, only)
    else:
        made_from = bundle_manifest(bundle)["parents"]["data"]["path"]
        dataset = Dataset(data or made_from)
        check_split(dataset, bundle)
        requests = DatasetRequests(dataset, recommender, only)
    if not len(requests.user_ids):
        raise ValueError("there are no users to recommend for: --users names none")
    keeps, item_ids = recommender.seen_rule(seen) == "keep", recommender.catalogue.items[c.ITEM_ID].to_numpy()
    request_time, when = time_of_requests(request_time, recommender, requests)
    target_action = None if action is None else target_actions_of(requests.user_ids, action, recommender)
    with atomic_write(output) as temporary, ParquetStream(temporary) as stream:
        for part in tqdm(list(in_chunks(len(requests.user_ids), batch_size)), desc="recommend", unit="batch"):
            padded, known = requests.read(part)
            known = no_items(len(padded.lengths)) if keeps else known
            now = np.full(len(padded.lengths), request_time)
            ranking = recommender.rank(padded, known, now, k, None if target_action is None else target_action[part])
            row, place = np.nonzero(ranking.items > 0)
            stream.write(
                {
                    c.USER_ID: requests.user_ids[part][row],
                    c.ITEM_ID: item_ids[ranking.items[row, place] - 1],
                    c.SCORE: ranking.score[row, place],
                    c.RANK: (place + 1).astype(np.int32),
                    c.RETRIEVER_SCORE: ranking.retriever_score[row, place],
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
    """Measure both stages and two baselines on the same users; write report.json, report.md and ranks.parquet.

    Sampled numbers stand apart: report-sampled-100.json, report-sampled-100.md and ranks-sampled-100.parquet. What is
    measured of the shown items, calibration and figures are of full ranking only.

    Args:
        bundle: folder written by export-bundle (or by export-index: the first stage alone).
        data: prepared dataset; None: the one the bundle was made from.
        output: folder of the report; None: the one that holds the bundle.
        split: which targets to rank. Choose by val, report test once.
        protocol: what each target is ranked among: full (all items, but for the seen ones unless the data were prepared
            with repeats: keep), or sampled-100 (the target and 100 of them, or any other number, drawn at random),
            which is not comparable to full.
        users: how many users, drawn at random; None: all.
        against: folder of another run's report, to compare both stages with; it must be of the same targets of the
            same users, ranked in the same way. None: with no other.
        plots: also write cohorts.png, ceiling.png, learning.png and calibration.png.
        resamples: bootstrap samples of users, and draws of each randomisation test.
        batch_size: users at a time.
        seed: of the draws, the bootstrap and the tests.
        trust: modules outside this package whose classes the bundle may name.
    """
    check_option("split", split, Part)
    check_least("resamples", resamples)
    negatives = negatives_of(protocol)
    recommender, output = Recommender.load(bundle), output or bundle.parent
    made_from = bundle_manifest(bundle)["parents"]["data"]["path"]
    dataset = Dataset(data or made_from)
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
    if against is not None:  # refused before the work, not after it
        other = read_baseline_run(against, mark)
        differs = check_baseline_run(other, conditions, dataset.num_items, measured, targets)
    outcome = rank_users(dataset, recommender, measured, split, batch_size, negatives, seed)
    report: dict[str, Any] = {"protocol": conditions, "items": dataset.num_items}
    report |= summarise(dataset, outcome.ranks, measured, split, resamples, seed)
    report |= beyond_accuracy(dataset, outcome, recommender.num_candidates)
    if against is not None:
        report["against"] = compare(outcome.ranks, other, differs, resamples, seed)
    line = protocol_line(conditions, len(measured), dataset.num_items)
    output.mkdir(parents=True, exist_ok=True)
    figures, missing = draw(report, outcome.place, bundle, output) if plots and negatives is None else ({}, [])
    with atomic_write(output / f"ranks{mark}.parquet") as temporary:
        pl.DataFrame({c.USER: measured, TARGET: targets, **outcome.ranks}).write_parquet(temporary)
    with atomic_write(output / f"report{mark}.md") as temporary:
        temporary.write_text(as_markdown(report, line, figures, missing), encoding="utf-8")
    write_json(output / f"report{mark}.json", report)
    print(f"\n{line}\n\n{as_table(report)}\n")
    if against is not None:
        print(f"{against_text(report, HEADLINE)}\n")
    for sentence in missing:
        print(sentence)
    for name in (f"report{mark}.json", f"report{mark}.md", f"ranks{mark}.parquet", *figures):
        print(output / name)


def time_of_requests(
    request_time: int | None, recommender: Recommender, requests: DatasetRequests | FileRequests
) -> tuple[int, str]:
    """Seconds of all requests, and a text to print of them, which is empty for a model without request time.

    Args:
        request_time: as it was given; None: that of the newest event of the log.
    """
    reads = recommender.request_time == "target"
    if request_time is None:
        if not reads:
            return 0, ""  # the newest event is not looked up where it does not count: it reads all times
        if requests.newest > time.time():
            logger.warning(
                "the newest event of the log, %s, lies in the future of this machine's clock, and its time is that of "
                "all requests; pass --request_time",
                date_of(requests.newest),
            )
        return requests.newest, f", as of {date_of(requests.newest)}, the newest event of the log"
    now = int(as_seconds([request_time], "request_time", recommender.newest_time)[0])
    late = requests.last_times > now
    if recommender.has_time and late.any():
        first = int(late.argmax())
        raise ValueError(
            f"request_time is {now}, before the newest event of {int(late.sum()):,} of {len(late):,} users, such as "
            f"{requests.last_times[first]} of user {requests.user_ids[first]}; give a later time, or --histories with "
            "only the events before it"
        )
    if not reads:
        logger.warning("the model was trained without request time, so --request_time %s changes nothing", now)
    return now, f", as of {date_of(now)}" if reads else ""


COMMANDS: dict[str, Any] = {
    "simulate": simulate,
    "prepare-data": prepare,
    "export-index": export_index,
    "mine-negatives": mine_negatives,
    "export-bundle": export_bundle,
    "recommend": recommend,
    "evaluate": evaluate,
}
