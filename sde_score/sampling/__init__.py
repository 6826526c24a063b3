"""Samplers: from a score function to samples."""
