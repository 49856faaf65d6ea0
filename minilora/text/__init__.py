"""Text: the generated world and its tasks, the tokenizer, and what turns text into batches."""
