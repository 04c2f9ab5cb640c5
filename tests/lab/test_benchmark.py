from types import SimpleNamespace

import pytest
import torch

from vqa_sft.errors import InputError
from vqa_sft.lab import benchmark, benchmark_cases, watch


def test_the_table_has_a_line_for_every_case_failed_or_not():
    cases = [benchmark_cases.Case(name, "train", "tiny", baseline="a") for name in "abc"]
    done = {"examples_per_s": 3.14, "rows_a_step": 16, "peak_gib": 12.3, "compilations": 6, "idle": 0.04, "tflop": 10}
    done |= {"first_steps_s": 61.2}
    results = {"a": done, "b": {"failed": 2}, "c": done | {"examples_per_s": 31.4}}
    assert benchmark.table(cases, results, 785).splitlines()[2:] == [
        "| a | 16 | 3.1 | 1.0 | 12.3 | 4% | 6 | 4% | 61 s |",
        "| b | | failed with exit code 2 | | | | | | |",
        "| c | 16 | 31.4 | 10.0 | 12.3 | 40% | 6 | 4% | 61 s |",
    ]


def test_the_time_that_a_gpu_does_nothing_but_exchange_is_without_that_of_kernels_beside_it():
    def event(name, start, end, device="CUDA"):
        where = getattr(torch.autograd.DeviceType, device)
        return SimpleNamespace(name=name, device_type=where, time_range=SimpleNamespace(start=start, end=end))

    events = [event("gemm", 0, 10), event("ncclDevKernel_AllReduce", 5, 14), event("gemm", 12, 13)]
    events += [event("ncclDevKernel_AllReduce", 20, 23), event("aten::mm", 0, 99, "CPU")]
    assert watch.exchanging_s(events) == pytest.approx(6e-6)  # 10 to 12, 13 to 14 and 20 to 23 us


def test_the_longest_gaps_are_between_the_last_kernel_to_end_and_the_next():
    def event(key, start, end, device="CUDA"):
        where = getattr(torch.autograd.DeviceType, device)
        return SimpleNamespace(key=key, device_type=where, time_range=SimpleNamespace(start=start, end=end))

    # "long" is still running when "short", which begins after it, has ended.
    events = [event("last", 9000, 9500), event("long", 0, 5000), event("short", 100, 200), event("next", 7000, 8500)]
    events.append(event("aten::mm", 5000, 7000, "CPU"))
    assert watch.longest_gaps(events, 2) == ["2.00 ms: long -> next", "0.50 ms: next -> last"]


def test_cases_of_a_tool_that_is_not_installed_are_left_out_and_an_error_where_asked_for(monkeypatch, capsys):
    cases = [benchmark_cases.Case("7B train", "train", "tiny"), benchmark_cases.Case("7B ms-swift", "swift", "tiny")]
    monkeypatch.setattr(benchmark, "missing_packages", lambda peer: ["ms-swift", "dacite"])
    for only in (None, ["7B"]):
        assert benchmark.chosen_cases(cases, only) == cases[:1]
        assert capsys.readouterr().out.splitlines() == [
            "Left out; install ms-swift for 7B ms-swift: pip install --no-deps ms-swift dacite"
        ]
    assert benchmark.chosen_cases(cases, ["7B train"]) == cases[:1]
    assert capsys.readouterr().out == ""
    with pytest.raises(InputError, match="--only swift names what cannot run here; install ms-swift"):
        benchmark.chosen_cases(cases, ["7B train", "swift"])
    with pytest.raises(InputError, match="--only 8B names no case"):
        benchmark.chosen_cases(cases, ["8B"])
    monkeypatch.setattr(benchmark, "missing_packages", lambda peer: [])
    assert benchmark.chosen_cases(cases, None) == cases


KINDS = ["TRL", "train", "train, two GPUs", "cached features", "FP8 base", "score", "score, FP8 base", "rotations"]
KINDS += ["five runs", "one row at a time"]
OF_FAMILIES = [case.name for row in benchmark_cases.FAMILIES for case in benchmark_cases.family_cases(*row)]


@pytest.mark.slow
@pytest.mark.parametrize("names", [KINDS, OF_FAMILIES], ids=["every kind", "every family"])
def test_every_case_runs_on_a_cpu(tmp_path, monkeypatch, capfd, names):
    only = [token for name in names for token in ("--only", name)]
    monkeypatch.setattr("sys.argv", ["benchmark", "--tiny", "--steps", "2", "--work", str(tmp_path), *only])
    benchmark.main()
    lines = [line.split("|") for line in capfd.readouterr().out.splitlines() if line.startswith("|")][2:]
    assert [line[1].strip() for line in lines] == names
    assert all(float(line[3]) > 0 for line in lines)
