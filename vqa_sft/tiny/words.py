"""The words of the drawn questions, in English and Korean."""

COLOURS = {
    "red": ((214, 36, 36), "빨간색"),
    "green": ((40, 160, 60), "초록색"),
    "blue": ((40, 70, 215), "파란색"),
    "yellow": ((245, 218, 40), "노란색"),
    "orange": ((250, 135, 20), "주황색"),
    "purple": ((130, 45, 165), "보라색"),
    "pink": ((250, 150, 190), "분홍색"),
    "brown": ((115, 70, 30), "갈색"),
    "black": ((15, 15, 15), "검은색"),
    "grey": ((135, 135, 135), "회색"),
    "cyan": ((60, 205, 220), "하늘색"),
}
SHAPES = {
    "circle": ("circles", "원"),
    "square": ("squares", "사각형"),
    "triangle": ("triangles", "삼각형"),
    "star": ("stars", "별"),
    "diamond": ("diamonds", "마름모"),
    "cross": ("crosses", "십자가"),
    "heart": ("hearts", "하트"),
    "ring": ("rings", "고리"),
    "arrow": ("arrows", "화살표"),
    "moon": ("moons", "달"),
}
PLACES = {
    "top left": "왼쪽 위",
    "top": "위",
    "top right": "오른쪽 위",
    "left": "왼쪽",
    "middle": "가운데",
    "right": "오른쪽",
    "bottom left": "왼쪽 아래",
    "bottom": "아래",
    "bottom right": "오른쪽 아래",
}
NUMBER_WORDS = {
    "en": ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"),
    "ko": ("영", "하나", "둘", "셋", "넷", "다섯", "여섯", "일곱", "여덟", "아홉"),
}
YES_NO = {"en": ("yes", "no"), "ko": ("예", "아니요")}
# The last wording of each list is held out from training, to see how the base takes a question it has not read.
WORDINGS: dict[str, dict[str, tuple[str, ...]]] = {
    "digit": {
        "en": (
            "Which digit is this?", "What digit is written here?", "Which digit is shown in the picture?",
            "What number is this?", "Which number is written in the picture?", "What is the digit?",
            "Which digit do you see?",
        ),
        "ko": ("이 숫자는 무엇인가요?", "그림에 적힌 숫자는?", "사진 속 숫자는 무엇입니까?", "어떤 숫자인가요?"),
    },
    "letter": {
        "en": (
            "Which letter is this?", "What letter is written here?", "Which letter is shown in the picture?",
            "What is the letter?", "Which letter do you see?",
        ),
        "ko": ("이 글자는 무엇인가요?", "그림에 적힌 알파벳은?", "어떤 글자인가요?"),
    },
    "shape": {
        "en": (
            "What shape is this?", "Which shape is in the picture?", "What is drawn here?", "Which shape do you see?",
            "What is the shape?",
        ),
        "ko": ("이 모양은 무엇인가요?", "그림에 있는 도형은?", "무엇이 그려져 있나요?", "어떤 모양인가요?"),
    },
    "shape of": {
        "en": ("What shape is {colour}?", "Which shape is the {colour} one?", "What is the {colour} shape?"),
        "ko": ("{colour} 도형은 무엇인가요?", "{colour} 모양은?"),
    },
    "colour": {
        "en": (
            "What colour is the {shape}?", "What color is the {shape}?", "Which colour does the {shape} have?",
            "The {shape} is which colour?",
        ),
        "ko": ("{shape}의 색은 무엇인가요?", "{shape_topic} 무슨 색인가요?", "{shape}의 색깔은?"),
    },
    "background": {
        "en": ("What colour is the background?", "What is the background color?", "Which colour is the background?"),
        "ko": ("배경은 무슨 색인가요?", "배경의 색은?"),
    },
    "count": {
        "en": (
            "How many {shapes} are there?", "How many {shapes} are in the picture?", "Count the {shapes}.",
            "What is the number of {shapes}?", "How many {shapes} do you see?",
        ),
        "ko": ("{shape_topic} 몇 개인가요?", "그림에 {shape_subject} 몇 개 있나요?", "{shape}의 개수는?"),
    },
    "place": {
        "en": (
            "Where is the {shape}?", "In which part of the picture is the {shape}?", "Where is the {shape} placed?",
            "The {shape} is where?",
        ),
        "ko": ("{shape_topic} 어디에 있나요?", "{shape}의 위치는?", "{shape}의 위치는 어디인가요?"),
    },
    "bigger": {"en": ("Which shape is bigger?", "What is bigger?", "Which is the bigger shape?"),
               "ko": ("더 큰 도형은 무엇인가요?", "어느 도형이 더 큰가요?")},
    "smaller": {"en": ("Which shape is smaller?", "What is smaller?", "Which is the smaller shape?"),
                "ko": ("더 작은 도형은 무엇인가요?", "어느 도형이 더 작은가요?")},
    "darker": {"en": ("Which shape is darker?", "What is darker?", "Which is the darker shape?"),
               "ko": ("더 어두운 도형은 무엇인가요?", "어느 도형이 더 어두운가요?")},
    "further left": {"en": ("Which shape is further left?", "What is on the left?", "Which shape is to the left?"),
                     "ko": ("더 왼쪽에 있는 도형은 무엇인가요?", "왼쪽 도형은?")},
    "further right": {"en": ("Which shape is further right?", "What is on the right?", "Which shape is to the right?"),
                      "ko": ("더 오른쪽에 있는 도형은 무엇인가요?", "오른쪽 도형은?")},
    "higher": {"en": ("Which shape is higher?", "What is on top?", "Which shape is above the other?"),
               "ko": ("더 위에 있는 도형은 무엇인가요?", "위쪽 도형은?")},
    "more": {"en": ("Are there more {shapes} or {others}?", "Which are there more of, {shapes} or {others}?"),
             "ko": ("{shape}, {other} 중 더 많은 것은?", "{shape}, {other} 중 무엇이 더 많나요?")},
    "is bigger": {"en": ("Is the {shape} bigger than the {other}?", "Is the {shape} larger than the {other}?"),
                  "ko": ("{shape_subject} {other}보다 큰가요?", "{shape_subject} {other}보다 더 큰가요?")},
    "is left of": {"en": ("Is the {shape} to the left of the {other}?", "Is the {shape} left of the {other}?"),
                   "ko": ("{shape_subject} {other}보다 왼쪽에 있나요?", "{shape_subject} {other}의 왼쪽에 있나요?")},
    "is there": {"en": ("Is there a {shape} in the picture?", "Is there a {shape}?"),
                 "ko": ("그림에 {shape_subject} 있나요?", "{shape_subject} 보이나요?")},
    "larger number": {"en": ("Which number is larger?", "What is the larger number?",
                             "Which of the two numbers is larger?"),
                      "ko": ("더 큰 숫자는 무엇인가요?", "두 숫자 중 큰 것은?")},
}  # fmt: skip


def with_particle(word: str, particles: str) -> str:
    """A Korean word and the first particle after a closing consonant, the second after a vowel."""
    closed = (ord(word[-1]) - ord("가")) % 28 != 0
    return word + particles[0 if closed else 1]
