"""Load a language model and its tokenizer, add LoRA, compile its blocks."""
