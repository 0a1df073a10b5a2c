"""Rows, CSV files that carry machine and versions, and plain-text tables."""

from __future__ import annotations

import csv
import datetime as dt
import importlib.metadata
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch

from bench.contenders import OURS

ROOT = Path(__file__).resolve().parent.parent


@dataclass
class Row:
    """One contender of one case. None stands for a figure that was not measured."""

    case: str = ""
    model: str = ""
    layers: int | None = None
    matrices: int | None = None
    elements: int | None = None
    rank: str = ""
    dtype: str = ""
    mode: str = ""
    device: str = ""
    contender: str = ""
    spans: str = ""
    form: str = ""
    backend: str = ""
    status: str = ""
    median_ms: float | None = None
    p20_ms: float | None = None
    p80_ms: float | None = None
    rounds: int | None = None
    times_naive: float | None = None
    times_hand_ordered: float | None = None
    times_compiled: float | None = None
    bound: str = ""
    bound_ms: float | None = None
    roofline_fraction: float | None = None
    copy_gb_per_s: float | None = None
    gemm_tflop_per_s: float | None = None
    error: float | None = None
    error_bound: float | None = None
    leak: float | None = None
    extra_bytes: int | None = None

    def describe(
        self, case: str, model: str, layers: int | None, dtype: str, mode: str, device: str
    ) -> None:
        self.case, self.model, self.layers = case, model, layers
        self.dtype, self.mode, self.device = dtype, mode, device


def cpu_name() -> str:
    """The processor's own name, or the machine type where the system doesn't tell."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def version(distribution: str) -> str:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return ""


def commit() -> str:
    """The checkout's commit, with + where bench or library differ from it; empty without git."""

    def git(*arguments: str) -> str:
        return subprocess.run(
            ["git", "-C", str(ROOT), *arguments],
            capture_output=True,
            text=True,
            check=True,
            timeout=20,
        ).stdout.strip()

    try:
        head = git("rev-parse", "--short=12", "HEAD")
        changed = git("status", "--porcelain", "--", "osf_kernels", "csrc", "bench/*.py")
    except (OSError, subprocess.SubprocessError):
        return ""
    return head + ("+" if changed else "")


def environment(device: torch.device) -> dict[str, str]:
    """Machine and versions, the same for every row of a run."""
    import osf_kernels

    gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    return {
        "date": dt.datetime.now(dt.timezone.utc).strftime("%Y-%m-%d"),
        "commit": commit(),
        "cpu": cpu_name(),
        "cores": str(os.cpu_count() or ""),
        "threads": str(torch.get_num_threads()),
        "gpu": gpu,
        "cuda": torch.version.cuda or "",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": version("triton"),
        "osf_kernels": osf_kernels.__version__,
    }


ENVIRONMENT_FIELDS = (
    "date",
    "commit",
    "cpu",
    "cores",
    "threads",
    "gpu",
    "cuda",
    "python",
    "torch",
    "triton",
    "osf_kernels",
)


def columns(kind: type) -> tuple[str, ...]:
    """Of a file whose rows are of a dataclass ``kind``: its fields, then the environment."""
    return tuple(f.name for f in fields(kind)) + ENVIRONMENT_FIELDS


FIELDS = columns(Row)


def cell(value: object) -> str:
    """A CSV cell: four significant digits of a float, empty for None."""
    if value is None:
        return ""
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def is_new(path: Path, kind: type) -> bool:
    """Whether a file has no rows yet. Raises ValueError where its columns aren't ``kind``'s."""
    if not path.exists() or path.stat().st_size == 0:
        return True
    with path.open(newline="") as file:
        header = tuple(next(csv.reader(file)))
    if header != columns(kind):
        raise ValueError(f"bench: {path} has other columns than this version writes; move it")
    return False


def append_csv(path: Path, rows: Iterable[Any], where: Mapping[str, str], kind: type = Row) -> None:
    """Append rows, dataclasses of one ``kind``, with a header where the file is new.

    Raises ValueError where the file was written with other columns.
    """
    names = columns(kind)
    path.parent.mkdir(parents=True, exist_ok=True)
    fresh = is_new(path, kind)
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, names, lineterminator="\n")
        if fresh:
            writer.writeheader()
        for row in rows:
            values = {name: cell(value) for name, value in asdict(row).items()}
            writer.writerow(values | {name: where[name] for name in ENVIRONMENT_FIELDS})


