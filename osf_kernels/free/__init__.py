"""The free block of a weight: coordinates of the updates that leave its protected part alone.

With U_l (m, p) and V_l (n, q) orthonormal bases of what is not protected, these updates are
ΔW = U_l C V_lᵀ with any C (p, q). ``basis.py`` holds such a basis, ``orders.py`` plans the gradient
of C without tensors, ``block.py`` computes with matrices. All of it is composed of library products
on every device, whatever backend is asked for, since at deployed ranks products are the bound.

May import: ``linalg/`` and what is below it.
"""
