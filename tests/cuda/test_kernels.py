"""The CUDA kernels, compiled by g++ and run in the SIMT emulator, against float64."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch

from osf_kernels.backends.jobs import Coefficients, Update
from tests.emulator import draws
from tests.emulator.harness import Run, build, compiler, run

# In order, and of random schedules one with four blocks side by side; more in the full suite.
SCHEDULES = ((0, 1), pytest.param(range(2, 9), marks=pytest.mark.slow))
BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32
DTYPES = (BF16, F16, F32)
# fp16 shares bf16's loaders: what only they decide runs for it in the full suite.
QUICK_DTYPES = (BF16, pytest.param(F16, marks=pytest.mark.slow), F32)

pytestmark = pytest.mark.skipif(compiler() is None, reason="no C++ compiler (g++)")


def generator(*key: object) -> torch.Generator:
    return torch.Generator().manual_seed(sum(map(ord, str(key))))


def check_coefficients(jobs: list[Coefficients], **options: object) -> Run:
    """Every job against float64, and every seed against the first, bit for bit."""
    runs = run(jobs, **options)  # type: ignore[arg-type]
    for job in jobs:
        outputs = [out for out in (job.A, job.B) if out is not None]
        truths = draws.true_coefficients(job, torch.float64)
        eagers = draws.true_coefficients(job, F32)
        terms = draws.true_coefficients(draws.magnitude(job), torch.float64)
        for out, truth, eager, term in zip(outputs, truths, eagers, terms, strict=True):
            got = runs[0][out]
            draws.assert_as_accurate(got, truth, eager.to(out.dtype), term)
            for other in runs[1:]:
                assert torch.equal(got, other[out]), "another schedule, other bits"
    return runs[0]


def check_update(jobs: list[Update], **options: object) -> Run:
    runs = run(jobs, **options)  # type: ignore[arg-type]
    for job in jobs:
        got = runs[0][job.out]
        truth, terms = (draws.true_update(j, torch.float64) for j in (job, draws.magnitude(job)))
        draws.assert_as_accurate(got, truth, draws.true_update(job, job.out.dtype), terms)
        for other in runs[1:]:
            assert torch.equal(got, other[job.out]), "another schedule, other bits"
    return runs[0]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(131, 67, 5, 9), (70, 300, 64, 64)])
def test_coefficients(dtype: torch.dtype, shape: tuple[int, int, int, int]) -> None:
    job = draws.coefficients_job(*shape, dtype, generator(dtype, shape))
    check_coefficients([job], seeds=(0, 1, 2))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(131, 67, 5, 9), (40, 300, 40, 70)])
def test_update(dtype: torch.dtype, shape: tuple[int, int, int, int]) -> None:
    check_update([draws.update_job(*shape, dtype, generator(dtype, shape))], seeds=(0, 1, 2))


@pytest.mark.parametrize("dtype", DTYPES)
def test_one_sided(dtype: torch.dtype) -> None:
    g = generator("one-sided", dtype)
    check_coefficients(
        [
            draws.coefficients_job(70, 90, 12, None, dtype, g),
            draws.coefficients_job(70, 90, None, 12, dtype, g),
        ]
    )
    check_update(
        [
            draws.update_job(70, 90, 12, None, dtype, g),
            draws.update_job(70, 90, None, 12, dtype, g, alpha=1.0, beta=0.0),
        ]
    )


@pytest.mark.parametrize("layout", draws.LAYOUTS)
@pytest.mark.parametrize("dtype", QUICK_DTYPES)
def test_coefficients_of_every_layout(dtype: torch.dtype, layout: str) -> None:
    g = generator(dtype, layout)
    check_coefficients(
        [
            draws.coefficients_job(45, 75, 11, 6, dtype, g, layouts=(layout, "rows", "columns")),
            draws.coefficients_job(48, 80, 8, 16, dtype, g, layouts=("rows", layout, layout)),
            draws.coefficients_job(33, 42, 7, 5, dtype, g, out_layout=layout),
        ]
    )


@pytest.mark.parametrize("layout", draws.LAYOUTS)
@pytest.mark.parametrize("dtype", QUICK_DTYPES)
def test_update_of_every_layout(dtype: torch.dtype, layout: str) -> None:
    g = generator(dtype, layout)
    check_update(
        [
            draws.update_job(45, 75, 11, 6, dtype, g, layouts=(layout, "rows", "rows")),
            draws.update_job(48, 80, 8, 16, dtype, g, layouts=("rows", layout, layout)),
            draws.update_job(33, 42, 7, 5, dtype, g, out_layout=layout, addend=dtype),
            draws.update_job(
                33, 42, 7, 5, dtype, g, layouts=(layout, "columns", "columns"), out_layout="columns"
            ),
        ]
    )


def test_line_alignments_of_four_and_eight_bytes() -> None:
    """Widths whose lines are aligned to 4 and 8 bytes only: the narrow sizes of cp.async."""
    g = generator("narrow")
    coefficients = [draws.coefficients_job(37, n, 6, 12, BF16, g) for n in (42, 44)]
    coefficients += [draws.coefficients_job(37, n, 6, 3, F32, g) for n in (42, 43)]
    check_coefficients(coefficients)
    check_update([draws.update_job(37, n, 6, 12, BF16, g) for n in (42, 44)])


def test_a_list_of_every_shape_and_dtype() -> None:
    """Mixed dtypes within a job run in tf32x3; each job has the bits it has alone."""
    g = generator("mixed")
    coefficients = [
        draws.coefficients_job(90, 70, 8, 8, BF16, g),
        draws.coefficients_job(20, 200, 3, 66, F16, g),
        draws.coefficients_job(50, 60, 9, 4, BF16, g, basis_dtype=F32),
        draws.coefficients_job(50, 60, 9, 4, F16, g, basis_dtype=F32, layouts=("columns",) * 3),
        draws.coefficients_job(60, 50, 4, 9, F32, g, basis_dtype=BF16),
        draws.coefficients_job(1, 1, 1, 1, F32, g),
        draws.coefficients_job(65, 33, 10, 10, BF16, g, offset=True),
    ]
    together = check_coefficients(coefficients, multiprocessors=13)
    for job in coefficients[:3]:
        assert job.A is not None
        assert torch.equal(together[job.A], run([job], multiprocessors=13)[0][job.A])

    updates = [
        draws.update_job(90, 70, 8, 8, BF16, g),
        draws.update_job(20, 200, 3, 66, F16, g),
        draws.update_job(50, 60, 9, 4, BF16, g, basis_dtype=F32),
        draws.update_job(50, 60, 9, 4, F16, g, basis_dtype=F32, layouts=("columns",) * 3),
        draws.update_job(60, 50, 4, 9, F32, g, basis_dtype=BF16),
        draws.update_job(1, 1, 1, 1, F32, g),
        draws.update_job(30, 30, 7, 7, BF16, g, coefficient_dtype=BF16),
    ]
    together = check_update(updates, multiprocessors=2)
    assert torch.equal(together[updates[0].out], run(updates[:1])[0][updates[0].out])


@pytest.mark.parametrize(
    ("dtype", "r", "k", "reads"),
    [
        (BF16, 150, 20, 2),
        pytest.param(F16, 20, 130, 2, marks=pytest.mark.slow),
        (F32, 20, 100, 2),
    ],
)
def test_ranks_beyond_a_block(dtype: torch.dtype, r: int, k: int, reads: int) -> None:
    """x is read once more for each further block of the larger rank."""
    g = generator("rank", dtype)
    job = draws.coefficients_job(160, 150, r, k, dtype, g)
    found = check_coefficients([job]).bytes_read[id(job.x)]
    assert found == reads * job.x.numel() * job.x.element_size()
    check_update([draws.update_job(160, 150, r, k, dtype, g)])


@pytest.mark.parametrize("dtype", QUICK_DTYPES)
@pytest.mark.parametrize("shape", [(70, 45, 12), (45, 70, 12), (45, 70, 30)], ids=str)
def test_offset(dtype: torch.dtype, shape: tuple[int, int, int]) -> None:
    """B less U diag(S), and of a root A less diag(S) Vᵀ, also with S strided."""
    g = generator("offset", dtype)
    m, n, r = shape
    jobs = []
    for root in (True, False):
        job = draws.coefficients_job(m, n, r, r, dtype, g, offset=True, root=root)
        assert job.S is not None
        spread = torch.full((3 * len(job.S),), draws.NAN)[::3]
        spread.copy_(job.S)
        down = job._replace(x=job.x.mT.contiguous().mT)
        jobs += [job, job._replace(S=spread), down]
    for job in jobs:
        check_coefficients([job])
    check_coefficients([jobs[0], jobs[3]])  # in one launch


def test_coefficients_in_the_dtype_of_x() -> None:
    g = generator("out dtype")
    check_coefficients(
        [draws.coefficients_job(70, 45, 6, 9, dtype, g, out_dtype=dtype) for dtype in (BF16, F16)]
    )


@pytest.mark.parametrize("dtype", QUICK_DTYPES)
@pytest.mark.parametrize("addend", [torch.float32, None])
def test_addend_and_beta(dtype: torch.dtype, addend: torch.dtype | None) -> None:
    """beta = 0 does not read x: its NaNs stay out, and the byte counter agrees."""
    g = generator("addend", dtype, addend)
    job = draws.update_job(
        70, 45, 6, 9, dtype, g, alpha=0.5, beta=0.0, addend=addend, out_layout="rows"
    )
    job.x.fill_(draws.NAN)
    assert check_update([job]).bytes_read[id(job.x)] == 0
    for beta in (1.0, -1.0):
        check_update(
            [draws.update_job(70, 45, 6, 9, dtype, g, alpha=-2.0, beta=beta, addend=addend)]
        )


def test_no_term_at_all() -> None:
    g = generator("bare")
    check_update(
        [
            draws.update_job(30, 45, None, None, F32, g, out_layout="rows"),
            draws.update_job(30, 45, 0, 0, BF16, g, beta=0.0, addend=BF16),
            draws.update_job(30, 45, None, None, F16, g, beta=0.0),
        ]
    )


@pytest.mark.parametrize("dtype", [BF16, F16])
def test_results_are_rounded_as_torch_rounds(dtype: torch.dtype) -> None:
    """Every finite number of the dtype, the ties above each, and what lies beyond."""
    every = torch.arange(2**16, dtype=torch.int32).to(torch.int16).view(dtype).double()
    every = every[every.isfinite()]
    ties = (every[1:] + every[:-1]) / 2
    beyond = torch.tensor([65519.0, 65520.0, 1e30, -3.4e38, 1e-30, -1e-45, float("inf")])
    values = torch.cat([every, ties, ties * (1 + 2**-20), beyond]).float()
    values = torch.nn.functional.pad(values, (0, -len(values) % 512)).reshape(-1, 512)
    x = torch.zeros(values.shape, dtype=dtype)
    job = Update(x, x, None, None, None, None, 1.0, 0.0, values)
    assert torch.equal(run([job])[0][x], values.to(dtype))


@pytest.mark.parametrize("dtype", QUICK_DTYPES)
def test_empty_sides_and_ranks(dtype: torch.dtype) -> None:
    """Sums over nothing are zero less the offset; what has no elements is not touched."""
    g = generator("empty", dtype)
    check_coefficients(
        [
            draws.coefficients_job(0, 20, 0, 3, dtype, g),
            draws.coefficients_job(20, 30, 0, 3, dtype, g),
            draws.coefficients_job(20, 30, 3, 0, dtype, g),
            draws.coefficients_job(20, 30, 0, 0, dtype, g),
        ]
    )
    x, V = torch.empty(0, 20, dtype=dtype), draws.columns(20, 3, dtype, g)
    A, B = torch.full((3, 20), draws.NAN), torch.empty(0, 3)
    S = torch.ones(3)
    for offset in (None, S):
        job = Coefficients(x, torch.empty(0, 3, dtype=dtype), V, A, B, offset)
        expected = torch.zeros(3, 20) if offset is None else -V.float().mT
        assert torch.equal(run([job])[0][A], expected)
    check_update(
        [
            draws.update_job(0, 20, 0, 3, dtype, g),
            draws.update_job(20, 0, 3, 0, dtype, g),
            draws.update_job(20, 30, 0, 3, dtype, g),
        ]
    )
    assert run([draws.update_job(0, 20, 0, 3, dtype, g)])[0].launches == 0


@pytest.mark.parametrize("dtype", QUICK_DTYPES)
@pytest.mark.parametrize(
    "value", [float("nan"), float("inf"), pytest.param(-float("inf"), marks=pytest.mark.slow)]
)
def test_what_is_not_finite_stays_so(dtype: torch.dtype, value: float) -> None:
    """One bad element spoils its row of B and its column of A, and nothing else."""
    g = generator("finite", dtype)
    job = draws.coefficients_job(70, 45, 6, 9, dtype, g)
    job.x[37, 21] = value
    done = run([job])[0]
    assert job.A is not None
    assert job.B is not None
    column, row = torch.zeros(45, dtype=torch.bool), torch.zeros(70, dtype=torch.bool)
    column[21] = row[37] = True
    assert torch.equal(~done[job.A].isfinite(), column.expand(6, -1))
    assert torch.equal(~done[job.B].isfinite(), row[:, None].expand(-1, 9))

    for bad in ("x", "R1", "L1"):
        job2 = draws.update_job(70, 45, 6, 9, dtype, g)
        getattr(job2, bad)[3, 4] = value
        out = run([job2])[0][job2.out]
        spoiled = torch.zeros(70, 45, dtype=torch.bool)
        rows, columns = {"x": (3, 4), "R1": (slice(None), 4), "L1": (3, slice(None))}[bad]
        spoiled[rows, columns] = True  # type: ignore[index]
        assert torch.equal(~out.isfinite(), spoiled)


def test_fp16_coefficients_beyond_the_range_of_fp16() -> None:
    g = generator("range")
    job = draws.update_job(40, 50, 4, None, F16, g, alpha=1.0)
    assert job.R1 is not None
    assert job.L1 is not None
    job.R1.mul_(1e6 / job.R1.abs().max())
    job.L1.mul_(1e-3)
    out = run([job])[0][job.out]
    assert out.isfinite().all()
    truth = draws.true_update(job, torch.float64)
    # Both factors carry 11 bits, as fp16 does; the result is rounded to fp16 once.
    bound = 2**-10 * (job.L1.double().abs() @ job.R1.double().abs()) + 2**-10 * truth.abs()
    assert ((out.double() - truth).abs() <= bound).all()


def test_tf32_only_where_it_is_allowed() -> None:
    """Allowed, both factors are rounded to 11 bits; not allowed, the error is that of float32."""
    g = generator("tf32")
    job = draws.coefficients_job(90, 80, 8, 8, F32, g)
    assert job.A is not None
    assert job.U is not None
    truth = draws.true_coefficients(job, torch.float64)[0]
    bound = job.U.double().abs().mT @ job.x.double().abs()
    errors = [
        float(((run([job], allow_tf32=allowed)[0][job.A].double() - truth).abs() / bound).max())
        for allowed in (False, True)
    ]
    assert errors[0] <= 2**-22
    assert 2**-16 <= errors[1] <= 2**-10

    update = draws.update_job(90, 80, 8, 8, F32, g)
    truth = draws.true_update(update, torch.float64)
    strict, loose = (
        float((run([update], allow_tf32=allowed)[0][update.out].double() - truth).norm())
        for allowed in (False, True)
    )
    assert strict * 100 < loose


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_dual_form_reads_x_twice_and_writes_it_once(dtype: torch.dtype) -> None:
    g = generator("bytes", dtype)
    first = draws.coefficients_job(150, 140, 20, 24, dtype, g)
    second = draws.update_job(150, 140, 20, 24, dtype, g)
    size = first.x.numel() * first.x.element_size()
    coefficients, update = check_coefficients([first]), check_update([second])
    assert coefficients.launches == 1
    assert update.launches == 1
    read = coefficients.bytes_read[id(first.x)] + update.bytes_read[id(second.x)]
    assert read == 2 * size
    assert coefficients.bytes_written[id(first.x)] == 0
    assert update.bytes_written[id(second.x)] == size


@pytest.mark.parametrize("seeds", SCHEDULES)
def test_partial_sums_are_added_in_their_order(seeds: Sequence[int]) -> None:
    """One element of x a partial sum: a loop over them in float32 gives the same bits."""
    g = generator("order")
    m, n = 9 * 128, 5 * 32  # 9 row blocks of A's partial sums, and 5 splits of B's
    U, V = torch.zeros(m, 4), torch.zeros(n, 8)
    U[::128], V[::32] = 1.0, 1.0
    scales = torch.logspace(-3, 3, m)[torch.randperm(m, generator=g)]
    # Exact in tf32: each product, and so each partial sum, is the element itself.
    x = (torch.randn(m, n, generator=g) * scales[:, None]).bfloat16().float()
    job = Coefficients(x, U, V, torch.empty(4, n), torch.empty(m, 8))
    a, b, backwards = torch.zeros(n), torch.zeros(m), torch.zeros(n)
    for i in range(9):
        a, backwards = a + x[128 * i], backwards + x[m - 128 - 128 * i]
    for i in range(5):
        b = b + x[:, 32 * i]
    assert not torch.equal(a, backwards)
    for done in run([job], seeds=seeds, multiprocessors=45):
        assert job.A is not None
        assert job.B is not None
        assert torch.equal(done[job.A], a.expand(4, -1))
        assert torch.equal(done[job.B], b[:, None].expand(-1, 8))


@pytest.mark.parametrize("multiprocessors", [2, 40])
@pytest.mark.parametrize("seeds", SCHEDULES)
def test_blocks_in_any_order_give_the_same_bits(seeds: Sequence[int], multiprocessors: int) -> None:
    """Partial sums arrive in the order that blocks are drawn in, up to four side by side.

    Problems of several splits, of one, and of sums over nothing, on more blocks than units and
    fewer; the emulator sees to it that each call leaves its counters at zero.
    """
    g = generator("any order")
    jobs = [
        draws.coefficients_job(270, 200, 20, 24, BF16, g),
        draws.coefficients_job(20, 30, 6, 9, BF16, g),
        draws.coefficients_job(140, 150, 130, 3, BF16, g),
        draws.coefficients_job(0, 20, 0, 3, BF16, g),
        draws.coefficients_job(150, 140, 9, 9, F32, g, offset=True),
    ]
    check_coefficients(jobs, seeds=seeds, multiprocessors=multiprocessors)


@pytest.mark.slow
def test_more_matrices_than_one_launch_holds() -> None:
    g = generator("many")
    jobs = [draws.coefficients_job(9, 3 + i % 40, 2, 3, F32, g) for i in range(142)]
    assert check_coefficients(jobs[1:]).launches == 1
    assert check_coefficients(jobs, seeds=(0, 1)).launches == 2
    updates = [draws.update_job(9, 3 + i % 40, 2, 3, F32, g) for i in range(128)]
    assert check_update(updates[1:]).launches == 1
    assert check_update(updates).launches == 2


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(6))
def test_shapes_drawn_at_random(seed: int) -> None:
    g = torch.Generator().manual_seed(seed)

    def below(n: int) -> int:
        return int(torch.randint(n, (), generator=g))

    def pick(*options: str) -> str:
        return options[below(len(options))]

    coefficients, updates = [], []
    for dtype in (*DTYPES, BF16):
        m, n = 1 + below(290), 1 + below(290)
        r, k = below(min(m, 90) + 1), below(min(n, 90) + 1)
        layouts = (pick(*draws.LAYOUTS), pick(*draws.LAYOUTS), pick(*draws.LAYOUTS))
        coefficients.append(draws.coefficients_job(m, n, r, k, dtype, g, layouts=layouts))
        updates.append(draws.update_job(m, n, r, k, dtype, g, layouts=layouts))
    machine = 1 + below(40)
    check_coefficients(coefficients, seeds=(seed, seed + 7), multiprocessors=machine)
    check_update(updates, seeds=(seed, seed + 7), multiprocessors=machine)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES)
def test_under_the_sanitizers(dtype: torch.dtype) -> None:
    """Address and undefined-behaviour sanitizers see buffers of exactly the tensors' size."""
    g = generator("sanitized", dtype)
    sanitized = build(sanitize=True)
    options = {"emulator": sanitized, "seeds": (1, 3)}
    check_coefficients(
        [
            draws.coefficients_job(131, 67, 5, 9, dtype, g),
            draws.coefficients_job(75, 45, 70, 9, dtype, g, layouts=("columns",) * 3),
            draws.coefficients_job(35, 45, 7, None, dtype, g, layouts=("unaligned",) * 3),
            draws.coefficients_job(35, 45, 7, 7, dtype, g, offset=True, out_layout="strided"),
        ],
        **options,
    )
    check_update(
        [
            draws.update_job(131, 67, 5, 9, dtype, g),
            draws.update_job(45, 45, 40, 9, dtype, g, layouts=("columns",) * 3, addend=dtype),
            draws.update_job(35, 45, 7, None, dtype, g, layouts=("unaligned",) * 3),
        ],
        **options,
    )
