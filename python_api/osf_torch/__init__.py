"""The thin API for training code: subspaces of a model, hooks, gradients, files.

It owns what knows of models and optimizers, and no mathematics: everything it computes is an
operator of ``osf_kernels``, of which it imports public names only.
"""

from osf_torch.confine import confine
from osf_torch.confined import Confined
from osf_torch.coverage import Coverage
from osf_torch.gradient import project_grad
from osf_torch.guard import Guard
from osf_torch.importance import layer_importance
from osf_torch.inputs import input_subspaces
from osf_torch.protect import protect
from osf_torch.ranks import allocate_ranks, ranks_by_energy
from osf_torch.refresh import refresh
from osf_torch.steps import Leak
from osf_torch.storage import load_subspaces, save_subspaces
from osf_torch.subspaces import Decomposition, Subspace, Subspaces

__all__ = [
    "Confined",
    "Coverage",
    "Decomposition",
    "Guard",
    "Leak",
    "Subspace",
    "Subspaces",
    "allocate_ranks",
    "confine",
    "input_subspaces",
    "layer_importance",
    "load_subspaces",
    "project_grad",
    "protect",
    "ranks_by_energy",
    "refresh",
    "save_subspaces",
]
