"""question and choices -> which choices may move, by rules in English and Korean. Standard library only.

Some choices refer to others by letter or place, or to labels in the image. Under another letter they say something
else, so the first `num_free` choices of a row alone are permuted, and those after them stay where they are:

    num_free          why                                                          for example
    all of them       the choices are texts that stand for themselves              cat, dog, fox
    all but the last  the last ones mean all others                                cat, dog, None of the above
    0                 one means what stands above it, and others follow            cat, All of the above, dog
    0                 one names another by its letter, number or place             cat, dog, Both A and B
    0                 they are labels in order: the options stand in the image     A, B, C    ①, ②, ③
    0                 they begin with labels in order                              A. cat, B. dog
    0                 the question names them by letter, or lists them so          Is option A or B larger?

A letter is a label where it is the whole text, or beside a word such as option: "Vitamin A", "5 A", "C major" and
"Both A and B blood types" are texts like any other. Numbers in order are plain answers, unless the question asks which
figure. "Both" and "none" are said of what is seen as often as of choices, and mean the same under every letter.
"""

import re
import unicodedata
from collections.abc import Iterable, Iterator, Sequence

from vqa_sft.questions.letters import LETTERS

# Sequences of labels, each known by its first. Roman numbers label choices and name statements, but name no choices.
_NAMING = (
    LETTERS,
    LETTERS.lower(),
    "①②③④⑤⑥⑦⑧⑨⑩",
    "❶❷❸❹❺❻❼❽❾❿",
    "㉠㉡㉢㉣㉤㉥㉦",
    "㉮㉯㉰㉱㉲㉳㉴",
    "ㄱㄴㄷㄹㅁㅂㅅ",
    "가나다라마바사",
    [str(number) for number in range(1, len(LETTERS) + 1)],
)
_ROMAN = ["I", "II", "III", "IV", "V", "VI", "VII", "VIII"]
_LABELS = (*_NAMING, _ROMAN, [number.lower() for number in _ROMAN], "ⅠⅡⅢⅣⅤⅥⅦⅧ")
_STARTING_WITH: dict[str | None, Sequence[str]] = {labels[0]: labels for labels in _LABELS}
_PLACES = {label: (number, place) for number, labels in enumerate(_NAMING) for place, label in enumerate(labels)}

# <this> in a pattern is one of WORDS; <X> is a label that names a choice. Patterns ignore case, so that in most of them
# "a" may be a label: they match whole texts, or ask for what no article precedes.
WORDS = {
    "circled": "[①-⑩❶-❿㉠-㉦㉮-㉴]",
    "label": r"(?:[a-z]|<circled>|[ㄱㄴㄷㄹㅁㅂㅅ]|(?<![가-힣])[가나다라마바사](?![가-힣])|[1-9]\d?)",
    "roman": "(?:[ivx]+|[Ⅰ-Ⅷ])",
    "X": r"(?:\(<label>\)|\[<label>\]|[\"'“‘]?<label>[\"'”’).]?)번?",
    "and": r"(?: ?[,;&·ㆍ、~] ?(?:(?:and|or|but not|및|또는) )?| (?:and|or|nor|and/or|but not|and not) "
    "| ?(?:와|과|랑|이랑|하고|및|또는|혹은|이나|나|도) ?|(?<=[①-⑩ㄱ-ㅅ])(?=[①-⑩ㄱ-ㅅ]))",
    "option": "(?:options?|choices?|answers?|alternatives?)",
    "option_ko": "(?:보기|선택지|정답|항목)",
    "thing": r"(?:<option>|fig(?:ure)?s?\.?|images?|pictures?|photos?|diagrams?|graphs?|charts?|plots?|panels?"
    "|drawings?|shapes?|patterns?|objects?|items?|box(?:es)?|cubes?|blocks?|tiles?|pieces?|points?|regions?|areas?"
    "|locations?|labels?|parts?|paths?|samples?|solutions?|statements?|cards?|symbols?|curves?|maps?|<option_ko>|그림"
    "|사진|이미지|도형|도표|그래프|지점|점|조각|상자|물체|부분|영역|카드|지도|자료)",
    "right": "(?:correct|right|true|false|wrong|incorrect|possible|valid|acceptable)",
    "right_ko": "(?:정답|오답|참|거짓|맞음|맞다|맞습니다|맞아요|옳음|옳다|옳습니다|틀림|틀리다|틀렸다|아님|아니다"
    "|아닙니다|해당|해당[됨함]|해당[된한]다|해당[됩합]니다)(?:이다|임|입니다)?",
    "all_ko": "(?:모두|전부|둘 ?다|셋 ?다)",
    "none_ko": "(?:없음|없다|없습니다|없어요)",
    "neither_ko": "(?:어느|어떤|아무) ?것도 (?:아님|아니다|아닙니다|해당.{1,8})",
    "content_ko": "(?:<option_ko>|답|것|내용|예시|설명|사항)",
    "given_ko": "(?:정답|답|(?:맞는|옳은|올바른|알맞은|해당하는|해당되는|해당) ?(?:것|답|보기|사항|항목)?)[이가은는]?",
    "listed_ko": "(?:있는|나온|제시된|언급된|열거된|주어진)",
    "above_ko": "(?:위|상기|이상|앞)(?:의|에|에서)? ?(?:<listed_ko> ?)?<content_ko>?들?",
}


