"""Negatives are never positives, and every mined row carries what the retriever and the signals say when they serve."""

import tracemalloc
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import torch
from closeness import close, same_ranks
from pipeline_fixtures import K, Run, recsys

from recsys2stage.artifacts import read_manifest
from recsys2stage.data.batches import Padded, Ragged
from recsys2stage.data.dataset import Dataset
from recsys2stage.mining.draws import ListDraws
from recsys2stage.mining.mine import ListBuilder
from recsys2stage.mining.miners import Miner, Mixture, Popular, RankBand, Request, Uniform, specify_miner
from recsys2stage.ranking.candidates import Candidates
from recsys2stage.ranking.lists import build_lists, positions_in, read_candidates, validation_users, without_repeats
from recsys2stage.ranking.ranker import Ranker
from recsys2stage.recommender import Recommender, RetrievedItems
from recsys2stage.retrieval.index import Exact

B, V, D, DEPTH = 30, 50, 6, 20
FILES = ("candidates.parquet", "requests.parquet", "states.npy")

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
        self.request = Request.from_exclusions(candidates, self.target, self.rows, self.items, self.counts)
        self.every = np.full((B, V + 1), -np.inf, np.float32)
        self.every[:, 1:] = self.queries @ self.vectors.T
        self.every[self.rows, self.items] = -np.inf

    def exact(self, rows: np.ndarray, items: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Exact scores and ranks from the whole matrix."""
        own = self.every[rows[:, None], np.maximum(items, 0)]
        return own, (self.every[rows][:, None] >= own[..., None]).sum(2)

    def positives(self, row: int) -> set[int]:
        return {*self.known[row].tolist(), int(self.target[row])}


def draws(seed: int, rows: int = B) -> ListDraws:
    """Random numbers of the first users."""
    return ListDraws.of(seed, np.arange(rows), np.arange(rows) * 7)


@pytest.fixture
def world(rng: np.random.Generator) -> World:
    return World(rng)


def chosen(row: np.ndarray) -> list[int]:
    return row[row > 0].tolist()


@pytest.mark.parametrize("miner", MINERS.values(), ids=MINERS)
def test_a_miner_never_chooses_a_positive(world: World, miner: Miner) -> None:
    for seed in range(10):
        negatives = miner.choose(world.request, draws(seed))
        assert ((negatives == -1) | ((negatives >= 1) & (negatives <= V))).all()
        assert any(chosen(row) for row in negatives)
        for row in range(B):
            assert not world.positives(row) & set(chosen(negatives[row]))


@pytest.mark.parametrize("miner", MINERS.values(), ids=MINERS)
def test_a_miner_chooses_the_same_from_the_same_seed(world: World, miner: Miner) -> None:
    one, other = (miner.choose(world.request, draws(7)) for _ in range(2))
    assert np.array_equal(one, other)


def test_a_request_without_any_positive_known_but_the_target() -> None:
    nobody = np.zeros(0, dtype=np.int64)
    request = Request.from_exclusions(np.array([[3, 1, 2]]), np.array([1]), nobody, nobody, np.ones(4))
    assert RankBand().choose(request, draws(0, 1)).tolist() == [[3, -1, 2]]


@pytest.mark.parametrize(("skip_top", "last"), [(0, None), (3, None), (0, 7), (3, 7), (6, 7)])
def test_the_whole_band_is_the_candidates_between_two_ranks(world: World, skip_top: int, last: int | None) -> None:
    negatives = RankBand(skip_top=skip_top, last=last).choose(world.request, draws(0))
    for row in range(B):
        band = world.request.candidates[row].tolist()[skip_top:last]
        assert chosen(negatives[row]) == [item for item in band if item > 0 and item not in world.positives(row)]


def test_some_of_a_band_are_as_many_as_there_are_and_stand_in_order(world: World) -> None:
    negatives = RankBand(count=4, skip_top=2, last=12).choose(world.request, draws(0))
    assert negatives.shape == (B, 4)
    for row in range(B):
        candidates = world.request.candidates[row].tolist()
        band = [item for item in candidates[2:12] if item > 0 and item not in world.positives(row)]
        places = [candidates.index(item) for item in chosen(negatives[row])]
        assert len(places) == min(4, len(band))
        assert places == sorted(set(places))
        assert all(2 <= place < 12 for place in places)


def test_every_item_of_a_band_has_its_chance(world: World) -> None:
    drawn = np.concatenate([RankBand(count=4).choose(world.request, draws(seed))[0] for seed in range(200)])
    negatives = [item for item in world.request.candidates[0].tolist() if item not in world.positives(0)]
    assert set(drawn.tolist()) == set(negatives)
    assert np.bincount(drawn).max() < 2 * 800 / len(negatives)


@pytest.mark.parametrize("options", [{"skip_top": -1}, {"last": 0}, {"skip_top": 5, "last": 5}])
def test_an_empty_band_is_an_error(options: dict[str, int]) -> None:
    with pytest.raises(ValueError, match=r"expected 0 <= skip_top < last|expected at least"):
        RankBand(**options)


@pytest.mark.parametrize("kind", [Uniform, Popular])
def test_as_many_are_drawn_as_asked(world: World, kind: type) -> None:
    full = [len(chosen(row)) for row in kind(10).choose(world.request, draws(0))]
    assert [count for row, count in enumerate(full) if row != 3] == [10] * (B - 1)
    assert full[3] < 10  # nearly all items are its positives
    with pytest.raises(ValueError, match="count is 0"):
        kind(0)


def test_uniform_draws_all_items_alike_and_popular_by_their_counts() -> None:
    counts = np.append(0, [1, 16, 81, 0])
    nobody = np.zeros(0, dtype=np.int64)
    request = Request.from_exclusions(np.full((2000, 1), -1), np.full(2000, 4), nobody, nobody, counts)

    def shares(miner: Miner) -> np.ndarray:
        drawn = miner.choose(request, draws(0, 2000))
        return np.bincount(drawn[drawn > 0], minlength=5)[1:] / (drawn > 0).sum()

    third = 1 / 3  # item 4 is everybody's target
    assert shares(Uniform(10)) == pytest.approx([third, third, third, 0], abs=0.02)
    assert shares(Popular(10, exponent=0.5)) == pytest.approx([1 / 14, 4 / 14, 9 / 14, 0], abs=0.02)
    assert shares(Popular(10, exponent=1.0)) == pytest.approx([1 / 98, 16 / 98, 81 / 98, 0], abs=0.02)


def test_what_no_one_ever_took_is_never_drawn_as_popular() -> None:
    nobody = np.zeros(0, dtype=np.int64)
    counts = np.array([0, 0, 5, 0, 5, 0])  # neither the first nor the last item
    request = Request.from_exclusions(np.full((500, 1), -1), np.full(500, 3), nobody, nobody, counts)
    assert set(chosen(Popular(10, exponent=0.25).choose(request, draws(0, 500)))) == {2, 4}


def test_a_mixture_repeats_no_item(world: World) -> None:
    negatives = Mixture([RankBand(), Uniform(20), Popular(20)]).choose(world.request, draws(0))
    assert negatives.shape == (B, DEPTH + 40)
    assert all(len(chosen(row)) == len(set(chosen(row))) for row in negatives)
    alone = RankBand().choose(world.request, draws(0))
    assert np.array_equal(negatives[:, :DEPTH], alone)  # the first part loses nothing to the others
    with pytest.raises(ValueError, match="expected at least one miner"):
        Mixture([])


def test_a_part_of_a_mixture_does_not_depend_on_how_many_another_draws(world: World) -> None:
    one, other = (Mixture([Uniform(count), Popular(9)]).choose(world.request, draws(0)) for count in (1, 5))
    for row in range(B):
        assert set(chosen(one[row, 1:])) | set(chosen(one[row, :1])) >= set(chosen(other[row, 5:]))


@pytest.mark.parametrize("miner", MINERS.values(), ids=MINERS)
def test_what_a_list_is_given_does_not_depend_on_the_batch(world: World, miner: Miner) -> None:
    whole = miner.choose(world.request, draws(3))
    for row in (0, 3, B - 1):
        own = world.rows == row
        alone = Request.from_exclusions(
            world.request.candidates[[row]], world.target[[row]], world.rows[own] * 0, world.items[own], world.counts
        )
        one = ListDraws.of(3, np.array([row]), np.array([row * 7]))
        assert miner.choose(alone, one).tolist() == [whole[row].tolist()]


def test_random_numbers_are_uniform_and_independent_from_list_to_list() -> None:
    """Chi-squared tests: of single numbers, of neighbours in a list, and of neighbouring lists, users and seeds."""
    users, places = np.arange(2_000).repeat(2), np.arange(4_000) + 10**9
    numbers = ListDraws.of(0, users, places).random((4_000, 50))
    assert ((numbers >= 0) & (numbers < 1)).all()
    pairs = {
        "of a list": (numbers[:, :-1], numbers[:, 1:]),
        "of the next list": (numbers[:-1], numbers[1:]),
        "of another seed": (numbers, ListDraws.of(1, users, places).random((4_000, 50))),
        "of another place": (numbers, ListDraws.of(0, users, places + 1).random((4_000, 50))),
    }
    for name, (one, other) in pairs.items():
        counts, _, _ = np.histogram2d(one.ravel(), other.ravel(), bins=10, range=((0, 1), (0, 1)))
        expected = one.size / 100
        statistic = ((counts - expected) ** 2 / expected).sum()
        assert statistic < 99 + 5 * np.sqrt(2 * 99), name  # mean 99, five standard deviations
    integers = ListDraws.of(0, users, places).integers(1, 4, (4_000, 50))
    assert np.bincount(integers.ravel(), minlength=5)[1:] == pytest.approx([200_000 / 3] * 3 + [0], abs=1_100)
    assert np.bincount(integers.ravel(), minlength=4)[0] == 0


def test_draws_go_on_and_parts_differ() -> None:
    one, other = draws(0), draws(0)
    assert np.array_equal(one.random((B, 8)), np.concatenate([other.random((B, 3)), other.random((B, 5))], axis=1))
    parts = [part.random((B, 4)) for part in draws(0).spawn(3)]
    assert len(np.unique(np.concatenate([*parts, draws(0).random((B, 4))]))) == 16 * B
    with pytest.raises(ValueError, match=r"size is \(2, 3\), expected \(30, N\)"):
        one.random((2, 3))


def test_positions_are_columns_of_the_own_row() -> None:
    candidates = np.array([[5, 2, 9], [1, -1, -1], [-1, -1, -1]])
    items = np.array([[9, 5, 1, -1], [5, 1, -1, 9], [1, 2, 3, -1]])
    assert positions_in(candidates, items).tolist() == [[2, 0, -1, -1], [-1, 0, -1, -1], [-1] * 4]
    assert positions_in(candidates[2:], items[2:]).tolist() == [[-1] * 4]


def test_later_repeats_become_none() -> None:
    items = np.array([[3, 1, 3, -1, 1, -1, 2], [1, 1, 1, 1, 1, 1, 1]])
    assert without_repeats(items).tolist() == [[3, 1, -1, -1, -1, -1, 2], [1, -1, -1, -1, -1, -1, -1]]


def test_each_row_has_its_true_score_and_rank(world: World) -> None:
    negatives = Mixture([RankBand(count=8), Uniform(8)]).choose(world.request, draws(0))
    selects = np.arange(B) % 3 == 0
    table = build_lists(world.request.candidates, world.request.target, world.scores, negatives, world.exact, selects)
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
    world.every[3] = -np.inf  # user 3 has no six items left
    table = build_lists(
        request.candidates, request.target, world.scores[:, 1:6], missed[:, None], world.exact, np.zeros(B, dtype=bool)
    )
    drawn = table["origin"] == "drawn"
    assert drawn.sum() >= B // 2
    assert (table["retriever_rank"][drawn & (table["row"] != 3)] == 6).all()


def test_lists_hold_target_and_negatives_or_all_candidates_in_order(world: World) -> None:
    negatives = MINERS["mixture"].choose(world.request, draws(0))
    selects = np.arange(B) % 2 == 0
    table = build_lists(world.request.candidates, world.request.target, world.scores, negatives, world.exact, selects)
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


def test_memory_does_not_grow_with_batch_times_catalogue() -> None:
    """The lists of 128 targets among 200,000 items, where (batch, catalogue) would be 26 million numbers."""
    rows, size, rng = 128, 200_000, np.random.default_rng(0)
    candidates = (1 + rng.permutation(size)[: rows * DEPTH]).reshape(rows, DEPTH)
    queries, vectors = rng.standard_normal((rows, 2)), rng.standard_normal((size, 2))
    seen = Ragged(rng.integers(1, size + 1, 50 * rows), np.arange(0, 50 * rows + 1, 50))
    target, counts = candidates[:, 3].copy(), np.append(0, rng.integers(0, 9, size))
    builder = ListBuilder.__new__(ListBuilder)
    builder.withheld, builder.ranked_vectors = None, torch.from_numpy(vectors)
    tracemalloc.start()
    try:
        request = Request.from_exclusions(candidates, target, seen.rows, seen.values, counts)
        negatives = Mixture([RankBand(), Uniform(3), Popular(3)]).choose(request, draws(0, rows))
        exact, validation = builder.exact_ranks(queries, seen), np.arange(rows) % 5 == 0
        table = build_lists(candidates, target, np.zeros(candidates.shape), negatives, exact, validation)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert (table["origin"] == "drawn").sum() > 4 * rows
    assert peak < 32 << 20  # of NumPy; torch holds a block of scores


def test_the_fold_is_a_seeded_hash_of_the_user() -> None:
    users = np.arange(100_000)
    fold = validation_users(users, 0.2, seed=0)
    assert fold.mean() == pytest.approx(0.2, abs=0.005)
    assert np.array_equal(validation_users(users[::-7], 0.2, 0), fold[::-7])  # whoever else is there
    assert validation_users(users, 0.2, seed=1)[fold].mean() == pytest.approx(0.2, abs=0.02)
    assert (validation_users(users, 0.3, 0) | ~fold).all()  # a larger share keeps those of a smaller one
    assert not validation_users(users, 0.0, 0).any()
    assert np.flatnonzero(fold)[:5].tolist() == [3, 10, 18, 21, 33]  # as ever


def test_a_miner_is_specified_by_class_and_options() -> None:
    assert specify_miner(Mixture([RankBand(skip_top=3), Popular(2)])) == {
        "class_path": "Mixture",
        "init_args": {
            "miners": [
                {
                    "class_path": "RankBand",
                    "init_args": {"count": None, "skip_top": 3, "last": None},
                },
                {"class_path": "Popular", "init_args": {"count": 2, "exponent": 0.75}},
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
    by_user = mined.group_by("user").agg(pl.col("fold").first(), pl.col("label").sum(), pl.col("request").n_unique())
    dataset = Dataset(trained.data)
    assert sorted(by_user["user"].to_list()) == dataset.users("val").tolist()
    assert by_user["request"].unique().to_list() == [1]
    assert set(by_user["label"]) == {0, 1}
    assert counts == {
        "lists": len(by_user),
        "users": len(by_user),
        "train_lists": len(by_user.filter((pl.col("fold") == "train") & (pl.col("label") == 1))),
        "select_lists": len(by_user.filter(pl.col("fold") == "select")),
        "target_outside_candidates": len(by_user.filter(pl.col("label") == 0)),
        "rows": len(mined),
    }
    assert counts["train_lists"]
    assert counts["target_outside_candidates"] > counts["users"] // 10


def test_users_whose_target_was_not_found_do_not_train(trained: Run) -> None:
    candidates = Candidates(trained.candidates, batch_size=1000)
    candidates.setup("fit")
    (batch,) = candidates.train_dataloader()
    assert len(batch.candidates.items) == candidates.manifest["counts"]["train_lists"]
    positive = batch.candidates.items.gather(1, batch.positive[:, None]).squeeze(1)
    dataset = Dataset(trained.data)
    lists_of = read_candidates(trained.candidates, [], Dataset(trained.data))
    trains = lists_of.user[(lists_of.fold == "train") & (lists_of.positive >= 0)]
    assert sorted(positive.tolist()) == sorted(dataset.targets(trains, "val").tolist())


def test_lists_that_select_are_what_is_served(trained: Run, mined: pl.DataFrame) -> None:
    recommender, dataset = Recommender.load(trained.index), Dataset(trained.data)
    users = mined.filter(pl.col("fold") == "select")["user"].unique().sort().to_numpy().astype(np.int64)
    padded = dataset.histories(users, "val", recommender.towers.max_length)
    now = dataset.request_times(users, "val")
    queries = recommender.queries(padded, now)
    items, scores, _ = recommender.candidates(queries, dataset.filtered_items(users, "val"), padded, now, K)
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
        return [(tmp_path / name / file).read_bytes() for file in FILES]

    again = mine("again")
    assert again == [(trained.candidates / file).read_bytes() for file in FILES]
    assert mine("other", "--seed", 1)[0] != again[0]


SAMPLED = '{"class_path": "Mixture", "init_args": {"miners": [{"class_path": "Uniform", "init_args": {"count": 9}}, \
{"class_path": "Popular", "init_args": {"count": 9}}, {"class_path": "RankBand", "init_args": {"count": 5}}]}}'


@pytest.fixture(scope="module")
def sampled(trained: Run, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Lists of sampled negatives, in one batch."""
    folder = tmp_path_factory.mktemp("sampled") / "candidates"
    of = ("--data", trained.data, "--index", trained.index, "--output", folder, "--k", K)
    recsys("mine-negatives", *of, "--miner", SAMPLED)
    return folder


@pytest.mark.parametrize(
    "words", [("--batch_size", 1), ("--batch_size", 7), ("--users", 40, "--batch_size", 16)], ids=str
)
def test_a_list_does_not_depend_on_what_is_mined_beside_it(
    trained: Run, sampled: Path, tmp_path: Path, words: tuple[object, ...]
) -> None:
    """Only scores are rounded otherwise in a batch of another size, and with them ranks that are nearly tied."""
    of = ("--data", trained.data, "--index", trained.index, "--output", tmp_path / "candidates", "--k", K)
    recsys("mine-negatives", *of, "--miner", SAMPLED, *words)
    some, every = (pl.read_parquet(folder / "candidates.parquet") for folder in (tmp_path / "candidates", sampled))
    every = every.filter(pl.col("user").is_in(some["user"].unique().to_list()))
    assert some["user"].n_unique() == (40 if "--users" in words else 150)
    assert some["fold"].n_unique() == some["origin"].n_unique() == 2
    both = some.join(every, on=["user", "item", "label", "origin", "fold"], validate="1:1")
    assert len(both) >= 0.99 * max(len(some), len(every))  # a near tie may fall the other way at the last candidate
    close(both["retriever_score"].to_numpy(), both["retriever_score_right"].to_numpy())
    same_ranks(both["retriever_rank"].to_numpy(), both["retriever_rank_right"].to_numpy())


# of the run with several targets and all signals


class Informed:
    """What was mined, and the very requests of its lists made anew of the bundle."""

    def __init__(self, run: Run) -> None:
        self.run, self.dataset = run, Dataset(run.data)
        self.recommender = Recommender.load(run.bundle)
        self.rows = pl.read_parquet(run.candidates / "candidates.parquet")
        self.requests = pl.read_parquet(run.candidates / "requests.parquet")
        self.user, self.place = (self.requests[name].to_numpy() for name in ("user", "place"))
        self.names = [signal["name"] for signal in self.recommender.signal_names]
        self.padded: Padded = self.dataset.histories(self.user, self.place, self.recommender.towers.max_length)
        self.known: Ragged = self.dataset.filtered_items(self.user, self.place)
        self.now = self.dataset.request_times(self.user, self.place)
        self.queries = self.recommender.queries(self.padded, self.now)
        self.found: RetrievedItems = self.recommender.candidates(self.queries, self.known, self.padded, self.now)

    def lists(self) -> list[pl.DataFrame]:
        """The rows of each list."""
        return self.rows.partition_by("request", maintain_order=True)


@pytest.fixture(scope="module")
def told(informed: Run) -> Informed:
    return Informed(informed)


def test_there_is_a_list_for_each_validation_target(told: Informed) -> None:
    users, ends = told.dataset.val_targets()
    assert told.user.tolist() == users.tolist()
    assert told.place.tolist() == ends.tolist()
    assert np.bincount(users).max() == 3
    assert told.requests["time"].to_numpy().tolist() == told.dataset.times[ends].tolist()
    targets = told.dataset.targets(users, ends)
    found = 0
    for number, rows in enumerate(told.lists()):
        assert rows["request"].unique().to_list() == [number]
        assert rows["user"].unique().to_list() == [users[number]]
        assert len(rows) == told.requests["rows"][number]
        labelled = rows.filter(pl.col("label") == 1)["item"].to_list()
        assert labelled in ([], [targets[number]])
        found += len(labelled)
    assert found > len(users) // 4
    by_user = told.requests.group_by("user").agg(pl.col("fold").n_unique())
    assert by_user["fold"].unique().to_list() == [1], "one who selects trains with none of its targets"
    assert told.requests["fold"].n_unique() == 2
    assert told.rows.select("request", "fold").unique().sort("request")["fold"].equals(told.requests["fold"])


def test_lists_are_counted_as_they_are(told: Informed) -> None:
    counts = read_manifest(told.run.candidates, "candidates", "")["counts"]
    target = told.dataset.targets(told.user, told.place)
    hit = (told.found.items == target[:, None]).any(1)
    selects = told.requests["fold"].to_numpy() == "select"
    assert counts == {
        "lists": len(told.user),
        "users": len(set(told.user.tolist())),
        "train_lists": int((hit & ~selects).sum()),
        "select_lists": int(selects.sum()),
        "target_outside_candidates": int((~hit).sum()),
        "rows": len(told.rows),
    }


def test_no_list_holds_an_item_that_is_known_by_then(told: Informed) -> None:
    """Nor is its target a negative; what comes later is as any other item, as nobody knows of it."""
    later = 0
    for rows, user, place in zip(told.lists(), told.user.tolist(), told.place.tolist(), strict=True):
        start, end = int(told.dataset.offsets[user]), int(told.dataset.offsets[user + 1])
        items = told.dataset.items[start:end].tolist()
        assert not set(items[: place - start]) & set(rows["item"])
        negatives = rows.filter(pl.col("label") == 0)["item"].to_list()
        assert items[place - start] not in negatives
        assert len(rows) == rows["item"].n_unique()
        later += len(set(items[place - start + 1 :]) & set(negatives))
    assert later > len(told.user) // 10


def test_the_history_of_a_list_ends_right_before_its_target(told: Informed) -> None:
    data = Candidates(told.run.candidates, recent=7)
    data.setup("fit")
    listed = data.read(np.arange(len(told.user))).candidates
    for row, (user, place) in enumerate(zip(told.user.tolist(), told.place.tolist(), strict=True)):
        before = told.dataset.items[int(told.dataset.offsets[user]) : place][::-1][:7].tolist()
        assert listed.recent[row].tolist() == before + [0] * (7 - len(before))
        gaps = told.dataset.times[place] - told.dataset.times[place - np.arange(1, len(before) + 1)]
        assert listed.ages[row, : len(before)].numpy() == pytest.approx(np.log1p(gaps), rel=1e-5)
    assert np.load(told.run.candidates / "states.npy") == pytest.approx(told.queries, abs=1e-5)


def test_what_selects_is_what_is_served_with_all_sources(told: Informed) -> None:
    """Every field that the second stage is told, candidate by candidate."""
    data = Candidates(told.run.candidates)
    data.setup("fit")
    selects = np.flatnonzero(told.requests["fold"].to_numpy() == "select")
    mined = data.read(selects).candidates
    served = told.recommender.candidate_batch(told.queries, told.found, told.padded, told.now)
    assert mined.items.shape == (len(selects), K)
    for name, one in mined._asdict().items():
        other = getattr(served, name)[selects]
        assert one.shape == other.shape, name
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-4, err_msg=name)
    sources = mined.signals[..., -4:]
    assert [name.partition(".")[0] for name in told.names[-4:]] == ["source"] * 4
    assert (sources[..., 0] == 0).any(), "some candidates the index did not name"
    assert (sources > 0).flatten(0, 1).any(0).all(), "every source named some"
    assert (sources > 0).any(-1).all(), "somebody named each"


