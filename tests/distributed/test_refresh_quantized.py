"""refresh of quantized weights that processes share out: as by one, each read where it is taken."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

from osf_torch import refresh
from tests.distributed.ranks import run_ranks
from tests.small_quantized import Scaled, quantized_model, scaled


def found_by(rank: int, shared: bool) -> tuple[dict[str, torch.Tensor], int]:
    """Singular values and bases, and how often this process dequantized a weight."""
    model, _ = quantized_model(scaled)
    reads, read = [], Scaled.dequantize
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Scaled, "dequantize", lambda W: reads.append(W.shape) or read(W))
        group = dist.group.WORLD if shared else None
        options = {"progress": False, "compute_dtype": torch.float64, "group": group}
        subspaces = refresh(model, 0.5, **options)
    held = {f"{name} {part}": t for name, s in subspaces.items() for part, t in s.factors().items()}
    return held, len(reads)


@pytest.mark.slow
def test_quantized_weights_are_shared_out():
    alone, reads = found_by(0, shared=False)
    assert reads == 4, "two weights, to look for NaN and to decompose"
    for held, reads in run_ranks(2, found_by, True):
        assert reads == 3, "one of the two is decomposed elsewhere"
        assert held.keys() == alone.keys()
        assert all(torch.equal(t, alone[key]) for key, t in held.items())
