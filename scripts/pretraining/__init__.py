"""Pre-training a small Llama from nothing: its text, tokenizer, loop and files."""
