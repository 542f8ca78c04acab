"""Independent runs side by side, and models merged from them."""
