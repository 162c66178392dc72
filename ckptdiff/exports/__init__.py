"""What a run found, with the values of its checkpoints, for other programs."""
