"""A tiny two-stage run, made once a session by the verbs themselves; read it, do not write into it."""

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import pytest

RETRIEVER = """
trainer: {max_epochs: 3, accelerator: cpu, enable_progress_bar: false, enable_model_summary: false}
model:
  class_path: Retriever
  init_args:
    dim: 16
    encoder: {class_path: Transformer, init_args: {layers: 1, heads: 2}}
    optimizer: {class_path: RecsysAdamW, init_args: {lr: 1.0e-2}}
    warmup_steps: 5
data:
  class_path: Histories
  init_args: {max_length: 20, batch_size: 32}
"""
RANKER = """
trainer: {max_epochs: 2, accelerator: cpu, enable_progress_bar: false, enable_model_summary: false}
model:
  class_path: Ranker
  init_args:
    scorer: {class_path: MLP, init_args: {hidden: [16]}}
    optimizer: {class_path: RecsysAdamW, init_args: {lr: 1.0e-2}}
    id_dropout: 0.3
    warmup_steps: 1
data:
  class_path: Candidates
  init_args: {batch_size: 16}
"""
SIGNALS = """
signals:
- {class_path: PopularityAsOf, init_args: {candidates: 5}}
- {class_path: Transitions, init_args: {candidates: 10, lags: [1, 2], top: 20}}
- {class_path: Neighbours, init_args: {candidates: 5}}
- Content
- Affinity
- Session
- Ratings
"""
TOLD = (  # the time of each request
    *("--data.init_args.request_time", "target"),
    *("--model.init_args.encoder.init_args.time", "recsys2stage.retrieval.encoders.times.RequestGap"),
)
K = 40  # candidates of the tiny run: a third of its catalogue, so that many targets lie outside


def recsys(*words: object) -> None:
    """`recsys WORDS` in this process: importing torch anew takes longer than the whole tiny run."""
    from recsys2stage.cli.main import main

    with mock.patch.object(sys, "argv", ["recsys", *map(str, words)]):
        main()


@dataclass(frozen=True)
class Run:
    """Where the artifacts of one run lie, and how each is made from the one before."""

    folder: Path

    @property
    def data(self) -> Path:
        return self.folder / "data"

    @property
    def retriever(self) -> Path:
        return self.folder / "retriever" / "best.ckpt"

    @property
    def index(self) -> Path:
        return self.folder / "index"

    @property
    def candidates(self) -> Path:
        return self.folder / "candidates"

    @property
    def ranker(self) -> Path:
        return self.folder / "ranker" / "best.ckpt"

    @property
    def bundle(self) -> Path:
        return self.folder / "bundle"

    def prepare(self, raw: Path, *words: object) -> None:
        recsys("prepare-data", "--source", "MovieLens", "--source.path", raw, "--output", self.data, *words)

    def fit_retriever(self, *words: object) -> None:
        self._fit("retriever", RETRIEVER, self.data, *words)

    def export_index(self, *words: object) -> None:
        recsys("export-index", "--retriever", self.retriever, "--data", self.data, "--output", self.index, *words)

    def mine_with_signals(self, *words: object) -> None:
        path = self.folder / "signals.yaml"
        path.write_text(SIGNALS, encoding="utf-8")
        self.mine("--config", path, *words)

    def mine(self, *words: object) -> None:
        of = ("--data", self.data, "--index", self.index, "--output", self.candidates)
        recsys("mine-negatives", *of, "--k", K, *words)

    def fit_ranker(self, *words: object) -> None:
        self._fit("ranker", RANKER, self.candidates, *words)

    def export_bundle(self, *words: object) -> None:
        of = ("--index", self.index, "--ranker", self.ranker, "--output", self.bundle)
        recsys("export-bundle", *of, "--candidates", K, *words)

    def refit(self, folder: Path, until: str = "test", *words: object) -> "Run":
        """The retriever trained again on the events until there, its index, and the bundle with this run's ranker."""
        other = Run(folder)
        folder.mkdir(exist_ok=True)
        of: tuple[object, ...] = ("--data.init_args.refit", self.folder / "retriever", "--data.init_args.until", until)
        other._fit("retriever", RETRIEVER, self.data, *of, *words)
        recsys("export-index", "--retriever", other.retriever, "--data", self.data, "--output", other.index)
        of = ("--index", other.index, "--ranker", self.ranker, "--data", self.data, "--output", other.bundle)
        recsys("export-bundle", *of)
        return other

    def _fit(self, stage: str, config: str, data: Path, *words: object) -> None:
        path = self.folder / f"{stage}.yaml"
        path.write_text(config, encoding="utf-8")
        output = self.folder / stage
        recsys("fit", "--config", path, "--output", output, "--data.init_args.path", data, *words)


@pytest.fixture(scope="session")
def raw(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A simulated world of 150 users and 120 items, in MovieLens's layout."""
    from recsys2stage.data.simulate import simulate

    folder = tmp_path_factory.mktemp("raw") / "tiny"
    simulate(folder, users=150, items=120, events=4_500)
    return folder


@pytest.fixture(scope="session")
def trained(raw: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Both stages on the simulated world."""
    run = Run(tmp_path_factory.mktemp("trained"))
    run.prepare(raw)
    run.fit_retriever()
    run.export_index()
    run.mine()
    run.fit_ranker()
    run.export_bundle()
    return run


@pytest.fixture(scope="session")
def informed(raw: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Both stages on the simulated world, told of the time and of all signals; three events of a user validate."""
    run = Run(tmp_path_factory.mktemp("informed"))
    run.prepare(raw, "--split", "LeaveOneOut", "--split.val", 3)
    run.fit_retriever(*TOLD)
    run.export_index()
    run.mine_with_signals()
    scorer = {"class_path": "DIN", "init_args": {"hidden": [16]}}
    run.fit_ranker("--model.init_args.scorer", json.dumps(scorer))
    run.export_bundle()
    return run
