"""Metrics on MovieLens-1M with and without targets of unknown time, from the ranks of finished runs.

    python benchmarks/estimated_times.py ml-1m.zip --data data/ml-1m runs/ml-1m-seed0 runs/ml-1m-seed1

In this copy of MovieLens-1M a tenth of the timestamps are estimated (PROVENANCE.txt in the zip). Those with status 3
have no known timestamp on one or both sides. As the last event of a user, such an event got the timestamp of the event
before it, although it may be later.
"""

import argparse
import io
import json
import zipfile
from pathlib import Path

import numpy as np
import polars as pl

from recsys2stage import columns as c
from recsys2stage.evaluation.compare import TARGET
from recsys2stage.evaluation.report import TITLES, metric_title, table
from recsys2stage.metrics import compute_metrics

METRICS = ("hr@10", "ndcg@10")
UNBOUNDED = 3  # status: estimated, bounded on at most one side


def statuses(archive: Path) -> pl.DataFrame:
    """user_id, item_id and timestamp status of every rating."""
    with zipfile.ZipFile(archive) as file:
        status = np.load(io.BytesIO(file.read("ml-1m/ratings_ts_status.npy")))
        lines = file.read("ml-1m/ratings.dat").decode("latin-1").splitlines()
    fields = pl.Series(lines).str.split_exact("::", 1).struct.rename_fields([c.USER_ID, c.ITEM_ID]).struct.unnest()
    return fields.cast(pl.Int64).with_columns(status=pl.Series(status))


def split_by_status(run: Path, data: Path, status: pl.DataFrame) -> tuple[pl.DataFrame, np.ndarray]:
    """The ranks of a run, and whether each target has status 3, (B,) bool."""
    ranks = pl.read_parquet(run / "ranks.parquet")
    users = pl.read_parquet(data / c.USER_TABLE, columns=[c.USER, c.USER_ID])
    items = pl.read_parquet(data / c.ITEM_TABLE, columns=[c.ITEM, c.ITEM_ID]).rename({c.ITEM: TARGET})
    targets = (
        ranks.select(pl.col(c.USER).cast(pl.Int64), pl.col(TARGET).cast(pl.Int64))
        .join(users.with_columns(pl.col(c.USER).cast(pl.Int64)), on=c.USER, how="left", maintain_order="left")
        .join(items.with_columns(pl.col(TARGET).cast(pl.Int64)), on=TARGET, how="left", maintain_order="left")
        .join(status, on=[c.USER_ID, c.ITEM_ID], how="left", maintain_order="left")
    )
    if targets["status"].has_nulls():
        raise SystemExit(f"{run} has targets that are not in the archive; give the data and archive of that run")
    return ranks, (targets["status"] == UNBOUNDED).to_numpy()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("archive", type=Path, help="the zip with ratings.dat and ratings_ts_status.npy")
    parser.add_argument("runs", type=Path, nargs="+", help="folders with a ranks.parquet")
    parser.add_argument("--data", type=Path, default=Path("data/ml-1m"), help="dataset of the runs")
    parser.add_argument("--json", type=Path, help="also write the metrics to this file")
    options = parser.parse_args()
    status = statuses(options.archive)
    figures: dict[str, dict[str, dict[str, dict[str, float]]]] = {}
    for run in options.runs:
        ranks, unbounded = split_by_status(run, options.data, status)
        groups = {"all": np.ones(len(ranks), bool), "time known or bounded": ~unbounded, "status 3": unbounded}
        rows = []
        for name in (name for name in TITLES if name in ranks.columns):
            values = compute_metrics(ranks[name].to_numpy())
            means = {label: {m: float(values[m][mask].mean()) for m in METRICS} for label, mask in groups.items()}
            figures.setdefault(str(run), {})[name] = means
            rows.append([TITLES[name], *(f"{means[label][m]:.4f}" for label in groups for m in METRICS)])
        head = [f"{label} ({int(mask.sum()):,}) {metric_title(m)}" for label, mask in groups.items() for m in METRICS]
        print(f"{run}\n\n{table(['model', *head], rows)}\n")
    if options.json:
        options.json.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
