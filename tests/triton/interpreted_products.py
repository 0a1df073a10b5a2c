"""A Q, Aᵀ Q, Aᵀ A and A Aᵀ in float32 accuracy under Triton's interpreter (interpreter.py)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import pytest
import torch
from torch import Tensor

from osf_kernels.backends import triton as backend
from osf_kernels.backends.triton import configs, product_schedule
from osf_kernels.testing import assert_error_within
from tests.helpers import generator_for
from tests.triton.jobs import LAYOUTS, assert_gram, assert_multiply, draw
from tests.triton.watching import watch

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
# What float16 shares with bfloat16 runs for it in the full suite.
QUICK_DTYPES = (torch.float32, pytest.param(torch.float16, marks=pytest.mark.slow), torch.bfloat16)
SIDES: tuple[Literal["right", "left"], ...] = ("right", "left")
# Small tiles, so that small matrices have several and every edge is ragged.
MULTIPLY = configs.Multiply(32, 32, 16, 4, 1)
GRAM = configs.Gram(32, 32, 4, 1)


@pytest.fixture(autouse=True)
def _short_splits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Split sums of small matrices too."""
    monkeypatch.setattr(configs, "SHORTEST_SPLIT", 32)
    monkeypatch.setattr(configs, "SHORTEST_GRAM_SPLIT", 32)


def guarded(batch: int, rows: int, columns: int) -> Tensor:
    """NaN results, each inside a frame of sevens that ``assert_kept`` looks at afterwards."""
    frames = torch.full((batch, rows + 4, columns + 8), 7.0)
    return frames[:, 2 : rows + 2, 4 : columns + 4].fill_(torch.nan)


def assert_kept(out: Tensor) -> None:
    batch, rows, columns = out.shape
    frames = out.as_strided((batch, rows + 4, columns + 8), (out.stride(0), columns + 8, 1), 0)
    kept = frames.clone()
    kept[:, 2 : rows + 2, 4 : columns + 4] = 7.0
    assert bool((kept == 7.0).all()), "wrote outside of its output"


def draw_multiply(
    shape: tuple[int, int],
    width: int,
    g: torch.Generator,
    *,
    batch: int = 2,
    dtype: torch.dtype = torch.bfloat16,
    transpose: bool = False,
    shared: bool = False,
    layout: str = "rows",
) -> tuple[list[Tensor], Tensor, Tensor]:
    m, n = shape
    As = [draw(m, n, dtype, g, layout) for _ in range(batch)]
    Q = torch.randn(1 if shared else batch, m if transpose else n, width, generator=g)
    return As, Q, guarded(batch, n if transpose else m, width)


def check_multiply(
    As: list[Tensor],
    Q: Tensor,
    out: Tensor,
    transpose: bool = False,
    config: configs.Multiply | None = MULTIPLY,
) -> None:
    backend.multiply(As, Q, out, transpose=transpose, config=config)
    assert_multiply(As, Q, out, transpose)
    assert_kept(out)
    left = torch.stack([A.mT if transpose else A for A in As])
    truth = left.double() @ Q.double()
    assert_error_within(out, truth, left.float() @ Q, scale=truth)


def check_gram(
    As: list[Tensor],
    side: Literal["right", "left"],
    config: configs.Gram | None = GRAM,
) -> Tensor:
    left = torch.stack([A.mT if side == "right" else A for A in As])
    batch, size, _ = left.shape
    out = guarded(batch, size, size)
    backend.gram(As, out, side=side, config=config)
    assert_gram(As, out, side)
    assert_kept(out)
    truth = left.double() @ left.double().mT
    assert_error_within(out, truth, left.float() @ left.float().mT, scale=truth)
    return out


# --- A Q and Aᵀ Q --------------------------------------------------------------------------


