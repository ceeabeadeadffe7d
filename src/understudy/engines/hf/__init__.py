"""Sampling with Hugging Face models in this process."""
