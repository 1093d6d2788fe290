"""Formats that hold only tensors and text: no pickle, no code."""
