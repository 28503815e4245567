"""One spelling for what is the same: numbers, words, short answers. In English, Russian and Japanese. Pure."""

import re
import unicodedata

# 1,000,000 and, with the thin or plain blanks of Russian and SI, 1 000 000; `3,14` is a fraction.
_THOUSANDS = re.compile(r"(?<![\w.,])\d{1,3}(?:([,\u00a0\u202f\u2009' ])\d{3})(?:\1\d{3})*(?![\d])")
_COMMA_FRACTION = re.compile(r"(?<![\w.,])(\d+),(\d+)(?![\w,])")
_IDLE_ZEROS = re.compile(r"(?<![\w.,])(\d+)\.(\d*?)0*(?![\w.])")
_BARE_FRACTION = re.compile(r"(?<![\w.,])\.(?=\d)")
_LEADING_ZEROS = re.compile(r"(?<![\w.,])0+(?=\d+(?!\w))")
_NOT_DIGIT = re.compile(r"\D")


def folded(text: str) -> str:
    """Return a text without what only its looks differ by: width, case, composition, kinds of minus and apostrophe."""
    text = unicodedata.normalize("NFKC", text).casefold()
    return text.translate(_LOOKS)


_LOOKS = str.maketrans({"−": "-", "‐": "-", "‑": "-", "–": "-", "—": "-", "’": "'", "ʼ": "'", "ё": "е"})


def numbers(text: str) -> str:
    """Spell each number the shortest way: `1,000` as 1000, `2.50` as 2.5, `3,14` as 3.14."""
    text = _THOUSANDS.sub(lambda match: _NOT_DIGIT.sub("", match[0]), text)
    text = _COMMA_FRACTION.sub(r"\1.\2", text)
    text = _BARE_FRACTION.sub("0.", text)
    text = _IDLE_ZEROS.sub(lambda match: f"{match[1]}.{match[2]}" if match[2] else match[1], text)
    return _LEADING_ZEROS.sub("", text)


# Endings of Russian words, after the light stemmer of Dolamic and Savoy, "Indexing and searching strategies for the
# Russian language" (2009): inflection goes, derivation stays.
_RUSSIAN = re.compile(
    r"(?<=[а-я]{3})(?:иями|ями|ами|ыми|ими|ых|их|ого|его|ому|ему|ете|ите|ешь|ишь|ала|ила|ели|али|или|ало|ило|ует|уют|ают|яют|ает|"
    r"яет|ать|ять|ить|еть|ый|ий|ой|ая|яя|ое|ее|ые|ие|ую|юю|ым|им|ом|ем|ах|ях|ов|ев|ей|ам|ям|ию|ия|ью|"
    r"ат|ят|ит|ет|ут|ют|ал|ил|ел|а|я|о|е|у|ю|ы|и|ь|й)$"
)
_REFLEXIVE = re.compile(r"(?<=[а-я]{4})с[ья]$")
# The S-stemmer of Harman, "How effective is suffixing?" (1991).
_ENGLISH = re.compile(r"(?<=[a-z]{3})(?:(?<![ae])ies|(?<![aeo])es|(?<![us'])s)$")


def stem(word: str) -> str:
    """Return what the inflections of a folded word have in common, roughly. Words of other scripts stay."""
    word = word.removesuffix("'s")
    if "а" <= word[-1:] <= "я":
        return _RUSSIAN.sub("", _REFLEXIVE.sub("", word))
    return _ENGLISH.sub(lambda match: {"ies": "y", "es": "e"}.get(match[0], ""), word)


_LEAD = re.compile(
    r"^(?:(?:so|thus|therefore|итак|значит)[,:]?\s+)?(?:(?:the|my|final|correct|правильный|мой|最終的な|正しい)\s*)*"
    r"(?:answer(?:\s+is)?|ответ|答え|回答|解答)\s*(?:[:：=-]|は)?\s*"
)
_BOXED = re.compile(r"\\boxed\{([^{}]*)\}")
_ARTICLE = re.compile(r"\b(?:a|an|the)\s+(?=\S)")
_MARKUP = re.compile(r"[*_`$]+|\\[()\[\]]")
_POLITE = re.compile(r"(?:です|である|だ|でした)$")
# Punctuation goes, but for what belongs to a number or a name (C#, C++, 50%) or to what is written out (a/b).
_SIGN_APART = re.compile(r"(?<![\w)])-\s+(?=[\d.])")
_UNIT_APART = re.compile(r"(?<=\d)\s+(?=%)")
_PUNCTUATION = re.compile(r"(?<!\d)\.|\.(?!\d)|(?<!\w)-(?!\d)|(?<=\w)-|[^\w\s.+#%/=<>&@-]")


def short_answer(text: str) -> str:
    """Return a short answer as all its spellings are: `The answer is **1,000**.` as `1000`, `はい。` as `はい`."""
    text = folded(text).strip()
    boxed = _BOXED.findall(text)
    text = _MARKUP.sub("", boxed[-1] if boxed else text).strip()
    text = _POLITE.sub("", numbers(_LEAD.sub("", text, count=1)).rstrip("。.!！ "))
    text = _UNIT_APART.sub("", _SIGN_APART.sub("-", _ARTICLE.sub("", text)))
    plain = " ".join(_PUNCTUATION.sub(" ", text).split())
    return plain or text
