"""The mixture-of-transformers family in BAGEL's form."""
