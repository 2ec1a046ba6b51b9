"""Every number in the README, as a command: ``python -m bench`` for all, ``python -m bench.swap`` for one."""
