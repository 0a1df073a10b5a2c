"""The projection's Triton kernel on a GPU: float64 parity, determinism, streams, graphs, 64-bit
offsets. Those of the products in float32 accuracy are in ``test_gpu_products``."""

from __future__ import annotations

from array import array

import pytest
import torch

import osf_kernels
from osf_kernels.backends import triton as backend
from osf_kernels.backends.jobs import Coefficients, Update
from osf_kernels.backends.triton import configs
from osf_kernels.ops._names import Names
from tests.helpers import generator_for, randn
from tests.lists import SPLIT, Entry, List, small_workspace_serves
from tests.triton.jobs import assert_coefficients, assert_update

launch = pytest.importorskip("osf_kernels.backends.triton.launch", exc_type=ImportError)

pytestmark = pytest.mark.gpu

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
PRECISIONS = ("tf32x3", "tf32", "ieee")
# Large and small, wide and tall, aligned and odd, below and beyond the rank block.
SHAPES = [
    ((1024, 1024), (64, 64)),
    ((4096, 384), (16, 24)),
    ((384, 4096), (100, 130)),
    ((257, 1031), (33, 7)),
    ((64, 64), (8, 8)),
    ((3000, 2049), (200, 0)),
]


@pytest.fixture(autouse=True)
def _usable() -> None:
    reason = backend.unavailable_reason(torch.device("cuda"))
    if reason is not None:
        pytest.skip(reason)


def on_device(job: Coefficients) -> Coefficients:
    return Coefficients(*(None if t is None else t.cuda() for t in job))  # type: ignore[arg-type]


def draw(
    shape: tuple[int, int],
    ranks: tuple[int, int],
    dtype: torch.dtype,
    g: torch.Generator,
    *,
    offset: bool = False,
) -> Coefficients:
    (m, n), (r, k) = shape, ranks
    job = Coefficients(
        randn(m, n, dtype=dtype, generator=g),
        randn(m, r, dtype=dtype, generator=g),
        randn(n, k, dtype=dtype, generator=g),
        torch.full((r, n), torch.nan),
        torch.full((m, k), torch.nan),
        torch.rand(r, generator=g) + 0.5 if offset else None,
    )
    return on_device(job)


