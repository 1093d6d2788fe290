"""An optimizer's state: which parameter each moment belongs to, and what becomes of it when the model changes. Pure."""
