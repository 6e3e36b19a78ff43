"""The API of `kdb serve`: formats, pages, limits, who may ask, and how it is run."""

from __future__ import annotations

import contextlib
import html
import io
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import polars as pl
import psutil
import pyarrow as pa
import pytest
import schemathesis
from click.testing import Result
from helpers.served import Served, served
from helpers.synthetic import Model, build
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import content_type_conformance, status_code_conformance

import kdb
from kdb.analysis.captions import EFFECTS, FEW, MEANS, READOUTS
from kdb.errors import QueryError, UnknownNameError
from kdb.queries.catalogue import load_catalogue
from kdb.warehouse.limits import Limits
from kdb.warehouse.paging import Page
from kdb.warehouse.schema import PARTITIONS, TABLES
from kdb.warehouse.store import Warehouse
from kdb.web.cells import cell
from kdb.web.ways import ways_to_ask

pytestmark = pytest.mark.slow

SLOW = "SELECT sum(a.range * b.range) FROM range(1000000000) a, range(1000000) b"
BIG = "SELECT sum(length(repeat('x', 3000000 + i::INTEGER))) FROM range(2048) t(i)"


@pytest.fixture(scope="module")
def server() -> Iterator[Served]:
    # No ordinary question takes so long on any machine: what is tested with it never meets the time limit.
    with served("--demo", "--seconds", "300", "--memory", "0.25") as running:
        yield running


@pytest.fixture(scope="module")
def client(server: Served) -> Iterator[httpx.Client]:
    with server.client() as opened:
        yield opened


@pytest.fixture(scope="module")
def demo() -> Iterator[Warehouse]:
    with kdb.open_demo() as opened:
        yield opened


def read(response: httpx.Response) -> pl.DataFrame:
    """The rows of a response, whatever its format."""
    assert response.status_code == 200, response.text
    kind = response.headers["content-type"].partition(";")[0]
    if kind == "application/json":
        return pl.DataFrame(response.json(), infer_schema_length=None)
    if kind == "text/csv":
        return pl.read_csv(response.content)
    if kind == "application/vnd.apache.parquet":
        return pl.read_parquet(io.BytesIO(response.content))
    return pl.DataFrame(pa.ipc.open_stream(response.content).read_all())


# Answers ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("format_", ["json", "csv", "arrow", "parquet"])
def test_a_saved_query_is_the_same_in_every_format_and_as_in_python(
    client: httpx.Client, demo: Warehouse, format_: str
) -> None:
    found = read(client.get("/api/queries/top-heads", params={"category": ["capital", "month"], "format": format_}))
    expected = demo.query("top-heads", category=["capital", "month"])
    assert found.rows() == expected.rows()
    assert found.columns == expected.columns


@pytest.mark.parametrize(
    ("accept", "kind"),
    [
        ("text/csv", "text/csv"),
        ("application/json;q=0.1, text/csv", "text/csv"),
        ("text/csv;q=0, */*", "application/json"),
        ("application/vnd.apache.arrow.stream", "application/vnd.apache.arrow.stream"),
        ("application/vnd.apache.parquet;q=0.9, text/html", "application/vnd.apache.parquet"),
        ("text/html", "application/json"),
        ("text/csv;q=nonsense", "application/json"),
    ],
)
def test_the_format_is_the_one_accepted(client: httpx.Client, accept: str, kind: str) -> None:
    response = client.get("/api/sql", params={"sql": "SELECT 1 AS one"}, headers={"accept": accept})
    assert response.headers["content-type"].partition(";")[0] == kind


def test_sql_answers_by_post_and_by_link(client: httpx.Client) -> None:
    text = "SELECT model, count(*) AS n FROM layer_scores GROUP BY model ORDER BY model"
    posted = client.post("/api/sql", json={"sql": text})
    assert posted.json() == client.get("/api/sql", params={"sql": text}).json()
    assert [row["model"] for row in posted.json()] == [
        "gemma-3-270m",
        "qwen2.5-coder-0.5b-instruct-q4",
        "qwen2.5-coder-1.5b-instruct-q4",
        "smollm2-135m",
    ]
    assert posted.headers["x-kdb-rows"] == "4"
    assert float(posted.headers["x-kdb-seconds"]) > 0


WITHOUT_ROWS = {"depth-by-step", "scores-by-step", "lens-fits", "expert-scores", "top-experts", "router-by-category"}
"""Queries that the demonstration, of models without checkpoints, tuned lens and experts, has no rows for."""


@pytest.mark.parametrize("name", sorted(load_catalogue()))
def test_every_saved_query_answers(client: httpx.Client, name: str) -> None:
    one = {"prompt": 24, "layer": 12, "head": 2, "neuron": "f11_441"}
    required = {param.name: one[param.name] for param in load_catalogue()[name].params if param.required}
    sizes = {"size": 0.2, "within": 2} if name == "families-at-size" else {}
    rows = client.get(f"/api/queries/{name}", params=required | sizes).json()
    assert (rows == []) == (name in WITHOUT_ROWS)