def test_signals_of_mined_rows_are_those_that_are_served(told: Informed) -> None:
    """Of the target and of drawn negatives, too, which are in no list that is served."""
    assert told.rows.columns[-len(told.names) :] == told.names
    assert read_manifest(told.run.candidates, "candidates", "")["signals"] == told.recommender.signal_names
    lengths = told.requests["rows"].to_numpy()
    items = np.zeros((len(lengths), lengths.max()), dtype=np.int64)
    real = np.arange(items.shape[1]) < lengths[:, None]
    items[real] = told.rows["item"].to_numpy()
    numbers = told.recommender.compute_signals(items, told.queries, told.found, told.padded, told.now)[real]
    assert told.rows["origin"].n_unique() == 2
    for place, name in enumerate(told.names):
        np.testing.assert_allclose(told.rows[name], numbers[:, place], rtol=1e-4, atol=1e-4, err_msg=name)
        assert numbers[:, place].std() > 1e-3, f"{name} must say something in this world"


def test_lists_come_best_first_by_the_retriever(told: Informed) -> None:
    """Whoever named them: score and rank are the retriever's."""
    scores = np.take_along_axis(told.queries @ told.recommender.vectors.T, told.found.items.clip(min=0), axis=1)
    assert told.found.score == pytest.approx(scores, abs=1e-5)
    assert (np.diff(told.found.score, axis=1) <= 0).all()
    assert (told.found.items > 0).all()


