"""The backends: ``jobs.py`` says what is asked of them; ``torch``, ``triton``, ``cuda`` run it.

``grouped.py`` drives the two of them that take lists, and ``choosing.py`` says which one serves a
call. ``primitives.py`` has the products and factorizations of ``osf_kernels.linalg``.

May import: torch, ``osf_kernels.plan`` and below; triton and the compiled extension lazily.
"""
