"""Any source becomes checked examples: rows, columns, answers, images; near-duplicates, folds and splits. No torch.

    names -> rows        sources: find_files, find_encoding, read_json, read_arrow
    rows -> examples     examples: find_columns, settle_columns, read_row (read_images, check_row), settle_answers
    what is wrong        problems: one table; check: a whole data set; fix: a copy without bad rows
    images -> folds      scan, duplicates (hash_images, compare_images), folds, split

Import from here: `examples.read_examples`, `options.ReadOptions`, `sources`, `columns.Columns`, `problems.Problems`,
`folds`, `split`. May import: the shared files (errors, letters, files, console).
"""
