"""Adapters between parts and wholes: a part of a tensor, a tensor with a part more, several tensors as one. No row or column is broken."""
