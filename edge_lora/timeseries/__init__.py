"""Forecasting: series from CSV files, windows and splits, bases, baselines, training."""
