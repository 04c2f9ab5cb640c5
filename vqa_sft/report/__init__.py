"""The text, the JSON and the page of `vqa-sft check`, and the text of `vqa-sft folds`. No torch.

Import from here: `check_text.describe`, `check_json.as_dict`, `check_page.write_page`, `folds_text.describe_folds`.
May import: predictions, config, batch, data, the shared files.
"""