@pytest.mark.parametrize("transpose", [False, True])
@pytest.mark.parametrize("dtype", QUICK_DTYPES, ids=str)
def test_multiply_against_float64(dtype: torch.dtype, transpose: bool) -> None:
    g = generator_for("multiply", dtype, transpose)
    check_multiply(
        *draw_multiply((75, 41), 20, g, dtype=dtype, transpose=transpose, batch=1),
        transpose=transpose,
    )


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("transpose", [False, True])
def test_multiply_strides(transpose: bool, layout: str) -> None:
    """Every class of strides of A, Q and out."""
    g = generator_for("multiply strides", transpose, layout)
    As, Q, out = draw_multiply((40, 36), 12, g, transpose=transpose, layout=layout)
    Q = torch.stack([LAYOUTS[layout](q) for q in Q])
    check_multiply(As, Q, out, transpose)
    turned = torch.full((2, out.shape[2], out.shape[1]), torch.nan).mT
    backend.multiply(As, Q.mT.contiguous().mT, turned, transpose=transpose, config=MULTIPLY)
    assert_multiply(As, Q, turned, transpose)


def test_matrices_of_unlike_strides() -> None:
    g = generator_for("multiply mixed")
    As, Q, out = draw_multiply((40, 32), 8, g, batch=4)
    for i, layout in enumerate(LAYOUTS):
        As[i] = LAYOUTS[layout](As[i])
    check_multiply(As, Q, out)


@pytest.mark.parametrize(
    ("dtype", "width"),
    [
        pytest.param(torch.bfloat16, 33, marks=pytest.mark.slow),
        (torch.float32, 1),
        (torch.float16, 1),
    ],
    ids=str,
)
def test_shared_sketch(dtype: torch.dtype, width: int) -> None:
    g = generator_for("shared", dtype, width)
    As, Q, out = draw_multiply((40, 36), width, g, dtype=dtype, shared=True)
    check_multiply(As, Q, out)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("dtype", "transpose", "width"),
    [
        (torch.bfloat16, False, 3),
        (torch.bfloat16, True, 64),
        (torch.bfloat16, False, 200),
        (torch.float16, True, 3),
        (torch.float16, False, 70),
        (torch.float32, False, 64),
        (torch.float32, True, 140),
    ],
    ids=str,
)
def test_pinned_multiply_configs(dtype: torch.dtype, transpose: bool, width: int) -> None:
    """The table's own tiles, chosen by rule."""
    g = generator_for("pinned", dtype, transpose, width)
    for shape in ((72, 40), (67, 35)):
        drawn = draw_multiply(shape, width, g, dtype=dtype, transpose=transpose, batch=1)
        check_multiply(*drawn, transpose=transpose, config=None)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_pieces_hold_every_bit(dtype: torch.dtype) -> None:
    """The identity returns a float32 to the bit, from the largest to those of 2⁻¹⁰⁹."""
    g = generator_for("bits", dtype)
    exponents = torch.randint(127 - 109, 255, (1, 32, 16), generator=g, dtype=torch.int32)
    mantissas = torch.randint(0, 2**23, (1, 32, 16), generator=g, dtype=torch.int32)
    Q = ((exponents << 23) | mantissas).view(torch.float32)
    Q[:, ::2] *= -1
    largest = torch.finfo(torch.float32).max
    Q[0, 0, :4] = torch.tensor([largest, -largest, 2.0**-109, 0.0])
    out = guarded(1, 32, 16)
    backend.multiply([torch.eye(32, dtype=dtype)], Q, out, config=MULTIPLY)
    assert torch.equal(out, Q)
    # Below, what falls under bfloat16's least step is lost.
    tiny = Q.sign() * torch.rand(Q.shape, generator=g) * 2.0**-110
    backend.multiply([torch.eye(32, dtype=dtype)], tiny, out, config=MULTIPLY)
    assert float((out - tiny).abs().max()) <= 2.0**-134
    # A float16 of all eleven bits, subnormal ones too, is in its two pieces.
    values = torch.randn(32, 32, generator=g).to(dtype)
    values[0, :4] = torch.tensor([torch.finfo(dtype).max, 2.0**-24, 3 * 2.0**-24, 1.0]).to(dtype)
    scale = torch.full((32,), 2.0**-3)
    out = guarded(1, 32, 32)
    backend.multiply([values], torch.diag(scale)[None], out, config=MULTIPLY)
    assert torch.equal(out[0], values.float() * scale)


