"""Drivers of numerical linear algebra: what refreshes a model's bases.

``orthonormal.py`` orthonormalizes columns, ``complement.py`` completes them, ``truncated.py``
decomposes weights by the methods of ``krylov.py``, ``dense.py`` and ``restarted.py``,
``extension.py`` grows a basis. No kernels: products and factorizations come from
``backends/primitives.py``. May import: torch, ``osf_kernels.ops``, ``osf_kernels.backends`` and
below.
"""
