"""Negatives are never positives, and every mined row carries the score and the rank the retriever really gives it."""

from pathlib import Path

import numpy as np
import polars as pl
import pytest
from pipeline_fixtures import K, Run, recsys

from recsys2stage.artifacts import read_manifest
from recsys2stage.dataset import Dataset
from recsys2stage.index import Exact
from recsys2stage.mining import (
    Miner,
    Mixture,
    Popular,
    RankBand,
    Request,
    Uniform,
    lists,
    read_candidates,
    select_fold,
    specify_miner,
    without_repeats,
)

B, V, D, DEPTH = 30, 50, 6, 20

MINERS = {
    "band": RankBand(),
    "band, some": RankBand(count=5, skip_top=2, last=15),
    "uniform": Uniform(12),
    "popular": Popular(12),
    "mixture": Mixture([RankBand(count=6), Uniform(6), Popular(6)]),
}


class World:
    """Random vectors; each user knows some items, and the target may be one of the known (a repeat)."""

    def __init__(self, rng: np.random.Generator, depth: int = DEPTH) -> None:
        self.vectors = rng.standard_normal((V, D)).astype(np.float32)
        self.queries = rng.standard_normal((B, D)).astype(np.float32)
        self.known = [np.sort(rng.choice(V, rng.integers(0, 9), replace=False)) + 1 for _ in range(B)]
        self.known[3] = np.arange(1, V - 4)  # knows nearly all: fewer items are left than candidates wanted
        unmet = [np.setdiff1d(np.arange(1, V + 1), known) for known in self.known]
        self.target = np.array([rng.choice(items) for items in unmet])
        self.counts = np.append(0, rng.integers(0, 40, V))
        lengths = [len(known) for known in self.known]
        self.offsets = np.append(0, np.cumsum(lengths))
        self.rows, self.items = np.repeat(np.arange(B), lengths), np.concatenate(self.known)
        index = Exact()
        index.build(self.vectors)
        self.scores, candidates = index.search(self.queries, depth, (self.items, self.offsets))
        self.request = Request.of(candidates, self.target, self.rows, self.items, self.counts)
        self.every = np.full((B, V + 1), -np.inf, np.float32)
        self.every[:, 1:] = self.queries @ self.vectors.T
        self.every[self.rows, self.items] = -np.inf

    def positives(self, row: int) -> set[int]:
        return {*self.known[row].tolist(), int(self.target[row])}


@pytest.fixture
def world(rng: np.random.Generator) -> World:
    return World(rng)


def chosen(row: np.ndarray) -> list[int]:
    return row[row > 0].tolist()


@pytest.mark.parametrize("miner", MINERS.values(), ids=MINERS)
def test_a_miner_never_chooses_a_positive(world: World, miner: Miner, rng: np.random.Generator) -> None:
    for _ in range(10):
        negatives = miner.choose(world.request, rng)
        assert ((negatives == -1) | ((negatives >= 1) & (negatives <= V))).all()
        assert any(chosen(row) for row in negatives)
        for row in range(B):
            assert not world.positives(row) & set(chosen(negatives[row]))


@pytest.mark.parametrize("miner", MINERS.values(), ids=MINERS)
def test_a_miner_chooses_the_same_from_the_same_seed(world: World, miner: Miner) -> None:
    one, other = (miner.choose(world.request, np.random.default_rng(7)) for _ in range(2))
    assert np.array_equal(one, other)


def test_a_request_without_any_positive_known_but_the_target(rng: np.random.Generator) -> None:
    nobody = np.zeros(0, dtype=np.int64)
    request = Request.of(np.array([[3, 1, 2]]), np.array([1]), nobody, nobody, np.ones(4))
    assert RankBand().choose(request, rng).tolist() == [[3, -1, 2]]


@pytest.mark.parametrize(("skip_top", "last"), [(0, None), (3, None), (0, 7), (3, 7), (6, 7)])
def test_the_whole_band_is_the_candidates_between_two_ranks(
    world: World, skip_top: int, last: int | None, rng: np.random.Generator
) -> None:
    negatives = RankBand(skip_top=skip_top, last=last).choose(world.request, rng)
    for row in range(B):
        band = world.request.candidates[row].tolist()[skip_top:last]
        assert chosen(negatives[row]) == [item for item in band if item > 0 and item not in world.positives(row)]


