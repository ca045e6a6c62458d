"""TwoStageRecommender: a scikit-learn style estimator of both stages on data frames, built on the `recsys` commands.

model = TwoStageRecommender.from_config("configs/ml-1m", max_epochs=20).fit(events)
model.recommend(users=[1, 2], k=10)
"""

import difflib
import inspect
import json
import shutil
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import polars as pl

from recsys2stage import columns as c
from recsys2stage.artifacts import atomic_write, make_folder, read_manifest, take, write_manifest
from recsys2stage.cli import evaluate, export, recommend, training
from recsys2stage.cli.configs import resolve_path
from recsys2stage.cli.parser import parse_config, python_errors
from recsys2stage.cli.quiet import quiet
from recsys2stage.data.fitted import FittedFolder
from recsys2stage.data.frames import FrameColumns, FrameTable, Refit, Sides, check_arguments
from recsys2stage.data.ids import given_ids
from recsys2stage.data.locks import locked
from recsys2stage.data.prepare import prepare
from recsys2stage.data.request_inputs import check_user_specs
from recsys2stage.data.sources.base import Kind
from recsys2stage.data.split import Marked
from recsys2stage.mining.mine import mine_negatives
from recsys2stage.options import Part, Seen, TimeUnit, call_text
from recsys2stage.ranking.bundle import bundle_manifest

KIND = "model"  # artifact kind in the manifest
DEFAULTS = {  # options of a fit without a config
    "retriever": ["--model=Retriever", "--data=Histories", "--trainer.max_epochs=60", "--trainer.gradient_clip_val=1"],
    "ranker": ["--model=Ranker", "--data=Candidates", "--trainer.max_epochs=30"],
}
VERBS = {"prepare": "prepare-data", "index": "export-index", "mine": "mine-negatives", "bundle": "export-bundle"}
NEVER = 1_000_000  # early-stopping patience that no fit reaches


class NotFittedError(ValueError, AttributeError):
    """Raised by methods that need a fitted model."""


