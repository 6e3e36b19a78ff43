"""Generate the built-in knowledge dataset: well-known facts in six categories, in prompts that small models continue.

Countries, their capitals and their languages are those of GeoNames; the other facts are in the short tables below.
The answer is always the next word.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping

from kdb.ingest.datasets.base import Dataset, DatasetInfo, Example
from kdb.ingest.datasets.published import in_words
from kdb.ingest.datasets.world import LANGUAGES, MONTHS, NUMBER_WORDS, countries, table

KNOWLEDGE = "knowledge"
_SOURCE = "prompts made by kdb, in part from GeoNames (CC BY 4.0)"
_TEMPLATE = "{text}"
_COUNTS = {"language": 53, "color": 56, "number": 50, "capital": 54, "country": 54, "month": 52}

# ISO codes of countries whose capital is one plain word. The name of every third one is, too, and is also an answer.
_WITH_CAPITAL = (
    *("FR", "DE", "IT", "ES", "JP", "CN", "RU", "EG", "GR", "PL", "AT", "PT", "TR", "IR", "IQ", "IE", "NO", "SE"),
    *("DK", "FI", "HU", "CU", "CA", "PE", "KE", "TH", "BE", "AU", "BR", "CL", "UA", "VN", "ID", "AF", "VE", "SY"),
    *("LB", "JO", "MA", "NG", "PK", "RO", "BG", "RS", "HR", "LY", "CO", "EC", "NP", "BD", "SA", "KR", "QA", "GH"),
)

# Countries in which nearly everyone speaks the language that is the first one in GeoNames.
_WITH_LANGUAGE = (
    *("FR", "GB", "DE", "JP", "IT", "CN", "ES", "RU", "EG", "GR", "PL", "TR", "PT", "HU", "BR", "SE", "MX", "DK"),
    *("FI", "TH", "AT", "KR", "AU", "VN", "UA", "IR", "AR", "SA", "RO", "CU", "BD", "NL", "NP", "BG", "IQ", "CL"),
)

_WRITERS = table("""
    William Shakespeare: English, Leo Tolstoy: Russian, Victor Hugo: French, Dante Alighieri: Italian,
    Miguel de Cervantes: Spanish, Johann Wolfgang von Goethe: German, Fyodor Dostoevsky: Russian, Homer: Greek,
    Julius Caesar: Latin, Charles Dickens: English, Gabriel Garcia Marquez: Spanish, Confucius: Chinese,
    Hans Christian Andersen: Danish, Haruki Murakami: Japanese, Voltaire: French, Plato: Greek, Henrik Ibsen: Norwegian
""")

_CITIES = table("""
    Munich: Germany, Milan: Italy, Barcelona: Spain, Marseille: France, Shanghai: China, Osaka: Japan, Mumbai: India,
    Sydney: Australia, Toronto: Canada, Istanbul: Turkey, Alexandria: Egypt, Krakow: Poland, Porto: Portugal,
    Karachi: Pakistan, Lagos: Nigeria, Casablanca: Morocco, Guadalajara: Mexico, Gothenburg: Sweden
""")

_LANDMARKS = table("""
    the Eiffel Tower: France, the Colosseum: Italy, the Great Wall: China, Mount Fuji: Japan, the Taj Mahal: India,
    the Great Pyramid of Giza: Egypt, the Kremlin: Russia, Machu Picchu: Peru, the Parthenon: Greece,
    the Brandenburg Gate: Germany, the Alhambra: Spain, Angkor Wat: Cambodia, the Sydney Opera House: Australia,
    the Louvre: France, the ancient city of Petra: Jordan, the Leaning Tower of Pisa: Italy, Chichen Itza: Mexico,
    Mount Kilimanjaro: Tanzania
""")

_COLORS_OF = table("""
    grass: green, the sky: blue, snow: white, coal: black, blood: red, a banana: yellow, a tomato: red, milk: white,
    chocolate: brown, an elephant: gray, a lemon: yellow, a flamingo: pink, a carrot: orange, a polar bear: white,
    a strawberry: red, salt: white, a crow: black, the ocean: blue, an emerald: green, a ruby: red, a sapphire: blue,
    a pumpkin: orange, a fire truck: red, an eggplant: purple, a swan: white, cotton: white
""")

# The words before " is " are the subject. A semicolon becomes a comma, since a comma would end the entry here.
_FLAGS = table("""
    France is blue; white and: red, the United States is red; white and: blue, Italy is green; white and: red,
    Belgium is black; yellow and: red, Ukraine is blue and: yellow, Sweden is blue and: yellow,
    Poland is white and: red, Russia is white; blue and: red, the Netherlands is red; white and: blue,
    Greece is blue and: white, Canada is red and: white, Finland is white and: blue,
    Ireland is green; white and: orange, Germany is black; red and: gold
""")

_TOGETHER = table("""
    a zebra is black and: white, a panda is black and: white, a bumblebee is black and: yellow,
    a tiger is orange and: black, a candy cane is red and: white, Santa Claus is dressed in red and: white,
    a traffic light is red; yellow or: green, a ladybug is red and: black, a chessboard is black and: white,
    a pixel on a screen is red; green or: blue
