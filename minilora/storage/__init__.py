"""The files on disk, safetensors and JSON only: models, adapters, and the state of an unfinished training run."""