def test_only_the_newest_targets_may_be_mined(told: Informed, tmp_path: Path) -> None:
    run = Run(tmp_path)
    of = ("--data", told.run.data, "--index", told.run.index, "--output", run.candidates, "--k", K)
    recsys("mine-negatives", *of, "--config", told.run.folder / "signals.yaml", "--targets", 2, "--batch_size", 7)
    requests = pl.read_parquet(run.candidates / "requests.parquet")
    users, ends = told.dataset.val_targets(2)
    assert (requests["user"].to_list(), requests["place"].to_list()) == (users.tolist(), ends.tolist())
    assert len(requests) < len(told.requests)
    keys = ["user", "place", "item", "retriever_rank"]
    table, whole = (
        rows.join(of.with_row_index("request").select(pl.col("request").cast(pl.Int32), "place"), on="request")
        .filter(pl.col("fold") == "select")
        .sort("user", "place", "retriever_rank")
        for rows, of in ((pl.read_parquet(run.candidates / "candidates.parquet"), requests), (told.rows, told.requests))
    )
    both = table.join(whole, on=keys, how="inner", maintain_order="left")
    assert len(both) == len(table) > 0
    for name in told.names:
        np.testing.assert_allclose(both[name], both[f"{name}_right"], rtol=1e-4, atol=1e-4, err_msg=name)
    with pytest.raises(SystemExit, match="targets is 0, expected at least 1"):
        recsys("mine-negatives", *of, "--targets", 0)


