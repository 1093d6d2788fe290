"""Adapters: named operations on tensors' shapes, each one entry of `table.ADAPTERS`.

Pure shape inference, no value is touched and no torch imported; the kernels of the same names are in `streaming/kernels/`.
"""
