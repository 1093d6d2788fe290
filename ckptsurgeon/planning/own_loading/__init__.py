"""What a plan must know of modules' own loading code: versions, and values that such code computes."""
