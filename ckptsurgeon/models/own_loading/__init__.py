"""A module's own way to load (versions, hooks, `_load_from_state_dict`): tried out, run by torch, undone where it fails."""
