"""Drop-ins for other packages, on the operators of ``osf_kernels``: one module a package.

An integration is imported by its own name (``import osf_torch.integrations.galore``) and imports
its peer only when it is switched on, so none of the peers is a requirement. A peer that is missing,
or of another version than the integration was written for, or without something that is to be
replaced, is an ImportError that names the supported versions, and nothing is replaced then. To
switch off puts back what was there; what another library has put on top meanwhile is left, with a
RuntimeWarning.
"""
