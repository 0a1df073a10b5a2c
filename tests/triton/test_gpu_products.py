"""A Q, Aᵀ Q, Aᵀ A and A Aᵀ on a GPU: as accurate as float32, whatever torch's matmul precision."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

import pytest
import torch
from torch import Tensor

from osf_kernels.backends import triton as backend
from osf_kernels.backends.triton import configs
from osf_kernels.testing import assert_error_within
from tests.helpers import generator_for, randn
from tests.triton.jobs import assert_gram, assert_multiply

pytestmark = pytest.mark.gpu

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
SIDES: tuple[Literal["right", "left"], ...] = ("right", "left")
# Aligned and odd, wide and tall, with a split sum and without.
SHAPES = [(1024, 1024), (4096, 136), (136, 4096), (257, 1031), (64, 64)]


@pytest.fixture(autouse=True, params=["ieee", "tf32"])
def _usable(request: pytest.FixtureRequest) -> Iterator[None]:
    """Every test runs with TF32 permitted too: it must not reach these products."""
    reason = backend.unavailable_reason(torch.device("cuda"))
    if reason is not None:
        pytest.skip(reason)
    matmul = torch.backends.cuda.matmul
    before = matmul.fp32_precision
    matmul.fp32_precision = request.param
    yield
    matmul.fp32_precision = before


def peer(left: Tensor, right: Tensor) -> Tensor:
    """torch's float32 product, in IEEE float32."""
    matmul = torch.backends.cuda.matmul
    before = matmul.fp32_precision
    matmul.fp32_precision = "ieee"
    try:
        return left.float() @ right.float()
    finally:
        matmul.fp32_precision = before


def draw(
    shape: tuple[int, int], batch: int, dtype: torch.dtype, g: torch.Generator
) -> list[Tensor]:
    return [randn(*shape, dtype=dtype, generator=g).cuda() for _ in range(batch)]


def check_multiply(
    As: list[Tensor], Q: Tensor, transpose: bool, config: configs.Multiply | None = None
) -> Tensor:
    left = torch.stack([A.mT if transpose else A for A in As])
    out = torch.full((len(As), left.shape[1], Q.shape[2]), torch.nan, device="cuda")
    backend.multiply(As, Q, out, transpose=transpose, config=config)
    truth = left.double() @ Q.double()
    assert_multiply(As, Q, out, transpose, "tf32x3")
    assert_error_within(out, truth, peer(left, Q.expand(len(As), -1, -1)), scale=truth)
    return out


def check_gram(
    As: list[Tensor], side: Literal["right", "left"], config: configs.Gram | None = None
) -> Tensor:
    left = torch.stack([A.mT if side == "right" else A for A in As])
    out = torch.full((len(As), left.shape[1], left.shape[1]), torch.nan, device="cuda")
    backend.gram(As, out, side=side, config=config)
    truth = left.double() @ left.double().mT
    assert_gram(As, out, side, "tf32x3")
    assert_error_within(out, truth, peer(left, left.mT), scale=truth)
    return out