class TwoStageRecommender:
    """A retriever and a ranker, fitted to a frame of events.

    `fit` runs the `recsys` commands on files in a folder, from prepare-data to the bundle that `recommend` and
    `evaluate` read. Frames may be polars, pandas or anything else that polars reads; results are pandas frames if
    `fit` received one, else polars. A fit seeds the random generators of the whole process.

    Args:
        config: a folder with prepare.yaml (its source is ignored), retriever.yaml, ranker.yaml and optionally
            index.yaml, mine.yaml and bundle.yaml, or its name in configs/. None: class defaults. Signals that need
            times, ratings or features missing from the frames are skipped with a warning.
        retriever: YAML file of the retriever; replaces the folder's.
        ranker: YAML file of the ranker; replaces the folder's.
        overlays: YAML files that override the retriever's in this order, or their names in configs/with/.
        max_epochs: maximum number of epochs of each fit; None: as configured.
        early_stopping: True: as configured; an integer: patience in epochs without a better NDCG@10; False: none. The
            weights of the best epoch are kept in any case.
        refit: train the retriever again, once validation has chosen its epochs, and count the signals again: on all
            events before the test targets (`all`), or on all events (`production`), without metrics then. None: no.
        seed: random seed of both fits, mining and bootstrap.
        folder: output folder; None: a temporary folder, deleted with the object and its copies. Only a model with a
            folder of its own, or a loaded one, can be pickled.
        user: column of the user id.
        item: column of the item id.
        time: column of the time; None: no times, rows are in chronological order.
        time_unit: seconds or milliseconds since 1970; iso: text; order: numbers that only give the order of events.
            None: by the column's type (dates as they are, text as iso, numbers as seconds).
        rating: column of the rating, if any.
        action: column of the action type (click, buy, ...), if any.
        item_features: column of the item frame -> categorical, multi or numeric; None: every column but the id and
            `title`, by its type (lists are multi, numbers numeric, all else categorical).
        user_features: the same for the user frame.
        verbose: whether the stages print their output and progress bars.
        trust: modules outside this package from which the stages' artifacts may load classes.
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
        refit: Refit | None = None,
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
        self.refit = refit
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
        self._holder: FittedFolder | None = None  # shared with copies
        self._pandas = False

    @classmethod
    def from_config(cls, config: str | Path, **overrides: Any) -> "TwoStageRecommender":
        """Creates an unfitted model from a folder of configs, or its name in configs/, and other class arguments."""
        return cls(config, **overrides)

    def get_params(self, deep: bool = True) -> dict[str, Any]:
        """Constructor arguments, as in scikit-learn; `deep` has no effect."""
        return {name: getattr(self, name) for name in list(inspect.signature(type(self)).parameters)}

    def __repr__(self) -> str:
        return call_text(type(self), self.get_params())

    def set_params(self, **params: Any) -> "TwoStageRecommender":
        """Sets constructor arguments, as in scikit-learn; those of the stages take effect at the next `fit`."""
        known = self.get_params()
        for name in params:
            if name not in known:
                near = difflib.get_close_matches(name, known, 1)
                hint = f"; did you mean {near[0]!r}?" if near else ""
                raise ValueError(f"set_params got {name!r}, expected one of {', '.join(known)}{hint}")
        for name, value in params.items():
            setattr(self, name, value)
        return self

    @property
    def path(self) -> Path:
        """Folder of the fitted model: data/, bundle/ and, unless it was loaded, the artifacts of all other stages."""
        if self._fitted is None:
            raise NotFittedError("this model is not fitted; call fit(events), or TwoStageRecommender.load(path)")
        if self._holder is not None and self._holder.is_changed():
            raise NotFittedError(
                f"{self._fitted} no longer holds this model: it was removed or overwritten; call fit(events), or "
                "TwoStageRecommender.load(path) for the one that is there"
            )
        return self._fitted

    def fit(self, events: Any, items: Any = None, users: Any = None, validation: Any = None) -> "TwoStageRecommender":
        """Fits both stages.

        Copies of the model keep the state they had; a copy of a fitted model shares its folder.

        Args:
            events: one row per event, in any order (chronological if there is no time column).
            items: item features and titles, one row per item id.
            users: user features, one row per user id.
            validation: later events. All of `events` are training events and each user's first event here is the
                validation target, for the retriever's early stopping and for training the ranker; there are no test
                targets. None: the config's split, by default leave-one-out (last event test, the one before it
                validation).

        Raises:
            ValueError: a column is missing, a row is invalid, or no user has a validation target.
        """
        check_arguments(self.get_params())
        self._fitted, self._holder, self._pandas = None, None, type(events).__module__.partition(".")[0] == "pandas"
        log = self._frames.mark_parts(events, validation)
        sides = self._frames.sides(items, users)
        holder = FittedFolder(self.folder)
        folder = holder.path
        paths = {stage: folder / stage for stage in ("data", "retriever", "index", "candidates", "ranker", "bundle")}
        with nullcontext() if holder.temporary else locked(folder), quiet(self.verbose):
            make_folder(folder)
            (folder / c.MANIFEST).unlink(missing_ok=True)  # an unfinished fit leaves no valid model
            self._prepare(log, sides, folder / "frames", paths["data"])
            self._train("retriever", paths["data"], paths["retriever"], self.overlays)
            inputs = {"retriever": paths["retriever"] / "best.ckpt", "data": paths["data"], "trust": self._trust}
            self._run(export.export_index, "index", **inputs, output=paths["index"])
            inputs = {"data": paths["data"], "index": paths["index"], "trust": self._trust}
            self._run(mine_negatives, "mine", **inputs, seed=self.seed, strict=False, output=paths["candidates"])
            self._train("ranker", paths["candidates"], paths["ranker"])
            index = paths["index"] if self.refit is None else self._refit(paths, folder / "refit")
            inputs = {"index": index, "ranker": paths["ranker"] / "best.ckpt", "trust": self._trust}
            self._run(export.export_bundle, "bundle", **inputs, output=paths["bundle"])
            parents = {"bundle": paths["bundle"], "data": paths["data"]}
            write_manifest(folder, KIND, self.get_params(), parents, pandas=self._pandas)
        self._fitted, self._holder = folder, holder.remember()
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
        """Recommends k items to users of `fit`, or to new users given by their histories.

        Args:
            users: user ids; None: all users of `fit`, or of `histories`.
            k: number of items per user.
            histories: a frame with the columns of the events and optionally of the user features; its users may be new.
            request_time: seconds since 1970 at which recommendations are made, no earlier than any user's newest event;
                None: the time of the newest event of the log.
            action: target action, for models with next_action.
            seen: keep or filter seen items; None: keep if the data were prepared with repeats: keep, else filter.

        Returns:
            A frame with the user and item id columns of the events, rank (from 1), score and retriever_score, sorted
            by user and rank.

        Raises:
            ValueError: a user id is in neither `fit` nor `histories`, or both users and histories are given.
        """
        model = self.path
        if users is not None and histories is not None:
            raise ValueError("both users and histories are given; give user ids of the events, or histories")
        with quiet(self.verbose), python_errors(), tempfile.TemporaryDirectory(prefix="recsys2stage-") as folder:
            output, log = Path(folder) / "recommendations.parquet", Path(folder) / "histories.parquet"
            if histories is not None:
                manifest = model / "bundle" / c.MANIFEST
                specs = take(bundle_manifest(model / "bundle"), "user_features", list, manifest)
                check_user_specs(specs, manifest)
                features = [spec["name"] for spec in specs]
                self._frames.histories(histories, features).write_parquet(log)
            recommend.recommend(
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
            frame = pl.read_parquet(output)
        frame = frame.select(
            pl.col(c.USER_ID).alias(self.user), pl.col(c.ITEM_ID).alias(self.item), c.RANK, c.SCORE, c.RETRIEVER_SCORE
        )
        return frame.to_pandas() if self._pandas else frame

    def evaluate(self, split: Part = "test", protocol: str = "full") -> dict[str, Any]:
        """Evaluates both stages and baselines with `recsys evaluate`; returns the content of its report.json.

        A model with refit="all" was trained on the validation targets, and one with refit="production" on the test
        targets too: they have no metrics on these.

        Args:
            split: val or test targets. Select models on val, report test once.
            protocol: full, or sampled-N (N sampled negatives), which is not comparable to any other protocol.
        """
        model = self.path
        with quiet(self.verbose), python_errors(), tempfile.TemporaryDirectory(prefix="recsys2stage-") as folder:
            evaluate.evaluate(
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
        """Writes a folder for `load` and for commands with --bundle and --data; replaces a model saved there."""
        model = self.path
        with locked(path), atomic_write(path, KIND) as folder:
            folder.mkdir()
            for part in ("data", "bundle"):
                shutil.copytree(model / part, folder / part)
            shutil.copy(model / c.MANIFEST, folder)

    @classmethod
    def load(cls, path: str | Path, trust: Sequence[str] | str | None = ()) -> "TwoStageRecommender":
        """Loads a saved model with all its arguments except the folder and the configs, which only `fit` reads.

        Args:
            path: folder written by `save`.
            trust: modules outside this package from which it may load classes; the saved value is ignored.
        """
        make = f"TwoStageRecommender(...).fit(events).save({str(path)!r}) in Python"
        manifest = read_manifest(path, KIND, make)
        reset = {"folder": None, "trust": trust, "config": None, "retriever": None, "ranker": None, "overlays": ()}
        options = take(manifest, "options", dict, Path(path) / c.MANIFEST)
        if unknown := options.keys() - inspect.signature(cls).parameters.keys():
            raise ValueError(f"{path} has unknown arguments {', '.join(sorted(unknown))}; run: {make}")
        model = cls(**options | reset)
        model._holder, model._pandas = FittedFolder(path).remember(), take(manifest, "pandas", bool, path)
        model._fitted = model._holder.path
        return model

    @property
    def _frames(self) -> FrameColumns:
        return FrameColumns(
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

    def _prepare(self, log: pl.DataFrame, sides: Sides, frames: Path, output: Path) -> None:
        options = self._frames.write(log, sides, frames)
        split = {"split": {"class_path": class_path(Marked)}} if "part" in options else {}
        source = {"class_path": class_path(FrameTable), "init_args": options}
        self._run(prepare, "prepare", source=source, output=output, **split)
        manifest = read_manifest(output, "dataset", "recsys prepare-data")
        if not manifest["counts"]["val_users"]:
            raise ValueError(
                f"the split {manifest['protocol']['split']} leaves no user a validation target, and early stopping, "
                "the best checkpoint and the ranker need them; pass validation= to fit, or a config with another split"
            )

    def _refit(self, paths: Mapping[str, Path], folder: Path) -> Path:
        """Trains the retriever again into a folder; returns its index."""
        until = "end" if self.refit == "production" else "test"
        options = [f"--data.init_args.refit={paths['retriever']}", f"--data.init_args.until={until}"]
        self._train("retriever", paths["data"], folder / "retriever", self.overlays, options)
        inputs = {"retriever": folder / "retriever/best.ckpt", "data": paths["data"], "trust": self._trust}
        self._run(export.export_index, "index", **inputs, output=folder / "index")
        return folder / "index"

    def _train(
        self,
        stage: str,
        data: Path,
        output: Path,
        overlays: Sequence[str | Path] = (),
        more: Sequence[str] = (),
    ) -> None:
        """Runs `recsys fit` for a stage, with more options."""
        config = self._config(stage)
        options = DEFAULTS[stage] if config is None else [f"--config={config}"]
        options = [*options, *(f"--config={resolve_path(overlay, 'configs/with', '.yaml')}" for overlay in overlays)]
        options += [f"--data.init_args.path={data}", f"--output={output}", f"--seed_everything={self.seed}", *more]
        if self.max_epochs is not None:
            options.append(f"--trainer.max_epochs={self.max_epochs}")
        if self.early_stopping is not True:
            options.append(f"--early_stopping.patience={self.early_stopping or NEVER}")
        if not self.verbose:
            options += ["--trainer.enable_progress_bar=false", "--trainer.enable_model_summary=false"]
        options.append("--trainer.devices=1")  # more processes would run the caller's script again
        with python_errors():
            training.train("fit", options)

    def _run(self, command: Callable[..., Any], stage: str, **options: Any) -> None:
        """Runs a command with the options of the stage's config, overridden by `options`."""
        config = self._config(stage)
        with python_errors():
            command(**parse_config(command, VERBS[stage], config, options))

    def _config(self, stage: str) -> Path | None:
        """The YAML file of a stage, if there is one."""
        file = {"retriever": self.retriever, "ranker": self.ranker}.get(stage)
        if file is not None:
            return resolve_path(file, "configs", ".yaml")
        if self.config is None:
            return None
        path = resolve_path(self.config, "configs") / f"{stage}.yaml"
        return path if path.is_file() else None


def class_path(cls: type) -> str:
    return f"{cls.__module__}.{cls.__qualname__}"