""")

_RAINBOW = ("red", "orange", "yellow", "green", "blue", "indigo", "violet")

_NUMBERS_OF = table("""
    a spider: eight, a triangle: three, a square: four, a bicycle: two, a hexagon: six, a pentagon: five,
    an octopus: eight, a tricycle: three, a week: seven, a year: twelve, an insect: six, a dog: four
""")

_SUMS = table("""
    one plus two: three, two plus two: four, two plus three: five, three plus three: six, four plus four: eight,
    five plus five: ten
""")

_HOLIDAYS = table("""
    Christmas: December, Halloween: October, Valentine's Day: February, New Year's Day: January,
    Saint Patrick's Day: March, American Independence Day: July, April Fools' Day: April, Christmas Eve: December,
    New Year's Eve: December, Bastille Day: July, Columbus Day: October, Veterans Day: November, Earth Day: April,
    Groundhog Day: February, Memorial Day: May, International Women's Day: March
""")


def load_knowledge() -> Dataset:
    """Generate the dataset, which is always the same."""
    examples = tuple(
        _example(category, relation, phrasing, subject, answer)
        for category, relation, phrasing, facts in _kinds()
        for subject, answer in facts.items()
    )
    return Dataset(KNOWLEDGE, _SOURCE, _TEMPLATE, examples, study="knowledge")


def knowledge_info() -> DatasetInfo:
    """Describe the dataset, without generating it."""
    return DatasetInfo(KNOWLEDGE, in_words(_COUNTS), _SOURCE, _TEMPLATE, "built in", study="knowledge")


def _kinds() -> Iterator[tuple[str, str, str, Mapping[str, str]]]:
    """Yield each kind of fact: category, relation, phrasing with {} for the subject, and answers by subject."""
    speak, capital = _languages(_WITH_LANGUAGE[::2]), _languages(_WITH_LANGUAGE[1::2], of="capital")
    yield "language", "national-language", "The national language of {} is called", speak
    yield "language", "language-in-city", "People who live in {} speak a language called", capital
    yield "language", "native-language", "The native language of {} was", _WRITERS

    yield "color", "color-of", "The typical color of {} is", _COLORS_OF
    yield "color", "colors-of-flag", "The flag of {}", _FLAGS
    yield "color", "colors-together", "{}", _TOGETHER
    yield "color", "rainbow", "The colors of the rainbow are {},", _sequences(_RAINBOW, longest=6)

    numbers = NUMBER_WORDS
    yield "number", "counting", "When we count, we say {},", _runs(numbers[:13], 3)
    yield "number", "countdown", "The countdown goes on: {},", _runs(numbers[10::-1], 3)
    yield "number", "by-twos", "Counting by twos: {},", _runs(numbers[2:13:2], 3) | _runs(numbers[1:12:2], 3)
    yield "number", "page-after", "On page {} the story begins, and it goes on to page", _runs(numbers[1:10], 1)
    yield "number", "parts-of", "Every child knows that {} has", _NUMBERS_OF
    yield "number", "sum", "One plus one equals two, and {} equals", _SUMS

    yield "capital", "capital-of", "The capital of {} is the city of", _capitals(_WITH_CAPITAL[::3])
    yield "capital", "seat-of", "The government of {} sits in its capital,", _capitals(_WITH_CAPITAL[1::3])
    yield "capital", "visit-to", "If you visit {}, do not miss its capital,", _capitals(_WITH_CAPITAL[2::3])

    named = {capital: country for country, capital in _capitals(_WITH_CAPITAL[1::3]).items()}
    yield "country", "country-of-capital", "The city of {} is the capital of", named
    yield "country", "country-of-city", "The city of {} lies in the country of", _CITIES
    yield "country", "country-of-landmark", "{} is in the country of", _LANDMARKS

    months = (*MONTHS, *MONTHS[:3])
    yield "month", "months-in-order", "The months in order: {},", _runs(months, 3)
    yield "month", "months-of-year", "The months of the year go {},", _runs(months[:14], 2)
    yield "month", "month-after", "The last day of {} is followed by the first day of", _runs(months[:13], 1)
    yield "month", "holiday-in", "People celebrate {} every year in the month of", _HOLIDAYS


def _example(category: str, relation: str, phrasing: str, subject: str, answer: str) -> Example:
    prompt = phrasing.replace("{}", subject.replace(";", ","))
    about = subject.partition(" is ")[0]
    return Example(prompt[0].upper() + prompt[1:], category=category, relation=relation, subject=about, answer=answer)


def _capitals(codes: tuple[str, ...]) -> dict[str, str]:
    return {countries()[code]["name"]: countries()[code]["capital"] for code in codes}


def _languages(codes: tuple[str, ...], of: str = "name") -> dict[str, str]:
    """Return the first language of each country, by the country's name or by its capital."""
    known = [countries()[code] for code in codes]
    return {country[of]: LANGUAGES[re.split("[,-]", country["languages"])[0]] for country in known}


def _runs(words: tuple[str, ...], length: int) -> dict[str, str]:
    """Return every sequence of that many words, with the word after it."""
    starts = range(len(words) - length)
    return {", ".join(words[start : start + length]): words[start + length] for start in starts}


def _sequences(words: tuple[str, ...], longest: int) -> dict[str, str]:
    """Return the first word, the first two words, and so on, each with the word after them."""
    return {", ".join(words[:end]): words[end] for end in range(1, longest + 1)}
