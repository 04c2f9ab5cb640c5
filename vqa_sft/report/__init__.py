"""What people read: the text, JSON and page of `vqa-sft check`, and the table of `vqa-sft folds`. No torch.

Import from here: `check_text.describe`, `check_json.as_dict`, `check_page.write_page`, `folds_text.describe_folds`.
May import: predictions, config, batch, data, the shared files.
"""
