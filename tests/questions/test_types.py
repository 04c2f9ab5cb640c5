import time
import unicodedata

import pytest

from vqa_sft.questions.types import RULES, TYPES, WORDS, find_type

WORDS_OF_CHOICES = ["cat", "dog", "fox"]

# type: questions that we wrote, eight or more of each type in each language; the choices of yes_no come below.
QUESTIONS = {
    "counting": """
        How many dogs are lying on the grass?
        How many colours does the flag have?
        How many letters are painted on the wall?
        Including the driver, how many people are in the boat?
        What is the number of windows on the top floor?
        What's the total number of cups on the tray?
        Count the candles on the cake.
        How many more spoons than forks are there?
        마당에 닭이 몇 마리 있나요?
        벤치에 앉은 사람은 모두 몇명입니까?
        접시 위의 만두는 몇 개인가요?
        주차된 트럭은 몇 대일까요?
        선반에 책이 몇권 꽂혀 있나요?
        창문의 개수는 얼마나 되나요?
        줄을 선 사람의 수는 얼마인가요?
        깃발에는 몇 가지 색이 쓰였나요?
        이 건물은 몇 층으로 되어 있나요?
        하늘에 얼마나 많은 풍선이 떠 있나요?
    """,
    "colour": """
        What color is the umbrella?
        What colour are the boy's shoes?
        What is the color of the kettle?
        Which colour does not appear on the kite?
        What two colors is the ferry painted in?
        What color is the lettering on the sign?
        The tablecloth is what color?
        What is the dominant colour of the tiles?
        우산은 무슨 색인가요?
        소파의 색깔은 무엇인가요?
        지붕 색상은 무엇입니까?
        아이가 쓴 모자는 어떤 색상인가요?
        문은 어떤색으로 칠해져 있나요?
        간판에 적힌 글자의 색깔은 무엇인가요?
        커튼의 색상 조합으로 알맞은 것은 무엇인가요?
        인형의 머리색은 무엇일까요?
        풍선의 색깔이 아닌 것은 무엇인가요?
    """,
    "ocr": """
        What number is written on the bus?
        What number is on the goalkeeper's back?
        What does the yellow sign say?
        What is printed on the mug?
        What brand is the tractor?
        What is the name of the bakery shop?
        What is the title of the book on the desk?
        What time does the tower clock show?
        What is the speed limit on this bridge?
        According to the menu, which soup costs most?
        버스에 적힌 번호는 무엇인가요?
        간판에 쓰여 있는 글자는 무엇인가요?
        현수막의 문구는 무엇입니까?
        벽시계가 가리키는 시각은 몇 시인가요?
        이 빵집의 이름은 무엇인가요?
        커피의 가격은 얼마인가요?
        운동화의 브랜드는 무엇인가요?
        우유의 유통기한은 언제까지인가요?
        칠판에 써 있는 단어는 무엇인가요?
        정류장에 오는 버스는 몇 번인가요?
    """,
    "place": """
        Where is the kitten sleeping?
        Where was this photo taken?
        In the picture, where is the kite in relation to the tree?
        What room is this?
        What kind of place is shown?
        In which city does this tram run?
        Which of these states is farthest south?
        On which side of the road is the mailbox?
        강아지는 어디에 누워 있나요?
        이 사진은 어디서 찍었을까요?
        사람들이 모인 장소는 무엇인가요?
        버스가 서 있는 곳은 어디인가요?
        이곳은 어떤 장소인가요?
        자전거의 위치는 어디입니까?
        이 사진의 배경은 무엇인가요?
        어느 도시의 야경일까요?
        고기는 어느 접시에 담겨 있나요?
    """,
    "attribute": """
        What is the bench made of?
        What shape is the mirror?
        What material is the roof made out of?
        What pattern does the curtain have?
        What is the weather like?
        What season is it?
        What time of day is it?
        What is the expression on the girl's face?
        How old is the baby?
        의자는 어떤 재질인가요?
        탁자의 모양은 무엇인가요?
        커튼의 무늬는 무엇인가요?
        바닥은 무엇으로 만들어졌나요?
        오늘 날씨는 어떤가요?
        사진을 찍은 계절은 언제인가요?
        이 사진은 언제 촬영되었나요?
        도로의 상태는 어떠한가요?
        고양이는 어떤 자세로 자고 있나요?
        아이스크림은 무슨 맛인가요?
    """,
    "general": """
        What is the woman holding?
        Who is standing next to the horse?
        Why is the boy wet?
        What animal is behind the fence?
        Which of the following organs is labelled C?
        What can be inferred from the picture?
        What is the man in the striped shirt doing?
        Which solution has a higher concentration of particles?
        여자가 들고 있는 것은 무엇인가요?
        아이들은 무엇을 하고 있나요?
        이 음식은 무엇인가요?
        식탁 위에 없는 것은 무엇인가요?
        동상은 누구를 기념하나요?
        이 기계의 용도는 무엇인가요?
        우산을 쓴 이유는 무엇인가요?
        이 꽃의 이름은 무엇인가요?
    """,
}

