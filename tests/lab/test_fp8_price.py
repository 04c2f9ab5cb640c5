"""What an FP8 base changes is measured on a CPU, emulated."""

import re
import sys

import numpy as np
import pytest

from vqa_sft.lab import fp8_price
from vqa_sft.models import fp8_base

pytestmark = pytest.mark.medium


def test_logits_and_losses_of_both_bases_are_compared(capsys, monkeypatch, tmp_path, as_it_loads):
    monkeypatch.setattr(fp8_price, "in_own_process", lambda function, base, args: function(base, args))
    monkeypatch.setattr(fp8_base, "why_not", fp8_base.why_not)  # given back after the test
    given = ["--model", "tiny", "--rows", "4", "--steps", "2", "--use_cpu", "--work", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", ["fp8_price", *given])
    fp8_price.main()
    said = capsys.readouterr().out
    (error,) = re.findall(r"FP8 base against whole base: relative error ([\d.]+)%", said)
    assert 0.5 < float(error) < 20
    steps = re.findall(r"^\| (\d) \| ([\d.]+) \| ([\d.]+) \|$", said, re.MULTILINE)
    assert [step for step, *_ in steps] == ["1", "2"]
    assert all(whole != rounded for _, whole, rounded in steps)


def test_the_error_is_that_of_centred_logits():
    logits = np.array([[0.0, 2.0], [1.0, 5.0]])
    assert fp8_price.describe(logits + 7, logits).startswith("relative error 0.00%, the largest 0.0000, 0 answers")
    assert fp8_price.describe(logits[:, ::-1], logits) == "relative error 200.00%, the largest 4.0000, 2 answers differ"
