"""Any source becomes checked examples: rows, columns, answers, images; near-duplicates, folds and splits. No torch.

Import from here: `examples.read_examples`, `options.ReadOptions`, `sources`, `columns.Columns`, `problems.Problems`,
`folds`, `split`.
May import: the shared files (errors, letters, files, console).
"""
