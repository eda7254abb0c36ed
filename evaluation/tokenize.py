"""Tokenize captions as coco-caption does, without Java.

coco-caption runs the Penn Treebank tokenizer of Stanford CoreNLP 3.4.1 (`-preserveLines -lowerCase`) and then
removes punctuation. The rules below reproduce the behaviour of that program; they agree with it on all 198,569
captions of Flickr8k, COCO and Pascal, and on all but a few in ten thousand captions with random punctuation,
markup, capitals and Unicode. Known differences:

* A caption that ends in a single initial ("plan B."): coco-caption keeps or drops the full stop depending on the
  first word of the next caption. Here it is dropped, as before "A", "The" and the like.
* Scripts and symbols added to Unicode after 2010, and rare marks of Indic scripts.
* Uncommon smileys, addresses with unusual punctuation, file names that start with a number, and an abbreviation
  followed by a letter ("Mo.b").
"""

import re

_DROPPED = frozenset(["", "''", "'", "``", "`", ".", "?", "!", ",", ":", "-", "--", "...", ";"])

_SYMBOLS = {
    "(": "-lrb-", ")": "-rrb-", "[": "-lsb-", "]": "-rsb-", "{": "-lcb-", "}": "-rcb-",
    "½": "1/2", "¼": "1/4", "¾": "3/4", "⅓": "1/3", "⅔": "2/3",
    "¢": "cents", "£": "#", "¤": "$", "€": "$", "₠": "$", "\x80": "$",
    "&lt;": "<", "&gt;": ">", "&quot;": "''", "&apos;": "'", "&nbsp;": "", "&ndash;": "--", "&mdash;": "--",
    '"': "''", "–": "--", "—": "--", "―": "--", "---": "--", "----": "--",
    "…": "...", "\x85": "...", "....": "...", ".....": "...",
}  # fmt: skip

_QUOTES = str.maketrans({
    "“": "``", "”": "''", "‘": "`", "’": "'", "‛": "`", "«": "``", "»": "''", "‹": "`", "›": "'",
    "\x91": "`", "\x92": "'", "\x93": "``", "\x94": "''",
})  # fmt: skip

# Abbreviations that keep their full stop: always, in capitals, before a number.
_ABBREVIATIONS = (
    "adj|adm|adv|al|ala|alex|apr|ariz|assn|asst|atty|aug|ave|bhd|bldg|blvd|brig|bros|capt|cf|cie|cmdr|co|col|colo"
    "|conn|corp|cos|cpl|ct|dak|dec|dept|det|dr|drs|elec|ens|esq|est|etc|ext|feb|fla|fri|ft|ga|gen|gov|govs|hon"
    "|inc|ind|insp|intl|invt|jan|jos|jr|jul|jun|kan|kans|ky|lt|ltd|maj|mar|md|mfg|mich|minn|mlle|mme|mo|mon|mont"
    "|mr|mrs|ms|msgr|mt|mtg|natl|neb|nev|nov|oct|okla|penn|pfc|ph|plc|ppte|ppty|pres|prof|pte|ptes|pty|ptys|pvt"
    "|rd|rep|reps|rev|rt|sen|sens|sep|sept|seq|sfc|sgt|spc|sq|sr|st|ste|supt|sys|tel|tenn|thu|tue|tues|univ|va|vs"
    "|vt|wed|wis|wisc|wm|wyo"
)
_CAPITAL_ABBREVIATIONS = "Ark|Az|Del|Ill|La|Mass|Miss|Ore|Pa|Tex|Wash"
_NUMBER_ABBREVIATIONS = "art|ca|fig|figs|no|nos|op|pp|prop"

# A single initial before one of these words ends a sentence and loses its full stop.
_STARTERS = (
    "A|About|According|After|An|As|At|But|Earlier|He|Her|Here|However|If|In|It|Last|Many|More|Now|Once|One|Other"
    "|Our|She|Since|So|Some|Such|That|The|Their|Then|There|These|They|This|We|What|When|While|Yet|You"
)

