"""What LoRA is for, what it costs, and what it does to what was known before."""
