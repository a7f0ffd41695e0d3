"""Parameter remapping: start a model from another of any size."""
