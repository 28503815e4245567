"""What kind of task a prompt is: patterns as data, in English, Russian and Japanese. Pure.

The task of which most different matches are found wins, each counting its task's weight; of equals the first in the
table. What asks for a thing to be done (translate, classify) weighs more than a subject that is spoken of.
"""

import re
from collections.abc import Iterable, Mapping, Sequence

import msgspec

from proxy.errors import ConfigError
from proxy.routing import reading

GENERAL = "general"
MAX_TASKS, MAX_PATTERNS, MAX_LENGTH = 32, 64, 500
# What is asked for at the paths that are no chat is a task by itself, for models that do nothing else.
OPERATIONS = ("embeddings", "rerank", "score", "classify", "pooling", "transcription", "tokenize",
              "detokenize")  # fmt: skip
_NAME = re.compile(r"[A-Za-z0-9_-]{1,64}")
# Only the ends of a long text are read, so many bytes of each, and of many matches a few.
_HEAD, _TAIL, _ENOUGH = 700, 400, 8

PATTERNS: dict[str, tuple[str, ...]] = {
    "translation": (
        r"\b(?:translat(?:e|ed|ing|ion)|how (?:do|would|can) (?:you|i|we) say|"
        r"(?:what is|what's|say|word for|means?) .{1,60} in (?:english|french|german|spanish|italian|portuguese|"
        r"dutch|polish|turkish|greek|latin|arabic|hindi|russian|ukrainian|japanese|chinese|korean)\b)",
        r"\b(?:перевед\w*|перевести|перевод\w* (?:на|с|эт\w+|текст\w*)|как (?:будет|сказать|пишется)\b.{0,60} по-\w+)",
        r"翻訳|和訳|英訳|(?:語|文)[にへ]訳|語に直し|語で(?:何|なん|どう|言)|訳して|訳せ",
    ),
    "classification": (
        r"\b(?:classif(?:y|ication)|categori[sz]e|sentiment|(?:label|tag) (?:each|the|these|this|it)|spam|"
        r"positive(?:,| or| and|/) ?(?:neutral|negative)|(?:which|what) (?:category|class|label|department)\b)",
        r"\b(?:классифиц\w+|тональност\w*|(?:как|к как)\w+ категори\w+|определи\w* (?:категори|класс|тип|тем)\w+|"
        r"отнеси к|позитивн\w+ или|положительн\w+ или|спам\w*)",
        r"分類|カテゴリ|判定|判別|ポジティブ|ネガティブ|肯定的|スパム|ラベル",
    ),
    "code": (
        r"```|\b(?:def \w+\(|class \w+[:({]|import \w+|select .{1,80} from\b|for \w+ in \w+\()|#include|"
        r"\(\w*\);|exception\b|\b\w+error:|\bundefined\b",
        r"\b(?:python|java(?:script)?|typescript|kotlin|c\+\+|c#|rust|golang|sql|html|css|bash|regex|docker\w*|"
        r"kubernetes|git|api|json|yaml|react|node\.js|npm|django|flask|numpy|pandas|dataframe|compiler?|debug\w*|"
        r"refactor\w*|source code|codebase|programm(?:e|ing)|algorithm|unit tests?|stack ?trace|segmentation fault|"
        r"pull request|merge conflict|race condition|deadlock|mutex|recursion|linked list|hash ?map|binary (?:search|"
        r"tree)|(?:for|while|my|the) loop|data ?base|backend|frontend|localhost)\b",
        r"\b(?:write|implement|fix|review|optimi[sz]e|test|call)\b.{0,40}\b(?:function|class|code|script|method|"
        r"program)\b",
        r"\b(?:код(?:а|е|ом|у)?|функци\w+ на|программ(?:а|у|ы|ный|ировани\w+)|скрипт\w*|алгоритм\w*|компил\w+|питон\w*|"
        r"отлад\w+|рефактор\w+|баг(?:а|и|ов)?|массив\w*|баз\w+ данных|репозитори\w+|регулярн\w+ выражени\w+)\b",
        r"コード|プログラム|関数を|実装|バグ|デバッグ|スクリプト|アルゴリズム|コンパイル|コミット|クエリ|データベース|正規表現|"
        r"配列|例外",
    ),
    "math": (
        r"[\^=] ?[-\d(]|\d ?[+*/×÷] ?\d|\d ?% of|\\(?:frac|int|sum|sqrt)|\$[^$]+\$",
        r"\b(?:solve|prove|comput(?:e|es|ing)|calculat\w+|equations?|integrals?|derivatives?|theorem|polynomial|"
        r"probabilit(?:y|ies)|matri(?:x|ces)|eigenvalues?|irrational|square root|geometry|algebra|modulo|factorial|"
        r"percent(?:age)? of|divided by|multipl(?:y|ied)|factori[sz]e|radius|circumference|hypotenuse|(?:prime|"
        r"odds) of)\b",
        r"\b(?:(?:what is|find|determine) the (?:\w+ )?(?:sum|product|average|value|area|perimeter|volume|ratio|number|"
        r"degree)|integers?)\b",
        r"\d[^\d\n]{0,200}?\bhow (?:many|much|far|fast|old|long)\b",
        r"\b(?:реши\w*|вычисл\w+|посчита\w+|рассчита\w+|докаж\w+|доказат\w+|уравнени\w+|интеграл\w*|производн\w+|"
        r"теорем\w+|вероятност\w+|матриц\w+|корень из|умнож\w+|сколько будет|процент\w* (?:от|из|составля\w+)|"
        r"периметр\w*|радиус\w*|площадь (?:круг|треугольник|квадрат|прямоугольник)\w+)",
        r"計算|数式|方程式|微分|積分|証明|確率|行列|解いて|合計|因数分解|平方根|面積|体積|半径|掛け算|割り算|足し算|引き算|の和を|パーセントは",
    ),
    "medical": (
        r"\b(?:symptoms?|diagnos\w+|treatments?|treated|disease|patients?|doctor|medicines?|medications?|dos(?:e|age)|"
        r"ibuprofen|paracetamol|acetaminophen|aspirin|antibiotics?|antidepressants?|warfarin|insulin|"
        r"blood (?:pressure|test|sugar)|cholesterol|cancer|diabetes|anemia|asthma|infection|surgery|vaccin\w+|"
        r"side effects?|pregnan\w+|clinical|(?:head|stomach|tooth|back)aches?|migraines?|fever|cough(?:ing)?|nausea|"
        r"rash|allerg(?:y|ies|ic)|sore throat|(?:chest|back|knee|joint) pain|dizz(?:y|iness)|the flu)\b",
        r"\b(?:симптом\w*|диагно\w+|лечени\w+|лечит\w*|болезн\w+|врач\w*|лекарств\w+|таблет\w+|парацетамол\w*|"
        r"ибупрофен\w*|аспирин\w*|антибиотик\w*|давлени\w+|беременн\w+|пневмони\w+|гастрит\w*|диабет\w*|пациент\w*|"
        r"побочн\w+|температур\w+ 3\d|боли(?:т|шь)\b|кашел\w*|кашля\w*|зубн\w+ бол\w+|насморк\w*|простуд\w*|"
        r"аллерги\w+|анализ(?:ы|ов)? (?:крови|мочи|сда\w+)|тошнот\w+)",
        r"症状|診断|医療|治療|薬|病気|副作用|血圧|患者|手術|感染|ワクチン|糖尿病|医師|頭痛|腹痛|腰痛|発熱|熱があ|妊娠|風邪|"
        r"アレルギー|吐き気|が痛",
    ),
    "legal": (
        r"\b(?:law(?:s|suit|yer)?|legal(?:ly)?|contracts?|clauses?|lease|landlord|tenant|evict\w*|court|sued?|"
        r"plaintiff|defendant|statut\w+|liab(?:le|ility)|felony|misdemeanor|copyright\w*|trademark\w*|patent(?:s|"
        r"ed)?|non-disclosure|attorney|gdpr|breach|(?:rental|prenuptial|settlement|employment) agreement|divorc\w+|"
        r"alimony|custody|inheritance|(?:my|tenants?'?|legal|consumer) rights|wrongful\w*|fired without|warrant|"
        r"police)\b",
        r"\b(?:стать(?:я|и|е|ю|ёй|ей) \d+|ук рф|гк рф|тк рф|коап|договор\w*|закон(?:а|у|ом|е|ы|ов|но)?\b|"
        r"иск(?:а|ом|овое)?\b|суд(?:а|е|у|ом|ебн\w+)?\b|юрис\w+|ответственност\w+|расторг\w+|работодател\w+|"
        r"наследств\w+|прав[ао] (?:собственности|потребител\w+)|уволи\w+|алимент\w+|развод[аеу]?\b|нотариус\w*|"
        r"завещани\w+|штраф\w*|доверенност\w+|патент\w*|товарн\w+ знак\w*)",
        r"法律|契約|規則|条項|著作権|民法|刑法|訴訟|裁判|弁護士|損害賠償|侵害|法的|違法|訴え|解雇|離婚|慰謝料|相続|遺言|特許|商標",
    ),
    "creative": (
        r"\b(?:write|compose|invent|create|make up|come up with|tell|continue|give|draft)\b.{0,60}\b(?:stor(?:y|ies)|"
        r"backstory|poems?|haiku|novel|fairy ?tale|lyrics|screenplay|sonnet|limerick|monologue|dialogue|song|plot|"
        r"toast|slogans?|jokes?|rhym\w+|fable|riddles?|verses?|superhero|villain)\b|\b(?:haiku|limerick|"
        r"fan ?fiction)\b",
        r"\b(?:сочини\w*|стих\w*|рассказ(?:а|ик|ы)?\b|сказк\w+|поэм\w+|роман(?:а|е)?\b|придума\w+|сценари\w+|песн\w+|"
        r"загадк\w+|слоган\w*|анекдот\w*|частушк\w+|басн\w+)",
        r"物語|詩|小説|創作|俳句|短歌|歌詞|童話|脚本|川柳|キャッチコピー|セリフ|怪談",
    ),
}  # fmt: skip
WEIGHTS = {"translation": 4, "classification": 3, "code": 2, "creative": 2}