def read_csv(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def table(header: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """Columns padded to their widest cell, the first one to the left, the others to the right."""
    widths = [max(len(line[i]) for line in (header, *lines)) for i in range(len(header))]

    def text(line: Sequence[str]) -> str:
        cells = [
            value.ljust(width) if i == 0 else value.rjust(width)
            for i, (value, width) in enumerate(zip(line, widths, strict=True))
        ]
        return "  ".join(cells).rstrip()

    return "\n".join([text(header), text(["-" * w for w in widths]), *map(text, lines)])


def shown(value: float | None, pattern: str) -> str:
    return "-" if value is None else format(value, pattern)


def failed(row: Row) -> bool:
    """A wrong result of anyone, or a backend of ours that was asked for and can't run."""
    return row.status.startswith("wrong") or (
        row.status.startswith("unavailable") and row.contender.startswith(OURS)
    )


# What a summary has room for, column -> header, of files with these columns.
SHORT = (
    {
        "case": "case",
        "dtype": "dtype",
        "rank": "rank",
        "contender": "contender",
        "config": "config",
        "device_ms": "device ms",
        "host_hit_ms": "host ms, hit",
        "host_miss_ms": "miss",
        "exposed_rounds": "exposed",
        "status": "status",
    },
    {
        "case": "case",
        "contender": "contender",
        "median_ms": "median ms",
        "times_naive": "x naive",
        "times_hand_ordered": "x by hand",
        "roofline_fraction": "roofline",
        "status": "status",
    },
    {
        "case": "case",
        "contender": "contender",
        "median_ms": "median ms",
        "times_svd": "x svd",
        "times_lowrank": "x lowrank",
        "missing_overlap": "1 - overlap",
        "residual": "residual",
        "status": "status",
    },
)


def short_table(rows: Sequence[Mapping[str, str]]) -> str:
    """Rows of a results file, a line each.

    Of a kind in ``SHORT`` some columns; of others all that differ from row to row, below a line
    of those that don't. Machine and versions are left out.
    """
    if not rows:
        return "no rows"
    picked = next((kind for kind in SHORT if kind.keys() <= rows[0].keys()), None)
    common = []
    if picked is None:
        values = {name: {row[name] for row in rows} for name in rows[0]}
        for name in ENVIRONMENT_FIELDS:
            values.pop(name, None)
        common = [f"{name}={min(v)}" for name, v in values.items() if len(v) == 1 and any(v)]
        picked = {name: name for name, found in values.items() if len(found) > 1}
    lines = [[(row[name] or "")[:60] or "-" for name in picked] for row in rows]
    text = table(list(picked.values()), lines) if picked else f"{len(rows)} rows alike"
    return "\n".join([*([", ".join(common)] if common else []), text])


def case_table(rows: Sequence[Row]) -> str:
    """A case as people read it. A contender without a speed shows why, below the table."""
    header = (
        "contender",
        "median ms",
        "p20",
        "p80",
        "x naive",
        "x by hand",
        "x compile",
        "roofline",
        "error",
        "leak",
        "extra MiB",
    )
    lines = [
        (
            row.contender,
            shown(row.median_ms, ".3f"),
            shown(row.p20_ms, ".3f"),
            shown(row.p80_ms, ".3f"),
            shown(row.times_naive, ".2f"),
            shown(row.times_hand_ordered, ".2f"),
            shown(row.times_compiled, ".2f"),
            shown(row.roofline_fraction, ".0%"),
            shown(row.error, ".1e"),
            shown(row.leak, ".1e"),
            "-" if row.extra_bytes is None else f"{row.extra_bytes / 2**20:.1f}",
        )
        for row in rows
    ]
    first = rows[0]
    notes = [f"{row.contender}: {row.status}" for row in rows if row.status != "ok"]
    facts = [
        f"{first.case}: {first.matrices} matrices, {first.elements} elements, {first.device}",
        *(
            f"{row.contender}: {row.form}, bases {row.spans}, backend {row.backend}"
            for row in rows
            if row.contender.startswith(OURS)
        ),
    ]
    if first.bound_ms is not None:
        facts.append(
            f"bound: {first.bound}, {first.bound_ms:.3f} ms at {first.copy_gb_per_s:.1f} GB/s copy "
            f"and {first.gemm_tflop_per_s:.3f} TFLOP/s GEMM, measured in the same rounds"
        )
    return "\n".join([*facts, table(header, lines), *notes])


LOG_SECONDS = 10.0  # between two lines of progress in a log


def progress() -> Callable[[str], None]:
    """What is being done, on stderr: one line rewritten in place on a terminal; elsewhere, as in a
    log, a line at the start and then at most one every ``LOG_SECONDS``."""
    if sys.stderr.isatty():

        def rewrite(text: str) -> None:
            print(f"\r\033[K{text}", end="", file=sys.stderr, flush=True)

        return rewrite
    due = 0.0

    def log(text: str) -> None:
        nonlocal due
        if text and time.monotonic() >= due:
            print(text, file=sys.stderr, flush=True)
            due = time.monotonic() + LOG_SECONDS

    return log
