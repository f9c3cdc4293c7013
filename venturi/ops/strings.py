"""String operators on numpy object arrays."""

from __future__ import annotations

import re
from collections import Counter
from itertools import pairwise
from typing import Any

import numpy as np
import torch

from venturi.core.errors import ModelError
from venturi.ops.table import op

T = torch.Tensor
Strings = np.ndarray[Any, Any]


@op("StringConcat", ulps=0.0)
def string_concat(a: Strings, b: Strings) -> Strings:
    return np.asarray(a + b, dtype=object)


@op("RegexFullMatch", ulps=0.0)
def regex_full_match(x: Strings, *, pattern: str) -> T:
    try:
        compiled = re.compile(pattern)
    except re.error as exc:
        raise ModelError(f"RegexFullMatch pattern {pattern!r} is not valid: {exc}") from exc
    hits = [compiled.fullmatch(str(s)) is not None for s in x.reshape(-1)]
    return torch.tensor(hits, dtype=torch.bool).reshape(x.shape)


@op("StringSplit", ulps=0.0)
def string_split(x: Strings, *, delimiter: str | None = None, maxsplit: int | None = None) -> tuple[Strings, T]:
    limit = -1 if maxsplit is None else maxsplit
    parts = [str(s).split(delimiter or None, limit) for s in x.reshape(-1)]
    width = max((len(p) for p in parts), default=0)
    out = np.full((len(parts), width), "", dtype=object)
    for i, p in enumerate(parts):
        out[i, : len(p)] = p
    counts = torch.tensor([len(p) for p in parts], dtype=torch.int64)
    return out.reshape(*x.shape, width), counts.reshape(x.shape)


@op("StringNormalizer", ulps=0.0)
def string_normalizer(
    x: Strings,
    *,
    case_change_action: str = "NONE",
    is_case_sensitive: int = 0,
    locale: str = "en_US",
    stopwords: list[str] | None = None,
) -> Strings:
    fold = (lambda s: s) if is_case_sensitive else str.lower
    stop = {fold(w) for w in stopwords or []}
    change = {"LOWER": str.lower, "UPPER": str.upper}.get(case_change_action, lambda s: s)
    kept = [change(s) for s in map(str, x.reshape(-1)) if fold(s) not in stop] or [""]
    out = np.array(kept, dtype=object)
    return out.reshape(1, -1) if x.ndim == 2 else out


@op("TfIdfVectorizer", ulps=1.0)
def tf_idf_vectorizer(
    x: Any,
    *,
    max_gram_length: int,
    max_skip_count: int,
    min_gram_length: int,
    mode: str,
    ngram_counts: list[int],
    ngram_indexes: list[int],
    pool_int64s: list[int] | None = None,
    pool_strings: list[str] | None = None,
    weights: list[float] | None = None,
) -> T:
    pool: list[Any] = list(pool_int64s if pool_int64s is not None else pool_strings or [])
    column: dict[tuple[Any, ...], int] = {}
    bounds = [*ngram_counts, len(pool)]
    for n, (start, end) in enumerate(pairwise(bounds), 1):
        for i in range(start, end, n):
            column[tuple(pool[i : i + n])] = len(column)
    rows = x.tolist() if x.ndim == 2 else [x.tolist()]
    out = torch.zeros(len(rows), max(ngram_indexes) + 1)
    for r, row in enumerate(rows):
        for gram, count in _count_ngrams(row, column, min_gram_length, max_gram_length, max_skip_count).items():
            weight = weights[gram] if weights is not None and mode != "TF" else 1.0
            out[r, ngram_indexes[gram]] += weight * (min(count, 1) if mode == "IDF" else count)
    return out if x.ndim == 2 else out[0]


def _count_ngrams(row: list[Any], column: dict[tuple[Any, ...], int], low: int, high: int, skips: int) -> Counter[int]:
    found: Counter[int] = Counter()
    for n in range(low, high + 1):
        for skip in range(skips + 1 if n > 1 else 1):
            stride = skip + 1
            for start in range(len(row) - (n - 1) * stride):
                gram = column.get(tuple(row[start : start + n * stride : stride]))
                if gram is not None:
                    found[gram] += 1
    return found
