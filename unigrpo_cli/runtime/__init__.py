"""Everything with a side effect: run directories, checkpoints, screens, pictures on disk."""
