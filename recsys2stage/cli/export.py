"""The commands export-index and export-bundle: checkpoints to folders that serve without training data."""

import inspect
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from recsys2stage import columns as c
from recsys2stage.artifacts import (
    DATA,
    RUN,
    atomic_write,
    fingerprint,
    locate_parent,
    read_array,
    read_json,
    read_manifest,
    take,
    verify,
    write_manifest,
)
from recsys2stage.checkpoints import UNTIL, build, read_checkpoint, trained_until
from recsys2stage.cli.averages import average as average_rankers
from recsys2stage.cli.refit_bundle import SELECTED, chosen_index, refit_reranker, refit_signals
from recsys2stage.data.batches import in_chunks
from recsys2stage.data.dataset import Dataset, feature_specs
from recsys2stage.data.folds import Fold, without_fold
from recsys2stage.data.locks import locked
from recsys2stage.data.manifest import source_log
from recsys2stage.data.side_tables import user_specs
from recsys2stage.data.summary import print_summary
from recsys2stage.evaluation.card import write_card
from recsys2stage.options import STRETCH, Until, check_integer
from recsys2stage.ranking.average import shared_weights
from recsys2stage.ranking.bundle import POPULARITY, RERANKER
from recsys2stage.ranking.reranker import Reranker
from recsys2stage.ranking.signals.base import FOLDER as SIGNALS
from recsys2stage.ranking.signals.base import save_signals
from recsys2stage.recommender import Recommender
from recsys2stage.retrieval.index import DESCRIPTION, VECTORS, Exact, Exclude, Index, measure
from recsys2stage.retrieval.towers import TOWERS, TwoTower
from recsys2stage.serving.packed import FOLDER as HISTORIES
from recsys2stage.serving.packed import pack
from recsys2stage.trust import Trust, arguments, trusts

