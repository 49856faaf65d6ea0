"""How to set LoRA: rate, rank, targets, and what an update can hold."""
