"""The reference backend: plain PyTorch on any device, the oracle for every other backend.

It implements every operation, and calls no other backend: what is compared with it is not in it.
"""

from graft.kernels.backend.registry import Backend, register_backend

reference = register_backend(Backend(name="reference", priority=0))
