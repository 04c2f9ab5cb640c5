"""A run as a decision model: `decision.json` and `decision_template.jinja` beside its weights.

transformers' `pipeline("decision")` and `transformers serve` read both, and answer with the run's own prompt, letters
and temperature.
"""

import io
from itertools import product
from typing import Any

import torch
from PIL import Image
from transformers import DecisionConfig, ProcessorMixin
from transformers.decision import label_token_ids
from transformers.decision.template_utils import Question, prepare_inputs

from vqa_sft.batch.collator import AnswerCollator
from vqa_sft.batch.decision_template import decision_template
from vqa_sft.batch.template import answer_prefix
from vqa_sft.errors import InputError, explains
from vqa_sft.models.scoring import find_letter_ids
from vqa_sft.predictions.calibration import Calibration, read_calibration
from vqa_sft.questions.letters import LETTERS
from vqa_sft.questions.types import find_type
from vqa_sft.runs.folder import Run

# Of questions of each type, in both languages.
_QUESTIONS = ("Who is it?", "How many {are} there?", "무슨 색인가요?", 'What does the "sign" say?\n', "Where is it?")


def decision_config(run: Run, processor: ProcessorMixin, adapter: str | None = None) -> DecisionConfig:
    """What transformers' decision models need of a run: its letters as they are spelt, the temperature of rows in
    their own order, its prompt. `adapter` names the folder of the adapter beside the base's weights.

    Raises InputError for a run that cannot be expressed so.
    """
    folder = str(run.folder)
    calibration = read_calibration(folder, {}) or Calibration()
    if calibration.bias is not None:
        raise InputError(
            f"the calibration of {folder} has a bias for each letter, and decision.json holds a temperature alone. "
            'Remove "orders identity" from its calibration.json, or its bias.'
        )
    labels = _labels(run, processor)
    reads = {"has_images": run.has_images, "has_context": run.has_context}
    reads["is_classification"] = run.classes is not None
    # The template refuses control tokens. That transformers marks them too fails with tokenizers that add a token of
    # their own, and with processors that look up tokens by their characters (Idefics3, SmolVLM).
    for marks in (True, False):
        config = DecisionConfig(
            labels={kind: labels for kind in Question.questions_types},
            temperature={kind: calibration.temperature for kind in Question.questions_types},
            chat_template=decision_template(processor, run.prompts, **reads),
            sanitize_control_tokens=marks,
            adapter=adapter,
        )
        try:
            _check_prompt(config, run, processor)
        except InputError:
            if not marks:
                raise
        else:
            break
    return config


def _labels(run: Run, processor: ProcessorMixin) -> list[str]:
    """The letters as transformers finds their tokens again. Raises InputError."""
    letter_ids = find_letter_ids(processor, run.num_letters, run.prompts).tolist()
    space = answer_prefix(processor, run.prompts.template_options)[1]
    labels = []
    for letter, letter_id in zip(LETTERS, letter_ids, strict=False):
        spelt = (space + letter, letter, processor.tokenizer.convert_ids_to_tokens(letter_id))
        found = [text for text in spelt if _has_id(processor, text, letter_id)]
        if not found:
            raise InputError(f"decision.json cannot name the token of {letter!r} in this model.")
        labels.append(found[0])
    return labels


def _has_id(processor: ProcessorMixin, label: str, letter_id: int) -> bool:
    try:
        return label_token_ids(processor.tokenizer, (label,)) == [letter_id]
    except ValueError:
        return False


def _check_prompt(config: DecisionConfig, run: Run, processor: ProcessorMixin) -> None:
    """Raises InputError where transformers makes another prompt of a question than the run was trained on."""
    collator = AnswerCollator(processor, run.prompts, run.num_letters or 0)
    file = io.BytesIO()
    Image.linear_gradient("L").resize((120, 84)).save(file, "PNG")
    nums = (1, 2) if run.has_images else (0,)
    for num_images, question, context in product(nums, _QUESTIONS, ("", "A {hint}.") if run.has_context else ("",)):
        choices = ["x", "y {text}"]
        row: dict[str, Any] = {
            "id": "sample",
            "question": question.strip(),
            "context": context,
            "choices": choices,
            "answer": None,
        }
        row |= {"images": [{"bytes": file.getvalue(), "path": None}] * num_images}
        row["question_type"] = find_type(question.strip(), choices if run.classes is None else [])
        request: dict[str, Any] = {"state": {"images": ["image-1"] * num_images}}
        request["state"] |= {"context": context} if run.has_context else {}
        request["questions"] = {"q": {"type": "choice", "instructions": question, "criteria": dict.fromkeys(choices)}}
        request["assets"] = {"image-1": Image.open(file)} if num_images else {}
        with explains(Exception, "transformers' decision pipeline refuses the run's prompt"):
            [(inputs, _)] = prepare_inputs(config, request, processor)
        expected = collator([row])
        same = [
            name in inputs and torch.equal(inputs[name].to(expected[name].dtype), expected[name])
            for name in ("input_ids", "pixel_values")
            if name in expected
        ]
        if not all(same):
            raise InputError(
                "transformers' decision pipeline makes another prompt than the run was trained on: "
                f"{processor.tokenizer.decode(inputs['input_ids'][0])[-200:]!r}."
            )
