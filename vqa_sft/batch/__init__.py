"""Examples become batches: prompts, chat template, collators.

Import from here: `prompts.Prompts`, `prompts.render_prompt`, `collator.TrainCollator`, `collator.AnswerCollator`,
`pixels.limit_pixels`. May import: data.
"""
