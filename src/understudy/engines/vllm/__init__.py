"""Sampling on vLLM servers: requests, weights that are pushed, and the check that they arrived."""
