"""Build time, memory, recall@100 and latency of Exact, IVF, IVF-PQ and HNSW, without and with a filter.

    python benchmarks/speed/indexes.py --items 1000000 --scratch /tmp/indexes
    python benchmarks/speed/indexes.py --items 10000000 --kinds exact ivf ivf-pq hnsw-small --queries 100
    python benchmarks/speed/indexes.py --table
    python benchmarks/alternate.py --before ../before indexes benchmarks/speed/indexes.py --ratios --items 1000000

The vectors are a mixture like that of a trained retriever: unit vectors around 1,000 centers of Zipf sizes, an item is
a center plus Gaussian noise of .7 of its length. A query is an item plus noise of .5 of its length: it looks for items
near one that the user would like. A filter allows items at random. Each kind is built and searched in a process of its
own, on one core; times are CPU times, so that other processes on the machine hardly change them. Rows are appended to
docs/measured/indexes.jsonl as they are measured; rows that are there already are not measured again.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path.insert(0, str(ROOT / "benchmarks"))
MEASURED = ROOT / "docs/measured/indexes.jsonl"
WIDTH, CENTRES, K, QUERIES = 64, 1000, 100, 200
SHARES = (1.0, 0.5, 0.1, 0.01)
LISTS = {1_000_000: 4096, 10_000_000: 8192}  # as `Auto` chooses
PROBES = (8, 16, 32, 64, 128)
PER_LIST = {"ivf-256": 256}  # vectors for each list that k-means is trained on; 64 for the other kinds
# kind: factory, then for each setting: parameters, k_factor, and whether it is measured with filters
KINDS: dict[str, tuple[str, list[tuple[Any, int, bool]]]] = {
    "exact": ("", [(None, 1, True)]),
    "ivf": ("IVF{lists},Flat", [({"nprobe": n}, 1, n == 32) for n in PROBES]),
    "ivf-256": ("IVF{lists},Flat", [({"nprobe": n}, 1, False) for n in PROBES]),
    "ivf-pq": (
        "IVF{lists},PQ16",
        [({"nprobe": 32}, f, f == 4) for f in (1, 4, 16)] + [({"nprobe": n}, 4, False) for n in (8, 128)],
    ),
    "hnsw": ("HNSW32", [({"efSearch": n}, 1, n == 128) for n in (128, 256, 512)]),
    "hnsw-small": ("HNSW16", [({"efSearch": n}, 1, n == 128) for n in (128, 256, 512)]),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--items", type=int, default=1_000_000)
    parser.add_argument("--kinds", nargs="+", default=["exact", "ivf", "ivf-pq", "hnsw"], choices=KINDS)
    parser.add_argument("--scratch", type=Path, default=Path("/tmp/indexes"), help="folder for vectors and indexes")
    parser.add_argument("--queries", type=int, default=QUERIES, help=f"queries to search with, at most {QUERIES}")
    parser.add_argument("--kind", choices=KINDS, help="measure one kind in this process")
    parser.add_argument("--table", action="store_true", help="print the rows as a Markdown table")
    parser.add_argument("--ratios", action="store_true", help="print numbers for benchmarks/alternate.py")
    options = parser.parse_args()
    if options.table:
        print_table()
    elif options.ratios:
        print(json.dumps(ratios(options.items)))
    elif options.kind:
        measure_kind(options.kind, options.items, options.scratch, options.queries)
    else:
        options.scratch.mkdir(parents=True, exist_ok=True)
        one = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1")
        for kind in options.kinds:
            command = [sys.executable, __file__, "--kind", kind, "--items", str(options.items)]
            command += ["--scratch", str(options.scratch), "--queries", str(options.queries)]
            subprocess.run(command, check=True, env={**os.environ, **one, "PYTHONPATH": str(ROOT)})


def make_vectors(items: int) -> tuple[np.ndarray, np.ndarray]:
    """Item vectors (V, D) and queries (Q, D), all of length 1."""
    rng = np.random.default_rng(0)
    centres = unit(rng.standard_normal((CENTRES, WIDTH), dtype=np.float32))
    weights = 1 / np.arange(1, CENTRES + 1)
    vectors = np.empty((items, WIDTH), np.float32)
    for start in range(0, items, 1 << 18):
        part = vectors[start : start + (1 << 18)]
        rng.standard_normal(out=part, dtype=np.float32)
        part *= 0.7 / np.sqrt(WIDTH)
        part += centres[rng.choice(CENTRES, len(part), p=weights / weights.sum())]
        part[:] = unit(part)
    noise = rng.standard_normal((QUERIES, WIDTH), dtype=np.float32) * np.float32(0.5 / np.sqrt(WIDTH))
    return vectors, unit(vectors[rng.integers(0, items, QUERIES)] + noise)


def unit(vectors: np.ndarray) -> np.ndarray:
    """Vectors of length 1."""
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def make_mask(items: int, share: float) -> np.ndarray | None:
    """A filter that allows a share of the items at random."""
    if share == 1:
        return None
    return np.random.default_rng(int(1 / share)).random(items, dtype=np.float32) < share


def measure_kind(kind: str, items: int, scratch: Path, count: int) -> None:
    """Builds an index and measures its settings that have no row yet."""
    factory, settings = KINDS[kind]
    factory = factory.format(lists=LISTS.get(items, 1 << int(np.log2(4 * np.sqrt(items)))))
    jobs = [
        (parameters, k_factor, share)
        for parameters, k_factor, filtered in settings
        for share in (SHARES if filtered else SHARES[:1])
    ]
    lists = int(factory[3:].partition(",")[0]) if factory.startswith("IVF") else 0
    train_on = min(items, lists * PER_LIST.get(kind, 64)) or None
    keys = {key(row) for row in read_rows()}
    name = factory or "Exact"
    jobs = [job for job in jobs if (name, items, train_on, json.dumps(job[0]), job[1], job[2]) not in keys]
    if not jobs:
        return
    from alternate import commit, processor

    from recsys2stage.retrieval.index import Exact

    path = scratch / f"vectors-{items}.npy"
    if not path.is_file():
        vectors, queries = make_vectors(items)
        np.save(scratch / f"queries-{items}.npy", queries)
        np.save(path, vectors)
    vectors, queries = np.load(path), np.load(scratch / f"queries-{items}.npy")[:count]
    index, built = build(kind, factory, train_on, vectors, scratch / f"index-{kind}-{items}")
    exact = Exact()
    exact.build(vectors)
    for parameters, k_factor, share in jobs:
        mask = make_mask(items, share)
        truth_path = scratch / f"truth-{items}-{share}-{count}.npy"
        if not truth_path.is_file():
            np.save(truth_path, exact.search(queries, K, allowed=mask)[1])
        truth = np.load(truth_path)
        if factory:
            index.set_parameters(parameters, k_factor)
        found, times = search_singly(index, queries, mask)
        row = {
            "index": name,
            "items": items,
            "train_on": train_on,
            "parameters": parameters,
            "k_factor": k_factor,
            "allowed": share,
            "recall@100": round(recall(found, truth), 4),
            "p50_ms": round(float(np.median(times)) * 1e3, 3),
            "p99_ms": round(float(np.quantile(times, 0.99)) * 1e3, 3),
            **built,
            "vectors_mb": round(vectors.nbytes / 2**20),
            "queries": len(queries),
            "commit": commit(ROOT),
            "processor": processor(),
        }
        with MEASURED.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
        print(json.dumps({name: row[name] for name in list(row)[:11]}), flush=True)


def build(
    kind: str, factory: str, train_on: int | None, vectors: np.ndarray, folder: Path
) -> tuple[Any, dict[str, float]]:
    """The index, built or as an earlier process left it in `folder`, and what building it took.

    The memory is what the process grows by, beside the vectors, which all indexes share.
    """
    from recsys2stage.retrieval.index import Exact, Faiss, Index

    if (folder / "built.json").is_file():
        return Index.load(folder), json.loads((folder / "built.json").read_text(encoding="utf-8"))
    index: Any = Faiss(factory, train_on=train_on) if factory else Exact()
    resident, start = memory("VmRSS"), time.process_time()
    index.build(vectors)
    seconds, growth = time.process_time() - start, memory("VmRSS") - resident
    index.save(folder)
    disk = sum(file.stat().st_size for file in folder.iterdir()) / 2**20
    built = {"build_s": round(seconds, 1), "memory_mb": round(growth), "disk_mb": round(disk)}
    (folder / "built.json").write_text(json.dumps(built), encoding="utf-8")
    return index, built


def search_singly(index: Any, queries: np.ndarray, mask: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
    """Items (Q, K) and CPU seconds (Q,) of queries that are searched one at a time."""
    found, times = [], []
    for row in (0, *range(len(queries))):  # the first search includes one-time costs
        start = time.process_time()
        found.append(index.search(queries[row : row + 1], K, allowed=mask)[1][0])
        times.append(time.process_time() - start)
    return np.stack(found[1:]), np.array(times[1:])


def recall(found: np.ndarray, truth: np.ndarray) -> float:
    """The share of the exact items that were found."""
    pairs = zip(found, truth, strict=True)
    return float(np.mean([np.isin(own[own > 0], items).mean() for items, own in pairs]))


def memory(field: str) -> float:
    """MiB of this process: VmRSS now, VmHWM at most so far."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field)) / 1024


