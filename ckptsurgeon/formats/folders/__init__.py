"""Checkpoints of several files, and files that are a part of one."""
