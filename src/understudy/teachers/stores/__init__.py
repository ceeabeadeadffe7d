"""Scores and responses that are kept on disk."""
