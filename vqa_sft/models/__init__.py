"""Loading a model, its LoRA targets, the letters' tokens and logits; what each model family needs.

Import from here: `load`, `lora`, `parts`, `families`, `adapters`, `scoring`, `processes`, and the rooms fast/ and
memory/. May import: config, batch, data.
"""
