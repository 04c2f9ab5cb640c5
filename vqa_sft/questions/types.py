"""question -> one of seven types, by rules in English and Korean. Standard library only.

The types, by what the answer is:

    counting    how many                                        How many dogs ...?        몇 마리 ...?
    colour      a colour                                        What colour is ...?       색깔은 무엇 ...?
    ocr         read off: writing, brands, prices, clocks       What does the sign say?   적힌 문구는 ...?
    yes_no      the choices say yes and no                      Is the light on?          불이 켜져 있나요?
    place       a place, or where something is                  Where is the cat?         어디에 있나요?
    attribute   another property: material, shape, state, ...   What is it made of?       어떤 모양 ...?
    general     everything else: what, who, why, ...            What is he doing?         무엇을 하고 있나요?
"""

import itertools
import re
import unicodedata
from collections.abc import Sequence

TYPES = ("counting", "colour", "ocr", "yes_no", "place", "attribute", "general")

# (type, English, Korean). The first row found in the question wins, so the order matters: "How many colours" is
# counting, the colour of a written word is colour, the city written on a bear is ocr. Questions are read in lower case
# and with single spaces; <this> is a list of WORDS. All repeats are bounded: no text makes the search slow.
RULES = (
    ("counting", r"\bhow many\b(?! (more )?<measure>\b)|\bcount the\b", r"몇 ?<counter>|얼마나 많은"),
    ("counting", r"\b(what('s| is| was)|give|find) the (\w{5,7} )?number of\b", r"개수|(의| )수[는가](?! ?[없있])"),
    ("colour", r"\b<what>(?!.{0,20} same )( [\w'’-]{1,20}){0,5} colou?rs?\b", r"<which> ?(색(?!연필|종이)|빛깔|컬러)"),
    ("colour", r"\bcolou?rs? (is|are|was|were)\b", r"<colour>( 조합| 구성)?<is>(?!.{0,9} 무엇을)"),
    ("colour", r"\bwhat (hue|shade)\b", r"(머리|털|옷| )색(은|이 아닌)"),
    # When a photo was taken comes before ocr, which has the times that are read.
    ("attribute", r"\b<what>.{0,20} <season>\b|\bhow is the weather\b", r"<which> ?<season>|<season>( 상태)?<is>"),
    ("attribute", r"\btime of (the )?(day|year)\b|\bday(time)? or night\b", r"언제 (찍|촬영)|(찍|촬영)[은힌된]? ?시간"),
    ("attribute", r"\bwhen was (this|the) <picture>\b", r"몇 ?살"),
    ("ocr", r"\bwhat (do|does|did)\b.{1,60}\b(say|says|read|spell)\b", r"(?<!글씨가 )적[힌혀]|쓰여|써 ?[있진]"),
    ("ocr", r"\b(is|are|was|words?|text) (written|printed)\b", r"쓰인 ?글|<text>(들?은|는|[이가] 아닌| 중)|언급된"),
    ("ocr", r"\b<read>s?( (is|are|appears?|shown|displayed|seen)){0,2} on (the|this|his|her|their)\b", r"<stated>"),
    ("ocr", r"\b(title|price|name)s? of (the|this)( \w{1,15}){0,2} <named_en>\b", r"<named>(의)? ?이름"),
    ("ocr", r"\bwhat <maker>\b|\b(brand|logo|slogan)s?\b|\bwhat('s| is| are) the prices?\b", r"<maker_ko>"),
    ("ocr", r"\bwhat numbers? (is|are) (the|this|that|on|in|at|shown)\b", r"표시된 <shown>|시계.{0,10}시[간각]"),
    ("ocr", r"\b(speed limit|phone number|price tag|(licen[cs]e|number) plate)\b", r"몇 ?<unit>"),
    ("ocr", r"\baccording to the (sign|label|menu|poster|receipt)\b", r"<carrier>에(?!.{0,12}그[려림])|간판은"),
    ("ocr", r"\b(is|being) advertised\b", r"(포스터|현수막|광고판?)[은는].{1,15} 홍보"),
    ("place", r"(^|[,.:!?] ?|\b(from|guess|know) )where\b", r"어디(?!에 (주로 )?(사용|쓰[이인]))"),
    ("place", r"\bwhere <verb>\b", r"<which> ?([종유][류형]의 )?<place>|어느 [가-힣]{1,5}에 ?[가-힣]{1,4} ?있"),
    ("place", r"\b<what>( (kind|type|sort) of)?( \w{1,12})? <place_en>\b", r"<scene>[은는](?!.{0,15}(재질|분위기))"),
    ("place", r"\bwhich (of these |of the following )?<land>\b|\bwhich (state|ocean) is\b", r"내부를 (찍|보여)"),
    ("place", r"\bthe (position|location|setting) of\b|\b<what> (side|direction|corner)\b", r"몇 ?번째에"),
    ("attribute", r"\b(<what>|how)\b.{0,30}\b<property_en>\b", r"<property><is>|<which>( [가-힣]{1,5})? <property>"),
    ("attribute", r"\bmade (out )?(of|from)\b", r"재질(?!의)|소재[는로]|무엇으로 (만들|되어|이루)|어떤 재료로"),
    ("attribute", r"\bhow (old|tall|big|large|long|wide|heavy|full|deep|hot|cold)\b", r"어떤 모습|모습은 어[떤떻]"),
)
WORDS = {
    "what": "what|which",
    "measure": "years?|months?|weeks?|days|hours?|minutes?|seconds?|miles|met(er|re)s|grams|dollars|degrees|kg|cm|km",
    "picture": "picture|photo|image|photograph",
    "read": "word|letter|number|name|text|price|date|year|digit",
    "named_en": "store|shop|restaurant|caf[eé]|hotel|company|airline|bank|street|road|station|stop|product|book"
    "|magazine|newspaper|movie|ship|boat|team",
    "maker": "brand|company|airline|website|street|logo|time (is|do|does)",
    "verb": "is|are|was|were|might|could|would|can|did|do|does",
    "place_en": "place|location|room|city|country|continent|venue|setting|scene|environment",
    "land": "states|cities|countries|continents|oceans",
    "property_en": "materials?|shapes?|sizes?|patterns?|textures?|styles?|conditions?|expressions?|moods?|emotions?"
    "|poses?|postures?|gender|ages?|flavou?rs?|tastes?|lengths?|heights?|features?|characteristics?|propert(y|ies)",
    "which": "어떤|어느|무슨",
    "is": "은|는|이 아닌|가 아닌|이 주로|인가|일까|에 가장| 중|으?로 (가장 )?(알맞|옳|올바|적절|적합|맞)",
    "counter": "개(?!월)|마리|명|사람|대|송이|그루|잔|병|장|권|켤레|자루|접시|그릇|조각|쌍|채|척|줄|칸|가지|종류|알|판"
    "|캔|벌|군데|곳|겹|팀|봉지|상자|글자|층(?!에)",
    "colour": "색깔들?|색상|빛깔|컬러",
    "season": "weather|season|날씨|계절|시간대",
    "text": "글자|글씨|문장|단어|숫자|제목|로고",
    "stated": "가격|금액|요금|점수|얼마(?!나)|제한 속도|[유소][통비] ?기한|날짜[는가]|개최|시간은 언제"
    "|(영업|운영|시작|마감|출발|도착) ?시간",
    "named": "가게|매장|상점|식당|음식점|카페|커피숍|빵집|서점|주유소|시장|축제|아파트|단지|호텔|회사|학교|역|정류장"
    "|도로|주차장|제품|상품|과자|술|책|배|프로그램",
    "maker_ko": "브랜드|상호|글귀|문구|번호|도로명|단체명|제품명|제조사|회사는|어디 ?(제품|회사)",
    "shown": "속도|온도|체온|시간|시각|몸무게|무게|교육|이름|목적지|것",
    "unit": "시|번(?!째)|도|원|월|년|호|점|퍼센트|%",
    "carrier": "안내문|안내판|현수막|전광판|메뉴판|영수증|라벨|편지|표지판|이 글",
    "place": "장소|곳|공간|위치|지역|도시|방향|쪽|역|강|산|공항|나라의 (도시|거리)",
    "scene": "장소|곳|공간|위치|지역|풍경|경관|경치|배경|자연 ?환경",
    "property": "모양|무늬|패턴|형태|형식|크기|상태|자세|포즈|표정|스타일|양식|느낌|분위기|특징|특성|맛|성별|나이|질감",
}


