"""Command lines: one file a script."""
