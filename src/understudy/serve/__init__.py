"""A teacher as a service."""