def test_only_targets_after_a_gap_may_be_mined(told: Informed, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    of = ("--data", told.run.data, "--index", told.run.index, "--output", tmp_path / "candidates", "--k", K)
    times, places = told.dataset.times, told.requests["place"].to_numpy()
    gaps = times[places] - times[places - 1]
    gap = int(np.median(gaps)) + 1
    recsys("mine-negatives", *of, "--gap", gap)
    mined = pl.read_parquet(tmp_path / "candidates/requests.parquet")
    assert mined["place"].to_list() == places[gaps >= gap].tolist() != []
    assert read_manifest(tmp_path / "candidates", "candidates", "")["options"]["gap"] == gap
    for wrong, says in ((-1, "gap is -1, expected at least 0"), (10**9, "events before it by 1000000000 sec")):
        with pytest.raises(SystemExit, match=says):
            recsys("mine-negatives", *of, "--gap", wrong)
    monkeypatch.setattr(Dataset, "has_time", False)
    with pytest.raises(SystemExit, match=r"gap is 60 seconds, but .* has an order and no times; leave it out"):
        recsys("mine-negatives", *of, "--gap", 60)


def test_no_list_shows_what_is_withheld(told: Informed, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else the ranker would learn that such items are never right, which is so in no log but this one."""
    dataset, size = told.dataset, told.dataset.num_items + 1
    targets = dataset.targets(told.user, told.place)
    withheld = np.bincount(told.rows["item"].to_numpy(), minlength=size) > 0
    withheld[targets] = False
    monkeypatch.setattr(Dataset, "cold", withheld)
    of = ("--data", told.run.data, "--index", told.run.index, "--output", tmp_path / "candidates", "--k", K)
    recsys("mine-negatives", *of, "--config", told.run.folder / "signals.yaml")
    mined = pl.read_parquet(tmp_path / "candidates/candidates.parquet")
    assert withheld.sum() > 3
    assert not withheld[mined["item"].to_numpy()].any()
    assert told.requests["user"].equals(pl.read_parquet(tmp_path / "candidates/requests.parquet")["user"])


def test_the_ranks_of_an_evaluation_are_those_of_the_lists_that_select(told: Informed, tmp_path: Path) -> None:
    """Both stages, with ids and without: what chooses the ranker is what a report says of the bundle."""
    recsys("evaluate", "--bundle", told.run.bundle, "--output", tmp_path, "--split", "val", "--resamples", 10)
    ranks = pl.read_parquet(tmp_path / "ranks.parquet").sort("user")
    data, model = (
        Candidates(told.run.candidates),
        Ranker.load_from_checkpoint(told.run.ranker, weights_only=True).eval(),
    )
    data.setup("fit")
    oldest = told.place == told.dataset.train_ends[told.user]  # the target that `--split val` means
    chosen = np.flatnonzero((told.requests["fold"].to_numpy() == "select") & oldest & (data.lists.positive >= 0))
    batch, reports = data.read(chosen), ranks.filter(pl.col("user").is_in(told.user[chosen].tolist()))
    assert len(reports) == len(chosen) > 10
    for name, masked in (("ranker", False), ("ranker_ids_masked", True)):
        with torch.no_grad():
            logits = model.reranker(batch.candidates, torch.full_like(batch.candidates.items, masked, dtype=torch.bool))
        own = logits.gather(1, batch.positive[:, None])
        assert reports[name].to_list() == (logits >= own).sum(1).tolist(), name
    first = batch.candidates.score.gather(1, batch.positive[:, None])
    better = (torch.from_numpy(told.queries[chosen] @ told.recommender.vectors[1:].T) >= first - 1e-6).numpy()
    for row, user in enumerate(told.user[chosen].tolist()):
        met = told.known.values[told.known.rows == chosen[row]]
        better[row, met - 1] = False
        assert reports["user"][row] == user
    assert reports["retriever"].to_list() == better.sum(1).tolist()
