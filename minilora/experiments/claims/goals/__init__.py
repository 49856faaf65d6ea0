"""Preferences, rewards and teachers: other objectives on adapters."""
