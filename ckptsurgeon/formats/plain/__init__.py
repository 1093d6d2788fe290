"""Containers that hold tensors and text alone: no pickle, nothing that could be run."""
