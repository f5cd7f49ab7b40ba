"""What the package costs at full size. Not installed with it."""
