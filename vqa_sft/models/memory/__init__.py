"""What a recipe needs of one GPU, counted from the shape of its model: no weights, no GPU, seconds on a laptop.

    shape    what the model has, counted on the meta device, with its adapter
    plan     what the recipe does with it: rows, pixels, precision, recomputation
    estimate {part: GiB} of shape and plan; `need_gib` is their peak, scoring included
    fit      the largest batches and images that fit, what to change, `choose_batch` for auto_batch
    describe what `vqa-sft memory` prints
    out_of_memory   `halve_batch`, `explains_out_of_memory`

Import from here: those modules. May import: what models may.
"""