def _compile(num_languages: int) -> list[tuple[str, re.Pattern]]:
    """Neighbouring rows of one type as one pattern."""
    rules = []
    for name, rows in itertools.groupby(RULES, key=lambda row: row[0]):
        pattern = "|".join(pattern for row in rows for pattern in row[1 : 1 + num_languages])
        rules.append((name, re.compile(re.sub(r"<(\w+)>", lambda word: f"({WORDS[word[1]]})", pattern))))
    return rules


_ENGLISH, RULES_OF_ALL = _compile(1), _compile(2)
YES_NO = re.compile(
    r"(yes|no|true|false|maybe|unknown|not sure|can ?not tell|can't tell|[예네]|아니[오요])([,.;!].*)?"
    r"|(그렇|아니|맞|틀리|있|없)다|그렇지 않다|아닙니다|(그렇|맞|틀리|있|없)(습니다|어요|음)|틀림|참|거짓"
    r"|(알 수 없|모르겠)(다|음|습니다|어요)"
)
MAX_CHARS = 300


def find_type(question: str, choices: Sequence[str]) -> str:
    """The type of a question, one of TYPES."""
    if choices and all(YES_NO.fullmatch(_clean(choice)) for choice in choices):
        return "yes_no"
    text = _clean(question)
    return next((name for name, rule in (_ENGLISH if text.isascii() else RULES_OF_ALL) if rule.search(text)), "general")


def _clean(text: str) -> str:
    # The end of a long text, because that is where it asks. Composed, because macOS writes Hangul in pieces.
    return " ".join(unicodedata.normalize("NFC", text[-MAX_CHARS:]).lower().split())