def test_numbers_and_texts_come_through_json(client: httpx.Client) -> None:
    text = """SELECT 9007199254740993 AS big, sum(i) AS total, 'nan'::DOUBLE AS nan, NULL AS nothing, 1.50 AS price,
        [1, 2] AS list, {'a': 'é"<'} AS struct, now()::TIMESTAMP > '2020-01-01' AS later, 1 AS twice, 2 AS twice
        FROM range(3) t(i)"""
    (row,) = client.post("/api/sql", json={"sql": text}).json()
    assert row == {
        "big": 9007199254740993,
        "total": 3,
        "nan": None,
        "nothing": None,
        "price": 1.5,
        "list": [1, 2],
        "struct": {"a": 'é"<'},
        "later": True,
        "twice": 1,
        "twice_1": 2,
    }


def test_what_has_no_text_is_refused_with_what_to_do(client: httpx.Client) -> None:
    for text in ("SELECT 'x'::BLOB AS b", "SELECT INTERVAL 1 DAY AS b", "SELECT ['x'::BLOB] AS b"):
        response = client.post("/api/sql", json={"sql": text})
        assert response.status_code == 400
        assert "column b: " in response.json()["error"]
        assert "cast it" in response.json()["error"]


@pytest.mark.parametrize(
    ("path", "status", "text"),
    [
        ("/api/queries/top-haeds", 404, "Did you mean 'top-heads'"),
        ("/api/queries/top-heads?modle=x", 400, "Did you mean 'model'?"),
        ("/api/queries/top-heads?k=many", 422, "k: Input should be a valid integer"),
        ("/api/queries/prompt-story", 422, "prompt: Field required"),
        ("/api/tables/layer_scroes", 404, "Did you mean 'layer_scores'"),
        ("/api/tables/layer_scores?filter=lyer=1", 404, "Did you mean 'layer'?"),
        ("/api/tables/layer_scores?filter=layer~1", 400, "filter: expected COLUMN=VALUE"),
        ("/api/tables/layer_scores?filter=layer=one", 400, "Could not convert string 'one'"),
        ("/api/tables/layer_scores?sort=-", 404, "Unknown column ''"),
        ("/api/tables/runs?sort=tables", 400, "filters and orders by a list are not supported"),
        ("/api/tables/layer_scores?limit=0", 422, "limit"),
        ("/api/tables/layer_scores?limit=5&cursor=x", 400, "cursor: does not belong to this table and order"),
        ("/api/tables/layer_scores?cursor=x", 400, "cursor: needs a limit"),
        ("/api/sql?sql=SELECT+1;SELECT+2", 400, "one statement at a time"),
        ("/api/sql?sql=SELECT+nope", 400, "nope"),
        ("/api/nothing", 404, "Not Found"),
    ],
)
def test_what_is_wrong_is_said(client: httpx.Client, path: str, status: int, text: str) -> None:
    response = client.get(path)
    assert response.status_code == status
    assert text in response.json()["error"]


# Tables ----------------------------------------------------------------------------------------------------------


def test_a_table_is_read_page_by_page(client: httpx.Client, demo: Warehouse) -> None:
    path = "/api/tables/query_layer_scores"
    params = {"filter": ["model=smollm2-135m", "prompt_id<40", "score>=0"], "sort": "-score", "limit": 700}
    response = client.get(path, params=params)
    pages = [read(response)]
    while "next" in response.links:
        response = client.get(response.links["next"]["url"])
        pages.append(read(response))
    expected = demo.sql(
        "SELECT * FROM query_layer_scores WHERE model = 'smollm2-135m' AND prompt_id < 40 AND score >= 0 "
        "ORDER BY score DESC, prompt_id, activates, layer NULLS LAST, component"
    )
    assert len(pages) > 2
    assert pl.concat(pages).rows() == expected.rows()
    assert "x-kdb-cursor" not in response.headers


@pytest.mark.parametrize("format_", ["csv", "arrow", "parquet", "json"])
def test_a_table_without_a_limit_is_whole(client: httpx.Client, demo: Warehouse, format_: str) -> None:
    found = read(client.get("/api/tables/layer_scores", params={"format": format_}))
    assert found.sort(found.columns).rows() == demo.scan("layer_scores").collect().sort(found.columns).rows()


