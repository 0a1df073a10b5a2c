"""Backend "cuda" on CPU tensors: its kernels in the emulator, in place of the extension's."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Sequence

from torch import Tensor

from osf_kernels.backends import cuda
from osf_kernels.backends.cuda.slices import SlicedProgram
from osf_kernels.backends.jobs import Coefficients, Job, Problem, Update
from tests.emulator.harness import run
from tests.helpers import Memory


class Emulated:
    """The entry points of the CUDA backend on CPU tensors, counting what they do."""

    def __init__(self) -> None:
        self.launches = 0
        self.read: Counter[int] = Counter()
        self.written: Counter[int] = Counter()

    def coefficients(self, jobs: Sequence[Coefficients]) -> None:
        self._run(jobs)

    def update(self, jobs: Sequence[Update]) -> None:
        self._run(jobs)

    def program(
        self, problems: Sequence[Problem], limit: int, *, kept: int, halves: bool
    ) -> SlicedProgram:
        assert problems[0].x.device.type == "cpu"
        return SlicedProgram(
            problems,
            limit,
            lambda stages: EmulatedProgram(stages, self),
            cuda.parts_bytes,
            halves=halves,
        )

    def _run(self, jobs: Sequence[Coefficients] | Sequence[Update]) -> None:
        done = run(jobs, seeds=(5,), multiprocessors=6)[0]
        self.launches += done.launches
        for tensor in {id(t): t for job in jobs for t in job if isinstance(t, Tensor)}.values():
            address = tensor.data_ptr()
            self.read[address] += done.bytes_read[id(tensor)]
            self.written[address] += done.bytes_written[id(tensor)]
        for job in jobs:
            outputs = (job.A, job.B) if isinstance(job, Coefficients) else (job.out,)
            for out in outputs:
                if out is not None:
                    out.copy_(done[out])


class EmulatedProgram:
    """Stages of jobs, whose operands are tensors once a call says where."""

    parts_bytes = 0

    def __init__(self, stages: Sequence[Sequence[Job]], kernels: Emulated) -> None:
        self._stages, self._kernels = stages, kernels

    def run(self, addresses: Sequence[int]) -> None:
        memory = Memory(itertools.chain.from_iterable(self._stages), addresses)
        for stage in self._stages:
            sums = [memory.tensors(job) for job in stage if isinstance(job, Coefficients)]
            updates = [memory.tensors(job) for job in stage if isinstance(job, Update)]
            if sums:
                self._kernels.coefficients(sums)
            if updates:
                self._kernels.update(updates)
