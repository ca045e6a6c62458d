"""MovieLens-1M with and without the targets of which the time is not known, from the ranks of finished runs.

    python benchmarks/estimated_times.py ml-1m.zip --data data/ml-1m runs/ml-1m-seed0 runs/ml-1m-seed1

In this copy of MovieLens-1M a tenth of the timestamps are estimated (PROVENANCE.txt in the zip). Of those with status 3
not even a neighbour on both sides is known: as a user's last event they were given the time of the event before them,
so that they look like the same second and are not known to be.
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
from recsys2stage.evaluation.report import TITLES, table, title_of
from recsys2stage.metrics import compute_metrics

METRICS = ("hr@10", "ndcg@10")
UNBOUNDED = 3  # status: estimated with a bound on one side, or none


def statuses(archive: Path) -> pl.DataFrame:
    """user_id, item_id and the status of the timestamp of every rating."""
    with zipfile.ZipFile(archive) as opened:
        status = np.load(io.BytesIO(opened.read("ml-1m/ratings_ts_status.npy")))
        lines = opened.read("ml-1m/ratings.dat").decode("latin-1").splitlines()
    fields = pl.Series(lines).str.split_exact("::", 1).struct.rename_fields([c.USER_ID, c.ITEM_ID]).struct.unnest()
    return fields.cast(pl.Int64).with_columns(status=pl.Series(status))


def split_by_status(run: Path, data: Path, status: pl.DataFrame) -> tuple[pl.DataFrame, np.ndarray]:
    """The ranks of a run, and which of its targets have status 3."""
    ranks = pl.read_parquet(run / "ranks.parquet")
    users = pl.read_parquet(data / c.USER_TABLE, columns=[c.USER, c.USER_ID])
    items = pl.read_parquet(data / c.ITEM_TABLE, columns=[c.ITEM, c.ITEM_ID]).rename({c.ITEM: TARGET})
    known = (
        ranks.select(pl.col(c.USER).cast(pl.Int64), pl.col(TARGET).cast(pl.Int64))
        .join(users.with_columns(pl.col(c.USER).cast(pl.Int64)), on=c.USER, how="left", maintain_order="left")
        .join(items.with_columns(pl.col(TARGET).cast(pl.Int64)), on=TARGET, how="left", maintain_order="left")
        .join(status, on=[c.USER_ID, c.ITEM_ID], how="left", maintain_order="left")
    )
    if known["status"].has_nulls():
        raise SystemExit(f"{run} has targets that are no ratings of the archive; name the data and archive of that run")
    return ranks, (known["status"] == UNBOUNDED).to_numpy()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("archive", type=Path, help="the zip with ratings.dat and ratings_ts_status.npy")
    parser.add_argument("runs", type=Path, nargs="+", help="folders with a ranks.parquet")
    parser.add_argument("--data", type=Path, default=Path("data/ml-1m"), help="the dataset they were measured on")
    parser.add_argument("--json", type=Path, help="also write the figures there")
    options = parser.parse_args()
    status = statuses(options.archive)
    figures: dict[str, dict[str, dict[str, dict[str, float]]]] = {}
    for run in options.runs:
        ranks, unbounded = split_by_status(run, options.data, status)
        groups = {"all": np.ones(len(ranks), bool), "time known or bounded": ~unbounded, "status 3": unbounded}
        rows = []
        for name in (name for name in TITLES if name in ranks.columns):
            values = compute_metrics(ranks[name].to_numpy())
            means = {label: {m: float(values[m][who].mean()) for m in METRICS} for label, who in groups.items()}
            figures.setdefault(str(run), {})[name] = means
            rows.append([TITLES[name], *(f"{means[label][m]:.4f}" for label in groups for m in METRICS)])
        head = [f"{label} ({int(who.sum()):,}) {title_of(m)}" for label, who in groups.items() for m in METRICS]
        print(f"{run}\n\n{table(['model', *head], rows)}\n")
    if options.json:
        options.json.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
