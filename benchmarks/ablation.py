"""What each thing that the ranker sees is worth, and each scorer and loss: it is fitted without it, or with another.

    python benchmarks/ablation.py runs/ml-1m-pair-seed0 --config configs/ml-1m/ranker.yaml
    python benchmarks/ablation.py runs/ml-1m-pair-seed0 --config configs/ml-1m/ranker.yaml --show    only print

RUN holds candidates/. Every row is a `recsys fit` of the config on the same lists, with more in `without` or another
scorer or loss; candidates stay. NDCG@10 is of the lists of the users that select, at the best epoch, targets outside
the candidates counted as 0; its difference to the row that sees everything is paired, with a standard error over
users. The test is not looked at.
Run again, it goes on with the rows that are missing.
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
from recsys2stage.ranking.ranker import NOWHERE, Ranker

EVERYTHING, NOTHING = "everything", "all signals and sources"
PARTS = ("score", "rank", "margin", "popularity")
MODEL = "--model.init_args"


class Change(NamedTuple):
    """How a row differs from the config.

    Args:
        hidden: what the scorer is not shown.
        shown: what it is shown, though the config's own `without` names it.
        words: further options of `recsys fit`.
        recent: newest events that it looks at; None: as configured.
    """

    hidden: tuple[str, ...] = ()
    shown: tuple[str, ...] = ()
    words: tuple[str, ...] = ()
    recent: int | None = None


def scorer(name: str) -> tuple[str, ...]:
    """That scorer with the layers of configs/ml-1m."""
    described = {"class_path": name, "init_args": {"hidden": [128, 64], "dropout": 0.2}}
    return (f"{MODEL}.scorer={json.dumps(described)}",)


OTHERWISE = {
    "MLP, shown state and vectors": Change(shown=("state", "vectors")),
    "DIN, shown vectors and 20 newest events": Change(shown=("vectors", "recent"), words=scorer("DIN"), recent=20),
    "MoL, shown state and vectors": Change(shown=("state", "vectors"), words=scorer("MoL")),
    "DCN": Change(words=scorer("DCN")),
    **{loss: Change(words=(f"{MODEL}.loss={loss}",)) for loss in ("LambdaRank", "BCE", "BPR")},
}


def changes(candidates: Path) -> dict[str, Change]:
    """All rows by their labels."""
    mined = read_manifest(candidates, "candidates", f"recsys mine-negatives --output {candidates}")["signals"]
    signals = dict.fromkeys(signal["name"].partition(".")[0] for signal in mined)
    apart = {name: Change(hidden=(name,)) for name in (*signals, *PARTS)}
    return {EVERYTHING: Change(), **apart, NOTHING: Change(hidden=tuple(signals)), **OTHERWISE}


def ndcgs(checkpoint: Path, data: Candidates) -> tuple[np.ndarray, np.ndarray]:
    """NDCG@10 of the lists that select, the ranker's and the retriever's."""
    reranker = Ranker.load_from_checkpoint(checkpoint, map_location="cpu").eval().reranker
    found = []
    with torch.inference_mode():
        for lists in data.val_dataloader():
            real, place = lists.listed.items != PAD, lists.positive.clamp(min=0)
            logits = reranker(lists.listed, torch.zeros_like(real)).masked_fill(~real, -torch.inf)
            own = lists.listed.rank.gather(1, place[:, None]).squeeze(1)
            ranks = torch.stack([compute_rank(logits, place), own], dim=1)
            found.append(torch.where((lists.positive >= 0)[:, None], ranks, NOWHERE).numpy())
    ranker, retriever = compute_metrics(np.concatenate(found), [10])["ndcg@10"].T
    return ranker, retriever


def measure(label: str, change: Change, options: argparse.Namespace) -> dict[str, Any]:
    """One fit, its own lists' NDCG@10 kept beside it."""
    candidates = options.run / "candidates"
    slug = "".join(letter if letter.isalnum() else "-" for letter in label)
    folder = ROOT / "runs/tables/ablation" / f"{options.run.name}-{slug}"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    config = yaml.safe_load(options.config.read_text())
    own = config["model"]["init_args"].get("without") or []
    without = [name for name in own if name not in change.shown] + list(change.hidden)
    recent = config["data"]["init_args"].get("recent", 20) if change.recent is None else change.recent
    words = ["--config", str(options.config), f"--data.init_args.path={candidates.resolve()}", *change.words]
    words += [f"{MODEL}.without={json.dumps(without)}", f"--data.init_args.recent={recent}"]
    words += [f"--seed_everything={options.seed}", "--trainer.enable_progress_bar=false", f"--output={folder}"]
    recsys("fit", *words, log=folder / "fit.log")
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
    """Difference to the row that sees everything, and its standard error over users."""
    with np.load(everything) as whole:
        gain, number = ranker - whole["ranker"], np.unique(whole["users"], return_inverse=True)[1]
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
    parser.add_argument("--config", type=Path, required=True, help="of the ranker")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--show", action="store_true", help="print what has been measured, and measure nothing")
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