def ratios(items: int) -> dict[str, float]:
    """CPU milliseconds per query of searches that an earlier version of the package can do, too."""
    from recsys2stage.retrieval.index import Exact, Faiss

    vectors, queries = make_vectors(items)
    numbers = {}
    indexes: dict[str, Any] = {"exact": Exact(), "ivf": Faiss(f"IVF{LISTS.get(items, 1024)},Flat", {"nprobe": 32})}
    for name, index in indexes.items():
        index.build(vectors)
        for share in SHARES:
            times = search_singly(index, queries[:40], make_mask(items, share))[1]
            numbers[f"{name} allowed {share:g} ms"] = float(np.median(times)) * 1e3
        start = time.process_time()
        index.search(queries[:64], K)
        numbers[f"{name} batch of 64, ms each"] = (time.process_time() - start) / 64 * 1e3
    return numbers


def read_rows() -> list[dict[str, Any]]:
    """The rows measured so far."""
    return (
        [json.loads(line) for line in MEASURED.read_text(encoding="utf-8").splitlines()] if MEASURED.is_file() else []
    )


def key(row: dict[str, Any]) -> tuple[Any, ...]:
    """What a row measured."""
    return row["index"], row["items"], row["train_on"], json.dumps(row["parameters"]), row["k_factor"], row["allowed"]


