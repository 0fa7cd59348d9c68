"""Runnable examples; a package, so that ``class_path: examples.cli_model...`` finds them from the root."""
