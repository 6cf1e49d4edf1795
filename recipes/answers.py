"""What a text gives as its answer: a number, or lines."""
import re
from decimal import Decimal

MARK = re.compile(r"####|\\boxed|answers?[ \n*_]{1,4}(?:is|are)\b|answers?\W{0,4}[:\uff1a]", re.I)
RUN_ON = re.compile(r"\n[ >*_#]*Q(?:uestion)? ?\d*[*_]* ?[:\uff1a]", re.I)
BEFORE = re.compile(r"(?:\W|begin\{\w+\*?\})*")             # of a sentence: its markup, newlines
END = re.compile(r"(?<=\d)\.(?!\d)"                         # not the dot of 3.5 or of Mr.
                 r"|(?<!\bMr)(?<!\bMrs)(?<!\bMs)(?<!\bDr)(?<!\bRs)(?<!\bapprox)"
                 r"""[.!?](?! ?=)(?=[*_"')\]$\\}]{0,4}(?:\s|$))"""
                 r"|(?<!:)\n(?![\s&]{0,9}=)")               # nor a line's, if the next has "= 7"
EQUALS = re.compile(r"=+|\u2248|\\approx|\bequal(?:s|s? to)\b|\bwhich (?:is|makes|gives)\b"
                    r"(?! (?:the|twice|half|double|\S+ (?:more|less|fewer|times|of|than))\b)", re.I)
# a minus, not that of 5-3 or "Lena - 5" but that of "it is - 5"; behind it a currency or a bracket
SIGN = (r"(?:(?<![\w)\]}%-])(?:-(?! )|(?<![\w)\]}%] )(?<!\n)- |(?<=\bis )- |(?<=\bof )- "
        r"|(?<=\bto )- )|(?<!\d )\b(?:minus|negative) )[ $\u20ac\xa3\xa5\u20b9*_({]{0,4}")
DIGITS = (r"(?:(?:\d{1,3}(?:(?:,\d{3})+|(?: \d{3})+)(?!\d)|\d+)(?:\.\d+)?|(?<!\.)\.\d+)"
          r"(?:[eE][-+]?\d+(?!\w))?")
BODY = rf"(?:(?P<whole>\d+) (?=\d{{1,2}} ?/ ?\d))?(?P<body>{DIGITS}(?: ?/ ?-?{DIGITS})*)"
POWER = (r"(?: ?(?:[x\xd7*\xb7]|\\times|\\cdot) ?10\^\{?(?P<power>-?\d{1,4})\}?"
         r"|(?:\^\{?|\*\*(?=\d))(?P<raised>-?\d{1,4})\}?)?")
NUMBER = re.compile(rf"(?P<sign>{SIGN})?(?<![^\W_])(?<!\^){BODY}{POWER}|\\[cdt]?frac|\\sqrt|\u221a")
# what makes the number before it a term: 3 * 4, 5-7, 2^3, 3:30
TERM = re.compile(r"[ %_$)}]*(?:(?:[-+x\xd7\xb7/^]|(?<!\*)\*(?!\*)|\\times|\\cdot|\\div|\xf7)"
                  r"[ _$(\\{]*[\d.]|\\pi|\u03c0|\\sqrt|\u221a)|:\d")
FRAC = re.compile(rf"\\[cdt]?frac ?(?:\{{ ?(-?{DIGITS}) ?\}} ?\{{ ?(-?{DIGITS}) ?\}}|(\d) ?(\d))")
SIGNS = str.maketrans("\u2010\u2011\u2013\u2212\ufe63\uff0d", "------")
FRACTIONS = str.maketrans({"\xbd": " 1/2", "\xbc": " 1/4", "\xbe": " 3/4", "\u2153": " 1/3",
                           "\u2154": " 2/3"})
RAISED = str.maketrans("\u207b\u2070\xb9\xb2\xb3\u2074\u2075\u2076\u2077\u2078\u2079",
                       "-0123456789")


