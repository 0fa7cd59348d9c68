"""Floors 0 and 1: what training and inference cost."""
