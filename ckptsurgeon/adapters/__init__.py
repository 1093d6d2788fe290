"""Adapters: named operations on tensors, each a value with its fields, shapes, traits and kernel, in a folder for its family.

Only kernels import torch, inside the function, so that a merge that only moves bytes never loads it. `table` lists all adapters.
"""
