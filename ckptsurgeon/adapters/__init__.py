"""Adapters: named operations on tensors, each a module with its fields, shapes, traits and kernel, in a room by family.

Only kernels import torch, inside of them, so that a merge that moves bytes alone never loads it. `table` names them all.
"""
