"""Which choices may move. Every line of a table is a row's choices, or a question and them."""

import random
import time
import unicodedata

import pytest

from vqa_sft.questions.references import count_free, find_references


def lines(table):
    return [line.strip() for line in table.strip().splitlines() if not line.strip().startswith("#")]


def choices_of(line):
    return [choice.strip() for choice in line.split("|")]


# All keep their places.
KEEP_ORDER = """
    # One names others by their letters.
    cat | dog | Both A and B | fox
    cat | dog | both a and b
    cat | dog | fox | A and C only
    cat | dog | fox | A, B, and C
    cat | dog | fox | Both (A) & (B) are correct
    cat | dog | fox | "A" and "B"
    cat | dog | fox | A and B, but not C
    cat | Neither A nor C | dog
    cat | dog | fox | Either option A or option B
    cat | dog | fox | Only A
    cat | dog | fox | All except C
    cat | dog | fox | The same as choice C
    cat | dog | fox | option b
    Android | iOS | Both A and B | None of the above
    고양이 | 개 | A와 B 모두 | 여우
    고양이 | 개 | A, B 둘 다 정답 | 여우
    고양이 | 개 | 여우 | B와 C만 해당
    고양이 | 개 | A도 B도 아님 | 여우
    고양이 | 개 | 여우 | A 또는 B
    고양이 | 개 | 여우 | A만
    # By numbers and other labels, whatever the letters are.
    cat | dog | Both 1 and 2 | fox
    cat | dog | Options 1 and 2 | fox
    고양이 | 개 | 보기 1과 2 | 여우
    고양이 | 개 | 1번과 2번 모두 | 여우
    고양이 | 개 | ①과 ② | 여우
    고양이 | 개 | ①② | 여우
    고양이 | 개 | ㄱ, ㄴ | 여우
    고양이 | 개 | (가)와 (나) | 여우
    # By their place.
    cat | dog | The first two options | fox
    고양이 | 개 | 첫 번째 보기와 같다 | 여우
    # What stands above it, where others follow.
    cat | All of the above | dog | fox
    cat | dog | Both of the above | fox
    고양이 | 위의 모두 | 개 | 여우
    # One choice alone can move nowhere.
    cat | None of these
    # Labels in order: the options stand in the image.
    A | B | C | D
    a | b
    (A) | (B) | (C)
    **A** | **B** | **C**
    Ａ | Ｂ | Ｃ
    A | B | C | D | C or D
    A | B | C | Cannot be determined
    A | B | Both are the same
    Option A | Option B | Option C
    Figure 1 | Figure 2 | Figure 3
    Sample A | Sample B | neither; the samples have the same temperature
    I | II | III | IV
    ① | ② | ③ | ④
    ㄱ | ㄴ | ㄷ | ㄹ
    ㄱ | ㄴ | ㄱ, ㄴ | ㄴ, ㄷ
    (가) | (나) | (다) | (라)
    Ⅰ | Ⅱ | Ⅲ
    그림 1 | 그림 2 | 그림 3
    1번 그림 | 2번 그림
    A | B | A와 B가 같다 | 알 수 없다
    # They begin with labels in order.
    A. cat | B. dog | C. fox
    (a) cat | (b) dog
    A: cat | B: dog | None of the above
    1. cat | 2. dog | 3. fox
    ① 고양이 | ② 개 | ③ 여우
    가. 고양이 | 나. 개 | 다. 여우
"""

# The last one stays, the others move.
KEEP_LAST = """
    cat | dog | fox | None of the above
    cat | dog | fox | None of the above is correct.
    cat | dog | fox | Other (none of the above)
    cat | dog | fox | All the above
    cat | dog | fox | All of these
    cat | dog | fox | None of these (N/A)
    cat | dog | fox | None of the other options
    cat | dog | fox | No correct answer
    cat | dog | fox | All answers are correct
    cat | dog | Both of these
    cat | dog | fox | Not listed
    cat | dog | fox | D. None of the above
    고양이 | 개 | 여우 | 위의 모두
    고양이 | 개 | 여우 | 위의 모든 것
    고양이 | 개 | 여우 | 위 보기 중 없음
    고양이 | 개 | 여우 | 위의 어느 것도 아님
    고양이 | 개 | 여우 | 이상 모두
    고양이 | 개 | 여우 | 모두 정답
    고양이 | 개 | 여우 | 정답 없음
    고양이 | 개 | 여우 | 정답이 없습니다.
    고양이 | 개 | 여우 | 해당 사항 없음
    고양이 | 개 | 여우 | 보기에 정답이 없음
    고양이 | 개 | 여우 | 모두 맞다
"""

