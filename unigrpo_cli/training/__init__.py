"""What train.py stands on: state, optimizer, update guard, metrics of a step."""
