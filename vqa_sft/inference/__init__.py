"""Scoring rows with runs: views, several runs at once, results on disk, `Predictor`.

May import: runs, models, predictions and what is below them; never training.
"""
