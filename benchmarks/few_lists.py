"""The ranker with few training lists: from the retriever's order, and from a linear start.

    python benchmarks/few_lists.py runs/amazon-beauty-pair-seed0 --config configs/amazon-beauty/ranker.yaml

RUN holds candidates/. For each number of lists and each sample, that many training lists are sampled, and a quarter as
many users of the validation lists select; all other validation lists measure, up to --held. NDCG@10 of these is printed
as one JSON line for each fit. The test targets are not used.
"""

import argparse
import json
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from lightning import Trainer
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from tables import commit

from recsys2stage.checkpoints import read_checkpoint
from recsys2stage.metrics import compute_metrics
from recsys2stage.optim import RecsysAdamW
from recsys2stage.ranking.candidates import Candidates
from recsys2stage.ranking.choice import ranks
from recsys2stage.ranking.ranker import Ranker
from recsys2stage.ranking.scorers import MLP

QUIET: dict[str, Any] = {"logger": False, "accelerator": "cpu", "enable_progress_bar": False}
HELD = "held"  # validation lists that only measure


class FewLists(Candidates):
    """Candidates with a sample of the lists.

    Args:
        path: as in Candidates.
        lists: number of training lists.
        held: largest number of lists that only measure.
        sample: number of the sample.
        options: of Candidates.
    """

    def __init__(self, path: Path, lists: int, held: int, sample: int, **options: Any) -> None:
        super().__init__(path, **options)
        self.sample = (lists, held, sample)

    def setup(self, stage: str) -> None:
        super().setup(stage)
        lists, held, sample = self.sample
        rng, fold = np.random.default_rng(sample), np.full(len(self.lists.fold), "unused")
        fold[rng.choice(self.training_lists(), lists, replace=False)] = "train"
        validation = np.flatnonzero(self.lists.fold == "select")
        users = rng.permutation(np.unique(self.lists.user[validation]))
        selects = np.isin(self.lists.user[validation], users[: lists // 4])
        fold[validation[selects]] = "select"
        measured = np.flatnonzero(~selects)
        fold[validation[np.random.default_rng(0).permutation(measured)[:held]]] = HELD
        self.lists = self.lists._replace(fold=fold)


def measure(data: FewLists, config: dict[str, Any], linear_start: bool, seed: int) -> dict[str, Any]:
    """NDCG@10 on the lists that only measure: of the retriever, of the ranker of one fit, and with its IDs masked."""
    options = config["model"]["init_args"]
    torch.manual_seed(seed)
    model = Ranker(
        data.num_items,
        data.vector_dim,
        data.features,
        signals=data.signals,
        scores_cold=data.scores_cold,
        recent=data.recent,
        linear_start=linear_start,
        scorer=partial(MLP, **options["scorer"]["init_args"]),
        optimizer=partial(RecsysAdamW, **options["optimizer"]["init_args"]),
        **{name: options[name] for name in ("without", "id_dropout", "final_lr") if name in options},
    )
    for name in ("scorer", "optimizer"):  # functions, which a checkpoint does not hold; only its weights are read
        model.hparams.pop(name)
    with tempfile.TemporaryDirectory() as folder:
        saved = ModelCheckpoint(folder, "best", monitor="val/ndcg@10", mode="max")
        stops = EarlyStopping("val/ndcg@10", mode="max", patience=config["early_stopping"]["patience"])
        trainer = Trainer(max_epochs=config["trainer"]["max_epochs"], callbacks=[saved, stops], **QUIET)
        trainer.fit(model, data)
        _, weights = read_checkpoint(Path(saved.best_model_path), "reranker", "")
    model.reranker.load_state_dict(weights)
    model.reranker.eval()
    values: dict[str, list[np.ndarray]] = {"retriever": [], "ranker": [], "ids_masked": []}
    numbers = np.flatnonzero(data.lists.fold == HELD)
    with torch.no_grad():
        for start in range(0, len(numbers), 64):
            lists = data.read(numbers[start : start + 64])
            masked = torch.ones_like(lists.candidates.items, dtype=torch.bool)
            logits = {
                "retriever": lists.candidates.score,
                "ranker": model.reranker(lists.candidates),
                "ids_masked": model.reranker(lists.candidates, masked),
            }
            for name, own in logits.items():
                values[name].append(compute_metrics(ranks(own, lists).numpy())["ndcg@10"])
    return {name: round(float(np.concatenate(own).mean()), 4) for name, own in values.items()} | {
        "held": len(numbers),
        "chosen": model.manifest_facts["chosen"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("--config", type=Path, required=True)
    parser.add_argument("--lists", type=int, nargs="+", default=[100, 300, 1_500])
    parser.add_argument("--samples", type=int, default=3)
    parser.add_argument("--held", type=int, default=1_500)
    given = parser.parse_args()
    config = yaml.safe_load(given.config.read_text(encoding="utf-8"))
    for lists in given.lists:
        for sample in range(given.samples):
            data = FewLists(
                given.run / "candidates",
                lists,
                given.held,
                sample,
                **{name: value for name, value in config["data"]["init_args"].items() if name != "path"},
            )
            for linear_start in (False, True):
                found = measure(data, config, linear_start, sample)
                row = {"lists": lists, "sample": sample, "linear_start": linear_start, **found, "commit": commit()}
                print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
