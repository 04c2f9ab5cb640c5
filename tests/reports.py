"""What `vqa-sft check` finds in a file of training rows."""

from vqa_sft.batch.prompts import Prompts
from vqa_sft.data.check import TRAINING, check
from vqa_sft.data.examples import read_examples
from vqa_sft.data.options import ReadOptions


def report_on(path, processor=None, **options):
    data = [(TRAINING, read_examples(str(path), ReadOptions(**options)))]
    return check(data, distance=None, prompts=Prompts(), processor=processor)[0]


def found(report):
    """Kind of problem -> labels."""
    return {problem.kind: [label for _, _, label in problem.rows] for problem in report.problems}
