"""Rewrites the forms in which people and models type mathematics to one plain LaTeX.

All rewriting happens here, in one table that is applied from top to bottom. `\\tfrac12` and
`\\frac {1}{2}` become `\\frac{1}{2}`; `1,234`, `1\\,234` and `1 234` become `1234`.
"""

import functools
import re
import unicodedata
from collections.abc import Callable

Replacement = str | Callable[[re.Match[str]], str]

_HIGH = "\u2070\u00b9\u00b2\u00b3\u2074\u2075\u2076\u2077\u2078\u2079\u207a\u207b\u207f"
_LOW = "\u2080\u2081\u2082\u2083\u2084\u2085\u2086\u2087\u2088\u2089"
_SUPERSCRIPTS = str.maketrans(_HIGH, "0123456789+-n")
_SUBSCRIPTS = str.maketrans(_LOW, "0123456789")
_SPACES = "\u00a0\u2002\u2003\u2005\u2006\u2007\u2008\u2009\u200a\u202f\u205f\u3000"

_SYMBOLS = {
    "\u2212": "-", "\u2013": "-", "\u2010": "-", "\u2011": "-", "\ufe63": "-", "\uff0d": "-",
    "\u00d7": r"\times ", "\u00b7": r"\cdot ", "\u22c5": r"\cdot ", "\u2219": r"\cdot ",
    "\u00f7": "/", "\u2215": "/", "\u03c0": r"\pi ", "\U0001d70b": r"\pi ", "\u221e": r"\infty ",
    "\u221a": r"\sqrt ", "\u00b1": r"\pm ", "\u2213": r"\mp ", "\u2264": r"\leq ",
    "\u2265": r"\geq ", "\u2260": r"\neq ", "\u2248": r"\approx ", "\u222a": r"\cup ",
    "\u2229": r"\cap ", "\u2208": r"\in ", "\u2205": r"\emptyset ", "\u00b0": r"^\circ ",
    "\u00ba": r"^\circ ", "\u230a": r"\lfloor ", "\u230b": r"\rfloor ", "\u2308": r"\lceil ",
    "\u2309": r"\rceil ", "\u2192": r"\to ", "\u2032": "'", "\u2019": "'", "\u2018": "'",
    "\u2026": "...", "\u211d": r"\mathbb{R}", "\u212f": "e", "\u2147": "e", "\u2148": "i",
    "\uff0c": ",", "\u200b": "", "\u2060": "", "\ufeff": "", "\u2061": "", "\u2062": "",
    "\u2063": ",",
}  # fmt: skip

_GREEK = {
    chr(code): name.lower() if "SMALL" in unicodedata.name(chr(code)) else name.title()
    for code in range(0x391, 0x3CA)
    for name in unicodedata.name(chr(code), "").replace("LAMDA", "LAMBDA").split()[3:4]
    if "WITH" not in unicodedata.name(chr(code))
}

_UNICODE = str.maketrans(
    {
        **_SYMBOLS,
        **dict.fromkeys(_SPACES, " "),
        **{letter: rf"\{name} " for letter, name in _GREEK.items()},
    }
)

_WRAPPERS = r"text|textbf|textit|textrm|textnormal|textsf|mbox|hbox|mathrm|mathbf|mathit|mathsf"
_WRAPPERS += r"|mathnormal|operatorname|boldsymbol|bm|rm|bf|it|pmb"

_MONEY = r"\\?[$%\u00a2-\u00a5\u20a0-\u20bf]"

_FUNCTIONS = (
    "arcsin|arccos|arctan|asin|acos|atan|sinh|cosh|tanh|sin|cos|tan|cot|sec|csc|sqrt|cbrt|ln|log"
    "|exp|floor|ceil|pi|infinity|infty|inf|oo|binom"
)
_FUNCTION_NAMES = {
    "asin": "arcsin", "acos": "arccos", "atan": "arctan", "infinity": "infty", "inf": "infty",
    "oo": "infty",
}  # fmt: skip


def _vulgar(match: re.Match[str]) -> str:
    """\u00bd is a fraction, and 2\u00bd a mixed number."""
    top, bottom = unicodedata.normalize("NFKC", match[0]).split("\u2044")
    return rf"\frac{{{top}}}{{{bottom or 1}}}"


