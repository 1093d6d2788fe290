"""From names, shapes and rules to a diff and a plan: every key has exactly one step or fate. Pure: no file, no torch, no printing."""