@pytest.mark.parametrize("dtype", QUICK_DTYPES, ids=str)
def test_multiply_ill_scaled(dtype: torch.dtype) -> None:
    """Rows and columns over many decades: the error follows each element's own size."""
    g = generator_for("scales", dtype)
    As, Q, out = draw_multiply((40, 70), 9, g, dtype=torch.float32)
    decades = 3 if dtype == torch.float16 else 10
    As = [(A * torch.logspace(-decades, decades, 40)[:, None]).to(dtype) for A in As]
    Q *= torch.logspace(-10, 10, 70)[:, None] * torch.logspace(8, -8, 9)
    backend.multiply(As, Q, out, config=MULTIPLY)
    assert_multiply(As, Q, out, False)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("value", "transpose"), [(torch.nan, False), (torch.inf, True), (-torch.inf, False)]
)
# numpy, under the interpreter, warns of an Inf times a zero or less an Inf.
@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")
def test_multiply_keeps_non_finite_values(value: float, transpose: bool) -> None:
    for dtype in DTYPES:
        g = generator_for("non-finite", dtype, value, transpose)
        As, Q, out = draw_multiply((40, 36), 9, g, dtype=dtype, transpose=transpose)
        row, column = (17, 21) if transpose else (21, 17)
        As[0][row, column] = value
        line = column if transpose else row
        Q[1, 5, 3] = value
        backend.multiply(As, Q, out, transpose=transpose, config=MULTIPLY)
        bad = ~out.isfinite()
        assert bool(bad[0, line].all())
        assert bool(bad[1, :, 3].all())
        bad[0, line] = False
        bad[1, :, 3] = False
        assert not bool(bad.any())


# --- Aᵀ A and A Aᵀ -------------------------------------------------------------------------


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("dtype", QUICK_DTYPES, ids=str)
def test_gram_against_float64(dtype: torch.dtype, side: Literal["right", "left"]) -> None:
    g = generator_for("gram", dtype, side)
    check_gram([draw(75, 41, dtype, g)], side)


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("side", SIDES)
def test_gram_strides(side: Literal["right", "left"], layout: str) -> None:
    g = generator_for("gram strides", side, layout)
    As = [draw(40, 36, torch.bfloat16, g, layout), draw(40, 36, torch.bfloat16, g)]
    out = check_gram(As, side)
    turned = torch.full(out.shape, torch.nan).mT
    strided = torch.full((2, *(2 * size for size in out.shape[1:])), torch.nan)[:, ::2, ::2]
    for other in (turned, strided) if layout == "rows" else ():
        backend.gram(As, other, side=side, config=GRAM)
        assert torch.equal(other, out)


@pytest.mark.parametrize("count", [1, 2, 3, pytest.param(6, marks=pytest.mark.slow)])
def test_every_tile_of_the_triangle(count: int) -> None:
    """Odd and even numbers of tiles, the last of them ragged."""
    g = generator_for("triangle", count)
    size = 16 * count - 5
    check_gram([draw(9, size, torch.float32, g)], "right", configs.Gram(16, 16, 4, 1))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("dtype", "side"),
    [(torch.bfloat16, "right"), (torch.float16, "left"), (torch.float32, "right")],
    ids=str,
)
def test_pinned_gram_configs(dtype: torch.dtype, side: Literal["right", "left"]) -> None:
    g = generator_for("pinned gram", dtype, side)
    for shape in ((40, 136), (136, 40), (67, 75)):
        check_gram([draw(*shape, dtype, g)], side, None)


