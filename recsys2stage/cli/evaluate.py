"""The command evaluate: both stages and the baselines on the same users, as a report."""

from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from recsys2stage import columns as c
from recsys2stage.artifacts import (
    RUN,
    atomic_write,
    fingerprint,
    write_json,
)
from recsys2stage.data.dataset import Dataset, sample_users
from recsys2stage.data.locks import locked
from recsys2stage.data.summary import print_summary
from recsys2stage.evaluation.baselines import Baseline, fit_baselines, specify_baseline
from recsys2stage.evaluation.card import Evaluation, complete_card
from recsys2stage.evaluation.compare import TARGET, check_baseline_run, compare, read_baseline_run
from recsys2stage.evaluation.evaluate import (
    beyond_accuracy,
    describe,
    num_negatives,
    protocol_line,
    rank_users,
    summarise,
)
from recsys2stage.evaluation.plots import write_figures
from recsys2stage.evaluation.report import MAIN_METRICS, against_text, as_markdown, as_table
from recsys2stage.evaluation.targets import BASKET, GAP, Targets, gaps
from recsys2stage.options import Part, Until, check_integer, check_option, check_seed, check_untrained
from recsys2stage.ranking.bundle import bundle_data, bundle_until, check_split
from recsys2stage.recommender import Recommender
from recsys2stage.trust import Trust, trusts

NO_FIGURES: dict[Until, str] = {
    "val": "",
    "test": "measure test targets, or evaluate the bundle that was chosen",
    "end": "evaluate the bundle that was chosen, or its refit until the test targets",
}
MAX_RESAMPLES = 1_000_000  # their means are kept in memory


@trusts
def evaluate(
    bundle: Path = RUN / "bundle",
    data: Path | None = None,
    output: Path | None = None,
    split: Part = "test",
    protocol: str = "full",
    users: int | None = None,
    against: Path | None = None,
    plots: bool = True,
    resamples: int = 1000,
    batch_size: int = 256,
    seed: int = 0,
    baselines: list[Baseline] | None = None,
    trust: Trust = None,
) -> None:
    """Evaluate both stages and baselines on the same users; write report.json, report.md and ranks.parquet.

    A full ranking also goes into the bundle's model card, README.md. Sampled protocols write report-sampled-100.json,
    report-sampled-100.md and ranks-sampled-100.parquet, without beyond-accuracy metrics, calibration and figures.

    Args:
        bundle: folder written by export-bundle, or by export-index (first stage only).
        data: prepared dataset; None: the one the bundle was made from.
        output: folder of the report; None: the folder of the bundle.
        split: which targets to rank. Select models on val, report test once.
        protocol: full: rank each target among all items, without seen ones unless prepared with repeats: keep; or
            sampled-100: among 100 (or any other number) of these, sampled at random, not comparable to full.
        users: number of users, sampled at random, each with all targets; None: all.
        against: folder of the baseline run's report, to compare both stages with; its targets, users and protocol must
            be the same. None: no comparison.
        plots: also write cohorts.png, gaps.png, ceiling.png, learning.png and calibration.png.
        resamples: number of bootstrap samples of users, and of permutations of each randomization test.
        batch_size: targets per batch.
        seed: random seed of sampling, bootstrap and tests.
        baselines: models counted on training events that the report compares with the two stages: Popularity, Markov,
            PersonalTopFrequency, TransitionGraph, ItemKNN, EASE or classes of your own. None: Popularity, Markov and,
            up to 100,000 items, TransitionGraph and, with repeats: keep, PersonalTopFrequency.
        trust: modules outside this package from which the bundle may load classes.
    """
    check_option("split", split, Part)
    check_integer("users", users, other="null for all", example=1000)
    check_integer("resamples", resamples, 1, MAX_RESAMPLES, example=1000)
    check_integer("batch_size", batch_size, example=256)
    check_seed("seed", seed)
    negatives = num_negatives(protocol)
    identity = fingerprint(bundle)  # before it is loaded: another bundle in its place gets no evaluation of this one
    until = bundle_until(bundle)
    check_untrained(bundle, until, split, NO_FIGURES[until])
    recommender, output = Recommender.load(bundle), output or bundle.parent
    dataset = Dataset(data or bundle_data(bundle), until)
    check_split(dataset, bundle)
    recommender.check(dataset)
    measured, places = dataset.target_events(split)
    chosen = np.isin(measured, sample_users(np.unique(measured), users, seed))
    measured, places = measured[chosen], places[chosen]
    if not len(measured):
        raise ValueError(
            f"{dataset.path} has no user with a {split} target; see the counts in its {c.MANIFEST}, or measure on the "
            f"other targets, split {'val' if split == 'test' else 'test'}"
        )
    if dataset.baskets and negatives is not None:
        raise ValueError(
            f"protocol is {protocol}, but the targets of {dataset.path} are baskets, which are ranked as sets, "
            "expected full; leave out protocol"
        )
    mark = "" if negatives is None else f"-{protocol}"
    conditions = describe(dataset, recommender.request_time, split, recommender.next_action, negatives, seed)
    targets, rows = dataset.targets(measured, places), Targets.of(dataset, measured, places)
    if against is not None:  # fail before the long evaluation
        baseline = read_baseline_run(against, mark)
        differs = check_baseline_run(baseline, conditions, dataset.num_items, measured, targets, places)
    fitted = fit_baselines(baselines, dataset)
    with locked(output / f"report{mark}.json"):
        outcome = rank_users(dataset, recommender, measured, places, batch_size, negatives, seed, fitted)
        report: dict[str, Any] = {"protocol": conditions, "items": dataset.num_items}
        report["baselines"] = {name: specify_baseline(baseline) for name, baseline in fitted.items()}
        report |= summarise(dataset, outcome.ranks, measured, places, resamples, seed)
        report |= beyond_accuracy(dataset, outcome, recommender.num_candidates, rows)
        if against is not None:
            report["against"] = compare(outcome.ranks, baseline, differs, resamples, seed, rows)
        line = protocol_line(conditions, report["users"], dataset.num_items, len(measured))
        output.mkdir(parents=True, exist_ok=True)
        with_figures = plots and negatives is None
        figures: dict[str, str] = {}
        missing: list[str] = []
        if with_figures:
            figures, missing = write_figures(report, outcome.candidate_rank, bundle, output, rows.weights())
        with atomic_write(output / f"ranks{mark}.parquet") as temporary:
            columns = {c.USER: measured, c.PLACE: places, TARGET: targets}
            if rows.baskets is not None:
                columns[BASKET] = rows.baskets
            if dataset.has_time:
                columns[GAP] = gaps(dataset, rows)
            pl.DataFrame({**columns, **outcome.ranks}).write_parquet(temporary)
        with atomic_write(output / f"report{mark}.md") as temporary:
            temporary.write_text(as_markdown(report, line, figures, missing), encoding="utf-8")
        write_json(output / f"report{mark}.json", report)
        card = [] if negatives else [complete_card(bundle, identity, dataset, Evaluation(report, line))]
        print(f"\n{line}\n\n{as_table(report)}\n")
        if against is not None:
            print(f"{against_text(report, MAIN_METRICS)}\n")
        several = "" if report["users"] == len(measured) else f"{len(measured):,} targets, "
        files = [f"report{mark}.json", f"ranks{mark}.parquet", *figures]
        print_summary(
            output / f"report{mark}.md",
            f"{report['users']:,} users, {several}{dataset.num_items:,} items",
            *missing,
            *(str(output / name) for name in files),
            *card,
            then=f"recsys recommend --bundle {bundle}",
        )