def test_some_of_a_band_are_as_many_as_there_are_and_stand_in_order(world: World, rng: np.random.Generator) -> None:
    negatives = RankBand(count=4, skip_top=2, last=12).choose(world.request, rng)
    assert negatives.shape == (B, 4)
    for row in range(B):
        candidates = world.request.candidates[row].tolist()
        band = [item for item in candidates[2:12] if item > 0 and item not in world.positives(row)]
        places = [candidates.index(item) for item in chosen(negatives[row])]
        assert len(places) == min(4, len(band))
        assert places == sorted(set(places))
        assert all(2 <= place < 12 for place in places)


def test_every_item_of_a_band_has_its_chance(world: World, rng: np.random.Generator) -> None:
    drawn = np.concatenate([RankBand(count=4).choose(world.request, rng)[0] for _ in range(200)])
    negatives = [item for item in world.request.candidates[0].tolist() if item not in world.positives(0)]
    assert set(drawn.tolist()) == set(negatives)
    assert np.bincount(drawn).max() < 2 * 800 / len(negatives)


@pytest.mark.parametrize("options", [{"skip_top": -1}, {"last": 0}, {"skip_top": 5, "last": 5}])
def test_an_empty_band_is_an_error(options: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="expected 0 <= skip_top < last"):
        RankBand(**options)


@pytest.mark.parametrize("kind", [Uniform, Popular])
def test_as_many_are_drawn_as_asked(world: World, kind: type, rng: np.random.Generator) -> None:
    full = [len(chosen(row)) for row in kind(10).choose(world.request, rng)]
    assert [count for row, count in enumerate(full) if row != 3] == [10] * (B - 1)
    assert full[3] < 10  # nearly all items are its positives
    with pytest.raises(ValueError, match="count is 0"):
        kind(0)


def test_uniform_draws_all_items_alike_and_popular_by_their_counts(rng: np.random.Generator) -> None:
    counts = np.append(0, [1, 16, 81, 0])
    nobody = np.zeros(0, dtype=np.int64)
    request = Request.of(np.full((2000, 1), -1), np.full(2000, 4), nobody, nobody, counts)

    def shares(miner: Miner) -> np.ndarray:
        drawn = miner.choose(request, rng)
        return np.bincount(drawn[drawn > 0], minlength=5)[1:] / (drawn > 0).sum()

    third = 1 / 3  # item 4 is everybody's target
    assert shares(Uniform(10)) == pytest.approx([third, third, third, 0], abs=0.02)
    assert shares(Popular(10, exponent=0.5)) == pytest.approx([1 / 14, 4 / 14, 9 / 14, 0], abs=0.02)
    assert shares(Popular(10, exponent=1.0)) == pytest.approx([1 / 98, 16 / 98, 81 / 98, 0], abs=0.02)


def test_what_no_one_ever_took_is_never_drawn_as_popular(rng: np.random.Generator) -> None:
    nobody = np.zeros(0, dtype=np.int64)
    counts = np.array([0, 0, 5, 0, 5, 0])  # neither the first nor the last item
    request = Request.of(np.full((500, 1), -1), np.full(500, 3), nobody, nobody, counts)
    assert set(chosen(Popular(10, exponent=0.25).choose(request, rng))) == {2, 4}


def test_a_mixture_repeats_no_item(world: World, rng: np.random.Generator) -> None:
    parts = [RankBand(), Uniform(20), Popular(20)]
    negatives = Mixture(parts).choose(world.request, rng)
    assert negatives.shape == (B, DEPTH + 40)
    assert all(len(chosen(row)) == len(set(chosen(row))) for row in negatives)
    rng = np.random.default_rng(0)
    parts_alone = np.concatenate([part.choose(world.request, np.random.default_rng(0)) for part in parts[:1]], axis=1)
    assert np.array_equal(negatives[:, :DEPTH], parts_alone)  # the first part loses nothing to the others
    with pytest.raises(ValueError, match="no miners"):
        Mixture([])


def test_later_repeats_become_none() -> None:
    items = np.array([[3, 1, 3, -1, 1, -1, 2], [1, 1, 1, 1, 1, 1, 1]])
    assert without_repeats(items).tolist() == [[3, 1, -1, -1, -1, -1, 2], [1, -1, -1, -1, -1, -1, -1]]


