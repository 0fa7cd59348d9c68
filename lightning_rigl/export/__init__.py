"""Trained sparse models made small and fast, and written to files."""