def _without_separators(match: re.Match[str]) -> str:
    return re.sub(r"[^\d.+-]", "", match[0])


def _scientific(match: re.Match[str]) -> str:
    return rf"{match[1]} \cdot 10^{{{int(match[2])}}}"


def _function(match: re.Match[str]) -> str:
    return "\\" + _FUNCTION_NAMES.get(match[1], match[1]) + " "


def _dotted(match: re.Match[str]) -> str:
    r"""`0.\dot{1}4285\dot{7}` repeats all digits from the first dot to the last."""
    return rf"{match[1]}\overline{{{match[2]}{match[3] or ''}{match[4] or ''}}}"


def _combining(match: re.Match[str]) -> str:
    return rf"\overline{{{re.sub('[^0-9]', '', match[0])}}}"


_FORMATTING: list[tuple[str, Replacement]] = [
    # What surrounds an answer and does not change it.
    (r"[\u00bc\u00bd\u00be\u2150-\u215e]", _vulgar),
    (rf"[{_HIGH}]+", lambda m: f"^{{{m[0].translate(_SUPERSCRIPTS)}}}"),
    (rf"[{_LOW}]+", lambda m: f"_{{{m[0].translate(_SUBSCRIPTS)}}}"),
    (r"(?:\d[\u0304\u0305\u0307])+", _combining),
    (r"\\(?:displaystyle|textstyle|scriptstyle|limits|nolimits|nonumber|rm|bf|it)(?![A-Za-z])", ""),
    (r"\\(?:left|right|[bB]igg?[lrm]?)(?![A-Za-z])\s*\.?(?=[\s()\[\]{}|\\/.]|$)", ""),
    (r"\\(?:dfrac|tfrac|cfrac)(?![A-Za-z])", r"\\frac"),
    (r"\\(?:lbrace)(?![A-Za-z])", r"\\{"),
    (r"\\(?:rbrace)(?![A-Za-z])", r"\\}"),
    (r"\\(?:lbrack)(?![A-Za-z])", "["),
    (r"\\(?:rbrack)(?![A-Za-z])", "]"),
    (r"\\(?:[lr]vert|mid)(?![A-Za-z])", "|"),
    (r"\\(?:ge|geqslant)(?![A-Za-z])|>=", r"\\geq "),
    (r"\\(?:le|leqslant)(?![A-Za-z])|<=", r"\\leq "),
    (r"\\(?:gt)(?![A-Za-z])", ">"),
    (r"\\(?:lt)(?![A-Za-z])", "<"),
    (r"\\(?:ne)(?![A-Za-z])|!=", r"\\neq "),
    (r"\\(?:imath|jmath)(?![A-Za-z])", "i"),
    (r"\\(?:varnothing)(?![A-Za-z])", r"\\emptyset "),
    (r"\\(?:longrightarrow|rightarrow|implies|Rightarrow)(?![A-Za-z])", r"\\to "),
    (r"\\(?:phantom|hspace|vspace|label|tag)\*?\{[^{}]*\}", ""),
    (r"\\(?:begin|end)\{(?:aligned|align\*?|equation\*?|gathered|split)\}", ""),
    # The decimal comma and the thousands of LaTeX, before its spaces are dropped.
    (r"(?<![\d.])(\d+)\{,\}(\d{1,2}|\d{4,})(?![\d{.])", r"\1.\2"),
    (r"\s*\^\s*(?:\{\s*\\prime\s*\}|\\prime)", "'"),
    (r"\s*\^\s*\{\s*\\prime\s*\\prime\s*\}", "''"),
    (r"(?<![A-Za-z])(?:np|numpy|math|sympy|sp|cmath)\.(?=[a-z])", ""),
    (r"\{,\}", ","),
    (r"\{:\}", ":"),
    (r"\\langle(?![A-Za-z])", "("),
    (r"\\rangle(?![A-Za-z])", ")"),
    (rf"\\(?:{_WRAPPERS})\s*\{{\s*({_MONEY}|[A-Z]{{3}}|Rs\.?)\s*\}}(?=\s*\d)", r"\1"),
    (rf"(?<=\d)\s*\\(?:{_WRAPPERS})\s*\{{\s*({_MONEY})\s*\}}", r"\1"),
    (r"\\mathrm\s+([ei])(?![A-Za-z])", r"{\1}"),
    (r"\\(?:checkmark|blacksquare|square|Box|qed)(?![A-Za-z])", ""),
    (r"\\(?:textcolor|colorbox|color)\s*\{[^{}]*\}|\\underline(?=\s*\{)", ""),
    (r"\\(?:tiny|small|normalsize|large|Large|LARGE|huge|Huge)(?![A-Za-z])", ""),
    (r"^\s*=", ""),
    (rf"^\\(?:{_WRAPPERS})\s*\{{([^{{}}]*[\d,()][^{{}}]*)\}}$", r"\1"),
    (r"(?<=\d)(?:\\[,!:; ]|\{ \}|\{\\,\}|~|\\thinspace)\s*(?=\d{3}(?!\d))", " "),
    (r"(?<!\\)\\!\s*", ""),
    (r"(?<!\\)\\(?:[,:;> ]|quad|qquad|thinspace|enspace)(?![A-Za-z])|~", " "),
    (r"^\\(?:approx|sim|simeq|cong)(?![A-Za-z])", ""),
    # Upright constants, words that join, and upright digits.
    (rf"\\(?:{_WRAPPERS})\s*\*?\{{\s*(-?[\d.,]+%?|[ei]|\\[A-Za-z]+)\s*\}}", r"{\1}"),
    (rf",?\s*\\(?:{_WRAPPERS})\s*\{{[\s,]*(?:and|or)[\s,]*\}}\s*,?", ", "),
    (r",?\s*(?<![A-Za-z\\{])(?:and|or)(?![A-Za-z}])\s*,?", ", "),
    (r"\\(?:land|lor|wedge|vee)(?![A-Za-z])", ", "),
]  # fmt: skip

