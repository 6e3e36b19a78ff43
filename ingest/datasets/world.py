"""Lists of words by category: months, colors, number words, languages, countries and their capitals.

Countries and capitals are those of GeoNames; the other lists are short and complete.
"""

from __future__ import annotations

import csv
import re
from collections.abc import Iterable, Mapping
from functools import cache
from pathlib import Path


def table(text: str) -> dict[str, str]:
    """Parse "France: Paris, Italy: Rome" to a dict."""
    return dict(entry.strip().split(": ") for entry in text.split(","))


MONTHS = (
    *("January", "February", "March", "April", "May", "June"),
    *("July", "August", "September", "October", "November", "December"),
)

COLORS = (
    *("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white", "gray"),
    *("gold", "silver", "violet", "indigo", "maroon", "turquoise", "scarlet", "crimson"),
)

NUMBER_WORDS = (
    *("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"),
    *("eleven", "twelve", "thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen", "nineteen", "twenty"),
)

_TENS = {"thirty": 30, "forty": 40, "fifty": 50, "sixty": 60, "seventy": 70, "eighty": 80, "ninety": 90}

# The codes are those of ISO 639, which GeoNames uses for the languages of a country.
LANGUAGES = table("""
    sq: Albanian, am: Amharic, ar: Arabic, hy: Armenian, az: Azerbaijani, eu: Basque, be: Belarusian, bn: Bengali,
    bs: Bosnian, bg: Bulgarian, my: Burmese, ca: Catalan, zh: Chinese, hr: Croatian, cs: Czech, da: Danish, nl: Dutch,
    en: English, eo: Esperanto, et: Estonian, fi: Finnish, fr: French, gl: Galician, ka: Georgian, de: German,
    el: Greek, gu: Gujarati, ht: Haitian, he: Hebrew, hi: Hindi, hu: Hungarian, is: Icelandic, id: Indonesian,
    ga: Irish, it: Italian, ja: Japanese, kk: Kazakh, km: Khmer, ko: Korean, ku: Kurdish, lo: Lao, la: Latin,
    lv: Latvian, lt: Lithuanian, mk: Macedonian, ms: Malay, mt: Maltese, mn: Mongolian, ne: Nepali, no: Norwegian,
    ps: Pashto, fa: Persian, pl: Polish, pt: Portuguese, pa: Punjabi, ro: Romanian, ru: Russian, sa: Sanskrit,
    sr: Serbian, sk: Slovak, sl: Slovene, so: Somali, es: Spanish, sw: Swahili, sv: Swedish, tl: Tagalog, ta: Tamil,
    te: Telugu, th: Thai, tr: Turkish, uk: Ukrainian, ur: Urdu, uz: Uzbek, vi: Vietnamese, cy: Welsh, yi: Yiddish,
    zu: Zulu
""")

# Names of countries that occur as answers to questions, but not in GeoNames.
_ALSO_COUNTRIES = table("""
    England: England, Scotland: Scotland, Wales: Wales, Northern Ireland: Northern Ireland, USA: United States,
    U.S.A: United States, United States of America: United States, UK: United Kingdom, U.K: United Kingdom,
    Great Britain: United Kingdom, Holland: Netherlands, Czech Republic: Czechia, Burma: Myanmar
""")

_ASKED_FOR = {
    "month": r"month",
    "color": r"colou?r",
    "language": r"language|speak|spoken|tongue",
    "capital": r"capital",
    "country": r"\b(countr(y|ies)|nations?|republics?|kingdoms?|states?|islands?)\b",
    "number": "",  # any words: only questions for a number have digits as answer
}


def answers_by_category(question: str, accepted: Iterable[str]) -> tuple[str, list[str]] | None:
    """Find the category of a question from its words and its answers; None if it is in none of the six.

    Returns also the answers in this category, in its spelling and each once: more than one if the accepted spellings
    name different things.
    """
    known = [_normal(answer) for answer in accepted]
    for category, asked in _ASKED_FOR.items():
        if re.search(asked, question.lower()):
            spelling = _spellings()[category]
            answers = list(dict.fromkeys(spelling[answer] for answer in known if answer in spelling))
            if category == "number":
                answers = list(dict.fromkeys(filter(None, map(_number, known))))
            if answers:
                return category, answers
    return None


def _number(answer: str) -> str | None:
    """Write a number up to twenty as a word, and a larger one in digits; None if it is not a whole number."""
    values = {word: value for value, word in enumerate(NUMBER_WORDS)} | _TENS
    if answer not in values and not re.fullmatch(r"[0-9]{1,15}", answer):
        return None
    value = values[answer] if answer in values else int(answer)
    return NUMBER_WORDS[value] if value < len(NUMBER_WORDS) else str(value)


def _normal(answer: str) -> str:
    return re.sub(r"^(the|a|an) ", "", answer.strip().rstrip(".").lower())


@cache
def _spellings() -> Mapping[str, Mapping[str, str]]:
    """Return, for each category, the proper spelling of each normalised name."""
    named = countries().values()
    country_names = [country["name"].removeprefix("The ") for country in named]
    capitals = [country["capital"] for country in named if country["capital"]]
    return {
        "month": {_normal(name): name for name in MONTHS},
        "color": {name: name for name in COLORS} | {"grey": "gray"},
        "language": {_normal(name): name for name in LANGUAGES.values()},
        "capital": {_normal(name): name for name in capitals},
        "country": {_normal(name): name for name in country_names}
        | {_normal(also): name for also, name in _ALSO_COUNTRIES.items()},
        "number": {},
    }


@cache
def countries() -> Mapping[str, Mapping[str, str]]:
    """Return GeoNames' countries by ISO code: `name`, `capital`, and `languages` as codes, the main one first."""
    return {country["code"]: country for country in frozen("countries.csv")}


def frozen(file: str) -> list[dict[str, str]]:
    """Read a table of facts that kdb comes with; the lines at its top name its source and licence."""
    lines = (Path(__file__).parent / "data" / file).read_text(encoding="utf-8").splitlines()
    return list(csv.DictReader(line for line in lines if not line.startswith("#")))
