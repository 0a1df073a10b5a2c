"""Numerical linear algebra, which refreshes a model's bases.

``svd/`` has truncated_svd, ``orthonormal/`` makes orthonormal columns of any, ``extend_basis.py``
grows a basis, and ``merge_basis.py`` has a grown one let go of what counts least. ``primitives.py``
has the products and the small factorizations that all of them consist of, and leaves the kernels
to the backends. ``cpu.py`` has every number that is tuned to a CPU.
May import: torch, ``osf_kernels.ops``, ``osf_kernels.backends`` and below.
"""