class Task(msgspec.Struct, frozen=True):
    """A kind of task and what it is known by. weight: what one match counts.

    patterns: each with the letters that a text must have for it to match, None where nobody says.
    """

    name: str
    patterns: tuple[tuple[re.Pattern[str] | None, re.Pattern[str]], ...]
    weight: int = 1


class BadPattern(ConfigError):
    """What is given under `tasks` is no good. path: of it; reason: the error without it."""

    def __init__(self, path: tuple[str | int, ...], reason: str) -> None:
        self.path = path
        self.reason = reason
        place = ".".join(step for step in path if isinstance(step, str)) + "".join(f"[{i}]" for i in path[2:])
        super().__init__(f"{place}: {reason}")


def tasks(extra: Mapping[str, Sequence[str]] | None = None) -> tuple[Task, ...]:
    """Return the table of tasks: the shipped patterns and, after them, those of `extra` by task.

    New names are new tasks, which come last. Raises BadPattern.
    """
    extra = extra or {}
    if len(extra) > MAX_TASKS:
        raise BadPattern(("tasks",), f"{len(extra)} tasks; at most {MAX_TASKS} may be given")
    checked = {name: _checked(name, patterns) for name, patterns in extra.items()}
    return tuple(
        Task(
            name,
            (*map(_shipped, PATTERNS.get(name, ())), *((None, pattern) for pattern in checked.get(name, ()))),
            WEIGHTS.get(name, 1),
        )
        for name in {**PATTERNS, **extra}
    )


