"""`python -m vqa_sft.cli`: the same as `vqa-sft`."""

from vqa_sft.cli.main import main

main()
