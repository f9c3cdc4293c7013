"""Where the operands and results of a step of a product or a convolution lie, for kernels fed by the tensor memory
accelerator.

A convolution is a product whose steps are channels of one tap: its rows are boxes of the image, moved by the tap, and
what lies outside the image arrives as zeros.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from venturi.backends.cuda.codegen.conv import ConvGeometry

SIDES = (1, 2, 4, 8, 16, 32, 64, 128)


@dataclass(frozen=True)
class Box:
    """`height` x `width` pixels of `images`: the rows of a tile of a convolution."""

    images: int
    height: int
    width: int

    def count(self, size: tuple[int, int, int]) -> int:
        """How many cover [images, P, Q]."""
        images, p, q = size
        return -(-images // self.images) * -(-p // self.height) * -(-q // self.width)


def best_box(size: tuple[int, int, int], rows: int) -> Box:
    """The squarest of the boxes of `rows` pixels that cover [images, P, Q] with the fewest: its taps overlap most.

    >>> best_box((128, 56, 56), 128), best_box((128, 7, 7), 128), best_box((1, 14, 14), 64)
    (Box(images=2, height=8, width=8), Box(images=128, height=1, width=1), Box(images=1, height=8, width=8))
    """
    boxes = [
        Box(g, rows // g // w, w) for g in SIDES for w in SIDES if w * g <= rows and (g == 1 or g <= size[0])
    ]  # fmt: skip
    boxes.sort(key=lambda b: (b.images, b.height + b.width))
    return min(boxes, key=lambda b: b.count(size))


@dataclass(frozen=True)
class Reader:
    """`columns` of the result, the `count` of steps of `step` elements, and text.

    `tiles` says how many tiles of rows there are, `steps` how many steps; `locate` places tile `pm`; `step_lines` and
    `coordinates` say where the image's operand of step `k` begins; `row` is the first row of a tile, where rows are
    numbered, `address` where a tile's rows `m` and columns `n` are stored, and `inside` which rows there are. `block`
    is the image's box of a step, `result` the result's box of a tile without its columns, at `place`.
    """

    columns: int
    count: int
    step: int
    sizes: tuple[str, ...]
    tiles: str
    steps: str
    locate: list[str]
    coordinates: str
    step_lines: list[str]
    block: tuple[int, ...]
    row: str
    address: list[str]
    inside: str
    result: tuple[int, ...]
    place: str
    other: Other | None = None

    def is_whole(self, columns: int) -> bool:
        """Whether all tiles of so many columns are in the result."""
        return self.columns % columns == 0

    def mask(self, columns: int) -> str:
        """Which elements of a tile of `columns` columns there are."""
        rows = f"({self.inside})[:, None]"
        return rows if self.is_whole(columns) else f"{rows} & (n < N)[None, :]"


@dataclass(frozen=True)
class Other:
    """What steps from `first` on read: another image, of boxes `block` at `coordinates`."""

    first: int
    coordinates: str
    block: tuple[int, ...]


def product_reader(n: int, k: int, bm: int, step: int) -> Reader:
    """D[M, n] = A[M, k] @ B[n, k]^T in tiles of `bm` rows."""
    return Reader(
        n, -(-k // step), step,
        ("M", "N", "K"), "tl.cdiv(M, BM)", f"tl.cdiv(K, {step})", [], f"[pm * BM, k * {step}]", [], (bm, step),
        "pm * BM",
        ["at = m.to(tl.int64)[:, None] * N + n[None, :]"],
        "m < M",
        (bm,), "pm * BM",
    )  # fmt: skip


def conv_reader(g: ConvGeometry, box: Box, step: int) -> Reader:
    """Weights are [outputs, taps * channels]. Stride 1 reads the image as [images, H, W, C], stride 2 as
    [images, H / 2, 2, W / 2, 2 * C]."""
    per_tap, taps = g.channels // step, g.kernel[0] * g.kernel[1]
    halves = g.strides[0] == 2
    offset = [
        f"tap = k // {per_tap}",
        f"r = (tap // {g.kernel[1]}) * {g.dilations[0]} - {g.pads[0]}",
        f"s = (tap % {g.kernel[1]}) * {g.dilations[1]} - {g.pads[1]}",
        f"channel = (k % {per_tap}) * {step}",
    ]
    if halves:
        coordinates = f"[image, p0 + (r >> 1), r & 1, q0 + (s >> 1), (s & 1) * {g.channels} + channel]"
    else:
        coordinates = "[image, p0 + r, q0 + s, channel]"
    return Reader(
        g.outputs,
        taps * per_tap,
        step,
        ("images", "P", "Q", "N"),
        f"tl.cdiv(images, {box.images}) * tl.cdiv(P, {box.height}) * tl.cdiv(Q, {box.width})",
        str(taps * per_tap),
        [
            f"across = tl.cdiv(Q, {box.width})",
            f"down = tl.cdiv(P, {box.height})",
            f"image = pm // (across * down) * {box.images}",
            f"p0 = ((pm // across) % down) * {box.height}",
            f"q0 = (pm % across) * {box.width}",
        ],
        coordinates,
        offset,
        (box.images, box.height, 1, box.width, step) if halves else (box.images, box.height, box.width, step),
        "0",
        [
            f"item = image + m // {box.height * box.width}",
            f"p = p0 + m // {box.width} % {box.height}",
            f"q = q0 + m % {box.width}",
            "at = ((item * P + p) * Q + q).to(tl.int64)[:, None] * N + n[None, :]",
        ],
        "(item < images) & (p < P) & (q < Q)",
        (box.images, box.height, box.width),
        "image, p0, q0",
    )


def branches_reader(here: ConvGeometry, there: ConvGeometry, box: Box, step: int) -> Reader:
    """The sum of two 1x1 convolutions, of images of their own; weights are [outputs, channels of both]. `here` has
    stride 1, `there` 1 or 2."""
    one, two = conv_reader(here, box, step), conv_reader(there, box, step)
    start = "[image, p0, 0, q0, {}]" if len(two.block) == 5 else "[image, p0, q0, {}]"
    other = Other(one.count, start.format(f"(k - {one.count}) * {step}"), two.block)
    count = one.count + two.count
    return replace(
        one, count=count, steps=str(count), coordinates=f"[image, p0, q0, k * {step}]", step_lines=[], other=other
    )