# All move.
MOVE = """
    cat | dog | fox | owl
    # A letter that is no label: units, keys, grades, chemical elements, squares of a board, words.
    Vitamin A | Vitamin B | Vitamin C | Vitamin D
    Plan A | Plan B | Plan C
    Grade A | Grade B
    5 A | 10 A | 15 A | 20 A
    C major | A minor | G major | D minor
    Both A and B blood types | only O | only AB
    A | B | AB | O
    Type A and B | Type O
    Vitamin A and C | iron | zinc
    C | E | G | A
    K | C | F | R
    a1 | b2 | c3 | d4
    A | The | An | In
    I | You | He | She
    a cat and a dog | a cat | a dog
    B-52 | F-16 | A-10
    E. coli | A. thaliana | B. subtilis
    E and F | G and H | cat | dog
    A+B | A-B | B/A
    # Roman numbers stand for statements of the question.
    I only | II only | I and II | I, II and III
    # Numbers and times.
    1 | 2 | 3 | 4
    1번 | 2번 | 3번 | 4번
    1 and 2 | 2 and 3 | 3 and 4
    Only 1 | Only 2 | Both 1 and 2
    1.5 | 2.5 | 3.5
    1:30 | 2:45 | 3:15
    (1, 2) | (2, 3) | (a, b) | (b, a)
    # What is seen.
    both | left | right | none
    all of them | none of them | two of them
    All of these people | one of them | cat
    above the table | below the table | on the left
    One above the other | Side by side | far apart
    the last choice of cake he made | a tart | a pie
    he answers the phone | he asks | he waits
    True | False | Not given
    # They mean the same in any place, and stand first or in the middle as they are.
    None of these | cat | dog | fox
    정답 없음 | 고양이 | 개
    # Korean words that only look like it.
    두 음료 모두 | 왼쪽 음료 | 오른쪽 음료 | 음료가 없음
    왼쪽 | 오른쪽 | 둘 다 | 둘 다 아님
    모두 서 있음 | 누워 있음 | 앉아 있음
    없음 | 왼쪽 | 오른쪽 | 직진
    계단 없음 | 직선 계단 | 나선형 계단
    고장 | 점검 중 | 이상 없음
    24도 이상 | 20도 이상 | 26도 이상
    이상해씨 | 피카츄 | 파이리
    책상 위 | 침대 옆 | 창문 앞
    A형 | B형 | AB형 | O형
    A형과 B형 | O형 | AB형
    비타민 A | 비타민 B | 비타민 C
    A팀 | B팀 | C팀
    A와 B 사이 | 강가 | 산
    가나 | 나이지리아 | 케냐
    나 | 너 | 우리
    가나다 | 나만 | 모두 | 없음
    가방 | 모두 | 나무 | 다리 | 라면 | 바나나 | 사과
    1개 | 2개 | 3개 | 4개
    ㄱ자 모양 | ㄷ자 모양 | ㅁ자 모양
    해당 지역 주민 | 관광객 | 학생
    보기 좋은 정원 | 숲 | 바다
    정답게 이야기하는 모습 | 싸우는 모습 | 자는 모습
    위 아래 모두 | 위 | 아래
"""


@pytest.mark.parametrize("line", lines(KEEP_ORDER))
def test_choices_that_refer_to_letters_or_places_keep_their_order(line):
    num_free, reference = find_references("Which is it?", choices_of(line))
    assert num_free == 0 and reference in choices_of(line)


@pytest.mark.parametrize("line", lines(KEEP_LAST))
def test_a_last_choice_that_means_all_others_stays_last(line):
    *others, last = choices_of(line)
    assert find_references("Which is it?", [*others, last]) == (len(others), last)


@pytest.mark.parametrize("line", lines(MOVE))
def test_texts_that_stand_for_themselves_move(line):
    assert find_references("Which is it?", choices_of(line)) == (len(choices_of(line)), "")