RERANKER_OPTIONS = ("num_items", "features", "scorer", "feature_dim", "signals", "scores_cold", "without", "mask_ids")
KEPT = (  # fields copied from the manifest of the index to that of the bundle
    *("vector_dim", "items", "has_time", "request_time", "next_action", "actions", "split_hash", "towers"),
    *("repeats", "newest_time", "user_features", "item_features"),
)


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
        index: how to search, exactly (Exact), by a faiss factory string (Faiss), or the fastest way with a given recall
            (Auto); None: Exact.
        measured: number of users to measure recall and latency on; 0: none.
        trust: modules outside this package from which the checkpoint may load classes.
    """
    check_integer("measured", measured, 0, example=1000)
    output = output or retriever.parent.parent / "index"
    options, weights = read_checkpoint(retriever, "towers", "recsys fit --config configs/NAME/retriever.yaml")
    dataset = Dataset(data, options[UNTIL])
    for name, expected in {"num_items": int, "request_time": str, "next_action": str, "actions": list | None}.items():
        take(options, name, expected, retriever)
    if options["num_items"] != dataset.num_items:
        raise ValueError(
            f"{retriever} has {options['num_items']} items but {data} has {dataset.num_items}; fit again on {data}"
        )
    dataset.check_split(retriever, options["split_hash"])
    fold = take({"fold": None, **options}, "fold", str | None, retriever)
    trained = dataset if fold is None else without_fold(dataset, Fold.parse(fold))
    towers = {name: options[name] for name in inspect.signature(TwoTower).parameters if name in options}
    index = index or Exact()
    with torch.inference_mode():
        vectors = build(TwoTower, towers, weights, retriever).all_item_vectors().numpy()
    first = Exact()
    first.build(vectors)
    facts = {
        "vector_dim": vectors.shape[1],
        "items": dataset.num_items,
        "has_time": dataset.has_time,
        "request_time": options["request_time"],
        "next_action": options["next_action"],
        "actions": options["actions"] or [],
        "split_hash": dataset.manifest["split_hash"],
        UNTIL: dataset.until,
        **refitted_from(retriever, dataset.until),
        "repeats": dataset.protocol["repeats"],
        "newest_time": int(trained.last_times.max()) if dataset.has_time else None,
        "user_features": user_specs(dataset),
        "item_features": feature_specs(dataset.item_features),
        "log": source_log(dataset.manifest, data / c.MANIFEST)._asdict(),
        "towers": towers,
        "fold": fold,
    }
    with locked(output), atomic_write(output, "index") as folder:
        folder.mkdir()
        first.save(folder)
        torch.save(weights, folder / TOWERS)
        np.save(folder / POPULARITY, trained.train_counts)
        (folder / c.ITEM_TABLE).write_bytes((dataset.path / c.ITEM_TABLE).read_bytes())
        parents = {"retriever": retriever, "data": data}

        def write() -> str:
            made = {"index": read_json(folder / DESCRIPTION, dict, "recsys export-index"), "measured": measured}
            write_manifest(folder, "index", made, parents, **facts)
            return str(made["index"]["class"])

        write()
        users = np.random.default_rng(0).permutation(dataset.users("val"))[:measured]
        if len(users):
            queries, exclude = validation_queries(folder, dataset, users)
            built = index.build_for(vectors, queries, exclude)
        else:
            index.build(vectors)
            built = index
        if index.tried:
            facts["tried"] = list(index.tried)
        built.save(folder)
        name = write()
        if len(users):
            served = Recommender.load(folder, trust=[type(built).__module__]).index  # the caller's own class
            facts["measured"] = measure(served, queries, min(100, dataset.num_items), exclude)
            write()
        write_card(folder, dataset)
    print_summary(
        output,
        f"{dataset.num_items:,} item vectors of {facts['vector_dim']} dimensions, {name.rpartition('.')[2]}",
        *describe_choice(index.tried),
        *describe_search(facts.get("measured")),
        then=f"recsys mine-negatives --data {data} --index {output}{'' if fold is None else f' --fold {fold}'}"
        if dataset.until == "val"
        else f"recsys export-bundle --index {output} --ranker RANKER/best.ckpt --data {data}",
    )


def refitted_from(retriever: Path, until: Until) -> dict[str, str]:
    """The hash of the checkpoint that a refit was chosen by, for the manifest of its index; nothing for other fits.

    Args:
        retriever: checkpoint.
        until: where its training events end.
    """
    if until == "val":
        return {}
    made = read_manifest(retriever.parent, "retriever", f"recsys fit --output {retriever.parent}, to its end")
    chosen = take(made["parents"], "selected", dict, retriever.parent / c.MANIFEST)
    return {SELECTED: take(chosen, "hash", str, retriever.parent / c.MANIFEST)}


def mined_lists(ranker: Path) -> Path:
    """The folder of lists that a ranker was trained on.

    Args:
        ranker: checkpoint.

    Raises:
        ValueError: if other lists are there now.
    """
    made = read_manifest(ranker.parent, "ranker", f"recsys fit --output {ranker.parent}")
    mined = take(made["parents"], "candidates", dict, ranker.parent / c.MANIFEST)
    path = locate_parent(ranker.parent, mined)
    make = f"recsys mine-negatives --output {path}"
    if fingerprint(path) != mined["hash"]:
        raise ValueError(f"{ranker} was trained on other candidates than those now in {path}; fit again")
    verify(path, read_manifest(path, "candidates", make), make)
    return path


def validation_queries(folder: Path, dataset: Dataset, users: np.ndarray) -> tuple[np.ndarray, Exclude]:
    """Query vectors of validation histories, and the items that are filtered for them."""
    recommender = Recommender.load(folder)
    recommender.check(dataset)
    queries = [
        recommender.queries(
            dataset.histories(users[part], "val", recommender.towers.max_length),
            dataset.request_times(users[part], "val"),
            dataset.target_action(users[part], "val", recommender.next_action),
        )
        for part in in_chunks(len(users), 64)
    ]
    seen = dataset.filtered_items(users, "val")
    return np.concatenate(queries), (seen.values, seen.offsets)


def describe_choice(tried: Sequence[dict[str, Any]]) -> list[str]:
    """The settings that an index was chosen from (`Auto`), the chosen one last, as lines of text."""
    lines = []
    for setting in tried:
        recalls = ", ".join(f"{name} {value:.4f}" for name, value in setting.items() if name != "index")
        lines.append(f"{'tried' if setting is not tried[-1] else 'chosen'} {setting['index']}: {recalls}")
    return lines


def describe_search(measured: dict[str, int | float] | None) -> list[str]:
    """The measurements of an index (`retrieval.index.measure`) as lines of text."""
    if measured is None:
        return ["recall and latency were not measured"]
    k = measured["k"]
    return [
        f"recall@{k} against exact search {measured[f'recall@{k}']:.4f} on {measured['queries']:,} validation targets",
        f"one query takes {measured['median_ms']:.2f} ms (median), {measured['p95_ms']:.2f} ms (95th percentile); in a "
        f"batch {measured['batch_ms']:.3f} ms",
    ]


@trusts
def export_bundle(
    index: Path = RUN / "index",
    ranker: Path = RUN / "ranker/best.ckpt",
    output: Path | None = None,
    candidates: int | None = None,
    with_histories: bool = False,
    data: Path | None = None,
    other: Path | None = None,
    average: list[Path] | None = None,
    trust: Trust = None,
) -> None:
    """Export both stages as one folder for serving, which needs no training data.

    With the index of a refitted retriever, the signals are counted again on the events of the refit, and so are the
    ranker's item tables; its weights stay.

    Args:
        index: folder written by export-index.
        ranker: checkpoint of a ranker.
        output: folder to write; None: bundle, next to the index.
        candidates: number of candidates that the ranker scores per request; None: as in its training.
        with_histories: whether to pack the users' histories into the folder, so that `recsys serve` knows them without
            the prepared data. They are all events of the data, with the users' ids.
        data: prepared dataset with the histories, of the index's split; None: the one the index was made from.
        other: index of the refitted second retriever, if the retriever was refitted and the ranker reads
            `OtherRetriever`.
        average: checkpoints of further rankers of the same candidates, such as those of other seeds; the bundle ranks
            by the mean of the calibrated scores of all. None: by `ranker` alone.
        trust: modules outside this package from which the checkpoint may load classes.
    """
    unset = "null for the number in the ranker's training"
    check_integer("candidates", candidates, other=unset, example=200)
    options, weights = read_checkpoint(ranker, "reranker", "recsys fit --config configs/NAME/ranker.yaml")
    reranker = {name: take({"mask_ids": False, **options}, name, object, ranker) for name in RERANKER_OPTIONS}
    arguments(Reranker, reranker, ranker)  # fail before writing a bundle that cannot be loaded
    for name in ("vector_dim", "num_candidates", "recent"):
        take(options, name, int, ranker)
    output, candidates = output or index.parent / "bundle", candidates or options["num_candidates"]
    indexed = read_manifest(index, "index", f"recsys export-index --output {index}")
    for name in KEPT:
        take(indexed, name, object, index / c.MANIFEST)
    candidates = min(candidates, take(indexed, "items", int, index / c.MANIFEST))
    take(weights, "vectors", torch.Tensor, ranker)
    verify(index, indexed, f"recsys export-index --output {index}")
    if options["split_hash"] != indexed["split_hash"]:
        raise ValueError(
            f"{ranker} was trained on data with split hash {str(options['split_hash'])[:12]}…, but {index} is of "
            f"{str(indexed['split_hash'])[:12]}…; mine with this index and fit again"
        )
    until = trained_until(indexed, index / c.MANIFEST)
    vectors = read_array(index / VECTORS, np.float32, (None, options["vector_dim"]))
    if until == "val" and not np.array_equal(weights["vectors"][1:].numpy(), vectors):
        raise ValueError(f"{ranker} was trained with other item vectors than those of {index}; mine and fit again")
    if other is not None and until == "val":
        raise ValueError(f"--other is {other}, but the retriever of {index} is no refit; leave it out")
    made_from = data or locate_parent(index, indexed["parents"]["data"])
    dataset = Dataset(made_from, until) if with_histories or data is not None or until != "val" else None
    if dataset is not None:
        dataset.check_split(index, indexed["split_hash"])
    reranker["dim"], signals = options["vector_dim"], None
    mined = mined_lists(ranker) if options["signals"] or until != "val" or average else None
    members, shares = [(reranker, weights)], None
    if average and mined is not None:
        members, shares = average_rankers(ranker, average, options, weights, RERANKER_OPTIONS, mined)
    if mined is not None and dataset is not None and until != "val":
        padded = np.concatenate([np.zeros_like(vectors[:1]), vectors])
        first = chosen_index(index, indexed, mined)
        members = [
            refit_reranker(*member, first, dataset, padded, path)
            for member, path in zip(members, [ranker, *(average or [])], strict=True)
        ]
        signals = refit_signals(mined, dataset, padded, other) if options["signals"] else None
    (reranker, weights), *further = members
    if shares is not None:
        weights = shared_weights([part for _, part in members], shares)
    with locked(output), atomic_write(output, "bundle") as folder:
        folder.mkdir()
        for file in Path(index).iterdir():
            if file.name not in (c.MANIFEST, c.CARD):
                (folder / file.name).write_bytes(file.read_bytes())
        torch.save(weights, folder / RERANKER)
        if signals is not None:
            save_signals(signals, folder / SIGNALS)
        elif options["signals"] and mined is not None:
            shutil.copytree(mined / SIGNALS, folder / SIGNALS)
        histories = {HISTORIES: pack(dataset, folder)} if dataset is not None and with_histories else {}
        write_manifest(
            folder,
            "bundle",
            options={"candidates": candidates, "with_histories": with_histories},
            parents={"index": index, "ranker": ranker, "data": made_from}
            | {f"ranker {number}": path for number, path in enumerate(average or [], start=2)},
            candidates=candidates,
            reranker=reranker,
            trained_until=until,
            recent=options["recent"],
            **({"average": [own for own, _ in further]} if further else {}),
            log=source_log(indexed, index / c.MANIFEST)._asdict(),
            **{name: indexed[name] for name in KEPT},
            **histories,
        )
        write_card(folder, dataset, output)
    packed = (f"histories of {histories[HISTORIES]['users']:,} users",) if histories else ()
    print_summary(
        output,
        f"both stages, {candidates} candidates of {indexed['items']:,} items are ranked per request",
        *([] if until == "val" else [f"retriever and signals learned from {STRETCH[until]}"]),
        *([f"the mean of {1 + len(further)} rankers"] if further else []),
        *packed,
        then=f"recsys {'serve' if until == 'end' else 'evaluate'} --bundle {output}",
    )
