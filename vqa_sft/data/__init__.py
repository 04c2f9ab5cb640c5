"""Any source becomes checked examples: rows, columns, answers, images; near-duplicates, folds and splits. No torch.

    names -> rows        sources: find_files, find_encoding; read_text, read_json, read_arrow
    rows -> examples     examples: find_columns, settle_columns; read_row (cells, read_images); settle_answers (answers)
    classifications      image_folder; classes (lists, near names); settle_classes; check_classes
    their candidates     class_probs: a file of likely classes; candidates: those of rows
    what is wrong        problems: one table; check: a whole data set; fix: a copy without bad rows
    images -> folds      scan, duplicates (hash_images, compare_images), folds, split

Import from here: `examples.read_examples`, `options.ReadOptions`, `sources`, `columns.Columns`, `problems.Problems`,
`folds`, `split`. May import: the shared files (questions, images, errors, files, console).
"""
