"""Loading a language model and its tokenizer, LoRA, compiling its blocks."""