def _compile(pattern: str) -> re.Pattern:
    while (filled := re.sub(r"(?<!\?P)<(\w+)>", lambda word: WORDS[word[1]], pattern)) != pattern:
        pattern = filled
    return re.compile(pattern, re.IGNORECASE)


# --- Labels of the row's own choices ----------------------------------------------------------------------------------

# The whole text: "A", "(a)", "Figure 2", "그림 (가)", "3번", "1번 사진".
_LABEL = _compile(
    r"(?P<before><thing> ?)?(?P<bracket>[(\[<])?(?P<label><label>|<roman>)[)\]>]?[.:]?(?: ?번)?(?P<after> ?<thing>)?"
)
# What a text begins with: "A. cat", "(b) dog", "③ fox"; not "1.5" or "E-mail".
_OWN_LABEL = _compile(
    r"(?:[(\[](<label>|<roman>)[)\]] ?|(<label>|<roman>)(?:[.):](?!\d) ?| [-–] )|(<circled>) ?)(?=\S)"
)
# What may follow two labels in order: "A", "B", "Both are the same".
_BESIDE_LABELS = _compile(
    r"(?:they are |both are |it is )?(?:both|neither|none|all|the same|same|equal|similar|no difference)\b.{0,60}"
    r"|(?:can ?not|can't|could not|not enough|unable|unclear|unknown|not sure|impossible|i don't know)\b.{0,40}"
    r"|(?:<all_ko>|없음|같|동일|똑같|차이 ?없|알 수 없|모르|모름).{0,12}"
    r"|<X><and><X>.{0,3} ?(?:서로 )?(?:같|동일|다르).{0,6}"
)
# Numbers alone are labels where the question asks which image or shape, and for no number.
_ASKS_WHICH = _compile(
    r"\b(?:which|what)(?: one| of| the| numbered| missing)* (?:fig|figure|image|picture|photo|diagram|graph|panel"
    r"|option|choice|drawing|shape|pattern|tile|piece|symbol|box|cube|frame|card)s?\b"
    r"|(?:어느|어떤|무슨|몇 ?번째?) ?(?:그림|사진|이미지|도형|보기|선택지|조각|그래프|카드|전개도|모양)"
)
_ASKS_NUMBER = _compile(r"\bhow (?:many|much)\b|\bnumbers?\b|몇 ?[개명마대장층살]|개수|숫자")
# Letters alone are plain answers where the question asks for one.
_ASKS_LETTER = _compile(
    r"\b(?:blood (?:type|group)|grade|vitamin|chord|musical note)s?\b"
    r"|\bletters? (?:is|are) (?:written|printed|painted)\b|혈액형|학점|등급|비타민|알파벳|글자"
)

# --- Choices that name others -----------------------------------------------------------------------------------------

