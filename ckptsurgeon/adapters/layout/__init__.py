"""Adapters that change the shape of one tensor or the order of its elements; no element is added, lost or changed."""
