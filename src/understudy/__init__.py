"""On-policy distillation of language models: a small student learns from its own attempts, judged by a larger teacher."""

__version__ = "0.1.0"
