"""What turns a layer into a model, and the variants of LoRA."""
