"""truncated_svd: the leading singular triplets of a matrix, a batch or a list.

``truncated_svd.py`` is the public function: ``arguments.py`` checks what it is given, ``driver.py``
groups matrices and runs a method on each ``group.py``, ``auto.py`` chooses that method,
``finish.py`` makes a ``result.py`` of its ``factors.py``. ``methods/`` has one file a method;
``rayleigh_ritz.py``, ``residual.py`` and ``beside.py`` are what they share: the small SVD that
they end in, how nearly triplets are singular, and whether larger ones were missed.
"""
