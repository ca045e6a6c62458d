"""The promise of extension: classes of one's own, outside the package, are named in YAML and go all the way through."""

from pathlib import Path

import numpy as np
import pytest
import torch
from pipeline_fixtures import Run, recsys

from recsys2stage.artifacts import read_manifest
from recsys2stage.data.dataset import Dataset
from recsys2stage.ranking.candidates import Candidates
from recsys2stage.ranking.ranker import Ranker
from recsys2stage.recommender import Recommender
from recsys2stage.retrieval.retriever import Retriever

MODULE = '''
"""One class for each seam."""

from contextlib import contextmanager
from pathlib import Path

import numpy as np
import polars as pl
import torch
from torch import nn

from recsys2stage.retrieval.encoders import Encoder
from recsys2stage.retrieval.index import Approximate
from recsys2stage.retrieval.items import ItemTable
from recsys2stage.retrieval.losses import Loss
from recsys2stage.ranking.losses import ListLoss
from recsys2stage.mining.miners import Miner
from recsys2stage.retrieval.objectives import NextItem
from recsys2stage.retrieval.encoders.positions import Position, PositionFactory
from recsys2stage.ranking.scorers import Scorer
from recsys2stage.shapes import Shape
from recsys2stage.ranking.signals import Proposer
from recsys2stage.data.sources import Source, Table
from recsys2stage.data.split import Split
from recsys2stage.retrieval.encoders.times import Time, TimeFactory


class Played(Source):
    """Songs somebody played: `who song when` in a text file."""

    def __init__(self, path: str, skip: int = 0):
        self.path = path
        self.skip = skip

    @contextmanager
    def open(self):
        lines = [line.split() for line in Path(self.path).read_text().splitlines()[self.skip:]]
        table = pl.DataFrame(lines, schema=["user_id", "item_id", "timestamp"], orient="row")
        table.with_columns(pl.col("timestamp").cast(pl.Int64)).write_parquet(self.path + ".parquet")
        with Table(Path(self.path + ".parquet"), time="timestamp").open() as tables:
            yield tables


class LastThree(Split):
    """The last event tests; the two before it validate."""

    min_events = 4

    def __init__(self, least: int = 5):
        self.least = least

    def ends(self, times, offsets):
        end = offsets[1:]
        enough = np.diff(offsets) >= self.least
        return np.where(enough, end - 3, end), np.where(enough, end - 1, end)


class Backwards(Position):
    """A learned vector for each place."""

    def __init__(self, shape, scale: float = 1.0):
        super().__init__(shape)
        self.table = nn.Parameter(torch.randn(shape.max_length, shape.dim) * scale)

    def embed(self, x):
        return x + self.table[: x.size(1)]


class Daylight(Time):
    """The hour of the event."""

    def __init__(self, shape, hours: int = 24):
        super().__init__(shape)
        self.hour = nn.Embedding(hours, shape.dim)

    def embed(self, x, times, request):
        return x + self.hour(times // 3600 % self.hour.num_embeddings)


class Running(Encoder):
    """A GRU."""

    def __init__(
        self,
        dim: int,
        max_length: int,
        position: PositionFactory = Backwards,
        time: TimeFactory = Daylight,
        layers: int = 1,
    ):
        super().__init__()
        shape = Shape(dim=dim, max_length=max_length, heads=1)
        self.position, self.time = position(shape), time(shape)
        self.gru = nn.GRU(dim, dim, layers, batch_first=True)

    def forward(self, x, lengths, times, request):
        return self.gru(self.time.embed(self.position.embed(x), times, request))[0]


class Shifted(ItemTable):
    """Vectors away from the origin."""

    def __init__(self, num_items: int, dim: int, features, by: float = 0.5):
        super().__init__(num_items, dim, features, std=0.5)
        self.by = by

    def forward(self, items):
        return super().forward(items) + self.by

    def every(self):
        return super().every() + self.by


class Margin(Loss):
    """The answer ahead of a random item."""

    def __init__(self, margin: float = 0.2):
        super().__init__()
        self.margin = margin

    def forward(self, queries, answers, catalogue):
        other = catalogue.vectors(torch.randint(1, len(catalogue.counts), answers.items.shape))
        gap = (queries * (catalogue.vectors(answers.items) - other)).sum(-1)
        return (self.margin - gap).relu().mean()


class Asked(NextItem):
    """The next item, under another name."""


class Halves(Approximate):
    """Finds only items of odd numbers by itself."""

    def __init__(self, step: int = 2):
        self.step = step

    def candidates(self, queries, n):
        odd = np.arange(0, len(self.vectors), self.step)
        best = np.argsort(-(queries @ self.vectors[odd].T), axis=1)[:, :n]
        found = odd[best] + 1
        return np.pad(found, ((0, 0), (0, n - found.shape[1])), constant_values=-1)


class EveryOther(Miner):
    """Every second candidate."""

    def __init__(self, step: int = 2):
        self.step = step

    def choose(self, request, rng):
        band = request.candidates[:, :: self.step]
        return np.where(request.is_excluded(band), -1, band)


class Linear(Scorer):
    """One layer."""

    def __init__(self, dim: int, num_features: int, hidden: int = 1):
        super().__init__()
        self.layer = nn.Linear(dim + num_features, hidden)
        nn.init.zeros_(self.layer.weight)
        nn.init.zeros_(self.layer.bias)

    def forward(self, shown):
        interest = shown.state[:, None] * shown.vectors
        return self.layer(torch.cat([interest, shown.features], -1)).sum(-1)


class Onwards(Proposer):
    """How far on in the list of all songs a candidate is, and how often it is played; names the songs further on."""

    by_id = True
    names = ("ahead", "played")

    def __init__(self, candidates: int = 0, every: int = 1):
        super().__init__(candidates)
        self.every = every

    def fit(self, dataset, vectors):
        self.tables = {"played": dataset.train_counts}

    def __call__(self, requests):
        newest, _ = requests.newest(1)
        numbers = np.stack([(requests.items - newest) / 10, self.tables["played"][requests.items]], axis=-1)
        return np.where(requests.items[..., None] > 0, numbers, 0).astype(np.float32)

    def propose(self, requests, known):
        newest, _ = requests.newest(1)
        named = (newest + self.every * np.arange(1, self.candidates + 1) - 1) % 30 + 1
        met = [set(known.values[a:b].tolist()) for a, b in zip(known.offsets[:-1], known.offsets[1:], strict=True)]
        left = [[item for item in row if item not in own] for row, own in zip(named.tolist(), met, strict=True)]
        return np.array([row + [-1] * (self.candidates - len(row)) for row in left])


class Hinge(ListLoss):
    """The positive ahead of each negative by one."""

    def forward(self, logits, positive, real):
        own = logits.gather(1, positive[:, None])
        return ((1 + logits - own).relu() * real).mean()
'''

