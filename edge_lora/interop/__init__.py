"""Other people's adapter files."""