# Letters as in the Java of CoreNLP 3.4.1: with combining marks, without numerals, and in the basic multilingual
# plane only.
_BARE_LETTER = (
    r"(?:[^\W\d_²³¹¼-¾\u2070\u2074-\u2089\u2150-\u2189\u2460-\u24ff\u2776-\u2793\U00010000-\U0010ffff]"
    r"|&[aeiouAEIOU](?:acute|grave|uml);)"
)
_LETTER = (
    rf"(?:{_BARE_LETTER}|[\xad\u02c2-\u036f\u0483-\u0487\u0591-\u05bd\u05bf\u05c1\u05c2\u05c4\u05c5\u05c7"
    r"\u0610-\u061a\u064b-\u065e\u0670\u06d6-\u06ed\u0711\u0730-\u074c\u07a6-\u07b0\u0900-\u0963\u0981-\u0d48"
    r"\u0e31\u0e34-\u0e3a\u0e47-\u0e4e])"
)
_CHARACTER = rf"(?:{_BARE_LETTER}|\d)"
_SYMBOL = (
    r"[!-/:-@\[-`{-~\x80\x85¡-¿×÷\u0589\u05be\u05f3\u05f4\u060c\u061b\u061f\u066a\u066d\u06d4\u0964\u0965"
    r"\u0e3f\u2013-\u2017\u201a\u2020-\u2023\u2026\u2030-\u2038\u203b\u203e-\u2044\u2070-\u208e\u20a0\u20a4"
    r"\u20ac\u2100-\u215e\u2190-\u2bff\u3001\u3002\u3012\u30fb\uff01-\uff20\uff3b-\uff40\uff5b-\uff65]"
)
_CURLY = r"(?:[’\x92]|(?i:&apos;))"
_APOSTROPHE = rf"(?:'|{_CURLY})"
_QUOTE = rf"(?:[`‘\x91]|{_APOSTROPHE})"  # characters used as an apostrophe
_SUFFIX = r"(?i:[msd]|re|ve|ll)"
_WORD = rf"(?:[dDoOlL]{_QUOTE}(?={_CHARACTER}{{2}}))?{_CHARACTER}+"  # o'clock
_COMPOUND = rf"{_WORD}(?:[-_\u2010\u2011]{_WORD})*"
_PART = "[A-Za-z0-9]+(?:-[A-Za-z]+){0,2}"

# The longest match wins, the first rule on a tie. A rule with a group yields only the group, but competes with its
# whole match, which may include the following characters.
_RULES = [
    re.compile(pattern)
    for pattern in (
        # markup
        r"""</?[A-Za-z_][A-Za-z0-9_:.-]*(?: +[A-Za-z][A-Za-z0-9_:.-]*(?: *= *(?:"[^"\n]*"|'[^'\n]*'))?)* */? *>""",
        r"<[!?][A-Za-z-][^>\n]*>",
        r"(?i:&(?:amp|lt|gt|quot|nbsp|ndash|mdash|apos);)|&#\d+;",
        # words
        rf"{_LETTER}(?:{_LETTER}|\d)*",
        _COMPOUND,
        r"[A-Za-z0-9][A-Za-z0-9.,]*(?:-[A-Za-z0-9]+)+",  # 1.5-inch
        rf"{_PART}(?:\\?/{_PART}){{1,2}}",  # and/or
        r"[A-Z]+(?:(?:&amp;|[&+])[A-Z]+)+",  # AT&T
        rf"{_LETTER}{_CHARACTER}*(?:[.!?]{_LETTER}{_CHARACTER}*)+",  # flickr.com, and grass.The
        r"(?i:(can)not|(gon)na|(got)ta|(lem)me|(gim)me|(wan)na)[^A-Za-z0-9]",
        # apostrophes
        rf"([A-Za-z]*?[A-MO-Za-mo-z])[nN]{_QUOTE}[tT]",
        rf"[nN]{_QUOTE}[tT]",
        rf"({_CHARACTER}+)(?:{_CURLY}{_SUFFIX}|'{_SUFFIX}[^A-Za-z])",
        rf"{_CURLY}{_SUFFIX}|('{_SUFFIX})[^A-Za-z]",
        r"('[tT])(?i:is|was)",
        rf"{_APOSTROPHE}[nN]{_APOSTROPHE}|{_CURLY}[nN]|('[nN])\s",  # rock 'n' roll
        rf"{_LETTER}+[aeiouyAEIOUY]{_QUOTE}[aeiouA-Z]{_LETTER}*",  # ma'am
        rf"[A-HJ-XZn]{_QUOTE}{_LETTER}{{2,}}",  # B'day
        rf"(?i:c{_QUOTE}(?:est|mon)|[eo]{_QUOTE}er|o{_QUOTE}o|ev{_QUOTE}ry|li{_QUOTE}l|cap{_QUOTE}n)",
        rf"(?i:nor{_QUOTE}easter|s{_QUOTE}mores)",
        rf"{_APOSTROPHE}(?i:em|till?|cause)",
        rf"(?i:ol|[dlj]){_APOSTROPHE}|([yY]{_APOSTROPHE}){_LETTER}",  # ol' man, y'all
        rf"{_APOSTROPHE}[2-9]0[sS]|('\d\d)\s",  # the '80s
        # full stops
        rf"({_COMPOUND}\.)[,;:]",
        r"(?:[A-Za-z]\.)+",
        rf"([A-Za-z])\.[ \xa0]+(?:{_STARTERS}|{_STARTERS.upper()})[ \xa0]",
        r"([A-Za-z])\.\s*\n",
        r"(?i:ph\.d\.?)",
        rf"(?i:{_ABBREVIATIONS})\.",
        rf"(?:{_CAPITAL_ABBREVIATIONS}|{_CAPITAL_ABBREVIATIONS.upper()})\.",
        rf"((?i:{_NUMBER_ABBREVIATIONS})\.)[ \xa0]?\d",
        # numbers and addresses
        r"[-+]?(?:\d*(?:[.:,\xad]\d+)+|\d+)",
        r"(?:\d{1,4}[- \xa0])?\d{1,4}(?:\\?/|⁄)\d{1,4}",  # 1 1/2
        r"(?:\(\d{2,3}\)[ \xa0]?|(?:\+\+?)?(?:\d{2,4}[- \xa0])?\d{2,4}[- \xa0])\d{3,4}[- \xa0]?\d{3,5}",
        r"[A-Z]+\$",  # US$
        r"""(?i:https?)://[^\s"<>|(){}]+[^\s"<>|(){}.!?,;:&`'-]""",
        r"""<?[A-Za-z0-9][^\s"<>|(){}@]*+@(?:[^\s"<>|(){}.]+\.)*[^\s"<>|(){}.]+>?""",
        rf"@[A-Za-z_]\w*|#{_LETTER}+",
        r"[cC]\+\+|[cCfF]#",
        # smileys, runs and single characters
        r"([<>]?[:;=][-o*']?[()DPdpO\\{@|\[\]]|:[03])[^A-Za-z0-9]",
        r"[\^x=~<>'-]_[\^x=~<>'-]'?|\([\^x=~<>'-][-_.][\^x=~<>'`-]'?\)",
        r"[?!]+|\\?\*+|#+|@+|_+|-+|\.{3,5}|<<|>>|''|``|[‘’‛“-‟«»‹›\x91-\x94]{1,2}",
        _SYMBOL,
    )
]