@pytest.mark.parametrize(
    "dtype", [pytest.param(torch.bfloat16, marks=pytest.mark.slow), torch.float32], ids=str
)
def test_long_sums_of_one_sign(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype) -> None:
    """Sums that only grow lose most: still at most twice what torch loses in float32."""
    monkeypatch.undo()
    g = generator_for("long", dtype)
    As = [torch.rand(2000, 16, generator=g).to(dtype)]
    check_gram(As, "right", configs.Gram(16, 64, 4, 1))
    Q = torch.rand(1, 2000, 5, generator=g)
    config = configs.Multiply(16, 64, 16, 4, 1)
    check_multiply(As, Q, guarded(1, 16, 5), transpose=True, config=config)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_gram_ill_scaled(dtype: torch.dtype) -> None:
    g = generator_for("gram scales", dtype)
    A = draw(40, 50, torch.float32, g) * torch.logspace(-10, 10, 50)
    out = guarded(1, 50, 50)
    backend.gram([A.to(dtype)], out, config=GRAM)
    assert_gram([A.to(dtype)], out, "right")


@pytest.mark.slow
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")
def test_gram_keeps_non_finite_values(value: float) -> None:
    for dtype in DTYPES:
        g = generator_for("gram non-finite", dtype, value)
        A = draw(60, 45, dtype, g)
        A[7, 40] = value
        out = guarded(1, 45, 45)
        backend.gram([A], out, config=GRAM)
        bad = ~out[0].isfinite()
        assert bool(bad[40].all())
        assert bool(bad[:, 40].all())
        bad[40] = bad[:, 40] = False
        assert not bool(bad.any())


# --- both ----------------------------------------------------------------------------------


@pytest.mark.slow
def test_same_bits_in_a_list_a_loop_and_again() -> None:
    g = generator_for("bits")
    As, Q, out = draw_multiply((70, 35), 9, g, transpose=True)
    square = torch.empty(2, 35, 35)
    backend.multiply(As, Q, out, transpose=True, config=MULTIPLY)
    backend.gram(As, square, config=GRAM)
    again, squares = torch.empty_like(out), torch.empty_like(square)
    backend.multiply(As, Q, again, transpose=True, config=MULTIPLY)
    backend.gram(As, squares, config=GRAM)
    assert torch.equal(out, again)
    assert torch.equal(square, squares)
    for i, A in enumerate(As):
        alone, alone_square = torch.empty(1, 35, 9), torch.empty(1, 35, 35)
        backend.multiply([A], Q[i : i + 1], alone, transpose=True, config=MULTIPLY)
        backend.gram([A], alone_square, config=GRAM)
        assert torch.equal(alone[0], out[i])
        assert torch.equal(alone_square[0], square[i])


@pytest.mark.slow
def test_sums_are_split_and_sliced(monkeypatch: pytest.MonkeyPatch) -> None:
    """The cases above do split sums, and a workspace beyond its bound is cut, to the same bits."""
    g = generator_for("split")
    As = [draw(70, 33, torch.float32, g) for _ in range(3)]
    out = check_gram(As, "right")

    def sums() -> list[int]:
        found = product_schedule.gram_launches(
            As,
            out.unbind(),
            right=True,
            fill=128,
            float32_precision="ieee",
            choose=lambda *_: GRAM,
        )
        return [made.counts[2] for made in found]  # problems that have several parts

    assert sums() == [3]
    monkeypatch.setattr(configs, "GRAM_WORKSPACE_ELEMENTS", 1)
    assert sums() == [1, 1, 1]
    assert torch.equal(check_gram(As, "right"), out)


def test_torch_matmul_precision_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """float32 is taken by tf32x3 where torch's own products may be TF32, and everywhere else."""
    watching = watch(monkeypatch)
    A, Q, out = torch.randn(16, 16), torch.randn(1, 16, 4), torch.empty(1, 16, 4)
    square = torch.empty(1, 16, 16)
    before = torch.backends.cuda.matmul.fp32_precision
    try:
        for setting in ("tf32", "ieee"):
            torch.backends.cuda.matmul.fp32_precision = setting
            backend.multiply([A], Q, out)
            backend.gram([A], square)
    finally:
        torch.backends.cuda.matmul.fp32_precision = before
    made = [(each.kernel, each.constants["PRECISION"]) for each in watching.planned]
    assert made == [("multiply", "tf32x3"), ("gram", "tf32x3")] * 2


