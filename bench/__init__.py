"""Every number in the README, as a command: ``python -m bench`` for all, or one by name."""
