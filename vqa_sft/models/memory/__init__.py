"""What a recipe needs of one GPU, counted from the shape of its model: no weights, no GPU, seconds on a laptop.

    needs           the shape of the model and the plan of what is done with it: `read_needs`
    images          pixels and tokens of the largest image
    count           what decoder layers keep, counted on tensors without values; kernels: what GPUs' own keep
    estimate        {part: GiB} of the two; `need_gib` is their peak, scoring included
    fit             the largest batches and images that fit, what to change; `choose_batch` for auto_batch
    describe        what `vqa-sft memory` prints
    out_of_memory   `halve_batch`, `explains_out_of_memory`

Import from here: these modules. May import: what models may.
"""
