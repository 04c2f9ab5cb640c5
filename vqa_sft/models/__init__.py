"""Loading a model, its LoRA targets, the letters' tokens and logits; what each model family needs.

Import from here: `load`, `scoring`, `processes`. May import: config, batch, data.
"""
