"""Measures of sparse networks: of arrays, while training, and as a page."""
