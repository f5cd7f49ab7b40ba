"""What users look at: runs as one self-contained page, as a picture of curves, and for other viewers."""
