"""Drop-ins for other packages, on the operators of ``osf_kernels``: one module a package.

An integration is imported by its own name (``import osf_torch.integrations.galore``) and imports
its peer only when it is switched on, so none of the peers is a requirement. A peer that is missing,
or of another version than the integration was written for, is an ImportError that names the
supported versions.
"""
