"""The thin API for training code: subspaces of a model, hooks, gradients.

It owns what knows of models and optimizers, and no mathematics: everything it computes is an
operator of ``osf_kernels``, of which it imports public names only.
"""

from osf_torch.gradient import project_grad
from osf_torch.guard import Guard, Leak, Subspace, protect

__all__ = ["Guard", "Leak", "Subspace", "project_grad", "protect"]