def test_two_last_choices_that_mean_all_others_both_stay():
    assert count_free("Which is it?", ["cat", "dog", "All of the above", "None of the above"]) == 2


# A question, its choices, and how many of them may move.
QUESTIONS = """
    # It names the choices.
    Is option A or B larger? | cat | dog | fox | 0
    Which of A, B, C and D is correct? | cat | dog | fox | owl | 0
    Which choice (A, B, or C) completes the series? | cat | dog | fox | 0
    Which box comes next? Select answers from A-E | cat | dog | fox | owl | hen | 0
    다음 A, B, C 중 옳은 것은? | 고양이 | 개 | 여우 | 0
    다음 ①~③ 중 옳은 것은? | 고양이 | 개 | 여우 | 0
    보기 A와 B의 차이는? | 고양이 | 개 | 여우 | 0
    # It lists them.
    Which is it? A. cat B. dog C. fox | cat | dog | fox | 0
    어느 것인가요? (A) 고양이 (B) 개 | 고양이 | 개 | 0
    # Letters of the image are none of the choices'.
    Points A, B, C and D lie on a circle. What is the angle ABC? | 30 | 40 | 50 | 60 | 4
    How long is it between A and B? | 1 m | 2 m | 2
    How long is it from A to D? | 1 m | 2 m | 3 m | 4 m | 4
    What does A show? | cat | dog | fox | 3
    A new bike: is it blue? | yes | no | 2
    Which of the answers is a dog? | cat | dog | 2
    이 보기 좋은 정원은 어디인가요? | 서울 | 부산 | 2
    # Numbers in order are labels where the question asks which image, and else an answer.
    Which figure completes the pattern? | 1 | 2 | 3 | 4 | 0
    어느 그림이 알맞은가요? | 1번 | 2번 | 3번 | 0
    How many triangles are in the figure? | 1 | 2 | 3 | 4 | 4
    Which number replaces the question mark? | 1 | 2 | 3 | 4 | 4
    몇 번 출구인가요? | 1번 | 2번 | 3번 | 3
    # So are letters.
    Which figure fits? | A | B | C | 0
    What grade is written on the paper? | A | B | C | 3
    이 사람의 혈액형은 무엇인가요? | A | B | AB | O | 4
    # The question says what the labels are.
    <보기> ㄱ. 물이 있다. ㄴ. 불이 있다. | ㄱ | ㄴ | ㄱ, ㄴ | 0
    옳은 것은? ㄱ. 물이 있다. ㄴ. 불이 있다. ㄷ. 돌이 있다. | ㄱ, ㄴ | ㄴ, ㄷ | ㄱ, ㄷ | 3
"""


@pytest.mark.parametrize("line", lines(QUESTIONS))
def test_a_question_may_name_its_choices(line):
    question, *choices, num_free = choices_of(line)
    assert count_free(question, choices) == int(num_free)


def test_hangul_in_pieces_is_read_as_whole_hangul():
    choices = [unicodedata.normalize("NFD", text) for text in ("고양이", "개", "여우", "정답 없음")]
    assert count_free("Which?", choices) == 3


def test_any_text_is_read():
    rng = random.Random(0)
    pieces = [
        *"AaBbDZIiİıſK①②⑩ㄱㄴㅎ가나12(9)[].,:-~ \n",
        "99",
        " and ",
        "option ",
        "보기 ",
        " 중",
        "위의 모두",
        "none of the above",
    ]
    for _ in range(5_000):
        texts = ["".join(rng.choices(pieces, k=rng.randint(0, 8))) for _ in range(rng.randint(0, 5))]
        num_free, reference = find_references("".join(rng.choices(pieces, k=12)), texts)
        assert num_free == len(texts) or (num_free == 0 or 2 <= num_free < len(texts)) and reference


@pytest.mark.parametrize(
    "text", ["A, B, " * 4_000, "a " * 8_000, "none of the above " * 900, "위의 " * 5_000, "(A" * 8_000]
)
def test_long_texts_are_read_in_no_time(text):
    start = time.process_time()
    find_references(text, [text, "cat", f"{text}."])
    assert time.process_time() - start < 1
