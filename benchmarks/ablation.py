"""Ablation of the ranker: fits without each of its inputs, and with other scorers and losses.

    python benchmarks/ablation.py runs/ml-1m-pair-seed0 --config configs/ml-1m/ranker.yaml
    python benchmarks/ablation.py runs/ml-1m-pair-seed0 --config configs/ml-1m/ranker.yaml --show    print only

RUN holds candidates/. Each row is a `recsys fit` of the config on the same candidates, with more inputs in `without`
or another scorer or loss. NDCG@10 is that of the validation lists at the best epoch; targets that were not retrieved
count as 0. Its difference to the row with all inputs is paired, with a standard error over users. The test targets are
not used. A second run measures only the missing rows.
"""

import argparse
import json
import shutil
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import yaml
from tables import ROOT, commit, recsys

from recsys2stage.artifacts import read_manifest
from recsys2stage.columns import PAD
from recsys2stage.metrics import compute_metrics, compute_rank
from recsys2stage.ranking.candidates import Candidates
from recsys2stage.ranking.ranker import NOT_RETRIEVED, Ranker

EVERYTHING, NOTHING = "everything", "all signals and sources"
PARTS = ("score", "rank", "margin", "popularity")
MODEL = "--model.init_args"


class Change(NamedTuple):
    """Difference of a row to the config.

    Args:
        removed: inputs removed from the ranker.
        added: inputs added to the ranker, although they are in the config's `without`.
        options: more options of `recsys fit`.
        recent: number of newest events among the ranker inputs; None: as configured.
    """

    removed: tuple[str, ...] = ()
    added: tuple[str, ...] = ()
    options: tuple[str, ...] = ()
    recent: int | None = None


def scorer(name: str) -> tuple[str, ...]:
    """Options of a scorer with the layers of configs/ml-1m."""
    spec = {"class_path": name, "init_args": {"hidden": [128, 64], "dropout": 0.2}}
    return (f"{MODEL}.scorer={json.dumps(spec)}",)


ALTERNATIVES = {
    "MLP, shown state and vectors": Change(added=("state", "vectors")),
    "DIN, shown vectors and 20 newest events": Change(added=("vectors", "recent"), options=scorer("DIN"), recent=20),
    "MoL, shown state and vectors": Change(added=("state", "vectors"), options=scorer("MoL")),
    "DCN": Change(options=scorer("DCN")),
    **{loss: Change(options=(f"{MODEL}.loss={loss}",)) for loss in ("LambdaRank", "BCE", "BPR")},
}


def changes(candidates: Path) -> dict[str, Change]:
    """All rows by label."""
    mined = read_manifest(candidates, "candidates", f"recsys mine-negatives --output {candidates}")["signals"]
    signals = dict.fromkeys(signal["name"].partition(".")[0] for signal in mined)
    single = {name: Change(removed=(name,)) for name in (*signals, *PARTS)}
    return {EVERYTHING: Change(), **single, NOTHING: Change(removed=tuple(signals)), **ALTERNATIVES}


def ndcgs(checkpoint: Path, data: Candidates) -> tuple[np.ndarray, np.ndarray]:
    """NDCG@10 of each validation list, by the ranker and by the retriever."""
    reranker = Ranker.load_from_checkpoint(checkpoint, map_location="cpu").eval().reranker
    parts = []
    with torch.inference_mode():
        for lists in data.val_dataloader():
            real, positive = lists.candidates.items != PAD, lists.positive.clamp(min=0)
            logits = reranker(lists.candidates, torch.zeros_like(real)).masked_fill(~real, -torch.inf)
            retrieved = lists.candidates.rank.gather(1, positive[:, None]).squeeze(1)
            ranks = torch.stack([compute_rank(logits, positive), retrieved], dim=1)
            parts.append(torch.where((lists.positive >= 0)[:, None], ranks, NOT_RETRIEVED).numpy())
    ranker, retriever = compute_metrics(np.concatenate(parts), [10])["ndcg@10"].T
    return ranker, retriever


def measure(label: str, change: Change, options: argparse.Namespace) -> dict[str, Any]:
    """Fits one row; also saves the NDCG@10 of each list."""
    candidates = options.run / "candidates"
    slug = "".join(letter if letter.isalnum() else "-" for letter in label)
    folder = ROOT / "runs/tables/ablation" / f"{options.run.name}-{slug}"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    config = yaml.safe_load(options.config.read_text())
    configured = config["model"]["init_args"].get("without") or []
    without = [name for name in configured if name not in change.added] + list(change.removed)
    recent = config["data"]["init_args"].get("recent", 20) if change.recent is None else change.recent
    arguments = ["--config", str(options.config), f"--data.init_args.path={candidates.resolve()}", *change.options]
    arguments += [f"{MODEL}.without={json.dumps(without)}", f"--data.init_args.recent={recent}"]
    arguments += [f"--seed_everything={options.seed}", "--trainer.enable_progress_bar=false", f"--output={folder}"]
    recsys("fit", *arguments, log=folder / "fit.log")
    data = Candidates(candidates, batch_size=128, recent=recent)
    data.setup("validate")
    ranker, retriever = ndcgs(folder / "best.ckpt", data)
    users = data.lists.user[data.lists.fold == "select"]
    np.savez(folder / "ndcg.npz", ranker=ranker, retriever=retriever, users=users)
    return {
        "run": options.run.name,
        "label": label,
        "seed": options.seed,
        "ndcg@10": round(float(ranker.mean()), 4),
        "retriever_ndcg@10": round(float(retriever.mean()), 4),
        "lists": len(ranker),
        **against(ROOT / "runs/tables/ablation" / f"{options.run.name}-{EVERYTHING}" / "ndcg.npz", ranker),
        "commit": commit(),
    }


def against(everything: Path, ranker: np.ndarray) -> dict[str, float]:
    """Difference to the row with all inputs, and its standard error clustered by user."""
    with np.load(everything) as reference:
        gain, number = ranker - reference["ranker"], np.unique(reference["users"], return_inverse=True)[1]
    lists = np.bincount(number)
    residual = np.bincount(number, gain - gain.mean())  # a user's lists are not independent
    error = np.sqrt(np.square(residual).sum()) / lists.sum()
    return {"difference": round(float(gain.mean()), 5), "standard_error": round(float(error), 5)}


def show(rows: list[dict[str, Any]]) -> None:
    print("| without, or instead | NDCG@10 | difference | over the retriever |")
    print("|---|---|---|---|")
    for row in rows:
        ratio = row["ndcg@10"] / row["retriever_ndcg@10"]
        print(
            f"| {row['label'] if row['difference'] or row['standard_error'] else '–'} | {row['ndcg@10']:.4f} "
            f"| {row['difference']:+.4f} ± {row['standard_error']:.4f} | × {ratio:.3f} |"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="folder with candidates/")
    parser.add_argument("--config", type=Path, required=True, help="config of the ranker")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--show", action="store_true", help="print the measured rows only")
    options = parser.parse_args()
    file = ROOT / "docs/measured/ablation.jsonl"
    every = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
    rows = [row for row in every if (row["run"], row["seed"]) == (options.run.name, options.seed)]
    done = {row["label"] for row in rows}
    if not options.show:
        for label, change in changes(options.run / "candidates").items():
            if label not in done:
                rows.append(measure(label, change, options))
                with file.open("a") as out:
                    out.write(json.dumps(rows[-1]) + "\n")
    show(rows)


if __name__ == "__main__":
    main()