_NUMBERS: list[tuple[str, Replacement]] = [
    # Numbers. Separators of thousands: spaces, apostrophes, underscores, Indian groups, dots.
    (r"(?<=\{)\d{1,3}(?:,\d{3})+(?=\})", _without_separators),
    (r"(?<![\d.,_])\d{1,3}(?:[ '_]\d{3})+(?![\d_,])", _without_separators),
    (r"(?<![\d.,])\d{1,2}(?:,\d{2})+,\d{3}(?![\d,])", _without_separators),
    (r"(?<![\d.,])(\d{1,3}(?:\.\d{3})+),(\d+)(?![\d,])",
     lambda m: m[1].replace(".", "") + "." + m[2]),
    (r"(?<![\d.,])\d{1,3}(?:\.\d{3}){2,}(?![\d.,])", lambda m: m[0].replace(".", "")),
    # Scientific notation of programs, also with an upright e.
    (r"(?<![A-Za-z\d_\\])(\d+\.?\d*|\.\d+)\s*(?:[eE]|\{[eE]\})\{?([-+]?\d{1,7})\}?(?![\d.A-Za-z{])",
     _scientific),
    (r"(?<=\d)\s*(?:[xX*]|\\times|\\cdot)\s*10\s*(?:\^|\*\*)\s*", r" \\cdot 10^"),
    (r"\*\*", "^"),
    # Repeating decimals.
    (r"(?<!\d)(\d*\.\d*)\\dot\{?(\d)\}?(?:(\d*)\\dot\{?(\d)\}?)?", _dotted),
    (r"(?<!\d)(\d*\.\d*)(?:\\bar|\\overline|\\dot)\s*(?:\{\s*(\d+)\s*\}|(\d))",
     lambda m: rf"{m[1]}\overline{{{m[2] or m[3]}}}"),
    (r"(?<!\d)(\d*\.\d*)\((\d+)\)(?!\s*[\d(])", r"\1\\overline{\2}"),
    (r"(?<!\d)(\d*\.\d{0,12}?)(\d{1,6}?)\2{2,}\s*(?:\.{3,}|\\[lc]?dots)",
     r"\1\\overline{\2}"),
    # Degrees. Names of functions typed without a backslash.
    (r"\s*\^\s*\{?\s*\\(?:circ|degree)\s*\}?|\\(?:degree|textdegree)(?![A-Za-z])", r"\\degree "),
    (rf"(?<![A-Za-z\\{{])({_FUNCTIONS})(?![A-Za-z}}])", _function),
    (r"\\(sqrt|frac|binom)\s+(?=[{(\[])", r"\\\1"),
    (r"\\sqrt\s*\(([^()]*)\)", r"\\sqrt{\1}"),
    (r"\\operatorname\{(\w+)\}", _function),
]  # fmt: skip

