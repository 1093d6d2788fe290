"""Initial values of fresh tensors: the schemes, and what a person's functions and modules' own resets give."""
