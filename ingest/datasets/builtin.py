"""Generate two datasets that need no file: true and false statements about cities, and coin puzzles."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

from kdb.ingest.datasets.base import Dataset, DatasetInfo
from kdb.ingest.datasets.layout import Layout, to_examples
from kdb.ingest.datasets.rows import Row, require
from kdb.ingest.datasets.world import frozen

_SEED = 2024
_N_CITIES = 400
_N_PUZZLES = 500
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
    """Yield two statements per city: its own country, then the other country of its pair.

    The countries of a pair have the same number of cities, and no city is said to lie outside its pair. So every word
    is as often true as false in each pair, and tells nothing about the pairs that a probe has not seen.
    """
    cities = frozen("cities.csv")
    pairs: dict[str, list[str]] = {}
    for city in cities:
        if city["country"] not in pairs.setdefault(city["pair"], []):
            pairs[city["pair"]].append(city["country"])
    for city in cities:
        one, other = pairs[city["pair"]]
        yield _statement(city["city"], city["country"], f"{one} / {other}", label=1)
        yield _statement(city["city"], other if city["country"] == one else one, f"{one} / {other}", label=0)


def _statement(city: str, country: str, pair: str, label: int) -> Row:
    text = f"{city} is a city in {country}."
    fields = {"text": text, "label": label, "city": city, "country": country, "pair": pair, "category": "country"}
    return Row("world-cities", fields)


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
        source="statements made by kdb from GeoNames (CC BY 4.0)",
        size=f"{_N_CITIES:,} true + {_N_CITIES:,} false",
        template="Geography quiz: say whether this is true or false. {text}",
        answers=("false", "true"),
        layout=Layout(group="pair", subject="city", category="category"),
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