# What looks like another type.
HARD = {
    "What is the colored object on the shelf?": "general",
    "What is the toy with the same color as the car?": "general",
    "What is behind the red car?": "general",
    "What is the name of the colony shown?": "general",
    "Which word does not rhyme with the others?": "general",
    "How many years does it take until the sum doubles?": "general",
    "This is a place where people pray. What is the man holding?": "general",
    "What is the person reading the newspaper wearing?": "general",
    "빨간색 물건은 무엇인가요?": "general",
    "뚜껑 색깔이 파란 병은 무엇인가요?": "general",
    "이 지도에서 색깔은 무엇을 의미하나요?": "general",
    "이 장소에서 볼 수 없는 것은 무엇인가요?": "general",
    "별 모양 과자는 무엇인가요?": "general",
    "초록 글씨가 적힌 도구는 무엇인가요?": "general",
    "이 전선은 주로 어디에 사용되나요?": "general",
    "시계는 몇 시를 가리키나요?": "ocr",
    "몇 번 버스인가요?": "ocr",
    "지금 온도는 몇 도인가요?": "ocr",
    "화분에 적힌 도시는 어디인가요?": "ocr",
    "줄에서 몇 번째에 서 있나요?": "place",
    "아이는 몇 살로 보이나요?": "attribute",
    "피곤해서 걸을 수는 없는 사람은 누구인가요?": "general",
}


def test_questions_of_every_type_are_recognised():
    wrong = [
        (question.strip(), find_type(question, WORDS_OF_CHOICES), expected)
        for expected, questions in QUESTIONS.items()
        for question in questions.strip().splitlines()
        if find_type(question, WORDS_OF_CHOICES) != expected
    ]
    assert wrong == []


@pytest.mark.parametrize("question", HARD)
def test_questions_that_look_like_another_type(question):
    assert find_type(question, WORDS_OF_CHOICES) == HARD[question]


@pytest.mark.parametrize(
    "choices",
    [
        ["yes", "no"],
        ["Yes.", "No, it is closed."],
        ["No", "Yes", "Not sure"],
        ["True", "False"],
        ["예", "아니오"],
        ["네", "아니요"],
        ["있다", "없다"],
        ["있습니다", "없습니다"],
        ["맞다", "틀리다", "알 수 없다"],
        ["네, 켜져 있습니다.", "아니요, 꺼져 있습니다."],
    ],
)
def test_choices_that_say_yes_and_no_decide_whatever_the_question(choices):
    assert find_type("Is the colour of the lamp the same as where it stands?", choices) == "yes_no"
    assert find_type("불이 켜져 있나요?", choices) == "yes_no"


@pytest.mark.parametrize("choices", [["yes", "no", "red"], ["No parking", "Yes minister"], ["네모", "예술"], []])
def test_other_choices_are_no_yes_or_no(choices):
    assert find_type("Is the light on?", choices) == "general"
    assert find_type("불이 켜져 있나요?", choices) == "general"


def test_letter_case_spaces_and_decomposed_hangul_make_no_difference():
    assert find_type("  HOW\n  MANY   dogs?", WORDS_OF_CHOICES) == "counting"
    assert find_type(unicodedata.normalize("NFD", "소파의 색깔은 무엇인가요?"), WORDS_OF_CHOICES) == "colour"


def test_a_long_text_is_judged_by_its_end():
    text = "How many people came? " + "They all went home. " * 50
    assert find_type(text + "What colour is the door?", WORDS_OF_CHOICES) == "colour"


def test_every_rule_is_of_a_known_type_and_every_list_is_used():
    assert {name for name, _, _ in RULES} == set(TYPES) - {"yes_no", "general"} == set(QUESTIONS) - {"general"}
    text = " ".join(pattern for rule in RULES for pattern in rule)
    assert [word for word in WORDS if f"<{word}>" not in text] == []


@pytest.mark.parametrize("piece", ["what ", "what is the ", "색깔", "표지판에 ", "title of the a b ", "where", "("])
def test_a_hostile_text_costs_no_time(piece):
    text = piece * 100_000
    start = time.process_time()
    assert find_type(text, [text] * 26) in TYPES
    assert time.process_time() - start < 0.1  # takes less than a millisecond


def test_ten_thousand_rows_take_less_than_a_second():
    questions = [line.strip() for lines in QUESTIONS.values() for line in lines.strip().splitlines()]
    start = time.process_time()
    for i in range(10_000):
        find_type(questions[i % len(questions)], WORDS_OF_CHOICES)
    assert time.process_time() - start < 1  # about 0.15 s