def test_each_row_has_its_true_score_and_rank(world: World, rng: np.random.Generator) -> None:
    negatives = Mixture([RankBand(count=8), Uniform(8)]).choose(world.request, rng)
    selects = np.arange(B) % 3 == 0
    table = lists(world.request, world.scores, negatives, world.every, selects)
    seen = {"candidate": 0, "drawn": 0}
    for row, item, label, score, rank, origin, fold in zip(*table.values(), strict=True):
        exact = world.every[row].tolist()
        assert score == pytest.approx(exact[item], abs=1e-5)
        assert np.isfinite(score)
        assert rank == 1 + sum(other > exact[item] for other in exact)  # no two scores are equal here
        assert label == (item == world.target[row])
        assert origin == ("candidate" if rank <= DEPTH else "drawn")
        assert fold == ("select" if selects[row] else "train")
        seen[origin] += 1
    assert min(seen.values()) > B


def test_what_the_index_missed_ranks_below_what_it_found(rng: np.random.Generator) -> None:
    """As an approximate index: the best items are not among the candidates."""
    world = World(rng)
    missed = world.request.candidates[:, 0]
    request = world.request._replace(candidates=world.request.candidates[:, 1:6])
    every = np.where(np.isin(np.arange(B), 3)[:, None], -np.inf, world.every)  # user 3 has no six items left
    table = lists(request, world.scores[:, 1:6], missed[:, None], every, np.zeros(B, dtype=bool))
    drawn = table["origin"] == "drawn"
    assert drawn.sum() >= B // 2
    assert (table["retriever_rank"][drawn & (table["row"] != 3)] == 6).all()


def test_lists_hold_target_and_negatives_or_all_candidates_in_order(world: World, rng: np.random.Generator) -> None:
    negatives = MINERS["mixture"].choose(world.request, rng)
    selects = np.arange(B) % 2 == 0
    table = lists(world.request, world.scores, negatives, world.every, selects)
    inside = outside = 0
    for row in range(B):
        own = table["row"] == row
        items, ranks = table["item"][own].tolist(), table["retriever_rank"][own].tolist()
        assert ranks == sorted(ranks)
        if selects[row]:
            assert items == chosen(world.request.candidates[row])
            assert ranks == list(range(1, len(items) + 1))
            continue
        found = world.target[row] in world.request.candidates[row]
        positive = [int(world.target[row])] if found else []  # one outside the candidates is never served
        assert sorted(items) == sorted(positive + chosen(negatives[row]))
        inside, outside = inside + found, outside + (not found)
    assert inside
    assert outside


def test_the_fold_is_a_seeded_hash_of_the_user() -> None:
    users = np.arange(100_000)
    fold = select_fold(users, 0.2, seed=0)
    assert fold.mean() == pytest.approx(0.2, abs=0.005)
    assert np.array_equal(select_fold(users[::-7], 0.2, 0), fold[::-7])  # whoever else is there
    assert select_fold(users, 0.2, seed=1)[fold].mean() == pytest.approx(0.2, abs=0.02)
    assert (select_fold(users, 0.3, 0) | ~fold).all()  # a larger share keeps those of a smaller one
    assert not select_fold(users, 0.0, 0).any()
    assert np.flatnonzero(fold)[:5].tolist() == [3, 10, 18, 21, 33]  # as ever


def test_a_miner_is_specified_by_class_and_options() -> None:
    assert specify_miner(Mixture([RankBand(skip_top=3), Popular(2)])) == {
        "class_path": "recsys2stage.mining.Mixture",
        "init_args": {
            "miners": [
                {
                    "class_path": "recsys2stage.mining.RankBand",
                    "init_args": {"count": None, "skip_top": 3, "last": None},
                },
                {"class_path": "recsys2stage.mining.Popular", "init_args": {"count": 2, "exponent": 0.75}},
            ]
        },
    }


# of the tiny run


@pytest.fixture(scope="module")
def mined(trained: Run) -> pl.DataFrame:
    return pl.read_parquet(trained.candidates / "candidates.parquet")


def test_no_item_up_to_and_including_the_target_is_a_negative(trained: Run, mined: pl.DataFrame) -> None:
    dataset = Dataset(trained.data)
    for (user,), rows in mined.filter(pl.col("label") == 0).group_by("user"):
        start, end = dataset.offsets[user], dataset.val_ends[user]
        assert not set(dataset.items[start:end].tolist()) & set(rows["item"].to_list())


