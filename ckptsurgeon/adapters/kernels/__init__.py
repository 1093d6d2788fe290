"""The adapters' kernels: for every name in `adapters.table.ADAPTERS` a function on torch tensors, and nothing is decided in one.

torch is imported inside the functions, so that a merge that moves bytes alone never loads it.
"""
