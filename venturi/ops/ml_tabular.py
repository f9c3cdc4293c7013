"""ai.onnx.ml: encoders, scalers, linear models and support vector machines."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from venturi.core.errors import RequestError
from venturi.ops.table import ML, POINTWISE, op
from venturi.ops.tensors import to_numpy

T = torch.Tensor


def post_transform(scores: T, kind: str) -> T:
    """NONE, SOFTMAX, SOFTMAX_ZERO (zeros stay zero), LOGISTIC or PROBIT."""
    if kind == "SOFTMAX":
        return torch.softmax(scores, -1)
    if kind == "SOFTMAX_ZERO":
        e = torch.where(scores == 0, torch.zeros_like(scores), torch.exp(scores - scores.amax(-1, keepdim=True)))
        return e / e.sum(-1, keepdim=True)
    if kind == "LOGISTIC":
        return torch.sigmoid(scores)
    if kind == "PROBIT":
        return 2**0.5 * torch.erfinv(2 * scores - 1)
    return scores


def pick_labels(index: T, ints: list[int] | None, strings: list[str] | None) -> Any:
    if strings:
        return np.array(strings, dtype=object)[index.numpy()]
    return torch.tensor(ints or list(range(int(index.max()) + 1 if index.numel() else 0)), dtype=torch.int64)[index]


@op("ArrayFeatureExtractor", domain=ML, ulps=0.0)
def array_feature_extractor(x: Any, index: T) -> Any:
    where = index.reshape(-1)
    out = x[..., where.numpy()] if isinstance(x, np.ndarray) else x[..., where]
    return out.reshape(1, -1) if x.ndim == 1 else out


@op("Binarizer", POINTWISE, domain=ML, ulps=0.0)
def binarizer(x: T, *, threshold: float = 0.0) -> T:
    return (x > threshold).to(x.dtype)


@op("Scaler", domain=ML)
def scaler(x: T, *, offset: list[float], scale: list[float]) -> T:
    return (x.float() - torch.tensor(offset)) * torch.tensor(scale)


@op("Imputer", domain=ML, ulps=0.0)
def imputer(
    x: T,
    *,
    imputed_value_floats: list[float] | None = None,
    imputed_value_int64s: list[int] | None = None,
    replaced_value_float: float = 0.0,
    replaced_value_int64: int = 0,
) -> T:
    new = torch.tensor(imputed_value_floats or imputed_value_int64s, dtype=x.dtype)
    if x.dtype.is_floating_point:
        hit = torch.isnan(x) if np.isnan(replaced_value_float) else x == replaced_value_float
    else:
        hit = x == replaced_value_int64
    return torch.where(hit, new, x)


@op("Normalizer", domain=ML)
def normalizer(x: T, *, norm: str = "MAX") -> T:
    y = x.float()
    size = {"MAX": lambda: y.amax(-1, keepdim=True), "L1": lambda: y.abs().sum(-1, keepdim=True)}.get(
        norm, lambda: y.square().sum(-1, keepdim=True).sqrt()
    )()
    return torch.where(size == 0, y, y / size)


@op("FeatureVectorizer", domain=ML, ulps=0.0)
def feature_vectorizer(*xs: T, inputdimensions: list[int] | None = None) -> T:
    return torch.cat([x.float().reshape(1, -1) if x.dim() == 1 else x.float() for x in xs], 1)


@op("LabelEncoder", domain=ML, ulps=0.0)
def label_encoder(
    x: Any,
    *,
    default_float: float = -0.0,
    default_int64: int = -1,
    default_string: str = "_Unused",
    default_tensor: Any = None,
    keys_floats: list[float] | None = None,
    keys_int64s: list[int] | None = None,
    keys_strings: list[str] | None = None,
    keys_tensor: Any = None,
    values_floats: list[float] | None = None,
    values_int64s: list[int] | None = None,
    values_strings: list[str] | None = None,
    values_tensor: Any = None,
) -> Any:
    keys = _first(keys_floats, keys_int64s, keys_strings, keys_tensor)
    values = _first(values_floats, values_int64s, values_strings, values_tensor)
    if values_tensor is not None:
        kind = to_numpy(values_tensor).dtype
        fallback = _default(kind) if default_tensor is None else to_numpy(default_tensor).reshape(-1)[0]
    elif values_strings is not None:
        kind, fallback = np.dtype(object), default_string
    elif values_int64s is not None:
        kind, fallback = np.dtype(np.int64), default_int64
    else:
        kind, fallback = np.dtype(np.float32), default_float
    table = {("nan" if isinstance(k, float) and np.isnan(k) else k): v for k, v in zip(keys, values)}
    flat = [
        table.get("nan" if isinstance(v, float) and np.isnan(v) else v, fallback)
        for v in to_numpy(x).reshape(-1).tolist()
    ]
    out = np.array(flat, dtype=kind).reshape(x.shape)
    return out if kind.kind == "O" else torch.from_numpy(out)


def _first(*candidates: Any) -> list[Any]:
    for c in candidates:
        if c is not None:
            return to_numpy(c).reshape(-1).tolist() if not isinstance(c, list | tuple) else list(c)
    return []


def _default(kind: Any) -> Any:
    return "_Unused" if kind.kind == "O" else -1 if kind.kind in "iu" else -0.0


@op("CategoryMapper", domain=ML, ulps=0.0)
def category_mapper(
    x: Any,
    *,
    cats_int64s: list[int],
    cats_strings: list[str],
    default_int64: int = -1,
    default_string: str = "_Unused",
) -> Any:
    if isinstance(x, np.ndarray):
        table = dict(zip(cats_strings, cats_int64s))
        return torch.tensor([table.get(s, default_int64) for s in x.reshape(-1)]).reshape(x.shape)
    names = dict(zip(cats_int64s, cats_strings))
    return np.array([names.get(i, default_string) for i in x.reshape(-1).tolist()], dtype=object).reshape(x.shape)


@op("OneHotEncoder", domain=ML, ulps=0.0)
def one_hot_encoder(
    x: Any, *, cats_int64s: list[int] | None = None, cats_strings: list[str] | None = None, zeros: int = 1
) -> T:
    cats: list[Any] = list(cats_strings if cats_strings is not None else cats_int64s or [])
    column = {c: i for i, c in enumerate(cats)}
    flat = x.reshape(-1).tolist()
    out = torch.zeros(len(flat), len(cats))
    for r, v in enumerate(flat):
        at = column.get(v if isinstance(v, str) else int(v))
        if at is not None:
            out[r, at] = 1.0
        elif not zeros:
            raise RequestError(f"OneHotEncoder: category {v!r} is not one of the model's {len(cats)}")
    return out.reshape(*x.shape, len(cats))


@op("DictVectorizer", domain=ML, ulps=0.0)
def dict_vectorizer(
    x: dict[Any, Any],
    *,
    int64_vocabulary: list[int] | None = None,
    string_vocabulary: list[str] | None = None,
) -> Any:
    vocabulary: list[Any] = list(string_vocabulary if string_vocabulary is not None else int64_vocabulary or [])
    values = [x.get(k) for k in vocabulary]
    if any(isinstance(v, str) for v in values):
        return np.array([v or "" for v in values], dtype=object)
    return torch.tensor([0 if v is None else v for v in values])


@op("CastMap", domain=ML, ulps=0.0)
def cast_map(x: dict[int, Any], *, cast_to: str = "TO_FLOAT", map_form: str = "DENSE", max_map: int = 1) -> Any:
    size = max_map if map_form == "SPARSE" else len(x)
    values = [x.get(i, 0) for i in range(size)] if map_form == "SPARSE" else [x[k] for k in sorted(x)]
    if cast_to == "TO_STRING":
        return np.array([str(v) for v in values], dtype=object)
    return torch.tensor([float(v) for v in values]) if cast_to == "TO_FLOAT" else torch.tensor([int(v) for v in values])


@op("ZipMap", domain=ML, ulps=0.0)
def zip_map(
    x: T, *, classlabels_int64s: list[int] | None = None, classlabels_strings: list[str] | None = None
) -> list[dict[Any, float]]:
    keys: list[Any] = list(classlabels_strings if classlabels_strings is not None else classlabels_int64s or [])
    return [dict(zip(keys, row)) for row in x.reshape(-1, len(keys)).tolist()]


@op("LinearRegressor", domain=ML, ulps=64)
def linear_regressor(
    x: T,
    *,
    coefficients: list[float],
    intercepts: list[float] | None = None,
    post_transform: str = "NONE",
    targets: int = 1,
) -> T:
    y = x.float() @ torch.tensor(coefficients).reshape(targets, -1).T
    y = y + torch.tensor(intercepts) if intercepts else y
    return _post(y, post_transform)


_post = post_transform


@op("LinearClassifier", domain=ML, ulps=64)
def linear_classifier(
    x: T,
    *,
    classlabels_ints: list[int] | None = None,
    classlabels_strings: list[str] | None = None,
    coefficients: list[float],
    intercepts: list[float] | None = None,
    multi_class: int = 0,
    post_transform: str = "NONE",
) -> tuple[Any, T]:
    labels: list[Any] = list(classlabels_strings or classlabels_ints or [])
    rows = len(coefficients) // x.shape[-1]
    y = x.float() @ torch.tensor(coefficients).reshape(rows, -1).T
    y = y + torch.tensor(intercepts) if intercepts else y
    if y.shape[1] == 1 and len(labels) == 2:
        index = (y[:, 0] > (0.5 if post_transform == "LOGISTIC" else 0)).long()
        y = torch.cat([-y, y], 1)
    else:
        index = y.argmax(1)
    return pick_labels(index, classlabels_ints, classlabels_strings), _post(y, post_transform)


def _kernel(a: T, b: T, kind: str, params: list[float]) -> T:
    gamma, coef0, degree = params or [0.0, 0.0, 0.0]
    if kind == "RBF":
        return torch.exp(-gamma * torch.cdist(a, b).square())
    product = a @ b.T
    if kind == "POLY":
        return (gamma * product + coef0).pow(degree)
    return torch.tanh(gamma * product + coef0) if kind == "SIGMOID" else product


@op("SVMRegressor", domain=ML, ulps=256)
def svm_regressor(
    x: T,
    *,
    coefficients: list[float],
    kernel_params: list[float] | None = None,
    kernel_type: str = "LINEAR",
    n_supports: int = 0,
    one_class: int = 0,
    post_transform: str = "NONE",
    rho: list[float],
    support_vectors: list[float] | None = None,
) -> T:
    weights = torch.tensor(coefficients)
    if n_supports:
        vectors = torch.tensor(support_vectors).reshape(n_supports, -1)
        y = _kernel(x.float(), vectors, kernel_type, kernel_params or []) @ weights
    else:
        y = x.float() @ weights
    y = (y + rho[0])[:, None]
    return torch.where(y > 0, 1.0, -1.0) if one_class else _post(y, post_transform)


@op("SVMClassifier", domain=ML, ulps=256)
def svm_classifier(
    x: T,
    *,
    classlabels_ints: list[int] | None = None,
    classlabels_strings: list[str] | None = None,
    coefficients: list[float],
    kernel_params: list[float] | None = None,
    kernel_type: str = "LINEAR",
    post_transform: str = "NONE",
    prob_a: list[float] | None = None,
    prob_b: list[float] | None = None,
    rho: list[float],
    support_vectors: list[float] | None = None,
    vectors_per_class: list[int] | None = None,
) -> tuple[Any, T]:
    """One-versus-one voting over all class pairs (libsvm), or one linear score a class without vectors."""
    labels: list[Any] = list(classlabels_strings or classlabels_ints or [])
    if not vectors_per_class:
        scores = x.float() @ torch.tensor(coefficients).reshape(len(labels), -1).T + torch.tensor(rho)[0]
        return pick_labels(scores.argmax(1), classlabels_ints, classlabels_strings), _post(scores, post_transform)
    counts = vectors_per_class
    vectors = torch.tensor(support_vectors).reshape(sum(counts), -1)
    weights = torch.tensor(coefficients).reshape(len(counts) - 1, -1)
    k = _kernel(x.float(), vectors, kernel_type, kernel_params or [])
    starts = np.concatenate([[0], np.cumsum(counts)])
    votes = torch.zeros(x.shape[0], len(counts))
    decisions: list[T] = []
    for i in range(len(counts)):
        for j in range(i + 1, len(counts)):
            a, b = slice(starts[i], starts[i + 1]), slice(starts[j], starts[j + 1])
            d = k[:, a] @ weights[j - 1, a] + k[:, b] @ weights[i, b] + rho[len(decisions)]
            decisions.append(d)
            votes[:, i] += (d > 0).float()
            votes[:, j] += (d <= 0).float()
    scores = torch.stack(decisions, 1)
    index = votes.argmax(1)
    if prob_a:
        scores = _pairwise_probability(scores, len(counts), prob_a, prob_b or [])
        index = scores.argmax(1)
    elif len(counts) == 2:
        scores = torch.cat([scores, -scores], 1)
    return pick_labels(index, classlabels_ints, classlabels_strings), _post(scores, post_transform)


def _pairwise_probability(decisions: T, n: int, prob_a: list[float], prob_b: list[float]) -> T:
    """Couple pairwise Platt probabilities to one distribution. Source: Wu, Lin, Weng (2004), method 2."""
    r = torch.zeros(decisions.shape[0], n, n, dtype=torch.float64)
    pair = 0
    for i in range(n):
        for j in range(i + 1, n):
            p = torch.sigmoid(-(decisions[:, pair].double() * prob_a[pair] + prob_b[pair])).clamp(1e-7, 1 - 1e-7)
            r[:, i, j], r[:, j, i] = p, 1 - p
            pair += 1
    q = -r.mT * r
    q = q + torch.diag_embed(r.square().sum(1))
    p = torch.full((decisions.shape[0], n), 1.0 / n, dtype=torch.float64)
    for _ in range(100):
        for t in range(n):
            qp = (q @ p[..., None])[..., 0]
            total = (p * qp).sum(-1)
            new = p[:, t] + (total - qp[:, t]) / q[:, t, t]
            p[:, t] = new
            p = p / p.sum(-1, keepdim=True)
    return p.float()
