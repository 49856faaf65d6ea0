"""What is kept on disk, as safetensors and JSON only: models, adapters, and the state of an unfinished training run."""