# The whole text is about several labels, or about one.
_SEVERAL = _compile(
    r"(?:(?:both|either|neither|only|just|all|none)(?: of)? )?(?:<thing> ?)?"
    r"(?P<labels><X>(?:<and>(?:<thing> )?<X>){1,25})"
    r"(?: (?:only|both|together|alone|above))*"
    r"(?: (?:are|is|can be|could be|may be)(?: both| all| equally)?(?: not)?(?: <right>| the answers?))?"
    r"[은는만도이가의]?(?: ?<all_ko>)?[가이]?(?: ?<right_ko>)?"
)
_ONE = _compile(
    r"only (<X>)|(<X>) ?(?:only|만)|same as (<X>)|(?:all|everything|any)(?: of them)?,? (?:except|but) (<X>)"
    r"|<option> (<X>)"
)
# Beside the word option a label is one anywhere in a text; a number is one where it counts no word after it.
_BESIDE_OPTION = _compile(
    r"\b<option> (\(<label>\)|\(?(?-i:[A-Z])(?![\w'’]))"
    r"|\b(?:option|choice)s? (\d\d?)(?=$|[.,;:?!]| (?:and|or|is|are)\b)"
    r"|(?<![가-힣])<option_ko> ?(\(<label>\)|(?-i:[A-Z])(?![a-z])|<circled>|[ㄱ-ㅅ])"
    r"|(?<![가-힣])(?:보기|선택지) ?(\d\d?)번?(?=$|[.,?! 과와은는이가을를의만도])"
)
_BY_PLACE = _compile(
    r"(?:(?:both|only|all|either|neither) )?(?:of )?(?:the )?(?:first|second|third|fourth|last|previous|next)"
    r"(?: two| three)? <option>(?: (?:is|are|above|only)\b.*)?"
    r"|.{0,20}(?:[첫두세네] ?번째|마지막|앞의 [두세]) ?(?:보기|선택지).{0,20}"
)
_LABELS_IN = _compile(r"(?<![a-z])<label>(?![a-z])")

# --- Choices that mean all others -------------------------------------------------------------------------------------

# Some stand below the others, or are wrong ...
_ABOVE = _compile(
    r"(?:.{1,40}[.;,:(] ?|it is |they are )?"
    r"(?:all|none|any|both|neither|either|each|two|one|more than one|other than)(?: of)? the "
    r"(?:above|previous|preceding|foregoing)"
    r"(?:[- ](?:mentioned|listed|<option>|statements?|ones?|reasons?|items?|factors|conclusions?))*"
    r"(?: (?:is|are|can|could|may|would|were|will|does|do|appl\w+)\b.*)?(?: ?[,;:()].*)?"
    r"|(?:all|none|both|neither)(?: of)? above|the above (?:are|all|two|three|<option>)\b.*"
    r"|.{1,60}\b(?:listed|given) above"
    r"|<above_ko>[이가은는의]? ?<all_ko>(?: ?(?:가 |다 )?<right_ko>)?"
    r"|(?:위|상기)의? ?[두세] ?가지 ?<all_ko>(?: ?<right_ko>)?"
    r"|(?:위|상기)의? ?모든 ?<content_ko>(?:들?[이가은는]? ?<right_ko>)?"
    r"|<above_ko> ?(?:중|가운데|<option_ko>)(?:에|에서|에는)? ?(?:<given_ko> ?)?"
    r"(?:하나도 |아무것도 )?(?:<none_ko>|아님|아니다)"
    r"|위에 ?<given_ko> ?<none_ko>|<above_ko> ?(?:중|가운데)? ?<neither_ko>"
)
# ... and some mean the same under every letter, and are last by custom.
_THESE = _compile(
    r"(?:all|none|neither|both|any|either)(?: of)? "
    r"(?:(?:these|those)(?: <option>| statements?| conclusions?| numbers?)?"
    r"|(?:the )?(?:(?:other|given|listed|provided|following) )?<option>|the (?:listed|provided|mentioned|following))"
    r"(?: (?:given|listed|provided|here))?(?: (?:is|are|apply|applies|can be|could be)\b.{0,40})?"
    r"|(?:all|none|both|neither)(?: of (?:them|these))?(?: is| are)?(?: all)? (?:correct|right|true|incorrect|wrong)"
    r"|(?:there is )?no (?:correct|right|valid) <option>(?: .{0,30})?|no <option> (?:is|are) <right>"
    r"|(?:other |something else )?not (?:listed|among .{0,15}|in the (?:list|options|choices))(?: here)?"
    r"|not applicable|n/a|<neither_ko>"
    r"|(?:(?:<listed_ko> ?)?(?:<option_ko>|이) ?(?:중|가운데)?(?:에|에서|에는)? ?)?<given_ko> ?<none_ko>"
    r"|(?:<listed_ko> ?)?(?:<option_ko>(?: ?중|가운데)?|이 ?중)(?:에|에서|에는)? ?<none_ko>"
    r"|둘 ?다 ?정답(?:이다|임|입니다)?|모든 ?<option_ko>[이가은는]? ?<right_ko>|(?:모두|전부|다) ?(?:가 )?<right_ko>"
    r"|(?:<option_ko>|이것들?|이들) ?(?:모두|전부)(?: ?<right_ko>)?"
)
_ASIDE = re.compile(r"(?<=\S) ?\([^()]*\)$")  # "None of these (N/A)"

