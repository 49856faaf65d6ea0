"""Adapters merged into one, served together, and trained on several devices."""
