"""axolotl: a plug-in that keeps protected directions where they are, from its YAML file.

::

    plugins:
      - osf_torch.integrations.axolotl.SubspacePlugin
    subspaces_rank: 0.5
    subspaces_method: confine   # or protect
    subspaces_leave_out: "*embed_tokens*"

It gives axolotl's trainers the callback of ``osf_torch.integrations.transformers``, of the model as
axolotl has loaded it, before the Trainer and its optimizer are made. What that refuses is refused,
and so are adapters, quantized loading and what exchanges or unfreezes weights while they train.

axolotl goes on without a plug-in whose module it can't import, and only logs that. So what is
missing here is another error than ImportError, which ends the run.

Written for axolotl 0.19; tested on its ``BasePlugin``, ``PluginManager`` and configuration, with
transformers' Trainer in the place of axolotl's, whose requirements pin other versions.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from torch import nn

from osf_torch.integrations._peer import require_peer
from osf_torch.storage import load_subspaces

NAME = "integrations.axolotl.SubspacePlugin"

try:
    _BASE: Any = require_peer(
        "axolotl.integrations.base", "axolotl", ">=0.12,<1", "axolotl"
    ).BasePlugin
except ImportError as _error:
    raise RuntimeError(str(_error)) from _error

# Keys of axolotl's configuration under which other things train than the weights, or weights that
# nothing covers, and what to do instead.
REFUSED = {
    "adapter": "leave it out: weights train inside their free blocks, with no adapter",
    "load_in_8bit": "load the weights as they are",
    "load_in_4bit": "load the weights as they are",
    "relora": "leave it out",
    "lisa_n_layers": "leave it out: it freezes and unfreezes layers while they train",
    "qat": "quantize after training",
    "deepspeed": "take fsdp_config with fsdp_version: 2",
}
_RANGE = re.compile(r"\[\d*:?\d*\]$")  # of rows, at the end of a name


class SubspacePlugin(_BASE):
    """Confines or protects the model that axolotl trains.

    Keys of the YAML file:

    * ``subspaces_rank``: a share ρ of each weight's directions (0.5), a number of them (64), or
      either by parameter name or pattern. Note that 1 is one direction and 1.0 all of them.
    * ``subspaces_file``: a file of ``save_subspaces`` in the place of ``subspaces_rank``.
    * ``subspaces_method``: "confine", the default, or "protect".
    * ``subspaces_leave_out``: names or patterns of names of matrices that are to move freely, such
      as "*embed_tokens*"; others that nothing covers are refused before training.

    A run is resumed from ``output_dir/checkpoint-<step>``, where the state of the subspaces is
    beside the weights.

    Attributes:
        callback: the ``SubspaceCallback`` of the model, once axolotl has asked for callbacks.

    Raises:
        ValueError: neither ``subspaces_rank`` nor ``subspaces_file``, or both; a key of
            :data:`REFUSED` that is set; as ``SubspaceCallback``.
        RuntimeError: at import: axolotl or transformers is missing or of another version.
    """

    def __init__(self) -> None:
        super().__init__()
        self.callback: Any = None

    def get_input_args(self) -> str:
        return "osf_torch.integrations._axolotl_args.SubspaceArgs"

    def register(self, cfg: Any) -> None:
        """Before anything is loaded."""
        require_settings(cfg)

    def add_callbacks_pre_trainer(self, cfg: Any, model: nn.Module) -> list[Any]:
        require_settings(cfg)
        try:
            from osf_torch.integrations.transformers import SubspaceCallback
        except ImportError as error:
            raise RuntimeError(str(error)) from error
        file = cfg.get("subspaces_file")
        given: Any = load_subspaces(file, model) if file else _plain(cfg["subspaces_rank"])
        self.callback = SubspaceCallback(
            model,
            given,
            cfg.get("subspaces_method") or "confine",
            leave_out=cfg.get("subspaces_leave_out"),
        )
        return [self.callback]

    def post_trainer_create(self, cfg: Any, trainer: Any) -> None:
        """Refuses a trainer that was made without the callback."""
        known = trainer.callback_handler.callbacks
        if self.callback is None or all(each is not self.callback for each in known):
            raise ValueError(
                f"osf_torch.{NAME}: expected axolotl's trainer to have the plug-in's callback, got "
                f"a {type(trainer).__name__} without it, under which nothing would be protected"
            )


def require_settings(cfg: Mapping[str, Any]) -> None:
    """Refuses keys under which nothing, or something else, would be protected.

    Raises:
        ValueError: as :class:`SubspacePlugin`.
    """
    given = [key for key in ("subspaces_rank", "subspaces_file") if cfg.get(key) is not None]
    if len(given) != 1:
        raise ValueError(
            f"osf_torch.{NAME}: expected one of subspaces_rank and subspaces_file in the "
            f"configuration, got {' and '.join(given) or 'neither'}; subspaces_rank: 0.5 protects "
            "half of each weight's directions"
        )
    for key, remedy in REFUSED.items():
        if cfg.get(key):
            raise ValueError(
                f"osf_torch.{NAME}: expected a configuration that trains the weights themselves, "
                f"got {key}: {cfg[key]}; {remedy}"
            )
    parts = [each for each in cfg.get("unfrozen_parameters") or () if _RANGE.search(str(each))]
    if parts:
        raise ValueError(
            f"osf_torch.{NAME}: expected unfrozen_parameters of whole weights, got {parts[0]!r}: "
            "what is projected or confined reaches into the other rows; name the whole weight"
        )


def _plain(rank: Any) -> Any:
    """A mapping of ranks without the class that axolotl gives it."""
    return dict(rank) if isinstance(rank, Mapping) else rank
