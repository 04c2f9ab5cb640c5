"""Examples become batches: prompts, chat template, collators.

Import from here: `prompts.Prompts`, `collator.TrainCollator`, `collator.AnswerCollator`. May import: data.
"""