def test_nobody_spares_the_test_item(trained: Run, mined: pl.DataFrame) -> None:
    dataset = Dataset(trained.data)
    users = dataset.users("test")
    tests = pl.DataFrame({"user": users.astype(np.int32), "item": dataset.targets(users, "test").astype(np.int32)})
    negatives = mined.filter(pl.col("label") == 0).select("user", "item")
    assert len(negatives.join(tests, on=["user", "item"])) > len(users) / 10


def test_the_counts_of_the_manifest_are_those_of_the_table(trained: Run, mined: pl.DataFrame) -> None:
    counts = read_manifest(trained.candidates, "candidates", "")["counts"]
    by_user = mined.group_by("user").agg(pl.col("fold").first(), pl.col("label").sum())
    dataset = Dataset(trained.data)
    assert sorted(by_user["user"].to_list()) == dataset.users("val").tolist()
    assert set(by_user["label"]) == {0, 1}
    assert counts == {
        "users": len(by_user),
        "train_users": len(by_user.filter((pl.col("fold") == "train") & (pl.col("label") == 1))),
        "select_users": len(by_user.filter(pl.col("fold") == "select")),
        "target_outside_candidates": len(by_user.filter(pl.col("label") == 0)),
        "rows": len(mined),
    }
    assert counts["train_users"]
    assert counts["target_outside_candidates"] > counts["users"] // 10


def test_users_whose_target_was_not_found_do_not_train(trained: Run) -> None:
    from recsys2stage.data import Candidates

    candidates = Candidates(trained.candidates, batch_size=1000)
    candidates.setup("fit")
    (batch,) = candidates.train_dataloader()
    assert len(batch.items) == candidates.manifest["counts"]["train_users"]
    positive = batch.items.gather(1, batch.positive[:, None]).squeeze(1)
    dataset = Dataset(trained.data)
    lists_of = read_candidates(trained.candidates / "candidates.parquet")
    trains = lists_of.user[(lists_of.fold == "train") & (lists_of.positive >= 0)]
    assert sorted(positive.tolist()) == sorted(dataset.targets(trains, "val").tolist())


def test_lists_that_select_are_what_is_served(trained: Run, mined: pl.DataFrame) -> None:
    from recsys2stage.recommend import Recommender

    recommender, dataset = Recommender.load(trained.index), Dataset(trained.data)
    users = mined.filter(pl.col("fold") == "select")["user"].unique().sort().to_numpy().astype(np.int64)
    padded = dataset.histories(users, "val", recommender.towers.max_length)
    queries = recommender.queries(padded, dataset.request_times(users, "val"))
    scores, items = recommender.candidates(queries, dataset.known(users, "val"), K)
    states = np.load(trained.candidates / "states.npy")
    for row, user in enumerate(users):
        own = mined.filter(pl.col("user") == user)
        assert own["item"].to_list() == items[row][items[row] > 0].tolist()
        assert own["retriever_score"].to_numpy() == pytest.approx(scores[row][items[row] > 0], abs=1e-6)
        assert own["retriever_rank"].to_list() == list(range(1, len(own) + 1))
        assert states[np.searchsorted(dataset.users("val"), user)] == pytest.approx(queries[row], abs=1e-6)


def test_mining_again_gives_the_same_bytes_and_another_seed_gives_others(trained: Run, tmp_path: Path) -> None:
    def mine(name: str, *words: object) -> list[bytes]:
        of = ("--data", trained.data, "--index", trained.index, "--output", tmp_path / name, "--k", K)
        recsys("mine-negatives", *of, *words)
        return [(tmp_path / name / file).read_bytes() for file in ("candidates.parquet", "states.npy")]

    table, states = mine("again")
    assert [table, states] == [(trained.candidates / f).read_bytes() for f in ("candidates.parquet", "states.npy")]
    assert mine("other", "--seed", 1)[0] != table


def test_some_users_are_mined_as_they_would_be_among_all(trained: Run, mined: pl.DataFrame, tmp_path: Path) -> None:
    of = ("--data", trained.data, "--index", trained.index, "--output", tmp_path / "some", "--k", K)
    recsys("mine-negatives", *of, "--users", 20, "--batch_size", 7)
    some = pl.read_parquet(tmp_path / "some" / "candidates.parquet")
    assert some["user"].n_unique() == 20
    assert some["user"].is_sorted()
    columns = ["user", "item", "retriever_rank", "fold"]
    served = some.filter(pl.col("fold") == "select").select(columns)
    assert len(served.join(mined.select(columns), on=columns)) == len(served) > 0
