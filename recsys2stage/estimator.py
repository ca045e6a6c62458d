"""Both stages as one object, for frames in a notebook: what the verbs of `recsys` do, by the very same functions.

model = TwoStageRecommender.from_config("configs/ml-1m", max_epochs=20).fit(events)
model.recommend(users=[1, 2], k=10)
"""

import functools
import inspect
import io
import json
import logging
import shutil
import tempfile
import weakref
from argparse import ArgumentError
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import Any

import polars as pl
import yaml  # type: ignore[import-untyped]  # it comes without annotations
from jsonargparse import ArgumentParser
from tqdm import tqdm

from recsys2stage import columns as c
from recsys2stage.artifacts import atomic_write, read_manifest, take, write_manifest
from recsys2stage.cli import commands, training
from recsys2stage.data import sources
from recsys2stage.data.frames import Frames, Sides, TimeUnit
from recsys2stage.data.ids import given_ids
from recsys2stage.data.options import Part, Seen
from recsys2stage.data.prepare import prepare
from recsys2stage.data.request_inputs import check_user_specs
from recsys2stage.data.sources.base import Kind
from recsys2stage.data.split import Marked
from recsys2stage.mining.mine import mine_negatives
from recsys2stage.ranking.bundle import bundle_manifest

KIND = "model"  # what a folder with a fitted model says it is
DEFAULTS = {  # a fit without a config: the classes' own options, and an end
    "retriever": ["--model=Retriever", "--data=Histories", "--trainer.max_epochs=60", "--trainer.gradient_clip_val=1"],
    "ranker": ["--model=Ranker", "--data=Candidates", "--trainer.max_epochs=30"],
}
NEVER = 1_000_000  # epochs without an improvement that no fit will see


class NotFittedError(ValueError, AttributeError):
    """What only a fitted model can do was asked of one that is not."""


