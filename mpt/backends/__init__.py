"""What computes a step of the model: one module per backend, and `choose.py`, which decides between them."""