def print_table() -> None:
    """Two tables for each number of items: without a filter, and with filters."""
    rows = read_rows()
    for items in sorted({row["items"] for row in rows}):
        print(f"\n### {items:,} items\n")
        print(
            "| index | trained on | setting | build, CPU s | memory, MiB | disk, MiB | recall@100 | p50, ms | p99, ms |"
        )
        print("|---" * 9 + "|")
        for row in (one for one in rows if one["items"] == items and one["allowed"] == 1):
            sizes = f"{row['build_s']:g} | {row['memory_mb']:,} | {row['disk_mb']:,}"
            trained = f"{row['train_on']:,}" if row["train_on"] else ""
            print(
                f"| {row['index']} | {trained} | {setting(row)} | {sizes} | {row['recall@100']:.3f} | {latency(row)} |"
            )
        print("\n| index | setting | allowed | recall@100 | p50, ms | p99, ms |")
        print("|---" * 6 + "|")
        for row in (one for one in rows if one["items"] == items and one["allowed"] < 1):
            share = f"{row['allowed']:.0%}"
            print(f"| {row['index']} | {setting(row)} | {share} | {row['recall@100']:.3f} | {latency(row)} |")


def setting(row: dict[str, Any]) -> str:
    """Search parameters in one cell."""
    parts = [f"{name} {value}" for name, value in (row["parameters"] or {}).items()]
    return ", ".join(parts + ([f"k_factor {row['k_factor']}"] if row["k_factor"] > 1 else []))


def latency(row: dict[str, Any]) -> str:
    """Two cells of a row."""
    return f"{row['p50_ms']:.3g} | {row['p99_ms']:.3g}"


if __name__ == "__main__":
    main()
