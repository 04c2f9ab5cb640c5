"""The benchmark of candidates runs on a CPU."""

import re
import sys

from vqa_sft.lab import candidate_speed


def test_every_encoder_and_the_classifier_are_timed(capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["candidate_speed", "--tiny"])
    candidate_speed.main()
    said = capsys.readouterr().out
    assert len([number for number in re.findall(r": (\d+) images/s", said) if int(number) > 0]) == 2
    assert "linear probe, five folds of 60 rows, 3 classes" in said
