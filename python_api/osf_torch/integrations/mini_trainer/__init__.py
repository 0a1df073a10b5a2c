"""mini_trainer's OSFT on osf_kernels: its decomposition and its two projections, drop-in.

``enable()`` puts these in the place of mini_trainer's own, ``disable()`` puts its own back::

    from osf_torch.integrations import mini_trainer as osf_mini_trainer

    osf_mini_trainer.enable()  # before create_osft_model_class / setup_model
    model = mini_trainer.setup_model_for_training.setup_model(..., osft=True)

The factors are mini_trainer's: W (N, M) = U_high diag(S_high) V_high + U_low diag(S_low) V_low,
with U_high (N, k) and U_low (N, R − k) in columns, V_high (k, M) and V_low (R − k, M) in rows,
R = min(N, M); the high ones are frozen, the low ones trained. What is other than there:

- Collectives follow the placements of a DTensor, on its own mesh: a sum over the ranks that hold
  shards of one column (row of V), a gather where V_high is sharded. A plain tensor is whole: under
  DDP nothing is reduced, where mini_trainer sums the coefficients of equal gradients over the ranks
  of the default group and so subtracts them world-size times. (A V_high with fewer rows than
  rank_high is a shard all the same, and on the default group, as mini_trainer takes it.)
- ``model.project_gradients()`` and ``project_parameters()`` of classes made while enabled project
  all factors that are local in one list call, and sum the others' coefficients in one collective
  per mesh group, in float32.
- Beyond half the rank the complement of U_high or V_high is the smaller basis, by (1 − ρ)/ρ in
  FLOPs and in what a gather moves. It is computed at the first projection with a ``cache_holder``
  (as from a model), sharded like its high basis, and dropped with it; ``enable(low_bases=False)``
  does without, and without its memory. It is computed anew once autograd has counted a write to the
  high basis, as by ``load_state_dict``, ``set_model_state_dict`` or ``copy_``; call
  :func:`drop_low_bases` after one that goes past autograd: by ``.data``, or by
  ``torch.distributed.checkpoint.load`` into DTensors of ``state_dict()`` that nothing then sets.
  With OSFT_CACHE_V mini_trainer's own cache of V_high is filled and used in its stead.

Supports rhai-innovation-mini-trainer 0.9.
"""

from osf_torch.integrations.mini_trainer.decomposition import create_svd_dict
from osf_torch.integrations.mini_trainer.low_bases import drop_low_bases
from osf_torch.integrations.mini_trainer.projections import (
    project_gradient_to_orthogonal_space,
    project_gradients,
    project_parameter_to_orthogonal_space,
    project_parameters,
)
from osf_torch.integrations.mini_trainer.switching import DISTRIBUTION, VERSIONS, disable, enable

__all__ = [
    "DISTRIBUTION",
    "VERSIONS",
    "create_svd_dict",
    "disable",
    "drop_low_bases",
    "enable",
    "project_gradient_to_orthogonal_space",
    "project_gradients",
    "project_parameter_to_orthogonal_space",
    "project_parameters",
]
