"""Models as policies."""
