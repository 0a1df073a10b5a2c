"""The CUDA kernels on a device."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
import torch
from torch import Tensor

from osf_kernels.backends import cuda
from osf_kernels.backends.jobs import Coefficients, Update
from tests.cuda.test_nvcc import CSRC, nvcc
from tests.emulator import draws, factorizations

BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32
DTYPES = (BF16, F16, F32)
# Tensor cores cut off, and do not round, what they add to an accumulator: over the 64 steps of
# the longest sum here (K = 1030) the error may grow to a few roundings of the sum of all terms.
ROUNDINGS = 8.0

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(60)]


@pytest.fixture(autouse=True)
def extension() -> None:
    reason = cuda.unavailable_reason()
    if reason is not None:
        pytest.skip(reason)


def to_device(job: draws.JobT) -> draws.JobT:
    """The job on the GPU in the same memory layout."""
    moved: dict[int, Tensor] = {}

    def move(a: object) -> object:
        if not isinstance(a, Tensor):
            return a
        if id(a) not in moved:
            storage = torch.empty(0, dtype=a.dtype).set_(a.untyped_storage())
            moved[id(a)] = storage.cuda().as_strided(a.shape, a.stride(), a.storage_offset())
        return moved[id(a)]

    return type(job)(*map(move, job))  # type: ignore[arg-type]


def check_coefficients(jobs: list[Coefficients], on_device: list[Coefficients]) -> None:
    for job, device_job in zip(jobs, on_device, strict=True):
        outputs = [out.cpu() for out in (device_job.A, device_job.B) if out is not None]
        truths = draws.true_coefficients(job, torch.float64)
        eagers = draws.true_coefficients(job, F32)
        terms = draws.true_coefficients(draws.magnitude(job), torch.float64)
        for out, truth, eager, term in zip(outputs, truths, eagers, terms, strict=True):
            draws.assert_as_accurate(out, truth, eager.to(out.dtype), term, ROUNDINGS)


def check_update(jobs: list[Update], on_device: list[Update]) -> None:
    for job, device_job in zip(jobs, on_device, strict=True):
        truth, terms = (draws.true_update(j, torch.float64) for j in (job, draws.magnitude(job)))
        eager = draws.true_update(job, job.out.dtype)
        draws.assert_as_accurate(device_job.out.cpu(), truth, eager, terms, ROUNDINGS)


def mixed_coefficients() -> list[Coefficients]:
    g = torch.Generator().manual_seed(11)
    jobs = [
        draws.coefficients_job(m, n, r, k, dtype, g, layouts=(layout, "rows", "columns"))
        for dtype in DTYPES
        for layout in draws.LAYOUTS
        for m, n, r, k in ((700, 333, 40, 64), (65, 1030, 60, 150))
    ]
    jobs += [draws.coefficients_job(300, 200, 16, None, dtype, g) for dtype in DTYPES]
    jobs += [draws.coefficients_job(300, 200, None, 16, dtype, g) for dtype in DTYPES]
    jobs += [draws.coefficients_job(300, 200, 16, 16, dtype, g, offset=True) for dtype in DTYPES]
    jobs += [draws.coefficients_job(300, 200, 16, 8, BF16, g, basis_dtype=F32)]
    return jobs


def mixed_updates() -> list[Update]:
    g = torch.Generator().manual_seed(12)
    jobs = [
        draws.update_job(m, n, r, k, dtype, g, layouts=(layout, "rows", "columns"))
        for dtype in DTYPES
        for layout in draws.LAYOUTS
        for m, n, r, k in ((700, 333, 40, 64), (65, 1030, 60, 150))
    ]
    jobs += [draws.update_job(300, 200, 16, None, dtype, g, beta=0.0) for dtype in DTYPES]
    jobs += [draws.update_job(300, 200, None, 16, dtype, g, addend=F32) for dtype in DTYPES]
    jobs += [draws.update_job(300, 200, 16, 8, BF16, g, basis_dtype=F32, out_layout="columns")]
    return jobs


def test_a_mixed_list_of_coefficients() -> None:
    jobs = mixed_coefficients()
    on_device = [to_device(job) for job in jobs]
    cuda.coefficients(on_device)
    check_coefficients(jobs, on_device)


def test_a_mixed_list_of_updates() -> None:
    jobs = mixed_updates()
    on_device = [to_device(job) for job in jobs]
    cuda.update(on_device)
    check_update(jobs, on_device)


def test_two_runs_and_a_loop_agree_bit_for_bit() -> None:
    jobs = mixed_coefficients()
    lists = [[to_device(job) for job in jobs] for _ in range(3)]
    cuda.coefficients(lists[0])
    cuda.coefficients(lists[1])
    for job in lists[2]:
        cuda.coefficients([job])
    for one, two, alone in zip(*lists, strict=True):
        for name in ("A", "B"):
            first = getattr(one, name)
            if first is not None:
                assert torch.equal(first, getattr(two, name))
                assert torch.equal(first, getattr(alone, name))


def test_a_stream_that_is_not_the_default() -> None:
    g = torch.Generator().manual_seed(13)
    job = draws.coefficients_job(2000, 1500, 64, 64, BF16, g)
    device_job = to_device(job)
    source = device_job.x.clone()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        device_job.x.zero_()
        torch.cuda._sleep(50_000_000)
        device_job.x.copy_(source)
        cuda.coefficients([device_job])
    torch.cuda.current_stream().wait_stream(stream)
    check_coefficients([job], [device_job])


def test_capture_in_a_graph_and_replay() -> None:
    g = torch.Generator().manual_seed(14)
    first = draws.coefficients_job(500, 400, 32, 48, BF16, g)
    second = draws.update_job(500, 400, 32, 48, BF16, g, out_layout="rows")
    on_device = to_device(first), to_device(second)
    cuda.coefficients([on_device[0]])
    cuda.update([on_device[1]])
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        cuda.coefficients([on_device[0]])
        cuda.update([on_device[1]])
    x = draws.randn(500, 400, dtype=BF16, generator=g)
    on_device[0].x.copy_(x)
    on_device[1].x.copy_(x)
    graph.replay()
    torch.cuda.synchronize()
    check_coefficients([first._replace(x=x)], [on_device[0]])
    check_update([second._replace(x=x)], [on_device[1]])


def assert_equal_coefficients(one: Coefficients, other: Coefficients) -> None:
    for got, expected in ((one.A, other.A), (one.B, other.B)):
        assert got is not None
        assert expected is not None
        assert torch.equal(got, expected)


def test_streams_side_by_side() -> None:
    """Calls that run at the same time share no counter, and each leaves its own as it was."""
    g = torch.Generator().manual_seed(15)
    jobs = [to_device(draws.coefficients_job(900, 1300, 40, 40, BF16, g)) for _ in range(4)]
    for job in jobs:
        cuda.coefficients([job])
    expected = [job._replace(A=job.A.clone(), B=job.B.clone()) for job in jobs]  # type: ignore[union-attr]
    streams = [torch.cuda.Stream() for _ in jobs]
    torch.cuda.synchronize()
    for _ in range(20):
        for stream, job in zip(streams, jobs, strict=True):
            with torch.cuda.stream(stream):
                job.A.zero_()  # type: ignore[union-attr]
                cuda.coefficients([job])
    torch.cuda.synchronize()
    for job, right in zip(jobs, expected, strict=True):
        assert_equal_coefficients(job, right)


def test_a_graph_beside_the_stream_it_was_captured_on() -> None:
    g = torch.Generator().manual_seed(16)
    captured, eager = (
        to_device(draws.coefficients_job(900, 1300, 40, 40, BF16, g)) for _ in range(2)
    )
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        cuda.coefficients([captured, eager])
    expected = [job._replace(A=job.A.clone(), B=job.B.clone()) for job in (captured, eager)]  # type: ignore[union-attr]
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        cuda.coefficients([captured])
    for _ in range(20):
        graph.replay()
        with torch.cuda.stream(stream):
            cuda.coefficients([eager])
    torch.cuda.synchronize()
    assert_equal_coefficients(captured, expected[0])
    assert_equal_coefficients(eager, expected[1])


def test_a_matrix_of_more_than_two_to_the_31_elements() -> None:
    """Row and column offsets beyond 32 bits: the far corner is as right as the near one.

    B is one sum of 31000 products in an accumulator that truncates at each of 1938 steps: so
    simulated it is off by 4.4e-5 of its size, where a wrong offset would be off by all of it.
    """
    m, n, r = 70_000, 31_000, 8
    free, _ = torch.cuda.mem_get_info()
    needed = 2 * 2 * m * n + 4 * 600 * n * r
    if free < needed:
        pytest.skip(f"needs {needed / 2**30:.0f} GiB of free GPU memory")
    x = torch.randn(m, n, device="cuda", dtype=BF16)
    U, V = (
        torch.randn(m, r, device="cuda", dtype=BF16),
        torch.randn(n, r, device="cuda", dtype=BF16),
    )
    A, B = torch.empty(r, n, device="cuda"), torch.empty(m, r, device="cuda")
    cuda.coefficients([Coefficients(x, U, V, A, B)])
    columns, rows = slice(n - 50, n), slice(m - 50, m)
    true_A = U.double().mT @ x[:, columns].double()
    true_B = x[rows].double() @ V.double()
    assert (A[:, columns] - true_A).norm() <= 1e-5 * true_A.norm()
    assert (B[rows] - true_B).norm() <= 2e-4 * true_B.norm()

    out = torch.empty_like(x)
    cuda.update([Update(out, x, U, A, None, None, -1.0, 1.0)])
    truth = x[rows, columns].double() - U[rows].double() @ A[:, columns].double()
    assert (out[rows, columns].double() - truth).norm() <= 1e-2 * truth.norm()


def test_a_failed_call_is_named() -> None:
    from osf_kernels import _cuda  # type: ignore[attr-defined]

    with pytest.raises(RuntimeError, match=r"cudaSetDevice failed|cudaDeviceGetAttribute.* failed"):
        _cuda.update(b"", 9999, False, 0)
    with pytest.raises(ValueError, match="expected records of"):
        _cuda.update(b"12345", 0, False, 0)


def has_image(folder: Path, number: str) -> bool:
    """Whether a build of csrc/ for one capability, without PTX, can run on the current device."""
    program, built = folder / "probe.cpp", folder / "probe"
    program.write_text('#include "api.h"\nint main() { return osf::image_error() != 0; }\n')
    command = [str(nvcc()), "-std=c++17", "-I", str(CSRC), "-o", str(built)]
    command += [f"-gencode=arch=compute_{number},code=sm_{number}"]
    command += [str(program), str(CSRC / "build_info.cu")]
    subprocess.run(command, check=True, capture_output=True, timeout=60)
    return subprocess.run([str(built)], check=False, timeout=60).returncode == 0


@pytest.mark.skipif(nvcc() is None, reason="nvcc was not found")
def test_a_build_for_another_architecture_is_told(tmp_path: Path) -> None:
    major, minor = torch.cuda.get_device_capability()
    assert has_image(tmp_path, f"{major}{minor}")
    assert not has_image(tmp_path, "80" if major != 8 else "90")


def assert_equal_factors(one: tuple[Tensor, ...], other: tuple[Tensor, ...]) -> None:
    for x, y in zip(one, other, strict=True):
        assert torch.equal(x, y)


@pytest.mark.parametrize("condition", [10.0, 1e6])
@pytest.mark.parametrize("l", [1, 2, 17, 64, 200, 0])
def test_inverse_factors(l: int, condition: float) -> None:
    """Up to the largest that fits (0 stands for it), also as a batch of transposed views."""
    l = l or cuda.largest_cholesky(torch.device("cuda"))
    G = factorizations.gram(5, l, condition, torch.Generator().manual_seed(l))
    inverse, info = cuda.cholesky_inverse(G.cuda())
    assert inverse.is_contiguous()
    factorizations.assert_inverse_factors(G, inverse.cpu(), info.cpu())
    symmetric = (G.triu() + G.triu(1).mT).cuda()
    assert_equal_factors(cuda.cholesky_inverse(symmetric.mT), (inverse, info))
    assert_equal_factors(cuda.cholesky_inverse(symmetric[2:3]), (inverse[2:3], info[2:3]))


def test_inverse_factors_of_what_is_not_positive_definite() -> None:
    l = 50
    G = factorizations.gram(6, l, 10.0, torch.Generator().manual_seed(21)).cuda()
    G[1, 7, 7] = -1.0
    G[2, 30, 30] = draws.NAN
    G[3, 0, 49] = float("inf")
    G[4, 40, 3] = draws.NAN  # below the diagonal
    inverse, info = cuda.cholesky_inverse(G)
    assert info.tolist() == [0, 8, 31, 50, 0, 0]
    assert inverse[1:4].isnan().all()
    good = [0, 4, 5]
    factorizations.assert_inverse_factors(G[good].cpu(), inverse[good].cpu(), info[good].cpu())


@pytest.mark.parametrize(("p", "l"), [(1, 1), (2, 2), (33, 33), (300, 40), (150, 150), (0, 0)])
def test_jacobi(p: int, l: int) -> None:
    """Up to the largest square that fits (0 stands for it), whose V is outside shared memory."""
    p = p or cuda.largest_jacobi(torch.device("cuda"))
    l = l or p
    M = torch.randn(4, p, l, generator=torch.Generator().manual_seed(l))
    U, S, V, info = cuda.jacobi_svd(M.cuda())
    factorizations.assert_svd(M, U.cpu(), S.cpu(), V.cpu(), info.cpu())
    strided = M.cuda().mT.contiguous().mT
    assert_equal_factors(cuda.jacobi_svd(strided), (U, S, V, info))
    assert_equal_factors(cuda.jacobi_svd(M[1:2].cuda()), (U[1:2], S[1:2], V[1:2], info[1:2]))


@pytest.mark.parametrize("l", [6, 40, 180])
def test_jacobi_of_awkward_matrices(l: int) -> None:
    cases = factorizations.awkward_matrices(l, torch.Generator().manual_seed(l))
    M = torch.stack(list(cases.values()))
    U, S, V, info = (x.cpu() for x in cuda.jacobi_svd(M.cuda()))
    factorizations.assert_svd(M, U, S, V, info, list(cases))


def test_jacobi_of_what_is_not_finite() -> None:
    M = torch.randn(3, 20, 20, generator=torch.Generator().manual_seed(22))
    M[0, 3, 3], M[2, 19, 19] = draws.NAN, float("inf")
    U, S, V, info = (x.cpu() for x in cuda.jacobi_svd(M.cuda()))
    assert info.tolist() == [-1, 0, -1]
    assert all(x[[0, 2]].isnan().all() for x in (U, S, V))
    factorizations.assert_svd(M[1:2], U[1:2], S[1:2], V[1:2], info[1:2])


def test_factorizations_of_a_large_batch_and_of_none() -> None:
    G = factorizations.gram(1, 12, 10.0, torch.Generator().manual_seed(23)).cuda()
    inverse, info = cuda.cholesky_inverse(G.expand(70_000, -1, -1))
    assert torch.equal(inverse, inverse[:1].expand_as(inverse))
    assert not info.any()
    U, S, V, info = cuda.jacobi_svd(G.expand(70_000, -1, -1))
    assert all(torch.equal(x, x[:1].expand_as(x)) for x in (U, S, V))
    assert not info.any()
    assert cuda.cholesky_inverse(G[:0])[0].shape == (0, 12, 12)
    assert [tuple(x.shape) for x in cuda.jacobi_svd(G[:, :5, :0])] == [
        (1, 5, 0),
        (1, 0),
        (1, 0, 0),
        (1,),
    ]


def test_factorizations_on_a_stream_and_in_a_graph() -> None:
    G = factorizations.gram(3, 60, 10.0, torch.Generator().manual_seed(24)).cuda()
    expected = cuda.cholesky_inverse(G), cuda.jacobi_svd(G)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        late = torch.zeros_like(G)
        torch.cuda._sleep(50_000_000)
        late.copy_(G)
        found = cuda.cholesky_inverse(late), cuda.jacobi_svd(late)
    torch.cuda.current_stream().wait_stream(stream)
    for one, other in zip(found, expected, strict=True):
        assert_equal_factors(one, other)

    source = torch.eye(60, device="cuda").repeat(3, 1, 1)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = cuda.cholesky_inverse(source), cuda.jacobi_svd(source)
    source.copy_(G)
    graph.replay()
    torch.cuda.synchronize()
    for one, other in zip(found, expected, strict=True):
        assert_equal_factors(one, other)


def test_factorizations_that_do_not_fit_are_refused() -> None:
    device = torch.device("cuda")
    l = cuda.largest_cholesky(device) + 1
    with pytest.raises(ValueError, match=rf"l <= {l - 1}, which fits .*, got \(1, {l}, {l}\)"):
        cuda.cholesky_inverse(torch.eye(l, device="cuda")[None])
    l = cuda.largest_jacobi(device) + 1
    with pytest.raises(ValueError, match=rf"l <= {l - 1} for p={l}, .*use torch.linalg.svd"):
        cuda.jacobi_svd(torch.eye(l, device="cuda")[None])
    assert cuda.largest_jacobi(device, square=False, rows=10 * l) < l - 1
    optin = torch.cuda.get_device_properties(device).shared_memory_per_block_optin
    known = {232448: (340, 240), 166912: (288, 203)}
    if optin in known:
        assert (cuda.largest_cholesky(device), cuda.largest_jacobi(device)) == known[optin]
