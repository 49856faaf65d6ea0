"""The experiments: each claim is measured here, and what runs writes its results under `runs/`."""
