"""The keys of the plug-in in axolotl's configuration; imported by axolotl, which has pydantic."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, model_validator

from osf_torch.integrations.axolotl import require_settings


class SubspaceArgs(BaseModel):
    """The keys that begin with ``subspaces_`` of the YAML file."""

    subspaces_rank: int | float | dict[str, int | float] | None = None
    subspaces_file: str | None = None
    subspaces_method: Literal["confine", "protect"] = "confine"
    subspaces_leave_out: str | list[str] | None = None

    @model_validator(mode="before")
    @classmethod
    def _require_settings(cls, data: Any) -> Any:
        require_settings(data)
        return data
