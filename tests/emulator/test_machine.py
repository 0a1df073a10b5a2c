"""The emulator's gates bite: a fault planted in a copy of a kernel is seen."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from osf_kernels.backends.jobs import Coefficients, Update
from tests.emulator import draws, factorizations
from tests.emulator.harness import EmulatorError, Run, build, compiler, run

pytestmark = pytest.mark.skipif(compiler() is None, reason="no C++ compiler (g++)")

SEEDS = tuple(range(1, 9))
BARRIER = "__syncthreads();"
WAIT = "ptx::cp_async_wait<STAGES - 2>();"
COUNT = "    count_written(params.counters, static_cast<int>(&p - params.problem));\n"


def without(text: str, nth: int) -> Callable[[str], str]:
    """Drops the nth occurrence of a piece of the source."""

    def mutate(source: str) -> str:
        parts = source.split(text)
        assert nth + 1 < len(parts), f"expected {nth + 1} of {text!r}, found {len(parts) - 1}"
        return text.join(parts[: nth + 1]) + text.join(["", *parts[nth + 1 :]])[len(text) :]

    return mutate


def replaced(old: str, new: str) -> Callable[[str], str]:
    def mutate(source: str) -> str:
        assert source.count(old) == 1, f"expected one {old!r}, found {source.count(old)}"
        return source.replace(old, new)

    return mutate


def moved(text: str, before: str) -> Callable[[str], str]:
    def mutate(source: str) -> str:
        return replaced(before, text + before)(replaced(text, "")(source))

    return mutate


def coefficients_job() -> Coefficients:
    """Two row blocks of several tiles each, on one multiprocessor: every stage is reused."""
    g = torch.Generator().manual_seed(1)
    return draws.coefficients_job(260, 300, 20, 24, torch.bfloat16, g)


def update_job() -> Update:
    """Two tiles of more chunks than stages, in float32: both factors come by cp.async.

    Six chunks: the last one's stage lies where write_out's scratch does.
    """
    g = torch.Generator().manual_seed(2)
    return draws.update_job(140, 100, 100, 40, torch.float32, g)


def mistakes(job: Coefficients | Update, **mutation: object) -> list[str]:
    """What goes wrong under each seed that something goes wrong under."""
    emulator = build(**mutation)  # type: ignore[arg-type]
    found = []
    for seed in SEEDS:
        try:
            done = run([job], seeds=(seed,), emulator=emulator, multiprocessors=1)[0]  # type: ignore[arg-type]
        except EmulatorError as error:
            found.append(str(error))
            continue
        if isinstance(job, Coefficients):
            assert job.A is not None
            assert job.B is not None
            truths = draws.true_coefficients(job, torch.float64)
            pairs = list(zip((done[job.A], done[job.B]), truths, strict=True))
        else:
            pairs = [(done[job.out], draws.true_update(job, torch.float64))]
        if any(not (got.double() - truth).norm() < 1e-2 * truth.norm() for got, truth in pairs):
            found.append("wrong result")
        if len(found) == 2:
            break
    return found


@pytest.mark.parametrize("job", [coefficients_job(), update_job()], ids=["coefficients", "update"])
def test_the_kernels_as_they_are_make_no_mistake(job: Coefficients | Update) -> None:
    assert mistakes(job) == []


@pytest.mark.slow
@pytest.mark.parametrize("nth", [0, 1, 2])
def test_coefficients_needs_each_barrier(nth: int) -> None:
    mutation = {"coefficients.cuh": without(BARRIER, nth)}
    assert mistakes(coefficients_job(), mutations=mutation, only="inst/coefficients_bf16_64.cu")


def split_job() -> Coefficients:
    """Several row blocks, each in several splits, and more units of sums than blocks."""
    g = torch.Generator().manual_seed(5)
    return draws.coefficients_job(600, 300, 24, 8, torch.bfloat16, g)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("file", "mutation"),
    [
        (
            "ordered.cuh",
            replaced(
                "  ptx::fence();\n  ptx::increment(counters + kWritten",
                "  ptx::increment(counters + kWritten",
            ),
        ),
        (
            "ordered.cuh",
            replaced("ptx::increment(counters + kWritten + problem)", "(void)(counters + problem)"),
        ),
        ("ordered.cuh", replaced("< units) ptx::pause();", "< units - 1) ptx::pause();")),
        ("ordered.cuh", replaced("wait_until_written(params.counters, problem, ", "(void)(")),
        ("ordered.cuh", replaced("i < kWritten + problems;", "i < kWritten + 0 * problems;")),
        ("ordered.cuh", replaced("static_cast<int>(gridDim.x) - 1) return;", "0) return;")),
        (
            "coefficients.cuh",
            replaced(
                "for (;;) {\n    const int unit = ptx::load_shared(claimed);",
                "for (int unit = blockIdx.x;; unit += gridDim.x) {",
            ),
        ),
        ("coefficients.cuh", moved(COUNT, "    tell_unit(claimed, next);\n")),
        ("coefficients.cuh", without(BARRIER, 0)),
        ("ordered.cuh", without(BARRIER, 0)),
    ],
    ids=[
        "no fence",
        "no count",
        "a count short",
        "no wait",
        "counters kept",
        "counters reset early",
        "units of blocks that may not run",
        "counted before the barrier",
        "no barrier after the claim",
        "no barrier after the wait",
    ],
)
def test_sums_need_every_step_of_their_order(file: str, mutation: Callable[[str], str]) -> None:
    """Of what lets one block read the partial sums of others, in the same launch."""
    emulator = build(mutations={file: mutation}, only="inst/coefficients_bf16_64.cu")
    job = split_job()
    right = run([job], seeds=(0,), multiprocessors=8)[0]
    for seed in SEEDS:
        try:
            for done in run([job], seeds=(seed, seed), emulator=emulator, multiprocessors=8):
                if not equal(job, done, right):
                    return
        except EmulatorError:
            return
    pytest.fail("no schedule shows it")


def equal(job: Coefficients, one: Run, other: Run) -> bool:
    assert job.A is not None
    assert job.B is not None
    return all(torch.equal(one[out], other[out]) for out in (job.A, job.B))


@pytest.mark.slow
def test_partial_sums_in_another_order_have_other_bits() -> None:
    """As if they were added as they arrive: from the slice that the block's number says."""
    order = replaced(
        "(slice + j) * slice_quads)", "((slice + j + blockIdx.x) % s.slices) * slice_quads)"
    )
    emulator = build(mutations={"ordered.cuh": order}, only="inst/coefficients_bf16_64.cu")
    job = split_job()
    right = run([job], seeds=(0,), multiprocessors=8)[0]
    assert not equal(job, run([job], emulator=emulator, multiprocessors=8)[0], right)


