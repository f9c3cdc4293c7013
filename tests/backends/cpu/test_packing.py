"""Weights packed by pieces are the weights packed at once, and an engine lets go of its file's pages."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch

import venturi as vt
from venturi.backends.cpu.codegen.isa import host
from venturi.backends.cpu.native import memory
from venturi.engine.container import Container

pytestmark = pytest.mark.skipif(isinstance(host(), str), reason=str(host()))


def _packs() -> dict[str, tuple[int, Callable[[torch.Tensor], torch.Tensor]]]:
    from venturi.backends.cpu.codegen.direct import pack_weights
    from venturi.backends.cpu.codegen.matrix import pack_matrix
    from venturi.backends.cpu.codegen.winograd import pack_winograd

    return {
        "direct": (48, lambda w: pack_weights(w, 48)),
        "winograd": (32, lambda w: pack_winograd(w, 4, 32)),
        "matrix": (32, lambda w: pack_matrix(w.bfloat16())),
    }


@pytest.mark.parametrize("name", ["direct", "winograd", "matrix"])
@pytest.mark.parametrize("out", [1, 32, 48, 49, 100, 193])
@pytest.mark.parametrize("piece", [1, 20_000, 1 << 30])
def test_pieces_make_the_whole(name: str, out: int, piece: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "PIECE_BYTES", piece)
    block, pack = _packs()[name]
    weight = torch.randn(out, 7, 3, 3, generator=torch.Generator().manual_seed(out))
    got = memory.packed_by_pieces(weight, block, pack)
    assert torch.equal(got, pack(weight))
    assert got.data_ptr() % memory.ALIGNMENT == 0


def test_what_is_packed_at_once_stays_small(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    monkeypatch.setattr(memory, "PIECE_BYTES", 64 * 40 * 4)
    memory.packed_by_pieces(torch.zeros(256, 40), 32, partial(_noted, seen))
    assert seen == [64] * 4


def _noted(seen: list[int], weight: torch.Tensor) -> torch.Tensor:
    seen.append(len(weight))
    return weight.view(-1, 32, 40)


def test_a_file_lets_go_of_its_pages_and_can_be_read_again(tmp_path: Path) -> None:
    net = vt.Network("big")
    x = net.input("x", (1, 512))
    net.output("y", x @ torch.randn(512, 4096).numpy())
    path = tmp_path / "big.vt"
    vt.build(net, device="cpu", opt_level=0).save(path)
    container = Container(path)
    weights = container.entry("weights.safetensors")
    before, read = _mapped_kb(path), bytes(weights)
    assert _mapped_kb(path) >= before + 8000, "reading maps the pages"
    container.release()
    assert _mapped_kb(path) < before + 1000
    assert bytes(weights) == read


def _mapped_kb(path: Path) -> int:
    """Resident pages of the file in this process."""
    total, inside = 0, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if "-" in line.split(" ")[0] and ":" not in line.split(" ")[0]:
            inside = line.endswith(path.name)
        elif inside and line.startswith("Rss:"):
            total += int(line.split()[1])
    return total
