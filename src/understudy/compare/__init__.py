"""Many runs of one recipe that differ in what is varied and nothing else, and a table of them."""

from __future__ import annotations
