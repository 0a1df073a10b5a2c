"""truncated_svd: the leading singular triplets of a matrix, a batch or a list.

``truncated_svd.py`` has the public function. ``arguments.py`` checks its arguments, ``driver.py``
sorts the matrices into groups (``group.py``), ``auto.py`` chooses a method for each, and
``finish.py`` makes results (``result.py``) of the method's factors (``factors.py``). ``methods/``
has one file a method. The methods share ``rayleigh_ritz.py``, the small SVD that they end in,
``residual.py``, the error of triplets, and ``beside.py``, the search for larger triplets.
"""
