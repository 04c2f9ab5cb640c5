"""What a recipe needs of one GPU, counted from the shape of its model: no weights, no GPU.

Import from here: `estimate`.
"""
