"""The backends: ``forms.py`` says what runs, ``torch``, ``triton`` and ``cuda`` run it.

``grouped.py`` drives the two of them that take lists, and ``choosing.py`` says which one serves a
call. ``primitives.py`` has the products and factorizations of ``osf_kernels.linalg``.

May import: torch, ``osf_kernels.plan`` and below; triton and the compiled extension lazily.
"""
