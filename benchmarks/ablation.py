"""What each thing that the ranker sees is worth: it is fitted without it, on the same lists, and selected by them.

    python benchmarks/ablation.py runs/ml-1m-pair-seed0 --config configs/ml-1m/ranker.yaml
    python benchmarks/ablation.py runs/ml-1m-pair-seed0 --config configs/ml-1m/ranker.yaml --show    only print

RUN holds candidates/. Every row is a `recsys fit` of the config with more in `without`; candidates stay. NDCG@10
is of the lists of the users that select, at the best epoch, targets outside the candidates counted as 0; its
difference to the row that sees everything is paired, with a standard error over users. The test is not looked at.
Run again, it goes on with the rows that are missing.
"""

import argparse
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from tables import ROOT, commit, recsys

from recsys2stage.artifacts import read_manifest
from recsys2stage.candidates import Candidates
from recsys2stage.columns import PAD
from recsys2stage.metrics import metrics_of, rank_of
from recsys2stage.ranker import NOWHERE, Ranker

EVERYTHING, NOTHING = "everything", "all signals and sources"
PARTS = ("score", "rank", "margin", "popularity")


def groups(candidates: Path) -> dict[str, list[str]]:
    """Label -> what is left out."""
    mined = read_manifest(candidates, "candidates", f"recsys mine-negatives --output {candidates}")["signals"]
    signals = list(dict.fromkeys(signal["name"].partition(".")[0] for signal in mined))
    return {EVERYTHING: [], **{name: [name] for name in [*signals, *PARTS]}, NOTHING: signals}


def ndcgs(checkpoint: Path, data: Candidates) -> tuple[np.ndarray, np.ndarray]:
    """NDCG@10 of the lists that select, the ranker's and the retriever's."""
    reranker = Ranker.load_from_checkpoint(checkpoint, map_location="cpu").eval().reranker
    found = []
    with torch.inference_mode():
        for lists in data.val_dataloader():
            real, place = lists.listed.items != PAD, lists.positive.clamp(min=0)
            logits = reranker(lists.listed, torch.zeros_like(real)).masked_fill(~real, -torch.inf)
            own = lists.listed.rank.gather(1, place[:, None]).squeeze(1)
            ranks = torch.stack([rank_of(logits, place), own], dim=1)
            found.append(torch.where((lists.positive >= 0)[:, None], ranks, NOWHERE).numpy())
    ranker, retriever = metrics_of(np.concatenate(found), [10])["ndcg@10"].T
    return ranker, retriever


def measure(label: str, left_out: list[str], options: argparse.Namespace) -> dict[str, Any]:
    """One fit, its own lists' NDCG@10 kept beside it."""
    candidates = options.run / "candidates"
    slug = "".join(letter if letter.isalnum() else "-" for letter in label)
    folder = ROOT / "runs/tables/ablation" / f"{options.run.name}-{slug}"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    own = yaml.safe_load(options.config.read_text())["model"]["init_args"].get("without") or []
    words = ["--config", str(options.config), f"--data.init_args.path={candidates.resolve()}"]
    words += [f"--model.init_args.without={json.dumps([*own, *left_out])}", f"--seed_everything={options.seed}"]
    words += ["--trainer.enable_progress_bar=false", f"--output={folder}"]
    recsys("fit", *words, log=folder / "fit.log")
    data = Candidates(candidates, batch_size=128, recent=0)
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
    print("| without | NDCG@10 | difference | over the retriever |")
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
        for label, left_out in groups(options.run / "candidates").items():
            if label not in done:
                rows.append(measure(label, left_out, options))
                with file.open("a") as out:
                    out.write(json.dumps(rows[-1]) + "\n")
    show(rows)


if __name__ == "__main__":
    main()
