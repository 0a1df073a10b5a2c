"""The methods by name: what each is called, how it is built, whose learning rate it takes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from bench.streams import peers
from bench.streams.bases import Kind
from bench.streams.ours import Ours, Recipe, Update
from bench.streams.peers import Plain
from bench.streams.subject import Subject

# ‖ΔW‖ of each task of a method's run on the same stream with the same seed.
Radii = Callable[[str], Sequence[float]]
Make = Callable[[Subject, Radii], Plain]
DEFAULT = "inputs"  # what the matched baseline is held to


@dataclass(frozen=True)
class Method:
    """A row of a comparison.

    Attributes:
        title: in tables and pictures.
        make: of a subject, and of the radii of other methods.
        tuned_as: whose learning rate it takes; its own where this is empty.
        compared: in a run that names no methods.
    """

    title: str
    make: Make
    tuned_as: str = ""
    compared: bool = False


def _peer(kind: Callable[[Subject], Plain]) -> Make:
    return lambda subject, _: kind(subject)


def _ours(recipe: Recipe) -> Make:
    return lambda subject, _: Ours(subject, recipe)


def _matched(subject: Subject, radii: Radii) -> Plain:
    return peers.Matched(subject, radii(DEFAULT))


METHODS: dict[str, Method] = {
    "plain": Method("plain fine-tuning", _peer(peers.Plain), compared=True),
    "matched": Method("plain, as far as ours moves", _matched, "plain", compared=True),
    "lora": Method(f"LoRA, r = {peers.LORA_RANK}", _peer(peers.Lora), compared=True),
    "olora": Method(f"O-LoRA, r = {peers.OLORA_RANK}", _peer(peers.OLora), compared=True),
    "peft-osf": Method("OSF (peft)", _peer(peers.PeftOsf), compared=True),
    "replay": Method("replay of 1 %", _peer(peers.Replay), compared=True),
    "inputs": Method("ours, inputs, confined", _ours(Recipe(energy=0.95)), compared=True),
    "inputs-protect": Method("ours, inputs", _ours(Recipe(energy=0.95, update="protect"))),
}
BASES: tuple[Kind, ...] = (
    "weights",
    "inputs",
    "outputs",
    "gradients",
    "both",
    "moment",
    "whitened",
)
UPDATES: tuple[Update, ...] = ("protect", "projected", "confine")
METHODS |= {
    f"bases-{kind}": Method(f"bases of {kind}", _ours(Recipe(kind, "protect")), "bases-inputs")
    for kind in BASES
}
METHODS |= {
    f"update-{update}": Method(f"inputs, {update}", _ours(Recipe("inputs", update)), "bases-inputs")
    for update in UPDATES[1:]
}
METHODS |= {
    f"energy-{energy:g}": Method(
        f"inputs, energy {energy:g}", _ours(Recipe(energy=energy, update="protect")), "bases-inputs"
    )
    for energy in (0.9, 0.97, 0.99)
}
METHODS |= {
    f"layers-{layers}": Method(
        f"inputs, {layers} alone", _ours(Recipe("inputs", "protect", layers=layers)), "bases-inputs"
    )
    for layers in ("attention", "mlp")
}
METHODS |= {
    f"soft-{strength:g}": Method(
        f"soft, strength {strength:g}",
        _ours(Recipe("inputs", "soft", strength=strength)),
        "bases-inputs",
    )
    for strength in (0.1, 1.0, 10.0)
}