@pytest.fixture(scope="module")
def snapshot(demo: Warehouse) -> Iterator[Warehouse]:
    with demo.snapshot(demo.runs(), Limits(2**28, 1)) as frozen:
        yield frozen


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    table=st.sampled_from(["checks", "ablations", "neuron_tokens", "query_layer_scores", "models"]),
    limit=st.integers(1, 9),
    data=st.data(),
)
def test_pages_join_to_the_whole_order(snapshot: Warehouse, table: str, limit: int, data: st.DataObject) -> None:
    columns = [*PARTITIONS, *TABLES[table].columns.keys()]
    sort = data.draw(st.lists(st.sampled_from([*columns, *(f"-{name}" for name in columns)]), max_size=3))
    filters = ["rank_before<3", "k=10"] if table == "ablations" else []
    whole = Page.of(table, filters=filters, sort=sort, limit=10_000)
    expected = snapshot.opened.batches(whole.sql, whole.params).read_all().slice(0, 5 * limit).to_pylist()
    found, cursor = [], None
    for _ in range(5):
        page = Page.of(table, filters=filters, sort=sort, limit=limit, cursor=cursor)
        rows = snapshot.opened.batches(page.sql, page.params).read_all().to_pylist()
        found += rows[:limit]
        if len(rows) <= limit:
            break
        cursor = page.cursor(rows[limit - 1])
    assert found == expected


@given(st.text(max_size=40))
def test_a_forged_cursor_or_filter_is_refused_or_asks_for_nothing_else(text: str) -> None:
    for asked in ({"cursor": text}, {"filters": [text]}, {"sort": [text]}):
        try:
            page = Page.of("layer_scores", limit=5, **asked)
        except (QueryError, UnknownNameError):
            continue
        # What was given stands in the parameters and never in the SQL.
        assert page.sql.count("?") == len(page.params)
        assert "'" not in page.sql


# Pages of tables, rows and answers --------------------------------------------------------------------------------


def test_a_table_is_filtered_by_its_facets_and_its_rows_have_addresses(client: httpx.Client) -> None:
    page = html.unescape(client.get("/tables/layer_scores").text)
    (facet,) = re.findall(r'href="(/tables/layer_scores\?filter=component%3Dffn)"', page)
    filtered = html.unescape(client.get(facet).text)
    stored = client.get("/api/tables/layer_scores?filter=component=ffn&limit=1").json()[0]
    address = re.findall(r'href="(/rows/layer_scores\?[^"]*)"', filtered)[0]
    assert "component%3Dffn" in address
    row = html.unescape(client.get(address).text)
    for name in ("model", "run", "prompt_id", "layer"):
        assert re.search(rf">{name}</th><td>(<a [^>]*>)?{stored[name]}<", row)
    gone = client.get("/rows/layer_scores?filter=run%3Dnone", headers={"accept": "text/html"})
    assert gone.status_code == 400
    assert "There is no such row" in gone.text


def test_lists_of_numbers_are_counted_on_pages_not_printed() -> None:
    assert cell([0.5] * 576) == "[576 floats]"
    assert cell([1, 2]) == "[1, 2]"


def test_an_answer_is_a_file_at_the_address_of_its_page(client: httpx.Client) -> None:
    answered = client.get("/queries/top-heads.csv?category=capital&k=1", follow_redirects=True)
    assert answered.text == client.get("/api/queries/top-heads?category=capital&k=1&format=csv").text
    rows = client.get("/tables/models.json?filter=model%3Dgemma-3-270m", follow_redirects=True).json()
    assert {row["model"] for row in rows} == {"gemma-3-270m"}
    assert client.get("/queries/nothing.csv", follow_redirects=True).status_code == 404


def test_an_answer_is_filtered_and_ordered_by_its_address(client: httpx.Client) -> None:
    page = html.unescape(client.get("/queries/top-heads?k=2&filter=category%3Dcapital&sort=-score").text)
    rows = client.get("/api/queries/top-heads?k=2&category=capital").json()
    heads = re.findall(r">(a\d+\.\d+)</a></td>", page)
    assert heads == [row["head_name"] for row in sorted(rows, key=lambda row: -row["score"])]
    wrong = client.get("/queries/top-heads?filter=nothing%3D1").text
    assert "Unknown column" in html.unescape(wrong)
    refused = client.get("/api/queries/top-heads?filter=nothing%3D1")
    assert (refused.status_code, "Unknown column" in refused.text) == (404, True)


@pytest.mark.parametrize("format_", ["csv", "json", "parquet"])
def test_what_is_downloaded_of_an_answer_has_the_filters_and_the_order_of_its_page(
    client: httpx.Client, format_: str
) -> None:
    page = html.unescape(client.get("/queries/top-heads?k=2&filter=category%3Dcapital&sort=score").text)
    (address,) = re.findall(rf'href="(/api/queries/top-heads[^"]*format={format_})"', page)
    read = {"csv": pl.read_csv, "json": pl.read_json, "parquet": pl.read_parquet}[format_]
    rows = read(client.get(address).content)
    assert set(rows["category"]) == {"capital"}
    assert rows["score"].to_list() == rows["score"].sort().to_list()
    assert len(rows) == len(client.get("/api/queries/top-heads?k=2&category=capital").json())


