"""What people read: text, JSON and page of `vqa-sft check`, the page of `vqa-sft report`, the table of `vqa-sft folds`.

No torch.
Import from here: `check_text.describe`, `check_json.as_dict`, `check_page.write_page`, `folds_text.describe_folds`,
`report_page.write_report`.
May import: runs, predictions, config, batch, data, the shared files.
"""
