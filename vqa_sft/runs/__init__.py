"""A run's folder: its files and checkpoints, out-of-fold predictions, exports, soups, the Hub.

Import from here: `folder`, `checkpoints`, `out_of_fold`, `export`, `decision`, `soup`, `hub`.
May import: models, predictions and what is below them.
"""
