"""Claims about LoRA, each measured under a rule that was written before the runs."""
