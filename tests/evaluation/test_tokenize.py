import hashlib
import json
import os
import time
from pathlib import Path

import pytest

from evaluation.tokenize import tokenize

# What pycocoevalcap 1.2 (Stanford CoreNLP 3.4.1) makes of each caption when one that begins with "A" follows;
# for line ends inside a caption, what it makes of spaces in their place. Escapes stand for invisible characters.
EXPECTED = [
    ("A brown dog runs through the grass .", "a brown dog runs through the grass"),
    ("Two dogs, one black; one white: both wet!", "two dogs one black one white both wet"),
    ("The end.The beginning", "the end.the beginning"),
    (
        "A man (in red) jumps [twice] over a {small} hedge",
        "a man -lrb- in red -rrb- jumps -lsb- twice -rsb- over a -lcb- small -rcb- hedge",
    ),
    (
        "Mr. Smith and Dr. Jones vs. St. Mary of the U.S. team, etc.",
        "mr. smith and dr. jones vs. st. mary of the u.s. team etc.",
    ),
    (
        "It is 5 p.m. on Jan. 5 in Mass. and no. 7 wins, no. Really no.",
        "it is 5 p.m. on jan. 5 in mass. and no. 7 wins no really no",
    ),
    ("John F. Kennedy and J. Edgar", "john f. kennedy and j. edgar"),
    ("Plan B. The dog sits", "plan b the dog sits"),
    ("Plan B. Dogs sit", "plan b. dogs sit"),
    (
        "Who cannot swim? I'm gonna try, wanna see, gotta go, lemme in, gimme that",
        "who can not swim i 'm gon na try wan na see got ta go lem me in gim me that",
    ),
    ("CANNOT Gonna cannots", "can not gon na cannots"),
    ("rock 'n' roll, rock'n'roll and bacon n' eggs", "rock 'n' roll rock 'n' roll and bacon n eggs"),
    ("a = b & c, a&b, AT&T, R&B, Q&A", "a = b & c a & b at&t r&b q&a"),
    ("-leading hyphen and trailing- and -- dashes --- here", "leading hyphen and trailing and dashes here"),
    ("A well-known t-shirt, a 10-year-old, a semi--colon", "a well-known t-shirt a 10-year-old a semi colon"),
    ("½ cup, 1½ cups, 1/2 cup, 3 1/2 cups and ¾", "1/2 cup 1 1/2 cups 1/2 cup 3\xa01/2 cups and 3/4"),
    ("no break space", "no break space"),
    ("“Quoted” and ‘single’ and \"double\" and ``back''", "quoted and single and double and back"),
    ("the dog’s bowl, the dogs’ bowls, don’t, I’m, they’ll", "the dog 's bowl the dogs bowls do n't i 'm they 'll"),
    (
        "the dog's bowl, the dogs' bowls, don't, I'm, they'll, she'd, we've, you're",
        "the dog 's bowl the dogs bowls do n't i 'm they 'll she 'd we 've you 're",
    ),
    ("dog&apos;s bone &amp; cat &lt;b&gt; &quot;hi&quot; a&nbsp;b", "dog 's bone & cat < b > hi a b"),
    ("DON'T STOP, IT'S O'CLOCK", "do n't stop it 's o'clock"),
    (
        "ma'am said y'all saw o'clock, ol' man, d'Artagnan, 'em and 'til '80s 1980's",
        "ma'am said y' all saw o'clock ol' man d'artagnan 'em and 'til '80s 1980 's",
    ),
    ("'tis the season, 'twas the night", "'t is the season 't was the night"),
    ("can't won't ain't shan't isn't n't", "ca n't wo n't ai n't sha n't is n't n't"),
    ("$5 or $5.50, 100% of US$20, €3, £4, ¢5, #1", "$ 5 or $ 5.50 100 % of us$ 20 $ 3 # 4 cents 5 # 1"),
    ("at 10:30, 10:30am, 1,000 people, 5.5 miles, .5, -3, +4", "at 10:30 10:30 am 1,000 people 5.5 miles .5 -3 +4"),
    ("1st 2nd 3rd and the 90s", "1st 2nd 3rd and the 90s"),
    ("hello... is it... me.. or not …", "hello is it me or not"),
    ("What?! Really!? Yes!! no?", "what ?! really !? yes !! no"),
    ("and/or his/her, a/b/c, w/o", "and/or his/her a/b/c w/o"),
    ("a_b and __init__ and snake_case", "a_b and __ init __ and snake_case"),
    ("3x5 card, 2*3, 2+2, C++, a^b, ~5, x|y, 50/50", "3x5 card 2 * 3 2 +2 c++ a ^ b ~ 5 x | y 50/50"),
    (
        "www.example.com http://www.example.com/a?b=c me@example.com @name #tag",
        "www.example.com http://www.example.com/a?b=c me@example.com @name #tag",
    ),
    (
        '<unk> <start> a dog <end> <b>bold</b> <br/> <img src="x">',
        '<unk> <start> a dog <end> <b> bold </b> <br/> <img\xa0src="x">',
    ),
    ("smile :) wink ;-) sad :( ^_^", "smile :-rrb- wink ;--rrb- sad :-lrb- ^_^"),
    ("call (555) 123-4567 or 555-1234", "call -lrb-555-rrb-\xa0123-4567 or 555-1234"),
    ("café naïve über Ünïcode", "café naïve über ünïcode"),
    ("cän't isän't don’t 5n't sän'ts cän've", "cän t isän t do n't 5n t sän ts cän 've"),
    ("日本語 犬 собака σκύλος", "日本語 犬 собака σκύλος"),
    ("emoji 😀 and heart ❤ and ™ and °C", "emoji and heart ❤ and ™ and ° c"),
    ("a—b – c ― d", "a b c d"),
    ("curly ”run“ ’’ ‘‘", "curly run"),
    ("soft\xadhyphen zero\u200bwidth", "softhyphen zero width"),
    ("a, b,c ,d", "a b c d"),
    ("bat., bat.; bat.", "bat. bat. bat"),
    ("word`s don`t", "word s do n`t"),
    ("O'Brien's d'oeuvres l'eau qu'il", "o'brien 's d'oeuvres l'eau qu'il"),
    ("Ph.D. e.g. i.e. a.m. a.b.c", "ph.d. e.g. i.e. a.m. a.b.c"),
    ("x.y z?w a!b", "x.y z?w a!b"),
    (
        "( ) [ ] { } < > | \\ / ~ @ # $ % ^ & * _ - + =",
        "-lrb- -rrb- -lsb- -rsb- -lcb- -rcb- < > | \\ / ~ @ # $ % ^ & * _ + =",
    ),
    ("...  . . . .... ......", ""),
    ("   ", ""),
    ("", ""),
    (".", ""),
    ("A dog\nruns", "a dog runs"),
    ("tab\tbed", "tab bed"),
    ("A\xa0dog\xa0\u202fruns", "a dog runs"),
    ("Line\rends\x0binside\x0ca\u2028caption\u2029go", "line ends inside a caption go"),
    ("A photo of vitamin D.", "a photo of vitamin d"),
    ("7:30p.m. in No.5", "7:30 p.m. in no. 5"),
    ("Wii U.S. a.m. A dog", "wii u.s. a.m. a dog"),
    ("dog,well-fed and a 1.5-inch bat.,then", "dog,well-fed and a 1.5-inch bat. then"),
    ("I'd've gone, hallowe'en, nor'easter, s'mores", "i 'd 've gone hallowe'en nor'easter s'mores"),
    ("\x93cp1252\x94 dog\x92s", "cp1252 dog 's"),
    ("«Guillemets» ‹x› „low‟", "guillemets x „ low ‟"),
    ("A 4 x 4 & a 12\" ruler, 6' tall, 5'10\"", "a 4 x 4 & a 12 ruler 6 tall 5 10"),
]


