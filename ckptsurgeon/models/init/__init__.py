"""Initial values of fresh tensors: built-in schemes, user-defined functions, and modules' own `reset_parameters`."""
