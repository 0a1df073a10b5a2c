"""Fused two-sided projections that keep updates out of a protected subspace.

``import osf_kernels`` works with no GPU, no Triton and no compiled extension; what then runs,
and why, is what ``python -m osf_kernels info`` and :func:`plan` say.

This package owns the operators: definition and validation (``ops/``), planning (``plan.py``),
backends (``backends/``), and what a test of them needs (``testing.py``). It imports torch, and
triton and the compiled extension lazily; imports run one way, downward in that order.
"""

from osf_kernels._padding import padded
from osf_kernels._version import __version__
from osf_kernels.backends.choosing import architecture as architecture_of
from osf_kernels.backends.choosing import requested as requested_backend
from osf_kernels.backends.choosing import use_backend
from osf_kernels.basis import Basis
from osf_kernels.errors import BackendUnavailableError, ConvergenceWarning, Refusal
from osf_kernels.free.basis import FreeBasis
from osf_kernels.free.block import add_free_many_, free_block, free_gradient, free_matrix
from osf_kernels.free.orders import FreePlan, plan_free
from osf_kernels.free.orders import Side as FreeSide
from osf_kernels.linalg.extend_basis import extend_basis
from osf_kernels.linalg.merge_basis import MergedBasis, merge_basis
from osf_kernels.linalg.orthonormal.orthonormalize import orthonormalize
from osf_kernels.linalg.orthonormal.polar import polar
from osf_kernels.linalg.svd.cost import SVDPlan, plan_svd
from osf_kernels.linalg.svd.result import TruncatedSVD
from osf_kernels.linalg.svd.truncated_svd import truncated_svd
from osf_kernels.ops._coefficient_list import CoefficientList
from osf_kernels.ops.coefficients import apply_, coefficients
from osf_kernels.ops.prepared import Prepared, prepare
from osf_kernels.ops.project import plan, project, project_, project_many_
from osf_kernels.ops.restore import restore_, restore_many_
from osf_kernels.plan import Mode, Plan

__all__ = [
    "BackendUnavailableError",
    "Basis",
    "CoefficientList",
    "ConvergenceWarning",
    "FreeBasis",
    "FreePlan",
    "FreeSide",
    "MergedBasis",
    "Mode",
    "Plan",
    "Prepared",
    "Refusal",
    "SVDPlan",
    "TruncatedSVD",
    "__version__",
    "add_free_many_",
    "apply_",
    "architecture_of",
    "coefficients",
    "extend_basis",
    "free_block",
    "free_gradient",
    "free_matrix",
    "merge_basis",
    "orthonormalize",
    "padded",
    "plan",
    "plan_free",
    "plan_svd",
    "polar",
    "prepare",
    "project",
    "project_",
    "project_many_",
    "requested_backend",
    "restore_",
    "restore_many_",
    "truncated_svd",
    "use_backend",
]
