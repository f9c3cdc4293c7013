"""Every architecture of the zoo builds and matches torch eager at two input sizes."""

from __future__ import annotations

import pytest

from tests.e2e.checks import check_entry
from tests.e2e.zoo import ZOO, Entry


@pytest.mark.parametrize("entry", ZOO, ids=lambda e: e.name)
def test_architecture(entry: Entry) -> None:
    result = check_entry(entry)
    assert result.steps > 0


def test_zoo_is_wide() -> None:
    assert len(ZOO) >= 25
    assert len({e.name for e in ZOO}) == len(ZOO)
