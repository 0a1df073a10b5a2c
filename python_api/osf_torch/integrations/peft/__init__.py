"""PEFT's OSF tuner on the operators of ``osf_kernels``, on one device or sharded by FSDP2.

:func:`enable` switches PEFT to it and :func:`disable` back; training code stays as it is::

    from osf_torch.integrations import peft as osf_peft

    osf_peft.enable()
    model = peft.get_peft_model(model, peft.OSFConfig(effective_rank=0.5))

PEFT freezes W_high = U_high S_high V_high, the leading triplets of a weight, and trains U_low,
S_low, V_low from the others. What is replaced:

- hooks: each gradient is projected in place once it is accumulated. PEFT's tensor hooks allocate
  another, never fire on FSDP2's shards, and are lost where a bfloat16 model's adapter is cast to
  float32, which is PEFT's default;
- forward: the frozen part takes no gradient and no concatenated copies of the factors, and an
  adapter that hasn't moved adds 0 in every dtype;
- ``project_gradient_to_orthogonal_space``: the V side from V_high itself instead of an n × n Gram
  matrix; a gradient that is whole on every rank is projected there, and not summed over them.

The decomposition stays PEFT's own. An adapter is saved as its low factors alone, and what they were
is computed anew from the weight where it is loaded: with other factors, of a cluster of equal
singular values say, it would mean something else there. So adapters trained with ours mean the same
to plain PEFT, and its own to ours. :func:`decompose_weight_matrix` gives the same factors without
PEFT.

With FSDP2, whose ``fully_shard`` replaces parameters, attach again after it::

    fully_shard(model)
    osf_peft.attach(model)

Then U_low's coefficients of a whole backward pass are summed over the ranks in one collective, on
the shards' own group; V_low, sharded by singular triplets, needs none. ``attach`` is also for
models made before :func:`enable` and after ``load_state_dict(assign=True)``; :func:`verify` says
where it is due. ``copy.deepcopy`` carries the hooks along.

A projected gradient isn't enough with AdamW: its elementwise scaling turns the step back into the
protected span. ``enable(restore=True)`` projects U_low and V_low themselves after every step of
every optimizer, :func:`restore_after` after those of one; then U_highᵀ W = S_high V_high holds to
rounding.

:func:`confine_lora` is for LoRA models instead of OSF ones: it makes a model confined with a rank
of them, whose protected part no optimizer can move. Adapter files are read and written by
``osf_torch.integrations.lora``.

Supported: peft 0.21. Beyond rounding, this differs from PEFT in that ``torch.autograd.grad``,
which accumulates nothing, returns gradients that aren't projected, and that a backward pass
projects what was accumulated before once more, which P² = P makes the same. Sharded gradients are
projected at the end of the backward pass, so after hooks that step an optimizer within it.

Source: Sculpting Subspaces, arXiv 2504.07097, and PEFT's OSF tuner.
"""

from osf_torch.integrations.peft.confining import confine_lora
from osf_torch.integrations.peft.factors import decompose_weight_matrix
from osf_torch.integrations.peft.switching import attach, disable, enable, restore_after, verify
from osf_torch.integrations.peft.targets import project_gradient_to_orthogonal_space

__all__ = [
    "attach",
    "confine_lora",
    "decompose_weight_matrix",
    "disable",
    "enable",
    "project_gradient_to_orthogonal_space",
    "restore_after",
    "verify",
]