@pytest.mark.slow
@pytest.mark.parametrize("nth", [0, 1, 2])
def test_update_needs_each_barrier(nth: int) -> None:
    mutation = {"update.cuh": without(BARRIER, nth)}
    assert mistakes(update_job(), mutations=mutation, only="inst/update_tf32x3.cu")


@pytest.mark.slow
@pytest.mark.parametrize("nth", [0, 1])
def test_update_needs_each_warp_barrier(nth: int) -> None:
    mutation = {"update.cuh": without("__syncwarp();", nth)}
    assert mistakes(update_job(), mutations=mutation, only="inst/update_tf32x3.cu")


@pytest.mark.slow
def test_a_sum_kept_in_the_tensor_cores_is_less_than_float32() -> None:
    """They truncate: of a long product's sum, kept in, more is lost than float32 sums lose."""

    def kept_in(source: str) -> str:
        apart = replaced("float apart[4] = {};", "float (&apart)[4] = d;")
        return replaced("d[i] += apart[i];", "(void)i;")(apart(source))

    emulator = build(mutations={"mma_traits.cuh": kept_in}, only="inst/update_tf32x3.cu")
    g = torch.Generator().manual_seed(6)
    job = draws.update_job(40, 300, 40, 70, torch.float32, g)
    truth, terms = (draws.true_update(j, torch.float64) for j in (job, draws.magnitude(job)))
    eager = draws.true_update(job, torch.float32)
    draws.assert_as_accurate(run([job])[0][job.out], truth, eager, terms)
    with pytest.raises(AssertionError, match="error"):
        draws.assert_as_accurate(run([job], emulator=emulator)[0][job.out], truth, eager, terms)


def factorization_job(kernel: str) -> factorizations.CholeskyJob | factorizations.JacobiJob:
    """More rows than a warp, more warps than one, and columns of zeros to complete."""
    g = torch.Generator().manual_seed(3)
    if kernel == "cholesky":
        return factorizations.cholesky_job(factorizations.gram(1, 45, 100.0, g))
    M = torch.randn(1, 75, 20, generator=g)
    M[:, :, 4:13] = 0
    return factorizations.jacobi_job(M)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kernel", "file", "only", "nth"),
    [
        ("cholesky", "cholesky.cu", "cholesky.cu", 1),
        ("jacobi", "triangular.cuh", "inst/jacobi_*.cu", 2),
        ("jacobi", "jacobi.cuh", "inst/jacobi_*.cu", 1),
        ("jacobi", "jacobi.cuh", "inst/jacobi_*.cu", 6),
    ],
)
def test_factorizations_need_their_barriers(kernel: str, file: str, only: str, nth: int) -> None:
    """Without one some schedule has other bits, or the machine stops it."""
    job = factorization_job(kernel)
    right = run([job], seeds=(0,))[0]
    mutated = build(mutations={file: without(BARRIER, nth)}, only=only)
    found = 0
    for seed in SEEDS:
        try:
            done = run([job], seeds=(seed,), emulator=mutated)[0]
            found += any(not torch.equal(done[out], right[out]) for out in job[1:])
        except EmulatorError:
            found += 1
    assert found > 0