def test_what_a_page_offers_to_copy_gives_the_same_answer(client: httpx.Client, demo: Warehouse) -> None:
    asked = {"category": ["capital"], "k": 2}
    command, python = ways_to_ask("top-heads", asked)
    assert command.text == "kdb query top-heads --category capital --k 2"
    assert python.text == 'kdb.open("WAREHOUSE").query("top-heads", category=[\'capital\'], k=2)'
    page = html.unescape(client.get("/queries/top-heads?category=capital&k=2").text)
    assert command.text in page
    assert "SET VARIABLE category = ['capital'];" in page
    assert len(demo.query("top-heads", **asked)) == len(client.get("/api/queries/top-heads", params=asked).json())


@pytest.mark.parametrize(
    ("wanted", "kinds"),
    [
        ("gemma", ["Models"]),
        ("capital", ["Categories"]),
        ("a12.2", ["Layers, heads and neurons"]),
        ("f11_441", ["Layers, heads and neurons"]),
        ("Paris", ["Prompts"]),
        ("top-heads", ["Saved queries"]),
    ],
)
def test_search_finds_what_has_a_name(client: httpx.Client, wanted: str, kinds: list[str]) -> None:
    page = client.get("/search", params={"q": wanted})
    found = re.findall(r"<h2>(.*?)</h2>", page.text)
    assert set(kinds) <= set(found)
    address = html.unescape(re.findall(r'<li><a href="([^"]+)"', page.text)[0])
    assert client.get(address).status_code == 200


def test_search_takes_any_text(client: httpx.Client) -> None:
    for wanted in ("", "'; DROP TABLE runs", "%", "<script>", "f99999999_1", "x" * 5000, "a1.1_99999999999"):
        page = client.get("/search", params={"q": wanted})
        assert page.status_code == 200
        assert "<script>alert" not in page.text


def test_the_log_has_requests_but_not_the_files_of_the_pages(server: Served, client: httpx.Client) -> None:
    client.get("/static/kdb.css")
    client.get("/static/missing.css")
    client.get("/healthz?after=static")
    server.line_with("after=static")
    assert not any("/static/kdb.css" in line for line in server.log)
    assert any("/static/missing.css" in line for line in server.log)


def test_a_labelled_text_has_the_verdict_of_each_layer(client: httpx.Client) -> None:
    sql = (
        "SELECT dataset, prompt_id, model, count(*) AS n FROM current.probe_predictions WHERE site = 'resid_post' "
        "GROUP BY ALL ORDER BY ALL LIMIT 1"
    )
    (tested,) = client.get("/api/sql", params={"sql": sql}).json()
    page = client.get("/prompt", params={"dataset": tested["dataset"], "prompt": tested["prompt_id"]}).text
    verdicts = page.partition(f"Verdicts of {tested['model']}")[2].partition("</table>")[0]
    assert verdicts.count("✓") + verdicts.count("✗") == tested["n"]


# Several datasets of facts ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def two_facts(tmp_path_factory: pytest.TempPathFactory) -> Iterator[httpx.Client]:
    """A server of two datasets with the same categories, one of them with too few prompts for intervals."""
    folder = tmp_path_factory.mktemp("two") / "w"
    models = [Model("tiny-a", "tiny", 10**8, 4, 2)]
    build(folder, models, [], prompts_per_category=12, top_k=10, more_facts={"relations": 4})
    with served("--warehouse", folder) as running, running.client() as opened:
        yield opened


def test_pages_show_datasets_apart_with_the_number_of_prompts(two_facts: httpx.Client) -> None:
    for path in ("/model?model=tiny-a", "/compare?model=tiny-a", "/head?layer=3&head=1"):
        page = two_facts.get(path).text
        assert ">knowledge</a>" in page
        assert ">relations</a>" in page
    assert "(n = " in two_facts.get("/compare?model=tiny-a").text
    assert MEANS in html.unescape(two_facts.get("/model?model=tiny-a").text)
    assert FEW in two_facts.get("/charts/top-heads?model=tiny-a").text, "some rows have no interval"


def test_prompts_of_one_number_in_two_datasets_are_not_one_page(two_facts: httpx.Client) -> None:
    refused = two_facts.get("/prompt?model=tiny-a&prompt=0", headers={"accept": "text/html"})
    assert refused.status_code == 400
    assert "Prompt 0 exists in several datasets: knowledge, relations." in html.unescape(refused.text)
    shown = two_facts.get("/prompt?model=tiny-a&prompt=0&dataset=relations")
    assert shown.status_code == 200
    assert ">relations</a>" in shown.text


