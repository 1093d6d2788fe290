"""Reading pickles without running them: a bounded machine for their opcodes, and the state_dicts in what it makes."""
