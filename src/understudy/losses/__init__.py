"""Losses: divergences, advantages, the terms that methods return, and schedules."""
