"""What a tokenizer is in GGUF's words: its files, its tokens, and how readers will split and merge text."""
