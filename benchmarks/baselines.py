"""The baselines on a prepared dataset, without a retriever: accuracy on the targets of a split, and CPU time.

    python benchmarks/baselines.py data/amazon-beauty --split val
    python benchmarks/baselines.py data/shop --baselines '[{"class_path": "EASE", "init_args": {"ridge": 1.0}}]'

Full ranking with the protocol of `recsys evaluate`. Choose options on val; report test once. --json appends a line for
each baseline with its options, the protocol, the commit and the command.
"""

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
from tables import commit

from recsys2stage.data.batches import in_chunks
from recsys2stage.data.dataset import Dataset, sample_users
from recsys2stage.evaluation.baselines import Baseline, fit_baselines, specify_baseline
from recsys2stage.evaluation.ranked_items import RankedItems
from recsys2stage.evaluation.report import MAIN_METRICS, metric_title, model_title, table
from recsys2stage.evaluation.targets import Targets
from recsys2stage.metrics import bootstrap, interval
from recsys2stage.trust import factory

ALL = [{"class_path": name} for name in ("Popularity", "Markov", "TransitionGraph", "ItemKNN", "EASE")]
BATCH = 256  # users


def measure(dataset: Dataset, baseline: Baseline, targets: Targets, seed: int) -> dict[str, Any]:
    """Fits a baseline and ranks the targets.

    Returns:
        Each metric as value, low and high (95 % bootstrap over users), CPU seconds and milliseconds a target.
    """
    start = time.process_time()
    fit_baselines([baseline], dataset)
    fitted = time.process_time()
    ranks = []
    for part in in_chunks(len(targets.users), BATCH):
        users, events = targets.users[part], targets.events[part]
        filtered, items = dataset.filtered_items(users, events), dataset.targets(users, events)
        pool = RankedItems.of(filtered, items, dataset.num_items, users, None, seed)
        ranks.append(pool.baseline_ranks(baseline, dataset.seen(users, events)))
    seconds = time.process_time() - fitted
    values = targets.metrics(np.concatenate(ranks))
    means = np.stack([values[metric] for metric in MAIN_METRICS], axis=1)
    low, high = interval(bootstrap(means, 1000, seed, targets.requests().users))
    return {
        "label": baseline.name,
        **{
            metric: {"value": round(float(means[:, j].mean()), 5), "low": round(low[j], 5), "high": round(high[j], 5)}
            for j, metric in enumerate(MAIN_METRICS)
        },
        "fit_cpu_seconds": round(fitted - start, 2),
        "rank_cpu_ms_per_target": round(1000 * seconds / len(targets.users), 3),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, help="prepared dataset")
    parser.add_argument("--split", choices=["val", "test"], default="val")
    parser.add_argument("--until", choices=["val", "test"], default="val", help="count events before these targets")
    parser.add_argument("--baselines", type=json.loads, default=ALL, help="JSON list of class_path and init_args")
    parser.add_argument("--users", type=int, help="users, sampled at random; all by default")
    parser.add_argument("--seed", type=int, default=0, help="of the sample and the bootstrap")
    parser.add_argument("--json", type=Path, help="file to append the rows to")
    options = parser.parse_args()
    if (options.split, options.until) == ("val", "test"):
        raise SystemExit("--until test counts the validation targets; measure on --split test, or leave it out")
    dataset, rows = Dataset(options.data, options.until), []
    users, events = dataset.target_events(options.split)
    chosen = np.isin(users, sample_users(np.unique(users), options.users, options.seed))
    targets = Targets.of(dataset, users[chosen], events[chosen])
    for described in options.baselines:
        baseline = factory(described, Baseline, "--baselines")()
        row = measure(dataset, baseline, targets, options.seed)
        print(f"{model_title(row['label'])}: fit {row['fit_cpu_seconds']} s", file=sys.stderr)
        rows.append(
            [model_title(row["label"]), *("{value:.4f} [{low:.4f}, {high:.4f}]".format(**row[m]) for m in MAIN_METRICS)]
        )
        if options.json:
            facts = {
                **{
                    "data": options.data.name,
                    "evaluated": options.split,
                    "until": options.until,
                    "targets": len(targets.users),
                    "seed": options.seed,
                },
                **{"protocol": dataset.protocol, "split_hash": dataset.manifest["split_hash"], "commit": commit()},
                "command": "python benchmarks/baselines.py " + " ".join(sys.argv[1:]),
            }
            with options.json.open("a", encoding="utf-8") as file:
                file.write(json.dumps({**row, "baseline": specify_baseline(baseline), **facts}) + "\n")
    print(table(["model", *map(metric_title, MAIN_METRICS)], rows))


if __name__ == "__main__":
    main()