def test_the_models_page_shows_effects_beside_scores(two_facts: httpx.Client) -> None:
    page = html.unescape(two_facts.get("/model?model=tiny-a").text)
    for figure in ("effect-map", "layer-effect-map", "score-vs-effect"):
        assert f"/charts/{figure}?" in page
        assert two_facts.get(f"/charts/{figure}?model=tiny-a").status_code == 200
    assert "/queries/head-effects?" in page


def test_pages_show_score_and_effect_side_by_side(two_facts: httpx.Client) -> None:
    head = html.unescape(two_facts.get("/head?layer=3&head=1&dataset=knowledge&category=capital").text)
    given = {"dataset": "knowledge", "category": "capital", "k": 1000}
    rows = two_facts.get("/api/queries/head-effects", params=given).json()
    (exact,) = (row["logp"] for row in rows if row["head_name"] == "a3.1")
    assert "<span>logp_exact</span></th>" in head
    assert f'<td class="number">{cell(exact, "logp")}</td>' in head
    assert "measured (exact), or estimated from a gradient (atp)" in head
    prompt = html.unescape(two_facts.get("/prompt?model=tiny-a&prompt=0&dataset=knowledge").text)
    for shown in (
        "<span>effect (exact)</span></th>",
        "<span>effect (atp)</span></th>",
        "/charts/lens-map?",
        "resid_mid",
    ):
        assert shown in prompt
    assert two_facts.get("/charts/lens-map?model=tiny-a&prompt=0&dataset=knowledge").status_code == 200
    neuron = re.search(r"f\d+_\d+", prompt)
    assert neuron is not None
    assert "Effect of replacing" not in two_facts.get(f"/neuron?neuron={neuron[0]}").text, "none was replaced"


def test_pages_of_an_older_warehouse_say_what_measures_effects(client: httpx.Client) -> None:
    if read(client.get("/api/queries/head-effects?format=csv")).height:
        pytest.skip("the demo has effects")
    (first,) = client.get("/api/queries/prompts?k=1").json()[:1]
    place = {"model": first["model"], "dataset": first["dataset"], "prompt": first["prompt_id"]}
    page = html.unescape(client.get("/prompt", params=place).text)
    assert EFFECTS in page
    assert READOUTS in page
    assert "/charts/lens-map" not in page
    assert EFFECTS in html.unescape(client.get("/head?layer=1&head=1").text)


def test_a_page_that_compares_has_each_datasets_five_best(two_facts: httpx.Client) -> None:
    page = two_facts.get("/compare", params={"model": "tiny-a", "category": "capital"}).text
    for dataset in ("knowledge", "relations"):
        given = {"dataset": dataset, "category": "capital", "k": 1}
        (best,) = two_facts.get("/api/queries/top-heads", params=given).json()
        row = re.search(
            rf">{dataset}</a></td><td class=\"tight\"><a href=[^>]*>capital</a></td><td class=\"tight\">1</td>.*a\d",
            page,
        )
        assert row is not None
        assert f"(n = {best['n_prompts']})" in page


def test_datasets_are_pooled_by_a_check_box_and_over_http(two_facts: httpx.Client) -> None:
    form = two_facts.get("/queries/top-heads").text
    assert re.search('<input type="checkbox" id="p-pool" name="pool" value="yes" ', form)
    assert "knowledge + relations" not in form
    pooled = two_facts.get("/queries/top-heads?pool=yes").text
    assert "knowledge + relations" in pooled
    assert re.search('name="pool" value="yes" checked', pooled)
    for value, expected in (("yes", {"knowledge + relations"}), ("no", {"knowledge", "relations"})):
        rows = two_facts.get("/api/queries/top-heads", params={"pool": value}).json()
        assert {row["dataset"] for row in rows} == expected
    chart = two_facts.get("/charts/top-heads?pool=yes").json()
    assert any("knowledge + relations" in line for line in chart["title"]["subtitle"])
    assert two_facts.get("/api/queries/top-heads?pool=maybe").status_code == 422


# Unchanged answers, new runs -------------------------------------------------------------------------------------


def test_an_unchanged_answer_is_not_sent_again(client: httpx.Client) -> None:
    for path in ("/", "/api/queries/runs", "/api/tables/checks", "/charts/top-heads"):
        etag = client.get(path).headers["etag"]
        again = client.get(path, headers={"if-none-match": f'"other", {etag}'})
        assert (again.status_code, again.content) == (304, b"")
        assert client.get(path, headers={"if-none-match": '"other"'}).status_code == 200
    assert client.get("/api/queries/runs").headers["etag"] != client.get("/api/queries/runs?format=csv").headers["etag"]


