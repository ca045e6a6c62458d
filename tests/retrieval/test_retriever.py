"""The retriever learns a world whose answer is known, ranks fully, and leaves a checkpoint that stands alone."""

import csv
import json
import math
import re
import sys
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from closeness import close
from lightning import Trainer
from worlds import write_movielens

from recsys2stage.cli.main import main
from recsys2stage.data.prepare import prepare
from recsys2stage.data.sources import MovieLens, Table
from recsys2stage.data.split import GlobalTime
from recsys2stage.metrics import compute_metrics
from recsys2stage.optim import RecsysAdamW, with_schedule
from recsys2stage.retrieval.encoders import Transformer
from recsys2stage.retrieval.encoders.times import Calendar
from recsys2stage.retrieval.histories import Histories
from recsys2stage.retrieval.losses import InfoNCE, NormPenalty
from recsys2stage.retrieval.objectives import NextItem
from recsys2stage.retrieval.retriever import Retriever
from recsys2stage.shapes import History

QUIET: dict[str, Any] = {
    "logger": False,
    "accelerator": "cpu",
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
    "num_sanity_val_steps": 0,
}


def model_for(data: Histories, **options: Any) -> Retriever:
    settings = {
        "dim": 32,
        "encoder": partial(Transformer, dropout=0.0),
        "optimizer": partial(RecsysAdamW, lr=1e-2),
        "warmup_steps": 10,
    }
    return Retriever(data.num_items, data.max_length, data.request_time, **(settings | options))


def naive_ranks(model: Retriever, data: Histories, split: str) -> np.ndarray:
    """Users one by one, candidates one by one: known items are no candidates, ties count against the target."""
    dataset, ranks = data.dataset, []
    vectors = torch.nn.functional.normalize(model.towers.items.table.weight.detach(), dim=-1)
    for user in dataset.users("val" if split == "val" else "test"):
        start, train, val = int(dataset.offsets[user]), int(dataset.train_ends[user]), int(dataset.val_ends[user])
        place = train if split == "val" else val
        met, target = dataset.items[start:place].tolist(), int(dataset.items[place])
        read = data.read_queries(np.array([user]), "val" if split == "val" else "test").history
        with torch.no_grad():
            query = model.towers.query_vectors(model.towers(read))[0, min(len(met), data.max_length) - 1]
        scores = (vectors @ query).tolist()
        others = [item for item in range(1, data.num_items + 1) if item not in met and item != target]
        ranks.append(1 + sum(scores[item] >= scores[target] for item in others))
    return np.array(ranks)


def test_the_cycle_is_learned(cycle: Path) -> None:
    """Item i is always followed by i + 1: hit@1, and so hit@10, must come to 1.0, from about chance."""
    data = Histories(cycle, max_length=12, batch_size=16)
    model = model_for(data)
    trainer = Trainer(max_epochs=12, check_val_every_n_epoch=12, **QUIET)
    [before] = trainer.validate(model, data, verbose=False)
    trainer.fit(model, data)
    [after] = trainer.validate(model, data, verbose=False)
    [test] = trainer.test(model, data, verbose=False)
    assert before["val/hr@10"] < 0.7, "30 of the 40 items are unknown to a user: chance is 1/3"
    assert after["val/hr@10"] == 1.0
    assert test["test/hr@10"] == 1.0
    assert after["val/ndcg@10"] > 0.9
    assert (naive_ranks(model, data, "test") <= 10).all()


@pytest.mark.parametrize("world", ["cycle", "ragged"])
@pytest.mark.parametrize("split", ["val", "test"])
def test_metrics_are_those_of_a_naive_full_ranking(split: str, world: str, request: pytest.FixtureRequest) -> None:
    data = Histories(request.getfixturevalue(world), max_length=6, eval_batch_size=17)
    model = model_for(data).eval()
    trainer = Trainer(**QUIET)
    [got] = (trainer.validate if split == "val" else trainer.test)(model, data, verbose=False)
    values = compute_metrics(naive_ranks(model, data, split))
    for name in ("hr@10", "ndcg@10", "mrr", "ndcg@200"):
        assert got[f"{split}/{name}"] == pytest.approx(values[name].mean(), rel=1e-5), name
    assert 0 < got[f"{split}/mrr"] < 1


