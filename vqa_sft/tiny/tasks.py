"""What the tiny base is asked to do with a drawn example while it is trained.

Letters alone do not move a model of this size from chance; four easier tasks beside the real one do:

    words     the question without choices, answered in words
    reading   "The answer is star." and lettered choices: the letter in front of a text
    both      the question with choices, answered by the letter and the words
    letter    the project's own prompt, answered by the letter alone
    variant   the same in other words: other system texts or none, "A)" for "A.", a closing line
"""

import numpy as np

from vqa_sft.batch.prompts import Prompts, render_messages
from vqa_sft.questions.letters import LETTERS, choice_to_letter

TASKS = ("letter", "variant", "both", "words", "reading")
DEFAULT = Prompts()
WORDS_SYSTEM = "Answer the question in a few words."
BOTH_SYSTEM = "Answer the multiple-choice question with the letter and the text of the right choice."
SYSTEMS = (
    "",  # the chat template's own
    "You are a helpful assistant. Answer with one letter.",
    "Look at the picture and answer with the letter of the right choice.",
    "그림을 보고 알맞은 보기의 기호로 답하세요.",
    "당신은 그림에 대한 객관식 문제를 푸는 도우미입니다. 정답의 기호만 쓰세요.",
)
USERS = (
    "{question}\n{choices}",
    "{question}\n\n{choices}",
    "{question}\n{choices}\nAnswer with the letter only.",
    "{question}\n{choices}\n\nAnswer:",
    "{question}\n{choices}\n정답 기호만 쓰세요.",
    "Question: {question}\nChoices:\n{choices}",
    "질문: {question}\n보기:\n{choices}",
)
CHOICES = ("{letter}. {text}", "{letter}) {text}", "({letter}) {text}", "{letter}: {text}")
READING = (
    "The answer is {text}.",
    "The right choice is {text}.",
    "Choose {text}.",
    "정답은 {text}입니다.",
    "Which one is {text}?",
)


def render_task(task: str, example: dict, rng: np.random.Generator) -> tuple[list[dict], str]:
    """Chat messages that ask `example` as `task` says, its choices in a random order; and the assistant's answer."""
    order = tuple(int(i) for i in rng.permutation(len(example["choices"])))
    letter = LETTERS[choice_to_letter(example["answer"], order)]
    text = example["choices"][example["answer"]]
    row = {"question": example["question"], "choices": example["choices"], "images": [example["image"]]}
    if task == "letter":
        return render_messages(row, order, DEFAULT), letter
    if task == "variant":
        return render_messages(row, order, _random_prompts(rng)), letter
    if task == "both":
        prompts = Prompts(BOTH_SYSTEM, choice=str(rng.choice(CHOICES)))
        return render_messages(row, order, prompts), f"{letter}. {text}"
    if task == "reading":
        prompts = DEFAULT if rng.random() < 0.5 else _random_prompts(rng)
        statement = str(rng.choice(READING)).format(text=text)
        return render_messages(row | {"question": statement}, order, prompts), letter
    if task == "words":
        content = [{"type": "image"}, {"type": "text", "text": row["question"]}]
        system = [{"role": "system", "content": WORDS_SYSTEM}] if rng.random() < 0.7 else []
        return [*system, {"role": "user", "content": content}], text
    raise ValueError(f"no task is called {task!r}")


def _random_prompts(rng: np.random.Generator) -> Prompts:
    system = DEFAULT.system if rng.random() < 0.4 else str(rng.choice(SYSTEMS))
    return Prompts(system, str(rng.choice(USERS)), str(rng.choice(CHOICES)))
