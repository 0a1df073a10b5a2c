"""The search behind OSF_AUTOTUNE=1: what it tries, what it keeps, what it must not touch."""

from __future__ import annotations

import threading
from collections.abc import Callable

import pytest
import torch

from osf_kernels.backends.chains import Chain, chain_of_job
from osf_kernels.backends.jobs import Coefficients, Update
from osf_kernels.backends.operands import Operand
from osf_kernels.backends.triton import autotune, configs


class Unusable(Exception):
    """Stands for a candidate that does not compile."""


PINNED = configs.projection_config("sm_90", "bfloat16", 64)


def test_takes_the_fastest_and_remembers_it() -> None:
    wanted = configs.candidates(PINNED)[3]
    tried: list[configs.Config] = []

    def timer(run: Callable[[], None]) -> float:
        run()
        return 1.0 if tried[-1] == wanted else 2.0

    tuner = autotune.Tuner(timer)
    assert tuner.choose("key", PINNED, lambda: tried.append) == wanted
    assert tried == configs.candidates(PINNED)
    assert tuner.choose("key", PINNED, lambda: pytest.fail("searched again")) == wanted
    assert tuner.choose("other", PINNED, lambda: tried.append) == wanted
    assert len(tried) == 2 * len(configs.candidates(PINNED))


def test_candidates_have_whole_steps_in_a_part_of_c() -> None:
    """A part is of as many rows as a tile: a step beyond them would read the next tile's."""
    for architecture in configs.ARCHITECTURES:
        for aligned in (True, False):
            for _, config in configs.shipped(architecture, aligned):
                for row in configs.candidates(config):
                    assert isinstance(row, configs.Projection)
                    assert row.block_q % row.block_k == 0, (architecture, row)


def test_skips_what_does_not_compile() -> None:
    def run(config: configs.Config) -> None:
        if config != PINNED._replace(num_warps=4):
            raise Unusable

    def timer(run: Callable[[], None]) -> float:
        run()
        return 5.0

    tuner = autotune.Tuner(timer, unusable=(Unusable,))
    assert tuner.choose("key", PINNED, lambda: run) == PINNED._replace(num_warps=4)


def test_other_failures_are_not_swallowed() -> None:
    def run(config: configs.Config) -> None:
        raise RuntimeError("device lost")

    def timer(run: Callable[[], None]) -> float:
        run()
        return 1.0

    with pytest.raises(RuntimeError, match="device lost"):
        autotune.Tuner(timer, unusable=(Unusable,)).choose("key", PINNED, lambda: run)


def test_falls_back_to_the_pinned_config() -> None:
    def timer(run: Callable[[], None]) -> float:
        raise Unusable

    tuner = autotune.Tuner(timer, unusable=(Unusable,))
    assert tuner.choose("key", PINNED, lambda: lambda config: None) == PINNED


def test_candidates_are_a_short_list_with_the_pinned_config_first() -> None:
    for architecture in configs.ARCHITECTURES:
        shipped: list[configs.Config] = [config for _, config in configs.shipped(architecture)]
        for dtype in ("bfloat16", "float16", "float32"):
            shipped += configs.shipped_products(architecture, dtype)
        for config in shipped:
            found = configs.candidates(config)
            assert found[0] == config
            assert len(found) == len(set(found)) <= 8


def test_buckets() -> None:
    assert [autotune.bucket(size) for size in (0, 1, 2, 3, 64, 65, 4096)] == [
        *(0, 1, 2, 4, 64, 128, 4096)
    ]


def tensors_of(chain: Chain) -> list[torch.Tensor]:
    return [t for link in chain for t in link.step if isinstance(t, torch.Tensor)]


