"""Drivers of numerical linear algebra: what refreshes a model's bases.

``truncated.py`` decomposes weights: ``inputs.py`` checks them, ``driver.py`` groups them,
``auto.py`` chooses a method, ``methods.py`` runs it from ``krylov.py`` or ``dense.py``,
``result.py`` is what comes out.
``spread.py`` prepares the Gram matrices of steep spectra for float32.
``orthonormal.py`` orthonormalizes columns, ``complement.py`` completes them, ``extension.py`` grows
a basis. No kernels: products and factorizations come from ``backends/primitives.py``. May import:
torch, ``osf_kernels.ops``, ``osf_kernels.backends`` and below.
"""