# A shipped pattern with such letters has them in each of its alternatives, so that most texts need not be searched.
_SCRIPTS = (re.compile("[а-яё]"), re.compile("[\u3040-\u30ff\u3400-\u9fff]"))


def _shipped(pattern: str) -> tuple[re.Pattern[str] | None, re.Pattern[str]]:
    script = next((script for script in _SCRIPTS if script.search(pattern)), None)
    # In Japanese there is no space behind an English word: only for letters of ASCII it must end there.
    return script, re.compile(pattern, re.ASCII if script is None else 0)


def names(extra: Iterable[str] = ()) -> tuple[str, ...]:
    """Return the names of all tasks: the shipped ones, general, those of `extra`, and the operations beside chat."""
    return tuple(dict.fromkeys((*PATTERNS, GENERAL, *extra, *OPERATIONS)))


def classify(text: str, table: Iterable[Task]) -> str:
    """Return the name of the task that a text asks for, `general` where no pattern matches."""
    text = reading.plain(reading.ends(text, _HEAD, _TAIL))[: _HEAD + _TAIL + 1]
    absent = _SCRIPTS if text.isascii() else [script for script in _SCRIPTS if not script.search(text)]
    best, most = GENERAL, 0
    for task in table:
        score = task.weight * _matches(text, task, absent)
        if score > most:
            best, most = task.name, score
    return best


def _matches(text: str, task: Task, absent: Sequence[re.Pattern[str]]) -> int:
    """Return how many different texts the patterns of a task match. absent: scripts that the text has no letter of."""
    found: set[str] = set()
    for script, pattern in task.patterns:
        if script is None or script not in absent:
            for match in pattern.finditer(text):
                found.add(match.group())
                if len(found) == _ENOUGH:
                    return _ENOUGH
    return len(found)


def _checked(name: str, patterns: Sequence[str]) -> tuple[re.Pattern[str], ...]:
    path = ("tasks", name)
    if name == GENERAL:
        raise BadPattern(path, "has no patterns: it is what matches nothing else")
    if not _NAME.fullmatch(name):
        raise BadPattern(path, "a task's name has letters, digits, - and _ only")
    if len(patterns) > MAX_PATTERNS:
        raise BadPattern(path, f"{len(patterns)} patterns; at most {MAX_PATTERNS} may be given")
    return tuple(_checked_pattern((*path, i), pattern) for i, pattern in enumerate(patterns))


def _checked_pattern(path: tuple[str | int, ...], pattern: str) -> re.Pattern[str]:
    if len(pattern) > MAX_LENGTH:
        raise BadPattern(path, f"{len(pattern)} characters; a pattern may have at most {MAX_LENGTH}")
    try:
        compiled = re.compile(pattern, re.IGNORECASE)
    except (re.error, OverflowError, RecursionError) as e:
        raise BadPattern(path, f"not a regular expression: {e}") from None
    if compiled.search(""):
        raise BadPattern(path, "matches the empty text, so every prompt would be of this task")
    return compiled
