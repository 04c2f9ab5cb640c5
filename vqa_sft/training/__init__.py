"""Training, in the order of recipes/sft.py: `rows`, `build` (the trainer), `survive` (fit), `validation`, `folder`.

Import from here: those, and `trainer.AnswerTrainer`. May import: runs, models, predictions and what is below them.
"""
