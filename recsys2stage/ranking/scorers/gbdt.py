"""Gradient-boosted trees, fitted by LightGBM (Ke et al., NeurIPS 2017) and evaluated as tensors."""

from collections.abc import Mapping
from importlib.util import find_spec
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from recsys2stage.options import check_integer, check_number, check_option
from recsys2stage.ranking.scorers.base import BoostedScorer, ListTable, RankerInputs

MAX_TREES, MAX_LEAVES = 10_000, 255
MAX_ROWS = 10_000  # of a list, by LightGBM
CHUNK = 16  # trees that are evaluated at once: their intermediate values fit in a processor's cache
UNREACHED = -1  # in `lefts`: a tree has fewer leaves

Objective = Literal["lambdarank", "rank_xendcg"]


class GBDT(BoostedScorer):
    """LightGBM's LambdaMART over the features: every tree is a step from the retriever's score.

        logit = weight · (base + Σ_t tree_t(features))

    Trees are grown on all training lists, `trees_per_epoch` in each epoch. So `trainer.max_epochs` and early stopping
    bound their number, best.ckpt has the best one on the validation lists, and a refit grows as many. `weight` is
    fitted to the validation lists; it does not change the order. Fitting is deterministic for a seed, in one thread.

    State and item vectors are not read, nor are learned embeddings of item features; their numbers are. The trees are
    stored as tensors and evaluated by torch: a bundle needs no LightGBM, and nothing in it is parsed or run. A decision
    is feature ≤ threshold; a row is in the leaf where the number of true decisions on the path's left turns, minus that
    on its right turns, equals the number of left turns (the GEMM strategy of Nakandala et al., OSDI 2020).

    Args:
        dim: width D of states and item vectors; not used.
        num_features: F.
        trees: maximum number of trees.
        trees_per_epoch: number of trees grown in an epoch.
        leaves: maximum number of leaves of a tree.
        learning_rate: factor of each tree.
        min_leaf: minimum number of training candidates in a leaf.
        l2: L2 regularization of the leaves.
        feature_share: share of the features, sampled again for each tree, that it may split on.
        objective: `lambdarank`, or `rank_xendcg` (Bruch 2021).
        cutoff: number of the first ranks whose pairs count (`lambdarank_truncation_level`).
    """

    feature: Tensor  # (trees, leaves − 1) int64, of each decision
    threshold: Tensor  # (trees, leaves − 1)
    route: Tensor  # (trees, leaves − 1, leaves) int8: 1 where a decision's left leads to the leaf, −1 where its right
    lefts: Tensor  # (trees, leaves) int16: left turns on the way to the leaf; −1 for leaves that a tree does not have
    value: Tensor  # (trees, leaves)
    grown: Tensor  # () int64: trees so far

    def __init__(
        self,
        dim: int,
        num_features: int,
        trees: int = 1000,
        trees_per_epoch: int = 50,
        leaves: int = 15,
        learning_rate: float = 0.05,
        min_leaf: int = 100,
        l2: float = 0.0,
        feature_share: float = 1.0,
        objective: Objective = "lambdarank",
        cutoff: int = 20,
    ) -> None:
        super().__init__(1)
        check_integer("trees", trees, 1, MAX_TREES, example=1000)
        check_integer("trees_per_epoch", trees_per_epoch, 1, trees, example=50)
        check_integer("leaves", leaves, 2, MAX_LEAVES, example=15)
        check_number("learning_rate", learning_rate, above=0, high=1, example=0.05)
        check_integer("min_leaf", min_leaf, 1, example=100)
        check_number("l2", l2, low=0, high=1e6, example=1.0)
        check_number("feature_share", feature_share, above=0, high=1, example=1.0, what="a share")
        check_option("objective", objective, Objective)
        check_integer("cutoff", cutoff, 1, example=20)
        self.num_features, self.trees, self.trees_per_epoch, self.leaves = num_features, trees, trees_per_epoch, leaves
        self.parameters_of_lightgbm: dict[str, Any] = {
            "objective": objective,
            "num_leaves": leaves,
            "learning_rate": learning_rate,
            "min_data_in_leaf": min_leaf,
            "lambda_l2": l2,
            "feature_fraction": feature_share,
            "lambdarank_truncation_level": cutoff,
            "label_gain": [0, 1],
            "use_missing": False,  # features are finite; the only kind of decision is then feature ≤ threshold
            "deterministic": True,
            "force_row_wise": True,
            "num_threads": 1,
            "verbosity": -1,
        }
        self.register_buffer("feature", torch.zeros(trees, leaves - 1, dtype=torch.int64))
        self.register_buffer("threshold", torch.zeros(trees, leaves - 1))
        self.register_buffer("route", torch.zeros(trees, leaves - 1, leaves, dtype=torch.int8))
        self.register_buffer("lefts", torch.full((trees, leaves), UNREACHED, dtype=torch.int16))
        self.register_buffer("value", torch.zeros(trees, leaves))
        self.register_buffer("grown", torch.zeros((), dtype=torch.int64))
        self.count = 0  # `grown` as a plain number: part of no graph
        self._booster: Any = None

    def parts(self, inputs: RankerInputs) -> list[Float[Tensor, "B C"]]:
        return [self.sum_trees(inputs.features)]

    def corrections(self, inputs: RankerInputs) -> list[Float[Tensor, "B C"]]:
        return []  # no gradient reaches a tree

    def sum_trees(self, features: Float[Tensor, "B C F"]) -> Float[Tensor, "B C"]:
        """The sum of all trees."""
        columns = features.flatten(0, 1).T.contiguous().float()  # (F, N): a decision reads one row
        total = columns.new_zeros(columns.size(1))
        for start in range(0, self.count, CHUNK):
            part = slice(start, min(start + CHUNK, self.count))
            feature, value, lefts = self.feature[part], self.value[part], self.lefts[part].to(columns.dtype)
            left = columns.index_select(0, feature.flatten()) <= self.threshold[part].flatten()[:, None]
            turns = left.view(*feature.shape, -1).to(columns.dtype)  # (trees, decisions, N)
            # integers of at most 1, and 1 only at the leaf that is reached: all others are clamped to 0
            bias = (1 - lefts).masked_fill(lefts == UNREACHED, -MAX_LEAVES)[..., None]
            with torch.autocast(columns.device.type, enabled=False):
                reached = torch.baddbmm(bias, self.route[part].to(columns.dtype).transpose(1, 2), turns).relu()
                total = total + (value.reshape(1, -1) @ reached.flatten(0, 1))[0]
        return total.view(features.shape[:2])

    def check_installed(self) -> None:
        if find_spec("lightgbm") is None:
            raise ValueError(
                "the scorer GBDT is fitted by lightgbm, which is not installed; install it: "
                "pip install 'recsys2stage[gbdt]'"
            )

    def prepare(self, lists: ListTable, seed: int) -> None:
        self.check_installed()
        import lightgbm

        if lists.features.shape[1] != self.num_features:
            raise ValueError(
                f"the lists have {lists.features.shape[1]} features, expected {self.num_features}; build the scorer "
                "for these lists"
            )
        if len(lists.sizes) and lists.sizes.max() > MAX_ROWS:
            raise ValueError(
                f"a training list has {lists.sizes.max():,} candidates, expected at most {MAX_ROWS:,} for trees; mine "
                "with a smaller --k, or use another scorer"
            )
        options = self.parameters_of_lightgbm | {"seed": seed % 2**31}
        data = lightgbm.Dataset(
            lists.features, lists.label, group=lists.sizes, init_score=lists.base, params=options, free_raw_data=True
        )
        self._booster = lightgbm.Booster(options, data)
        self.fill(0, [])  # a resumed fit grows the same trees once more

    def grow(self, epochs: int) -> bool:
        if self._booster is None:
            raise RuntimeError("the trees have no lists to grow on; call prepare first")
        wanted, before = min(epochs * self.trees_per_epoch, self.trees), self.count
        while self._booster.current_iteration() < wanted:
            if self._booster.update():  # no tree improves the objective any more
                break
        count = min(self._booster.current_iteration(), wanted)
        if count > before:
            dumped = self._booster.dump_model(start_iteration=before, num_iteration=count - before)
            self.fill(before, [tree["tree_structure"] for tree in dumped["tree_info"]])
        return self.count > before

    def fill(self, start: int, structures: list[Mapping[str, Any]]) -> None:
        """Stores trees in the form of LightGBM's JSON from number `start` on; later ones are removed.

        Args:
            start: number of trees that stay.
            structures: the "tree_structure" of each further tree.
        """
        for part, empty in ((self.feature, 0), (self.threshold, 0), (self.route, 0), (self.lefts, UNREACHED)):
            part[start:] = empty
        self.value[start:] = 0
        for number, structure in enumerate(structures, start=start):
            decisions = leaves = 0
            todo: list[tuple[Mapping[str, Any], dict[int, int]]] = [(structure, {})]  # a node and the turns to it
            while todo:
                node, turns = todo.pop()
                if "split_index" not in node:
                    self.value[number, leaves] = float(node["leaf_value"])
                    self.lefts[number, leaves] = sum(turn > 0 for turn in turns.values())
                    for decision, turn in turns.items():
                        self.route[number, decision, leaves] = turn
                    leaves += 1
                    continue
                if node["decision_type"] != "<=":
                    raise ValueError(
                        f"a tree decides by {node['decision_type']!r}, expected '<='; grow it from numbers, not classes"
                    )
                self.feature[number, decisions] = int(node["split_feature"])
                self.threshold[number, decisions] = float(round_down(float(node["threshold"])))
                for side, turn in (("right", -1), ("left", 1)):
                    todo.append((node[f"{side}_child"], turns | {decisions: turn}))
                decisions += 1
        self.count = start + len(structures)
        self.grown.fill_(self.count)

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], prefix: str, *args: Any, **options: Any) -> None:
        """Loads the trees, and checks what they refer to."""
        grown, feature = state_dict.get(f"{prefix}grown"), state_dict.get(f"{prefix}feature")
        super()._load_from_state_dict(state_dict, prefix, *args, **options)
        if grown is None or feature is None or grown.shape != () or feature.is_meta:
            return  # reported by torch as missing or misshapen
        count = int(grown)
        if not 0 <= count <= self.trees:
            raise ValueError(f"the trees are {count:,}, expected 0 to {self.trees:,}; fit again")
        if feature.numel() and (feature.min() < 0 or feature.max() >= self.num_features):
            raise ValueError(
                f"the trees read the features {int(feature.min())} to {int(feature.max())}, expected 0 to "
                f"{self.num_features - 1}; fit again"
            )
        self.count, self._booster = count, None

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_booster": None}  # with its training lists; a copy does not grow


def round_down(value: float) -> np.float32:
    """The largest float32 that is not above a number: x ≤ value and x ≤ round_down(value) agree for every float32 x."""
    rounded = np.float32(value)
    return np.nextafter(rounded, np.float32(-np.inf)) if float(rounded) > value else rounded