@pytest.mark.slow
def test_sweeps_that_do_not_suffice_are_reported() -> None:
    """Two sweeps: their number is in info, for a matrix that needs more, and U has its columns."""
    few = build(mutations={"jacobi.cuh": replaced("kSweeps = 30;", "kSweeps = 2;")}, only="inst/j*")
    g = torch.Generator().manual_seed(4)
    job = factorizations.jacobi_job(torch.stack([torch.randn(16, 16, generator=g), torch.eye(16)]))
    done = run([job], emulator=few)[0]
    assert done[job.info].tolist() == [2, 0]
    assert all(done[out].isfinite().all() for out in job[1:])


@pytest.mark.slow
@pytest.mark.parametrize("change", ["", "ptx::cp_async_wait<STAGES - 1>();"])
@pytest.mark.parametrize(
    ("file", "only", "job"),
    [
        ("coefficients.cuh", "inst/coefficients_bf16_64.cu", coefficients_job()),
        ("update.cuh", "inst/update_tf32x3.cu", update_job()),
    ],
    ids=["coefficients", "update"],
)
def test_no_wait_for_copies(file: str, only: str, job: Coefficients | Update, change: str) -> None:
    """Dropped, or one group short."""
    assert mistakes(job, mutations={file: replaced(WAIT, change)}, only=only)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("mutation", "message"),
    [
        (replaced(WAIT, f"{WAIT} if (threadIdx.x < 32) {BARRIER}"), "divergent barrier"),
        (replaced(WAIT, f"{WAIT} if (threadIdx.x == 5) __syncwarp();"), "divergent"),
        (replaced("kStages = 4;", "kStages = 40;"), "bytes of shared memory, the machine has"),
        (replaced("? kPipelineBytes : kScratchBytes;", "? 128 : 128;"), "outside shared memory"),
    ],
    ids=["barrier", "warp", "shared memory", "too little shared memory"],
)
def test_what_no_machine_would_run(mutation: Callable[[str], str], message: str) -> None:
    emulator = build(mutations={"update.cuh": mutation}, only="inst/update_tf32x3.cu")
    with pytest.raises(EmulatorError, match=message):
        run([update_job()], emulator=emulator)


@pytest.mark.slow
def test_padded_rows_come_in_16_bytes_whatever_their_width() -> None:
    """Where copies of 16 bytes bring zeros, bases of padded rows are zero, and no others."""
    copy = "ptx::cp_async<16>(shared, global, valid * size);"
    zeros = {"tile.cuh": replaced(copy, "ptx::cp_async<16>(shared, global, 0 * valid * size);")}
    emulator = build(mutations=zeros, only="inst/coefficients_bf16_64.cu")
    for layout in ("padded", "unaligned"):
        g = torch.Generator().manual_seed(7)
        layouts = ("unaligned", layout, layout)
        job = draws.coefficients_job(70, 90, 13, 11, torch.bfloat16, g, layouts=layouts)
        assert job.A is not None
        assert job.B is not None
        done = run([job], emulator=emulator)[0]
        for got, truth in zip(
            (done[job.A], done[job.B]), draws.true_coefficients(job, torch.float64), strict=True
        ):
            expected = torch.zeros_like(truth) if layout == "padded" else truth
            assert float((got.double() - expected).norm()) <= 1e-2 * float(truth.norm())


# One line more than the matrix has.
BEYOND = replaced("row0, rank0, p.m, p.rank[term]", "row0, rank0, p.m + 1, p.rank[term]")


def test_a_planted_out_of_bounds_read() -> None:
    mutated = build(mutations={"update.cuh": BEYOND}, only="inst/update_tf32x3.cu")
    with pytest.raises(EmulatorError, match="outside every buffer"):
        run([update_job()], emulator=mutated)


@pytest.mark.slow
def test_the_sanitizer_sees_a_planted_out_of_bounds_read() -> None:
    mutated = build(sanitize=True, mutations={"update.cuh": BEYOND}, only="inst/update_tf32x3.cu")
    with pytest.raises(EmulatorError, match="AddressSanitizer: heap-buffer-overflow"):
        run([update_job()], emulator=mutated)
