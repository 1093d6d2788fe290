"""What is decided once both trees are laid on each other: what neighbours settle, what several targets share, what stands apart."""