class TwoStageRecommender:
    """A retriever and a ranker, fitted to a frame of events.

    Each stage runs as its verb does, on files in a folder: frames become Parquet, Parquet a prepared dataset, and so on
    to the bundle, from which `recommend` and `evaluate` read. Frames may be of polars or pandas, or anything else that
    polars reads; answers are of the kind that `fit` was given. A fit seeds the generators of the whole process.

    Args:
        config: a folder with prepare.yaml (whose source is not used), retriever.yaml and ranker.yaml, and perhaps
            index.yaml, mine.yaml and bundle.yaml; or the name of such a folder in configs/. None: every class's own
            options. Signals that the frames cannot give, for want of times, ratings or features, are left out with a
            warning.
        retriever: the retriever's YAML file, in place of the folder's.
        ranker: the ranker's YAML file, in place of the folder's.
        overlays: YAML files on top of the retriever's, one on top of the other, or their names in configs/with/.
        max_epochs: the most epochs of either fit; None: as configured.
        early_stopping: True: as configured; a number of epochs without an improvement of NDCG@10; False: not at all.
            The weights of the best epoch are kept in any case.
        seed: of both fits, the mining and the bootstrap.
        folder: where everything is written; None: a temporary folder, which goes with the object.
        user: the column of the user id.
        item: the column of the item id.
        time: the column of the time; None: the rows stand in order, and there are no times.
        time_unit: of numbers, seconds or milliseconds since 1970; iso text; order: numbers that only say what came
            first. None: by the column's type (dates as they are, text as iso, numbers as seconds).
        rating: the column of the rating, if there is one.
        action: the column of what the user did (click, buy, ...), if there is one.
        item_features: column of the item frame -> categorical, multi or numeric; None: every column, by its type (lists
            are multi, numbers numeric, all else categorical), but the id and `title`.
        user_features: the same of the user frame.
        verbose: whether the stages print and show their progress.
        trust: modules outside this package whose classes the artifacts of the stages may name.
    """

    def __init__(
        self,
        config: str | Path | None = None,
        *,
        retriever: str | Path | None = None,
        ranker: str | Path | None = None,
        overlays: Sequence[str | Path] = (),
        max_epochs: int | None = None,
        early_stopping: bool | int = True,
        seed: int = 0,
        folder: str | Path | None = None,
        user: str = "user_id",
        item: str = "item_id",
        time: str | None = "timestamp",
        time_unit: TimeUnit | None = None,
        rating: str | None = None,
        action: str | None = None,
        item_features: Mapping[str, Kind] | None = None,
        user_features: Mapping[str, Kind] | None = None,
        verbose: bool = False,
        trust: Sequence[str] | str | None = (),
    ) -> None:
        self.config = config
        self.retriever = retriever
        self.ranker = ranker
        self.overlays = overlays
        self.max_epochs = max_epochs
        self.early_stopping = early_stopping
        self.seed = seed
        self.folder = folder
        self.user = user
        self.item = item
        self.time = time
        self.time_unit = time_unit
        self.rating = rating
        self.action = action
        self.item_features = item_features
        self.user_features = user_features
        self.verbose = verbose
        self.trust = trust
        self._fitted: Path | None = None
        self._pandas = False

    @classmethod
    def from_config(cls, config: str | Path, **overrides: Any) -> "TwoStageRecommender":
        """A model as a folder of configs describes it.

        Args:
            config: the folder, or its name in configs/.
            overrides: further arguments of the class.
        """
        return cls(config, **overrides)

    def get_params(self, deep: bool = True) -> dict[str, Any]:
        """The arguments, as scikit-learn's tools ask for them; there is nothing deeper."""
        return {name: getattr(self, name) for name in list(inspect.signature(type(self)).parameters)}

    @property
    def path(self) -> Path:
        """The folder of the fitted model: data/, bundle/ and, unless it was loaded, every stage before it."""
        if self._fitted is None:
            raise NotFittedError("this model is not fitted; call fit(events), or TwoStageRecommender.load(path)")
        return self._fitted

    def fit(self, events: Any, items: Any = None, users: Any = None, validation: Any = None) -> "TwoStageRecommender":
        """Fits both stages.

        Args:
            events: a frame with a row for each event, in any order (in order where there is no time).
            items: a frame with what is known of items, by their ids.
            users: a frame with what is known of users, by their ids.
            validation: a frame of later events. Each user's first there is the target that the retriever is selected by
                and the ranker trained on, and all of `events` train; no events are left to test. None: the config's
                split decides, by default the last event of each user tests and the one before it validates.

        Raises:
            ValueError: for columns that are missing, rows that are bad, or where no user has a validation target.
        """
        self._fitted, self._pandas = None, type(events).__module__.partition(".")[0] == "pandas"
        log = self._frames.marked(events, validation)
        sides = self._frames.sides(items, users)
        folder = self._new_folder()
        paths = {stage: folder / stage for stage in ("data", "retriever", "index", "candidates", "ranker", "bundle")}
        with quiet(self.verbose):
            self._prepare(log, sides, folder / "frames", paths["data"])
            self._train("retriever", paths["data"], paths["retriever"], self.overlays)
            best = paths["retriever"] / "best.ckpt"
            own = {"retriever": best, "data": paths["data"], "trust": self._trust}
            self._run(commands.export_index, "index", **own, output=paths["index"])
            of = {"data": paths["data"], "index": paths["index"], "seed": self.seed, "strict": False}
            self._run(mine_negatives, "mine", **of, trust=self._trust, output=paths["candidates"])
            self._train("ranker", paths["candidates"], paths["ranker"])
            best = paths["ranker"] / "best.ckpt"
            own = {"index": paths["index"], "ranker": best, "trust": self._trust}
            self._run(commands.export_bundle, "bundle", **own, output=paths["bundle"])
        parents = {"bundle": paths["bundle"], "data": paths["data"]}
        write_manifest(folder, KIND, self.get_params(), parents, pandas=self._pandas)
        self._fitted = folder
        return self

    def recommend(
        self,
        users: Iterable[Any] | None = None,
        k: int = 10,
        *,
        histories: Any = None,
        request_time: int | None = None,
        action: str | None = None,
        seen: Seen | None = None,
    ) -> Any:
        """The best items for users of the events, or for histories of users never seen.

        Args:
            users: user ids; None: everybody, or those of the histories.
            k: how many items each.
            histories: a frame with the columns of the events, and perhaps of user features. These users need not be
                known.
            request_time: seconds since 1970 at which recommendations are made, no earlier than any user's newest event;
                None: the newest event of the log.
            action: the kind of action to recommend for, where the model is told.
            seen: whether items that a user has seen may be recommended, keep or filter; None: as the data were
                prepared, keep with repeats: keep, else filter.

        Returns:
            A frame with the user and item ids under their names in the events, rank from 1, score, retriever_score;
            by user, best first.

        Raises:
            ValueError: for users that are not known (a history or `fit` knows them), or both users and histories.
        """
        model = self.path
        if users is not None and histories is not None:
            raise ValueError(
                "both users and histories are given; give users of the events, or histories of whom to recommend for"
            )
        with quiet(self.verbose), tempfile.TemporaryDirectory(prefix="recsys2stage-") as folder:
            output, log = Path(folder) / "recommendations.parquet", Path(folder) / "histories.parquet"
            if histories is not None:
                manifest = model / "bundle" / c.MANIFEST
                specs = take(bundle_manifest(model / "bundle"), "user_features", list, manifest)
                check_user_specs(specs, manifest)
                features = [spec["name"] for spec in specs]
                self._frames.histories(histories, features).write_parquet(log)
            commands.recommend(
                bundle=model / "bundle",
                data=model / "data",
                histories=None if histories is None else log,
                users=None if users is None else [*given_ids(users)],
                output=output,
                k=k,
                request_time=request_time,
                action=action,
                seen=seen,
                trust=self._trust,
            )
            resolve_path = pl.read_parquet(output)
        resolve_path = resolve_path.select(
            pl.col(c.USER_ID).alias(self.user), pl.col(c.ITEM_ID).alias(self.item), c.RANK, c.SCORE, c.RETRIEVER_SCORE
        )
        return resolve_path.to_pandas() if self._pandas else resolve_path

    def evaluate(self, split: Part = "test", protocol: str = "full") -> dict[str, Any]:
        """Both stages and two baselines, measured as by `recsys evaluate`; the report, as in its report.json.

        Args:
            split: val or test targets. Choose by val, report test once.
            protocol: full, or sampled-N, whose numbers are not comparable to those of any other.
        """
        model = self.path
        with quiet(self.verbose), tempfile.TemporaryDirectory(prefix="recsys2stage-") as folder:
            commands.evaluate(
                bundle=model / "bundle",
                data=model / "data",
                output=Path(folder),
                split=split,
                protocol=protocol,
                plots=False,
                seed=self.seed,
                trust=self._trust,
            )
            (report,) = Path(folder).glob("report*.json")
            return json.loads(report.read_text(encoding="utf-8"))

    def save(self, path: str | Path) -> None:
        """Writes a folder for `load`, and for the verbs with --bundle and --data; a model saved there is replaced."""
        model = self.path
        with atomic_write(path, KIND) as folder:
            folder.mkdir()
            for part in ("data", "bundle"):
                shutil.copytree(model / part, folder / part)
            shutil.copy(model / c.MANIFEST, folder)

    @classmethod
    def load(cls, path: str | Path, trust: Sequence[str] | str | None = ()) -> "TwoStageRecommender":
        """A model that was saved, with all its arguments but the folder, and the configs, which only a fit reads.

        Args:
            path: folder that `save` wrote.
            trust: modules outside this package whose classes it may name; what the folder itself says does not count.
        """
        make = f"TwoStageRecommender(...).fit(events).save({str(path)!r}) in Python"
        manifest = read_manifest(path, KIND, make)
        own = {"folder": None, "trust": trust, "config": None, "retriever": None, "ranker": None, "overlays": ()}
        options = take(manifest, "options", dict, Path(path) / c.MANIFEST)
        if unknown := options.keys() - inspect.signature(cls).parameters.keys():
            raise ValueError(f"{path} has the arguments {', '.join(sorted(unknown))}, which are unknown; run: {make}")
        model = cls(**options | own)
        model._fitted, model._pandas = Path(path).resolve(), take(manifest, "pandas", bool, path)
        return model

    @property
    def _frames(self) -> Frames:
        return Frames(
            user=self.user,
            item=self.item,
            time=self.time,
            time_unit=self.time_unit,
            rating=self.rating,
            action=self.action,
            item_features=self.item_features,
            user_features=self.user_features,
        )

    @property
    def _trust(self) -> list[str]:
        return [self.trust] if isinstance(self.trust, str) else list(self.trust or ())

    def _new_folder(self) -> Path:
        if self.folder is None:
            folder = Path(tempfile.mkdtemp(prefix="recsys2stage-"))
            weakref.finalize(self, shutil.rmtree, folder, ignore_errors=True)
            return folder
        folder = Path(self.folder).resolve()
        folder.mkdir(parents=True, exist_ok=True)
        (folder / c.MANIFEST).unlink(missing_ok=True)  # until the new one is complete, there is no model here
        return folder

    def _prepare(self, log: pl.DataFrame, sides: Sides, frames: Path, output: Path) -> None:
        options = self._frames.write(log, sides, frames)
        split = {"split": {"class_path": class_path(Marked)}} if "part" in options else {}
        source = {"class_path": class_path(sources.Table), "init_args": options}
        self._run(prepare, "prepare", source=source, output=output, **split)
        manifest = read_manifest(output, "dataset", "recsys prepare-data")
        if not manifest["counts"]["val_users"]:
            raise ValueError(
                f"the split {manifest['protocol']['split']} leaves no user a validation target, and early stopping, "
                "the choice of the best weights and the ranker need some; give fit a frame of validation events, or "
                "a config with another split"
            )

    def _train(self, stage: str, data: Path, output: Path, overlays: Sequence[str | Path] = ()) -> None:
        """`recsys fit`."""
        config = self._config(stage)
        options = DEFAULTS[stage] if config is None else [f"--config={config}"]
        options = [*options, *(f"--config={resolve_path(overlay, 'configs/with', '.yaml')}" for overlay in overlays)]
        options += [f"--data.init_args.path={data}", f"--output={output}", f"--seed_everything={self.seed}"]
        if self.max_epochs is not None:
            options.append(f"--trainer.max_epochs={self.max_epochs}")
        if self.early_stopping is not True:
            options.append(f"--early_stopping.patience={self.early_stopping or NEVER}")
        if not self.verbose:
            options += ["--trainer.enable_progress_bar=false", "--trainer.enable_model_summary=false"]
        options.append("--trainer.devices=1")  # further processes would run the caller's script again
        with config_errors(config):
            training.train("fit", options)

    def _run(self, verb: Callable[..., Any], stage: str, **options: Any) -> None:
        """A verb with the options of the stage's config, and these on top."""
        config = self._config(stage)
        configured = {} if config is None else yaml.safe_load(config.read_text(encoding="utf-8")) or {}
        parser = ArgumentParser(exit_on_error=False)
        parser.add_function_arguments(verb)
        with config_errors(config):
            parsed = parser.parse_object({**configured, **options})
            verb(**parser.instantiate(parsed).as_dict())

    def _config(self, stage: str) -> Path | None:
        """The YAML file of a stage; None where there is none."""
        own = {"retriever": self.retriever, "ranker": self.ranker}.get(stage)
        if own is not None:
            return resolve_path(own, "configs", ".yaml")
        if self.config is None:
            return None
        path = resolve_path(self.config, "configs") / f"{stage}.yaml"
        return path if path.is_file() else None