def test_a_new_run_appears_by_itself(
    warehouse: Path, run_kdb: Callable[..., Result], tiny_model: Path, tmp_path: Path
) -> None:
    other = tmp_path / "other.csv"
    other.write_text("text,label\n" + "\n".join(f"It rains{'!' if i % 2 else '.'},{i % 2}" for i in range(20)))
    with served("--warehouse", warehouse) as running, running.client() as asking:
        before = asking.get("/api/queries/runs")
        assert [row["dataset"] for row in before.json()] == ["weather"]
        result = run_kdb("ingest", "--model", tiny_model, "--dataset", other, "--warehouse", warehouse)
        assert result.exit_code == 0, result.output
        after = asking.get("/api/queries/runs", headers={"if-none-match": before.headers["etag"]})
        assert [row["dataset"] for row in after.json()] == ["weather", "other"]
        assert "other" in asking.get("/").text


def test_an_answer_is_forgotten_when_a_run_keeps_its_id_and_loses_rows(
    warehouse: Path, run_kdb: Callable[..., Result]
) -> None:
    text = "SELECT (SELECT count(*) FROM activations) AS vectors, (SELECT any_value(tables) FROM runs) AS tables"
    with served("--warehouse", warehouse) as running, running.client() as asking:
        before = asking.get("/api/sql", params={"sql": text})
        assert before.json()[0]["vectors"] > 0
        dropped = run_kdb("runs", "keep-vectors", "none", "--yes", "--warehouse", warehouse)
        assert dropped.exit_code == 0, dropped.output
        after = asking.get("/api/sql", params={"sql": text}, headers={"if-none-match": before.headers["etag"]})
        assert after.status_code == 200
        assert after.json()[0]["vectors"] == 0
        assert "activations" not in after.json()[0]["tables"]
        assert after.json() == kdb.open(warehouse).sql(text).to_dicts()


def test_an_empty_warehouse_says_how_to_fill_it(tmp_path: Path) -> None:
    Warehouse.create(tmp_path / "w")
    with served("--warehouse", tmp_path / "w") as running, running.client() as asking:
        assert "kdb ingest --model" in asking.get("/").text
        for path in ("/compare", "/prompt", "/queries/top-heads", "/sql?q=FROM+runs", "/schema"):
            assert asking.get(path).status_code == 200


# Limits ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "told"),
    [
        (BIG, "exceeds the memory limit of 256 MiB"),
        ("FROM range(1000001)", "more than 1,000,000 rows"),
        ("SELECT repeat('x', 3000) AS x FROM range(400000)", "more than 256 MiB"),
    ],
)
def test_an_answer_beyond_a_limit_is_refused_and_the_next_one_comes(client: httpx.Client, text: str, told: str) -> None:
    response = client.post("/api/sql", json={"sql": text})
    assert response.status_code == 400
    assert told in response.json()["error"]
    assert client.post("/api/sql", json={"sql": "SELECT 1 AS one"}).json() == [{"one": 1}]