@pytest.mark.parametrize(
    "shape",
    [
        *((0, 12), (12, 0), (0, 0)),
        *(pytest.param(shape, marks=pytest.mark.slow) for shape in ((1, 1), (1, 50), (50, 1))),
    ],
)
def test_degenerate_shapes(shape: tuple[int, int]) -> None:
    """A sum over nothing is zero, written all the same."""
    g = generator_for(shape)
    for transpose in (False, True):
        for width in (0, 1, 3):
            As, Q, out = draw_multiply(shape, width, g, transpose=transpose)
            backend.multiply(As, Q, out, transpose=transpose)
            assert_multiply(As, Q, out, transpose)
    for side in SIDES:
        check_gram([draw(*shape, torch.bfloat16, g)], side, None)


def test_empty_list() -> None:
    backend.multiply([], torch.empty(1, 5, 2), torch.empty(0, 7, 2))
    backend.multiply([], torch.empty(0, 5, 2), torch.empty(0, 7, 2))
    backend.gram([], torch.empty(0, 5, 5))


A, Q, OUT, SQUARE = torch.randn(6, 4), torch.randn(1, 4, 2), torch.empty(1, 6, 2), torch.empty(4, 4)
REFUSED: dict[str, tuple[type[Exception], str, Callable[[], None]]] = {
    "Q along the wrong side": (
        ValueError,
        r"expected Q to be \(1 or 1, 6, l\) with A of shape \(6, 4\) and transpose=True",
        lambda: backend.multiply([A], Q, OUT, transpose=True),
    ),
    "as many Q as matrices": (
        ValueError,
        r"expected Q to be \(3 or 1, 4, l\)",
        lambda: backend.multiply([A] * 3, Q.expand(2, 4, 2), OUT.expand(3, 6, 2)),
    ),
    "out": (
        ValueError,
        r"expected out to be \(1, 6, 2\), got \(1, 6, 3\)",
        lambda: backend.multiply([A], Q, torch.empty(1, 6, 3)),
    ),
    "one result a matrix": (
        ValueError,
        "expected out to be",
        lambda: backend.multiply([A, A], Q, OUT),
    ),
    "dtype of Q": (TypeError, "Q to be float32", lambda: backend.multiply([A], Q.double(), OUT)),
    "dtype of out": (
        TypeError,
        "out to be float32",
        lambda: backend.gram([A], SQUARE[None].bfloat16()),
    ),
    "float64": (
        TypeError,
        "got float64; float64 runs on the torch backend",
        lambda: backend.gram([A.double()], SQUARE[None]),
    ),
    "mixed dtypes": (
        ValueError,
        r"expected As\[1\] to be \(6, 4\) float32 like As\[0\]",
        lambda: backend.gram([A, A.bfloat16()], SQUARE.expand(2, 4, 4)),
    ),
    "not a matrix": (
        ValueError,
        r"expected As\[0\] to be a matrix",
        lambda: backend.gram([A[None]], SQUARE[None]),
    ),
    "size of a gram": (
        ValueError,
        r"expected out to be \(1, 6, 6\)",
        lambda: backend.gram([A], SQUARE[None], side="left"),
    ),
    "side": (
        ValueError,
        "'right' or 'left', got 'up'",
        lambda: backend.gram([A], SQUARE[None], side="up"),  # type: ignore[arg-type]
    ),
    "device": (
        ValueError,
        r"expected As\[0\] on cpu beside out, got meta",
        lambda: backend.gram([A.to("meta")], SQUARE[None]),
    ),
    "device of Q": (
        ValueError,
        "expected Q on cpu beside out, got meta",
        lambda: backend.multiply([A], Q.to("meta"), OUT),
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refusals(name: str) -> None:
    kind, message, call = REFUSED[name]
    with pytest.raises(kind, match=message):
        call()
