import json

import pytest

from vqa_sft.lab import start


def test_every_case_finds_the_caches_that_its_name_says():
    cases = start.cases_of([500, 3000])
    assert len(cases) == 12 and len(set(cases)) == 11  # the rule, warm, with 3,000 rows comes twice
    for before, case in zip(cases, cases[1:], strict=False):
        if case.how != "uncompiled" and not case.cold:
            # What was compiled before lies there; after a cold start of few rows the rule may have compiled nothing.
            assert before.how == "compiled" or before in (start.Case("rule", 500), start.Case("rule", start.LONG, True))


@pytest.mark.slow
def test_the_start_is_measured_on_a_cpu(tmp_path, monkeypatch, capfd):
    monkeypatch.setattr("sys.argv", ["start", "--tiny", "--only", "uncompiled", "--work", str(tmp_path)])
    start.main()
    (line,) = [json.loads(line) for line in capfd.readouterr().out.splitlines() if line.startswith('{"uncompiled')]
    found = line["uncompiled, 32 rows"]
    assert 0 < found["first_s"] < found["end_s"] and found["weights_s"] > 0


def test_without_a_gpu_the_full_shapes_are_refused_before_anything_is_written(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr("sys.argv", ["start", "--work", str(tmp_path / "work")])
    with pytest.raises(SystemExit) as ended:
        start.main()
    assert ended.value.code == 2 and "--tiny" in capsys.readouterr().err and not (tmp_path / "work").exists()
