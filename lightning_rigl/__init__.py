"""Dynamic sparse training for PyTorch Lightning."""
