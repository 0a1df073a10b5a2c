"""The methods by name: what each is called, how it is built, whose learning rate it takes."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import osf_torch
from bench.streams import peers
from bench.streams.ours import Layers, Ours, Update
from bench.streams.peers import Plain
from bench.streams.sources import Library, Memories, Prior, Probed, Source, Weights
from bench.streams.subject import Subject

# ‖ΔW‖ of each task of the run that a method needs.
Radii = Callable[[], Sequence[float]]
Make = Callable[[Subject, Radii], Plain]
ENERGIES = (0.8, 0.9, 0.95, 0.97, 0.99)  # of ``osf_torch.input_subspaces``; its default among them
# What osf_torch does without arguments; the matched baseline is held to it.
DEFAULT = f"energy-{inspect.signature(osf_torch.input_subspaces).parameters['energy'].default:g}"
HEADS = "heads"  # of models that have them
# By which rows of heads are told apart, though it is of nothing that they train.
HEADS_RATE = 1e-4
PRIOR = "prior"  # for subjects that have text of no task
BASES = "bases-inputs"  # whose learning rate the variants of ours take


@dataclass(frozen=True)
class Method:
    """A row of a comparison.

    Attributes:
        title: in tables and pictures.
        make: of a subject, and of the radii of the run that it needs.
        tuned_as: whose learning rate it takes; its own where this is empty.
        compared: in a run that names no methods.
        fixed: the learning rate in the rows of a method that has none; None where it has one.
        needs: of which method it takes the radii, those of the run with its stream and seed.
    """

    title: str
    make: Make
    tuned_as: str = ""
    compared: bool = False
    fixed: float | None = None
    needs: str = ""


def _peer(kind: Callable[[Subject], Plain]) -> Make:
    return lambda subject, _: kind(subject)


def _matched(subject: Subject, radii: Radii) -> Plain:
    return peers.Matched(subject, radii())


def _ours(
    source: Callable[[], Source],
    update: Update = "protect",
    *,
    layers: Layers = "all",
    strength: float = 0.0,
) -> Make:
    return lambda subject, _: Ours(subject, source(), update, layers=layers, strength=strength)


METHODS: dict[str, Method] = {
    HEADS: Method("heads alone", _peer(peers.Heads), compared=True, fixed=HEADS_RATE),
    "plain": Method("plain fine-tuning", _peer(peers.Plain), compared=True),
    "matched": Method(
        "plain, as far as ours moves", _matched, "plain", compared=True, needs=DEFAULT
    ),
    "lora": Method(f"LoRA, r = {peers.LORA_RANK}", _peer(peers.Lora), compared=True),
    "olora": Method(f"O-LoRA, r = {peers.OLORA_RANK}", _peer(peers.OLora), compared=True),
    "peft-osf": Method("OSF (peft)", _peer(peers.PeftOsf), compared=True),
    "replay": Method("replay of 1 %", _peer(peers.Replay), compared=True),
    DEFAULT: Method("ours", _ours(Library, "confine"), compared=True),
    # What is protected before the first task.
    PRIOR: Method("ours, from general text on", _ours(Prior, "confine"), DEFAULT),
    # Which bases, at the same free share.
    BASES: Method("bases: inputs", _ours(lambda: Memories("inputs"))),
    "bases-outputs": Method("bases: outputs", _ours(lambda: Memories("outputs")), BASES),
    "bases-gradients": Method("bases: gradients", _ours(lambda: Memories("gradients")), BASES),
    "bases-both": Method("bases: inputs and gradients", _ours(lambda: Memories("both")), BASES),
    "bases-moment": Method("bases: Adam's moment", _ours(lambda: Memories("moment")), BASES),
    "bases-whitened": Method("bases: whitened weights", _ours(lambda: Memories("whitened")), BASES),
    "bases-weights": Method(
        "bases: weights", _ours(lambda: Weights(shares=(1 - 0.75**0.5, 1 - 0.25**0.5))), BASES
    ),
    # Which update.
    "update-projected": Method(
        "inputs, projected alone", _ours(lambda: Memories("inputs"), "projected"), BASES
    ),
    "update-confine": Method(
        "inputs, confined", _ours(lambda: Memories("inputs"), "confine"), BASES
    ),
    # Which layers are trained.
    "layers-attention": Method(
        "inputs, attention alone", _ours(lambda: Memories("inputs"), layers="attention"), BASES
    ),
    "layers-mlp": Method(
        "inputs, MLP alone", _ours(lambda: Memories("inputs"), layers="mlp"), BASES
    ),
    # How many directions: fixed shares, the energy, a probe's loss, the layers' importance.
    "rank-half": Method(
        "inputs, half of the fixed share", _ours(lambda: Memories("inputs", (0.875, 0.625))), BASES
    ),
    "rank-probed": Method("inputs, by a probe's loss", _ours(Probed), BASES),
    "weights": Method("weights, fixed share", _ours(Weights)),
    "weights-half": Method(
        "weights, half of it", _ours(lambda: Weights(shares=(0.25, 0.45))), "weights"
    ),
    "weights-mrr": Method("weights, mrr and trr", _ours(lambda: Weights(mrr=0.1)), "weights"),
    "weights-mrr-half": Method(
        "weights, half of mrr and trr",
        _ours(lambda: Weights(shares=(0.25, 0.45), mrr=0.05)),
        "weights",
    ),
    # How right the decomposition is.
    "weights-exact": Method("weights, exact SVD", _ours(lambda: Weights("exact")), "weights"),
    "weights-lowrank": Method("weights, svd_lowrank", _ours(lambda: Weights("lowrank")), "weights"),
}
METHODS |= {
    f"soft-{strength:g}": Method(
        f"inputs, soft, λ = {strength:g}",
        _ours(lambda: Memories("inputs"), "soft", strength=strength),
        BASES,
    )
    for strength in (0.1, 1.0, 10.0)
}
METHODS |= {
    name: Method(
        f"inputs, energy {energy:g}",
        _ours(lambda energy=energy: Library(energy=energy), "confine"),  # type: ignore[misc]
        DEFAULT,
    )
    for energy in ENERGIES
    if (name := f"energy-{energy:g}") != DEFAULT
}
