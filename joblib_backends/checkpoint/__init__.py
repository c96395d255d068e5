"""Checkpoints: the results of finished tasks in one file, so that a search that was killed goes on where it stopped."""