_ONLY_QUOTES = re.compile("[‘’‛“-‟«»‹›\x91-\x94]+")
_CONTRACTION = re.compile(rf"{_CURLY}{_SUFFIX}|[nN]{_QUOTE}[tT]")

# Fast path for most words: letters only, followed by a space, or by a comma or full stop that is dropped.
_PLAIN = re.compile(r"([A-Za-z]+(?=\s)|[A-Za-z]{2,}(?=[.,]\s))(?: ?[.,](?=\s))?\s*")
_NOT_PLAIN = frozenset(
    f"cannot|gonna|gotta|lemme|gimme|wanna|{_ABBREVIATIONS}|{_CAPITAL_ABBREVIATIONS.lower()}"
    f"|{_NUMBER_ABBREVIATIONS}".split("|")
)
_LINE_ENDS = re.compile("[\n\r\x0b\x0c\u2028\u2029]")


def tokenize(caption: str) -> list[str]:
    """Return the lower-case words of a caption, without punctuation.

    Line ends become spaces; in coco-caption they assign all later captions to wrong images.
    """
    text = _LINE_ENDS.sub(" ", caption) + "\n"
    tokens = []
    position = 0
    while position < len(text):
        plain = _PLAIN.match(text, position)
        if plain and (word := plain[1].lower()) not in _NOT_PLAIN:
            tokens.append(word)
            position = plain.end()
            continue
        matches = [match for rule in _RULES if (match := rule.match(text, position))]
        if not matches:
            position += 1
            continue
        best = max(matches, key=re.Match.end)
        token = best[best.lastindex or 0]
        position += len(token)
        if (written := _write(token)) not in _DROPPED:
            tokens.append(written)
    return tokens


def _write(token: str) -> str:
    """Normalize a token as the original does."""
    if token in _SYMBOLS:
        return _SYMBOLS[token]
    if _CONTRACTION.fullmatch(token):
        token = token.replace("&apos;", "'").translate(_QUOTES)
    elif _ONLY_QUOTES.fullmatch(token):
        token = token.translate(_QUOTES)
    token = token.lower().replace("\xad", "").replace("&amp;", "&").replace(" ", "\xa0")
    return token.replace("(", "-lrb-").replace(")", "-rrb-")
