"""`vqa-sft ...`: laptop tools, a thin shell over the other packages. Nobody imports it."""
