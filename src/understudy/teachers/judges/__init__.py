"""Verbal teachers: they read a response and answer with a digit."""
