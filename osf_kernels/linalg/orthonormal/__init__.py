"""Orthonormal columns, batched over matrices of one shape.

``orthonormalize.py`` and ``polar.py`` are public; ``operator.py`` makes the operators of both.
``cholesky_qr.py`` has the passes that all of this folder is made of, ``block_gram_schmidt.py``
orthonormalizes a block against a basis, ``complement.py`` completes a basis.
"""