def update_of(job: Coefficients) -> Update:
    assert job.V is not None
    return Update(job.x, job.x, job.U, job.A, job.B, job.V.mT, -1.0, 1.0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("precision", PRECISIONS)
def test_list_of_mixed_shapes(dtype: torch.dtype, precision: str) -> None:
    g = generator_for("gpu", dtype, precision)
    jobs = [draw(shape, ranks, dtype, g) for shape, ranks in SHAPES]
    backend.coefficients(jobs, float32_precision=precision)
    for job in jobs:
        assert_coefficients(job, precision)
    before = [job.x.clone() for job in jobs]
    updates = [update_of(job) for job in jobs]
    backend.update(updates, float32_precision=precision)
    for update, x in zip(updates, before, strict=True):
        assert_update(update, x, precision)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_padded_rows(dtype: torch.dtype) -> None:
    """Ragged ranks in rows of whole vectors, whose padding holds NaN and stays as it is."""

    def padded(t: torch.Tensor | None) -> torch.Tensor | None:
        if t is None or t.dim() < 2:
            return t
        wide = torch.full((t.shape[0], -(-t.shape[1] // 8) * 8 + 8), torch.nan, device="cuda")
        return wide.to(t.dtype)[:, : t.shape[1]].copy_(t)

    g = generator_for("gpu padded", dtype)
    drawn = [draw((512, 768), ranks, dtype, g) for ranks in ((77, 100), (20, 13), (301, 5))]
    jobs = [Coefficients(*map(padded, job)) for job in drawn]  # type: ignore[arg-type]
    backend.coefficients(jobs)
    for job in jobs:
        assert_coefficients(job, "tf32x3")
    before = [job.x.clone() for job in jobs]
    updates = [update_of(job) for job in jobs]
    backend.update(updates)
    for update, x in zip(updates, before, strict=True):
        assert_update(update, x, "tf32x3")
        for t in (update.out, update.L2):
            assert t is not None
            rows, columns = t.shape
            beside = t.as_strided((rows, t.stride(0) - columns), t.stride(), columns)
            assert bool(beside.isnan().all())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_offset(dtype: torch.dtype) -> None:
    """Less U diag(S) and V diag(S), of rows and of columns, up to a block's rank and beyond."""
    g = generator_for("gpu offset", dtype)
    for ranks in ((32, 32), (64, 64), (200, 200)):
        jobs = [draw((1500, 900), ranks, dtype, g, offset=True)]
        assert jobs[0].A is not None
        assert jobs[0].B is not None
        columns = jobs[0].x.mT.contiguous().mT
        A, B = torch.empty_like(jobs[0].A), torch.empty_like(jobs[0].B)
        jobs.append(jobs[0]._replace(x=columns, A=A, B=B))
        backend.coefficients(jobs)
        for job in jobs:
            assert_coefficients(job, "tf32x3")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_same_bits_again_and_updates_in_a_loop(dtype: torch.dtype) -> None:
    """Sums of a list are split otherwise than a loop's; what is updated from them is the same."""
    g = generator_for("gpu bits", dtype)
    jobs = [draw(shape, ranks, dtype, g) for shape, ranks in SHAPES]
    inputs = [job.x.clone() for job in jobs]
    outcomes = []
    for batches in ([jobs], [jobs], [[job] for job in jobs]):
        for job, x in zip(jobs, inputs, strict=True):
            job.x.copy_(x)
        backend.coefficients(jobs)
        for batch in batches:
            backend.update([update_of(job) for job in batch])
        outcomes.append([t.clone() for job in jobs for t in (job.x, job.A, job.B) if t is not None])
    for other in outcomes[1:]:
        assert all(map(torch.equal, outcomes[0], other))
    for job, x in zip(jobs, inputs, strict=True):
        job.x.copy_(x)
        backend.coefficients([job])
        assert_coefficients(job, "tf32x3")


def test_non_finite_values_stay() -> None:
    g = generator_for("gpu nan")
    for dtype in DTYPES:
        for value in (torch.nan, torch.inf):
            job = draw((300, 200), (16, 16), dtype, g)
            job.x[37, 21] = value
            backend.coefficients([job])
            assert job.A is not None
            assert not bool(job.A[:, 21].isfinite().any())
            backend.update([update_of(job)])
            assert not bool(job.x[:, 21].isfinite().any())


@pytest.mark.parametrize("warm", [True, False])
def test_graph_capture_and_replay(warm: bool) -> None:
    """Replays follow new contents of the same tensors, whether or not the call had run before."""
    g = generator_for("gpu graph", warm)
    # Compiles kernels, which a capture can't.
    compiled = [draw((512, 640), (32, 48), torch.bfloat16, g)]
    backend.coefficients(compiled)
    backend.update([update_of(compiled[0])])
    job = draw((512, 640), (32, 48), torch.bfloat16, g)
    original = job.x.clone()
    if warm:
        backend.coefficients([job])
        backend.update([update_of(job)])
        job.x.copy_(original)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        backend.coefficients([job])
        backend.update([update_of(job)])
    for _ in range(3):
        fresh = torch.randn_like(original)
        job.x.copy_(fresh)
        graph.replay()
        torch.cuda.synchronize()
        assert_coefficients(job._replace(x=fresh))
        assert_update(update_of(job), fresh)


def test_records_of_a_capture_are_those_of_a_copy() -> None:
    """To the bit, also beyond the integers that a double holds."""
    device = torch.device("cuda")
    driver = launch.Driver()
    records = array("q", [0, 1, -1, 2**53 + 1, -(2**53) - 1, 2**63 - 1, -(2**63), 2**47 + 3])
    driver.upload(records, device, True)  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = driver.upload(records, device, True)
    for _ in range(2):
        captured.fill_(7)
        graph.replay()
        assert captured.tolist() == records.tolist()
    assert driver.upload(records, device, False).tolist() == records.tolist()


def test_stream_of_the_caller() -> None:
    """Work follows the current stream's order: a slow fill before it is seen."""
    g = generator_for("gpu stream")
    job = draw((1024, 768), (32, 32), torch.bfloat16, g)
    fresh = torch.randn_like(job.x)
    job.x.fill_(torch.nan)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)
        job.x.copy_(fresh)
        backend.coefficients([job])
        backend.update([update_of(job)])
    torch.cuda.current_stream().wait_stream(stream)
    assert_coefficients(job._replace(x=fresh))
    assert_update(update_of(job), fresh)


def test_sums_of_calls_in_flight_on_several_streams() -> None:
    """Programs of three calls share the processors, some wait for parts: the bits stay the same."""
    g = generator_for("gpu streams")
    jobs = [draw((4096, 512 + 64 * i), (24, 32), torch.bfloat16, g) for i in range(3)]
    expected = []
    for job in jobs:
        backend.coefficients([job])
        assert job.A is not None
        assert job.B is not None
        expected.append((job.A.clone(), job.B.clone()))
        job.A.fill_(torch.nan)
        job.B.fill_(torch.nan)
    torch.cuda.synchronize()
    streams = [torch.cuda.Stream() for _ in jobs]
    for _ in range(200):
        for stream, job in zip(streams, jobs, strict=True):
            with torch.cuda.stream(stream):
                backend.coefficients([job])
    torch.cuda.synchronize()
    for job, (A, B) in zip(jobs, expected, strict=True):
        assert job.A is not None
        assert job.B is not None
        assert torch.equal(job.A, A)
        assert torch.equal(job.B, B)


def test_repeated_call_copies_nothing() -> None:
    """The second call of a prepared list with the same tensors finds its records on the device."""
    case = List(SPLIT, "gpu cache", device="cuda")
    with osf_kernels.use_backend("triton"):
        prepared = case.prepare()
    grads = case.draw()
    prepared.project_(grads)
    # acc_events: torch 2.11 warns without it. A profiled call is the operator's, not the list's.
    names = Names("project_many_", "grads")
    activities = [torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities, acc_events=True) as profile:
        prepared.run_project_(names, grads)
        torch.cuda.synchronize()
    events = [event.key for event in profile.key_averages()]
    assert any("projection_kernel" in key for key in events)
    assert not [key for key in events if "Memcpy" in key]


def test_search_leaves_the_tensors_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OSF_AUTOTUNE", "1")
    g = generator_for("gpu autotune")
    job = draw((700, 900), (40, 40), torch.bfloat16, g)
    before = job.x.clone()
    backend.coefficients([job])
    assert_coefficients(job)
    assert torch.equal(job.x, before)
    backend.update([update_of(job)])
    assert_update(update_of(job), before)


@pytest.mark.slow
def test_more_than_two_to_the_31_elements() -> None:
    """Offsets beyond 2³¹ elements: the last rows are right, checked in float64 by the row."""
    m, n, r = 2**16 + 64, 2**15 + 256, 16
    needed_bytes = 2 * m * n * 2
    free_bytes = torch.cuda.mem_get_info()[0]
    if free_bytes < needed_bytes * 1.25:
        pytest.skip(f"needs {needed_bytes >> 30} GiB of free device memory")
    assert m * n > 2**31
    x = torch.randn(m, n, dtype=torch.bfloat16, device="cuda")
    U = torch.randn(m, r, dtype=torch.bfloat16, device="cuda")
    V = torch.randn(n, r, dtype=torch.bfloat16, device="cuda")
    A = torch.full((r, n), torch.nan, device="cuda")
    B = torch.full((m, r), torch.nan, device="cuda")
    backend.coefficients([Coefficients(x, U, V, A, B)])
    tail, last = slice(m - 64, m), slice(n - 64, n)
    assert_coefficients(Coefficients(x[tail], None, V, None, B[tail].clone()))
    assert_coefficients(Coefficients(x[:, last], U, None, A[:, last].clone(), None))
    before = x[tail].clone()
    backend.update([Update(x, x, U, A, B, V.mT, -1.0, 1.0)])
    assert_update(Update(x[tail], before, U[tail], A, B[tail], V.mT, -1.0, 1.0), before)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_pinned_config_of_this_device(dtype: torch.dtype) -> None:
    """Whatever the rules choose among, forced in turn, at ranks up to the block and beyond."""
    g = generator_for("gpu configs", dtype)
    architecture = launch.architecture(torch.device("cuda"))
    maths = ("bfloat16",) if dtype == torch.bfloat16 else ("tf32", "float32")
    for math, config in configs.shipped(architecture):
        if math not in maths:
            continue
        precision = "tf32" if (math, dtype) == ("tf32", torch.float32) else "tf32x3"
        options = {"config": config, "float32_precision": precision}
        for rank in (24, config.block_r + 8):
            job = draw((1000, 776), (rank, 32), dtype, g)
            backend.coefficients([job], **options)  # type: ignore[arg-type]
            assert_coefficients(job, precision)
            before = job.x.clone()
            backend.update([update_of(job)], **options)  # type: ignore[arg-type]
            assert_update(update_of(job), before, precision)


# Long enough for sums to be split; in a list that runs through many tasks.
LONG = ((2048, 192), (192, 2048), (768, 640))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_whole_projections_with_every_pinned_config_of_this_device(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every step of a list in one launch, parts of sums and what corrects them included."""
    for math, config in configs.shipped(launch.architecture(torch.device("cuda"))):
        if (math == "bfloat16") != (dtype == torch.bfloat16):
            continue
        monkeypatch.setattr(configs, "projection_config", lambda *_, found=config: found)
        ranks = ((24, 16), (config.block_r + 8, 40))
        entries = [Entry(shape, dtype, "high high", r) for shape in LONG for r in ranks]
        case = List(entries, f"gpu whole {config}", device="cuda", factor=4.0)
        with osf_kernels.use_backend("triton"):
            prepared = case.prepare()
            grads = case.draw()
            before = [x.clone() for x in grads]
            prepared.project_(grads)
        case.assert_projected(grads, before)


@pytest.mark.parametrize("wide", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_matrices_beside_fit_every_pinned_config(dtype: torch.dtype, wide: bool) -> None:
    """Dense protected parts, of the weights' dtype or of float32, at ranks of every block."""
    architecture = launch.architecture(torch.device("cuda"))
    ranks = sorted({config.block_r for _, config in configs.shipped(architecture)})
    entries = [Entry((768, 640), dtype, "high high", (r, r)) for r in (*ranks, 2 * ranks[-1])]
    case = List(entries, f"gpu beside {wide}", device="cuda", factor=4.0)
    dense, pinned = case.dense()
    weights = case.draw()
    before = [x.clone() for x in weights]
    with osf_kernels.use_backend("triton"):
        case.prepare().restore_(weights, protected=[H.float() if wide else H for H in dense])
    case.assert_restored(weights, before, pinned)


def test_a_projection_in_flight_on_several_streams() -> None:
    """Programs of three calls share the processors; tasks of each wait for others of their own."""
    g = generator_for("gpu projections on streams")
    xs = [randn(2048, 512 + 64 * i, dtype=torch.bfloat16, generator=g).cuda() for i in range(3)]
    bases = []
    for x in xs:
        for size in x.shape:
            gaussian = torch.randn(size, 32, generator=g)
            bases.append(torch.linalg.qr(gaussian).Q.bfloat16().contiguous().cuda())
    with osf_kernels.use_backend("triton"):
        expected = [
            osf_kernels.project(x, bases[2 * i], bases[2 * i + 1]) for i, x in enumerate(xs)
        ]
        torch.cuda.synchronize()
        streams = [torch.cuda.Stream() for _ in xs]
        for _ in range(100):
            found = []
            for i, (stream, x) in enumerate(zip(streams, xs, strict=True)):
                with torch.cuda.stream(stream):
                    found.append(osf_kernels.project(x, bases[2 * i], bases[2 * i + 1]))
            torch.cuda.synchronize()
            for actual, wanted in zip(found, expected, strict=True):
                assert torch.equal(actual, wanted)


@pytest.mark.parametrize("limit", [1, 1 << 20])
def test_matrices_in_turns_through_a_small_workspace(limit: int) -> None:
    """What waits for memory waits for tasks before it alone: calls return, and with the same bits
    as where each matrix has memory of its own."""
    entries = [Entry((640, 512), torch.bfloat16, "high high", (24, 16)) for _ in range(24)]
    case = List(entries, f"gpu turns {limit}", device="cuda", factor=4.0)
    with osf_kernels.use_backend("triton"):
        small_workspace_serves(case, limit, 2)
