"""What it sees: files, lists, prepared volumes, crops and batches."""
