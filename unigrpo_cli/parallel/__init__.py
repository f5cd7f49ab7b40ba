"""Ranks, worker threads, out-of-memory hints."""