def final_number(text):
    r"""The number that a text gives as its answer, as a Decimal; None if a person reads none.

    It is read in the sentence or box behind the last ####, \boxed, "answer is" or "answer:" that
    has one, before a question of the model's own: the result of a calculation, behind "=", else
    the first. Without a mark it is the text's last. 1/0, an open brace and more than 1,000 digits
    give None.
    """
    text = RUN_ON.split(tidy(text), 1)[0]
    end = len(text)
    for mark in reversed(list(MARK.finditer(text))):
        behind = text[mark.end():end].lstrip(" \n:*_})")
        end = mark.start()
        box = mark[0] == "\\boxed" and behind.startswith("{")
        part = inside(behind[1:], 1) if box else inside(sentence(behind), 0)
        if part is None or NUMBER.search(part):
            return part and result(part)
    *_, last = [None, *NUMBER.finditer(text[:end])]
    return last and value(last)


def tidy(text):
    """The same text with one kind of space, minus, thousands, raised digits and fractions."""
    text = "\n".join(text.translate(SIGNS | FRACTIONS).splitlines())
    text = re.sub(r"(?:\\[,;: ]|~|[^\S\n])+", " ", text.replace("{,}", ",")).replace(" \n", "\n")
    text = re.sub(r"\\!|\\(?=[$%])", "", text)
    text = re.sub("[\u207b\u2070\xb9\xb2\xb3\u2074-\u2079]+",
                  lambda m: "^" + m[0].translate(RAISED), text)
    text = re.sub(r"(?<=\d)(?=\\[cdt]?frac)", " ", text)
    return FRAC.sub(lambda m: f"{m[1] or m[3]}/{m[2] or m[4]}", text)


def sentence(text):
    end = END.search(text, BEFORE.match(text).end())
    return text[:end.start()] if end else text


def inside(text, depth):
    """Up to the brace that closes what is open before text; None if one stays open."""
    outside = depth - 1
    for brace in re.finditer("[{}]", text):
        depth += 1 if brace[0] == "{" else -1
        if depth == outside:
            return text[:brace.start()]
    return None if depth else text


def result(text):
    """Behind the last "=" where one number stands; without one the first number, if it is alone.
    The reasons behind "because" do not count."""
    claim = re.split(r"\b(?:because|since)\b", text, maxsplit=1, flags=re.I)[0]
    for part in dict.fromkeys((claim, text)):
        for side in reversed(EQUALS.split(part)):
            first = NUMBER.search(side)
            if first and not TERM.match(side, first.end()):
                return value(first)


def value(number):
    if not number["body"] or len(number[0]) > 1000:                             # \frac{x}{2}
        return None
    try:
        x, *bottom = (Decimal(re.sub("[, ]", "", part)) for part in number["body"].split("/"))
        if bottom:
            below, = bottom                                 # two slashes are a date's
            x = (Decimal(number["whole"] or 0) * below + x) / below
        if number["power"]:
            x = x.scaleb(int(number["power"]))
        if number["raised"]:
            x = Decimal(number["body"]) ** int(number["raised"])    # 3/2^2 is none, nor 1,000^2
    except (ArithmeticError, ValueError):
        return None
    if x.is_finite() and abs(x.adjusted()) < 1000:
        return x.copy_negate() if number["sign"] else x


def number_or_text(answer):
    """A Decimal as it is, a text that is a number as one, any other text; None if it is blank."""
    if isinstance(answer, Decimal):
        return answer
    match = NUMBER.fullmatch(tidy(answer).strip(" $%").removeprefix("+"))
    number = value(match) if match else None
    return number if number is not None else answer if answer.strip() else None


def final_lines(text, several):
    """Lines behind the last "answer:", all or the last one; without case, blank lines, and of each
    line a last dot and ** or ` around it."""
    mark = r"(?:^|\n)[\s>*_#-]*(?:final )?answer[*_ ]*:(?:\*\*|__)?"
    lines = [line.strip() for line in re.split(mark, text.casefold())[-1].splitlines()]
    bare = lambda line: re.sub(r"^(\*\*|`)(.+)\1$", r"\2", line.removesuffix("."))
    lines = [bare(line).removesuffix(".") or line for line in lines if line]
    return lines if several else lines[-1:]