# --- Questions that name the choices ----------------------------------------------------------------------------------

_AMONG = _compile(
    r"\b(?:which(?: one)?(?: of)?|among|out of) (<X>(?:<and><X>){1,25})(?![\w'’])"
    r"|(?<![a-z])(<X>(?:<and><X>){1,25}) ?(?:중|가운데)(?![가-힣]{3})"
)
_RANGE = _compile(
    r"(?<!\w)\(?([aㄱ가①㉠㉮]|1(?=번))\)?번? ?[~∼〜-] ?\(?(<label>)\)?번? ?(?:중|가운데)"
    r"|\b(?:(?:select|choose|pick)\b.{0,30} (?:from|among)|<option>(?: from)?) "
    r"\(?(a) ?(?:-|–|to|through) ?([a-z])(?![\w'’])"
)
_LISTED = _compile(r"(?<![^\s(])\(?([a-z])[.):] ?")

# --- Texts that are searched: with labels other than the article "a", or words of the patterns above ------------------

_LATIN = re.compile("[a-z'’]+")
_OPTION_WORDS = [f"{word}{end}" for word in ("option", "choice", "answer", "alternative") for end in ("", "s")]
_HINTS_OF_QUESTIONS = frozenset([*LETTERS[1:].lower(), *_OPTION_WORDS])
_HINTS_OF_CHOICES = _HINTS_OF_QUESTIONS.union(
    ["ii", "above", "previous", "preceding", "foregoing", "these", "those", "listed", "among", "list", "applicable"],
    ["all", "none", "both", "neither", "only", "same", "everything", "except", "mentioned", "provided", "following"],
)
_LABEL_HINT = re.compile(
    "[0-9０-９Ａ-Ｚａ-ｚ①-⑩❶-❿㉠-㉦㉮-㉴ㄱ-ㅎⅡ]|보기|선택지|정답|항목|(?<![가-힣])[나다](?![가-힣])"
)
_KOREAN_HINT = re.compile("없|아님|아니|아닙|것도|모두|모든|전부|둘 ?다|가지|해당|답|[A-Za-z)]만")
_FULL_WIDTH = {code: code - 0xFEE0 for code in range(0xFF01, 0xFF5F)} | {0x3000: " "}


def count_free(question: str, choices: Sequence[str]) -> int:
    """How many of the choices, from the first one on, may be permuted."""
    return find_references(question, choices)[0]


def find_references(question: str, choices: Sequence[str]) -> tuple[int, str]:
    """How many of the choices, from the first one on, may be permuted, and the text for which the others may not; ""
    where all may."""
    question = _clean(question)
    if _may_refer(question, _HINTS_OF_QUESTIONS) and (named := _find_named(question, choices)):
        return 0, named
    joined = unicodedata.normalize("NFC", "\n".join(choices))
    if not _may_refer(joined, _HINTS_OF_CHOICES) and not _KOREAN_HINT.search(joined):
        return len(choices), ""
    texts = [_clean(choice) for choice in choices]
    if _begin_with_labels(texts):
        return 0, choices[0]
    texts = [_without_label(text, place) for place, text in enumerate(texts)]
    if _are_labels(question, texts):
        return 0, choices[0]
    num_free = len(texts)
    while num_free and _means_all_others(texts[num_free - 1]):
        num_free -= 1
    if num_free == 0:  # there are no others
        return len(choices), ""
    for place, text in enumerate(texts):
        if _names_others(question, text, texts) or (place < num_free and _ABOVE.fullmatch(text)):
            return 0, choices[place]
    if num_free == len(choices):
        return num_free, ""
    return (num_free if num_free > 1 else 0), choices[num_free]


def _clean(text: str) -> str:
    """One line, composed, without marks around it: "**A** " is "A"."""
    if not text.isascii():
        text = unicodedata.normalize("NFC", text).translate(_FULL_WIDTH)  # macOS writes Hangul in pieces
    return " ".join(text.split()).strip("*$_\"'`“”‘’ ").rstrip(".。")


def _may_refer(text: str, hints: frozenset[str]) -> bool:
    return not hints.isdisjoint(_LATIN.findall(text.lower())) or bool(_LABEL_HINT.search(text))


def _begin_with_labels(texts: Sequence[str]) -> bool:
    """Whether each text begins with the label of its place; the last ones need none where they mean all others."""
    num_labels = _count_in_order(map(_own_label, texts))
    return num_labels > 1 and all(map(_means_all_others, texts[num_labels:]))


