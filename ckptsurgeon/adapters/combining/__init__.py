"""Adapters that cut, extend or join tensors along a dim."""
