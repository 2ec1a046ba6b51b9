"""Files of other projects, read and written with NumPy alone."""
