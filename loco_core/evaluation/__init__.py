"""JUDGE an image."""
