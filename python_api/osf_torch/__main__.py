"""``python -m osf_torch estimate MODEL --rho .8 --tokens 8192``: what a run would take."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from typing import Any

import torch

from osf_kernels import __version__
from osf_torch.estimate import estimate

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


MODEL = (
    "a folder with config.json or safetensors, a config.json, a .safetensors file or its index, or "
    "a model type (llama)"
)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m osf_torch")
    parser.add_argument("--version", action="version", version=f"osf-kernels {__version__}")
    commands = parser.add_subparsers(dest="command")
    about = "bytes, FLOPs and collectives of a step by each method, and the time of the refresh"
    _add_arguments(commands.add_parser("estimate", help=about, description=about))
    options = parser.parse_args(arguments)
    if options.command is None:
        parser.print_help()
        return 0
    try:
        found = estimate(
            options.model,
            _ranks(options),
            tokens=options.tokens,
            world=options.world,
            filter=options.filter,
            rank=options.confine_rank,
            weights=DTYPES.get(options.dtype),
            dtype=DTYPES.get(options.basis_dtype),
            architecture=options.arch,
            device=options.device,
            tflops=options.tflops,
        )
    except (ImportError, TypeError, ValueError) as error:
        print(error, file=sys.stderr)
        return 2
    print(json.dumps(found.as_dict(), indent=2) if options.json else found)
    return 0


def _add_arguments(command: argparse.ArgumentParser) -> None:
    add = command.add_argument
    add("model", help=MODEL)
    add("--rho", type=float, default=None, help="share of each weight's directions, in (0, 1]")
    add(
        "--rank",
        action="append",
        default=[],
        metavar="PATTERN=RANK",
        help="of the weights that a pattern names, an int or a share; before --rho",
    )
    add("--tokens", type=int, required=True, help="of a step, on each rank")
    add("--world", type=int, default=1, help="ranks of FSDP2 (1)")
    add("--filter", action="append", default=None, metavar="PATTERN", help="which weights")
    add("--confine-rank", type=int, default=None, help="also of confine(rank=)")
    add(
        "--dtype",
        choices=DTYPES,
        default=None,
        help="of the model, in place of the config's; of a quantized one: dequantized",
    )
    add("--basis-dtype", choices=DTYPES, default=None, help="of the bases (float32)")
    add("--arch", default=None, help="cpu, sm_80, sm_86, sm_90, sm_100 or gfx942 (sm_90)")
    add("--device", default=None, help="measure the rates of this device, such as cpu")
    add("--tflops", type=float, default=None, help="a rate of products, in place of --device")
    add("--json", action="store_true", help="print one JSON object")


def _ranks(options: argparse.Namespace) -> Any:
    """Raises ValueError where neither --rho nor --rank says what."""
    named: dict[str, float | int] = {}
    for given in options.rank:
        pattern, _, value = given.rpartition("=")
        try:
            named[pattern] = int(value) if value.isdigit() else float(value)
        except ValueError:
            pattern = ""
        if not pattern:
            raise ValueError(
                f"osf_torch.estimate: expected --rank to be PATTERN=RANK, got {given!r}; such as "
                "'*.q_proj.weight=64'"
            )
    if options.rho is None and not named:
        raise ValueError(
            "osf_torch.estimate: expected --rho or --rank, got neither; --rho .8 protects four "
            "fifths of each weight's directions"
        )
    if not named:
        return options.rho
    return named if options.rho is None else {**named, "*": options.rho}


if __name__ == "__main__":
    raise SystemExit(main())
