"""How it is run: ranks, schedule, checkpoints, log."""
