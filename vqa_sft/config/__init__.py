"""The fields of a training recipe and of a prediction, from a yaml and the command line; their checks. No torch.

Import from here: `recipe.read_recipe`, `recipe.Recipe`, `training.RecipeArguments`; `fields` to read other fields.
May import: batch.prompts, data.
"""