def test_scratch_shares_no_memory() -> None:
    x = torch.randn(12, 10).mT
    U, V = torch.randn(10, 3), torch.randn(1, 2).expand(12, 2)
    A, B = torch.randn(3, 12), torch.randn(10, 2)
    sums = chain_of_job(Coefficients(x, U, V, A, B))
    update = chain_of_job(Update(x, x, U, A, B, V.mT, -1.0, 1.0))
    mine = {t.untyped_storage().data_ptr() for t in (x, U, V, A, B)}

    def scratch_of(chain: Chain) -> Chain:
        copies, arena = autotune.scratch_chain(chain, torch.device("cpu"))
        assert arena.bytes == 0
        for t, copy in zip(tensors_of(chain), tensors_of(copies), strict=True):
            assert copy.untyped_storage().data_ptr() not in mine
            assert (copy.shape, copy.stride(), copy.dtype) == (t.shape, t.stride(), t.dtype)
            assert torch.equal(copy, t)
        return copies

    (link,) = scratch_of(update)
    step = link.step
    assert isinstance(step, Update)
    assert step.out.data_ptr() == step.x.data_ptr(), "in place as the job is"
    assert (step.alpha, step.beta, step.addend) == (-1.0, 1.0, None)
    # A matrix that two sums read is one, so that the second finds it in L2.
    first, second = (link.step for link in scratch_of(sums))
    assert first.x is not None
    assert second.x is not None
    assert first.x.data_ptr() == second.x.data_ptr()


def test_median_of_times() -> None:
    calls: list[None] = []
    assert autotune.time_ms(lambda: calls.append(None)) >= 0.0
    assert len(calls) == 6


def test_a_search_runs_its_candidates_inside_the_call_it_is_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A search is part of planning a call, so that it launches while that call has begun."""
    dispatch = pytest.importorskip("osf_kernels.backends.triton.dispatch", exc_type=ImportError)
    monkeypatch.setenv("OSF_AUTOTUNE", "1")
    launched: list[str] = []

    class Driver(dispatch.launch.Driver):  # type: ignore[name-defined, misc]
        def launch(self, kernel: object, grid: object, *_: object, **options: object) -> None:
            launched.append(str(options["num_warps"]))

    tuner = autotune.Tuner(lambda run: float(run() or 1))
    monkeypatch.setattr(dispatch, "_tuner", lambda: tuner)
    monkeypatch.setattr(dispatch.launch, "driver", Driver())
    x, V = torch.randn(64, 32), torch.randn(32, 8)
    jobs = [Coefficients(x, None, V, None, torch.empty(64, 8))]
    call = (jobs, None, None)
    thread = threading.Thread(target=dispatch.run_jobs, args=call, daemon=True)
    thread.start()
    thread.join(timeout=20)
    assert not thread.is_alive(), "the search waits for its own call"
    pinned = configs.projection_config("sm_80", "float32", 8)
    assert len(launched) == len(configs.candidates(pinned)) + 1


def test_scratch_of_operands_is_in_place_where_the_job_is() -> None:
    """One place behind two arguments isn't one memory."""
    device = torch.device("cpu")
    like = torch.empty(8, 6)
    x, other = (Operand.like(like, argument) for argument in (1, 2))
    assert x.data_ptr() == other.data_ptr()
    for out, in_place in ((x, True), (x.mT.mT, True), (other, False)):
        chain = chain_of_job(Update(out, x, None, None, None, None, 1.0, 1.0))
        ((link,), _) = autotune.scratch_chain(chain, device)
        step = link.step
        assert isinstance(step, Update)
        assert (step.out.data_ptr() == step.x.data_ptr()) == in_place
        assert step.out.device == device


def test_chains_of_like_sizes_share_a_choice() -> None:
    """What takes about as long: the same steps and dtypes, sizes of the same powers of two."""

    def key(m: int, n: int, r: int, dtype: torch.dtype = torch.bfloat16) -> object:
        def matrix(rows: int, columns: int, dtype: torch.dtype = dtype) -> torch.Tensor:
            return torch.empty(rows, columns, dtype=dtype, device="meta")

        A, B = matrix(r, n, torch.float32), matrix(m, r, torch.float32)
        chain = chain_of_job(Coefficients(matrix(m, n), matrix(m, r), matrix(n, r), A, B))
        return autotune.key_of_chain(chain)

    like = key(1000, 600, 60)
    assert hash(like) == hash(key(1024, 1000, 64))
    assert like == key(1024, 1000, 64)
    for other in (key(1025, 600, 60), key(1000, 600, 32), key(1000, 600, 60, torch.float32)):
        assert like != other
