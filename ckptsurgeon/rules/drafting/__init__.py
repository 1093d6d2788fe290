"""Patterns for sets of keys: few, general, and matching nothing else. Pure text."""