@pytest.mark.parametrize(("caption", "words"), EXPECTED)
def test_words_are_those_of_coco_caption(caption, words):
    assert " ".join(tokenize(caption)) == words


@pytest.mark.parametrize("space", ["\n", "\r", "\x0b", "\x0c", "\u2028", "\u2029", "\xa0", "\t", "  "])
def test_line_ends_and_other_separators_are_spaces(space):
    assert tokenize(f"a dog{space}runs.{space}") == ["a", "dog", "runs"]


def test_tokens_contain_no_spaces():
    assert tokenize("1 1/2 cups <b c>") == ["1\xa01/2", "cups", "<b\xa0c>"]


@pytest.mark.parametrize("part", ["a", "a-", "a.", "a'", "'", "<a ", "a@", "1 ", "(1", "A&", "n't", "aa'a!"])
def test_tokenizing_takes_linear_time(part):
    started = time.perf_counter()
    tokenize(part * (6_000 // len(part)))
    assert time.perf_counter() - started < 5


# Digests of what pycocoevalcap 1.2 makes of all captions, so that this needs no Java.
@pytest.mark.parametrize(
    ("source", "digest"),
    [
        ("flickr8k", "8c370c7d1bca91b6136c39a779e3e2fbd788c15ada88b843cdd401132a9c7754"),
        ("general", "4d955432016deaae1ffaafc4ae7ca294bfa2cf4d5d4d82042d6b3d0278621f54"),
        ("coco", "9da43c339600f891a139ae36b35d1b37fe172eee418e9cc868d3e7169a641a3c"),
    ],
)
def test_words_of_real_captions_are_those_of_coco_caption(source, digest):
    if "CAPTIONER_DATA" not in os.environ:
        pytest.skip("CAPTIONER_DATA names no folder of real captions")
    captions = real_captions(Path(os.environ["CAPTIONER_DATA"]), source)
    text = "\n".join(" ".join(tokenize(caption)) for caption in captions)
    assert hashlib.sha256(text.encode()).hexdigest() == digest


def real_captions(data: Path, source: str) -> list[str]:
    if source == "flickr8k":
        lines = (data / "flickr8k/Flickr8k_text/Flickr8k.token.txt").read_text(encoding="utf-8").split("\n")
        return [line.split("\t", 1)[1] for line in lines if line]
    if source == "general":
        lines = (data / "general/captions.jsonl").read_text(encoding="utf-8").split("\n")
        return [caption for line in lines if line for caption in json.loads(line)["captions"]]
    annotations = json.loads((data / "coco/annotations/captions_val2017.json").read_text(encoding="utf-8"))
    return [annotation["caption"] for annotation in annotations["annotations"]]