def test_a_question_beyond_the_time_limit_is_refused_and_those_that_wait_are_bounded() -> None:
    with served("--demo", "--workers", "1", "--queue", "1", "--seconds", "8") as running, running.client() as asking:
        statuses: list[httpx.Response] = []

        def ask(number: int) -> None:
            statuses.append(running.client().post("/api/sql", json={"sql": f"{SLOW} -- {number}"}))

        threads = [threading.Thread(target=ask, args=[number]) for number in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert sorted(response.status_code for response in statuses) == [400, 400, 503, 503]
        refused = next(response for response in statuses if response.status_code == 400)
        assert "exceeds the time limit of 8 s" in refused.json()["error"]
        turned_away = next(response for response in statuses if response.status_code == 503)
        assert turned_away.headers["retry-after"] == "2"
        # Again while a worker that takes the place of another one is slower than a question may be.
        assert any(asking.get("/api/queries/runs").status_code == 200 for _ in range(20))
        assert "kdb_questions_turned_away_total 2.0" in asking.get("/metrics").text


def test_equal_questions_are_answered_once() -> None:
    text = "SELECT count(*) AS n FROM range(30000) a, range(30000) b WHERE a.range > b.range"
    with served("--demo", "--workers", "2", "--seconds", "3600") as running, running.client() as asking:
        answers: list[httpx.Response] = []
        ask = lambda: answers.append(running.client().post("/api/sql", json={"sql": text}))  # noqa: E731
        threads = [threading.Thread(target=ask) for _ in range(5)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert [answer.json() for answer in answers] == [[{"n": 449985000}]] * 5
        assert "kdb_answers_from_memory_total 4.0" in asking.get("/metrics").text


def test_a_question_ends_when_its_client_leaves() -> None:
    """Without this, the one worker would be busy for an hour, and the next client would give up."""
    with served("--demo", "--workers", "1", "--seconds", "3600") as running, running.client() as asking:
        with pytest.raises(httpx.ReadTimeout):
            httpx.post(f"{running.url}/api/sql", json={"sql": SLOW}, timeout=1)
        answered = asking.post("/api/sql", json={"sql": "SELECT 1 AS one"}, timeout=600)
        assert answered.json() == [{"one": 1}]


def test_a_download_ends_when_its_client_leaves() -> None:
    with served("--demo", "--workers", "1") as running, running.client() as asking:
        with asking.stream("GET", "/api/tables/probe_predictions?format=json") as response:
            next(response.iter_raw(100))
        assert asking.post("/api/sql", json={"sql": "SELECT 1 AS one"}).json() == [{"one": 1}]


def test_clients_that_read_nothing_lose_their_workers_before_others_are_turned_away() -> None:
    with served("--demo", "--workers", "2", "--seconds", "60") as running, contextlib.ExitStack() as held:
        before = psutil.Process(running.process.pid).memory_info().rss
        for name in ("probe_predictions?format=json", "probe_predictions?format=json&sort=layer"):
            stalled = held.enter_context(socket.socket())
            stalled.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            stalled.connect(running.address)
            stalled.sendall(f"GET /api/tables/{name} HTTP/1.1\r\nHost: {running.host}\r\n\r\n".encode())
        running.wait_until_busy(2)
        with running.client() as asking:
            assert asking.get("/api/sql", params={"sql": "SELECT 1 AS one"}).json() == [{"one": 1}]
        assert psutil.Process(running.process.pid).memory_info().rss - before < 2**26


def test_a_worker_that_dies_is_replaced() -> None:
    with served("--demo", "--workers", "1") as running, running.client() as asking:
        assert asking.get("/api/queries/runs").status_code == 200
        for forker in psutil.Process(running.process.pid).children():
            for child in forker.children():
                child.kill()
                child.wait()
        assert asking.get("/api/queries/runs").status_code == 200


# Who may ask -----------------------------------------------------------------------------------------------------


def test_another_address_needs_a_token(run_kdb: Callable[..., Result]) -> None:
    result = run_kdb("serve", "--demo", "--host", "0.0.0.0")
    assert result.exit_code == 2
    assert "--token" in result.stderr


def test_the_token_is_wanted_of_programs_and_browsers() -> None:
    with served("--demo", "--host", "0.0.0.0", KDB_TOKEN="se cret") as running, running.client() as asking:
        assert asking.get("/healthz").status_code == 200
        refused = asking.get("/api/queries")
        assert (refused.status_code, refused.headers["www-authenticate"]) == (401, "Bearer")
        for wrong in ("Bearer nope", "Basic se cret", "Bearer \xff"):
            assert asking.get("/metrics", headers={"authorization": wrong.encode("latin-1")}).status_code == 401
        assert asking.get("/api/queries", headers={"authorization": "Bearer se cret"}).status_code == 200
        page = asking.get("/", headers={"accept": "text/html"})
        assert (page.status_code, page.headers["location"]) == (303, "/login")
        assert asking.post("/login", data={"token": "nope"}).status_code == 401
        entered = asking.post("/login", data={"token": "se cret"})
        assert entered.status_code == 303
        assert {"HttpOnly", "SameSite=strict"} <= set(entered.headers["set-cookie"].split("; "))
        assert "se cret" not in entered.headers["set-cookie"]
        assert asking.get("/", headers={"accept": "text/html"}).status_code == 200
        asking.cookies.set("kdb_session", "0" * 64)
        assert asking.get("/api/queries").status_code == 401


@pytest.mark.parametrize(
    "host", ["evil.example", "evil.example:80", "127.0.0.1.evil.example", "[::1", "", "localhost@evil"]
)
def test_other_hosts_are_refused(client: httpx.Client, host: str) -> None:
    response = client.get("/api/queries", headers={"host": host})
    assert response.status_code == 400


def test_other_origins_are_refused(client: httpx.Client, server: Served) -> None:
    for origin in ("https://evil.example", "null", server.url.replace("http:", "https:"), f"{server.url}0"):
        response = client.post("/api/sql", json={"sql": "SELECT 1"}, headers={"origin": origin})
        assert response.status_code == 403
    assert client.post("/api/sql", json={"sql": "SELECT 1"}, headers={"origin": server.url}).status_code == 200


@pytest.mark.parametrize(
    "path", ["/", "/api/queries", "/static/kdb.js", "/nothing", "/api/sql?sql=DROP", "/static/../app.py"]
)
def test_every_answer_tells_browsers_what_they_may_do(client: httpx.Client, path: str) -> None:
    headers = client.get(path).headers
    policy = headers["content-security-policy"]
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy
    assert headers["x-content-type-options"] == "nosniff"
    assert "server" not in headers


def test_pages_hold_no_script_and_no_style_of_their_own(client: httpx.Client) -> None:
    for path in ("/", "/model?model=smollm2-135m", "/sql?q=FROM+prompts", "/queries/top-heads", "/nothing"):
        text = client.get(path, headers={"accept": "text/html"}).text
        assert "<script>" not in text
        assert "style=" not in text
        assert " onclick=" not in text


# How it is run ---------------------------------------------------------------------------------------------------


def test_health_metrics_and_log(server: Served, client: httpx.Client) -> None:
    assert client.get("/healthz").json()["status"] == "ok"
    assert client.get("/api/sql", params={"sql": "SELECT 'logged'"}).status_code == 200
    told = client.get("/metrics").text
    assert 'kdb_requests_total{method="GET",route="/api/sql",status="200"}' in told
    assert "kdb_request_seconds_bucket" in told
    entry = json.loads(server.line_with("logged"))
    assert (entry["method"], entry["path"], entry["status"], entry["client"]) == ("GET", "/api/sql", 200, "127.0.0.1")
    assert set(entry) == {"time", "client", "method", "path", "query", "status", "bytes", "seconds"}


@pytest.mark.parametrize("sign", [signal.SIGTERM, signal.SIGINT])
def test_it_stops_when_what_is_under_way_is_sent_and_leaves_nothing_behind(tmp_path: Path, sign: int) -> None:
    with served("--demo", TMPDIR=str(tmp_path)) as running:
        taken: list[httpx.Response] = []
        text = "SELECT count(*) AS n FROM range(20000) a, range(20000) b WHERE a.range > b.range"
        thread = threading.Thread(target=lambda: taken.append(running.client().post("/api/sql", json={"sql": text})))
        thread.start()
        running.wait_until_busy(1)
        assert any(tmp_path.iterdir())
        running.process.send_signal(sign)
        assert running.process.wait() == 0
        thread.join()
        assert taken[0].json() == [{"n": 199990000}]
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith("kdb")] == []


@pytest.mark.parametrize("args", [["--warehouse", "nowhere"], ["--port", "70000"], ["--workers", "0"]])
def test_a_wrong_option_is_one_message(run_kdb: Callable[..., Result], args: list[str]) -> None:
    result = run_kdb("serve", *args)
    assert result.exit_code == 2
    assert "Traceback" not in result.stderr


def test_a_port_that_is_taken_is_one_message(run_kdb: Callable[..., Result]) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        result = run_kdb("serve", "--demo", "--port", str(taken.getsockname()[1]))
    assert result.exit_code == 2
    assert "already in use" in result.stderr


def test_a_whole_table_takes_no_more_memory_than_a_page(server: Served, client: httpx.Client) -> None:
    def peak() -> int:
        processes = [psutil.Process(server.process.pid), *psutil.Process(server.process.pid).children(recursive=True)]
        return max(process.memory_info().rss for process in processes)

    client.get("/api/tables/probe_predictions?limit=10")
    before, sent = peak(), 0
    with client.stream("GET", "/api/tables/probe_predictions?format=json") as response:
        for chunk in response.iter_raw():
            sent += len(chunk)
    assert sent > 80 * 2**20
    assert peak() - before < sent / 2


# OpenAPI ---------------------------------------------------------------------------------------------------------


def test_the_description_names_every_saved_query_with_its_parameters(client: httpx.Client) -> None:
    paths = client.get("/api/openapi.json").json()["paths"]
    for saved in load_catalogue().values():
        told = paths[f"/api/queries/{saved.name}"]["get"]["parameters"]
        also = {"filter", "sort", "format"}
        assert {param["name"] for param in told} == {param.name for param in saved.params} | also
        assert {p["name"] for p in told if p["required"]} == {p.name for p in saved.params if p.required}


def test_no_described_request_is_a_fault_of_the_server(server: Served) -> None:
    schema = schemathesis.openapi.from_url(f"{server.url}/api/openapi.json")
    tried = 0
    for operation in schema.get_all_operations():
        strategy = operation.ok().as_strategy()

        @settings(
            max_examples=int(os.environ.get("KDB_EXAMPLES", "8")),
            deadline=None,
            database=None,
            suppress_health_check=list(HealthCheck),
        )
        @given(case=strategy)
        def ask(case: schemathesis.Case) -> None:
            nonlocal tried
            tried += 1
            response = case.call(timeout=600)
            case.validate_response(
                response, checks=[not_a_server_error, status_code_conformance, content_type_conformance]
            )
            assert response.status_code in {200, 400, 404, 422}, response.text

        ask()
    assert tried > 100


CURL = [
    line.strip()
    for page in ("README.md", "docs/serving.md")
    for line in (Path(__file__).parents[1] / page).read_text().splitlines()
    if line.startswith("    curl ")
]


@pytest.mark.skipif(shutil.which("curl") is None, reason="there is no curl")
@pytest.mark.parametrize("command", CURL)
def test_documented_request_is_answered(server: Served, tmp_path: Path, command: str) -> None:
    command = command.replace("http://127.0.0.1:8765", server.url).replace("curl", "curl --fail --silent --show-error")
    done = subprocess.run(["bash", "-c", command], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout or next(tmp_path.iterdir()).stat().st_size > 100
