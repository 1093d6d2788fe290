"""Finds patterns for sets of keys: few and general, but matching no other key. Pure text."""
