"""One base and its adapters behind HTTP, in the words of OpenAI's interface."""
