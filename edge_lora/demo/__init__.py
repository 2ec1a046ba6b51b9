"""The demo: a small language model, three skills, and adapters that switch between them."""