def _own_label(text: str) -> str | None:
    match = _OWN_LABEL.match(text)
    return match[match.lastindex] if match else None


def _without_label(text: str, place: int) -> str:
    """The text without the label of its place."""
    label = _own_label(text)
    is_own = label in _PLACES and _PLACES[label][1] == place
    return _OWN_LABEL.sub("", text, count=1) if is_own else text


def _count_in_order(labels: Iterable[str | None]) -> int:
    """How many of them, from the first one on, are the labels of one sequence in its order."""
    known: Sequence[str] = ()
    count = 0
    for label in labels:
        known = known or _STARTING_WITH.get(label, ())
        if count == len(known) or label != known[count]:
            break
        count += 1
    return count


def _are_labels(question: str, texts: Sequence[str]) -> bool:
    """Whether the choices are labels in order, or two are and what follows is said beside labels."""
    num_labels = _count_in_order(match["label"] if match else None for match in map(_LABEL.fullmatch, texts))
    if num_labels < 2 or not all(map(_is_beside_labels, texts[num_labels:])):
        return False
    first = _LABEL.fullmatch(texts[0])
    if first["before"] or first["bracket"] or first["after"]:
        return True
    if first["label"] == "1":
        return bool(_ASKS_WHICH.search(question)) and not _ASKS_NUMBER.search(question)
    return not _ASKS_LETTER.search(question)


def _is_beside_labels(text: str) -> bool:
    return bool(_BESIDE_LABELS.fullmatch(text) or _SEVERAL.fullmatch(text)) or _means_all_others(text)


def _means_all_others(text: str) -> bool:
    return bool(_THESE.fullmatch(_ASIDE.sub("", text)) or _ABOVE.fullmatch(text))


def _names_others(question: str, text: str, texts: Sequence[str]) -> bool:
    """Whether a choice names others of the row by their labels or places."""
    if any(_are_named(label, texts, is_sure=True) for label in _beside_option(text)) or _BY_PLACE.fullmatch(text):
        return True
    several, one = _SEVERAL.fullmatch(text), _ONE.fullmatch(text)
    if several:
        return _are_named(several["labels"], texts) and not _is_about_statements(question, several["labels"])
    # A number alone may be a count.
    return bool(one) and not one[one.lastindex].isdecimal() and _are_named(one[one.lastindex], texts)


def _beside_option(text: str) -> Iterator[str]:
    """Labels next to the word option."""
    return (match[match.lastindex] for match in _BESIDE_OPTION.finditer(text))


def _are_named(shown: str, texts: Sequence[str], is_sure: bool = False) -> bool:
    """Whether the labels in `shown` are those of choices of the row. Numbers are plain ones where the choices with
    these numbers hold numbers too, unless it `is_sure` that they are labels."""
    labels = _LABELS_IN.findall(shown)
    places = [_PLACES.get(label, (None, len(texts))) for label in labels]
    if not labels or len({number for number, _ in places}) > 1 or any(place >= len(texts) for _, place in places):
        return False
    return is_sure or not labels[0].isdecimal() or not any(re.search(r"\d", texts[place]) for _, place in places)


def _is_about_statements(question: str, shown: str) -> bool:
    """Whether the question itself says what ㄱ and ㄴ are: "ㄱ. ...". Letters are always those of the choices too."""
    labels = re.findall("[ㄱ-ㅅ]", shown)
    return bool(labels) and all(re.search(rf"{label}\)?[.):]", question) for label in labels)


def _find_named(question: str, choices: Sequence[str]) -> str:
    """What in the question names choices by their labels; "" if nothing does."""
    for label in _beside_option(question):
        if _are_named(label, choices, is_sure=True):
            return f"option {label} in the question"
    for match in _AMONG.finditer(question):
        if _count_in_order(_LABELS_IN.findall(match[match.lastindex])) == len(choices):
            return match.group()
    for match in _RANGE.finditer(question):
        first, last = (_PLACES.get(label) for label in match.groups() if label)
        if first and last == (first[0], len(choices) - 1):
            return match.group()
    listed = [*_find_listed(question, choices)]
    return listed[0] if len(listed) > 1 else ""


def _find_listed(question: str, choices: Sequence[str]) -> Iterator[str]:
    """Choices that the question lists behind their letters."""
    for match in _LISTED.finditer(question):
        _, place = _PLACES.get(match[1], (None, len(choices)))
        text = _clean(choices[place]) if place < len(choices) else ""
        if text and question[match.end() : match.end() + len(text)].casefold() == text.casefold():
            yield match.group() + text