def test_known_items_are_filtered(cycle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A model that puts all that is known first and the target next is perfect once they are filtered."""
    data = Histories(cycle, max_length=12, eval_batch_size=200)
    model = model_for(data, dim=data.num_items).eval()
    [batch] = data.val_dataloader()
    scores = torch.zeros(len(batch.users), data.num_items)
    scores[batch.excluded_rows, batch.excluded_items - 1] = 1.0
    scores[torch.arange(len(scores)), batch.target - 1] = 0.5  # below all known, above all unknown
    monkeypatch.setattr(model.towers, "queries", lambda history: scores)
    monkeypatch.setattr(model.towers, "all_item_vectors", lambda: torch.eye(data.num_items))
    [got] = Trainer(**QUIET).validate(model, data, verbose=False)
    assert got["val/mrr"] == 1.0


def test_requests_without_a_history_are_ranked_by_popularity_as_in_serving(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    events = [  # every third user has come before the split times, the others begin after them
        (user, int(item), 4.0, 10**9 + step * 1_000 + (0 if user % 3 == 0 else 20_000 + user * 500))
        for user in range(30)
        for step, item in enumerate(rng.permutation(15)[: 5 + user % 4 * 3] + 1)
    ]
    split = GlobalTime(val=0.3, test=0.2)
    prepare(MovieLens(write_movielens(tmp_path / "raw", events)), tmp_path / "data", split=split)
    data = Histories(tmp_path / "data", max_length=5)
    model = model_for(data)
    Trainer(**QUIET).validate(model, data, verbose=False)
    [batch] = data.val_dataloader()
    new, counts = batch.history.lengths == 0, data.dataset.train_counts[1:]
    assert 0 < new.sum() < len(new)
    popular = [np.count_nonzero(counts >= counts[target - 1]) for target in batch.target[new].tolist()]
    with torch.inference_mode():
        assert model.eval().ranks(batch)[new].tolist() == popular


class Fit(NamedTuple):
    output: Path
    metrics: list[dict[str, str]]  # validation rows of metrics.csv
    manifest: dict[str, Any]

    def checkpoint(self, name: str) -> dict[str, Any]:
        return torch.load(self.output / name, weights_only=True)


@pytest.fixture(scope="module")
def fit(cycle: Path, tmp_path_factory: pytest.TempPathFactory) -> Fit:
    """`recsys fit` of 6 epochs, of which the last two begin with ruined item vectors."""
    output = tmp_path_factory.mktemp("fit") / "retriever"
    config = output.parent / "retriever.yaml"
    config.write_text(f"""
output: {output}
trainer:
  {{max_epochs: 6, accelerator: cpu, log_every_n_steps: 8, enable_progress_bar: false, enable_model_summary: false}}
early_stopping: {{patience: 10}}
model:
  class_path: Retriever
  init_args:
    dim: 32
    warmup_steps: 10
    encoder: {{class_path: Transformer, init_args: {{layers: 1, dropout: 0.1}}}}
    optimizer: {{class_path: RecsysAdamW, init_args: {{lr: 0.0007}}}}
data: {{class_path: Histories, init_args: {{path: {cycle}, max_length: 12, batch_size: 16}}}}
""")

    def ruin(model: Retriever) -> None:
        if model.current_epoch >= 4:
            with torch.no_grad():
                model.towers.items.table.weight[1:].normal_()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Retriever, "on_train_epoch_start", ruin)
        run_recsys(patch, "fit", "--config", str(config))
    with next((output / "log").glob("*/metrics.csv")).open() as file:
        rows = [row for row in csv.DictReader(file) if row["val/ndcg@10"]]
    return Fit(output, rows, json.loads((output / "manifest.json").read_text()))


def run_recsys(patch: pytest.MonkeyPatch, *argv: str) -> None:
    patch.setattr(sys, "argv", ["recsys", *argv])
    main()


def test_the_kept_checkpoint_is_the_best_and_not_the_last(fit: Fit) -> None:
    values = [float(row["val/ndcg@10"]) for row in fit.metrics]
    assert len(values) == 6
    best = int(np.argmax(values))
    assert best < 4, values
    assert values[best] < 0.99, "too easy to tell the best from another"
    assert values[-1] < values[best] - 0.1
    assert fit.checkpoint("best.ckpt")["epoch"] == best
    assert fit.checkpoint("last.ckpt")["epoch"] == 5
    assert fit.manifest["best"] == pytest.approx(values[best])
    assert (fit.manifest["kind"], fit.manifest["monitor"], fit.manifest["epochs"]) == ("retriever", "val/ndcg@10", 6)
    assert fit.manifest["steps"] == 6 * 8  # 120 windows in batches of 16


def test_a_checkpoint_stands_alone(fit: Fit, cycle: Path, tmp_path: Path) -> None:
    """It loads with weights_only=True from a folder of its own, and measures what the fit measured."""
    alone = tmp_path / "alone.ckpt"
    alone.write_bytes((fit.output / "best.ckpt").read_bytes())
    model = Retriever.load_from_checkpoint(alone, weights_only=True, map_location="cpu")
    assert model.towers.items.num_items == 40
    assert len(model.towers.encoder.blocks) == 1
    assert model.hparams["request_time"] == "none"
    ranks = naive_ranks(model.eval(), Histories(cycle, max_length=12), "val")
    assert compute_metrics(ranks)["ndcg@10"].mean() == pytest.approx(fit.manifest["best"], abs=1e-4)


def test_recsys_validate_measures_the_best(fit: Fit, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    config = next((fit.output / "log").glob("*/config.yaml"))
    run_recsys(monkeypatch, "validate", "--config", str(config))
    printed = capsys.readouterr().out
    [line] = [line for line in printed.splitlines() if "val/ndcg@10 " in line]
    [value] = re.findall(r"\d\.\d+", line)
    assert float(value) == pytest.approx(fit.manifest["best"], abs=1e-6)


def test_popularity_of_training_is_in_the_checkpoint(fit: Fit, cycle: Path) -> None:
    weights, dataset = fit.checkpoint("best.ckpt")["state_dict"], Histories(cycle).dataset
    assert weights["target_counts"].tolist() == dataset.target_counts.tolist()
    assert weights["last_times"].tolist() == dataset.last_times.tolist()


# --- the towers


def test_the_query_is_that_of_the_newest_place(ragged: Path) -> None:
    data = Histories(ragged, max_length=8)
    model = model_for(data).eval()
    batch = data.read_queries(data.dataset.users("test"), "test")
    lengths = batch.history.lengths
    assert len(lengths.unique()) > 3
    with torch.no_grad():
        queries, places = model.towers.queries(batch.history), model.towers.query_vectors(model.towers(batch.history))
        for row, length in enumerate(lengths.tolist()):
            alone = data.read_queries(batch.users[row : row + 1].numpy(), "test").history
            torch.testing.assert_close(queries[row], places[row, length - 1])
            torch.testing.assert_close(
                queries[row], model.towers.query_vectors(model.towers(alone))[0, -1], rtol=1e-4, atol=1e-6
            )
        torch.testing.assert_close(queries.norm(dim=1), torch.ones(len(queries)))
        nothing = torch.zeros(2, 1, dtype=torch.long)
        empty = model.towers.queries(History(nothing, nothing[:, 0], nothing, None))
    assert empty.isfinite().all()


def test_item_vectors_are_unit_and_padding_is_none(cycle: Path) -> None:
    data = Histories(cycle, max_length=12, batch_size=16)
    model = model_for(data)
    table = model.towers.items.table.weight
    assert not table[0].any()
    Trainer(max_epochs=1, limit_val_batches=0, **QUIET).fit(model, data)
    assert not table[0].any(), "padding must not learn"
    vectors = model.towers.all_item_vectors()
    torch.testing.assert_close(vectors.norm(dim=1), torch.ones(40))
    some = torch.tensor([3, 40, 1])
    close(model.towers.item_vectors(some), vectors[some - 1])


# --- the optimiser


def test_the_rate_warms_up_linearly_and_stays() -> None:
    weight = torch.nn.Parameter(torch.zeros(1))
    both = with_schedule(RecsysAdamW([weight], lr=0.5), 4)
    optimizer, schedule = both["optimizer"], both["lr_scheduler"]
    rates = []
    for _ in range(6):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule["scheduler"].step()
    assert rates == pytest.approx([0.125, 0.25, 0.375, 0.5, 0.5, 0.5])
    assert schedule["interval"] == "step"


def test_the_rate_falls_along_a_half_cosine_to_its_share() -> None:
    weight, step = torch.nn.Parameter(torch.zeros(1)), 0
    both = with_schedule(RecsysAdamW([weight], lr=0.5), 2, final=0.1, progress=lambda: step / 8)
    rates = []
    for step in range(1, 10):  # noqa: B007  progress reads it
        rates.append(both["optimizer"].param_groups[0]["lr"])
        both["optimizer"].step()
        both["lr_scheduler"]["scheduler"].step()
    expected = [0.5 * (0.1 + 0.9 * (1 + math.cos(math.pi * done / 8)) / 2) for done in range(1, 9)]
    assert rates[0] == pytest.approx(0.25)
    assert rates[1:] == pytest.approx(expected)
    assert rates[-1] == pytest.approx(0.05)


def test_what_is_left_of_the_rate_is_a_share() -> None:
    with pytest.raises(ValueError, match=r"final_lr is 1\.5, expected a share of the learning rate, from 0 to 1"):
        Retriever(num_items=10, max_length=5, final_lr=1.5).configure_optimizers()


def test_the_optimiser_is_that_of_the_seed() -> None:
    group = RecsysAdamW([torch.nn.Parameter(torch.zeros(1))]).param_groups[0]
    assert (group["lr"], group["betas"], group["eps"], group["weight_decay"]) == (1e-3, (0.9, 0.98), 1e-8, 0.0)


@pytest.mark.parametrize("request_time", ["none", "target"])
def test_recomputed_activations_change_nothing(ragged: Path, request_time: str) -> None:
    """Value and gradient, dropout included: what is drawn for a few rows is drawn again for their gradient."""
    data = Histories(ragged, max_length=10, batch_size=7, request_time=request_time)  # type: ignore[arg-type]
    window = data.read_windows(data.train_dataloader().plan()[0])

    def gradients(dropout: float, rows: int | None) -> list[torch.Tensor]:
        torch.manual_seed(0)
        model = model_for(data, encoder=partial(Transformer, dropout=dropout), recompute_rows=rows).double()
        model.log = lambda *_, **__: None  # type: ignore[method-assign]
        torch.manual_seed(1)
        loss = model.training_step(window, 0)
        loss.backward()
        return [loss.detach(), *(weight.grad for weight in model.parameters() if weight.grad is not None)]

    for one, other in zip(gradients(0.0, None), gradients(0.0, 3), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-12)
    for one, other in zip(gradients(0.5, None), gradients(0.5, len(window.items)), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-12)


def test_a_clock_is_refused_where_there_are_no_times(tmp_path: Path) -> None:
    (tmp_path / "events.csv").write_text("user_id,item_id\n" + "".join(f"1,{item}\n" for item in range(5)))
    prepare(Table(tmp_path / "events.csv", time=None, time_unit="order"), tmp_path / "data")
    data = Histories(tmp_path / "data", max_length=5)
    model = model_for(data, encoder=partial(Transformer, time=Calendar))
    with pytest.raises(ValueError, match=r"has an order and no times; add the overlay configs/with/no-time.yaml"):
        Trainer(**QUIET, max_epochs=1).fit(model, datamodule=data)
    model = model_for(data, objective=NextItem(session_weight=10.0))
    with pytest.raises(ValueError, match=r"NextItem\) reads times, but .* has an order and no times; leave the objec"):
        Trainer(**QUIET, max_epochs=1).fit(model, datamodule=data)


def test_recompute_rows_are_at_least_one() -> None:
    with pytest.raises(ValueError, match="recompute_rows is 0, expected at least 1, or null to keep all activations"):
        Retriever(5, 5, recompute_rows=0)


# --- the price on long states


def test_the_norm_penalty_is_its_definition() -> None:
    norm = torch.tensor(5.0, dtype=torch.float64)
    assert NormPenalty(0.1)(norm).item() == pytest.approx(0.5)
    assert NormPenalty(0.1, cap=3.0)(norm).item() == pytest.approx(0.1 * 2.0**2)
    assert NormPenalty(0.1, cap=5.5)(norm).item() == 0
    with pytest.raises(ValueError, match=r"weight is -1.0, expected a number of at least 0"):
        NormPenalty(-1.0)


@pytest.mark.parametrize("similarity", ["cosine", "dot"])
def test_the_price_is_on_states_before_they_are_made_unit(ragged: Path, similarity: Any) -> None:
    data = Histories(ragged, max_length=8)
    window = data.read_windows(np.arange(12))
    free = model_for(data, similarity=similarity).eval()
    priced = model_for(data, similarity=similarity, norm_penalty=NormPenalty(0.3, cap=1.0)).eval()
    priced.load_state_dict(free.state_dict())
    plain, dear = free.losses(window), priced.losses(window)
    training_batch = free.objective(window)
    norm = free.towers(training_batch.history)[training_batch.target_positions].norm(dim=-1).mean()
    assert norm > 1.5, "else the cap is not reached"
    assert dear["state_norm"].item() == pytest.approx(norm.item(), rel=1e-5)
    assert dear["norm_penalty"].item() == pytest.approx(0.3 * (norm.item() - 1) ** 2, rel=1e-4)
    assert dear["loss"].item() == pytest.approx(plain["loss"].item() + dear["norm_penalty"].item(), rel=1e-5)
    assert set(dear) - set(plain) == {"state_norm", "norm_penalty"}
    for losses in (plain, dear):
        losses["loss"].backward()
    weights = [model.towers.encoder.blocks[0].attention.out.weight.grad for model in (free, priced)]
    assert not torch.allclose(*weights), "long states pay"


# --- schedules


def test_schedules_go_by_the_share_of_the_planned_steps(cycle: Path) -> None:
    data = Histories(cycle, max_length=10, batch_size=40)
    seen: list[float] = []

    class Watching(InfoNCE):
        def forward(self, queries: Any, targets: Any, catalogue: Any) -> Any:
            seen.append(targets.progress)
            return super().forward(queries, targets, catalogue)

    trainer = Trainer(max_epochs=2, logger=False, enable_checkpointing=False, enable_progress_bar=False)
    trainer.fit(model_for(data, loss=Watching(hard=[(0.0, None), (0.5, 4)])), data)
    steps = len(data.train_dataloader())
    assert seen == [step / (2 * steps) for step in range(2 * steps)]


def test_a_schedule_wants_a_run_with_an_end(cycle: Path) -> None:
    data = Histories(cycle, max_length=10, batch_size=40)
    trainer = Trainer(max_epochs=-1, logger=False, enable_checkpointing=False, enable_progress_bar=False)
    with pytest.raises(ValueError, match=r"InfoNCE is scheduled over the whole run.* set trainer.max_epochs"):
        trainer.fit(model_for(data, loss=InfoNCE(hard=[(0.0, None), (0.5, 4)])), data)


# --- a start from another fit's weights


def test_a_fit_may_start_from_anothers_weights(cycle: Path, fit: Fit, tmp_path: Path) -> None:
    data = Histories(cycle, max_length=12, batch_size=16)
    theirs = fit.checkpoint("best.ckpt")["state_dict"]
    frozen = partial(RecsysAdamW, lr=0.0)
    encoder = partial(Transformer, layers=1, dropout=0.1)
    model = model_for(data, dim=32, encoder=encoder, optimizer=frozen, start=fit.output / "best.ckpt")
    Trainer(max_epochs=1, limit_val_batches=0, **QUIET).fit(model, data)
    for name, weight in model.towers.state_dict().items():
        assert torch.equal(weight, theirs[f"towers.{name}"]), name
    assert "start" not in model.hparams, "where it came from must not matter to those who load it"
    other = model_for(data, dim=16, encoder=encoder, start=fit.output / "best.ckpt")
    with pytest.raises(ValueError, match=r"best\.ckpt holds a model of another architecture, so it cannot init"):
        Trainer(max_epochs=1, **QUIET).fit(other, data)
    with pytest.raises(
        FileNotFoundError, match=r"none\.ckpt does not exist, expected a checkpoint; .* run: recsys fit"
    ):
        Trainer(max_epochs=1, **QUIET).fit(model_for(data, start=tmp_path / "none.ckpt"), data)