@pytest.mark.parametrize("transpose", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_multiply(dtype: torch.dtype, transpose: bool) -> None:
    g = generator_for("gpu multiply", dtype, transpose)
    for shape in SHAPES:
        As = draw(shape, 3, dtype, g)
        columns = [A.mT.contiguous().mT for A in As]
        for width in (1, 64, 70, 200):
            rows = shape[0] if transpose else shape[1]
            shared = torch.randn(1, rows, width, generator=g).cuda()
            check_multiply(As, shared, transpose)
            check_multiply(columns, torch.randn(3, rows, width, generator=g).cuda(), transpose)


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gram(dtype: torch.dtype, side: Literal["right", "left"]) -> None:
    g = generator_for("gpu gram", dtype, side)
    for shape in SHAPES:
        As = draw(shape, 3, dtype, g)
        check_gram(As, side)
        check_gram([A.mT.contiguous().mT for A in As], side)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_long_sums_of_one_sign(dtype: torch.dtype) -> None:
    """What truncation in the tensor cores would bias most: sums that only grow."""
    g = generator_for("gpu long", dtype)
    As = [torch.rand(32768, 64, generator=g).to(dtype).cuda() for _ in range(2)]
    check_gram(As, "right")
    check_multiply(As, torch.rand(1, 32768, 16, generator=g).cuda(), True)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_pieces_hold_every_bit(dtype: torch.dtype) -> None:
    g = generator_for("gpu bits", dtype)
    exponents = torch.randint(127 - 100, 255, (1, 128, 64), generator=g, dtype=torch.int32)
    mantissas = torch.randint(0, 2**23, (1, 128, 64), generator=g, dtype=torch.int32)
    Q = ((exponents << 23) | mantissas).view(torch.float32).cuda()
    Q[:, ::2] *= -1
    Q[0, 0, 0] = torch.finfo(torch.float32).max
    out = torch.empty(1, 128, 64, device="cuda")
    backend.multiply([torch.eye(128, dtype=dtype, device="cuda")], Q, out)
    assert torch.equal(out, Q)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_ill_scaled(dtype: torch.dtype) -> None:
    g = generator_for("gpu scales", dtype)
    decades = 3 if dtype == torch.float16 else 8
    scale = torch.logspace(-decades, decades, 512)[:, None]
    A = (torch.randn(512, 640, generator=g) * scale).to(dtype).cuda()
    Q = torch.randn(1, 640, 24, generator=g) * torch.logspace(8, -8, 24)
    out, square = torch.empty(1, 512, 24).cuda(), torch.empty(1, 512, 512).cuda()
    backend.multiply([A], Q.cuda(), out)
    assert_multiply([A], Q.cuda(), out, False, "tf32x3")
    backend.gram([A], square, side="left")
    assert_gram([A], square, "left", "tf32x3")


def test_non_finite_values_stay() -> None:
    g = generator_for("gpu non-finite")
    for dtype in DTYPES:
        for value in (torch.nan, torch.inf):
            (A,) = draw((300, 200), 1, dtype, g)
            A[37, 21] = value
            out, square = torch.empty(1, 300, 24).cuda(), torch.empty(1, 200, 200).cuda()
            backend.multiply([A], torch.randn(1, 200, 24, generator=g).cuda(), out)
            backend.gram([A], square)
            assert not bool(out[0, 37].isfinite().any())
            assert not bool(square[0, 21].isfinite().any())
            assert not bool(square[0, :, 21].isfinite().any())
            out[0, 37] = square[0, 21] = square[0, :, 21] = 0.0
            assert bool(out.isfinite().all())
            assert bool(square.isfinite().all())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_same_bits_in_a_list_a_loop_and_again(dtype: torch.dtype) -> None:
    g = generator_for("gpu product bits", dtype)
    As = draw((4096, 136), 3, dtype, g)
    Q = torch.randn(3, 136, 40, generator=g).cuda()
    out, square = check_multiply(As, Q, False), check_gram(As, "right")
    assert torch.equal(check_multiply(As, Q, False), out)
    assert torch.equal(check_gram(As, "right"), square)
    for i, A in enumerate(As):
        assert torch.equal(check_multiply([A], Q[i : i + 1], False)[0], out[i])
        assert torch.equal(check_gram([A], "right")[0], square[i])


@pytest.mark.filterwarnings("ignore:Synchronization debug mode:UserWarning")
def test_stream_of_the_caller_and_no_synchronization() -> None:
    """Work follows the current stream: a slow fill before it is seen, and nothing waits for it."""
    g = generator_for("gpu product stream")
    (A,) = draw((1024, 768), 1, torch.bfloat16, g)
    Q = torch.randn(1, 768, 32, generator=g).cuda()
    out, square = torch.empty(1, 1024, 32).cuda(), torch.empty(1, 768, 768).cuda()
    backend.multiply([A], Q, out)  # compiles, and uploads the launches' records
    backend.gram([A], square)
    fresh = torch.randn_like(A)
    A.fill_(torch.nan)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    try:
        torch.cuda.set_sync_debug_mode("error")
        with torch.cuda.stream(stream):
            torch.cuda._sleep(50_000_000)
            A.copy_(fresh)
            backend.multiply([A], Q, out)
            backend.gram([A], square)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    torch.cuda.current_stream().wait_stream(stream)
    assert_multiply([A], Q, out, False)
    assert_gram([A], square, "right")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_pinned_config_of_this_device(dtype: torch.dtype) -> None:
    """Whatever the rules choose among, forced in turn, aligned and not."""
    from osf_kernels.backends.triton import launch

    g = generator_for("gpu product configs", dtype)
    architecture = launch.architecture(torch.device("cuda"))
    name = str(dtype).removeprefix("torch.")
    for aligned, shape in ((True, (1000, 776)), (False, (1001, 775))):
        As = draw(shape, 2, dtype, g)
        Q = torch.randn(1, shape[1], 72, generator=g).cuda()
        for config in configs.shipped_products(architecture, name, aligned):
            if isinstance(config, configs.Multiply):
                check_multiply(As, Q, False, config)
            elif isinstance(config, configs.Gram):
                check_gram(As, "right", config)
                check_gram(As, "left", config)


@pytest.mark.slow
def test_more_than_two_to_the_31_elements() -> None:
    """Offsets beyond 2³¹ elements: the last rows and columns are right."""
    m, n = 2**16 + 64, 2**15 + 256
    needed_bytes = 2 * m * n
    free_bytes = torch.cuda.mem_get_info()[0]
    if free_bytes < needed_bytes * 1.25:
        pytest.skip(f"needs {needed_bytes * 5 // 4 >> 30} GiB of free device memory")
    assert m * n > 2**31
    A = torch.randn(m, n, dtype=torch.bfloat16, device="cuda")
    Q = torch.randn(1, n, 16, device="cuda")
    out = torch.full((1, m, 16), torch.nan, device="cuda")
    backend.multiply([A], Q, out)
    assert_multiply([A[-64:]], Q, out[:, -64:], False)
    Q = torch.randn(1, m, 16, device="cuda")
    out = torch.full((1, n, 16), torch.nan, device="cuda")
    backend.multiply([A], Q, out, transpose=True)
    assert_multiply([A[:, -64:]], Q, out[:, -64:], True)
