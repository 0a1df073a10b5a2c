"""The Plan of a list of matrices that were decided one by one."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from osf_kernels.forms import matmuls
from osf_kernels.plan import Matrix, Mode, Plan, Step, coefficient_bytes


def summary(
    entries: Sequence[tuple[Matrix, Step, str, str]],
    mode: Mode,
    device: str,
    grouped: tuple[int, int],
    notes: Sequence[str] = (),
) -> Plan:
    """What a list runs, from (matrix, step, backend, why) of each.

    ``grouped`` are the calls and the bytes of workspace of the programs of grouped backends.
    """
    calls, workspace = grouped
    for x, step, name, _ in entries:
        if name == "torch":
            calls += matmuls(step.calls, step.joined)
            workspace = max(workspace, coefficient_bytes(x, step))
    return Plan(
        form=_joined(step.label for _, step, _, _ in entries) or "nothing to do",
        flops=sum(step.flops for _, step, _, _ in entries),
        bytes=sum(step.bytes for _, step, _, _ in entries),
        launches=calls,
        workspace_bytes=workspace,
        backend=_joined(backend for _, _, backend, _ in entries) or "none",
        why="; ".join(
            dict.fromkeys(f"{step.why} ({name}: {why})" for _, step, name, why in entries)
        )
        or "an empty list",
        mode=mode,
        device=device,
        matrices=tuple((x, step, backend) for x, step, backend, _ in entries),
        notes=tuple(notes),
    )


def _joined(words: Iterable[str]) -> str:
    return " + ".join(dict.fromkeys(words))
