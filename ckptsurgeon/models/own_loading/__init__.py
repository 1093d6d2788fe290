"""Modules with loading code of their own (versions, hooks, `_load_from_state_dict`): it is probed, run by torch, and undone on failure."""
