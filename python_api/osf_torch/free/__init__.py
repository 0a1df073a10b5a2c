"""How a module trains the free block of a weight: what ``confine`` puts into it.

``spec.py`` says what is confined of a weight and under which names its tensors are held,
``merging.py`` brings weights up to date, ``linear.py`` and ``current.py`` are what autograd sees of
a linear layer and of a weight by itself, ``layers.py`` the classes and hooks that modules get,
``stepping.py`` the hooks of optimizers' steps, ``state.py`` and ``summary.py`` what is saved and
shown.
"""
