"""Checkpoints, and weights of MONAI and of the authors. `python -m dae.weights` is the command."""