PREPARE = """
source: {class_path: my_parts.Played, init_args: {path: PATH, skip: 1}}
split: {class_path: my_parts.LastThree, init_args: {least: 6}}
"""
RETRIEVER = """
trainer: {max_steps: 3, accelerator: cpu, enable_progress_bar: false, enable_model_summary: false}
model:
  class_path: Retriever
  init_args:
    dim: 8
    encoder:
      class_path: my_parts.Running
      init_args:
        position: {class_path: my_parts.Backwards, init_args: {scale: 0.3}}
        time: {class_path: my_parts.Daylight, init_args: {hours: 12}}
        layers: 2
    items: {class_path: my_parts.Shifted, init_args: {by: 0.25}}
    objective: my_parts.Asked
    loss: {class_path: my_parts.Margin, init_args: {margin: 0.4}}
data: {class_path: Histories, init_args: {max_length: 6, batch_size: 16}}
"""
INDEX = "index: {class_path: my_parts.Halves, init_args: {step: 3}}\n"
MINE = """
miner: {class_path: my_parts.EveryOther, init_args: {step: 3}}
signals: [{class_path: my_parts.Onwards, init_args: {candidates: 5, every: 2}}, Session]
k: 15
select: 0.3
"""
RANKER = """
trainer: {max_steps: 2, accelerator: cpu, enable_progress_bar: false, enable_model_summary: false}
model:
  class_path: Ranker
  init_args:
    scorer: {class_path: my_parts.Linear, init_args: {hidden: 3}}
    loss: my_parts.Hinge
    without: [Onwards.played]
data: {class_path: Candidates, init_args: {batch_size: 16}}
"""


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    folder = tmp_path_factory.mktemp("extend")
    (folder / "my_parts.py").write_text(MODULE)
    rng = np.random.default_rng(0)
    lines = ["who song when"]
    for user in range(60):
        for place, song in enumerate(rng.choice(30, rng.integers(4, 12), replace=False)):
            lines.append(f"listener-{user} song-{song} {1_000_000_000 + 5_000 * place}")
    (folder / "played.txt").write_text("\n".join(lines))
    texts = {"prepare": PREPARE.replace("PATH", str(folder / "played.txt")), "retriever": RETRIEVER}
    texts |= {"index": INDEX, "mine": MINE, "ranker": RANKER}
    for name, text in texts.items():
        (folder / f"{name}.yaml").write_text(text)
    made = Run(folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(folder)
        yaml = {name: ("--config", folder / f"{name}.yaml") for name in texts}
        recsys("prepare-data", *yaml["prepare"], "--output", made.data)
        recsys("fit", *yaml["retriever"], "--output", folder / "retriever", "--data.path", made.data)
        of, own = ("--retriever", made.retriever, "--data", made.data), ("--trust", "my_parts")
        with pytest.raises(SystemExit, match=r"best.ckpt names my_parts.Running, .* --trust my_parts"):
            recsys("export-index", *yaml["index"], *of, "--output", made.index)
        recsys("export-index", *yaml["index"], *of, "--output", made.index, *own)
        of = ("--data", made.data, "--index", made.index)
        recsys("mine-negatives", *yaml["mine"], *of, "--output", made.candidates, *own)
        recsys("fit", *yaml["ranker"], "--output", folder / "ranker", "--data.path", made.candidates)
        recsys("export-bundle", "--index", made.index, "--ranker", made.ranker, "--output", made.bundle, *own)
        recsys("evaluate", "--bundle", made.bundle, "--output", folder, "--resamples", 10, *own)
        yield made


def test_a_source_and_a_split_of_ones_own_prepare_data(run: Run) -> None:
    dataset = Dataset(run.data)
    assert dataset.manifest["options"]["source"]["class_path"] == "my_parts.Played"
    assert dataset.protocol["split"] == "LastThree"
    assert dataset.protocol["least"] == 6
    users = dataset.users("val")
    assert len(users) > 20
    assert (dataset.val_ends - dataset.train_ends)[users].tolist() == [2] * len(users)


def test_a_checkpoint_with_parts_of_ones_own_loads_with_weights_only(run: Run) -> None:
    model = Retriever.load_from_checkpoint(run.retriever, weights_only=True, trust=["my_parts"])
    encoder = model.towers.encoder
    assert type(encoder).__module__ == "my_parts"
    assert encoder.gru.num_layers == 2
    assert encoder.position.table.shape == (6, 8)
    assert encoder.time.hour.num_embeddings == 12
    assert model.towers.items.by == 0.25
    ranker = Ranker.load_from_checkpoint(run.ranker, weights_only=True, trust=["my_parts"])
    assert type(ranker.reranker.scorer).__name__ == "Linear"
    assert ranker.reranker.scorer.layer.out_features == 3


def test_parts_of_ones_own_were_trained(run: Run) -> None:
    torch.manual_seed(0)
    last = run.ranker.with_name("last.ckpt")  # the best may be the untrained one
    weights = torch.load(last, weights_only=True)["state_dict"]
    assert weights["reranker.scorer.layer.weight"].abs().sum() > 0
    config = (run.folder / "retriever/log/version_0/config.yaml").read_text()
    for name in ("Running", "Backwards", "Daylight", "Shifted", "Asked", "Margin"):
        assert f"class_path: my_parts.{name}" in config


def test_an_index_and_a_miner_of_ones_own_are_in_the_manifests(run: Run) -> None:
    index = read_manifest(run.index, "index", "")["options"]["index"]
    assert index == {"class": "my_parts.Halves", "options": {"step": 3}}
    options = read_manifest(run.candidates, "candidates", "")["options"]
    assert options["miner"] == {"class_path": "my_parts.EveryOther", "init_args": {"step": 3}}
    assert options["signals"][0] == {"class_path": "my_parts.Onwards", "init_args": {"candidates": 5, "every": 2}}


def test_a_signal_of_ones_own_is_mined_learned_from_and_served(run: Run) -> None:
    recommender, dataset = Recommender.load(run.bundle, trust=["my_parts"]), Dataset(run.data)
    signal = recommender.signals[0]
    assert type(signal).__module__ == "my_parts"
    assert (signal.candidates, signal.every) == (5, 2)
    assert np.array_equal(signal.tables["played"], dataset.train_counts)
    names = [number["name"] for number in recommender.signal_names]
    assert names[:3] == ["Onwards.ahead", "Onwards.played", "Session.gap"]
    assert names[-2:] == ["source.index", "source.Onwards"]

    ranker = Ranker.load_from_checkpoint(run.ranker, weights_only=True, trust=["my_parts"])
    assert ranker.reranker.signal_by_id.tolist() == [True, True, *[False] * 10, True, True]
    assert (ranker.reranker.signal_scale[:2] > 0).tolist() == [True, False], "one of them is left out"

    data = Candidates(run.candidates)
    data.setup("fit")
    selects = np.flatnonzero(data.lists.fold == "select")
    mined, users, ends = data.read(selects).candidates, data.lists.user[selects], data.lists.position[selects]
    padded, now = dataset.histories(users, ends, 6), dataset.request_times(users, ends)
    queries = recommender.queries(padded, now)
    found = recommender.candidates(queries, dataset.filtered_items(users, ends), padded, now)
    served = recommender.candidate_batch(queries, found, padded, now)
    for name, one in mined._asdict().items():
        torch.testing.assert_close(one, getattr(served, name), rtol=1e-4, atol=1e-4, msg=name)
    newest = mined.recent[:, :1]
    real = mined.items > 0
    torch.testing.assert_close(mined.signals[..., 0][real], ((mined.items - newest) / 10)[real])
    assert (mined.signals[..., -1] > 0).any(), "some candidates are its own"
    assert mined.recent.shape[1] == 20
    assert not mined.recent[:, 6:].any(), "older events are not known when it serves"


def test_the_bundle_serves_with_parts_of_ones_own(run: Run) -> None:
    recommender = Recommender.load(run.bundle, trust=["my_parts"])
    rows = recommender.recommend(["song-1", "song-2"], k=5, times=[1_000_000_000, 1_000_003_600])
    assert len({row["item_id"] for row in rows} - {"song-1", "song-2"}) == 5
    assert type(recommender.index).__name__ == "Halves"
    assert type(recommender.towers.encoder).__name__ == "Running"
    assert (run.folder / "report.json").is_file()


def test_without_its_module_the_error_says_what_cannot_be_imported(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.delitem(sys.modules, "my_parts")
    monkeypatch.setattr(sys, "path", [path for path in sys.path if path != str(run.folder)])
    with pytest.raises(SystemExit, match=r"my_parts.* cannot be imported .*PYTHONPATH"):
        recsys("evaluate", "--bundle", run.bundle, "--output", Path("nowhere"), "--trust", "my_parts")
