"""A run: its directory, setup, trainer, monitor, doctor and memory table. Stands on train.py."""
