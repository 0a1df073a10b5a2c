"""Long streams of tasks, and what each method forgets of them: ``python -m bench streams``.

``data`` reads the tasks, ``encoder`` and ``decoder`` are the models that learn them, ``peers`` and
``ours`` the methods, ``training`` runs one method over one stream, ``rows`` keeps what came out.
"""
