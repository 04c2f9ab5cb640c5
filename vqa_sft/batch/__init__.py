"""Examples become batches: prompts, chat template, collators.

Import from here: `prompts.Prompts`, `prompts.render_prompt`, `collator.TrainCollator`, `collator.AnswerCollator`,
`image_size.limit_pixels`, `image_size.describe_images`. May import: data.
"""
