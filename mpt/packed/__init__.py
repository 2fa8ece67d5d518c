"""Weights packed in small integers: what says so, where they lie, their real values, layers that keep them packed."""