def resolve_path(name: str | Path, place: str, suffix: str = "") -> Path:
    """A path as it stands, or the name of something in a folder of configs."""
    for path in (Path(name), Path(place) / f"{name}{suffix}"):
        if path.exists():
            return path
    raise FileNotFoundError(f"{name} does not exist, nor does {path}; give a path, or a name from {place}")


def class_path(kind: type) -> str:
    return f"{kind.__module__}.{kind.__qualname__}"


@contextmanager
def config_errors(config: Path | None) -> Iterator[None]:
    """What a parser does not like is a ValueError that names the file it read."""
    try:
        yield
    except ArgumentError as error:
        raise ValueError(f"{config or 'the default options'}: {error}") from error


@contextmanager
def quiet(verbose: bool) -> Iterator[None]:
    """No prints, no progress bars, and of what Lightning logs only warnings; unless verbose."""
    if verbose:
        yield
        return
    loggers = [logging.getLogger(name) for name in ("lightning.pytorch", "lightning.fabric")]
    levels = [logger.level for logger in loggers]
    shown = tqdm.__init__
    try:
        for logger in loggers:
            logger.setLevel(logging.WARNING)
        tqdm.__init__ = functools.partialmethod(shown, disable=True)  # it reads its environment only when imported
        with redirect_stdout(io.StringIO()):
            yield
    finally:
        tqdm.__init__ = shown
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
