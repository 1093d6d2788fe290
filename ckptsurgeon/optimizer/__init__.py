"""An optimizer's state: whose moments they are, and what becomes of them when the model changes. Pure."""
