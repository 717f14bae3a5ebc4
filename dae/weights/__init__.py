"""Other people's weights in, MONAI's layout out. `python -m dae.weights` is the command."""
