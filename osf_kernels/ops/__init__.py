"""The operators: one file a family, each with its schema, fake, autograd and vmap rules.

May import: torch, ``osf_kernels.backends``, ``osf_kernels.plan`` and below.
"""
