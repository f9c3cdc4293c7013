"""ai.onnx.ml: tree ensembles, walked for all rows and all trees at once."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from venturi.ops.ml_tabular import pick_labels, post_transform
from venturi.ops.table import ML, op

T = torch.Tensor
_MODES = [
    "BRANCH_LEQ",
    "BRANCH_LT",
    "BRANCH_GTE",
    "BRANCH_GT",
    "BRANCH_EQ",
    "BRANCH_NEQ",
    "BRANCH_MEMBER",
    "LEAF",
]
_LEAF = _MODES.index("LEAF")
_POST = ["NONE", "SOFTMAX", "LOGISTIC", "SOFTMAX_ZERO", "PROBIT"]


@dataclass(frozen=True)
class Forest:
    """Nodes of all trees in one numbering. Interior: feature, split, yes/no child. Leaves point to themselves."""

    roots: T
    feature: T
    split: T
    mode: T
    yes: T
    no: T
    nan_yes: T
    members: dict[int, T]

    def leaves(self, x: T) -> T:
        """[N, trees] node number of the leaf that each row of x [N, F] reaches in each tree."""
        at = self.roots[None].expand(x.shape[0], -1).clone()
        for _ in range(len(self.feature) + 1):
            mode = self.mode[at]
            if bool((mode == _LEAF).all()):
                break
            value = torch.gather(x, 1, self.feature[at])
            at = torch.where(mode == _LEAF, at, torch.where(self._test(value, at, mode), self.yes[at], self.no[at]))
        return at

    def _test(self, value: T, at: T, mode: T) -> T:
        split = self.split[at]
        tests = [value <= split, value < split, value >= split, value > split, value == split, value != split]
        out = torch.zeros_like(mode, dtype=torch.bool)
        for m, test in enumerate(tests):
            out = torch.where(mode == m, test, out)
        for node, allowed in self.members.items():
            out = torch.where(at == node, torch.isin(value, allowed), out)
        return torch.where(torch.isnan(value), self.nan_yes[at], out)


def _legacy_forest(a: dict[str, Any], dtype: torch.dtype) -> tuple[Forest, dict[tuple[int, int], int]]:
    trees, ids = a["nodes_treeids"], a["nodes_nodeids"]
    number = {(t, n): i for i, (t, n) in enumerate(zip(trees, ids))}
    modes = [_MODES.index(m) for m in a["nodes_modes"]]

    def child(field: str) -> T:
        return torch.tensor([i if modes[i] == _LEAF else number[t, c] for i, (t, c) in enumerate(zip(trees, a[field]))])

    seen: dict[int, int] = {}
    for i, t in enumerate(trees):
        seen.setdefault(t, i)
    splits = a["nodes_values_as_tensor"]
    missing = a["nodes_missing_value_tracks_true"] or [0] * len(modes)
    forest = Forest(
        torch.tensor(list(seen.values())), torch.tensor(a["nodes_featureids"]),
        (torch.tensor(a["nodes_values"]) if splits is None else splits).to(dtype), torch.tensor(modes),
        child("nodes_truenodeids"), child("nodes_falsenodeids"), torch.tensor(missing).bool(), {},
    )  # fmt: skip
    return forest, number


def _votes(forest: Forest, x: T, nodes: list[int], targets: list[int], weights: T, width: int) -> T:
    """[N, trees, width] of what each reached leaf votes for each target; NaN where it does not vote."""
    table = torch.full((len(forest.feature), width), float("nan"), dtype=weights.dtype)
    for n, t, w in zip(nodes, targets, weights):
        table[n, t] = w if bool(torch.isnan(table[n, t])) else table[n, t] + w
    return table[forest.leaves(x)]


def _aggregate(votes: T, how: str) -> T:
    if how == "MIN":
        return torch.nan_to_num(votes, nan=float("inf")).amin(1)
    if how == "MAX":
        return torch.nan_to_num(votes, nan=-float("inf")).amax(1)
    total = torch.nan_to_num(votes, nan=0.0).sum(1)
    return total / votes.shape[1] if how == "AVERAGE" else total


def _weights(values: list[float] | None, tensor: T | None) -> T | None:
    return tensor if tensor is not None else None if values is None else torch.tensor(values)


@op("TreeEnsembleRegressor", domain=ML, ulps=64)
def tree_ensemble_regressor(x: T, **a: Any) -> T:
    attrs: dict[str, Any] = {k: a.get(k) for k in _LEGACY} | a
    forest, number = _legacy_forest(attrs, x.dtype if x.dtype.is_floating_point else torch.float32)
    weights = _weights(attrs.get("target_weights"), attrs.get("target_weights_as_tensor"))
    assert weights is not None, "TreeEnsembleRegressor needs target weights"
    width = attrs.get("n_targets") or 1
    nodes = [number[k] for k in zip(attrs["target_treeids"], attrs["target_nodeids"])]
    votes = _votes(forest, x.to(forest.split.dtype), nodes, attrs["target_ids"], weights, width)
    y = _aggregate(votes, attrs.get("aggregate_function") or "SUM")
    base = _weights(attrs.get("base_values"), attrs.get("base_values_as_tensor"))
    y = y if base is None else y + base
    return post_transform(y.float(), attrs.get("post_transform") or "NONE")


@op("TreeEnsembleClassifier", domain=ML, ulps=64)
def tree_ensemble_classifier(x: T, **a: Any) -> tuple[Any, T]:
    attrs: dict[str, Any] = {k: a.get(k) for k in _LEGACY} | a
    forest, number = _legacy_forest(attrs, x.dtype if x.dtype.is_floating_point else torch.float32)
    weights = _weights(attrs.get("class_weights"), attrs.get("class_weights_as_tensor"))
    assert weights is not None, "TreeEnsembleClassifier needs class weights"
    ints, strings = attrs.get("classlabels_int64s"), attrs.get("classlabels_strings")
    count = len(strings or ints or [])
    nodes = [number[k] for k in zip(attrs["class_treeids"], attrs["class_nodeids"])]
    y = _aggregate(_votes(forest, x.to(forest.split.dtype), nodes, attrs["class_ids"], weights, count), "SUM")
    base = _weights(attrs.get("base_values"), attrs.get("base_values_as_tensor"))
    kind = attrs.get("post_transform") or "NONE"
    if count == 2 and len(set(attrs["class_ids"])) == 1:
        column = y[:, attrs["class_ids"][0]]
        column = column if base is None else column + base[-1]
        if kind == "LOGISTIC" or bool((weights < 0).any()):
            y, index = torch.stack([-column, column], 1), (column > 0).long()
        else:
            y, index = torch.stack([1 - column, column], 1), (column > 0.5).long()
    else:
        y = y if base is None else y + base
        index = y.argmax(1)
    return pick_labels(index, ints, strings), post_transform(y.float(), kind)


_LEGACY = (
    "nodes_treeids", "nodes_nodeids", "nodes_modes", "nodes_featureids", "nodes_values", "nodes_values_as_tensor",
    "nodes_truenodeids", "nodes_falsenodeids", "nodes_missing_value_tracks_true",
)  # fmt: skip


@op("TreeEnsemble", domain=ML, ulps=64)
def tree_ensemble(
    x: T,
    *,
    aggregate_function: int = 1,
    leaf_targetids: list[int],
    leaf_weights: T,
    membership_values: T | None = None,
    n_targets: int,
    nodes_falseleafs: list[int],
    nodes_falsenodeids: list[int],
    nodes_featureids: list[int],
    nodes_hitrates: T | None = None,
    nodes_missing_value_tracks_true: list[int] | None = None,
    nodes_modes: T,
    nodes_splits: T,
    nodes_trueleafs: list[int],
    nodes_truenodeids: list[int],
    post_transform: int = 0,
    tree_roots: list[int],
) -> T:
    n, leaves = len(nodes_featureids), len(leaf_targetids)
    x, nodes_splits, nodes_modes, leaf_weights = (t.cpu() for t in (x, nodes_splits, nodes_modes, leaf_weights))

    def child(ids: list[int], leaf: list[int]) -> list[int]:
        return [n + i if is_leaf else i for i, is_leaf in zip(ids, leaf)]

    own = list(range(n, n + leaves))
    modes = nodes_modes.to(torch.int64).tolist()
    members: dict[int, T] = {}
    if membership_values is not None:
        sets: list[list[float]] = [[]]
        for v in membership_values.tolist():
            if v != v:
                sets.append([])
            else:
                sets[-1].append(v)
        members = {i: torch.tensor(s, dtype=x.dtype) for i, s in zip([i for i, m in enumerate(modes) if m == 6], sets)}
    pad = [0] * leaves
    forest = Forest(
        torch.tensor(tree_roots), torch.tensor(list(nodes_featureids) + pad),
        torch.cat([nodes_splits.to(x.dtype), x.new_zeros(leaves)]), torch.tensor(modes + [_LEAF] * leaves),
        torch.tensor(child(nodes_truenodeids, nodes_trueleafs) + own),
        torch.tensor(child(nodes_falsenodeids, nodes_falseleafs) + own),
        torch.tensor(list(nodes_missing_value_tracks_true or [0] * n) + pad).bool(), members,
    )  # fmt: skip
    votes = _votes(forest, x, own, list(leaf_targetids), leaf_weights.to(x.dtype), n_targets)
    how = ["AVERAGE", "SUM", "MIN", "MAX"][aggregate_function]
    return _transform(_aggregate(votes, how), _POST[post_transform])


_transform = post_transform
