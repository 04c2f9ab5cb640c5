"""The trainer, its loss, averages of weights, curves. May import: runs, models, predictions and what is below them."""