_FORMATTING_RULES = [(re.compile(pattern), new) for pattern, new in _FORMATTING]
_NUMBER_RULES = [(re.compile(pattern), new) for pattern, new in _NUMBERS]

_DELIMITERS = (
    ("$$", "$$"),
    ("$", "$"),
    (r"\[", r"\]"),
    (r"\(", r"\)"),
    ("**", "**"),
    ("`", "`"),
    ('"', '"'),
    (r"\$", r"\$"),
)
_DOLLAR = re.compile(r"(?<!\\)\$")
_BOXED = re.compile(r"\\(?:boxed|fbox|framebox)\s*\{(.*)\}", re.DOTALL)


def unwrap(text: str) -> str:
    """Removes what stands around an answer: spaces, math delimiters, boxes, a final full stop."""
    previous = None
    while text != previous:
        previous = text
        text = text.strip().strip("\u200b\ufeff")
        text = re.sub(r"\\+$", "", text)
        if text.endswith((".", ",", ";", ":")) and not text.endswith(".."):
            text = text[:-1].rstrip().removesuffix("\\")
        for begin, end in _DELIMITERS:
            inner = text[len(begin) : len(text) - len(end)]
            if len(text) > len(begin + end) and text.startswith(begin) and text.endswith(end):
                text = text if begin in inner or end in inner else inner
        boxed = _BOXED.fullmatch(text)
        if boxed and is_balanced(boxed[1]):
            text = boxed[1]
        if text.startswith("{") and text.endswith("}") and is_balanced(text[1:-1]):
            text = text[1:-1]
    return text


@functools.lru_cache(maxsize=4096)
def normalize(text: str) -> str:
    """Returns one plain LaTeX form of an answer or a label."""
    text = unwrap(text)
    if len(_DOLLAR.findall(text)) % 2 == 0:
        # An odd number of signs is a currency, or a label that is broken.
        text = unwrap(_DOLLAR.sub("", text))
    if text.isascii() and text.isdigit():
        return text
    for pattern, new in _FORMATTING_RULES[:4]:
        text = pattern.sub(new, text)
    text = unicodedata.normalize("NFKC", text.translate(_UNICODE)).translate(_UNICODE)
    for pattern, new in _FORMATTING_RULES[4:]:
        text = pattern.sub(new, text)
    for pattern, new in _NUMBER_RULES:
        text = pattern.sub(new, text)
    return unwrap(re.sub(r"\s+", " ", text))


def words(text: str) -> str:
    """Returns the normal form in which words are compared: `\\text{Yes}` is yes."""
    text = re.sub(rf"\\(?:{_WRAPPERS})\s*\*?\{{([^{{}}]*)\}}", r"\1", unwrap(text))
    text = unicodedata.normalize("NFKC", text).replace("\\ ", " ").strip(' \t\n.,;:?"`*')
    if re.fullmatch(r"\(\s*[A-Za-z]{1,4}\s*\)", text):
        text = text[1:-1].strip()
    text = re.sub(r"\s+", " ", text)
    # A letter may be a variable, and n is not N.
    return text if len(text) == 1 else text.casefold()


def is_balanced(text: str) -> bool:
    """Whether every brace is closed: "1} and \\\\boxed{2" comes from two boxes, not from one."""
    depth = 0
    for brace in re.findall(r"\\.|[{}]", text, re.DOTALL):
        depth += {"{": 1, "}": -1}.get(brace, 0)
        if depth < 0:
            return False
    return depth == 0
