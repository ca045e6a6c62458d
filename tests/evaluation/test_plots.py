"""Figures show the numbers of the report; learning curves are those of the fits that the bundle was made from."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pipeline_fixtures import Run, recsys

from recsys2stage.artifacts import fingerprint
from recsys2stage.evaluation.plots import (
    FIGURES,
    Curves,
    calibration_figure,
    ceiling,
    ceiling_figure,
    cohorts_figure,
    gaps_figure,
    learning_curves,
    learning_figure,
    read_log,
)

PNG = b"\x89PNG\r\n\x1a\n"


@pytest.fixture(scope="module")
def report(trained: Run, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("report")
    recsys("evaluate", "--bundle", trained.bundle, "--output", folder, "--resamples", 20)
    return folder


def content(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "report.json").read_text())


def test_a_report_has_its_figures(report: Path, trained: Run, capsys: pytest.CaptureFixture[str]) -> None:
    names = {"report.json", "report.md", "ranks.parquet", *FIGURES}
    assert {file.name for file in report.iterdir()} == names
    text = (report / "report.md").read_text()
    for name, title in FIGURES.items():
        assert (report / name).read_bytes().startswith(PNG)
        assert f"![{title}]({name})" in text


def test_an_index_has_no_figures_of_a_ranker(trained: Run, tmp_path: Path) -> None:
    recsys("evaluate", "--bundle", trained.index, "--output", tmp_path, "--resamples", 10)
    assert {file.name for file in tmp_path.glob("*.png")} == {
        *("cohorts.png", "gaps.png", "ceiling.png", "learning.png")
    }
    fits, missing = learning_curves(trained.index)
    assert [fit.stage for fit in fits] == ["retriever"]
    assert missing == []


def test_without_plots_and_of_samples_there_are_none(trained: Run, tmp_path: Path) -> None:
    for words in (("--plots", "false"), ("--protocol", "sampled-20")):
        recsys("evaluate", "--bundle", trained.bundle, "--output", tmp_path, "--resamples", 10, *words)
    assert list(tmp_path.glob("*.png")) == []
    assert ".png" not in (tmp_path / "report.md").read_text()


def test_bars_are_the_cohorts_ndcg(report: Path) -> None:
    cohorts = content(report)["cohorts"]
    whole = cohorts_figure({name: own for name, own in content(report).items() if name != "by_gap"}).axes
    assert len(whole) == len(cohorts) == 4
    del cohorts["gap_to_request"]  # gaps.png shows it, by other groups
    axes = cohorts_figure(content(report)).axes
    assert len(axes) == len(cohorts)
    for ax, groups in zip(axes, cohorts.values(), strict=True):
        for bars, name in zip(ax.containers, ("retriever", "ranker"), strict=True):
            expected = [group[name]["ndcg@10"] for group in groups.values()]
            assert [bar.get_width() for bar in bars] == pytest.approx(expected)
        labels = [label.get_text() for label in ax.get_yticklabels()]
        assert labels == [f"{label} ({group['users']:,} users)" for label, group in groups.items()]


def test_points_by_gap_are_the_values_with_their_intervals(report: Path) -> None:
    groups = content(report)["by_gap"]
    figure = gaps_figure({"one split": content(report), "another": content(report)})
    assert [ax.get_title() for ax in figure.axes] == ["one split", "another"]
    for ax in figure.axes:
        assert len(ax.containers) == 2
        for bars, name in zip(ax.containers, ("retriever", "ranker"), strict=True):
            points, _, (lines,) = bars
            shown = [group["models"][name]["ndcg@10"] for group in groups.values()]
            assert points.get_xdata() == pytest.approx([one["value"] for one in shown])
            spans = [(segment[0, 0], segment[1, 0]) for segment in lines.get_segments()]
            assert np.array(spans) == pytest.approx(np.array([(one["low"], one["high"]) for one in shown]))
        names = [label.get_text() for label in ax.get_yticklabels()]
        assert names == [f"{label}\n({group['targets']:,} targets)" for label, group in groups.items()]
    with pytest.raises(ValueError, match="the reports old have no metrics by gap"):
        gaps_figure({"old": {"models": {}}})


def test_the_ceiling_is_the_recall_of_the_first_candidates() -> None:
    place = np.array([1, 3, 3, 5, 9])  # of four candidates: two targets are not among them
    assert ceiling(place, 4) == pytest.approx([0.2, 0.2, 0.6, 0.6])
    (line,) = ceiling_figure(place, 4).axes[0].lines
    assert line.get_xdata().tolist() == [1, 2, 3, 4]
    assert line.get_ydata() == pytest.approx([0.2, 0.2, 0.6, 0.6])


def test_reliability_is_the_bins_beside_the_diagonal(report: Path) -> None:
    calibration = content(report)["calibration"]
    _, line = calibration_figure(calibration).axes[0].lines
    assert line.get_xdata() == pytest.approx([row["confidence"] for row in calibration["bins"]])
    assert line.get_ydata() == pytest.approx([row["hits"] for row in calibration["bins"]])


# learning curves


def test_curves_are_those_of_both_fits(trained: Run) -> None:
    fits, missing = learning_curves(trained.bundle)
    assert missing == []
    assert [fit.stage for fit in fits] == ["retriever", "ranker"]
    assert [len(fit.columns["val/ndcg@10"][0]) for fit in fits] == [
        3,
        3,
    ]  # epochs; the ranker's starts before the first
    best = json.loads((trained.folder / "retriever" / "manifest.json").read_text())["best"]
    assert fits[0].columns["val/ndcg@10"][1].max() == pytest.approx(best)
    assert "val/retriever_ndcg@10" in fits[1].columns
    assert len(learning_figure(fits).axes) == 4  # two panels, each with a second scale for the loss


def log_of(folder: Path, version: int, rows: list[tuple[int, str, str]]) -> None:
    path = folder / f"version_{version}"
    path.mkdir(parents=True)
    lines = ["epoch,step,train/loss,val/ndcg@10", *(f"0,{step},{loss},{value}" for step, loss, value in rows)]
    (path / "metrics.csv").write_text("\n".join([*lines, ""]))


def test_a_resumed_fit_goes_on_where_it_took_up(tmp_path: Path) -> None:
    log_of(tmp_path, 0, [(9, "", ".1"), (9, "5", ""), (19, "", ".2"), (19, "4", ""), (29, "", ".9")])
    log_of(tmp_path, 2, [(19, "", ".21"), (19, "3.9", ""), (29, "", ".3"), (29, "3", "")])
    log_of(tmp_path, 10, [(39, "", ".4")])  # after 2, whatever the letters say
    curves = read_log(tmp_path)
    assert [part.tolist() for part in curves["val/ndcg@10"]] == [[9, 19, 29, 39], [0.1, 0.21, 0.3, 0.4]]
    assert [part.tolist() for part in curves["train/loss"]] == [[9, 19, 29], [5, 3.9, 3]]
    log_of(tmp_path, 11, [(9, "", ".5")])  # a fit from the start replaces them all
    assert [part.tolist() for part in read_log(tmp_path)["val/ndcg@10"]] == [[9], [0.5]]


def test_what_a_log_does_not_have_is_not_drawn(tmp_path: Path) -> None:
    assert read_log(tmp_path / "nowhere") == {}
    log_of(tmp_path, 0, [(9, "5", ""), (19, "4", "")])
    curves = read_log(tmp_path)
    assert list(curves) == ["train/loss"]
    learning_figure([Curves("retriever", curves)])


def test_no_legend_covers_a_curve(trained: Run, report: Path) -> None:
    """One in the best corner of the axes lay on the loss, which has a scale of its own."""
    fits, _ = learning_curves(trained.bundle)
    calibration = json.loads((report / "report.json").read_text())["calibration"]
    figures = [learning_figure(fits), learning_figure(fits[:1]), calibration_figure(calibration)]
    for figure in figures:
        figure.canvas.draw()
        (legend,) = figure.legends
        box = legend.get_window_extent()
        assert legend.get_texts()
        assert 0 <= box.x0 <= box.x1 <= figure.bbox.x1  # not cut off
        assert 0 <= box.y0 <= box.y1 <= figure.bbox.y1
        for axes in figure.axes:
            assert axes.get_legend() is None
            assert not box.overlaps(axes.get_tightbbox())
    labels = [text.get_text() for text in figures[0].legends[0].get_texts()]
    assert labels == ["retriever", "ranker", "retriever, users of the ranker", "training loss"]


@pytest.fixture
def moved(trained: Run, tmp_path: Path) -> Run:
    """The run in another place, whose manifests name that place."""
    run = Run(tmp_path / "run")
    shutil.copytree(trained.folder, run.folder)
    manifests = [run.index / "manifest.json", run.bundle / "manifest.json"]
    for manifest in manifests:
        manifest.write_text(manifest.read_text().replace(str(trained.folder), str(run.folder)))
    bundle = json.loads(manifests[1].read_text())
    bundle["parents"]["index"]["hash"] = fingerprint(run.index)
    manifests[1].write_text(json.dumps(bundle))
    assert learning_curves(run.bundle)[1] == []
    return run


def test_a_log_that_is_gone_is_missed_in_words(moved: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.rmtree(moved.folder / "retriever" / "log")
    fits, missing = learning_curves(moved.bundle)
    assert [fit.stage for fit in fits] == ["ranker"]
    assert missing == [
        f"No learning curve of the retriever: {moved.folder / 'retriever' / 'log'} has no metrics.csv with val/ndcg@10 "
        "or train/loss."
    ]
    shutil.rmtree(moved.ranker.parent)
    recsys("evaluate", "--bundle", moved.bundle, "--output", tmp_path / "out", "--resamples", 10)
    assert not (tmp_path / "out" / "learning.png").exists()
    gone = f"No learning curve of the ranker: {moved.ranker} is gone or has changed."
    assert gone in capsys.readouterr().out
    assert gone in (tmp_path / "out" / "report.md").read_text()


def test_the_log_of_another_fit_is_not_taken_for_this_ones(moved: Run) -> None:
    with moved.retriever.open("ab") as file:
        file.write(b"trained again")
    fits, missing = learning_curves(moved.bundle)
    assert [fit.stage for fit in fits] == ["ranker"]
    assert missing == [f"No learning curve of the retriever: {moved.retriever} is gone or has changed."]
    (moved.index / "manifest.json").write_text("{}")
    fits, missing = learning_curves(moved.bundle)
    assert [fit.stage for fit in fits] == ["ranker"]
    assert missing == [f"No learning curve of the retriever: {moved.index} is gone or has changed."]
